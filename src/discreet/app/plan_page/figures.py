"""The pictures of a plan as inline SVG in the page's colours; empty without the extra ``report``."""

from __future__ import annotations

import math

import numpy as np

from discreet.app.plan_page.curves import (
    constant_tan,
    cost_of,
    decades,
    epsilon_plane,
    full_batch_epsilon,
    overhead_by_batch,
)
from discreet.app.plan_page.simulated import Simulation
from discreet.app.report.axes import DASHES, both_grids, nice, plain_ticks, say, short
from discreet.app.report.plots import ACCENT, ACCENT2, ACCENT3, ALARM, INK, SOFT, can_draw, canvas, for_page
from discreet.app.report.text import duration
from discreet.privacy.options import Proposal
from discreet.privacy.planner import KNEE_OVERHEAD, knee_batch, knee_noise_multiplier
from discreet.privacy.planning import WALL_OVERHEAD

_INCHES = (6.4, 3.5)
_WALL_SIGMA = knee_noise_multiplier(WALL_OVERHEAD)
_KNEE_SIGMA = knee_noise_multiplier(KNEE_OVERHEAD)


def wall_figure(proposal: Proposal) -> str:
    """Epsilon against sigma at constant TAN: flat above the knee, surging at the wall."""
    if not can_draw():
        return ""
    plan = proposal.plan
    nu = plan.noise_multiplier / plan.batch_size
    top = max(8.0, 1.6 * plan.noise_multiplier)
    points = constant_tan(plan, sigmas=decades(0.35, min(top, nu * plan.examples)))
    limit = full_batch_epsilon(plan)
    with canvas("wall", inches=_INCHES) as (drawn, axes):
        both_grids(axes)
        axes.set_xscale("log")
        axes.set_yscale("log")
        sigmas, epsilons = zip(*points, strict=True)
        axes.axvspan(sigmas[0], _WALL_SIGMA, color=ALARM, alpha=0.08, linewidth=0)
        axes.axhline(limit, color=SOFT, linewidth=1.0, linestyle=DASHES)
        axes.plot(sigmas, epsilons, color=ACCENT, linewidth=2.0)
        axes.axvline(_KNEE_SIGMA, color=ACCENT2, linewidth=1.0, linestyle=DASHES)
        axes.plot(plan.noise_multiplier, plan.epsilon, marker="o", markersize=7, color=ACCENT, markeredgecolor=INK)
        say(axes, "this plan", at=(plan.noise_multiplier, plan.epsilon), shift=(7, 8), colour=INK, weight="bold")
        say(axes, "the wall", at=(_WALL_SIGMA, epsilons[0]), shift=(-6, -4), colour=ALARM, right=True)
        say(axes, "the knee", at=(_KNEE_SIGMA, epsilons[0]), shift=(5, -4), colour=ACCENT2)
        say(axes, f"full batches: {limit:.3g}", at=(sigmas[-1], limit), shift=(-2, -11), colour=SOFT, right=True)
        plain_ticks(
            axes, x=(0.35, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 20, 40, 80), y=nice(min(epsilons), max(epsilons))
        )
        axes.set_xlim(sigmas[0], sigmas[-1])
        axes.set_xlabel("noise multiplier σ, at constant σ / B and S (batch grows to the right)")
        axes.set_ylabel("ε")
    return for_page(drawn.getvalue(), prefix="wall")


