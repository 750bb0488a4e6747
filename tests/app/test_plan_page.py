"""The page of a plan: self-contained, escaped, with its pictures, and honest about what is simulated."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from discreet.app.plan_page import Simulation, read_simulation, render_page
from discreet.app.plan_page.curves import constant_tan, decades, epsilon_at, full_batch_epsilon, overhead_by_batch
from discreet.app.plan_page.rows import in_terminal, known_rows, reasons
from discreet.app.planning import Planned
from discreet.app.report import plots
from discreet.errors import ConfigError
from discreet.privacy.accounting import epsilon
from discreet.privacy.compute import Machine
from discreet.privacy.options import Proposal
from discreet.privacy.planning import plan

RUNS = tuple((batch, 0.93 - 0.004 * math.log2(batch) + 0.002 * seed) for batch in (16, 32, 64) for seed in (-1, 0, 1))
SIMULATION = Simulation(points=RUNS, slope=-0.004, intercept=0.93, at_batch=2_048, low=0.87, high=0.90)


class Page(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


@pytest.fixture(scope="module")
def proposal() -> Proposal:
    machine = Machine(seconds_per_example=1e-4, seconds_per_step=1e-2, parameters=10_000, place="<b>a & b</b>")
    return plan(examples=60_000, epsilon=3.0, samples=300_000, usual_steps=300, machine=machine)


@pytest.fixture(scope="module")
def page(proposal: Proposal) -> str:
    return render_page(proposal, simulation=SIMULATION)


def test_the_page_is_self_contained(page: str) -> None:
    found = Page(page)
    assert not {"script", "link", "iframe", "object", "embed", "img", "form", "base", "a"} & set(found.tags)
    assert "http" not in page.replace("http-equiv", "")
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert "<b>a" not in page
    assert "&lt;b&gt;a &amp; b" in page
    identifiers = [value for name, value in found.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))


def test_all_pictures_are_there(page: str) -> None:
    assert Page(page).tags.count("svg") == 5
    for words in ("The wall", "The knee", "Batch and steps", "Simulated at constant noise", "What a change would do"):
        assert words in page
    for words in ("this plan", "full batches:", "balanced", "epsilon halved", "the real run"):
        assert f">{words}" in page


def test_every_plan_and_every_reason_is_there(page: str, proposal: Proposal) -> None:
    for option in proposal.options:
        assert option.kind.value in page
    for warning in proposal.warnings:
        assert warning[:60] in page
    assert "they are no result" in page


def test_page_and_terminal_show_the_same_figures(page: str, proposal: Proposal) -> None:
    chosen = proposal.recommended
    text = Planned(proposal=proposal, chosen=chosen, data=None, out=None, html=None).text()
    for row, cells in known_rows(proposal.options):
        line = next(line for line in text.splitlines() if line.startswith(row.label))
        for cell in cells:
            assert f">{cell}</td>" in page
            assert in_terminal(cell) in line
    for row, reason in reasons(chosen):
        assert f"  {row.label} {in_terminal(row.figure(chosen))}: {reason}" in text
        assert f"<td>{row.title}</td>" in page
    words = re.sub(r"(?s)<(style|svg).*?</\1>", "", page)
    assert re.findall(r"\d\.\d{5,}", text + words) == []
    assert "\u202f" not in text


@pytest.mark.parametrize(
    ("figure", "shown"),
    [("2\u202f881", "2,881"), ("5.56 × 10⁻⁶", "5.56e-6"), ("1\u00a0min\u00a059\u00a0s", "1 min 59 s"), ("yes", "yes")],
)
def test_a_figure_in_a_terminal_is_plain(figure: str, shown: str) -> None:
    assert in_terminal(figure) == shown


def test_the_same_proposal_gives_the_same_page(page: str, proposal: Proposal) -> None:
    assert render_page(proposal, simulation=SIMULATION) == page


def test_without_the_extra_it_says_so(proposal: Proposal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("discreet.app.plan_page.figures.can_draw", lambda: False)
    monkeypatch.setattr(plots, "can_draw", lambda: False)
    text = render_page(proposal, simulation=SIMULATION)
    assert "svg" not in Page(text).tags
    assert "discreet[report]" in text


def test_the_wall_is_the_accountants(proposal: Proposal) -> None:
    """The curve passes through the plan, falls to full batches, and is the accountant's where it was asked."""
    made = proposal.plan
    points = constant_tan(made, sigmas=decades(0.5, 8.0, count=60))
    values = [value for _, value in points]
    assert values == sorted(values, reverse=True)
    nearest = min(points, key=lambda point: abs(math.log(point[0] / made.noise_multiplier)))
    assert nearest[1] == pytest.approx(made.epsilon, rel=0.08)
    assert values[-1] > full_batch_epsilon(made) > 0
    assert values[0] > 2 * made.epsilon


