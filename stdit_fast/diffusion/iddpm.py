"""IDDPM: linear betas, epsilon prediction, learned-range variance (Nichol and Dhariwal, 2021), masked by frames.

The tables are float32, as Open-Sora 1.1's are: betas are rounded to float32 and all else follows from them.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Model = Callable[..., Tensor]


def linear_betas(num_timesteps: int) -> Tensor:
    """[N] float32, linear from 1e-4 to 2e-2 at N = 1000, scaled with 1000 / N."""
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 1e-4, scale * 2e-2, num_timesteps, dtype=torch.float64).float()


class IDDPM:
    """Noising and training loss.

    Args:
        num_timesteps: length of the schedule; betas run linearly from 1e-4 to 2e-2 at 1000 and are scaled
            with 1000 / num_timesteps.
    """

    def __init__(self, num_timesteps: int = 1000):
        if num_timesteps < 2:
            raise ValueError(f"num_timesteps is {num_timesteps}, expected at least 2")
        self.num_timesteps = num_timesteps
        betas = linear_betas(num_timesteps)
        alphas = 1 - betas
        alpha_bar = alphas.cumprod(0)
        before = torch.cat((torch.ones(1), alpha_bar[:-1]))
        posterior_variance = betas * (1 - before) / (1 - alpha_bar)
        self.alpha_bar = alpha_bar
        self._tables = {
            "signal": alpha_bar.sqrt(),
            "noise": (1 - alpha_bar).sqrt(),
            "inverse_signal": (1 / alpha_bar).sqrt(),
            "inverse_noise": (1 / alpha_bar - 1).sqrt(),
            "posterior_start": betas * before.sqrt() / (1 - alpha_bar),
            "posterior_current": (1 - before) * alphas.sqrt() / (1 - alpha_bar),
            "log_beta": betas.log(),
            # The posterior has no variance at step 0; that of step 1 stands in.
            "log_posterior": torch.cat((posterior_variance[1:2], posterior_variance[1:])).log(),
        }

    def _at(self, table: str, t: Tensor) -> Tensor:
        """Entries of a table at t [B], as [B, 1, 1, 1, 1]."""
        values = self._tables[table]
        if values.device != t.device:
            values = self._tables[table] = values.to(t.device)
        return values[t][:, None, None, None, None]

    # ------------------------------------------------------------- timesteps

    def sample_timestep(self, rng: np.random.Generator) -> int:
        """One training timestep, uniform over the schedule."""
        return int(rng.integers(self.num_timesteps))

    # ----------------------------------------------------------------- noise

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """sqrt(alpha_bar_t) x_start + sqrt(1 - alpha_bar_t) noise.

        Args:
            x_start, noise: [B, C, T, H, W].
            t: [B] integers.
        """
        return self._at("signal", t) * x_start + self._at("noise", t) * noise

    # ------------------------------------------------------------------ loss

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict | None = None,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of each sample: mse + vb.

        Args:
            model: called as model(x_t, t, **model_kwargs), answers [B, 2C, T, H, W]: epsilon, then the variance.
            x_start: [B, C, T, H, W] clean latents.
            t: [B] integer timesteps.
            model_kwargs: further arguments of the model.
            noise: [B, C, T, H, W] standard normal; None draws it.
            mask: [B, T], False where a frame is a condition. Those are noised at timestep 0, the model gets the
                mask as `x_mask` beside the unchanged t, and the loss is the mean over the other frames; a
                sample without any contributes 0.
            counted: [B], how many frames that mean is over, where x_start holds only some frames of the samples:
                the losses of all parts then sum up to that of the whole. None: x_start holds all.

        Returns:
            "loss", "mse", "vb": [B] float32. vb is in bits; its gradient reaches the variance only.

        Raises:
            ValueError: a model output of another shape.
        """
        model_kwargs = dict(model_kwargs or {})
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        if mask is not None:
            mask = mask.to(x_start.device) != 0
            clean = self.q_sample(x_start, torch.zeros_like(t), noise)
            x_t = torch.where(mask[:, None, :, None, None], x_t, clean)
            model_kwargs.setdefault("x_mask", mask)

        out = model(x_t, t, **model_kwargs)
        if out.shape != (x_t.shape[0], 2 * x_t.shape[1], *x_t.shape[2:]):
            want = [x_t.shape[0], 2 * x_t.shape[1], *x_t.shape[2:]]
            raise ValueError(f"the model answers {list(out.shape)}, expected {want}: epsilon and variance (pred_sigma)")
        epsilon, variance = out.chunk(2, dim=1)
        mse = self._weigh_mse(frame_mean((noise - epsilon).square(), mask, counted), t)
        vb = frame_mean(self._variational_bound(x_start, x_t, t, epsilon.detach(), variance), mask, counted)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _weigh_mse(self, mse: Tensor, t: Tensor) -> Tensor:
        return mse

    def _variational_bound(self, x_start: Tensor, x_t: Tensor, t: Tensor, epsilon: Tensor, variance: Tensor) -> Tensor:
        """KL(posterior || model) in bits, at t = 0 the likelihood of x_start instead, elementwise."""
        true_mean = self._posterior_mean(x_start, x_t, t)
        true_log_var = self._at("log_posterior", t)
        start = self._at("inverse_signal", t) * x_t - self._at("inverse_noise", t) * epsilon
        mean = self._posterior_mean(start, x_t, t)
        log_var = self.log_variance(variance, t)

        kl = 0.5 * (log_var - true_log_var - 1 + (true_log_var - log_var).exp())
        kl = kl + 0.5 * (true_mean - mean).square() * (-log_var).exp()
        nll = -discretised_gaussian_log_likelihood(x_start, mean, 0.5 * log_var)
        return torch.where((t == 0)[:, None, None, None, None], nll, kl) / math.log(2)

    def _posterior_mean(self, start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self._at("posterior_start", t) * start + self._at("posterior_current", t) * x_t

    def log_variance(self, variance: Tensor, t: Tensor) -> Tensor:
        """f*log(beta) + (1-f)*log(posterior variance), f = (v+1)/2, from the model's v [B, C, T, H, W]."""
        share = (variance + 1) / 2
        return share * self._at("log_beta", t) + (1 - share) * self._at("log_posterior", t)


def frame_mean(values: Tensor, mask: Tensor | None, counted: Tensor | None = None) -> Tensor:
    """Mean of [B, C, T, H, W] over each sample, over the frames where mask [B, T] is True; 0 where none is: [B].

    Args:
        counted: [B], to divide by instead of the number of those frames, where there are more elsewhere.
    """
    per_frame = values.float().mean(dim=(1, 3, 4))
    if mask is None:
        return per_frame.mean(1) if counted is None else per_frame.sum(1) / counted
    kept = torch.where(mask, per_frame, 0)  # not a product: 0 * NaN would be NaN
    return kept.sum(1) / (mask.sum(1) if counted is None else counted).clamp(min=1)


def discretised_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P(x) of values on the grid of 256 levels in [-1, 1], elementwise.

    The mass of a bin of +-1/255 under a normal, by the tanh approximation of its CDF; the outermost bins reach
    to infinity. Logarithms are clamped at 1e-12 (Ho et al., 2020, section 3.3).
    """
    centred = x - mean
    inverse = (-log_scale).exp()
    upper = approximate_normal_cdf(inverse * (centred + 1 / 255))
    lower = approximate_normal_cdf(inverse * (centred - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def approximate_normal_cdf(x: Tensor) -> Tensor:
    """The normal CDF as 0.5 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
