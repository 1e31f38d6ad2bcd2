"""What each process of tests/test_sequence_parallel_gpu.py runs: torchrun ... sequence_gpu_worker.py FOLDER RUNS.

On GPUs, over NCCL, in bfloat16, with the kernels; without GPUs the same over gloo, in float32, in plain PyTorch. Loss
and gradients are held to plain PyTorch in float32 in one process: once computed whole by one process, with the same
kernels, and once by a group. Sums come in another order there, so they may differ, but not be further from the truth.

RUNS is JSON: {name: the command line of a training run}. Processes write what they found into FOLDER/RANK.json. One
that is still there after DEADLINE says where it is, and ends.
"""

import gc
import hashlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from sequence_worker import gradients, make_inputs
from torch import Tensor

from stdit_fast import STDiT2, STDiT2Config
from stdit_fast.diffusion import IDDPM
from stdit_fast.parallel.groups import SequenceGroups
from stdit_fast.parallel.processes import Processes, end_after, launch
from stdit_fast.parallel.sequence import FrameSwitch, split_frames

ON_GPU = torch.cuda.is_available()
DTYPE, BACKEND = (torch.bfloat16, "fused") if ON_GPU else (torch.float32, "reference")
DEADLINE = 150 if ON_GPU else 280  # s
COLLECTIVE_TIMEOUT = 90  # s; a process may compile kernels while the other waits

# name: (samples, frames, height, width of the latents, masked, pieces of a rank's positions, blocks recomputed)
CASES = {
    "even": (2, 16, 18, 32, False, 1, 0),
    "odd, chunks": (2, 13, 18, 30, True, 2, 0),  # 135 positions
    "one long sample, chunks, recomputed": (1, 33, 10, 14, True, 2, 2),  # 35 positions
}
VIDEO, IMAGE, CLIP = (1, 13, 18, 32, True), (3, 1, 18, 32, False), (1, 13, 10, 14, False)


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGUN:.1f} s, rank {dist.get_rank()}] {text}", file=sys.stderr, flush=True)


def make_model(dtype: torch.dtype, backend: str) -> STDiT2:
    """Two heads of 72; the same weights, exact in bfloat16, in any precision."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=144, depth=2, num_heads=2, caption_channels=16, model_max_length=6)
    model = STDiT2(STDiT2Config(**sizes, backend=backend)).train()
    for p in model.parameters():
        if p.count_nonzero() == 0:
            torch.nn.init.normal_(p, std=0.05)
        p.data = p.data.bfloat16().float()
    return model.to(device(), dtype)


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")


def on_device(*case):
    latents, t, noise, mask, arguments = make_inputs(*case)
    arguments = {k: v if k == "mask" else v.to(device()) for k, v in arguments.items()}
    return *(value.to(device()) for value in (latents, t, noise, mask)), arguments


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


def computed_alone(name: str) -> dict:
    """Loss and gradients of a case by one process: the truth, and with what groups compute with."""
    *case, _, _ = CASES[name]
    inputs, results = on_device(*case), {}
    for kind, model in (("truth", make_model(torch.float32, "reference")), ("alone", make_model(DTYPE, BACKEND))):
        loss = losses(model, inputs)
        loss.mean().backward()
        results[kind] = loss.detach(), gradients(model)
    return results


def compare(group, name: str, alone: dict) -> dict:
    *case, chunks, recomputed = CASES[name]
    inputs = on_device(*case)
    (loss, want), (own_loss, own) = alone["truth"], alone["alone"]
    model = make_model(DTYPE, BACKEND)
    model.set_checkpointing(recomputed)
    total, found = shared_gradients(group, model, inputs, case[1], chunks)
    values = b"".join(value.float().cpu().numpy().tobytes() for value in (total, *found.values()))
    again = shared_gradients(group, model, inputs, case[1], chunks)
    return {
        "loss": [float((x - loss).norm() / loss.norm()) for x in (own_loss, total)],
        "gradients": [errors(own, want), errors(found, want)],
        "digest": hashlib.sha256(values).hexdigest(),
        "repeats": torch.equal(total, again[0]) and all(torch.equal(found[k], again[1][k]) for k in found),
    }


def batches_of(rank: int) -> list[tuple[tuple, int]]:
    """(case, ranks that share it) of a rank's two batches: one that a pair shares, and images or a clip of its own."""
    return [(VIDEO, 2), (CLIP if rank % 2 else IMAGE, 1)]


