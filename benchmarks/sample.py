"""Sampling, the transformer's part: suite "sample".

    python -m stdit_fast.benchmarks.sample --cases 256-16-1 --out sample.jsonl

A case is resolution-frames-samples, as in the step suite: so many samples with guidance, from noise to latents, by the
ancestral sampler. The model is XL/2 in bfloat16. "reference" is plain PyTorch, "compile" the same with each block under
torch.compile, "fused" our kernels, by CUDA graphs where they serve. Text encoder and autoencoder are not timed.

With --forward, single predictions with guidance instead ("fused forward"), and beside them the forward pass of training
on half as many tokens, which keeps what a backward pass needs ("fused training forward"); where that does not fit into
memory it is left out.
"""

import argparse
import sys
import time

import torch

from stdit_fast import STDiT2
from stdit_fast.benchmarks.monitor import watched
from stdit_fast.benchmarks.records import Record, append, results_file, tell_cpu
from stdit_fast.benchmarks.step import (
    IMPLEMENTATIONS,
    TOKENS_OF_TEXT,
    build,
    make_inputs,
    parse_case,
    positions_of,
    step_flops,
)
from stdit_fast.diffusion import denoise, make_scheduler
from stdit_fast.errors import run_command
from stdit_fast.model.prediction import Predictor

GUIDANCE = 7.0
SCALARS = ("num_frames", "height", "width", "ar", "fps")
COLUMNS = f"{'case':<14}{'impl':<12}{'what':<18}{'ms':>10}{'low':>10}{'high':>10}{'TFLOP/s':>9}{'GiB':>8}"


def bind(model: STDiT2, inputs: dict, copies: int, cuda_graphs: bool) -> Predictor:
    """A predictor of `copies` times the batch, as guidance wants it."""
    predictor = Predictor(model, cuda_graphs)
    y, mask = torch.cat([inputs["y"]] * copies), torch.cat([inputs["mask"]] * copies)
    drop = torch.arange(len(y), device=y.device) >= len(inputs["y"])
    text = model.encode_text(y, mask, drop)
    predictor.bind(text, **{name: torch.cat([inputs[name]] * copies) for name in SCALARS})
    return predictor


def timed(function, repeats: int, warmup: int) -> list[float]:
    """Milliseconds of each repeat; the device is waited for around every one."""
    times = []
    for _ in range(warmup + repeats):
        _wait()
        started = time.perf_counter()
        function()
        _wait()
        times.append(1000 * (time.perf_counter() - started))
    return times[warmup:]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_samples(model: STDiT2, case: str, impl: str, args: argparse.Namespace) -> Record:
    """Whole samples."""
    frames, height, width, batch = parse_case(case)
    device = next(model.parameters()).device
    inputs = make_inputs(model.config, frames, height, width, batch, device.type)
    noise, scheduler = torch.randn_like(inputs["x"]), make_scheduler("iddpm")
    with torch.no_grad():
        predictor = bind(model, inputs, 2, cuda_graphs=impl == "fused")

        def sample() -> None:
            out = denoise(predictor, scheduler, noise, num_steps=args.steps, guidance=GUIDANCE)
            assert out.isfinite().all()

        with watched() as gpu:
            times = timed(sample, args.repeats, warmup=1)
    flops = args.steps * prediction_flops(model, frames, height, width, 2 * batch)
    notes = {"what": "samples", "steps": args.steps, "guidance": GUIDANCE, "depth": args.depth} | gpu
    return Record.of_times("sample", case, impl, times, flops=flops, peak_gib=_peak(), notes=notes)


def run_forward(model: STDiT2, case: str, impl: str, args: argparse.Namespace) -> list[Record]:
    """Single predictions with guidance, and the forward pass of training on the same batch without it."""
    frames, height, width, batch = parse_case(case)
    device = next(model.parameters()).device
    inputs = make_inputs(model.config, frames, height, width, batch, device.type)
    with torch.no_grad():
        predictor = bind(model, inputs, 2, cuda_graphs=impl == "fused")
        x, t = torch.cat((inputs["x"],) * 2), torch.cat((inputs["timestep"],) * 2)
        times = timed(lambda: predictor(x, t), args.repeats, warmup=4)
    flops = prediction_flops(model, frames, height, width, 2 * batch)
    notes = {"what": "forward", "depth": args.depth}
    ours = Record.of_times("sample", case, f"{impl} forward", times, flops=flops, peak_gib=_peak(), notes=notes)
    model.train()
    kept = {}

    def forward() -> None:
        kept.clear()
        kept["out"] = model(**inputs)

    try:
        times = timed(forward, args.repeats, warmup=2)
    except torch.OutOfMemoryError:
        times = None
    kept.clear()
    model.eval()
    if times is None:
        print(f"{case:<14}{impl:<12}{'training forward':<18}  out of memory", flush=True)
        _peak()
        return [ours]
    flops = prediction_flops(model, frames, height, width, batch) + text_flops(model, batch)
    notes = {"what": "training forward", "depth": args.depth}
    name = f"{impl} training forward"
    return [ours, Record.of_times("sample", case, name, times, flops=flops, peak_gib=_peak(), notes=notes)]


def prediction_flops(model: STDiT2, frames: int, height: int, width: int, batch: int) -> int:
    """Operations of one prediction, without the text's keys and values, which are made once for all steps."""
    return step_flops(model.config, batch, frames, positions_of(height, width)) // 3 - text_flops(model, batch)


def text_flops(model: STDiT2, batch: int) -> int:
    """Operations of the text's keys and values for all blocks."""
    return model.config.depth * batch * TOKENS_OF_TEXT * 4 * model.config.hidden_size**2


def _peak() -> float | None:
    """GiB reserved at most, graphs' memory included."""
    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_reserved() / 2**30
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["256-16-1"])
    parser.add_argument("--impl", nargs="+", default=list(IMPLEMENTATIONS), choices=IMPLEMENTATIONS)
    parser.add_argument("--forward", action="store_true", help="time single predictions and training's forward pass")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=results_file, help="results file to append to")
    args = parser.parse_args()
    for case in args.cases:
        parse_case(case)
    if args.depth > 1:
        tell_cpu("--depth 1 --steps 2 with a case like 144p-1-1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(COLUMNS)
    for impl in args.impl:
        model = build(impl, args.depth, device).eval()
        _peak()  # forgets what building took
        for case in args.cases:
            found = run_forward(model, case, impl, args) if args.forward else [run_samples(model, case, impl, args)]
            for r in found:
                rate = r.flops / r.ms / 1e9
                print(f"{case:<14}{impl:<12}{r.notes['what']:<18}{r.ms:>10.1f}{r.ms_low:>10.1f}{r.ms_high:>10.1f}"
                      f"{rate:>9.0f}{r.peak_gib or 0:>8.1f}", flush=True)  # fmt: skip
            if args.out:
                append(args.out, found)
        del model
        torch.compiler.reset()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
