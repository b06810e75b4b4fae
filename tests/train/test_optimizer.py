"""AdamW with factors by entry: against torch's own, against a loop over entries, and under every layout."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from math import isnan, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from elle_mp.config import OptimConfig
from elle_mp.growth.apply import Moments
from elle_mp.growth.factors import After, Factors
from elle_mp.models.transformer import Transformer
from elle_mp.ops.random import normal_block
from elle_mp.parallel.sharding import local_tensor, my_bounds, named_specs
from elle_mp.train import entries
from elle_mp.train.entries import CPU_BLOCK, Age, Settings, shard_factors, step_by_entry
from elle_mp.train.optimizer import ShardedAdamW
from tests.distributed_utils import run_distributed
from tests.tiny import grid, model_of, moments, spec_of, text, weights

LR, BETAS, EPS, DECAY = 3e-3, (0.9, 0.98), 1e-3, 0.1
OPTIM = OptimConfig(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, clip=0.0)
FREEZE, WARM, COPIES = After(freeze_old=True), After(new_factor=0.0), After(new_factor=1.3)
SCALES = torch.tensor([0.25, 1 / 3, 0.5, 1.0, 2.0], dtype=torch.float64)


def small(place: Any, dtype: torch.dtype = torch.float64, family: str = "gpt") -> Transformer:
    return model_of(spec_of(family, layers=1), place, dtype)


def shapes_of(model: Transformer) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape(model.sizes) for name, spec in named_specs(model)}


def scalar_factors(model: Transformer) -> dict[str, Factors]:
    """One rate and one epsilon for each parameter; every fourth has none, every fifth is new."""
    out = {}
    for number, (name, shape) in enumerate(shapes_of(model).items()):
        rate, eps = float(SCALES[number % 2]), float(SCALES[1 + number % 2])
        none: tuple[Tensor | None, ...] = (None,) * len(shape)
        first = torch.full(shape[:1], rate, dtype=torch.float64)
        last = torch.full(shape[-1:], eps, dtype=torch.float64)
        if number % 4:
            out[name] = Factors((first, *none[1:]), (*none[1:], last), none, new=number % 5 == 0)
    return out


def vector_factors(model: Transformer) -> dict[str, Factors]:
    """Every mixture of dimensions with and without factors, and of old, new and mixed ones."""
    out = {}
    generator = torch.Generator().manual_seed(5)
    for number, (name, shape) in enumerate(shapes_of(model).items()):

        def scales(skip: int, shape: tuple[int, ...] = shape, number: int = number) -> tuple[Tensor | None, ...]:
            drawn = [SCALES[torch.randint(0, 5, (size,), generator=generator)] for size in shape]
            return tuple(None if (number + dim) % 3 == skip else item for dim, item in enumerate(drawn))

        ages = [torch.rand(size, generator=generator) < 0.6 for size in shape]
        old = tuple(None if (number + dim) % 4 == 0 else item for dim, item in enumerate(ages))
        out[name] = Factors(scales(0), scales(1), old, new=number % 7 == 6)
    return out


def push(model: Transformer, optimizer: ShardedAdamW, number: int, after: After) -> None:
    """A step with random gradients that do not depend on the layout."""
    specs = dict(named_specs(model))
    for name, parameter in model.named_parameters():
        shape = specs[name].shape(model.sizes)
        parameter.grad = torch.zeros_like(parameter)
        local = local_tensor(parameter.grad)
        bounds = my_bounds(specs[name], shape, model.grid)
        local.copy_(normal_block(number, f"gradient/{name}", shape, bounds, local.dtype))
    optimizer.step(0.5, after)


def gradient(name: str, number: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """What :func:`push` gives the whole parameter."""
    return normal_block(number, f"gradient/{name}", shape, tuple((0, size) for size in shape), dtype)


def at(values: tuple[Tensor | None, ...], index: tuple[int, ...]) -> float:
    """The product over dimensions at one entry."""
    out = 1.0
    for item, position in zip(values, index, strict=True):
        out *= 1.0 if item is None else float(item[position])
    return out


def loop(
    start: Mapping[str, Tensor], factors: Mapping[str, Factors], decays: Mapping[str, bool], afters: list[After]
) -> dict[str, Tensor]:
    """AdamW one entry at a time; weights and moments by name, as ``weights`` and ``moments`` give them."""
    out = {}
    for name, weight in start.items():
        shape, item, decay = tuple(weight.shape), factors[name], DECAY if decays[name] else 0.0
        given = [gradient(name, number, shape) for number in range(len(afters))]
        result = [weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)]
        steps = 0
        for index in product(*(range(size) for size in shape)):
            p, m, v, steps = float(weight[index]), 0.0, 0.0, 0
            s, r, old = at(item.rate, index), at(item.eps, index), not item.new and bool(at(item.old, index))
            for after, whole in zip(afters, given, strict=True):
                steps += 0 if after.freeze_old and all_old(item) else 1
                if after.freeze_old and old:
                    continue
                lr, g = 0.5 * LR * (1.0 if old else after.new_factor), float(whole[index])
                m = BETAS[0] * m + (1 - BETAS[0]) * g
                v = BETAS[1] * v + (1 - BETAS[1]) * g * g
                p -= lr * decay * p
                p -= lr * s * (m / (1 - BETAS[0] ** steps)) / (sqrt(v / (1 - BETAS[1] ** steps)) + EPS * r)
            for tensor, value in zip(result, (p, m, v), strict=True):
                tensor[index] = value
        out[name], out[f"{name}.exp_avg"], out[f"{name}.exp_avg_sq"] = result
        out[f"{name}.step"] = torch.tensor(float(steps))
    return out


def all_old(item: Factors) -> bool:
    return not item.new and all(mask is None or bool(mask.all()) for mask in item.old)


def everything(model: Transformer, optimizer: ShardedAdamW) -> dict[str, Tensor]:
    return weights(model) | moments(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_factors_it_is_fused_adamw_bitwise(dtype: torch.dtype) -> None:
    model = small(grid(), dtype)
    optimizer = ShardedAdamW(model, OPTIM)
    plain = weights(model)
    specs, shapes = dict(named_specs(model)), shapes_of(model)
    groups = [
        {"params": [plain[name] for name in plain if specs[name].decay is decays], "weight_decay": DECAY * decays}
        for decays in (True, False)
    ]
    reference = torch.optim.AdamW(groups, lr=0.5 * LR, betas=BETAS, eps=EPS, fused=True)
    for number in range(5):
        push(model, optimizer, number, After())
        for name, value in plain.items():
            value.grad = gradient(name, number, shapes[name], dtype)
        reference.step()
    for name, value in weights(model).items():
        assert torch.equal(value, plain[name]), name


def test_one_rate_for_a_parameter_is_a_group_of_torch_s_adamw() -> None:
    """``lr' = s lr``, ``wd' = wd / s``, ``eps' = r eps``; what is new rises from 0."""
    model = small(grid())
    factors = scalar_factors(model)
    optimizer = ShardedAdamW(model, OPTIM, factors)
    assert all(item.uniform for item in optimizer.factors.values())
    plain = weights(model)
    specs, shapes = dict(named_specs(model)), shapes_of(model)
    groups: list[dict[str, Any]] = []
    for name, value in plain.items():
        rate, eps = (
            (at(item.rate, (0,) * len(shapes[name])), at(item.eps, (0,) * len(shapes[name])))
            if (item := factors.get(name))
            else (1.0, 1.0)
        )
        decay = DECAY * specs[name].decay / rate
        groups.append({"params": [value], "name": name, "rate": rate, "eps": EPS * eps, "weight_decay": decay})
    assert len({(group["rate"], group["eps"]) for group in groups}) == 3
    assert len(optimizer.inner.param_groups) > 6
    reference = torch.optim.AdamW(groups, betas=BETAS, fused=False, foreach=False)
    for number, factor in enumerate((0.0, 0.5, 1.3, 1.3)):
        push(model, optimizer, number, After(new_factor=factor))
        for group in reference.param_groups:
            name = group["name"]
            new = name in factors and factors[name].new
            group["lr"] = 0.5 * LR * group["rate"] * (factor if new else 1.0)
            plain[name].grad = gradient(name, number, shapes[name])
        reference.step()
    for name, value in weights(model).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("shape", [(2 * CPU_BLOCK + 3,), (3, CPU_BLOCK + 1), (700, 200), (6, 5, 4)])
