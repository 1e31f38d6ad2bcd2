"""Videos written and read back: what is in them, and that they appear whole or not at all."""

import json
import os
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from stdit_fast.errors import ConfigError
from stdit_fast.media import write
from stdit_fast.media.pixels import from_pixels, to_pixels
from stdit_fast.media.read import decode_clip, probe
from stdit_fast.media.write import VideoWriter, read_metadata

DATA = Path(__file__).parent / "data"
SUFFIXES = [".mp4", ".gif", ".png"]
METADATA = {"prompt": 'a "sea" 海 \U0001f30a', "settings": json.dumps({"seed": 42, "scale": 7.5}), "long": "x" * 700}


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    return decode_clip(DATA / "carphone_pristine.mp4", start=0, num_frames=12, frame_interval=1, height=144, width=176)


def write_video(path: Path, *chunks, fps: float = 25, metadata: dict | None = None) -> Path:
    with VideoWriter(path, fps, metadata) as writer:
        for chunk in chunks:
            writer.write(chunk)
    return path


def animation(path: Path) -> tuple[np.ndarray, list[float]]:
    """Frames, uint8 [T, H, W, 3], and their durations in milliseconds."""
    with Image.open(path) as image:
        frames = [(np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(image)]
    pixels, durations = zip(*frames, strict=True)
    return np.stack(pixels), list(durations)


def test_pixels_there_and_back(clip):
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    video = from_pixels(pixels)
    assert video.shape == (3, 1, 16, 16) and video.min() == -1 and video.max() == 1
    np.testing.assert_array_equal(to_pixels(video), pixels)
    assert to_pixels(torch.tensor([-1.5, 0.0, 3.0]).view(3, 1, 1, 1)).tolist() == [[[[0, 128, 255]]]]


def test_mp4_reads_back_close(tmp_path, clip):
    path = write_video(tmp_path / "new" / "a.mp4", clip[:, :5], clip[:, 5:6], clip[:, 6:], fps=30000 / 1001)
    assert probe(path) == (12, 144, 176, pytest.approx(30000 / 1001, rel=1e-6))
    back = decode_clip(path, start=0, num_frames=12, frame_interval=1, height=144, width=176)
    assert (back - clip).abs().mean() < 4 / 127.5
    assert (back - clip).mean((1, 2, 3)).abs().max() < 1 / 127.5  # neither darker nor of another tint
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)  # BT.709, studio range
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays before all of it is there


def test_colours_of_mp4_survive(tmp_path):
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128)])
    frame = np.repeat(np.repeat(colours[None, None].astype(np.uint8), 32, axis=1), 32, axis=2)
    path = write_video(tmp_path / "a.mp4", frame)
    back = to_pixels(decode_clip(path, start=0, num_frames=1, frame_interval=1, height=32, width=192))[0]
    assert np.abs(back[16, 16::32].astype(int) - colours).max() <= 4


def test_mp4_without_libx264(tmp_path, clip, monkeypatch):
    monkeypatch.setattr(write.av, "codecs_available", av.codecs_available - {"libx264"})
    path = write_video(tmp_path / "a.mp4", clip, metadata=METADATA)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    back = decode_clip(path, start=0, num_frames=12, frame_interval=1, height=144, width=176)
    assert (back - clip).abs().mean() < 4 / 127.5
    assert read_metadata(path) == METADATA


def test_odd_sizes(tmp_path, clip):
    odd = clip[:, :3, :143, :175]
    path = write_video(tmp_path / "a.mp4", odd)
    assert probe(path)[:3] == (3, 144, 176)
    back = decode_clip(path, start=0, num_frames=3, frame_interval=1, height=144, width=176)
    assert (back[..., :143, :175] - odd).abs().mean() < 4 / 127.5
    assert (back[..., -1, :] - back[..., -2, :]).abs().mean() < 4 / 127.5
    for suffix in (".gif", ".png"):
        assert animation(write_video(tmp_path / f"a{suffix}", odd))[0].shape == (3, 143, 175, 3)


