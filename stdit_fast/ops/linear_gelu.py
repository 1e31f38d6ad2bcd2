"""Linear and GELU by its tanh approximation, and the way back: what the MLP ops are made of.

On Hopper in bf16 the forward GEMM is cuBLASLt's, with bias and activation in its epilogue; elsewhere it is PyTorch's,
with a pass of Triton behind it. The hidden values h, before the activation, are kept for the backward pass. Where there
is memory for the activation too, the GEMM back to h has GELU's gradient in its epilogue. Otherwise a pass makes the
activation again beside the gradient: in that case an epilogue saves nothing (docs/kernels.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stdit_fast.kernels import gelu as kernels
from stdit_fast.ops import cublaslt, library, registry
from stdit_fast.ops.linear import bias_gradient, weight_gradient


def serving() -> tuple[str, str]:
    """The chooser of the ops with an MLP inside."""
    name, reason = registry.triton_kernel()
    if name == registry.REFERENCE:
        return name, reason
    usable, why = cublaslt.available(torch.cuda.current_device())
    if not usable:
        return name, f"{reason}; GELU in passes of its own ({why})"
    return "cublaslt", f"{why}: GELU in the GEMMs, bf16; fp16 and fp32 by triton"


def linear_gelu_backward(
    dy: Tensor, hidden: Tensor, activation: Tensor | None, weight: Tensor, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Through y = linear(gelu(h)) to h, without y's bias.

    Args:
        dy: [N, C_out]; hidden: h [N, C_hidden].
        activation: gelu(h), where it was kept.
        weight: [C_out, C_hidden].
        wants_weight: whether its gradient is.

    Returns:
        The gradient of h, its sum over the rows, and the gradient of the weight.
    """
    if activation is None:
        dh, activation, dbias = gelu_backward_op(dy @ weight, hidden)
    else:
        dh = gelu_input_gradient_op(dy, weight, hidden)
        dbias = bias_gradient(dh)
    return dh, dbias, weight_gradient(dy, activation, weight) if wants_weight else None


def keeps(activation: Tensor, wanted: bool) -> Tensor | None:
    """What to keep of an activation: all of it if wanted and of use, else nothing."""
    return activation if wanted and cublaslt.usable(activation) else None


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    if cublaslt.serves(x, weight, bias):
        return cublaslt.linear_gelu(x, weight, bias)
    hidden = F.linear(x, weight, bias)
    return kernels.forward(hidden), hidden


def _input_gradient(dy: Tensor, weight: Tensor, hidden: Tensor) -> Tensor:
    dy = dy.contiguous()
    if cublaslt.serves(dy, weight, hidden):
        return cublaslt.gelu_input_gradient(dy, weight, hidden)
    return kernels.backward(dy @ weight, hidden)[0]


linear_gelu_op = library.define(
    "linear_gelu(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor)",
    _linear_gelu,
    lambda x, weight, bias: (x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], weight.shape[0])),
)
gelu_backward_op = library.define(
    "gelu_backward(Tensor da, Tensor h) -> (Tensor, Tensor, Tensor)",
    lambda da, h: kernels.backward(da.contiguous(), h),
    lambda da, h: (h.new_empty(h.shape), h.new_empty(h.shape), h.new_empty(h.shape[1])),
)
gelu_input_gradient_op = library.define(
    "gelu_input_gradient(Tensor dy, Tensor weight, Tensor hidden) -> Tensor",
    _input_gradient,
    lambda dy, weight, hidden: hidden.new_empty(hidden.shape),
)
