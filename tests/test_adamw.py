"""AdamW's step: the definition against PyTorch's optimizer in float64, and the kernels against the definition."""

import math

import pytest
import torch
from torch import Tensor

from stdit_fast import _cuda
from stdit_fast.ops import registry
from stdit_fast.ops.adamw import AdamWStep, Hyperparameters, definition, library_step, square_sum_definition

ON_GPU, GPU_REASON = _cuda.available()
needs_gpu = pytest.mark.skipif(not ON_GPU, reason=GPU_REASON)
SETTINGS = Hyperparameters(1e-3, (0.9, 0.95), 1e-8, 0.02, max_norm=1.0, average_decay=0.99)
SIZES = [(3,), (5, 7), (1,), (2, 3, 4)]
# Around the kernels' widths: a vector of 4, a step of 1,024, two of them, a tile of 8,192 values.
ODD = [1, 2, 3, 4, 5, 1023, 1024, 1025, 2049, 8191, 8192, 8193, 24_583, 100_003, 0, 65_536]


def values(shape, seed: int, scale: float = 1.0, offset: int = 0) -> Tensor:
    """Normal values, `offset` elements behind an aligned address."""
    size = math.prod(shape)
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(offset + size, generator=generator))[offset:].view(shape)


class Case:
    """Tensors of an optimizer that has made some steps, and gradients for the next ones."""

    def __init__(self, shapes, averages=True, working=True, dtype=torch.float32, offset=0, seed=0):
        self.shapes, self.seed = shapes, seed

        def tensors(kind, scale=1.0):
            return [values(shape, 100 * i + kind + seed, scale, offset) for i, shape in enumerate(shapes)]

        self.masters = [t.to(dtype) for t in tensors(1)]
        self.exp_avgs = [t.to(dtype) for t in tensors(2, 1e-3)]
        self.exp_avg_sqs = [t.square().to(dtype) for t in tensors(3, 1e-3)]
        self.averages = [t.to(dtype) for t in tensors(4)] if averages else None
        self.working = [t.bfloat16() for t in self.masters] if working else None
        self.steps = torch.arange(len(shapes)).float()

    def grads(self, step: int, dtype=torch.bfloat16, device="cpu", offset=0, scale=1e-2) -> list[Tensor | None]:
        seed = 7919 * (step + 1) + self.seed
        grads = [values(shape, seed + i, scale).to(dtype) for i, shape in enumerate(self.shapes)]
        return [placed(grad, device, offset) for grad in grads]

    def on(self, device, offset=0) -> AdamWStep:
        def move(tensors):
            return None if tensors is None else [placed(t, device, offset) for t in tensors]

        lists = (self.masters, self.exp_avgs, self.exp_avg_sqs)
        return AdamWStep(
            *map(move, lists), self.steps.to(device, copy=True), move(self.averages), move(self.working)
        )  # fmt: skip


def placed(tensor: Tensor, device, offset: int) -> Tensor:
    """A copy on a device, `offset` elements behind an aligned address, among sevens."""
    around = torch.full((offset + tensor.numel() + 5,), 7.0, dtype=tensor.dtype, device=device)
    view = around[offset : offset + tensor.numel()]
    return view.copy_(tensor.flatten()).view(tensor.shape)


def run(step: AdamWStep, grads, settings=SETTINGS, loss=None) -> float:
    square_sum = step.square_sum(grads)
    step.update(grads, square_sum, loss, settings)
    return float(square_sum)


def everything(step: AdamWStep) -> list[Tensor]:
    lists = (step.masters, step.exp_avgs, step.exp_avg_sqs, step.averages or [], step.working or [], [step.steps])
    return [tensor.cpu() for tensors in lists for tensor in tensors]


def same(mine: list[Tensor], other: list[Tensor]) -> bool:
    return len(mine) == len(other) and all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


# ------------------------------------------------------------- the definition


