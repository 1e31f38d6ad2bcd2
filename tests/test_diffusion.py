"""Training losses against the original's, their limits, SpeeDiT's tables, the mask strategies."""

import numpy as np
import pytest
import torch
from conftest import relative_error

from stdit_fast.diffusion import IDDPM, MaskGenerator, SpeeDiT
from stdit_fast.diffusion.masks import STRATEGIES, strategy_mask
from stdit_fast.errors import ConfigError


@pytest.mark.parametrize("name", ["iddpm_loss", "iddpm_loss_masked"])
def test_equals_the_original(golden, name):
    d, _ = golden(name)
    seen = {}

    def model(x, t, **kwargs):
        seen.update(x=x, t=t, **kwargs)
        return d["model_out"]

    got = IDDPM().training_losses(model, d["x_start"], d["t"], {"y": 1}, noise=d["noise"], mask=d.get("mask"))
    for key in ("loss", "mse", "vb"):
        assert got[key].shape == (4,) and relative_error(got[key], d[f"loss.{key}"]) < 1e-5, key
    assert relative_error(seen["x"], d["x_t"]) < 1e-5
    assert torch.equal(seen["t"], d["t"]) and not seen["t"].is_floating_point() and seen["y"] == 1
    if "mask" in d:
        assert torch.equal(seen["x_mask"], d["mask"].bool())
    else:
        assert "x_mask" not in seen


def test_bound_is_zero_for_the_true_posterior_and_matches_a_float64_kl():
    """The KL of two normals, written out in float64, at every timestep but 0."""
    diffusion = IDDPM()
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(1, 1000)
    x, noise, error, v = (torch.randn(999, 1, 1, 2, 2, generator=generator) for _ in range(4))
    for off, variance in ((0.0, -torch.ones_like(v)), (0.3, v)):
        out = torch.cat((noise + off * error, variance), dim=1)
        got = diffusion.training_losses(lambda *_, out=out, **__: out, x, t, noise=noise)
        beta = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
        bar = (1 - beta).cumprod(0)
        before = torch.cat((torch.ones(1, dtype=torch.float64), bar[:-1]))
        true_var = beta * (1 - before) / (1 - bar)
        true_var[0] = true_var[1]
        share = (variance.double() + 1) / 2
        shape = (-1, 1, 1, 1, 1)
        log_var = share * beta[t].log().view(shape) + (1 - share) * true_var[t].log().view(shape)
        # mean = (x_t - beta / sqrt(1 - bar) * eps) / sqrt(alpha), so the means differ by that factor times the error
        gap = (beta / (1 - bar).sqrt() / (1 - beta).sqrt())[t].view(shape) * off * error.double()
        ratio = true_var[t].view(shape) / log_var.exp()
        kl = 0.5 * (ratio - 1 - ratio.log() + gap**2 / log_var.exp()) / np.log(2)
        torch.testing.assert_close(got["vb"].double(), kl.mean(dim=(1, 2, 3, 4)), atol=2e-4, rtol=2e-3)


def test_masked_mean_is_that_of_the_frames_to_generate():
    diffusion = IDDPM()
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(3, 4, 5, 2, 3, generator=generator) for _ in range(2))
    out = torch.randn(3, 8, 5, 2, 3, generator=generator)
    t = torch.tensor([0, 10, 900])
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]])
    got = diffusion.training_losses(lambda *_, **__: out, x, t, noise=noise, mask=mask)
    for b in range(3):
        kept = mask[b].bool()
        part = {"x_start": x[b : b + 1, :, kept], "t": t[b : b + 1], "noise": noise[b : b + 1, :, kept]}
        want = diffusion.training_losses(lambda *_, b=b, kept=kept: out[b : b + 1, :, kept], **part)
        for key in ("loss", "mse", "vb"):
            torch.testing.assert_close(got[key][b], want[key][0])


def test_a_sample_of_conditions_only_gives_zero():
    x = torch.randn(2, 4, 3, 2, 2)
    out = torch.randn(2, 8, 3, 2, 2)
    out[0] = torch.nan  # nothing of it may count
    out.requires_grad_(True)
    mask = torch.tensor([[0, 0, 0], [1, 0, 1]])
    got = IDDPM().training_losses(lambda *_, **__: out, x, torch.tensor([0, 500]), mask=mask)
    assert got["loss"][0] == 0 and got["mse"][0] == 0 and got["vb"][0] == 0
    assert got["loss"][1].isfinite() and got["loss"][1] > 0


def test_bound_moves_the_variance_only():
    x = torch.randn(1, 4, 2, 2, 2)
    out = torch.randn(1, 8, 2, 2, 2, requires_grad=True)
    losses = IDDPM().training_losses(lambda *_, **__: out, x, torch.tensor([100]))
    (grad,) = torch.autograd.grad(losses["vb"].sum(), out, retain_graph=True)
    assert grad[:, :4].count_nonzero() == 0 and grad[:, 4:].count_nonzero() == grad[:, 4:].numel()
    (grad,) = torch.autograd.grad(losses["mse"].sum(), out)
    assert grad[:, 4:].count_nonzero() == 0 and grad[:, :4].count_nonzero() > 0


