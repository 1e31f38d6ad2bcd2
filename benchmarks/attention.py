"""Spatial attention, ours and the libraries', forward and backward: suite "attention". Needs a Hopper GPU.

    python -m stdit_fast.benchmarks.attention --cases 96x144 128x256 --out attention.jsonl

A case is sequences x length, of 16 heads of 72 or --head-dim in bfloat16, and a direction. "cuda" is our kernel on
packed qkv, with the RMSNorm of q and k inside. "cudnn" and "flash_attention_2" are PyTorch's; "flash-attn-3" and
"flash-attn-4" are there where those are installed; all on contiguous q, k and v, without norm. Each is first held
against explicit softmax in float64. Several calls in a row, captured as a CUDA graph, are timed on the GPU's clock.

--once runs each of our kernels once and times nothing, for a profiler:

    ncu --set full -k regex:attention_backward python -m stdit_fast.benchmarks.attention --once --cases 96x144
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from stdit_fast.benchmarks import peers
from stdit_fast.benchmarks.records import Record, append, results_file
from stdit_fast.errors import ConfigError, run_command
from stdit_fast.ops import cuda_attention, library_attention
from stdit_fast.ops.rms_norm import rms_norm

HEADS, HEAD_DIM, EPS = 16, 72, 1e-6
OURS = "cuda"
LIBRARIES = ("cudnn", "flash_attention_2")
PEERS = ("flash-attn-3", "flash-attn-4")  # of benchmarks/peers.py
CASES = ("96x144", "128x256", "64x400", "64x1024", "32x1590", "16x3600")
TOLERANCE = 2e-2  # relative error, some roundings to bfloat16
BUSY_CYCLES = 400_000  # that the GPU is kept busy while a graph is launched, about 0.2 ms
COLUMNS = f"{'case':<22}{'impl':<20}{'ms':>9}{'low':>9}{'high':>9}{'TFLOP/s':>9}{'GB/s':>8}"


def parse_case(case: str) -> tuple[int, int]:
    """(sequences, length) of "96x144"."""
    sequences, _, length = case.partition("x")
    if not (sequences.isdecimal() and length.isdecimal() and int(sequences) and int(length)):
        raise ConfigError("cases", case, "write sequences x length, like 96x144")
    return int(sequences), int(length)


def case_name(case: str, head_dim: int) -> str:
    """The case as its records have it: "96x144", or "96x144x64" of another head dimension than STDiT-2's."""
    return case if head_dim == HEAD_DIM else f"{case}x{head_dim}"


def flops(sequences: int, length: int, backward: bool, head_dim: int = HEAD_DIM) -> int:
    """Operations of the products: two of length x length x head dimension a head forward, five backward."""
    return (10 if backward else 4) * sequences * HEADS * length**2 * head_dim


def least_bytes(sequences: int, length: int, backward: bool, head_dim: int = HEAD_DIM) -> int:
    """Bytes that must move: q, k, v and o; backward q, k, v, o, the gradient of o, and three gradients."""
    return (8 if backward else 4) * sequences * length * HEADS * head_dim * 2


class Inputs:
    """Random qkv [N, S, 3, H, D], weights of the norms, and a gradient of o [N, S, H, D]."""

    def __init__(self, sequences: int, length: int, head_dim: int = HEAD_DIM):
        generator = torch.Generator("cuda").manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

        self.qkv, self.d_o = randn(sequences, length, 3, HEADS, head_dim), randn(sequences, length, HEADS, head_dim)
        self.q_weight, self.k_weight = 1 + 0.1 * randn(head_dim), 1 + 0.1 * randn(head_dim)


def our_calls(x: Inputs) -> tuple[Callable, Callable]:
    """(forward, backward) of our kernel; each answers its results as [N, S, ..., H, D]."""
    o, lse = cuda_attention.forward(x.qkv, x.q_weight, x.k_weight, EPS)
    d_qkv = torch.empty_like(x.qkv)

    def backward() -> list[Tensor]:
        cuda_attention.backward(x.d_o, x.qkv, x.q_weight, x.k_weight, o, lse, EPS, d_qkv)
        return [d_qkv]

    return lambda: [cuda_attention.forward(x.qkv, x.q_weight, x.k_weight, EPS)[0]], backward


def library_calls(x: Inputs, name: str) -> tuple[Callable, Callable]:
    """The same of a library's, which knows no norm."""
    library = library_attention._LIBRARIES[name]
    q, k, v = (part.transpose(1, 2).contiguous() for part in x.qkv.unbind(2))
    d_o = x.d_o.transpose(1, 2).contiguous()
    o, lse = library.forward(q, k, v)
    d_o = torch.empty_like(o).copy_(d_o)

    def backward() -> list[Tensor]:
        return [torch.stack([g.transpose(1, 2) for g in library.backward(d_o, q, k, v, o, lse)], 2)]

    def bare_backward() -> None:
        library.backward(d_o, q, k, v, o, lse)

    backward.bare = bare_backward
    return lambda: [library.forward(q, k, v)[0].transpose(1, 2)], backward


