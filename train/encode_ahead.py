"""Online encoding of the next batch while the GPU has this one's step to do: on a stream of its own.

What comes out is a batch as features give one, latents and text states in place of pixels and captions.
"""

import time
from collections.abc import Iterator

import torch

from stdit_fast.encoders.autoencoder import FrameAutoencoder
from stdit_fast.encoders.text import TextEncoder
from stdit_fast.media.pixels import from_pixels


class EncodeAhead:
    """Batches of a loader; one may be encoded before it is asked for.

    Args:
        batches: as `VideoTextDataset` makes them.
        vae, text_encoder: the run's.
        device: theirs. Without a GPU a batch is encoded at once.
    """

    def __init__(self, batches: Iterator[dict], vae: FrameAutoencoder, text_encoder: TextEncoder, device: torch.device):
        self._batches, self._vae, self._text_encoder = batches, vae, text_encoder
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._coming: dict | None = None
        self._is_encoded = False  # what is coming, on the stream

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        """The next batch, encoded if it was looked at; the current stream waits for that, the host does not."""
        batch, self._coming = self._coming, None
        if batch is None:
            return next(self._batches)
        if self._is_encoded and self._stream is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(self._stream)
            for value in (batch["latents"], batch["text_states"]):
                value.record_stream(stream)  # their memory is free when this stream, too, is done with them
        return batch

    def look_ahead(self) -> float:
        """Starts encoding the next batch; seconds that its loading was waited for."""
        asked = time.perf_counter()
        self._coming = next(self._batches)
        waited = time.perf_counter() - asked
        self._is_encoded = False
        if "latents" not in self._coming:  # as those of features have
            cut = self._text_encoder.truncated
            try:
                self._coming = self._encode_beside(self._coming)
                self._is_encoded = True
            except torch.OutOfMemoryError:  # its step encodes it, when this one's memory is free
                self._text_encoder.truncated = cut
        return waited

    def _encode_beside(self, batch: dict) -> dict:
        if self._device.type != "cuda":
            return self._encoded(batch)
        if self._stream is None:
            # Once: what the encoders keep of their parameters was made on the current stream.
            self._stream = torch.cuda.Stream(self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            return self._encoded(batch)

    @torch.no_grad()
    def _encoded(self, batch: dict) -> dict:
        rest = {key: value for key, value in batch.items() if key not in ("pixels", "posterior_noise", "text")}
        pixels, noise = (
            value if value is None else value.to(self._device, non_blocking=True)
            for value in (batch["pixels"], batch.get("posterior_noise"))
        )
        cut = self._text_encoder.truncated
        latents = self._vae.encode(from_pixels(pixels), noise).float()
        states, mask = self._text_encoder.encode(batch["text"])
        real = mask.flatten().nonzero().flatten()
        if states.is_cuda:
            real = real.pin_memory().to(self._device, non_blocking=True)
        rest["latents"], rest["text_states"] = latents, states.flatten(0, 2).index_select(0, real)
        rest["tokens"], rest["truncated"] = mask.sum(1), self._text_encoder.truncated - cut
        return rest