@pytest.mark.parametrize("max_norm", [math.inf, 0.05])
def test_definition_is_pytorchs_adamw_in_float64(max_norm):
    """Five steps, clipped as torch.nn.utils.clip_grad_norm_ does it; one tensor has no gradient every other time."""
    settings = Hyperparameters(1e-2, (0.9, 0.99), 1e-6, 0.1, max_norm, average_decay=0.9)
    case = Case(SIZES, working=False, dtype=torch.float64)
    step = case.on("cpu")
    params = [torch.nn.Parameter(m.clone()) for m in case.masters]
    averages = [a.clone() for a in case.averages]
    theirs = torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    for i, p in enumerate(params):
        moments = {"exp_avg": case.exp_avgs[i].clone(), "exp_avg_sq": case.exp_avg_sqs[i].clone()}
        theirs.state[p] = {"step": torch.tensor(float(i)), **moments}
    for number in range(5):
        grads = [g.double() for g in case.grads(number, torch.float32)]
        if number % 2:
            grads[1] = None
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.clone()
        norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
        theirs.step()
        for average, p in zip(averages, params, strict=True):
            average.mul_(0.9).add_(p.detach(), alpha=0.1)
        assert run(step, grads, settings) == pytest.approx(float(norm) ** 2, rel=1e-12)
    assert step.steps.tolist() == [5, 4, 7, 8]
    for i, p in enumerate(params):
        torch.testing.assert_close(step.masters[i], p.detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(step.exp_avg_sqs[i], theirs.state[p]["exp_avg_sq"], rtol=1e-12, atol=0)
        torch.testing.assert_close(step.averages[i], averages[i], rtol=1e-12, atol=1e-14)


def errors(results: list[Tensor], exact: list[Tensor]) -> float:
    pairs = zip(results, exact, strict=True)
    return math.sqrt(sum(float((a.double() - b).square().sum()) for a, b in pairs))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_error_is_no_larger_than_that_of_pytorchs_fused_optimizer(device):
    """Masters and moments in float32 after twenty steps, against float64."""
    case = Case([(40_009,), (3, 1001)], averages=False, working=False)
    ours, exact = case.on(device), Case([(40_009,), (3, 1001)], False, False, torch.float64).on("cpu")
    params = [torch.nn.Parameter(m.to(device, copy=True)) for m in case.masters]
    theirs = torch.optim.AdamW(params, lr=SETTINGS.lr, betas=SETTINGS.betas, eps=1e-8, weight_decay=0.02, fused=True)
    for i, p in enumerate(params):
        theirs.state[p] = {
            "step": torch.tensor(float(i), device=device),
            "exp_avg": case.exp_avgs[i].to(device, copy=True),
            "exp_avg_sq": case.exp_avg_sqs[i].to(device, copy=True),
        }
    settings = Hyperparameters(SETTINGS.lr, SETTINGS.betas, 1e-8, 0.02)
    for number in range(20):
        grads = case.grads(number, torch.float32)
        run(exact, [g.double() for g in grads], settings)
        run(ours, [g.to(device) for g in grads], settings)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.to(device)
        theirs.step()
    for mine, name, truth in ((ours.masters, None, exact.masters), (ours.exp_avgs, "exp_avg", exact.exp_avgs),
                              (ours.exp_avg_sqs, "exp_avg_sq", exact.exp_avg_sqs)):  # fmt: skip
        other = [p.detach() if name is None else theirs.state[p][name] for p in params]
        mine, other = ([t.cpu() for t in tensors] for tensors in (mine, other))
        assert 0 < errors(mine, truth) <= 1.001 * errors(other, truth), name


def test_working_copies_are_the_rounded_masters_and_averages_follow():
    step = Case(SIZES).on("cpu")
    start = [a.clone() for a in step.averages]
    run(step, Case(SIZES).grads(0))
    for master, working, average, old in zip(step.masters, step.working, step.averages, start, strict=True):
        assert torch.equal(working, master.bfloat16())
        torch.testing.assert_close(average, 0.99 * old + 0.01 * master, rtol=1e-6, atol=1e-6)


POISONED = [("grad", math.nan), ("grad", math.inf), ("loss", math.nan), ("loss", -math.inf)]


def poison(where: str, value: float, grads, device):
    loss = torch.tensor(value if where == "loss" else 0.3, dtype=torch.float64, device=device)
    if where == "grad":
        grads[-1].flatten()[-1] = value
    return loss


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize(("where", "value"), POISONED)
def test_a_step_that_is_not_finite_changes_nothing(where, value, device):
    case = Case([(3,), (9001,), (70_000,)])
    step = case.on(device)
    before = [t.clone() for t in everything(step)]
    grads = case.grads(0, device=device)
    run(step, grads, loss=poison(where, value, grads, device))
    assert same(everything(step), before)
    run(step, case.grads(0, device=device), loss=torch.zeros((), dtype=torch.float64, device=device))
    assert step.steps.tolist() == [1, 2, 3] and not any(map(torch.equal, everything(step), before))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
def test_the_librarys_step_is_the_definition_to_rounding(grad_dtype, device):
    """PyTorch's kernels, for GPUs without ours: clipped, with a tensor that has no gradient, then a skipped step."""
    case = Case([(3, 5), (9001,), (70_000,), (11,)])
    step, plain = case.on(device), case.on("cpu")
    for number in range(3):
        grads = case.grads(number, grad_dtype)
        grads[number] = None
        on_device = [None if g is None else g.to(device) for g in grads]
        before = [None if g is None else g.clone() for g in on_device]
        library_step(step, on_device, square_sum_definition(on_device, step.steps.device), None, SETTINGS)
        definition(plain, grads, square_sum_definition(grads, torch.device("cpu")), None, SETTINGS)
        assert all(g is None or torch.equal(g, b) for g, b in zip(on_device, before, strict=True))
    assert torch.equal(step.steps.cpu(), plain.steps)
    for mine, other in zip(everything(step), everything(plain), strict=True):
        coarse = mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, other, rtol=1e-2 if coarse else 1e-5, atol=1e-4 if coarse else 1e-7)
    before = [t.clone() for t in everything(step)]
    nowhere = torch.tensor(math.nan, dtype=torch.float64, device=device)
    library_step(step, on_device, torch.ones_like(nowhere), nowhere, SETTINGS)
    assert same(everything(step), before)


