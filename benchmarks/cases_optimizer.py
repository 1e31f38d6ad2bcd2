"""From gradients to new weights and averages: norm, clipping, AdamW, EMA, on the shapes of the real model."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from stdit_fast import STDiT2, STDiT2Config
from stdit_fast.benchmarks import peers
from stdit_fast.benchmarks.registry import Case
from stdit_fast.ops.adamw import AdamWStep, Hyperparameters

CPU_CONFIG = {"depth": 1, "hidden_size": 144, "num_heads": 2, "caption_channels": 64}
# float32: the norm reads g; AdamW reads p, g, m, v and writes p, m, v; the average is read and written.
BYTES_PER_PARAMETER = 4 * (1 + 7 + 2)
DECAY, MAX_NORM, LEARNING_RATE = 0.9999, 1.0, 2e-5
WATCHED = 8  # tensors whose change is held against what is expected

# Takes weights with gradients, and their averages; answers a call that clips, steps and averages.
Stepper = Callable[[list[Tensor], list[Tensor]], Callable[[], None]]


def cases(device: str, quick: bool) -> Iterator[Case]:
    """One step on all parameters."""
    count = sum(shape.numel() for shape in shapes(device))
    members: dict[str, Callable[[], Stepper]] = {"stdit_fast": lambda: ours}
    if device == "cuda":
        members |= {"torch-fused": lambda: _torch(fused=True), "torch-foreach": lambda: _torch(foreach=True)}
        members |= {name: partial(_apex, find) for name, find in peers.ADAMW.items()}
    yield Case(
        "optimizer",
        f"{count / 1e6:.0f}M-parameters",
        {name: partial(prepare, find, device) for name, find in members.items()},
        bytes=BYTES_PER_PARAMETER * count,
        expected=partial(prepare, lambda: _torch(foreach=False), device),
        tolerance=1e-2,  # changes of about 2e-5 and 5e-5 of values of about 1, in float32
        rounds=10,
        warmup=2,
    )


def shapes(device: str) -> list[torch.Size]:
    """The parameters' shapes of the real model, on the CPU of a tiny one."""
    with torch.device("meta"):
        model = STDiT2(STDiT2Config(**({} if device == "cuda" else CPU_CONFIG)))
    return [p.shape for p in model.parameters() if p.requires_grad]


def prepare(find: Callable[[], Stepper], device: str) -> Callable[[], tuple[Tensor, ...]]:
    """A call that clips, steps and averages; it answers by how much its first changed some weights and averages."""
    stepper = find()
    generator = torch.Generator(device).manual_seed(0)
    weights = [torch.randn(s, device=device, generator=generator).requires_grad_() for s in shapes(device)]
    for w in weights:
        w.grad = torch.randn(w.shape, device=device, generator=generator)
    averages = [0.5 * w.detach() for w in weights]
    call = stepper(weights, averages)

    watched = [*weights[:: len(weights) // WATCHED], *averages[:: len(averages) // WATCHED]]
    before = [tensor.detach().double() for tensor in watched]
    call()
    changes = tuple(tensor.detach().double() - old for tensor, old in zip(watched, before, strict=True))
    del before

    def timed() -> tuple[Tensor, ...]:
        call()
        return changes

    return timed


def ours(weights: list[Tensor], averages: list[Tensor]) -> Callable[[], None]:
    """Training's own two passes; the gradients are not clipped in their place, as they are by the others."""
    masters, grads = [w.detach() for w in weights], [w.grad for w in weights]
    moments = [[torch.zeros_like(master) for master in masters] for _ in range(2)]
    adamw = AdamWStep(masters, *moments, torch.zeros(len(masters), device=masters[0].device), averages)
    settings = Hyperparameters(LEARNING_RATE, (0.9, 0.999), 1e-8, 0.0, MAX_NORM, DECAY)
    return lambda: adamw.update(grads, adamw.square_sum(grads), None, settings)


def _with(step: Callable[[], None], weights: list[Tensor], averages: list[Tensor]) -> Callable[[], None]:
    """Clipping, a step, and the averages by PyTorch's one call for all tensors."""
    plain = [w.detach() for w in weights]

    @torch.no_grad()
    def call() -> None:
        torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)
        step()
        torch._foreach_lerp_(averages, plain, 1 - DECAY)

    return call


def _torch(**options: bool) -> Stepper:
    def stepper(weights: list[Tensor], averages: list[Tensor]) -> Callable[[], None]:
        step = torch.optim.AdamW(weights, LEARNING_RATE, weight_decay=0.0, **options).step
        return _with(step, weights, averages)

    return stepper


def _apex(find: Callable) -> Stepper:
    adam = find()

    def stepper(weights: list[Tensor], averages: list[Tensor]) -> Callable[[], None]:
        return _with(adam(weights, LEARNING_RATE, weight_decay=0.0, adam_w_mode=True).step, weights, averages)

    return stepper
