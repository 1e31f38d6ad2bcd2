"""Whether batches that GPUs share train the same: one run for each size of group, curves on one picture.

    python -m stdit_fast.benchmarks.scaling_curves --gpus 4 --out FOLDER [--steps 200]

Runs of the training driver on the clips of tests/data, with the same videos in each step: on one GPU, one after the
other; on all, each its own; and on all, shared by 2, 4, 8. The first two differ by the order of sums alone, which is
the noise that the others are held to. FOLDER gets the logs, scaling_curves.png and scaling_curves.json. Needs two GPUs.
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

from stdit_fast.benchmarks.convergence import smooth
from stdit_fast.benchmarks.random_encoders import random_t5
from stdit_fast.benchmarks.records import command_line, device_name, installed_versions
from stdit_fast.benchmarks.train_run import write_tokenizer
from stdit_fast.parallel.groups import SIZES
from stdit_fast.train.demo_data import make_demo_data
from stdit_fast.train.pictures import read_metrics

SLACK = 2.0  # what is compared are single runs
FLOOR = 0.002  # a distance below is as close as two orders of summation come


def runs_of(gpus: int) -> dict[str, tuple[int, dict]]:
    """(processes, options) of each run; all of them train `gpus` batches a step."""
    runs = {"one GPU": (1, {"grad_accumulation": gpus})}
    for size in SIZES:
        if gpus % size == 0:
            name = "each its own" if size == 1 else f"shared by {size}"
            runs[name] = gpus, {"sequence_parallel": size, "grad_accumulation": size}
    return runs


def train(run: Path, table: Path, text_encoder: Path, steps: int, processes: int, options: dict) -> np.ndarray:
    """One run of the driver, its loss at each step."""
    settings = {
        "config": Path(sys.modules["stdit_fast.train"].__file__).with_name("configs") / "tiny.yaml",
        "buckets": "{96p: {8: [0.5, 2], 16: [0.5, 1]}, 64p: {8: [0.5, 4], 16: [1.0, 2]}}",  # no images: all are shared
        "dataset.data_path": table,
        "text_encoder.from_pretrained": text_encoder,
        "lr": 3e-4,
        "steps": steps,
        "ckpt_every": 10 * steps,
        "validation.every": 0,
        "sampling.every": 0,
        "outputs": run,
    } | options
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(processes)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", "stdit_fast.train"]
    command += [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    with open(run.with_suffix(".log"), "w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return np.array([record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record])


def compare(losses: dict[str, np.ndarray]) -> dict:
    """Distances of the smoothed curves from one GPU's (relative, root mean square), and the verdict."""
    exact = smooth(losses["one GPU"])
    distance = {
        name: float(np.sqrt(np.mean((smooth(values) / exact - 1) ** 2)))
        for name, values in losses.items()
        if name != "one GPU"
    }
    noise = max(SLACK * distance["each its own"], FLOOR)
    return {
        "distance_from_one_gpu": distance,
        "first_loss": {name: float(values[0]) for name, values in losses.items()},
        "last_mean_loss": {name: float(smooth(values)[-1]) for name, values in losses.items()},
        "within_noise": all(value <= noise for value in distance.values()),
    }


def plot(losses: dict[str, np.ndarray], path: Path) -> None:
    """The smoothed curves; below, over one GPU's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, height_ratios=(3, 1))
    exact = smooth(losses["one GPU"])
    for name, values in losses.items():
        at = np.arange(len(values) - len(exact) + 1, len(values) + 1)
        (line,) = top.plot(at, smooth(values), label=name, linewidth=1.2)
        bottom.plot(at, 100 * (smooth(values) / exact - 1), color=line.get_color(), linewidth=1)
    top.set_ylabel("loss, running mean")
    top.legend()
    bottom.set_ylabel("against one GPU, %")
    bottom.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--clips", type=Path, default=Path("tests/data"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        table = make_demo_data(args.clips, scratch / "data")
        random_t5(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4).save_pretrained(scratch / "t5")
        write_tokenizer(scratch / "t5")
        runs = runs_of(args.gpus)
        folders = {name: scratch / name.replace(" ", "_") for name in runs}
        with ThreadPoolExecutor() as pool:  # side by side: nothing is timed
            started = {
                name: pool.submit(train, folders[name], table, scratch / "t5", args.steps, *run)
                for name, run in runs.items()
            }
            failed = [name for name, run in started.items() if run.exception()]
        for name in failed:
            print(folders[name].with_suffix(".log").read_text()[-2000:], file=sys.stderr)
        if failed:
            return 1
        losses = {name: run.result() for name, run in started.items()}
        for folder in folders.values():
            shutil.copy(folder / "metrics.jsonl", args.out / f"{folder.name}.jsonl")
    verdict = compare(losses)
    plot(losses, args.out / "scaling_curves.png")
    summary = {
        "device": f"{args.gpus} x {device_name()}",
        "versions": installed_versions(),
        "command": command_line(),
        "steps": args.steps,
    }
    (args.out / "scaling_curves.json").write_text(json.dumps(summary | verdict, indent=1) + "\n")
    print(json.dumps(verdict, indent=1))
    return 0 if verdict["within_noise"] else 1


if __name__ == "__main__":
    sys.exit(main())
