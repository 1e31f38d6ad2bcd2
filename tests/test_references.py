import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stdit_fast.errors import ConfigError
from stdit_fast.media.pixels import from_pixels
from stdit_fast.media.read import decode_clip, decode_image
from stdit_fast.media.write import VideoWriter
from stdit_fast.sample.references import load_reference, reference_frames

DATA = Path(__file__).parent / "data"
CLIP = DATA / "carphone_pristine.mp4"


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Path:
    """A clip of 20 frames at 10 a second; frame i is a flat grey of 10 * i."""
    path = tmp_path_factory.mktemp("clip") / "numbered.mp4"
    with VideoWriter(path, 10) as writer:
        writer.write(np.broadcast_to(10 * np.arange(20, dtype=np.uint8)[:, None, None, None], (20, 32, 48, 3)).copy())
    return path


def shown(video: torch.Tensor) -> list[int]:
    return [round(grey / 10) for grey in ((video.mean((0, 2, 3)) + 1) * 127.5).tolist()]


@pytest.fixture(scope="module")
def photograph(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "a.png"
    frame = decode_clip(CLIP, start=0, num_frames=1, frame_interval=1, height=144, width=176)
    with VideoWriter(path, 1) as writer:
        writer.write(frame)
    return path


def test_a_clip_is_read_as_in_training():
    video = load_reference(CLIP, 64, 96)
    assert video.dtype == torch.float32 and video.shape == (3, 120, 64, 96)
    expected = decode_clip(CLIP, start=0, num_frames=120, frame_interval=1, height=64, width=96)
    assert torch.equal(video, expected)
    assert torch.equal(load_reference(str(CLIP), 64, 96, max_frames=7), expected[:, :7])
    assert reference_frames(CLIP) == reference_frames(str(CLIP)) == 120


@pytest.mark.parametrize(
    "fps, frames",
    [
        (None, list(range(20))),
        (10, list(range(20))),
        (5, list(range(0, 20, 2))),
        (20, [0, *(i for i in range(1, 20) for _ in range(2)), 19]),
        (4, [0, 3, 5, 8, 10, 13, 15, 18]),
        (0.01, [0]),
    ],
)
def test_another_frame_rate(numbered, fps, frames):
    video = load_reference(numbered, 32, 48, fps=fps)
    assert shown(video) == frames
    assert reference_frames(numbered, fps=fps) == len(frames)
    assert shown(load_reference(numbered, 32, 48, max_frames=3, fps=fps)) == frames[:3]


def test_an_animation_is_a_clip(tmp_path):
    with VideoWriter(tmp_path / "a.gif", 29.97) as writer:
        writer.write(np.broadcast_to(10 * np.arange(24, dtype=np.uint8)[:, None, None, None], (24, 32, 48, 3)).copy())
    assert reference_frames(tmp_path / "a.gif") == 24
    assert shown(load_reference(tmp_path / "a.gif", 16, 16)) == list(range(24))


def test_an_image_by_path_by_pillow_and_as_a_tensor(photograph):
    expected = decode_image(photograph, height=64, width=48)
    assert torch.equal(load_reference(photograph, 64, 48), expected)
    with Image.open(photograph) as image:
        assert torch.equal(load_reference(image, 64, 48), expected)
        assert reference_frames(image) == reference_frames(photograph) == 1
        pixels = from_pixels(np.asarray(image)[None])
    for tensor in (pixels, pixels[:, 0], pixels.double()):
        found = load_reference(tensor, 64, 48)
        assert found.shape == (3, 1, 64, 48) and found.dtype == torch.float32
        # Pillow rounds to 8 bits between its two passes
        assert (found - expected).abs().max() < 2.5 / 127.5
        assert reference_frames(tensor) == 1


def test_the_tag_and_the_mode_of_a_pillow_image_are_followed(tmp_path):
    left_white = np.zeros((20, 40), np.uint8)
    left_white[:, :20] = 255
    image = Image.fromarray(left_white)
    image.getexif()[0x0112] = 6  # to be shown a quarter turn clockwise
    found = load_reference(image, 40, 20)
    assert found[:, 0, 5].min() == 1 and found[:, 0, 35].max() == -1


def test_tensors_of_the_right_size_are_only_cropped_and_cut():
    video = torch.rand(3, 5, 24, 24) * 2 - 1
    assert torch.equal(load_reference(video, 24, 24), video)
    assert torch.equal(load_reference(video, 24, 16, max_frames=2), video[:, :2, :, 4:20])
    assert reference_frames(video) == 5
    enlarged = load_reference(video.sign(), 48, 48)
    assert enlarged.shape == (3, 5, 48, 48) and enlarged.abs().max() <= 1  # bicubic overshoots


@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.zeros(1, 4, 8, 8), "reference_path = 'torch.float32 [1, 4, 8, 8]': a tensor must be of floats"),
        (torch.zeros(8, 8), "'torch.float32 [8, 8]': a tensor must be of floats"),
        (torch.zeros(3, 0, 8, 8), "'torch.float32 [3, 0, 8, 8]': a tensor must be of floats"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "'torch.uint8 [3, 8, 8]': a tensor must be of floats"),
        (torch.full((3, 8, 8), 255.0), "'values from 255 to 255': a tensor's values must lie in [-1, 1]"),
        (torch.full((3, 8, 8), torch.nan), "'values from nan to nan': a tensor's values must lie in [-1, 1]"),
    ],
)
def test_tensors_that_are_no_references(tensor, message):
    for function in (lambda: load_reference(tensor, 8, 8), lambda: reference_frames(tensor)):
        with pytest.raises(ConfigError, match=re.escape(message)):
            function()


def test_files_that_cannot_be_read(tmp_path):
    for suffix in (".png", ".mp4"):
        (tmp_path / f"noise{suffix}").write_bytes(b"noise" * 500)
        (tmp_path / f"empty{suffix}").touch()
        for name, reason in (("nowhere", "vanished: no such file"), ("noise", "corrupt: "), ("empty", "empty: ")):
            path = tmp_path / f"{name}{suffix}"
            for function in (load_reference, lambda path, *size: reference_frames(path)):
                with pytest.raises(ConfigError, match=re.escape(f"reference_path = {str(path)!r}: {reason}")):
                    function(path, 32, 32)


def test_a_damaged_pillow_image(tmp_path, photograph):
    cut = tmp_path / "cut.png"
    cut.write_bytes(photograph.read_bytes()[:2000])
    with (
        Image.open(cut) as image,
        pytest.raises(ConfigError, match="(?s)reference_path = <PIL.*the image cannot be read"),
    ):
        load_reference(image, 32, 32)


def test_what_is_no_reference(numbered):
    for function in (lambda: load_reference(7, 32, 32), lambda: reference_frames(7)):
        with pytest.raises(ConfigError, match="reference_path = 7: use a path, an image, or a tensor"):
            function()
    for fps in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=f"fps = {fps}: use a number of frames a second above 0"):
            load_reference(numbered, 32, 32, fps=fps)
