"""The end of a search that nobody disturbed."""

from __future__ import annotations

import pytest

from discreet.train.tune import Tuned
from train.attacked import searched


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return searched(tmp_path_factory.mktemp("undisturbed") / "run")
