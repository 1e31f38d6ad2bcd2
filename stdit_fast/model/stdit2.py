"""STDiT-2: the video diffusion transformer of Open-Sora 1.1, on the ops of `stdit_fast.ops`.

The model knows shapes and order, nothing of kernels, processes or diffusion. Latents are [B, C_in, T, H, W];
tokens stay [B, T, S, C] through all blocks, S = ceil(H/p) * ceil(W/q).

Everything that the conditioning decides (shift, scale, gate) is [B, 1, ...], or [B, T, ...] when an x_mask
makes frames differ, so masked and unmasked passes are one path.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init

from stdit_fast import ops
from stdit_fast.errors import ConfigError
from stdit_fast.model.arena import Arena
from stdit_fast.model.config import STDiT2Config
from stdit_fast.model.embeddings import (
    CaptionEmbedder,
    Linear,
    Mlp,
    RotaryEmbedding,
    ScalarEmbedder,
    position_embedding,
)
from stdit_fast.model.graphs import BlockGraphs
from stdit_fast.model.memory import (
    blocks_to_checkpoint,
    gradient_bytes,
    room_for_activations,
    samples_at_once,
    training_bytes,
)

logger = logging.getLogger(__name__)

_LESS_USABLE = 0.97  # of an arena, where a step that was to fit did not


class RMSNormWeight(nn.Module):
    """The weight of a QK-normalisation; the attention op that it is passed to does the arithmetic."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))


class SelfAttention(nn.Module):
    """Parameters of one self-attention; the block calls the ops."""

    def __init__(self, config: STDiT2Config, proj_std: float | None = None):
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.q_norm = RMSNormWeight(self.head_dim) if config.qk_norm else None
        self.k_norm = RMSNormWeight(self.head_dim) if config.qk_norm else None
        self.proj = Linear(config.hidden_size, config.hidden_size, proj_std)


