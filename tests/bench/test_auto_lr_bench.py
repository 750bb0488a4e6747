"""The benchmark of learning rates: its table on made-up figures, and one tiny run of each kind."""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.auto_lr import __main__ as program
from bench.auto_lr import contestants, gaps, overhead, pruning, simulated, table
from bench.auto_lr.tasks import NAMES, NameModel, Task, load, name_loss
from torch import nn

from discreet.app.data.source import Examples
from discreet.core.clipping import Clipping
from discreet.core.gradient import clipped_gradient
from discreet.privacy.plan import Plan

ROOT = Path(__file__).resolve().parents[2]


def _row(contestant: str, accuracy: float, *, seed: int = 0, rate: float = 0.02) -> dict[str, Any]:
    key = {"task": "toy", "epsilon": 1.0, "seed": seed, "contestant": contestant}
    return {**key, "accuracy": accuracy, "rate": rate, "updates": 9, "probes": 0, "cpu_seconds": 1.0}


ROWS = [
    _row("auto", 0.80),
    _row("auto", 0.90, seed=1),
    _row("grid:adam:0.02:linear", 0.86),
    _row("grid:adam:0.02:linear", 0.88, seed=1),
    _row("grid:adam:0.1:linear", 0.99),
    _row("grid:adam:0.1:linear", 0.51, seed=1),
    _row("auto-from-0.0001", 0.84),
    _row("auto-from-1", 0.85),
]


def _cell(rows: list[dict[str, Any]]) -> gaps.Cell:
    return gaps.cells(rows)["toy", 1.0]


def test_the_oracle_is_one_setting_for_all_seeds():
    """Seeds differ by 6 points behind and 2 ahead: 2 on average, 4 of error."""
    cell = _cell(ROWS)
    assert gaps.oracle(cell) == "grid:adam:0.02:linear"
    assert gaps.gap(cell) == gaps.Gap(pytest.approx(2.0), pytest.approx(4.0), 2)
    assert table.spread(cell) == pytest.approx(1.0)


def test_a_gap_is_over_seeds_that_both_have():
    """A third seed of one of them, better or worse, is no part of it; one seed has no error."""
    cell = _cell([*ROWS, _row("auto", 0.10, seed=2), _row("fixed", 0.85, seed=1), _row("prodigy", 0.5, seed=7)])
    assert gaps.gap(cell) == gaps.Gap(pytest.approx(2.0), pytest.approx(4.0), 2)
    assert gaps.gap(cell, "fixed") == gaps.Gap(pytest.approx(3.0), None, 1)
    assert gaps.gap(cell, "auto", to="fixed") == gaps.Gap(pytest.approx(-5.0), None, 1)
    assert gaps.gap(cell, "prodigy") is None
    assert gaps.gap(cell, "dadapt") is None
    assert gaps.gap(_cell([_row("auto", 0.8)])) is None


def test_the_luck_of_the_oracle_is_not_scored():
    """The first seed chooses 0.1, .51 with the second, which chooses 0.02, .86 with the first."""
    assert gaps.gap_without_luck(_cell(ROWS)) == gaps.Gap(
        pytest.approx((86 - 80 + 51 - 90) / 2), pytest.approx(22.5), 2
    )
    assert gaps.gap_without_luck(_cell(ROWS), "auto-from-1") is None
    assert gaps.gap_without_luck(_cell([_row("auto", 0.8)])) is None


def test_settings_that_are_level_share_the_choice():
    rows = [_row("auto", 0.0, seed=seed) for seed in (0, 1)]
    for rate, accuracies in ((0.01, (0.9, 0.5)), (0.02, (0.9, 0.7)), (0.03, (0.2, 0.9))):
        rows += [_row(f"grid:adam:{rate}:linear", value, seed=seed) for seed, value in enumerate(accuracies)]
    found = gaps.gap_without_luck(_cell(rows))
    assert found == gaps.Gap(pytest.approx((20 + 60) / 2), pytest.approx(20.0), 2)


def test_pure_luck_is_a_gap_only_to_those_who_look():
    """Settings that are what sets itself, but for noise: the oracle is ahead, a choice with other seeds is not."""
    draw = random.Random(0)
    lucky, fair = [], []
    for _ in range(60):
        names = ["auto", *contestants.grid()]
        cell = {name: {seed: draw.gauss(90.0, 1.0) for seed in range(3)} for name in names}
        lucky.append(gaps.gap(cell))
        fair.append(gaps.gap_without_luck(cell))
    seen, unseen = (gaps.over_tasks([gap for gap in found if gap is not None]) for found in (lucky, fair))
    assert seen is not None
    assert unseen is not None
    assert seen.points > 0.9
    assert abs(unseen.points) < 0.35


def test_the_mean_over_tasks_has_the_error_of_its_parts():
    both = [gaps.Gap(1.0, 0.3, 3), gaps.Gap(2.0, 0.4, 2)]
    assert gaps.over_tasks(both) == gaps.Gap(pytest.approx(1.5), pytest.approx(0.25), 2)
    assert gaps.over_tasks([*both, gaps.Gap(3.0, None, 1)]) == gaps.Gap(pytest.approx(2.0), None, 1)
    assert gaps.over_tasks([]) is None


