"""Learning-rate schedules against values worked out by hand."""

from __future__ import annotations

from itertools import pairwise
from math import cos, pi, sqrt

import pytest

from elle_mp.config import OptimConfig
from elle_mp.train.schedules import rate_factor


def factors(steps: int = 20, **optim: object) -> list[float]:
    config = OptimConfig.model_validate(optim)
    return [rate_factor(config, step, steps) for step in range(steps)]


def test_warm_up_rises_linearly_to_the_peak_and_never_starts_at_zero() -> None:
    for schedule in ("linear", "cosine", "inverse_sqrt", "wsd", "constant"):
        values = factors(schedule=schedule, warmup=0.25)
        assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert max(values) == 1.0


def test_linear_and_cosine_fall_to_the_floor() -> None:
    linear = factors(schedule="linear", warmup=0.2)
    assert linear[4:] == pytest.approx([1 - k / 16 for k in range(16)])
    low = factors(schedule="linear", warmup=0.2, min_lr=0.1)
    assert low[4:] == pytest.approx([0.1 + 0.9 * (1 - k / 16) for k in range(16)])
    cosine = factors(schedule="cosine", warmup=0.2, min_lr=0.1)
    assert cosine[4:] == pytest.approx([0.1 + 0.9 * (1 + cos(pi * k / 16)) / 2 for k in range(16)])


def test_inverse_sqrt_is_the_paper_s() -> None:
    values = factors(schedule="inverse_sqrt", warmup=0.2)
    assert values[3:] == pytest.approx([sqrt(4 / (step + 1)) for step in range(3, 20)])


def test_wsd_holds_the_peak_then_falls_in_its_last_share() -> None:
    values = factors(schedule="wsd", warmup=0.1, decay_share=0.25, min_lr=0.0)
    assert values[2:15] == [1.0] * 13
    assert values[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    assert factors(schedule="wsd", warmup=0.1, decay_share=0.25, min_lr=0.5)[-1] == pytest.approx(0.5)


def test_constant_and_no_warm_up() -> None:
    assert factors(schedule="constant", warmup=0) == [1.0] * 20
    assert factors(schedule="linear", warmup=0)[0] == 1.0
    assert factors(steps=1, schedule="linear", warmup=0.08) == [1.0]
    assert factors(steps=1, schedule="wsd", warmup=0.0) != []


@pytest.mark.parametrize("schedule", ["linear", "cosine", "inverse_sqrt", "wsd", "constant"])
def test_beyond_the_end_the_rate_stays_in_range(schedule: str) -> None:
    config = OptimConfig.model_validate({"schedule": schedule, "warmup": 0.1, "min_lr": 0.2})
    tail = [rate_factor(config, step, 20) for step in range(19, 60)]
    floor = 0.0 if schedule == "inverse_sqrt" else 0.2
    assert all(floor < value + 1e-12 and value <= 1 for value in tail)
    assert all(later <= earlier for earlier, later in pairwise(tail))
