"""The whole model on fused ops against the same on plain PyTorch, and a live Open-Sora model with fused blocks."""

import copy
import gc
import json
import logging
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from conftest import relative_error
from kernel_checks import DEVICE, SLACK
from test_stdit2 import golden_inputs, inputs

from stdit_fast import STDiT2, STDiT2Config, ops, patch_opensora
from stdit_fast.errors import ConfigError
from stdit_fast.model.graphs import SEEN_BEFORE, BlockGraphs
from stdit_fast.model.memory import blocks_for_budget, kept_units
from stdit_fast.ops.rms_norm import rms_norm
from stdit_fast.ops.temporal_attention import rotate

SMALL = dict(hidden_size=48, depth=2, num_heads=2, caption_channels=8, model_max_length=6, class_dropout_prob=0.0)


def models(dtype=torch.float32, **changes) -> tuple[STDiT2, STDiT2]:
    """(fused, reference) with the same parameters, none of them zero."""
    torch.manual_seed(0)
    reference = STDiT2(STDiT2Config(**(SMALL | changes), backend="reference")).eval()
    with torch.no_grad():
        for p in reference.parameters():
            if p.norm() == 0 or p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
        reference.y_embedder.y_proj.fc2.weight.mul_(100)  # texts that differ: else gradients by way of them cancel
    fused = STDiT2(STDiT2Config(**(SMALL | changes), backend="fused")).eval()
    fused.load_state_dict(reference.state_dict())
    return fused.to(DEVICE, dtype), reference.to(DEVICE, dtype)


def on_device(given: dict) -> dict:
    return {k: v if k == "mask" else v.to(DEVICE) for k, v in given.items()}


def step(model, given) -> dict[str, torch.Tensor]:
    """Output and gradients of one step."""
    model.zero_grad()
    x = given["x"].clone().requires_grad_()
    out = model(**(given | {"x": x}))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    (out * weights).sum().backward()
    return {"out": out.detach(), "d_x": x.grad} | {n: p.grad.clone() for n, p in model.named_parameters()}


def masked(given):
    x_mask = torch.ones(given["x"].shape[0], given["x"].shape[2], dtype=torch.bool)
    x_mask[0, 0] = False
    return given | {"x_mask": x_mask.to(DEVICE)}


FRAMES = 3 if DEVICE == "cuda" else 2  # the interpreter takes seconds for each
CASES = {
    "video": lambda: inputs(batch=2, frames=FRAMES, height=3, width=4),
    "masked": lambda: masked(inputs(batch=2, frames=FRAMES, height=4, width=3)),
    "image": lambda: inputs(batch=2, frames=1),
    "masked image": lambda: masked(inputs(batch=2, frames=1)),
}


@pytest.mark.parametrize("case, legacy", [*((case, False) for case in CASES), ("masked", True)])
def test_equals_the_reference(case, legacy):
    fused, reference = models(qk_norm_legacy=legacy, final_layer_legacy=legacy)
    given = on_device(CASES[case]())
    got, theirs = step(fused, given), step(reference, given)
    want = step(reference.double(), {k: v.double() if v.is_floating_point() else v for k, v in given.items()})
    for name, value in want.items():
        # Gradients that nearly cancel have errors of their own in plain float32 too.
        allowed = max(1e-5, 2 * relative_error(theirs[name], value))
        assert relative_error(got[name], value) < allowed, name


