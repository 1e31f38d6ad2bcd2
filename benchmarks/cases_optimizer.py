"""From gradients to new weights and averages: norm, clipping, AdamW, EMA, on the shapes of the real model."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from stdit_fast import STDiT2, STDiT2Config
from stdit_fast.benchmarks import peers
from stdit_fast.benchmarks.registry import Case

CPU_CONFIG = {"depth": 1, "hidden_size": 144, "num_heads": 2, "caption_channels": 64}
# float32: the norm reads g; AdamW reads p, g, m, v and writes p, m, v; the average is read and written.
BYTES_PER_PARAMETER = 4 * (1 + 7 + 2)
DECAY, MAX_NORM, LEARNING_RATE = 0.9999, 1.0, 2e-5

# Takes weights with gradients; answers a call that steps them, without the average.
Stepper = Callable[[list[Tensor]], Callable[[], None]]


def cases(device: str, quick: bool) -> Iterator[Case]:
    """One step on all parameters."""
    count = sum(shape.numel() for shape in shapes(device))
    members: dict[str, Callable[[], Stepper]] = {"stdit_fast": lambda: _torch(fused=device == "cuda")}
    if device == "cuda":
        members |= {"torch-fused": lambda: _torch(fused=True), "torch-foreach": lambda: _torch(foreach=True)}
        members |= {name: partial(_apex, find) for name, find in peers.ADAMW.items()}
    yield Case(
        "optimizer",
        f"{count / 1e6:.0f}M-parameters",
        {name: partial(prepare, find, name == "stdit_fast", device) for name, find in members.items()},
        bytes=BYTES_PER_PARAMETER * count,
        expected=partial(prepare, lambda: _torch(foreach=False), False, device),
        tolerance=1e-5,
        rounds=10,
        warmup=2,
    )


def shapes(device: str) -> list[torch.Size]:
    """The parameters' shapes of the real model, on the CPU of a tiny one."""
    with torch.device("meta"):
        model = STDiT2(STDiT2Config(**({} if device == "cuda" else CPU_CONFIG)))
    return [p.shape for p in model.parameters() if p.requires_grad]


def prepare(find: Callable[[], Stepper], ours: bool, device: str) -> Callable[[], Tensor]:
    """A call that clips, steps and averages; it answers the weights' and averages' sums of squares after its first."""
    stepper = find()
    generator = torch.Generator(device).manual_seed(0)
    weights = [torch.randn(s, device=device, generator=generator).requires_grad_() for s in shapes(device)]
    for w in weights:
        w.grad = torch.randn(w.shape, device=device, generator=generator)
    step = stepper(weights)
    plain = [w.detach() for w in weights]
    averages, average = _average(plain, ours)

    def norm_of(tensors: list[Tensor]) -> Tensor:
        return torch.stack(torch._foreach_norm(tensors)).double().square().sum()

    @torch.no_grad()
    def call() -> None:
        torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)
        step()
        average()

    call()
    first = torch.stack([norm_of(plain), norm_of(averages)])

    def timed() -> Tensor:
        call()
        return first

    return timed


def _average(weights: list[Tensor], ours: bool) -> tuple[list[Tensor], Callable[[], None]]:
    """(averages, a call that moves them): training's own, or PyTorch's one call for all tensors."""
    if ours:
        from stdit_fast.train.ema import EMA

        ema = EMA(weights, DECAY)
        return ema.averages, lambda: ema.update(weights)
    averages = [w.clone() for w in weights]
    return averages, lambda: torch._foreach_lerp_(averages, weights, 1 - DECAY)


def _torch(**options: bool) -> Stepper:
    def stepper(weights: list[Tensor]) -> Callable[[], None]:
        return torch.optim.AdamW(weights, LEARNING_RATE, weight_decay=0.0, **options).step

    return stepper


def _apex(find: Callable) -> Stepper:
    adam = find()

    def stepper(weights: list[Tensor]) -> Callable[[], None]:
        return adam(weights, LEARNING_RATE, weight_decay=0.0, adam_w_mode=True).step

    return stepper
