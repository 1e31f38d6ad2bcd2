"""Sampling: text, images and videos as prompts, any size, any length."""

from stdit_fast.sample.conditions import Condition, parse_mask_strategy
from stdit_fast.sample.pipeline import STDiT2Pipeline, STDiT2PipelineOutput
from stdit_fast.sample.prompts import Prompt, parse_prompt

__all__ = ["Condition", "Prompt", "STDiT2Pipeline", "STDiT2PipelineOutput", "parse_mask_strategy", "parse_prompt"]
