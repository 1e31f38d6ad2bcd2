"""The T5 encoder's kernels against their definitions: captions of uneven length, odd widths."""

import pytest
import torch
from kernel_checks import check_forward, dtypes, randn

from stdit_fast.ops import packed_text as ops


def attention_case(lengths, heads, head_dim, longest) -> dict:
    return {
        "qkv": randn(sum(lengths), 3, heads, head_dim, scale=0.5),
        "tiles": ops.caption_tiles(lengths).to(randn(1).device),
        "bias": randn(heads, 2 * longest - 1, seed=1),
    }


@dtypes
@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim", "longest"),
    [((5, 1, 70, 3), 2, 16, 70), ((2,), 3, 64, 9), ((130, 64, 65), 1, 32, 200)],
    ids=["uneven", "one", "long"],
)
def test_attention(lengths, heads, head_dim, longest, dtype):
    """Captions see themselves alone; the table of distances may be longer than any caption."""

    def run(fused):
        # The bias is float32 whatever the model computes in.
        return lambda qkv, tiles, bias: ops.text_self_attention(
            qkv, tiles, bias.to(torch.promote_types(qkv.dtype, torch.float32)), fused
        )

    check_forward(run(True), run(False), attention_case(lengths, heads, head_dim, longest), dtype)


def test_tiles_of_captions():
    assert ops.caption_tiles([64, 3, 65]).tolist() == [[0, 64, 0], [64, 3, 0], [67, 65, 0], [67, 65, 64]]
    assert ops.caption_tiles([]).shape == (0, 3)


@dtypes
@pytest.mark.parametrize(("rows", "columns"), [(5, 24), (3, 1000)])
def test_rms_norm(rows, columns, dtype):
    inputs = {"x": 30 * randn(rows, columns), "weight": randn(columns, seed=1)}
    check_forward(
        lambda **given: ops.text_rms_norm(**given, eps=1e-6),
        lambda **given: ops.text_rms_norm(**given, eps=1e-6, fused=False),
        inputs,
        dtype,
    )


@dtypes
@pytest.mark.parametrize(("rows", "columns"), [(4, 40), (2, 3000)])
def test_gated_gelu(rows, columns, dtype):
    """Also where its exponential overflows or vanishes."""
    h = 3 * randn(rows, 2, columns)
    h[0, 0, :4] = torch.tensor([30.0, -30.0, 0.0, 1e-4])
    check_forward(ops.gated_gelu, lambda h: ops.gated_gelu(h, fused=False), {"h": h}, dtype)


def test_registered_ops():
    checks = [
        (ops._attend_op, tuple(attention_case((3, 2), 1, 16, 4).values())),
        (ops._norm_op, (randn(2, 8), randn(8, seed=1), 1e-6)),
        (ops._gelu_op, (randn(2, 2, 8),)),
    ]
    for op, arguments in checks:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_shapes_that_do_not_fit():
    case = attention_case((3, 2), 2, 16, 4)
    with pytest.raises(ValueError, match="text_self_attention: bias"):
        ops.text_self_attention(case["qkv"], case["tiles"], case["bias"][:1])
    with pytest.raises(ValueError, match="text_rms_norm: weight"):
        ops.text_rms_norm(randn(2, 8), randn(7), 1e-6)
    with pytest.raises(ValueError, match="gated_gelu: h"):
        ops.gated_gelu(randn(2, 3, 8))
