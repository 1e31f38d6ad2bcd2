"""The training loop. `Trainer.__init__` builds, `train` loops, `train_step` is one step; read them in that order."""

import gc
import json
import logging
import math
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from stdit_fast.errors import ConfigError
from stdit_fast.media.pixels import from_pixels
from stdit_fast.model import disposal
from stdit_fast.model.arena import leave_default_stream
from stdit_fast.parallel import watchdog
from stdit_fast.parallel.allocator import expand_segments
from stdit_fast.parallel.groups import TRANSFERS
from stdit_fast.parallel.processes import launch
from stdit_fast.reporting import report
from stdit_fast.train import checkpoint, out_of_memory
from stdit_fast.train.bad_samples import BadSamples
from stdit_fast.train.build import (
    Data,
    build_data,
    build_diffusion,
    build_encoders_of,
    build_model,
    build_optimizer,
    encoder_dtype,
)
from stdit_fast.train.checkpoint import Checkpoints, TrainState
from stdit_fast.train.config import TrainConfig, size_table, to_dict
from stdit_fast.train.ema import EMA
from stdit_fast.train.encode_ahead import EncodeAhead
from stdit_fast.train.features import pad_texts
from stdit_fast.train.metrics import Metrics
from stdit_fast.train.pending import PendingStep, Readback, Stopwatch
from stdit_fast.train.send_ahead import SendAhead
from stdit_fast.train.validation import Validation

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """The run cannot go on, and says why."""


