"""Sequence parallelism: each rank of a group holds some frames of the same videos.

Spatial attention, cross attention and MLP stay within a frame, so they need no other rank. Temporal attention needs all
frames of a position: around it the layout switches from frames to positions, [B, T/n, S, C] to [B, T, S/n, C], and back
(Zhao et al., "DSP: Dynamic Sequence Parallelism for Multi-Dimensional Transformers", 2024). What travels is the
modulated input, before the projection that makes three of it, and the attention's output: two all-to-alls of one unit
(C values a token) a block forward, two backward.

T and S need not be multiples of n: parts differ by one frame or position at most, and all-to-alls of unequal parts move
what there is. So nothing is padded, and nothing needs a mask.

Transfers overlap with computation:
- backward, a projection's gradient of its input leaves first, and that of its weight is computed while it travels;
- forward, a rank's positions are cut into chunks: one chunk is projected and attended to while the next one arrives
  and the one before leaves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from stdit_fast.ops.linear import weight_gradient
from stdit_fast.parallel.groups import SequenceGroup, check_split

# Tokens of a rank from which on two chunks are worth their launches.
TOKENS_FOR_TWO_CHUNKS = 16384


def bounds(total: int, parts: int) -> list[int]:
    """[parts + 1]: where each of `parts` contiguous parts begins and ends; sizes differ by one, larger first."""
    size, larger = divmod(total, parts)
    return [i * size + min(i, larger) for i in range(parts + 1)]


def part_of(total: int, parts: int, index: int) -> slice:
    """The part of rank `index`."""
    start, stop = bounds(total, parts)[index : index + 2]
    return slice(start, stop)


class FrameSwitch:
    """What a model needs to compute on some frames of a video; see `STDiT2.switch`.

    Args:
        group: the ranks that hold the video.
        num_frames: T, of the whole video.
        chunks: pieces of a rank's positions that overlap with each other; None: by size.

    Attributes:
        frames: of this rank.
    """

    def __init__(self, group: SequenceGroup, num_frames: int, chunks: int | None = None):
        self.group, self.num_frames, self.chunks = group, num_frames, chunks
        self.frame_bounds = bounds(num_frames, group.size)
        self.frames = self.frames_of(group.rank)

    def frames_of(self, rank: int) -> slice:
        """The frames that a rank of the group has."""
        return part_of(self.num_frames, self.group.size, rank)

    def temporal(
        self, u: Tensor, weight: Tensor, bias: Tensor, attention: Callable[[Tensor], Tensor], proj_weight: Tensor
    ) -> Tensor:
        """linear(attention(linear(u))) where attention sees all frames.

        Args:
            u: [B, T/n, S, C], this rank's frames.
            weight, bias: of the first linear layer, [3*C, C] and [3*C].
            attention: [B, T, s, 3*C] to [B, T, s, C], for any number s of positions.
            proj_weight: [C, C] of the second linear layer, which has no bias here.

        Returns:
            [B, T/n, S, C].

        Raises:
            ConfigError: fewer frames or positions than ranks.
        """
        batch, frames, positions, channels = u.shape
        check_split(self.group.size, self.num_frames, positions)
        chunks = self._chunks(batch, positions)
        there = [_Transfer(self, batch, channels, chunk) for chunk in chunks]
        back = [_Transfer(self, batch, channels, chunk) for chunk in chunks]
        arriving = _Depart.apply(u, there)
        leaving = []
        for token, transfer, returning in zip(arriving, there, back, strict=True):
            o = attention(_ArrivingLinear.apply(token, weight, bias, transfer))
            leaving.append(_Return.apply(o, returning))
        return _ReturnedLinear.apply(proj_weight, positions, back, *leaving)

    @torch.no_grad()
    def there_and_back(self, u: Tensor) -> Tensor:
        """u [B, T/n, S, C] through both all-to-alls, with nothing between them; it comes back as it was."""
        out = torch.empty_like(u)
        for chunk in self._chunks(u.shape[0], u.shape[2]):
            there, back = (_Transfer(self, u.shape[0], u.shape[3], chunk) for _ in range(2))
            there.send_columns(u)
            back.send_frames(there.receive_all_frames())
            back.receive_columns(out)
        return out

    def agree(self, count: int) -> int:
        """The largest of the group's counts: all ranks have to recompute the same blocks."""
        return self.group.largest(count)

    def _chunks(self, batch: int, positions: int) -> list[list[slice]]:
        """For each chunk, the positions of it that each rank has; all ranks have to see the same ones."""
        tokens = batch * self.num_frames * positions // self.group.size  # not this rank's own, which may be others
        edges = bounds(positions, self.group.size)
        wanted = self.chunks or (2 if tokens >= TOKENS_FOR_TWO_CHUNKS else 1)
        count = max(1, min(wanted, positions // self.group.size))
        chunks: list[list[slice]] = [[] for _ in range(count)]
        for start, stop in pairwise(edges):
            for chunk, (first, last) in zip(chunks, pairwise(bounds(stop - start, count)), strict=True):
                chunk.append(slice(start + first, start + last))
        return chunks


@contextmanager
def split_frames(model, switch: FrameSwitch | None) -> Iterator[None]:
    """Forward passes of `model` (the bare one) get some frames of the videos, as `switch` says; None: whole videos."""
    before, model.switch = model.switch, switch
    try:
        yield
    finally:
        model.switch = before


# ------------------------------------------------------------------- transfers


class _Transfer:
    """One chunk's way from frames to positions, or back; it may go both ways, forward and backward.

    On the wire the parts for or from each rank stand one after the other. The transfer keeps them until they have
    arrived. Autograd's functions hand each other empty tensors, tokens, that stand for them: where parts are unequal, a
    gradient on its way has another size than its value had.
    """

    def __init__(self, switch: FrameSwitch, batch: int, channels: int, chunk: list[slice]):
        group = switch.group
        self.group, self.batch, self.channels, self.columns = group, batch, channels, chunk
        self.all_frames = [stop - start for start, stop in pairwise(switch.frame_bounds)]
        self.own_frames = self.all_frames[group.rank]
        self.own_positions = _length(chunk[group.rank])
        # What goes to, or comes from, each rank: its frames of some positions, or some frames of its positions.
        self.by_columns = [batch * self.own_frames * _length(c) * channels for c in chunk]
        self.by_frames = [batch * frames * self.own_positions * channels for frames in self.all_frames]
        self._work = self._sent = self._arriving = None

    def send_columns(self, x: Tensor) -> Tensor:
        """Sends x [B, T/n, S, C] to those who have its positions; the token."""
        packed = x.new_empty(sum(self.by_columns))
        for part, c in zip(packed.split(self.by_columns), self.columns, strict=True):
            part.view(self.batch, self.own_frames, -1, self.channels).copy_(x[:, :, c])
        return self._send(packed, self.by_columns, self.by_frames)

    def send_frames(self, x: Tensor) -> Tensor:
        """Sends x [B, T, s, C] to those who have its frames; the token."""
        if self.batch == 1:  # as it is
            packed = x.contiguous().flatten()
        else:
            packed = x.new_empty(sum(self.by_frames))
            for part, own in zip(packed.split(self.by_frames), x.split(self.all_frames, dim=1), strict=True):
                part.view_as(own).copy_(own)
        return self._send(packed, self.by_frames, self.by_columns)

    def _send(self, packed: Tensor, sizes: list[int], sizes_back: list[int]) -> Tensor:
        self._arriving, self._sent = packed.new_empty(sum(sizes_back)), packed  # what is sent lives until it has left
        self._work = dist.all_to_all_single(
            self._arriving, packed, sizes_back, sizes, group=self.group.device, async_op=True
        )
        return packed.new_empty(0)

    def _arrived(self) -> Tensor:
        self._work.wait()  # which makes the device wait, not the CPU
        arrived, self._work, self._sent, self._arriving = self._arriving, None, None, None
        return arrived

    def receive_all_frames(self) -> Tensor:
        """What was sent by `send_columns`: [B, T, s, C]."""
        parts = self._arrived()
        shape = (self.own_positions, self.channels)
        if self.batch == 1:
            return parts.view(1, sum(self.all_frames), *shape)
        sizes = zip(parts.split(self.by_frames), self.all_frames, strict=True)
        return torch.cat([part.view(self.batch, frames, *shape) for part, frames in sizes], dim=1)

    def receive_columns(self, out: Tensor) -> None:
        """What was sent by `send_frames`, into its positions of out [B, T/n, S, C]."""
        for part, c in zip(self._arrived().split(self.by_columns), self.columns, strict=True):
            out[:, :, c] = part.view(self.batch, self.own_frames, -1, self.channels)


def _length(part: slice) -> int:
    return part.stop - part.start


class _Depart(torch.autograd.Function):
    """u [B, T/n, S, C] sets out to those who have its positions: a token for each chunk."""

    @staticmethod
    def forward(ctx, u, transfers):
        ctx.transfers = transfers
        ctx.shape = u.shape
        return tuple(transfer.send_columns(u) for transfer in transfers)

    @staticmethod
    def backward(ctx, *tokens):
        du = tokens[0].new_empty(ctx.shape)
        for transfer in ctx.transfers:
            transfer.receive_columns(du)
        return du, None


class _ArrivingLinear(torch.autograd.Function):
    """A chunk arrives with all frames and goes through the linear layer: [B, T, s, C_out]."""

    @staticmethod
    def forward(ctx, token, weight, bias, transfer):
        u = transfer.receive_all_frames()
        ctx.save_for_backward(u, weight)
        ctx.transfer = transfer
        return F.linear(u, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        u, weight = ctx.saved_tensors
        token = ctx.transfer.send_frames(dy @ weight)
        # While that travels:
        dweight = weight_gradient(dy, u, weight) if ctx.needs_input_grad[1] else None
        dbias = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return token, dweight, dbias, None


class _Return(torch.autograd.Function):
    """The attention's output [B, T, s, C] sets out to those who have its frames: a token."""

    @staticmethod
    def forward(ctx, o, transfer):
        ctx.transfer = transfer
        return transfer.send_frames(o)

    @staticmethod
    def backward(ctx, token):
        return ctx.transfer.receive_all_frames(), None


class _ReturnedLinear(torch.autograd.Function):
    """All chunks are back, and go through the linear layer: [B, T/n, S, C]."""

    @staticmethod
    def forward(ctx, weight, positions, transfers, *tokens):
        first = transfers[0]
        o = tokens[0].new_empty(first.batch, first.own_frames, positions, first.channels)
        for transfer in transfers:
            transfer.receive_columns(o)
        ctx.save_for_backward(o, weight)
        ctx.transfers = transfers
        return F.linear(o, weight)

    @staticmethod
    def backward(ctx, dy):
        o, weight = ctx.saved_tensors
        do = dy @ weight
        # The last chunk is the first that is taken up again.
        tokens = [transfer.send_columns(do) for transfer in reversed(ctx.transfers)]
        dweight = weight_gradient(dy, o, weight) if ctx.needs_input_grad[0] else None  # while those travel
        return dweight, None, None, *tokens
