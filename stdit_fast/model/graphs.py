"""CUDA graphs of the blocks' forward and backward passes, one pair a bucket: small buckets without the CPU's launching.

A step of the blocks is some 2,600 launches. Up to about 16,000 tokens the GPU is done with them before the CPU has made
them; a graph is one launch. What changes from batch to batch is copied into fixed places first: tokens, modulation, and
the packed text, padded to the bucket's capacity, whose lengths the kernels read on the GPU.

All graphs share one piece of memory, since one bucket's backward pass is over before the next bucket's forward pass
begins, and ordinary steps share it with them (`stdit_fast.model.arena`). What goes in and out has its places beside it,
also shared by all: inputs, results, and the gradients of both and of parameters.
"""

import logging
import weakref
from collections.abc import Sequence
from contextlib import nullcontext, suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stdit_fast import ops
from stdit_fast.model import disposal, memory
from stdit_fast.model.arena import Arena, take_workspaces
from stdit_fast.model.packing import packed_bytes, packed_views

logger = logging.getLogger(__name__)

MAX_TOKENS = 16384  # beyond, the GPU is the slower one
SEEN_BEFORE = 2  # steps of a bucket that run as usual: a graph is worth its capture where a bucket comes back
MAX_GRAPHS = 64
_WARMUP = 2
_SLACK = 3 << 29  # bytes; steps hold more or less beside what is counted
_GROWTH = 1.25  # an arena is so much larger than what was seen: the next bucket may be larger


