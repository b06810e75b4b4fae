"""Runs an op on its compiled path and on its PyTorch path."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from elle_mp.ops import (
    activations,
    dropout,
    expanded_attention,
    library,
    linear_cross_entropy,
    native,
    norms,
    prompt_embedding,
)

USERS = (activations, dropout)
LEVELS = ("plain", "avx2", "avx512", "avx512_bf16")


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which implementation the test sees."""
    if request.param == "torch":
        for module in USERS:
            monkeypatch.setattr(module, "helpers", lambda name: None)
        for module in (expanded_attention, linear_cross_entropy, norms, prompt_embedding):
            monkeypatch.setattr(module, "_KERNELS", None)
    elif native.helpers("gelu") is None or expanded_attention._KERNELS is None:
        pytest.skip("the helpers and the ops are not built")
    return str(request.param)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An instruction level of this machine."""
    monkeypatch.delenv("ELLE_MP_INSTRUCTIONS", raising=False)
    best = library.instructions()
    if best is None or LEVELS.index(request.param) > LEVELS.index(best):
        pytest.skip(f"no {request.param} here")
    monkeypatch.setenv("ELLE_MP_INSTRUCTIONS", request.param)
    assert library.instructions() == request.param
    return str(request.param)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads for the ops, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
