"""The CUDA kernels of the fused norms, on the emulator, against their formulas in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from elle_mp.ops.library import compiled_ops
from tests.cuda.norm_cases import CASES, NormCase, name_of, run_and_check

pytestmark = pytest.mark.skipif(compiled_ops("add_norm") is None, reason="the ops are not built, or older")


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_both_directions_equal_the_formulas(emulated: Any, case: NormCase, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for order in ("forward", "reverse", "3"):
        monkeypatch.setenv("ELLE_MP_EMULATED_ORDER", order)
        results.append(run_and_check(emulated, case))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_what_does_not_fit_is_refused(emulated: Any) -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(8)
    with pytest.raises(RuntimeError, match="weight does not fit"):
        emulated.add_norm(x, None, weight[:4], None, None, None, 0, 0, 1e-5, True)
    with pytest.raises(RuntimeError, match="dropout wants keys"):
        emulated.add_norm(x, None, weight, None, None, None, 0, 100, 1e-5, True)
    with pytest.raises(RuntimeError, match="keys do not fit"):
        emulated.add_norm(x, None, weight, None, None, torch.zeros(4, dtype=torch.int64), 0, 100, 1e-5, True)
    with pytest.raises(RuntimeError, match="residual does not fit"):
        emulated.add_norm(x, x[:1].contiguous(), weight, None, None, None, 0, 0, 1e-5, True)