def test_a_model_without_variance_is_refused():
    with pytest.raises(ValueError, match="epsilon and variance"):
        IDDPM().training_losses(lambda x, t: x, torch.zeros(1, 4, 1, 2, 2), torch.tensor([3]))


def test_speedit_tables(golden):
    d, meta = golden("speedit_tables")
    speed = SpeeDiT()
    assert relative_error(torch.from_numpy(speed.p), d["p"]) < 1e-5
    assert relative_error(speed.weights, d["weights"]) < 1e-5
    assert speed.meaningful_steps == int(meta["meaningful_steps"])


def test_speedit_weighs_mse_alone():
    x, noise = torch.randn(2, 4, 1, 2, 2), torch.randn(2, 4, 1, 2, 2)
    out, t = torch.randn(2, 8, 1, 2, 2), torch.tensor([20, 700])
    plain = IDDPM().training_losses(lambda *_: out, x, t, noise=noise)
    speed = SpeeDiT()
    got = speed.training_losses(lambda *_: out, x, t, noise=noise)
    torch.testing.assert_close(got["mse"], plain["mse"] * speed.weights[t])
    torch.testing.assert_close(got["vb"], plain["vb"])
    torch.testing.assert_close(got["loss"], got["mse"] + got["vb"])


def test_speedit_timesteps():
    speed = SpeeDiT()
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 8):
        t = speed.sample_timesteps(n, rng)
        half = n // 2 + 1
        assert t.shape == (n,) and t.min() >= 0 and t.max() < 1000
        duals = [700 - v if v < 700 else v - 700 for v in t[:half]]
        assert t[half:].tolist() == duals[: n - half]
    drawn = np.array([speed.sample_timestep(rng) for _ in range(40000)])
    want = np.zeros(1000)
    np.add.at(want, np.arange(1000), speed.p / 2)
    np.add.at(want, speed.dual(np.arange(1000)), speed.p / 2)
    seen = np.bincount(drawn, minlength=1000) / len(drawn)
    blocks = [slice(i, i + 100) for i in range(0, 1000, 100)]
    for block in blocks:
        assert abs(seen[block].sum() - want[block].sum()) < 0.01


def test_iddpm_timesteps_are_uniform():
    rng = np.random.default_rng(0)
    t = np.array([IDDPM.sample_timestep(IDDPM(), rng) for _ in range(20)])
    assert t.min() >= 0 and t.max() < 1000 and len(set(t)) > 10


# ------------------------------------------------------------------------- masks


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, length) of each run of condition frames."""
    edges = np.flatnonzero(np.diff(np.concatenate(([1], mask.astype(int), [1]))))
    return [(int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("frames", [2, 3, 16, 33])
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies(name, frames):
    rng = np.random.default_rng(0)
    masks = [strategy_mask(name, frames, rng) for _ in range(300)]
    assert all(mask.shape == (frames,) and mask.dtype == bool for mask in masks)
    longest = max(1, frames // 4) if "quarter" in name else 1
    lengths, starts = set(), set()
    for mask in masks:
        found = runs(mask)
        if name == "mask_no":
            assert found == []
            continue
        if name.endswith("head_tail"):
            if mask.any():
                assert len(found) == 2 and found[0][0] == 0 and sum(found[1]) == frames
                assert found[0][1] == found[1][1]
            lengths.add(found[0][1] if mask.any() else 1)
            continue
        (start, length), *more = found
        assert not more
        lengths.add(length)
        starts.add(start)
        assert not name.endswith("head") or start == 0
        assert not name.endswith("tail") or start + length == frames
    if name != "mask_no":
        assert lengths == set(range(1, longest + 1))
    if name.endswith("random"):
        assert starts >= {0, frames - 1} or longest > 1 and min(starts) == 0


def test_ratios_are_met_and_images_never_masked():
    ratios = {"mask_no": 0.5, "mask_image_head": 0.3, "mask_quarter_tail": 0.2}
    generator, rng = MaskGenerator(ratios), np.random.default_rng(0)
    masks = np.stack([generator.mask(8, rng) for _ in range(4000)])
    assert abs(masks.all(1).mean() - 0.5) < 0.03
    assert abs((~masks[:, 0]).mean() - 0.3) < 0.03
    assert abs((~masks[:, -1]).mean() - 0.2) < 0.03
    assert MaskGenerator({"mask_image_head": 1.0}).mask(1, rng).all()
    assert MaskGenerator().mask(16, rng).all()
    batch = generator.get_masks(torch.zeros(3, 4, 8, 2, 2), rng)
    assert batch.shape == (3, 8) and batch.dtype == torch.bool


@pytest.mark.parametrize(
    "ratios, message",
    [
        ({"mask_no": 0.5, "mask_image_head": 0.4}, "the shares sum to 0.9; make them sum to 1"),
        ({"mask_quarter_heads": 1.0}, "did you mean 'mask_quarter_head'"),
        ({"mask_no": 1.5, "mask_image_head": -0.5}, "mask_ratios.mask_no = 1.5"),
        ({"mask_image_head": 0.6, "mask_image_tail": 0.6}, "the shares sum to 1.2"),
    ],
)
def test_bad_ratios(ratios, message):
    with pytest.raises(ConfigError, match=message):
        MaskGenerator(ratios)
