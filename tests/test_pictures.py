import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from stdit_fast.errors import ConfigError
from stdit_fast.media.pictures import GAP, MARGIN, MAX_FRAME_HEIGHT, SHEET_WIDTH, STRIP_GAP, sheet
from stdit_fast.train import pictures
from stdit_fast.train.pictures import Panel, contact_sheets, loss_curve, read_metrics, running_mean

ORANGE = (255, 111, 0)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def write(path, *lines: str | dict):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def count(image: np.ndarray, colour: tuple, tolerance: int = 8) -> int:
    return int((np.abs(image - np.array(colour)).max(-1) <= tolerance).sum())


def flat(colour: tuple, *shape: int) -> torch.Tensor:
    """Frames [B, 3, T, H, W] of one colour."""
    batch, num_frames, height, width = shape
    values = torch.tensor(colour, dtype=torch.float32) / 127.5 - 1
    return values.view(1, 3, 1, 1, 1).expand(batch, 3, num_frames, height, width)


def test_read_metrics_takes_what_is_whole(tmp_path):
    path = write(
        tmp_path / "metrics.jsonl",
        {"step": 3, "loss": 0.5},
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.7},
        {"step": 2, "val_loss": 0.9},
        '{"step": 3, "lo{"step": 4, "loss": 0.1}',
        "[1, 2]",
        {"loss": 9.0},
        {"step": 3, "loss": 0.4},
        '{"step": 5, "loss": 0.0',
    )
    assert read_metrics(path) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.7, "val_loss": 0.9},
        {"step": 3, "loss": 0.4},
    ]


def test_running_mean():
    values = np.array([1.0, 5.0, 3.0, 7.0])
    np.testing.assert_allclose(running_mean(values, 3), [3.0, 3.0, 5.0, 5.0])
    np.testing.assert_allclose(running_mean(values, 1), values)


def test_loss_curve_is_drawn(tmp_path):
    records = [
        {"step": s, "loss": 1 / s + 0.2, "mse": 1 / s, "vb": 0.2, "grad_norm": 1 + s, "lr": 1e-4} for s in range(1, 41)
    ]
    records += [{"step": s, "val_loss": 0.5} for s in (10, 20)]
    records[7]["loss"] = float("nan")
    out = tmp_path / "new" / "loss.png"
    loss_curve(write(tmp_path / "metrics.jsonl", *records, '{"step": 41, "lo'), out)
    image = pixels(out)
    assert image.shape == (780, 1080, 3)
    assert count(image, (31, 95, 168)) > 500  # the smoothed curve
    assert count(image, (198, 40, 40)) > 50  # the validation points
    assert count(image, (142, 36, 170)) > 100  # the learning rate
    assert os.listdir(out.parent) == ["loss.png"]


