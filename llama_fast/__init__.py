"""Fused Triton kernels that make LLaMA-family decoders fast, and prove it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import native, ops
    from .engine import LLM, SamplingParams
    from .fusion import fuse, unfuse
    from .profiler.run import profile
    from .tasks import answer, complete, summarize, translate

__version__ = "0.1.0"
__all__ = [
    "LLM", "SamplingParams", "__version__", "answer", "complete", "fuse", "native", "ops", "profile", "summarize", "translate", "unfuse",
]  # fmt: skip

_HOMES = {
    "LLM": ".engine", "SamplingParams": ".engine", "profile": ".profiler.run",
    **dict.fromkeys(("answer", "complete", "summarize", "translate"), ".tasks"),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports on first use: the ops need PyTorch, `fuse` and `unfuse` transformers."""
    if name in ("native", "ops"):
        return import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    if name in ("fuse", "unfuse"):
        try:
            return getattr(import_module(".fusion", __name__), name)
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            raise ImportError(
                f'llama_fast.{name} needs transformers: pip install "llama-fast[transformers]"'
            ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
