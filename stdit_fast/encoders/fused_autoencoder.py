"""The encoder of diffusers' AutoencoderKL on the passes of `ops/frames.py`: its own modules and parameters, run by us.

Every convolution is the library's and takes and leaves pictures with channels last. Between two of them there is one
pass for the statistics, which also adds bias and residual, and one for GroupNorm and SiLU.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stdit_fast.encoders.weights import hooked
from stdit_fast.ops.frames import (
    Frames,
    enter_frames,
    frame_statistics,
    group_norm_silu,
    pictures,
    place_frames,
    unserved,
)
from stdit_fast.ops.wide_attention import wide_attention

TOKENS_MULTIPLE = 8  # of the attention, so that the products' rows are aligned


class _Prepared(NamedTuple):
    """Parameters in the kernels' order, and what they were made of."""

    made_of: tuple
    values: tuple[Tensor, ...]


def why_not(vae: nn.Module) -> str:
    """Why this autoencoder's encoder cannot be served by the kernels, where it is now; or an empty string."""
    encoder = vae.encoder
    if vae.use_slicing or vae.use_tiling:
        return "slicing or tiling is switched on"
    if hooked(vae):
        return "there are hooks on its modules"
    for name, module in encoder.named_modules():
        if reason := _unknown(module):
            return f"{name or 'the encoder'}: {reason}"
    norms = [m for m in encoder.modules() if isinstance(m, nn.GroupNorm)]
    widths = tuple({m.num_channels for m in norms})
    if any(m.num_groups & (m.num_groups - 1) for m in norms):
        return f"{norms[0].num_groups} groups, where a power of two is needed"
    parameter = encoder.conv_in.weight
    if any(p.dtype != parameter.dtype for p in encoder.parameters()):
        return "parameters of several dtypes"
    return unserved(parameter.device, parameter.dtype, widths, max(m.num_groups for m in norms))