def norm_weights(attn: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weights of the norms of an attention's q and k, None where it has none."""
    return getattr(attn.q_norm, "weight", None), getattr(attn.k_norm, "weight", None)


class CrossAttention(nn.Module):
    """Parameters of the video tokens' attention over packed text."""

    def __init__(self, config: STDiT2Config):
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.q_linear = Linear(config.hidden_size, config.hidden_size)
        self.kv_linear = Linear(config.hidden_size, 2 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size, initial_std=0)


class FrameSwitch(Protocol):
    """Finds the other frames where a model computes on some of a video's alone; see `STDiT2.switch`.

    Attributes:
        num_frames: of the whole video.
    """

    num_frames: int

    def places(self, x: Tensor) -> Tensor:
        """Where rows of u and of the result of `temporal` lie, for the frames x [B, T_own, S, C]; see `ops.Branch`."""

    def leaving(self, x: Tensor) -> AbstractContextManager[None]:
        """Holds what makes u of the frames x for the next call of `temporal`."""

    def temporal(
        self,
        u: Tensor,
        positions: int,
        weight: Tensor,
        bias: Tensor,
        attention: Callable[[Tensor], Tensor],
        proj_weight: Tensor,
    ) -> Tensor:
        """linear(attention(linear(u))) of own frames, where attention gets all T of some positions: [B*T_own*S, C].

        Args:
            u: [B*T_own*S, C], its rows where `places` says, as those of the result.
            positions: S.
            weight, bias, proj_weight: of the two linear layers.
            attention: [B, T, s, 3*C] to [B, T, s, C], for any s.
        """

    def agree(self, count: int) -> int:
        """The number of blocks to recompute, from what this part of the video alone would need."""


class Arrivals(Protocol):
    """Says when weights are there; see `STDiT2.arrivals`."""

    def wait(self, group: int | None = None) -> None:
        """What the device does from now on sees the weights of that group of `gradient_order`; None: all weights."""


class Conditioning(NamedTuple):
    """What all blocks share.

    Attributes:
        layout: of the packed text.
        rotation: [T, 2, D/2] of the temporal attention, see `ops.rotation_table`.
        switch: where x holds some of the T frames only.
        keep_activation: whether the MLP's activation is kept for the backward pass.
    """

    layout: ops.TextLayout
    rotation: Tensor
    switch: FrameSwitch | None = None
    keep_activation: bool = False


class TextContext(NamedTuple):
    """Captions as the blocks read them.

    kv: [M, depth, 2, H, D], keys and values of the packed text for each block.
    layout: where each sample's tokens lie in it.
    """

    kv: Tensor
    layout: ops.TextLayout


class STDiT2Block(nn.Module):
    """Spatial attention, temporal attention, cross attention, MLP, each on the residual stream.

    The output of a block's MLP is added to the residual stream by the op that the next block begins with.
    """

    def __init__(self, config: STDiT2Config):
        super().__init__()
        channels = config.hidden_size
        self.rotate_first, self.backend = config.qk_norm_legacy, config.backend
        self.attn = SelfAttention(config)
        self.attn_temp = SelfAttention(config, proj_std=0)
        self.cross_attn = CrossAttention(config)
        self.mlp = Mlp(channels, int(channels * config.mlp_ratio), channels)
        self.scale_shift_table = nn.Parameter(torch.empty(6, channels))
        self.scale_shift_table_temporal = nn.Parameter(torch.empty(3, channels))

    def forward(
        self, x: Tensor, branch: ops.Branch | None, modulation: Tensor, kv: Tensor, cond: Conditioning
    ) -> tuple[Tensor, ops.Branch]:
        """One block.

        Args:
            x: [B, T, S, C], the residual stream.
            branch: what the block before has left to be added to it.
            modulation: [B, 1 or T, 9, C]: shift, scale, gate of the spatial attention, of the MLP, of the temporal
                attention, tables added.
            kv: [M, 2, H, D], keys and values of the packed text.

        Returns:
            The residual stream and what is left to be added to it.
        """
        backend, attn, cross, mlp = self.backend, self.attn, self.cross_attn, self.mlp
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, temp_shift, temp_scale, temp_gate = modulation.unbind(2)

        x, qkv = ops.modulated_linear(x, branch, shift, scale, attn.qkv.weight, attn.qkv.bias, backend=backend)
        o = ops.spatial_attention(_split_heads(qkv, attn), *norm_weights(attn), backend=backend)
        branch = ops.Branch(ops.projection(o, attn.proj.weight, backend=backend), gate, attn.proj.bias)

        x, o, places = self._temporal(x, branch, temp_shift, temp_scale, cond)
        branch = ops.Branch(o, temp_gate, self.attn_temp.proj.bias, places)

        x, q = ops.gate_residual_linear(x, branch, cross.q_linear.weight, cross.q_linear.bias, backend=backend)
        q = q.flatten(1, 2).unflatten(-1, (cross.num_heads, cross.head_dim))
        o = ops.cross_attention(q, kv, cond.layout, backend=backend).view_as(x)
        branch = ops.Branch(ops.projection(o, cross.proj.weight, backend=backend), None, cross.proj.bias)

        weights = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight)
        options = {"keep_activation": cond.keep_activation, "backend": backend}
        x, o = ops.modulated_mlp(x, branch, mlp_shift, mlp_scale, *weights, **options)
        return x, ops.Branch(o, mlp_gate, mlp.fc2.bias)

    def _temporal(
        self, x: Tensor, branch: ops.Branch, shift: Tensor, scale: Tensor, cond: Conditioning
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The residual stream; the temporal attention's output, projected but for the bias; and where its rows lie."""
        attn, backend = self.attn_temp, self.backend
        weight, bias, proj = attn.qkv.weight, attn.qkv.bias, attn.proj.weight

        if cond.switch is None and x.shape[1] == 1 and ops.use_kernel("temporal_attention", backend, x, attn.head_dim):
            # The one frame of an image attends to itself: its value is the result, whatever q and k are.
            values = slice(2 * x.shape[-1], None)
            x, o = ops.modulated_linear(x, branch, shift, scale, weight[values], bias[values], backend=backend)
            return x, ops.projection(ops.without_gradient(o, *norm_weights(attn)), proj, backend=backend), None
        # Either finds the bias's gradient: the attention's kernel in passing, the linear layer by a pass of its own.
        held = None
        if ops.use_kernel("temporal_attention", backend, x, attn.head_dim):
            bias, held = bias.detach(), bias

        def attention(qkv: Tensor) -> Tensor:
            options = {"rotate_first": self.rotate_first, "bias": held, "backend": backend}
            return ops.temporal_attention(_split_heads(qkv, attn), *norm_weights(attn), cond.rotation, **options)

        if cond.switch is not None:
            places = cond.switch.places(x)
            with cond.switch.leaving(x):
                x, u = ops.gate_residual_layer_norm_modulate(x, branch, shift, scale, places=places, backend=backend)
            return x, cond.switch.temporal(u, x.shape[2], weight, bias, attention, proj), places
        x, qkv = ops.modulated_linear(x, branch, shift, scale, weight, bias, backend=backend)
        return x, ops.projection(attention(qkv), proj, backend=backend), None


def _split_heads(qkv: Tensor, attn: nn.Module) -> Tensor:
    """[B, T, S, 3*C] to [B, T, S, 3, H, D]."""
    return qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim))


