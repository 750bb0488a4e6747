from __future__ import annotations

import pytest

from discreet.app import progress
from discreet.app.progress import Progress


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
