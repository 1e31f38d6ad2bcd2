"""The transformer: one block, the whole step, a sample; beside plain PyTorch and its compiler."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from stdit_fast import STDiT2, STDiT2Config, ops
from stdit_fast.benchmarks import sample, step
from stdit_fast.benchmarks.registry import Case
from stdit_fast.diffusion import denoise, make_scheduler
from stdit_fast.model.stdit2 import Conditioning

BLOCKS, QUICK_BLOCKS, CPU_BLOCKS = ("6x16x144", "1x16x3600", "24x1x256"), ("6x16x144",), ("1x2x36",)
STEPS, QUICK_STEPS, CPU_STEPS = ("144p-16-6", "256-1-24", "256-16-8"), ("144p-16-6",), ("144p-2-1",)
SAMPLES, CPU_SAMPLES = ("256-16-1",), ("144p-2-1",)
IMPLEMENTATIONS = ("fused", "reference", "compile")
DEPTH, CPU_DEPTH = 28, 1
CPU_WIDTH = {"hidden_size": 144, "num_heads": 2, "caption_channels": 64}
TOLERANCES = {"forward": 3e-2, "both": 0.15}  # a block rounds to bfloat16 some thirty times; gradients twice that


def _implementations(device: str, quick_without: tuple[str, ...] = ()) -> list[str]:
    """Ours first; on the CPU the plain one alone."""
    return [name for name in IMPLEMENTATIONS if name not in quick_without] if device == "cuda" else ["reference"]


# ------------------------------------------------------------------ one block


def block_cases(device: str, quick: bool) -> Iterator[Case]:
    """A block, forward, and forward and backward, of samples x frames x positions."""
    for size in CPU_BLOCKS if device == "cpu" else QUICK_BLOCKS if quick else BLOCKS:
        for direction in ("forward", "both"):
            config = block_config("reference", device)
            yield Case(
                "block",
                f"{size}-{direction}",
                {impl: partial(prepare_block, impl, size, direction, device) for impl in _implementations(device)},
                flops=block_flops(config, size) * (1 if direction == "forward" else 3),
                expected=partial(prepare_block, "reference", size, direction, device),
                tolerance=TOLERANCES[direction],
            )


def block_config(impl: str, device: str) -> STDiT2Config:
    backend = "fused" if impl == "fused" else "reference"
    return STDiT2Config(depth=1, backend=backend, **_width(device))


def _width(device: str) -> dict[str, int]:
    """What differs from XL/2 beside the depth."""
    return {} if device == "cuda" else CPU_WIDTH


def block_flops(config: STDiT2Config, size: str) -> int:
    """Operations of a block's forward pass, without the text's keys and values."""
    batch, frames, positions = map(int, size.split("x"))
    with_text = step.step_flops(config, batch, frames, positions) // (3 * config.depth)
    return with_text - batch * step.TOKENS_OF_TEXT * 4 * config.hidden_size**2


def prepare_block(impl: str, size: str, direction: str, device: str) -> Callable[[], tuple[Tensor, ...]]:
    """A call of one block; its results, or with "both" the gradients of what it takes and of its qkv weight."""
    batch, frames, positions = map(int, size.split("x"))
    config = block_config(impl, device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = STDiT2(config).to(dtype).train()
        step.fill_zeros(model)
        x = torch.randn(batch, frames, positions, config.hidden_size).to(dtype)
        modulation = (0.5 * torch.randn(batch, frames, 9, config.hidden_size)).to(dtype)
        kv = torch.randn(batch * step.TOKENS_OF_TEXT, 2, config.num_heads, config.head_dim).to(dtype)
        grads = [torch.randn_like(x) for _ in range(2)]
    cond = Conditioning(
        ops.text_layout(None, batch, step.TOKENS_OF_TEXT, torch.device(device)),
        ops.rotation_table(model.rope.freqs, frames),
    )
    block = model.blocks[0]
    weight = block.attn.qkv.weight
    if impl == "compile":
        torch.compiler.reset()
        block = torch.compile(block)
    if direction == "forward":

        @torch.no_grad()
        def forward() -> tuple[Tensor, Tensor]:
            x_out, branch = block(x, None, modulation, kv, cond)
            return x_out, branch.o

        return forward
    x, modulation, kv = (t.requires_grad_() for t in (x, modulation, kv))

    def both() -> tuple[Tensor, ...]:
        x_out, branch = block(x, None, modulation, kv, cond)
        return torch.autograd.grad((x_out, branch.o), (x, modulation, kv, weight), grads)

    return both


# ------------------------------------------------------------------ the whole


def step_cases(device: str, quick: bool) -> Iterator[Case]:
    """Forward and backward of the whole model; on the CPU of a small one of one block."""
    depth = DEPTH if device == "cuda" else CPU_DEPTH
    for name in CPU_STEPS if device == "cpu" else QUICK_STEPS if quick else STEPS:
        frames, height, width, batch = step.parse_case(name)
        config = STDiT2Config(depth=depth, **_width(device))
        yield Case(
            "step",
            name,
            {
                # The compiler's block is measured by its own suite; a whole step of it compiles for half a minute.
                impl: partial(prepare_step, impl, name, depth, device)
                for impl in _implementations(device, ("compile",) if quick else ())
            },
            flops=step.step_flops(config, batch, frames, step.positions_of(height, width)),
            host=True,
            rounds=5 if quick or device == "cpu" else 10,
            warmup=step.WARMUP if device == "cuda" else 1,
        )


def prepare_step(impl: str, case: str, depth: int, device: str) -> Callable[[], None]:
    """A call of the step suite's case."""
    model = step.build(impl, depth, device, **_width(device))
    model.set_cuda_graphs(impl == "fused" and device == "cuda")
    frames, height, width, batch = step.parse_case(case)
    inputs = step.make_inputs(model.config, frames, height, width, batch, device)
    if impl == "compile":
        torch.compiler.reset()
    grad = torch.randn(batch, model.config.out_channels, *inputs["x"].shape[2:], device=device)

    def call() -> None:
        model.zero_grad(set_to_none=True)
        model(**inputs).backward(grad)

    return call


