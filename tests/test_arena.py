"""Memory that CUDA graphs and ordinary steps share: how it is divided, and that neither writes over the other's."""

import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from kernel_checks import DEVICE
from test_fused_model import masked, models, on_device, step
from test_stdit2 import inputs
from torch.utils.checkpoint import checkpoint

from stdit_fast.model import arena as arena_module
from stdit_fast.model import memory
from stdit_fast.model.arena import leave_default_stream
from stdit_fast.model.graphs import BlockGraphs
from stdit_fast.train.trainer import free_memory

GIB = 1 << 30
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")


@pytest.fixture
def other_stream():
    """Training's stream, for the time of a test."""
    before = torch.cuda.current_stream()
    leave_default_stream(torch.device(DEVICE))
    yield
    torch.cuda.synchronize()
    torch.cuda.set_stream(before)


def trained(monkeypatch, recomputed=0):
    """A model that captures the small batches of `batches` at once, and recomputes that many blocks of the large."""
    fused, _ = models(torch.bfloat16)
    fused.train()
    fused.set_checkpointing("auto")
    monkeypatch.setattr("stdit_fast.model.graphs.SEEN_BEFORE", 0)
    monkeypatch.setattr("stdit_fast.model.graphs.MAX_TOKENS", 2 * 3 * 6)
    monkeypatch.setattr(
        "stdit_fast.model.stdit2.blocks_to_checkpoint", lambda model, x, *_: recomputed * (x.shape[:3].numel() > 36)
    )
    return fused


def batches() -> dict[str, dict]:
    """Two small ones of other sizes, a large one with condition frames and one without; captions have all their tokens:
    else the text's GEMM, which graphs pad, may add in another order."""
    made = {
        "small": inputs(batch=2, frames=3, height=5, width=4),
        "image": inputs(batch=2, frames=1, height=6, width=3),
        "large": masked(inputs(batch=4, frames=5, height=12, width=10)),
        "other": inputs(batch=3, frames=4, height=14, width=12),
    }
    given = {name: on_device(batch) for name, batch in made.items()}
    for seed, batch in enumerate(given.values()):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        batch["x"] = torch.randn(batch["x"].shape, generator=generator, device=DEVICE)
        batch["mask"] = torch.ones(batch["mask"].shape, dtype=torch.long)
    return given


def assert_same(got: dict, want: dict) -> None:
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@needs_gpu
@pytest.mark.parametrize("recomputed", [0, 1, 2])
def test_steps_in_turn_are_the_steps_alone(recomputed, monkeypatch, other_stream):
    """Bit for bit, in an order in which each follows each. Ordinary steps' activations lie in the graphs' memory."""
    fused, given = trained(monkeypatch, recomputed), batches()
    want = {name: step(fused, batch) for name, batch in given.items()}
    fused.set_cuda_graphs(True)
    graphed, in_arena = [], []
    run, used = fused._run_blocks, []

    def spy(*args):
        found = run(*args)
        if fused.graphs.arena is not None and not torch.cuda.is_current_stream_capturing():
            used.append(fused.graphs.arena.live_bytes() if args[-1] is fused.graphs.arena else 0)
        return found

    monkeypatch.setattr(fused, "_run_blocks", spy)
    order = "large small large small image other image small other large image large other small other small small"
    order = order.split()
    for name in order:
        used.clear()
        assert_same(step(fused, given[name]), want[name])
        graphed.append(fused.last_graphed)
        in_arena.append(bool(used) and used[-1] > 0)
        assert fused.graphs.arena is None or fused.graphs.arena.live_bytes() == 0
    assert graphed == [name in ("small", "image") for name in order]
    ordinary = [i for i, name in enumerate(order) if name in ("large", "other")]
    # The first is before there is an arena; one that wants a larger arena than there is has it made anew afterwards.
    assert sum(in_arena[i] for i in ordinary) >= 4 and in_arena[ordinary[-1]]
    arena = fused.graphs.arena
    assert arena.reserved_bytes() < arena.size + arena.BESIDE + (40 << 20)
    fused.graphs.release()
    assert fused.graphs.captured == 0


