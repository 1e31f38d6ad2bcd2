"""The autoencoder's encoding of frames and the text encoder's of captions; on a GPU at the sizes of Open-Sora's."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from stdit_fast.benchmarks.encoders import t5_flops
from stdit_fast.benchmarks.peers import Absent
from stdit_fast.benchmarks.random_encoders import T5_XXL, random_autoencoder, random_t5
from stdit_fast.benchmarks.registry import Case
from stdit_fast.errors import ConfigError

# frames x height x width of what is encoded together; micro-batches as stage 1 and 2 have them
FRAMES, QUICK_FRAMES, CPU_FRAMES = ("96x144x256", "272x240x424"), ("96x144x256",), ("4x144x256",)
MICRO_BATCH = 16
CAPTIONS, TOKENS = (6, 17), 200
# Operations of the autoencoder's encoder: of a pixel, and of a pair of the positions that its attention compares
FLOPS_A_PIXEL, FLOPS_A_PAIR = 4_128_640, 2048


def cases(device: str, quick: bool) -> Iterator[Case]:
    """On the CPU the embedded encoders, which need no weights."""
    if device == "cpu":
        for size in CPU_FRAMES:
            yield Case("encoders", f"patch-codec-{size}", {"stdit_fast": partial(prepare_codec, size)}, host=True)
        yield Case("encoders", "minilm-6-captions", {"stdit_fast": partial(prepare_minilm, 6)}, host=True)
        return
    compiled = () if quick else ("compile",)  # which takes a minute
    for size in QUICK_FRAMES if quick else FRAMES:
        yield Case(
            "encoders",
            f"autoencoder-{size}",
            {
                impl: partial(prepare_autoencoder, impl, size)
                for impl in ("stdit_fast", "diffusers", "channels-last", *compiled)
            },
            flops=autoencoder_flops(size),
            expected=partial(prepare_autoencoder, "diffusers", size),
            tolerance=3e-2,
            rounds=5,
        )
    for count in CAPTIONS[:1] if quick else CAPTIONS:
        yield Case(
            "encoders",
            f"t5-xxl-{count}x{TOKENS}",
            {impl: partial(prepare_t5, impl, count) for impl in ("stdit_fast", "transformers", *compiled)},
            flops=t5_flops([TOKENS] * count),
            expected=partial(prepare_t5, "transformers", count),
            tolerance=4e-2,
            rounds=5,
        )


def autoencoder_flops(size: str) -> int:
    """Operations of encoding frames x height x width, which are multiples of 8."""
    frames, height, width = map(int, size.split("x"))
    return frames * (FLOPS_A_PIXEL * height * width + FLOPS_A_PAIR * (height // 8 * (width // 8)) ** 2)


def prepare_codec(size: str) -> Callable[[], Tensor]:
    from stdit_fast.encoders.autoencoder import PATCH_CODEC, load_autoencoder

    codec = load_autoencoder(PATCH_CODEC)
    video = _video(size, "cpu", torch.float32)
    return lambda: codec.encode(video)


def prepare_minilm(count: int) -> Callable[[], object]:
    from stdit_fast.encoders.text import MINILM, load_text_encoder

    try:
        encoder = load_text_encoder(MINILM)
    except ConfigError as error:  # its data are a package of their own
        raise Absent(str(error)) from error
    captions = ["a calm sea under a grey sky, seen from a boat"] * count
    return lambda: encoder.encode(captions)


def prepare_autoencoder(impl: str, size: str) -> Callable[[], Tensor]:
    """Means of the posterior, scaled; ours as training does it, or diffusers' module alone, plain or compiled."""
    from stdit_fast.encoders.autoencoder import VideoAutoencoder

    torch.manual_seed(0)
    with torch.device("cuda"):
        vae = random_autoencoder().bfloat16().eval().requires_grad_(False)
    video = _video(size, "cuda", torch.bfloat16)
    if impl == "stdit_fast":
        autoencoder = VideoAutoencoder(vae, MICRO_BATCH).to("cuda", torch.bfloat16)
        return lambda: autoencoder.encode(video)
    frames = video[0].transpose(0, 1)
    if impl == "channels-last":
        vae, frames = vae.to(memory_format=torch.channels_last), frames.contiguous(memory_format=torch.channels_last)

    if impl == "compile":
        torch.compiler.reset()
        vae.encoder = torch.compile(vae.encoder, dynamic=False)

    @torch.no_grad()
    def encode() -> Tensor:
        means = [vae.encode(part).latent_dist.mean.float() for part in frames.split(MICRO_BATCH)]
        return torch.cat(means).transpose(0, 1)[None] * vae.config.scaling_factor

    return encode


def prepare_t5(impl: str, count: int) -> Callable[[], Tensor]:
    """States of whole captions, [count * TOKENS, C]: ours on packed tokens, or transformers' encoder, block by block
    under the compiler or not."""
    from stdit_fast.encoders.fused_t5 import PackedT5

    model = random_t5(**T5_XXL).eval().requires_grad_(False)
    ids = torch.randint(3, 32000, (count, TOKENS), generator=torch.Generator().manual_seed(0))
    if impl == "compile":
        torch.compiler.reset()
        for block in model.encoder.block:
            block.compile(dynamic=False)
    on_gpu, mask = ids.cuda(), torch.ones(count, TOKENS, dtype=torch.long, device="cuda")

    @torch.no_grad()
    def encode() -> Tensor:
        if impl == "stdit_fast":
            return PackedT5(model)(ids.flatten(), [TOKENS] * count)
        return model(input_ids=on_gpu, attention_mask=mask).last_hidden_state.flatten(0, 1)

    return encode


def _video(size: str, device: str, dtype: torch.dtype) -> Tensor:
    """[1, 3, T, H, W] of smooth values in [-1, 1]."""
    frames, height, width = map(int, size.split("x"))
    generator = torch.Generator(device).manual_seed(0)
    coarse = torch.rand(1, 3, frames, height // 8, width // 8, device=device, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (frames, height, width)).to(dtype)
