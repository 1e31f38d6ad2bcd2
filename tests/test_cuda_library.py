"""The CUDA library and the op that it serves: on the CPU the definition, on a GPU the kernel against it."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from stdit_fast import _cuda
from stdit_fast.ops import registry
from stdit_fast.ops.ema_update import definition, ema_update

CSRC = Path(__file__).resolve().parents[1] / "csrc"
DECAY = 0.9999
DTYPES = [torch.float32, torch.bfloat16]
# Around the kernel's widths: a vector of 4, a step of 1,024, a tile of 8,192 values.
SIZES = [1, 2, 3, 4, 5, 1023, 1024, 1025, 8191, 8192, 8193, 24_583, 100_003]

BUILT, BUILT_REASON = _cuda.built()
ON_GPU, GPU_REASON = _cuda.available()
needs_library = pytest.mark.skipif(not BUILT, reason=f"CUDA library {BUILT_REASON}")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason=GPU_REASON)
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH")


def pair(size: int, dtype: torch.dtype, device: str = "cpu", offset: int = 0, seed: int = 0):
    """An average and a parameter of `size` values, `offset` values behind an aligned address."""
    generator = torch.Generator().manual_seed(1000 * seed + size)
    ema = torch.randn(offset + size, generator=generator).to(device)[offset:]
    param = torch.randn(offset + size, generator=generator).to(device, dtype)[offset:]
    return ema, param


def clones(tensors):
    return [t.clone() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
def test_definition_follows_the_formula_in_float64(dtype):
    ema, param = pair(4099, dtype)
    expected = ema.double().numpy() * DECAY + param.double().numpy() * (1 - DECAY)
    ema_update([ema], [param], DECAY)
    np.testing.assert_allclose(ema.numpy(), expected, rtol=0, atol=4 * np.spacing(np.float32(4)))


def test_definition_rounds_each_operation_to_float32():
    ema, param = pair(4099, torch.bfloat16)
    e, p = ema.numpy().copy(), param.float().numpy()
    expected = e + np.float32(1 - DECAY) * (p - e)
    assert expected.dtype == np.float32
    ema_update([ema], [param], DECAY)
    assert np.array_equal(ema.numpy(), expected)


def test_a_constant_parameter_is_approached_geometrically():
    ema, param = torch.zeros(3, 5), torch.full((3, 5), 2.0)
    for _ in range(10):
        ema_update([ema], [param], 0.5)
    assert torch.equal(ema, torch.full((3, 5), 2 * (1 - 0.5**10)))


@pytest.mark.parametrize(("decay", "source"), [(0.0, "param"), (1.0, "ema")])
def test_decay_of_0_and_1(decay, source):
    ema, param = torch.tensor([1.5, -2.0]), torch.tensor([0.25, 8.0])
    expected = {"ema": ema.clone(), "param": param.clone()}[source]
    ema_update([ema], [param], decay)
    assert torch.equal(ema, expected)
    assert torch.equal(param, torch.tensor([0.25, 8.0]))


def test_parameters_that_need_gradients_and_empty_lists():
    ema, param = torch.zeros(4), torch.nn.Parameter(torch.ones(4))
    ema_update([ema], [param], 0.75)
    assert not ema.requires_grad and torch.equal(ema, torch.full((4,), 0.25))
    ema_update([], [], 0.5)


@pytest.mark.parametrize(
    ("ema", "params", "decay", "message"),
    [
        ([torch.zeros(2)], [torch.zeros(2)], 1.5, "decay is 1.5"),
        ([torch.zeros(2)], [torch.zeros(2)], float("nan"), "decay is nan"),
        ([torch.zeros(2)], [], 0.5, "1 averages for 0 parameters"),
        ([torch.zeros(2), torch.zeros(2)], [torch.zeros(2), torch.zeros(1, 2)], 0.5, r"params\[1\] has shape \[1, 2\]"),
        ([torch.zeros(2).bfloat16()], [torch.zeros(2)], 0.5, r"ema\[0\] is torch.bfloat16"),
        ([torch.zeros(2)], [torch.zeros(2).half()], 0.5, r"params\[0\] is torch.float16"),
        ([torch.zeros(2)], [torch.zeros(2, device="meta")], 0.5, r"params\[0\] is on meta, its average on cpu"),
        ([torch.zeros(2, 3)], [torch.zeros(3, 2).T], 0.5, "must be contiguous"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(ema, params, decay, message):
    with pytest.raises(ValueError, match=message):
        ema_update(ema, params, decay)


def test_the_registry_says_what_serves_and_why():
    (serving,) = [s for s in registry.serving() if s.op == "ema_update"]
    assert serving.implementation == ("cuda" if ON_GPU else registry.REFERENCE)
    assert serving.reason == GPU_REASON


def test_without_the_library_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(_cuda, "_load", lambda: (None, "not built: no nvcc"))
    assert _cuda.available.__wrapped__() == (False, "CUDA library not built: no nvcc")
    with pytest.raises(RuntimeError, match="CUDA library not built: no nvcc"):
        _cuda.library()


@needs_nvcc
def test_the_library_is_built_where_nvcc_is():
    if any(words in BUILT_REASON for words in ("STDIT_FAST_CUDA=0", "cannot use the toolchain")):
        pytest.skip(BUILT_REASON)
    assert BUILT, BUILT_REASON


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_the_interface_is_plain_c():
    command = ["cc", "-std=c99", "-Wall", "-Werror", "-pedantic", "-fsyntax-only", "-x", "c"]
    header = CSRC / "include" / "stdit" / "c_api.h"
    result = subprocess.run([*command, "-include", str(header), "/dev/null"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@needs_library
def test_failures_of_the_library_are_exceptions():
    library = _cuda.library()
    with pytest.raises(RuntimeError, match="cudaError"):
        library.check_device(4096)
    with pytest.raises(RuntimeError, match="unknown dtype 7"):
        library.ema_update([], [], [], param_dtype=7, decay=0.5, device=0, stream=0)
    with pytest.raises(ValueError, match="differ in length"):
        library.ema_update([0], [], [1], param_dtype=0, decay=0.5, device=0, stream=0)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_kernel_gives_the_bits_of_the_definition(dtype, offset):
    pairs = [pair(size, dtype, "cuda", offset) for size in SIZES]
    ema, params = [e for e, _ in pairs], [p for _, p in pairs]
    expected, untouched = clones(ema), clones(params)
    definition(expected, params, DECAY)
    ema_update(ema, params, DECAY)
    for size, have, want in zip(SIZES, ema, expected, strict=True):
        assert torch.equal(have, want), size
    for have, want in zip(params, untouched, strict=True):
        assert torch.equal(have, want)


@needs_gpu
@pytest.mark.parametrize(("ema_offset", "param_offset"), [(1, 0), (0, 1), (3, 2)])
def test_kernel_leaves_the_neighbours_of_a_view_alone(ema_offset, param_offset):
    around = torch.full((9000,), 7.0, device="cuda")
    ema = around[ema_offset : ema_offset + 8193]
    param = torch.randn(9000, device="cuda")[param_offset : param_offset + 8193]
    expected = ema.clone()
    definition([expected], [param], 0.5)
    ema_update([ema], [param], 0.5)
    assert torch.equal(ema, expected)
    assert (around[:ema_offset] == 7).all() and (around[ema_offset + 8193 :] == 7).all()


@needs_gpu
def test_kernel_takes_many_tensors_of_both_dtypes_and_repeats_bit_for_bit():
    pairs = [pair((37 * i) % 5000, DTYPES[i % 3 == 0], "cuda", seed=i) for i in range(700)]
    params = [p for _, p in pairs]
    runs = [clones([e for e, _ in pairs]) for _ in range(3)]
    definition(runs[0], params, DECAY)
    for run in runs[1:]:
        ema_update(run, params, DECAY)
    for want, *haves in zip(*runs, strict=True):
        assert all(torch.equal(have, want) for have in haves)


@needs_gpu
def test_kernel_runs_on_the_current_stream():
    ema, param = torch.zeros(1_000_000, device="cuda"), torch.zeros(1_000_000, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        param.fill_(8.0)
        ema_update([ema], [param], 0.75)
    stream.synchronize()
    assert torch.equal(ema, torch.full_like(ema, 2.0))


@needs_gpu
def test_kernel_is_captured_in_a_cuda_graph():
    ema, param = torch.zeros(5000, device="cuda"), torch.full((5000,), 8.0, device="cuda")
    ema_update([ema.clone()], [param], 0.5)  # loads the kernel, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update([ema], [param], 0.5)
    assert not ema.any()
    graph.replay()
    graph.replay()
    assert torch.equal(ema, torch.full_like(ema, 6.0))


@needs_gpu
def test_kernel_takes_more_elements_than_32_bits_count():
    size = 2**32 + 5
    if torch.cuda.mem_get_info()[0] < 7 * size:
        pytest.skip("needs 28 GiB of free GPU memory")
    ema = torch.zeros(size, device="cuda")
    param = torch.ones(size, device="cuda", dtype=torch.bfloat16)
    ema_update([ema], [param], 0.25)
    assert ema.min().item() == ema.max().item() == 0.75


@pytest.mark.skipif(not ON_GPU or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernel_follows_its_tensors_to_another_gpu():
    ema, param = torch.zeros(5000, device="cuda:1"), torch.ones(5000, device="cuda:1")
    ema_update([ema], [param], 0.5)
    assert torch.equal(ema, torch.full_like(ema, 0.5))
    assert torch.cuda.current_device() == 0
