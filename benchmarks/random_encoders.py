"""The frozen encoders at their real sizes with random weights, for machines without the real ones."""

import torch

T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}  # sizes of t5-v1_1-xxl


def random_autoencoder():
    """An AutoencoderKL of sd-vae-ft's size with random weights, in float32 on the CPU."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
    )


def t5_config(**sizes: int):
    """A T5Config of T5 1.1's kind of encoder."""
    from transformers import T5Config

    return T5Config(
        vocab_size=32128, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
        tie_word_embeddings=False, **sizes,
    )  # fmt: skip


def random_t5(**sizes: int):
    """A T5 encoder of the given sizes with random weights, the same each time, in bfloat16, on the GPU if there is one.

    Returns:
        A T5EncoderModel.
    """
    from transformers import T5EncoderModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return T5EncoderModel(t5_config(**sizes))
    finally:
        torch.set_default_dtype(torch.float32)
