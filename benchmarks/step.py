"""The transformer's training step, forward and backward, without optimizer: suite "step".

    python -m stdit_fast.benchmarks.step --cases 144p-16-6 256-1-24 --out step.jsonl

A case is resolution-frames-batch. The model is XL/2 in bfloat16 with an x_mask, as in training. "reference" is plain
PyTorch, "compile" the same with each block under torch.compile, "fused" our kernels.
"""

import argparse
import gc
import sys
import time

import torch

from stdit_fast import STDiT2, STDiT2Config
from stdit_fast.benchmarks.monitor import watched
from stdit_fast.benchmarks.records import Record, append, results_file, tell_cpu
from stdit_fast.errors import ConfigError, run_command
from stdit_fast.model import memory
from stdit_fast.model.arena import leave_default_stream
from stdit_fast.train.buckets import Buckets

IMPLEMENTATIONS = ("reference", "compile", "fused")
TOKENS_OF_TEXT = 200
WARMUP = 5  # steps, after which everything is compiled and captured
COLUMNS = f"{'case':<14}{'impl':<12}{'tokens':>8}{'ms':>9}{'low':>9}{'high':>9}{'TFLOP/s':>9}{'GiB':>8}"


def parse_case(case: str) -> tuple[int, int, int, int]:
    """(frames, height, width, batch) of "144p-16-6", at the aspect ratio of 9:16 or, failing that, the squarest."""
    try:
        resolution, frames, batch = case.rsplit("-", 2)
        buckets = Buckets({resolution: {int(frames): [1.0, int(batch)]}})
    except ValueError as error:
        raise ConfigError("cases", case, f"write resolution-frames-batch, like 144p-16-6 ({error})") from error
    chosen = min(buckets, key=lambda b: abs(b.height / b.width - (9 / 16 if resolution.endswith("p") else 1)))
    return int(frames), chosen.height, chosen.width, int(batch)


