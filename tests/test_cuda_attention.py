"""Our CUDA attention: what it refuses without a GPU; on a Hopper GPU, against the definition in float64."""

import importlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from kernel_checks import SLACK, check, randn, relative_error
from torch.nn.attention import SDPBackend, sdpa_kernel

from stdit_fast import _cuda, ops
from stdit_fast.ops import cuda_attention
from stdit_fast.ops.rms_norm import rms_norm

spatial_attention = importlib.import_module("stdit_fast.ops.spatial_attention")  # the module, not the function

CSRC = Path(__file__).resolve().parents[1] / "csrc"
REGISTERS = CSRC / "registers.json"
HEAD_DIM = 72  # of STDiT-2, where no other is said
BUILT, BUILT_REASON = _cuda.built()
ON_GPU, GPU_REASON = cuda_attention.available(0) if torch.cuda.is_available() else (False, "no GPU")
needs_library = pytest.mark.skipif(not BUILT, reason=f"CUDA library {BUILT_REASON}")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason=GPU_REASON)
# Triton brings one.
CUOBJDUMP = shutil.which("cuobjdump") or next(
    (str(path) for path in Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump")), ""
)

# Around the kernels' tiles: 16, 64 and 128 queries or keys, one block of 192 keys, 80, 96 and 128 keys at a time, of
# the last of them 48 or 64; 512 keys, as many as stay in shared memory; 320 keys, of more of which the backward pass is
# another.
LENGTHS = [1, 2, 15, 64, 65, 80, 81, 127, 128, 129, 144, 145, 160, 161, 192, 193, 256, 257, 300, 320, 321, 385, 390]
LENGTHS += [449, 513, 641, 1590]


# ------------------------------------------------------------ without a GPU


@pytest.mark.parametrize(
    ("qkv", "reason"),
    [
        (torch.empty(1, 1, 4, 3, 2, HEAD_DIM, dtype=torch.bfloat16), "a tensor on cpu"),
        (torch.empty(1, 1, 4, 3, 2, HEAD_DIM, dtype=torch.bfloat16, device="meta"), "a tensor on meta"),
    ],
)
def test_what_is_not_served_has_a_reason(qkv, reason):
    assert cuda_attention.unserved(qkv) == reason


PLAIN = {"normalise_q": False, "normalise_k": False}


def arguments(**changes) -> dict:
    """Of a call that the library takes, with changes."""
    heads = {name: (4096 * (i + 1), 8 * 216, 216, 72) for i, name in enumerate("qkvo")}
    sizes = {"sequences": 2, "queries": 8, "keys": 8, "heads": 1, "head_dim": HEAD_DIM, "scale": 1.0, "epsilon": 1e-6}
    weights = {"q_weight": 0, "k_weight": 0, "weight_dtype": 0, "normalise_q": True, "normalise_k": True}
    return {**heads, **sizes, **weights, "lse": 0, **changes}


@needs_library
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 56}, f"head dimension 56, where {cuda_attention.served_head_dims()} can be served"),
        ({"queries": 0}, "an empty dimension"),
        ({"q": (0, 8, 8, 8)}, "q is null"),
        ({"k": (4104, 8, 8, 8)}, "k does not begin at a multiple of 16 bytes"),
        ({"v": (4096, 8, 12, 8)}, "a stride of v is 12 elements, where multiples of 8"),
        ({"o": (4096, -8, 8, 8)}, "a stride of o is -8 elements"),
        ({"weight_dtype": 9}, "unknown dtype 9 of the weights"),
        ({"sequences": 2**30, "heads": 16}, r"more than 2\^30 blocks"),
        ({"scale": -1.0}, "scale -1.000000, where positive ones are served"),
        ({"key_starts": 256, "packed_keys": 8}, "packed keys with a norm"),
        ({"key_starts": 256, "packed_keys": 0, **PLAIN}, "0 packed keys"),
        ({"key_starts": 256, "packed_keys": 999, "keys": 321, **PLAIN}, "packed sequences of 321 keys, where 320 can"),
    ],
)
def test_calls_that_cannot_be_served_are_refused_before_any_launch(changes, message):
    call = _cuda.library().Attention(**arguments(**changes))
    with pytest.raises(RuntimeError, match=message):
        call.forward(0, 0, 0)
    with pytest.raises(RuntimeError, match=message):
        call.forward_scratch()
    with pytest.raises(RuntimeError, match=message):
        call.backward_scratch(0)


