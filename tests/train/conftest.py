"""The end of a search that nobody disturbed, and the noise that met two sums."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest

from discreet.core.clipping import ClippedSum
from discreet.train import releases
from discreet.train.tune import Tuned
from train.attacked import searched


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return searched(tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.fixture
def reused(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """The positions at which one key's noise was added to two different sums, over all runs of a test."""
    seen: dict[tuple[bytes, int], set[str]] = {}
    original = releases.release

    def spy(total: ClippedSum, *, noise_multiplier: float, source: object, divisor: float, into: object) -> object:
        parts = b"".join(value.numpy().tobytes() for value in total.tensors.values())
        seen.setdefault((source._key, source.position), set()).add(hashlib.sha256(parts).hexdigest())
        return original(total, noise_multiplier=noise_multiplier, source=source, divisor=divisor, into=into)

    monkeypatch.setattr(releases, "release", spy)
    return lambda: [position for (_, position), sums in seen.items() if len(sums) > 1]
