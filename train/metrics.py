"""Where a run's numbers go: metrics.jsonl (every step), TensorBoard, Weights & Biases, the progress bar."""

import json
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from stdit_fast.arguments import bar_options
from stdit_fast.errors import ConfigError
from stdit_fast.media.write import VideoWriter


class Metrics:
    """The record of one run; only the main process has one.

    Args:
        folder: of the run.
        start, steps: step that the run goes on from, and its last.
        log_every: steps between points in TensorBoard.
        wandb: log to Weights & Biases too, under the folder's name.
        config: recorded with it.
    """

    def __init__(self, folder: Path, start: int, steps: int, log_every: int, wandb: bool, config: dict):
        self.log_every = log_every
        self.file = folder / "metrics.jsonl"
        _forget_after(self.file, start)
        self._lines = open(self.file, "a", buffering=1)  # noqa: SIM115 (closed in `close`)
        self._board = SummaryWriter(folder / "tensorboard", purge_step=start + 1)
        self._bar = tqdm(total=steps, initial=start, unit="step", smoothing=0.05, **bar_options())
        self._bucket_times: dict[str, list[float]] = defaultdict(list)
        self._imbalances: list[tuple[float, float]] = []
        self._wandb = _start_wandb(folder, config) if wandb else None

    def step(self, step: int, values: dict, bucket: str) -> None:
        """Records one step: `values` by name, numbers only; `bucket` is this process's own.

        Of `imbalance_expected` and `imbalance_seen`, what waiting for the slowest process adds to a step, the former is
        this step's, by the table of step times, and the latter that of two steps before.
        """
        self._write({"step": step, "bucket": bucket} | values)
        self._bucket_times[bucket].append(values["step_seconds"])
        if "imbalance_seen" in values:
            self._imbalances.append((values["imbalance_expected"], values["imbalance_seen"]))
        shown = {
            "loss": f"{values['loss']:.4f}",
            "norm": f"{values['grad_norm']:.2f}",
            "tok/s": f"{values['tokens_per_second']:.0f}",
            "wait": f"{values['wait_share']:.0%}",
            "bad": int(values["bad_samples"]),
            "skipped": int(values["skipped_steps"]),
            "bucket": bucket,
        }
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if step % self.log_every == 0:
            self._to_boards(step, values | {f"step_seconds/{bucket}": values["step_seconds"]})

    def validation(self, step: int, loss: float, per_bucket: dict[str, float]) -> None:
        """Records a validation loss, in all and by bucket."""
        self._write({"step": step, "val_loss": loss, "val_loss_per_bucket": per_bucket})
        self._to_boards(step, {"val_loss": loss} | {f"val_loss/{name}": v for name, v in per_bucket.items()})

    def sampling(self, step: int, count: int, failed: int, seconds: float) -> None:
        """Records how many prompts were sampled, how many samples failed in the run so far, and the time it took."""
        values = {"samples": count, "failed_samples": failed, "sampling_seconds": seconds}
        self._write({"step": step} | values)
        self._to_boards(step, values)

    def samples(self, step: int, videos: Mapping[str, np.ndarray], fps: float) -> None:
        """Shows samples on the boards: videos as animated GIFs, which TensorBoard plays, single frames as PNGs.

        Args:
            videos: uint8 [T, H, W, 3] by name.
            fps: frames a second.

        Raises:
            OSError: no room for temporary files.
        """
        with tempfile.TemporaryDirectory() as folder:
            for number, (name, pixels) in enumerate(videos.items()):
                path = Path(folder, f"{number}.{'png' if len(pixels) == 1 else 'gif'}")
                with VideoWriter(path, fps) as writer:
                    writer.write(pixels)
                # Not by add_video, which would want moviepy to make the same GIF.
                _, height, width, channels = pixels.shape
                image = Summary.Image(
                    height=height, width=width, colorspace=channels, encoded_image_string=path.read_bytes()
                )
                self._board.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
                if self._wandb is not None:
                    self._wandb.log({name: _wandb_media(path)}, step=step)

    def message(self, text: str) -> None:
        """A line above the progress bar."""
        self._bar.write(text)

    def summary(self) -> str:
        """Median step time of every bucket, as a small table, and how unevenly the processes were busy."""
        if not self._bucket_times:
            return ""
        rows = [f"{name:<24}{len(t):>7}{sorted(t)[len(t) // 2]:>10.3f} s" for name, t in self._bucket_times.items()]
        lines = [f"{'bucket':<24}{'steps':>7}{'median':>12}", *sorted(rows)]
        if self._imbalances:
            expected, seen = (sum(values) / len(values) for values in zip(*self._imbalances, strict=True))
            lines.append(f"waiting for the slowest process: {expected:.1%} expected, {seen:.1%} seen, on average")
        return "\n".join(lines)

    def close(self) -> None:
        self._bar.close()
        self._lines.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, line: dict) -> None:
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._lines.write(json.dumps(known) + "\n")  # JSON knows no NaN

    def _to_boards(self, step: int, values: dict) -> None:
        finite = {k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        for name, value in finite.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)


def _forget_after(file: Path, step: int) -> None:
    """Drops lines of steps that a resumed run does again, and a line that a killed run left half written."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    draft = file.with_suffix(".tmp")
    draft.write_text("".join(kept))
    os.replace(draft, file)


def _wandb_media(path: Path):
    import wandb

    return wandb.Image(str(path)) if path.suffix == ".png" else wandb.Video(str(path))


def _start_wandb(folder: Path, config: dict):
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("wandb", True, "it is not installed; run `pip install wandb`, or use wandb: false") from error
    return wandb.init(project="stdit-fast", name=folder.name, dir=folder, config=config, resume="allow")