@pytest.mark.skipif(DEVICE == "cpu", reason="bf16 needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_bfloat16_errs_no_more_than_the_reference(case):
    given = on_device(CASES[case]())
    _, exact = models(torch.float64)
    fused, reference = models(torch.bfloat16)
    exact.load_state_dict(reference.state_dict())
    want = step(exact, {k: v.double() if v.is_floating_point() else v for k, v in given.items()})
    ours, theirs = step(fused, given), step(reference, given)

    def total_error(results):  # of all gradients together: single small ones are noise
        names = [n for n in want if want[n].norm() > 0]  # an image has no temporal q and k
        error = sum(float((results[n].double() - want[n]).norm() ** 2 / want[n].norm() ** 2) for n in names)
        return (error / len(names)) ** 0.5

    assert total_error(ours) < SLACK * total_error(theirs)


@pytest.mark.parametrize(
    "case",
    [
        "image",
        pytest.param("video", marks=pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: a minute in the interpreter")),
    ],
)
def test_equals_the_original(golden, case):
    tensors, meta = golden("stdit2_tiny")
    config = json.loads(meta["config"])
    model = STDiT2(STDiT2Config(**config, qk_norm_legacy=True, final_layer_legacy=True, backend="fused")).eval()
    model.load_state_dict({k.removeprefix("param."): v.float() for k, v in tensors.items() if k.startswith("param.")})
    model.to(DEVICE)
    given = golden_inputs(tensors, case)
    grad_out = given.pop("grad_out").to(DEVICE)
    out = model(**on_device(given))
    assert relative_error(out.cpu(), tensors[f"{case}.out.x_mask"]) < 1e-5
    (out * grad_out).sum().backward()
    for name, parameter in model.named_parameters():
        got, want = parameter.grad.cpu(), tensors[f"{case}.grad.{name}"]
        assert relative_error(got.flatten()[::97] if parameter.numel() >= 4000 else got, want) < 1e-4, name


@pytest.mark.parametrize("case", ["image", "masked"] if DEVICE == "cuda" else ["image"])
def test_checkpointing_changes_no_bit(case):
    fused, _ = models()
    given = on_device(CASES[case]())
    want = step(fused, given)
    for count in ("all", 1):
        fused.set_checkpointing(count)
        got = step(fused, given)
        for name, value in want.items():
            assert torch.equal(got[name], value), (count, name)


def test_auto_checkpointing_keeps_everything_that_fits():
    fused, _ = models()
    fused.set_checkpointing("auto")
    step(fused, on_device(CASES["image"]()))
    assert fused.last_checkpointed == 0


def test_blocks_for_budget():
    """The fewest blocks, and never more memory than the budget where any count fits."""
    kept, blocks = 20.0, 28
    counts = [blocks_for_budget(budget, 1, blocks, kept) for budget in range(0, 700, 5)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == blocks and counts[-1] == 0
    for budget, count in zip(range(0, 700, 5), counts, strict=True):
        need = max((blocks - count) * kept, kept) + 2 * count + 20
        assert need <= budget or count == blocks


def test_plain_pytorch_is_known_to_keep_more():
    tokens = torch.empty(1, 1, 1, 1152, device=DEVICE)
    kept = [kept_units(STDiT2Config(backend=backend), tokens) for backend in ("fused", "reference")]
    assert kept[0] < kept[1]


@pytest.mark.parametrize("value", ["some", -1, 29, 1.5])
def test_checkpointing_refuses(value):
    fused, _ = models()
    with pytest.raises(ConfigError, match='checkpointing.*use "off", "all", "auto" or a number from 0 to 2'):
        fused.set_checkpointing(value)


def test_fused_without_a_kernel_raises_with_the_reason():
    model = STDiT2(STDiT2Config(**(SMALL | dict(hidden_size=24)), backend="auto"))
    model.x_embedder.backend = "fused"
    with pytest.raises(ConfigError, match="patch_embed has no kernel for this call .*torch.float64"):
        model.double()(**{k: v.double() if v.is_floating_point() else v for k, v in inputs().items()})


@pytest.mark.skipif(DEVICE == "cpu", reason="compiles for a GPU")
def test_torch_compile_of_the_model():
    fused, reference = models(torch.bfloat16)
    given = on_device(CASES["masked"]())
    exact = step(reference.float(), given)
    plain = step(fused, given)
    got = {n.removeprefix("_orig_mod."): value for n, value in step(torch.compile(fused), given).items()}
    for name, value in exact.items():
        # The compiler rounds differently between the ops, so its error is another one, but no larger a one.
        assert relative_error(got[name], value) < max(0.02, 2 * relative_error(plain[name], value)), name


@pytest.mark.skipif(DEVICE == "cpu", reason="synchronises with a GPU")
def test_no_synchronisation():
    fused, _ = models(torch.bfloat16)
    given = on_device(CASES["masked"]())
    step(fused, given)
    x = given["x"].clone().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused(**(given | {"x": x})).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------- a live Open-Sora model


class TheirAttention(nn.Module):
    """Written from the description of Open-Sora 1.1: same attribute names, plain arithmetic."""

    def __init__(self, channels, heads, rope=None):
        super().__init__()
        self.num_heads, self.head_dim, self.rotary_emb = heads, channels // heads, rope
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.q_norm, self.k_norm = TheirNorm(self.head_dim), TheirNorm(self.head_dim)
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, x):  # [N, L, C]
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        if self.rotary_emb is not None:
            q, k = self.rotary_emb(q), self.rotary_emb(k)
        weights = (self.q_norm(q) @ self.k_norm(k).transpose(-1, -2) * self.head_dim**-0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class TheirNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))

    def forward(self, x):
        return rms_norm(x, self.weight)


class TheirCrossAttention(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.num_heads, self.head_dim = heads, channels // heads
        self.q_linear, self.kv_linear = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x, y, lengths):
        out = []
        for sample, text in zip(x, y[0].split(lengths), strict=True):
            q = self.q_linear(sample).view(-1, self.num_heads, self.head_dim).transpose(0, 1)
            k, v = self.kv_linear(text).view(-1, 2, self.num_heads, self.head_dim).permute(1, 2, 0, 3)
            weights = (q @ k.transpose(-1, -2) * self.head_dim**-0.5).softmax(-1)
            out.append((weights @ v).transpose(0, 1).flatten(1))
        return self.proj(torch.stack(out))


class TheirMlp(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


class TheirBlock(nn.Module):
    def __init__(self, channels, heads, rope):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.attn, self.attn_temp = TheirAttention(channels, heads), TheirAttention(channels, heads, rope)
        self.cross_attn, self.mlp = TheirCrossAttention(channels, heads), TheirMlp(channels)
        self.scale_shift_table = nn.Parameter(torch.randn(6, channels))
        self.scale_shift_table_temporal = nn.Parameter(torch.randn(3, channels))

    def forward(self, x, y, t, t_tmp, mask=None, x_mask=None, t0=None, t0_tmp=None, T=None, S=None):
        def per_token(table, rows, rows0, i):
            given, zero = (table[i] + r.unflatten(1, (-1, x.shape[2]))[:, i, None] for r in (rows, rows0))
            return given if x_mask is None else torch.where(x_mask.repeat_interleave(S, 1)[..., None], given, zero)

        t0, t0_tmp = (t, t_tmp) if x_mask is None else (t0, t0_tmp)
        s = [per_token(self.scale_shift_table, t, t0, i) for i in range(6)]
        r = [per_token(self.scale_shift_table_temporal, t_tmp, t0_tmp, i) for i in range(3)]
        u = (self.norm(x) * (1 + s[1]) + s[0]).view(-1, S, x.shape[2])
        x = x + s[2] * self.attn(u).view_as(x)
        u = (self.norm(x) * (1 + r[1]) + r[0]).unflatten(1, (T, S)).transpose(1, 2).flatten(0, 1)
        o = self.attn_temp(u).unflatten(0, (-1, S)).transpose(1, 2).flatten(1, 2)
        x = x + r[2] * o
        x = x + self.cross_attn(x, y, mask)
        return x + s[5] * self.mlp(self.norm(x) * (1 + s[4]) + s[3])


class TheirRope(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.freqs = nn.Parameter(10000 ** (-torch.arange(0, size, 2) / size), requires_grad=False)

    def rotate_queries_or_keys(self, x):
        return rotate(x, ops.rotation_table(self.freqs, x.shape[-2]))


class TheirModel(nn.Module):
    def __init__(self, channels=48, heads=2, depth=2):
        super().__init__()
        self.rope = TheirRope(channels // heads)
        self.blocks = nn.ModuleList(TheirBlock(channels, heads, self.rope.rotate_queries_or_keys) for _ in range(depth))

    def forward(self, x, **given):
        for block in self.blocks:
            x = block(x, **given)
        return x


@pytest.mark.parametrize("with_mask", [False, True], ids=["unmasked", "x_mask"])
@pytest.mark.parametrize("frames", [1, FRAMES])
def test_patched_model_gives_the_same(frames, with_mask):
    torch.manual_seed(0)
    theirs = TheirModel().to(DEVICE)
    patched = copy.deepcopy(theirs)
    for block in patched.blocks:  # a bound method is copied with what it is bound to, the model's own rope
        assert block.attn_temp.rotary_emb.__self__ is patched.rope
    parameters = dict(patched.named_parameters())
    state = {name: value.clone() for name, value in patched.state_dict().items()}
    assert patch_opensora(patched, backend="fused") is patched
    assert all(parameters[name] is p for name, p in patched.named_parameters())
    assert patched.state_dict().keys() == state.keys()

    tokens, channels = 3, 48
    x = torch.randn(2, frames * tokens, channels)
    given = dict(y=torch.randn(1, 7, channels), t=torch.randn(2, 6 * channels), t_tmp=torch.randn(2, 3 * channels))
    given |= dict(mask=[3, 4], T=frames, S=tokens)
    if with_mask:
        given |= dict(t0=torch.randn(2, 6 * channels), t0_tmp=torch.randn(2, 3 * channels))
        given |= dict(x_mask=torch.tensor([[False] + [True] * (frames - 1), [True] * frames]))
    given = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    outs, grads = [], []
    for model in (theirs, patched):
        leaf = x.to(DEVICE).requires_grad_()
        out = model(leaf, **given)
        (out * torch.arange(out.numel(), device=DEVICE).view_as(out).cos()).sum().backward()
        outs.append(out)
        zero = torch.zeros(())
        grads.append({n: zero if p.grad is None else p.grad for n, p in model.named_parameters()} | {"x": leaf.grad})
    assert relative_error(outs[1], outs[0]) < 1e-5
    for name, want in grads[0].items():
        if float(want.norm()) > 1e-3:
            assert relative_error(grads[1][name], want) < 1e-4, name


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda m: m.blocks[1].attn.attn_drop.__setattr__("p", 0.1), "blocks.1.attn.attn_drop.*0.1.*no dropout"),
        (lambda m: delattr(m.blocks[0], "scale_shift_table_temporal"), "blocks.0.scale_shift_table_temporal.*3 rows"),
        (lambda m: setattr(m.blocks[0].mlp, "fc1", nn.Identity()), "blocks.0.mlp.fc1.*Identity.*nn.Linear"),
        (lambda m: delattr(m, "rope"), "model.*TheirModel.*rope.freqs"),
    ],
)
def test_what_cannot_be_patched_is_refused_untouched(spoil, message):
    model = TheirModel()
    spoil(model)
    with pytest.raises(ConfigError, match=message):
        patch_opensora(model)
    assert all(isinstance(block, TheirBlock) for block in model.blocks)


def test_patching_says_what_it_did(caplog):
    with caplog.at_level(logging.INFO):
        patch_opensora(TheirModel())
    assert "2 blocks replaced" in caplog.text


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("full", [True, False], ids=["full captions", "uneven captions"])
@pytest.mark.parametrize("case", CASES)
def test_cuda_graphs_give_the_same(case, full, monkeypatch):
    """Captured with one batch, replayed with others."""
    fused, _ = models(torch.bfloat16)
    fused.train()
    batches = []
    for seed in range(4):
        given = on_device(CASES[case]())
        generator = torch.Generator(DEVICE).manual_seed(seed)
        given["x"] = torch.randn(given["x"].shape, generator=generator, device=DEVICE)
        lengths = [[6], [6]] if full else [[1 + seed], [5 - seed]]
        given["mask"] = (torch.arange(6) < torch.tensor(lengths)).long()
        batches.append(given)
    want = [step(fused, given) for given in batches]
    fused.set_cuda_graphs(True)
    monkeypatch.setattr("stdit_fast.model.graphs.SEEN_BEFORE", 0)
    got = [step(fused, given) for given in batches]
    assert len(fused.graphs._graphs) == 1
    for mine, theirs in zip(got, want, strict=True):
        for name, value in theirs.items():
            if full:
                assert torch.equal(mine[name], value), name
            else:  # padding makes the text's GEMM larger, and the library may add in another order there
                assert relative_error(mine[name], value) < 0.04, name


@pytest.fixture
def eager_collector():
    """It runs after nearly every object that is made."""
    before = gc.get_threshold()
    gc.collect()
    gc.set_threshold(1)
    yield
    gc.set_threshold(*before)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("asked", [False, True], ids=["by itself", "asked to"])
def test_rubbish_with_a_graph_is_collected_during_a_capture(asked, monkeypatch, eager_collector):
    """Its graphs and their memory go afterwards; PyTorch would abort the process."""
    monkeypatch.setattr("stdit_fast.model.graphs.SEEN_BEFORE", 0)
    given = on_device(CASES["video"]())
    rubbish, fused = (models(torch.bfloat16)[0].train() for _ in range(2))
    want = step(fused, given)
    rubbish.set_cuda_graphs(True), fused.set_cuda_graphs(True)
    step(rubbish, given)
    assert rubbish.graphs.captured == 1
    pool, forgotten = rubbish.graphs.arena.id, weakref.ref(rubbish)
    held = [rubbish]
    held.append(held)
    del rubbish
    run, left = fused._run_blocks, []

    def spy(*args):
        nonlocal held
        if torch.cuda.is_current_stream_capturing():
            held = None
            if asked:
                gc.collect()
            left.append([[object() for _ in range(10)] for _ in range(10)])  # makes it run, if it may
        return run(*args)

    monkeypatch.setattr(fused, "_run_blocks", spy)
    got = step(fused, given)
    assert left and fused.last_graphed and gc.isenabled()
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    gc.collect()
    assert forgotten() is None
    fused.graphs.release()
    assert not torch.cuda.memory_snapshot(pool)


def test_a_model_with_graphs_is_in_no_cycle():
    fused, _ = models()
    fused.set_cuda_graphs(True)
    copied = copy.deepcopy(fused)
    assert copied.graphs._model is copied and fused.graphs._model is fused
    gone = weakref.ref(copied)
    gc.disable()
    try:
        del copied
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_other_threads_pin_memory_during_a_capture(monkeypatch):
    """As the data loader's does, which would fail, and the training with it."""
    fused, _ = models(torch.bfloat16)
    fused.train()
    fused.set_cuda_graphs(True)
    monkeypatch.setattr("stdit_fast.model.graphs.SEEN_BEFORE", 0)
    captured, pinned = threading.Event(), []

    def pin():
        while not captured.is_set() and len(pinned) < 5000:
            pinned.append(torch.empty(8192, dtype=torch.uint8, pin_memory=True))  # kept, so that each is a new one

    with ThreadPoolExecutor(1) as pool:
        pinning = pool.submit(pin)
        try:
            step(fused, on_device(CASES["video"]()))
        finally:
            captured.set()
        pinning.result()
    assert fused.graphs.captured == 1


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_a_second_forward_pass_before_the_backward_pass_is_refused(monkeypatch):
    fused, _ = models(torch.bfloat16)
    fused.train()
    fused.set_cuda_graphs(True)
    monkeypatch.setattr("stdit_fast.model.graphs.SEEN_BEFORE", 0)
    given = on_device(CASES["video"]())
    first, _ = fused(**given), fused(**given)
    with pytest.raises(RuntimeError, match="set_cuda_graphs"):
        first.sum().backward()


def test_a_capture_that_fails_is_named_once_and_survived(monkeypatch, caplog):
    fused, _ = models()
    graphs = BlockGraphs(fused)
    attempts = []

    def fail(key, *_):
        attempts.append(key)
        raise torch.cuda.OutOfMemoryError("out of memory, as said by the test")

    monkeypatch.setattr(graphs, "_capture", fail)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x = SimpleNamespace(
        is_cuda=True, shape=torch.Size([1, 2, 3, 48]), dtype=torch.bfloat16, device=torch.device("cuda")
    )
    found = [graphs.find(x, torch.empty(1, 1, 9 * 48), None, 6) for _ in range(SEEN_BEFORE + 3)]
    assert found == [None] * len(found) and len(attempts) == 1
    assert caplog.text.count("No CUDA graph for tokens of shape [1, 2, 3, 48]") == 1
    assert "as said by the test" in caplog.text


def test_a_captured_bucket_needs_no_memory(monkeypatch):
    """It runs as its graph, even if all memory is taken: also by its own graph."""
    fused, _ = models()
    fused.set_checkpointing("auto")
    fused.graphs = graphs = BlockGraphs(fused)
    monkeypatch.setattr(fused, "_count_checkpointed", lambda *given: 1)
    monkeypatch.setattr(fused, "_graph", lambda *sizes: "its graph")
    monkeypatch.setattr(graphs, "run", lambda graph, *given: fused._run_blocks(*given))
    given = on_device(CASES["image"]())
    seen = []
    monkeypatch.setattr(graphs, "has", lambda *sizes: seen.append(sizes) or len(seen) > 1)
    fused(**given)
    assert not fused.last_graphed and fused.last_checkpointed == 1
    fused(**given)
    assert fused.last_graphed and fused.last_checkpointed == 0
    fused.set_checkpointing(1)
    fused(**given)
    assert not fused.last_graphed and len(seen) == 2
    monkeypatch.undo()
    (x, modulation, length), _ = seen
    assert not graphs.has(x, modulation, length)
    graphs._graphs[x.shape, modulation.shape, len(x) * length, x.dtype, x.device] = "its graph"
    assert graphs.has(x, modulation, length) and not graphs.has(x, modulation, length + 1)


def test_graphs_notice_other_parameters():
    fused, _ = models()
    graphs = BlockGraphs(fused)
    graphs._forget_if_parameters_moved()
    graphs._graphs["some bucket"] = SimpleNamespace(close=lambda: None)
    graphs._forget_if_parameters_moved()
    assert graphs.captured == 1
    fused.blocks[0].mlp.fc1.weight = nn.Parameter(fused.blocks[0].mlp.fc1.weight.detach().clone())
    graphs._forget_if_parameters_moved()
    assert graphs.captured == 0
    assert len(graphs._parameters) == len(list(fused.blocks.parameters()))
    assert all(a is b for a, b in zip(graphs._parameters, fused.blocks.parameters(), strict=True))