def test_the_tables_of_the_documentation():
    rows = [*ROWS, {**_row("auto", 0.5), "epsilon": 3.0}, _row("fixed", 0.95, seed=1)]
    first, second, third = table.markdown(rows, {"toy": "the toy", "never run": "none"}).split("\n\n")
    lines = first.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| the toy | 1 | 87.0 (adam 0.02 linear) | 85.0 | +2.00 ± 4.00 | -16.50 ± 22.50 | — |")
    assert lines[2].endswith("| 2/2/0 |")
    assert lines[3].startswith("| the toy | 3 | — | 50.0 | — |")
    assert (
        "| 1 | DP-Adam | 1 | +2.00 ± 4.00 | -16.50 ± 22.50 | +2.00 ± 4.00 (the toy) | -16.50 ± 22.50 (the toy) |"
        in second
    )
    assert "| 1 | 0.02, linear | 1 | -5.00 | 0 | the toy -5.00 |" in third
    for part in (first, second, third):
        assert len({line.count("|") for line in part.splitlines()}) == 1


def test_the_documentation_shows_the_tables_of_its_record():
    rows = program.read(ROOT / "bench" / "results" / "auto-lr-small.json")
    assert table.markdown(rows, NAMES) in (ROOT / "docs" / "learning-rate.md").read_text()


def test_what_is_missing_is_a_dash():
    text = table.render(ROWS)
    assert "adam:0.02:linear" in text
    assert "mean gap to the oracle at epsilon 1, over 1 tasks: auto +2.00 ± 4.00" in text
    assert " - " in table.render([_row("fixed", 0.8)])


def test_the_grid_is_that_of_the_issue():
    assert len(contestants.grid()) == 7 * 2 * 2
    assert set(contestants.names()) >= {"auto", "fixed", "prodigy", "dadapt", "search"}


class _Small(Task):
    """Small enough for a test: 100 updates, so that probes are made."""

    def plan(self, epsilon: float) -> Plan:
        return Plan.solve(examples=len(self.train), batch_size=100, steps=100, epsilon=epsilon, delta=1e-4)


def _small() -> Task:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(700, 5, generator=generator)
    targets = (features[:, 0] > 0).long()
    train, test = Examples(features[:400], targets[:400]), Examples(features[400:], targets[400:])
    return _Small("small", train, test, lambda: nn.Linear(5, 2))


@pytest.mark.parametrize("contestant", ["auto", "auto-sgdm", "auto-from-1", "fixed", "grid:sgdm:0.3:linear"])
def test_every_kind_of_contestant_learns_what_is_easy(contestant):
    result = contestants.run(contestant, _small(), 8.0, seed=0)
    assert result.accuracy > 0.85
    assert (result.probes > 0) == contestant.startswith("auto")


def test_rows_are_resumed(tmp_path, monkeypatch):
    asked: list[str] = []

    def run(contestant: str, task: Task, epsilon: float, *, seed: int) -> contestants.Result:
        asked.append(contestant)
        return contestants.Result(accuracy=0.5, rate=0.1, updates=1)

    monkeypatch.setattr(contestants, "run", run)
    monkeypatch.setattr(program, "load", lambda name, data, *, small: _small())
    words = ["--tasks", "toy", "--epsilons", "1", "--contestants", "auto", "--out", str(tmp_path / "rows.json")]
    assert program.main([*words, "--seeds", "1"]) == 0
    once = len(asked)
    assert program.main([*words, "--seeds", "2"]) == 0
    assert len(asked) == 2 * once
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 2 * once