class BlockGraphs:
    """The graphs of one model's blocks, captured as buckets come.

    Args:
        early: the memory that is shared is there for the second ordinary step, when training holds what it will hold,
            instead of for the first capture: large buckets then never divide memory among themselves.

    Attributes:
        arena: their memory, once one was to be captured.
        reserved_bytes: what they keep from steps that do not share it.
    """

    def __init__(self, model: nn.Module, early: bool = False):
        self._model_ref, self._early = weakref.ref(model), early  # which owns this: no cycle for a collector to find
        self._parameters: list[Tensor] = []
        self._addresses: tuple[int, ...] = ()  # negative where no gradient is wanted
        self._blocks: tuple[int, ...] = ()
        self._owners: list[tuple[dict, str]] = []
        self._gradients: list[Tensor] = []
        self._places: dict[str, Tensor] = {}  # flat, of the largest size so far
        self._graphs: dict[tuple, _Graph] = {}
        self._seen: dict[tuple, int] = {}
        self._refused: set[tuple] = set()
        self._pending: weakref.ref[_Run] | None = None  # the run whose backward pass may come next
        self._last_bytes = 0  # of the graph that the last step ran, if any
        self._largest_step = self._largest_work = 0.0  # bytes of a step's forward pass, and beside it, so far
        self._may_grow = False  # the arena: there is more memory than was asked for
        self._may_be_in_use = False  # the arena, by what an ordinary step may have left
        self._told_of_use = self._has_failed = False
        self._had_arena = False
        self._steps = 0  # ordinary ones, without an arena
        self.arena: Arena | None = None
        self.reserved_bytes = 0

    def __reduce__(self) -> tuple:
        return BlockGraphs, (self._model, self._early)  # a copied model's are its own, and captured anew

    @property
    def _model(self) -> nn.Module:
        return self._model_ref()

    @property
    def captured(self) -> int:
        """How many buckets have a graph."""
        return len(self._graphs)

    @property
    def pool_bytes(self) -> int:
        """Bytes of the graphs' memory at the last step's peak that do not count as allocated."""
        if self.arena is None or self.arena.size == 0:
            return self.reserved_bytes
        return self._last_bytes

    def shared_memory(self, x: Tensor, planned: int) -> Arena | None:
        """What the forward pass of an ordinary training step allocates from; None where all of the GPU's is meant.

        Where a step needs more of it, or beside it, than was thought of, all graphs are forgotten, to be captured anew
        in another.

        Args:
            x: [B, T, S, C] tokens; planned: bytes that training holds, `memory.training_bytes`.
        """
        self._last_bytes = 0
        step, work = memory.step_bytes(self._model, x), memory.work_bytes(self._model, x)
        self._largest_step, self._largest_work = max(self._largest_step, step), max(self._largest_work, work)
        stream = torch.cuda.current_stream(x.device)
        if stream == torch.cuda.default_stream(x.device) or torch.cuda.is_current_stream_capturing():
            return None
        if self._is_pending() or (self.arena is not None and self.arena.stream != stream):
            return None
        if self.arena is not None:
            missing = work - memory.room_beside(self._model, x.device, planned, self.reserved_bytes)
            too_small = step > self.arena.usable and self._may_grow
            if (missing > _SLACK or too_small) and not self.arena.live_bytes():
                self._largest_work = max(self._largest_work, work + missing)  # so that this happens once
                self.release()
        if self.arena is None:
            self._steps += 1
            if not (self._early and self._steps > 1) and not self._had_arena or self._has_failed:
                return None
            try:
                self._make_arena(x)
            except RuntimeError as error:
                self._has_failed = True
                logger.warning("CUDA graphs and other steps do not share memory: %s", error)
                return None
        self._may_be_in_use = True
        return self.arena

    def find(self, x: Tensor, modulation: Tensor, layout: ops.TextLayout, max_tokens: int) -> "_Graph | None":
        """The graph of this bucket; None where the step has to run as usual, as do a bucket's first ones.

        Args:
            x: [B, T, S, C] tokens; modulation: [B, 1 or T, 9*C]; layout: of the text, of at most `max_tokens` a sample.
        """
        if not x.is_cuda or x.shape[:3].numel() > MAX_TOKENS or torch.cuda.is_current_stream_capturing():
            return None
        self._forget_if_parameters_moved()
        if not self._memory_is_free():
            return None
        capacity, key = x.shape[0] * max_tokens, _key(x, modulation, max_tokens)
        if key not in self._graphs:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= SEEN_BEFORE or len(self._graphs) >= MAX_GRAPHS or key in self._refused:
                return None
            try:
                with disposal.collector_paused():
                    self._capture(key, x, modulation, layout, capacity, max_tokens)
            except RuntimeError as error:  # no memory for it, most likely; the step itself may fit
                self._refused.add(key)
                logger.warning("No CUDA graph for tokens of shape %s, which run as usual: %s", list(x.shape), error)
                return None
        return self._graphs[key]

    def has(self, x: Tensor, modulation: Tensor, max_tokens: int) -> bool:
        """Whether this bucket was captured: its step takes no memory beyond the graphs' own."""
        return _key(x, modulation, max_tokens) in self._graphs

    def place(self, name: str, like: Tensor) -> Tensor:
        """The place of that name for a tensor of that shape, without a history. Graphs that were captured before keep
        theirs, should it have been smaller."""
        name, count = f"{name} {like.dtype}", like.numel()
        if name not in self._places or self._places[name].numel() < count:
            self._places[name] = torch.empty(count, dtype=like.dtype, device=like.device)
        return self._places[name][:count].view(like.shape)

    def release(self, after_failure: bool = False) -> None:
        """Forgets all graphs and gives their memory back; buckets are captured anew when they come again.

        Args:
            after_failure: a step has run out of memory: more is left to what is not shared from now on.
        """
        if after_failure:
            self._largest_work *= 1.1
        self._drop_graphs()
        if self.arena is None:
            return
        # By name, since a frame or an output of a step may still refer to them: what they hold is wanted now.
        self.arena.close()
        self.arena, self.reserved_bytes, self._may_be_in_use = None, 0, False
        torch.cuda.synchronize()
        disposal.destroy_retired()
        torch.cuda.empty_cache()

    def _drop_graphs(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._pending, self._last_bytes = None, 0

    def run(
        self, graph: "_Graph", x: Tensor, modulation: Tensor, text: Tensor, layout: ops.TextLayout, rotation: Tensor
    ) -> tuple[Tensor, ops.Branch]:
        """As `STDiT2._run_blocks`: the residual stream, and what is left to be added to it; `text` is [M, C]."""
        self._last_bytes = graph.bytes
        text = F.pad(text, (0, 0, 0, graph.text.shape[0] - text.shape[0]))
        given = (x, modulation, text)
        x, o, gate = _Replay.apply(self, graph, layout.starts, rotation, *given, *self._parameters)
        return x, ops.Branch(o, gate, self._model.blocks[-1].mlp.fc2.bias)

    def _forget_if_parameters_moved(self) -> None:
        """A graph reads parameters by address; where they or the blocks are others now, all are captured anew."""
        blocks = tuple(map(id, self._model.blocks))
        if blocks != self._blocks:
            self._blocks = blocks
            modules = self._model.blocks.modules()
            self._owners = [
                (m._parameters, name) for m in modules for name, p in m._parameters.items() if p is not None
            ]
        parameters = [owner[name] for owner, name in self._owners]
        addresses = tuple(p.data_ptr() if p.requires_grad else -p.data_ptr() for p in parameters)
        if addresses != self._addresses:
            self._drop_graphs()
            self._parameters, self._addresses = parameters, addresses
            self._gradients = []

    def _make_gradients(self) -> None:
        """The places of parameters' gradients, unless they are there: one piece of memory, taken while none is cached.

        They stay: among what an ordinary step has cached, each would keep a piece from the next bucket's activations.
        """
        self._forget_if_parameters_moved()
        wanted = [p for p in self._parameters if p.requires_grad]
        if self._gradients or not wanted:
            return
        piece = torch.empty(packed_bytes(wanted), dtype=torch.uint8, device=wanted[0].device)
        self._gradients = packed_views(piece, wanted)

    def _is_pending(self) -> bool:
        """Whether a graph is between its two passes: what its forward pass kept lies where the arena is free."""
        return self._pending is not None and self._pending() is not None

    def _memory_is_free(self) -> bool:
        """Whether a graph may write to all of the arena: no tensor of an ordinary step is left there."""
        if not self._may_be_in_use:
            return True
        live = self.arena.live_bytes()
        if live and not self._told_of_use:
            self._told_of_use = True
            logger.warning(
                "%d KiB of an earlier step are still held where CUDA graphs write: such steps run as usual. Let go of "
                "outputs and losses before the next step, or use model.set_cuda_graphs(False)", live >> 10,
            )  # fmt: skip
        self._may_be_in_use = live > 0
        return not live

    def _capture(self, key, x, modulation, layout, capacity, max_tokens) -> None:
        torch.cuda.synchronize(x.device)
        disposal.destroy_retired()
        torch.cuda.empty_cache()
        self._make_gradients()
        needed = memory.graph_bytes(self._model, x)
        self._largest_step = max(self._largest_step, needed)
        if self.arena is not None and 0 < self.arena.usable < needed and self._may_grow:
            self.release()
        self._largest_work = max(self._largest_work, memory.work_bytes(self._model, x))
        if self.arena is None:
            self._make_arena(x)
        if 0 < self.arena.usable < needed:
            raise RuntimeError(f"it takes {needed / 2**30:.1f} GiB of {self.arena.usable / 2**30:.1f}")
        self._graphs[key] = _Graph(self, x, modulation, layout, capacity, max_tokens)
        self.reserved_bytes = self.arena.reserved_bytes()
        if self.arena.size:
            self._gather_the_rest()
        self._may_be_in_use = self.arena.size > 0  # to be looked at once

    def _make_arena(self, x: Tensor) -> None:
        """As much as the largest steps so far can use, of what training leaves beside their backward passes."""
        torch.cuda.synchronize(x.device)
        disposal.destroy_retired()
        torch.cuda.empty_cache()
        self._make_gradients()
        if self._early:
            take_workspaces(x)
        if torch.cuda.current_stream(x.device) == torch.cuda.default_stream(x.device):
            with torch.cuda.stream(torch.cuda.Stream(x.device)):
                self.arena = Arena(x.device)
            return
        planned = self._model.planned_bytes()
        split = torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)  # by what stays in them
        most = memory.room_beside(self._model, x.device, planned, split) - self._largest_work - Arena.BESIDE
        wanted = _GROWTH * self._largest_step
        self._may_grow = wanted < most
        if most < self._largest_work:
            raise RuntimeError(f"{max(most, 0) / 2**30:.1f} GiB are left")
        size = int(min(wanted, most))
        try:
            self.arena = Arena(x.device, size)
        except torch.OutOfMemoryError:  # other processes have taken some meanwhile
            torch.cuda.empty_cache()
            self.arena = Arena(x.device, int(0.9 * size))
        self._had_arena = True
        self.reserved_bytes = self.arena.reserved_bytes()
        self._gather_the_rest()

    def _gather_the_rest(self) -> None:
        """Has the allocator hold what backward passes need as one piece, which it divides as each bucket wants it.

        Else each bucket would find the last one's pieces, of other sizes, and have them given back to the device.
        """
        needed = self._largest_work + memory.gradient_bytes(self._model)
        with suppress(torch.OutOfMemoryError):  # then as they come
            torch.empty(int(needed), dtype=torch.uint8, device=self.arena.device)


