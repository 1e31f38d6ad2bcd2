"""ZeRO-2's optimizer over two processes, on the CPU through gloo: what ColossalAI asks of a GPU is stood in for."""

import contextlib
import math
import os

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from stdit_fast.parallel.processes import Processes, launch

SHAPES = [(7, 13), (5,), (1,), (3, 4, 5)]  # of 1 to 91 values: odd ones are padded
STEPS = 4
DECAY = 0.9


class LikeGraphs(torch.autograd.Function):
    """sum(x * grad); its gradient lies, as a CUDA graph's does, where the next backward pass writes."""

    @staticmethod
    def forward(ctx, x: Tensor, grad: Tensor, place: Tensor):
        ctx.grad, ctx.place = grad, place
        return (x * grad).sum()

    @staticmethod
    def backward(ctx, d_out: Tensor):
        ctx.place.copy_(ctx.grad).mul_(d_out)
        return ctx.place.detach(), None, None


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator) for shape in SHAPES]
        self.weights = nn.ParameterList([nn.Parameter(value.bfloat16()) for value in values])
        self.places = [torch.empty_like(p) for p in self.weights]

    def forward(self, seed: int) -> Tensor:
        """A loss whose gradients are random values; one weight has none every third time."""
        generator = torch.Generator().manual_seed(seed)
        grads = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]
        used = [i for i in range(len(SHAPES)) if i != 3 or seed % 3]
        return sum(LikeGraphs.apply(self.weights[i], grads[i], self.places[i]) for i in used).float()


def boosted(processes: Processes, group):
    from colossalai.accelerator import get_accelerator

    from stdit_fast.parallel.plugins import ShardedOptimizer

    cpu = type(get_accelerator())
    cpu.Stream = cpu.current_stream = lambda *args: None
    cpu.stream = lambda *args: contextlib.nullcontext()
    ShardedOptimizer._sanity_checks = lambda self: None
    model = Weights()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    options = {"partition_grad": True, "dp_process_group": group, "backward_context": contextlib.nullcontext}
    optimizer = ShardedOptimizer(optim, 1.0, processes, **options)
    averages = [m.clone() for m in optimizer.masters]
    optimizer.follow(averages, DECAY)
    return model, optimizer, averages


def train(model, optimizer, steps: list[int], factors=(1.0, 0.5), poisoned: int | None = None) -> list[list[float]]:
    """Steps of two micro-batches each, whose losses have these factors, or are NaN. Answers the numbers."""
    found = []
    for step in steps:
        numbers = torch.zeros(3, dtype=torch.float64)
        for i, factor in enumerate(factors):
            loss = model(2 * step + i) * (math.nan if step == poisoned else factor)
            optimizer.backward(loss)
            numbers[0] += loss.detach().double()
        numbers[1] = 1
        optimizer.reduce_gradients()
        optimizer.guarded_step(numbers)
        found.append(numbers.tolist())
    return found


def states(model, optimizer, averages) -> list[Tensor]:
    """All that there is, whole: masters, averages, moments and the model's own weights."""
    moments = [[optimizer.optim.state[m][name] for m in optimizer.masters] for name in ("exp_avg", "exp_avg_sq")]
    parts = (optimizer.masters, averages, *moments)
    if optimizer.processes.world_size > 1:
        parts = map(optimizer.gather, parts)
    whole = [t.flatten() for tensors in (*parts, model.parameters()) for t in tensors]
    return [t.detach().float().clone() for t in whole]


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = launch(0)
    alone = Processes(0, 1, torch.device("cpu"))
    groups = [dist.new_group([i]) for i in range(2)]
    every, poisoned = list(range(STEPS)), 2 if rank == 1 else None
    results = {}
    for name, processes, group, options in (
        ("both", both, dist.group.WORLD, {"steps": every}),
        ("alone", alone, groups[rank], {"steps": every}),
        ("poisoned", both, dist.group.WORLD, {"steps": every, "poisoned": poisoned}),
        ("without", both, dist.group.WORLD, {"steps": [0, 1, 3]}),
    ):
        made = boosted(processes, group)
        numbers = train(*made[:2], **options)
        results[name] = {"numbers": numbers, "states": states(*made), "steps": made[1].steps}
    torch.save(results, f"{folder}/{rank}.pt")
    both.close()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    from stdit_fast.parallel.processes import _free_port

    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(work, (_free_port(), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_with_the_same_batch_are_one(results):
    """Sharded, padded and gathered, or not: the same bits, with accumulation and a weight without gradients."""
    for mine in results:
        both, alone = mine["both"], mine["alone"]
        assert both["steps"] == STEPS
        for ours, other in zip(both["numbers"], alone["numbers"], strict=True):
            assert ours[:2] == [2 * other[0], 2] and ours[2] == pytest.approx(other[2], rel=1e-12)
        for ours, other in zip(both["states"], alone["states"], strict=True):
            assert torch.equal(ours, other)


def test_accumulated_gradients_are_those_of_both_batches(results):
    """The norm is that of their sum, though the second batch's gradients took the place of the first's."""
    model, total = Weights(), {}
    for seed, factor in ((0, 1.0), (1, 0.5)):
        (model(seed) * factor).backward()
        for i, p in enumerate(model.weights):
            if p.grad is not None:
                total[i] = p.grad.float() + total.get(i, 0.0)
                p.grad = None
    square = sum(float(g.double().square().sum()) for g in total.values())
    assert results[0]["alone"]["numbers"][0][2] == pytest.approx(square, rel=1e-2)  # sums are rounded to bfloat16


def test_a_loss_that_is_not_finite_on_one_process_skips_on_all(results):
    for mine in results:
        poisoned, without = mine["poisoned"], mine["without"]
        assert math.isnan(poisoned["numbers"][2][0]) and poisoned["steps"] == without["steps"] == STEPS - 1
        assert all(map(torch.equal, poisoned["states"], without["states"]))
