"""The benchmark of the planner: its verdicts on made-up figures, one tiny run, and the quick ones of E4 to E7."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from bench.planner import constant_tan, digits, sampling_noise
from bench.planner.__main__ import main
from bench.planner.proxies import RATES, SETTINGS, SHAPES, candidates_of

from discreet.app.data import digits as load_digits
from discreet.insight.simulated_run import Trial
from discreet.insight.simulation import Simulation, fit_of, rank
from discreet.privacy.accounting import SampledGaussian, epsilon


def _trials(accuracies: dict[str, float], *, batch: int, spread: float = 0.01) -> list[Trial]:
    return [
        Trial(candidate=name, batch=batch, noise_multiplier=1.0, steps=10, seed=seed, accuracy=mean + offset)
        for name, mean in accuracies.items()
        for seed, offset in enumerate((-spread, 0.0, spread))
    ]


def _simulation(accuracies: dict[str, float]) -> Simulation:
    trials = _trials(accuracies, batch=16)
    best = rank(trials)[0].candidate
    fitted = [trial for batch in (8, 16, 32) for trial in _trials({best: accuracies[best]}, batch=batch)]
    return Simulation(
        ranking=rank(trials),
        trials=tuple(trials),
        fitted=tuple(fitted),
        fit=fit_of(fitted, at_batch=1024),
        data="made up",
        examples_processed=10,
        full_search=640,
        seconds=1.0,
    )


SIMULATED = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6}


def test_the_same_order_agrees_and_the_reverse_does_not():
    found = constant_tan.agreement(_simulation(SIMULATED), _trials(SIMULATED, batch=1024))
    assert (found["tau"], found["met"], found["regret"]) == (1.0, True, 0.0)
    turned = dict(zip(SIMULATED, reversed(list(SIMULATED.values())), strict=True))
    found = constant_tan.agreement(_simulation(SIMULATED), _trials(turned, batch=1024))
    assert (found["tau"], found["met"]) == (-1.0, False)
    assert found["regret"] == pytest.approx(0.3)


def test_a_real_run_inside_the_interval_holds_and_one_outside_does_not():
    simulation = _simulation(SIMULATED)
    assert constant_tan.held(simulation, _trials(SIMULATED, batch=1024))["met"]
    lower = constant_tan.held(simulation, _trials({"a": 0.8}, batch=1024))
    assert not lower["met"]
    assert lower["runs_inside"] == 0


def test_the_band_is_two_seed_deviations_and_a_spread():
    steady = {64: [0.820, 0.821, 0.819], 4096: [0.826, 0.827, 0.825]}  # little apart, and seeds less
    assert constant_tan.band(steady, at_batch=4096)["spread"] < 0.013
    assert not constant_tan.band(steady, at_batch=4096)["met"]
    inside = {16: [0.89, 0.90, 0.91], 1024: [0.90, 0.91, 0.92]}
    assert constant_tan.band(inside, at_batch=1024)["met"]
    outside = {16: [0.86, 0.87, 0.88], 1024: [0.90, 0.91, 0.92]}
    found = constant_tan.band(outside, at_batch=1024)
    assert not found["met"]
    assert found["farthest"] == pytest.approx(0.04)
    assert found["seed_sd"] == pytest.approx(0.01)


def _record(means: dict[int, float], *, slope: float, seed_sd: float, law: str = "1 / B") -> dict:
    at = max(means)
    spread = {"means": {str(batch): mean for batch, mean in means.items()}, "seed_sd": seed_sd}
    return {"batch_size": at, "range": spread, "simulation": {"fit": {"law": law, "slope": slope}}}


def test_the_law_is_taken_out_of_the_band():
    means = {batch: 0.83 - 0.4 / batch for batch in (64, 256, 4096)}
    assert constant_tan.after_law(_record(means, slope=-0.4, seed_sd=0.001))["farthest"] == pytest.approx(0)
    wrong = constant_tan.after_law(_record(means, slope=0.4, seed_sd=0.001))
    assert not wrong["met"]
    assert wrong["farthest"] == pytest.approx(0.8 * (1 / 64 - 1 / 4096))
    falling = {batch: 0.5 - 0.02 * math.log2(batch) for batch in (64, 4096)}
    assert constant_tan.after_law(_record(falling, slope=-0.02, seed_sd=0.001, law="log2 B"))["met"]


def _hits(accuracy: float, *, seed: int, images: int = 2000) -> np.ndarray:
    return np.random.default_rng(seed).random(images) < accuracy


def test_a_law_that_is_there_is_found_and_taken_out():
    batches = (32, 64, 128, 512, 4096)
    hits = {b: [_hits(0.8 - 2.0 / b, seed=97 * b + s, images=40_000) for s in range(4)] for b in batches}
    cheap = {
        b: [float(_hits(0.8 - 2.0 / b, seed=b + 1000 * s, images=40_000).mean()) for s in (5, 6, 7)]
        for b in (32, 64, 128)
    }
    found = sampling_noise.judged(hits, cheap, at_batch=4096)
    assert found["slope"] == pytest.approx(-2.0, abs=0.3)
    assert not found["raw"]["within"]
    assert found["raw"]["at"] == 32
    assert found["corrected"]["farthest"] < found["raw"]["farthest"] / 4


def test_a_small_test_set_hides_what_a_large_one_shows():
    hits = {b: [_hits(0.8 - 0.6 / b, seed=b + 10_000 * s, images=40_000) for s in range(5)] for b in (64, 512, 4096)}
    raw = sampling_noise.deviations({b: [float(r.mean()) for r in runs] for b, runs in hits.items()}, at_batch=4096)
    small = sampling_noise.small_tests(hits, at_batch=4096)
    assert not raw["within"]
    assert small["within"] > 0.8
    assert small["two_sds"] > 4 * raw["two_sds"]


def test_the_grid_is_what_it_says():
    candidates = candidates_of(SETTINGS["digits"], load_digits())
    assert len(candidates) == len(RATES) * len(SHAPES) >= 8
    assert len({candidate.name for candidate in candidates}) == len(candidates)
    assert len({id(candidate.plan) for candidate in candidates}) == 1


def test_a_tiny_run_writes_what_it_prints_and_keeps_what_was_there(tmp_path, capsys, monkeypatch):
    tiny = dataclasses.replace(SETTINGS["digits"], batch_size=256, steps=4)
    monkeypatch.setitem(SETTINGS, "digits", tiny)
    monkeypatch.setattr(constant_tan, "candidates_of", lambda *given: candidates_of(*given)[3:5])
    out = tmp_path / "deep" / "planner.json"
    out.parent.mkdir()
    out.write_text(json.dumps({"kept": 1}))
    main(["--data", "digits", "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["kept"] == 1
    found = record["constant_tan"]["digits"]
    assert [int(batch) for batch in found["range"]["means"]] == [4, 8, 16, 32, 64, 128, 256]
    assert found["simulation"]["points"]
    assert found["saved"]["examples"] == pytest.approx(2 * 256 / (2 * 4 + 2 + 4 + 8))
    printed = capsys.readouterr().out
    assert printed.startswith("digits: N 1447, B 256, S 4")
    assert printed.count("met   ") + printed.count("MISSED") == 5


def test_e7_the_wall_to_the_digits_that_the_specification_prints():
    found = digits.e7()
    for row, published in zip(found["rows"], digits.PUBLISHED_WALL, strict=True):
        if row["batch"] != 22:
            # Half of the last printed digit, and half a thousandth for the grids of two accountants.
            assert abs(row["epsilon"] - published) <= (0.005 if published < 10 else 0.05) + 5e-4 * published
    assert found["met"]


def test_e7_the_rounded_pair_lies_within_its_rounding():
    """Printed as (22, 0.70) with 4.08: some pair that rounds to it spends that; the pair itself spends 3.96."""

    def spent(batch: float, sigma: float) -> float:
        return epsilon([SampledGaussian(batch / digits.EXAMPLES, sigma, 400)], delta=digits.DELTA)

    assert spent(21.5, 0.705) < spent(22, 0.70) < 4.08 < spent(22.5, 0.695)


@pytest.mark.slow
def test_e4_a_small_batch_does_as_well_at_constant_noise():
    """|accuracy(16) - accuracy(512)| below 2 seed deviations; twice the noise per update is told from it."""
    data = digits.Digits()
    reference = data.mean(seeds=3, batch=512, sigma_ref=16)
    small = data.mean(seeds=3, batch=16, sigma_ref=16)
    louder = data.mean(seeds=3, batch=16, sigma_ref=32)
    sd = math.sqrt((reference["sd"] ** 2 + small["sd"] ** 2) / 2)
    assert abs(small["accuracy"] - reference["accuracy"]) < 2 * sd
    assert abs(louder["accuracy"] - reference["accuracy"]) > 2 * sd
