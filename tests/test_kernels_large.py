"""More than 2^31 elements: offsets that do not fit 32 bits. Needs a GPU with room for them."""

import pytest
import torch
from kernel_checks import relative_error

from stdit_fast import ops
from stdit_fast.kernels import gelu
from stdit_fast.ops.linear_gelu import gelu_input_gradient_op, linear_gelu_op

GIB = 2**30
ROOM = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
pytestmark = pytest.mark.skipif(ROOM < 64 * GIB, reason="needs a GPU with 64 GiB or more")
FEW = 7  # positions at the end that are computed alone, too


@pytest.fixture(autouse=True)
def give_memory_back():
    yield
    torch.cuda.empty_cache()


def randn(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def close(got, want):
    assert relative_error(got, want) < 1e-2


def test_residual_and_norm():
    batch, frames, positions, channels = 2, 4, 240_000, 1152  # 2.2e9 elements
    x, o, mod = randn(batch, frames, positions, channels), randn(1, 1, 1, channels), randn(batch, frames, channels)
    o = o.expand_as(x).contiguous()
    x_new, u = ops.gate_residual_layer_norm_modulate(x, ops.Branch(o, mod), mod, mod, backend="fused")
    part = (slice(1, 2), slice(3, 4), slice(positions - FEW, positions))
    last = mod[1:, 3:]
    want = ops.gate_residual_layer_norm_modulate(x[part], ops.Branch(o[part], last), last, last, backend="reference")
    close(x_new[part], want[0])
    close(u[part], want[1])


def test_gelu():
    h = randn(480_000, 4608)  # 2.2e9 elements
    close(gelu.forward(h)[-FEW:], gelu.forward(h[-FEW:].contiguous()))


def test_linear_gelu():
    x, weight, bias = randn(480_000, 64), randn(4608, 64), randn(4608)  # 2.2e9 hidden values
    activation, hidden = linear_gelu_op(x, weight, bias)
    few = linear_gelu_op(x[-FEW:].contiguous(), weight, bias)
    close(activation[-FEW:], few[0])
    close(hidden[-FEW:], few[1])
    dy, out = randn(480_000, 64), randn(64, 4608)
    few = gelu_input_gradient_op(dy[-FEW:].contiguous(), out, hidden[-FEW:].contiguous())
    close(gelu_input_gradient_op(dy, out, hidden)[-FEW:], few)


def test_temporal_attention():
    qkv = randn(2, 16, 20_000, 3, 16, 72)  # 2.2e9 elements
    rotation = ops.rotation_table(torch.rand(36, device="cuda"), 16)
    o = ops.temporal_attention(qkv, None, None, rotation, backend="fused")
    want = ops.temporal_attention(qkv[1:, :, -FEW:].contiguous(), None, None, rotation, backend="fused")
    close(o[1:, :, -FEW:], want)


def test_spatial_attention():
    weight = torch.ones(72, device="cuda", dtype=torch.bfloat16)
    qkv = randn(2, 1250, 256, 3, 16, 72)  # 2.2e9 elements
    o = ops.spatial_attention(qkv, weight, weight, backend="fused")
    close(o[1:, -2:], ops.spatial_attention(qkv[1:, -2:].contiguous(), weight, weight, backend="fused"))


def test_cross_attention():
    q, kv = randn(2, 940_000, 16, 72), randn(9, 2, 16, 72)  # 2.2e9 elements
    layout = ops.text_layout(torch.tensor([[1] * 4 + [0], [1] * 5]), 2, 5, torch.device("cuda"))
    o = ops.cross_attention(q, kv, layout, backend="fused")
    alone = ops.text_layout(None, 1, 5, torch.device("cuda"))
    close(o[1:, -FEW:], ops.cross_attention(q[1:, -FEW:].contiguous(), kv[4:].contiguous(), alone, backend="fused"))
