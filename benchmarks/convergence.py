"""Whether the fused path trains like plain PyTorch: the same steps on the same clips, curves on one picture.

    python -m stdit_fast.benchmarks.convergence --out FOLDER [--steps 300]

Three runs of the training driver on the clips of tests/data, with the same data, masks, timesteps, noise and initial
values: plain PyTorch in float32, plain PyTorch in bfloat16, and the fused kernels in bfloat16. What bfloat16 alone does
to plain PyTorch is the noise that the fused run is held to: its smoothed curve may be as far from float32's, times 1.3.
FOLDER gets the three logs, convergence.png and summary.json. Needs a GPU.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from stdit_fast.arguments import check_output_folder
from stdit_fast.benchmarks import curves
from stdit_fast.benchmarks.records import device_name
from stdit_fast.errors import run_command

SLACK = 1.3
EXACT = "plain fp32"
RUNS = {
    EXACT: {"plugin": "ddp", "dtype": "fp32", "model.backend": "reference"},
    "plain bf16": {"plugin": "zero2", "dtype": "bf16", "model.backend": "reference"},
    "fused bf16": {"plugin": "zero2", "dtype": "bf16", "model.backend": "fused"},
}
MODEL = {"model.hidden_size": 576, "model.num_heads": 8, "model.depth": 8}
STYLES = {
    EXACT: {"color": "#212121"},
    "plain bf16": {"color": "#1f5fa8"},
    "fused bf16": {"color": "#c62828", "linestyle": "--"},
}


def train(run: Path, steps: int, settings: dict) -> np.ndarray:
    """One run of the driver, its loss at each step."""
    subprocess.run([sys.executable, *curves.driver_arguments(run, steps, settings)], check=True)
    return curves.losses_of(run)


def compare(losses: dict[str, np.ndarray]) -> dict:
    """Distances of the smoothed curves from plain float32's (relative, root mean square), and the verdict."""
    distance = curves.distances(losses, EXACT)
    return {
        "distance_from_plain_fp32": distance,
        "last_mean_loss": curves.last_means(losses),
        "within_noise": distance["fused bf16"] <= max(SLACK * distance["plain bf16"], curves.FLOOR),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--clips", type=Path, default=Path("tests/data"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    check_output_folder("--out", args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        inputs = curves.make_inputs(args.clips, scratch)
        runs = {name: scratch / name.replace(" ", "_") for name in RUNS}
        settings = inputs | MODEL
        losses = curves.run_all(runs, lambda name: train(runs[name], args.steps, settings | RUNS[name]), args.out)
    curves.plot(losses, EXACT, args.out / "convergence.png", STYLES)
    return curves.write_verdict(compare(losses), args.out / "summary.json", device_name(), args.steps)


if __name__ == "__main__":
    sys.exit(run_command(main))