def test_loss_curve_data(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(pictures, "_draw_losses", lambda axes, series, title: drawn.update(series, title=title))
    records = [
        {"step": 1, "loss": 2},
        {"step": 2, "loss": None},
        {"step": 3, "loss": float("inf")},
        {"step": 5, "loss": 1.5},
    ]
    loss_curve(write(tmp_path / "metrics.jsonl", *records), tmp_path / "loss.png", title="A run")
    assert drawn["title"] == "A run"
    assert [values.tolist() for values in drawn["loss"]] == [[1, 5], [2.0, 1.5]]
    assert len(drawn["val_loss"][0]) == 0


def test_one_record_is_enough(tmp_path):
    loss_curve(write(tmp_path / "metrics.jsonl", {"step": 1, "loss": 1.0}), tmp_path / "loss.png")
    assert pixels(tmp_path / "loss.png").shape == (600, 1080, 3)


def test_loss_curve_without_data(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        loss_curve(tmp_path / "absent.jsonl", tmp_path / "loss.png")
    with pytest.raises(ConfigError, match="no line has a step and a finite loss"):
        loss_curve(write(tmp_path / "metrics.jsonl", {"step": 1, "loss": float("nan")}), tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def contact_sheet(video, x_mask, captions, out, decoded=None, **limits) -> None:
    """Of one batch."""
    contact_sheets([Panel(video, x_mask, captions, decoded=decoded)], out, **limits)


def test_condition_frames_are_framed(tmp_path):
    video = flat(RED, 2, 4, 48, 64)
    out = tmp_path / "sheet.png"
    contact_sheet(video, torch.ones(2, 4, dtype=torch.bool), ["one", "two"], out)
    legend = count(pixels(out), ORANGE, 0)
    assert legend > 0
    x_mask = torch.ones(2, 4, dtype=torch.bool)
    x_mask[0, 0] = x_mask[1, 2] = x_mask[1, 3] = False
    contact_sheet(video, x_mask, ["one", "two"], out)
    height, width = MAX_FRAME_HEIGHT, int(MAX_FRAME_HEIGHT * 64 / 48)
    border = height * width - (height - 2 * pictures.BORDER) * (width - 2 * pictures.BORDER)
    image = pixels(out)
    assert count(image, ORANGE, 0) == legend + 3 * border
    # the frames lie side by side in their order: of the first sample the first is framed
    top = np.argwhere((image == ORANGE).all(-1))
    first = top[top[:, 0] > 80]
    assert first[:, 1].min() == MARGIN
    assert count(image, RED) == 8 * height * width - 3 * border


def test_reconstruction_stands_below_and_is_not_framed(tmp_path):
    video, decoded = flat(RED, 1, 3, 32, 32), flat(BLUE, 1, 3, 24, 32)
    x_mask = torch.tensor([[False, True, True]])
    contact_sheet(video, x_mask, ["caption"], tmp_path / "sheet.png", decoded=decoded)
    image = pixels(tmp_path / "sheet.png")
    side = MAX_FRAME_HEIGHT
    assert count(image, BLUE) == 3 * side * side
    red, blue = (np.argwhere((np.abs(image - colour) < 8).all(-1))[:, 0] for colour in (RED, BLUE))
    assert red.max() < blue.min()


def test_frames_are_spread_evenly_over_a_long_sample(tmp_path):
    video = torch.linspace(-1, 1, 50).view(1, 1, 50, 1, 1).expand(1, 3, 50, 16, 16)
    contact_sheet(video, None, ["long"], tmp_path / "sheet.png", max_frames=6)
    image = pixels(tmp_path / "sheet.png")
    row = image[-MARGIN - pictures.TILE_GAP - 20]
    side = MAX_FRAME_HEIGHT
    centres = [MARGIN + i * (side + GAP) + side // 2 for i in range(6)]
    assert row[centres, 0].tolist() == [round(255 * t / 49) for t in (0, 10, 20, 29, 39, 49)]


def test_samples_are_limited(tmp_path):
    for batch in (3, 9):
        contact_sheet(flat(RED, batch, 2, 16, 16), None, ["x"] * batch, tmp_path / "sheet.png", max_samples=2)
        assert count(pixels(tmp_path / "sheet.png"), RED) == 2 * 2 * MAX_FRAME_HEIGHT**2


def test_panels_of_several_buckets(tmp_path):
    panels = [
        Panel(flat(RED, 2, 16, 16, 32), torch.ones(2, 16, dtype=torch.bool), ["a " * 500, ""], "144p-16-0.50"),
        Panel(flat(BLUE, 5, 1, 64, 32), None, ["image"] * 5, "256-1-2.00"),
    ]
    contact_sheets(panels, tmp_path / "sheet.png", title="Batches")
    image = pixels(tmp_path / "sheet.png")
    assert image.shape[1] == SHEET_WIDTH
    red, blue = (np.argwhere((np.abs(image - colour) < 8).all(-1)) for colour in (RED, BLUE))
    assert red[:, 0].max() < blue[:, 0].min()
    assert max(red[:, 1].max(), blue[:, 1].max()) < SHEET_WIDTH - MARGIN
    # images stand side by side in one row
    assert np.ptp(blue[:, 0]) + 1 == MAX_FRAME_HEIGHT


def test_a_picture_is_replaced_whole(tmp_path, monkeypatch):
    out = tmp_path / "sheet.png"
    contact_sheet(flat(RED, 1, 1, 16, 16), None, ["x"], out)
    before = out.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        contact_sheet(flat(BLUE, 1, 1, 16, 16), None, ["x"], out)
    assert out.read_bytes() == before


def test_a_sheet_of_samples(tmp_path):
    rows = [
        ("a red sea " * 90, flat(RED, 1, 20, 32, 32)[0]),
        ("blue", flat(BLUE, 1, 1, 32, 64)[0]),
        ("", torch.linspace(-1, 1, 50).view(1, 50, 1, 1).expand(3, 50, 16, 16)),
    ]
    sheet(rows, 6, tmp_path / "new" / "sheet.png")
    image = pixels(tmp_path / "new" / "sheet.png")
    side = MAX_FRAME_HEIGHT
    assert image.shape[1] == SHEET_WIDTH
    assert count(image, RED) == 6 * side * side and count(image, BLUE) == 2 * side * side
    red, blue = (np.argwhere((np.abs(image - colour) < 8).all(-1)) for colour in (RED, BLUE))
    assert red[:, 0].max() < blue[:, 0].min()
    assert (image[MARGIN : red[:, 0].min()] < 100).any()  # the caption stands above
    row = image[-MARGIN - STRIP_GAP - 20]
    centres = [MARGIN + i * (side + GAP) + side // 2 for i in range(6)]
    assert row[centres, 0].tolist() == [round(255 * t / 49) for t in (0, 10, 20, 29, 39, 49)]
    assert os.listdir(tmp_path / "new") == ["sheet.png"]
