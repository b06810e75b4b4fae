"""Norms against torch's: plain, with weighted statistics, and with the residual sum in front."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_mp.ops import norms
from elle_mp.profiling.entry import Case, Entry, Run, differentiated, normal, seeded

EPS = 1e-5


def layer_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    """LayerNorm of ``[B, S, D]``."""
    inputs, gradient = _inputs(shape, dtype, device, 2)
    width = shape[-1:]
    peers = {"F.layer_norm": differentiated(lambda x, w, b: F.layer_norm(x, width, w, b, EPS), inputs, (gradient,))}
    if find_spec("apex") is not None and device.type == "cuda":
        peers["apex"] = _apex("FusedLayerNormAffineFunction", inputs, gradient, width)
    run = differentiated(lambda x, w, b: norms.layer_norm(x, w, b, EPS), inputs, (gradient,))
    return _case(run, peers, gradient, tensors=(2, 5))


def rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    """RMSNorm of ``[B, S, D]``."""
    inputs, gradient = _inputs(shape, dtype, device, 1)
    width = shape[-1:]
    peers = {"F.rms_norm": differentiated(lambda x, w: F.rms_norm(x, width, w, EPS), inputs, (gradient,))}
    if find_spec("liger_kernel") is not None and device.type == "cuda":
        peers["Liger"] = _liger(inputs, gradient)
    return _case(
        differentiated(lambda x, w: norms.rms_norm(x, w, EPS), inputs, (gradient,)), peers, gradient, tensors=(2, 5)
    )


def weighted_layer_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    """The residual sum and the count-weighted LayerNorm in one pass; torch has plain statistics to compare with."""
    (x, *gains), gradient = _inputs(shape, dtype, device, 2)
    residual, other = normal(seeded(), shape, dtype, device).flip(0), gradient.flip(0)
    width, size = shape[-1:], shape[-1]
    weights = torch.rand(size, generator=seeded(), dtype=torch.float64).to(device) + 0.5
    weights = weights / weights.sum()
    inputs, gradients = (x, residual, *gains), (gradient, other)
    op: Callable[..., tuple[Tensor, ...]] = norms.weighted_layer_norm
    reference: Callable[..., tuple[Tensor, ...]] = norms.weighted_layer_norm_reference

    def plain(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.layer_norm(total, width, w, b, EPS), total

    return _case(
        differentiated(lambda *four: op(*four, EPS, weights), inputs, gradients),
        {"reference": differentiated(lambda *four: reference(*four, EPS, weights), inputs, gradients)},
        gradient,
        tensors=(4, 8),
        yardsticks={"add, F.layer_norm": differentiated(plain, inputs, gradients)},
    )


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, gains: int
) -> tuple[tuple[Tensor, ...], Tensor]:
    generator = seeded()
    x, gradient = (normal(generator, shape, dtype, device) for _ in range(2))
    return (x, *(1 + 0.1 * normal(generator, shape[-1:], dtype, device) for _ in range(gains))), gradient


def _case(
    ours: Run,
    peers: dict[str, Run],
    like: Tensor,
    tensors: tuple[int, int],
    yardsticks: dict[str, Run] | None = None,
) -> Case:
    """``tensors``: how many of the size of the hidden states are read and written, forward, and with backward."""
    size = float(like.numel() * like.element_size())
    return Case(ours, peers, (tensors[0] * size, tensors[1] * size), yardsticks=yardsticks or {})


def _apex(name: str, inputs: tuple[Tensor, ...], gradient: Tensor, width: tuple[int, ...]) -> Run:
    from apex.normalization import fused_layer_norm

    function = getattr(fused_layer_norm, name)
    return differentiated(lambda x, w, b: function.apply(x, w, b, width, EPS), inputs, (gradient,))


def _liger(inputs: tuple[Tensor, ...], gradient: Tensor) -> Run:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return differentiated(lambda x, w: LigerRMSNormFunction.apply(x, w, EPS), inputs, (gradient,))


SHAPES = ((1, 512, 768), (4, 512, 768), (8, 2048, 1024))
DIMS = "BxSxD: sequences, positions, width"
ENTRIES = (
    Entry("layer_norm", DIMS, SHAPES, layer_norm),
    Entry("weighted_layer_norm", DIMS, SHAPES, weighted_layer_norm),
    Entry("rms_norm", DIMS, SHAPES, rms_norm),
)
