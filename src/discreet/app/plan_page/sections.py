"""The page's texts and tables: what is proposed, why, what a change would do, and what to beware of."""

from __future__ import annotations

from discreet.app.plan_page.figures import (
    changes_figure,
    knee_figure,
    plane_figure,
    simulation_figure,
    wall_figure,
)
from discreet.app.plan_page.rows import known_rows, reasons
from discreet.app.plan_page.simulated import Simulation
from discreet.app.report import parts
from discreet.app.report.text import duration, percent, plain, safe, scientific, upward
from discreet.insight.extrapolation import Law
from discreet.privacy.options import Proposal


def headline(proposal: Proposal) -> str:
    """What was asked, and the figures of the recommended plan."""
    option, plan = proposal.recommended, proposal.plan
    asked = (
        f"{plain(plan.examples)} examples, ε = {upward(plan.epsilon)}, δ = {scientific(plan.delta)}; "
        f"{safe(proposal.mode.value)}: {parts.sentence(proposal.bound.said)}."
    )
    figures = [
        ("Batch size", plain(plan.batch_size), "expected examples per step"),
        ("Steps", plain(plan.steps), f"{option.epochs:.3g} passes over the data"),
        ("Noise multiplier", plain(plan.noise_multiplier), f"{option.overhead:.3f} × the floor, full batches"),
    ]
    if option.seconds is not None and proposal.machine is not None:
        figures.append(("Time", duration(option.seconds), proposal.machine.place))
    return "\n".join(
        [
            "<header>",
            parts.paragraph("A plan for private training", role="eyebrow"),
            f"<h1>{safe(option.kind.value.capitalize())}: {plain(plan.steps)} steps of {plain(plan.batch_size)}</h1>",
            parts.paragraph(asked, role="lead"),
            "</header>",
            parts.facts(figures),
        ]
    )


def plans_section(proposal: Proposal) -> str:
    """The plans side by side; the recommended one is marked."""
    names = [option.kind.value + (" ✓" if option is proposal.recommended else "") for option in proposal.options]
    rows = [(f"{row.title}<small>{row.note}</small>", *map(safe, cells)) for row, cells in known_rows(proposal.options)]
    return parts.section(
        "The plans side by side",
        markup=[
            parts.table(("", *names), rows=rows, numeric=range(1, len(names) + 1)),
            parts.paragraph(
                "All of them keep the same promise. They differ in how much noise small batches cost, and in compute. "
                "Noise multipliers are solved and certified by the accountant; batch and steps come from closed forms.",
                role="note",
            ),
        ],
    )


def reasons_section(proposal: Proposal) -> str:
    """Why each number of the recommended plan is what it is."""
    option = proposal.recommended
    rows = [(row.title, safe(row.figure(option)), parts.sentence(reason)) for row, reason in reasons(option)]
    return parts.section(
        f"Why {option.kind.value}",
        markup=[
            parts.paragraph(parts.sentence(option.reasons["plan"].capitalize()), role="claim"),
            parts.table(("Number", "Value", "Because"), rows=rows, numeric=(1,)),
        ],
    )


def pictures_section(proposal: Proposal) -> str:
    """The wall, the knee, and the plane of batch and steps."""
    drawn = [
        _picture(
            "The wall",
            wall_figure(proposal),
            caption="Epsilon at constant noise per update: batch and noise multiplier shrink together, so every update "
            "is as noisy and learning goes as before, for less compute. Epsilon stays where it was, until the wall.",
        ),
        _picture(
            "The knee",
            knee_figure(proposal),
            caption="Noise per update at the same epsilon. Beyond the knee a larger batch costs compute and buys next "
            "to nothing; at the wall noise is twice its floor. Curve and points are the accountant's; where knee "
            "and wall lie is a closed form.",
        ),
        _picture(
            "Batch and steps",
            plane_figure(proposal),
            caption="At this plan's noise per update. Solid lines: equal epsilon; dashed lines: equal "
            f"{'time' if proposal.machine is not None else 'compute'}, each a factor of four apart. Where solid lines "
            "stand upright, a smaller batch costs no privacy.",
        ),
    ]
    note = (
        "The lines of equal epsilon in the last picture are the closed form, μ = q √(S (exp(1/σ²) − 1)), scaled to "
        "pass through this plan; all else is the accountant's. What a run has spent is told by its ledger alone."
    )
    if not any(drawn):
        note = "Install the extra discreet[report] to see the pictures here."
    return parts.section("The pictures", markup=[*drawn, parts.paragraph(parts.sentence(note), role="note")])


def simulation_section(proposal: Proposal, simulation: Simulation | None) -> str:
    """What simulated runs at small batches say about the real one; nothing without a simulation."""
    if simulation is None:
        return ""
    sizes = sorted({batch for batch, _ in simulation.points})
    text = (
        f"{len(simulation.points)} runs at batches of {plain(sizes[0])} to {plain(sizes[-1])} and the same noise per "
        f"update. {_trend(simulation)}, which expects "
        f"{percent(simulation.line(simulation.at_batch))} at the real batch of {plain(simulation.at_batch)}; a single "
        f"run there should lie between {percent(simulation.low)} and {percent(simulation.high)}."
    )
    warning = (
        "Small batches are optimistic, and these runs are not private: their noise is the real one's, their sampling "
        "is not. They rank settings and draw this line; they are no result."
    )
    picture = parts.figure(simulation_figure(proposal, simulation), caption=warning)
    stamp = ""
    if simulation.stamp:
        stamp = parts.paragraph(
            f"<strong>{safe(simulation.stamp)}</strong>: these runs read private data, and no epsilon covers them.",
            role="stamp",
        )
    return parts.section("Simulated at constant noise per update", markup=[stamp, parts.paragraph(text), picture])


def _trend(simulation: Simulation) -> str:
    if simulation.law is Law.INVERSE:
        return "Accuracy rises with the batch towards a limit, as 1 / batch falls"
    return f"Their line changes by {100 * simulation.slope:+.2f} points per doubling of the batch"


def _picture(title: str, drawn: str, *, caption: str) -> str:
    if not drawn:
        return ""
    return f"<h3>{safe(title)}</h3>\n{parts.figure(drawn, caption=caption)}"


def changes_section(proposal: Proposal) -> str:
    """What more data, more epsilon or more compute would buy."""
    rows = [(safe(item.change.capitalize()), parts.sentence(item.effect)) for item in proposal.what_if]
    picture = parts.figure(
        changes_figure(proposal),
        caption="Noise summed over the run at a learning rate of 1 / S. Data and epsilon buy in proportion; compute "
        "past the knee buys next to nothing.",
    )
    return parts.section("What a change would do", markup=[picture, parts.table(("Change", "Effect"), rows=rows)])


def warnings_section(proposal: Proposal) -> str:
    """What to know before relying on it."""
    return parts.section("Before you rely on it", markup=[parts.listing(proposal.warnings, role="open")])
