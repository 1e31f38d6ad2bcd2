"""Checkpoints: a folder that appears whole or not at all, in safetensors and JSON, free of plugins and world sizes.

checkpoints/step-00000500/
  model/config.json, model.safetensors      fp32 weights; STDiT2.from_pretrained reads the folder
  ema/config.json, model.safetensors        averaged weights, likewise
  optimizer/exp_avg.safetensors, exp_avg_sq.safetensors
  rng.safetensors                           generator states of each process
  state.json                                step, data position, counts, configuration, versions
  samples.png                               where prompts were sampled at that step; it comes afterwards
"""

import json
import logging
import os
import platform
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stdit_fast.errors import ConfigError
from stdit_fast.media.files import flush
from stdit_fast.model.checkpoints import Mismatch, complete_checkpoints, newest_checkpoint
from stdit_fast.model.stdit2 import STDiT2
from stdit_fast.parallel.masters import MasterWeights
from stdit_fast.parallel.processes import Processes
from stdit_fast.train.ema import EMA

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainState:
    """The objects that a checkpoint saves and fills.

    Attributes:
        model: the bare model, for its config, names and buffers.
        buffers: its buffers in the precision they came in, by name.
        optimizer: holds the masters and moments.
        ema: None where none is kept.
    """

    model: STDiT2
    buffers: dict[str, Tensor]
    optimizer: MasterWeights
    ema: EMA | None

    @property
    def names(self) -> list[str]:
        """Names of the masters, in order."""
        return [name for name, p in self.model.named_parameters() if p.requires_grad]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie.
        keep: how many of the newest stay.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: str | Path, keep: int, processes: Processes):
        self.folder, self.keep, self.processes = Path(folder), keep, processes
        if processes.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                remedy = f"no folder can be made there ({error}); name another"
                raise ConfigError("outputs", str(self.folder.parent), remedy) from error
            for debris in self.folder.glob(".*ing-step-*"):
                shutil.rmtree(debris)

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        return newest_checkpoint(self.folder)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies, if there is one."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: TrainState, progress: dict) -> Path:
        """Writes a checkpoint and removes those beyond `keep`. All processes take part.

        Args:
            progress: what goes into state.json beside the step.

        Raises:
            OSError: the disk refuses; the earlier checkpoints are untouched.
        """
        final = self.path(step)
        writing = self.folder / f".writing-{final.name}"
        main, error = self.processes.is_main, None
        rng = self.processes.gather_objects(_generator_states())
        writer = _Writer(writing) if main else None
        for part, tensors in _parts(state):
            # Every process walks through the gathering; the main one keeps the tensors and writes.
            whole = {}
            for name, tensor in tensors:
                if main and error is None:
                    whole[name] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            if main and error is None:
                error = writer.tensors(part, whole)
        if main and error is None:
            error = writer.finish(final, state.model.config, rng, {"step": step, **progress}, state.ema is not None)
        error = self.processes.gather_objects(error)[0]
        if error is not None:
            raise OSError(f"checkpoint {final} was not written: {error}")
        if main:
            self._prune()
        return final

    def _prune(self) -> None:
        for old in complete_checkpoints(self.folder)[: -self.keep]:
            doomed = old.with_name(f".deleting-{old.name}")
            os.replace(old, doomed)  # so that no half-deleted folder ever looks like a checkpoint
            shutil.rmtree(doomed)


