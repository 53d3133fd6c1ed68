"""What the commands that generate share: their options, the engine, and how text is written."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from .common import console, errors

if TYPE_CHECKING:
    from ..engine.llm import LLM
    from ..engine.sampling import SamplingParams

ModelArgument = Annotated[
    str | None,
    typer.Argument(help="A folder, a .gguf file, a hub id or a run of `train`; the embedded model by default."),
]
MaxTokens = Annotated[int, typer.Option(min=0, help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopK = Annotated[int, typer.Option(min=0, help="Keep the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens that together reach this probability.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")]
Seed = Annotated[int | None, typer.Option(min=0, help="The same seed gives the same text.")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
DTypeName = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
CacheTokens = Annotated[int | None, typer.Option(min=1, help="Size of the KV cache; by default what fits.")]


def open_engine(
    model: str | None, device: str, dtype: str, max_cache_tokens: int | None, params: "SamplingParams"
) -> "LLM":  # fmt: skip
    """An engine for one sequence at a time. On a GPU it has captured its step: the lines that say so come before any text."""
    from ..engine.llm import LLM

    with model_folder(model) as folder:
        llm = LLM(folder, device=device, dtype=dtype, max_cache_tokens=max_cache_tokens, max_batch=1)
    if llm.device.type == "cuda":
        llm.generate([0], replace(params, max_tokens=3, ignore_eos=True, stop=()))
    return llm


@contextmanager
def model_folder(model: str | None) -> Iterator[str | None]:
    """What to load for `model`: itself, or for the folder of a training run its last checkpoint, written to a folder for so long."""
    run = Path(model or "")
    if model is None or not ((run / "config.toml").is_file() and (run / "checkpoints").is_dir()):
        yield model
        return
    from ..train.export import export

    with TemporaryDirectory(prefix="llama-fast-") as folder:
        taken = export(run, Path(folder) / "model")
        errors.print(f"{taken.name} of {run}", style="dim", highlight=False, markup=False)
        yield str(Path(folder) / "model")


def write(text: str) -> None:
    """Text as it is: no markup, no wrapping, at once."""
    console.file.write(text)
    console.file.flush()