def positions_of(height: int, width: int) -> int:
    """Tokens of a frame of that size in pixels."""
    return -(-(height // 8) // 2) * -(-(width // 8) // 2)


def step_flops(config: STDiT2Config, batch: int, frames: int, positions: int, text_tokens: int = TOKENS_OF_TEXT) -> int:
    """Operations of forward and backward, 3 times the forward: the blocks' GEMMs and attentions.

    36 C^2 a token and block for the GEMMs, 4 C times the keys for each attention, 4 C^2 a text token and block for
    its keys and values; recomputation is not counted.
    """
    channels, tokens = config.hidden_size, batch * frames * positions
    video = tokens * (36 * channels**2 + 4 * (positions + frames + text_tokens) * channels)
    text = batch * text_tokens * 4 * channels**2
    return 3 * config.depth * (video + text)


def make_inputs(config: STDiT2Config, frames: int, height: int, width: int, batch: int, device: str) -> dict:
    """Random inputs of a training step, every second sample with its first frame as a condition."""
    generator = torch.Generator(device).manual_seed(0)
    full = {"device": device, "generator": generator}
    scalar = torch.ones(batch, device=device)
    x_mask = torch.ones(batch, frames, dtype=torch.bool, device=device)
    x_mask[::2, 0] = frames == 1
    return {
        "x": torch.randn(batch, 4, frames, height // 8, width // 8, **full),
        "timestep": torch.randint(1000, (batch,), **full),
        "y": torch.randn(batch, 1, TOKENS_OF_TEXT, config.caption_channels, dtype=torch.bfloat16, **full),
        "mask": torch.ones(batch, TOKENS_OF_TEXT, dtype=torch.long),
        "x_mask": x_mask,
        "num_frames": scalar * frames,
        "height": scalar * height,
        "width": scalar * width,
        "ar": scalar * height / width,
        "fps": scalar * 8,
        "drop_caption": torch.zeros(batch, dtype=torch.bool, device=device),
    }


def measure(model: STDiT2, inputs: dict, repeats: int) -> tuple[list[float], float]:
    """(milliseconds of each repeat, peak GiB); the device is waited for around every step."""
    on_gpu = inputs["x"].is_cuda
    out_grad = None
    times = []
    for i in range(repeats + WARMUP):
        if i == WARMUP and on_gpu:
            torch.cuda.reset_peak_memory_stats()
        model.zero_grad(set_to_none=True)
        _wait(on_gpu)
        started = time.perf_counter()
        out = model(**inputs)
        out_grad = torch.randn_like(out) if out_grad is None else out_grad
        out.backward(out_grad)
        _wait(on_gpu)
        times.append(1000 * (time.perf_counter() - started))
    return times[WARMUP:], torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["144p-16-6"])
    parser.add_argument("--impl", nargs="+", default=list(IMPLEMENTATIONS), choices=IMPLEMENTATIONS)
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--checkpointing", default="off", help="off, all, auto or a number of blocks")
    parser.add_argument("--no-graphs", action="store_true", help="run small buckets of ours without CUDA graphs too")
    parser.add_argument("--memory-gib", type=float, help="use at most this much of the GPU's memory")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--profile", help="write the kernels' times of one step of each case to this file")
    parser.add_argument("--out", type=results_file, help="results file to append to")
    args = parser.parse_args()
    for case in args.cases:
        parse_case(case)
    checkpointing = int(args.checkpointing) if args.checkpointing.isdigit() else args.checkpointing
    if checkpointing not in ("off", "all", "auto") and not isinstance(checkpointing, int):
        raise ConfigError("checkpointing", checkpointing, "use off, all, auto or a number of blocks")
    if args.memory_gib and not torch.cuda.is_available():
        raise ConfigError("memory-gib", args.memory_gib, "it is for a GPU, and none is visible; leave it out")

    if args.depth > 1:
        tell_cpu("--depth 1 with a case like 144p-1-1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    leave_default_stream(torch.device(device))  # as the trainer does
    if args.memory_gib:
        memory.hold_to(args.memory_gib)
    print(COLUMNS)
    for impl in args.impl:
        model = build(impl, args.depth, device)
        model.set_checkpointing(checkpointing)
        for case in args.cases:
            begin_anew(model, impl == "fused" and not args.no_graphs)
            run_case(model, case, impl, args)
        del model
        torch.compiler.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
    return 0


def begin_anew(model: STDiT2, graphs: bool) -> None:
    """Lets go of what an earlier case has left: gradients, CUDA graphs and their memory, cached memory."""
    model.zero_grad(set_to_none=True)
    model.set_cuda_graphs(graphs)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def build(impl: str, depth: int, device: str, **sizes: int) -> STDiT2:
    """The model as an implementation has it: XL/2 but for `sizes`, in bfloat16 on a GPU and in float32 elsewhere."""
    config = STDiT2Config(depth=depth, backend="fused" if impl == "fused" else "reference", **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        model = STDiT2(config).to(torch.bfloat16 if device == "cuda" else torch.float32).train()
    fill_zeros(model)
    if impl == "compile":
        model.blocks = torch.nn.ModuleList(torch.compile(block) for block in model.blocks)
    return model


def fill_zeros(model: torch.nn.Module) -> None:
    """Draws the parameters that begin as zeros: what they make would be timed on zeros."""
    for p in model.parameters():
        if p.count_nonzero() == 0:
            torch.nn.init.normal_(p, std=0.02)


def run_case(model: STDiT2, case: str, impl: str, args: argparse.Namespace) -> None:
    """Measures one case, prints its line and appends its record."""
    device = next(model.parameters()).device.type
    frames, height, width, batch = parse_case(case)
    inputs = make_inputs(model.config, frames, height, width, batch, device)
    positions = positions_of(height, width)
    tokens = batch * frames * positions
    if impl == "compile":
        torch.compiler.reset()  # each size is compiled for itself
    try:
        with watched() as gpu:
            times, peak = measure(model, inputs, args.repeats)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        print(f"{case:<14}{impl:<12}{tokens:>8}  out of memory", flush=True)
        return
    if model.graphs is not None:
        peak += model.graphs.pool_bytes / 2**30  # what the graphs' own memory holds does not count as allocated
    flops = step_flops(model.config, batch, frames, positions)
    record = Record.of_times("step", case, impl, times, flops=flops, peak_gib=round(peak, 2))
    record.notes = {"checkpointing": args.checkpointing, "depth": args.depth} | gpu
    if impl == "fused":
        record.notes["cuda_graph"] = model.last_graphed
    if args.checkpointing == "auto":
        record.notes["checkpointed_blocks"] = model.last_checkpointed
    if args.memory_gib:
        record.notes["memory_gib"] = args.memory_gib
    if args.out:
        append(args.out, [record])
    rate = flops / record.ms / 1e9
    print(f"{case:<14}{impl:<12}{tokens:>8}{record.ms:>9.1f}{record.ms_low:>9.1f}"
          f"{record.ms_high:>9.1f}{rate:>9.0f}{peak:>8.1f}", flush=True)  # fmt: skip
    if args.profile:
        write_profile(model, inputs, args.profile, case, impl)


def write_profile(model: STDiT2, inputs: dict, path: str, case: str, impl: str) -> None:
    """Appends a table of the kernels of one step, and how long the CPU took to launch them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        out = model(**inputs)
        out.backward(torch.randn_like(out))
        torch.cuda.synchronize()
    model.zero_grad(set_to_none=True)
    _wait(True)
    started = time.perf_counter()
    out = model(**inputs)
    out.backward(torch.randn_like(out))
    launched = 1000 * (time.perf_counter() - started)
    _wait(True)
    total = 1000 * (time.perf_counter() - started)
    kernels = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    busy = sum(e.self_device_time_total for e in kernels) / 1000
    lines = [f"== {case} {impl}: kernels {busy:.1f} ms, {sum(e.count for e in kernels)} launches; "
             f"a step {total:.1f} ms, launched after {launched:.1f} ms"]  # fmt: skip
    lines += [f"{e.self_device_time_total / 1000:9.2f} ms {e.count:6d}  {e.key[:130]}" for e in kernels[:45]]
    with open(path, "a") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
