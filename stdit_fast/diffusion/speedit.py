"""SpeeDiT: timesteps drawn where the schedule changes, losses weighted by SNR (Wang et al., 2024). Training only."""

import numpy as np
import torch
from torch import Tensor

from stdit_fast.diffusion.iddpm import IDDPM


class SpeeDiT(IDDPM):
    """IDDPM for the first phase of training ("iddpm-speed" of Open-Sora 1.1).

    With g the gradient of sqrt(1 - alpha_bar) along the schedule, p is proportional to
    tanh(1e6 * (g - 1e-4)) + 1.5, and mse is weighted by 1 / (1 + snr).

    Attributes:
        p: [1000] float64, the probability of each timestep before its dual is taken.
        weights: [1000] float32, of the mse.
        meaningful_steps: m; a timestep t's dual is m - t below m, t - m from there on.
    """

    def __init__(self, num_timesteps: int = 1000):
        super().__init__(num_timesteps)
        # Where the tanh turns, p depends on the last bits of sqrt(1 - alpha_bar), so these are reproduced: the
        # original reads betas back off its float32 alpha_bar, and accumulates them again in float64.
        before = torch.cat((torch.ones(1), self.alpha_bar[:-1]))
        betas = (1 - self.alpha_bar / before).double()
        gradient = np.gradient((1 - (1 - betas).cumprod(0)).sqrt().float().numpy())
        p = np.tanh(1e6 * (gradient - 1e-4)) + 1.5
        self.p = p.astype(np.float64) / p.sum(dtype=np.float64)
        flat = np.flatnonzero(gradient < 5e-5)
        self.meaningful_steps = int(flat[0]) + 1 if flat.size else num_timesteps
        snr = self.alpha_bar / (1 - self.alpha_bar)
        self.weights = 1 / (1 + snr)
        self._tables["weights"] = self.weights

    def dual(self, t: np.ndarray) -> np.ndarray:
        """The timestep that goes with t: |t - m|."""
        return np.abs(np.asarray(t) - self.meaningful_steps)

    def sample_timesteps(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """[n] timesteps of one batch as the original draws them: n/2 + 1 from p, then their duals, cut to n."""
        drawn = rng.choice(self.num_timesteps, size=n // 2 + 1, p=self.p)
        return np.concatenate((drawn, self.dual(drawn)))[:n]

    def sample_timestep(self, rng: np.random.Generator) -> int:
        """One timestep that depends on its own sample alone: from p, replaced by its dual half of the time.

        `sample_timesteps` ties the samples of a batch together, so a sample's timestep would change with the
        batch it is in; the distribution of each timestep is the same.
        """
        t = rng.choice(self.num_timesteps, p=self.p)
        return int(self.dual(t) if rng.random() < 0.5 else t)

    def _weigh_mse(self, mse: Tensor, t: Tensor) -> Tensor:
        return mse * self._at("weights", t).flatten()
