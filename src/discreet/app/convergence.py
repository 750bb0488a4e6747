"""`discreet check --convergence`: what each clipping rule does to the descent of the model for a data file.

The examples are made up, with the public shape of the data: no private value reaches the model, the table or the page.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch

from discreet.app import models
from discreet.app.options import DataOptions, open_data, stand_in
from discreet.app.report import parts
from discreet.app.report.plots import ACCENT, ACCENT2, ACCENT3, ALARM, INK, SOFT, can_draw, canvas, for_page
from discreet.app.stand_ins import random_examples
from discreet.core.clipping import Clipping
from discreet.core.style import Style
from discreet.errors import ConfigError
from discreet.insight.convergence import Convergence, convergence_report, stationary_probability
from discreet.insight.origin import Origin
from discreet.privacy.files import write_atomically

EXAMPLES = 12
_STEPS, _RATE = 150, 0.03
_INCHES = (6.4, 3.5)
_COLOURS = (INK, ACCENT, ALARM, ACCENT2, ACCENT3, SOFT)
_LINES = ("-", "-", "-", "--", "--", ":")

RULES = {
    "none": Clipping.none(),
    "abadi 2": Clipping.abadi(2.0),
    "abadi 0.1": Clipping.abadi(0.1),
    "automatic": Clipping.automatic(),
    "psac": Clipping.psac(0.1),
    "abadi 2, by layers": Clipping.abadi(2.0, style=Style.per_layer()),
}
"""The rules that are compared: the tangent kernel knows no noise, so the guarantee is not part of this."""


def check_convergence(data: DataOptions, *, kind: models.ModelKind) -> Convergence:
    """Kernel, spectra, slopes and noise-free descent of the model that `discreet train` would build for this data."""
    spec = stand_in(open_data(data, kind=kind), kind=kind, clipping=RULES["none"])
    with torch.random.fork_rng():
        model = models.build(spec).double().eval()
    inputs, targets = random_examples(spec, count=EXAMPLES)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    return convergence_report(model, inputs, targets, rules=RULES, origin=Origin.PUBLIC, steps=_STEPS, rate=_RATE)


def render_page(found: Convergence) -> str:
    """The table and the pictures as one self-contained page. A function of its argument alone."""
    rows = [
        (
            parts.sentence(name),
            f"{min(flow.eigenvalues):.3g}",
            f"{flow.definite:.3g}",
            f"{flow.asymmetry:.3g}",
            f"{flow.slope:.4g}",
            f"{100 * flow.clipped:.0f}&nbsp;%",
            "falls" if flow.falls else "rises",
        )
        for name, flow in found.flows.items()
    ]
    header = ("Rule", "Least eigenvalue", "of the symmetric part", "Asymmetry", "dL/dt", "Clipped", "The loss")
    made_up = f"{found.examples} made-up examples of the data's public shape, {found.outputs} outputs, no noise."
    return parts.page(
        title="Descent under clipping",
        markup=[
            "<header>",
            parts.paragraph("Convergence", role="eyebrow"),
            "<h1>Descent under clipping</h1>",
            "</header>",
            parts.section(
                "What each rule does",
                markup=[
                    parts.paragraph(parts.sentence(found.stamp), role="stamp") if found.stamp else "",
                    parts.paragraph(parts.sentence(made_up)),
                    parts.table(header, rows=rows, numeric=(1, 2, 3, 4, 5), role="wide"),
                ],
            ),
            parts.section(
                "Pictures",
                markup=[
                    parts.figure(
                        spectrum_figure(found),
                        caption="Eigenvalues of M in f' = -M l', largest first. Without clipping M is the kernel "
                        "itself. One norm over all parameters keeps them positive; norms by layers need not.",
                    ),
                    parts.figure(
                        descent_figure(found),
                        caption="The summed loss along clipped descent without noise, each rule at the same shrinking "
                        "rate. A clipped loss may rise although every example's own step is downhill.",
                    ),
                    parts.figure(
                        stationary_figure(),
                        caption="Where clipped descent leaves the predicted probability of a logistic model whose "
                        "examples share one input of norm 1, from closed forms. Above the diagonal it is too sure.",
                    ),
                ],
            ),
        ],
    )


def write_page(found: Convergence, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        ConfigError: it cannot be written there.
    """
    try:
        write_atomically(path, render_page(found))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name a file that can.") from None


def spectrum_figure(found: Convergence) -> str:
    """Positive eigenvalues on a logarithmic axis; what is negative is marked at the bottom."""
    if not can_draw():
        return ""
    with canvas("spectrum", inches=_INCHES) as (drawn, axes):
        axes.set_yscale("log")
        positive = [value for flow in found.flows.values() for value in flow.eigenvalues if value > 0]
        floor = min(positive, default=1.0) / 3
        for (name, flow), colour, line in zip(found.flows.items(), _COLOURS, _LINES, strict=True):
            values = [max(value, floor) for value in flow.eigenvalues]
            axes.plot(range(1, len(values) + 1), values, color=colour, linestyle=line, linewidth=1.8, label=name)
            below = [place for place, value in enumerate(flow.eigenvalues, 1) if value <= 0]
            axes.plot(below, [floor] * len(below), marker="v", markersize=5, linestyle="", color=colour)
        axes.set_xlabel("place")
        axes.set_ylabel("eigenvalue")
        _legend(axes)
    return for_page(drawn.getvalue(), prefix="spectrum")


def _legend(axes: Any) -> None:
    """Above the picture, where no line runs."""
    axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def descent_figure(found: Convergence) -> str:
    """Loss against step, a line for each rule."""
    if not can_draw() or not found.curves:
        return ""
    with canvas("descent", inches=_INCHES) as (drawn, axes):
        for (name, curve), colour, line in zip(found.curves.items(), _COLOURS, _LINES, strict=True):
            axes.plot(range(len(curve)), curve, color=colour, linestyle=line, linewidth=1.8, label=name)
        axes.set_xlabel("step")
        axes.set_ylabel("summed loss, nats")
        axes.set_ylim(bottom=0)
        _legend(axes)
    return for_page(drawn.getvalue(), prefix="descent")


def stationary_figure() -> str:
    """Predicted against true probability, by rule."""
    if not can_draw():
        return ""
    rules = {
        "none, or a large bound": Clipping.none(),
        "abadi, R = 0.5": Clipping.abadi(0.5),
        "abadi, R = 0.1": Clipping.abadi(0.1),
        "automatic, γ = 0.01": Clipping.automatic(),
        "psac, r = 0.1": Clipping.psac(0.1),
        "global, R = 0.75": Clipping.global_(0.75),
    }
    places = torch.linspace(0.5, 0.995, 100, dtype=torch.float64).tolist()
    with canvas("stationary", inches=_INCHES) as (drawn, axes):
        for (name, rule), colour, line in zip(rules.items(), _COLOURS, _LINES, strict=True):
            predicted = [stationary_probability(rule, place) for place in places]
            axes.plot(places, _broken(predicted), color=colour, linestyle=line, linewidth=1.8, label=name)
        axes.set_xlabel("true probability of the more likely class")
        axes.set_ylabel("predicted")
        _legend(axes)
    return for_page(drawn.getvalue(), prefix="stationary")


def _broken(values: list[float]) -> list[float]:
    """A gap where a curve jumps."""
    jumps = [abs(after - before) > 0.1 for before, after in itertools.pairwise(values)]
    return [math.nan if jump else value for value, jump in zip(values, [*jumps, False], strict=True)]
