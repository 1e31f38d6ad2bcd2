"""Fused operations: one file each, with the definition in plain PyTorch, the checks and the dispatch.

To add one: a file `ops/X.py` with one public function `X`, its `definition` and `registry.declare`, a line
here, and `tests/test_ops.py` cases that hold it against the definition in float64.
"""

from stdit_fast.ops.cross_attention import TextLayout, cross_attention, text_layout
from stdit_fast.ops.gate_residual import gate_residual
from stdit_fast.ops.layer_norm_modulate import layer_norm_modulate
from stdit_fast.ops.mlp import mlp
from stdit_fast.ops.patch_embed import patch_embed
from stdit_fast.ops.registry import check_backend, serving
from stdit_fast.ops.spatial_attention import spatial_attention
from stdit_fast.ops.temporal_attention import temporal_attention

# What a forward pass of the model calls; `backend="fused"` demands a kernel for each.
MODEL_OPS = (
    "cross_attention",
    "gate_residual",
    "layer_norm_modulate",
    "mlp",
    "patch_embed",
    "spatial_attention",
    "temporal_attention",
)

__all__ = [
    "MODEL_OPS",
    "TextLayout",
    "check_backend",
    "cross_attention",
    "gate_residual",
    "layer_norm_modulate",
    "mlp",
    "patch_embed",
    "serving",
    "spatial_attention",
    "temporal_attention",
    "text_layout",
]
