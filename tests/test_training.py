"""Whole runs of a small model on the real clips: in this process, in processes that are killed, in two processes."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DATA, as_it_was
from safetensors.torch import load_file

from stdit_fast import STDiT2
from stdit_fast.errors import ConfigError
from stdit_fast.train import checkpoint
from stdit_fast.train.config import parse
from stdit_fast.train.encode_ahead import EncodeAhead

CONFIG = Path(__file__).parents[1] / "train" / "configs" / "tiny.yaml"
SMALL = {
    "model.hidden_size": 24,
    "model.depth": 2,
    "text_encoder.model_max_length": 8,
    "dataset.num_workers": 0,
    "validation.every": 0,
    "sampling.every": 0,
    "buckets": "{64p: {1: [1.0, 3], 4: [0.5, 2], 8: [1.0, 2]}}",
    "ckpt_every": 3,
    "keep_checkpoints": 2,
}


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """A metadata table over the clips: each as videos of several stated lengths, and stills."""
    import av

    folder = tmp_path_factory.mktemp("data")
    path = folder / "table.csv"
    rows = []
    for name, height, width in (("bikes", 272, 640), ("carphone_pristine", 144, 176)):
        with av.open(str(DATA / f"{name}.mp4")) as container:
            for i, frame in zip(range(4), container.decode(video=0), strict=False):
                frame.to_image(width=width // 2, height=height // 2).save(folder / f"{name}{i}.png")
                rows.append((f"{name}{i}.png", f"a still of {name}", 1, height // 2, width // 2))
        for frames in (10, 30, 60):
            rows.append((DATA / f"{name}.mp4", f"a clip of {name}, {frames} frames", frames, height, width))
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("path", "text", "num_frames", "height", "width"), *rows])
    return path


def arguments(table: Path, outputs: Path, **changes) -> list[str]:
    values = SMALL | {"dataset.data_path": table, "outputs": outputs} | changes
    return ["--config", str(CONFIG), *(part for key, value in values.items() for part in (f"--{key}", str(value)))]


def command(processes: int, args: list[str]) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), "-m", "stdit_fast.train", *args]


# Runs that are compared bit for bit: on the CPU, with one thread a process, so that sums are made in one order.
EXACT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(args: list[str], processes: int = 1) -> subprocess.CompletedProcess:
    """A run as a user starts it."""
    environment = os.environ | EXACT
    done = subprocess.run(command(processes, args), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def losses(outputs: Path) -> list[tuple]:
    """(step, loss, gradient norm) of every step, in the order of the file."""
    lines = [json.loads(line) for line in (outputs / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.fixture(scope="session")
def finished(table, tmp_path_factory):
    """An uninterrupted run of 9 steps of two micro-batches, in a process of its own: bits depend on its threads."""
    outputs = tmp_path_factory.mktemp("finished")
    run(arguments(table, outputs, steps=9, grad_accumulation=2))
    return outputs


def test_a_finished_run(finished):
    record = losses(finished)
    assert [step for step, *_ in record] == list(range(1, 10))
    assert all(math.isfinite(loss) and norm > 0 for _, loss, norm in record)
    kept = checkpoint.complete_checkpoints(finished / "checkpoints")
    assert [path.name for path in kept] == ["step-00000006", "step-00000009"]
    model, ema = (STDiT2.from_pretrained(kept[-1] / part) for part in ("model", "ema"))
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, ema.blocks[0].mlp.fc1.weight)
    assert list((finished / "tensorboard").iterdir())
    line = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["tokens_per_second"] > 0 and 0 <= line["wait_share"] <= 1 and line["bucket"].startswith("64p-")
    pickled = [p for p in (finished / "checkpoints").rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".pth")]
    assert not pickled


def wait_for_step(outputs: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    file = outputs / "metrics.jsonl"
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be stopped"
        if file.is_file() and len(file.read_text().splitlines()) >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


def test_terminated_and_killed_it_continues_bit_for_bit(table, finished, tmp_path):
    args = arguments(table, tmp_path, steps=9, grad_accumulation=2)
    environment = os.environ | EXACT
    for number, step in ((signal.SIGTERM, 2), (signal.SIGKILL, 5)):
        process = subprocess.Popen(command(1, args), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        wait_for_step(tmp_path, step, process)
        process.send_signal(number)
        output = process.communicate(timeout=120)[0].decode()
        if number == signal.SIGTERM:
            assert process.returncode == 0, output
            done = losses(tmp_path)[-1][0]
            assert step <= done < 9
            assert checkpoint.newest_checkpoint(tmp_path / "checkpoints").name == f"step-{done:08d}"
        else:
            assert process.returncode == -signal.SIGKILL
    run(args)
    assert losses(tmp_path) == losses(finished)
    for part in ("model", "ema"):
        file = Path("checkpoints", "step-00000009", part, "model.safetensors")
        mine, other = load_file(tmp_path / file), load_file(finished / file)
        assert all(torch.equal(mine[key], other[key]) for key in other)


def test_two_processes_train_like_one_with_both_batches(table, finished, tmp_path):
    """Same batches, same curve, up to the order of the sums; and one goes on from the other's checkpoint.

    Then a signal reaches one process alone: all save after the same step and leave.
    """
    import psutil

    run(arguments(table, tmp_path, steps=6), processes=2)
    for mine, other in zip(losses(tmp_path), losses(finished)[:6], strict=True):
        assert mine == pytest.approx(other, rel=2e-4), (mine, other)
    file = Path("checkpoints", "step-00000006", "model", "model.safetensors")
    mine, other = load_file(tmp_path / file), load_file(finished / file)
    for key in other:
        assert (mine[key] - other[key]).abs().max() <= 1e-4, key
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000006")
    shutil.copytree(finished / "checkpoints" / "step-00000006", tmp_path / "checkpoints" / "step-00000006")
    args = arguments(table, tmp_path, steps=5000, ckpt_every=5000)
    launcher = subprocess.Popen(
        command(2, args), env=os.environ | EXACT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for_step(tmp_path, 9, launcher)
    ranks = {p.environ().get("RANK"): p for p in psutil.Process(launcher.pid).children()}
    ranks["1"].terminate()
    output = launcher.communicate(timeout=120)[0].decode()
    assert launcher.returncode == 0, output
    for mine, other in zip(losses(tmp_path)[6:9], losses(finished)[6:], strict=True):
        assert mine == pytest.approx(other, rel=2e-4), (mine, other)
    last = losses(tmp_path)[-1][0]
    assert checkpoint.newest_checkpoint(tmp_path / "checkpoints").name == f"step-{last:08d}"


# --------------------------------------------------------------- in this process: on a GPU where there is one


def same(mine: list[tuple], other: list[tuple]) -> bool:
    """Equal bit for bit on the CPU; on a GPU a library's attention may add in another order."""
    if not torch.cuda.is_available():
        return mine == other
    return all(a == pytest.approx(b, rel=2e-2) for a, b in zip(mine, other, strict=True))


