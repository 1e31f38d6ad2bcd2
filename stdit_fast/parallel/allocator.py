"""How PyTorch's allocator takes memory from a GPU, as training wants it, and the one place that reads its variables."""

import os

import torch

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the first's older name
_SETTING = "expandable_segments:True"


def expand_segments() -> str:
    """Has the allocator keep memory in segments that grow and shrink by pages, where nothing says otherwise.

    As it comes, it takes a segment for each large tensor, which no larger tensor can use later and smaller ones use in
    part: buckets of many sizes leave gaps that add up to gigabytes. Pages of gaps can go elsewhere.

    Returns:
        What was done, in words, or why nothing was.
    """
    if not torch.cuda.is_available():
        return "memory is the CPU's"
    named = [name for name in VARIABLES if os.environ.get(name)]
    if named:
        return f"GPU memory as {named[0]}={os.environ[named[0]]} has it"
    if torch.cuda.is_initialized():
        return f"GPU memory is in segments of fixed size, as this process began: {VARIABLES[0]}={_SETTING} changes that"
    torch._C._accelerator_setAllocatorSettings(_SETTING)
    return f"GPU memory is in expandable segments; {VARIABLES[0]} would say otherwise"
