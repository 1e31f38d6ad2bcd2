"""Sequence parallelism: each rank of a group holds some frames of the same videos.

Spatial attention, cross attention and MLP stay within a frame, so they need no other rank. Temporal attention needs all
frames of a position: around it the layout switches from frames to positions, [B, T/n, S, C] to [B, T, S/n, C], and back
(Zhao et al., "DSP: Dynamic Sequence Parallelism for Multi-Dimensional Transformers", 2024). What travels is the
modulated input, before the projection that makes three of it, and the attention's output: two all-to-alls of one unit
(C values a token) a block forward, two backward.

T and S need not be multiples of n: parts differ by one frame or position at most, and all-to-alls of unequal parts move
what there is. So nothing is padded, and nothing needs a mask.

Nothing is copied before or after a transfer of one sample. What makes the modulated input writes its rows in the order
in which they leave (`FrameSwitch.places`), the projection behind works on rows in the order in which they come back,
and what reads its result finds them there; backward likewise.

Transfers overlap with computation:
- backward, a projection's gradient of its input leaves first, and that of its weight is computed while it travels;
- a rank's positions are cut into chunks: one chunk is projected and attended to while the next one arrives and the one
  before leaves.
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

# Tokens of a rank from which on chunks are worth their launches, and how many there are then.
TOKENS_FOR_CHUNKS = 16384
MOST_CHUNKS = 2


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
        self._places: dict[tuple, Tensor] = {}

    def frames_of(self, rank: int) -> slice:
        """The frames that a rank of the group has."""
        return part_of(self.num_frames, self.group.size, rank)

    def places(self, x: Tensor) -> Tensor:
        """The order in which rows travel, for own frames x [B, T/n, S, C]; see `ops.Branch`.

        Chunk after chunk, and in it part after part for each rank: its positions of the first frame, of the second, ...
        """
        batch, own_frames, positions, _ = x.shape
        check_split(self.group.size, self.num_frames, positions)
        key = batch, positions, x.device
        if key not in self._places:
            table = torch.empty(positions, 2, dtype=torch.int32)
            begun = 0
            for part in (part for chunk in self._chunks(batch, positions) for part in chunk):
                count = _length(part)
                table[part, 0] = torch.arange(begun, begun + count, dtype=torch.int32)
                table[part, 1] = count
                begun += batch * own_frames * count
            self._places[key] = table.to(x.device)
        return self._places[key]

    def temporal(
        self,
        u: Tensor,
        positions: int,
        weight: Tensor,
        bias: Tensor,
        attention: Callable[[Tensor], Tensor],
        proj_weight: Tensor,
    ) -> Tensor:
        """linear(attention(linear(u))) where attention sees all frames.

        Args:
            u: [B*T/n*S, C], this rank's frames, its rows where `places` says.
            positions: S.
            weight, bias: of the first linear layer, [3*C, C] and [3*C].
            attention: [B, T, s, 3*C] to [B, T, s, C], for any number s of positions.
            proj_weight: [C, C] of the second linear layer, which has no bias here.

        Returns:
            [B*T/n*S, C], its rows as those of u.

        Raises:
            ConfigError: fewer frames or positions than ranks.
        """
        there, back = self._passage(u, positions), self._passage(u, positions)
        arriving = _Depart.apply(u, there)
        leaving = []
        for i, token in enumerate(arriving):
            o = attention(_ArrivingLinear.apply(token, weight, bias, there, i))
            leaving.append(_Return.apply(o, back, i))
        return _ReturnedLinear.apply(proj_weight, back, *leaving)

    @torch.no_grad()
    def there_and_back(self, u: Tensor, positions: int) -> Tensor:
        """u, as that of `temporal`, through both all-to-alls, with nothing between them; it comes back as it was."""
        there, back = self._passage(u, positions), self._passage(u, positions)
        there.send_columns(u)
        for i in range(len(there.transfers)):
            back.send_frames(i, there.transfers[i].receive_all_frames())
        return back.receive_columns()

    def agree(self, count: int) -> int:
        """The largest of the group's counts: all ranks have to recompute the same blocks."""
        return self.group.largest(count)

    def _passage(self, u: Tensor, positions: int) -> "_Passage":
        check_split(self.group.size, self.num_frames, positions)
        batch = len(u) // (_length(self.frames) * positions)
        return _Passage(self, batch, u.shape[1], self._chunks(batch, positions))

    def _chunks(self, batch: int, positions: int) -> list[list[slice]]:
        """For each chunk, the positions of it that each rank has; all ranks have to see the same ones."""
        tokens = batch * self.num_frames * positions // self.group.size  # not this rank's own, which may be others
        edges = bounds(positions, self.group.size)
        wanted = self.chunks or (MOST_CHUNKS if tokens >= TOKENS_FOR_CHUNKS else 1)
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
    arrived.

    Attributes:
        rows: of the chunk, in the order of `FrameSwitch.places`.
    """

    def __init__(self, switch: FrameSwitch, batch: int, channels: int, chunk: list[slice], first_row: int):
        group = switch.group
        self.group, self.batch, self.channels = group, batch, channels
        self.all_frames = [stop - start for start, stop in pairwise(switch.frame_bounds)]
        own_frames = self.all_frames[group.rank]
        self.own_positions = _length(chunk[group.rank])
        # What goes to, or comes from, each rank: its frames of some positions, or some frames of its positions.
        self.by_columns = [batch * own_frames * _length(c) * channels for c in chunk]
        self.by_frames = [batch * frames * self.own_positions * channels for frames in self.all_frames]
        self.rows = slice(first_row, first_row + sum(self.by_columns) // channels)
        self._work = self._sent = self._arriving = None

    def send_columns(self, rows: Tensor) -> Tensor:
        """Sends the chunk's rows to those who have its positions; the token."""
        sent = rows.contiguous().flatten()
        return self._send(sent, sent.new_empty(sum(self.by_frames)), self.by_columns, self.by_frames)

    def send_frames(self, x: Tensor, rows: Tensor) -> Tensor:
        """Sends x [B, T, s, C] to those who have its frames; the token. What they send goes to the chunk's rows."""
        if self.batch == 1:  # as it is
            sent = x.contiguous().flatten()
        else:
            sent = x.new_empty(sum(self.by_frames))
            for part, own in zip(sent.split(self.by_frames), x.split(self.all_frames, dim=1), strict=True):
                part.view_as(own).copy_(own)
        return self._send(sent, rows.flatten(), self.by_frames, self.by_columns)

    def _send(self, sent: Tensor, arriving: Tensor, sizes: list[int], sizes_back: list[int]) -> Tensor:
        self._arriving, self._sent = arriving, sent  # what is sent lives until it has left
        self._work = dist.all_to_all_single(arriving, sent, sizes_back, sizes, group=self.group.device, async_op=True)
        return sent.new_empty(0)

    def arrive(self) -> Tensor:
        """The device waits for what the other ranks have sent."""
        self._work.wait()  # which makes the device wait, not the CPU
        arrived, self._work, self._sent, self._arriving = self._arriving, None, None, None
        return arrived

    def receive_all_frames(self) -> Tensor:
        """What was sent by `send_columns`: [B, T, s, C]."""
        parts = self.arrive()
        shape = (self.own_positions, self.channels)
        if self.batch == 1:
            return parts.view(1, sum(self.all_frames), *shape)
        sizes = zip(parts.split(self.by_frames), self.all_frames, strict=True)
        return torch.cat([part.view(self.batch, frames, *shape) for part, frames in sizes], dim=1)


