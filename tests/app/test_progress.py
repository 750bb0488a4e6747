from __future__ import annotations

import pytest

from discreet.app import progress
from discreet.app.progress import Progress
from discreet.app.training import evaluations
from discreet.privacy.plan import Plan


def test_plain_lines_when_not_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 6.0, 7.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    asked: list[float] = []
    with Progress(steps=10) as shown:
        for done, epsilon in ((1, 0.5), (2, 0.8), (3, 0.9), (10, 2.0)):
            shown.show(done, epsilon=lambda spent=epsilon: asked.append(spent) or spent)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert asked == [0.8, 2.0]  # what is not shown is not composed
    assert printed.err.splitlines() == [
        "step 2/10  epsilon 0.800  24s left",
        "step 10/10  epsilon 2.000  0s left",
    ]


def test_steps_of_an_earlier_process_do_not_count_as_fast(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    Progress(steps=400, done=200).show(210, epsilon=lambda: 1.0)
    assert capsys.readouterr().err == "step 210/400  epsilon 1.000  3m 10s left\n"


@pytest.mark.parametrize(("seconds", "text"), [(3.2, "3s"), (61, "1m 01s"), (7265, "2h 01m")])
def test_clock(seconds: float, text: str) -> None:
    assert progress._clock(seconds) == text


@pytest.mark.parametrize(
    ("batch", "steps", "held_out", "expected"),
    [(250, 300, 350, 10), (700, 136, 10_000, 1), (2_900, 300, 16_281, 8), (10, 5, 0, 7), (10, 1, 100_000, 1)],
)
def test_evaluations_on_the_way_are_few_where_training_is_short(
    batch: int, steps: int, held_out: int, expected: int
) -> None:
    plan = Plan.solve(examples=3_000, batch_size=batch, steps=steps, noise_multiplier=1.0)
    assert evaluations(plan, held_out=held_out) == expected
    assert expected == 1 or expected * held_out / 3 <= 0.05 * batch * steps
