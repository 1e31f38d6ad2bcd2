"""ColossalAI's plugins with what training needs of their optimizers: a guarded step, and whole fp32 weights.

Import only after `processes.import_colossalai`, which keeps ColossalAI's import quiet.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from colossalai.booster.plugin import LowLevelZeroPlugin, TorchDDPPlugin
from colossalai.booster.plugin.low_level_zero_plugin import LowLevelZeroModel
from colossalai.interface import OptimizerWrapper
from colossalai.zero import LowLevelZeroOptimizer
from torch import Tensor

from stdit_fast.parallel.masters import MasterWeights, norm_limit
from stdit_fast.parallel.processes import Processes


class ReplicatedOptimizer(OptimizerWrapper, MasterWeights):
    """Every process holds all weights in fp32 (TorchDDPPlugin)."""

    def __init__(self, optim: torch.optim.AdamW, max_norm: float, processes: Processes):
        super().__init__(optim)
        self.max_norm, self.processes = norm_limit(max_norm), processes

    def gradients(self) -> list[Tensor | None]:
        return [master.grad for master in self.masters]

    def reduce(self, numbers: Tensor) -> None:
        if self.processes.world_size > 1:
            dist.all_reduce(numbers[:-1])  # every process has the whole gradient

    def working_copies(self) -> None:
        return None

    def share_weights(self) -> None:
        pass  # all have made the same

    def gather(self, parts: list[Tensor]) -> Iterator[Tensor]:
        yield from parts

    def split(self, whole: Tensor, index: int) -> Tensor:
        return whole

    @torch.no_grad()
    def load_masters(self, weights: list[Tensor]) -> None:
        for master, whole in zip(self.masters, weights, strict=True):
            master.copy_(whole)


class ShardedOptimizer(LowLevelZeroOptimizer, MasterWeights):
    """Each process holds its part of the fp32 weights and moments (ZeRO-2), the model is bf16.

    Gradients are reduced and scattered by ColossalAI while the backward pass runs; what it does with them afterwards is
    not used: a conversion, a clipping and a norm that is read back for each parameter. One process alone has nothing to
    scatter, and its gradients are taken where the backward pass leaves them.
    """

    def __init__(self, optim: torch.optim.AdamW, max_norm: float, processes: Processes, **kwargs):
        self.max_norm, self.processes = norm_limit(max_norm), processes
        self._backward_passes = 0  # since the last step
        super().__init__(optim, **kwargs)

    def _attach_reduction_hook(self) -> None:
        if self.processes.world_size > 1:
            super()._attach_reduction_hook()

    def backward(self, loss: Tensor, inputs=None, retain_graph: bool = False) -> None:
        alone = self.processes.world_size == 1
        if alone and self._backward_passes == 1:
            # A CUDA graph's gradients lie where its next run will write: what is to be added to needs its own memory.
            for working in self._working():
                if working.grad is not None:
                    working.grad = working.grad.clone()
        self._backward_passes += 1
        with self._backward_context():
            loss.backward(inputs=inputs, retain_graph=retain_graph)
        if alone:
            return
        self._reduce_grad(self._partition_grads)
        if self._overlap_communication:
            for store in self.pg_to_bucket_store.values():  # the device waits, where ColossalAI's host would
                torch.cuda.current_stream().wait_stream(store.comm_stream)

    def step(self, closure=None) -> None:
        raise RuntimeError("this optimizer steps by guarded_step")

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._backward_passes = 0
        super().zero_grad(set_to_none)

    def gradients(self) -> list[Tensor | None]:
        if self.processes.world_size == 1:
            return [working.grad for working in self._working()]
        return [self.get_working_grad_by_param_id(id(working)) for working in self._working()]

    def reduce(self, numbers: Tensor) -> None:
        if self.processes.world_size > 1:
            dist.all_reduce(numbers)

    def working_copies(self) -> list[Tensor]:
        padded = [self._working_param_to_padded_working_param[working] for working in self._working()]
        return [whole.chunk(self.processes.world_size)[self.processes.rank] for whole in padded]

    def share_weights(self) -> None:
        if self.processes.world_size == 1:
            return
        whole = [self._working_param_to_padded_working_param[working] for working in self._working()]
        # Each is gathered in place, and all of them as one call.
        dist.group.WORLD.allgather_into_tensor_coalesced(whole, self.working_copies()).wait()

    def _working(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self._working_param_groups.values() for parameter in group]

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
        super().__init__(stage=2, precision="bf16", cast_inputs=False)
        self.max_norm, self.processes = max_norm, processes

    def configure(self, model, optimizer=None, criterion=None, dataloader=None, lr_scheduler=None):
        model = LowLevelZeroModel(model, self.precision, cast_inputs=False)
        optimizer = ShardedOptimizer(
            optimizer,
            self.max_norm,
            self.processes,
            **self.zero_optim_kwargs,
            backward_context=model._hook_context,
        )
        model.update_master_params = optimizer.update_master_params
        return super().configure(model, optimizer, criterion, dataloader, lr_scheduler)
