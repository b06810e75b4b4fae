"""AP and AP+ against numbers worked out by hand."""

from __future__ import annotations

import pytest

from elle_mp.stream.lifelong import average_increased_perplexity, average_perplexity


def test_ap_is_the_geometric_mean() -> None:
    assert average_perplexity({"docs": 2.0, "code": 8.0}) == pytest.approx(4.0, rel=1e-15)
    assert average_perplexity({"docs": 17.5}) == pytest.approx(17.5, rel=1e-15)
    assert average_perplexity({"a": 1e300, "b": 1e300, "c": 1e-300}) == pytest.approx(1e100)


def test_ap_plus_is_the_mean_rise_over_earlier_domains() -> None:
    finished = {"docs": 10.0, "code": 20.0}
    assert average_increased_perplexity({"docs": 10.0}, {}, "docs") is None
    assert average_increased_perplexity({"docs": 13.0, "code": 20.0}, {"docs": 10.0}, "code") == 3.0
    now = {"docs": 9.0, "code": 26.0, "science": 30.0}
    assert average_increased_perplexity(now, finished, "science") == pytest.approx((-1.0 + 6.0) / 2)


def test_the_current_domain_does_not_count_when_it_is_finished_itself() -> None:
    finished = {"docs": 10.0, "code": 20.0}
    assert average_increased_perplexity({"docs": 12.0, "code": 99.0}, finished, "code") == 2.0