def test_large_gradients_have_a_norm():
    """1e30 squared is no float32, but a float64."""
    step = Case([(4,)]).on("cpu")
    grads = [torch.full((4,), 1e30)]
    assert run(step, grads) == pytest.approx(4e60)
    assert step.steps.tolist() == [1]


def test_no_gradient_at_all():
    step = Case(SIZES).on("cpu")
    before = [t.clone() for t in everything(step)]
    assert run(step, [None] * len(SIZES)) == 0
    n = len(SIZES)
    assert same(everything(step)[: 3 * n], before[: 3 * n]) and step.steps.tolist() == [0, 1, 2, 3]
    assert not any(map(torch.equal, step.averages, Case(SIZES).averages))  # they follow all the same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(exp_avgs=[torch.zeros(2)]), r"1 exp_avgs for 2 masters"),
        (dict(exp_avg_sqs=[torch.zeros(2), torch.zeros(4)]), r"exp_avg_sqs\[1\] has 4 elements, its master 3"),
        (dict(masters=[torch.zeros(2), torch.zeros(3).bfloat16()]), r"masters\[1\] is torch.bfloat16"),
        (dict(averages=[torch.zeros(2), torch.zeros(3).half()]), r"averages\[1\] is torch.float16"),
        (dict(working=[torch.zeros(2), torch.zeros(3)]), r"working\[0\] is torch.float32, expected torch.bfloat16"),
        (dict(averages=[torch.zeros(2), torch.zeros(3, device="meta")]), r"averages\[1\] is on meta"),
        (dict(masters=[torch.zeros(2), torch.zeros(6)[::2]]), r"masters\[1\] must be contiguous"),
        (dict(steps=torch.zeros(2, dtype=torch.int64)), r"steps is torch.int64 \[2\], expected torch.float32 \[2\]"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(change, message):
    def zeros():
        return [torch.zeros(2), torch.zeros(3)]

    whole = dict(masters=zeros(), exp_avgs=zeros(), exp_avg_sqs=zeros(), steps=torch.zeros(2))
    with pytest.raises(ValueError, match=message):
        AdamWStep(**(whole | change))


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([torch.zeros(3)], "1 gradients for 2 masters"),
        ([torch.zeros(3), torch.zeros(3)], r"grads\[1\] has 3 elements, its master 35"),
        ([torch.zeros(3), torch.zeros(35).bfloat16()], "gradients of several dtypes, torch.bfloat16, torch.float32"),
        ([None, torch.zeros(35).half()], r"grads\[1\] is torch.float16"),
        ([None, torch.zeros(70)[::2]], r"grads\[1\] must be contiguous"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(grads, message):
    with pytest.raises(ValueError, match=message):
        Case([(3,), (35,)]).on("cpu").square_sum(grads)


def test_a_decay_outside_0_to_1_is_refused():
    step = Case([(3,)]).on("cpu")
    with pytest.raises(ValueError, match="average_decay is 1.5"):
        run(step, [torch.zeros(3)], Hyperparameters(1e-3, (0.9, 0.99), 1e-8, 0, average_decay=1.5))


def test_the_registry_says_what_serves_and_why():
    (serving,) = [s for s in registry.serving() if s.op == "adamw"]
    without = "library" if torch.cuda.is_available() else registry.REFERENCE
    assert serving.implementation == ("cuda" if ON_GPU else without)
    assert serving.reason == GPU_REASON


# ---------------------------------------------------------------- the kernels


def against_definition(case: Case, grad_dtype=torch.bfloat16, offset=0, grad_offset=0, without=()) -> None:
    """Three steps give the definition's bits, and the memory around the tensors stays as it is."""
    ours, plain, again = case.on("cuda", offset), case.on("cpu"), case.on("cuda", offset)
    for number in range(3):
        grads = case.grads(number, grad_dtype)
        grads = [None if (i + number) in without else g for i, g in enumerate(grads)]
        on_gpu = [None if g is None else placed(g, "cuda", grad_offset) for g in grads]
        loss = torch.tensor(0.1, dtype=torch.float64)
        square_sum = square_sum_definition(grads, torch.device("cpu"))
        definition(plain, grads, square_sum, loss, SETTINGS)
        assert run(ours, on_gpu, loss=loss.cuda()) == pytest.approx(float(square_sum), rel=1e-13)
        run(again, on_gpu, loss=loss.cuda())
    assert same(everything(ours), everything(again))
    for i, (mine, other) in enumerate(zip(everything(ours), everything(plain), strict=True)):
        assert torch.equal(mine, other), (i, int((mine != other).sum()))
    for tensors in (ours.masters, ours.exp_avgs, ours.exp_avg_sqs, ours.averages or [], ours.working or []):
        for tensor in tensors:
            around = torch.empty(0, dtype=tensor.dtype, device="cuda").set_(tensor.untyped_storage())
            assert (around[:offset] == 7).all() and (around[offset + tensor.numel() :] == 7).all()


@needs_gpu
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("averages", "working"), [(True, True), (False, True), (True, False), (False, False)])
def test_kernels_give_the_bits_of_the_definition(grad_dtype, averages, working):
    against_definition(Case([(size,) for size in ODD], averages, working), grad_dtype)


@needs_gpu
@pytest.mark.parametrize(("offset", "grad_offset"), [(1, 0), (0, 1), (2, 3), (0, 2)])
def test_kernels_take_any_alignment(offset, grad_offset):
    against_definition(Case([(size,) for size in ODD]), offset=offset, grad_offset=grad_offset)


@needs_gpu
def test_kernels_leave_tensors_without_gradient_to_their_averages():
    against_definition(Case([(size,) for size in ODD]), without=(3, 9, 12))


@needs_gpu
def test_kernels_take_more_tensors_than_one_argument_holds():
    against_definition(Case([((37 * i) % 5000,) for i in range(1100)]))


@needs_gpu
def test_kernels_clip_by_the_norm_that_they_are_given():
    """A square sum of several processes takes the place of this one's."""
    case = Case([(size,) for size in ODD])
    ours, plain, grads = case.on("cuda"), case.on("cpu"), case.grads(0)
    whole = 3 * square_sum_definition(grads, torch.device("cpu"))
    definition(plain, grads, whole, None, SETTINGS)
    on_gpu = [g.cuda() for g in grads]
    ours.square_sum(on_gpu)
    ours.update(on_gpu, whole.cuda(), None, SETTINGS)
    assert same(everything(ours), everything(plain))


@needs_gpu
def test_kernels_run_on_the_current_stream_and_in_a_cuda_graph():
    case = Case([(9000,), (70_001,)])
    ours, plain = case.on("cuda"), case.on("cpu")
    grads = [torch.zeros_like(g) for g in case.grads(0, device="cuda")]
    ours.square_sum(grads)  # loads the kernels, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        square_sum = ours.square_sum(grads)
        ours.update(grads, square_sum, None, SETTINGS)
    for number in range(2):
        new = case.grads(number)
        torch.cuda._sleep(100_000_000)
        for grad, value in zip(grads, new, strict=True):
            grad.copy_(value)
        graph.replay()
        definition(plain, new, square_sum_definition(new, torch.device("cpu")), None, SETTINGS)
    assert same(everything(ours), everything(plain))


@needs_gpu
def test_kernels_take_more_elements_than_32_bits_count():
    size = 2**32 + 5
    if torch.cuda.mem_get_info()[0] < 14 * size:
        pytest.skip("needs 56 GiB of free GPU memory")
    master, exp_avg, exp_avg_sq = (torch.zeros(size, device="cuda") for _ in range(3))
    step = AdamWStep([master], [exp_avg], [exp_avg_sq], torch.zeros(1, device="cuda"))
    grad = torch.ones(size, device="cuda", dtype=torch.bfloat16)
    assert run(step, [grad], Hyperparameters(0.5, (0.9, 0.99), 0.0, 0.0)) == size
    assert master.min().item() == master.max().item() == pytest.approx(-0.5, rel=1e-6)


@pytest.mark.skipif(not ON_GPU or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_follow_their_tensors_to_another_gpu():
    case = Case([(5000,)])
    ours, plain, grads = case.on("cuda:1"), case.on("cpu"), case.grads(0)
    run(ours, [g.to("cuda:1") for g in grads])
    run(plain, grads)
    assert same(everything(ours), everything(plain)) and torch.cuda.current_device() == 0
