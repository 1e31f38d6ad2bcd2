"""Clips and pictures: reading, writing, contact sheets."""
