"""What every test shares: one thread, a quiet Hypothesis, and the way to the real data."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

if not torch.cuda.is_available():
    # Before anything imports Triton: its own functions, too, ask when they are made. PyTorch on a CPU uses none.
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("discreet", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("discreet")


def data_root() -> Path | None:
    """The folder of real data sets: ``$DISCREET_DATA``, else ``../shared/data`` beside the repository, else None."""
    named = os.environ.get("DISCREET_DATA")
    candidates = [Path(named)] if named else [ROOT.parent / "shared" / "data"]
    return next((path for path in candidates if path.is_dir()), None)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Sums then have one order, and parallel test workers do not fight over cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_draws():
    """Tests that build models with torch's own generator start from the same state, in any order."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets, or a skip that says how to get one."""
    found = data_root()
    if found is None:
        pytest.skip("no real data: set DISCREET_DATA to a folder that holds adult/, fashion_mnist/, sms_spam/, ...")
    return found
