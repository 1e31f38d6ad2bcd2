"""The frozen encoders at real size, ours beside the libraries' own: suite "encoders". Needs a GPU.

    python -m stdit_fast.benchmarks.encoders --cases vae-272x240x424 t5-17-uneven --out encoders.jsonl

A case is vae-FRAMESxHEIGHTxWIDTH (pixels to latents), or t5-CAPTIONS-uneven or -full: captions padded to 200 tokens, of
lengths spread evenly from 20 to 200, or all of 200. Weights are random, of the size of sd-vae-ft and t5-v1_1-xxl.

Implementations: "fused" is ours; "diffusers" and "transformers" run their modules as they are, the former also with
channels last; "compile" is each with torch.compile in its default mode, the autoencoder's encoder as a whole (where the
compiler chooses channels last by itself), T5 block by block. All in bfloat16 on the same inputs. Before it is timed,
each is held against the same network in float32: the error is the relative norm of the difference, on a few frames or
captions. A time is that of a whole call, from the CPU's launch to the GPU's end.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from stdit_fast.benchmarks.random_encoders import T5_XXL, random_autoencoder, random_t5
from stdit_fast.benchmarks.records import Record, append, need_gpu, results_file
from stdit_fast.encoders.autoencoder import AUTO, VideoAutoencoder
from stdit_fast.encoders.fused_t5 import PackedT5
from stdit_fast.errors import ConfigError, nearest, run_command

CASES = ("vae-272x240x424", "vae-96x144x256", "vae-64x480x848", "t5-17-uneven", "t5-17-full", "t5-6-uneven")
VAE_IMPLS = ("fused", "diffusers", "diffusers channels_last", "diffusers compile")
T5_IMPLS = ("fused", "transformers", "transformers compile")
DEVICE = "cuda"
COMPILER = "inductor"
MICRO_BATCH = 16  # frames at once, of all implementations
MAX_LENGTH, SHORTEST = 200, 20
CHECKED_CAPTIONS = 4


def parse_case(case: str) -> tuple[str, tuple]:
    """("vae", (frames, height, width)) or ("t5", (captions, kind))."""
    kind, _, rest = case.partition("-")
    if kind == "vae":
        sizes = rest.split("x")
        if len(sizes) == 3 and all(size.isdecimal() and int(size) for size in sizes):
            return kind, tuple(map(int, sizes))
        raise ConfigError("cases", case, "write vae-FRAMESxHEIGHTxWIDTH, like vae-272x240x424")
    count, _, lengths = rest.partition("-")
    if kind == "t5" and count.isdecimal() and int(count) and lengths in ("uneven", "full"):
        return kind, (int(count), lengths)
    raise ConfigError("cases", case, nearest(case, CASES))


def lengths_of(count: int, kind: str) -> list[int]:
    """Tokens of each caption."""
    if kind == "full" or count == 1:
        return [MAX_LENGTH] * count
    return [round(SHORTEST + (MAX_LENGTH - SHORTEST) * i / (count - 1)) for i in range(count)]


def autoencoder_flops(vae: torch.nn.Module, height: int, width: int) -> int:
    """Operations of encoding one frame: its convolutions and linear layers, and attention's products."""
    total = 0
    found = []

    def count(module, inputs, output):
        nonlocal total
        weight = module.weight
        if isinstance(module, torch.nn.Conv2d):
            total += 2 * weight.numel() * output.shape[-2] * output.shape[-1]
        else:  # attention's four layers, of which q brings the products
            tokens = output.numel() // output.shape[-1]
            total += 2 * weight.numel() * tokens + tokens**2 * weight.shape[0]

    for module in vae.encoder.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            found.append(module.register_forward_hook(count))
    with torch.no_grad():
        vae.encoder(torch.zeros(1, 3, height, width, device=vae.device, dtype=vae.dtype))
    for hook in found:
        hook.remove()
    return total


def t5_flops(lengths: list[int]) -> int:
    """Operations of the products on real tokens."""
    wide, inner, hidden = T5_XXL["d_model"], T5_XXL["d_kv"] * T5_XXL["num_heads"], T5_XXL["d_ff"]
    layer = 2 * (4 * wide * inner + 3 * wide * hidden)
    attention = 4 * inner * sum(n * n for n in lengths)
    return T5_XXL["num_layers"] * (layer * sum(lengths) + attention)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def timed(call: Callable, repeats: int) -> list[float]:
    """Milliseconds of whole calls, after two that are not counted."""
    times = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return times[2:]


class Autoencoders:
    """The same random autoencoder as each implementation runs it."""

    impls = VAE_IMPLS

    def __init__(self, micro_batch: int):
        torch.manual_seed(0)
        self.exact = random_autoencoder().to(DEVICE).eval()
        self.micro_batch = micro_batch or AUTO
        self.checked_frames = micro_batch or MICRO_BATCH

    def build(self, impl: str) -> VideoAutoencoder:
        vae = copy.deepcopy(self.exact).bfloat16()
        if impl == "diffusers channels_last":
            vae.to(memory_format=torch.channels_last)
        if impl == "diffusers compile":
            vae.encoder = torch.compile(vae.encoder, dynamic=False, backend=COMPILER)
        return VideoAutoencoder(vae, self.micro_batch, "fused" if impl == "fused" else "reference")

    def run(self, case: str, impl: str, repeats: int) -> Record:
        frames, height, width = parse_case(case)[1]
        generator = torch.Generator(DEVICE).manual_seed(0)
        video = torch.rand(1, 3, frames, height, width, device=DEVICE, generator=generator) * 2 - 1
        # Pictures are smooth: not white noise alone, but large patches of colour too.
        coarse = torch.rand(frames, 3, 8, 8, device=DEVICE, generator=generator) * 2 - 1
        patches = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        video = (0.2 * video[0].movedim(1, 0) + 0.8 * patches).movedim(1, 0)[None]
        few = video[:, :, : self.checked_frames]  # a whole micro-batch: the compiler makes no other size
        want = VideoAutoencoder(self.exact, 1, "reference").encode(few)
        autoencoder = self.build(impl)
        error = relative_error(autoencoder.encode(few), want)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        times = timed(lambda: autoencoder.encode(video), repeats)
        return Record.of_times(
            "encoders", case, impl, times,
            flops=frames * autoencoder_flops(self.exact, height, width),
            peak_gib=(torch.cuda.max_memory_allocated() - before) / 2**30,
            notes={"relative_error": error, "micro_batch": self.micro_batch},
        )  # fmt: skip


