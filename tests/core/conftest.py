"""An empty compiler, a recorder without a GPU, and the rules of before: for each test that asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo

from core.compiling import Deliveries
from core.recorded import ON_GPU, Again
from discreet.core import compiled, parameter, replay


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Deliveries]:
    """An empty compiler that builds no kernels, and what it does."""
    found = Deliveries()
    deliver, compile_region = compiled.Region.deliver, compiled.Region.compile

    def delivering(self: compiled.Region, *given: Any) -> None:
        found.delivered += 1
        deliver(self, *given)

    def compiling(self: compiled.Region, *given: Any) -> None:
        found.compiled += 1
        compile_region(self, *given)

    monkeypatch.setattr(compiled.Region, "deliver", delivering)
    monkeypatch.setattr(compiled.Region, "compile", compiling)
    monkeypatch.setattr(compiled, "compiler", compiled.without_kernels)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled._backends.clear()
    yield found
    torch._dynamo.reset()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, recordings are made and replayed by what stands in for CUDA graphs."""
    Again.made = 0
    if not ON_GPU:
        monkeypatch.setattr(replay, "Recorder", Again)
        monkeypatch.setattr(replay, "records", lambda device: True)


@pytest.fixture
def registry() -> Iterator[None]:
    """Rules that a test registers end with it."""
    tables = (parameter.RULES, parameter.DECOMPOSITIONS)
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)
