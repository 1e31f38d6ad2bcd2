"""Predictions without gradients, many with the same text and sizes: the transformer's part of sampling.

The text's keys and values are made once for all steps. On a GPU a prediction is one CUDA graph, so that small models
and videos are not bound by the CPU's launching; what changes between calls is copied into fixed places first.
"""

import logging

import torch
from torch import Tensor

from stdit_fast import ops
from stdit_fast.model.stdit2 import STDiT2, TextContext

logger = logging.getLogger(__name__)

MAX_TOKENS = 65536  # beyond, the GPU is the slower one by far, and a graph would only hold memory
_WARMUP = 2
_SCALARS = ("num_frames", "height", "width", "ar", "fps")


class Predictor:
    """Calls a model as `stdit_fast.diffusion.denoise` does: predictor(x, t, x_mask).

    Graphs are captured as shapes come, and serve later texts of the same batch size too.

    Args:
        model: in evaluation mode.
        cuda_graphs: False runs every call as usual; so do a CPU, and calls of more than MAX_TOKENS tokens.
    """

    def __init__(self, model: STDiT2, cuda_graphs: bool = True):
        self.model = model
        self._wants_graphs = cuda_graphs
        self._graphs: dict[tuple, _Graph] = {}
        self._pool = self._stream = None
        self._addresses: tuple[int, ...] = ()
        self._text: TextContext | None = None
        self._scalars: dict[str, Tensor] = {}

    def bind(self, text: TextContext, **scalars: Tensor) -> None:
        """Sets what stays the same for the calls that follow.

        Args:
            text: of `STDiT2.encode_text`, for as many samples as a call will have.
            scalars: num_frames, height, width, ar, fps, each [B], as in the model's `forward`.
        """
        if scalars.keys() != set(_SCALARS):
            raise TypeError(f"bind needs {', '.join(_SCALARS)}; got {', '.join(scalars)}")
        self._text = text
        self._scalars = {name: value.to(text.kv.device) for name, value in scalars.items()}
        for graph in self._graphs.values():
            graph.bound = False

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, x_mask: Tensor | None = None) -> Tensor:
        """The model's output [B, 2*C, T, H, W] float32.

        Args:
            x: [B, C, T, H, W] latents; t: [B] integer timesteps; x_mask: [B, T], False where a frame is a condition.
        """
        if self._text is None:
            raise RuntimeError("bind(text, ...) comes before the first prediction")
        if len(self._text.layout.lengths) != len(x):  # a graph's text has its own batch size, and would hide it
            raise ValueError(f"bound is the text of {len(self._text.layout.lengths)} samples, expected {len(x)}")
        graph = self._graph(x, t, x_mask)
        if graph is None:
            return self._predict(x, t, x_mask)
        if not graph.bound:
            graph.bind(self._text, self._scalars)
        return graph.replay(x, t, x_mask)

    def _predict(self, x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        return self.model(x, t, self._text, x_mask=x_mask, **self._scalars)

    def _graph(self, x: Tensor, t: Tensor, x_mask: Tensor | None) -> "_Graph | None":
        rows, columns = (-(-size // p) for size, p in zip(x.shape[3:], self.model.config.patch_size[1:], strict=True))
        tokens = x.shape[0] * x.shape[2] * rows * columns
        if not self._wants_graphs or not x.is_cuda or tokens > MAX_TOKENS:
            return None
        addresses = tuple(p.data_ptr() for p in self.model.parameters())
        if addresses != self._addresses:  # a graph reads parameters by address
            self._graphs.clear()
            self._addresses = addresses
        key = (x.shape, x.dtype, x_mask is None)
        if key not in self._graphs:
            if self._pool is None:
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(x.device)
            try:
                self._graphs[key] = _Graph(self, x, t, x_mask)
            except RuntimeError as error:  # no memory for it, most likely; the call itself may fit
                self._wants_graphs = False
                logger.warning(
                    "No CUDA graph for latents of shape %s; predictions run as usual: %s", list(x.shape), error
                )
                return None
        return self._graphs[key]


class _Graph:
    """One shape's graph, and the places that it reads and writes."""

    def __init__(self, predictor: Predictor, x: Tensor, t: Tensor, x_mask: Tensor | None):
        model, text = predictor.model, predictor._text
        batch, most = x.shape[0], model.config.model_max_length
        self.x, self.t = x.clone(), t.clone()
        self.x_mask = None if x_mask is None else x_mask.to(x.device).clone()
        self.scalars = {name: value.clone() for name, value in predictor._scalars.items()}
        self.kv = text.kv.new_zeros(batch * most, *text.kv.shape[1:])
        self.starts = text.layout.starts.clone()
        unused = text.layout.token_index
        layout = ops.TextLayout((most,) * batch, batch * most, most, self.starts, unused, unused, unused)
        self.bind(text, predictor._scalars)

        def predict() -> Tensor:
            return model(self.x, self.t, TextContext(self.kv, layout), x_mask=self.x_mask, **self.scalars)

        side = predictor._stream
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            for _ in range(_WARMUP):  # compiles, picks algorithms, allocates workspaces
                predict()
        torch.cuda.current_stream(x.device).wait_stream(side)
        torch.cuda.synchronize(x.device)
        self.graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads may allocate meanwhile, as a data loader's does that pins batches.
        with torch.cuda.graph(self.graph, pool=predictor._pool, stream=side, capture_error_mode="thread_local"):
            self.out = predict()

    def bind(self, text: TextContext, scalars: dict[str, Tensor]) -> None:
        self.kv[: text.kv.shape[0]].copy_(text.kv)
        self.starts.copy_(text.layout.starts)
        for name, value in scalars.items():
            self.scalars[name].copy_(value)
        self.bound = True

    def replay(self, x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        self.x.copy_(x)
        self.t.copy_(t)
        if x_mask is not None:
            self.x_mask.copy_(x_mask)
        self.graph.replay()
        return self.out.clone()
