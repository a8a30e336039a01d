"""Prompt tuning for text and code."""
