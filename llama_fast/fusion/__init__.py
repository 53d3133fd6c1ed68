"""Fused layers for transformers models: `llama_fast.fuse` and `llama_fast.unfuse`. Needs transformers."""

from .model import fuse, unfuse
from .report import FuseReport, Left, Swapped

__all__ = ["FuseReport", "Left", "Swapped", "fuse", "unfuse"]
