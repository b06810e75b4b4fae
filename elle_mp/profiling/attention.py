"""Attention against SDPA: dense causal sequences, and packed documents, for which SDPA gets the mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_mp.ops.expanded_attention import expanded_attention, expanded_attention_reference
from elle_mp.profiling.entry import Case, Entry, Run, differentiated, normal, seeded

MEAN_DOCUMENT = 128
PROMPT = 16
BACKWARD = 2.5
"""Operations of the backward pass in those of the forward pass: five products instead of two."""
REFERENCE_SCORES = 1 << 24
"""Scores up to which the reference, which holds them all in fp32, is timed too."""


def causal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    """Dense causal sequences ``[B, S, H, D]``."""
    return _case(shape, dtype, device, None)


def packed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    """The same with documents of mean length 128 behind a prompt of 16 tokens."""
    batch, length = shape[:2]
    prompt = min(PROMPT, length - 1)
    place = torch.arange(length)
    begins = torch.rand(batch, length, generator=seeded()) < 1 / MEAN_DOCUMENT
    begins[:, :prompt], begins[:, prompt] = False, True
    return _case(shape, dtype, device, torch.where(begins, place, 0).cummax(1).values)


def _case(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, starts: Tensor | None) -> Case:
    batch, length, heads, size = shape
    generator = seeded()
    q, k, v, gradient = (normal(generator, shape, dtype, device) for _ in range(4))
    prompt = min(PROMPT, length - 1)
    place = torch.arange(length)
    seen = (place <= place[:, None]).expand(batch, -1, -1)
    mask = None
    if starts is not None:
        seen = seen & ((starts[:, None] == starts[:, :, None]) | (place < prompt))
        mask = seen[:, None].to(device)
        starts = starts.to(device)

    def ours(*inputs: Tensor) -> Tensor:
        return expanded_attention(*inputs, causal=True, doc_starts=starts, prompt_length=prompt)[0]

    def reference(*inputs: Tensor) -> Tensor:
        return expanded_attention_reference(*inputs, causal=True, doc_starts=starts, prompt_length=prompt)[0]

    inputs = (q, k, v)
    peers: dict[str, Run] = {"SDPA": _sdpa(inputs, gradient, mask)}
    if batch * heads * length * length <= REFERENCE_SCORES:
        peers["reference"] = differentiated(reference, inputs, (gradient,))
    operations = 4.0 * size * heads * int(seen.sum())
    tensor = float(q.numel() * q.element_size())
    return Case(
        differentiated(ours, inputs, (gradient,)),
        peers,
        moved=(4 * tensor, 12 * tensor),
        operations=(operations, (1 + BACKWARD) * operations),
    )


def _sdpa(inputs: tuple[Tensor, ...], gradient: Tensor, mask: Tensor | None) -> Run:
    """SDPA on tensors laid out as it likes them; its results as ours are."""
    own = [x.transpose(1, 2).contiguous() for x in inputs]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

    run = differentiated(attend, own, (gradient.transpose(1, 2).contiguous(),))
    return lambda backward: tuple(x.transpose(1, 2) for x in run(backward))


SHAPES = ((1, 256, 12, 64), (4, 512, 12, 64), (4, 2048, 12, 64))
DIMS = "BxSxHxD: sequences, positions, heads, size of a head"
ENTRIES = (
    Entry("expanded_attention", DIMS, SHAPES, causal),
    Entry("expanded_attention_packed", DIMS, SHAPES, packed),
)
