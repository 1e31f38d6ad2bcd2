"""How many blocks a batch has to recompute to fit into the GPU's memory: `set_checkpointing("auto")`."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from stdit_fast.model.arena import Arena
from stdit_fast.ops import use_kernel

# What a block keeps for its backward pass, in units of one value per token and channel: the residual stream four
# times, q, k, v and output of both attentions, q and output of cross attention, the three outputs that gates multiply,
# and the hidden values of the MLP, mlp_ratio times.
KEPT_UNITS = 4 + 4 + 4 + 2 + 3
# Plain PyTorch keeps much more; measured, in the same units.
_KEPT_UNITS_REFERENCE = 45
# At the peak one block's backward pass has its gradients beside what was kept; 18 were seen.
_WORK_UNITS = 20
# The allocator cannot use every byte: blocks of many sizes come and go. An arena is one piece.
_FRAGMENTATION = 0.04
_FRAGMENTATION_BESIDE_ARENA = 0.02
_TRANSIENT_UNITS = 6  # of one block's forward pass, beside what is kept
_FIXED = 1 << 30  # libraries' workspaces, latents
# What recomputing all blocks adds to a step, and what a further pass does beside its tokens, in tokens. Of an H100's
# steps whole and in single samples: 480p, 16 frames, batch 4 (19 blocks or none) 1,242 and 1,076 ms; 720p, batch 2 (21
# or 11) 1,643 and 1,533 ms.
_RECOMPUTATION = 0.225
_TOKENS_OF_A_PASS = 1000
LEAST_TOKENS = 16384  # of a pass: below, the CPU's launches take longer


def blocks_to_checkpoint(model: nn.Module, tokens: Tensor, planned: int, arena: Arena | None = None) -> int:
    """The number of blocks that must be recomputed so that the step fits on the tokens' GPU.

    Args:
        model: with `blocks` and `config`.
        tokens: [B, T, S, C], the input of the first block.
        planned: bytes that training holds beside activations, `training_bytes`.
        arena: what the forward pass allocates from; None: all of the GPU's memory.
    """
    unit, kept, blocks = _unit(tokens), kept_units(model.config, tokens), len(model.blocks)
    if arena is None:
        return blocks_for_budget(_budget(model, tokens, planned), unit, blocks, kept)
    text = text_bytes(model.config, len(tokens))
    fitting = (count for count in range(blocks + 1) if held_in_arena(unit, blocks, kept, count, text) <= arena.usable)
    return next(fitting, blocks)


def room_for_activations(
    model: nn.Module, tokens: Tensor, planned: int, checkpointed: int, arena: Arena | None = None
) -> bool:
    """Whether the blocks that are not recomputed can keep the activations of their MLPs too; as above."""
    unit, kept, blocks = _unit(tokens), kept_units(model.config, tokens) + model.config.mlp_ratio, len(model.blocks)
    if arena is None:
        return needed_bytes(unit, blocks, kept, checkpointed) <= _budget(model, tokens, planned)
    return held_in_arena(unit, blocks, kept, checkpointed, text_bytes(model.config, len(tokens))) <= arena.usable


def samples_at_once(model: nn.Module, shape: torch.Size, like: Tensor, held: float) -> int:
    """How many samples of a batch to run at once: fewer where that is faster than recomputing blocks of all.

    It depends on nothing that changes during a run.

    Args:
        shape: [B, T, S, C] of the batch's tokens; like: of their GPU and dtype.
        held: bytes that training holds beside activations, with all gradients.
    """
    samples, tokens_each = shape[0], shape[1:3].numel()
    blocks, config = len(model.blocks), model.config
    limit = (1 - _FRAGMENTATION_BESIDE_ARENA) * memory_limit(like.device.index) - held - _FIXED - Arena.BESIDE

    def cost(count: int) -> float:  # of a pass, in tokens
        x = like.new_empty(()).expand(count, *shape[1:])
        text = text_bytes(config, count)
        usable = Arena.USABLE * (limit - work_bytes(model, x))
        kept, unit = kept_units(config, x), _unit(x)
        fitting = (n for n in range(blocks + 1) if held_in_arena(unit, blocks, kept, n, text) <= usable)
        return count * tokens_each * (1 + _RECOMPUTATION * next(fitting, blocks) / blocks) + _TOKENS_OF_A_PASS

    best, least = samples, cost(samples)
    for passes in range(2, samples + 1):
        small, larger = divmod(samples, passes)
        if small * tokens_each < LEAST_TOKENS:
            break
        found = larger * cost(small + 1) + (passes - larger) * cost(small)
        if found < least:
            best, least = small + (larger > 0), found
    return best


def held_in_arena(unit: int, blocks: int, kept: float, count: int, text: float) -> float:
    """Bytes of a forward pass of which `count` blocks are recomputed, also in an arena; the text's keys and values."""
    return unit * (max((blocks - count) * kept, kept) + 2 * count + _TRANSIENT_UNITS) + text


