"""Between pixels as files hold them and videos as the model sees them."""

import numpy as np
import torch
from torch import Tensor


def from_pixels(pixels: np.ndarray | Tensor) -> Tensor:
    """uint8 [..., T, H, W, 3] to float32 [..., 3, T, H, W] in [-1, 1], on the same device."""
    if isinstance(pixels, Tensor) and pixels.is_cuda:
        channels_first = pixels.movedim(-1, -4).contiguous()
    else:  # NumPy is twice as fast at it
        channels_first = torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(pixels), -1, -4)))
    return channels_first.to(torch.float32).div_(127.5).sub_(1)


def to_pixels(video: Tensor) -> np.ndarray:
    """Float [3, T, H, W] in [-1, 1], on any device, to uint8 [T, H, W, 3]; values beyond are cut."""
    values = ((video.detach().float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return values.permute(1, 2, 3, 0).contiguous().numpy()
