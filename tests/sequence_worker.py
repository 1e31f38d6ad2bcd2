"""What the processes of tests/test_sequence_parallel.py run: python sequence_worker.py FOLDER PROCESSES PORT ARGUMENTS.

Every case is computed twice: by one process alone, and by the group. What differs goes into FOLDER/RANK.json. ARGUMENTS
is the command line of a training run, as JSON.
"""

import json
import os
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from stdit_fast import STDiT2, STDiT2Config
from stdit_fast.diffusion import IDDPM, SpeeDiT
from stdit_fast.parallel.copies import SLOTS, PeerCopies, Slots
from stdit_fast.parallel.groups import SequenceGroups
from stdit_fast.parallel.processes import Processes, import_colossalai, launch
from stdit_fast.parallel.sequence import FrameSwitch, split_frames

# name: (samples, frames, height, width of the latents, masked, pieces of a rank's positions, blocks recomputed)
CASES = {
    "even": (2, 8, 8, 8, False, 1, 0),
    "odd frames and positions": (2, 7, 6, 10, True, 1, 0),  # 15 positions
    "one sample, chunks": (1, 5, 6, 14, True, 2, 0),  # 21 positions
    "two samples, chunks, recomputed": (2, 9, 6, 10, True, 3, 1),
    "as many frames as ranks": (1, 4, 4, 4, False, 1, 2),
}
CHANNELS, DEPTH = 48, 2


def make_model(caption_channels: int = 16) -> STDiT2:
    torch.manual_seed(0)
    sizes = dict(hidden_size=CHANNELS, depth=DEPTH, num_heads=4, caption_channels=caption_channels, model_max_length=6)
    config = STDiT2Config(**sizes, backend="reference")
    model = STDiT2(config).train()
    for p in model.parameters():  # zero-initialised layers would hide what comes before them
        if p.count_nonzero() == 0:
            torch.nn.init.normal_(p, std=0.05)
    return model


def make_inputs(samples: int, frames: int, rows: int, columns: int, masked: bool):
    """(latents, timesteps, noise, mask, the model's arguments) of whole videos."""
    generator = torch.Generator().manual_seed(samples * 1000 + frames)
    shape = samples, 4, frames, rows, columns
    latents, noise = torch.randn(2, *shape, generator=generator)
    mask = torch.rand(samples, frames, generator=generator) < 0.6 if masked else torch.ones(samples, frames).bool()
    if masked:
        mask[0, 1], mask[-1, :3] = True, False  # one rank may have no frame that counts
    one = torch.ones(samples)
    arguments = {
        "y": torch.randn(samples, 1, 6, 16, generator=generator),
        "mask": torch.arange(6) < torch.randint(1, 7, (samples, 1), generator=generator),
        "num_frames": one * frames,
        "height": one * 8 * rows,
        "width": one * 8 * columns,
        "ar": one * rows / columns,
        "fps": one * 8,
        "drop_caption": torch.arange(samples) == 1,
    }
    return latents, torch.arange(samples) * 400, noise, mask, arguments


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


class FileSlots(Slots):
    """Slots of processes of one machine, in a file that all of them map."""

    def __init__(self, group, folder: Path, size: int):
        self.group, self.size = group, size
        path = folder / f"slots-{group.size}-{group.first}-{size}"
        whole = group.size * SLOTS * size
        self.memory = torch.from_file(str(path), shared=True, size=whole, dtype=torch.uint8)
        self.meet()

    def of(self, rank: int, slot: int) -> torch.Tensor:
        return self.memory[(rank * SLOTS + slot) * self.size :][: self.size]

    def meet(self) -> None:
        dist.barrier(group=self.group.host)


def by_copies(group, folder: Path):
    """The group with copies for its transfers."""
    copies = PeerCopies(group.rank, group.size, torch.device("cpu"), partial(FileSlots, group, folder))
    return replace(group, copies=copies)


