"""What training asks of an optimizer beside ColossalAI's interface, however its weights are split."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from stdit_fast.ops.adamw import AdamWStep, Hyperparameters
from stdit_fast.parallel.processes import Processes


class MasterWeights(ABC):
    """The extra interface of both optimizers, and their step.

    Masters are the fp32 weights that the optimizer updates, on each process its own part of them. Lists that go
    with them (moments, averages) are split alike.

    Attributes:
        optim: holds settings and state, under the names of torch.optim.AdamW; its own step is never called.
        max_norm: of the gradient; infinity: no clipping.
        processes: among which the work is split.
        overlaps: gradients may travel while the backward pass goes on (`reducing`), and updated weights while what
            comes after the step does (`wait_for_weights`).
    """

    optim: torch.optim.AdamW
    max_norm: float
    processes: Processes
    overlaps = False
    _averages: list[Tensor] | None = None
    _average_decay = 1.0
    _step: AdamWStep | None = None

    @property
    def masters(self) -> list[Tensor]:
        """This process's fp32 weights, in the order of the model's parameters."""
        return [p for group in self.param_groups for p in group["params"]]

    @property
    def steps(self) -> int:
        """Updates so far; skipped ones do not count. Waits for the device."""
        states = self.optim.state
        return int(next(iter(states.values()))["step"]) if states else 0

    def follow(self, averages: list[Tensor], decay: float) -> None:
        """From now on every update also moves `averages`, which are like the masters, 1 - decay of the way to them."""
        self._averages, self._average_decay, self._step = averages, decay, None

    @torch.no_grad()
    def make_state(self) -> None:
        """Makes the moments, unless they are there.

        Else the first step would, from what its activations have left: each in a gap that no later bucket fills.
        """
        self._adamw()

    @torch.no_grad()
    def guarded_step(self, numbers: Tensor) -> None:
        """Clips and updates, or leaves everything as it was where loss or gradient are not finite; clears gradients.

        All of it is decided on the device, and nothing is read back.

        Args:
            numbers: [2 or more] float64 on the device: first this process's loss, then what else is to be summed over
                the processes. Afterwards these sums, and as the last the square of the gradient's norm before clipping.
        """
        self.wait_for_weights()  # what is still to come would replace what is updated now
        step, grads = self._adamw(), self.gradients()
        numbers[-1] = step.square_sum(grads)
        self.reduce(numbers)
        (group,) = self.optim.param_groups
        settings = Hyperparameters(
            lr=float(group["lr"]),
            betas=tuple(group["betas"]),
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            max_norm=self.max_norm,
            average_decay=self._average_decay,
        )
        step.update(grads, numbers[-1], numbers[0], settings)
        self.share_weights()
        self.zero_grad()

    def reducing(self) -> AbstractContextManager:
        """The backward pass in here is this process's last before `reduce_gradients`: that begins meanwhile, if it may.

        Only devices wait for other processes in it, and all processes have begun whatever there is before they leave:
        one that runs out of memory in it can begin the step's passes anew.
        """
        return nullcontext()

    @abstractmethod
    def reduce_gradients(self) -> None:
        """Turns each process's own gradients into the mean over processes, once a step, after its backward passes.

        Those are local, but for `reducing`.
        """

    @abstractmethod
    def gradients(self) -> list[Tensor | None]:
        """This process's part of each master's gradient, the mean over processes; None where there is none."""

    @abstractmethod
    def reduce(self, numbers: Tensor) -> None:
        """Sums numbers over the processes, in place: the last too where gradients are split."""

    @abstractmethod
    def working_copies(self) -> list[Tensor] | None:
        """The part of the model's own weights that goes with each master, or None where masters are the model's."""

    @abstractmethod
    def share_weights(self) -> None:
        """Brings updated weights to the other processes."""

    @abstractmethod
    def wait_for_weights(self) -> None:
        """The device waits until all weights are there; forward passes of the model do so by themselves."""

    @abstractmethod
    def gather(self, parts: list[Tensor]) -> Iterator[Tensor]:
        """Whole tensors from tensors split like the masters, one after the other, on every process."""

    @abstractmethod
    def split(self, whole: Tensor, index: int) -> Tensor:
        """This process's part of a tensor that goes with master `index`."""

    @abstractmethod
    def load_masters(self, weights: list[Tensor]) -> None:
        """Sets the weights, masters and working copies, from whole tensors."""

    def _adamw(self) -> AdamWStep:
        """The step over the present state, which is made where it is missing and may have been loaded since."""
        masters, states = self.masters, self.optim.state
        known = self._step
        if known is not None and states[masters[0]].get("exp_avg") is known.exp_avgs[0]:
            return known
        device = masters[0].device
        counts = [float(states[master].get("step", 0)) for master in masters]
        steps = torch.tensor(counts, dtype=torch.float32, device=device)
        for i, master in enumerate(masters):
            state = states[master]
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment not in state:
                    state[moment] = torch.zeros_like(master)
            state["step"] = steps[i]
        self._step = AdamWStep(
            [master.detach() for master in masters],
            [states[master]["exp_avg"] for master in masters],
            [states[master]["exp_avg_sq"] for master in masters],
            steps,
            self._averages,
            self.working_copies(),
        )
        return self._step


def norm_limit(max_norm: float) -> float:
    """A configured maximum, of which 0 stands for none."""
    return max_norm if max_norm > 0 else math.inf
