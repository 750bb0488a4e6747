"""What computing costs: times, bounds and microbatches, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from discreet.errors import ConfigError
from discreet.privacy.compute import Bound, Machine, parse_time, realised_at_most
from discreet.privacy.sampling import PoissonSampling

MIB = 2.0**20


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("5m", 300), ("1.5h", 5400), ("2d", 172_800), (" .5 m ", 30), ("3.s", 3)]
)
def test_times(text, seconds):
    assert parse_time(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "m", "5 minutes", "-5m", "0s", "1e9m", "nan s", "5mm", "1:30m", "infh"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ConfigError, match="90s, 5m"):
        parse_time(text)


def test_seconds_of_a_training_by_hand():
    machine = Machine(
        seconds_per_example=1e-3, seconds_per_microbatch=1e-2, seconds_per_step=1e-1, largest_microbatch=64
    )
    # 100 examples are two microbatches of at most 64.
    assert machine.seconds(batch_size=100, steps=10, examples=10_000) == pytest.approx(10 * (0.1 + 0.02 + 0.1))
    assert machine.throughput == pytest.approx(1 / (1e-3 + 1e-2 / 64))
    assert Machine.told(250.0).seconds(batch_size=50, steps=10, examples=10_000) == pytest.approx(2.0)


def test_what_fits_into_the_bound_never_takes_longer():
    machine = Machine(
        seconds_per_example=1e-4, seconds_per_microbatch=3e-3, seconds_per_step=2e-2, largest_microbatch=128
    )
    for seconds in (1.0, 20.0, 300.0):
        bound = Bound(samples=machine.samples_in(seconds), overhead=machine.overhead)
        for steps in (1, 7, 30):
            batch = math.floor(bound.batch(steps))
            if batch >= 1:
                assert machine.seconds(batch_size=batch, steps=steps, examples=10**9) <= seconds * (1 + 1e-9)
                assert bound.admits(batch_size=batch, steps=steps)
                assert not bound.admits(batch_size=batch + 1, steps=steps)


def test_the_microbatch_fits_into_memory_and_is_round():
    machine = Machine(
        seconds_per_example=1e-3,
        largest_microbatch=4096,
        bytes_per_example=1 * MIB,
        fixed_bytes=100 * MIB,
        free_bytes=1000 * MIB,
    )
    assert machine.microbatch(5000, examples=10**6) == 800
    assert machine.peak_bytes(5000, examples=10**6) == pytest.approx(900 * MIB)
    assert machine.microbatch(5, examples=10**6) == 8
    assert Machine(seconds_per_example=1.0).microbatch(10_000, examples=10**6) == 512
    assert Machine(seconds_per_example=1.0).peak_bytes(10_000, examples=10**6) is None
    with pytest.raises(ConfigError, match="one example does not fit"):
        Machine(seconds_per_example=1.0, bytes_per_example=MIB, fixed_bytes=95 * MIB, free_bytes=100 * MIB).microbatch(
            8, examples=100
        )


def test_realised_batches_stay_below_the_tail():
    """False-alarm rate: a batch passes 4 standard deviations in 3.2e-5 of draws; 5 among 2,000 in less than 1e-9."""
    sampling = PoissonSampling(examples=5_000, batch_size=400)
    sizes = np.array([len(sampling.draw(key=bytes(32), step=step)) for step in range(2_000)])
    assert (sizes > realised_at_most(400, examples=5_000)).sum() < 5
    assert realised_at_most(5_000, examples=5_000) == 5_000


@pytest.mark.parametrize(
    "arguments",
    [
        {"seconds_per_example": 0.0},
        {"seconds_per_example": math.nan},
        {"seconds_per_example": 1.0, "seconds_per_step": -1.0},
        {"seconds_per_example": 1.0, "seconds_per_microbatch": math.inf},
        {"seconds_per_example": 1.0, "largest_microbatch": 0},
    ],
)
def test_an_impossible_machine_is_refused(arguments):
    with pytest.raises(ConfigError):
        Machine(**arguments)


@pytest.mark.parametrize("throughput", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_throughput_is_refused(throughput):
    with pytest.raises(ConfigError, match="throughput"):
        Machine.told(throughput)


@pytest.mark.parametrize("samples", [0.0, 0.5, -3.0, math.nan])
def test_a_bound_of_less_than_an_example_is_refused(samples):
    with pytest.raises(ConfigError, match="less than one example"):
        Bound(samples=samples)