@contextmanager
def counted_collectives():
    """[(name, bytes handed over)] of every collective on tensors in the meantime."""
    calls, real = [], {}

    def count(name):
        def call(*args, **kwargs):
            given = args[1] if name == "all_to_all_single" else args[0]
            calls.append((name, given.numel() * given.element_size() if torch.is_tensor(given) else 0))
            return real[name](*args, **kwargs)

        return call

    for name in ("all_to_all_single", "all_to_all", "all_reduce", "all_gather", "all_gather_into_tensor", "broadcast"):
        real[name] = getattr(dist, name)
        setattr(dist, name, count(name))
    try:
        yield calls
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def compare(group, name: str, diffusion) -> dict:
    """Errors of the group's loss and gradients against those of one process, and what travelled."""
    samples, frames, rows, columns, masked, chunks, recomputed = CASES[name]
    model = make_model()
    latents, t, noise, mask, arguments = make_inputs(samples, frames, rows, columns, masked)
    whole = diffusion.training_losses(model, latents, t, arguments, noise=noise, mask=mask)
    whole["loss"].mean().backward()
    want = gradients(model)

    switch = FrameSwitch(group, frames, chunks)
    own = switch.frames
    model.set_checkpointing(recomputed)
    with split_frames(model, switch), counted_collectives() as forward:
        part = diffusion.training_losses(
            model, latents[:, :, own], t, arguments, noise=noise[:, :, own], mask=mask[:, own], counted=mask.sum(1)
        )
    with counted_collectives() as backward:
        part["loss"].mean().backward()
    got = gradients(model)
    errors = {}
    for key in ("loss", "mse", "vb"):
        total = part[key].detach().clone()
        dist.all_reduce(total, group=group.device)
        errors[key] = float((total - whole[key].detach()).abs().max() / whole[key].detach().abs().max())
    for key, value in want.items():
        total = got[key]
        dist.all_reduce(total, group=group.device)
        errors[key] = float((total - value).norm() / value.norm().clamp(min=1e-4))
    unit = latents[:, :, own].numel() // 4 // 4 * CHANNELS * 4  # tokens of 2 x 2 latents, CHANNELS float32 values
    return {
        "errors": errors,
        "missing": sorted(want.keys() - got.keys()),
        "unit": unit,
        "forward": forward,
        "backward": backward,
        "recomputed": recomputed,
    }


def predictions(group) -> float:
    """Largest difference of predictions without gradients, legacy final layer and norms, with an x_mask."""
    torch.manual_seed(1)
    model = make_model().eval()
    model.config.final_layer_legacy = True
    latents, t, _, mask, arguments = make_inputs(2, 6, 6, 6, True)
    with torch.no_grad():
        whole = model(latents, t, x_mask=mask, **arguments)
        switch = FrameSwitch(group, 6)
        with split_frames(model, switch):
            part = model(latents[:, :, switch.frames], t, x_mask=mask[:, switch.frames], **arguments)
    return float((part - whole[:, :, switch.frames]).abs().max() / whole.abs().max())


def refusals(processes: Processes, group) -> dict[str, str]:
    def message(function) -> str:
        try:
            function()
        except ValueError as error:
            return str(error)
        return ""

    model = make_model()
    latents, t, _, _, arguments = make_inputs(1, 4, 2, 2, False)

    def too_few_positions():
        with split_frames(model, FrameSwitch(group, 4)):
            model(latents[:, :, :1], t, **arguments)

    return {
        "not a size": message(lambda: SequenceGroups(processes, [3])),
        "does not divide": message(lambda: SequenceGroups(processes, [8])),
        "not of GPUs": message(lambda: SequenceGroups(processes, [2], "copies")),
        "too few positions": message(too_few_positions),
    }


def training(one, processes: Processes) -> dict:
    """Gradients of three steps of a trainer against those of their batches on one process."""
    torch.manual_seed(0)
    for p in one.state.model.parameters():
        if p.count_nonzero() == 0:
            torch.nn.init.normal_(p, std=0.05)
    batches = iter(one.data.loader(one.config, pin_memory=False))
    kinds, errors = [], []
    one.metrics = None
    for _ in range(3):
        own = [next(batches) for _ in range(one.config.grad_accumulation)]
        found = {}
        one.optimizer.guarded_step = lambda _, found=found: found.update(gradients(one.state.model))
        one.train_step(iter(own))
        requests = sum(processes.gather_objects([batch["request"] for batch in own]), [])
        whole = {(r.index, r.bucket): r for r in requests}.values()
        kinds.append(sorted(r.parts for r in whole))
        assert {r.step_batches for r in requests} == {len(whole)}
        for request in whole:
            batch = one.data.dataset[replace(request, parts=1, part=0)]
            (one.losses(one.state.model, batch)["loss"].mean() / len(whole)).backward()
        want = gradients(one.state.model)
        errors += [float((found[k] - g).norm() / g.norm().clamp(min=1e-4)) for k, g in want.items()]
    del one.optimizer.guarded_step
    one._pending = None
    return {"kinds": kinds, "worst": max(errors), "gradients": len(errors)}


