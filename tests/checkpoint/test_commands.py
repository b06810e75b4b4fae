"""``elle-mp checkpoint``: what it tells, that it finds damage, and that the one file holds the same numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from elle_mp.checkpoint.consolidate import consolidate
from elle_mp.checkpoint.store import CheckpointStore
from elle_mp.checkpoint.stream_reader import StoredTensors
from elle_mp.cli import main as program
from elle_mp.config import GrowthConfig, grown
from elle_mp.errors import UserError
from elle_mp.growth.plan import make_plan
from elle_mp.stream.state import RunState
from tests import tiny

VALUES = {
    "model.table": torch.arange(24.0).view(6, 4),
    "model.layers.0.bias": torch.arange(3.0).bfloat16(),
    "model.norm_stats": torch.linspace(0, 1, 5, dtype=torch.float64),
    "optim.table.step": torch.tensor(7.0),
    "optim.table.exp_avg": torch.arange(24.0).view(6, 4) / 7,
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with two checkpoints, the latest after a growth."""
    config = tiny.config_of("gpt")
    spec = tiny.spec_of("gpt")
    larger = grown(config.model, tiny.GrowConfig(layers=3, mlp=80))
    plan = make_plan(spec, larger, GrowthConfig(), 1)
    state = RunState(stage=1, phase="train", step=3, global_step=12, tokens=3400, lineage=[plan.to_json()])
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.save("stage-0-a", VALUES, {"state": RunState().to_json(), "model": spec.to_json()}, permanent=True)
    meta = {"state": state.to_json(), "model": replace(spec, layers=3, mlp=80).to_json(), "layout": {"tp": 2, "pp": 1}}
    store.save("step-12", VALUES, meta)
    return tmp_path / "run"


def _run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as end:
        program.main(["checkpoint", *(str(item) for item in arguments)])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def test_info(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "info", run_dir)
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0
    assert lines["checkpoint"] == str(run_dir / "checkpoints" / "step-12")
    assert lines["step"] == "12 of the run, 3,400 tokens" and lines["position"] == "stage 1, train, step 3"
    assert lines["model"].startswith("gpt: layers 3, heads 4,") and "mlp 80" in lines["model"]
    assert lines["parameters"] == str(24 + 3 + 5)
    assert lines["tensors"] == f"5, {96 + 6 + 40 + 4 + 96} bytes, bfloat16, float32, float64"
    assert out.splitlines()[-2] == "written by  1 rank, tp 2"
    assert lines["grown"] == "layers 2 to 3, mlp 40 to 80 (width replicate, depth zero_out, exact)"
    code, out, _ = _run(capsys, "info", run_dir / "checkpoints" / "stage-0-a")
    assert code == 0 and out.splitlines()[0].endswith("stage-0-a (permanent)") and "grown" not in out


def test_info_for_programs(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, "info", run_dir, "--json")
    about = json.loads(out)
    assert code == 0 and about["name"] == "step-12" and about["ranks"] == 1 and about["state"]["tokens"] == 3400
    assert about["tensors"]["model.layers.0.bias"] == {"shape": [3], "dtype": "bfloat16", "bytes": 6}
    assert about["bytes"] == sum(value.nbytes for value in VALUES.values())
    assert about["lineage"][0]["from"]["layers"] == 2 and about["lineage"][0]["to"]["layers"] == 3
    for name, entry in about["files"].items():
        assert (run_dir / "checkpoints" / "step-12" / name).stat().st_size == entry["size"]