@needs_library
def test_scratch_memory_of_the_forward_pass():
    short, long = (_cuda.library().Attention(**arguments(queries=n, keys=n)) for n in (300, 1590))
    assert short.forward_scratch() == 0
    for sequences, keys, wanted in ((1320, 144, 256), (1319, 144, 0), (1320, 80, 0), (1320, 192, 256), (1320, 193, 0)):
        call = _cuda.library().Attention(**arguments(sequences=sequences, queries=keys, keys=keys))
        assert call.forward_scratch() == wanted, (sequences, keys)
    for scratch in (0, 100):
        with pytest.raises(RuntimeError, match="scratch memory does not begin at a multiple of 256"):
            long.forward(scratch, 0, 0)


@needs_library
def test_gradients_that_cannot_be_written_are_refused():
    call, good = _cuda.library().Attention(**arguments()), (4096, 8, 8, 8)
    rest = {
        "d_o": good,
        "d_q": good,
        "d_k": good,
        "d_v": good,
        "d_weights": 0,
        "scratch": 256,
        "device": 0,
        "stream": 0,
    }
    with pytest.raises(RuntimeError, match="d_k does not begin at a multiple of 16 bytes"):
        call.backward(**{**rest, "d_k": (4100, 8, 8, 8)})
    with pytest.raises(RuntimeError, match="scratch memory does not begin at a multiple of 256"):
        call.backward(**{**rest, "scratch": 100})


def test_head_dims_are_those_of_the_kernels():
    header = (CSRC / "attention" / "head_dim.h").read_text()
    (served,) = re.findall(r"using ServedHeadDims = HeadDims<([\d, ]+)>", header)
    assert tuple(map(int, served.split(","))) == cuda_attention.HEAD_DIMS


@needs_library
@pytest.mark.skipif(not CUOBJDUMP, reason="no cuobjdump")
def test_registers_are_those_of_the_table():
    """Hot kernels live in registers: what a change costs shows here. `registers.json` holds what nvcc 13.0 gives, and
    `python tests/test_cuda_attention.py` writes it anew from the library as built."""
    if not _cuda.library().cuda_compiler.startswith("13.0."):
        pytest.skip(BUILT_REASON)
    table, found = json.loads(REGISTERS.read_text()), registers_of_library()
    assert set(found) == set(table), "write the kernels of the library as built now into csrc/registers.json"
    for kernel, used in found.items():
        for what, count in used.items():
            assert count <= table[kernel][what], f"{kernel}: {what} {count}, in {REGISTERS.name} {table[kernel][what]}"


@needs_library
@pytest.mark.skipif(not CUOBJDUMP, reason="no cuobjdump")
def test_products_need_not_wait_for_each_other():
    """Where registers run out, the compiler has each wgmma waited for, and says so in a line of a long log."""
    with_products = 0
    for function in dump_of_library("-sass").split("Function : ")[1:]:
        products, fences = function.count("HGMMA"), function.count("WARPGROUP.ARRIVE")
        with_products += products > 0
        assert 3 * fences <= products, f"{function.split()[0]}: {products} products, {fences} fences"
    assert with_products > 20


def dump_of_library(what: str) -> str:
    """What cuobjdump tells of the CUDA library."""
    command = [CUOBJDUMP, what, str(Path(_cuda.library().__file__).with_name("libstdit_cuda.so"))]
    return subprocess.run(command, text=True, check=True, stdout=subprocess.PIPE).stdout


def registers_of_library() -> dict[str, dict[str, int]]:
    """Registers a thread and bytes of its stack, where those lie that do not fit, by kernel and its numbers in
    brackets."""
    text = dump_of_library("--dump-resource-usage")
    found = {}
    for mangled, registers, stack in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", text):
        name = re.search(r"[a-z]+(?:_[a-z]+)*_kernel|$", mangled)[0]
        if not name:
            continue
        numbers = ",".join(re.findall(r"L[ib](\d+)E", mangled))
        dtype = "float" if "kernelIf" in mangled else "bfloat16" if "kernelI13__nv_bfloat16" in mangled else ""
        found[f"{name}[{numbers or dtype}]"] = {"registers": int(registers), "stack": int(stack)}
    return found


# ------------------------------------------------------------ on a GPU


def fused(qkv, q_weight, k_weight):
    return ops.spatial_attention(qkv, q_weight, k_weight, backend="fused")


def plain(qkv, q_weight, k_weight):
    return ops.spatial_attention(qkv, q_weight, k_weight, backend="reference")


