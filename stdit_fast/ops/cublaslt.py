"""GEMMs of a linear layer with bias, GELU and their gradients in the epilogues, by cuBLASLt through the CUDA library.

Below the ops: no gradient, no dispatch. Tensors are contiguous bfloat16 on one GPU. Each GEMM runs the algorithm that
cuBLASLt proposes first for its sizes, so that it gives the same bits every time and may be captured in a CUDA graph.
"""

import functools

import torch
from torch import Tensor

from stdit_fast import _cuda

MAX_PLANS = 1024  # of sizes: captions are as long as they come


@functools.cache
def available(device: int | None = None) -> tuple[bool, str]:
    """Whether cuBLASLt can be used on a GPU, and the version or the reason.

    Args:
        device: index of the GPU; None for the one that was current at the first call.
    """
    usable, reason = _cuda.available(device)
    if not usable:
        return False, reason
    if not hasattr(_cuda.library(), "cublaslt_version"):
        return False, f"{reason}, before it knew cuBLASLt"
    try:
        version = _cuda.library().cublaslt_version()
    except RuntimeError as error:
        return False, str(error)
    return True, f"cuBLASLt {version // 10000}.{version // 100 % 100}.{version % 100}, {reason}"


def usable(x: Tensor) -> bool:
    """Whether these GEMMs serve tensors of x's device and dtype; nothing else of it is looked at."""
    return x.is_cuda and x.dtype == torch.bfloat16 and available(x.device.index)[0]


def serves(*tensors: Tensor) -> bool:
    """Whether these GEMMs take these tensors, whose sizes are multiples of 8."""
    return all(usable(t) and t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)


def linear(x: Tensor, weight: Tensor, *, rank: int = 0) -> Tensor:
    """x W^T for x [N, C_in] and weight [C_out, C_in]."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    _run("LINEAR_FORWARD", x.shape[0], weight.shape, x, weight, y, None, None, rank)
    return y


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, rank: int = 0) -> tuple[Tensor, Tensor]:
    """(gelu_tanh(h), h) with h = x W^T + bias; x [N, C_in], weight [C_out, C_in], bias [C_out]."""
    y, hidden = (x.new_empty(x.shape[0], weight.shape[0]) for _ in range(2))
    _run("LINEAR_FORWARD", x.shape[0], weight.shape, x, weight, y, bias, hidden, rank)
    return y, hidden


def gelu_input_gradient(dy: Tensor, weight: Tensor, hidden: Tensor, *, rank: int = 0) -> Tensor:
    """(dy W) * gelu_tanh'(h), the gradient of linear(gelu(h)) in h.

    dy [N, C_out], weight [C_out, C_in], hidden: h [N, C_in].
    """
    dh = torch.empty_like(hidden)
    _run("LINEAR_INPUT_GRADIENT", dy.shape[0], weight.shape, dy, weight, dh, None, hidden, rank)
    return dh


@functools.lru_cache(MAX_PLANS)
def _plan(product: str, gelu: bool, bias: bool, rows: int, weight_shape: tuple[int, int], device: int, rank: int):
    library = _cuda.library()
    return library.Linear(
        product=getattr(library, product),
        gelu=gelu,
        bias=bias,
        rows=rows,
        in_features=weight_shape[1],
        out_features=weight_shape[0],
        device=device,
        rank=rank,
    )


def _run(
    product: str,
    rows: int,
    weight_shape: torch.Size,
    first: Tensor,
    second: Tensor,
    result: Tensor,
    bias: Tensor | None,
    hidden: Tensor | None,
    rank: int,
) -> None:
    device = result.device
    plan = _plan(product, hidden is not None, bias is not None, rows, weight_shape, device.index, rank)
    # Given back at once, to this stream's next use: the allocator keeps workspaces of streams and graphs apart.
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device) if plan.workspace_bytes else None
    plan.run(
        first.data_ptr(),
        second.data_ptr(),
        result.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if hidden is None else hidden.data_ptr(),
        0 if workspace is None else workspace.data_ptr(),
        torch._C._cuda_getCurrentRawStream(device.index),
    )