def test_workspaces_are_taken_by_a_pass_of_each_kind():
    seen = []

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            seen.append(torch.is_grad_enabled())
            return a.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    before = arena_module._products
    arena_module._products = lambda a, bias: before(Recorded.apply(a), bias)
    try:
        with torch.no_grad():
            arena_module.take_workspaces(torch.empty(1, dtype=torch.bfloat16, device=DEVICE))
    finally:
        arena_module._products = before
    assert len(seen) == 2  # and once more for the backward pass


@needs_gpu
def test_libraries_keep_nothing_in_an_arena(other_stream):
    """A thread of its own stands for one that has called no library yet, as the backward pass's does at first."""
    x = torch.randn(64, 64, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    bias = torch.randn(64, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    stream = torch.cuda.Stream()  # with no workspaces yet, of either thread
    with torch.cuda.stream(stream):
        arena_module.take_workspaces(x)
        arena = arena_module.Arena(torch.device(DEVICE, 0), 256 << 20)
        with arena.use():
            out = checkpoint(
                arena_module._products, x, bias, use_reentrant=False, preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), arena.use()),
            )  # fmt: skip
        torch.autograd.grad(out.sum(), (x, bias))
        del out
        assert arena.live_bytes() == 0
        arena.close()


@needs_gpu
@pytest.mark.parametrize("how", ["ordinary step", "capture"])
def test_an_arena_that_is_given_up_is_given_back(how, monkeypatch, other_stream):
    """At once, though the frame of the step that wants a larger one still refers to it."""
    fused, given = trained(monkeypatch), batches()
    fused.set_cuda_graphs(True)
    for name in ("small", "small"):
        step(fused, given[name])
    first, taken = fused.graphs.arena, []
    pool, held = first.id, first.reserved_bytes()
    monkeypatch.setattr("stdit_fast.model.graphs._GROWTH", 3.0)
    if how == "capture":
        monkeypatch.setattr(first, "usable", 1)
        monkeypatch.setattr("stdit_fast.model.graphs.memory.step_bytes", lambda *_: 1)
    else:
        monkeypatch.setattr(first, "usable", 0.1)
    make = BlockGraphs._make_arena

    def spy(self, x):
        taken.append(sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(pool)))
        make(self, x)

    monkeypatch.setattr(BlockGraphs, "_make_arena", spy)
    step(fused, given["image" if how == "capture" else "large"])
    assert held > 0 and taken == [0] and fused.graphs.arena is not first and first.reserved_bytes() == 0


@needs_gpu
def test_what_a_deleted_model_held_is_there_for_the_next(monkeypatch, other_stream):
    fused, given = trained(monkeypatch), batches()
    fused.set_cuda_graphs(True)
    for _ in range(2):
        step(fused, given["small"])
    pool = fused.graphs.arena.id
    del fused
    gc.collect()
    assert sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(pool)) > 0
    free_memory()
    assert sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(pool)) == 0


@needs_gpu
def test_tensors_that_are_held_keep_graphs_from_running(monkeypatch, other_stream, caplog):
    fused, given = trained(monkeypatch), batches()
    want = {name: step(fused, batch) for name, batch in given.items()}
    fused.set_cuda_graphs(True)
    for name in ("large", "small", "large", "small"):
        step(fused, given[name])
    assert fused.last_graphed
    held = fused(**given["large"])
    assert fused.graphs.arena.live_bytes() > 0
    assert_same(step(fused, given["small"]), want["small"])
    assert not fused.last_graphed and "are still held where CUDA graphs write" in caplog.text
    fused.zero_grad()
    weights = torch.randn(held.shape, generator=torch.Generator().manual_seed(5)).to(held)
    (held * weights).sum().backward()
    for name, p in fused.named_parameters():
        assert torch.equal(p.grad, want["large"][name]), name
    assert_same(step(fused, given["small"]), want["small"])
    assert fused.last_graphed


