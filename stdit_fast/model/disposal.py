"""Where CUDA graphs and the pools of their memory come to an end: only where no thread captures or draws from a pool.

PyTorch waits for the device when it destroys a pool, and aborts the process if a capture, or any use of any pool, is
under way then. Python destroys what nothing refers to wherever it happens to be, and what lies in a cycle wherever its
garbage collector happens to run: in the middle of a capture too. So what is to be destroyed is handed over to here
(`retire`), and goes when somebody asks for it at a place of their choice (`destroy_retired`).
"""

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.RLock()  # a destructor may begin another one
_under_way = 0  # captures and uses of pools, of all threads
_paused = 0
_collector_was_on = False
_graphs: list = []
_pools: list = []


def retire_with(owner: object, *, graphs: tuple = (), pool: object = None) -> weakref.finalize:
    """Keeps graphs or a pool from being destroyed with their owner; they are retired with it. Called, it does so now.

    The owner must be all that refers to them for longer.
    """
    finalizer = weakref.finalize(owner, _retire, graphs, pool)
    finalizer.atexit = False
    return finalizer


def _retire(graphs: tuple, pool: object) -> None:
    # Without the lock: the garbage collector may have called from anywhere.
    _graphs.extend(graphs)
    if pool is not None:
        _pools.append(pool)


def destroy_retired() -> None:
    """Destroys what was retired, if nothing is under way; else it waits for the next call.

    The device must be done with the graphs.
    """
    with _lock:
        if _under_way:
            return
        for retired in (_graphs, _pools):  # a pool last: graphs count on it
            while retired:
                del retired[-1]


@contextmanager
def under_way() -> Iterator[None]:
    """Nothing that was retired is destroyed in here, whichever thread asks for it."""
    begin()
    try:
        yield
    finally:
        end()


def begin() -> None:
    """As entering `under_way`."""
    global _under_way
    with _lock:
        _under_way += 1


def end() -> None:
    """As leaving `under_way`."""
    global _under_way
    with _lock:
        _under_way -= 1


@contextmanager
def collector_paused() -> Iterator[None]:
    """Python's garbage collector has run, and does not run in here: it might find graphs that others have captured.

    It is on again, if it was, when all threads have left.
    """
    global _paused, _collector_was_on
    with _lock:
        if not _paused:
            _collector_was_on = gc.isenabled()
            gc.disable()
        _paused += 1
        first = _paused == 1
    try:
        if first:  # another's capture may be under way otherwise
            gc.collect()
        yield
    finally:
        with _lock:
            _paused -= 1
            if not _paused and _collector_was_on:
                gc.enable()
