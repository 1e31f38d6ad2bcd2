"""Loss curves of small runs of the training driver on the clips of tests/data, held against one of them."""

import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from stdit_fast.benchmarks.random_encoders import random_t5
from stdit_fast.benchmarks.records import command_line, installed_versions
from stdit_fast.benchmarks.train_run import write_tokenizer
from stdit_fast.train.demo_data import make_demo_data
from stdit_fast.train.pictures import read_metrics

WINDOW = 25  # steps of the running mean
FLOOR = 0.002  # a distance below is as close as two orders of summation come


def make_inputs(clips: Path, folder: Path) -> dict:
    """Data and a small T5 of random weights in `folder`, as settings of the driver."""
    table = make_demo_data(clips, folder / "data")
    text_encoder = folder / "t5"
    random_t5(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4).save_pretrained(text_encoder)
    write_tokenizer(text_encoder)
    return {"dataset.data_path": table, "text_encoder.from_pretrained": text_encoder}


def driver_arguments(run: Path, steps: int, settings: dict) -> list[str]:
    """The driver's command line for a run of tiny.yaml that only trains."""
    settings = {
        "config": Path(sys.modules["stdit_fast.train"].__file__).with_name("configs") / "tiny.yaml",
        "lr": 3e-4,
        "steps": steps,
        "ckpt_every": 10 * steps,
        "validation.every": 0,
        "sampling.every": 0,
        "outputs": run,
    } | settings
    return ["-m", "stdit_fast.train", *(text for key, value in settings.items() for text in (f"--{key}", str(value)))]


def losses_of(run: Path) -> np.ndarray:
    """A run's loss at each step."""
    return np.array([record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record])


def run_all(
    folders: dict[str, Path], train: Callable[[str], np.ndarray], out: Path, at_once: int | None = None
) -> dict[str, np.ndarray]:
    """Losses of all runs, which go side by side: nothing is timed.

    Args:
        folders: of each run, by its name, in the order in which they begin; its metrics go to `out` as it ends, however
            it does.
        train: makes the run of that name.
        at_once: runs side by side at most; None: as many as the pool has threads.

    Raises:
        SystemExit: with what each run that failed says.
    """

    def run(name: str) -> np.ndarray:
        try:
            return train(name)
        finally:
            if (folders[name] / "metrics.jsonl").is_file():
                shutil.copy(folders[name] / "metrics.jsonl", out / f"{folders[name].name}.jsonl")

    with ThreadPoolExecutor(at_once) as pool:
        started = {name: pool.submit(run, name) for name in folders}
    failures = [f"{name}: {run.exception()}" for name, run in started.items() if run.exception()]
    if failures:
        raise SystemExit("\n".join(failures))
    return {name: run.result() for name, run in started.items()}


def smooth(losses: np.ndarray) -> np.ndarray:
    """The running mean over WINDOW steps."""
    return np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")


def distances(losses: dict[str, np.ndarray], exact: str) -> dict[str, float]:
    """How far the other smoothed curves are from that of `exact`: relative, root mean square."""
    curve = smooth(losses[exact])
    return {
        name: float(np.sqrt(np.mean((smooth(values) / curve - 1) ** 2)))
        for name, values in losses.items()
        if name != exact
    }


def last_means(losses: dict[str, np.ndarray]) -> dict[str, float]:
    """Where the smoothed curves end."""
    return {name: float(smooth(values)[-1]) for name, values in losses.items()}


def plot(losses: dict[str, np.ndarray], exact: str, path: Path, styles: dict[str, dict] | None = None) -> None:
    """The curves, thin as they are and thick smoothed; below, the smoothed ones over that of `exact`.

    Args:
        styles: matplotlib's options of each smoothed curve.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, height_ratios=(3, 1))
    for name, values in losses.items():
        curve, at = smooth(values), np.arange(WINDOW, len(values) + 1)
        (line,) = top.plot(at, curve, label=name, **(styles or {}).get(name, {}))
        top.plot(np.arange(1, len(values) + 1), values, color=line.get_color(), alpha=0.2, linewidth=0.8)
        bottom.plot(at, 100 * (curve / smooth(losses[exact]) - 1), color=line.get_color())
    top.set_ylabel(f"loss, mean of {WINDOW} steps")
    top.legend()
    bottom.set_ylabel(f"against {exact}, %")
    bottom.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_verdict(verdict: dict, path: Path, device: str, steps: int) -> int:
    """Writes and prints a comparison; the exit status that says whether it is within the noise."""
    summary = {"device": device, "versions": installed_versions(), "command": command_line(), "steps": steps}
    path.write_text(json.dumps(summary | verdict, indent=1) + "\n")
    print(json.dumps(verdict, indent=1))
    return 0 if verdict["within_noise"] else 1
