"""What training asks of an optimizer beside ColossalAI's interface, however its weights are split."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor

from stdit_fast.parallel.processes import Processes


class MasterWeights(ABC):
    """The extra interface of both optimizers.

    Masters are the fp32 weights that the optimizer updates, on each process its own part of them. Lists that go
    with them (moments, averages) are split alike.
    """

    processes: Processes

    @property
    def masters(self) -> list[Tensor]:
        """This process's fp32 weights, in the order of the model's parameters."""
        return [p for group in self.param_groups for p in group["params"]]

    @abstractmethod
    def guarded_step(self) -> float:
        """Clips and steps, or leaves everything as it was where the gradient norm is not finite.

        Returns:
            The gradient norm over all processes, before clipping.
        """

    @abstractmethod
    def gather(self, parts: list[Tensor]) -> Iterator[Tensor]:
        """Whole tensors from tensors split like the masters, one after the other, on every process."""

    @abstractmethod
    def split(self, whole: Tensor, index: int) -> Tensor:
        """This process's part of a tensor that goes with master `index`."""

    @abstractmethod
    def load_masters(self, weights: list[Tensor]) -> None:
        """Sets the weights, masters and working copies, from whole tensors."""
