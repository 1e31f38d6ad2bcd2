"""STDiT-2 against the original's outputs and gradients, and as a transformers model."""

import json

import pytest
import torch
from conftest import relative_error

from stdit_fast import STDiT2, STDiT2Config
from stdit_fast.errors import ConfigError

TINY = dict(hidden_size=24, depth=2, num_heads=2, caption_channels=8, model_max_length=6, class_dropout_prob=0.0)


def tiny_model(seed=0, **changes) -> STDiT2:
    """A small model whose zero-initialised parts are filled too, so that every path shows in the output."""
    torch.manual_seed(seed)
    model = STDiT2(STDiT2Config(**(TINY | changes))).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.norm() == 0 or p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def inputs(batch=2, frames=3, height=6, width=4, tokens=6, dtype=torch.float32, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    scalar = torch.ones(batch)
    return {
        "x": torch.randn(batch, 4, frames, height, width, generator=generator, dtype=dtype),
        "timestep": torch.randint(1000, (batch,), generator=generator),
        "y": torch.randn(batch, 1, tokens, 8, generator=generator, dtype=dtype),
        "mask": (torch.arange(tokens) < torch.arange(1, batch + 1)[:, None]).long(),
        "num_frames": scalar * frames,
        "height": scalar * height * 8,
        "width": scalar * width * 8,
        "ar": scalar * height / width,
        "fps": scalar * 24,
    }


@pytest.fixture(scope="module")
def golden_model(golden):
    tensors, meta = golden("stdit2_tiny")
    config = STDiT2Config(**json.loads(meta["config"]), qk_norm_legacy=True, final_layer_legacy=True)
    model = STDiT2(config).eval()
    model.load_state_dict({k.removeprefix("param."): v.float() for k, v in tensors.items() if k.startswith("param.")})
    return model, tensors


def golden_inputs(tensors, case):
    return {k.split(".in.")[1]: v for k, v in tensors.items() if k.startswith(f"{case}.in.")}


@pytest.mark.parametrize("checkpointing", ["off", "all"])
@pytest.mark.parametrize("case", ["video", "image"])
def test_equals_the_original(golden_model, case, checkpointing):
    model, tensors = golden_model
    model.set_checkpointing(checkpointing)
    given = golden_inputs(tensors, case)
    grad_out, x_mask = given.pop("grad_out"), given.pop("x_mask")
    with torch.no_grad():
        assert relative_error(model(**given), tensors[f"{case}.out.no_x_mask"]) < 1e-5
    model.zero_grad()
    out = model(**given, x_mask=x_mask)
    assert relative_error(out, tensors[f"{case}.out.x_mask"]) < 1e-5
    (out * grad_out).sum().backward()
    compared = 0
    for name, parameter in model.named_parameters():
        got, want = parameter.grad, tensors[f"{case}.grad.{name}"]
        if parameter.numel() >= 4000:
            got = got.flatten()[::97]
        assert got.shape == want.shape
        assert relative_error(got, want) < 1e-4, name
        compared += 1
    assert compared == sum(key.startswith(f"{case}.grad.") for key in tensors)


def test_xl_has_767_million_parameters():
    with torch.device("meta"):
        model = STDiT2(STDiT2Config())
    assert sum(p.numel() for p in model.parameters()) == 767_452_064
    assert model.state_dict()["y_embedder.y_embedding"].shape == (200, 4096)
    assert model.state_dict()["rope.freqs"].shape == (36,)


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 5, 3), (7, 3, 8)])
def test_any_size(size):
    model, frames = tiny_model(), size[0]
    given = inputs(frames=frames, height=size[1], width=size[2])
    out = model(**given)
    assert out.shape == (2, 8, *size) and out.dtype == torch.float32 and out.isfinite().all()


def test_odd_size_is_the_padded_size_cut_back():
    """The right border's missing latents count as zeros."""
    model = tiny_model()
    given = inputs(height=5, width=3)
    padded = given | {"x": torch.nn.functional.pad(given["x"], (0, 1, 0, 1))}
    torch.testing.assert_close(model(**given), model(**padded)[..., :5, :3])


@pytest.mark.parametrize("legacy", [False, True])
def test_x_mask_of_all_frames_is_no_mask(legacy):
    model = tiny_model(qk_norm_legacy=legacy, final_layer_legacy=legacy)
    given = inputs()
    torch.testing.assert_close(model(**given, x_mask=torch.ones(2, 3)), model(**given))


