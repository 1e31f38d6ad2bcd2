"""Predictions of videos that several ranks share: each computes on its frames, and all get the whole."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from stdit_fast.model.prediction import Predictor
from stdit_fast.model.stdit2 import STDiT2
from stdit_fast.parallel.groups import SequenceGroup
from stdit_fast.parallel.sequence import FrameSwitch, split_frames


class SharedPredictor(Predictor):
    """A `Predictor` that all ranks of a group call alike, with the same arguments.

    Args:
        model: in evaluation mode, the same on all ranks.
        group: the ranks; videos have at least as many frames.
    """

    def __init__(self, model: STDiT2, group: SequenceGroup):
        super().__init__(model, cuda_graphs=False)
        self.group = group

    def _predict(self, x: Tensor, t: Tensor, x_mask: Tensor | None) -> Tensor:
        switch = FrameSwitch(self.group, x.shape[2])
        own = switch.frames
        with split_frames(self.model, switch):
            part = super()._predict(x[:, :, own], t, None if x_mask is None else x_mask[:, own])
        return _gather_frames(part, switch)


def _gather_frames(part: Tensor, switch: FrameSwitch) -> Tensor:
    """[B, C, T, H, W] of each rank's [B, C, T/n, H, W]."""
    counts = [frames.stop - frames.start for frames in map(switch.frames_of, range(switch.group.size))]
    most = max(counts)
    own = F.pad(part.movedim(2, 0), (0, 0) * 4 + (0, most - part.shape[2])).contiguous()
    whole = own.new_empty(switch.group.size * most, *own.shape[1:])
    dist.all_gather_into_tensor(whole, own, group=switch.group.device)
    frames = torch.cat([piece[:count] for piece, count in zip(whole.split(most), counts, strict=True)])
    return frames.movedim(0, 2).contiguous()
