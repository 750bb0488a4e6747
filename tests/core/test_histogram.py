"""Private counts: their sensitivity, their threshold, and that nothing rare is ever told."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from discreet.core.clipping import ClippedSum
from discreet.core.histogram import (
    MAX_NAME_LENGTH,
    Buckets,
    Names,
    _bounded_counts,
    private_counts,
    selection_threshold,
)
from discreet.core.noise import release
from discreet.core.rng import NoiseSource
from discreet.errors import ConfigError

ROW = st.tuples(
    st.integers(-1, 3),
    st.integers(-1, 6),
    st.none() | st.text(max_size=130),
    st.none() | st.sampled_from(["a", "b", "", "a|b", "1|a", "names|0|a", "\ud800", "x" * 101, "0", "é", "é"]),
)


def _total(rows) -> ClippedSum:
    columns = list(zip(*rows, strict=True)) if rows else [[], [], [], []]
    return _bounded_counts(
        buckets={
            "p": Buckets(index_N=np.array(columns[0], dtype=np.int64), size=4),
            "q": Buckets(index_N=np.array(columns[1], dtype=np.int64), size=7),
        },
        names={"r": Names(list(columns[2])), "s": Names(list(columns[3]))},
        examples=len(rows),
    )


def _distance(one: ClippedSum, other: ClippedSum) -> float:
    zero = torch.zeros(1, dtype=torch.float64)
    square = 0.0
    for key in one.tensors.keys() | other.tensors.keys():
        square += float((one.tensors.get(key, zero) - other.tensors.get(key, zero)).square().sum())
    return math.sqrt(square)


def _count(values, *, sigma=1.0, delta=1e-6, source=None):
    return private_counts(
        buckets={},
        names={"c": Names(values)},
        examples=len(values),
        noise_multiplier=sigma,
        delta=delta,
        source=source or NoiseSource.insecure_seed(0),
    )


@given(st.lists(ROW, max_size=8), ROW)
def test_one_row_moves_all_counts_by_at_most_the_sensitivity(rows, row):
    with_row, without = _total([*rows, row]), _total(rows)
    assert with_row.sensitivity == without.sensitivity == 2.0
    assert _distance(with_row, without) <= with_row.sensitivity + 1e-12


def test_the_sensitivity_is_reached():
    assert _distance(_total([(0, 0, "a", "b")]), _total([])) == 2.0


def test_counts_are_exact_before_the_noise():
    total = _total([(0, 6, "a", "a"), (0, -1, "a", None), (3, 6, "b", "a")])
    assert total.tensors["buckets|0"].tolist() == [2, 0, 0, 1]
    assert total.tensors["buckets|1"].tolist() == [0, 0, 0, 0, 0, 0, 2]
    assert {key: float(value) for key, value in total.tensors.items() if key.startswith("names")} == {
        "names|0|a": 2,
        "names|0|b": 1,
        "names|1|a": 2,
    }


@pytest.mark.parametrize("value", [None, "x" * (MAX_NAME_LENGTH + 1), "\udfff"])
def test_a_name_that_cannot_be_counted_counts_nowhere(value):
    assert _bounded_counts(buckets={}, names={"c": Names([value])}, examples=1).tensors == {}


def test_columns_with_bars_in_their_values_do_not_share_a_count():
    total = _bounded_counts(buckets={}, names={"a": Names(["1|x"]), "b": Names(["x"])}, examples=1)
    assert len(total.tensors) == 2


def test_order_of_rows_changes_no_released_number():
    values = ["a"] * 400 + ["b"] * 300 + [f"rare {i}" for i in range(50)]
    shuffled = list(np.random.default_rng(3).permutation(values))
    assert _count(values) == _count(shuffled)


def test_the_noise_of_a_name_does_not_depend_on_other_names():
    alone = _count(["a"] * 400 + ["b"] * 400)
    together = _count(["a"] * 400 + ["b"] * 400 + ["0first"] * 500 + ["zlast"] * 500)
    for name in ("a", "b"):
        assert together.names["c"][name] == alone.names["c"][name]


def test_a_canary_is_never_told():
    values = ["common"] * 1000 + ["canary-7731"]
    told = set()
    for seed in range(200):
        counts = _count(values, sigma=3.0, source=NoiseSource.insecure_seed(seed))
        told |= set(counts.names["c"])
        assert "canary" not in repr(counts)
    assert told == {"common"}


@pytest.mark.parametrize("delta", [1e-8, 1e-5, 0.05, 0.5])
@pytest.mark.parametrize("columns", [1, 7])
def test_threshold_gives_delta_to_the_names_of_one_row(delta, columns):
    """1 - (1 - Q((tau - k) / s))^m <= delta, with almost equality: nothing is wasted."""
    threshold = selection_threshold(noise_std=5.0, names_per_row=columns, delta=delta)
    one_name = stats.norm.sf((threshold.value - threshold.presence) / 5.0)
    any_name = -math.expm1(columns * math.log1p(-one_name))
    assert any_name <= -math.expm1(-delta) <= delta
    if delta <= 0.05:
        assert any_name > 0.9 * delta


def test_frequency_of_telling_a_name_at_the_presence_count():
    """Statistical, with a negative control; false-alarm rate below 1e-6 (binomial, 4,000 draws)."""
    threshold = selection_threshold(noise_std=2.0, names_per_row=1, delta=0.2)
    values = ["n"] * threshold.presence
    told = sum(
        bool(_count(values, sigma=2.0, delta=0.2, source=NoiseSource.insecure_seed(i)).names["c"]) for i in range(4000)
    )
    expected = -math.expm1(-0.2)
    assert stats.binom.sf(told - 1, 4000, expected) > 1e-6
    assert stats.binom.cdf(told, 4000, expected) > 1e-6
    assert stats.binom.cdf(told, 4000, 1.5 * expected) < 1e-6


def test_absent_names_stay_absent_and_present_needs_the_presence_count():
    threshold = selection_threshold(noise_std=30.0, names_per_row=1, delta=0.9)
    assert threshold.presence >= 1
    strict = selection_threshold(noise_std=30.0, names_per_row=1, delta=1e-6)
    assert strict.presence == 1 + math.floor((strict.value - strict.presence) / 10)
    for seed in range(50):
        values = ["rare"] * (strict.presence - 1) + ["common"] * 5000
        assert set(_count(values, sigma=30.0, source=NoiseSource.insecure_seed(seed)).names["c"]) == {"common"}


def test_buckets_get_the_noise_of_the_release():
    index_N = np.repeat(np.arange(3), [5, 0, 7])
    counts = private_counts(
        buckets={"p": Buckets(index_N=index_N, size=3)},
        names={},
        examples=12,
        noise_multiplier=2.0,
        delta=0.0,
        source=NoiseSource.insecure_seed(4),
    )
    bare = ClippedSum(tensors={"buckets|0": torch.tensor([5.0, 0.0, 7.0], dtype=torch.float64)}, sensitivity=1.0)
    expected = release(bare, noise_multiplier=2.0, source=NoiseSource.insecure_seed(4)).tensors["buckets|0"]
    assert counts.buckets["p"].tolist() == expected.tolist()
    assert counts.noise_std == 2.0
    assert not counts.private


def test_noise_std_grows_with_the_root_of_the_columns():
    counts = private_counts(
        buckets={str(i): Buckets(index_N=np.zeros(4, dtype=np.int64), size=1) for i in range(5)},
        names={str(i): Names(["a"] * 4) for i in range(4)},
        examples=4,
        noise_multiplier=1.5,
        delta=1e-5,
        source=NoiseSource.system(),
    )
    assert counts.noise_std == 1.5 * 3
    assert counts.private


def test_without_noise_all_names_are_told_and_nothing_is_private():
    counts = _count(["a", "a", "b"], sigma=0.0, delta=0.0)
    assert counts.names["c"] == {"a": 2.0, "b": 1.0}
    assert not counts.private


def test_one_position_is_claimed():
    source = NoiseSource.insecure_seed(0)
    _count(["a"], source=source)
    assert source.position == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index_N": np.array([0, 4])}, "outside"),
        ({"index_N": np.array([0, -2])}, "outside"),
        ({"index_N": np.array([0.0, 1.0])}, "integers"),
        ({"index_N": np.array([[0, 1]])}, "1 rows|integers"),
        ({"index_N": np.array([0])}, "1 rows"),
        ({"size": 0}, "size"),
    ],
)
def test_buckets_out_of_shape_are_refused(change, message):
    settings = {"index_N": np.array([0, 3]), "size": 4, **change}
    with pytest.raises(ConfigError, match=message):
        _bounded_counts(buckets={"p": Buckets(**settings)}, names={}, examples=2)


def test_names_of_another_length_are_refused():
    with pytest.raises(ConfigError, match="3 rows: must be 2"):
        _bounded_counts(buckets={}, names={"r": Names(["a"] * 3)}, examples=2)


@pytest.mark.parametrize("delta", [0.0, -1e-6, 1.0, math.nan])
def test_names_need_a_delta(delta):
    with pytest.raises(ConfigError, match="delta"):
        _count(["a"], delta=delta)


def test_nothing_to_count_is_refused():
    with pytest.raises(ConfigError, match="0 columns"):
        _bounded_counts(buckets={}, names={}, examples=2)
