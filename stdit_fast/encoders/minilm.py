"""A text encoder for machines without a T5's weights: token embeddings alone."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stdit_fast.encoders.modules import ModelMixin as ModelMixin  # diffusers looks for it here
from stdit_fast.encoders.modules import SavableModule, register_to_config
from stdit_fast.encoders.text import TextStates

TOKENIZER_FILE = "tokenizer.json"


class MiniLMEmbeddings(SavableModule):
    """The input embeddings of all-MiniLM-L6-v2: no network, 384 channels, one fixed vector a token.

    Captions that share words share states, which is what learning from captions needs; word order is lost. Each
    row is scaled to unit root mean square: as stored they are near 0.05 and differ from token to token, and the
    model's caption projection, initialised with standard deviation 0.02, would hardly see them.

    Saved and loaded as diffusers' models are, its tokenizer beside it.

    Args:
        vocabulary, channels: size of the table.
        max_length: tokens of a caption, special tokens included; longer captions are cut and counted.
    """

    @register_to_config
    def __init__(self, vocabulary: int = 30522, channels: int = 384, max_length: int = 200):
        super().__init__()
        self.register_buffer("table", torch.zeros(vocabulary, channels))
        self.channels, self.max_length = channels, max_length
        self.truncated = 0

    @classmethod
    def from_table(cls, table: Tensor, tokenizer, max_length: int = 200) -> "MiniLMEmbeddings":
        """Of embeddings [vocabulary, channels] and a tokenizers.Tokenizer.

        Its special tokens stay, so no caption is empty.
        """
        embeddings = cls(*table.shape, max_length)
        rms = table.float().square().mean(1, keepdim=True).sqrt()
        embeddings.table = (table.float() / rms.clamp_min(1e-6)).to(table.dtype)
        embeddings._take(tokenizer)
        return embeddings

    def _take(self, tokenizer) -> None:
        tokenizer.enable_truncation(self.max_length)
        tokenizer.enable_padding(length=self.max_length, pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]")
        self.tokenizer = tokenizer

    def save_pretrained(self, save_directory, **kwargs) -> None:
        super().save_pretrained(save_directory, **kwargs)
        self.tokenizer.save(str(Path(save_directory) / TOKENIZER_FILE))

    @classmethod
    def from_pretrained(cls, path, **kwargs) -> "MiniLMEmbeddings":
        from tokenizers import Tokenizer

        embeddings = super().from_pretrained(path, **kwargs)
        embeddings._take(Tokenizer.from_file(str(Path(path) / kwargs.get("subfolder", "") / TOKENIZER_FILE)))
        return embeddings

    def served_by(self) -> str:
        """What encodes, in words."""
        return "a table of embeddings"

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextStates:
        """States [B, 1, max_length, channels] and mask [B, max_length] of B captions."""
        # one by one: a batch starts the tokenizer's threads, which later warn in every forked data worker
        encodings = [self.tokenizer.encode(caption) for caption in captions]
        self.truncated += sum(bool(encoding.overflowing) for encoding in encodings)
        ids = torch.tensor([encoding.ids for encoding in encodings])
        mask = torch.tensor([encoding.attention_mask for encoding in encodings])
        device = self.table.device
        states = self.table[ids.to(device)] * mask[..., None].to(self.table)
        return TextStates(states.unsqueeze(1), mask)
