"""Samplers on IDDPM's schedule, as diffusers schedulers: ancestral with the learned variance, DDIM, DPM-Solver++.

All take the model's whole output, epsilon and variance, and any number of steps up to the schedule's length. What a
step needs is computed on the host, once for all steps, so that a step waits for no device, and its arithmetic is in
the sample's own precision. The ancestral sampler's tables start from IDDPM's betas, rounded to float32, but are not
rounded again as the training tables are: in float32 1 - alpha_bar is off by 2e-4 of itself at timestep 0, and betas
read back off ratios of alpha_bar by up to 5e-4, which all steps see where the schedule is not thinned out.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from stdit_fast.diffusion.iddpm import linear_betas
from stdit_fast.errors import ConfigError, nearest


def sampling_betas(num_train_timesteps: int = 1000) -> Tensor:
    """IDDPM's betas: [N] float32.

    Raises:
        ConfigError: fewer than 21 timesteps, whose last beta would be 1 or more.
    """
    if num_train_timesteps < 21:
        raise ConfigError("num_train_timesteps", num_train_timesteps, "the last beta is 20 / N: choose at least 21")
    return linear_betas(num_train_timesteps)


def check_num_steps(num_steps: int, num_train_timesteps: int) -> None:
    """ConfigError unless 1 <= num_steps <= num_train_timesteps."""
    if not isinstance(num_steps, int) or not 1 <= num_steps <= num_train_timesteps:
        raise ConfigError("num_sampling_steps", num_steps, f"choose a whole number from 1 to {num_train_timesteps}")


@dataclass
class IDDPMSchedulerOutput(SchedulerOutput):
    """One step's result.

    Attributes:
        prev_sample: [B, C, T, H, W], x of the next, lower timestep.
        pred_original_sample: [B, C, T, H, W], the x_0 that the predicted epsilon stands for.
    """

    pred_original_sample: Tensor


class _AncestralStep(NamedTuple):
    inverse_signal: float
    inverse_noise: float
    posterior_start: float
    posterior_current: float
    log_beta: float
    log_posterior: float


class IDDPMScheduler(SchedulerMixin, ConfigMixin):
    """Ancestral sampling with the learned variance, on a respaced schedule (Nichol and Dhariwal, 2021, section 4).

    Until `set_timesteps` is called it takes every step of the schedule.

    Args:
        num_train_timesteps: N, length of the schedule that the model was trained on.

    Attributes:
        timesteps: [n] int64, descending: what the model is given.
        alphas_cumprod: [N] float64, of the whole schedule.
    """

    order = 1
    init_noise_sigma = 1.0  # pure noise is standard normal

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000):
        self.alphas_cumprod = (1 - sampling_betas(num_train_timesteps).double()).cumprod(0)
        self.set_timesteps(num_train_timesteps)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Keeps n of the N timesteps, evenly from 0 to N - 1 and rounded; one step keeps timestep 0 alone.

        Betas between the kept ones are 1 - alpha_bar[t_k] / alpha_bar[t_(k-1)].

        Raises:
            ConfigError: a number of steps outside 1..N.
        """
        check_num_steps(num_inference_steps, len(self))
        # Summed, not multiplied: the original's halves are rounded with the sum's own error.
        stride = (len(self) - 1) / max(num_inference_steps - 1, 1)
        kept = [round(position) for position in accumulate([stride] * (num_inference_steps - 1), initial=0.0)]

        alpha_bar = self.alphas_cumprod[kept]
        before = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
        alphas = alpha_bar / before
        betas = 1 - alphas
        coefficients = _AncestralStep(
            inverse_signal=(1 / alpha_bar).sqrt(),
            inverse_noise=(1 / alpha_bar - 1).sqrt(),
            posterior_start=betas * before.sqrt() / (1 - alpha_bar),
            posterior_current=(1 - before) * alphas.sqrt() / (1 - alpha_bar),
            log_beta=betas.log(),
            # -inf at the lowest step, which adds no noise: training's stand-in for it is not needed here.
            log_posterior=(betas * (1 - before) / (1 - alpha_bar)).log(),
        )
        columns = (values.tolist() for values in coefficients)
        self._steps = {t: _AncestralStep(*row) for t, row in zip(kept, zip(*columns, strict=True), strict=True)}
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor(kept[::-1], device=device)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample as it is; other schedulers of diffusers scale it."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> IDDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """x at the next lower timestep: the posterior's mean and, but for the lowest step, noise.

        log variance = f * log(beta) + (1 - f) * log(posterior variance), f = (v + 1) / 2 (section 3.1). The predicted
        x_0 is not clipped: latents have no range.

        Args:
            model_output: [B, 2C, T, H, W]: epsilon, then v.
            timestep: one of `timesteps`; a tensor on a device is waited for.
            sample: [B, C, T, H, W] float32 or float64.
            generator: draws the noise; a list has one a sample.
            noise: [B, C, T, H, W] standard normal, in place of the generator's.
            return_dict: False gives a tuple.

        Raises:
            ValueError: a timestep that is not one of `timesteps`, a model output of another shape.
        """
        timestep = int(timestep)
        if timestep not in self._steps:
            raise ValueError(f"timestep {timestep} is not one of the {self.num_inference_steps} of set_timesteps")
        if model_output.shape != (sample.shape[0], 2 * sample.shape[1], *sample.shape[2:]):
            raise ValueError(
                f"the model answers {list(model_output.shape)} to {list(sample.shape)}, expected twice the channels: "
                "epsilon and variance (pred_sigma)"
            )
        at = self._steps[timestep]
        epsilon, v = model_output.to(sample.dtype).chunk(2, dim=1)
        start = at.inverse_signal * sample - at.inverse_noise * epsilon
        previous = at.posterior_start * start + at.posterior_current * sample
        if timestep > 0:  # the lowest of the kept timesteps is always 0
            share = (v + 1) / 2
            log_variance = share * at.log_beta + (1 - share) * at.log_posterior
            if noise is None:
                noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            previous = previous + (0.5 * log_variance).exp() * noise
        return IDDPMSchedulerOutput(previous, start) if return_dict else (previous, start)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise.

        Args:
            original_samples, noise: [B, C, T, H, W].
            timesteps: [B] or [1] integers of the whole schedule.
        """
        alpha_bar = self.alphas_cumprod.to(timesteps.device)[timesteps][:, None, None, None, None]
        return alpha_bar.sqrt().to(original_samples) * original_samples + (1 - alpha_bar).sqrt().to(noise) * noise