def step_bytes(model: nn.Module, tokens: Tensor) -> float:
    """Bytes of a forward pass in an arena where nothing is recomputed."""
    kept = kept_units(model.config, tokens) + model.config.mlp_ratio
    return held_in_arena(_unit(tokens), len(model.blocks), kept, 0, text_bytes(model.config, len(tokens)))


def work_bytes(model: nn.Module, tokens: Tensor) -> float:
    """Bytes that a step needs outside of an arena: of the backward pass, with the gradients of keys and values of text.

    Those come block by block and are joined at the end.
    """
    return _WORK_UNITS * _unit(tokens) + 2 * text_bytes(model.config, len(tokens))


def graph_bytes(model: nn.Module, tokens: Tensor) -> float:
    """Bytes of both passes' graphs in an arena, the gradients of parameters among them, which are copied from there."""
    return step_bytes(model, tokens) + work_bytes(model, tokens) + gradient_bytes(model)


def room_beside(model: nn.Module, device: torch.device, planned: int, arena: int = 0) -> float:
    """Bytes for what steps need beside an arena of that size; with 0, for both."""
    missing = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad and p.grad is None)
    held = max(torch.cuda.memory_allocated(device) + missing, planned)
    return (1 - _FRAGMENTATION_BESIDE_ARENA) * memory_limit(device.index) - held - _FIXED - arena


def _unit(tokens: Tensor) -> int:
    """Bytes of one value per token and channel."""
    return tokens.numel() * tokens.element_size()


def _budget(model: nn.Module, tokens: Tensor, planned: int) -> float:
    """Bytes that activations can have."""
    # What is there already counts as it is; what training has yet to allocate (before its first step) as planned.
    held = max(torch.cuda.memory_allocated(tokens.device), planned)
    if getattr(model, "graphs", None) is not None:
        held += model.graphs.reserved_bytes
    return activation_budget(memory_limit(tokens.device.index), held, text_bytes(model.config, len(tokens)))


def activation_budget(limit: float, held: float, text: float) -> float:
    """Bytes that activations can have of `limit`, where so many are held by weights and states, and taken by text."""
    return (1 - _FRAGMENTATION) * limit - held - text - _FIXED


def text_bytes(config, samples: int) -> int:
    """Bytes of the text's keys and values for all blocks, in 16 bits, where every caption has all its tokens.

    A step of images was seen to take three quarters of that beside what its tokens take, 19 MB a caption of 200 tokens.
    """
    return samples * config.model_max_length * config.depth * 2 * config.hidden_size * 2


def blocks_for_budget(budget: float, unit: int, blocks: int, kept: float) -> int:
    """The fewest of `blocks` to recompute, where each of the others keeps `kept` units and each of these two.

    Args:
        budget: bytes for activations; `unit`: bytes of one value per token and channel.
    """
    fitting = (count for count in range(blocks + 1) if needed_bytes(unit, blocks, kept, count) <= budget)
    return next(fitting, blocks)


def needed_bytes(unit: int, blocks: int, kept: float, count: int) -> float:
    """Bytes at the peak where `count` blocks are recomputed."""
    # The last blocks' backward passes are over, and their memory is free, when the first is recomputed.
    held = max((blocks - count) * kept, kept)
    return unit * (held + 2 * count + _WORK_UNITS)


def kept_units(config, tokens: Tensor) -> float:
    """Units that one block keeps for its backward pass."""
    if not use_kernel("modulated_linear", config.backend, tokens, config.hidden_size):
        return _KEPT_UNITS_REFERENCE
    return KEPT_UNITS + config.mlp_ratio


def training_bytes(model: nn.Module, reserve: int | None) -> int:
    """Bytes of parameters and of what else training holds beside activations; see `STDiT2.set_checkpointing`."""
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return parameters + (training_reserve(model) if reserve is None else reserve)


def training_reserve(model: nn.Module) -> int:
    """Bytes of gradients, AdamW's states with float32 masters, and the average, the last two sharded over all ranks."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return gradient_bytes(model) + count * (4 + 4 + 4 + 4) // ranks


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients of all parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


@lru_cache
def memory_limit(device: int) -> int:
    """Bytes that this process can have: the device's, less what others hold, at most its allowed fraction."""
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    return min(free + ours, int(total * torch.cuda.get_per_process_memory_fraction(device)))


def hold_to(gib: float) -> None:
    """Has this process use at most so much of its GPU, as if that were a smaller one."""
    total = torch.cuda.get_device_properties().total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))
    memory_limit.cache_clear()