def peer_calls(x: Inputs, attention: peers.Attention) -> tuple[Callable, Callable]:
    """The same of a function from q, k, v [N, S, H, D] to o that autograd differentiates."""
    leaves = [part.contiguous().requires_grad_() for part in x.qkv.unbind(2)]
    with torch.cuda.stream(capture_stream()):  # autograd goes back on the stream on which it came
        capture_stream().wait_stream(torch.cuda.default_stream())
        o = attention(*leaves)
    torch.cuda.current_stream().wait_stream(capture_stream())

    def bare_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(o, leaves, x.d_o, retain_graph=True)

    def backward() -> list[Tensor]:
        return [torch.stack(bare_backward(), 2)]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [attention(*leaves)]

    backward.bare = bare_backward
    return forward, backward


def installed_peers() -> tuple[list[str], list[str]]:
    """The peers that are there, and of each other one why it is not."""
    there, absent = [], []
    for name in PEERS:
        try:
            peers.ATTENTION[name]()
        except peers.Absent as reason:
            absent.append(f"{name}: {reason}")
        else:
            there.append(name)
    return there, absent


def errors(x: Inputs, results: list[Tensor], norm: bool) -> list[float]:
    """Relative errors of o and of qkv's gradient on the first sequence, against float64."""
    qkv = x.qkv[:1].double().requires_grad_()
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    if norm:
        q, k = rms_norm(q, x.q_weight.double(), EPS), rms_norm(k, x.k_weight.double(), EPS)
    o = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2)
    d_qkv = torch.autograd.grad(o, qkv, x.d_o[:1].double())[0]
    return [
        float((got[:1].double() - want).norm() / want.norm())
        for got, want in zip(results, (o.detach(), d_qkv), strict=True)
    ]


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def timed(call: Callable, calls: int, repeats: int) -> list[float]:
    """Milliseconds of a call, each repeat the mean of some in a row, as one CUDA graph: no launch is waited for."""
    side = capture_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made at a first call is not made while a graph is captured
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(calls):
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return times


def run(case: str, head_dim: int, impl: str, args: argparse.Namespace) -> list[Record]:
    """Checks and times one implementation on one case."""
    sequences, length = parse_case(case)
    x = Inputs(sequences, length, head_dim)
    case = case_name(case, head_dim)
    if impl in peers.ATTENTION:
        forward, backward = peer_calls(x, peers.ATTENTION[impl]())
    else:
        forward, backward = our_calls(x) if impl == OURS else library_calls(x, impl)
    found = errors(x, forward() + backward(), norm=impl == OURS)
    if not max(found) < TOLERANCE:
        raise RuntimeError(f"{impl} is wrong at {case}: relative errors of o and d_qkv {found}")
    records = []
    for direction, call in (("forward", forward), ("backward", getattr(backward, "bare", backward))):
        is_backward = direction == "backward"
        counted = {f.__name__: f(sequences, length, is_backward, head_dim) for f in (flops, least_bytes)}
        records.append(
            Record.of_times(
                "attention",
                f"{case}-{direction}",
                impl,
                timed(call, args.calls, args.repeats),
                flops=counted["flops"],
                bytes=counted["least_bytes"],
                notes={"relative_error": found[is_backward], "norm_inside": impl == OURS},
            )
        )
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--head-dim", nargs="+", type=int, default=[HEAD_DIM], choices=cuda_attention.HEAD_DIMS)
    parser.add_argument("--impl", nargs="+", choices=[OURS, *LIBRARIES, *PEERS], help="by default all that there are")
    parser.add_argument("--calls", type=int, default=10, help="in a row, of which the mean is taken")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--once", action="store_true", help="run our kernels once, for a profiler")
    parser.add_argument("--out", type=results_file, help="results file to append to")
    args = parser.parse_args()
    for case in args.cases:
        parse_case(case)
    served, reason = cuda_attention.available(0) if torch.cuda.is_available() else (False, "no GPU is visible")
    if not served:
        raise SystemExit(f"our attention cannot run here: {reason}")
    if args.once:
        for case, head_dim in itertools.product(args.cases, args.head_dim):
            forward, backward = our_calls(Inputs(*parse_case(case), head_dim))
            forward()
            backward()
        torch.cuda.synchronize()
        return 0
    there, absent = installed_peers()
    for reason in absent:
        if args.impl is None:
            print(reason)
        elif reason.partition(":")[0] in args.impl:
            raise ConfigError("impl", reason.partition(":")[0], f"{reason}; leave it out")
    print(COLUMNS)
    for case, head_dim, impl in itertools.product(args.cases, args.head_dim, args.impl or [OURS, *LIBRARIES, *there]):
        records = run(case, head_dim, impl, args)
        for r in records:
            print(f"{r.case:<22}{impl:<20}{r.ms:>9.4f}{r.ms_low:>9.4f}{r.ms_high:>9.4f}"
                  f"{r.flops / r.ms / 1e9:>9.0f}{r.bytes / r.ms / 1e6:>8.0f}", flush=True)  # fmt: skip
        if args.out:
            append(args.out, records)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
