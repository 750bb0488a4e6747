"""One trial: a whole training with clipping and noise, in memory, whose charge is its caller's business.

A trial writes nothing, charges nothing and returns nothing but the trained model. So it has few callers:
`discreet.insight.simulated_run` and `curves`, whose data are public, and `discreet.train.tune`, which charges all its
trials as one query before the first of them begins. `tests/architecture` keeps the list.

A trial is a function of (key, data, numbers): weights, batches, noise and dropout masks all follow from the key.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from discreet.core.axes import Layout
from discreet.core.clipping import Clipping
from discreet.core.gradient import LossFunction, trainable
from discreet.core.noise import release
from discreet.core.rng import NoiseSource, subkey
from discreet.core.seeded import cuda_indices
from discreet.errors import ConfigError
from discreet.privacy.sampling import PoissonSampling
from discreet.train.auto_lr import RateControl
from discreet.train.examples import Examples
from discreet.train.step import ClippedStep, Microbatch, gradient_memory, whole_batch, write_gradient
from discreet.train.stillness import Allowed, Watch

MICROBATCH = 512


class Optimiser(enum.Enum):
    """What moves the weights."""

    ADAM = "adam"
    SGD = "sgd"


@dataclass(frozen=True)
class Recipe:
    """How released gradients become weights: post-processing, which costs no privacy.

    Attributes:
        learning_rate: of the first step.
        optimiser: Adam with torch's defaults, or plain gradient descent without momentum.
        decay: the rate falls linearly to zero; else it is constant.
        averaging: the model returned is the exponential average of the weights with this decay per step; 0: the last.
    """

    learning_rate: float
    optimiser: Optimiser = Optimiser.ADAM
    decay: bool = True
    averaging: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning rate {self.learning_rate}: must be a finite number above 0; try 0.01.")
        if not 0 <= self.averaging < 1:
            raise ConfigError(f"averaging {self.averaging}: must be at least 0 and below 1; 0 averages nothing.")

    def for_steps(self, steps: int, *, instead_of: int) -> Recipe:
        """The rate that does the same with another number of steps at the same budget (constant TAN).

        The noise of one step grows like sqrt(S), so that of all steps stays the same when a plain rate goes like 1 / S
        (section 4.3, arXiv:2210.03403). Adam has divided the gradient by its noise already: there it is 1 / sqrt(S).
        """
        ratio = instead_of / steps
        factor = ratio if self.optimiser is Optimiser.SGD else math.sqrt(ratio)
        return replace(self, learning_rate=self.learning_rate * factor)


@dataclass(frozen=True)
class Schedule:
    """The public numbers of one trial: (B, sigma, S) and N.

    Attributes:
        sampling: N examples, expected batch B.
        noise_multiplier: sigma >= 0.
        steps: S >= 1.
    """

    sampling: PoissonSampling
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 <= self.noise_multiplier < math.inf:
            raise ConfigError(
                f"steps={self.steps}, noise_multiplier={self.noise_multiplier}: must be at least 1 and at least 0; "
                "take them from a Plan."
            )

    @property
    def examples_processed(self) -> int:
        """Expected number of per-example gradients, ``B S``."""
        return self.sampling.batch_size * self.steps


def fresh_model(build: Callable[[], nn.Module], *, key: bytes) -> nn.Module:
    """A model whose weights follow from the key: torch's global generator is seeded, and put back."""
    with torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(subkey(key, "initial weights")[:8], "little") >> 1)
        return build()


def run_trial(
    model: nn.Module,
    examples: Examples,
    *,
    loss: LossFunction,
    schedule: Schedule,
    recipe: Recipe,
    clipping: Clipping,
    layout: Layout | None,
    key: bytes,
    private: bool,
    allowed: Allowed | None = None,
    on_step: Callable[[int], None] | None = None,
) -> None:
    """Train ``model`` in place.

    **Guarantees.** With a secret key that serves this trial alone, the final weights are the output of S
    Poisson-sampled Gaussian queries of noise multiplier sigma under ``clipping``, and of post-processing. Nothing else
    leaves the trial: ``on_step`` is told a number of steps.

    Args:
        model: all its trainable parameters are trained; on any device.
        examples: N of them, as the schedule says.
        loss: per-example losses, shape (B,).
        layout: from the self-check, which the caller has run.
        key: 32 bytes. private: whether it is secret; otherwise a forward may write what it likes.
        allowed: what a forward may write in any case, from the self-check; None: nothing.
        on_step: called with the number of steps done, after each.

    Raises:
        ConfigError: the data set has another size than the schedule, or noise is asked for without clipping.
    """
    if examples.count != schedule.sampling.examples:
        raise ConfigError(
            f"{examples.count} examples, {schedule.sampling.examples} in the schedule: must be equal; plan for them."
        )
    parameters = trainable(model)
    device = next(iter(parameters.values())).device
    permitted = allowed if allowed is not None else Allowed()
    step = ClippedStep(
        model=model,
        loss=loss,
        fetch=lambda indices: examples.fetch(indices, device=device),
        parameters=parameters,
        clipping=clipping,
        layout=layout,
        microbatch=Microbatch(MICROBATCH, batch=whole_batch(schedule.sampling.batch_size)),
        watch=Watch(model, permitted) if private else None,
        made_up=examples.made_up(device=device) if permitted.moving else None,
    )
    optimizer = _optimizer(recipe, list(parameters.values()))
    rates = RateControl(optimizer, recipe.learning_rate if recipe.decay else None, steps=schedule.steps)
    average = _Average(list(parameters.values()), decay=recipe.averaging)
    source = NoiseSource.keyed(subkey(key, "trial noise"), private=private)
    sampling_key = subkey(key, "trial batches")
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda_indices([device])))
        for index in range(schedule.steps):
            torch.manual_seed(int.from_bytes(subkey(key, f"trial torch|{index}")[:8], "little") >> 1)
            total = step.clipped_sum(schedule.sampling.draw(key=sampling_key, step=index))
            released = release(
                total,
                noise_multiplier=schedule.noise_multiplier,
                source=source,
                divisor=schedule.sampling.batch_size,
                into=gradient_memory(total, parameters),
            )
            write_gradient(released, parameters)
            step = step.after(released)
            rates.before_update(index)
            optimizer.step()
            rates.after_update()
            average.take(index)
            if on_step is not None:
                on_step(index + 1)
    average.put()
    optimizer.zero_grad(set_to_none=True)


def _optimizer(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if recipe.optimiser is Optimiser.ADAM:
        return torch.optim.Adam(parameters, lr=recipe.learning_rate)
    return torch.optim.SGD(parameters, lr=recipe.learning_rate)


class _Average:
    """The exponential average of the weights, and at first the plain mean: decay min(d, (1 + t) / (10 + t))."""

    def __init__(self, parameters: list[nn.Parameter], *, decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self._averages: list[Tensor] = [p.detach().clone() for p in parameters] if decay else []

    @torch.no_grad()
    def take(self, index: int) -> None:
        """Move the average towards the weights after update ``index``."""
        keep = min(self._decay, (1 + index) / (10 + index))
        for average, parameter in zip(self._averages, self._parameters, strict=False):
            average.lerp_(parameter, 1 - keep)

    @torch.no_grad()
    def put(self) -> None:
        """Make the average the model's weights."""
        for average, parameter in zip(self._averages, self._parameters, strict=False):
            parameter.copy_(average)
