"""Samplers against float64 definitions and known answers; frames kept, changed and generated; guidance; noise."""

import math

import diffusers
import pytest
import torch
from conftest import relative_error

from stdit_fast.diffusion import IDDPM, IDDPMScheduler, denoise, guide, make_scheduler
from stdit_fast.diffusion.schedulers import linear_betas, trailing_timesteps
from stdit_fast.errors import ConfigError

NAMES = ("iddpm", "ddim", "dpm-solver++")
BETAS = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64).float().double()
ALPHA_BAR = (1 - BETAS).cumprod(0)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class FakeModel:
    """Epsilon and variance that depend on x, t and x_mask, frame by frame unless `mix`; remembers what it was given."""

    def __init__(self, mix: float = 0.0, dtype: torch.dtype | None = None):
        self.mix, self.dtype, self.calls = mix, dtype, []

    def __call__(self, x, t, x_mask=None):
        assert t.dtype == torch.int64 and t.shape == (len(x),)
        self.calls.append((x.clone(), t.clone(), x_mask if x_mask is None else x_mask.clone()))
        level = t.to(x.dtype)[:, None, None, None, None] / 1000
        if x_mask is not None:
            level = torch.where(x_mask[:, None, :, None, None], level, 0)
        out = torch.cat((torch.sin(1.3 * x + 2 * level), torch.tanh(x - level)), dim=1)
        out = out + self.mix * x.mean(dim=(1, 2), keepdim=True)
        return out.to(self.dtype or x.dtype)


# ------------------------------------------------------------------ ancestral sampling in float64


def kept_timesteps(num_steps: int) -> list[int]:
    position, kept = 0.0, []
    for _ in range(num_steps):
        kept.append(round(position))
        position += 999 / (num_steps - 1) if num_steps > 1 else 0
    return kept


def ancestral_step(out, x, noise, num_steps: int, index: int):
    """(x of the next step, x_0) by Bayes' rule, all of it in float64."""
    kept = kept_timesteps(num_steps)
    bar = ALPHA_BAR[kept[index]]
    before = ALPHA_BAR[kept[index - 1]] if index > 0 else torch.tensor(1.0, dtype=torch.float64)
    alpha = bar / before
    beta = 1 - alpha
    epsilon, v = out.double().chunk(2, dim=1)
    x = x.double()
    start = (x - (1 - bar).sqrt() * epsilon) / bar.sqrt()
    if index == 0:
        return start, start
    # q(x_(k-1) | x_k, x_0): the prior N(sqrt(before) x_0, 1 - before) times the likelihood of x_k, by their precisions.
    variance = 1 / (1 / (1 - before) + alpha / beta)
    mean = variance * (before.sqrt() * start / (1 - before) + alpha.sqrt() * x / beta)
    share = (v + 1) / 2
    deviation = (0.5 * (share * beta.log() + (1 - share) * variance.log())).exp()
    return mean + deviation * noise.double(), start


