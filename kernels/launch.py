"""Launches of Triton kernels at a fraction of the usual cost on the CPU.

`kernel[grid](...)` examines every argument in Python and looks the compiled kernel up by a long key, and a training
step has over a thousand launches. What the compiler specialises on is little: dtypes, whether pointers are 16-byte
aligned, whether integers are 1 or multiples of 16. `launch` remembers the compiled kernel by that, and calls it
directly.
"""

import torch
from torch import Tensor
from triton import JITFunction

_compiled: dict[tuple, tuple] = {}


def launch(kernel, programs: int, *args, **options) -> None:
    """Runs `kernel` on a grid of `programs` on the current stream.

    Args:
        args: all its arguments that are not compile-time constants, in order; they come first in its signature.
        options: all its compile-time constants by name, and num_warps, num_stages, maxnreg.
    """
    if not isinstance(kernel, JITFunction):  # under the interpreter
        kernel[(programs,)](*args, **options)
        return
    device = torch._C._cuda_getDevice()
    # The options' order is that of the call, so it is the same each time.
    key = (id(kernel), device, *map(_specialization, args), *options.values())
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[(programs,)](*args, **options)
        constants = tuple(options[parameter.name] for parameter in kernel.params if parameter.is_constexpr)
        _compiled[key] = (compiled.run, compiled.function, compiled.packed_metadata, constants)
        return
    run, function, metadata, constants = found
    stream = torch._C._cuda_getCurrentRawStream(device)
    run(programs, 1, 1, stream, function, metadata, None, None, None, *args, *constants)


def _specialization(value):
    """What Triton's compiler may know of an argument."""
    if isinstance(value, Tensor):
        return value.dtype if value.data_ptr() % 16 == 0 else (value.dtype, "unaligned")
    if isinstance(value, int):
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
    return type(value)
