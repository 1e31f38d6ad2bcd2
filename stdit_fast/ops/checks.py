"""Argument checks shared by the ops: one wording for a wrong shape."""

from torch import Tensor


def expect_shape(op: str, name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """Raises ValueError unless `tensor` has that shape; a string in `shape` names a free dimension."""
    ok = tensor.dim() == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not ok:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, expected [{', '.join(map(str, shape))}]")


def expect_not_empty(op: str, name: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor without elements."""
    if tensor.numel() == 0:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}, which holds no element")


def expect_modulation(op: str, name: str, modulation: Tensor, x: Tensor) -> None:
    """Raises ValueError unless `modulation` is [B, 1, C] or [B, T, C] for x [B, T, S, C]."""
    batch, frames, _, channels = x.shape
    if modulation.dim() != 3 or modulation.shape[1] not in (1, frames):
        found, want = list(modulation.shape), f"[{batch}, 1 or {frames}, {channels}]"
        raise ValueError(f"{op}: {name} has shape {found}, expected {want}")
    expect_shape(op, name, modulation, (batch, modulation.shape[1], channels))


def expect_qkv(
    op: str, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, bias: Tensor | None = None
) -> None:
    """Raises ValueError unless qkv is [B, T, S, 3, H, D] with elements; the weights, where given, [D]; bias [3*H*D]."""
    expect_shape(op, "qkv", qkv, ("B", "T", "S", 3, "H", "D"))
    expect_not_empty(op, "qkv", qkv)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            expect_shape(op, name, weight, (qkv.shape[-1],))
    if bias is not None:
        expect_shape(op, "bias", bias, (qkv.shape[3:].numel(),))


def expect_dtype(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Raises ValueError unless `tensor` has x's dtype, as the kernels need it."""
    if tensor.dtype != x.dtype:
        raise ValueError(f"{op}: {name} is {tensor.dtype} and x {x.dtype}; cast one, or use backend='reference'")