def find(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of a run.

    Raises:
        ConfigError: there is none.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        path = newest_checkpoint(path / "checkpoints") or path
    if not (path / "state.json").is_file():
        remedy = "it holds no state.json; give a folder like checkpoints/step-00000500"
        raise ConfigError("checkpoint", str(path), remedy)
    return path


def load(path: str | Path, state: TrainState, *, with_optimizer: bool = True) -> dict:
    """Fills model, EMA and, if wanted, the optimizer's moments from a checkpoint of any world size or plugin.

    Returns:
        The content of state.json.

    Raises:
        ConfigError: no checkpoint there, an unreadable file, or weights that do not fit, with the list.
    """
    path = find(path)
    progress = json.loads((path / "state.json").read_text())
    names, optimizer = state.names, state.optimizer
    weights = _read(path / "model" / "model.safetensors")
    mismatch = Mismatch.between(weights, state.model)
    if mismatch:
        remedy = f"{mismatch.describe()}. Use the model's settings of its state.json, or another folder"
        raise ConfigError("checkpoint", str(path), remedy)
    optimizer.load_masters([weights[name] for name in names])
    for name, buffer in state.model.named_buffers():
        buffer.copy_(weights[name])
        state.buffers[name].copy_(weights[name])
    if state.ema is not None:
        ema_file = path / "ema" / "model.safetensors"
        averages = _read(ema_file) if ema_file.is_file() else weights
        state.ema.load([optimizer.split(averages[name], i) for i, name in enumerate(names)])
    if with_optimizer and progress["optimizer_steps"] > 0:
        _load_moments(path / "optimizer", state, progress["optimizer_steps"])
    return progress


def load_rng(path: Path, processes: Processes) -> None:
    """Sets this process's generators; a process that the checkpoint does not know keeps its own."""
    states = _read(path / "rng.safetensors")
    if (cpu := states.get(f"cpu.{processes.rank}")) is not None:
        torch.set_rng_state(cpu)
    cuda = states.get(f"cuda.{processes.rank}")
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)


def _load_moments(folder: Path, state: TrainState, steps: int) -> None:
    wrapped = state.optimizer.optim
    for moment in MOMENTS:
        values = _read(folder / f"{moment}.safetensors")
        for i, (name, master) in enumerate(zip(state.names, state.optimizer.masters, strict=True)):
            part = state.optimizer.split(values[name], i).to(master.device, copy=True)
            wrapped.state[master][moment] = part
    for master in state.optimizer.masters:
        wrapped.state[master]["step"] = torch.tensor(float(steps), device=master.device)


def _parts(state: TrainState) -> Iterable[tuple[str, Iterable[tuple[str, Tensor]]]]:
    """(file, named whole tensors) of everything that is split over the processes."""
    optimizer, names = state.optimizer, state.names
    buffers = state.buffers.items()
    yield "model/model", chain(_gathered(names, optimizer, optimizer.masters), buffers)
    if state.ema is not None:
        yield "ema/model", chain(_gathered(names, optimizer, state.ema.averages), buffers)
    if optimizer.steps > 0:
        for moment in MOMENTS:
            parts = [optimizer.optim.state[master][moment] for master in optimizer.masters]
            yield f"optimizer/{moment}", _gathered(names, optimizer, parts)


def _gathered(names: list[str], optimizer: MasterWeights, parts: list[Tensor]) -> Iterable[tuple[str, Tensor]]:
    return zip(names, optimizer.gather(parts), strict=True)


def _generator_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _read(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as content:
            return {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:  # safetensors raises its own type and OSError's kin alike
        raise ConfigError("checkpoint", str(file), f"it cannot be read ({error})") from error


class _Writer:
    """Writes the files of one checkpoint into a folder of its own; answers errors instead of raising them.

    Only one process writes, and the others wait for it in the next gathering: an exception here would leave
    them hanging.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def tensors(self, part: str, tensors: dict[str, Tensor]) -> str | None:
        file = self.folder / f"{part}.safetensors"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, file, metadata={"format": "pt"})
            flush(file)
        except Exception as error:  # a full disk shows as OSError or as safetensors' own error
            return self._give_up(error)
        return None

    def finish(self, final: Path, model_config, rng: list[dict], progress: dict, has_ema: bool) -> str | None:
        try:
            for part in ("model", "ema") if has_ema else ("model",):
                model_config.save_pretrained(self.folder / part)
            states = {f"{kind}.{rank}": s for rank, kinds in enumerate(rng) for kind, s in kinds.items()}
            save_file(states, self.folder / "rng.safetensors")
            progress = progress | {"versions": {"python": platform.python_version(), "torch": torch.__version__}}
            (self.folder / "state.json").write_text(json.dumps(progress, indent=1))
            for file in ("rng.safetensors", "state.json"):
                flush(self.folder / file)
            doomed = final.with_name(f".deleting-{final.name}")
            if final.exists():  # the same step again, after a resume from an older checkpoint
                os.replace(final, doomed)
            os.replace(self.folder, final)
            flush(final.parent)
            shutil.rmtree(doomed, ignore_errors=True)
        except Exception as error:
            return self._give_up(error)
        return None

    def _give_up(self, error: Exception) -> str:
        shutil.rmtree(self.folder, ignore_errors=True)
        return f"{type(error).__name__}: {error}"