def knee_figure(proposal: Proposal) -> str:
    """Noise per update over its floor, against the batch, with the wall, the knee and the plans."""
    if not can_draw():
        return ""
    plan, mu = proposal.plan, proposal.mu
    knee = knee_batch(examples=plan.examples, mu=mu, steps=plan.steps)
    wall = knee_batch(examples=plan.examples, mu=mu, steps=plan.steps, overhead=WALL_OVERHEAD)
    here = [option for option in proposal.options if option.plan.steps == plan.steps]
    low = min([wall / 4, *(0.7 * option.plan.batch_size for option in here)])
    high = min(plan.examples, max([6 * knee, *(1.6 * option.plan.batch_size for option in here)]))
    floor = plan.noise_multiplier / plan.batch_size / proposal.recommended.overhead
    curve = overhead_by_batch(plan, floor=floor, batches=decades(max(1.0, low), high))
    points = [point for point in curve if point[1] <= 8]
    with canvas("knee", inches=_INCHES) as (drawn, axes):
        both_grids(axes)
        axes.set_xscale("log")
        axes.set_yscale("log")
        batches, ratios = zip(*points, strict=True)
        axes.plot(batches, ratios, color=ACCENT, linewidth=2.0)
        axes.axhline(1.0, color=SOFT, linewidth=1.0, linestyle=DASHES)
        say(axes, "full batches", at=(batches[0], 1.0), shift=(3, 3), colour=SOFT)
        for batch, name, colour in ((wall, "the wall", ALARM), (knee, "the knee", ACCENT2)):
            if batches[0] <= batch <= batches[-1]:
                axes.axvline(batch, color=colour, linewidth=1.0, linestyle=DASHES)
                say(axes, name, at=(batch, ratios[0]), shift=(5, -4), colour=colour)
        for option in here:
            chosen = option is proposal.recommended
            axes.plot(
                option.plan.batch_size,
                option.overhead,
                marker="o",
                markersize=8 if chosen else 6,
                color=ACCENT if chosen else ACCENT3,
                markeredgecolor=INK,
                markeredgewidth=1.2 if chosen else 0.6,
            )
            weight = "bold" if chosen else "normal"
            say(
                axes,
                option.kind.value,
                at=(option.plan.batch_size, option.overhead),
                shift=(6, 7),
                colour=INK,
                weight=weight,
            )
        plain_ticks(axes, x=nice(batches[0], batches[-1]), y=(1, 1.1, 1.25, 1.5, 2, 3, 4, 6, 8))
        axes.set_ylim(0.96, max(1.3, max(ratios) * 1.06))
        axes.set_xlabel(f"expected batch B, at ε = {plan.epsilon:g} and {plan.steps} steps")
        axes.set_ylabel("noise per update, full batches = 1")
    return for_page(drawn.getvalue(), prefix="knee")


def plane_figure(proposal: Proposal) -> str:
    """Lines of equal epsilon and of equal cost over (steps, batch), at the noise per update of the recommended plan."""
    if not can_draw():
        return ""
    plan, mu = proposal.plan, proposal.mu
    nu = plan.noise_multiplier / plan.batch_size
    steps = np.geomspace(max(1.0, plan.steps / 20), plan.steps * 20, 60)
    batches = np.geomspace(max(1.0, 0.36 / nu), min(plan.examples, max(8.0 / nu, 2.5 * plan.batch_size)), 60)
    epsilons = epsilon_plane(plan, mu=mu, steps=steps, batches=batches)
    costs = np.array([[cost_of(proposal, batch_size=b, steps=s) for s in steps] for b in batches])
    here = cost_of(proposal, batch_size=plan.batch_size, steps=plan.steps)
    in_time = proposal.machine is not None
    with canvas("plane", inches=(6.4, 4.1)) as (drawn, axes):
        both_grids(axes)
        axes.set_xscale("log")
        axes.set_yscale("log")
        levels = [plan.epsilon * factor for factor in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)]
        lines = axes.contour(steps, batches, epsilons, levels=levels, colors=ACCENT, linewidths=[1, 1, 2.2, 1, 1, 1])
        axes.clabel(lines, fmt=lambda value: f"ε {value:.3g}", fontsize=8, colors=ACCENT)
        money = axes.contour(
            steps,
            batches,
            costs,
            levels=[here * 4.0**power for power in (-2, -1, 0, 1, 2)],
            colors=SOFT,
            linewidths=1.0,
            linestyles="dashed",
        )
        axes.clabel(money, fmt=lambda value: _cost(value, in_time=in_time), fontsize=8, colors=SOFT)
        for sigma, name, colour in ((_WALL_SIGMA, "wall", ALARM), (_KNEE_SIGMA, "knee", ACCENT2)):
            if batches[0] < sigma / nu < batches[-1]:
                axes.axhline(sigma / nu, color=colour, linewidth=1.0, linestyle=(0, (1, 2)))
                say(
                    axes,
                    f"{name}, σ = {sigma:.2f}",
                    at=(steps[-1], sigma / nu),
                    shift=(-3, 3),
                    colour=colour,
                    right=True,
                )
        axes.plot(plan.steps, plan.batch_size, marker="o", markersize=8, color=ACCENT, markeredgecolor=INK)
        say(axes, "this plan", at=(plan.steps, plan.batch_size), shift=(7, 7), colour=INK, weight="bold")
        plain_ticks(axes, x=nice(steps[0], steps[-1]), y=nice(batches[0], batches[-1]))
        axes.set_xlabel("steps S")
        axes.set_ylabel("expected batch B")
    return for_page(drawn.getvalue(), prefix="plane")


