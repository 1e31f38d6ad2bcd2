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

Where the group has `copies`, transfers are copies between the memory of its GPUs and not collectives. What is sent then
lies in a stage that the other ranks read from, where kernels and products have written it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from stdit_fast.kernels.results import result_into
from stdit_fast.ops.linear import weight_gradient
from stdit_fast.parallel.copies import Arrival, Staged
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
        self._leaving: _Passage | None = None  # whose stage is filled before `temporal`

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

    @contextmanager
    def leaving(self, x: Tensor) -> Iterator[None]:
        """The modulated norm that is made in here of own frames x [B, T/n, S, C] may lie where it is sent from.

        It belongs to the next call of `temporal`, and its memory to others after it.
        """
        batch, _, positions, channels = x.shape
        self._leaving = self._passage(batch, positions, channels)
        with result_into(self._leaving.stage_of_columns(x.dtype)):
            yield

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
        there, back = self._passages(u, positions)
        arriving = _Depart.apply(u, there)
        leaving = []
        for i, token in enumerate(arriving):
            qkv = _ArrivingLinear.apply(token, weight, bias, there, i)
            with result_into(back.stage_of_frames(i, u.dtype)):
                o = attention(qkv)
            leaving.append(_Return.apply(o, back, i))
        return _ReturnedLinear.apply(proj_weight, back, *leaving)

    @torch.no_grad()
    def there_and_back(self, u: Tensor, positions: int) -> Tensor:
        """u, as that of `temporal`, through both all-to-alls, with nothing between them; it comes back as it was."""
        there, back = self._passages(u, positions)
        there.send_columns(u)
        for i in range(len(there.transfers)):
            back.send_frames(i, there.transfers[i].receive_all_frames())
        return back.receive_columns()

    def agree(self, count: int) -> int:
        """The largest of the group's counts: all ranks have to recompute the same blocks."""
        return self.group.largest(count)

    def _passages(self, u: Tensor, positions: int) -> tuple["_Passage", "_Passage"]:
        """There, as `leaving` may have begun it, and back."""
        there, self._leaving = self._leaving, None
        batch, channels = len(u) // (_length(self.frames) * positions), u.shape[1]
        return there or self._passage(batch, positions, channels), self._passage(batch, positions, channels)

    def _passage(self, batch: int, positions: int, channels: int) -> "_Passage":
        check_split(self.group.size, self.num_frames, positions)
        return _Passage(self, batch, channels, self._chunks(batch, positions))

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
        span: of the chunk, in values of its passage's frames.
    """

    def __init__(self, switch: FrameSwitch, batch: int, channels: int, chunk: list[slice], before: list[int]):
        """
        Args:
            before: positions of each rank in the chunks before this one.
        """
        group = switch.group
        self.group, self.batch, self.channels = group, batch, channels
        self.all_frames = [stop - start for start, stop in pairwise(switch.frame_bounds)]
        counts = [_length(part) for part in chunk]
        own_frames, self.own_positions = self.all_frames[group.rank], counts[group.rank]
        # What goes to, or comes from, each rank: its frames of some positions, or some frames of its positions.
        self.by_columns = [batch * own_frames * count * channels for count in counts]
        self.by_frames = [batch * frames * self.own_positions * channels for frames in self.all_frames]
        first = sum(before)
        self.rows = slice(batch * own_frames * first, batch * own_frames * (first + sum(counts)))
        start = batch * switch.num_frames * before[group.rank] * channels
        self.span = slice(start, start + sum(self.by_frames))
        # Where this rank's part begins in what each rank sends: in its columns, or in its frames.
        earlier = first + sum(counts[: group.rank])
        self.in_columns = [batch * frames * earlier * channels for frames in self.all_frames]
        start = switch.frame_bounds[group.rank]
        self.in_frames = [
            batch * channels * (switch.num_frames * done + count * start)
            for done, count in zip(before, counts, strict=True)
        ]
        self._work: dist.Work | Arrival | None = None
        self._sent = self._arriving = None

    def send_columns(self, rows: Tensor, staged: Staged | None) -> Tensor:
        """Sends the chunk's rows to those who have its positions; the token.

        Args:
            staged: of the whole passage; holds the rows.
        """
        sent = rows.contiguous().flatten()
        arriving = sent.new_empty(sum(self.by_frames))
        return self._send(sent, arriving, self.by_columns, self.by_frames, staged, self.in_columns)

    def send_frames(self, x: Tensor, rows: Tensor, staged: Staged | None) -> Tensor:
        """Sends x [B, T, s, C] to those who have its frames; the token. What they send goes to the chunk's rows.

        Args:
            staged: of the whole passage; gets x, unless it is there.
        """
        place = None if staged is None else staged.values[self.span]
        if self.batch == 1:  # as it is
            sent = x.contiguous().flatten()
            if place is not None and place.data_ptr() != sent.data_ptr():
                sent = place.copy_(sent)
        else:
            sent = x.new_empty(sum(self.by_frames)) if place is None else place
            for part, own in zip(sent.split(self.by_frames), x.split(self.all_frames, dim=1), strict=True):
                part.view_as(own).copy_(own)
        return self._send(sent, rows.flatten(), self.by_frames, self.by_columns, staged, self.in_frames)

    def _send(
        self,
        sent: Tensor,
        arriving: Tensor,
        sizes: list[int],
        sizes_back: list[int],
        staged: Staged | None,
        starts: list[int],
    ) -> Tensor:
        self._arriving, self._sent = arriving, sent  # what is sent lives until it has left
        if staged is not None:
            self._work = self.group.copies.all_to_all(staged, arriving, sizes_back, starts)
        else:
            group = self.group.device
            self._work = dist.all_to_all_single(arriving, sent, sizes_back, sizes, group=group, async_op=True)
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
        self.copies, self.channels = switch.group.copies, channels
        self.transfers: list[_Transfer] = []
        before = [0] * switch.group.size
        for chunk in chunks:
            self.transfers.append(_Transfer(switch, batch, channels, chunk, before))
            before = [done + _length(part) for done, part in zip(before, chunk, strict=True)]
        self.count = self.transfers[-1].rows.stop
        # The most values that any rank sends of columns, and of frames.
        most_frames = max(stop - start for start, stop in pairwise(switch.frame_bounds))
        self._most_columns = batch * most_frames * sum(before) * channels
        self._most_frames = batch * switch.num_frames * max(before) * channels
        self._returned: Tensor | None = None
        self._columns: Staged | None = None
        self._frames: Staged | None = None
        self._to_come = 0  # chunks of frames that are still to be sent from the stage

    def stage_of_columns(self, dtype: torch.dtype) -> Tensor | None:
        """Where all rows [N, C] are to be written that are sent next; None: anywhere."""
        if self.copies is None:
            return None
        self._columns = self.copies.stage(self._most_columns, self.count * self.channels, dtype)
        return self._columns.values.view(self.count, self.channels)

    def stage_of_frames(self, index: int, dtype: torch.dtype) -> Tensor | None:
        """Where a chunk's [B, T, s, C] is to be written that is sent next, flat; None: anywhere."""
        if self.copies is None:
            return None
        transfer = self.transfers[index]
        if self._to_come == 0:
            count = sum(sum(each.by_frames) for each in self.transfers)
            self._frames = self.copies.stage(self._most_frames, count, dtype)
            self._to_come = len(self.transfers)
        # With several samples parts have to be brought into order first, which is done on the way there.
        return self._frames.values[transfer.span] if transfer.batch == 1 else None

    def send_columns(self, rows: Tensor) -> tuple[Tensor, ...]:
        """All chunks of rows [N, C] set out to those who have their positions."""
        return tuple(self.send_chunk(i, rows) for i in range(len(self.transfers)))

    def send_chunk(self, index: int, rows: Tensor) -> Tensor:
        """A chunk of rows [N, C] sets out to those who have its positions."""
        transfer = self.transfers[index]
        own = rows[transfer.rows]
        if self.copies is not None:
            if self._columns is None:
                self.stage_of_columns(rows.dtype)
            place = self._columns.values.view(rows.shape)[transfer.rows]
            if place.data_ptr() != own.data_ptr():
                own = place.copy_(own)
        return transfer.send_columns(own, self._columns)

    def send_frames(self, index: int, x: Tensor) -> Tensor:
        """A chunk x [B, T, s, C] sets out to those who have its frames."""
        if self._returned is None:
            self._returned = x.new_empty(self.count, x.shape[-1])
        transfer = self.transfers[index]
        if self.copies is not None:
            self._to_come -= 1
        return transfer.send_frames(x, self._returned[transfer.rows], self._frames)

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
        du = ctx.passage.stage_of_frames(ctx.index, dy.dtype)
        if du is None:
            du = dy @ weight
        else:
            du = torch.mm(dy.flatten(0, -2), weight, out=du.view(-1, weight.shape[1])).view(*dy.shape[:-1], -1)
        token = ctx.passage.send_frames(ctx.index, du)
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
        passage, tokens = ctx.passage, []
        do = passage.stage_of_columns(dy.dtype)
        if do is None:
            do = dy.new_empty(passage.count, weight.shape[1])
        for i, transfer in reversed(list(enumerate(passage.transfers))):  # the last chunk is taken up again first
            torch.mm(dy[transfer.rows], weight, out=do[transfer.rows])
            tokens.append(passage.send_chunk(i, do))
        dweight = weight_gradient(dy, o, weight) if ctx.needs_input_grad[0] else None  # while those travel
        return dweight, None, *reversed(tokens)
