"""Predictions with the text encoded once, and as CUDA graphs."""

import pytest
import torch
from kernel_checks import DEVICE
from test_fused_model import masked, models, on_device
from test_stdit2 import inputs

from stdit_fast.model.prediction import Predictor

SCALARS = ("num_frames", "height", "width", "ar", "fps")


def given(batch=2, **changes):
    return on_device(inputs(batch=batch, frames=3, height=5, width=4, **changes))


def parts(given: dict) -> tuple[dict, dict]:
    """What is bound once, and what changes from call to call."""
    bound = {name: given[name] for name in SCALARS}
    return bound, {"x": given["x"], "t": given["timestep"], "x_mask": given.get("x_mask")}


@pytest.mark.parametrize("case", ["plain", "masked"])
def test_the_same_as_the_model(case):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    fused, _ = models(dtype)
    batch = given() if case == "plain" else masked(given())
    with torch.no_grad():
        want = fused(**batch)
    bound, call = parts(batch)
    predictor = Predictor(fused, cuda_graphs=False)
    predictor.bind(fused.encode_text(batch["y"], batch["mask"]), **bound)
    assert torch.equal(predictor(**call), want)


def test_a_dropped_caption_is_the_empty_one_at_its_length():
    fused, _ = models()
    batch = given()
    with torch.no_grad():
        want = fused(**batch, drop_caption=torch.tensor([False, True], device=DEVICE))
    bound, call = parts(batch)
    predictor = Predictor(fused, cuda_graphs=False)
    text = fused.encode_text(batch["y"], batch["mask"], torch.tensor([False, True], device=DEVICE))
    predictor.bind(text, **bound)
    assert torch.equal(predictor(**call), want)


def test_what_is_missing_is_named():
    fused, _ = models()
    batch = given()
    predictor = Predictor(fused)
    bound, call = parts(batch)
    with pytest.raises(RuntimeError, match="bind"):
        predictor(**call)
    with pytest.raises(TypeError, match="num_frames, height, width, ar, fps"):
        predictor.bind(fused.encode_text(batch["y"], batch["mask"]), num_frames=bound["num_frames"])
    with pytest.raises(ValueError, match="text of 2 samples, expected 1"):
        predictor.bind(fused.encode_text(batch["y"], batch["mask"]), **bound)
        predictor(call["x"][:1], call["t"][:1])
    with pytest.raises(ValueError, match="expected \\[B, 1, L, 8\\]"):
        fused.encode_text(batch["y"][..., :4])


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("case", ["plain", "masked"])
def test_graphs_give_the_same(case):
    """Captured with one batch and text, replayed with others."""
    fused, _ = models(torch.bfloat16)
    predictor, plain = Predictor(fused), Predictor(fused, cuda_graphs=False)
    for seed in range(4):
        batch = given() if case == "plain" else masked(given())
        generator = torch.Generator(DEVICE).manual_seed(seed)
        batch["mask"] = (torch.arange(6) < torch.tensor([[1 + seed], [5 - seed]])).long()
        batch["y"] = torch.randn(batch["y"].shape, generator=generator, device=DEVICE)
        batch["timestep"] = torch.tensor([seed, 999 - seed], device=DEVICE)
        bound, call = parts(batch)
        text = fused.encode_text(batch["y"], batch["mask"])
        for one in (predictor, plain):
            one.bind(text, **{name: value + seed for name, value in bound.items()})
        for _ in range(2):
            call["x"] = torch.randn(call["x"].shape, generator=generator, device=DEVICE)
            assert torch.equal(predictor(**call), plain(**call))
    assert len(predictor._graphs) == 1


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_graphs_notice_other_parameters():
    fused, _ = models(torch.bfloat16)
    predictor = Predictor(fused)
    batch = given()
    bound, call = parts(batch)
    predictor.bind(fused.encode_text(batch["y"], batch["mask"]), **bound)
    before = predictor(**call)
    fused.final_layer.linear.weight = torch.nn.Parameter(2 * fused.final_layer.linear.weight.detach())
    fused.final_layer.linear.bias = torch.nn.Parameter(2 * fused.final_layer.linear.bias.detach())
    torch.testing.assert_close(predictor(**call), 2 * before)
