"""CUDA graphs of the blocks' forward and backward passes, one pair a bucket: small buckets without the CPU's launching.

A step of the blocks is some 2,600 launches. Up to about 16,000 tokens the GPU is done with them before the CPU has made
them; a graph is one launch. What changes from batch to batch is copied into fixed places first: tokens, modulation, and
the packed text, padded to the bucket's capacity, whose lengths the kernels read on the GPU.

All graphs share one pool of memory, since one bucket's backward pass is over before the next bucket's forward pass
begins. Gradients of parameters leave through one set of buffers for the same reason.
"""

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stdit_fast import ops

logger = logging.getLogger(__name__)

MAX_TOKENS = 16384  # beyond, the GPU is the slower one
SEEN_BEFORE = 2  # steps of a bucket that run as usual: a graph is worth its capture where a bucket comes back
MAX_GRAPHS = 64
_WARMUP = 2


class BlockGraphs:
    """The graphs of one model's blocks, captured as buckets come.

    Attributes:
        pool_bytes: memory that the graphs keep for themselves.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._parameters: list[Tensor] = []
        self._addresses: tuple[int, ...] = ()  # negative where no gradient is wanted
        self._blocks: tuple[int, ...] = ()
        self._places: list[tuple[dict, str]] = []
        self._gradients: list[Tensor] = []
        self._graphs: dict[tuple, _Graph] = {}
        self._seen: dict[tuple, int] = {}
        self._refused: set[tuple] = set()
        self._pool = self._stream = None  # of all captures: what one gave back serves the next on the same stream alone
        self._runs = 0
        self._pending: int | None = None  # the run whose backward pass may come next
        self.pool_bytes = 0

    @property
    def captured(self) -> int:
        """How many buckets have a graph."""
        return len(self._graphs)

    def find(self, x: Tensor, modulation: Tensor, layout: ops.TextLayout, max_tokens: int) -> "_Graph | None":
        """The graph of this bucket; None where the step has to run as usual, as do a bucket's first ones.

        Args:
            x: [B, T, S, C] tokens; modulation: [B, 1 or T, 9*C]; layout: of the text, of at most `max_tokens` a sample.
        """
        if not x.is_cuda or x.shape[:3].numel() > MAX_TOKENS or torch.cuda.is_current_stream_capturing():
            return None
        self._forget_if_parameters_moved()
        capacity, key = x.shape[0] * max_tokens, _key(x, modulation, max_tokens)
        if key not in self._graphs:
            self._seen[key] = self._seen.get(key, 0) + 1
            if self._seen[key] <= SEEN_BEFORE or len(self._graphs) >= MAX_GRAPHS or key in self._refused:
                return None
            try:
                self._capture(key, x, modulation, layout, capacity, max_tokens)
            except RuntimeError as error:  # no memory for it, most likely; the step itself may fit
                self._refused.add(key)
                logger.warning("No CUDA graph for tokens of shape %s, which run as usual: %s", list(x.shape), error)
                return None
        return self._graphs[key]

    def has(self, x: Tensor, modulation: Tensor, max_tokens: int) -> bool:
        """Whether this bucket was captured: its step takes no memory beyond the graphs' own."""
        return _key(x, modulation, max_tokens) in self._graphs

    def run(
        self, graph: "_Graph", x: Tensor, modulation: Tensor, text: Tensor, layout: ops.TextLayout, rotation: Tensor
    ) -> tuple[Tensor, ops.Branch]:
        """As `STDiT2._run_blocks`: the residual stream, and what is left to be added to it; `text` is [M, C]."""
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
            self._places = [
                (m._parameters, name) for m in modules for name, p in m._parameters.items() if p is not None
            ]
        parameters = [owner[name] for owner, name in self._places]
        addresses = tuple(p.data_ptr() if p.requires_grad else -p.data_ptr() for p in parameters)
        if addresses != self._addresses:
            self._graphs.clear()
            self._parameters, self._addresses = parameters, addresses
            self._gradients = [torch.empty_like(p) for p in parameters if p.requires_grad]

    def _capture(self, key, x, modulation, layout, capacity, max_tokens) -> None:
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(x.device)
        torch.cuda.synchronize(x.device)
        torch.cuda.empty_cache()  # as the capture does: what is reserved afterwards beyond this is the graphs'
        before = torch.cuda.memory_reserved(x.device)
        self._graphs[key] = _Graph(self, x, modulation, layout, capacity, max_tokens)
        torch.cuda.synchronize(x.device)
        self.pool_bytes += max(0, torch.cuda.memory_reserved(x.device) - before)