def _unknown(module: nn.Module) -> str:
    """What of a module `FusedEncoder` does not know."""
    kind = type(module).__name__
    if kind not in _KNOWN:
        return f"{kind} is not known"
    if kind == "ResnetBlock2D":
        plain = module.time_emb_proj is None and module.upsample is None and module.downsample is None
        return "" if plain and module.output_scale_factor == 1 else "it is no plain residual block"
    if kind == "Attention":
        plain = module.heads == 1 and module.residual_connection and module.rescale_output_factor == 1
        plain = plain and module.group_norm is not None and module.to_q.bias is not None
        return "" if plain and module.spatial_norm is None and module.norm_q is None else "it is no plain attention"
    if kind == "Downsample2D":
        return "" if module.use_conv and module.padding == 0 and module.norm is None else "another downsampling"
    if kind == "Conv2d":
        how = (module.kernel_size, module.stride, module.padding)
        known = how in (((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (0, 0)), ((1, 1), (1, 1), (0, 0)))
        plain = (
            module.padding_mode == "zeros"
            and module.groups == 1
            and module.dilation == (1, 1)
            and module.bias is not None
        )
        return "" if known and plain else f"{module} is not known"
    return ""


_KNOWN = {
    "Encoder", "ModuleList", "Conv2d", "DownEncoderBlock2D", "UNetMidBlock2D", "ResnetBlock2D", "Downsample2D",
    "Attention", "GroupNorm", "SiLU", "Dropout", "Linear",
}  # fmt: skip


class FusedEncoder:
    """Runs `vae.encoder` and its `quant_conv`.

    Args:
        vae: an AutoencoderKL that `why_not` has nothing against.
        fused: false: the ops' definitions, for tests.
    """

    def __init__(self, vae: nn.Module, fused: bool = True):
        self.vae = vae
        self.fused = fused
        self._prepared: dict[int, _Prepared] = {}

    def __call__(self, frames: Tensor) -> Tensor:
        """Moments [N, 2 * latent channels, H/8, W/8], in the network's dtype, of frames [N, 3, H, W]."""
        encoder = self.vae.encoder
        x = enter_frames(frames, encoder.conv_in.weight, encoder.conv_in.bias, fused=self.fused)
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                x = self._resnet(resnet, x)
            for downsampler in block.downsamplers or ():
                x = self._halve(downsampler.conv, x)
        middle = encoder.mid_block
        x = self._resnet(middle.resnets[0], x)
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            if attention is not None:
                x = self._attention(attention, x)
            x = self._resnet(resnet, x)
        out = self._conv(encoder.conv_out, self._norm(encoder.conv_norm_out, x))
        moments = pictures(out) + encoder.conv_out.bias.view(-1, 1, 1)
        if self.vae.quant_conv is not None:
            moments = self.vae.quant_conv(moments)
        return moments

    def _norm(self, norm: nn.GroupNorm, x: Frames, **how) -> Tensor:
        return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, fused=self.fused, **how)

    def _resnet(self, block: nn.Module, x: Frames) -> Frames:
        hidden = self._conv(block.conv1, self._norm(block.norm1, x))
        hidden = self._norm(block.norm2, frame_statistics(hidden, block.conv1.bias, fused=self.fused))
        out = self._conv(block.conv2, hidden)
        del hidden  # tensors of a whole micro-batch: none stays longer than it must
        residual, bias = x.data, block.conv2.bias
        if block.conv_shortcut is not None:
            shortcut = block.conv_shortcut
            residual = F.linear(residual, shortcut.weight.flatten(1))
            (bias,) = self._ready(shortcut, (bias, shortcut.bias), lambda: (bias.float() + shortcut.bias.float(),))
        return place_frames(out.flatten(1, 2), bias, x.size, residual, row_pitch=x.size[1] + 1, fused=self.fused)

    def _halve(self, conv: nn.Conv2d, x: Frames) -> Frames:
        """The zeros that this convolution wants on the right and below are there already."""
        out = self._conv(conv, x.data)
        return place_frames(out.flatten(1, 2), conv.bias, (out.shape[1], out.shape[2]), fused=self.fused)

    def _attention(self, attention: nn.Module, x: Frames) -> Frames:
        height, width = x.size
        pixels = height * width
        tokens = -(-pixels // TOKENS_MULTIPLE) * TOKENS_MULTIPLE
        u = self._norm(attention.group_norm, x, silu=False, tokens=tokens)
        qkv = F.linear(u, *self._qkv(attention))
        o = F.linear(wide_attention(qkv, pixels, fused=self.fused), attention.to_out[0].weight)
        return place_frames(o, attention.to_out[0].bias, (height, width), x.data, fused=self.fused)

    def _conv(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """The convolution without its bias, of [N, h, w, C] with channels last; its own padding."""

        def prepare() -> tuple[Tensor]:
            return (conv.weight.contiguous(memory_format=torch.channels_last),)

        (weight,) = self._ready(conv, (conv.weight,), prepare)
        out = F.conv2d(x.permute(0, 3, 1, 2), weight, stride=conv.stride, padding=conv.padding).permute(0, 2, 3, 1)
        return out.contiguous()

    # ------------------------------------------------------------ parameters

    def _qkv(self, attention: nn.Module) -> tuple[Tensor, Tensor]:
        layers = (attention.to_q, attention.to_k, attention.to_v)
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        return self._ready(attention, (*weights, *biases), lambda: (torch.cat(weights), torch.cat(biases)))

    def _ready(self, module: nn.Module, parameters: tuple[Tensor, ...], prepare) -> tuple[Tensor, ...]:
        """What `prepare` makes of the parameters, kept as long as they stay what they are."""
        made_of = tuple((p.data_ptr(), p._version, p.dtype) for p in parameters)
        found = self._prepared.get(id(module))
        if found is None or found.made_of != made_of:
            found = self._prepared[id(module)] = _Prepared(made_of, prepare())
        return found.values
