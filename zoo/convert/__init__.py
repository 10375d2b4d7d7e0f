"""Weights in and out: Hugging Face's directories and our own, read and written as streams."""

from zoo.convert.loading import from_hf, load
from zoo.convert.saving import save, to_hf
from zoo.convert.source import load_config

__all__ = ["from_hf", "load", "load_config", "save", "to_hf"]
