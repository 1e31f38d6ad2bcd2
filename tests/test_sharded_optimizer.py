"""ZeRO-2's optimizer over two processes, on the CPU through gloo: what ColossalAI asks of a GPU is stood in for."""

import contextlib
import functools
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
BUCKETS = 3  # what is in none of the groups below is the third


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


class FailsHere(torch.autograd.Function):
    """Runs out of memory in the backward pass, once, if it is to."""

    due = False
    left = []  # how many buckets had left then

    @staticmethod
    def forward(ctx, x: Tensor):
        return x.clone()

    @staticmethod
    def backward(ctx, d_out: Tensor):
        if FailsHere.due:
            FailsHere.due = False
            raise torch.OutOfMemoryError("provoked")
        return d_out


class Weights(nn.Module):
    def __init__(self, backwards: bool = False):
        super().__init__()
        self.backwards = backwards  # in another order
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator) for shape in SHAPES]
        self.weights = nn.ParameterList([nn.Parameter(value.bfloat16()) for value in values])
        self.places = [torch.empty_like(p) for p in self.weights]

    def forward(self, seed: int) -> Tensor:
        """A loss whose gradients are random values; one weight has none every third time."""
        generator = torch.Generator().manual_seed(seed)
        grads = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]
        used = [i for i in range(len(SHAPES)) if i != 3 or seed % 3]
        # Nested, so that the last of them has its gradient first: 3, 2, 1, 0, the order of the groups.
        total = torch.zeros((), dtype=torch.bfloat16, requires_grad=True)
        for i in reversed(used) if self.backwards else used:
            total = FailsHere.apply(total) if i == 1 else total
            total = total + LikeGraphs.apply(self.weights[i], grads[i], self.places[i])
        return total.float()

    def gradient_order(self) -> list[list[nn.Parameter]]:
        return [[self.weights[3], self.weights[2]], [self.weights[1]]]


def boosted(processes: Processes, group, backwards: bool = False):
    from colossalai.accelerator import get_accelerator

    from stdit_fast.parallel.plugins import ShardedOptimizer

    cpu = type(get_accelerator())
    cpu.Stream = cpu.current_stream = lambda *args: None
    cpu.stream = lambda *args: contextlib.nullcontext()
    ShardedOptimizer._sanity_checks = lambda self: None
    model = Weights(backwards)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    options = {"partition_grad": True, "dp_process_group": group, "backward_context": contextlib.nullcontext}
    optimizer = ShardedOptimizer(optim, 1.0, processes, model.gradient_order(), **options)
    model.arrivals = optimizer.arrivals
    averages = [m.clone() for m in optimizer.masters]
    optimizer.follow(averages, DECAY)
    return model, optimizer, averages


def train(
    model, optimizer, steps: list[int], factors=(1.0, 0.5), poisoned=None, overlaps=False, fails=False, shift=0
) -> list[list[float]]:
    """Steps of two micro-batches each, whose losses have these factors, or are NaN. Answers the numbers.

    Args:
        overlaps: the second one's gradients set out in its backward pass, and weights arrive when they are needed.
        fails: that pass runs out of memory in each step, and the step's passes begin anew.
        shift: of the seeds.
    """
    found, optimizer.overlaps = [], overlaps
    for step in steps:
        numbers = torch.zeros(3, dtype=torch.float64)

        def backward(i: int, last: bool = False, step=step, numbers=numbers):
            model.arrivals.wait()
            loss = model(2 * step + i + shift) * (math.nan if step == poisoned else factors[i])
            with optimizer.reducing() if last else contextlib.nullcontext():
                optimizer.backward(loss)
            numbers[0] += loss.detach().double()

        backward(0)
        FailsHere.due = fails
        try:
            backward(1, last=True)
        except torch.OutOfMemoryError:
            FailsHere.left.append(len(optimizer._reduction._sent))
            optimizer.zero_grad()
            numbers.zero_()
            backward(0)
            backward(1, last=True)
        assert not FailsHere.due
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
    # Other batches on each, in another order of the graph, and at times one has a gradient that the other has not.
    apart = {"steps": every, "shift": 100 * rank}
    world, results = dist.group.WORLD, {}
    for name, processes, group, options in (
        ("both", both, world, {"steps": every}),
        ("alone", alone, groups[rank], {"steps": every}),
        ("poisoned", both, world, {"steps": every, "poisoned": poisoned}),
        ("without", both, world, {"steps": [0, 1, 3]}),
        ("apart", both, world, apart),
        ("apart, overlapping", both, world, apart | {"overlaps": True}),
        ("apart, one begins anew", both, world, apart | {"overlaps": True, "fails": rank == 0}),
    ):
        made = boosted(processes, group, backwards=rank == 1 and name.startswith("apart"))
        with sent_in_passes() as sent:
            numbers = train(*made[:2], **options)
        made[1].wait_for_weights()
        results[name] = {"numbers": numbers, "states": states(*made), "steps": made[1].steps, "sent": sent}
    results["left before it failed"] = FailsHere.left
    torch.save(results, f"{folder}/{rank}.pt")
    both.close()


