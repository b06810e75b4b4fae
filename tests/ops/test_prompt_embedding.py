"""Prompts, tokens and positions in one op, against lookups, sums, norm and dropout one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from elle_mp.ops.dropout import DropoutKey, threshold
from elle_mp.ops.prompt_embedding import Gain, has_kernel, prompt_embedding, prompt_embedding_reference

EPS = 1e-5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.5e-2}
VOCABULARY, DOMAINS, POSITIONS = 300, 3, 120
NAMES = ("out", "table", "prompt_table", "position_table", "weight", "bias")

needs_kernels = pytest.mark.skipif(not has_kernel(torch.empty(0)), reason="the ops are not built")


@dataclass(frozen=True)
class Case:
    """Sizes and options of one call."""

    batch: int
    columns: int
    runs: tuple[range, ...]
    prompt: int = 0
    positions: bool = True
    norm: str = ""
    """``""`` (none), ``plain`` or ``weighted``."""
    p: float = 0.0
    strided: bool = False

    def ids(self) -> Tensor:
        """Some ids are frequent, some do not occur, some are not in the table."""
        text = sum(max(0, run.stop - max(run.start, self.prompt)) for run in self.runs)
        ids = torch.randint(0, VOCABULARY - 10, (self.batch, text)) // torch.randint(1, 9, (self.batch, text))
        return ids.where(torch.rand(ids.shape) > 0.05, VOCABULARY + 5)

    def run(self, dtype: torch.dtype, reference: bool = False) -> list[Tensor | None]:
        """The result and the gradients of everything that there is."""
        torch.manual_seed(0)
        shapes = (VOCABULARY,), (DOMAINS, self.prompt), (POSITIONS,), (), ()
        tensors = [torch.randn(*shape, self.columns).bfloat16().to(dtype) for shape in shapes]
        ids, dy = self.ids(), torch.randn(self.batch, sum(map(len, self.runs)), self.columns).bfloat16().to(dtype)
        if self.strided:
            tensors[:3] = [torch.cat((x, x), -1)[..., : self.columns] for x in tensors[:3]]
            dy = torch.cat((dy, dy), 1)[:, : dy.shape[1]]
        there = (True, self.prompt > 0, self.positions, bool(self.norm), bool(self.norm))
        leaves = [x.requires_grad_() if here else None for x, here in zip(tensors, there, strict=True)]
        table, prompt_table, position_table, weight, bias = leaves
        w = torch.arange(1.0, self.columns + 1.0, dtype=torch.float64)
        norm: Gain | None = None
        if weight is not None and bias is not None:
            norm = (weight, bias, EPS, w / w.sum() if self.norm == "weighted" else None)
        options: dict[str, Any] = {"prompt_table": prompt_table, "position_table": position_table, "norm": norm}
        if prompt_table is not None:
            options["domains"] = torch.arange(self.batch) % DOMAINS
        options |= {"p": self.p, "key": DropoutKey(7, torch.arange(self.batch) * 3 + 1)}
        assert table is not None
        out = (prompt_embedding_reference if reference else prompt_embedding)(table, ids, self.runs, **options)
        found = torch.autograd.grad(out, [x for x in leaves if x is not None], dy)
        gradients = iter(found)
        return [out.detach(), *(None if x is None else next(gradients) for x in leaves)]


CASES = [
    Case(3, 48, (range(70),), prompt=16, norm="weighted", p=0.2),
    Case(2, 33, (range(20),), prompt=5, norm="plain", p=0.1),
    Case(2, 33, (range(10), range(40, 50)), prompt=8, p=0.1),
    Case(4, 17, (range(64),), prompt=64, norm="plain"),
    Case(2, 20, (range(3),), prompt=64, p=0.3),
    Case(2, 20, (range(70, 80), range(100, 110)), prompt=64, norm="plain", p=0.3),
    Case(1, 2, (range(1),), norm="plain"),
    Case(2, 1, (range(9),), prompt=4, p=0.2),
    Case(1, 7, (range(1),), positions=False),
    Case(0, 12, (range(9),), prompt=2, norm="plain", p=0.2),
    Case(3, 12, (range(5, 5),), norm="plain"),
    Case(2, 70, (range(100),), positions=False, prompt=3, strided=True, p=0.1),
    Case(5, 129, (range(31),), norm="weighted", strided=True),
]


def check(case: Case, dtype: torch.dtype) -> None:
    """Against the reference in fp64; largest difference over the largest entry."""
    for name, value, exact in zip(NAMES, case.run(dtype), case.run(torch.float64, reference=True), strict=True):
        assert (value is None) == (exact is None)
        if value is None or exact is None:
            continue
        assert value.dtype == dtype and value.shape == exact.shape
        if exact.numel():
            assert (value.double() - exact).abs().max() < TOLERANCE[dtype] * exact.abs().max().clamp(min=0.1), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_result_and_gradients(level: str, dtype: torch.dtype, case: Case) -> None:
    check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_kernels(path: str, dtype: torch.dtype) -> None:
    """Not in bf16, in which PyTorch sums the gradients of gains."""
    for case in CASES:
        check(case, dtype)


@needs_kernels
@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    batch, length, columns, prompt = (int(torch.randint(1, n, (), generator=draw)) for n in (5, POSITIONS, 150, 70))
    norm = ("", "plain", "weighted")[seed % 3]
    case = Case(batch, columns, (range(length),), prompt * (seed % 2), seed % 4 > 0, norm, 0.1 * (seed % 3))
    check(case, (torch.float32, torch.bfloat16)[seed // 2 % 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_one_op_is_the_others_bit_for_bit(level: str, dtype: torch.dtype, case: Case) -> None:
    """The result, and the gradients of what no other sum is made for: tokens and gains."""
    found, expected = case.run(dtype), case.run(dtype, reference=True)
    for number in (0, 1, 4, 5):
        one, other = found[number], expected[number]
        assert one is other is None or (one is not None and other is not None and torch.equal(one, other))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_bitwise_repeatable_and_independent_of_threads(two_threads: None, dtype: torch.dtype) -> None:
    case = Case(4, 80, (range(110),), prompt=7, norm="weighted", p=0.1)
    first = case.run(dtype)
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        again = case.run(dtype)
        assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_frequent_rows_lose_nothing_in_bf16(path: str) -> None:
    """Tokens and, with the kernel, positions and prompts too: summed in bf16 they stop at 256."""
    tables = [torch.zeros(*shape, 8, dtype=torch.bfloat16).requires_grad_() for shape in ((3,), (2, 1), (4,))]
    out = prompt_embedding(
        tables[0],
        torch.ones(2048, 2, dtype=torch.int64),
        (range(3),),
        prompt_table=tables[1],
        position_table=tables[2],
        domains=torch.zeros(2048, dtype=torch.int64),
    )
    token, prompt, position = torch.autograd.grad(out, tables, torch.ones_like(out))
    assert token[:, 0].tolist() == [0, 4096, 0]
    if path == "compiled":
        assert prompt[:, 0, 0].tolist() == [2048, 0] and position[:, 0].tolist() == [2048, 2048, 2048, 0]


def test_what_does_not_fit_is_refused(path: str) -> None:
    table, prompts = torch.zeros(9, 4), torch.zeros(2, 3, 4)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="for 6 positions"):
        prompt_embedding(table, ids, (range(6),))
    with pytest.raises(ValueError, match="for 3 positions"):
        prompt_embedding(table, ids, (range(6),), prompt_table=prompts, domains=torch.zeros(2, dtype=torch.int64))
    with pytest.raises((IndexError, RuntimeError)):
        prompt_embedding(table, ids, (range(5),), position_table=torch.zeros(4, 4))
    with pytest.raises((IndexError, RuntimeError)):
        prompt_embedding(table, ids, (range(8),), prompt_table=prompts, domains=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="dropout"):
        prompt_embedding(table, ids, (range(5),), p=0.1, key=DropoutKey(1, torch.arange(3)))


@needs_kernels
def test_opcheck() -> None:
    ops = torch.ops.elle_mp
    torch.manual_seed(0)
    table, prompts, places = (torch.randn(*shape, 5).requires_grad_() for shape in ((6,), (2, 1), (4,)))
    weight, bias = (torch.randn(5).requires_grad_() for _ in range(2))
    ids, at, domains = torch.tensor([[1, 2], [2, 2]]), torch.arange(3), torch.tensor([1, 0])
    others = ids, at, domains, torch.full((5,), 0.2, dtype=torch.float64), torch.tensor([4, 9]), 0, threshold(0.3)
    torch.library.opcheck(ops.prompt_embedding.default, (table, prompts, places, weight, bias, *others, EPS))
    plain = ids, torch.arange(2), None, None, None, 0, 0, 0.0
    torch.library.opcheck(ops.prompt_embedding.default, (table, None, None, None, None, *plain))
    some = ("test_schema", "test_faketensor")
    with torch.no_grad():
        out, statistics = ops.prompt_embedding(table, prompts, places, weight, bias, *others, EPS)
        saved = (torch.randn_like(out), statistics, table, prompts, places, weight, *others)
        torch.library.opcheck(ops.prompt_embedding_backward.default, saved, test_utils=some)


def test_gradcheck_of_the_reference() -> None:
    """fp64 has no kernel: the face takes the reference."""
    torch.manual_seed(0)
    shapes = ((5,), (2, 2), (6,), (), ())
    leaves = tuple(torch.randn(*shape, 3, dtype=torch.float64).requires_grad_() for shape in shapes)
    ids, domains = torch.tensor([[1, 4, 1], [0, 4, 4]]), torch.tensor([1, 1])
    key = DropoutKey(1, torch.arange(2))

    def embed(table: Tensor, prompts: Tensor, places: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        options: dict[str, Any] = {"prompt_table": prompts, "position_table": places, "domains": domains}
        return prompt_embedding(table, ids, (range(5),), norm=(weight, bias, EPS, None), p=0.3, key=key, **options)

    assert torch.autograd.gradcheck(embed, leaves)
