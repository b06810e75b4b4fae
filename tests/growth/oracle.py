"""Growth written a second time, from growth.md's tables, with loops and without a line of elle_mp.growth.

For every parameter: which old entry each new entry copies, its scale ``s`` and the number of copies ``n`` (sections 1.1
and 1.3). It covers the floor map and the families' exact strategies for the residual axis (copy, or ``iso``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elle_mp.models.spec import ModelSpec

Index = npt.NDArray[np.int64]
Factor = npt.NDArray[np.float64]


def floor(old: int, new: int) -> list[int]:
    """Section 2's lemma: ``i -> floor(i N / N')``."""
    return [i * old // new for i in range(new)]


def copies(index: list[int]) -> list[int]:
    """How many entries copy what each entry copies."""
    return [index.count(unit) for unit in index]


@dataclass(frozen=True)
class Dimension:
    """A dimension's map and, per new entry, its number of copies and its scale."""

    index: Index
    n: Factor
    s: Factor


@dataclass(frozen=True)
class Growth:
    """Section 1's numbers between two specs."""

    old: ModelSpec
    new: ModelSpec
    iso: bool

    def query_head(self, head: int) -> int:
        """Section 1.2: ``m_q(i) = m_kv(i // g') g + ((i mod g') g) // g'``."""
        g, new_g = self.old.queries, self.new.queries
        group = floor(self.old.kv_groups, self.new.kv_groups)[head // new_g]
        return group * g + ((head % new_g) * g) // new_g

    def embed(self, role: str) -> Dimension:
        """The residual axis: ``rho``, ``alpha``, ``eta`` by role."""
        index = floor(self.old.embed, self.new.embed)
        c = np.array(copies(index), dtype=np.float64)
        rho = 1 / np.sqrt(c) if self.iso else np.ones_like(c)
        eta = np.sqrt(self.old.embed / self.new.embed) if self.iso else 1.0
        s = {
            "write": rho,
            "read": 1 / c,
            "gain": eta / rho,
            "bias": np.ones_like(c),
            "head gain": eta / rho / (c * rho),
            "head bias": 1 / (c * rho),
        }[role]
        return Dimension(np.array(index), c, s)

    def mlp(self, role: str, gated: bool) -> Dimension:
        """Inner units; of a gated MLP each unit has its gate and its up row."""
        units = floor(self.old.mlp, self.new.mlp)
        width = 2 if gated else 1
        index = [unit * width + k for unit in units for k in range(width)]
        c = np.array([count for count in copies(units) for _ in range(width)], dtype=np.float64)
        return Dimension(np.array(index), c, 1 / c if role == "read" else np.ones_like(c))

    def heads_read(self) -> Dimension:
        """Columns of the output projection: query heads."""
        k = self.new.head_dim
        heads = [self.query_head(head) for head in range(self.new.heads)]
        c = np.array([count for count in copies(heads) for _ in range(k)], dtype=np.float64)
        return Dimension(np.array([head * k + i for head in heads for i in range(k)]), c, 1 / c)

    def qkv_write(self) -> Dimension:
        """Rows of the stacked projection: in each group its queries, its key, its value."""
        k, g = self.new.head_dim, self.old.queries
        groups = floor(self.old.kv_groups, self.new.kv_groups)
        rows: list[int] = []
        for new_group, group in enumerate(groups):
            for query in range(self.new.queries):
                head = self.query_head(new_group * self.new.queries + query)
                assert head // g == group
                rows += [(group * (g + 2) + head % g) * k + i for i in range(k)]
            for slot in (g, g + 1):
                rows += [(group * (g + 2) + slot) * k + i for i in range(k)]
        c = np.array(copies(rows), dtype=np.float64)
        return Dimension(np.array(rows), c, np.ones_like(c))

    def same(self, size: int) -> Dimension:
        """A dimension that does not grow."""
        return Dimension(np.arange(size), np.ones(size), np.ones(size))

    def dimensions(self, name: str) -> list[Dimension]:
        """The table of section 1.2."""
        spec, last = self.new, name.split(".")[-1]
        if last in ("token_table", "position_table", "prompt_table"):
            sizes = {
                "token_table": [spec.padded_vocab],
                "position_table": [spec.positions],
                "prompt_table": [spec.domains, spec.prompt_tokens],
            }[last]
            return [self.same(size) for size in sizes] + [self.embed("write")]
        if last == "output_table":
            return [self.same(spec.padded_vocab), self.embed("read")]
        if last == "table_bias":
            return [self.same(spec.padded_vocab)]
        if last == "gate":
            return [self.same(1)]
        if "norm." in name:
            tied_head = name.startswith("head.") or (name.startswith("final_norm") and spec.tied)
            kind = "gain" if last == "weight" else "bias"
            return [self.embed(f"head {kind}" if tied_head else kind)]
        if name.startswith("head."):
            return [self.embed("write"), self.embed("read")][: 2 if last == "dense_weight" else 1]
        inner = self.qkv_write() if ".attention." in name else self.mlp("write", spec.gated_mlp)
        back = self.heads_read() if ".attention." in name else self.mlp("read", False)
        return {
            "qkv_weight": [inner, self.embed("read")],
            "qkv_bias": [inner],
            "in_weight": [inner, self.embed("read")],
            "in_bias": [inner],
            "out_weight": [self.embed("write"), back],
            "out_bias": [self.embed("write")],
        }[last]

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """``s`` and ``r = 1 / (n s)`` of every entry of the new parameter."""
        dims = self.dimensions(name)
        s, n = np.ones(()), np.ones(())
        for dim in dims:
            s, n = s[..., None] * dim.s, n[..., None] * dim.n
        return torch.from_numpy(s), torch.from_numpy(1 / (n * s))

    def copied(self, name: str, old: Tensor) -> Tensor:
        """``old`` at the entries that the new parameter's entries copy."""
        dims = self.dimensions(name)
        assert tuple(old.shape) == tuple(int(dim.index.max()) + 1 for dim in dims), name
        return old[np.ix_(*(dim.index for dim in dims))]

    def weight(self, name: str, old: Tensor) -> Tensor:
        """``s P[m]``."""
        return self.copied(name, old) * self.factors(name)[0].to(old.dtype)

    def gradient(self, name: str, old: Tensor, degree: int = 1) -> Tensor:
        """``r^degree G[m]``: gradients and first moments (1), second moments (2)."""
        return self.copied(name, old) * self.factors(name)[1].to(old.dtype) ** degree
