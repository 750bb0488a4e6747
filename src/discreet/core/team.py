"""Work in the threads that the library's own operations run in.

After an operation the threads of OpenMP wait busily, for some milliseconds, for the next one. Threads of Python would
share the cores with them meanwhile, and are slow to start; so the work is given to those very threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch  # brings its OpenMP into the process

_Share = TypeVar("_Share")
_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Parallel = ctypes.CFUNCTYPE(None, _Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


def for_each(work: Callable[[_Share], None], shares: Sequence[_Share]) -> None:
    """``work(share)`` for each of the shares, all at the same time; returns when every one is done.

    Raises:
        BaseException: what the first call that failed raised, or an interrupt.
    """
    left, done, raised = list(shares), [], []

    def body(_: int | None) -> None:
        while not raised:
            try:
                share = left.pop()
            except IndexError:
                return
            try:
                work(share)
                done.append(share)
            except BaseException as error:  # noqa: BLE001 -- raised again below
                raised.append(error)

    _together(body, len(shares))
    if raised:
        raise raised[0]
    if len(done) < len(shares):
        raise KeyboardInterrupt  # C drops what is raised between two lines of a callback


def for_rows(run: Callable[[int, int, int, int], None], rows: int, threads: int) -> None:
    """``run(start, stop, threads, enter)``: compiled code, for all rows, that shares them out by itself.

    ``enter`` is the address of ``GOMP_parallel``: a callback in each thread would cost 50 to 100 microseconds. Without
    it each thread makes a call of its own, for some of the rows.
    """
    if threads < 2 or _parallel is not None:
        run(0, rows, threads, _address)
    else:
        edges = [rows * thread // threads for thread in range(threads + 1)]
        for_each(lambda share: run(*share, 1, 0), list(itertools.pairwise(edges)))


def _together(body: Callable[[int | None], None], threads: int) -> None:
    if threads < 2:
        body(None)
    elif _parallel is not None:
        _parallel(_Body(body), None, threads, 0)
    else:
        with ThreadPoolExecutor(threads - 1) as pool:
            for _ in range(threads - 1):
                pool.submit(body, None)
            body(None)


def _openmp() -> Callable[[object, object, int, int], None] | None:
    """``GOMP_parallel(function, data, threads, flags)``: how code of GCC enters a parallel region. None without it."""
    if sys.platform != "linux" or not torch.backends.openmp.is_available():
        return None
    with contextlib.suppress(AttributeError):
        return _Parallel(("GOMP_parallel", ctypes.CDLL(None)))
    return None


_parallel = _openmp()
_address = 0 if _parallel is None else ctypes.cast(_parallel, ctypes.c_void_p).value
