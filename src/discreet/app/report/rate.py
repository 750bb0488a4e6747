"""How a learning rate set itself: every private answer that it rests on, as a table."""

from __future__ import annotations

from discreet.app.report import parts
from discreet.app.report.record import RunRecord


def rate_section(run: RunRecord) -> str:
    """What was asked and answered, in order; empty when the rate was given."""
    rows = []
    for metric in run.metrics:
        values = metric.values
        if "probe_rise" in values:
            rows.append(
                (
                    str(metric.step),
                    f"{values.get('probe_displacement', 0.0):.3g}",
                    f"{values['probe_rise']:+.2f} ± {values.get('probe_noise', 0.0):.2f}",
                    f"{values.get('probe_rate', 0.0):.3g}",
                )
            )
    if not rows:
        return ""
    return parts.section(
        "How the learning rate set itself",
        markup=[
            parts.table(
                (
                    "Update spent",
                    "Noise in weights",
                    "Rise of the mean loss<small>in units of what it may lose</small>",
                    "Rate",
                ),
                rows=rows,
                numeric=(0, 1, 2, 3),
            ),
            parts.paragraph(
                "Each row is one update of the plan, spent on one number in place of a gradient: part of the privacy "
                "loss above, and not beside it. The rate aims at noise that costs all there is to lose, a rise of 1: "
                "the loss itself before training, later what has been learned.",
                role="note",
            ),
        ],
    )
