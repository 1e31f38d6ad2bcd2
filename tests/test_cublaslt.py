"""cuBLASLt's epilogues: what the library says without a GPU, and on one the GEMMs against their definition."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, relative_error

from stdit_fast import _cuda
from stdit_fast.ops import cublaslt, linear
from stdit_fast.ops.linear import weight_gradient, weight_gradients_into

ROOT = Path(__file__).resolve().parents[1]
USABLE, REASON = cublaslt.available()
needs_gpu = pytest.mark.skipif(not USABLE, reason=REASON)
needs_library = pytest.mark.skipif(not _cuda.built()[0], reason=_cuda.built()[1])


def header_folder() -> Path | None:
    """Where the cuBLASLt of this environment has its header."""
    spec = importlib.util.find_spec("nvidia")
    places = [
        Path(p) / name / "include"
        for p in (spec.submodule_search_locations if spec else [])
        for name in ("cu13", "cublas")
    ]
    places.append(Path("/usr/local/cuda/include"))
    return next((place for place in places if (place / "cublasLt.h").is_file()), None)


@pytest.mark.skipif(not shutil.which("c++") or not header_folder(), reason="no compiler or no cublasLt.h")
def test_the_declarations_are_those_of_the_header():
    command = ["c++", "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", f"-I{ROOT}/csrc", "-isystem", header_folder()]
    command += ["-isystem", "/usr/local/cuda/include", ROOT / "csrc" / "linear" / "cublaslt_values.cpp"]
    result = subprocess.run(command, capture_output=True, text=True)
    if "cuda_runtime_api.h: No such file" in result.stderr:
        pytest.skip("no header of the CUDA runtime")
    assert result.returncode == 0, result.stderr


@needs_library
def test_layers_that_cannot_be_are_refused():
    sizes = {"rows": 8, "in_features": 16, "out_features": 8, "device": 0}
    linear = _cuda.library().Linear
    for options, message in (
        ({"product": 1, "gelu": False, "bias": True}, "product 1 with gelu 0 and bias 1"),
        ({"product": 1, "gelu": True, "bias": True}, "product 1 with gelu 1 and bias 1"),
        ({"product": 2, "gelu": False, "bias": False}, "product 2 with gelu 0 and bias 0"),
        ({"product": 0, "gelu": True, "bias": True, "rows": 0}, "a size of 0"),
        ({"product": 0, "gelu": True, "bias": True, "out_features": 12}, "16 to 12, where multiples of 8"),
        ({"product": 0, "gelu": True, "bias": True, "rank": -1}, "rank -1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            linear(**(sizes | options))


def test_the_reason_is_given_where_it_cannot_be_had(monkeypatch):
    class WithoutCublaslt:
        def cublaslt_version(self):
            raise RuntimeError("cuBLASLt is not loaded in this process")

    monkeypatch.setattr(_cuda, "available", lambda device=None: (True, "CUDA library built"))
    monkeypatch.setattr(_cuda, "library", WithoutCublaslt)
    assert cublaslt.available.__wrapped__() == (False, "cuBLASLt is not loaded in this process")
    WithoutCublaslt.cublaslt_version = lambda self: 130102
    assert cublaslt.available.__wrapped__() == (True, "cuBLASLt 13.1.2, CUDA library built")


def test_the_gradient_of_a_tall_weight_is_its_transposes(monkeypatch):
    monkeypatch.setattr("stdit_fast.ops.linear._MANY_ROWS", 30)
    dy, x, tall = torch.randn(5, 7, 40).double(), torch.randn(5, 7, 8).double(), torch.randn(40, 8).double()
    torch.testing.assert_close(weight_gradient(dy, x, tall), torch.einsum("abo,abi->oi", dy, x))
    torch.testing.assert_close(weight_gradient(x, dy, tall.t()), torch.einsum("abo,abi->oi", x, dy))


def test_a_weight_gradient_is_made_in_its_place_once():
    dy, x, weight = torch.randn(5, 7, 40), torch.randn(5, 7, 8), torch.randn(40, 8)
    place, want = torch.full_like(weight, torch.nan), torch.einsum("abo,abi->oi", dy, x)
    with weight_gradients_into({weight.data_ptr(): place}):
        assert weight_gradient(dy, x, weight[4:]).data_ptr() != place.data_ptr()  # another weight
        assert weight_gradient(dy, x, weight).data_ptr() == place.data_ptr()
        torch.testing.assert_close(place, want)
        again = weight_gradient(2 * dy, x, weight)  # of a second use, which autograd adds to the first
    torch.testing.assert_close(again, 2 * want)
    torch.testing.assert_close(place, want)
    assert weight_gradient(dy, x, weight).data_ptr() != place.data_ptr()


def test_rows_that_the_library_might_lose_are_added_by_themselves(monkeypatch):
    risks = [linear._rows_at_risk(rows, 1152**2) for rows in (1985, 2049, 2063, 2064, 2112, 2113)]
    assert risks == [0, 1, 15, 0, 0, 1] and linear._rows_at_risk(2049, 3456 * 1152) == 0
    products = []
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *args, f=torch.Tensor.addmm_: products.append(1) or f(*args))
    for rows, expected in ((2051, 1), (2100, 0)):
        dy, x, weight = torch.randn(1, rows, 3).double(), torch.randn(1, rows, 2).double(), torch.randn(3, 2).double()
        place, want = torch.full_like(weight, torch.nan), torch.einsum("ano,ani->oi", dy, x)
        torch.testing.assert_close(weight_gradient(dy, x, weight), want)
        with weight_gradients_into({weight.data_ptr(): place}):
            assert weight_gradient(dy, x, weight).data_ptr() == place.data_ptr()
        torch.testing.assert_close(place, want)
        assert len(products) == 2 * expected
        products.clear()


def test_gradients_of_a_projection(monkeypatch):
    """The path that a GPU takes, in float64, with rows that are added by themselves and without.

    The bias's gradient is summed in float32, whatever comes in.
    """
    monkeypatch.setattr(linear.registry, "use_kernel", lambda *args: True)
    for rows in (2051, 6):
        given = [torch.randn(*s, device=DEVICE).double().requires_grad_() for s in ((rows, 3), (2, 3), (2,))]
        dy = torch.randn(rows, 2, device=DEVICE).double()
        want = torch.autograd.grad(F.linear(*given), given, dy)
        *others, d_bias = torch.autograd.grad(linear.projection(*given), given, dy)
        for got, expected in zip(others, want, strict=False):
            torch.testing.assert_close(got, expected)
        assert relative_error(d_bias, dy.sum(0)) < 1e-5 and d_bias.dtype == torch.float64
    with pytest.raises(ValueError, match="bias"):
        linear.projection(*given[:2], torch.zeros(3, device=DEVICE))


@needs_gpu
@pytest.mark.parametrize("rows, out", [(2561, 32), (4034, 32), (26_882, 1152), (76_610, 1152), (82_945, 2304)])
def test_no_row_of_a_weight_gradient_is_lost(rows, out):
    """Row counts of which cuBLASLt 13.1 loses the last."""
    dy, x = randn(rows, out), randn(rows, 1152)
    dy[:-8] = 0
    want = dy[-8:].double().t() @ x[-8:].double()
    assert relative_error(weight_gradient(dy, x, dy.new_empty(out, 1152)), want) < 4e-3


def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, device="cuda")).bfloat16()


@needs_gpu
@pytest.mark.parametrize("rows, into, out", [(7, 72, 144), (1001, 1152, 4608), (4097, 136, 520)])
def test_epilogues_against_float64(rows, into, out):
    x, weight, bias = randn(rows, into), randn(out, into, scale=into**-0.5), randn(out)
    y, hidden = cublaslt.linear_gelu(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), bias.double())
    plain = F.linear(x, weight, bias)
    assert relative_error(hidden, exact) <= 1.3 * relative_error(plain, exact)
    want = F.gelu(exact, approximate="tanh")
    assert relative_error(y, want) <= 1.3 * relative_error(F.gelu(plain, approximate="tanh"), want)

    dy, back = randn(rows, into), randn(into, out, scale=out**-0.5)
    leaf = hidden.double().requires_grad_()
    (want,) = torch.autograd.grad(F.gelu(leaf, approximate="tanh"), leaf, dy.double() @ back.double())
    dh = cublaslt.gelu_input_gradient(dy, back, hidden)
    assert relative_error(dh, want) < 4e-3
    assert torch.equal(dh, cublaslt.gelu_input_gradient(dy, back, hidden))

    for first, second in zip((y, hidden), cublaslt.linear_gelu(x, weight, bias), strict=True):
        assert torch.equal(first, second)


@needs_gpu
def test_they_are_captured_in_a_cuda_graph_on_any_stream():
    x, weight, bias = randn(512, 1152), randn(4608, 1152, scale=0.03), randn(4608)
    want = cublaslt.linear_gelu(x, weight, bias)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        got = cublaslt.linear_gelu(x, weight, bias)
    for tensor in got:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@needs_gpu
def test_what_they_do_not_take_is_left_to_others():
    x = randn(9, 16)
    assert cublaslt.serves(x) and not cublaslt.serves(x.float()) and not cublaslt.serves(x.cpu())
    assert not cublaslt.serves(x.t()) and not cublaslt.serves(x.flatten()[1:9])