@contextlib.contextmanager
def sent_in_passes():
    """Of each reduce-scatter meanwhile: its size, and whether it set out while a backward pass ran."""
    sent, real = [], dist.ProcessGroup.reduce_scatter_tensor_coalesced

    @functools.wraps(real)
    def reduce_scatter(group, outputs, *args):
        sent.append((sum(output.numel() for output in outputs), torch._C._current_graph_task_id() != -1))
        return real(group, outputs, *args)

    dist.ProcessGroup.reduce_scatter_tensor_coalesced = reduce_scatter
    try:
        yield sent
    finally:
        dist.ProcessGroup.reduce_scatter_tensor_coalesced = real


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


def test_gradients_that_travel_early_are_the_same(results):
    """The same bits, whatever order a process's graph has, where one lacks a gradient, and where one begins anew."""
    for mine in results:
        for name in ("apart, overlapping", "apart, one begins anew"):
            assert mine[name]["steps"] == STEPS
            for ours, other in zip(mine[name]["states"], mine["apart"]["states"], strict=True):
                assert torch.equal(ours, other), name
            for ours, other in zip(mine[name]["numbers"], mine["apart"]["numbers"], strict=True):
                assert ours == pytest.approx(other, rel=1e-12)


def test_buckets_leave_in_one_order_and_early(results):
    sizes = [[size for size, _ in mine[name]["sent"]] for mine in results for name in mine if name.startswith("apart")]
    assert all(one == sizes[0] for one in sizes) and len(sizes[0]) == BUCKETS * STEPS
    assert not any(early for mine in results for _, early in mine["apart"]["sent"])
    early = [[early for _, early in mine["apart, overlapping"]["sent"]] for mine in results]
    # In steps with all gradients, all leave inside the pass; the other graph has the first bucket's gradients last.
    assert all(early[0][:BUCKETS]) and all(early[1][:BUCKETS])
    assert not all(early[0]) and not all(early[1])
    # Where a pass fails, some have left, unless the first one's gradients are incomplete, and are not sent again.
    assert results[0]["left before it failed"] == [2, 0, 2, 2]
    assert [early for _, early in results[0]["apart, one begins anew"]["sent"]] == early[0]


@pytest.mark.parametrize("recomputed", [0, 2])
def test_the_model_knows_when_its_gradients_come(recomputed):
    """A group is complete before the next one begins; all is in one of them."""
    from sequence_worker import make_inputs, make_model

    from stdit_fast.diffusion import IDDPM

    model, came = make_model(), []
    model.set_checkpointing(recomputed)
    group_of = {id(p): i for i, group in enumerate(model.gradient_order()) for p in group}
    assert group_of.keys() == {id(p) for p in model.parameters()} and len(set(group_of.values())) == 3
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: came.append(group_of[id(p)]))
    latents, t, noise, mask, arguments = make_inputs(2, 4, 4, 4, True)
    IDDPM().training_losses(model, latents, t, arguments, noise=noise, mask=mask)["loss"].mean().backward()
    blocks = [group for group in came if group < 2]
    assert blocks == sorted(blocks) and len(came) == len(group_of)
    assert sum(group == 2 for group in came[: came.index(1)]) <= 2, "what is not of a block comes after them"


@pytest.mark.parametrize("recomputed", [0, 2])
def test_the_model_waits_for_weights_before_it_uses_them(recomputed):
    """Weights that are garbage until they are waited for give the same prediction and the same keys of the text."""
    from sequence_worker import make_inputs, make_model

    class Deliveries:
        def __init__(self, model):
            self.groups = [[(p, p.detach().clone()) for p in group] for group in model.gradient_order()]
            for p in model.parameters():
                p.data.fill_(math.nan)

        @torch.no_grad()
        def wait(self, group=None):
            for p, value in self.groups[group]:
                p.copy_(value)

    latents, t, _, mask, arguments = make_inputs(2, 4, 4, 4, True)
    found = []
    for late in (False, True):
        model = make_model()
        model.set_checkpointing(recomputed)
        if late:
            model.arrivals = Deliveries(model)
        kv = model.encode_text(arguments["y"]).kv.detach()
        out = model(latents, t, x_mask=mask, **arguments)
        out.square().mean().backward()
        found.append([kv, out.detach(), *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *found))