@pytest.fixture
def trainer(table, tmp_path):
    """trainer(**changes) -> a Trainer that writes into tmp_path / "run"."""
    from stdit_fast.train.trainer import Trainer

    def make(outputs="run", data=table, **changes):
        return Trainer(parse(arguments(data, tmp_path / outputs, **changes)))

    with as_it_was():
        yield make


def test_next_stage_with_and_without_the_optimizer(trainer, tmp_path):
    first = trainer(steps=3)
    path = first.train()
    for keep in (True, False):
        second = trainer(f"second-{keep}", steps=1, load=path, load_optimizer=keep)
        assert second.step == 0 and second.data.sampler.state_dict()["position"] == 0
        for mine, other in zip(second.optimizer.masters, first.optimizer.masters, strict=True):
            assert torch.equal(mine, other)
        states = second.optimizer.optim.state
        assert second.optimizer.steps == (3 if keep else 0)
        assert any(bool(state[k].any()) for state in states.values() for k in ("exp_avg", "exp_avg_sq")) == keep
        if keep:
            for mine, other in zip(second.optimizer.masters, first.optimizer.masters, strict=True):
                theirs = first.optimizer.optim.state[other]
                assert all(torch.equal(states[mine][k], theirs[k]) for k in ("exp_avg", "exp_avg_sq", "step"))
        second.train()  # and it trains on


