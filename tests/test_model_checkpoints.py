"""Weights from elsewhere: Open-Sora 1.1 in its forms, PixArt-alpha, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file
from test_stdit2 import TINY, inputs, tiny_model

from stdit_fast import STDiT2, STDiT2Config
from stdit_fast.errors import ConfigError
from stdit_fast.model.checkpoints import read_state_dict


@pytest.fixture
def legacy():
    return tiny_model(qk_norm_legacy=True, final_layer_legacy=True)


@pytest.mark.parametrize("form", ["folder", "safetensors", "pt", "wrapped", "sharded"])
def test_open_sora(tmp_path, legacy, form):
    state = legacy.state_dict()
    path = tmp_path
    if form == "folder":
        keys = TINY | {"model_type": "STDiT2", "enable_flash_attn": False, "qk_norm": True}
        (tmp_path / "config.json").write_text(json.dumps(keys))
        save_file(state, tmp_path / "model.safetensors")
    elif form == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    elif form == "pt":
        path = tmp_path / "weights.pt"
        torch.save(state, path)
    elif form == "wrapped":
        path = tmp_path / "ema.pt"
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "step": 3}, path)
    else:
        names = list(state)
        for number, part in enumerate((names[::2], names[1::2])):
            torch.save({k: state[k] for k in part}, tmp_path / f"pytorch_model-{number}.bin")
        where = {k: f"pytorch_model-{i % 2}.bin" for i, k in enumerate(names)}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    model = STDiT2.from_open_sora(path)
    assert model.config.qk_norm_legacy and model.config.final_layer_legacy
    given = inputs() | {"x_mask": torch.tensor([[True, False, True], [True, True, True]])}
    torch.testing.assert_close(model(**given), legacy(**given))


def test_open_sora_misfit(tmp_path, legacy):
    state = legacy.state_dict()
    del state["fps_embedder.mlp.0.bias"]
    state["blocks.0.extra"] = torch.zeros(2)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="1 keys missing: fps_embedder.mlp.0.bias; 1 keys unexpected: blocks.0.extra"):
        STDiT2.from_open_sora(tmp_path / "w.safetensors")
    assert STDiT2.from_open_sora(tmp_path / "w.safetensors", strict=False).config.depth == 2


def test_no_pickled_code_runs(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"x": torch.zeros(1), "bomb": Bomb()}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="would run code"):
        read_state_dict(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


def test_unreadable_paths(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "words.pt").write_text("hello")
    for name, file in (("empty", None), ("cut_index", "model.safetensors.index.json"), ("cut_config", "config.json")):
        (tmp_path / name).mkdir()
        if file is not None:
            (tmp_path / name / file).write_text('{"weight_map": ')
    save_file({"x": torch.zeros(1)}, tmp_path / "cut_config" / "model.safetensors")
    (tmp_path / "no_map").mkdir()
    (tmp_path / "no_map" / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    for name, message in (
        ("absent.pt", "no such file"),
        ("cut.safetensors", "cannot be read as safetensors"),
        ("cut.pt", "cannot be read|more than tensors"),
        ("notes.txt", "ends in .safetensors"),
        ("words.pt", "it cannot be read .*; is it complete"),
        ("empty", "found none"),
        ("cut_index", "index.json': it cannot be read as JSON"),
        ("cut_config", "config.json': it cannot be read as JSON"),
        ("no_map", "its weight_map should say which file"),
    ):
        with pytest.raises(ConfigError, match=message):
            STDiT2.from_open_sora(tmp_path / name)


def pixart_state(config: STDiT2Config, tokens: int) -> dict:
    """The keys of PixArt-alpha 1024, at the size of `config`."""
    torch.manual_seed(5)
    own = STDiT2(config).state_dict()
    lacks = ("attn_temp", "q_norm", "k_norm", "temporal", "fl_embedder", "fps_embedder", "t_block_temp", "rope")
    state = {k: torch.randn_like(v) for k, v in own.items() if not any(part in k for part in lacks)}
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"][:, :, 0]
    state["y_embedder.y_embedding"] = torch.randn(tokens, config.caption_channels)
    state["pos_embed"] = torch.randn(1, 16, config.hidden_size)
    return state


def test_pixart(tmp_path):
    config = STDiT2Config(**TINY)
    state = pixart_state(config, tokens=4)
    torch.save({"state_dict": state}, tmp_path / "PixArt.pth")
    torch.manual_seed(0)
    fresh = STDiT2(config).state_dict()
    torch.manual_seed(0)
    model = STDiT2.from_pixart(tmp_path / "PixArt.pth", config)
    loaded = model.state_dict()
    assert torch.equal(loaded["x_embedder.proj.weight"], state["x_embedder.proj.weight"][:, :, None])
    assert torch.equal(loaded["y_embedder.y_embedding"][:4], state["y_embedder.y_embedding"])
    assert (loaded["y_embedder.y_embedding"][4:] == state["y_embedder.y_embedding"][3]).all()
    for key in fresh:
        if key not in state:
            assert torch.equal(loaded[key], fresh[key]), key
        elif "embed" not in key:
            assert torch.equal(loaded[key], state[key]), key
    assert not model.config.qk_norm_legacy
    # Before training, the temporal branch adds nothing: a frame of a video is what PixArt makes of it as an image.
    assert loaded["blocks.0.attn_temp.proj.weight"].count_nonzero() == 0


def test_pixart_512_has_no_size_embedders_and_other_gaps_raise(tmp_path):
    config = STDiT2Config(**TINY)
    state = {k: v for k, v in pixart_state(config, 6).items() if not k.startswith(("csize", "ar_embedder"))}
    save_file(state, tmp_path / "p512.safetensors")
    STDiT2.from_pixart(tmp_path / "p512.safetensors", config)
    del state["blocks.0.attn.qkv.bias"]
    state["decoder.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "gap.safetensors")
    with pytest.raises(ConfigError, match="missing: blocks.0.attn.qkv.bias; 1 keys unexpected: decoder.weight"):
        STDiT2.from_pixart(tmp_path / "gap.safetensors", config)
