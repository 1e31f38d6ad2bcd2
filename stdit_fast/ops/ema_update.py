"""The exponential moving average of a model's parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stdit_fast import _cuda
from stdit_fast.ops import registry

NAME = "ema_update"


def _choose() -> tuple[str, str]:
    available, reason = _cuda.available()
    return ("cuda" if available else registry.REFERENCE), reason


registry.declare(NAME, _choose)


@torch.no_grad()
def ema_update(ema: Sequence[Tensor], params: Sequence[Tensor], decay: float) -> None:
    """ema[i] += (1 - decay) * (params[i] - ema[i]), in place, computed in float32.

    Bytes it must move: 12 an element for float32 parameters (the average in and out, the parameter in), 10 for
    bfloat16. On one GPU all tensors go in a handful of launches on the current stream. The CUDA kernel and the
    plain definition give the same bits.

    Args:
        ema: the averages, float32 and contiguous.
        params: the parameters, float32 or bfloat16 and contiguous; each of its average's shape and device.
        decay: the average's share that stays, 0 to 1.

    Raises:
        ValueError: a decay outside 0 to 1, or tensors that do not fit together.
        RuntimeError: the GPU refused the launch.
    """
    _check(ema, params, decay)
    if _one_gpu(ema):
        _launch(ema, params, decay)
    else:
        definition(ema, params, decay)


def definition(ema: Sequence[Tensor], params: Sequence[Tensor], decay: float) -> None:
    """The average in plain PyTorch; each of the three operations rounds to float32."""
    weight = 1.0 - decay
    for average, param in zip(ema, params, strict=True):
        average.add_((param - average).mul_(weight))


def _check(ema: Sequence[Tensor], params: Sequence[Tensor], decay: float) -> None:
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"{NAME}: decay is {decay}, expected 0 to 1")
    if len(ema) != len(params):
        raise ValueError(f"{NAME}: {len(ema)} averages for {len(params)} parameters")
    for i, (average, param) in enumerate(zip(ema, params, strict=True)):
        if average.shape != param.shape:
            raise ValueError(f"{NAME}: params[{i}] has shape {list(param.shape)}, its average {list(average.shape)}")
        if average.dtype != torch.float32:
            raise ValueError(f"{NAME}: ema[{i}] is {average.dtype}, expected torch.float32")
        if param.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{NAME}: params[{i}] is {param.dtype}, expected torch.float32 or torch.bfloat16")
        if average.device != param.device:
            raise ValueError(f"{NAME}: params[{i}] is on {param.device}, its average on {average.device}")
        if not (average.is_contiguous() and param.is_contiguous()):
            raise ValueError(f"{NAME}: ema[{i}] and params[{i}] must be contiguous")


def _one_gpu(tensors: Sequence[Tensor]) -> bool:
    devices = {tensor.device for tensor in tensors}
    device = next(iter(devices), None)
    return len(devices) == 1 and device.type == "cuda" and _cuda.available(device.index)[0]


def _launch(ema: Sequence[Tensor], params: Sequence[Tensor], decay: float) -> None:
    library = _cuda.library()
    device = ema[0].device
    dtypes = {torch.float32: library.FLOAT32, torch.bfloat16: library.BFLOAT16}
    stream = torch.cuda.current_stream(device).cuda_stream
    with torch.cuda.device(device):
        for dtype, code in dtypes.items():
            pairs = [(e, p) for e, p in zip(ema, params, strict=True) if p.dtype == dtype]
            if pairs:
                library.ema_update(
                    ema=[e.data_ptr() for e, _ in pairs],
                    params=[p.data_ptr() for _, p in pairs],
                    sizes=[e.numel() for e, _ in pairs],
                    param_dtype=code,
                    decay=decay,
                    device=device.index,
                    stream=stream,
                )