def inputs(
    batch: int, frames: int, length: int, heads: int, norm: bool = True, scale: float = 1.0, head_dim: int = HEAD_DIM
) -> dict:
    qkv = randn(batch, frames, length, 3, heads, head_dim, scale=scale)
    if not norm:
        return {"qkv": qkv, "q_weight": None, "k_weight": None}
    return {"qkv": qkv, **{f"{x}_weight": 1 + 0.3 * randn(head_dim, seed=i) for i, x in enumerate("qk")}}


@needs_gpu
@pytest.mark.parametrize("length", LENGTHS)
def test_against_the_definition(length):
    given = inputs(1, 2, length, 3)
    assert not cuda_attention.unserved(given["qkv"].bfloat16())
    check(fused, plain, given, torch.bfloat16)


OTHER_HEAD_DIMS = [d for d in cuda_attention.HEAD_DIMS if d != HEAD_DIM]


@needs_gpu
@pytest.mark.parametrize("length", [2, 65, 144, 161, 193, 300, 321, 449, 1100])
@pytest.mark.parametrize("head_dim", OTHER_HEAD_DIMS)
def test_other_head_dims(head_dim, length):
    given = inputs(1, 2, length, 3, head_dim=head_dim)
    assert not cuda_attention.unserved(given["qkv"].bfloat16())
    check(fused, plain, given, torch.bfloat16)


@needs_gpu
@pytest.mark.parametrize("length", [144, 300, 390])
@pytest.mark.parametrize("head_dim", OTHER_HEAD_DIMS)
def test_other_head_dims_without_norm_or_with_large_weights(head_dim, length):
    check(fused, plain, inputs(1, 2, length, 2, norm=False, scale=4.0, head_dim=head_dim), torch.bfloat16)
    given = inputs(1, 1, length, 2, head_dim=head_dim)
    given["q_weight"], given["k_weight"] = given["q_weight"] * 4, given["k_weight"] * 4
    check(fused, plain, given, torch.bfloat16)


@needs_gpu
@pytest.mark.parametrize("length", [7, 144, 300, 390])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_without_norm(length, scale):
    """Scores have no bound then: the softmax looks for a maximum."""
    check(fused, plain, inputs(1, 2, length, 2, norm=False, scale=scale), torch.bfloat16)


@needs_gpu
@pytest.mark.parametrize("length", [300, 390])
def test_weights_too_large_for_a_bound(length):
    """Scores so large that both passes must round alike."""
    given = inputs(1, 1, length, 2)
    given["q_weight"], given["k_weight"] = given["q_weight"] * 4, given["k_weight"] * 4
    check(fused, plain, given, torch.bfloat16)


SIZES = [(24, 144, 16, 72), (24, 300, 16, 72), (2, 300, 3, 72), (2, 1100, 16, 72), (40, 513, 16, 72)]
SIZES += [(40, 65, 16, 72), (24, 200, 16, 72), (24, 256, 16, 72)]
SIZES += [(90, 200, 16, 72), (90, 200, 16, 96)]
SIZES += [(90, 144, 16, 72), (660, 100, 2, 72), (90, 144, 16, 80), (90, 144, 16, 96)]  # blocks keep together
SIZES += [(frames, length, 16, d) for d in OTHER_HEAD_DIMS for frames, length in ((24, 144), (24, 300), (16, 513))]


@needs_gpu
@pytest.mark.parametrize(("frames", "length", "heads", "head_dim"), SIZES)
def test_more_heads_than_multiprocessors(frames, length, heads, head_dim):
    """Blocks take several units; up to 320 keys, a head's are walked by one block or shared by several, in turn."""
    given = inputs(1, frames, length, heads, head_dim=head_dim)
    given = {name: x.bfloat16().requires_grad_() for name, x in given.items()}
    grad = randn(1, frames, length, heads * head_dim, seed=9, dtype=torch.bfloat16)
    ours = gradients(fused, given, grad)
    for got, again in zip(ours, gradients(fused, given, grad), strict=True):
        assert torch.equal(got, again)
    for got, want in zip(ours, gradients(plain, given, grad), strict=True):
        assert relative_error(got, want) < 2e-2


def gradients(function, given: dict, grad: torch.Tensor) -> list[torch.Tensor]:
    out = function(**given)
    return [out.detach(), *torch.autograd.grad(out, list(given.values()), grad)]


