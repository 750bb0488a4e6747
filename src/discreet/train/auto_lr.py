"""The learning rate, when nobody sets one: a fixed DP-Adam rate with linear decay to zero.

The best rate of DP-SGD grows linearly with epsilon, but that of sign-like methods, DP-Adam among them, is nearly
independent of it (arXiv:2603.03226): Adam divides by the size of what it sees, and under DP that is mostly the noise.
So one public rate transfers across budgets, and nothing about the data goes into it. Probing the loss inside the budget
(HyFreeDP, arXiv:2503.00703) is to replace this rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LRScheduler

from discreet.errors import ConfigError

AUTO = "auto"
DEFAULT_ADAM_RATE = 0.02
"""Peak rate for Adam-like optimizers on normalised gradients; see docs/lab-notes.md for the sweeps behind it."""

LearningRate = float | str | LRScheduler | None
"""A peak rate with linear decay; "auto"; a torch scheduler, stepped once per update; None: the optimizer's own."""


@dataclass(frozen=True)
class LinearDecay:
    """``peak * (1 - step / steps)``, a function of public numbers only."""

    peak: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.peak < float("inf"):
            raise ConfigError(f"learning_rate={self.peak}: must be a finite number above 0; the usual value is 0.01.")

    def at(self, step: int) -> float:
        """Rate of update ``step``, counted from 0."""
        return self.peak * (1.0 - step / self.steps)


class RateControl:
    """Sets the learning rate of every parameter group before each update, keeping the ratios between groups.

    Args:
        optimizer: whose rates are set.
        learning_rate: see `LearningRate`.
        steps: S.

    Raises:
        ConfigError: "auto" with an optimizer whose rate is not scale-free, or a scheduler of another optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, learning_rate: LearningRate, *, steps: int) -> None:
        self._optimizer = optimizer
        self.scheduler: LRScheduler | None = None
        self._decay: LinearDecay | None = None
        if isinstance(learning_rate, LRScheduler):
            if learning_rate.optimizer is not optimizer:
                raise ConfigError("the scheduler belongs to another optimizer; make it from the optimizer passed here.")
            if needs_arguments(type(learning_rate).step):
                raise ConfigError(
                    f"{type(learning_rate).__name__}: its step needs a metric, and none of the private data is "
                    "released; use a "
                    "scheduler that depends on the step alone."
                )
            self.scheduler = learning_rate
        elif learning_rate == AUTO:
            if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam)):
                raise ConfigError(
                    f'learning_rate="auto" with {type(optimizer).__name__}: only Adam-like optimizers have a rate that '
                    "transfers; pass a number, a scheduler, or None for the optimizer's own."
                )
            self._decay = LinearDecay(DEFAULT_ADAM_RATE, steps)
        elif isinstance(learning_rate, str):
            raise ConfigError(f'learning_rate="{learning_rate}": must be "auto", a number, a torch scheduler or None.')
        elif learning_rate is not None:
            self._decay = LinearDecay(float(learning_rate), steps)
        first = float(optimizer.param_groups[0]["lr"])
        self._ratios = [float(group["lr"]) / first if first else 1.0 for group in optimizer.param_groups]

    def describe(self) -> str:
        """What rules the rate, for the record of what a run depends on."""
        return repr(self._decay) if self.scheduler is None else type(self.scheduler).__qualname__

    def before_update(self, step: int) -> float:
        """Set the rates for this update; returns the first group's."""
        if self._decay is not None:
            rate = self._decay.at(step)
            for group, ratio in zip(self._optimizer.param_groups, self._ratios, strict=True):
                group["lr"] = rate * ratio
        return float(self._optimizer.param_groups[0]["lr"])

    def after_update(self) -> None:
        """Step the torch scheduler, if that is who rules."""
        if self.scheduler is not None:
            self.scheduler.step()


def needs_arguments(method: Callable[..., object]) -> bool:
    """Whether a method, as its class defines it, cannot be called without arguments."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return any(p.default is inspect.Parameter.empty and p.kind not in kinds for p in parameters)
