"""GroupNorm + SiLU of pictures around the library's convolutions, forward only: what a frozen autoencoder needs.

cuDNN's convolutions are fastest with channels last (H100, bf16, 128 to 512 channels: 700 to 760 TFLOP/s, where a Triton
kernel with bias, residual and statistics inside reached 530 to 660, and the same work with channels first 330 to 570);
what PyTorch runs around them is not. Pictures lie as `Frames` do, and between two convolutions there are two passes:
one takes the statistics (and adds a residual), one normalises. Biases are parts of these passes.

Bytes that must move a normalisation: x once for the statistics, once in and once out; with a residual that in too, and
the sum out.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stdit_fast.kernels import frames as kernels
from stdit_fast.kernels.tiles import interpreted
from stdit_fast.ops import library, registry
from stdit_fast.ops.checks import expect_dtype, expect_shape

PLACE_NAME, ENTER_NAME, NORM_NAME, STATISTICS_NAME = (
    "place_frames",
    "enter_frames",
    "group_norm_silu",
    "frame_statistics",
)
MIN_CHANNELS = 16


class Frames(NamedTuple):
    """Pictures, data + shift, and mean and variance of each one's channels.

    data: [N, H+1, W+1, C], contiguous. The last row and column are zero, but where there is a shift they hold anything.
    statistics: float32 [N, 2, C], of data + shift.
    shift: [C], not yet added; or None.
    """

    data: Tensor
    statistics: Tensor
    shift: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.data.shape[1] - 1, self.data.shape[2] - 1


def _choose() -> tuple[str, str]:
    if not torch.cuda.is_available():
        return registry.REFERENCE, "no GPU is visible"
    reason = unserved(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)
    return (registry.REFERENCE, reason) if reason else ("triton", "bf16 and fp16, channels that are powers of two")


for _name in (PLACE_NAME, ENTER_NAME, NORM_NAME, STATISTICS_NAME):
    registry.declare(_name, _choose)


def unserved(device: torch.device, dtype: torch.dtype, channels: tuple[int, ...] = (), groups: int = 1) -> str:
    """Why the kernels cannot serve networks of such pictures, or an empty string."""
    for count in channels:
        if count < MIN_CHANNELS or count & (count - 1):
            return f"{count} channels, where a power of two from {MIN_CHANNELS} on is needed"
        if count % groups:
            return f"{count} channels in {groups} groups"
    if device.type == "cuda":
        if dtype not in (torch.bfloat16, torch.float16):
            return f"{dtype}, where bf16 or fp16 is needed"
        major, minor = torch.cuda.get_device_capability(device)
        return "" if major >= 8 else f"compute capability {major}.{minor}, where 8.0 is needed"
    return "" if interpreted() else f"a tensor on {device.type}, without Triton's interpreter"


# ------------------------------------------------------- into the layout


def enter_frames(x: Tensor, weight: Tensor, bias: Tensor, fused: bool = True) -> Frames:
    """conv3x3(x) + bias of pictures as they come, in the weight's dtype: the network's first convolution.

    Args:
        x: [N, C_in, H, W], of any strides and floating dtype; rounded to the weight's.
        weight: [C_out, C_in, 3, 3], C_out a power of two from 16 on; bias: [C_out].
        fused: false: the definition.

    Raises:
        ValueError: a shape that does not fit.
    """
    expect_shape(ENTER_NAME, "x", x, ("N", "C", "H", "W"))
    expect_shape(ENTER_NAME, "weight", weight, ("C_out", x.shape[1], 3, 3))
    expect_shape(ENTER_NAME, "bias", bias, (weight.shape[0],))
    return Frames(*(_enter_op if fused else enter_definition)(x, weight, bias))


def enter_definition(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _with_statistics(F.conv2d(x.to(weight.dtype), weight, bias.to(weight.dtype), padding=1))


def place_frames(
    src: Tensor,
    bias: Tensor,
    size: tuple[int, int],
    residual: Tensor | None = None,
    *,
    row_pitch: int | None = None,
    fused: bool = True,
) -> Frames:
    """src + bias (+ residual) in the layout.

    Args:
        src: [N, P, C], contiguous; pixel (h, w) of a picture is its row h * row_pitch + w.
        bias: [C], of any dtype; size: H, W.
        residual: [N, H+1, W+1, C] in the layout.
        row_pitch: W where not given.
        fused: false: the definition.

    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    height, width = size
    pitch = width if row_pitch is None else row_pitch
    expect_shape(PLACE_NAME, "src", src, ("N", "P", "C"))
    expect_shape(PLACE_NAME, "bias", bias, (src.shape[2],))
    if pitch < width or src.shape[1] < (height - 1) * pitch + width:
        rows = f"{src.shape[1]} rows, lines {pitch} apart"
        raise ValueError(f"{PLACE_NAME}: src has {rows}, too few for {height} * {width} pixels")
    if residual is not None:
        expect_shape(PLACE_NAME, "residual", residual, (src.shape[0], height + 1, width + 1, src.shape[2]))
        expect_dtype(PLACE_NAME, "residual", residual, src)
    return Frames(*(_place_op if fused else place_definition)(src, bias, residual, height, width, pitch))


