"""What a person looks at after a run: the loss curve, and contact sheets of training batches."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from stdit_fast.errors import ConfigError
from stdit_fast.media.files import whole_file
from stdit_fast.media.pictures import (
    GAP,
    ROW_WIDTH,
    blank,
    caption_height,
    font,
    frame_image,
    frame_size,
    spread,
    wrap,
    write_caption,
    write_rows,
)

CONDITION_COLOUR = "#ff6f00"
CURVE_COLOUR = "#1f5fa8"
VALIDATION_COLOUR = "#c62828"

BORDER = 4  # of a condition frame, in pixels
TILE_GAP = 20  # between samples


def read_metrics(metrics_jsonl: str | os.PathLike) -> list[dict]:
    """The records of a metrics file that have a step, in the order of steps.

    A line that is not whole (a killed run leaves one) is left out; the lines of one step are joined, and of a metric
    that stands there twice (a resumed run repeats steps) the last value counts.
    """
    records = {}
    with open(metrics_jsonl, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records[record["step"]] = {**records.get(record["step"], {}), **record}
    return [records[step] for step in sorted(records)]


def loss_curve(metrics_jsonl: str | os.PathLike, out_png: str | os.PathLike, *, title: str = "Training loss") -> None:
    """Draw the loss, its running mean and the validation loss over the steps; below, gradient norm and learning rate.

    Args:
        metrics_jsonl: one JSON object a line, with step (int) and any of loss, mse, vb, val_loss, grad_norm, lr.
        out_png: the picture, written whole or not at all.

    Raises:
        ConfigError: the file is not there, or no record has a finite loss (key ``metrics``).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not Path(metrics_jsonl).is_file():
        raise ConfigError("metrics", str(metrics_jsonl), "there is no such file; a run writes it to its output folder")
    records = read_metrics(metrics_jsonl)
    series = {name: _series(records, name) for name in ("loss", "mse", "vb", "val_loss", "grad_norm", "lr")}
    if not len(series["loss"][0]):
        raise ConfigError("metrics", str(metrics_jsonl), "no line has a step and a finite loss; the run logged none")

    below = any(len(series[name][0]) for name in ("grad_norm", "lr"))
    figure = Figure(figsize=(9, 6.5 if below else 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if below else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 1][: 1 + below])[:, 0]
    _draw_losses(axes[0], series, title)
    if below:
        _draw_optimizer(axes[1], series["grad_norm"], series["lr"])
    axes[-1].set_xlabel("step")
    with whole_file(out_png) as draft:
        figure.savefig(draft, format="png")


