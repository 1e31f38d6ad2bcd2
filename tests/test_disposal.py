"""Where graphs and pools come to an end, and when Python's garbage collector runs; without a GPU."""

import gc
import threading

import pytest

from stdit_fast.model import disposal
from stdit_fast.train.trainer import free_memory


class Thing:
    """Notes its end."""

    def __init__(self, name: str, ended: list):
        self.name, self.ended = name, ended

    def __del__(self):
        self.ended.append(self.name)


class Owner:
    def __init__(self, ended: list, name: str = ""):
        self.graph, self.pool = Thing(f"graph{name}", ended), Thing(f"pool{name}", ended)
        self.of_pool = disposal.retire_with(self, pool=self.pool)
        self.of_graph = disposal.retire_with(self, graphs=(self.graph,))


@pytest.fixture
def ended():
    disposal.destroy_retired()
    yield []
    disposal.destroy_retired()


def test_what_is_rubbish_waits_until_it_is_asked_for(ended):
    owner = Owner(ended)
    owner.itself = owner
    del owner
    gc.collect()
    assert ended == []
    with disposal.under_way():
        disposal.destroy_retired()
        assert ended == []
    disposal.destroy_retired()
    assert ended == ["graph", "pool"]


def test_a_new_run_asks_for_it(ended):
    """Of a trainer that is gone: its graphs' memory would be missing to the next in its process."""
    owner = Owner(ended)
    owner.itself = owner
    del owner
    free_memory()
    assert ended == ["graph", "pool"]


def test_what_is_given_up_by_name_ends_though_the_owner_lives(ended):
    owner = Owner(ended)
    owner.pool = owner.graph = None
    owner.of_graph(), owner.of_pool()
    owner.of_pool()  # a second time changes nothing
    disposal.destroy_retired()
    assert ended == ["graph", "pool"]


def test_another_threads_capture_counts(ended):
    begun, over = threading.Event(), threading.Event()

    def capture():
        with disposal.under_way():
            begun.set()
            over.wait(10)

    thread = threading.Thread(target=capture)
    thread.start()
    begun.wait(10)
    owner = Owner(ended)
    del owner
    disposal.destroy_retired()
    assert ended == []
    over.set()
    thread.join()
    disposal.destroy_retired()
    assert ended == ["graph", "pool"]


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_as_it_was(was_on):
    before = gc.isenabled()
    try:
        gc.enable() if was_on else gc.disable()
        with pytest.raises(ValueError, match="inside"), disposal.collector_paused():
            assert not gc.isenabled()
            with disposal.collector_paused():
                assert not gc.isenabled()
            assert not gc.isenabled()
            raise ValueError("inside")
        assert gc.isenabled() == was_on
    finally:
        gc.enable() if before else gc.disable()


def test_the_collector_waits_for_the_last_thread():
    inside, leave, seen = threading.Event(), threading.Event(), []

    def pause():
        with disposal.collector_paused():
            inside.set()
            leave.wait(10)
        seen.append(gc.isenabled())

    with disposal.collector_paused():
        thread = threading.Thread(target=pause)
        thread.start()
        inside.wait(10)
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert seen == [True]


def test_rubbish_is_collected_before(ended):
    owner = Owner(ended)
    owner.itself = owner
    del owner
    with disposal.collector_paused():
        disposal.destroy_retired()
        assert ended == ["graph", "pool"]
