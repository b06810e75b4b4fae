"""``parallel.apex``: apex's kernels in the place of torch's, or one line that says why not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from elle_mp.config_file import parse_config
from elle_mp.errors import UserError
from elle_mp.models.transformer import Transformer
from elle_mp.ops import apex
from elle_mp.train.apex import ApexAdamW, check_apex
from elle_mp.train.optimizer import ShardedAdamW
from tests.tiny import grid, model_of, optimizer_of, spec_of, train

PACKAGE = {
    "apex/__init__.py": "",
    "apex/multi_tensor_apply/__init__.py": """
def multi_tensor_applier(op, overflow, lists, *args):
    return op(65536, overflow, lists, *args)
""",
    "apex/normalization/__init__.py": "",
    # What the kernels are documented to compute, on any device, and how often they did.
    "apex/normalization/fused_layer_norm.py": """
import torch
calls = []

def fused_layer_norm_affine(x, weight, bias, shape, eps):
    calls.append("layer")
    assert x.dtype == weight.dtype == bias.dtype
    return torch.nn.functional.layer_norm(x, shape, weight, bias, eps)

def fused_rms_norm_affine(x, weight, shape, eps):
    calls.append("rms")
    assert x.dtype == weight.dtype
    return torch.nn.functional.rms_norm(x, shape, weight, eps)
""",
    "amp_C.py": """
calls = []

def multi_tensor_adam(chunk, overflow, lists, lr, beta1, beta2, eps, step, mode, correct, decay):
    calls.append(step)
    assert mode == 1 and correct == 1 and overflow.numel() == 1
    for g, p, m, v in zip(*lists, strict=True):
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        p.sub_(lr * (update + decay * p))
""",
    "fused_layer_norm_cuda.py": "",
}


@pytest.fixture()
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that packages are imported from first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "amp_C", "fused_layer_norm_cuda")]:
        del sys.modules[name]


def install(site: Path, *left_out: str) -> None:
    for name, text in PACKAGE.items():
        if name not in left_out:
            path = site / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def trained(family: str, with_apex: bool) -> tuple[Transformer, ShardedAdamW]:
    """A small model after some steps, some of whose parameters have had fewer updates than others."""
    model = model_of(spec_of(family), grid(apex=with_apex))
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    optimizer.moments["layers.1.mlp.in_weight"].step.zero_()  # as a growth in depth leaves a layer
    train(model, optimizer, 3, seed=7)
    return model, optimizer


@pytest.mark.parametrize("family", ["bert", "gpt", "llama"])
def test_a_model_trains_as_under_torch(family: str, site: Path) -> None:
    install(site)
    (ours, state), (wanted, _) = trained(family, True), trained(family, False)
    assert isinstance(state.inner, ApexAdamW)
    for name, weight in wanted.named_parameters():
        got: Tensor = ours.get_parameter(name)
        torch.testing.assert_close(got, weight, rtol=1e-9, atol=1e-12, msg=name)
    steps, norms = sys.modules["amp_C"].calls, sys.modules["apex.normalization.fused_layer_norm"].calls
    assert set(steps) == {1, 2, 3, 4, 5}  # a launch for each number of updates
    assert set(norms) == {"rms" if family == "llama" else "layer"}
    assert float(state.moments["layers.1.mlp.in_weight"].step) == 3
    assert float(state.moments["layers.0.mlp.in_weight"].step) == 5


def test_what_is_missing_is_said_in_one_line(site: Path) -> None:
    cases = (
        (("apex/multi_tensor_apply/__init__.py", "apex/normalization/fused_layer_norm.py"), "an unrelated package"),
        (("amp_C.py",), "without its CUDA kernels"),
    )
    for left_out, words in cases:
        folder = site / words.split()[-1]
        folder.mkdir()
        install(folder, *left_out)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(folder))
            with pytest.raises(UserError, match=f"^parallel.apex=true, but apex is .*{words}.*; build "):
                apex.load_apex()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
def test_a_run_without_gpus_is_refused(site: Path) -> None:
    tree = {"model": {"layers": 1, "heads": 1, "head_dim": 8, "seq_len": 8}}
    stream = [{"domain": "a", "data": "a", "steps": 1}, {"domain": "b", "data": "b", "steps": 1}]
    check_apex(parse_config(tree | {"stream": stream}))
    stream[1]["parallel"] = {"apex": True}
    install(site)
    with pytest.raises(UserError, match="no GPU is visible"):
        check_apex(parse_config(tree | {"stream": stream}))