def place_definition(
    src: Tensor, bias: Tensor, residual: Tensor | None, height: int, width: int, row_pitch: int
) -> tuple[Tensor, Tensor]:
    rows = F.pad(src, (0, 0, 0, max(0, height * row_pitch - src.shape[1])))[:, : height * row_pitch]
    out = rows.unflatten(1, (height, row_pitch))[:, :, :width].permute(0, 3, 1, 2) + bias.to(src.dtype).view(-1, 1, 1)
    return _with_statistics(out if residual is None else out + pictures(residual))


def frame_statistics(data: Tensor, shift: Tensor, fused: bool = True) -> Frames:
    """Pictures data + shift; data [N, H+1, W+1, C] is left as it is, and read once."""
    expect_shape(STATISTICS_NAME, "data", data, ("N", "H+1", "W+1", "C"))
    expect_shape(STATISTICS_NAME, "shift", shift, (data.shape[3],))
    return Frames(data, (_statistics_op if fused else statistics_definition)(data, shift), shift)


def statistics_definition(data: Tensor, shift: Tensor) -> Tensor:
    return _with_statistics(pictures(data) + shift.to(data.dtype).view(-1, 1, 1))[1]


# ------------------------------------------------------------ normalisation


def group_norm_silu(
    x: Frames,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    silu: bool = True,
    tokens: int = 0,
    fused: bool = True,
) -> Tensor:
    """GroupNorm (Wu and He, 2018), then SiLU where asked for.

    Args:
        weight, bias: [C].
        tokens: 0: the result is in the layout. Otherwise it is [N, tokens, C]: the pixels row by row, without the
            border, then zeros.
        fused: false: the definition.

    Raises:
        ValueError: a shape that does not fit.
    """
    data, statistics, shift = x
    expect_shape(NORM_NAME, "data", data, ("N", "H+1", "W+1", "C"))
    channels, (height, width) = data.shape[3], x.size
    expect_shape(NORM_NAME, "statistics", statistics, (data.shape[0], 2, channels))
    expect_shape(NORM_NAME, "weight", weight, (channels,))
    expect_shape(NORM_NAME, "bias", bias, (channels,))
    if channels % groups:
        raise ValueError(f"{NORM_NAME}: {channels} channels do not go into {groups} groups")
    if tokens and tokens < height * width:
        raise ValueError(f"{NORM_NAME}: {tokens} tokens for {height} * {width} pixels")
    return (_norm_op if fused else norm_definition)(data, statistics, shift, weight, bias, groups, eps, silu, tokens)


def norm_definition(
    data: Tensor,
    statistics: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    tokens: int,
) -> Tensor:
    x = pictures(data)
    if shift is not None:
        x = x + shift.to(x.dtype).view(-1, 1, 1)
    out = F.group_norm(x, groups, weight.to(data.dtype), bias.to(data.dtype), eps)
    out = F.silu(out) if silu else out
    if not tokens:
        return lay(out)
    rows = out.flatten(2).mT
    return F.pad(rows, (0, 0, 0, tokens - rows.shape[1]))


# ------------------------------------------------------------------- layout


def pictures(data: Tensor) -> Tensor:
    """[N, C, H, W], a view, of [N, H+1, W+1, C]."""
    return data[:, :-1, :-1].permute(0, 3, 1, 2)


def lay(x: Tensor) -> Tensor:
    """[N, C, H, W] in the layout."""
    return F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, 1, 0, 1)).contiguous()


def _with_statistics(out: Tensor) -> tuple[Tensor, Tensor]:
    wide = out.to(torch.promote_types(out.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, (2, 3), correction=0)
    return lay(out), torch.stack([mean, variance], 1)


# ---------------------------------------------------------------- registered


def _fake(like: Tensor, count: int, height: int, width: int, channels: int) -> tuple[Tensor, Tensor]:
    return like.new_empty(count, height + 1, width + 1, channels), _fake_statistics(like, count, channels)


def _fake_statistics(like: Tensor, count: int, channels: int) -> Tensor:
    return like.new_empty(count, 2, channels, dtype=torch.float32)


_enter_op = library.define(
    "enter_frames(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor)",
    lambda x, weight, bias: kernels.enter(x, weight.contiguous(), bias),
    lambda x, weight, bias: _fake(weight, x.shape[0], x.shape[2], x.shape[3], weight.shape[0]),
)
_place_op = library.define(
    "place_frames(Tensor src, Tensor bias, Tensor? residual, int height, int width, int row_pitch) -> (Tensor, Tensor)",
    lambda src, bias, residual, height, width, row_pitch: kernels.place(
        src.contiguous(), bias, residual if residual is None else residual.contiguous(), height, width, row_pitch
    ),
    lambda src, bias, residual, height, width, row_pitch: _fake(src, src.shape[0], height, width, src.shape[2]),
)
_statistics_op = library.define(
    "frame_statistics(Tensor data, Tensor shift) -> Tensor",
    lambda data, shift: kernels.statistics(data.contiguous(), shift),
    lambda data, shift: _fake_statistics(data, data.shape[0], data.shape[3]),
)
_norm_op = library.define(
    "group_norm_silu(Tensor data, Tensor statistics, Tensor? shift, Tensor weight, Tensor bias, int groups, float eps, "
    "bool silu, int tokens) -> Tensor",
    lambda data, *others: kernels.normalize(data.contiguous(), *others),
    lambda data, statistics, shift, weight, bias, groups, eps, silu, tokens: (
        data.new_empty(data.shape[0], tokens, data.shape[3]) if tokens else data.new_empty(data.shape)
    ),
)
