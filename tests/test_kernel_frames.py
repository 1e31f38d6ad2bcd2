"""The autoencoder's kernels against their definitions: odd sizes, borders, statistics, several pictures."""

import pytest
import torch
from kernel_checks import check_forward, dtypes, randn

from stdit_fast.kernels import frames as kernels
from stdit_fast.ops import frames as ops
from stdit_fast.ops import wide_attention as attention
from stdit_fast.ops.wide_attention import wide_attention


def tensors(x: ops.Frames) -> tuple[torch.Tensor, torch.Tensor]:
    return x.data, x.statistics


@dtypes
@pytest.mark.parametrize(("count", "channels", "height", "width", "c_out"), [(2, 3, 7, 6, 16), (1, 1, 1, 9, 32)])
def test_first_convolution(count, channels, height, width, c_out, dtype):
    """From a part of a video, whose frames lie apart."""
    inputs = {
        "x": randn(count, channels, 3, height, 2 * width)[:, :, 1, :, ::2],
        "weight": randn(c_out, channels, 3, 3, seed=1, scale=0.3),
        "bias": randn(c_out, seed=2),
    }

    def run(fused):
        return lambda **inputs: tensors(ops.enter_frames(**inputs, fused=fused))

    data, _ = check_forward(run(True), run(False), inputs, dtype)
    assert not data[:, -1].any() and not data[:, :, -1].any()


@dtypes
@pytest.mark.parametrize(
    ("count", "height", "width", "channels", "pitch", "residual"),
    [(2, 5, 130, 16, 130, True), (3, 1, 1, 32, 1, False), (2, 9, 7, 64, 8, True), (1, 12, 40, 256, 41, False)],
)
def test_rows_into_the_layout(monkeypatch, count, height, width, channels, pitch, residual, dtype):
    """From rows with and without borders; tiles that end in a picture, with it, and on its border."""
    monkeypatch.setitem(kernels.TUNING, "walk_elements", 1024)
    inputs = {
        "src": randn(count, height * pitch + 3, channels),
        "bias": randn(channels, seed=1),
        "residual": ops.lay(randn(count, channels, height, width, seed=2)) if residual else None,
    }

    def run(fused):
        def call(src, bias, residual):
            return tensors(ops.place_frames(src, bias, (height, width), residual, row_pitch=pitch, fused=fused))

        return call

    data, _ = check_forward(run(True), run(False), inputs, dtype)
    assert not data[:, -1].any() and not data[:, :, -1].any()


@dtypes
@pytest.mark.parametrize(("lanes", "sizes"), [(256, (2, 32, 3, 5)), (4, (1, 16, 30, 33))])
def test_statistics(monkeypatch, lanes, sizes, dtype):
    """What the border holds does not count."""
    monkeypatch.setattr(kernels, "STATISTICS_TILES", lanes)
    monkeypatch.setitem(kernels.TUNING, "walk_elements", 512)
    data = ops.lay(randn(*sizes))
    data[:, -1] = data[:, :, -1] = 1e4
    check_forward(
        lambda data, shift: ops.frame_statistics(data, shift).statistics,
        lambda data, shift: ops.frame_statistics(data, shift, fused=False).statistics,
        {"data": data, "shift": randn(sizes[1], seed=1)},
        dtype,
    )


@dtypes
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("groups", "tokens"), [(8, 0), (1, 40), (16, 35)])
@pytest.mark.parametrize("shifted", [True, False])
def test_normalisation(groups, tokens, silu, shifted, dtype):
    channels, height, width = 16, 5, 7
    data = ops.lay(randn(2, channels, height, width) + 3 * randn(2, channels, 1, 1, seed=4))
    if shifted:
        data[:, -1] = data[:, :, -1] = 1e4
    inputs = {"data": data, "shift": randn(channels, seed=3) if shifted else None}
    inputs |= {"weight": randn(channels, seed=1), "bias": randn(channels, seed=2)}

    def run(fused):
        def call(data, shift, weight, bias):
            moved = ops.pictures(data) if shift is None else ops.pictures(data) + shift.view(-1, 1, 1)
            given = ops.Frames(data, ops._with_statistics(moved)[1], shift)
            return ops.group_norm_silu(given, weight, bias, groups, 1e-6, silu=silu, tokens=tokens, fused=fused)

        return call

    (out,) = check_forward(run(True), run(False), inputs, dtype)
    border = out[:, height * width :] if tokens else torch.cat([out[:, -1], out[:, :, -1]], 1)
    assert not border.any()