def _key(x: Tensor, modulation: Tensor, max_tokens: int) -> tuple:
    return x.shape, modulation.shape, x.shape[0] * max_tokens, x.dtype, x.device


class _Run:
    """A graph's forward pass whose backward pass may come: it lives as long as that can be asked for."""


class _Graph:
    """One bucket's pair of graphs, and the places that they read and write."""

    def __init__(self, graphs: BlockGraphs, x, modulation, layout, capacity: int, max_tokens: int):
        model, arena = graphs._model, graphs.arena
        batch = x.shape[0]
        # Values do not matter while capturing; starts must be real, since kernels read memory by it.
        self.x, self.modulation = graphs.place("x", x), graphs.place("modulation", modulation)
        self.text = graphs.place("text", x.new_empty(capacity, x.shape[-1]))
        self.starts = layout.starts.clone()
        self.rotation = ops.rotation_table(model.rope.freqs, x.shape[1]).clone()
        with torch.no_grad():
            self.x.copy_(x), self.modulation.copy_(modulation), self.text.zero_()
        inputs = [t.detach().requires_grad_() for t in (self.x, self.modulation, self.text)]
        # The parameters' memory under leaves of its own: those of the model may have been seen on another stream.
        names = [f"model.blocks.{name}" for name, _ in model.blocks.named_parameters()]
        leaves = [p.detach().requires_grad_(p.requires_grad) for p in graphs._parameters]
        self._leaves = dict(zip(names, leaves, strict=True))
        layout = ops.TextLayout(
            (max_tokens,) * batch, capacity, max_tokens, self.starts, *([layout.token_index] * 3)
        )  # fmt: skip
        differentiated = [*inputs, *(leaf for leaf in leaves if leaf.requires_grad)]
        args = (*inputs, layout, self.rotation, 0, arena if arena.size else None)

        stream = arena.stream
        current = torch.cuda.current_stream(x.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream), torch.enable_grad():
            for _ in range(_WARMUP):  # compiles, picks algorithms, allocates workspaces
                with arena.use() if arena.size else nullcontext():
                    outs = self._forward(model, args)
                self.outs = [graphs.place(f"out {i}", out) for i, out in enumerate(outs)]
                self.d_outs = [graphs.place(f"d_out {i}", out).zero_() for i, out in enumerate(outs)]
                torch.autograd.grad(outs, differentiated, self.d_outs, allow_unused=True)
                del outs
        current.wait_stream(stream)
        torch.cuda.synchronize(x.device)
        self.input_gradients = [graphs.place(f"gradient of {i}", t) for i, t in enumerate(inputs)]
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self._arena = arena  # whose pool must outlive them
        self._retire = disposal.retire_with(self, graphs=(self.forward_graph, self.backward_graph))
        # "thread_local": other threads may allocate meanwhile, as the data loader's does where batches are pinned.
        options = {"pool": arena.id, "stream": stream, "capture_error_mode": "thread_local"}
        torch.cuda.reset_peak_memory_stats(x.device)  # what it was before is lost
        before = torch.cuda.memory_allocated(x.device)
        with disposal.under_way(), torch.enable_grad(), torch.cuda.graph(self.forward_graph, **options):
            outs = self._forward(model, args)
            _copy([out.detach() for out in outs], self.outs)
        wanted = [leaf.data_ptr() for leaf in differentiated[len(inputs) :]]
        places = dict(zip(wanted, graphs._gradients, strict=True))
        capture = torch.cuda.graph(self.backward_graph, **options)
        with ops.weight_gradients_into(places), disposal.under_way(), capture:
            grads = torch.autograd.grad(outs, differentiated, self.d_outs, allow_unused=True)
            _copy(grads[: len(inputs)], self.input_gradients)
            _copy(grads[len(inputs) :], graphs._gradients)
        self.bytes = torch.cuda.max_memory_allocated(x.device) - before  # of the arena's, at the peak

    def close(self) -> None:
        """Gives the graphs up, whoever still refers to this object."""
        self.forward_graph = self.backward_graph = None
        self._retire()

    def _forward(self, model: nn.Module, args: tuple) -> tuple[Tensor, Tensor, Tensor]:
        return torch.func.functional_call(_Blocks(model), self._leaves, args)


