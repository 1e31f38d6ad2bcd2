"""ColossalAI's plugins with what training needs of their optimizers: a guarded step, and whole fp32 weights.

Import only after `processes.import_colossalai`, which keeps ColossalAI's import quiet.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from colossalai.booster.plugin import LowLevelZeroPlugin, TorchDDPPlugin
from colossalai.booster.plugin.low_level_zero_plugin import LowLevelZeroModel
from colossalai.interface import OptimizerWrapper
from colossalai.zero import LowLevelZeroOptimizer
from torch import Tensor

from stdit_fast.parallel.masters import MasterWeights, norm_limit
from stdit_fast.parallel.overlap import Arrivals, GradientReduction, places_of
from stdit_fast.parallel.processes import Processes


class ReplicatedOptimizer(OptimizerWrapper, MasterWeights):
    """Every process holds all weights in fp32 (TorchDDPPlugin)."""

    def __init__(self, optim: torch.optim.AdamW, max_norm: float, processes: Processes):
        super().__init__(optim)
        self.max_norm, self.processes = norm_limit(max_norm), processes

    def reduce_gradients(self) -> None:
        if self.processes.world_size == 1:
            return
        for master in self.masters:
            if master.grad is None:  # where another process may have one
                master.grad = torch.zeros_like(master)
        grads = [master.grad for master in self.masters]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= self.processes.world_size
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])

    def gradients(self) -> list[Tensor | None]:
        return [master.grad for master in self.masters]

    def reduce(self, numbers: Tensor) -> None:
        if self.processes.world_size > 1:
            dist.all_reduce(numbers[:-1])  # every process has the whole gradient

    def working_copies(self) -> None:
        return None

    def share_weights(self) -> None:
        pass  # all have made the same

    def wait_for_weights(self) -> None:
        pass

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

    What ColossalAI does with gradients is not used: it reduces them as the backward pass brings them, in an order that
    differs between ranks that run other graphs, in pieces of 2 MB, and its conversion, clipping and norm read back a
    number for each parameter. One process alone has nothing to scatter, and its gradients are taken where the backward
    pass leaves them.

    Args:
        order: of the parameters, in groups, as backward passes complete their gradients (see `GradientReduction`).

    Attributes:
        arrivals: of updated weights; where `overlaps` is set, forward passes have to wait for them.
    """

    def __init__(
        self,
        optim: torch.optim.AdamW,
        max_norm: float,
        processes: Processes,
        order: Iterable[Iterable[torch.nn.Parameter]] = (),
        **kwargs,
    ):
        self.max_norm, self.processes = norm_limit(max_norm), processes
        self._backward_passes = 0  # since the last step
        self._parts: list[Tensor] | None = None  # of reduced gradients
        super().__init__(optim, **kwargs)
        self.arrivals = Arrivals()
        self._reduction = None
        if processes.world_size > 1:
            order = [list(group) for group in order]
            self._groups = places_of(self._working(), order)
            self._reduction = GradientReduction(self._working(), order, processes)
            self.grad_handles += self._reduction.handles  # which ColossalAI removes

    def _attach_reduction_hook(self) -> None:
        pass  # see `reduce_gradients`

    def backward(self, loss: Tensor, inputs=None, retain_graph: bool = False) -> None:
        if self._backward_passes == 1:
            # A CUDA graph's gradients lie where its next run will write: what is to be added to needs its own memory.
            for working in self._working():
                if working.grad is not None:
                    working.grad = working.grad.clone()
        self._backward_passes += 1
        with self._backward_context():
            loss.backward(inputs=inputs, retain_graph=retain_graph)

    def reducing(self) -> AbstractContextManager:
        return self._reduction.during() if self.overlaps and self._reduction is not None else nullcontext()

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        if self._reduction is not None:
            self._parts = self._reduction.finish()

    def step(self, closure=None) -> None:
        raise RuntimeError("this optimizer steps by guarded_step")

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._backward_passes, self._parts = 0, None
        super().zero_grad(set_to_none)

    def gradients(self) -> list[Tensor | None]:
        if self.processes.world_size == 1:
            return [working.grad for working in self._working()]
        return self._parts

    def reduce(self, numbers: Tensor) -> None:
        if self.processes.world_size > 1:
            dist.all_reduce(numbers)

    def working_copies(self) -> list[Tensor]:
        padded = [self._working_param_to_padded_working_param[working] for working in self._working()]
        return [whole.chunk(self.processes.world_size)[self.processes.rank] for whole in padded]

    def share_weights(self) -> None:
        if self.processes.world_size == 1:
            return
        self.wait_for_weights()
        whole = [self._working_param_to_padded_working_param[working] for working in self._working()]
        own = self.working_copies()
        for number, places in reversed(list(enumerate(self._groups))):  # as forward passes need them
            if places:  # each is gathered in place, and all of them as one call
                tensors = [whole[i] for i in places], [own[i] for i in places]
                self.arrivals.expect(number, dist.group.WORLD.allgather_into_tensor_coalesced(*tensors))
        if not self.overlaps:
            self.wait_for_weights()

    def wait_for_weights(self) -> None:
        self.arrivals.wait()

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

    def local_gradients(self, model):
        """Forward and backward passes in here leave gradients to this process: `reduce_gradients` comes afterwards."""
        return model.module.no_sync()

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

    def local_gradients(self, model):
        """As `ReplicatedPlugin.local_gradients`; here they always stay."""
        return nullcontext()

    def configure(self, model, optimizer=None, criterion=None, dataloader=None, lr_scheduler=None):
        order = model.gradient_order() if hasattr(model, "gradient_order") else ()
        model = LowLevelZeroModel(model, self.precision, cast_inputs=False)
        optimizer = ShardedOptimizer(
            optimizer,
            self.max_norm,
            self.processes,
            order,
            **self.zero_optim_kwargs,
            backward_context=model._hook_context,
        )
        model.update_master_params = optimizer.update_master_params
        if order:
            model.module.arrivals = optimizer.arrivals
        return super().configure(model, optimizer, criterion, dataloader, lr_scheduler)
