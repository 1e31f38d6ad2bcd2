"""Batches that travel to the device on a stream of their own: the same values, and nothing is overwritten too early."""

import pytest
import torch

from stdit_fast.train import send_ahead
from stdit_fast.train.send_ahead import SendAhead

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"


def batch(number: int, tokens: int) -> dict:
    generator = torch.Generator().manual_seed(number)
    made = {
        "text_states": torch.randn(tokens, 24, generator=generator).bfloat16(),
        "noise": torch.randn(3, 4, 2, 5, 7, generator=generator),
        "x_mask": torch.rand(3, 2, generator=generator) < 0.5,
        "timestep": torch.randint(1000, (3,), generator=generator),
        "seconds": torch.tensor(float(number), dtype=torch.float64),
        "tokens": torch.tensor([1, 2, tokens - 3]),
        "samples": torch.arange(3),
    }
    made = {key: value.pin_memory() if ON_GPU else value for key, value in made.items()}
    return made | {"bucket": number, "text": ["a", "b", "c"], "posterior_noise": None}


def assert_same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        if not torch.is_tensor(value):
            assert got[key] is value
            continue
        on_host = key in send_ahead.ON_THE_HOST
        assert got[key].device.type == ("cpu" if on_host else DEVICE.type)
        assert got[key].dtype == value.dtype and torch.equal(got[key].cpu(), value), key


@pytest.mark.parametrize("kept", [1, 3])
def test_batches_come_as_they_are_and_stay_as_long_as_they_are_kept(kept, monkeypatch):
    """Of sizes that grow and shrink; each is looked at again when `kept` - 1 more have come, and some work later."""
    monkeypatch.setattr(send_ahead, "LEAST_BYTES", 1)
    sizes = [9, 5, 40, 8, 41, 200, 7, 11, 200, 4, 60]
    wanted = [batch(number, size) for number, size in enumerate(sizes)]
    ahead, got = SendAhead(iter(wanted), DEVICE, kept), []
    for number in range(len(wanted)):
        got.append(next(ahead))
        assert_same(got[-1], wanted[number])
        for earlier in range(max(0, number - kept + 1), number):
            assert_same(got[earlier], wanted[earlier])
    with pytest.raises(StopIteration):
        next(ahead)


def test_what_is_too_large_takes_the_ordinary_way(monkeypatch):
    wanted = [batch(0, 9), batch(1, 500), batch(2, 9)]
    monkeypatch.setattr(send_ahead, "MOST_BYTES", 20_000)
    got = list(SendAhead(iter(wanted), DEVICE))
    assert got[1] is wanted[1] and got[0]["noise"] is not wanted[0]["noise"]
    assert_same(got[2], wanted[2])


def test_no_memory_for_it(monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("full")

    wanted = [batch(0, 9), batch(1, 9)]
    ahead = SendAhead(iter(wanted), DEVICE)
    with monkeypatch.context() as now:
        now.setattr(torch, "empty", full)
        assert next(ahead) is wanted[0]
    assert_same(next(ahead), wanted[1])


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_batch_travels_while_the_gpu_computes_and_is_not_overwritten_before_it_was_read():
    """Each step reads its batch after long work, which the host does not wait for."""
    count = 12
    wanted = [batch(number, 4000 + number) for number in range(count)]
    ahead, slow = SendAhead(iter(wanted), DEVICE), torch.randn(4096, 4096, device=DEVICE)
    next_stream = torch.cuda.Stream()
    with torch.cuda.stream(next_stream):
        slow = slow @ slow
        torch.cuda.synchronize()
        sums, arrived_early = [], 0
        for number in range(count):
            got = next(ahead)
            begun = torch.cuda.Event()
            for _ in range(20):
                slow = (slow @ slow).clamp(-1, 1)
            begun.record()
            sums.append([got[key].double().sum() for key in ("text_states", "noise", "timestep")])
            if number > 3:
                ahead._stream.synchronize()  # over long before the step that was just asked for
                arrived_early += not begun.query()
        torch.cuda.synchronize()
    for found, given in zip(sums, wanted, strict=True):
        for value, key in zip(found, ("text_states", "noise", "timestep"), strict=True):
            torch.testing.assert_close(value.cpu(), given[key].double().sum(), rtol=1e-12, atol=1e-9)
    assert arrived_early >= count - 6