class TextEncoders:
    """The same random T5 as each implementation runs it."""

    impls = T5_IMPLS

    def __init__(self, micro_batch: int):
        self.model = random_t5(**T5_XXL).eval().requires_grad_(False)

    def run(self, case: str, impl: str, repeats: int) -> Record:
        lengths = lengths_of(*parse_case(case)[1])
        generator = torch.Generator().manual_seed(0)
        captions = [torch.randint(3, 32000, (n,), generator=generator) for n in lengths]
        call = self.packed if impl == "fused" else self.padded
        self.compiled(impl == "transformers compile")
        few = range(0, len(captions), max(1, len(captions) // CHECKED_CAPTIONS))
        error = relative_error(torch.cat([call(captions)[i] for i in few]), self.exact([captions[i] for i in few]))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        times = timed(lambda: call(captions), repeats)
        return Record.of_times(
            "encoders", case, impl, times,
            flops=t5_flops(lengths),
            peak_gib=(torch.cuda.max_memory_allocated() - before) / 2**30,
            notes={"relative_error": error, "tokens": sum(lengths), "padded_to": MAX_LENGTH},
        )  # fmt: skip

    def compiled(self, wanted: bool) -> None:
        """Has transformers' blocks run under the compiler, or as they are."""
        for block in self.model.encoder.block:
            block._compiled_call_impl = None
            if wanted:
                block.compile(dynamic=False, backend=COMPILER)

    @torch.no_grad()
    def packed(self, captions: list[Tensor]) -> list[Tensor]:
        lengths = [len(c) for c in captions]
        return list(PackedT5(self.model)(torch.cat(captions), lengths).split(lengths))

    @torch.no_grad()
    def padded(self, captions: list[Tensor]) -> list[Tensor]:
        ids = torch.zeros(len(captions), MAX_LENGTH, dtype=torch.long)
        for row, caption in zip(ids, captions, strict=True):
            row[: len(caption)] = caption
        mask = (ids > 0).long()
        out = self.model(input_ids=ids.to(DEVICE), attention_mask=mask.to(DEVICE)).last_hidden_state
        return [row[: len(c)] for row, c in zip(out, captions, strict=True)]

    @torch.no_grad()
    def exact(self, captions: list[Tensor]) -> Tensor:
        """In float32, one block's parameters widened at a time."""
        from transformers import T5EncoderModel

        narrow = self.model.encoder.block
        one = copy.copy(self.model.config)
        one.num_layers = 1
        with torch.device(DEVICE):
            wide = T5EncoderModel(one).eval()
        table = narrow[0].layer[0].SelfAttention.relative_attention_bias
        wide.encoder.final_layer_norm = torch.nn.Identity()
        hidden = [torch.nn.functional.embedding(c.to(DEVICE)[None], self.model.shared.weight).float() for c in captions]
        for block in narrow:
            state = {name: value.float() for name, value in block.state_dict().items()}
            state["layer.0.SelfAttention.relative_attention_bias.weight"] = table.weight.float()
            wide.encoder.block[0].load_state_dict(state)
            hidden = [wide.encoder(inputs_embeds=h).last_hidden_state for h in hidden]
        norm = copy.deepcopy(self.model.encoder.final_layer_norm).float()
        return torch.cat([norm(h)[0] for h in hidden])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--impl", nargs="+", choices=sorted({*VAE_IMPLS, *T5_IMPLS}), help="default: all of a case's")
    parser.add_argument("--micro-batch", type=int, default=MICRO_BATCH, help="frames at once; 0: auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=results_file, help="results file to append to")
    args = parser.parse_args()
    for case in args.cases:
        parse_case(case)
    need_gpu("encoders of real size are timed on a GPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print(f"{'case':<20}{'impl':<26}{'ms':>9}{'low':>9}{'high':>9}{'TFLOP/s':>9}{'error':>10}{'GiB':>7}")
    for kind, networks in (("vae", Autoencoders), ("t5", TextEncoders)):
        cases = [case for case in args.cases if parse_case(case)[0] == kind]
        built = networks(args.micro_batch) if cases else None
        for case in cases:
            for impl in networks.impls:
                if args.impl and impl not in args.impl:
                    continue
                r = built.run(case, impl, args.repeats)
                print(f"{case:<20}{impl:<26}{r.ms:>9.1f}{r.ms_low:>9.1f}{r.ms_high:>9.1f}{r.flops / r.ms / 1e9:>9.0f}"
                      f"{r.notes['relative_error']:>10.2e}{r.peak_gib:>7.2f}", flush=True)  # fmt: skip
                if args.out:
                    append(args.out, [r])
        del built
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
