"""The fused block for people who have a live Open-Sora 1.1 model: `patch_opensora(model)`.

Their class stays, with its own embeddings, forward and checkpoints; each block is replaced by one that holds the very
same submodules and parameters under the same names, and calls our ops.
"""

import functools
import logging

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from stdit_fast import ops
from stdit_fast.errors import ConfigError
from stdit_fast.model.stdit2 import Conditioning, STDiT2Block

logger = logging.getLogger(__name__)

_LINEARS = ("attn.qkv", "attn.proj", "attn_temp.qkv", "attn_temp.proj", "cross_attn.q_linear", "cross_attn.kv_linear")
_LINEARS += ("cross_attn.proj", "mlp.fc1", "mlp.fc2")
_MODULES = ("attn", "attn_temp", "cross_attn", "mlp")
_FLAGS = ("grad_checkpointing", "grad_checkpointing_step")  # how their trainer marks a block
_TABLES = {"scale_shift_table": 6, "scale_shift_table_temporal": 3}


def patch_opensora(model: nn.Module, *, backend: str = "auto", rotate_first: bool = True) -> nn.Module:
    """Swaps the blocks of an Open-Sora 1.1 STDiT2 for fused ones, in place.

    Parameters stay the same objects under the same names, so optimizers, state dicts and checkpoints keep working,
    and results are the same up to rounding.

    Args:
        model: their `STDiT2`, with `blocks` and `rope`, on any device, in any of the kernels' dtypes.
        backend: "auto", "fused" or "reference", as in `STDiT2Config`.
        rotate_first: rotate q and k before normalising them, as 1.1 does.

    Returns:
        The same model.

    Raises:
        ConfigError: a part that is not as in Open-Sora 1.1 (a block without an attribute, dropout, sequence
            parallelism), before anything is changed.
    """
    ops.check_backend(backend, ops.MODEL_OPS)
    blocks, rope = getattr(model, "blocks", None), getattr(model, "rope", None)
    freqs = getattr(rope, "freqs", None)
    if not isinstance(blocks, nn.ModuleList) or not isinstance(freqs, Tensor):
        remedy = "pass Open-Sora 1.1's STDiT2: a module with a ModuleList `blocks` and `rope.freqs`"
        raise ConfigError("model", type(model).__name__, remedy)
    for i, block in enumerate(blocks):
        _check_block(i, block)
    shared = _Shared(rope)
    for i, block in enumerate(blocks):
        blocks[i] = PatchedBlock(block, shared, backend, rotate_first)
    logger.info("%d blocks replaced by fused ones (backend %s)", len(blocks), backend)
    return model


def _check_block(index: int, block: nn.Module) -> None:
    """Raises ConfigError for what the fused block does not do."""

    def refuse(key: str, value, remedy: str):
        raise ConfigError(f"blocks.{index}.{key}", value, remedy)

    for name in _LINEARS:
        linear = functools.reduce(lambda m, part: getattr(m, part, None), name.split("."), block)
        if not isinstance(linear, nn.Linear):
            refuse(name, type(linear).__name__, "Open-Sora 1.1 has an nn.Linear there")
        if linear.bias is None:
            refuse(f"{name}.bias", None, "Open-Sora 1.1 has a bias there")
    for name, rows in _TABLES.items():
        table = getattr(block, name, None)
        if not isinstance(table, Tensor) or table.shape[0] != rows:
            refuse(name, getattr(table, "shape", None), f"Open-Sora 1.1 has a table of {rows} rows there")
    for name, module in block.named_modules():
        rate = getattr(module, "p", 0.0) if isinstance(module, nn.Dropout) else getattr(module, "drop_prob", 0.0)
        if rate:
            refuse(name, rate, "the fused block has no dropout; set it to 0")
    if getattr(block, "_enable_sequence_parallelism", False):
        refuse("enable_sequence_parallelism", True, "switch it off; stdit_fast.train has its own")


class _Shared:
    """What the blocks of one model compute once: the rotation table. Not a module: `rope` stays the model's."""

    def __init__(self, rope: nn.Module):
        self.rope = rope
        self._key, self._rotation = None, None

    def rotation(self, num_frames: int, device: torch.device) -> Tensor:
        freqs = self.rope.freqs
        key = (num_frames, device, freqs.data_ptr(), freqs._version)
        if key != self._key:
            self._key, self._rotation = key, ops.rotation_table(freqs.detach().to(device), num_frames)
        return self._rotation


@functools.lru_cache(maxsize=8)
def _layout(lengths: tuple[int, ...], device: torch.device) -> ops.TextLayout:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ops.text_layout(mask, len(lengths), max(lengths), device)


class PatchedBlock(nn.Module):
    """An Open-Sora 1.1 block's parameters and signature, with our ops inside."""

    # The arithmetic is our block's, which asks for nothing but these attributes.
    _run = STDiT2Block.forward
    _temporal = STDiT2Block._temporal

    def __init__(self, block: nn.Module, shared: _Shared, backend: str, rotate_first: bool):
        super().__init__()
        for name in _MODULES:
            setattr(self, name, getattr(block, name))
        for name in _TABLES:
            setattr(self, name, getattr(block, name))
        for name in _FLAGS:
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))
        self.training = block.training
        self.backend, self.rotate_first, self._shared = backend, rotate_first, shared

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        t: Tensor,
        t_tmp: Tensor,
        mask: list[int] | None = None,
        x_mask: Tensor | None = None,
        t0: Tensor | None = None,
        t0_tmp: Tensor | None = None,
        T: int | None = None,
        S: int | None = None,
    ) -> Tensor:
        """As their block: x [B, T*S, C], packed text y [1, M, C] with `mask` its lengths, t [B, 6*C], t_tmp [B, 3*C].

        x_mask [B, T] is False where a frame is a condition, which t0 and t0_tmp modulate.
        """
        batch, _, channels = x.shape
        cross = self.cross_attn
        text = y.reshape(-1, channels)
        lengths = tuple(mask) if mask is not None else (text.shape[0] // batch,) * batch
        kv = F.linear(text, cross.kv_linear.weight, cross.kv_linear.bias)
        kv = kv.unflatten(-1, (2, cross.num_heads, cross.head_dim))
        cond = Conditioning(_layout(lengths, x.device), self._shared.rotation(T, x.device))
        x, branch = self._run(x.unflatten(1, (T, S)), None, self._modulation(t, t_tmp, t0, t0_tmp, x_mask), kv, cond)
        return ops.gate_residual(x, *branch[:3], backend=self.backend).flatten(1, 2)

    def _modulation(self, t, t_tmp, t0, t0_tmp, x_mask) -> Tensor:
        """[B, 1 or T, 9, C]."""
        tables = torch.cat((self.scale_shift_table, self.scale_shift_table_temporal))
        rows = torch.cat((t, t_tmp), dim=-1)[:, None]
        if x_mask is not None:
            rows = torch.where(x_mask[:, :, None], rows, torch.cat((t0, t0_tmp), dim=-1)[:, None])
        return tables + rows.unflatten(-1, (9, -1))
