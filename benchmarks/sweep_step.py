"""One training step of any bucket, measured: its time and the memory that it takes, also where that is not enough."""

import gc
import time

import torch
from torch import Tensor

from stdit_fast import STDiT2
from stdit_fast.benchmarks.sweep_model import GIB, Probe, Shape
from stdit_fast.diffusion import IDDPM
from stdit_fast.model.config import STDiT2Config

# Steps that compile, choose algorithms and grow the allocator's pools; small buckets also capture their CUDA graph.
WARMUP, WARMUP_OF_GRAPHS = 2, 4
LEAST_SECONDS, MOST_REPEATS = 0.8, 5
LONG = 1.1  # of steps that take so many seconds one warms up, and one is timed: they repeat to a few thousandths


class StateShard:
    """What a rank of ZeRO-2 holds of the optimizer's state, and its step: fp32 masters, AdamW, clipping, the average.

    Of each parameter the first part of `world_size` is taken; the others' parts and the communication are not there.
    """

    def __init__(self, parameters: list[Tensor], world_size: int, ema_decay: float):
        self.parameters, self.ema_decay = parameters, ema_decay
        self.parts = [slice(0, -(-p.numel() // world_size)) for p in parameters]
        self.masters = [self._part(p, part).float() for p, part in zip(parameters, self.parts, strict=True)]
        self.averages = [m.clone() for m in self.masters]
        on_gpu = parameters[0].is_cuda
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-6, weight_decay=0.0, fused=on_gpu)

    @staticmethod
    def _part(tensor: Tensor, part: slice) -> Tensor:
        return tensor.detach().flatten()[part]

    @torch.no_grad()
    def step(self) -> None:
        """Updates the masters, the average and the working weights from the parameters' gradients, and drops these."""
        whole = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        grads = [self._part(g, part).float() for g, part in zip(whole, self.parts, strict=True)]
        del whole
        for parameter in self.parameters:
            parameter.grad = None
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        torch._foreach_mul_(grads, (1.0 / norm.clamp(min=1.0)))
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.averages, self.masters, 1 - self.ema_decay)
        working = [self._part(p, part) for p, part in zip(self.parameters, self.parts, strict=True)]
        torch._foreach_copy_(working, self.masters)


class StepMeasurer:
    """Measures whole steps: diffusion loss, backward, optimizer, average; random weights and inputs.

    Args:
        config: of the model.
        device: where.
        world_size: ranks over which the state is split.
        text_tokens: tokens of each caption, all of them real.
        ballast: bytes that are held beside, as other libraries would.

    Attributes:
        base: bytes of weights, gradients, the optimizer's state, the average, and the ballast.
    """

    def __init__(
        self,
        config: STDiT2Config,
        device: torch.device | str,
        *,
        world_size: int = 1,
        text_tokens: int = 200,
        ballast: int = 0,
    ):
        self.device, self.text_tokens = torch.device(device), text_tokens
        on_gpu = self.device.type == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        torch.manual_seed(0)
        with self.device:
            self.model = STDiT2(config).to(dtype).train()
            self.ballast = torch.empty(ballast, dtype=torch.uint8)
        for parameter in self.model.parameters():  # zero-initialised layers would be timed on zeros
            if parameter.count_nonzero() == 0:
                torch.nn.init.normal_(parameter, std=0.02)
        self.model.set_cuda_graphs(on_gpu)
        self.state = StateShard(list(self.model.parameters()), world_size, ema_decay=0.9999)
        self.weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.base = 2 * self.weights + 4 * sum(m.numel() * m.element_size() for m in self.state.masters) + ballast
        self.diffusion = IDDPM()
        self._seen: set[Shape] = set()  # whose kernels are compiled
        self.held = torch.cuda.memory_allocated() if on_gpu else 0

    def __call__(self, shape: Shape, batch: int, checkpointed: int) -> Probe:
        """Measures; a probe without seconds ran out of memory, after which all of it is free again.

        Raises:
            RuntimeError: memory that was not given back.
        """
        probe = Probe(shape, batch, checkpointed)
        try:
            seconds, peak = self._measure(shape, batch, checkpointed)
            probe = Probe(shape, batch, checkpointed, tuple(seconds), peak, self.model.last_kept_activations)
        except torch.OutOfMemoryError:
            pass  # recovered below, when no frame of the traceback holds tensors any more
        self._recover()
        return probe

    def _measure(self, shape: Shape, batch: int, checkpointed: int) -> tuple[list[float], int]:
        self.model.set_checkpointing(checkpointed, reserve=self.base - self.weights)
        inputs = self._inputs(shape, batch)
        small = shape.tokens(batch) <= 16384 and checkpointed == 0
        warmup = WARMUP_OF_GRAPHS if small and self.device.type == "cuda" else WARMUP - (shape in self._seen)
        self._seen.add(shape)
        self._reset_peak()
        seconds: list[float] = []
        while len(seconds) < MOST_REPEATS and sum(seconds) < LEAST_SECONDS:
            self._wait()
            started = time.perf_counter()
            self._step(inputs)
            self._wait()
            taken = time.perf_counter() - started
            if warmup > 0:
                warmup -= 2 if taken > LONG and not small else 1
            else:
                seconds.append(taken)
        return seconds, self._peak()

    def _step(self, inputs: dict) -> None:
        noise, mask = inputs["noise"], inputs["x_mask"]
        losses = self.diffusion.training_losses(
            self.model, inputs["latents"], inputs["timestep"], inputs["arguments"], noise=noise, mask=mask
        )
        losses["loss"].mean().backward()
        self.state.step()

    def _inputs(self, shape: Shape, batch: int) -> dict:
        """A batch like the data set's: every second video has its first frame as a condition."""
        generator = torch.Generator(self.device).manual_seed(0)
        options = {"device": self.device, "generator": generator}
        latent = (batch, 4, shape.frames, shape.height // 8, shape.width // 8)
        x_mask = torch.ones(batch, shape.frames, dtype=torch.bool, device=self.device)
        x_mask[::2, 0] = shape.frames == 1
        one = torch.ones(batch, device=self.device)
        states = (batch, 1, self.text_tokens, self.model.config.caption_channels)
        return {
            "latents": torch.randn(latent, **options),
            "noise": torch.randn(latent, **options),
            "timestep": torch.randint(1000, (batch,), **options),
            "x_mask": x_mask,
            "arguments": {
                "y": torch.randn(states, dtype=next(self.model.parameters()).dtype, **options),
                "mask": torch.ones(batch, self.text_tokens, dtype=torch.long),
                "drop_caption": torch.zeros(batch, dtype=torch.bool, device=self.device),
                "num_frames": one * shape.frames,
                "height": one * shape.height,
                "width": one * shape.width,
                "ar": one * shape.height / shape.width,
                "fps": one * 8,
            },
        }

    # --------------------------------------------------------------- the device

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> int:
        if self.device.type != "cuda":
            return 0
        # What the graphs' own pool holds does not count as allocated.
        return torch.cuda.max_memory_allocated() + self.model.graphs.pool_bytes

    def _recover(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        self.model.set_cuda_graphs(self.device.type == "cuda")  # forgets those that there are, with their pool
        gc.collect()
        if self.device.type != "cuda":
            return
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        if self.held == 0 or not self.state.optimizer.state:
            return
        moments = sum(t.numel() * t.element_size() for s in self.state.optimizer.state.values() for t in s.values())
        left = torch.cuda.memory_allocated() - self.held - moments
        if left > GIB:  # libraries' workspaces and tables of positions stay
            raise RuntimeError(f"{left / 2**20:.0f} MiB were not given back after a probe")
