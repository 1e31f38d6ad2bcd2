"""What conditions STDiT-2 and where its tokens are: sinusoids, scalar embedders, positions, captions."""

import math

import torch
import torch.nn as nn
from torch import Tensor

from stdit_fast.ops import mlp

SINUSOID_CHANNELS = 256


class Linear(nn.Linear):
    """A Linear that knows its initial weight, as only leaves are asked for theirs.

    Args:
        initial_std: of a normal initial weight; 0: zeros; None: Xavier uniform.
    """

    def __init__(self, channels_in: int, channels_out: int, initial_std: float | None = None):
        self.initial_std = initial_std
        super().__init__(channels_in, channels_out)


def sinusoid(value: Tensor, channels: int = SINUSOID_CHANNELS, max_period: float = 10000.0) -> Tensor:
    """cat(cos, sin) of value * max_period^(-i/half), i < half = channels/2 (the timestep embedding of DDPM).

    Args:
        value: [N], integers or floats; used in float32 or better.

    Returns:
        [N, channels] float32, or float64 for a float64 value.
    """
    half = channels // 2
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    exponent = torch.arange(half, device=value.device, dtype=wide.dtype) / half
    angle = wide[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


class ScalarEmbedder(nn.Module):
    """A number (timestep, pixels, ratio, frames, frames/s) to a vector: sinusoid, Linear, SiLU, Linear."""

    def __init__(self, channels: int, initial_std: float | None = None):
        super().__init__()
        self.mlp = nn.Sequential(
            Linear(SINUSOID_CHANNELS, channels, initial_std), nn.SiLU(), Linear(channels, channels, initial_std)
        )

    def forward(self, *values: Tensor) -> Tensor:
        """k values of shape [B] to [B, k*channels]: embedded one by one, concatenated in order."""
        weight = self.mlp[0].weight
        return torch.cat([self.mlp(sinusoid(v.to(weight.device)).to(weight.dtype)) for v in values], dim=-1)


class CaptionEmbedder(nn.Module):
    """Text states to the model's width, and the vectors that stand for a dropped caption.

    `y_embedding` is a buffer, as in Open-Sora 1.1: it is saved and loaded, and not trained.
    """

    def __init__(self, caption_channels: int, channels: int, max_tokens: int, backend: str = "auto"):
        super().__init__()
        self.y_proj = Mlp(caption_channels, channels, channels, initial_std=0.02, backend=backend)
        self.register_buffer("y_embedding", torch.empty(max_tokens, caption_channels))

    def forward(self, y: Tensor, drop: Tensor | None) -> Tensor:
        """Packed or padded text states [..., L, caption_channels] of B samples to [..., L, C].

        Args:
            y: [B, L, caption_channels].
            drop: [B] bool, True where the caption is replaced by the first L vectors of `y_embedding`.
        """
        y = y.to(self.y_embedding.dtype)
        if drop is not None:
            null = self.y_embedding[: y.shape[1]]
            y = torch.where(drop.to(y.device)[:, None, None], null, y)
        return y


class Mlp(nn.Module):
    """fc1, GELU(tanh), fc2."""

    def __init__(
        self,
        channels_in: int,
        hidden: int,
        channels_out: int,
        initial_std: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        self.backend = backend
        self.fc1 = Linear(channels_in, hidden, initial_std)
        self.fc2 = Linear(hidden, channels_out, initial_std)

    def forward(self, x: Tensor) -> Tensor:
        return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, backend=self.backend)


class RotaryEmbedding(nn.Module):
    """Holds the angles of the temporal rotation, one set for the model (`rope.freqs` of a checkpoint).

    They stay float32 when the model is cast: an angle is frame * freq, and bfloat16 would be off by whole
    degrees after a hundred frames.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.register_buffer("freqs", torch.empty(head_dim // 2))  # filled by STDiT2._init_weights

    def initial(self, theta: float = 10000.0) -> Tensor:
        """theta^(-2i/head_dim), i < head_dim/2 (Su et al., 2021, section 3.2.2)."""
        return theta ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu") / self.head_dim)

    def _apply(self, fn, recurse=True):
        before = self.freqs
        super()._apply(fn, recurse)
        if not before.is_meta and not self.freqs.is_meta:
            wide = torch.promote_types(self.freqs.dtype, torch.float32)
            self.freqs = before.to(device=self.freqs.device, dtype=wide)
        return self


def position_embedding(
    channels: int, rows: int, columns: int, scale: Tensor, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """2D sine-cosine positions, scaled so that pictures of any size span the range seen at base size.

    The first half of the channels holds the column, the second the row, each as cat(sin, cos) of
    place * 10000^(-2i/(C/2)), i < C/4. A place is index / scale * (base / size), base = round(sqrt(rows*columns)).

    Args:
        channels: C, a multiple of 4.
        rows, columns: size of the token grid.
        scale: [B] float32, sqrt(height*width in pixels) / input_sq_size.

    Returns:
        [B, rows*columns, C] in `dtype`, row by row.
    """
    scale = scale.to(device=device, dtype=torch.float32)
    base = round(math.sqrt(rows * columns))
    exponent = torch.arange(channels // 4, device=device, dtype=torch.float32) * (2 / (channels // 2))
    frequency = torch.exp(-math.log(10000.0) * exponent)

    def encode(size: int) -> Tensor:  # [B, size, C/2]
        place = torch.arange(size, device=device, dtype=torch.float32) / scale[:, None] * (base / size)
        angle = place[..., None] * frequency
        return torch.cat((angle.sin(), angle.cos()), dim=-1)

    column = encode(columns)[:, None].expand(-1, rows, -1, -1)
    row = encode(rows)[:, :, None].expand(-1, -1, columns, -1)
    return torch.cat((column, row), dim=-1).flatten(1, 2).to(dtype)