class _Passage:
    """All chunks' ways from frames to positions, or back.

    Autograd's functions hand each other empty tensors, tokens, that stand for chunks on their way: where parts are
    unequal, a gradient has another size there than its value had.
    """

    def __init__(self, switch: FrameSwitch, batch: int, channels: int, chunks: list[list[slice]]):
        self.transfers: list[_Transfer] = []
        self.count = 0  # of rows
        for chunk in chunks:
            self.transfers.append(_Transfer(switch, batch, channels, chunk, self.count))
            self.count = self.transfers[-1].rows.stop
        self._returned: Tensor | None = None

    def send_columns(self, rows: Tensor) -> tuple[Tensor, ...]:
        """All chunks of rows [N, C] set out to those who have their positions."""
        return tuple(transfer.send_columns(rows[transfer.rows]) for transfer in self.transfers)

    def send_frames(self, index: int, x: Tensor) -> Tensor:
        """A chunk x [B, T, s, C] sets out to those who have its frames."""
        if self._returned is None:
            self._returned = x.new_empty(self.count, x.shape[-1])
        transfer = self.transfers[index]
        return transfer.send_frames(x, self._returned[transfer.rows])

    def receive_columns(self) -> Tensor:
        """All rows [N, C], when the chunks are back."""
        for transfer in self.transfers:
            transfer.arrive()
        return self.take_rows()

    def take_rows(self) -> Tensor:
        """All rows [N, C], when each of the chunks has been waited for."""
        rows, self._returned = self._returned, None
        return rows


def _length(part: slice) -> int:
    return part.stop - part.start


class _Depart(torch.autograd.Function):
    """u [N, C] sets out to those who have its positions: a token for each chunk."""

    @staticmethod
    def forward(ctx, u, passage):
        ctx.passage = passage
        return passage.send_columns(u)

    @staticmethod
    def backward(ctx, *tokens):
        return ctx.passage.receive_columns(), None


class _ArrivingLinear(torch.autograd.Function):
    """A chunk arrives with all frames and goes through the linear layer: [B, T, s, C_out]."""

    @staticmethod
    def forward(ctx, token, weight, bias, passage, index):
        u = passage.transfers[index].receive_all_frames()
        ctx.save_for_backward(u, weight)
        ctx.passage, ctx.index = passage, index
        return F.linear(u, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        u, weight = ctx.saved_tensors
        token = ctx.passage.send_frames(ctx.index, dy @ weight)
        # While that travels:
        dweight = weight_gradient(dy, u, weight) if ctx.needs_input_grad[1] else None
        dbias = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return token, dweight, dbias, None, None


class _Return(torch.autograd.Function):
    """The attention's output [B, T, s, C] sets out to those who have its frames: a token."""

    @staticmethod
    def forward(ctx, o, passage, index):
        ctx.transfer = passage.transfers[index]
        return passage.send_frames(index, o)

    @staticmethod
    def backward(ctx, token):
        return ctx.transfer.receive_all_frames(), None, None


class _ReturnedLinear(torch.autograd.Function):
    """Chunks come back and go through the linear layer, one while the next is on its way: [N, C]."""

    @staticmethod
    def forward(ctx, weight, passage, *tokens):
        y = tokens[0].new_empty(passage.count, weight.shape[0])
        for transfer in passage.transfers:
            torch.mm(transfer.arrive().view(-1, weight.shape[1]), weight.t(), out=y[transfer.rows])
        ctx.save_for_backward(passage.take_rows(), weight)
        ctx.passage = passage
        return y

    @staticmethod
    def backward(ctx, dy):
        o, weight = ctx.saved_tensors
        # The last chunk is the first that is taken up again.
        transfers = reversed(ctx.passage.transfers)
        tokens = [transfer.send_columns(dy[transfer.rows] @ weight) for transfer in transfers]
        dweight = weight_gradient(dy, o, weight) if ctx.needs_input_grad[0] else None  # while those travel
        return dweight, None, *reversed(tokens)
