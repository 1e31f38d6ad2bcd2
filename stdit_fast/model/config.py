"""STDiT2Config: the keys of Open-Sora 1.1's config.json, and ours."""

import logging

from transformers import PretrainedConfig

from stdit_fast.errors import ConfigError, nearest
from stdit_fast.ops.registry import BACKENDS

logger = logging.getLogger(__name__)

# Keys of a downloaded config that choose kernels. Which kernel runs is `backend`'s business alone, so that a
# downloaded file can never switch to the slow path silently.
KERNEL_KEYS = ("enable_flash_attn", "enable_layernorm_kernel")
IMAGE_FPS = 120.0  # an image's frame rate, as Open-Sora 1.1 tells the model
LEGACY_KEYS = ("qk_norm_legacy", "final_layer_legacy")


class STDiT2Config(PretrainedConfig):
    """Shape and behaviour of an STDiT-2.

    Args:
        input_size: accepted for Open-Sora's sake; the model takes any T, H, W.
        input_sq_size: side in pixels at which positions are unscaled.
        in_channels: channels of the latents.
        patch_size: (1, p, q) latents a token.
        hidden_size: C, a multiple of 12 (thirds for the size embedders, quarters for positions).
        depth: number of blocks.
        num_heads: H; C / H is the head dimension and must be even (rotary pairs).
        mlp_ratio: hidden width of the MLP over C.
        class_dropout_prob: share of captions dropped in training.
        pred_sigma: predict the variance too, 2 * in_channels out.
        caption_channels: width of the text states.
        model_max_length: text tokens at most.
        qk_norm: RMS-normalise q and k of both self-attentions.
        qk_norm_legacy: rotate before normalising, as Open-Sora 1.1 did.
        final_layer_legacy: condition frames pass the final modulation twice, as in Open-Sora 1.1.
        backend: "auto" (fastest that works), "fused" (raise if it can't be had), "reference" (plain PyTorch).

    Raises:
        ConfigError: a value that the model cannot have.
    """

    model_type = "stdit2"

    def __init__(
        self,
        input_size=(None, None, None),
        input_sq_size=512,
        in_channels=4,
        patch_size=(1, 2, 2),
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        class_dropout_prob=0.1,
        pred_sigma=True,
        caption_channels=4096,
        model_max_length=200,
        qk_norm=True,
        qk_norm_legacy=False,
        final_layer_legacy=False,
        backend="auto",
        **kwargs,
    ):
        self.input_size = list(input_size)
        self.input_sq_size = input_sq_size
        self.in_channels = in_channels
        self.patch_size = list(patch_size)
        self.hidden_size = hidden_size
        self.depth = depth
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.class_dropout_prob = class_dropout_prob
        self.pred_sigma = pred_sigma
        self.caption_channels = caption_channels
        self.model_max_length = model_max_length
        self.qk_norm = qk_norm
        self.qk_norm_legacy = qk_norm_legacy
        self.final_layer_legacy = final_layer_legacy
        self.backend = backend
        _drop_open_sora_keys(kwargs)
        super().__init__(**kwargs)
        self._check()

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.pred_sigma else 1)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As PretrainedConfig, but a saved config without the legacy keys comes from Open-Sora 1.1."""
        config_dict = dict(config_dict)
        missing = [key for key in LEGACY_KEYS if key not in config_dict and key not in kwargs]
        if missing:
            logger.warning("the config has no %s: taken as Open-Sora 1.1's, so set to true", " and no ".join(missing))
            config_dict.update(dict.fromkeys(missing, True))
        return super().from_dict(config_dict, **kwargs)

    def to_diff_dict(self):
        """What is saved; the legacy keys are always written, as their absence means Open-Sora 1.1."""
        return super().to_diff_dict() | {key: getattr(self, key) for key in LEGACY_KEYS}

    def _check(self):
        if self.backend not in BACKENDS:
            raise ConfigError("backend", self.backend, nearest(self.backend, BACKENDS))
        if len(self.patch_size) != 3 or self.patch_size[0] != 1 or min(self.patch_size) < 1:
            raise ConfigError("patch_size", self.patch_size, "use (1, p, q): frames are never merged")
        sizes = ("in_channels", "hidden_size", "depth", "num_heads", "caption_channels", "model_max_length")
        for key in (*sizes, "input_sq_size"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "use a positive number")
        if int(self.hidden_size * self.mlp_ratio) < 1:
            raise ConfigError("mlp_ratio", self.mlp_ratio, "use a positive number, such as 4")
        if self.hidden_size % 12:
            raise ConfigError(
                "hidden_size", self.hidden_size, "use a multiple of 12: sizes take a third, places a quarter"
            )
        if self.hidden_size % self.num_heads or self.head_dim % 2:
            remedy = f"use a divisor of hidden_size = {self.hidden_size} that leaves an even head dimension"
            raise ConfigError("num_heads", self.num_heads, remedy)
        if not 0 <= self.class_dropout_prob <= 1:
            raise ConfigError("class_dropout_prob", self.class_dropout_prob, "use a share between 0 and 1")


def _drop_open_sora_keys(kwargs: dict) -> None:
    """Takes Open-Sora's own keys out of `kwargs`; refuses those whose effect this model does not have."""
    for key in KERNEL_KEYS:
        if key in kwargs:
            logger.info("%s = %s is ignored: kernels are chosen by `backend`", key, kwargs.pop(key))
    for key, harmless in (
        ("enable_sequence_parallelism", (False, True)),
        ("drop_path", (0, 0.0, None)),
        ("no_temporal_pos_emb", (False,)),
        ("freeze", (None,)),
        ("auto_map", None),
    ):
        if key in kwargs:
            value = kwargs.pop(key)
            if harmless is not None and value not in harmless:
                raise ConfigError(key, value, f"this model has no such option; use {harmless[0]!r}")
