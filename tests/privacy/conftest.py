"""A small plan, a place for its ledger, and the ledger, open for writing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from discreet.privacy.ledger import Ledger
from discreet.privacy.plan import Plan
from privacy.small_ledger import KEY, small_plan


@pytest.fixture(scope="module")
def plan() -> Plan:
    return small_plan()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def ledger(path: Path, plan: Plan) -> Iterator[Ledger]:
    with Ledger.create(path, plan=plan, key_id=KEY, test_mode=False, facts={"device": "cpu"}) as opened:
        yield opened