@needs_gpu
@pytest.mark.parametrize("head_dim", cuda_attention.HEAD_DIMS)
def test_every_value_is_written(monkeypatch, head_dim):
    """Memory that comes full of NaN leaves none in the outputs."""
    empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = empty(self, *args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(255)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for frames, length in ((2, 5), (2, 144), (2, 300), (2, 390), (440, 144)):
        given = inputs(1, frames, length, 3, head_dim=head_dim)
        given = {name: x.bfloat16().requires_grad_() for name, x in given.items()}
        for x in gradients(fused, given, randn(1, frames, length, 3 * head_dim, dtype=torch.bfloat16)):
            assert x.isfinite().all()


@needs_gpu
@pytest.mark.parametrize(("frames", "length"), [(96, 144), (32, 256), (16, 400), (4, 1590)])
@pytest.mark.parametrize("head_dim", cuda_attention.HEAD_DIMS)
def test_errors_beside_flash_attention_2(head_dim, frames, length):
    """Those of o and of the gradients of q, k and v are at most 1.3 times the ones of FlashAttention 2 around a norm in
    bfloat16."""
    given = {name: x.bfloat16().requires_grad_() for name, x in inputs(1, frames, length, 4, head_dim=head_dim).items()}
    grad = randn(1, frames, length, 4 * head_dim, seed=9, dtype=torch.bfloat16)

    def flash(qkv, q_weight, k_weight):
        q, k, v = qkv[0].transpose(1, 3).unbind(2)  # [frames, heads, length, head_dim]
        q, k = rms_norm(q, q_weight, 1e-6), rms_norm(k, k_weight, 1e-6)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            o = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return o.transpose(1, 2).flatten(2)[None]

    exact = gradients(plain, {name: x.detach().double().requires_grad_() for name, x in given.items()}, grad.double())
    ours, theirs = (gradients(function, given, grad) for function in (fused, flash))
    for want, got, library in zip(parts(exact), parts(ours), parts(theirs), strict=True):
        assert relative_error(got, want) <= SLACK * relative_error(library, want)


def parts(results: list[torch.Tensor]) -> list[torch.Tensor]:
    """o and the gradients of q, k and v, of o and the gradients of qkv and of the weights."""
    return [results[0], *results[1].unbind(3)]


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("length", [144, 256, 1590])
def test_on_a_gpu_that_is_not_the_current_one(length):
    given = {name: x.bfloat16().requires_grad_() for name, x in inputs(1, 2, length, 3).items()}
    grad = randn(1, 2, length, 3 * HEAD_DIM, dtype=torch.bfloat16)
    there = {name: x.detach().to("cuda:1").requires_grad_() for name, x in given.items()}
    assert torch.cuda.current_device() == 0
    for got, want in zip(gradients(fused, there, grad.to("cuda:1")), gradients(fused, given, grad), strict=True):
        assert got.device.index == 1 and torch.equal(got.cpu(), want.cpu())


@needs_gpu
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, 1:],
        lambda x: x.transpose(0, 1),
        lambda x: x[..., 8 : 8 + HEAD_DIM],
        lambda x: x[..., 1 : 1 + HEAD_DIM],
        lambda x: x[:, :, :, :, 1:],
    ],
    ids=["cut", "frames", "aligned", "misaligned", "heads"],
)
def test_strided_inputs(view):
    wide = randn(2, 2, 70, 3, 3, HEAD_DIM + 16, dtype=torch.bfloat16)
    here = view(wide)[..., :HEAD_DIM]
    w = [1 + 0.3 * randn(HEAD_DIM, seed=i, dtype=torch.bfloat16) for i in range(2)]
    assert torch.equal(fused(here, *w), fused(here.contiguous(), *w))


# Lengths of each sample's text, queries, heads: around tiles of 80 (of the last 48) and 128 keys, 64, 128 and 192
# queries, cuts of the work between multiprocessors, and heads that do not share them evenly.
TEXTS = [
    ([1], 1, 1),
    ([5, 1], 7, 2),
    ([80, 64, 65], 65, 2),
    ([129, 3, 200], 130, 3),
    ([320, 1, 128], 300, 2),
    ([13, 77, 160, 161, 20], 700, 16),
    ([200, 120], 5000, 16),
    ([33] * 100, 20, 4),
    ([48, 129], 640, 20),
    ([9, 200], 200, 72),
    ([70], 65, 150),
]
PACKED = dict(argvalues=TEXTS, ids=lambda value: "-".join(map(str, value[:5])) if isinstance(value, list) else None)


def text_inputs(lengths: list[int], queries: int, heads: int, head_dim: int = HEAD_DIM) -> tuple[dict, object]:
    """q and kv of cross attention, and the text's layout."""
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    layout = ops.text_layout(mask, len(lengths), longest, torch.device("cuda"))
    shapes = {"q": (len(lengths), queries, heads, head_dim), "kv": (sum(lengths), 2, heads, head_dim)}
    return {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}, layout


