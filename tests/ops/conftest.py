"""Runs an op on its compiled path and on its PyTorch path."""

from __future__ import annotations

import pytest

from elle_mp.ops import activations, dropout, expanded_attention, linear_cross_entropy, native

USERS = (activations, dropout, linear_cross_entropy)


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which implementation the test sees."""
    if request.param == "torch":
        for module in USERS:
            monkeypatch.setattr(module, "helpers", lambda name: None)
        monkeypatch.setattr(expanded_attention, "_KERNELS", None)
    elif native.helpers("gelu") is None or expanded_attention._KERNELS is None:
        pytest.skip("the helpers and the ops are not built")
    return str(request.param)
