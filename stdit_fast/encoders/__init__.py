"""The frozen encoders in front of the transformer: video to latents, captions to text states."""

from stdit_fast.encoders.autoencoder import FrameAutoencoder, latent_size, load_autoencoder
from stdit_fast.encoders.text import TextStates, load_text_encoder

__all__ = ["FrameAutoencoder", "TextStates", "latent_size", "load_autoencoder", "load_text_encoder"]