def sample_cases(device: str, quick: bool) -> Iterator[Case]:
    """A sample with guidance, from noise to latents; few steps where time is short."""
    depth, steps = (CPU_DEPTH, 2) if device == "cpu" else (DEPTH, 10 if quick else 100)
    for name in CPU_SAMPLES if device == "cpu" else SAMPLES:
        frames, height, width, batch = step.parse_case(name)
        shape = STDiT2Config(depth=depth, **_width(device))
        one = step.step_flops(shape, 2 * batch, frames, step.positions_of(height, width)) // 3
        one -= depth * 2 * batch * step.TOKENS_OF_TEXT * 4 * shape.hidden_size**2
        yield Case(
            "sample",
            f"{name}-{steps}-steps",
            {
                impl: partial(prepare_sample, impl, name, steps, depth, device)
                for impl in _implementations(device, ("compile",) if quick else ())
            },
            flops=steps * one,
            host=True,
            rounds=3,
            warmup=1,
        )


def prepare_sample(impl: str, case: str, steps: int, depth: int, device: str) -> Callable[[], Tensor]:
    """A call of the sample suite's case."""
    model = step.build(impl, depth, device, **_width(device)).eval()
    frames, height, width, batch = step.parse_case(case)
    inputs = step.make_inputs(model.config, frames, height, width, batch, device)
    noise, scheduler = torch.randn_like(inputs["x"]), make_scheduler("iddpm")
    with torch.no_grad():
        predictor = sample.bind(model, inputs, 2, cuda_graphs=impl == "fused" and device == "cuda")

    @torch.no_grad()
    def call() -> Tensor:
        return denoise(predictor, scheduler, noise, num_steps=steps, guidance=sample.GUIDANCE)

    return call
