"""The encoders' benchmark on small networks: what it counts, and that its errors are those of the arithmetic."""

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from stdit_fast.benchmarks import encoders
from stdit_fast.benchmarks.random_encoders import random_autoencoder
from stdit_fast.errors import ConfigError

SMALL_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}
ON_GPU = torch.cuda.is_available()


@pytest.fixture
def small(monkeypatch):
    """Without a GPU: the clock and the memory of none."""
    monkeypatch.setattr(encoders, "T5_XXL", SMALL_T5)
    monkeypatch.setattr(encoders, "MAX_LENGTH", 12)
    monkeypatch.setattr(encoders, "SHORTEST", 3)
    monkeypatch.setattr(encoders, "COMPILER", "eager")  # which is quick
    config = T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **SMALL_T5)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    monkeypatch.setattr(encoders, "random_t5", lambda **sizes: T5EncoderModel(config).to(encoders.DEVICE, dtype))
    if not ON_GPU:
        monkeypatch.setattr(encoders, "DEVICE", "cpu")
        for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda: 0)


def test_cases():
    assert encoders.parse_case("vae-272x240x424") == ("vae", (272, 240, 424))
    assert encoders.parse_case("t5-17-uneven") == ("t5", (17, "uneven"))
    for wrong, message in (
        ("vae-240x424", "write vae-FRAMES"),
        ("t5-17-even", "t5-17-"),
        ("t6-1-full", "did you mean"),
    ):
        with pytest.raises(ConfigError, match=message):
            encoders.parse_case(wrong)
    assert encoders.lengths_of(3, "uneven") == [20, 110, 200]
    assert encoders.lengths_of(2, "full") == [200, 200]


def test_operations():
    """Of T5-XXL some two a parameter and token; of the autoencoder its first level alone 4 * 18 * 128^2 a pixel."""
    parameters = 24 * (4 * 4096 * 4096 + 3 * 4096 * 10240)
    assert encoders.t5_flops([100]) == 2 * parameters * 100 + 24 * 4 * 4096 * 100**2
    with torch.device("meta"):
        vae = random_autoencoder()
        vae.encoder.forward = lambda x, forward=vae.encoder.forward: forward(x.to("meta"))
    whole, level = encoders.autoencoder_flops(vae, 64, 64), 64 * 64 * 4 * 18 * 128 * 128
    assert 3 * level < whole < 4 * level
    assert encoders.autoencoder_flops(vae, 128, 64) > 2 * whole  # attention grows with the square


@pytest.mark.parametrize("impl", encoders.T5_IMPLS)
def test_a_text_encoder_is_measured(small, impl):
    record = encoders.TextEncoders(16).run("t5-3-uneven", impl, repeats=1)
    assert record.notes["tokens"] == 3 + 8 + 12 and record.flops == encoders.t5_flops([3, 8, 12])
    assert 0 <= record.notes["relative_error"] < (2e-2 if ON_GPU else 1e-5) and record.ms > 0
