"""`make demo`: trains a small STDiT-2 on real clips and stills, stops half way, resumes, and shows the result.

python -m stdit_fast.train.demo [--short] [--clips tests/data] [--outputs outputs/demo]
"""

import argparse
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from stdit_fast.errors import run_command
from stdit_fast.train.checkpoint import newest_checkpoint
from stdit_fast.train.demo_data import make_demo_data

logger = logging.getLogger("demo")

CONFIGS = Path(__file__).with_name("configs")
PANELS = 3  # batches on the contact sheet


class Plan(NamedTuple):
    """How much of a demo is run."""

    config: Path
    steps: int
    clips: int  # that samples are made of
    sampling_steps: int
    data: dict = {}  # of make_demo_data


PLANS = {
    "cuda": Plan(CONFIGS / "demo_gpu.yaml", 3000, 3, 100, {"whole_shots": True, "repeats": 24}),
    "cpu": Plan(CONFIGS / "tiny.yaml", 600, 2, 30),
    "short": Plan(CONFIGS / "tiny.yaml", 60, 1, 4),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="stdit_fast.train.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--clips", type=Path, default=Path("tests/data"), help="folder with the three clips")
    parser.add_argument("--outputs", type=Path, default=Path("outputs/demo"), help="where everything goes")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    run = args.outputs / "run"
    shutil.rmtree(run, ignore_errors=True)  # a demo starts anew; only its data set stays
    plan = PLANS["short" if args.short else "cuda" if torch.cuda.is_available() else "cpu"]
    table = make_demo_data(args.clips, args.outputs / ("shots" if plan.data else "clips"), **plan.data)
    steps = plan.steps
    shared = ["--config", str(plan.config), "--dataset.data_path", str(table), "--outputs", str(run)]
    shared += ["--ckpt_every", str(steps // 4), "--validation.every", str(steps // 4)]

    logger.info("Training the first half: %d steps.", steps // 2)
    _train([*shared, "--steps", str(steps // 2)])
    logger.info("Resuming from the checkpoint for the second half.")
    _train([*shared, "--steps", str(steps)])

    first, last = _loss_ends(run / "metrics.jsonl", steps)
    pictures = draw(run, [*shared, "--steps", str(steps)])
    checkpoint = newest_checkpoint(run / "checkpoints")
    logger.info("Sampling: from texts, from first frames, from beginnings of clips.")
    samples = ["--checkpoint", str(checkpoint), "--out", str(run / "samples")]
    samples += ["--count", str(plan.clips), "--steps", str(plan.sampling_steps)]
    _run("stdit_fast.train.showcase", samples)
    pictures["samples"] = run / "samples" / "samples.png"
    logger.info("\nThe loss fell from %.3f (mean of the first steps) to %.3f (mean of the last).", first, last)
    for what, path in (*pictures.items(), ("checkpoint", checkpoint)):
        logger.info("%-14s %s", what, path)
    if not last < 0.8 * first:
        logger.error("The loss has not fallen by a fifth: something is wrong.")
        return 1
    return 0


def _train(arguments: list[str]) -> None:
    _run("stdit_fast.train", arguments)


def _run(module: str, arguments: list[str]) -> None:
    """A process of its own, as a user starts it; where that fails, which it tells itself, the demo ends."""
    # Threads that wait for each other give their cores to the process that decodes, and to whatever else runs there.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    status = subprocess.run([sys.executable, "-m", module, *arguments], env=environment).returncode
    if status:
        raise SystemExit(f"the demo ends: python -m {module} {shlex.join(arguments)} failed with status {status}")


def _loss_ends(metrics: Path, steps: int) -> tuple[float, float]:
    """Mean loss of the first five and of the last eighth of the steps."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    if len(losses) != steps:
        raise SystemExit(f"metrics.jsonl has {len(losses)} steps, expected {steps}: the resume lost or repeated some")
    return float(np.mean(losses[:5])), float(np.mean(losses[-steps // 8 :]))


def draw(run: Path, arguments: list[str]) -> dict[str, Path]:
    """Writes the loss curve and a contact sheet of training batches with their condition frames; name -> path."""
    from stdit_fast.media.pixels import from_pixels
    from stdit_fast.parallel.processes import launch
    from stdit_fast.train.build import build_data, build_diffusion, build_encoders
    from stdit_fast.train.config import parse
    from stdit_fast.train.pictures import Panel, contact_sheets, loss_curve

    pictures = {"loss curve": run / "loss.png", "contact sheet": run / "batch.png"}
    loss_curve(run / "metrics.jsonl", pictures["loss curve"])
    config = parse(arguments)
    processes = launch(config.seed)
    vae, _ = build_encoders(config, processes.device)
    data = build_data(config, processes, build_diffusion(config))
    panels = []
    for request in data.sampler:
        bucket = data.buckets[request.bucket]
        batch = data.dataset[request]
        if bucket.num_frames == 1 or batch["x_mask"].all() or any(p.title.endswith(bucket.name) for p in panels):
            continue  # one batch of each of several video buckets, with condition frames in it
        with torch.no_grad():
            video = from_pixels(batch["pixels"])
            decoded = vae.decode(vae.encode(video.to(processes.device))).float().cpu()
        cut = video[..., : decoded.shape[-2], : decoded.shape[-1]]
        panels.append(Panel(cut, batch["x_mask"], batch["text"], f"bucket {bucket.name}", decoded=decoded))
        if len(panels) == PANELS:
            break
    processes.close()
    contact_sheets(panels, pictures["contact sheet"])
    return pictures


if __name__ == "__main__":
    sys.exit(run_command(main))