def test_verify(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, "verify", run_dir)
    assert code == 0 and "5 tensors" in out and "all as written" in out and err == ""
    path = next((run_dir / "checkpoints" / "step-12").glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, out, err = _run(capsys, "verify", path.parent)
    assert code == 2 and out == "" and str(path) in err and err.count("\n") == 1
    code, _, err = _run(capsys, "consolidate", run_dir, run_dir / "out.safetensors")
    assert code == 2 and str(path) in err and not (run_dir / "out.safetensors").exists()
    path.unlink()
    code, _, err = _run(capsys, "verify", path.parent)
    assert code == 2 and f"{path} is missing" in err
    assert _run(capsys, "verify", run_dir / "checkpoints" / "stage-0-a")[0] == 0
    (path.parent / "meta.json").unlink()
    for command in ("verify", "info"):
        code, _, err = _run(capsys, command, path.parent)
        assert code == 2 and "meta.json is missing" in err and err.count("\n") == 1


@pytest.mark.parametrize("optimizer", [False, True])
def test_consolidate(run_dir: Path, capsys: pytest.CaptureFixture[str], optimizer: bool) -> None:
    out = run_dir / "new" / "model.safetensors"
    options = ["--optimizer"] if optimizer else []
    code, text, _ = _run(capsys, "consolidate", run_dir, out, *options)
    expected = {name: value for name, value in VALUES.items() if optimizer or name.startswith("model.")}
    assert code == 0 and f"{len(expected)} tensors" in text
    loaded = load_file(out)
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), name
    with safe_open(out, "pt") as file:
        about = file.metadata()
    assert about["elle_mp.global_step"] == "12" and json.loads(about["elle_mp.model"])["layers"] == 3
    assert list(out.parent.iterdir()) == [out]
    code, _, err = _run(capsys, "consolidate", run_dir, out)
    assert code == 2 and "is there already" in err
    code, _, err = _run(capsys, "consolidate", run_dir, out.parent)
    assert code == 2 and "is a folder; give a file" in err


def test_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for path, message in ((tmp_path / "no", "no checkpoint; give a run"), (tmp_path / "run", "no complete checkpoint")):
        for command in (["info", path], ["verify", path], ["consolidate", path, tmp_path / "out"]):
            code, _, err = _run(capsys, *command)
            assert code == 2 and message in err and err.count("\n") == 1
    CheckpointStore(tmp_path / "run" / "checkpoints").save("a", {"model.w": torch.zeros(2, dtype=torch.complex128)}, {})
    code, out, _ = _run(capsys, "info", tmp_path / "run")  # nobody's meta is needed
    assert code == 0 and "complex128" in out
    code, _, err = _run(capsys, "consolidate", tmp_path / "run", tmp_path / "out")
    assert code == 2 and "tensor model.w is torch.complex128" in err
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


CONSOLIDATE = """
import sys
from pathlib import Path
from elle_mp.checkpoint.consolidate import consolidate
from elle_mp.checkpoint.stream_reader import StoredTensors

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

stored, written = StoredTensors(Path(sys.argv[1])), []
before = status("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
consolidate(stored, Path(sys.argv[2]), False, written.append)
print((status("VmHWM:") - before) // 1024, sum(written))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_consolidating_takes_the_memory_of_blocks(tmp_path: Path) -> None:
    """In a process of its own: what others have left in the heap decides how large holes grow."""
    store = CheckpointStore(tmp_path)
    size = (256, 1 << 18)  # 256 MiB
    make = lambda name, bounds: torch.full([high - low for low, high in bounds], 1.5)  # noqa: E731
    store.save_streamed("a", {"model.w": (size, torch.float32)}, make, {})
    call = [sys.executable, "-c", CONSOLIDATE, str(tmp_path / "a"), str(tmp_path / "out")]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=True)
    taken, written = map(int, done.stdout.split())
    assert taken < 100
    assert written == 256 << 20
    with safe_open(tmp_path / "out", "pt") as file:
        assert (file.get_slice("model.w")[-1] == 1.5).all()


def test_a_disk_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path / "c")
    store.save("a", {"model.w": torch.ones(100)}, {})

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UserError, match=r"cannot write .*out: No space left on device"):
        consolidate(StoredTensors(tmp_path / "c" / "a"), tmp_path / "out", False)
    assert {path.name for path in tmp_path.iterdir()} == {"c"}


def test_help_answers_without_torch() -> None:
    code = (
        "import sys\nfrom elle_mp.cli.main import main\n"
        "try:\n    main(['checkpoint', *sys.argv[1:], '--help'])\n"
        "except SystemExit as end:\n    sys.exit('imported torch' if 'torch' in sys.modules else end.code)"
    )
    for command in ([], ["info"], ["verify"], ["consolidate"]):
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