@needs_gpu
def test_a_graph_between_its_passes_keeps_its_memory(monkeypatch, other_stream):
    fused, given = trained(monkeypatch), batches()
    want = {name: step(fused, batch) for name, batch in given.items()}
    fused.set_cuda_graphs(True)
    for name in ("large", "small", "large", "small"):
        step(fused, given[name])
    fused.zero_grad()
    out = fused(**given["small"])
    assert fused.last_graphed
    between = fused(**given["large"])
    assert fused.graphs.arena.live_bytes() == 0  # it went elsewhere
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    (out * weights).sum().backward()
    for name, p in fused.named_parameters():
        assert torch.equal(p.grad, want["small"][name]), name
    del between, out
    fused(**given["small"])  # whose backward pass never comes, and cannot any more
    assert_same(step(fused, given["large"]), want["large"])


@needs_gpu
def test_on_the_default_stream_graphs_have_their_own(monkeypatch):
    fused, given = trained(monkeypatch, recomputed=1), batches()
    want = {name: step(fused, batch) for name, batch in given.items()}
    fused.set_cuda_graphs(True)
    for name in ("large", "small", "large", "image", "small", "large"):
        assert_same(step(fused, given[name]), want[name])
    assert fused.graphs.captured == 2 and fused.graphs.arena.size == 0 < fused.graphs.pool_bytes


class FakeBlocks(list):
    def modules(self):
        return []


class FakeModel:
    """As the estimates of memory want it."""

    def __init__(self, backend="fused"):
        self.blocks = FakeBlocks([None] * 28)
        self.config = SimpleNamespace(hidden_size=1152, depth=28, mlp_ratio=4.0, model_max_length=200, backend=backend)
        self.graphs = None

    def parameters(self):
        return [SimpleNamespace(numel=lambda: 767_000_000, element_size=lambda: 2, requires_grad=True, grad=None)]

    def planned_bytes(self):
        return 18 * 767_000_000