def mixed_steps(processes: Processes) -> dict:
    """Gradients inside the optimizer of training where ranks share a video, then have batches of their own.

    On GPUs that is ZeRO, and the latter are CUDA graphs from the third step on.
    """
    from colossalai.booster import Booster

    from stdit_fast.parallel.sequence_plugins import SequenceReplicatedPlugin, SequenceShardedPlugin

    rank, world_size = processes.rank, processes.world_size
    plugin = (SequenceShardedPlugin if ON_GPU else SequenceReplicatedPlugin)(0.0, processes, [2])
    model = make_model(torch.float32, BACKEND)
    model.set_cuda_graphs(ON_GPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    wrapped, optimizer, *_ = Booster(plugin=plugin).boost(model, optimizer)
    bare = wrapped.unwrap()

    truth = make_model(torch.float32, "reference")
    whole_batches = [VIDEO] * (world_size // 2) + [batches_of(other)[1][0] for other in range(world_size)]
    for case in whole_batches:
        (losses(truth, on_device(*case)).mean() / len(whole_batches)).backward()
    want = gradients(truth)

    own = [(on_device(*case), case[1], parts) for case, parts in batches_of(rank)]
    worst, graphed, found = 0.0, False, []
    for overlaps in (False, True, True, True, False):  # the third is captured
        optimizer.overlaps = overlaps
        gc.collect()  # none in a capture
        for inputs, num_frames, parts in own:
            with plugin.local_gradients(wrapped):
                with plugin.shared(bare, parts, num_frames, 5):
                    frames = slice(None) if bare.switch is None else bare.switch.frames
                    counted = None if bare.switch is None else inputs[3].sum(1).float()
                    loss = losses(wrapped, inputs, frames, counted).mean()
                loss = loss * world_size / len(whole_batches)
                if parts == 1:  # the last
                    with optimizer.reducing():
                        optimizer.backward(loss)
                else:
                    optimizer.backward(loss)
            graphed = graphed or bare.last_graphed
        optimizer.reduce_gradients()
        whole = dict(zip(want, optimizer.gather(optimizer.gradients()), strict=True))
        found.append({name: value.clone() for name, value in whole.items()})
        worst = max(worst, errors(whole, want)["all"])
        optimizer.zero_grad()
    same = all(torch.equal(g, found[-1][name]) for name, g in found[-2].items())
    return {"worst": worst, "graphed": graphed, "same_early": same}


def train(arguments: list[str]) -> int:
    """A run of the driver's trainer in these processes; the step at which it ended."""
    from stdit_fast.train.config import parse
    from stdit_fast.train.trainer import Trainer

    gc.collect()  # CUDA graphs of before
    trainer = Trainer(parse(arguments))
    trainer.train()
    return trainer.step


def main(folder: Path, runs: dict[str, list[str]]) -> None:
    end_after(DEADLINE)
    if not ON_GPU:
        torch.set_num_threads(1)
    processes = launch(0, COLLECTIVE_TIMEOUT)
    say("launched")
    sizes = [n for n in (2, 4) if processes.world_size % n == 0]
    groups = SequenceGroups(processes, sizes)
    say("groups are connected")
    # Each begins with another case, so that together they compile each kernel about once.
    names = list(CASES)
    start = processes.rank % len(names)
    alone = {}
    for name in names[start:] + names[:start]:
        alone[name] = computed_alone(name)
        say(f"{name}: alone")
    result = {"cases": {}, "copies": {}}
    for size in sizes:
        for name in names:
            result["cases"][f"{size}: {name}"] = compare(groups[size], name, alone[name])
            say(f"{name}: shared by {size}")
    for size in sizes if ON_GPU else ():
        copied = replace(groups[size], copies=groups.copies_of(groups[size]))
        for name in names:
            result["copies"][f"{size}: {name}"] = compare(copied, name, alone[name])
            say(f"{name}: shared by {size}, by copies")
    chosen = SequenceGroups(processes, sizes, "auto")
    result["by itself"] = {size: chosen[size].copies is not None for size in sizes}
    result["mixed"] = mixed_steps(processes)
    say("mixed steps")
    result["runs"] = {}
    for name, arguments in runs.items():
        result["runs"][name] = train(arguments)
        say(f"run {name}")
    (folder / f"{processes.rank}.json").write_text(json.dumps(result))
    processes.close()


BEGUN = time.monotonic()

if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
