"""transformers' T5EncoderModel without padding: its own modules and parameters, run by us on packed tokens.

The products run on the real tokens of all captions, q, k and v as one, both halves of the gated MLP as one, the
residual added by the product that leads back to it. For that the parameters of such products are laid side by side in
memory: they stay the model's, as parts of one tensor.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stdit_fast.encoders.weights import hooked
from stdit_fast.kernels.tiles import interpreted
from stdit_fast.ops.packed_text import caption_tiles, gated_gelu, text_rms_norm, text_self_attention

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")


def why_not(model: nn.Module) -> str:
    """Why this T5 encoder cannot be served, where it is now; or an empty string."""
    config = model.config
    if not config.is_gated_act or config.dense_act_fn not in ACTIVATIONS:
        return f"an MLP of {config.feed_forward_proj}, where gated-gelu is needed"
    if config.d_kv < 16 or config.d_kv & (config.d_kv - 1):
        return f"heads of {config.d_kv}, where a power of two from 16 on is needed"
    if hooked(model):
        return "there are hooks on its modules"
    dtypes, devices = {p.dtype for p in model.parameters()}, {p.device for p in model.parameters()}
    if len(dtypes) > 1 or len(devices) > 1:
        return "parameters of several dtypes or on several devices"
    (dtype,), (device,) = dtypes, devices
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"compute capability {major}.{minor}, where 8.0 is needed"
        return "" if dtype == torch.bfloat16 else f"{dtype}, where bf16 is needed"
    return "" if interpreted() else f"parameters on {device.type}, without Triton's interpreter"


class PackedT5:
    """Runs a T5 encoder that `why_not` has nothing against.

    Args:
        model: a T5EncoderModel.
        fused: false: the ops' definitions, for tests.
    """

    def __init__(self, model: nn.Module, fused: bool = True):
        self.model = model
        self.fused = fused

    def __call__(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """Last hidden states [M, C] of captions' tokens, one caption after the other.

        Args:
            ids: int [M], on the CPU; lengths: of the captions, M in all.
        """
        encoder = self.model.encoder
        weight = encoder.embed_tokens.weight
        # Both tables go to the device in one copy.
        tiles = caption_tiles(lengths)
        numbers = torch.cat([ids.int(), tiles.flatten()])
        if weight.is_cuda:
            numbers = numbers.pin_memory().to(weight.device, non_blocking=True)
        ids, tiles = numbers[: len(ids)], numbers[len(ids) :].view(-1, 3)
        x = F.embedding(ids, weight)
        bias = self._bias_by_distance(max(lengths))
        for block in encoder.block:
            x = self._attention(block.layer[0], x, tiles, bias)
            x = self._mlp(block.layer[1], x)
        return self._norm(encoder.final_layer_norm, x)

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        return text_rms_norm(x, norm.weight, norm.variance_epsilon, fused=self.fused)

    def _attention(self, layer: nn.Module, x: Tensor, tiles: Tensor, bias: Tensor) -> Tensor:
        attention = layer.SelfAttention
        weight = side_by_side(attention.q, attention.k, attention.v)
        qkv = F.linear(self._norm(layer.layer_norm, x), weight)
        heads = attention.n_heads
        o = text_self_attention(qkv.view(len(x), 3, heads, -1), tiles, bias, fused=self.fused)
        return x.addmm_(o, attention.o.weight.T)

    def _mlp(self, layer: nn.Module, x: Tensor) -> Tensor:
        mlp = layer.DenseReluDense
        hidden = F.linear(self._norm(layer.layer_norm, x), side_by_side(mlp.wi_0, mlp.wi_1))
        return x.addmm_(gated_gelu(hidden.view(len(x), 2, -1), fused=self.fused), mlp.wo.weight.T)

    def _bias_by_distance(self, length: int) -> Tensor:
        """float32 [H, 2 * length - 1]: the first block's bias, which all share, of key - query from 1 - length on."""
        attention = self.model.encoder.block[0].layer[0].SelfAttention
        table = attention.relative_attention_bias.weight
        distance = torch.arange(1 - length, length, device=table.device)
        buckets = attention._relative_position_bucket(
            distance,
            bidirectional=True,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        return table[buckets].T.float().contiguous()


@torch.no_grad()
def side_by_side(*layers: nn.Linear) -> Tensor:
    """The layers' weights [out, in] of one dtype, one below the other, as one tensor [sum of outs, in] that they are
    parts of from then on."""
    weights = [layer.weight for layer in layers]
    columns = weights[0].shape[1]
    rows = sum(w.shape[0] for w in weights)
    first, at = weights[0], weights[0].data_ptr()
    for w in weights:
        if w.data_ptr() != at or not w.is_contiguous():
            break
        at += w.numel() * w.itemsize
    else:
        # Neighbours may also come from a file, of which each is a part: the storage has to reach from end to end.
        if first.untyped_storage().data_ptr() + first.untyped_storage().nbytes() >= at:
            return first.data.as_strided((rows, columns), (columns, 1))
    whole = torch.cat([w.data for w in weights])
    for layer, part in zip(layers, whole.split([w.shape[0] for w in weights]), strict=True):
        layer.weight.data = part
    return whole
