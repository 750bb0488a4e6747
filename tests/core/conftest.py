"""An empty compiler for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo

from core.compiling import Deliveries
from discreet.core import compiled


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