def test_statistics_of_values_far_from_zero():
    """A deviation of 1 around a mean of 3,000: a difference of sums of squares in float32 would have no digit left."""
    data, shift = ops.lay(randn(2, 16, 50, 61)), randn(16, seed=1) + 3000
    mean, variance = ops.frame_statistics(data, shift).statistics.double().unbind(1)
    want_mean, want_variance = ops.frame_statistics(data.double(), shift.double(), fused=False).statistics.unbind(1)
    torch.testing.assert_close(mean, want_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(variance, want_variance, rtol=2e-3, atol=0)


@dtypes
@pytest.mark.parametrize("room", [2**28, 2 * 24 * 24, 240])
def test_attention_of_one_wide_head(monkeypatch, room, dtype):
    """All pictures at once, some, and parts of one."""
    monkeypatch.setattr(attention, "MAX_SCORES", room)
    check_forward(
        lambda qkv: wide_attention(qkv, 21)[:, :21],
        lambda qkv: wide_attention(qkv, 21, fused=False)[:, :21],
        {"qkv": randn(3, 24, 3 * 16)},
        dtype,
    )


def test_registered_ops():
    data, bias = ops.lay(randn(1, 16, 3, 4)), randn(16, seed=1)
    statistics = ops.frame_statistics(data, bias).statistics
    checks = [
        (ops._enter_op, (randn(1, 3, 4, 5), randn(16, 3, 3, 3), bias)),
        (ops._place_op, (randn(1, 14, 16), bias, data, 3, 4, 4)),
        (ops._statistics_op, (data, bias)),
        (ops._norm_op, (data, statistics, None, bias, bias + 1, 4, 1e-6, True, 0)),
        (ops._norm_op, (data, statistics, bias, bias, bias + 1, 4, 1e-6, False, 16)),
        (attention._op, (randn(2, 8, 48), 7)),
    ]
    for op, arguments in checks:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_shapes_that_do_not_fit():
    data, bias = ops.lay(randn(1, 16, 3, 4)), randn(16, seed=1)
    with pytest.raises(ValueError, match="enter_frames: weight"):
        ops.enter_frames(randn(1, 3, 4, 5), randn(16, 4, 3, 3), bias)
    with pytest.raises(ValueError, match="frame_statistics: shift"):
        ops.frame_statistics(data, bias[:8])
    with pytest.raises(ValueError, match="place_frames: residual"):
        ops.place_frames(randn(1, 12, 16), bias, (3, 4), data[:, :-1])
    with pytest.raises(ValueError, match="too few for"):
        ops.place_frames(randn(1, 11, 16), bias, (3, 4))
    x = ops.frame_statistics(data, bias)
    with pytest.raises(ValueError, match="16 channels do not go into 5 groups"):
        ops.group_norm_silu(x, bias, bias, 5, 1e-6)
    with pytest.raises(ValueError, match=r"11 tokens for 3 \* 4 pixels"):
        ops.group_norm_silu(x, bias, bias, 4, 1e-6, tokens=11)
    with pytest.raises(ValueError, match="with 9 keys"):
        wide_attention(randn(1, 8, 48), 9)


def test_what_is_not_served_is_said():
    cpu = torch.device("cpu")
    assert "24 channels" in ops.unserved(cpu, torch.float32, (16, 24))
    assert "8 channels" in ops.unserved(cpu, torch.float32, (8,))
    assert "in 32 groups" in ops.unserved(cpu, torch.float32, (16,), groups=32)