def tokens(count: int, samples: int = 4):
    """What the estimates ask of [B, T, S, C] tokens in bfloat16."""
    x = torch.empty(samples, 1, count // samples, 1152, dtype=torch.bfloat16, device="meta")
    return x


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(memory, "memory_limit", lambda index: int(79.1 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: int(13.8e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: int(14e9))
    monkeypatch.setattr(memory, "use_kernel", lambda *given: True)


def test_what_an_arena_costs_large_steps(h100):
    """Little: 480p, 16 frames, batch 4 recomputes at most one block more than with all memory and no graphs."""
    model, x, largest = FakeModel(), tokens(4 * 16 * 1590), tokens(2 * 16 * 3600, samples=2)
    room = memory.room_beside(model, x.device, model.planned_bytes())
    arena = SimpleNamespace(usable=room - memory.work_bytes(model, largest))
    alone = memory.blocks_to_checkpoint(model, x, model.planned_bytes())
    beside = memory.blocks_to_checkpoint(model, x, model.planned_bytes(), arena)
    assert alone == 18 and beside in (18, 19)
    assert memory.blocks_to_checkpoint(model, tokens(6 * 16 * 144, 6), model.planned_bytes(), arena) == 0
    assert memory.room_for_activations(model, tokens(6 * 16 * 144, 6), model.planned_bytes(), 0, arena)
    assert not memory.room_for_activations(model, x, model.planned_bytes(), beside, arena)
    assert memory.graph_bytes(model, tokens(64 * 256, 64)) < arena.usable
    small = SimpleNamespace(usable=arena.usable - 20 * GIB)
    assert memory.blocks_to_checkpoint(model, x, model.planned_bytes(), small) > beside + 3
    assert memory.blocks_to_checkpoint(model, x, model.planned_bytes(), SimpleNamespace(usable=0)) == 28


@pytest.mark.parametrize(
    "case, samples, frames, positions, expected",
    [
        ("480p, 16 frames", 4, 16, 1590, 1),
        ("720p, 16 frames", 2, 16, 3600, 1),
        ("240p, 16 frames", 17, 16, 405, 6),
        ("256, 16 frames: all fits", 8, 16, 256, 8),
        ("144p, 16 frames: as small as it should be", 6, 16, 144, 6),
        ("one sample", 1, 16, 8100, 1),
    ],
)
def test_passes_over_fewer_samples_before_blocks_are_recomputed(h100, case, samples, frames, positions, expected):
    model, like = FakeModel(), torch.empty(1, dtype=torch.bfloat16, device="meta")
    held = model.planned_bytes() + memory.gradient_bytes(model)
    found = memory.samples_at_once(model, torch.Size((samples, frames, positions, 1152)), like, held)
    assert found == expected


def test_a_gpu_with_room_runs_batches_as_they_are(h100, monkeypatch):
    monkeypatch.setattr(memory, "memory_limit", lambda index: 192 * GIB)
    model, like = FakeModel(), torch.empty(1, dtype=torch.bfloat16, device="meta")
    assert memory.samples_at_once(model, torch.Size((4, 16, 1590, 1152)), like, model.planned_bytes()) == 4


class FakeArena:
    BESIDE = 384 << 20

    def __init__(self, device, size, live=0):
        self.device, self.size, self.live, self.stream = device, size, live, "training's"
        self.usable = size

    def close(self):
        self.usable = 0

    def live_bytes(self):
        return self.live

    def reserved_bytes(self):
        return self.size


@pytest.fixture
def graphs(h100, monkeypatch):
    monkeypatch.setattr("stdit_fast.model.graphs.Arena", FakeArena)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: "training's")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: "the default")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr("stdit_fast.model.graphs.take_workspaces", lambda like: None)
    model = FakeModel()
    model.graphs = made = BlockGraphs(model, early=True)
    made.planned = model.planned_bytes()
    yield made  # which does not keep its model


def test_the_arena_grows_with_what_was_seen(graphs):
    small, large, planned = tokens(6 * 16 * 144, 6), tokens(4 * 16 * 1590), graphs.planned
    assert graphs.shared_memory(small, planned) is None  # the first step, in which training allocates its own
    first = graphs.shared_memory(small, planned)
    assert memory.step_bytes(graphs._model, small) < first.size < 30 * GIB
    assert graphs.shared_memory(small, planned) is first
    graphs._graphs["a bucket"] = SimpleNamespace(close=lambda: None)
    second = graphs.shared_memory(large, planned)
    assert graphs.captured == 0 and second is graphs.arena
    room = memory.room_beside(graphs._model, small.device, planned)
    lost = int(14e9) - int(13.8e9) + FakeArena.BESIDE
    assert second.size == int(room - memory.work_bytes(graphs._model, large) - lost)
    assert graphs.shared_memory(large, planned) is second  # which is all there is, though it recomputes blocks
    graphs.release(after_failure=True)
    third = graphs.shared_memory(small, planned)
    assert third.size == pytest.approx(second.size - 0.1 * memory.work_bytes(graphs._model, large))


def test_the_arena_leaves_what_backward_passes_need(graphs):
    """A batch of many images has much text, whose gradients are not in the arena."""
    large, images, planned = tokens(4 * 16 * 1590), tokens(254 * 256, 254), graphs.planned
    first = [graphs.shared_memory(large, planned) for _ in range(3)][-1]
    second = graphs.shared_memory(images, planned)
    assert second.size < first.size - 8 * GIB
    assert graphs.shared_memory(large, planned) is second is graphs.shared_memory(images, planned)


def test_what_is_held_stays(graphs):
    """An arena that is in use is not given up; nor shared while a graph is between its passes."""
    small, large, planned = tokens(6 * 16 * 144, 6), tokens(4 * 16 * 1590), graphs.planned
    _, arena = (graphs.shared_memory(small, planned) for _ in range(2))
    arena.live = 1 << 20
    assert graphs.shared_memory(large, planned) is arena
    assert not graphs._memory_is_free()
    arena.live = 0
    assert graphs._memory_is_free()

    class Run:
        pass

    run = Run()
    graphs._pending = weakref.ref(run)
    assert graphs.shared_memory(small, planned) is None and graphs.arena is arena
    del run  # the output was thrown away
    assert graphs.shared_memory(small, planned) is arena


def test_no_arena_where_there_is_no_room(graphs, monkeypatch, caplog):
    monkeypatch.setattr(memory, "memory_limit", lambda index: 20 * GIB)
    x = tokens(4 * 16 * 1590)
    assert [graphs.shared_memory(x, graphs.planned) for _ in range(4)] == [None] * 4
    assert caplog.text.count("do not share memory") == 1 and "0.0 GiB are left" in caplog.text


def test_the_first_capture_makes_the_arena(graphs):
    graphs._early = False
    small, planned = tokens(6 * 16 * 144, 6), graphs.planned
    assert [graphs.shared_memory(small, planned) for _ in range(3)] == [None] * 3
    graphs._make_arena(small)
    arena = graphs.arena
    assert graphs.shared_memory(small, planned) is arena
    assert graphs.shared_memory(tokens(4 * 16 * 1590), planned).size > arena.size


def test_on_the_default_stream_nothing_is_shared(graphs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: "training's")
    assert [graphs.shared_memory(tokens(864), graphs.planned) for _ in range(3)] == [None] * 3 and graphs.arena is None


def test_places_are_shared_and_grow():
    graphs = BlockGraphs(FakeModel())
    first = graphs.place("x", torch.empty(2, 3))
    assert graphs.place("x", torch.empty(5)).data_ptr() == first.data_ptr() and first.shape == (2, 3)
    larger = graphs.place("x", torch.empty(4, 3))
    assert larger.data_ptr() != first.data_ptr() and graphs.place("x", torch.empty(6)).data_ptr() == larger.data_ptr()
    assert graphs.place("x", torch.empty(6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert graphs.place("y", torch.empty(6)).data_ptr() != larger.data_ptr()


def test_a_number_of_blocks_is_the_least_that_is_recomputed(monkeypatch):
    """Measured alone, it may not fit into an arena."""
    fused, _ = models()
    on_gpu = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr("stdit_fast.model.stdit2.blocks_to_checkpoint", lambda model, x, planned, arena: arena.size)
    for wanted, count in ((0, 2), (1, 2), (2, 2), ("auto", 2)):
        fused.set_checkpointing(wanted)
        assert fused._count_checkpointed(on_gpu, SimpleNamespace(size=2)) == count
    fused.set_checkpointing(1)
    assert fused._count_checkpointed(on_gpu, SimpleNamespace(size=0)) == fused._count_checkpointed(on_gpu) == 1


def test_a_step_that_does_not_fit_recomputes_more(monkeypatch):
    """And its results are the same."""
    fused, _ = models(depth=4)
    fused.train()
    given = on_device(batches()["image"])
    want = step(fused, given)
    arena, tried = SimpleNamespace(usable=100.0, use_alone=nullcontext), []
    run = fused._run_blocks

    def too_large(*args):
        *_, count, _ = args
        tried.append(count)
        if count < 3:
            raise torch.OutOfMemoryError("out of memory, as said by the test")
        return run(*args[:-1])

    monkeypatch.setattr(fused, "_plan", lambda tokens: (arena, 0))
    monkeypatch.setattr(fused, "_count_checkpointed", lambda tokens, arena: 2)
    monkeypatch.setattr(fused, "_run_blocks", too_large)
    got = step(fused, given)
    assert tried == [0, 2, 3] and fused.last_checkpointed == 3 and arena.usable == pytest.approx(100 * 0.97**2)
    for name, value in want.items():
        assert torch.allclose(got[name], value, atol=1e-6), name
    fused.switch = "ranks that would wait"
    with pytest.raises(torch.OutOfMemoryError):
        fused._run_ordinary(None, None, 0, arena)
    fused.switch = None
    monkeypatch.setattr(fused, "_run_blocks", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("always")))
    with pytest.raises(torch.OutOfMemoryError, match="always"):
        fused._run_ordinary(None, None, 0, arena)