def trailing_timesteps(num_steps: int, num_train_timesteps: int) -> list[int]:
    """n timesteps from N - 1 down in steps of N / n, rounded: the first is the noisiest, the last about N / n.

    For samplers that end with a jump to x_0: they need no step at timestep 0, whose noise is no longer seen, and must
    not start below the level of pure noise that they are given. diffusers' own "trailing" accumulates N / n in
    floating point, which gives one step too many, at timestep -1, for 62 of the 1000 possible numbers of steps.

    Raises:
        ConfigError: a number of steps outside 1..N.
    """
    check_num_steps(num_steps, num_train_timesteps)
    return [(2 * num_train_timesteps * k + num_steps) // (2 * num_steps) - 1 for k in range(num_steps, 0, -1)]


def _epsilon(model_output: Tensor, sample: Tensor) -> Tensor:
    """Both samplers below are deterministic, so the variance that follows epsilon in the channels has no use."""
    return model_output[:, : sample.shape[1]].to(sample.dtype)


class RespacedDDIMScheduler(DDIMScheduler):
    """diffusers' DDIM with eta = 0 for any number of steps and a model that also predicts the variance.

    diffusers steps down by N // n timesteps wherever the next timestep is, so unless n divides N noise is left over:
    with 334 of 1000 steps, a Gaussian of standard deviation 0.1 comes out with 0.21.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Sets `timesteps` to n `trailing_timesteps`; ConfigError for a number of steps outside 1..N."""
        timesteps = trailing_timesteps(num_inference_steps, self.config.num_train_timesteps)
        alpha_bar = self.alphas_cumprod.double().cpu()[timesteps].tolist()
        before = [*alpha_bar[1:], float(self.final_alpha_cumprod)]
        self._steps = dict(zip(timesteps, zip(alpha_bar, before, strict=True), strict=True))
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor(timesteps, device=device)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """x at the next of `timesteps`, x_0 after the last (Song et al., 2021, equation 12 with sigma = 0).

        Args:
            model_output: [B, C or 2C, T, H, W], of which epsilon [B, C, T, H, W] is used.
            timestep: one of `timesteps`; a tensor on a device is waited for.
            sample: [B, C, T, H, W] float32 or float64.
            return_dict: False gives a tuple.
        """
        alpha_bar, before = self._steps[int(timestep)]
        epsilon = _epsilon(model_output, sample)
        start = (sample - (1 - alpha_bar) ** 0.5 * epsilon) / alpha_bar**0.5
        previous = before**0.5 * start + (1 - before) ** 0.5 * epsilon
        return DDIMSchedulerOutput(previous, start) if return_dict else (previous, start)


class RespacedDPMSolverScheduler(DPMSolverMultistepScheduler):
    """diffusers' DPM-Solver++ for any number of steps and a model that also predicts the variance.

    diffusers' variance_type is not used: it takes the first 3 channels as epsilon, whatever their number.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Sets `timesteps` to n `trailing_timesteps`; ConfigError for a number of steps outside 1..N."""
        timesteps = trailing_timesteps(num_inference_steps, self.config.num_train_timesteps)
        super().set_timesteps(device=device, timesteps=timesteps)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """x at the next of `timesteps`, x_0 after the last (Lu et al., 2022, algorithm 2).

        Args:
            model_output: [B, C or 2C, T, H, W], of which epsilon [B, C, T, H, W] is used.
            timestep: one of `timesteps`, in their order; a tensor on a device is waited for.
            sample: [B, C, T, H, W] float32 or float64.
            return_dict: False gives a tuple.
        """
        return super().step(_epsilon(model_output, sample), timestep, sample, return_dict=return_dict)

    def restart(self, where: Tensor, model_output: Tensor, sample: Tensor) -> None:
        """Makes the coming step a first-order one at some places, whose past does not lead to `sample`.

        The second-order term is the difference between this step's x_0 and the last one's, so the two are made equal.

        Args:
            where: bool, broadcastable to [B, C, T, H, W].
            model_output, sample: what the coming step is given.
        """
        if self.model_outputs[-1] is not None:
            start = self.convert_model_output(_epsilon(model_output, sample), sample=sample)
            self.model_outputs[-1] = torch.where(where, start, self.model_outputs[-1])


SCHEDULERS = {"iddpm": IDDPMScheduler, "ddim": RespacedDDIMScheduler, "dpm-solver++": RespacedDPMSolverScheduler}


def make_scheduler(
    name: str, num_train_timesteps: int = 1000
) -> IDDPMScheduler | RespacedDDIMScheduler | RespacedDPMSolverScheduler:
    """The scheduler of a name, on IDDPM's betas.

    Args:
        name: "iddpm" (ancestral, the original's), "ddim" or "dpm-solver++" (second order, multistep).
        num_train_timesteps: N, length of the schedule that the model was trained on.

    Raises:
        ConfigError: an unknown name, a schedule that is too short.
    """
    if name not in SCHEDULERS:
        raise ConfigError("scheduler", name, nearest(name, SCHEDULERS))
    if name == "iddpm":
        return IDDPMScheduler(num_train_timesteps)
    common = {
        "num_train_timesteps": num_train_timesteps,
        "trained_betas": sampling_betas(num_train_timesteps).tolist(),
        "prediction_type": "epsilon",
        "timestep_spacing": "trailing",
    }
    if name == "ddim":
        # The last step goes to x_0 itself, as the ancestral sampler's does, not to the noise of timestep 0.
        return RespacedDDIMScheduler(**common, clip_sample=False, set_alpha_to_one=True)
    return RespacedDPMSolverScheduler(**common, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero")
