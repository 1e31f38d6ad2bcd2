"""The optimizer's step over the weights of XL/2, with clipping, working copies and averages: suite "optimizer".

    python -m stdit_fast.benchmarks.optimizer --out optimizer.jsonl

Needs a GPU. Cases:

- `adamw`: the work on the GPU. Ours in two passes; PyTorch's parts one after the other (gradients to float32, their
  norm, clipping, fused AdamW, the averages in a loop, copies to bfloat16); NVIDIA apex's FusedAdam in place of
  PyTorch's where it is installed. Bytes are those that two passes must move; the share is of a device copy's bandwidth.
- `gap`: wall time from gradients to the next forward pass through ColossalAI's plugin and one process: our
  ShardedPlugin, and LowLevelZeroPlugin as it comes, with the averages in a loop. What its hooks add to the backward
  pass counts.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from stdit_fast.benchmarks.ops import copy_bandwidth, quantiles
from stdit_fast.benchmarks.records import Record, append, need_gpu, results_file
from stdit_fast.errors import run_command
from stdit_fast.model.config import STDiT2Config
from stdit_fast.model.stdit2 import STDiT2
from stdit_fast.ops.adamw import AdamWStep, Hyperparameters

SETTINGS = Hyperparameters(2e-5, (0.9, 0.999), 1e-8, 0.0, max_norm=1.0, average_decay=0.9999)
BYTES = {True: 38, False: 30}  # an element, with and without averages
COLUMNS = f"{'case':<24}{'impl':<12}{'ms':>9}{'low':>9}{'high':>9}{'TB/s':>7}{'of copy':>9}"


def model(**config) -> STDiT2:
    """XL/2, or another size, without values."""
    with torch.device("meta"):
        return STDiT2(STDiT2Config(**config))


class Tensors:
    """Masters, moments, averages, working copies and gradients of a model's shapes."""

    def __init__(self, shapes: list[torch.Size], averages: bool):
        def values(scale: float = 0.02, dtype=torch.float32) -> list[Tensor]:
            return [torch.randn(shape, device="cuda").mul_(scale).to(dtype) for shape in shapes]

        self.masters, self.exp_avgs, self.grads = values(), values(1e-4), values(1e-4, torch.bfloat16)
        self.exp_avg_sqs = [m.square() for m in values(1e-4)]
        self.averages = values() if averages else None
        self.working = [m.bfloat16() for m in self.masters]
        self.steps = torch.full((len(shapes),), 100.0, device="cuda")

    @property
    def count(self) -> int:
        return sum(m.numel() for m in self.masters)


def ours(tensors: Tensors) -> Callable[[], None]:
    """The two passes."""
    lists = (tensors.masters, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.steps, tensors.averages, tensors.working)
    step = AdamWStep(*lists)

    def run():
        step.update(tensors.grads, step.square_sum(tensors.grads), None, SETTINGS)

    return run


def parts(tensors: Tensors, optimizer_class: type, **options) -> Callable[[], None]:
    """The same with an optimizer of PyTorch's kind, one pass after the other."""
    params = [torch.nn.Parameter(m) for m in tensors.masters]
    optimizer = optimizer_class(
        params, lr=SETTINGS.lr, betas=SETTINGS.betas, eps=SETTINGS.eps, weight_decay=SETTINGS.weight_decay, **options
    )
    for p, exp_avg, exp_avg_sq, step in zip(
        params, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.steps.unbind(), strict=True
    ):
        optimizer.state[p] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    @torch.no_grad()
    def run():
        for p, grad in zip(params, tensors.grads, strict=True):
            p.grad = grad.float()
        torch.nn.utils.clip_grad_norm_(params, SETTINGS.max_norm)
        optimizer.step()
        if tensors.averages is not None:
            for average, p in zip(tensors.averages, params, strict=True):
                average.lerp_(p, 1 - SETTINGS.average_decay)
        torch._foreach_copy_(tensors.working, params)
        optimizer.zero_grad()

    return run


def implementations(tensors: Tensors) -> dict[str, Callable[[], Callable[[], None]]]:
    """What is installed here, by name."""
    found = {
        "fused": lambda: ours(tensors),
        "torch": lambda: parts(tensors, torch.optim.AdamW, fused=True),
    }
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        return found
    return found | {"apex": lambda: parts(tensors, FusedAdam, adam_w_mode=True)}