def test_the_model_of_names_looks_back_only_and_gives_one_loss_per_name():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NameModel()
    ids = torch.randint(1, 27, (3, 16), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[:, 9:] = 5
    torch.testing.assert_close(model(ids)[:, :9], model(changed)[:, :9])
    targets = ids.clone()
    targets[0, 4:] = -1
    assert name_loss(model, (ids, targets)).shape == (3,)


def test_the_toy_is_what_the_specification_says():
    task = load("toy", Path())
    assert (len(task.train), len(task.test)) == (20_000, 4_000)
    plan = task.plan(8.0)
    assert (plan.batch_size, plan.steps) == (500, 600)
    assert plan.noise_multiplier == pytest.approx(0.730, rel=0.01)


def test_the_simulated_step_is_that_of_the_engine():
    """A second implementation of automatic clipping, against the first."""
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(30) % 3
    world = simulated.World({}, (features, targets, features, targets))
    weights = world.weights(0)
    model = nn.Sequential(nn.Linear(5, simulated.HIDDEN), nn.ReLU(), nn.Linear(simulated.HIDDEN, 3))
    for parameter, layer in zip(model.parameters(), world.layers(weights), strict=True):
        parameter.data.copy_(layer)
    total = clipped_gradient(
        model,
        lambda network, batch: nn.functional.cross_entropy(network(batch[0]), batch[1], reduction="none"),
        (features, targets),
        clipping=Clipping.automatic(),
    )
    engine = torch.cat([value.flatten() for value in total.tensors.values()])
    torch.testing.assert_close(world.clipped(weights, torch.arange(30)), engine, rtol=1e-4, atol=1e-4)


def test_contestants_differ_in_the_rate_alone():
    """Batches and noise of a seed are those of the loop: a rate of the grid, given to it, ends at the same bits."""
    task = _small()
    plan = task.plan(8.0)
    ends = []
    for how in ("plain", "loop"):
        model = task.model(3)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        if how == "loop":
            contestants.looped(task, plan, model, optimizer, 0.02, seed=3)
        else:
            contestants.trained(task, plan, model, optimizer, contestants.SHAPES["linear"], seed=3)
        ends.append(torch.cat([value.detach().flatten() for value in model.parameters()]))
    assert torch.equal(*ends)


def test_the_grid_is_walked_outward_and_left_where_it_is_lost():
    """Best at 0.06: every better rate is met; the far side is left once 5 points are lost."""
    known: dict[str, float] = {}
    accuracies = dict(zip(contestants.RATES["adam"], (0.5, 0.7, 0.79, 0.8, 0.86, 0.9, 0.89), strict=True))
    for setting in pruning.outward():
        _, kind, rate, shape = setting.split(":")
        if (kind, shape) == ("adam", "linear") and pruning.is_worth_a_run(setting, known, seed=0):
            known[setting] = accuracies[float(rate)]
    assert [float(setting.split(":")[2]) for setting in known] == [0.02, 0.01, 0.03, 0.06, 0.1]
    later = {setting for setting in known if pruning.is_worth_a_run(setting, known, seed=1)}
    assert later == {"grid:adam:0.06:linear", "grid:adam:0.1:linear"}


def test_a_setting_left_behind_is_no_oracle():
    rows = [*ROWS, _row("grid:adam:0.06:linear", 0.98)]
    assert gaps.oracle(_cell(rows)) == "grid:adam:0.02:linear"


def test_seeds_are_outermost_and_searches_last(tmp_path):
    options = argparse.Namespace(tasks=["toy", "digits"], epsilons=[1.0], seeds=2)
    cells = list(program.order(options))
    assert [cell[2] for cell in cells if cell[3] != "search"] == sorted(
        cell[2] for cell in cells if cell[3] != "search"
    )
    assert {cell[3] for cell in cells[-4:]} == {"search"}
    assert len(cells) == len(set(cells)) == 2 * 2 * len(contestants.names())


def test_small_tasks_are_cut():
    task = load("toy", Path(), small=True)
    plan = task.plan(3.0)
    assert (len(task.train), len(task.test), plan.batch_size, plan.steps) == (20_000, 4_000, 500, 300)


def test_what_asking_costs_is_told_from_one_run():
    """Two probes of half an update, three of a whole one, among 95 updates that take 1."""
    turns = [(2.0, 2), *[(1.0, 0)] * 47, (4.0, 3), *[(1.0, 0)] * 46]
    cost = overhead.Cost.split(turns)
    assert (len(cost.probes), len(cost.updates)) == (5, 95)
    assert cost.share_of_updates == pytest.approx(0.05)
    assert cost.ratio == pytest.approx(1.0)
    assert cost.share_of_time == pytest.approx(4 / 99)
    assert cost.added_time == pytest.approx(0.0)
    assert cost.noise == pytest.approx(1 / math.sqrt(0.95) - 1)


def test_a_run_is_measured_whole():
    cost = overhead.measure(_small(), 8.0)
    assert len(cost.probes) + len(cost.updates) == 100
    assert len(cost.probes) >= 2
    assert min(cost.updates) > 0


def test_the_simulation_learns_and_asks_twice():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(900, 6, generator=generator)
    targets = (features[:, 0] > 0).long()
    data = (features[:600], targets[:600], features[600:], targets[600:])
    world = simulated.World({3: (150, 160, 1.0)}, data)
    accuracy, rate = simulated.automatic(world, 3, seed=0)
    assert accuracy > 85
    assert 0.002 < rate < 0.3
    for kind, peak in (("adam", 0.02), ("sgdm", 1.0)):
        assert simulated.train(world, 3, rate=peak, kind=kind, seed=0) > 85


@pytest.mark.parametrize(
    ("contestant", "chosen", "is_run"),
    [
        ("auto", ["auto"], True),
        ("auto-sgdm", ["auto"], False),
        ("grid:sgdm:1:linear", ["grid"], True),
        ("grid:sgdm:1:linear", ["grid:adam"], False),
        ("search", [""], True),
    ],
)
def test_contestants_are_chosen_by_name_or_group(contestant, chosen, is_run):
    assert program._is_chosen(contestant, chosen) == is_run
