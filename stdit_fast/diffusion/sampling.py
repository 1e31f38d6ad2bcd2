"""The denoising loop: classifier-free guidance, frames that are kept, changed or generated, noise a sample's own."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stdit_fast.diffusion.schedulers import SCHEDULERS, IDDPMScheduler, RespacedDPMSolverScheduler, check_num_steps
from stdit_fast.errors import ConfigError

Predict = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Generators = torch.Generator | Sequence[torch.Generator] | None


def guide(out: Tensor, scale: float, channels: int | None = None) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, 2022): epsilon = u + scale * (c - u).

    Args:
        out: [2B, 2C, T, H, W], epsilon and variance; the first half of the batch is conditional (c), the second
            unconditional (u).
        scale: 1 gives c and 0 gives u, to the bit.
        channels: how many of epsilon's C channels are guided, the first ones; None: all. Open-Sora 1.1 guides 3 of 4.

    Returns:
        [B, 2C, T, H, W]; epsilon's other channels and the variance are the conditional half's.

    Raises:
        ValueError: an odd batch or number of channels.
        ConfigError: channels outside 1..C.
    """
    if out.shape[0] % 2 or out.shape[1] % 2:
        raise ValueError(f"out has shape {list(out.shape)}, expected [2B, 2C, T, H, W]")
    channels = _check_guidance_channels(channels, out.shape[1] // 2)
    conditional, unconditional = out.chunk(2)
    guided = torch.lerp(unconditional[:, :channels], conditional[:, :channels], scale)
    return torch.cat((guided, conditional[:, channels:]), dim=1)


@torch.no_grad()
def denoise(
    predict: Predict,
    scheduler,
    latents: Tensor,
    *,
    num_steps: int,
    edit: Tensor | Sequence[Sequence[float]] | None = None,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    generators: Generators = None,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> Tensor:
    """Latents out of noise, and out of reference frames where `edit` says so.

    A frame of edit ratio e takes part in the last int(e * num_steps) steps. Until then it is a condition: clean, with
    x_mask False. At its first step a reference is noised to that step's level. Frames that do not take part leave each
    step as they were, to the bit, and steps in which no frame takes part are left out.

    The loop waits for no device: what depends on `edit` is decided on the host before it. (A generator on the CPU
    for latents on a GPU does cost a copy a step.)

    Args:
        predict: the model, called as predict(x, t, x_mask): x [n, C, T, H, W] of the latents' dtype, t [n] int64,
            x_mask [n, T] bool, False where a frame is a condition, or None where all frames of all samples take part.
            It answers [n, 2C, T, H, W] of any floating dtype: epsilon, then the variance. n is B, or 2B with
            guidance, where the second half is the first again and is to be predicted unconditionally.
        scheduler: of `make_scheduler`; its timesteps and state are set anew.
        latents: [B, C, T, H, W] float32 or float64, which is also the precision of all arithmetic here (but for
            DPM-Solver++, whose update rounds to float32): standard normal noise where edit is 1, clean reference
            latents elsewhere.
        num_steps: 1 up to the length of the scheduler's training schedule.
        edit: [B, T], on the host: 1 generates a frame from noise, 0 keeps it, what is between changes it from that
            share of the schedule on. A share below one step keeps it too. None: 1 everywhere.
        guidance: classifier-free guidance scale; 1 predicts once, without guidance.
        guidance_channels: see `guide`.
        generators: of the noise: one for the batch, or one a sample, which makes a sample's noise independent of the
            batch: its references' noise first, if any are changed, then one draw a step from its first one on, if
            the scheduler adds noise. None: PyTorch's own.
        progress: wraps the list of timesteps, as tqdm does.

    Returns:
        [B, C, T, H, W], of the latents' dtype.

    Raises:
        ConfigError: a setting that cannot be; it names the setting.
        ValueError: latents or a model output of another shape or dtype.
    """
    if latents.ndim != 5 or latents.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"latents are {list(latents.shape)} {latents.dtype}, expected [B, C, T, H, W] in float32 or 64"
        )
    check_settings(scheduler, num_steps, guidance, guidance_channels, latents.shape[1])
    draw = _noise_source(generators, latents)
    edit = _check_edit(edit, latents)
    scheduler.set_timesteps(num_steps)

    # All of this is on the host, so that the loop branches without asking the device.
    # The margin is for ratios such as 0.29, of which 100 times would be 28.99...
    entry = num_steps - (edit * num_steps + 1e-4).floor().long()  # [B, T]: the step at which a frame joins
    step = torch.arange(num_steps)[:, None, None]
    active, joins = entry <= step, (entry == step) & (edit < 1)  # [n, B, T]
    all_active, any_joins = active.flatten(1).all(1).tolist(), joins.flatten(1).any(1).tolist()
    samples_active = active.any(2).tolist()
    begin = int(entry.min())

    noised = _noised_references(scheduler, latents, joins, draw)
    active, joins = active.to(latents.device), joins.to(latents.device)
    x = latents
    timesteps = scheduler.timesteps[begin:].tolist()
    for k, t in enumerate(progress(timesteps) if progress else timesteps, start=begin):
        if any_joins[k]:
            x = torch.where(_per_frame(joins[k]), noised, x)
        x_mask = None if all_active[k] else active[k]
        out = _predict(predict, x, t, x_mask, guidance, guidance_channels)
        if any_joins[k] and isinstance(scheduler, RespacedDPMSolverScheduler):
            scheduler.restart(_per_frame(joins[k]), out, x)
        noise = {"noise": draw(samples_active[k])} if isinstance(scheduler, IDDPMScheduler) and t > 0 else {}
        x = scheduler.step(out, t, x, **noise).prev_sample
        if x_mask is not None:
            x = torch.where(_per_frame(x_mask), x, latents)
    return x


def _predict(
    predict: Predict, x: Tensor, t: int, x_mask: Tensor | None, guidance: float, guidance_channels: int | None
) -> Tensor:
    """The guided prediction [B, 2C, T, H, W], in x's dtype."""
    copies = 1 if guidance == 1 else 2
    inputs = torch.cat((x,) * copies)
    out = predict(
        inputs,
        torch.full(inputs.shape[:1], t, device=x.device),
        x_mask if x_mask is None else torch.cat((x_mask,) * copies),
    )
    want = [len(inputs), 2 * x.shape[1], *x.shape[2:]]
    if list(out.shape) != want:
        raise ValueError(f"the model answers {list(out.shape)}, expected {want}: epsilon and variance (pred_sigma)")
    out = out.to(x.dtype)
    return out if copies == 1 else guide(out, guidance, guidance_channels)


def _noised_references(scheduler, latents: Tensor, joins: Tensor, draw: Callable[[list[bool]], Tensor]) -> Tensor:
    """The latents with each frame that joins on the way (joins [n, B, T]) at the noise level of its first step."""
    noised = latents
    if joins.any():
        noise = draw(joins.any(2).any(0).tolist())
        for k in joins.flatten(1).any(1).nonzero().flatten().tolist():
            at_level = scheduler.add_noise(latents, noise, scheduler.timesteps[k : k + 1])
            noised = torch.where(_per_frame(joins[k].to(latents.device)), at_level, noised)
    return noised


def _per_frame(mask: Tensor) -> Tensor:
    """[B, T] for use with [B, C, T, H, W]."""
    return mask[:, None, :, None, None]


def _noise_source(generators: Generators, latents: Tensor) -> Callable[[list[bool]], Tensor]:
    """A function of [B] flags that draws noise like the latents; with a generator a sample, for flagged ones only."""
    like = {"device": latents.device, "dtype": latents.dtype}
    if generators is None or isinstance(generators, torch.Generator):
        return lambda wanted: randn_tensor(latents.shape, generator=generators, **like)
    generators = list(generators)
    if len(generators) != len(latents):
        raise ConfigError("generators", len(generators), f"give one, or one for each of the {len(latents)} samples")
    unused = torch.zeros_like(latents[:1])

    def draw(wanted: list[bool]) -> Tensor:
        return torch.cat(
            [
                randn_tensor(unused.shape, generator=generator, **like) if want else unused
                for generator, want in zip(generators, wanted, strict=True)
            ]
        )

    return draw


def _check_edit(edit: Tensor | Sequence[Sequence[float]] | None, latents: Tensor) -> Tensor:
    """edit as [B, T] float64 on the host."""
    shape = (latents.shape[0], latents.shape[2])
    if edit is None:
        return torch.ones(shape, dtype=torch.float64)
    try:
        edit = torch.as_tensor(edit, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError) as error:
        raise ConfigError("edit", edit, f"give one number for each frame, {list(shape)}: {error}") from error
    if edit.shape != shape:
        raise ConfigError("edit", list(edit.shape), f"give one number for each frame: the shape is {list(shape)}")
    outside = edit[~((edit >= 0) & (edit <= 1))]  # NaN too
    if len(outside):
        raise ConfigError("edit", outside[0].item(), "a ratio is from 0 (keep the frame) to 1 (generate it)")
    return edit


def _check_guidance_channels(channels: int | None, available: int) -> int:
    """The number of guided channels, all of them for None."""
    if channels is None:
        return available
    if not 1 <= channels <= available:
        raise ConfigError("guidance_channels", channels, f"choose 1 to {available}, or None for all")
    return channels


def check_settings(scheduler, num_steps: int, guidance: float, guidance_channels: int | None, channels: int) -> None:
    """Raises ConfigError for what `denoise` would refuse of these, for latents of so many channels."""
    if not math.isfinite(guidance):
        raise ConfigError("guidance_scale", guidance, "choose a finite scale; 1 is none")
    _check_guidance_channels(guidance_channels, channels)
    if not isinstance(scheduler, tuple(SCHEDULERS.values())):
        raise ConfigError("scheduler", type(scheduler).__name__, "make it with make_scheduler")
    check_num_steps(num_steps, len(scheduler))
    config = scheduler.config
    if isinstance(scheduler, RespacedDPMSolverScheduler) and (
        config.algorithm_type != "dpmsolver++" or config.solver_order > 2
    ):
        found = f"{config.algorithm_type} of order {config.solver_order}"
        raise ConfigError("scheduler", found, "only dpmsolver++ of order 1 or 2 can take frames in on the way")