def different_data(one, processes: Processes) -> str:
    """What a rank is told whose batch is another one."""
    for batch in one.data.loader(one.config, pin_memory=False):
        if batch["request"].parts > 1:
            break
    batch["fingerprint"] += processes.rank == 1
    try:
        one.losses(one.state.model, batch)
    except ValueError as error:
        return str(error)
    return ""


def out_of_memory(one) -> str:
    """What is said where a shared batch does not fit; all ranks are made to fail alike here."""
    real, said = one._forward_backward, ""

    def fail(batch, own, last):
        if batch["request"].parts > 1:
            raise torch.OutOfMemoryError("no memory")
        return real(batch, own, last)

    one._forward_backward = fail
    for batch in one.data.loader(one.config, pin_memory=False):
        try:
            one._accumulate([batch], torch.zeros(3), dict.fromkeys(("truncated", "out_of_memory"), 0.0))
        except RuntimeError as error:
            said = f"{type(error).__name__}: {error}"
            break
    del one._forward_backward
    one.optimizer.zero_grad()
    return said


def sampling(group, run: Path, folder: Path) -> dict:
    """Latents of a shared pipeline against those of one process, and what the command line makes of a run."""
    from stdit_fast.diffusion.schedulers import make_scheduler
    from stdit_fast.encoders import load_autoencoder, load_text_encoder
    from stdit_fast.sample.__main__ import main as sample
    from stdit_fast.sample.pipeline import STDiT2Pipeline

    text = load_text_encoder("minilm-embeddings", max_length=6)
    model = make_model(caption_channels=text.channels).eval()
    pipeline = STDiT2Pipeline.of(model, load_autoencoder("patch-codec"), text, make_scheduler("ddim", 1000))
    pipeline.set_progress_bar_config(disable=True)

    def latents():
        options = dict(num_frames=5, height=48, width=80, num_inference_steps=3, loops=2, condition_frame_length=2)
        generator = torch.Generator().manual_seed(3)
        return pipeline("a sea", output_type="latent", generator=generator, **options).frames

    alone = latents()
    pipeline.share(group)
    shared = latents()
    arguments = ["--model", run, "--prompt", "a sea", "--num_frames", 5, "--height", 48, "--width", 80]
    arguments += ["--num_sampling_steps", 2, "--outputs", folder / "samples", "--device", "cpu"]
    close, Processes.close = Processes.close, Processes.barrier
    status = sample([str(a) for a in arguments])
    Processes.close = close
    return {
        "difference": float((shared - alone).norm() / alone.norm()),
        "status": status,
        "files": sorted(path.name for path in (folder / "samples").iterdir()),
    }


def work(folder: Path, rank: int, arguments: list[str]) -> None:
    from stdit_fast.train.config import parse
    from stdit_fast.train.trainer import Trainer

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    processes = launch(0)
    groups = SequenceGroups(processes, [1, 2, 4], "auto")
    result = {"cases": {}, "copies": {}, "transfers": groups.describe()}
    for size in (2, 4):
        group = groups[size]
        assert (group.first, group.rank) == (rank // size * size, rank % size)
        for name in CASES:
            diffusion = SpeeDiT() if name == "even" else IDDPM()
            result["cases"][f"{size}: {name}"] = compare(group, name, diffusion)
            copied = by_copies(group, folder)
            result["copies"][f"{size}: {name}"] = compare(copied, name, diffusion)
        result[f"prediction {size}"] = max(predictions(group), predictions(by_copies(group, folder)))
        result[f"largest {size}"] = [group.largest(10 + rank), group.first + size + 9]
    result["refusals"] = refusals(processes, groups[processes.world_size])
    one = Trainer(parse(arguments))
    result["training"] = training(one, processes)
    result["different data"] = different_data(one, processes)
    result["out of memory"] = out_of_memory(one)
    result["run"] = {"path": str(one.train()), "step": one.step}
    result["sampling"] = sampling(groups[4], Path(result["run"]["path"]).parents[1], folder)
    (folder / f"{rank}.json").write_text(json.dumps(result))
    processes.close()


def main() -> int:
    """Forks after the imports, which take longer than the work."""
    folder, world_size, port = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    arguments = json.loads(sys.argv[4])
    import_colossalai()
    import stdit_fast.train.trainer  # noqa: F401

    os.environ |= {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            work(folder, rank, arguments)
            return 0
        children.append(child)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)


if __name__ == "__main__":
    sys.exit(main())