def test_gif(tmp_path, clip):
    path = write_video(tmp_path / "a.gif", clip[:, :7], clip[:, 7:], fps=24)
    pixels, durations = animation(path)
    assert pixels.shape == (12, 144, 176, 3)
    assert np.abs(pixels.astype(int) - to_pixels(clip)).mean() < 4
    assert durations == [40, 40, 40, 50, 40, 40, 40, 40, 50, 40, 40, 40]  # 4.17 hundredths of a second
    with Image.open(path) as image:
        assert image.info["loop"] == 0
    assert animation(write_video(tmp_path / "fast.gif", clip[:, :3], fps=100))[1] == [20, 20, 20]
    # each frame has a palette of its own: 512 colours, 64 a frame, are exact
    numbers = np.arange(512, dtype=np.uint16).reshape(8, 8, 8)
    colours = np.stack([numbers % 8 * 36, numbers // 8 % 8 * 36, numbers // 64 * 36], axis=-1).astype(np.uint8)
    np.testing.assert_array_equal(animation(write_video(tmp_path / "colours.gif", colours))[0], colours)


def test_png_of_one_frame_is_an_image(tmp_path, clip):
    path = write_video(tmp_path / "a.png", clip[:, :1], metadata=METADATA)
    with Image.open(path) as image:
        assert image.format == "PNG" and not image.is_animated
        assert image.text == {"Title": METADATA["prompt"], "Comment": json.dumps(METADATA)}
        np.testing.assert_array_equal(np.asarray(image), to_pixels(clip[:, :1])[0])
    assert b"acTL" not in path.read_bytes()


def test_png_of_several_frames_is_animated(tmp_path, clip):
    path = write_video(tmp_path / "a.png", *clip.split(1, dim=1), fps=24)
    pixels, durations = animation(path)
    np.testing.assert_array_equal(pixels, to_pixels(clip))
    assert durations == pytest.approx([1000 / 24] * 12)
    with Image.open(path) as image:
        assert image.n_frames == 12 and image.info["loop"] == 0
        image.verify()  # every chunk's checksum


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("count", [1, 3])
def test_metadata_come_back(tmp_path, clip, suffix, count):
    path = write_video(tmp_path / f"a{suffix.upper()}", clip[:, :count], metadata=METADATA)
    assert read_metadata(path) == METADATA
    bare = write_video(tmp_path / f"b{suffix}", clip[:, :count])
    assert read_metadata(bare) == {}


def test_title_of_mp4(tmp_path, clip):
    with av.open(str(write_video(tmp_path / "a.mp4", clip, metadata=METADATA))) as container:
        assert container.metadata["title"] == METADATA["prompt"]
        assert json.loads(container.metadata["comment"]) == METADATA


def test_metadata_of_other_files(tmp_path):
    assert read_metadata(DATA / "bikes.mp4") == {}
    for comment in (b"by hand", b"[1]", b"\xff"):
        Image.new("RGB", (8, 8)).save(tmp_path / "a.gif", comment=comment)
        assert read_metadata(tmp_path / "a.gif") == {}
    (tmp_path / "noise.mp4").write_bytes(b"no video" * 99)
    (tmp_path / "noise.png").write_bytes(b"no image" * 99)
    for name, reason in (("noise.mp4", "corrupt"), ("noise.png", "corrupt"), ("nowhere.gif", "vanished")):
        with pytest.raises(ConfigError, match=f"path = .*{name}': {reason}"):
            read_metadata(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_arrays_and_tensors_give_the_same_file(tmp_path, clip, suffix):
    tensor = write_video(tmp_path / f"a{suffix}", clip)
    array = write_video(tmp_path / f"b{suffix}", to_pixels(clip))
    assert tensor.read_bytes() == array.read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_file_grows_with_the_frames(tmp_path, suffix):
    rng = np.random.default_rng(0)
    sizes = []
    with VideoWriter(tmp_path / f"a{suffix}", 24) as writer:
        for _ in range(4):
            writer.write(rng.integers(0, 256, (80, 64, 64, 3), dtype=np.uint8))
            (draft,) = tmp_path.iterdir()
            assert draft.name.startswith(".")
            sizes.append(draft.stat().st_size)
    final = (tmp_path / f"a{suffix}").stat().st_size
    assert sizes == sorted(sizes) and sizes[1] > final / 4 and sizes[3] > final / 2


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("count", [0, 1, 2])
def test_an_exception_leaves_nothing(tmp_path, clip, suffix, count):
    path = tmp_path / f"a{suffix}"
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, 24) as writer:
        if count:
            writer.write(clip[:, :count])
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_exception_leaves_what_was_there(tmp_path, clip, suffix):
    path = write_video(tmp_path / f"a{suffix}", clip)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"frames of \[8, 8\] \(height, width\) after those of \[144, 176\]"):
        write_video(path, clip[:, :2], clip[..., :8, :8])
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    write_video(path, clip[:, :2])
    assert path.read_bytes() != before and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_without_frames_is_refused(tmp_path, suffix):
    for chunks in ([], [np.empty((0, 8, 8, 3), np.uint8)]):
        with pytest.raises(ValueError, match="no frame was written"):
            write_video(tmp_path / f"a{suffix}", *chunks)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "frames, found",
    [
        (np.zeros((2, 8, 8, 3)), "ndarray of float64 [2, 8, 8, 3]"),
        (np.zeros((8, 8, 3), np.uint8), "ndarray of uint8 [8, 8, 3]"),
        (np.zeros((2, 8, 8, 4), np.uint8), "ndarray of uint8 [2, 8, 8, 4]"),
        (torch.zeros(2, 3, 8, 8), "Tensor of torch.float32 [2, 3, 8, 8]"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "Tensor of torch.uint8 [2, 8, 8, 3]"),
    ],
)
def test_frames_of_another_form_are_refused(tmp_path, frames, found):
    with pytest.raises(ValueError, match=re.escape(f"float tensor [3, T, H, W], not a {found}")):
        write_video(tmp_path / "a.png", frames)


@pytest.mark.parametrize(
    "path, fps, message",
    [
        ("a.avi", 24, "path = 'a.avi': the name must end with one of .mp4, .gif, .png"),
        ("mp4", 24, "path = 'mp4': the name must end with"),
        ("a.mp4", 0, "fps = 0: use a number of frames a second from 0.1 to 1000"),
        ("a.mp4", 1001, "fps = 1001: use a number"),
        ("a.mp4", float("nan"), "fps = nan: use a number"),
    ],
)
def test_writers_that_cannot_be(path, fps, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        VideoWriter(path, fps)


@pytest.mark.parametrize("fps", [0.1, 7.5, 1000])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_slow_and_fast(tmp_path, clip, fps, suffix):
    path = write_video(tmp_path / f"a{suffix}", clip[:, :3], fps=fps)
    if suffix == ".mp4":
        assert probe(path).fps == pytest.approx(fps)
    else:
        expected = max(20, 1000 / fps) if suffix == ".gif" else 1000 / fps
        assert np.mean(animation(path)[1]) == pytest.approx(expected, abs=5 if suffix == ".gif" else 0.01)