def _copy(gradients: Sequence[Tensor | None], buffers: list[Tensor]) -> None:
    """Gradients or results into buffers in which they do not lie already; zeros where there is none. Few launches."""
    pairs = [(b, g) for b, g in zip(buffers, gradients, strict=True) if g is not None and g.data_ptr() != b.data_ptr()]
    # One that lies otherwise, or has another dtype, would have all of them copied one by one.
    alike = [(b, g) for b, g in pairs if g.stride() == b.stride() and g.dtype == b.dtype]
    for b, g in pairs:
        if g.stride() != b.stride() or g.dtype != b.dtype:
            b.copy_(g)
    if alike:
        torch._foreach_copy_(*(list(side) for side in zip(*alike, strict=True)))
    absent = [b for b, g in zip(buffers, gradients, strict=True) if g is None]
    if absent:
        torch._foreach_zero_(absent)


class _Blocks(nn.Module):
    """All blocks of a model as one function."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args) -> tuple[Tensor, Tensor, Tensor]:
        x, branch = self.model._run_blocks(*args)
        return x, branch.o, branch.gate.contiguous()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graphs, graph, starts, rotation, x, modulation, text, *parameters):
        ctx.graphs, ctx.graph = graphs, graph
        for place, value in (
            (graph.x, x), (graph.modulation, modulation), (graph.text, text), (graph.starts, starts),
            (graph.rotation, rotation),
        ):  # fmt: skip
            place.copy_(value)
        graph.forward_graph.replay()
        ctx.run = _Run()
        graphs._pending = weakref.ref(ctx.run)
        return tuple(out.detach() for out in graph.outs)  # new objects, whose history is this run's

    @staticmethod
    def backward(ctx, *d_outs):
        graphs, graph = ctx.graphs, ctx.graph
        if graphs._pending is None or graphs._pending() is not ctx.run:
            raise RuntimeError(
                "the blocks ran again before this backward pass, and CUDA graphs share their memory; run each "
                "backward pass before the next forward pass, or switch them off: model.set_cuda_graphs(False)"
            )
        for place, value in zip(graph.d_outs, d_outs, strict=True):
            place.copy_(value)
        graph.backward_graph.replay()
        graphs._pending = None
        gradients = iter(graphs._gradients)
        parameters = (next(gradients).detach() if p.requires_grad else None for p in graphs._parameters)
        return None, None, None, None, *(g.detach() for g in graph.input_gradients), *parameters
