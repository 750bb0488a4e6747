"""Simulation at constant TAN: what stays fixed, what is refused, what is stamped, and that a batch can be told."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from discreet.core.clipping import Clipping
from discreet.core.gradient import clipped_gradient
from discreet.core.noise import release
from discreet.core.rng import NoiseSource, seed_key, subkey
from discreet.errors import CheckFailed, ConfigError
from discreet.insight.simulated_run import Candidate, Origin, Proxy, run_simulated, scaled
from discreet.insight.simulation import NonPrivateSimulation, Simulation, simulate, usual_scales
from discreet.privacy.plan import Plan
from discreet.train.examples import Examples
from discreet.train.step import whole_batch
from discreet.train.trial import Optimiser, Recipe, run_trial
from train import toys

STEPS = 12


def _plan(*, batch: int = 64, sigma: float = 2.0, steps: int = STEPS) -> Plan:
    clipping = Clipping.abadi(1.0).describe()
    return Plan.solve(examples=10_000, batch_size=batch, steps=steps, noise_multiplier=sigma, clipping=clipping)


def _accuracy(model: nn.Module) -> float:
    features, targets = toys.data(examples=400).tensors
    with torch.no_grad():
        return float((model(features).argmax(1) == targets).float().mean())


def _proxy(origin: Origin = Origin.PUBLIC) -> Proxy:
    return Proxy(data=toys.data(), score=_accuracy, origin=origin, name="toys")


def _build() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def _candidate(rate: float = 0.05, *, name: str | None = None, plan: Plan | None = None) -> Candidate:
    return Candidate(
        name=name or f"rate {rate}", plan=plan or _plan(), recipe=Recipe(rate), build=_build, loss=toys.loss
    )


@pytest.mark.parametrize("factor", [1, 2, 3, 7.5, 64])
def test_noise_in_the_parameters_and_steps_are_those_of_the_plan(factor):
    plan = _plan(batch=1000, sigma=3.0)
    schedule = scaled(plan, factor=factor, examples=2000)
    assert schedule.noise_multiplier / schedule.sampling.batch_size == pytest.approx(3.0 / 1000, rel=1e-12)
    assert schedule.sampling.batch_size == round(1000 / factor)
    assert schedule.steps == plan.steps


@pytest.mark.parametrize("factor", [0.5, 0, -1, math.inf, math.nan])
def test_a_simulation_is_never_larger_than_the_run(factor):
    with pytest.raises(ConfigError, match="scale"):
        scaled(_plan(), factor=factor, examples=2000)


def test_a_proxy_must_hold_one_batch():
    with pytest.raises(ConfigError, match="larger scale or proxy"):
        scaled(_plan(batch=1000), factor=2, examples=499)


@pytest.mark.parametrize(("batch", "middle"), [(4096, 64), (1024, 32), (256, 8), (8, 2)])
def test_usual_scales_keep_batches_from_becoming_tiny(batch, middle):
    scales = usual_scales(batch)
    assert scales == (2 * middle, middle, middle / 2)
    assert batch / scales[0] >= min(16, batch / 4)


@pytest.mark.parametrize("optimiser", list(Optimiser))
def test_a_trial_is_the_engine_step_by_step(optimiser):
    """`run_trial` against the blocks, written out: same batches, same clipped sums, same noise, same weights."""
    schedule = scaled(_plan(), factor=4, examples=toys.EXAMPLES)
    key = seed_key(3)
    model, twin = toys.model(), toys.model()
    clipping = Clipping.abadi(1.0)
    recipe = Recipe(0.1, optimiser=optimiser, decay=False)
    run_trial(
        model,
        Examples(toys.data()),
        loss=toys.loss,
        schedule=schedule,
        recipe=recipe,
        clipping=clipping,
        layout=None,
        key=key,
        private=False,
    )
    source = NoiseSource.keyed(subkey(key, "trial noise"), private=False)
    kinds = {Optimiser.ADAM: torch.optim.Adam, Optimiser.SGD: torch.optim.SGD}
    optimizer = kinds[optimiser](twin.parameters(), lr=0.1)
    features, targets = toys.data().tensors
    for step in range(STEPS):
        rows = torch.from_numpy(schedule.sampling.draw(key=subkey(key, "trial batches"), step=step))
        total = clipped_gradient(
            twin,
            toys.loss,
            (features[rows], targets[rows]),
            clipping=clipping,
            examples=len(rows),
            at_most=whole_batch(schedule.sampling.batch_size),
        )
        released = release(
            total, noise_multiplier=schedule.noise_multiplier, source=source, divisor=schedule.sampling.batch_size
        )
        for name, parameter in twin.named_parameters():
            parameter.grad = released.tensors[name]
        optimizer.step()
    assert torch.equal(toys.weights(model), toys.weights(twin))


def test_the_average_is_that_of_the_weights():
    schedule = scaled(_plan(), factor=4, examples=toys.EXAMPLES)
    model, seen = toys.model(), []
    arguments = {
        "loss": toys.loss,
        "schedule": schedule,
        "clipping": Clipping.abadi(1.0),
        "layout": None,
        "key": seed_key(3),
        "private": False,
    }
    run_trial(
        model,
        Examples(toys.data()),
        recipe=Recipe(0.1),
        on_step=lambda step: seen.append(toys.weights(model).clone()),
        **arguments,
    )
    averaged = toys.model()
    run_trial(averaged, Examples(toys.data()), recipe=Recipe(0.1, averaging=0.9), **arguments)
    expected = toys.weights(toys.model())
    for index, weights in enumerate(seen):
        keep = min(0.9, (1 + index) / (10 + index))
        expected = keep * expected + (1 - keep) * weights
    assert torch.allclose(toys.weights(averaged), expected, atol=1e-6)


def test_no_noise_and_no_clipping_is_gradient_descent():
    plan = Plan.solve(
        examples=toys.EXAMPLES, batch_size=toys.EXAMPLES, steps=5, epsilon=math.inf, clipping=Clipping.none().describe()
    )
    model, twin = toys.model(), toys.model()
    run_trial(
        model,
        Examples(toys.data()),
        loss=toys.loss,
        schedule=scaled(plan, factor=1, examples=toys.EXAMPLES),
        recipe=Recipe(0.2, optimiser=Optimiser.SGD, decay=False),
        clipping=Clipping.none(),
        layout=None,
        key=seed_key(0),
        private=False,
    )
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.2)
    features, targets = toys.data().tensors
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(twin(features), targets).backward()
        optimizer.step()
    assert torch.allclose(toys.weights(model), toys.weights(twin), atol=1e-6)


def test_dropout_follows_the_key_and_the_callers_randomness_is_kept():
    schedule = scaled(_plan(), factor=4, examples=toys.EXAMPLES)
    results = []
    for _ in range(2):
        model = toys.model(dropout=0.5)
        torch.manual_seed(len(results))
        before = torch.random.get_rng_state()
        run_trial(
            model,
            Examples(toys.data()),
            loss=toys.loss,
            schedule=schedule,
            recipe=Recipe(0.1),
            clipping=Clipping.abadi(1.0),
            layout=None,
            key=seed_key(1),
            private=False,
        )
        assert torch.equal(before, torch.random.get_rng_state())
        results.append(toys.weights(model))
    assert torch.equal(*results)


def test_rates_follow_the_steps():
    plain, adam = Recipe(1.0, optimiser=Optimiser.SGD), Recipe(1.0)
    assert plain.for_steps(400, instead_of=100).learning_rate == 0.25
    assert adam.for_steps(400, instead_of=100).learning_rate == 0.5


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_must_be_a_rate(rate):
    with pytest.raises(ConfigError, match="learning rate"):
        Recipe(rate)


def test_equal_seeds_give_equal_bits_and_others_do_not():
    runs = [run_simulated(_candidate(), _proxy(), factor=2, seed=seed) for seed in (0, 0)]
    assert runs[0] == runs[1]
    models = []
    for seed in (0, 1):
        proxy = Proxy(toys.data(), lambda model: models.append(toys.weights(model)) or 0.5, Origin.PUBLIC, "toys")
        run_simulated(_candidate(), proxy, factor=2, seed=seed)
    assert not torch.equal(*models)


def test_a_simulation_ranks_fits_and_says_what_it_saved():
    candidates = [_candidate(0.05), _candidate(1e-6, name="asleep"), _candidate(0.02)]
    seen: list[tuple[int, int]] = []
    found = simulate(candidates, _proxy(), scales=(4, 2, 1), on_progress=lambda *place: seen.append(place))
    assert type(found) is Simulation
    assert found.stamp == ""
    assert found.ranking[-1].candidate == "asleep"
    assert found.chosen == found.ranking[0].candidate != "asleep"
    assert {(t.batch, t.noise_multiplier) for t in found.trials} == {(32, 1.0)}
    assert {t.batch for t in found.fitted} == {16, 32, 64}
    assert {t.candidate for t in found.fitted} == {found.chosen}
    assert {t.seed for t in found.trials}.isdisjoint({t.seed for t in found.fitted})
    assert found.fit.at_batch == 64
    assert found.examples_processed == STEPS * (9 * 32 + 3 * (16 + 32 + 64))
    assert found.full_search == STEPS * 9 * 64
    assert found.saved == pytest.approx(found.full_search / found.examples_processed)
    assert seen[-1] == (STEPS * 18, STEPS * 18)
    assert all(done <= total for done, total in seen)


def test_the_file_has_what_the_plan_page_takes():
    record = json.loads(json.dumps(simulate([_candidate()], _proxy(), scales=(4, 2, 1)).to_json(), allow_nan=False))
    assert {"batch", "seed", "accuracy"} == set(record["points"][0])
    assert len(record["points"]) == 9
    assert {"slope", "intercept", "at_batch", "low", "high"} <= set(record["fit"])
    at = record["fit"]["at_batch"]
    x = {"log2 B": math.log2(at), "1 / B": 1 / at}[record["fit"]["law"]]
    line = record["fit"]["intercept"] + record["fit"]["slope"] * x
    assert line == pytest.approx(record["fit"]["expected"])
    assert record["stamp"] == ""


def test_private_data_are_refused_without_the_flag():
    private = _proxy(Origin.PRIVATE)
    with pytest.raises(ConfigError, match="each trial would cost a full epsilon"):
        simulate([_candidate()], private, scales=(4, 2, 1))
    with pytest.raises(ConfigError, match="unaccounted"):
        run_simulated(_candidate(), private, factor=2, seed=0)


def test_private_data_with_the_flag_are_stamped_everywhere(caplog):
    with caplog.at_level(logging.WARNING, logger="discreet"):
        found = simulate([_candidate()], _proxy(Origin.PRIVATE), scales=(4, 2, 1), unaccounted=True)
    assert isinstance(found, NonPrivateSimulation)
    assert [record.message.split(":")[1].strip() for record in caplog.records] == ["NON-PRIVATE"]
    record = found.to_json()
    assert record["stamp"] == "NON-PRIVATE"
    assert record["warnings"][0].startswith("NON-PRIVATE")
    assert found.note().startswith("NON-PRIVATE")


def test_a_model_that_could_not_be_trained_privately_is_refused():
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    bad = Candidate(name="norm", plan=_plan(), recipe=Recipe(0.1), build=build, loss=toys.loss)
    with pytest.raises(CheckFailed):
        simulate([bad], _proxy(), scales=(4, 2, 1))


@pytest.mark.parametrize(
    ("names", "options"),
    [((), {}), (("a", "a"), {}), (("a",), {"scales": (4, 2)}), (("a",), {"scales": (4, 4, 2)}), (("a",), {"seeds": 2})],
)
def test_a_request_without_evidence_is_refused(names, options):
    with pytest.raises(ConfigError):
        simulate([_candidate(name=name) for name in names], _proxy(), **options)
