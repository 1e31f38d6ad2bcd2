"""The ops' place in PyTorch's dispatcher: one `torch.library` for all, so that compilers and fake tensors see them.

An op comes in three parts. Its kernel takes and returns real tensors and knows no gradient; its fake
implementation returns tensors of the right shapes; and, for a differentiable op, a `torch.autograd.Function` whose
forward calls the op again below autograd. (`torch.library.register_autograd` does the same in a general way that
costs 30 us a call here, some 8 ms in a training step of this model.)
"""

import functools
from collections.abc import Callable

import torch

NAMESPACE = "stdit_fast"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(schema: str, kernel: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Registers an op without gradient and returns it.

    Args:
        schema: as PyTorch writes them, "name(Tensor x, float eps) -> Tensor"; no output may alias an input.
        kernel: the implementation for a GPU, and for the CPU under Triton's interpreter.
        fake: the same signature; returns empty tensors of the outputs' shapes, strides and dtypes.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CPU")
    _LIBRARY.impl(name, _on_its_device(kernel), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _on_its_device(kernel: Callable) -> Callable:
    """The kernel, launched on the device of its tensors, which need not be the current one."""

    @functools.wraps(kernel)
    def launch(*args):
        device = next(a.device.index for a in args if isinstance(a, torch.Tensor))
        if device == torch.cuda.current_device():
            return kernel(*args)
        with torch.cuda.device(device):
            return kernel(*args)

    return launch


def differentiable(op: torch._ops.OpOverload, function: type[torch.autograd.Function]) -> None:
    """Gives an op its gradient: `function`, whose forward returns `below_autograd(op, ...)`."""
    _LIBRARY.impl(op._schema.name.partition("::")[2], function.apply, "Autograd")


def below_autograd(op: torch._ops.OpOverload, *args):
    """The op's kernel itself, from within the forward of its autograd function."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