class FinalLayer(nn.Module):
    """LN, modulate, Linear to the patches' values."""

    def __init__(self, config: STDiT2Config):
        super().__init__()
        patch = config.patch_size[1] * config.patch_size[2]
        self.backend = config.backend
        self.linear = Linear(config.hidden_size, patch * config.out_channels, initial_std=0)
        self.scale_shift_table = nn.Parameter(torch.empty(2, config.hidden_size))

    def forward(self, x: Tensor, branch: ops.Branch, cond: Tensor) -> Tensor:
        """x [B, T, S, C] with what is left to be added, cond [B, 1 or T, C] to [B, T, S, p*q*C_out]."""
        return self._project(self._norm(x, branch, cond))

    def forward_legacy(
        self, x: Tensor, branch: ops.Branch | None, cond: Tensor, cond_zero: Tensor, x_mask: Tensor
    ) -> Tensor:
        """Open-Sora 1.1 under an x_mask: condition frames are normalised and modulated twice."""
        z = self._norm(x, branch, cond)
        return self._project(torch.where(x_mask[:, :, None, None], z, self._norm(z, None, cond_zero)))

    def _project(self, x: Tensor) -> Tensor:
        return ops.projection(x, self.linear.weight, self.linear.bias, backend=self.backend)

    def _norm(self, x: Tensor, branch: ops.Branch | None, cond: Tensor) -> Tensor:
        modulation = self._modulation(cond)
        if branch is None:
            return ops.layer_norm_modulate(x, *modulation, backend=self.backend)
        return ops.gate_residual_layer_norm_modulate(x, branch, *modulation, backend=self.backend)[1]

    def _modulation(self, cond: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = (self.scale_shift_table + cond.unsqueeze(2)).unbind(2)
        return shift, scale


class PatchEmbed(nn.Module):
    """Latents to tokens, with the positions added."""

    def __init__(self, config: STDiT2Config):
        super().__init__()
        patch = tuple(config.patch_size)
        self.backend = config.backend
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        return ops.patch_embed(x, self.proj.weight, self.proj.bias, position, backend=self.backend)


class STDiT2(PreTrainedModel):
    """Predicts noise (and, with pred_sigma, the variance) of video latents of any T, H, W.

    Parameter names are those of Open-Sora 1.1, so its checkpoints load unchanged.

    Attributes:
        switch: None, or how to find the other frames where forward passes get some of a video's frames alone: x and
            x_mask hold these, and all else describes the whole video.
        arrivals: None, or where weights may still be on their way, which is then waited for before they are used.
    """

    config_class = STDiT2Config
    base_model_prefix = ""
    main_input_name = "x"
    _no_split_modules = ["STDiT2Block"]
    _keep_in_fp32_modules_strict = ["rope"]  # see RotaryEmbedding

    def __init__(self, config: STDiT2Config):
        super().__init__(config)
        ops.check_backend(config.backend, ops.MODEL_OPS)
        channels = config.hidden_size
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = ScalarEmbedder(channels, initial_std=0.02)
        self.t_block = nn.Sequential(nn.SiLU(), Linear(channels, 6 * channels, initial_std=0.02))
        self.t_block_temp = nn.Sequential(nn.SiLU(), Linear(channels, 3 * channels, initial_std=0.02))
        self.y_embedder = CaptionEmbedder(config.caption_channels, channels, config.model_max_length, config.backend)
        self.blocks = nn.ModuleList(STDiT2Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.csize_embedder = ScalarEmbedder(channels // 3)
        self.ar_embedder = ScalarEmbedder(channels // 3)
        self.fl_embedder = ScalarEmbedder(channels)
        self.fps_embedder = ScalarEmbedder(channels)
        self.rope = RotaryEmbedding(config.head_dim)
        self.checkpointed_blocks: int | str = 0
        self.memory_reserve: int | None = None
        self._training_bytes: int | None = None  # once a step on a GPU has asked
        self.last_checkpointed = 0
        self.last_kept_activations = False
        self.graphs: BlockGraphs | None = None
        self.last_graphed = False
        self.switch: FrameSwitch | None = None
        self.arrivals: Arrivals | None = None
        self.post_init()

    # ---------------------------------------------------------------- forward

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: "Tensor | TextContext",
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        num_frames: Tensor | None = None,
        height: Tensor | None = None,
        width: Tensor | None = None,
        ar: Tensor | None = None,
        fps: Tensor | None = None,
        drop_caption: Tensor | None = None,
    ) -> Tensor:
        """One prediction.

        Args:
            x: [B, C_in, T, H, W] noised latents.
            timestep: [B] diffusion timesteps, integers (a plugin that casts floats must not round them).
            y: [B, 1, L, caption_channels] text states, L at most model_max_length; or what `encode_text` made of
                them, where the same captions serve several predictions (mask and drop_caption then say nothing).
            mask: [B, L], nonzero where a token is real; None: all are. On the CPU it costs no synchronisation.
            x_mask: [B, T], False where a frame is a condition and counts as timestep 0; None: no conditions.
            num_frames, height, width, ar, fps: [B], of the video in frames, pixels, pixels, height/width,
                frames a second.
            drop_caption: [B] bool, captions to replace by the empty one. None draws them with
                class_dropout_prob in training mode and drops none in evaluation.

        Returns:
            [B, C_in or 2*C_in, T, H, W] float32 (float64 for a float64 model).

        Raises:
            ValueError: a missing argument or a shape that does not fit, with the shape that would.
        """
        self._check_inputs(x, timestep, y, x_mask, num_frames, height, width, ar, fps)
        self._wait_for_weights(len(self.blocks))
        weight = self.x_embedder.proj.weight
        rows, columns = (-(-size // p) for size, p in zip(x.shape[3:], self.config.patch_size[1:], strict=True))
        scale = (height.float() * width.float()).sqrt() / self.config.input_sq_size
        position = position_embedding(self.config.hidden_size, rows, columns, scale, x.device, weight.dtype)
        tokens = self.x_embedder(x.to(weight.dtype), position)

        size = torch.cat((self.csize_embedder(height, width), self.ar_embedder(ar)), dim=-1)
        length = self.fl_embedder(num_frames) + self.fps_embedder(fps)
        if x_mask is not None:
            x_mask = x_mask.to(x.device) != 0
        t = self.t_embedder(timestep)
        t_zero = None if x_mask is None else self.t_embedder(torch.zeros_like(timestep))
        spatial = self._per_frame(self.t_block, t, t_zero, size, x_mask)
        temporal = self._per_frame(self.t_block_temp, t, t_zero, length, x_mask)
        text, layout = y if isinstance(y, TextContext) else self._embed_text(y, mask, drop_caption)
        rotation = ops.rotation_table(self.rope.freqs, x.shape[2] if self.switch is None else self.switch.num_frames)
        modulation = torch.cat((spatial, temporal), dim=-1)
        graph = self._graph(tokens, modulation, layout) if self._has_graph(tokens, modulation) else None
        if graph is None:
            arena, count = self._plan(tokens)
            before = self._shared_arena()
            graph = None if count else self._graph(tokens, modulation, layout)
            if graph is None and self._shared_arena() is not before:  # made for a capture that failed
                arena, count = self._plan(tokens)
        # Else, whatever else is in memory by now, the graph's place is its own.
        self.last_checkpointed = count if graph is None else 0
        self.last_graphed = graph is not None
        if graph is not None:
            tokens, branch = self.graphs.run(graph, tokens, modulation, text, layout, rotation)
        else:
            tokens, branch = self._run_ordinary(tokens, modulation, text, layout, rotation, count, arena)

        if x_mask is not None and self.config.final_layer_legacy:
            tokens = self.final_layer.forward_legacy(tokens, branch, t[:, None], (t_zero + size)[:, None], x_mask)
        else:
            tokens = self.final_layer(tokens, branch, _select_frames(t, t_zero, x_mask))
        out = self._unpatchify(tokens, rows, columns)[..., : x.shape[3], : x.shape[4]]
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def _run_ordinary(self, tokens: Tensor, *args) -> tuple[Tensor, ops.Branch]:
        """As `_run_blocks`, from the arena that its last argument is, if any.

        Where that turns out to be too small, more blocks are recomputed, in this step and from now on.
        """
        *given, count, arena = args
        while arena is not None:
            try:
                with arena.use_alone():
                    return self._run_blocks(tokens, *given, count, arena)
            except torch.OutOfMemoryError:  # where others take part in the step, they are in another place of it by now
                if self.switch is not None or count == len(self.blocks):
                    raise
            arena.usable *= _LESS_USABLE
            self.last_checkpointed = count = max(count + 1, self._count_checkpointed(tokens, arena))
        return self._run_blocks(tokens, *given, count)

    def _run_blocks(
        self,
        x: Tensor,
        modulation: Tensor,
        text: Tensor,
        layout: ops.TextLayout,
        rotation: Tensor,
        checkpointed: int = 0,
        arena: Arena | None = None,
    ) -> tuple[Tensor, ops.Branch]:
        """All blocks, the first `checkpointed` under checkpointing: the residual stream and what is left to be added.

        The caller has this pass allocate from the `arena`, if any; recomputed blocks do so too.

        Args:
            x: [B, T, S, C]; modulation: [B, 1 or T, 9*C] without the blocks' tables; text: [M, C], or its keys and
                values [M, depth, 2, H, D].
        """
        self.last_kept_activations = self._keeps_activations(x, checkpointed, arena)
        cond = Conditioning(layout, rotation, self.switch, self.last_kept_activations)
        # A recomputed block's backward pass comes next, so that its activation takes no other block's place.
        recomputed = cond._replace(keep_activation=True)
        # What depends on no block's x is made for all blocks at once: modulation [depth, B, 1 or T, 9, C], and the
        # text's keys and values [M, depth, 2, H, D] by one GEMM.
        tables = torch.cat([t for b in self.blocks for t in (b.scale_shift_table, b.scale_shift_table_temporal)])
        tables = tables.view(len(self.blocks), 1, 1, 9, -1)
        modulations = (tables + modulation.unflatten(-1, (9, -1))).unbind(0)
        kvs = (text if text.dim() == 5 else self._keys_and_values(text)).unbind(1)

        branch = None
        for i, (block, *args) in enumerate(zip(self.blocks, modulations, kvs, strict=True)):
            self._wait_for_weights(len(self.blocks) - 1 - i)
            if i < checkpointed:
                # No block draws random numbers, so their state need not be kept. The branch goes in as it is: added
                # here it would be one tensor less to keep, by another kernel, whose last bits may differ.
                options = {"use_reentrant": False, "preserve_rng_state": False}
                if arena is not None:
                    options["context_fn"] = lambda: (nullcontext(), arena.use())
                x, branch = checkpoint(block, x, branch, *args, recomputed, **options)
            else:
                x, branch = block(x, branch, *args, cond)
        return x, branch

    def encode_text(self, y: Tensor, mask: Tensor | None = None, drop_caption: Tensor | None = None) -> "TextContext":
        """What the blocks read of captions, for any number of predictions with them.

        Args:
            y, mask: as in `forward`.
            drop_caption: [B] bool, captions to replace by the empty one, as the unconditional half of a guided batch
                does; None: none.
        """
        cfg = self.config
        if y.dim() != 4 or y.shape[1] != 1 or y.shape[3] != cfg.caption_channels:
            raise ValueError(f"y has shape {list(y.shape)}, expected [B, 1, L, {cfg.caption_channels}]")
        self._check_text_length(y.shape[2])
        self._wait_for_weights(len(self.blocks))
        if drop_caption is None:
            drop_caption = torch.zeros(y.shape[0], dtype=torch.bool, device=y.device)
        text, layout = self._embed_text(y, mask, drop_caption)
        return TextContext(self._keys_and_values(text), layout)

    def _keys_and_values(self, text: Tensor) -> Tensor:
        """Of packed text [M, C] for all blocks, by one GEMM: [M, depth, 2, H, D]."""
        linears = [block.cross_attn.kv_linear for block in self.blocks]
        kv = F.linear(text, torch.cat([linear.weight for linear in linears]), torch.cat([li.bias for li in linears]))
        return kv.unflatten(-1, (len(linears), 2, self.config.num_heads, self.config.head_dim))

    def _graph(self, x: Tensor, modulation: Tensor, layout: ops.TextLayout):
        """The CUDA graph that runs the blocks on this batch, if there is one."""
        wanted = self.graphs is not None and self.training and torch.is_grad_enabled()
        if not wanted or self.switch is not None or torch.compiler.is_compiling():
            return None
        if not ops.use_kernel("modulated_linear", self.config.backend, x, x.shape[-1]):
            return None
        graph = self.graphs.find(x, modulation, layout, self.config.model_max_length)
        if graph is not None:
            self._wait_for_weights(None)
        return graph

    def _wait_for_weights(self, group: int | None) -> None:
        """Before weights of that group of `gradient_order` are used; None: of all."""
        if self.arrivals is not None:
            self.arrivals.wait(group)

    @staticmethod
    def _per_frame(block: nn.Module, t: Tensor, t_zero: Tensor | None, extra: Tensor, x_mask: Tensor | None) -> Tensor:
        """block(t + extra), for condition frames block(t_zero + extra): [B, 1 or T, k*C]."""
        zero = None if t_zero is None else block(t_zero + extra)
        return _select_frames(block(t + extra), zero, x_mask)

    def _embed_text(self, y: Tensor, mask: Tensor | None, drop: Tensor | None) -> tuple[Tensor, ops.TextLayout]:
        """Drops captions, packs the real tokens, projects them to the model's width: ([M, C], layout)."""
        if drop is None and self.training and self.config.class_dropout_prob > 0:
            drop = torch.rand(y.shape[0], device=y.device) < self.config.class_dropout_prob
        layout = ops.text_layout(mask, y.shape[0], y.shape[2], y.device)
        states = self.y_embedder(y.squeeze(1), drop).flatten(0, 1)
        return self.y_embedder.y_proj(states.index_select(0, layout.token_index)), layout

    def _unpatchify(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """[B, T, rows*columns, p*q*C_out] (channels last) to [B, C_out, T, rows*p, columns*q]."""
        _, p, q = self.config.patch_size
        batch, frames = tokens.shape[:2]
        grid = tokens.reshape(batch, frames, rows, columns, p, q, self.config.out_channels)
        return grid.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, rows * p, columns * q)

    def _check_inputs(self, x, timestep, y, x_mask, num_frames, height, width, ar, fps) -> None:
        cfg = self.config
        if x.dim() != 5 or x.shape[1] != cfg.in_channels or x.numel() == 0:
            raise ValueError(f"x has shape {list(x.shape)}, expected [B, {cfg.in_channels}, T, H, W] with no size 0")
        batch, frames = x.shape[0], x.shape[2]
        if isinstance(y, TextContext):
            if len(y.layout.lengths) != batch:
                raise ValueError(f"y holds the text of {len(y.layout.lengths)} samples, expected {batch}")
        elif y.dim() != 4 or y.shape[:2] != (batch, 1) or y.shape[3] != cfg.caption_channels:
            raise ValueError(f"y has shape {list(y.shape)}, expected [{batch}, 1, L, {cfg.caption_channels}]")
        else:
            self._check_text_length(y.shape[2])
        if x_mask is not None and x_mask.shape != (batch, frames):
            raise ValueError(f"x_mask has shape {list(x_mask.shape)}, expected [{batch}, {frames}]")
        scalars = dict(timestep=timestep, num_frames=num_frames, height=height, width=width, ar=ar, fps=fps)
        for name, value in scalars.items():
            if value is None or value.shape != (batch,):
                got = "is missing" if value is None else f"has shape {list(value.shape)}"
                raise ValueError(f"{name} {got}, expected a tensor of shape [{batch}]")

    def _check_text_length(self, tokens: int) -> None:
        most = self.config.model_max_length
        if not 1 <= tokens <= most:
            raise ValueError(f"y has {tokens} tokens, expected 1 to model_max_length = {most}")

    def gradient_order(self) -> list[list[nn.Parameter]]:
        """All parameters in groups, in the order in which a backward pass completes their gradients.

        A block is one group, but for what is computed for all blocks at once: that is in the last group, which is
        complete after all blocks. Forward passes need them in reverse, the last group before all.
        """
        last: dict[int, nn.Parameter] = {id(p): p for p in self.parameters()}
        groups = []
        for block in reversed(self.blocks):
            tables = block.scale_shift_table, block.scale_shift_table_temporal
            late = {id(p) for p in (*tables, *block.cross_attn.kv_linear.parameters())}
            groups.append([last.pop(id(p)) for p in block.parameters() if id(p) not in late])
        end = [last.pop(id(p)) for p in self.final_layer.linear.parameters()]
        return [end + groups[0], *groups[1:], list(last.values())]

    # --------------------------------------------------------- checkpointing

    def set_checkpointing(self, blocks: str | int, reserve: int | None = None) -> None:
        """Recomputes the first blocks in the backward pass instead of keeping what it needs of them.

        Args:
            blocks: "off", "all", a number of blocks, or "auto": as many as each batch needs to fit into the GPU's
                memory (`stdit_fast.model.memory`); on the CPU none. Gradients do not depend on it. More than the
                number are recomputed where memory that is shared with CUDA graphs would not hold the rest.
            reserve: with "auto", bytes that training needs beside parameters and activations; None: gradients,
                a sharded optimizer and the average as `train` holds them (`memory.training_reserve`).

        Raises:
            ConfigError: anything else.
        """
        counts = {"off": 0, "all": len(self.blocks), "auto": "auto"}
        count = counts.get(blocks, blocks)
        if count != "auto" and (not isinstance(count, int) or not 0 <= count <= len(self.blocks)):
            remedy = f'use "off", "all", "auto" or a number from 0 to {len(self.blocks)}'
            raise ConfigError("checkpointing", blocks, remedy)
        self.checkpointed_blocks, self.memory_reserve, self._training_bytes = count, reserve, None

    def set_cuda_graphs(self, wanted: bool, early: bool = False) -> None:
        """In training on a GPU, runs small buckets as CUDA graphs (`stdit_fast.model.graphs`).

        Results are the same. Each backward pass has to run before the next forward pass. Buckets that recompute blocks
        run as usual, and so do the first steps of each. On a stream other than the default one
        (`stdit_fast.model.arena.leave_default_stream`) they share memory with ordinary steps.

        Args:
            early: that memory is taken before there is a graph, in the second step.
        """
        if self.graphs is not None:
            self.graphs.release()
        self.graphs = BlockGraphs(self, early) if wanted else None

    def samples_at_once(self, shape: torch.Size, held: int) -> int:
        """How many samples of a batch to run at once where "auto" recomputes what does not fit: fewer passes recompute.

        Args:
            shape: [B, C_in, T, H, W] of the batch's latents.
            held: bytes that training holds on the GPU beside activations and gradients.
        """
        weight = self.x_embedder.proj.weight
        if not weight.is_cuda or self.checkpointed_blocks != "auto":
            return shape[0]
        rows, columns = (-(-size // p) for size, p in zip(shape[3:], self.config.patch_size[1:], strict=True))
        tokens = torch.Size((shape[0], shape[2], rows * columns, self.config.hidden_size))
        gradients = gradient_bytes(self)  # and CUDA graphs' own
        held = max(held + gradients, self.planned_bytes()) + gradients
        return samples_at_once(self, tokens, weight, held)

    def _has_graph(self, tokens: Tensor, modulation: Tensor) -> bool:
        """Whether a graph of this bucket was captured, and no number of blocks to recompute was asked for."""
        if self.graphs is None or self.switch is not None or self.checkpointed_blocks not in ("auto", 0):
            return False
        return self.graphs.has(tokens, modulation, self.config.model_max_length)

    def _plan(self, tokens: Tensor) -> tuple[Arena | None, int]:
        """Where an ordinary step's forward pass allocates from, if not from all memory, and the blocks to recompute."""
        shares = self.graphs is not None and self.training and torch.is_grad_enabled() and tokens.is_cuda
        if not shares or torch.compiler.is_compiling():
            return None, self._count_checkpointed(tokens)
        arena = self.graphs.shared_memory(tokens, self.planned_bytes())
        return arena, self._count_checkpointed(tokens, arena)

    def _shared_arena(self) -> Arena | None:
        return None if self.graphs is None else self.graphs.arena

    def _count_checkpointed(self, tokens: Tensor, arena: Arena | None = None) -> int:
        if not torch.is_grad_enabled():
            return 0
        wanted = self.checkpointed_blocks
        if wanted != "auto" and arena is None:
            return wanted
        if not tokens.is_cuda:
            return 0
        count = blocks_to_checkpoint(self, tokens, self.planned_bytes(), arena)
        if wanted != "auto":
            count = max(wanted, count)
        return count if self.switch is None else self.switch.agree(count)

    def _keeps_activations(self, tokens: Tensor, checkpointed: int, arena: Arena | None = None) -> bool:
        """Whether there is memory for the MLPs' activations of all blocks that are not recomputed."""
        if not tokens.is_cuda or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return room_for_activations(self, tokens, self.planned_bytes(), checkpointed, arena)

    def planned_bytes(self) -> int:
        """Bytes that training holds beside activations."""
        if self._training_bytes is None:
            self._training_bytes = training_bytes(self, self.memory_reserve)
        return self._training_bytes

    # ------------------------------------------------------- initial values

    def _init_weights(self, module: nn.Module) -> None:
        """Initial values of one module's own parameters and buffers, as Open-Sora 1.1 sets them.

        transformers calls it for modules with values of their own that no checkpoint has filled, and only for
        those: a container cannot set its children's.
        """
        # `init` leaves alone what a checkpoint has filled, which torch.nn.init would not.
        if isinstance(module, Linear):
            if module.initial_std is None:
                init.xavier_uniform_(module.weight)
            else:
                init.normal_(module.weight, std=module.initial_std)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv3d):  # as the Linear over a flattened patch that it is
            fan_out, fan_in = module.weight.flatten(1).shape
            bound = (6 / (fan_in + fan_out)) ** 0.5
            init.uniform_(module.weight, -bound, bound)
            init.zeros_(module.bias)
        elif isinstance(module, RMSNormWeight):
            init.ones_(module.weight)
        elif isinstance(module, RotaryEmbedding):
            init.copy_(module.freqs, module.initial())
        elif isinstance(module, STDiT2Block):
            std = module.scale_shift_table.shape[-1] ** -0.5
            init.normal_(module.scale_shift_table, std=std)
            init.normal_(module.scale_shift_table_temporal, std=std)
        elif isinstance(module, FinalLayer):
            init.normal_(module.scale_shift_table, std=module.scale_shift_table.shape[-1] ** -0.5)
        elif isinstance(module, CaptionEmbedder):
            init.normal_(module.y_embedding, std=module.y_embedding.shape[-1] ** -0.5)

    # -------------------------------------------------------------- loading

    @classmethod
    def from_pretrained(cls, path, *args, strict: bool = True, **kwargs):
        """As PreTrainedModel.from_pretrained, but a checkpoint that does not fit raises.

        Args:
            path: a `save_pretrained` folder or a hub name.
            strict: False keeps initial values for missing keys and ignores unexpected ones, with a warning.

        Raises:
            ConfigError: with `strict`, the list of keys missing, unexpected or of another shape.
        """
        from stdit_fast.model.checkpoints import Mismatch

        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("ignore_mismatched_sizes", True)  # gathered and raised below, all at once
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        mismatch = Mismatch.from_loading_info(info)
        if mismatch and strict:
            raise ConfigError("checkpoint", str(path), mismatch.describe())
        if mismatch:
            logger.warning("%s: %s", path, mismatch.describe())
        return (model, info) if wants_info else model

    @classmethod
    def from_open_sora(cls, path, *, strict: bool = True, **config_changes) -> "STDiT2":
        """An Open-Sora 1.1 checkpoint (folder, .safetensors or .pt), both legacy flags set.

        See `stdit_fast.model.checkpoints.load_open_sora`.
        """
        from stdit_fast.model.checkpoints import load_open_sora

        return load_open_sora(path, strict=strict, **config_changes)

    @classmethod
    def from_pixart(cls, path, config: STDiT2Config | None = None, *, strict: bool = True) -> "STDiT2":
        """A model that starts from a PixArt-alpha checkpoint; see `stdit_fast.model.checkpoints.load_pixart`."""
        from stdit_fast.model.checkpoints import load_pixart

        return load_pixart(path, config, strict=strict)


def _select_frames(t: Tensor, t_zero: Tensor | None, x_mask: Tensor | None) -> Tensor:
    """[B, K] for frames to generate and for condition frames to [B, 1 or T, K]."""
    if x_mask is None:
        return t[:, None]
    return torch.where(x_mask[:, :, None], t[:, None], t_zero[:, None])