def changes_figure(proposal: Proposal) -> str:
    """Bars: what each change does to the noise that reaches the model."""
    if not can_draw():
        return ""
    items = [item for item in proposal.what_if if not item.change.endswith("the same noise")]
    with canvas("changes", inches=(6.4, 0.5 + 0.32 * len(items))) as (drawn, axes):
        axes.grid(visible=False)
        for place, item in enumerate(reversed(items)):
            better = item.factor <= 1
            axes.barh(place, item.factor - 1, left=1, height=0.62, color=ACCENT if better else ALARM, alpha=0.85)
            side = -1 if better else 1
            axes.annotate(
                f"× {item.factor:.2f}",
                xy=(item.factor, place),
                xytext=(5 * side, 0),
                textcoords="offset points",
                ha="right" if better else "left",
                va="center",
                color=INK,
                fontsize=8.5,
            )
        axes.axvline(1.0, color=SOFT, linewidth=1.0)
        axes.set_yticks(range(len(items)), [item.change for item in reversed(items)], color=INK)
        factors = [item.factor for item in items]
        axes.set_xlim(min(factors) - 0.22, max(factors) + 0.22)
        axes.set_xlabel("noise that reaches the model, this plan = 1")
    return for_page(drawn.getvalue(), prefix="changes")


def simulation_figure(proposal: Proposal, simulation: Simulation) -> str:
    """Accuracy of simulated runs against the batch, the line through them, its band, and the real batch."""
    if not can_draw():
        return ""
    least = min(batch for batch, _ in simulation.points)
    batches = decades(least, max(simulation.at_batch, *(batch for batch, _ in simulation.points)) * 1.15, count=60)
    with canvas("simulation", inches=_INCHES) as (drawn, axes):
        both_grids(axes)
        axes.set_xscale("log", base=2)
        band = simulation.band(batches)
        if band:
            low, high = zip(*band, strict=True)
            axes.fill_between(batches, low, high, color=ACCENT3, alpha=0.35, linewidth=0)
        axes.plot(batches, [simulation.line(batch) for batch in batches], color=ACCENT, linewidth=1.8)
        x, y = zip(*simulation.points, strict=True)
        axes.plot(
            x, y, linestyle="none", marker="o", markersize=5, color=ACCENT2, markeredgecolor=INK, markeredgewidth=0.5
        )
        real = simulation.line(simulation.at_batch)
        axes.errorbar(
            simulation.at_batch,
            real,
            yerr=[[max(0.0, real - simulation.low)], [max(0.0, simulation.high - real)]],
            color=INK,
            marker="D",
            markersize=6,
            capsize=4,
            linewidth=1.4,
        )
        say(axes, "the real run", at=(simulation.at_batch, simulation.high), shift=(-6, 6), colour=INK, right=True)
        axes.set_xticks([2**power for power in range(int(math.log2(least)), int(math.log2(batches[-1])) + 1)])
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
        axes.minorticks_off()
        axes.margins(y=0.12)
        axes.set_xlabel(f"simulated batch, at constant σ / B and {proposal.plan.steps} steps")
        axes.set_ylabel("accuracy")
    return for_page(drawn.getvalue(), prefix="simulation")


def _cost(value: float, *, in_time: bool) -> str:
    return duration(value).replace("\u00a0", " ") if in_time else f"{short(float(f'{value:.2g}'))} examples"
