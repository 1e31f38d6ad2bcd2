"""Fused operations: one file each, with the definition in plain PyTorch, the checks and the dispatch.

To add one: a file `ops/X.py` with one public function `X`, its `definition` and `registry.declare`, a line
here, and `tests/test_ops.py` cases that hold it against the definition in float64.
"""

from stdit_fast.ops.cross_attention import TextLayout, cross_attention, text_layout
from stdit_fast.ops.gate_residual import gate_residual
from stdit_fast.ops.gate_residual_layer_norm_modulate import gate_residual_layer_norm_modulate
from stdit_fast.ops.layer_norm_modulate import layer_norm_modulate
from stdit_fast.ops.linear import projection, weight_gradients_into
from stdit_fast.ops.mlp import mlp, modulated_mlp
from stdit_fast.ops.modulated_linear import gate_residual_linear, modulated_linear
from stdit_fast.ops.patch_embed import patch_embed
from stdit_fast.ops.registry import check_backend, serving, use_kernel
from stdit_fast.ops.residual_norm import Branch, without_gradient
from stdit_fast.ops.spatial_attention import spatial_attention
from stdit_fast.ops.temporal_attention import rotation_table, temporal_attention

# What a forward pass of the model calls; `backend="fused"` demands a kernel for each.
MODEL_OPS = (
    "cross_attention",
    "gate_residual",
    "gate_residual_layer_norm_modulate",
    "gate_residual_linear",
    "layer_norm_modulate",
    "mlp",
    "modulated_linear",
    "modulated_mlp",
    "patch_embed",
    "spatial_attention",
    "temporal_attention",
)

__all__ = [
    "MODEL_OPS",
    "Branch",
    "TextLayout",
    "check_backend",
    "cross_attention",
    "gate_residual",
    "gate_residual_layer_norm_modulate",
    "gate_residual_linear",
    "layer_norm_modulate",
    "mlp",
    "modulated_linear",
    "modulated_mlp",
    "patch_embed",
    "projection",
    "rotation_table",
    "serving",
    "spatial_attention",
    "temporal_attention",
    "text_layout",
    "use_kernel",
    "weight_gradients_into",
    "without_gradient",
]