def measure_adamw(shapes: list[torch.Size], out: str | None) -> None:
    ceiling = copy_bandwidth()
    print(f"device copy {ceiling / 1e12:.2f} TB/s\n{COLUMNS}")
    for averages in (True, False):
        tensors = Tensors(shapes, averages)
        case = f"adamw-{tensors.count / 1e6:.0f}M" + ("" if averages else "-no-ema")
        for impl, make in implementations(tensors).items():
            times = quantiles(make(), repeats=20)
            moved = BYTES[averages] * tensors.count
            rate = moved / times[0] * 1e3
            notes = {"share_of_copy": round(rate / ceiling, 3), "copy_bytes_per_s": ceiling}
            if out:
                append(out, [Record("optimizer", case, impl, *times, bytes=moved, notes=notes)])
            print(f"{case:<24}{impl:<12}{times[0]:>9.3f}{times[1]:>9.3f}{times[2]:>9.3f}{rate / 1e12:>7.2f}"
                  f"{rate / ceiling:>9.0%}", flush=True)  # fmt: skip
        del tensors, make
        torch.cuda.empty_cache()


class Boosted:
    """A model's weights behind a plugin, with gradients that a backward pass brings again and again."""

    def __init__(self, plugin, config: dict):
        from colossalai.booster import Booster

        bare = model(**config).to_empty(device="cuda")
        for p in bare.parameters():
            torch.nn.init.normal_(p, std=0.02)
        trained = [p for p in bare.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=SETTINGS.lr, betas=SETTINGS.betas, weight_decay=0.0, fused=True)
        self.model, self.optimizer, *_ = Booster(plugin=plugin).boost(bare, optimizer)
        self.parameters = [p for p in self.model.unwrap().parameters() if p.requires_grad]
        self.grads = [1e-4 * torch.randn_like(p) for p in self.parameters]
        self.averages = [m.detach().clone() for group in self.optimizer.param_groups for m in group["params"]]
        self.numbers = torch.zeros(2, dtype=torch.float64, device="cuda")

    def backward(self) -> None:
        self.optimizer.backward_by_grad(self.parameters, self.grads)

    def ours(self) -> None:
        self.optimizer.guarded_step(self.numbers)

    @torch.no_grad()
    def theirs(self) -> None:
        self.optimizer.step()
        masters = (m for group in self.optimizer.param_groups for m in group["params"])
        for average, master in zip(self.averages, masters, strict=True):
            average.lerp_(master, 1 - SETTINGS.average_decay)
        self.optimizer.zero_grad()

    def times(self, step: Callable[[], None], repeats: int = 10) -> tuple[float, list[float]]:
        """Wall time in milliseconds, with all work on the GPU: the backward pass's median, and the step's repeats."""
        backward, steps = [], []
        for _ in range(repeats + 2):
            for function, found in ((self.backward, backward), (step, steps)):
                torch.cuda.synchronize()
                started = time.perf_counter()
                function()
                torch.cuda.synchronize()
                found.append(1e3 * (time.perf_counter() - started))
        return statistics.median(backward[2:]), steps[2:]


def measure_gap(config: dict, out: str | None) -> None:
    from stdit_fast.parallel.processes import launch

    processes = launch(0)
    from colossalai.booster.plugin import LowLevelZeroPlugin

    from stdit_fast.parallel.plugins import ShardedPlugin

    plugins = {
        "fused": lambda: ShardedPlugin(SETTINGS.max_norm, processes),
        "colossalai": lambda: LowLevelZeroPlugin(stage=2, precision="bf16", max_norm=SETTINGS.max_norm),
    }
    bare = 0.0  # the backward pass where no hook takes part, which it does not with ours
    for impl, make in plugins.items():
        boosted = Boosted(make(), config)
        if impl == "fused":
            boosted.optimizer.follow(boosted.averages, SETTINGS.average_decay)
        backward, steps = boosted.times(boosted.ours if impl == "fused" else boosted.theirs)
        bare = bare or backward
        times = [max(0.0, backward - bare) + step for step in steps]
        count = sum(p.numel() for p in boosted.parameters)
        case = f"gap-{count / 1e6:.0f}M"
        notes = {"hooks_ms": round(max(0.0, backward - bare), 3)}
        record = Record.of_times("optimizer", case, impl, times, bytes=BYTES[True] * count, notes=notes)
        if out:
            append(out, [record])
        print(f"{case:<24}{impl:<12}{record.ms:>9.3f}{record.ms_low:>9.3f}{record.ms_high:>9.3f}", notes, flush=True)
        del boosted
        torch.cuda.empty_cache()
    processes.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["adamw", "gap"], choices=["adamw", "gap"])
    parser.add_argument("--depth", type=int, default=28, help="blocks of the model")
    parser.add_argument("--out", type=results_file, help="results file to append to")
    args = parser.parse_args()
    need_gpu("the optimizer is timed on a GPU")
    config = {"depth": args.depth}
    if "adamw" in args.cases:
        measure_adamw([p.shape for p in model(**config).parameters() if p.requires_grad], args.out)
    if "gap" in args.cases:
        measure_gap(config, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