def test_non_finite_steps_are_skipped_counted_and_stop_the_run(trainer, monkeypatch, tmp_path):
    from stdit_fast.train.trainer import Trainer, TrainingError

    one = trainer(steps=8, max_skipped_in_a_row=3)
    real, poisoned = Trainer.losses, {2, 5, 6, 7}
    before = {}

    def losses_(self, model, batch):
        out = real(self, model, batch)
        if self.step + 1 in poisoned:
            before[self.step + 1] = [m.clone() for m in (*self.optimizer.masters, *self.state.ema.averages)]
            factor = math.nan if self.step % 2 else math.inf
            out = {key: value * factor for key, value in out.items()}
        elif self.step in before:  # the step before this one was poisoned: nothing may have moved
            now = [*self.optimizer.masters, *self.state.ema.averages]
            assert all(torch.equal(a, b) for a, b in zip(before[self.step], now, strict=True))
        return out

    monkeypatch.setattr(Trainer, "losses", losses_)
    with pytest.raises(TrainingError, match=r"3 steps in a row were not finite.*bucket 64p-.*(png|mp4)"):
        one.train()
    assert one.step == 7 and one.skipped == 4
    assert all(torch.isfinite(m).all() for m in one.optimizer.masters)
    assert len((tmp_path / "run" / "skipped_steps.jsonl").read_text().splitlines()) == 4
    assert one.optimizer.steps == 3
    assert [loss for _, loss, _ in losses(tmp_path / "run")][4:] == [None, None, None]


def test_a_steps_numbers_come_later_but_all_come(trainer, monkeypatch):
    """They are read one step later, and before validation and checkpoints: the last step's too, here a skipped one."""
    from stdit_fast.train.trainer import Trainer

    one = trainer(steps=3, ckpt_every=2, **{"validation.every": 2})
    real, seen = Trainer.losses, []

    def losses_(self, model, batch):
        out = real(self, model, batch)
        if model is self.model:
            seen.append(self._pending.step if self._pending else None)
        return {key: value * math.nan for key, value in out.items()} if self.step == 2 else out

    monkeypatch.setattr(Trainer, "losses", losses_)
    path = one.train()
    lines = [json.loads(line) for line in (one.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "val_loss" in line) for line in lines] == [(1, False), (2, False), (2, True), (3, False)]
    assert seen == [None, 1, None]  # unread during the next step, unless something had to know before
    assert lines[-1]["loss"] is None and all(line["step_seconds"] > 0 for line in lines if "loss" in line)
    state = json.loads((path / "state.json").read_text())
    assert (state["step"], state["optimizer_steps"], state["skipped_steps"], state["skipped_in_a_row"]) == (3, 2, 1, 1)
    (skipped,) = [json.loads(line) for line in (one.folder / "skipped_steps.jsonl").read_text().splitlines()]
    assert skipped["step"] == 3 and skipped["batches"][0][0][1]