def test_the_knee_curve_passes_through_the_plan(proposal: Proposal) -> None:
    made, overhead = proposal.plan, proposal.recommended.overhead
    floor = made.noise_multiplier / made.batch_size / overhead
    points = overhead_by_batch(made, floor=floor, batches=decades(made.batch_size / 3, made.batch_size * 3, count=41))
    assert points[20][0] == pytest.approx(made.batch_size, rel=1e-6)
    assert points[20][1] == pytest.approx(overhead, rel=0.02)


def test_the_closed_form_is_anchored_at_the_plan() -> None:
    """Exact at the plan; at twice the steps within 5 % of the accountant, where sigma is above 2."""
    free = plan(examples=60_000, epsilon=3.0, usual_steps=300)
    made = free.plan

    def at(steps: int) -> float:
        sigma = made.noise_multiplier
        return epsilon_at(made, batch_size=made.batch_size, steps=steps, noise_multiplier=sigma, mu=free.mu)

    assert at(made.steps) == pytest.approx(made.epsilon, rel=1e-6)
    assert at(2 * made.steps) == pytest.approx(epsilon(made.queries(2 * made.steps), delta=made.delta), rel=0.05)


def test_the_band_is_that_of_one_new_run() -> None:
    """The textbook interval, by hand: n = 9, t(7) = 2.3646, s^2 = sum of squares / 7."""
    x = np.log2([batch for batch, _ in RUNS])
    residuals = np.array([0.002 * seed for _ in range(3) for seed in (-1, 0, 1)])
    s = math.sqrt((residuals**2).sum() / 7)
    half = 2.36462 * s * math.sqrt(1 + 1 / 9 + (11 - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum())
    ((low, high),) = SIMULATION.band([2_048])
    assert (high - low) / 2 == pytest.approx(half, rel=1e-5)
    assert (high + low) / 2 == pytest.approx(0.93 - 0.004 * 11)
    alone = Simulation(points=RUNS[:2], slope=0.0, intercept=0.9, at_batch=64, low=0.8, high=0.9)
    assert alone.band([64]) == []


def _record() -> dict[str, object]:
    return {
        "points": [{"batch": batch, "seed": 0, "accuracy": accuracy} for batch, accuracy in RUNS],
        "fit": {"slope": -0.004, "intercept": 0.93, "at_batch": 2_048, "low": 0.87, "high": 0.90, "runs": 9},
        "more": "is ignored",
    }


def test_a_law_and_a_stamp_are_read(tmp_path: Path) -> None:
    record = _record()
    fit = {**record["fit"], "law": "1 / B", "slope": -0.7, "intercept": 0.93}  # type: ignore[dict-item]
    path = tmp_path / "simulation.json"
    path.write_text(json.dumps({**record, "fit": fit, "stamp": "NON-PRIVATE"}))
    found = read_simulation(path)
    assert found.line(64) == pytest.approx(0.93 - 0.7 / 64)
    assert found.stamp == "NON-PRIVATE"
    assert len(found.band([64])) == 1
    path.write_text(json.dumps({**record, "fit": {**fit, "law": "B"}}))
    with pytest.raises(ConfigError, match="law must be one of"):
        read_simulation(path)


def test_a_simulation_is_read(tmp_path: Path) -> None:
    path = tmp_path / "simulation.json"
    path.write_text(json.dumps(_record()))
    assert read_simulation(path) == SIMULATION


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": []}, "points must be a list"),
        ({"points": [{"batch": 16.5, "accuracy": 0.5}]}, "batch must be a whole number"),
        ({"points": [{"batch": 16, "accuracy": 1.5}]}, "accuracy must be between 0 and 1"),
        ({"points": ["x"]}, "batch must be a finite number"),
        ({"fit": None}, "fit must be an object"),
        ({"fit": {"slope": True}}, "slope must be a finite number"),
    ],
)
def test_a_broken_simulation_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "simulation.json"
    path.write_text(json.dumps(_record() | change))
    with pytest.raises(ConfigError, match=message):
        read_simulation(path)