def _key(x: Tensor, modulation: Tensor, max_tokens: int) -> tuple:
    return x.shape, modulation.shape, x.shape[0] * max_tokens, x.dtype, x.device


class _Graph:
    """One bucket's pair of graphs, and the places that they read and write."""

    def __init__(self, graphs: BlockGraphs, x, modulation, layout, capacity: int, max_tokens: int):
        model = graphs._model
        batch = x.shape[0]
        # Values do not matter while capturing; starts must be real, since kernels read memory by it.
        self.x, self.modulation = x.detach().clone(), modulation.detach().clone()
        self.text = x.new_zeros(capacity, x.shape[-1])
        self.starts = layout.starts.clone()
        self.rotation = ops.rotation_table(model.rope.freqs, x.shape[1]).clone()
        inputs = [t.requires_grad_() for t in (self.x, self.modulation, self.text)]
        # The parameters' memory under leaves of its own: those of the model may have been seen on another stream.
        names = [f"model.blocks.{name}" for name, _ in model.blocks.named_parameters()]
        leaves = [p.detach().requires_grad_(p.requires_grad) for p in graphs._parameters]
        self._leaves = dict(zip(names, leaves, strict=True))
        self.layout = ops.TextLayout(
            (max_tokens,) * batch, capacity, max_tokens, self.starts, *([layout.token_index] * 3)
        )  # fmt: skip
        self.differentiated = [*inputs, *(leaf for leaf in leaves if leaf.requires_grad)]

        side = graphs._stream
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side), torch.enable_grad():
            for _ in range(_WARMUP):  # compiles, picks algorithms, allocates workspaces
                outs = self._forward(model)
                self.d_outs = [torch.zeros_like(out) for out in outs]
                torch.autograd.grad(outs, self.differentiated, self.d_outs, allow_unused=True)
            del outs
        torch.cuda.current_stream(x.device).wait_stream(side)
        torch.cuda.synchronize(x.device)
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # "thread_local": other threads may allocate meanwhile, as the data loader's does where batches are pinned.
        options = {"pool": graphs._pool, "stream": side, "capture_error_mode": "thread_local"}
        with torch.enable_grad(), torch.cuda.graph(self.forward_graph, **options):
            outs = self._forward(model)
        wanted = [leaf.data_ptr() for leaf in self.differentiated[len(inputs) :]]
        places = dict(zip(wanted, graphs._gradients, strict=True))
        with ops.weight_gradients_into(places), torch.cuda.graph(self.backward_graph, **options):
            grads = torch.autograd.grad(outs, self.differentiated, self.d_outs, allow_unused=True)
            _copy(grads[len(inputs) :], graphs._gradients)
        self.outs = tuple(out.detach() for out in outs)
        self.input_gradients = grads[: len(inputs)]

    def _forward(self, model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        args = (self.x, self.modulation, self.text, self.layout, self.rotation)
        return torch.func.functional_call(_Blocks(model), self._leaves, args)


def _copy(gradients: Sequence[Tensor | None], buffers: list[Tensor]) -> None:
    """Gradients into the buffers in which they do not lie already; zeros where there is none. In few launches."""
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
        graphs._runs += 1
        ctx.run = graphs._pending = graphs._runs
        return tuple(out.detach() for out in graph.outs)  # new objects, whose history is this run's

    @staticmethod
    def backward(ctx, *d_outs):
        graphs, graph = ctx.graphs, ctx.graph
        if graphs._pending != ctx.run:
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
