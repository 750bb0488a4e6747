"""Per-example gradients by autograd alone, one loss after the other: what the self-check compares the engine with.

Shape legend: B = examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from discreet.core.clipping import Clipping
from discreet.core.gradient import LossFunction
from discreet.core.layout import frozen_state, recomputes
from discreet.core.uses import zeros_like_sums


@dataclass(frozen=True)
class BruteForce:
    """What autograd alone finds, one example at a time: norms, the clipped sum, and how much was added up in it."""

    norms: dict[str, Tensor]
    sums: dict[str, Tensor]
    scale: float
    connected: set[str]

    def sum_agrees(self, found: Mapping[str, Tensor], tolerance: float) -> bool:
        """Whether a clipped sum is this one, relative to all that was added up."""
        gaps = [(value - found[name]).norm().double() for name, value in self.sums.items()]
        return float(torch.stack(gaps).norm()) <= tolerance * max(self.scale, tolerance)


def by_brute_force(
    model: nn.Module,
    loss: LossFunction,
    batch: Any,
    parameters: dict[str, nn.Parameter],
    size: int,
    clipping: Clipping,
) -> BruteForce:
    """Per-example gradients by autograd alone; only one example's gradients are held at a time."""
    rules = clipping.divide(parameters).rules
    sums = zeros_like_sums(parameters)
    norms: dict[str, list[Tensor]] = {name: [] for name in parameters}
    added, connected = [], set()
    for row in one_at_a_time(model, loss, batch, parameters, range(size)):
        connected |= {name for name, gradient in zip(parameters, row, strict=True) if gradient is not None}
        each = {
            name: torch.zeros_like(sums[name]) if gradient is None else gradient.to(sums[name].dtype)
            for name, gradient in zip(parameters, row, strict=True)
        }
        for name, gradient in each.items():
            norms[name].append(gradient.norm())
        for group, rule in rules.items():
            norm = torch.stack([norms[name][-1] for name in group]).norm()
            if not bool(torch.isfinite(norm)):
                continue
            factor = rule.factor(norm.reshape(1))[0]
            added.append(float(norm * factor))
            for name in group:
                sums[name].add_(each[name] * factor)
    return BruteForce({name: torch.stack(each) for name, each in norms.items()}, sums, sum(added), connected)


def one_at_a_time(
    model: nn.Module, loss: LossFunction, batch: Any, parameters: dict[str, nn.Parameter], wanted: Sequence[int]
) -> Iterator[tuple[Tensor | None, ...]]:
    """Gradients of one loss after the other, in the order of the parameters, by autograd alone."""
    losses = loss(model, batch)
    if recomputes(losses):
        yield from _recomputed(model, loss, batch, parameters, wanted)
        return
    for place, index in enumerate(wanted):
        try:
            row = torch.autograd.grad(losses[index], list(parameters.values()), retain_graph=True, allow_unused=True)
        except RuntimeError:
            if place == 0:
                raise
            # A graph that can be gone through once, as selective activation checkpoints make it.
            yield from _recomputed(model, loss, batch, parameters, wanted[place:])
            return
        yield row


def _recomputed(
    model: nn.Module, loss: LossFunction, batch: Any, parameters: dict[str, nn.Parameter], wanted: Sequence[int]
) -> Iterator[tuple[Tensor | None, ...]]:
    """The same where ``autograd.grad`` is not to be had: stand-ins for the parameters collect the gradients."""

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, index: int) -> None:
            with frozen_state(model, seed=torch.initial_seed()):  # the same random numbers for every row
                loss(self.model, batch)[index].backward()

    for index in wanted:
        stand_ins = {f"model.{name}": nn.Parameter(parameter.detach()) for name, parameter in parameters.items()}
        torch.func.functional_call(Loss(), stand_ins, (index,))
        yield tuple(stand_in.grad for stand_in in stand_ins.values())


def norms_of(row: Sequence[Tensor | None]) -> list[float]:
    """The norms of one example's gradients; 0 where there is none."""
    return [0.0 if gradient is None else float(gradient.double().norm()) for gradient in row]
