"""Whether batches that GPUs share train the same: one run for each size of group, curves on one picture.

    python -m stdit_fast.benchmarks.scaling_curves --gpus 4 --out FOLDER [--steps 200]

Runs of the training driver on the clips of tests/data, with the same videos in each step: on one GPU, one after the
other; on all, each its own; and on all, shared by 2, 4, 8. The first two differ by the order of sums alone, which is
the noise that the others are held to. FOLDER gets each run's metrics and what it wrote, as it goes; then
scaling_curves.png and scaling_curves.json. Needs two GPUs. (Without any, it runs on as many CPU processes.)
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from stdit_fast.arguments import check_output_folder
from stdit_fast.benchmarks import curves
from stdit_fast.benchmarks.records import device_name
from stdit_fast.errors import run_command
from stdit_fast.parallel.groups import SIZES

GRACE = 20.0  # s between a launcher's end by SIGTERM and by SIGKILL
SLACK = 2.0  # what is compared are single runs
EXACT = "one GPU"
BUCKETS = "{96p: {8: [0.5, 2], 16: [0.5, 1]}, 64p: {8: [0.5, 4], 16: [1.0, 2]}}"  # no images: all are shared


def runs_of(gpus: int) -> dict[str, tuple[int, dict]]:
    """(processes, options) of each run; all of them train `gpus` batches a step."""
    runs = {EXACT: (1, {"grad_accumulation": gpus})}
    for size in SIZES:
        if gpus % size == 0:
            name = "each its own" if size == 1 else f"shared by {size}"
            runs[name] = gpus, {"sequence_parallel": size, "grad_accumulation": size}
    return runs


def train(run: Path, log: Path, steps: int, processes: int, settings: dict, deadline: float) -> np.ndarray:
    """One run of the driver, its loss at each step.

    Args:
        log: gets what it writes.
        deadline: seconds that it may take.

    Raises:
        RuntimeError: it failed, or did not end; its processes have. With the end of its log.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(processes)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    # A rank that hangs is named well before the run has to end.
    settings = {"hang_timeout": max(60.0, deadline / 2)} | settings
    command += curves.driver_arguments(run, steps, settings)
    with open(log, "w") as file:
        launcher = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = launcher.wait(deadline)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # it ends its workers
            with suppress(subprocess.TimeoutExpired):
                launcher.wait(GRACE)
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            status = f"none after {deadline:g} s"
    if status:
        raise RuntimeError(f"status {status}; {log} ends with\n{log.read_text()[-2000:]}")
    return curves.losses_of(run)


def compare(losses: dict[str, np.ndarray]) -> dict:
    """Distances of the smoothed curves from one GPU's (relative, root mean square), and the verdict."""
    distance = curves.distances(losses, EXACT)
    noise = max(SLACK * distance["each its own"], curves.FLOOR)
    return {
        "distance_from_one_gpu": distance,
        "first_loss": {name: float(values[0]) for name, values in losses.items()},
        "last_mean_loss": curves.last_means(losses),
        "within_noise": all(value <= noise for value in distance.values()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--clips", type=Path, default=Path("tests/data"))
    parser.add_argument("--deadline", type=float, default=3600, help="seconds that all of it may take")
    parser.add_argument(
        "--at_once", type=int, default=2, help="runs side by side: NCCL's kernels hold a GPU while they wait"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    check_output_folder("--out", args.out)
    begun = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        inputs = curves.make_inputs(args.clips, scratch) | {"buckets": BUCKETS}
        runs = runs_of(args.gpus)
        longest_first = sorted(runs, key=lambda name: -runs[name][1]["grad_accumulation"])
        folders = {name: scratch / name.replace(" ", "_") for name in longest_first}
        logs = {name: args.out / f"{folder.name}.log" for name, folder in folders.items()}

        def run(name: str) -> np.ndarray:
            processes, options = runs[name]
            left = max(1.0, begun + args.deadline - time.monotonic())
            return train(folders[name], logs[name], args.steps, processes, inputs | options, left)

        losses = curves.run_all(folders, run, args.out, args.at_once)
    curves.plot(losses, EXACT, args.out / "scaling_curves.png")
    device = f"{args.gpus} x {device_name()}"
    return curves.write_verdict(compare(losses), args.out / "scaling_curves.json", device, args.steps)


if __name__ == "__main__":
    sys.exit(run_command(main))
