"""Rates after a growth."""

from __future__ import annotations

import pytest

from elle_mp.growth.factors import After
from elle_mp.train.rates import after_growth, rewarm_factor


def test_rewarm_rises_linearly_to_the_schedule_and_stays() -> None:
    assert [rewarm_factor("rewarm", since, 4) for since in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rewarm_factor("rewarm", None, 4) == 1.0
    for rate in ("keep", "mup", "asym_rewarm"):
        assert rewarm_factor(rate, 0, 4) == 1.0


def test_only_asym_rewarm_has_a_rate_for_copies_and_it_stays_above_the_others() -> None:
    found = [after_growth("asym_rewarm", 4, 0, since).new_factor for since in (0, 1, 3, 4, 100000)]
    assert found == pytest.approx([0.325, 0.65, 1.3, 1.3, 1.3])
    for rate in ("keep", "mup", "rewarm"):
        assert after_growth(rate, 4, 0, 0) == After()


def test_old_entries_rest_for_exactly_the_steps_asked_for() -> None:
    assert [after_growth("keep", 250, 2, since).freeze_old for since in range(4)] == [True, True, False, False]
    assert after_growth("asym_rewarm", 2, 1, 0) == After(freeze_old=True, new_factor=0.65)


def test_a_model_that_never_grew_has_no_rule() -> None:
    assert after_growth("asym_rewarm", 250, 100, None) == After()