def _series(records: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of one metric."""
    found = [(r["step"], r[name]) for r in records if isinstance(r.get(name), (int, float)) and math.isfinite(r[name])]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over an odd `window` centred on each value; at both ends, over the part of it that there is."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first = np.maximum(places - window // 2, 0)
    end = np.minimum(places + window // 2 + 1, len(values))
    return (total[end] - total[first]) / (end - first)


def _draw_losses(axes, series: dict, title: str) -> None:
    steps, loss = series["loss"]
    window = min(len(loss) // 4, max(10, len(loss) // 20)) | 1
    smooth = running_mean(loss, window)
    axes.plot(steps, loss, color=CURVE_COLOUR, alpha=0.3, linewidth=0.8, label="loss")
    label = f"loss, mean of {window}" if window > 1 else None
    axes.plot(steps, smooth, color=CURVE_COLOUR, linewidth=2, label=label)
    for name, style in (("mse", "--"), ("vb", ":")):
        if len(series[name][0]):
            axes.plot(
                series[name][0], running_mean(series[name][1], window), style, color="#555555", linewidth=1, label=name
            )
    if len(series["val_loss"][0]):
        axes.plot(*series["val_loss"], "o-", color=VALIDATION_COLOUR, markersize=5, linewidth=1, label="validation")
    everything = np.concatenate([series[name][1] for name in ("loss", "val_loss")])
    if everything.min() > 0 and everything.max() > 20 * everything.min():
        axes.set_yscale("log")
    axes.set_title(title)
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)


def _draw_optimizer(axes, grad_norm: tuple, lr: tuple) -> None:
    from matplotlib.ticker import NullFormatter

    lines = []
    if len(grad_norm[0]):
        lines += axes.plot(*grad_norm, color="#2e7d32", linewidth=0.8, label="gradient norm")
        axes.set_ylabel("gradient norm")
        if grad_norm[1].min() > 0 and grad_norm[1].max() > 20 * grad_norm[1].min():
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_yticks([])
    if len(lr[0]):
        right = axes.twinx()
        lines += right.plot(*lr, color="#8e24aa", linewidth=1.2, label="learning rate")
        right.set_ylabel("learning rate")
        right.set_ylim(bottom=0)
        right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.grid(alpha=0.25)
    axes.legend(lines, [line.get_label() for line in lines], frameon=False, loc="best")


@dataclass
class Panel:
    """One batch of a contact sheet.

    Args:
        video: [B, 3, T, H, W] in [-1, 1].
        x_mask: bool [B, T], False where a frame is a condition; None: no conditions.
        captions: B of them.
        title: the bucket's name, for instance.
        decoded: the autoencoder's reconstruction, [B, 3, T, h, w]; shown below each sample.
    """

    video: Tensor
    x_mask: Tensor | None
    captions: Sequence[str]
    title: str = ""
    decoded: Tensor | None = None


def contact_sheets(
    panels: Sequence[Panel], out_png: str | os.PathLike, *, max_samples: int = 8, max_frames: int = 16, title: str = ""
) -> None:
    """Draw batches of several buckets below each other: a strip of frames a sample, condition frames in colour.

    Args:
        panels: the batches; strips short enough to stand side by side do.
        out_png: the picture, written whole or not at all.
        max_samples: of a batch, the first ones.
        max_frames: of a sample, evenly spread from its first to its last.
        title: above everything.
    """
    rows = [_legend(title, any(p.decoded is not None for p in panels))]
    for panel in panels:
        rows += _draw_panel(panel, max_samples, max_frames)
    write_rows(rows, out_png)


def _legend(title: str, has_decoded: bool) -> Image.Image:
    image, draw = blank(40)
    x = 0
    if title:
        draw.text((x, 0), title, "black", font(22, bold=True))
        x = int(draw.textlength(title, font(22, bold=True))) + 40
    draw.rectangle((x, 3, x + 32, 23), "#dddddd", CONDITION_COLOUR, BORDER)
    text = "condition frame" + ("      each sample: the frames, below them their reconstruction" if has_decoded else "")
    draw.text((x + 42, 4), text, "black", font(16))
    return image


def _draw_panel(panel: Panel, max_samples: int, max_frames: int) -> list[Image.Image]:
    """The panel's heading, then rows of as many tiles as fit beside each other."""
    batch, _, num_frames, height, width = panel.video.shape
    shown = min(batch, max_samples)
    columns = spread(num_frames, max_frames)
    size = frame_size(height, width, len(columns))
    tile_width = len(columns) * (size[0] + GAP) - GAP
    per_row = max(1, (ROW_WIDTH + TILE_GAP) // (tile_width + TILE_GAP))

    heading, draw = blank(34)
    facts = [panel.title] if panel.title else []
    facts.append(f"{num_frames} frames" if num_frames > 1 else "images")
    facts.append(f"{width} x {height} pixels")
    facts.append(f"{shown} of {batch} samples" if shown < batch else f"{batch} sample{'s' * (batch > 1)}")
    if len(columns) < num_frames:
        facts.append(f"{len(columns)} frames shown")
    draw.line((0, 0, ROW_WIDTH, 0), "#bbbbbb")
    draw.text((0, 8), "   ".join(facts), "#333333", font(16, bold=True))

    rows = [heading]
    for start in range(0, shown, per_row):
        samples = range(start, min(start + per_row, shown))
        captions = [wrap(panel.captions[sample], tile_width) for sample in samples]
        lines = max(len(caption) for caption in captions)
        tiles = [_draw_tile(panel, sample, columns, size, captions[sample - start], lines) for sample in samples]
        row, _ = blank(tiles[0].height + TILE_GAP)
        for place, tile in enumerate(tiles):
            row.paste(tile, (place * (tile_width + TILE_GAP), 0))
        rows.append(row)
    return rows


def _draw_tile(
    panel: Panel, sample: int, columns: np.ndarray, size: tuple[int, int], caption: list[str], lines: int
) -> Image.Image:
    """One sample: its caption in the room of `lines` lines, its strip of frames, and their reconstruction."""
    strips = [panel.video[sample]] + ([] if panel.decoded is None else [panel.decoded[sample]])
    text_height = caption_height(lines)
    height = text_height + len(strips) * (size[1] + GAP) - GAP
    tile, draw = blank(height, len(columns) * (size[0] + GAP) - GAP)
    write_caption(draw, caption)
    for place, frame in enumerate(columns):
        left = place * (size[0] + GAP)
        is_condition = panel.x_mask is not None and not bool(panel.x_mask[sample, frame])
        for row, strip in enumerate(strips):
            top = text_height + row * (size[1] + GAP)
            tile.paste(frame_image(strip[:, frame], size), (left, top))
            if is_condition and row == 0:
                box = (left, top, left + size[0] - 1, top + size[1] - 1)
                draw.rectangle(box, outline=CONDITION_COLOUR, width=BORDER)
    return tile
