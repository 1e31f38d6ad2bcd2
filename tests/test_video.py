import shutil
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import torch
from av.video.reformatter import Interpolation
from PIL import Image

from stdit_fast.media.read import BadSample, cover, decode_clip, decode_image, is_image, probe

DATA = Path(__file__).parent / "data"
BICUBIC = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT

# name: frames, source size, size asked for, size that covers it, left edge of the crop
CLIPS = {
    "bigbuckbunny": (132, (720, 1280), (72, 120), (72, 128), 4),
    "bikes": (250, (272, 640), (64, 64), (64, 151), 43),
    "carphone_pristine": (120, (144, 176), (72, 80), (72, 88), 4),
}


@pytest.fixture(scope="module", params=sorted(CLIPS))
def clip(request):
    """(name, every frame of the clip decoded in sequence, resized and cropped by hand)."""
    _, _, (height, width), (full_height, full_width), left = CLIPS[request.param]
    frames = []
    with av.open(str(DATA / f"{request.param}.mp4")) as container:
        for frame in container.decode(video=0):
            resized = frame.reformat(full_width, full_height, "rgb24", interpolation=BICUBIC).to_ndarray()
            frames.append(resized[:, left : left + width])
    return request.param, np.stack(frames)


def as_pixels(video: torch.Tensor) -> np.ndarray:
    """float [3, T, H, W] in [-1, 1] to uint8 [T, H, W, 3]."""
    return ((video + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


@pytest.mark.parametrize("frame_interval", [1, 3])
def test_clip_after_a_seek_equals_sequential_decoding(clip, frame_interval):
    name, frames = clip
    count, _, (height, width), _, _ = CLIPS[name]
    assert len(frames) == count
    num_frames = 8
    last_start = count - (num_frames - 1) * frame_interval - 1
    for start in [0, 1, 29, 30, 31, 75, last_start - 1, last_start]:
        video = decode_clip(
            DATA / f"{name}.mp4",
            start=start,
            num_frames=num_frames,
            frame_interval=frame_interval,
            height=height,
            width=width,
        )
        assert video.dtype == torch.float32 and video.shape == (3, num_frames, height, width)
        expected = frames[start : start + num_frames * frame_interval : frame_interval][:num_frames]
        np.testing.assert_array_equal(as_pixels(video), expected, err_msg=f"{name} from {start}")


def test_values_lie_in_minus_one_to_one_and_reach_far():
    video = decode_clip(DATA / "bikes.mp4", start=0, num_frames=4, frame_interval=1, height=136, width=320)
    assert -1 <= video.min() < -0.7 and 0.7 < video.max() <= 1


def pillow_resize(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(plane.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))


def test_colours_and_resizing_match_a_computation_in_floating_point():
    with av.open(str(DATA / "bikes.mp4")) as container:
        frame = next(f for i, f in enumerate(container.decode(video=0)) if i == 60)
    planes = frame.to_ndarray(format="yuv420p").astype(np.float64)
    luma = (planes[:272] - 16) / 219
    blue, red = (pillow_resize(planes[rows].reshape(136, 320), 272, 640) for rows in (slice(272, 340), slice(340, 408)))
    blue, red = (blue - 128) / 224, (red - 128) / 224
    # ITU-R BT.601, studio range
    channels = luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue
    for height, width in [(272, 640), (68, 160)]:
        expected = np.stack([pillow_resize(c, height, width) for c in channels]).clip(0, 1) * 2 - 1
        video = decode_clip(DATA / "bikes.mp4", start=60, num_frames=1, frame_interval=1, height=height, width=width)
        error = video[:, 0].numpy() - expected
        assert abs(error.mean()) < 0.1 / 127.5
        assert np.abs(error).mean() < 0.5 / 127.5


@pytest.mark.parametrize(
    "source, size, full, corner",
    [
        ((720, 1280), (72, 72), (72, 128), (0, 28)),
        ((1280, 720), (72, 72), (128, 72), (28, 0)),
        ((100, 100), (144, 256), (256, 256), (56, 0)),
        ((271, 641), (90, 212), (90, 213), (0, 0)),
    ],
)
def test_cover_and_centre_crop(source, size, full, corner):
    fit = cover(*source, *size)
    assert (fit.height, fit.width) == full
    rows, columns = np.mgrid[: full[0], : full[1]]
    cropped = fit.crop(np.stack([rows, columns], axis=-1))
    assert cropped.shape[:2] == size
    assert tuple(cropped[0, 0]) == corner


def test_probe_of_the_clips():
    for name, (count, size, *_) in CLIPS.items():
        found = probe(DATA / f"{name}.mp4")
        assert (found.num_frames, found.height, found.width) == (count, *size)
    assert probe(DATA / "bikes.mp4").fps == 25
    assert probe(DATA / "carphone_pristine.mp4").fps == pytest.approx(30000 / 1001)


# Clips in other containers, made here: frame i is a flat grey of 6 * i.
def write_clip(path: Path, codec: str, times=None, options=None, count: int = 40) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 4_000_000
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 6 * i, np.uint8), "rgb24")
            frame.pts = i if times is None else times[i]
            frame.time_base = Fraction(1, 25) if times is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shown_indices(path: Path, start: int, num_frames: int, frame_interval: int) -> list[int]:
    video = decode_clip(path, start=start, num_frames=num_frames, frame_interval=frame_interval, height=48, width=64)
    return [round(grey / 6) for grey in as_pixels(video).mean(axis=(1, 2, 3))]


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("matroska.mkv", "libx264", {"g": "10"}),
        ("transport_stream_that_starts_late.ts", "libx264", {"g": "10"}),
        ("no_times.h264", "libx264", {"g": "10"}),
        ("avi_with_b_frames.avi", "libx264", {"g": "10"}),
        ("mpeg4.avi", "mpeg4", {"g": "10", "bf": "2"}),
        ("open_groups.mp4", "libx264", {"g": "10", "x264-params": "open-gop=1:bframes=3:b-pyramid=normal"}),
        ("vp9.webm", "libvpx-vp9", {"g": "10", "deadline": "realtime", "cpu-used": "8"}),
    ],
)
def test_other_containers_find_the_same_frames(tmp_path, name, codec, options):
    path = write_clip(tmp_path / name, codec, options=options)
    assert probe(path)[:3] == (40, 48, 64)
    for start in [0, 1, 9, 10, 17, 24]:
        assert shown_indices(path, start, 6, 3) == list(range(start, start + 18, 3))
    assert shown_indices(path, 32, 8, 1) == list(range(32, 40))


