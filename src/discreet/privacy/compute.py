"""What computing costs, in plain numbers: a machine's measured speed and memory, and a bound on how much may be used.

Symbols: B = expected batch; S = steps; b = microbatch; q = sampling rate B / N.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from discreet.errors import ConfigError

MEMORY_SHARE = 0.9
"""Share of the free memory that a microbatch may fill."""

TAIL = 4.0
"""A realised Poisson batch stays below ``B + 4 sqrt(B (1 - q))`` in all but about 3 of 100,000 steps."""

ROUNDING = 8
"""Microbatches are multiples of 8, for the sake of tensor cores and vector units."""

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


@dataclass(frozen=True)
class Machine:
    """What private training of one model costs on one machine: measured by `discreet.measure`, or told.

    ``seconds(step) = seconds_per_step + ceil(B / b) seconds_per_microbatch + B seconds_per_example``.

    Attributes:
        seconds_per_example: forward, backward and clipping of one more example.
        seconds_per_microbatch: what every microbatch costs on top, however small.
        seconds_per_step: noise and optimizer, once per step.
        largest_microbatch: more examples at a time are not faster here.
        bytes_per_example: what one more example of a microbatch holds at the peak; None: not measured.
        fixed_bytes: model, gradients, noise and optimizer; None: not measured.
        free_bytes: memory that could be had when it was measured, the fixed bytes still to be taken from it.
        parameters: trainable numbers d of the model; None: not known.
        place: where it was measured, in words.
    """

    seconds_per_example: float
    seconds_per_microbatch: float = 0.0
    seconds_per_step: float = 0.0
    largest_microbatch: int = 512
    bytes_per_example: float | None = None
    fixed_bytes: float | None = None
    free_bytes: float | None = None
    parameters: int | None = None
    place: str = "as told"

    def __post_init__(self) -> None:
        if not 0 < self.seconds_per_example < math.inf:
            raise ConfigError(
                f"seconds_per_example={self.seconds_per_example}: must be finite and above 0; measure the model again."
            )
        for name in ("seconds_per_microbatch", "seconds_per_step"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)}: must be finite and at least 0; measure it again.")
        if self.largest_microbatch < 1:
            raise ConfigError(f"largest_microbatch={self.largest_microbatch}: must be at least 1; the default is 512.")

    @classmethod
    def told(cls, examples_per_second: float) -> Machine:
        """A machine of which only the throughput of private training is known."""
        if not 0 < examples_per_second < math.inf:
            raise ConfigError(
                f"throughput={examples_per_second}: must be finite and above 0, in examples per second; "
                "`discreet plan DATA` measures it."
            )
        return cls(seconds_per_example=1.0 / examples_per_second)

    @property
    def throughput(self) -> float:
        """Examples per second in large microbatches."""
        return 1.0 / self._seconds_per_example_in_full

    @property
    def _seconds_per_example_in_full(self) -> float:
        return self.seconds_per_example + self.seconds_per_microbatch / self.largest_microbatch

    @property
    def overhead(self) -> float:
        """The fixed cost of one step, in examples: a batch of this size spends half of its time on it.

        A microbatch that is not full costs as much as if it were: that is counted here, so `Bound` never lets too much
        pass.
        """
        fixed = self.seconds_per_step + self.seconds_per_microbatch
        return fixed / self._seconds_per_example_in_full

    def microbatch(self, batch_size: int, *, examples: int) -> int:
        """b: as much of a realised batch as is fast and fits, ``floor((0.9 free - fixed) / bytes per example)``.

        Raises:
            ConfigError: not even one example fits.
        """
        size = min(realised_at_most(batch_size, examples=examples), self.largest_microbatch)
        if self.bytes_per_example and self.free_bytes is not None:
            room = MEMORY_SHARE * self.free_bytes - (self.fixed_bytes or 0.0)
            fitting = math.floor(room / self.bytes_per_example)
            if fitting < 1:
                raise ConfigError(
                    f"{self.free_bytes / 2**20:.0f} MiB free: one example does not fit (model "
                    f"{(self.fixed_bytes or 0) / 2**20:.0f} MiB, example {self.bytes_per_example / 2**20:.1f} MiB); "
                    "use a smaller model or activation checkpointing."
                )
            size = min(size, fitting)
        return size if size < ROUNDING else size - size % ROUNDING

    def seconds(self, *, batch_size: int, steps: int, examples: int) -> float:
        """Expected time of a whole training, without reading the data and without evaluation."""
        parts = math.ceil(batch_size / self.microbatch(batch_size, examples=examples))
        step = self.seconds_per_step + parts * self.seconds_per_microbatch + batch_size * self.seconds_per_example
        return steps * step

    def peak_bytes(self, batch_size: int, *, examples: int) -> float | None:
        """Expected peak memory of a step, model included; None when it was not measured."""
        if self.bytes_per_example is None or self.fixed_bytes is None:
            return None
        return self.fixed_bytes + self.microbatch(batch_size, examples=examples) * self.bytes_per_example

    def samples_in(self, seconds: float) -> float:
        """Examples, each step's `overhead` included, that can be processed in this time."""
        return seconds / self._seconds_per_example_in_full


@dataclass(frozen=True)
class Bound:
    """How much may be computed: at most ``samples`` examples, where each step counts for ``batch + overhead``.

    Attributes:
        samples: budget, in examples.
        overhead: fixed cost of a step, in examples (`Machine.overhead`).
        said: how the bound was given, in words: "5m", "20 million examples".
    """

    samples: float
    overhead: float = 0.0
    said: str = ""

    def __post_init__(self) -> None:
        if not self.samples >= 1:
            raise ConfigError(
                f"compute={self.said or f'{self.samples:g} examples'}: allows less than one example; raise it."
            )

    def cost(self, *, batch_size: float, steps: int) -> float:
        """What a plan uses of ``samples``."""
        return steps * (batch_size + self.overhead)

    def batch(self, steps: int) -> float:
        """The largest batch with which so many steps keep the bound; it may be below 1."""
        return self.samples / steps - self.overhead

    def admits(self, *, batch_size: int, steps: int) -> bool:
        """Whether a plan keeps the bound."""
        return self.cost(batch_size=batch_size, steps=steps) <= self.samples * (1 + 1e-9)


def realised_at_most(batch_size: int, *, examples: int) -> int:
    """A size that realised Poisson batches practically never pass: ``ceil(B + 4 sqrt(B (1 - q)))``, at most N."""
    return min(examples, math.ceil(batch_size + TAIL * math.sqrt(batch_size * (1 - batch_size / examples))))


def parse_time(text: str) -> float:
    """Seconds of "90s", "5m", "1.5h" or "2d".

    Raises:
        ConfigError: no number with a unit, or not above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([smhd])\s*", text)
    seconds = float(match[1]) * _UNITS[match[2]] if match else math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(f'compute="{text}": must be a time above zero with its unit; write 90s, 5m, 1.5h or 2d.')
    return seconds
