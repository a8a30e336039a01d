"""Prompt tuning for every modality: the thin core."""