def test_condition_frames_count_as_timestep_0():
    """With all frames conditions, t has no say; the plain final layer then equals a pass at t = 0."""
    model = tiny_model()
    given = inputs()
    masked = model(**given, x_mask=torch.zeros(2, 3))
    at_zero = model(**(given | {"timestep": torch.zeros(2, dtype=torch.long)}))
    torch.testing.assert_close(masked, at_zero)
    mixed = model(**given, x_mask=torch.tensor([[True, False, True], [True, True, True]]))
    assert relative_error(mixed[1], model(**given)[1]) < 1e-5
    assert relative_error(mixed[0], model(**given)[0]) > 1e-3


def test_legacy_orders_differ():
    base = tiny_model()
    for flag in ("qk_norm_legacy", "final_layer_legacy"):
        other = STDiT2(STDiT2Config(**TINY, **{flag: True})).eval()
        other.load_state_dict(base.state_dict())
        given = inputs() | {"x_mask": torch.tensor([[True, False, True], [True, True, False]])}
        assert relative_error(other(**given), base(**given)) > 1e-4


def test_samples_do_not_mix_and_padding_tokens_have_no_say():
    model = tiny_model()
    given = inputs(batch=3)
    out = model(**given)
    for b in range(3):
        alone = {k: v[b : b + 1] for k, v in given.items()}
        alone["y"] = alone["y"].clone()
        alone["y"][alone["mask"][:, None] == 0] = 1e6
        torch.testing.assert_close(model(**alone), out[b : b + 1], atol=1e-5, rtol=1e-4)


def test_without_a_mask_all_tokens_are_real():
    model = tiny_model()
    given = inputs()
    want = model(**(given | {"mask": torch.ones(2, 6)}))
    torch.testing.assert_close(model(**(given | {"mask": None})), want)


def test_dropped_captions():
    model = tiny_model()
    given = inputs()
    null = model.y_embedder.y_embedding[None, None].expand(2, 1, -1, -1)
    want = model(**(given | {"y": null}))
    assert relative_error(want, model(**given)) > 1e-5
    torch.testing.assert_close(model(**given, drop_caption=torch.tensor([True, True])), want)
    one = model(**given, drop_caption=torch.tensor([False, True]))
    torch.testing.assert_close(one[0], model(**given)[0])
    torch.testing.assert_close(one[1], want[1])
    model.config.class_dropout_prob = 1.0
    torch.testing.assert_close(model.train()(**given), want)


def test_gradients_in_float64():
    """Finite differences along random directions, for every parameter and the input, masked and legacy."""
    for flags in ({}, {"qk_norm_legacy": True, "final_layer_legacy": True}, {"qk_norm": False}):
        model = tiny_model(**(flags | {"depth": 1})).double()
        given = inputs(frames=2, height=3, width=2, dtype=torch.float64)
        x_mask = torch.tensor([[True, False], [True, True]])
        generator = torch.Generator().manual_seed(1)
        probe = torch.randn(2, 8, 2, 3, 2, generator=generator, dtype=torch.float64)

        def value(model=model, given=given, x_mask=x_mask, probe=probe):
            return (model(**given, x_mask=x_mask) * probe).sum()

        given["x"].requires_grad_(True)
        names, leaves = zip(*model.named_parameters(), ("x", given["x"]), strict=False)
        grads = torch.autograd.grad(value(), leaves)
        for name, leaf, grad in zip(names, leaves, grads, strict=True):
            direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                leaf.add_(1e-5 * direction)
                up = value()
                leaf.sub_(2e-5 * direction)
                slope = (up - value()) / 2e-5
                leaf.add_(1e-5 * direction)
            want = (grad * direction).sum()
            assert abs(slope - want) <= 1e-5 * max(1.0, abs(float(want))), (name, float(slope), float(want))


def test_checkpointing_changes_no_gradient():
    grads = []
    for mode in ("off", 1, "all"):
        model = tiny_model().train()
        model.set_checkpointing(mode)
        model(**inputs(), x_mask=torch.tensor([[True, False, True], [True, True, True]])).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))
    with pytest.raises(ConfigError, match="checkpointing = 3: use"):
        model.set_checkpointing(3)


def test_bfloat16_keeps_rotary_angles_and_answers_float32():
    model = tiny_model()
    exact = model(**inputs())
    half = tiny_model().to(torch.bfloat16)
    assert half.rope.freqs.dtype == torch.float32 and torch.equal(half.rope.freqs, model.rope.freqs)
    out = half(**inputs())
    assert out.dtype == torch.float32 and relative_error(out, exact) < 5e-2