def test_betas_are_those_of_training():
    for length in (1000, 250):
        betas = linear_betas(length)
        assert torch.equal(betas.log(), IDDPM(length)._tables["log_beta"])
        assert torch.equal((1 - betas).cumprod(0), IDDPM(length).alpha_bar)
        assert torch.equal(IDDPMScheduler(length).alphas_cumprod, (1 - betas.double()).cumprod(0))
    for name in NAMES:
        torch.testing.assert_close(make_scheduler(name).alphas_cumprod.double(), ALPHA_BAR, rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_steps", [1000, 100, 10, 1])
def test_ancestral_steps_equal_a_float64_definition(num_steps):
    """Float64 along the whole trajectory, float32 at each step of it."""
    scheduler, model = make_scheduler("iddpm"), FakeModel(mix=0.3)
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == kept_timesteps(num_steps)[::-1]
    x = want = normal(2, 4, 2, 3, 3, dtype=torch.float64)
    for k, t in enumerate(scheduler.timesteps.tolist()):
        noise = normal(*x.shape, seed=k + 1, dtype=torch.float64)
        out, times = model(x, torch.full((2,), t)), torch.full((2,), t)
        got = scheduler.step(out, t, x, noise=noise)
        single = scheduler.step(out.float(), torch.tensor(t), x.float(), noise=noise.float())
        want, start = ancestral_step(model(want, times), want, noise, num_steps, num_steps - 1 - k)
        assert relative_error(got.prev_sample, want) < 1e-9 and relative_error(got.pred_original_sample, start) < 1e-9
        assert single.prev_sample.dtype == torch.float32
        assert relative_error(single.prev_sample, want) < 1e-6, t
        assert relative_error(single.pred_original_sample, start) < 1e-5, t
        x = got.prev_sample


def test_the_loop_follows_the_definition():
    """`denoise`, its noise drawn again from the same seed."""
    x = want = normal(2, 4, 2, 3, 3, dtype=torch.float64)
    got = denoise(FakeModel(mix=0.3), make_scheduler("iddpm"), x, num_steps=10, generators=generators(7)[0])
    (again,) = generators(7)
    for index in reversed(range(10)):
        t = torch.full((2,), kept_timesteps(10)[index])
        noise = torch.randn(x.shape, generator=again, dtype=torch.float64) if index else None
        want, _ = ancestral_step(FakeModel(mix=0.3)(want, t), want, noise, 10, index)
    assert relative_error(got, want) < 1e-9


def test_kept_timesteps():
    scheduler = IDDPMScheduler()
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))  # before set_timesteps too
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.tolist() == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert scheduler.timesteps.dtype == torch.int64
    for num_steps in range(1, 1001):
        scheduler.set_timesteps(num_steps)
        kept = scheduler.timesteps.tolist()
        assert kept == kept_timesteps(num_steps)[::-1] and len(set(kept)) == num_steps
        assert kept[-1] == 0 and (num_steps == 1 or kept[0] == 999)
        trailing = trailing_timesteps(num_steps, 1000)
        assert len(trailing) == num_steps and trailing[0] == 999 and trailing[-1] >= 0
        assert all(
            a - b in (1000 // num_steps, 1000 // num_steps + 1) for a, b in zip(trailing, trailing[1:], strict=False)
        )


def test_noise_levels():
    x, noise = normal(2, 4, 1, 2, 2), normal(2, 4, 1, 2, 2, seed=1)
    t = torch.tensor([3, 900])
    bar = ALPHA_BAR[t][:, None, None, None, None]
    want = bar.sqrt() * x + (1 - bar).sqrt() * noise
    assert relative_error(make_scheduler("iddpm").add_noise(x, noise, t), want) < 1e-7
    assert relative_error(IDDPM().q_sample(x, t, noise), want) < 1e-5
    assert make_scheduler("iddpm").scale_model_input(x, 3) is x


def test_ancestral_noise_comes_from_the_generator():
    scheduler = make_scheduler("iddpm")
    scheduler.set_timesteps(10)
    x, out = normal(2, 4, 1, 2, 2), normal(2, 8, 1, 2, 2, seed=1)
    noise = torch.cat([torch.randn(1, 4, 1, 2, 2, generator=g) for g in generators(3, 4)])
    want = scheduler.step(out, 555, x, noise=noise)
    got = scheduler.step(out, 555, x, generator=generators(3, 4))
    assert torch.equal(got.prev_sample, want.prev_sample)
    previous, start = scheduler.step(out, 555, x, noise=noise, return_dict=False)
    assert torch.equal(previous, want.prev_sample) and torch.equal(start, want.pred_original_sample)
    assert not torch.equal(scheduler.step(out, 555, x).prev_sample, want.prev_sample)
    assert torch.equal(scheduler.step(out, 0, x).prev_sample, scheduler.step(out, 0, x).prev_sample)  # no noise


# ------------------------------------------------------------------------------- known answers


class GaussianModel:
    """The perfect model of data N(mean, deviation^2): epsilon, and v of the reverse step's true variance."""

    def __init__(self, mean: float, deviation: float, timesteps: list[int]):
        self.mean, self.deviation = mean, deviation
        self.before = dict(zip(timesteps, timesteps[1:] + [None], strict=True))

    def __call__(self, x, t, x_mask=None):
        assert (t == t[0]).all()
        t = int(t[0])
        bar = ALPHA_BAR[t]
        total = bar * self.deviation**2 + 1 - bar  # variance of x_t
        epsilon = (1 - bar).sqrt() * (x - bar.sqrt() * self.mean) / total
        if self.before[t] is None:
            return torch.cat((epsilon, torch.zeros_like(x)), dim=1)
        before = ALPHA_BAR[self.before[t]]
        beta = 1 - bar / before
        posterior = beta * (1 - before) / (1 - bar)
        unknown = self.deviation**2 * (1 - bar) / total  # variance of x_0 given x_t
        variance = posterior + (before.sqrt() * beta / (1 - bar)) ** 2 * unknown
        v = 2 * (variance / posterior).log() / (beta / posterior).log() - 1
        return torch.cat((epsilon, v.expand_as(x).to(x.dtype)), dim=1)


@pytest.mark.parametrize("deviation", [0.5, 0.1])
@pytest.mark.parametrize("name", NAMES)
def test_a_gaussian_is_recovered(name, deviation):
    """With the true variance, ancestral sampling is exact but for its ends; the others approach an ODE's solution."""
    mean, num_steps = 0.7, 250
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(num_steps)
    model = GaussianModel(mean, deviation, scheduler.timesteps.tolist())
    noise = normal(2, 4, 4, 32, 32)
    got = denoise(model, scheduler, noise, num_steps=num_steps, generators=generators(1)[0])
    assert abs(got.mean() - mean) < 0.01
    assert got.std() == pytest.approx(deviation, rel=0.08 if name == "ddim" else 0.03)


def ode_error(scheduler, num_steps: int) -> float:
    """Largest distance from the exact solution of the probability flow ODE, for data N(0.3, 0.1^2)."""
    scheduler.set_timesteps(num_steps)
    noise = normal(1, 4, 1, 16, 16, dtype=torch.float64)
    bar = ALPHA_BAR[-1]
    want = 0.3 + 0.1 * (noise - bar.sqrt() * 0.3) / (bar * 0.1**2 + 1 - bar).sqrt()
    model = GaussianModel(0.3, 0.1, scheduler.timesteps.tolist())
    return float((denoise(model, scheduler, noise, num_steps=num_steps) - want).abs().max())


def test_deterministic_samplers_approach_the_ode_with_any_number_of_steps():
    """61, 334 and 501 do not divide 1000, which diffusers' own timesteps do not survive."""
    for name, most in (("ddim", 7.0), ("dpm-solver++", 3.5)):
        errors = {n: ode_error(make_scheduler(name), n) for n in (30, 61, 100, 150, 334, 501, 1000)}
        assert all(error < most / n + 1e-3 for n, error in errors.items()), (name, errors)
        assert sorted(errors.values(), reverse=True) == list(errors.values()), (name, errors)
    assert ode_error(make_scheduler("dpm-solver++"), 100) < 0.6 * ode_error(make_scheduler("ddim"), 100)


@pytest.mark.parametrize("num_steps", [20, 50])
@pytest.mark.parametrize("name", ["ddim", "dpm-solver++"])
def test_equals_diffusers_where_the_steps_divide_the_schedule(name, num_steps):
    common = {"trained_betas": BETAS.tolist(), "timestep_spacing": "trailing"}
    if name == "ddim":
        theirs = diffusers.DDIMScheduler(**common, clip_sample=False)
    else:
        theirs = diffusers.DPMSolverMultistepScheduler(**common)
    theirs.set_timesteps(num_steps)
    x = normal(2, 4, 2, 3, 3)
    got, ours = denoise(FakeModel(), make_scheduler(name), x, num_steps=num_steps), make_scheduler(name)
    ours.set_timesteps(num_steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    for t in theirs.timesteps:
        x = theirs.step(FakeModel()(x, t.expand(2))[:, :4], t, x).prev_sample
    assert relative_error(got, x) < 1e-4


# --------------------------------------------------------------------------------- edited frames

EDIT = [[1, 1, 0, 0.5, 0.25], [0, 0.05, 1, 0.5, 1]]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", NAMES)
def test_condition_frames_stay_to_the_bit(name, guidance):
    x = normal(2, 4, 5, 3, 3)
    before = x.clone()
    edit = torch.tensor([[1.0, 0, 1, 0, 1], [0, 1, 1, 1, 0]])
    model = FakeModel(mix=0.3, dtype=torch.bfloat16)
    got = denoise(
        model, make_scheduler(name), x, num_steps=6, edit=edit, guidance=guidance, generators=generators(1, 2)
    )
    assert got.dtype == torch.float32 and got.isfinite().all() and torch.equal(x, before)
    kept = (edit == 0)[:, None, :, None, None].expand_as(x)
    assert torch.equal(got[kept], x[kept])
    assert (got[~kept] != x[~kept]).all()
    for seen, _, x_mask in model.calls:
        copies = 1 if guidance == 1 else 2
        assert torch.equal(x_mask, (edit != 0).repeat(copies, 1)) and len(seen) == 2 * copies
        assert torch.equal(seen[kept.repeat(copies, 1, 1, 1, 1)], x[kept].repeat(copies))


@pytest.mark.parametrize("name", NAMES)
def test_edit_ratios_say_when_a_frame_takes_part(name):
    """int(e * n) last steps of 10; a reference joins at its step's level and the model changes it from there on."""
    x, scheduler, model = normal(2, 4, 5, 16, 16), make_scheduler(name), FakeModel()
    got = denoise(model, scheduler, x, num_steps=10, edit=EDIT, generators=generators(1, 2))
    steps = torch.tensor([[10, 10, 0, 5, 2], [0, 0, 10, 5, 10]])
    timesteps = scheduler.timesteps.tolist()
    assert [int(t[0]) for _, t, _ in model.calls] == timesteps
    for k, (seen, _, x_mask) in enumerate(model.calls):
        left = 10 - k
        assert torch.equal(x_mask, steps >= left)
        clean = (steps < left)[:, None, :, None, None].expand_as(x)
        assert torch.equal(seen[clean], x[clean])
        bar = ALPHA_BAR[timesteps[k]]
        for b, frame in ((steps == left) & (steps < 10)).nonzero().tolist():
            noise = (seen[b, :, frame] - bar.sqrt() * x[b, :, frame]) / (1 - bar).sqrt()
            assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1  # 1024 values
    kept = (steps == 0)[:, None, :, None, None].expand_as(x)
    assert torch.equal(got[kept], x[kept]) and (got[~kept] != x[~kept]).float().mean() > 0.99
    first = torch.stack([model.calls[5][0][b, :, 3] for b in range(2)])
    assert not torch.equal(first[0] - x[0, :, 3], first[1] - x[1, :, 3])  # each sample's noise is its own


@pytest.mark.parametrize("name", NAMES)
def test_steps_without_frames_are_left_out(name):
    x, scheduler = normal(2, 4, 3, 3, 3), make_scheduler(name)
    model, seen = FakeModel(), []

    def progress(timesteps):
        seen.extend(timesteps)
        return iter(timesteps)

    denoise(model, scheduler, x, num_steps=10, edit=[[0.29] * 3] * 2, progress=progress)
    want = scheduler.timesteps.tolist()[-2:]
    assert [int(t[0]) for _, t, _ in model.calls] == seen == want
    assert all(x_mask is None for _, _, x_mask in model.calls)  # all frames take part
    denoise(model, scheduler, x, num_steps=100, edit=[[0.29] * 3] * 2)
    assert len(model.calls) == 2 + 29  # 0.29 * 100 is 28.99... in floating point
    for edit in ([[0.0] * 3] * 2, [[0.05] * 3] * 2):
        assert torch.equal(denoise(None, scheduler, x, num_steps=10, edit=edit), x)


def test_x_mask_is_none_while_all_frames_take_part():
    x, model = normal(2, 4, 2, 3, 3), FakeModel()
    denoise(model, make_scheduler("ddim"), x, num_steps=10, edit=[[1, 0.7], [0.3, 0.7]])
    assert [x_mask is None for _, _, x_mask in model.calls] == [False] * 7 + [True] * 3
    plain = denoise(FakeModel(), make_scheduler("ddim"), x, num_steps=10)
    assert torch.equal(denoise(FakeModel(), make_scheduler("ddim"), x, num_steps=10, edit=torch.ones(2, 2)), plain)


@pytest.mark.parametrize("name", ["ddim", "dpm-solver++"])
def test_a_frame_that_joins_has_no_past(name):
    """A frame that the model treats on its own comes out as if it had been alone from its first step on."""
    x, scheduler = normal(1, 4, 3, 3, 3), make_scheduler(name)
    got = denoise(FakeModel(), scheduler, x, num_steps=20, edit=[[1.0, 0.5, 0.25]], generators=generators(1))
    noise = torch.randn(x.shape, generator=generators(1)[0])
    for frame, first in ((0, 0), (1, 10), (2, 15)):
        scheduler.set_timesteps(20)
        alone = x[:, :, frame : frame + 1]
        if first > 0:
            alone = scheduler.add_noise(alone, noise[:, :, frame : frame + 1], scheduler.timesteps[first : first + 1])
        for t in scheduler.timesteps[first:].tolist():
            alone = scheduler.step(FakeModel()(alone, torch.full((1,), t)), t, alone).prev_sample
        torch.testing.assert_close(got[:, :, frame : frame + 1], alone, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------- guidance and noise


def test_guide():
    out = normal(4, 8, 2, 3, 3)
    conditional, unconditional = out[:2], out[2:]
    guided = unconditional[:, :4] + 7.0 * (conditional[:, :4] - unconditional[:, :4])
    torch.testing.assert_close(guide(out, 7.0), torch.cat((guided, conditional[:, 4:]), dim=1))
    torch.testing.assert_close(guide(out, 7.0, 3), torch.cat((guided[:, :3], conditional[:, 3:]), dim=1))
    assert torch.equal(guide(out, 7.0, 4), guide(out, 7.0))
    assert torch.equal(guide(out, 1.0), conditional)
    assert torch.equal(guide(out, 0.0)[:, :4], unconditional[:, :4])


def conditional_model(seen: list, dtype: torch.dtype | None = None):
    """Two samples, or twice two, of which the second two's epsilon differs by 0.1, their variance by 0.5."""
    model = FakeModel(dtype=dtype)

    def predict(x, t, x_mask):
        seen.append((x, t, x_mask))
        out = model(x, t, x_mask)
        if len(x) == 4:
            out[2:, :4] += 0.1
            out[2:, 4:] += 0.5
        return out

    return predict


@pytest.mark.parametrize("name", NAMES)
def test_guidance_in_the_loop(name):
    x, edit, seen = normal(2, 4, 2, 3, 3), [[1, 0], [0.5, 1]], []
    arguments = {"num_steps": 4, "edit": edit}
    plain = denoise(FakeModel(), make_scheduler(name), x, **arguments, generators=generators(1, 2))
    one = denoise(
        conditional_model(seen), make_scheduler(name), x, **arguments, guidance=1, generators=generators(1, 2)
    )
    assert torch.equal(one, plain) and all(len(x) == 2 for x, _, _ in seen)
    nearly = denoise(
        conditional_model(seen), make_scheduler(name), x, **arguments, guidance=1 + 1e-6, generators=generators(1, 2)
    )
    torch.testing.assert_close(nearly, plain, rtol=1e-4, atol=1e-4)
    for inputs in seen[-1]:
        assert inputs is None or len(inputs) == 4 and torch.equal(inputs[:2], inputs[2:])

    def shifted(x, t, x_mask):  # what guidance makes of a constant difference
        out = FakeModel()(x, t, x_mask)
        out[:, :3] -= 0.1 * (3.0 - 1)
        return out

    got = denoise(
        conditional_model([]),
        make_scheduler(name),
        x,
        **arguments,
        guidance=3.0,
        guidance_channels=3,
        generators=generators(1, 2),
    )
    want = denoise(shifted, make_scheduler(name), x, **arguments, generators=generators(1, 2))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert relative_error(got, plain) > 1e-2


@pytest.mark.parametrize("guidance", [1.0, 7.0])
@pytest.mark.parametrize("name", NAMES)
def test_arithmetic_is_in_the_latents_precision(name, guidance):
    """A bf16 model's answer is rounded once, by the model."""
    x, seen = normal(2, 4, 2, 3, 3), []
    model = conditional_model(seen, torch.bfloat16)
    arguments = {"num_steps": 4, "guidance": guidance, "edit": [[1, 0.5], [0, 1]]}
    got = denoise(model, make_scheduler(name), x, **arguments, generators=generators(1, 2))
    want = denoise(
        lambda *inputs: model(*inputs).float(), make_scheduler(name), x, **arguments, generators=generators(1, 2)
    )
    assert got.dtype == torch.float32 and torch.equal(got, want)
    assert all(x.dtype == torch.float32 for x, _, _ in seen)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(name):
    x, scheduler = normal(4, 4, 5, 3, 3), make_scheduler(name)
    edit = [*EDIT, [0.3] * 5, [1, 1, 0, 1, 1]]
    both = denoise(FakeModel(mix=0.3), scheduler, x, num_steps=10, edit=edit, generators=generators(5, 6, 7, 8))
    for b in range(4):
        (generator,) = generators(5 + b)
        alone = denoise(
            FakeModel(mix=0.3), scheduler, x[b : b + 1], num_steps=10, edit=edit[b : b + 1], generators=generator
        )
        assert torch.equal(alone[0], both[b]), b


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bits(name):
    x, scheduler = normal(2, 4, 5, 3, 3), make_scheduler(name)

    def run(source):
        return denoise(FakeModel(), scheduler, x, num_steps=5, edit=EDIT, generators=source)

    first = run(generators(1, 2))
    assert torch.equal(first, run(generators(1, 2))) and torch.equal(first[0], run(generators(1, 3))[0])
    assert not torch.equal(first[1], run(generators(1, 3))[1])
    assert torch.equal(run(generators(4)[0]), run(generators(4)[0]))
    torch.manual_seed(0)
    first = run(None)
    torch.manual_seed(0)
    assert torch.equal(first, run(None)) and not torch.equal(first, run(None))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has nothing to wait for")
@pytest.mark.parametrize("name", NAMES)
def test_the_loop_waits_for_no_device(name):
    x, model = normal(2, 4, 5, 3, 3).cuda(), FakeModel(dtype=torch.bfloat16)

    def watched(timesteps):
        torch.cuda.set_sync_debug_mode("error")
        yield from timesteps

    source = [torch.Generator("cuda").manual_seed(seed) for seed in (1, 2)]
    try:
        denoise(
            model, make_scheduler(name), x, num_steps=10, edit=EDIT, guidance=4.0, generators=source, progress=watched
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(model.calls) == 10


# ------------------------------------------------------------------------- files and bad inputs


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(name, tmp_path):
    scheduler = make_scheduler(name, 500)
    scheduler.save_pretrained(tmp_path)
    again = type(scheduler).from_pretrained(tmp_path)
    assert type(again) is type(scheduler) and len(again) == 500
    assert again.config["num_train_timesteps"] == 500
    assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)
    x = normal(1, 4, 2, 3, 3)
    want = denoise(FakeModel(), scheduler, x, num_steps=7, generators=generators(1))
    assert torch.equal(denoise(FakeModel(), again, x, num_steps=7, generators=generators(1)), want)


def test_names():
    assert isinstance(make_scheduler("ddim"), diffusers.DDIMScheduler)
    assert isinstance(make_scheduler("dpm-solver++"), diffusers.DPMSolverMultistepScheduler)
    with pytest.raises(ConfigError, match=r"scheduler = 'dpmsolver\+\+': did you mean 'dpm-solver\+\+'\?"):
        make_scheduler("dpmsolver++")
    for name in NAMES:
        with pytest.raises(ConfigError, match="num_train_timesteps = 20: .* at least 21"):
            make_scheduler(name, 20)


@pytest.mark.parametrize("num_steps", [0, 1001, -3, 2.5])
@pytest.mark.parametrize("name", NAMES)
def test_bad_numbers_of_steps(name, num_steps):
    scheduler = make_scheduler(name)
    message = rf"num_sampling_steps = {num_steps}: choose a whole number from 1 to 1000"
    with pytest.raises(ConfigError, match=message):
        scheduler.set_timesteps(num_steps)
    with pytest.raises(ConfigError, match=message):
        denoise(FakeModel(), scheduler, normal(1, 4, 1, 2, 2), num_steps=num_steps)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"edit": [[0.5, 1.5], [1, 1]]}, "edit = 1.5: a ratio is from 0"),
        ({"edit": [[0.5, -0.1], [1, 1]]}, "edit = -0.1"),
        ({"edit": [[1, 1], [1, math.nan]]}, "edit = nan"),
        ({"edit": torch.ones(2, 3)}, r"edit = \[2, 3\]: .* the shape is \[2, 2\]"),
        ({"edit": [1.0, 1.0]}, r"edit = \[2\]"),
        ({"edit": [[1.0], [1.0, 0.5]]}, r"edit = .*one number for each frame, \[2, 2\]"),
        ({"edit": [["a", 1], [1, 1]]}, "edit = .*one number for each frame"),
        ({"guidance": math.nan}, "guidance_scale = nan"),
        ({"guidance": 3.0, "guidance_channels": 5}, "guidance_channels = 5: choose 1 to 4"),
        ({"guidance_channels": 0}, "guidance_channels = 0"),
        ({"generators": generators(1, 2, 3)}, "generators = 3: .* 2 samples"),
        ({"scheduler": diffusers.DDIMScheduler()}, "scheduler = 'DDIMScheduler': make it with make_scheduler"),
        (
            {"scheduler": type(make_scheduler("dpm-solver++"))(solver_order=3)},
            r"scheduler = 'dpmsolver\+\+ of order 3'",
        ),
        ({"latents": torch.zeros(2, 4, 2, 2)}, r"latents are \[2, 4, 2, 2\]"),
        ({"latents": torch.zeros(2, 4, 2, 2, 2, dtype=torch.float16)}, "latents are .* torch.float16"),
        ({"predict": lambda x, t, x_mask: x}, "epsilon and variance"),
    ],
)
def test_bad_inputs(arguments, message):
    arguments = {
        "predict": FakeModel(),
        "scheduler": make_scheduler("dpm-solver++"),
        "latents": normal(2, 4, 2, 2, 2),
        "num_steps": 4,
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        denoise(**arguments)


def test_bad_steps():
    scheduler, x = make_scheduler("iddpm"), normal(1, 4, 1, 2, 2)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep 5 is not one of the 10"):
        scheduler.step(torch.cat((x, x), dim=1), 5, x)
    with pytest.raises(ValueError, match=r"answers \[1, 4, 1, 2, 2\] .* twice the channels"):
        scheduler.step(x, 999, x)
    with pytest.raises(ValueError, match=r"expected \[2B, 2C, T, H, W\]"):
        guide(normal(3, 8, 1, 2, 2), 2.0)
