"""Sampling: from prompts and conditions to videos."""