@needs_gpu
@pytest.mark.parametrize(("lengths", "queries", "heads"), **PACKED)
def test_cross_attention_against_the_definition(lengths, queries, heads, head_dim=HEAD_DIM):
    given, layout = text_inputs(lengths, queries, heads, head_dim)
    assert not cuda_attention.unserved(given["q"].bfloat16(), layout.max_length)
    kwargs = {"layout": layout}
    check(
        lambda q, kv: ops.cross_attention(q, kv, backend="fused", **kwargs),
        lambda q, kv: ops.cross_attention(q, kv, backend="reference", **kwargs),
        given,
        torch.bfloat16,
    )


@needs_gpu
@pytest.mark.parametrize(("lengths", "queries", "heads"), [TEXTS[1], *TEXTS[3:7], TEXTS[8]], ids=PACKED["ids"])
@pytest.mark.parametrize("head_dim", [d for d in cuda_attention.HEAD_DIMS if d != HEAD_DIM])
def test_cross_attention_of_other_head_dims(head_dim, lengths, queries, heads):
    test_cross_attention_against_the_definition(lengths, queries, heads, head_dim)


@needs_gpu
def test_cross_attention_over_padded_and_strided_text(monkeypatch):
    """Rows of kv beyond the texts get no gradient; what lies in outputs before does not matter."""
    empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = empty(self, *args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(255)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    given, layout = text_inputs([30, 130, 7], 200, 3)
    q, kv = given["q"].bfloat16(), given["kv"].bfloat16()
    grad = randn(3, 200, 3 * HEAD_DIM, seed=7, dtype=torch.bfloat16).unflatten(2, (3, HEAD_DIM))
    wide = torch.zeros(200, 2, 3, 2 * HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    padded = wide[..., :HEAD_DIM]
    padded[: len(kv)] = kv
    o, lse = cuda_attention.cross_forward(q, kv, layout.starts, layout.max_length)
    d_q, d_kv = cuda_attention.cross_backward(grad, q, kv, layout.starts, layout.max_length, o, lse)
    again = cuda_attention.cross_forward(q, padded, layout.starts, 200)
    assert torch.equal(again[0], o) and torch.equal(again[1], lse) and o.isfinite().all()
    grads = cuda_attention.cross_backward(grad, q, padded, layout.starts, 200, *again)
    assert torch.equal(grads[0], d_q) and torch.equal(grads[1][: len(kv)], d_kv)
    assert not grads[1][len(kv) :].any() and d_q.isfinite().all() and d_kv.isfinite().all()


@needs_gpu
@pytest.mark.parametrize(
    ("lengths", "head_dim", "reason"),
    [
        ([321, 4], HEAD_DIM, "a text of 321 tokens, where 320 fit"),
        ([32, 4], 128, f"head dimension 128, where {cuda_attention.served_head_dims()} can be served"),
    ],
)
def test_texts_that_fall_back(lengths, head_dim, reason):
    given, layout = text_inputs(lengths, 10, 2, head_dim)
    q, kv = given["q"].bfloat16(), given["kv"].bfloat16()
    assert cuda_attention.unserved(q, layout.max_length) == reason
    got, want = (ops.cross_attention(q, kv, layout, backend=backend) for backend in ("fused", "reference"))
    assert relative_error(got, want) < 1e-2


@needs_gpu
def test_on_another_stream_and_in_a_graph():
    given = {name: x.bfloat16().requires_grad_() for name, x in inputs(1, 2, 300, 2).items()}
    grad = randn(1, 2, 300, 2 * HEAD_DIM, dtype=torch.bfloat16)
    want = gradients(fused, given, grad)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = gradients(fused, given, grad)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = gradients(fused, given, grad)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    for a, b, c in zip(want, got, captured, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@needs_gpu
def test_registered_op():
    qkv = randn(1, 2, 70, 3, 2, HEAD_DIM, dtype=torch.bfloat16).requires_grad_()
    w = [(1 + 0.3 * randn(HEAD_DIM, seed=i, dtype=torch.bfloat16)).requires_grad_() for i in range(2)]
    torch.library.opcheck(spatial_attention._op, (qkv, *w, 1e-6))
    compiled = torch.compile(fused, fullgraph=True)
    assert torch.equal(compiled(qkv, *w), fused(qkv, *w))


if __name__ == "__main__":
    rows = [f'  "{kernel}": {json.dumps(used)}' for kernel, used in sorted(registers_of_library().items())]
    REGISTERS.write_text("{\n" + ",\n".join(rows) + "\n}\n")
