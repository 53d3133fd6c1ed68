"""What the commands that generate share: their options, the engine, and how text is written."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Threads, console, errors

if TYPE_CHECKING:
    from ..engine.llm import LLM
    from ..engine.sampling import SamplingParams

Model = Annotated[str, typer.Argument(help="A folder, a .gguf file, a hub id, a run of `train`, smollm2 or embedded.")]
EMBEDDED = "embedded"
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
DTypeName = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
MaxTokens = Annotated[int, typer.Option(min=0, help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
Seed = Annotated[int | None, typer.Option(min=0, help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this string; may be given again.")]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn, as options of a command."""

    temperature: Temperature = 0.7
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k likeliest tokens; 0: all.")] = 0
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that together reach this probability.")] = 1.0
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")] = 0.0
    seed: Seed = None


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Where and how a model runs, as options of a command."""

    device: DeviceName = "auto"
    dtype: DTypeName = "auto"
    max_cache_tokens: Annotated[int | None, typer.Option(min=1, help="Size of the KV cache; by default what fits.")] = (
        None
    )
    threads: Threads = None

    def open(self, model: str | Path, **sizes: Any) -> "LLM":
        """An engine of what `model_folder` gives."""
        from ..engine.llm import LLM

        with model_folder(model) as folder:
            return LLM(folder, device=self.device, dtype=self.dtype, max_cache_tokens=self.max_cache_tokens, **sizes)

    def open_for_one(self, model: str, params: "SamplingParams") -> "LLM":
        """An engine for one sequence at a time. It has recorded its step: the line that says so comes before any text."""
        llm = self.open(model, max_batch=1)
        llm.generate([0], replace(params, max_tokens=3, ignore_eos=True, stop=()))
        return llm


@contextmanager
def model_folder(model: str | Path) -> Iterator[str | Path]:
    """What to load for `model`: itself, or for the folder of a training run its last checkpoint, written to a folder for so long."""
    run = Path(model)
    if not ((run / "config.toml").is_file() and (run / "checkpoints").is_dir()):
        yield model
        return
    from ..train.export import export

    with TemporaryDirectory(prefix="llama-fast-") as folder:
        taken = export(run, Path(folder) / "model")
        errors.print(f"{taken.name} of {run}", style="dim", highlight=False, markup=False)
        yield Path(folder) / "model"


def write(text: str) -> None:
    """Text as it is: no markup, no wrapping, at once."""
    console.file.write(text)
    console.file.flush()
