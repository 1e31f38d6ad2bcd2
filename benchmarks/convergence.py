"""Whether the fused path trains like plain PyTorch: the same steps on the same clips, curves on one picture.

    python -m stdit_fast.benchmarks.convergence --out FOLDER [--steps 300]

Three runs of the training driver on the clips of tests/data, with the same data, masks, timesteps, noise and initial
values: plain PyTorch in float32, plain PyTorch in bfloat16, and the fused kernels in bfloat16. What bfloat16 alone does
to plain PyTorch is the noise that the fused run is held to: its smoothed curve may be as far from float32's, times 1.3.
FOLDER gets the three logs, convergence.png and summary.json. Needs a GPU.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from stdit_fast.benchmarks.random_encoders import random_t5
from stdit_fast.benchmarks.records import command_line, device_name, installed_versions
from stdit_fast.benchmarks.train_run import write_tokenizer
from stdit_fast.train.demo_data import make_demo_data
from stdit_fast.train.pictures import read_metrics

SLACK = 1.3
WINDOW = 25  # steps of the running mean
RUNS = {
    "plain fp32": {"plugin": "ddp", "dtype": "fp32", "model.backend": "reference"},
    "plain bf16": {"plugin": "zero2", "dtype": "bf16", "model.backend": "reference"},
    "fused bf16": {"plugin": "zero2", "dtype": "bf16", "model.backend": "fused"},
}
COLOURS = {"plain fp32": "#212121", "plain bf16": "#1f5fa8", "fused bf16": "#c62828"}


def train(run: Path, table: Path, text_encoder: Path, steps: int, options: dict[str, str]) -> np.ndarray:
    """One run of the driver, its loss at each step."""
    settings = {
        "config": Path(sys.modules["stdit_fast.train"].__file__).with_name("configs") / "tiny.yaml",
        "dataset.data_path": table,
        "text_encoder.from_pretrained": text_encoder,
        "model.hidden_size": 576,
        "model.num_heads": 8,
        "model.depth": 8,
        "lr": 3e-4,
        "steps": steps,
        "ckpt_every": 10 * steps,
        "validation.every": 0,
        "sampling.every": 0,
        "outputs": run,
    } | options
    command = [sys.executable, "-m", "stdit_fast.train"]
    command += [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    subprocess.run(command, check=True)
    return np.array([record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record])


def smooth(losses: np.ndarray) -> np.ndarray:
    """The running mean over WINDOW steps."""
    return np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")


def compare(losses: dict[str, np.ndarray]) -> dict:
    """Distances of the smoothed curves from plain float32's (relative, root mean square), and the verdict."""
    curves = {name: smooth(values) for name, values in losses.items()}
    exact = curves["plain fp32"]
    distance = {n: float(np.sqrt(np.mean((c / exact - 1) ** 2))) for n, c in curves.items() if n != "plain fp32"}
    return {
        "distance_from_plain_fp32": distance,
        "last_mean_loss": {name: float(curve[-1]) for name, curve in curves.items()},
        # A distance below 0.2% is as close as two orders of summation come.
        "within_noise": distance["fused bf16"] <= max(SLACK * distance["plain bf16"], 0.002),
    }


def plot(losses: dict[str, np.ndarray], path: Path) -> None:
    """The three curves, thin as they are and thick smoothed; below, the smoothed curves over plain float32's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, height_ratios=(3, 1))
    exact = smooth(losses["plain fp32"])
    for name, values in losses.items():
        curve, at = smooth(values), np.arange(WINDOW, len(values) + 1)
        top.plot(np.arange(1, len(values) + 1), values, color=COLOURS[name], alpha=0.2, linewidth=0.8)
        top.plot(at, curve, color=COLOURS[name], label=name, linestyle="--" if name == "fused bf16" else "-")
        bottom.plot(at, 100 * (curve / exact - 1), color=COLOURS[name])
    top.set_ylabel(f"loss, mean of {WINDOW} steps")
    top.legend()
    bottom.set_ylabel("against plain fp32, %")
    bottom.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--clips", type=Path, default=Path("tests/data"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        table = make_demo_data(args.clips, scratch / "data")
        random_t5(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4).save_pretrained(scratch / "t5")
        write_tokenizer(scratch / "t5")
        runs = {name: scratch / name.replace(" ", "_") for name in RUNS}
        with ThreadPoolExecutor() as pool:  # side by side: nothing is timed
            started = {
                name: pool.submit(train, runs[name], table, scratch / "t5", args.steps, options)
                for name, options in RUNS.items()
            }
            losses = {name: run.result() for name, run in started.items()}
        for run in runs.values():
            shutil.copy(run / "metrics.jsonl", args.out / f"{run.name}.jsonl")
    verdict = compare(losses)
    plot(losses, args.out / "convergence.png")
    summary = {
        "device": device_name(),
        "versions": installed_versions(),
        "command": command_line(),
        "steps": args.steps,
    }
    (args.out / "summary.json").write_text(json.dumps(summary | verdict, indent=1) + "\n")
    print(json.dumps(verdict, indent=1))
    return 0 if verdict["within_noise"] else 1


if __name__ == "__main__":
    sys.exit(main())