def test_a_first_time_other_than_zero_shifts_nothing(tmp_path):
    path = write_clip(tmp_path / "late.mkv", "libx264", times=[5000 + 40 * i for i in range(40)], options={"g": "10"})
    assert shown_indices(path, 13, 5, 3) == [13, 16, 19, 22, 25]


def test_variable_rate_is_sampled_evenly_in_time(tmp_path):
    # 20 frames of 20 ms, then 20 of 60 ms: 25 frames a second on average.
    times = [20 * i for i in range(20)] + [400 + 60 * i for i in range(20)]
    path = write_clip(tmp_path / "variable.mp4", "libx264", times=times, options={"g": "10"})
    found = probe(path)
    step = 1000 / found.fps
    expected = [max(j for j in range(40) if times[j] <= i * step + step / 2) for i in range(2, 34, 4)]
    shown = shown_indices(path, 2, 8, 4)
    assert shown == sorted(shown)
    assert np.abs(np.array(times)[shown] - np.array(times)[expected]).max() <= step


def test_rotation_is_applied(tmp_path):
    data = bytearray((DATA / "carphone_pristine.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 4 + 36
    # A quarter turn clockwise in the track header, as telephones write it.
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 144 << 16, 0, 1 << 30)
    path = tmp_path / "turned.mp4"
    path.write_bytes(data)
    assert probe(path)[:3] == (120, 176, 144)
    video = decode_clip(path, start=7, num_frames=2, frame_interval=1, height=176, width=144)
    upright = decode_clip(
        DATA / "carphone_pristine.mp4", start=7, num_frames=2, frame_interval=1, height=144, width=176
    )
    torch.testing.assert_close(video, torch.rot90(upright, -1, dims=(2, 3)), rtol=0, atol=0)


def test_too_short_missing_and_empty_clips(tmp_path):
    def decode(path, start=0):
        return decode_clip(path, start=start, num_frames=16, frame_interval=3, height=32, width=32)

    with pytest.raises(BadSample, match="too short: frame 120"):
        decode(DATA / "carphone_pristine.mp4", start=75)
    assert decode(DATA / "carphone_pristine.mp4", start=74).shape == (3, 16, 32, 32)
    for function in (probe, decode):
        with pytest.raises(BadSample, match="vanished"):
            function(tmp_path / "nowhere.mp4")
        (tmp_path / "empty.mp4").touch()
        with pytest.raises(BadSample, match="empty"):
            function(tmp_path / "empty.mp4")
        (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
        with pytest.raises(BadSample, match="corrupt"):
            function(tmp_path / "noise.mp4")
        with pytest.raises(BadSample, match="unreadable"):
            function(tmp_path)


def test_damaged_clips_raise_bad_sample_or_decode(tmp_path):
    """Whatever bytes are damaged, nothing but BadSample may come out."""
    rng = np.random.default_rng(1)
    whole = (DATA / "carphone_pristine.mp4").read_bytes()
    failed = 0
    for trial in range(30):
        data = bytearray(whole[: int(rng.integers(1000, len(whole)))] if trial % 2 else whole)
        for place in rng.integers(0, len(data), 200):
            data[place] = rng.integers(256)
        path = tmp_path / "damaged.mp4"
        path.write_bytes(data)
        try:
            probe(path)
            decode_clip(path, start=40, num_frames=8, frame_interval=3, height=32, width=32)
        except BadSample as error:
            assert error.reason
            failed += 1
    assert failed > 15


def test_sound_alone_is_undecodable(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(BadSample, match="no video stream"):
        probe(path)


def gradient(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 255 // height, columns * 255 // width, rows * 0 + 90], axis=-1).astype(np.uint8)


def test_image_is_resized_and_centre_cropped(tmp_path):
    Image.fromarray(gradient(120, 200)).save(tmp_path / "a.png")
    image = decode_image(tmp_path / "a.png", height=60, width=60)
    assert image.dtype == torch.float32 and image.shape == (3, 1, 60, 60)
    resized = np.asarray(Image.fromarray(gradient(120, 200)).resize((100, 60), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(as_pixels(image)[0], resized[:, 20:80])


def test_image_orientation_tag_is_followed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    Image.fromarray(gradient(40, 80)).save(tmp_path / "a.png", exif=exif)
    assert probe(tmp_path / "a.png") == (1, 80, 40, 0.0)
    image = decode_image(tmp_path / "a.png", height=80, width=40)
    np.testing.assert_array_equal(as_pixels(image)[0], np.rot90(gradient(40, 80), -1))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        Image.fromarray(np.full((20, 30), 200 * 256, np.uint16)).save(path)
    else:
        Image.new("RGB", (30, 20), (200, 200, 200)).convert(mode).save(path)
    pixels = as_pixels(decode_image(path, height=20, width=30))
    assert pixels.shape == (1, 20, 30, 3)
    assert abs(pixels.mean() - 200) < (60 if mode == "1" else 4)


def test_bad_images(tmp_path):
    Image.fromarray(gradient(200, 200)).save(tmp_path / "a.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes((tmp_path / "a.png").read_bytes()[:500])
    with pytest.raises(BadSample, match="corrupt"):
        decode_image(cut, height=32, width=32)
    empty = tmp_path / "empty.jpg"
    empty.touch()
    for path, reason in [(tmp_path / "gone.jpg", "vanished"), (empty, "empty")]:
        for function in (probe, lambda path: decode_image(path, height=32, width=32)):
            with pytest.raises(BadSample, match=reason):
                function(path)


def test_is_image():
    assert is_image("A/b.JPG") and is_image(Path("x.webp"))
    assert not is_image("a.mp4") and not is_image("jpg")


def test_decoding_does_not_leak(tmp_path):
    path = tmp_path / "carphone.mp4"
    shutil.copy(DATA / "carphone_pristine.mp4", path)
    Image.fromarray(gradient(144, 176)).save(tmp_path / "a.png")
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(path.read_bytes()[:3000])

    def decode(count):
        for i in range(count):
            decode_clip(path, start=i % 20, num_frames=2, frame_interval=1, height=32, width=32)
            decode_image(tmp_path / "a.png", height=32, width=32)
            with pytest.raises(BadSample):
                decode_clip(damaged, start=0, num_frames=2, frame_interval=1, height=32, width=32)

    process = psutil.Process()
    decode(60)
    before = process.memory_info().rss
    decode(300)
    # One container that is not closed keeps over 100 KB: 30 MB for these.
    assert process.memory_info().rss - before < 16 * 2**20
