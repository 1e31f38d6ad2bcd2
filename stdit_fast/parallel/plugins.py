"""ColossalAI's plugins with what training needs of their optimizers: a guarded step, and whole fp32 weights.

Import only after `processes.import_colossalai`, which keeps ColossalAI's import quiet.
"""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from colossalai.amp.naive_amp.mixed_precision_mixin import BF16MixedPrecisionMixin
from colossalai.booster.plugin import LowLevelZeroPlugin, TorchDDPPlugin
from colossalai.booster.plugin.low_level_zero_plugin import LowLevelZeroModel
from colossalai.interface import OptimizerWrapper
from colossalai.zero import LowLevelZeroOptimizer
from torch import Tensor

from stdit_fast.parallel.masters import MasterWeights
from stdit_fast.parallel.processes import Processes


class ReplicatedOptimizer(OptimizerWrapper, MasterWeights):
    """Every process holds all weights in fp32 (TorchDDPPlugin)."""

    def __init__(self, optim: torch.optim.Optimizer, max_norm: float, processes: Processes):
        super().__init__(optim)
        self.max_norm, self.processes = max_norm or math.inf, processes

    def guarded_step(self) -> float:
        norm = self.clip_grad_by_norm(self.max_norm).item()
        if math.isfinite(norm):
            self.step()
        self.zero_grad()
        return norm

    def gather(self, parts: list[Tensor]) -> Iterator[Tensor]:
        yield from parts

    def split(self, whole: Tensor, index: int) -> Tensor:
        return whole

    @torch.no_grad()
    def load_masters(self, weights: list[Tensor]) -> None:
        for master, whole in zip(self.masters, weights, strict=True):
            master.copy_(whole)


class _SkipNonFinite(BF16MixedPrecisionMixin):
    """ColossalAI asks its mixed-precision part whether to skip a step; its own bf16 part never says yes."""

    def __init__(self, optimizer: "ShardedOptimizer"):
        self.optimizer = optimizer

    def should_skip_step(self) -> bool:
        self.optimizer.measure_norms()
        return not math.isfinite(self.optimizer.grad_norm)


class ShardedOptimizer(LowLevelZeroOptimizer, MasterWeights):
    """Each process holds its part of the fp32 weights and moments (ZeRO-2), the model is bf16.

    The gradient norm is one reduction with one read-back, where ColossalAI reads back every parameter's.
    """

    def __init__(self, optim: torch.optim.Optimizer, processes: Processes, **kwargs):
        super().__init__(optim, **kwargs)
        self.processes = processes
        self.mixed_precision_mixin = _SkipNonFinite(self)
        self.grad_norm = math.nan
        self._group_norms: list[float] = []

    def measure_norms(self) -> None:
        """The gradient norm of each parameter group over all processes, into `grad_norm`."""
        squares = []
        for group in range(self.num_param_groups):
            grads = [g for g in self.get_working_grads_by_group_id(group) if g is not None]
            norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
            squares.append(torch.stack(norms).square().sum())
        total = torch.stack(squares)
        dist.all_reduce(total)
        self._group_norms = total.sqrt().tolist()
        self.grad_norm = math.hypot(*self._group_norms)

    def _compute_grad_norm(self, dp_pg, gradients, norm_type=2):
        return self._group_norms.pop(0)  # `step` asks once a group, in order

    def guarded_step(self) -> float:
        self.step()
        self.zero_grad()
        return self.grad_norm

    def gather(self, parts: list[Tensor]) -> Iterator[Tensor]:
        for master, part in zip(self.masters, parts, strict=True):
            working = self.master_to_working_param[id(master)]
            yield self.processes.all_gather(part)[: working.numel()].view(working.shape)

    def split(self, whole: Tensor, index: int) -> Tensor:
        padding = -whole.numel() % self.processes.world_size
        padded = torch.nn.functional.pad(whole.flatten(), (0, padding))
        return padded.chunk(self.processes.world_size)[self.processes.rank]

    @torch.no_grad()
    def load_masters(self, weights: list[Tensor]) -> None:
        for index, (master, whole) in enumerate(zip(self.masters, weights, strict=True)):
            master.copy_(self.split(whole, index))
            self.master_to_working_param[id(master)].copy_(whole)


class ReplicatedPlugin(TorchDDPPlugin):
    """TorchDDPPlugin in fp32; the plugin for the CPU (gloo).

    Args:
        max_norm: of the gradient; 0: no clipping.
    """

    def __init__(self, max_norm: float, processes: Processes):
        super().__init__(broadcast_buffers=False)
        self.max_norm, self.processes = max_norm, processes

    def configure(self, model, optimizer=None, criterion=None, dataloader=None, lr_scheduler=None):
        optimizer = ReplicatedOptimizer(optimizer, self.max_norm, self.processes)
        return super().configure(model, optimizer, criterion, dataloader, lr_scheduler)


class ShardedPlugin(LowLevelZeroPlugin):
    """LowLevelZeroPlugin, ZeRO-2 in bf16 with fp32 masters; the plugin for GPUs ("zero2").

    Inputs are not cast: the model casts its latents, and sizes and timesteps must keep their digits.

    Args:
        max_norm: of the gradient; 0: no clipping.
    """

    def __init__(self, max_norm: float, processes: Processes):
        super().__init__(stage=2, precision="bf16", max_norm=max_norm, cast_inputs=False)
        self.processes = processes

    def configure(self, model, optimizer=None, criterion=None, dataloader=None, lr_scheduler=None):
        model = LowLevelZeroModel(model, self.precision, cast_inputs=False)
        optimizer = ShardedOptimizer(
            optimizer, self.processes, **self.zero_optim_kwargs, backward_context=model._hook_context
        )
        model.update_master_params = optimizer.update_master_params
        return super().configure(model, optimizer, criterion, dataloader, lr_scheduler)
