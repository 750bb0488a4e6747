"""Work in the threads of the library: all of it, at the same time, and nothing left undone unsaid."""

import sys
import threading

import pytest
import torch

from discreet.core import noise, team
from discreet.core.rng import PIECE

WAYS = [pytest.param(True, id="openmp"), pytest.param(False, id="python")]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(team, "_parallel", None)
    elif team._parallel is None:
        pytest.skip("no OpenMP of GCC's kind in this process")


def test_openmp_is_found_where_torch_brings_it():
    if sys.platform != "linux" or not torch.backends.openmp.is_available():
        pytest.skip("not this platform")
    assert team._parallel is not None


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_every_share_is_worked_on_once(way, count):
    seen = []
    team.for_each(seen.append, range(count))
    assert sorted(seen) == list(range(count))


def test_shares_are_worked_on_at_the_same_time(way):
    meeting = threading.Barrier(2, timeout=30)
    team.for_each(lambda share: meeting.wait(), range(2))  # one thread alone would wait until the barrier breaks


def test_tensors_are_worked_on_in_every_thread(way):
    into = torch.zeros(4, 100_000)
    team.for_each(lambda row: into[row].add_(row + 1), range(4))
    assert torch.equal(into.sum(1), torch.arange(1, 5) * 100_000.0)


def test_rows_are_shared_out_by_compiled_code_or_to_calls_of_it(way):
    calls = []
    team.for_rows(lambda *call: calls.append(call), 5, 2)
    in_c = team._parallel is not None
    assert sorted(calls) == ([(0, 5, 2, team._address)] if in_c else [(0, 2, 1, 0), (2, 5, 1, 0)])
    calls.clear()
    team.for_rows(lambda *call: calls.append(call), 5, 1)
    assert [call[:3] for call in calls] == [(0, 5, 1)]


@pytest.mark.parametrize("error", [ValueError, IndexError, KeyboardInterrupt])
def test_what_a_share_raises_is_raised(way, error):
    def work(share):
        if share == 1:
            raise error("share 1")

    with pytest.raises(error, match="share 1"):
        team.for_each(work, range(3))


def test_an_interrupt_that_c_swallows_is_raised_again(monkeypatch):
    """A signal that arrives between two lines of the callback: ctypes prints it and goes on."""
    monkeypatch.setattr(team, "_together", lambda body, threads: None)
    with pytest.raises(KeyboardInterrupt):
        team.for_each(lambda share: None, range(2))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_threads_draw_equal_shares_of_the_noise_and_each_entry_once(threads):
    """A bias counted as much as 65,536 draws: one thread had three fifths of the work."""
    sizes = [5, 70_000, 3, 64, 1 << 17, 7, 900_000, 0, 12, 1 << 16]
    values = {str(at): torch.zeros(size) for at, size in enumerate(sizes)}
    shares = noise._shares(values, values, threads=threads)
    for stretch in (stretch for share in shares for stretch in share):
        assert stretch.start % PIECE == 0
        stretch.target[:] += 1
    assert all((value == 1).all() for value in values.values())
    drawn = [sum(len(stretch.value) for stretch in share) for share in shares]
    assert len(drawn) == threads
    assert max(drawn) <= sum(sizes) / threads + 2 * PIECE