def free_memory() -> None:
    """Gives back what nothing needs any more, CUDA graphs of models that are gone and their memory too."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    disposal.destroy_retired()
    torch.cuda.empty_cache()


class Trainer:
    """One run on this process; all processes of the run hold one each.

    Raises:
        ConfigError: whatever of the configuration, the data or the weights cannot be, before the first step.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        if config.expandable_segments:
            logger.info(expand_segments())  # before anything is there
        self.processes = launch(config.seed)
        free_memory()  # what an earlier run of this process has left
        early = config.share_memory is True
        if config.cuda_graphs and (early or (config.share_memory == "auto" and self.processes.world_size == 1)):
            leave_default_stream(self.processes.device)  # before anything is there: memory belongs to a stream
        from colossalai.booster import Booster  # after launch, which keeps its import quiet

        from stdit_fast.parallel.sequence_plugins import SequenceReplicatedPlugin, SequenceShardedPlugin

        self.watchdog = watchdog.Watchdog(self.processes, config.dead_after, config.hang_timeout)
        self.device = self.processes.device
        self.folder = Path(config.outputs)
        self.diffusion = build_diffusion(config)
        sharded = self._plugin_name() != "ddp"
        plugin_class = SequenceShardedPlugin if sharded else SequenceReplicatedPlugin

        # The data first: what is wrong with it shows before gigabytes of encoders are read.
        self.data = build_data(config, self.processes, self.diffusion)
        self.validation = self._build_validation()
        data = [self.data, *([self.validation.data] if self.validation else [])]
        self.vae, self.text_encoder = self._build_encoders(data)

        model = build_model(config, self.text_encoder.channels)
        blocks = config.grad_checkpoint
        model.set_checkpointing({True: "all", False: "off"}[blocks] if isinstance(blocks, bool) else blocks)
        model.set_cuda_graphs(config.cuda_graphs, early)
        model.train()
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        sizes = np.unique(self.data.sampler.degrees).tolist()
        plugin = plugin_class(config.grad_clip, self.processes, sizes, config.sequence_transfers)
        self.booster = Booster(plugin=plugin)
        optimizer = build_optimizer(config, model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # DDP's, of ColossalAI's arguments
            self.model, self.optimizer, *_ = self.booster.boost(model, optimizer)
        ema = EMA(self.optimizer.masters, config.ema_decay) if config.ema_decay > 0 else None
        self.optimizer.overlaps = config.overlap_communication
        if ema is not None:
            self.optimizer.follow(ema.averages, ema.decay)
        self.state = TrainState(self.model.unwrap(), buffers, self.optimizer, ema)
        self.sampling = self._build_sampling()

        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep_checkpoints, self.processes)
        self.bad_samples = BadSamples(self.folder / "bad_samples.jsonl", config.dataset.max_bad_share)
        unreadable = [{"sample": f.row, "path": f.path, "reason": f.reason} for f in self.data.metadata.unreadable]
        self.bad_samples.add_to_list(unreadable, write=self.processes.is_main)
        self.step = self.saved_step = 0
        self.skipped = self.skipped_in_a_row = self.truncated = self.failed_samples = 0
        self.pieces = out_of_memory.Pieces()
        self._pending: PendingStep | None = None
        self._busy_seconds = 0.0  # of this process's passes in the last step that was settled
        self._told_to_stop = False  # by a signal to this process
        self._stopping = False  # agreed by all processes, so that they leave after the same step
        self._restore()
        free_memory()
        self.optimizer.make_state()
        self._held = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        self.last_parts = 1  # of the last batch
        self._chosen: dict[torch.Size, int] = {}  # how many samples of a batch of that shape run at once

    # -------------------------------------------------------------- the loop

    def train(self) -> Path | None:
        """Trains to the last step, or until SIGTERM or SIGINT; answers the last checkpoint.

        A signal ends it after the step in which its number is read, which is the next.
        """
        self._listen_for_signals()
        self.metrics = self._open_metrics()
        self._announce()
        batches = self.on_their_way(iter(self.data.loader(self.config, pin_memory=self.device.type == "cuda")))
        try:
            with self.watchdog:
                while self.step < self.config.steps and not self._stopping:
                    self.train_step(batches)
                    self.watchdog.at(self.step, watchdog.BESIDE)
                    if self._due(self.config.validation.every):
                        self.validate()
                    last = self.step == self.config.steps
                    if last or self._due(self.config.ckpt_every):
                        self.save(last)
                    if self._due(self.config.sampling.every):
                        self.settle()  # which knows whether a signal has come
                        if not self._stopping:
                            self.sample()  # after saving, of which it cannot cost anything
                return self.save(last=True)
        finally:
            if self.metrics:
                self.metrics.message(self.metrics.summary())
                self.metrics.close()

    def on_their_way(self, batches: Iterator[dict]) -> Iterator[dict]:
        """A loader's batches for `train_step`, where something is done for one before its step."""
        if self.config.encode_ahead and self.vae is not None:
            return EncodeAhead(batches, self.vae, self.text_encoder, self.device)
        if self.device.type == "cuda":
            return SendAhead(batches, self.device, kept=self.config.grad_accumulation)
        return batches

    def train_step(self, batches: Iterator[dict]) -> None:
        """One optimizer step: `grad_accumulation` batches a process, forward, backward, guarded step.

        Nothing here waits for the device, which has this step's work when the step before is settled.
        """
        readback, busy = Readback(self.device), Stopwatch(self.device)
        self._set_learning_rate()
        loss_sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # of loss, mse, vb, weighted
        own = dict.fromkeys(("tokens", "samples", "bad", "waited", "truncated", "out_of_memory"), 0.0)
        micro_batches, bad = [], []
        for i in range(self.config.grad_accumulation):
            asked = time.perf_counter()
            self.watchdog.at(self.step + 1, watchdog.LOADING)
            batch = next(batches)
            bucket = self.data.buckets[batch["bucket"]].name
            self.watchdog.at(self.step + 1, watchdog.COMPUTING, bucket)
            own["waited"] += time.perf_counter() - asked
            own["tokens"] += token_count(batch, self.state.model.config.patch_size)
            own["samples"] += len(batch["samples"]) / batch["request"].parts
            own["bad"] += len(batch["bad"])
            bad.extend(batch["bad"])
            micro_batches.append(batch)
            with busy:
                loss_sums = self._accumulate(micro_batches, loss_sums, own)
            if isinstance(batches, EncodeAhead) and self._more_to_come(i):
                self.watchdog.at(self.step + 1, watchdog.LOADING)
                own["waited"] += batches.look_ahead()

        self.watchdog.at(self.step + 1, watchdog.UPDATING, bucket)
        own["told_to_stop"] = float(self._told_to_stop)
        own |= {f"busy {rank}": 0.0 for rank in range(self.processes.world_size)}
        own[f"busy {self.processes.rank}"] = self._busy_seconds
        numbers = torch.cat([loss_sums, self._on_device([*own.values(), 0.0])])
        self.settle()
        self.optimizer.reduce_gradients()
        self.optimizer.guarded_step(numbers)
        readback.send(numbers)

        self.step += 1
        self.data.sampler.advance()
        lr, request = self.optimizer.param_groups[0]["lr"], batch["request"]
        names = ("loss", "mse", "vb", *own, "square_norm")
        trained = [(batch["bucket"], batch["samples"].tolist()) for batch in micro_batches]
        self._pending = PendingStep(self.step, lr, request, trained, bad, names, readback, busy)

    def settle(self) -> None:
        """Reads the numbers of the last step, if that has not been done, and does what depends on them.

        Afterwards all of the device's work sees the last step's weights.
        """
        self.optimizer.wait_for_weights()
        pending, self._pending = self._pending, None
        if pending is None:
            return
        values, seconds = pending.readback.read()
        self._busy_seconds = pending.busy.read()
        total = dict(zip(pending.names, values, strict=True))
        for mean in ("loss", "mse", "vb", "waited"):
            total[mean] /= self.processes.world_size
        grad_norm = math.sqrt(total["square_norm"])
        self.truncated += round(total["truncated"])
        self._stopping = total["told_to_stop"] > 0
        if total["out_of_memory"]:
            self._agree_on_pieces(pending.step, round(total["out_of_memory"]))
        self._count_bad_samples(pending.bad, bad=int(total["bad"]), seen=round(total["samples"]))
        self._record(pending, total, grad_norm, seconds)
        self._check_finite(pending, total["loss"], grad_norm)

    def losses(self, model, batch: dict) -> dict[str, torch.Tensor]:
        """The diffusion's loss, mse and vb of each sample, [B]; a batch that is not of features is encoded first.

        Of a batch that several ranks share, each has a part of them: together they are their sum.
        """
        on_device = {k: v.to(self.device, non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}
        if "latents" in batch:
            latents, states = on_device["latents"], on_device["text_states"]
            text = pad_texts(states, batch["tokens"], self.text_encoder.max_length, encoder_dtype(self.device))
        else:
            with torch.no_grad():
                video = from_pixels(on_device["pixels"])
                latents = self.vae.encode(video, on_device.get("posterior_noise")).float()
                text = self.text_encoder.encode(batch["text"])
        scalars = {key: on_device[key] for key in ("num_frames", "height", "width", "ar", "fps")}
        arguments = {"y": text.states, "mask": text.mask, "drop_caption": on_device["drop_caption"], **scalars}
        request, frames = batch["request"], self.data.buckets[batch["bucket"]].num_frames
        with self.booster.plugin.shared(self.state.model, request.parts, frames, batch.get("fingerprint", 0)):
            return self.diffusion.training_losses(
                model,
                latents,
                on_device["timestep"],
                arguments,
                noise=on_device["noise"],
                mask=on_device["x_mask"],
                counted=on_device.get("counted"),
            )

    # ------------------------------------------------------- parts of a step

    def _on_device(self, values: list[float]) -> torch.Tensor:
        """Numbers as float64 on the device, on their way there while the host goes on."""
        on_gpu = self.device.type == "cuda"
        return torch.tensor(values, dtype=torch.float64, pin_memory=on_gpu).to(self.device, non_blocking=True)

    def _weight(self, batch: dict) -> float:
        """Weight of a batch's mean loss, such that the mean over processes of their sums is the step's loss.

        All ranks that share a batch have its weight, for their parts of its loss.
        """
        if self.config.loss_weighting == "batch":
            return self.processes.world_size / batch["request"].step_batches
        return len(batch["samples"]) * self.processes.world_size / batch["request"].step_samples

    def _accumulate(self, batches: list[dict], sums: torch.Tensor, own: dict[str, float]) -> torch.Tensor:
        """Forward and backward passes of the last of this process's batches in a step; the sums with its losses added.

        Where it runs out of memory, its bucket runs in smaller pieces from now on, and the step's passes begin anew.
        Other processes notice nothing of it: gradients that they have from this one already stay as they are.

        Args:
            batches: of the step so far.
            sums: loss, mse and vb of those before, weighted, [3].
            own: counts of the step so far, of which those of the passes are kept.

        Raises:
            torch.OutOfMemoryError: a single sample does not fit.
            TrainingError: other processes share a batch of the step, and wait inside this pass.
        """
        batch = batches[-1]
        bucket, samples = self.data.buckets[batch["bucket"]], len(batch["samples"])
        try:
            return sums + self._forward_backward(batch, own, last=len(batches) == self.config.grad_accumulation)
        except torch.OutOfMemoryError as error:
            shared = max(b["request"].parts for b in batches)
            if shared > 1:
                raise TrainingError(
                    f"rank {self.processes.rank} ran out of memory with {samples} samples of {bucket.name} in a step "
                    f"of which {shared} ranks share a batch, so that it cannot be run in pieces. Use a smaller batch "
                    "size for this bucket, or more ranks to share it (sequence_parallel)"
                ) from error
            if not self.pieces.halve(bucket, samples, self._at_once(batch)):
                raise
        # Out here, where the exception no longer holds what its frames had.
        own["out_of_memory"] += 1
        own["truncated"] = 0.0
        self.optimizer.zero_grad()
        self._free_memory()
        sums = torch.zeros_like(sums)
        for count in range(len(batches)):
            sums = self._accumulate(batches[: count + 1], sums, own)
        return sums

    def _forward_backward(self, batch: dict, own: dict[str, float], last: bool) -> torch.Tensor:
        """Passes of a batch, in pieces where it is known not to fit: loss, mse and vb, weighted, [3].

        Args:
            last: it is this process's last batch of the step.
        """
        bucket, samples = self.data.buckets[batch["bucket"]], len(batch["samples"])
        shared = batch["request"].parts > 1
        parts = self.pieces.of(bucket, samples, planned=not shared, at_once=self._at_once(batch))
        self.last_parts = len(parts)
        if self.config.grad_checkpoint == "auto" and bucket.checkpointed is not None:
            as_measured = not shared and not self.pieces.lowered(bucket)
            self.state.model.set_checkpointing(bucket.checkpointed if as_measured else "auto")
        own["truncated"] += batch.get("truncated", 0) / batch["request"].parts  # of one that was encoded ahead
        already_truncated = self.text_encoder.truncated
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for part in parts:
            weight = self._weight(batch) * (part.stop - part.start) / samples
            with self.booster.plugin.local_gradients(self.model):
                losses = self.losses(self.model, out_of_memory.take(batch, part))
                with self.optimizer.reducing() if last and part is parts[-1] else nullcontext():
                    self.booster.backward(losses["loss"].mean() * weight, self.optimizer)
            sums += torch.stack([losses[k].detach().mean() for k in ("loss", "mse", "vb")]).double() * weight
        own["truncated"] += (self.text_encoder.truncated - already_truncated) / batch["request"].parts
        return sums

    def _at_once(self, batch: dict) -> int:
        """How many samples to run at once, as far as that is chosen before memory runs out."""
        bucket, shape = self.data.buckets[batch["bucket"]], batch["noise"].shape
        split, on_features = self.config.split_batches, self.config.features.path is not None
        wanted = split is True or (split == "auto" and on_features and self.processes.world_size == 1)
        if not wanted or self.config.grad_checkpoint != "auto":
            return shape[0]
        if bucket.checkpointed is not None or batch["request"].parts > 1:
            return shape[0]
        if shape not in self._chosen:
            self.state.model.set_checkpointing("auto")  # a bucket before this one may have had a number
            self._chosen[shape] = self.state.model.samples_at_once(shape, self._held)
        return self._chosen[shape]

    def _free_memory(self) -> None:
        """Gives back what nothing needs, the CUDA graphs' own memory too: they are captured anew as buckets come."""
        if self.state.model.graphs is not None:
            self.state.model.graphs.release(after_failure=True)
        free_memory()

    def _agree_on_pieces(self, step: int, count: int) -> None:
        """Brings the sizes that processes have lowered to all of them."""
        self.pieces.count += count
        before = dict(self.pieces.known)
        known = self.pieces.agree(self.processes.gather_objects(self.pieces.limits))
        for name, most in known.items():
            if self.metrics and before.get(name) != most:
                self.metrics.message(
                    f"step {step}: {name} ran out of memory; its batches run in pieces of at most {most} from now on"
                )

    def _set_learning_rate(self) -> None:
        """Linear warm-up, then constant."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * min(1.0, (self.step + 1) / (self.config.warmup_steps + 1))

    def _count_bad_samples(self, found: list[dict], bad: int, seen: int) -> None:
        if bad and self.processes.world_size > 1:
            found = [entry for part in self.processes.gather_objects(found) for entry in part]
        self.bad_samples.record(found, seen, write=self.processes.is_main)

    def _check_finite(self, pending: PendingStep, loss: float, grad_norm: float) -> None:
        """Counts a skipped step, names its samples, and stops the run after too many in a row."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        own = [
            (self.data.buckets[bucket].name, [self.data.metadata.row(sample).path for sample in samples])
            for bucket, samples in pending.batches
        ]
        everyone = self.processes.gather_objects(own)
        named = "; ".join(
            f"rank {rank}, bucket {bucket}: {', '.join(paths)}"
            for rank, part in enumerate(everyone)
            for bucket, paths in part
        )
        text = f"step {pending.step} skipped: loss {loss:g}, gradient norm {grad_norm:g}; batch of {named}"
        if self.metrics:
            self.metrics.message(text)
            with open(self.folder / "skipped_steps.jsonl", "a") as file:
                file.write(json.dumps({"step": pending.step, "loss": str(loss), "batches": everyone}) + "\n")
        if self.skipped_in_a_row >= self.config.max_skipped_in_a_row:
            raise TrainingError(
                f"{self.skipped_in_a_row} steps in a row were not finite; the last: {text}. Lower lr, look at these "
                f"samples, or raise max_skipped_in_a_row"
            )

    def _record(self, pending: PendingStep, total: dict[str, float], grad_norm: float, seconds: float) -> None:
        """Writes a step's numbers, under this process's last bucket."""
        if not self.metrics:
            return
        values = {
            "loss": total["loss"],
            "mse": total["mse"],
            "vb": total["vb"],
            "grad_norm": grad_norm,
            "lr": pending.lr,
            "tokens_per_second": total["tokens"] / seconds,
            "step_seconds": seconds,
            "wait_share": total["waited"] / seconds,
            "bad_samples": self.bad_samples.count,
            "skipped_steps": self.skipped,
            "truncated_captions": self.truncated,
            "out_of_memory": self.pieces.count,
            "epoch": pending.request.epoch,
        }
        if self.processes.world_size > 1:
            busy = [total[f"busy {rank}"] for rank in range(self.processes.world_size)]
            seen = max(busy) * len(busy) / sum(busy) - 1 if sum(busy) else 0.0
            values |= {"imbalance_expected": pending.request.imbalance, "imbalance_seen": seen}
        self.metrics.step(pending.step, values, self.data.buckets[pending.batches[-1][0]].name)

    def _build_encoders(self, data: list[Data]):
        """(autoencoder, text encoder) as the data needs them."""
        return build_encoders_of(self.config, self.device, data)

    # ------------------------------------------------------------ validation

    def _build_validation(self) -> Validation | None:
        settings = self.config.validation
        if not settings.every:
            return None
        data = self.data
        if settings.data_path is not None:
            data = build_data(self.config, self.processes, self.diffusion, settings.data_path)
        return Validation(data, settings.batches_per_bucket, self.processes)

    def validate(self) -> float:
        """The loss on the fixed samples, logged; the training goes on unchanged."""
        self.settle()
        bare = self.state.model
        bare.eval()
        loss, per_bucket = self.validation.run(lambda batch: self.losses(bare, batch)["loss"])
        bare.train()
        if self.metrics:
            self.metrics.validation(self.step, loss, per_bucket)
        return loss

    # -------------------------------------------------------------- sampling

    def _build_sampling(self):
        if not self.config.sampling.every:
            return None
        from stdit_fast.train.sampling import Sampling  # brings in diffusers' pipelines, which take seconds

        return Sampling(self.config, self.state, self.vae, self.text_encoder, self.processes)

    def sample(self) -> None:
        """Samples the prompts onto the boards and a contact sheet; the training goes on unchanged, even if that fails.

        The sheet is samples/step-00000500.png, and samples.png in the checkpoint of the same step, if there is one.
        """
        from stdit_fast.train.sampling import write_sheets

        started = time.perf_counter()
        if self.state.model.graphs is not None:
            self.state.model.graphs.release()  # they hold nearly all memory
        samples = self.sampling.run()
        failures = [f"the sample of {s.text!r} failed ({s.error})" for s in samples if s.error]
        if self.metrics:
            beside = self.checkpoints.path(self.step)
            sheets = [self.folder / "samples" / f"{beside.name}.png"]
            if beside.is_dir():
                sheets.append(beside / "samples.png")
            videos = {f"samples/{s.title}": s.pixels for s in samples if s.pixels is not None}
            try:
                write_sheets(samples, sheets)
                self.metrics.samples(self.step, videos, self.config.sampling.fps)
            except OSError as error:
                failures.append(f"the samples were not written ({error})")
        self.failed_samples += len(failures)
        if self.metrics:
            seconds = time.perf_counter() - started
            for failure in failures:
                self.metrics.message(f"step {self.step}: {failure}; the training goes on")
            self.metrics.message(f"step {self.step}: sampled {len(videos)} of {len(samples)} prompts, {seconds:.1f} s")
            self.metrics.sampling(self.step, len(videos), self.failed_samples, seconds)

    # ------------------------------------------------- checkpoints and signals

    def save(self, last: bool = False) -> Path | None:
        """Writes a checkpoint, unless this step has one. A disk that refuses stops the run only at its end."""
        self.settle()
        if self.saved_step == self.step:
            return self.checkpoints.newest()
        progress = {
            "optimizer_steps": self.optimizer.steps,
            "sampler": self.data.sampler.state_dict(),
            "bad_samples": self.bad_samples.state_dict(),
            "skipped_steps": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "truncated_captions": self.truncated,
            "pieces": self.pieces.state_dict(),
            "failed_samples": self.failed_samples,
            "config": to_dict(self.config),
        }
        try:
            path = self.checkpoints.save(self.step, self.state, progress)
        except OSError as error:
            if last:
                raise
            if self.metrics:
                self.metrics.message(f"{error}; the training goes on, the next try is at the next ckpt_every")
            return None
        self.saved_step = self.step
        return path

    def _restore(self) -> None:
        """Goes on from the newest checkpoint of this run, else starts from the one in `load`, if any."""
        newest = self.checkpoints.newest()
        if newest is not None and not self.config.resume:
            remedy = f"{self.folder} holds checkpoints of an earlier run, which this one would replace; name another"
            raise ConfigError("outputs", str(self.folder), f"{remedy} folder, or use resume: true")
        if newest is not None:
            progress = checkpoint.load(newest, self.state)
            checkpoint.load_rng(newest, self.processes)
            self.step = self.saved_step = progress["step"]
            self.skipped, self.skipped_in_a_row = progress["skipped_steps"], progress["skipped_in_a_row"]
            self.bad_samples.load_state_dict(progress["bad_samples"])
            self.truncated = progress["truncated_captions"]
            self.failed_samples = progress.get("failed_samples", 0)  # which earlier checkpoints do not know
            self.pieces.load_state_dict(progress.get("pieces", {"limits": {}, "count": 0}))  # likewise
            self._restore_position(progress)
            logger.info("resumed from %s", newest)
        elif self.config.load is not None:
            checkpoint.load(self.config.load, self.state, with_optimizer=self.config.load_optimizer)
            taken = "with" if self.config.load_optimizer else "without"
            logger.info("started from %s, %s its optimizer state", self.config.load, taken)

    def _restore_position(self, progress: dict) -> None:
        """The place in the data; other buckets or data make another order, so that the next epoch is begun."""
        saved, now = progress["config"], json.loads(json.dumps(to_dict(self.config)))
        changed = [key for key in ("buckets", "resolutions", "dataset") if _order_of(saved[key]) != _order_of(now[key])]
        position = dict(progress["sampler"])
        if changed:
            position.update(epoch=position["epoch"] + 1, position=0)
            logger.warning("%s changed since the checkpoint: going on with epoch %d", changed, position["epoch"])
        self.data.sampler.load_state_dict(position)

    def _listen_for_signals(self) -> None:
        def note(number, frame):
            self._told_to_stop = True  # a second signal changes nothing: launchers pass on what the terminal sent too

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, note)

    # ----------------------------------------------------------------- small

    def _plugin_name(self) -> str:
        """The plugin by name; refuses one that cannot run here."""
        wanted, on_gpu = self.config.plugin, self.device.type == "cuda"
        sharded = "zero2" if self.config.sequence_parallel == 1 else "zero2-seq"
        chosen = (sharded if on_gpu else "ddp") if wanted == "auto" else wanted
        if chosen != "ddp" and not on_gpu:
            raise ConfigError("plugin", wanted, f"{chosen} needs a GPU, and none is visible; use ddp or auto")
        transfers = self.config.sequence_transfers
        if transfers == "copies" and not on_gpu:
            raise ConfigError(TRANSFERS, transfers, "they are made by a GPU, and none is visible; use collectives")
        precision = "fp32" if chosen == "ddp" else "bf16"
        if self.config.dtype not in ("auto", precision):
            remedy = f"the plugin {chosen} trains in {precision}; use that or auto"
            raise ConfigError("dtype", self.config.dtype, remedy)
        return chosen

    def _more_to_come(self, micro_batch: int) -> bool:
        """Whether the run has a batch after this one of the present step."""
        return self.step + 1 < self.config.steps or micro_batch + 1 < self.config.grad_accumulation

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _open_metrics(self) -> Metrics | None:
        if not self.processes.is_main:
            return None
        config = self.config
        return Metrics(self.folder, self.step, config.steps, config.log_every, config.wandb, to_dict(config))

    def _announce(self) -> None:
        """What runs, on what and with which kernels, before the first step."""
        if not self.metrics:
            return
        parameters = sum(p.numel() for p in self.state.model.parameters())
        self.metrics.message(str(report()))
        self.metrics.message(
            f"\n{parameters / 1e6:.1f} M parameters, backend {self.config.model.backend}, {self._plugin_name()} on "
            f"{self.processes.world_size} x {self.device.type}, "
            f"{self.data.sampler.steps_per_epoch(self.data.sampler.epoch)} steps an epoch"
        )
        if transfers := self.booster.plugin.sequence_groups.describe():
            self.metrics.message(transfers)
        if self.vae is not None:
            encoders = f"autoencoder: {self.vae.served_by()}; text encoder: {self.text_encoder.served_by()}"
            self.metrics.message(encoders)
        table = size_table(self.config)
        if table is not None:
            self.metrics.message(table.describe())
        self.metrics.message(self.data.sampler.plan(self.data.sampler.epoch).describe(self.data.buckets) + "\n")


def token_count(batch: dict, patch_size: list[int]) -> int:
    """Video tokens of a batch: B * T * ceil(h/p) * ceil(w/q) of its latents."""
    samples, _, frames, rows, columns = batch["noise"].shape
    return samples * frames * -(-rows // patch_size[1]) * -(-columns // patch_size[2])


def _order_of(value):
    """The part of a setting that decides the order of the samples."""
    if isinstance(value, dict) and "data_path" in value:
        return {key: value[key] for key in ("data_path", "frame_interval", "drop_last")}
    return value
