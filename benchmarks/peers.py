"""What others offer for the same work, where it is installed: attention, LayerNorm, AdamW.

Each peer is a function that answers its implementation, or raises `Absent` with the reason. So every benchmark can name
what it could not be held against.
"""

import functools
import importlib
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Takes q, k, v [N, S, H, D] and answers o [N, S, H, D].
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
# Takes q [N, S, H, D], k and v [M, H, D] of all samples' keys in a row, and how many each has; answers o like q.
PackedAttention = Callable[[Tensor, Tensor, Tensor, list[int]], Tensor]


class Absent(Exception):
    """An implementation that cannot be had here; the text says why."""


def installed(module: str, distribution: str):
    """A module, imported. Raises Absent where it is not there, or does not load."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        own = missing == module.partition(".")[0]
        raise Absent(f"{distribution} is not installed" if own else f"{distribution} lacks {error.name}") from None
    except Exception as error:  # a build for another PyTorch or CUDA raises what it likes
        raise Absent(f"{distribution} does not load here: {' '.join(str(error).split())[:200]}") from None


def _offered(module, name: str, distribution: str):
    try:
        return getattr(module, name)
    except AttributeError:
        raise Absent(f"{distribution} is there, without {module.__name__}.{name}") from None


# ------------------------------------------------------------------ attention


def _sdpa(backend: SDPBackend) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        try:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        except RuntimeError as error:
            if "No available kernel" in str(error):
                raise Absent(f"PyTorch's {backend.name} does not take these tensors") from None
            raise

    return attention


def _first(function: Callable) -> Attention:
    """A function that answers the output alone, or with the log-sum-exp."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return attention


def _flash_attention_2() -> Attention:
    return _first(_offered(installed("flash_attn", "flash-attn"), "flash_attn_func", "flash-attn"))


def _flash_attention_3() -> Attention:
    return _first(_offered(installed("flash_attn_interface", "flash-attn-3"), "flash_attn_func", "flash-attn-3"))


def _flash_attention_4() -> Attention:
    return _first(_offered(installed("flash_attn.cute", "flash-attn-4"), "flash_attn_func", "flash-attn-4"))


def _xformers() -> Attention:
    return _offered(installed("xformers.ops", "xformers"), "memory_efficient_attention", "xformers")


ATTENTION: dict[str, Callable[[], Attention]] = {
    "sdpa-math": lambda: _sdpa(SDPBackend.MATH),
    "sdpa-flash": lambda: _sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa-efficient": lambda: _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-cudnn": lambda: _sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash-attn-2": _flash_attention_2,
    "flash-attn-3": _flash_attention_3,
    "flash-attn-4": _flash_attention_4,
    "xformers": _xformers,
}


def _packed_flash_attention_2() -> PackedAttention:
    function = _offered(installed("flash_attn", "flash-attn"), "flash_attn_varlen_func", "flash-attn")

    @functools.cache
    def bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

    def attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        samples, rows = q.shape[:2]
        q_bounds, k_bounds = bounds((rows,) * samples, q.device), bounds(tuple(lengths), q.device)
        return function(q.flatten(0, 1), k, v, q_bounds, k_bounds, rows, max(lengths)).view_as(q)

    return attention


def _packed_xformers() -> PackedAttention:
    function = _xformers()
    mask = _offered(installed("xformers.ops.fmha.attn_bias", "xformers"), "BlockDiagonalMask", "xformers")

    def attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        bias = mask.from_seqlens([q.shape[1]] * q.shape[0], lengths)
        return function(q.flatten(0, 1)[None], k[None], v[None], attn_bias=bias).view_as(q)

    return attention


def _padded_sdpa(backend: SDPBackend) -> PackedAttention:
    """PyTorch's own, which takes text padded to the longest, and a mask."""
    attention = _sdpa(backend)

    @functools.cache
    def padding(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        count, place = torch.tensor(lengths)[:, None], torch.arange(max(lengths))
        mask = place < count
        index = (count.cumsum(0) - count + place) * mask
        return index.to(device), mask[:, None, None, :].to(device)

    def packed(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        index, mask = padding(tuple(lengths), q.device)
        k, v = (x.index_select(0, index.flatten()).unflatten(0, index.shape) for x in (k, v))
        return attention(q, k, v, mask)

    return packed


PACKED_ATTENTION: dict[str, Callable[[], PackedAttention]] = {
    "sdpa-math": lambda: _padded_sdpa(SDPBackend.MATH),
    "sdpa-efficient": lambda: _padded_sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-cudnn": lambda: _padded_sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash-attn-2": _packed_flash_attention_2,
    "xformers": _packed_xformers,
}


# ------------------------------------------------------------------ LayerNorm

# Takes x [..., C] and eps, answers LayerNorm without affine.
LayerNorm = Callable[[Tensor, float], Tensor]


def _apex_layer_norm() -> LayerNorm:
    """NVIDIA's apex: on PyPI another project has that name, and a build without extensions has no kernels."""
    module = installed("apex.normalization.fused_layer_norm", "NVIDIA apex")
    installed("fused_layer_norm_cuda", "NVIDIA apex, built with its CUDA extensions,")
    fused = _offered(module, "fused_layer_norm", "NVIDIA apex")
    return lambda x, eps: fused(x, x.shape[-1:], eps)


def _liger_layer_norm() -> LayerNorm:
    module = installed("liger_kernel.ops.layer_norm", "liger-kernel")
    function = _offered(module, "LigerLayerNormFunction", "liger-kernel")

    @functools.cache
    def affine(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        ones = torch.ones(size, dtype=dtype, device=device)
        return ones, torch.zeros_like(ones)

    return lambda x, eps: function.apply(x, *affine(x.shape[-1], x.dtype, x.device), eps)


LAYER_NORM: dict[str, Callable[[], LayerNorm]] = {"apex": _apex_layer_norm, "liger": _liger_layer_norm}


# ------------------------------------------------------------------ AdamW


def _apex_adam():
    """apex's FusedAdam class; its default is AdamW's decoupled weight decay."""
    module = installed("apex.optimizers", "NVIDIA apex")
    installed("amp_C", "NVIDIA apex, built with its CUDA extensions,")
    return _offered(module, "FusedAdam", "NVIDIA apex")


ADAMW: dict[str, Callable] = {"apex": _apex_adam}
FAMILIES: dict[str, dict[str, Callable]] = {"attention": ATTENTION, "LayerNorm": LAYER_NORM, "AdamW": ADAMW}


def absent() -> dict[str, str]:
    """Every peer that cannot be had here: "family: name" -> reason."""
    found = {}
    for family, members in FAMILIES.items():
        for name, find in members.items():
            try:
                find()
            except Absent as reason:
                found[f"{family}: {name}"] = str(reason)
    return found