def test_a_non_finite_gradient_alone_skips_too(trainer):
    one = trainer(steps=1)
    weight = one.state.model.blocks[0].mlp.fc1.weight
    handle = weight.register_hook(lambda grad: grad * math.inf)
    before = [m.clone() for m in one.optimizer.masters]
    one.train()
    handle.remove()
    assert one.skipped == 1 and all(torch.equal(a, b) for a, b in zip(before, one.optimizer.masters, strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="reads the gradients that DDP leaves on the CPU")
def test_sample_weighting_is_the_mean_over_samples(trainer, monkeypatch):
    """With batches of unequal size, the step's gradient is that of the mean over all samples."""
    buckets = "{64p: {1: [1.0, 5], 8: [1.0, 1]}}"
    one = trainer(steps=1, grad_accumulation=2, loss_weighting="sample", buckets=buckets, grad_clip=0)
    batches = iter(one.data.loader(one.config, pin_memory=False))
    pair = [next(batches), next(batches)]
    found = []
    monkeypatch.setattr(one.optimizer, "guarded_step", lambda numbers: found.append(float(numbers[0])))
    one.metrics = None
    one.train_step(iter(pair))
    grads = [p.grad.clone() for p in one.state.model.parameters()]
    one.optimizer.zero_grad()
    each = torch.cat([one.losses(one.state.model, batch)["loss"] for batch in pair])
    assert len(each) == pair[0]["request"].step_samples
    each.mean().backward()
    assert found[0] == pytest.approx(float(each.mean().detach()), rel=1e-5)
    for got, want in zip(grads, (p.grad for p in one.state.model.parameters()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_validation_is_the_same_every_time_and_leaves_no_trace(trainer):
    one = trainer(steps=2, **{"validation.every": 1, "model.class_dropout_prob": 0.5})
    one.train()
    other = trainer("other", steps=2, **{"model.class_dropout_prob": 0.5})
    other.train()
    assert same(losses(one.folder), losses(other.folder))
    one.metrics = None
    assert one.validate() == one.validate()
    lines = [json.loads(line) for line in (one.folder / "metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validations] == [1, 2]
    assert {name.rsplit("-", 1)[0] for name in validations[0]["val_loss_per_bucket"]} >= {"64p-1", "64p-8"}


def test_bad_samples_are_replaced_listed_once_and_limited(trainer, table, tmp_path):
    rows = table.read_text().splitlines()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes((DATA / "bikes.mp4").read_bytes()[:2000])
    name = rows[1].split(",")[0]
    (tmp_path / name).write_bytes((table.parent / name).read_bytes())
    changed = [rows[0], *(r.replace(str(DATA / "bikes.mp4"), str(broken)) if "60 frames" in r else r for r in rows[1:])]
    changed = [r if r.startswith("/") or "path" in r else f"{table.parent}/{r}" for r in changed]
    data = tmp_path / "table.csv"
    changed.append(f"{tmp_path}/gone.mp4,its size is not known either,,,")  # so that it is in no bucket
    data.write_text("\n".join(changed) + "\n")
    one = trainer(data=data, steps=12, **{"dataset.max_bad_share": 0.9})
    assert one.bad_samples.count == 0
    one.train()
    listed = [json.loads(line) for line in (one.folder / "bad_samples.jsonl").read_text().splitlines()]
    assert [Path(entry["path"]).name for entry in listed] == ["gone.mp4", "broken.mp4"]
    assert all(entry["reason"] for entry in listed)
    assert one.step == 12 and one.bad_samples.count >= 1


def test_a_disk_that_refuses_costs_no_step(trainer, monkeypatch):
    one = trainer(steps=5, ckpt_every=2)
    real, refused = checkpoint.save_file, []

    def refuse(*args, **kwargs):
        if one.step == 2:
            refused.append(one.step)
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    one.train()
    kept = checkpoint.complete_checkpoints(one.folder / "checkpoints")
    assert refused and [path.name for path in kept] == ["step-00000004", "step-00000005"]
    assert not list((one.folder / "checkpoints").glob(".*"))


def test_what_a_killed_save_leaves_is_no_checkpoint(trainer):
    one = trainer(steps=3)
    one.train()
    folder = one.folder / "checkpoints"
    shutil.copytree(folder / "step-00000003", folder / ".writing-step-00000006")
    assert checkpoint.newest_checkpoint(folder).name == "step-00000003"
    again = trainer(steps=4)
    assert again.step == 3 and not (folder / ".writing-step-00000006").exists()


def test_an_earlier_run_is_not_overwritten(trainer):
    trainer(steps=1).train()
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run"):
        trainer(steps=1, resume="false")


def test_truncated_captions_are_counted_once(trainer):
    one = trainer(steps=3, **{"text_encoder.model_max_length": 4, "validation.every": 1})
    one.train()
    lines = [json.loads(line) for line in (one.folder / "metrics.jsonl").read_text().splitlines()]
    counted = [line["truncated_captions"] for line in lines if "loss" in line]
    assert counted == sorted(counted) and 3 <= counted[-1] <= 9 and one.truncated == counted[-1]
    assert trainer(steps=4, **{"text_encoder.model_max_length": 4}).truncated == counted[-1]


def test_changed_buckets_begin_the_next_epoch(trainer, caplog):
    one = trainer(steps=2)
    one.train()
    again = trainer(steps=3, buckets="{64p: {1: [1.0, 2], 8: [1.0, 1]}}")
    assert again.step == 2 and again.data.sampler.state_dict()["epoch"] == one.data.sampler.state_dict()["epoch"] + 1
    assert "going on with epoch" in caplog.text


def test_gradient_checkpointing_changes_nothing(trainer):
    plain, recomputed = trainer("plain", steps=2), trainer("recomputed", steps=2, grad_checkpoint="true")
    assert recomputed.state.model.checkpointed_blocks == 2
    assert trainer("one", steps=2, grad_checkpoint=1).state.model.checkpointed_blocks == 1
    plain.train()
    recomputed.train()
    assert same(losses(plain.folder), losses(recomputed.folder))


def test_the_real_encoders_path(trainer, tmp_path):
    """A diffusers autoencoder and a transformers T5 from folders; the autoencoder samples with keyed noise."""
    from test_autoencoder import tiny_autoencoder_kl
    from test_text_encoder import save_tokenizer, tiny_t5

    tiny_autoencoder_kl().save_pretrained(tmp_path / "vae")
    tiny_t5().save_pretrained(tmp_path / "t5")
    save_tokenizer(tmp_path / "t5")
    encoders = {"vae.from_pretrained": tmp_path / "vae", "text_encoder.from_pretrained": tmp_path / "t5"}
    one = trainer(steps=2, **encoders, **{"validation.every": 1})
    batch = next(iter(one.data.loader(one.config, pin_memory=False)))
    assert batch["posterior_noise"].shape == batch["noise"].shape
    assert not torch.equal(batch["posterior_noise"], batch["noise"])
    one.train()  # before it, the zero final layer answers alike for all latents
    assert len(losses(one.folder)) == 2
    first = one.losses(one.state.model.eval(), batch)["loss"]
    assert torch.equal(first, one.losses(one.state.model, batch)["loss"])  # nothing drawn on the way
    changed = one.losses(one.state.model, batch | {"posterior_noise": batch["posterior_noise"] + 1})["loss"]
    assert not torch.equal(first, changed)


def test_encoding_ahead_changes_nothing(trainer, monkeypatch):
    """Not the numbers, not what is counted, not what a resumed run sees; nor does a batch that does not fit ahead."""
    settings = {"grad_accumulation": 2, "text_encoder.model_max_length": 4, "ckpt_every": 2}
    plain = trainer("plain", steps=3, **settings)
    plain.train()
    ahead, encoded = EncodeAhead._encoded, []

    def some(self, batch):
        encoded.append(len(encoded) != 1)
        if not encoded[-1]:
            raise torch.OutOfMemoryError("the second does not fit")
        return ahead(self, batch)

    monkeypatch.setattr(EncodeAhead, "_encoded", some)
    for steps in (2, 3):  # resumed in between
        one = trainer("ahead", steps=steps, **settings, encode_ahead=True)
        one.train()
    assert encoded == [True, False, True] + [True]  # all but the first of each run
    assert losses(one.folder) == losses(plain.folder)
    counts = [
        [json.loads(line).get("truncated_captions") for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        for run in (plain, one)
    ]
    assert counts[0] == counts[1] and one.truncated == plain.truncated > 0


def test_moments_made_ahead_change_nothing(trainer):
    ahead, later = trainer("ahead", steps=2), trainer("later", steps=2)
    assert ahead.optimizer.optim.state and ahead.optimizer.steps == 0
    later.optimizer.optim.state.clear()
    later.optimizer._step = None
    ahead.train(), later.train()
    assert losses(ahead.folder) == losses(later.folder)


def test_iddpm_speed_trains(trainer):
    one = trainer(steps=2, **{"scheduler.type": "iddpm-speed"})
    one.train()
    assert len(losses(one.folder)) == 2


def test_warm_up(trainer):
    one = trainer(steps=4, warmup_steps=3, lr=1e-3)
    one.train()
    lines = [json.loads(line) for line in (one.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])


def test_ema_follows_the_weights(trainer):
    one = trainer(steps=3, ema_decay=0.7)
    want = [m.clone() for m in one.optimizer.masters]
    real = one.optimizer.guarded_step

    def step(numbers):
        real(numbers)
        for average, master in zip(want, one.optimizer.masters, strict=True):
            average.mul_(0.7).add_(master.detach(), alpha=0.3)

    one.optimizer.guarded_step = step
    one.train()
    for got, average in zip(one.state.ema.averages, want, strict=True):
        torch.testing.assert_close(got, average)


# ------------------------------------------------------------------- bad input


def refuses(capfd, args: list[str], *parts: str) -> None:
    """A run that ends with a message before it trains; the message has all `parts`."""
    done = subprocess.run(command(1, args), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    for part in parts:
        assert part in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_line_says_what_is_wrong(table, tmp_path, capfd):
    refuses(capfd, arguments(table, tmp_path, lrr=3), "lrr", "did you mean 'lr'")


@pytest.mark.parametrize(
    "changes, parts",
    [
        # nothing fits: what there is, and what is needed
        ({"buckets": "{1024: {1: [1.0, 1]}}"}, ("136x320", "1024: height*width >= 838861")),
        ({"buckets": "{64p: {8: [1.0, 500]}}", "dataset.drop_last": "true"}, ("500", "64p-8")),
        ({"vae.from_pretrained": "/no/such/vae"}, ("vae.from_pretrained", "/no/such/vae")),
        ({"text_encoder.from_pretrained": "/no/such/t5"}, ("text_encoder.from_pretrained", "/no/such/t5")),
        ({"model.from_pretrained": "/no/such/model"}, ("/no/such/model",)),
        ({"grad_accumulation": 500, "dataset.drop_last": "true"}, ("500",)),
        ({"plugin": "zero2"}, ("zero2 needs a GPU",)),
        ({"sequence_transfers": "copies"}, ("use collectives",)),
    ],
)
def test_refused_before_the_first_step(trainer, changes, parts):
    if {"plugin", "sequence_transfers"} & changes.keys() and torch.cuda.is_available():
        pytest.skip("it works here: there is a GPU")
    with pytest.raises(ConfigError) as caught:
        trainer(steps=1, **changes)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_a_missing_column(trainer, tmp_path):
    bad = tmp_path / "bad.csv"
    bad.write_text("path,caption\nx.mp4,hello\n")
    with pytest.raises(ConfigError, match="text"):
        trainer(data=bad, steps=1)


def test_a_checkpoint_of_another_shape(trainer):
    trainer(steps=1).train()
    with pytest.raises(ConfigError, match=r"keys of another shape: .*the model has"):
        trainer(steps=2, **{"model.hidden_size": 48})


def test_weights_of_another_shape(trainer, tmp_path):
    path = trainer(steps=1).train()
    with pytest.raises(ConfigError, match="model.hidden_size = 48: the weights at .* have 24"):
        trainer("other", steps=1, **{"model.hidden_size": 48, "model.from_pretrained": path / "model"})
    one = trainer("third", steps=1, **{"model.from_pretrained": path / "model"})
    assert one.step == 0 and not one.state.model.config.qk_norm_legacy


@pytest.mark.skipif(not torch.cuda.is_available(), reason="zero2 needs a GPU")
def test_zero2_resumes_with_its_fp32_masters(trainer, tmp_path):
    """What a resumed run starts from is bit for bit what the other one had, and the same losses follow."""
    whole = trainer("whole", steps=6)
    assert type(whole.optimizer).__name__ == "ShardedOptimizer"
    assert whole.state.model.x_embedder.proj.weight.dtype == torch.bfloat16
    assert whole.state.model.rope.freqs.dtype == torch.float32
    half = trainer("half", steps=3)
    half.train()
    masters = [m.clone() for m in half.optimizer.masters]
    again = trainer("half", steps=6)
    assert again.step == 3
    for mine, other in zip(again.optimizer.masters, masters, strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, other)
        state = again.optimizer.optim.state[mine]
        assert state["exp_avg"].device == mine.device and float(state["step"]) == 3
    again.train()
    whole.train()
    assert same(losses(tmp_path / "half"), losses(tmp_path / "whole"))
