"""What travels between processes that each keep a part of the weights, while they compute: gradients to where each part
belongs while the backward pass goes on, and new weights to all while the next forward pass does.

Parameters are put into buckets, in the order in which a backward pass is done with them. A bucket leaves as one
reduce-scatter when all of its gradients are there and all buckets before it have left; the others follow at the pass's
end. So all processes send the same buckets in the same order, whatever their graphs are and wherever a gradient is
missing, and none waits for one that another would send later. Weights come back in the buckets' reverse order.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from weakref import proxy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from stdit_fast.parallel.processes import Processes

# Parts of so many values each begin where a kernel can read 16 bytes at once.
_ALIGNMENT = 8


def places_of(parameters: Sequence[nn.Parameter], order: Iterable[Iterable[nn.Parameter]]) -> list[list[int]]:
    """Places in `parameters` of each group of `order`, and in one more group of all that is in none."""
    places = {id(p): i for i, p in enumerate(parameters)}
    groups = [[places.pop(id(p)) for p in group if id(p) in places] for group in order]
    return [*groups, list(places.values())]


class GradientReduction:
    """The reduction of one model's gradients.

    A process that runs out of memory in a backward pass of `during` may begin anew: buckets that have left hold all
    that the step's passes give them, so they stay as they are, and their gradients are not looked at again.

    Args:
        parameters: those that are trained.
        order: groups of parameters, in the order in which backward passes complete their gradients; each becomes a
            bucket, and what is in none of them the last one. Parameters that are not trained are passed over.
        processes: among which gradients are averaged.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], order: Iterable[Iterable[nn.Parameter]], processes: Processes
    ):
        self._parameters, self._processes = list(parameters), processes
        # Parts of odd sizes last, so that the others stay aligned.
        self._buckets = [sorted(bucket, key=self._is_odd) for bucket in places_of(self._parameters, order) if bucket]
        self._bucket_of = {i: number for number, bucket in enumerate(self._buckets) for i in bucket}
        # Of this step; what travels lives until it is there.
        self._sent: list[tuple[dist.Work, list[Tensor], Tensor]] = []
        self._missing: list[int] = []  # gradients of each bucket; empty: they are not waited for
        self._begun_at = 0
        weak = proxy(self)  # parameters outlive this
        self.handles = [
            p.register_post_accumulate_grad_hook(partial(_arrived, weak, i)) for i, p in enumerate(self._parameters)
        ]

    @contextmanager
    def during(self) -> Iterator[None]:
        """The backward pass in here is the step's last on this process: buckets leave as they are complete."""
        self._missing, self._begun_at = [len(bucket) for bucket in self._buckets], len(self._sent)
        try:
            yield
            # Before anything else that processes have to do in one order.
            self._send_until(len(self._buckets))
        finally:
            self._missing = []

    def finish(self) -> list[Tensor]:
        """This process's part of each gradient's mean, of ceil(numel / world_size) values, padded with zeros; the
        gradients are gone. Sends what has not left yet."""
        self._send_until(len(self._buckets))
        parts: list[Tensor | None] = [None] * len(self._parameters)
        for bucket, (work, _, own) in zip(self._buckets, self._sent, strict=True):
            work.wait()  # which makes the device wait, not the CPU
            own.div_(self._processes.world_size)
            for i, part in zip(bucket, own.split([self._size(i) for i in bucket]), strict=True):
                parts[i] = part
        self._sent = []
        return parts  # all of them: each parameter is in a bucket

    def _size(self, index: int) -> int:
        """Values of each process's part of a gradient."""
        return -(-self._parameters[index].numel() // self._processes.world_size)

    def _is_odd(self, index: int) -> bool:
        return self._size(index) % _ALIGNMENT != 0

    def arrived(self, index: int) -> None:
        """A gradient is complete."""
        if not self._missing:
            return
        bucket = self._bucket_of[index]
        if bucket < self._begun_at:  # which left before the pass began anew
            self._parameters[index].grad = None
            return
        self._missing[bucket] -= 1
        if self._missing[bucket] < 0:
            shape = list(self._parameters[index].shape)
            raise RuntimeError(f"the gradient of a parameter of shape {shape} came twice in a backward pass")
        ready = len(self._sent)
        while ready < len(self._buckets) and self._missing[ready] == 0:
            ready += 1
        self._send_until(ready)

    @torch.no_grad()
    def _send_until(self, end: int) -> None:
        """Sends all buckets before that one."""
        world_size = self._processes.world_size
        for bucket in self._buckets[len(self._sent) : end]:
            whole = []
            for i in bucket:  # each from where it is, and all of them as one call
                parameter, padding = self._parameters[i], self._size(i) * world_size - self._parameters[i].numel()
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                whole.append(F.pad(grad.flatten(), (0, padding)) if padding else grad.flatten())
            sizes = [self._size(i) for i in bucket]
            own = whole[0].new_empty(sum(sizes))
            work = dist.group.WORLD.reduce_scatter_tensor_coalesced(list(own.split(sizes)), whole)
            self._sent.append((work, whole, own))
            for i in bucket:
                self._parameters[i].grad = None


def _arrived(reduction: GradientReduction, index: int, parameter: Tensor) -> None:
    reduction.arrived(index)


class Arrivals:
    """Weights that other processes have updated, and that are on their way; the model waits for them as it needs them.

    Groups are those of `STDiT2.gradient_order`, by their numbers.
    """

    def __init__(self) -> None:
        self._coming: dict[int, dist.Work] = {}

    def expect(self, group: int, work: dist.Work) -> None:
        """The group's weights are there when `work` is done."""
        self._coming[group] = work

    def wait(self, group: int | None = None) -> None:
        """What the device does from now on sees the group's weights, or all of them; the host does not wait."""
        for number in list(self._coming) if group is None else [group]:
            work = self._coming.pop(number, None)
            if work is not None:
                work.wait()
