"""One training step of any bucket, measured: its time and the memory that it takes, also where that is not enough."""

import gc
import logging
import time
from dataclasses import replace

import torch
from torch import Tensor

from stdit_fast import STDiT2
from stdit_fast.benchmarks.sweep_model import GIB, Probe, Shape
from stdit_fast.diffusion import IDDPM
from stdit_fast.model.config import STDiT2Config
from stdit_fast.model.graphs import MAX_TOKENS
from stdit_fast.ops.adamw import AdamWStep, Hyperparameters
from stdit_fast.train.out_of_memory import parts_of

logger = logging.getLogger(__name__)

# The first step of a probe compiles and grows the allocator's pools; small buckets also capture their CUDA graph.
WARMUP, WARMUP_OF_GRAPHS = 1, 4
# Steps are timed until the last ones agree to STEADY, two of them at least and LEAST_SECONDS in all; else MOST in all.
STEADY, LEAST_SECONDS, MOST_REPEATS = 0.03, 0.8, 6
LEAST_CAPTIONS = 64  # in pinned memory
LONG = 1.1  # of steps that take so many seconds one is timed: they repeat to a few thousandths


class StateShard:
    """What a rank of ZeRO-2 holds of the optimizer's state, and its step: fp32 masters, AdamW, clipping, the average.

    Of each parameter the first part of `world_size` is taken; the others' parts and the communication are not there.
    """

    def __init__(self, parameters: list[Tensor], world_size: int, ema_decay: float):
        self.parameters = parameters
        self.parts = [slice(0, -(-p.numel() // world_size)) for p in parameters]
        self.masters = [self._part(p, part).float() for p, part in zip(parameters, self.parts, strict=True)]
        self.averages = [m.clone() for m in self.masters]
        # Training's own step, on the weights that a rank updates; those of float32 are copied by themselves.
        self._working = [self._part(p, part) for p, part in zip(parameters, self.parts, strict=True)]
        self._copies = parameters[0].dtype == torch.bfloat16
        self._step = AdamWStep(
            self.masters,
            [torch.zeros_like(m) for m in self.masters],
            [torch.zeros_like(m) for m in self.masters],
            torch.zeros(len(self.masters), device=self.masters[0].device),
            self.averages,
            self._working if self._copies else None,
        )
        self._settings = Hyperparameters(
            lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, max_norm=1.0, average_decay=ema_decay
        )

    @staticmethod
    def _part(tensor: Tensor, part: slice) -> Tensor:
        return tensor.detach().flatten()[part]

    @torch.no_grad()
    def step(self) -> None:
        """Updates the masters, the average and the working weights from the parameters' gradients, and drops these."""
        grads = [
            None if p.grad is None else self._part(p.grad, part)
            for p, part in zip(self.parameters, self.parts, strict=True)
        ]
        self._step.update(grads, self._step.square_sum(grads), None, self._settings)
        for parameter in self.parameters:
            parameter.grad = None
        if not self._copies:
            torch._foreach_copy_(self._working, self.masters)


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
        self._stored: Tensor | None = None  # captions in pinned memory, for all probes
        self.held = torch.cuda.memory_allocated() if on_gpu else 0

    def __call__(self, shape: Shape, batch: int, checkpointed: int, pieces: int = 1) -> Probe:
        """Measures; a probe without seconds ran out of memory, after which all of it is free again."""
        probe = Probe(shape, batch, checkpointed, pieces=pieces)
        try:
            seconds, peak = self._measure(probe)
            probe = replace(probe, seconds=tuple(seconds), peak=peak, keeps=self.model.last_kept_activations)
        except torch.OutOfMemoryError:
            pass  # recovered below, when no frame of the traceback holds tensors any more
        self._recover()
        return probe

    def _measure(self, probe: Probe) -> tuple[list[float], int]:
        self.model.set_checkpointing(probe.checkpointed, reserve=self.base - self.weights)
        inputs = self._inputs(probe.shape, probe.batch)
        parts = parts_of(probe.batch, probe.pieces)
        small = probe.shape.tokens(probe.at_once) <= MAX_TOKENS
        graphs = small and probe.checkpointed == 0 and self.device.type == "cuda"
        warmup = WARMUP_OF_GRAPHS if graphs else WARMUP
        self._reset_peak()
        seconds: list[float] = []
        while not _settled(seconds[warmup:]):
            self._wait()
            started = time.perf_counter()
            self._step(inputs, parts)
            self._wait()
            seconds.append(time.perf_counter() - started)
        timed = seconds[warmup:]
        return _steady(timed) or timed[-3:], self._peak()

    def _step(self, inputs: dict[str, Tensor], parts: list[slice]) -> None:
        for part in parts:
            self._forward_backward(inputs, part).backward()
        self.state.step()

    def _forward_backward(self, inputs: dict[str, Tensor], part: slice) -> Tensor:
        """The loss of a part of a batch, weighed by its share."""
        of_part = {key: value[part].to(self.device, non_blocking=True) for key, value in inputs.items()}
        latents, noise, mask = (of_part.pop(key) for key in ("latents", "noise", "x_mask"))
        timestep, stored = of_part.pop("timestep"), of_part.pop("stored")
        # Stored states lie on the device beside their padded form.
        arguments = of_part | {"y": stored.clone(), "mask": torch.ones(stored.shape[0], self.text_tokens).long()}
        losses = self.diffusion.training_losses(self.model, latents, timestep, arguments, noise=noise, mask=mask)
        return losses["loss"].mean() * (len(latents) / len(inputs["latents"]))

    def _inputs(self, shape: Shape, batch: int) -> dict[str, Tensor]:
        """A batch like the data set's, in the host's memory: every second video has its first frame as a condition."""
        latent = (batch, 4, shape.frames, shape.height // 8, shape.width // 8)
        x_mask = torch.ones(batch, shape.frames, dtype=torch.bool)
        x_mask[::2, 0] = shape.frames == 1
        one = torch.ones(batch)
        if self._stored is None or len(self._stored) < batch:  # pinning takes longer than a step
            caption = torch.randn(1, 1, self.text_tokens, self.model.config.caption_channels)
            self._stored = None
            stored = caption.to(next(self.model.parameters()).dtype).repeat(max(batch, LEAST_CAPTIONS), 1, 1, 1)
            self._stored = stored.pin_memory() if self.device.type == "cuda" else stored
        inputs = {
            "latents": torch.randn(latent),
            "noise": torch.randn(latent),
            "timestep": torch.randint(1000, (batch,)),
            "x_mask": x_mask,
            "drop_caption": torch.zeros(batch, dtype=torch.bool),
            "num_frames": one * shape.frames,
            "height": one * shape.height,
            "width": one * shape.width,
            "ar": one * shape.height / shape.width,
            "fps": one * 8,
        }
        if self.device.type == "cuda":
            inputs = {key: value.pin_memory() for key, value in inputs.items()}
        return inputs | {"stored": self._stored[:batch]}

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
        left = torch.cuda.memory_allocated() - self.held
        if left > GIB:  # libraries' workspaces and tables of positions stay
            logger.warning("%.0f MiB were not given back after a probe; later peaks count them", left / 2**20)
            self.held += left


def _steady(seconds: list[float]) -> list[float]:
    """The last steps, two or more, that took about the same time; none where the last two did not."""
    counts = range(len(seconds), 1, -1)
    return next((seconds[-n:] for n in counts if max(seconds[-n:]) <= (1 + STEADY) * min(seconds[-n:])), [])


def _settled(seconds: list[float]) -> bool:
    """Whether enough steps were timed."""
    enough = bool(seconds) and (seconds[-1] > LONG or len(seconds) == MOST_REPEATS)
    return enough or sum(_steady(seconds)) >= LEAST_SECONDS
