"""Prompt tuning for vision-language models. Names are loaded when they are first used."""