def test_initial_values():
    torch.manual_seed(0)
    model = STDiT2(STDiT2Config(**(TINY | {"hidden_size": 144, "caption_channels": 64})))
    zero = ("attn_temp.proj.weight", "cross_attn.proj.weight", "final_layer.linear.weight")
    for name, p in model.named_parameters():
        if name.endswith(zero):
            assert p.count_nonzero() == 0, name
        elif name.endswith("norm.weight"):
            assert (p == 1).all(), name
        elif name.endswith("bias"):
            assert p.count_nonzero() == 0, name
        elif name.startswith(("t_embedder", "t_block", "y_embedder")):
            assert abs(p.std() / 0.02 - 1) < 0.1, name
        elif name == "x_embedder.proj.weight" or name.endswith(("qkv.weight", "fc1.weight", "q_linear.weight")):
            fan_out, fan_in = p.flatten(1).shape
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert p.abs().max() <= bound and abs(p.std() / (bound / 3**0.5) - 1) < 0.1, name
    want = 10000 ** (-torch.arange(0, 72, 2) / 72)
    torch.testing.assert_close(model.rope.freqs, want)
    assert model.y_embedder.y_embedding.std() > 0


# ------------------------------------------------------------------- as a PreTrainedModel


def test_save_and_load(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.rope.freqs.mul_(1.5)  # loaded values are used, not recomputed
    model.save_pretrained(tmp_path)
    back = STDiT2.from_pretrained(tmp_path)
    assert back.config.qk_norm_legacy is False and back.config.final_layer_legacy is False
    assert back.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    torch.testing.assert_close(back(**inputs()), model(**inputs()))


def test_a_checkpoint_that_does_not_fit_raises_with_the_list(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    missing = tensors.pop("blocks.1.attn.qkv.weight")
    tensors["blocks.9.stray"] = torch.zeros(1)
    tensors["t_block.1.bias"] = torch.zeros(3)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError) as caught:
        STDiT2.from_pretrained(tmp_path)
    text = str(caught.value)
    for part in ("1 keys missing: blocks.1.attn.qkv.weight", "blocks.9.stray", "t_block.1.bias is [3], the model has"):
        assert part in text
    lenient = STDiT2.from_pretrained(tmp_path, strict=False)
    filled = lenient.blocks[1].attn.qkv.weight
    assert filled.shape == missing.shape and filled.isfinite().all() and filled.std() > 0
    assert torch.equal(lenient.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_config_of_open_sora(tmp_path, caplog):
    """A downloaded config.json: accepted, legacy without the keys, never switched to slow kernels."""
    downloaded = TINY | {
        "model_type": "STDiT2", "architectures": ["STDiT2"], "input_size": [None, None, None], "qk_norm": True,
        "enable_flash_attn": False, "enable_layernorm_kernel": False, "enable_sequence_parallelism": False,
        "drop_path": 0.0, "no_temporal_pos_emb": False, "freeze": None, "torch_dtype": "float32",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(downloaded))
    with caplog.at_level("INFO"):
        config = STDiT2Config.from_pretrained(tmp_path)
    assert config.qk_norm_legacy and config.final_layer_legacy and config.backend == "auto"
    assert "taken as Open-Sora 1.1's" in caplog.text and "enable_flash_attn = False is ignored" in caplog.text
    assert STDiT2Config().qk_norm_legacy is False
    config.save_pretrained(tmp_path / "again")
    assert STDiT2Config.from_pretrained(tmp_path / "again").qk_norm_legacy is True


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": 100}, "hidden_size = 100: use a multiple of 12"),
        ({"num_heads": 5}, "num_heads = 5: use a divisor"),
        ({"patch_size": (2, 2, 2)}, "patch_size"),
        ({"backend": "refrence"}, "did you mean 'reference'"),
        ({"drop_path": 0.1}, "drop_path = 0.1"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob = 1.5"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ConfigError, match=message):
        STDiT2Config(**(TINY | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 3, 6, 4)}, r"x has shape \[2, 3, 3, 6, 4\]"),
        ({"y": torch.zeros(2, 1, 7, 8)}, "y has 7 tokens, expected 1 to model_max_length = 6"),
        ({"y": torch.zeros(2, 1, 6, 9)}, "y has shape"),
        ({"fps": None}, "fps is missing"),
        ({"height": torch.ones(3)}, r"height has shape \[3\]"),
        ({"x_mask": torch.ones(2, 4)}, r"x_mask has shape \[2, 4\], expected \[2, 3\]"),
        ({"mask": torch.zeros(2, 6)}, "have no token"),
    ],
)
def test_forward_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**(inputs() | change))
