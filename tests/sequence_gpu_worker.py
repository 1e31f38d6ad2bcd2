"""What each process of tests/test_sequence_parallel_gpu.py runs under torchrun, on a GPU of its own, in bfloat16.

Loss and gradients are held to plain PyTorch in float32 on one GPU: once computed whole by one process, with the same
kernels, and once by a group. Sums come in another order there, so they may differ, but not be further from the truth.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sequence_worker import gradients, make_inputs
from torch import Tensor

from stdit_fast import STDiT2, STDiT2Config
from stdit_fast.diffusion import IDDPM
from stdit_fast.parallel.processes import Processes, launch
from stdit_fast.parallel.sequence import FrameSwitch, split_frames

# name: (samples, frames, height, width of the latents, masked, pieces of a rank's positions, blocks recomputed)
CASES = {
    "even": (2, 16, 18, 32, False, 1, 0),
    "odd, chunks": (2, 13, 18, 30, True, 2, 0),  # 135 positions
    "one sample, chunks, recomputed": (1, 9, 22, 30, True, 2, 2),
}


def make_model(dtype: torch.dtype, backend: str) -> STDiT2:
    """Two heads of 72; the same weights, exact in bfloat16, in any precision."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=144, depth=2, num_heads=2, caption_channels=16, model_max_length=6)
    model = STDiT2(STDiT2Config(**sizes, backend=backend)).train()
    for p in model.parameters():
        if p.count_nonzero() == 0:
            torch.nn.init.normal_(p, std=0.05)
        p.data = p.data.bfloat16().float()
    return model.to("cuda", dtype)


def on_gpu(*case):
    latents, t, noise, mask, arguments = make_inputs(*case)
    arguments = {k: v if k == "mask" else v.cuda() for k, v in arguments.items()}
    return latents.cuda(), t.cuda(), noise.cuda(), mask.cuda(), arguments


def losses(model, inputs, frames: slice = slice(None), counted: Tensor | None = None) -> Tensor:
    latents, t, noise, mask, arguments = inputs
    return IDDPM().training_losses(
        model,
        latents[:, :, frames],
        t,
        arguments,
        noise=noise[:, :, frames],
        mask=mask[:, frames],
        counted=counted,
    )["loss"]


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors of each gradient, and of all as one vector."""
    scale = {k: g.norm().clamp(min=1e-4 * max(w.norm() for w in want.values())) for k, g in want.items()}
    each = {k: float((got[k].float() - g).norm() / scale[k]) for k, g in want.items()}
    squares = [torch.stack([(got[k].float() - g).square().sum(), g.square().sum()]) for k, g in want.items()]
    difference, size = torch.stack(squares).sum(0).sqrt().tolist()
    return each | {"all": difference / size}


def shared_gradients(group, model, inputs, frames: int, chunks: int) -> tuple[Tensor, dict[str, Tensor]]:
    switch = FrameSwitch(group, frames, chunks)
    with split_frames(model, switch):
        loss = losses(model, inputs, switch.frames, inputs[3].sum(1).float())
    loss.mean().backward()
    total, found = loss.detach().clone(), gradients(model)
    for value in (total, *found.values()):
        dist.all_reduce(value, group=group.device)
    return total, found


def compare(group, name: str) -> dict:
    *case, chunks, recomputed = CASES[name]
    inputs = on_gpu(*case)
    truth = make_model(torch.float32, "reference")
    loss = losses(truth, inputs)
    loss.mean().backward()
    want = gradients(truth)
    model = make_model(torch.bfloat16, "fused")
    alone = losses(model, inputs)
    alone.mean().backward()
    model.set_checkpointing(recomputed)
    alone_errors = errors(gradients(model), want)
    total, found = shared_gradients(group, model, inputs, case[1], chunks)
    again = shared_gradients(group, model, inputs, case[1], chunks)
    return {
        "loss": [float((x.detach() - loss.detach()).norm() / loss.detach().norm()) for x in (alone, total)],
        "gradients": [alone_errors, errors(found, want)],
        "repeats": torch.equal(total, again[0]) and all(torch.equal(found[k], again[1][k]) for k in found),
    }


def mixed_steps(processes: Processes) -> dict:
    """Gradients inside ZeRO where the first two ranks share a video and the others have images, as CUDA graphs."""
    import_booster()
    from colossalai.booster import Booster

    from stdit_fast.parallel.sequence_plugins import SequenceShardedPlugin

    rank, world_size = processes.rank, processes.world_size
    video, image = (1, 9, 18, 32, True), (3, 1, 18, 32, False)
    batches = [video] + [image] * (world_size - 2)
    plugin = SequenceShardedPlugin(0.0, processes, [2])
    model = make_model(torch.float32, "fused")
    model.set_cuda_graphs(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    wrapped, optimizer, *_ = Booster(plugin=plugin).boost(model, optimizer)
    bare = wrapped.unwrap()

    truth = make_model(torch.float32, "reference")
    for case in batches:
        (losses(truth, on_gpu(*case)).mean() / len(batches)).backward()
    want = gradients(truth)

    own = on_gpu(*(video if rank < 2 else image))
    worst, graphed, found = 0.0, False, []
    for overlaps in (False, True, True, True, False):  # the third is captured
        parts = 2 if rank < 2 else 1
        with plugin.local_gradients(wrapped), plugin.shared(bare, parts, own[0].shape[2], 5):
            frames = slice(None) if bare.switch is None else bare.switch.frames
            counted = None if bare.switch is None else own[3].sum(1).float()
            loss = losses(wrapped, own, frames, counted).mean()
        optimizer.overlaps = overlaps
        with optimizer.reducing():
            optimizer.backward(loss * world_size / len(batches))
        graphed = graphed or bare.last_graphed
        optimizer.reduce_gradients()
        whole = dict(zip(want, optimizer.gather(optimizer.gradients()), strict=True))
        found.append(whole)
        worst = max(worst, errors(whole, want)["all"])
        optimizer.zero_grad()
    same = all(torch.equal(g, found[-1][name]) for name, g in found[-2].items())
    return {"worst": worst, "graphed": graphed, "same_early": same}


def import_booster() -> None:
    from stdit_fast.parallel.processes import import_colossalai

    import_colossalai()


def main(folder: Path) -> None:
    processes = launch(0)
    from stdit_fast.parallel.groups import SequenceGroups

    sizes = [n for n in (2, 4) if processes.world_size % n == 0]
    groups = SequenceGroups(processes, sizes)
    result = {"cases": {f"{size}: {name}": compare(groups[size], name) for size in sizes for name in CASES}}
    result["mixed"] = mixed_steps(processes)
    (folder / f"{processes.rank}.json").write_text(json.dumps(result))
    processes.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
