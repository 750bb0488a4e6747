"""`discreet check --convergence`: made-up examples alone, a table, and a page that loads nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from discreet.app import cli
from discreet.app.convergence import RULES, render_page, stationary_figure
from discreet.core.clipping import Clipping
from discreet.insight.convergence import Convergence, Flow
from discreet.insight.origin import Origin


def _found(origin: Origin) -> Convergence:
    flow = Flow(
        rule=Clipping.automatic().describe(),
        eigenvalues=(3.0, 0.5, -0.1),
        rotation=0.0,
        definite=-0.2,
        asymmetry=0.7,
        loss=4.0,
        slope=0.3,
        clipped=0.5,
    )
    return Convergence(dict.fromkeys(RULES, flow), dict.fromkeys(RULES, (4.0, 4.5, 3.0)), 12, 3, origin)


def test_the_page_says_what_rises_and_stands_alone() -> None:
    page = render_page(_found(Origin.PUBLIC))
    assert "rises" in page
    assert "NON-PRIVATE" not in page
    assert "<script" not in page
    assert "NON-PRIVATE" in render_page(_found(Origin.PRIVATE))


def test_the_pictures_are_drawn_where_they_can_be() -> None:
    pytest.importorskip("matplotlib")
    page = render_page(_found(Origin.PUBLIC))
    assert page.count("<svg") == 3
    assert "abadi, R = 0.1" in stationary_figure()


def test_the_command_compares_the_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.csv"
    table.write_text("a,b,y\n" + "".join(f"{i % 7},{i % 5},{'no' if i % 3 else 'yes'}\n" for i in range(60)))
    page = tmp_path / "c.html"
    assert cli.main(["check", str(table), "--target", "y", "--convergence", "--html", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["flows"]) == set(RULES)
    assert found["flows"]["none"]["asymmetry"] < 1e-9
    assert found["flows"]["none"]["slope"] < 0
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert cli.main(["check", str(table), "--target", "y", "--html", str(page)]) == 2
