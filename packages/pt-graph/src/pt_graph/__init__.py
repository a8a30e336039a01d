"""Prompt tuning for graphs. Names are loaded when they are first used."""