def test_with_ones_the_step_by_entry_is_fused_adamw(dtype: torch.dtype, close: float, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator, dtype=dtype)
    plain = weight.clone()
    reference = torch.optim.AdamW([plain], lr=LR, betas=BETAS, eps=1e-8, weight_decay=DECAY, fused=True)
    state = Moments(torch.zeros(()), torch.zeros_like(weight), torch.zeros_like(weight))
    factors = shard_factors(None, shape, tuple((0, size) for size in shape), weight)
    for _ in range(10):
        plain.grad = torch.randn(shape, generator=generator, dtype=dtype)
        step_by_entry(weight, plain.grad, state, factors, Settings(LR, BETAS, 1e-8, DECAY, After()))
        reference.step()
    torch.testing.assert_close(weight, plain, rtol=close, atol=close)
    assert float(state.step) == 10
    for got, name in ((state.first, "exp_avg"), (state.second, "exp_avg_sq")):
        torch.testing.assert_close(got, reference.state[plain][name], rtol=close, atol=close)


PHASES = {
    "mup": [After()] * 4,
    "freeze, then all": [FREEZE, FREEZE, After(), After()],
    "rewarmed copies": [WARM, After(new_factor=0.6), COPIES, COPIES],
    "both": [After(freeze_old=True, new_factor=0.5), COPIES],
}


