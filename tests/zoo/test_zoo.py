"""Named architectures from other people's packages: norms and sums agree with one example at a time.

The figures are those of ``docs/models.md``, from the same function.
"""

from __future__ import annotations

import dataclasses

import pytest

from oracles import alone
from zoo.compare import compare, gap
from zoo.model import B
from zoo.packages import THIRD_PARTY_WARNINGS
from zoo.table_of_models import ZOO

pytestmark = [pytest.mark.filterwarnings(text) for text in THIRD_PARTY_WARNINGS]
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


@pytest.mark.parametrize("name", list(ZOO))
def test_norms_and_sum_equal_one_example_at_a_time(name):
    zoo = ZOO[name]
    if not zoo.installed:
        pytest.skip(f"{zoo.family} is not installed; pip install 'discreet[zoo]'")
    found = compare(zoo)
    for dtype, tolerance in TOLERANCE.items():
        gap = dataclasses.asdict(getattr(found, dtype))
        assert max(gap.values()) < tolerance, (dtype, gap)


def test_the_zoo_names_at_least_fifty_models():
    assert len(ZOO) >= 50


@pytest.mark.parametrize("name", ["LSTM", "TextCNN"])
def test_one_parameter_that_is_off_by_a_millionth_is_seen(name):
    zoo = ZOO[name]
    model, batch = zoo.make()
    expected = alone(model, zoo.loss, batch, size=B)
    largest = max(expected, key=lambda key: float(expected[key].norm()))
    expected[largest] = expected[largest] * (1 + 1e-6)
    found = dataclasses.asdict(gap(model, zoo.loss, batch, expected))
    assert min(found.values()) > 100 * TOLERANCE["float64"], found