@pytest.mark.parametrize("phase", PHASES)
def test_factors_by_entry_are_a_loop_over_entries(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "CPU_BLOCK", 200)
    model = small(grid())
    factors = vector_factors(model)
    optimizer = ShardedAdamW(model, OPTIM, factors)
    assert {item.age for item in optimizer.factors.values()} == set(Age)
    decays = {name: spec.decay for name, spec in named_specs(model)}
    wanted = loop(weights(model), factors, decays, PHASES[phase])
    for number, after in enumerate(PHASES[phase]):
        push(model, optimizer, number, after)
    found = everything(model, optimizer)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-14, check_dtype=False, msg=name)


def laid_out(family: str, parallel: dict[str, int]) -> dict[str, Tensor]:
    """Three kinds of step under a layout."""
    model = small(grid(**parallel), family=family)
    optimizer = ShardedAdamW(model, OPTIM, vector_factors(model))
    for number, after in enumerate((FREEZE, After(new_factor=0.4), After())):
        push(model, optimizer, number, after)
    return everything(model, optimizer)


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(
    "parallel", [{"dp_shard": 2}, {"tp": 2}, {"tp": 2, "dp_shard": 2}], ids=lambda item: "x".join(item)
)
def test_every_layout_makes_the_same_step(family: str, parallel: dict[str, int]) -> None:
    whole = laid_out(family, {})
    ranks = 1
    for size in parallel.values():
        ranks *= size
    for found in run_distributed(laid_out, ranks, family, parallel):
        assert found.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, rtol=1e-15, atol=1e-15, msg=name)


def real_steps(model: Transformer, optimizer: ShardedAdamW, steps: int, after: After) -> list[float]:
    losses = []
    for _ in range(steps):
        tokens, domain, targets = text(4)
        loss = model(tokens, domain, targets) / targets.numel()
        loss.backward()
        optimizer.step(1.0, after)
        losses.append(float(loss.detach()))
    return losses


def is_old(item: Factors, shape: tuple[int, ...]) -> Tensor:
    out = torch.full(shape, not item.new)
    for dim, mask in enumerate(item.old):
        if mask is not None:
            out &= mask.view([-1 if index == dim else 1 for index in range(len(shape))])
    return out


def test_frozen_entries_stay_bitwise_while_the_others_learn_and_then_all_learn() -> None:
    """Weights, moments and, where nothing moves, the step count; the loss falls before and after the thaw."""
    model = small(grid())
    factors = vector_factors(model)
    optimizer = ShardedAdamW(model, OPTIM, factors)
    real_steps(model, optimizer, 3, After())
    before = everything(model, optimizer)
    frozen = real_steps(model, optimizer, 8, FREEZE)
    after = everything(model, optimizer)
    still = 0
    for name, shape in shapes_of(model).items():
        old = is_old(factors[name], shape)
        still += int(old.sum())
        for key in (name, f"{name}.exp_avg", f"{name}.exp_avg_sq"):
            assert torch.equal(after[key][old], before[key][old]), key
            learns = after[key][~old] != before[key][~old]
            # Rows of tables that no token reads have no gradient, but their weights decay.
            assert learns.double().mean() > 0.1 if len(learns) else True, key
        assert float(after[f"{name}.step"]) == (3 if bool(old.all()) else 11), name
    assert still > 1000
    thawed = real_steps(model, optimizer, 8, After())
    assert frozen[-1] < frozen[0] - 1e-3
    assert thawed[-1] < thawed[0] - 1e-3
    last = weights(model)
    for name, shape in shapes_of(model).items():
        old = is_old(factors[name], shape)
        assert not bool(old.any()) or bool((last[name][old] != after[name][old]).any()), name


def test_a_gradient_that_is_not_finite_moves_nothing_of_any_entry() -> None:
    model = small(grid())
    optimizer = ShardedAdamW(model, OPTIM, vector_factors(model))
    push(model, optimizer, 0, After())
    before = everything(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    assert isnan(optimizer.step(1.0, COPIES))
    for name, value in everything(model, optimizer).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("factors", "complaint"),
    [
        (Factors((torch.ones(3),), (None,), (None,)), r"shapes \[\(3,\)\].*shape \(4,\)"),
        (Factors((None, None), (None,), (None,)), "factors of shapes"),
        (Factors((torch.tensor([1.0, 1.0, 0.0, 1.0]),), (None,), (None,)), "positive"),
        (Factors((None,), (torch.tensor([1.0, float("nan"), 1.0, 1.0]),), (None,)), "positive"),
    ],
)
def test_factors_that_do_not_fit_are_refused(factors: Factors, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        shard_factors(factors, (4,), ((0, 2),), torch.zeros(2))


def test_factors_of_unknown_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"does not have: layers\.7\.gate"):
        ShardedAdamW(small(grid()), OPTIM, {"layers.7.gate": Factors((None,), (None,), (None,))})
