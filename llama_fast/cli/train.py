"""`llama-fast train`: a model from shards of tokens, and what a run has learnt as a folder to use."""

from pathlib import Path
from typing import Annotated

import typer

from .common import Command, GroupWithDefault, Threads, console, fail

app = typer.Typer(
    cls=GroupWithDefault,
    help="Train a model on shards of tokens; `llama-fast train export RUN FOLDER` writes what it has learnt.",
    add_completion=False,
)


@app.command(cls=Command)
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file.", show_default=False)],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: --set optimizer.lr=3e-4. Repeatable."),
    ] = None,
    threads: Threads = None,
) -> None:
    """Train a model, or go on with a run where it was interrupted.

    On several processes: `torchrun --nproc-per-node 2 -m llama_fast.train CONFIG`, with the same options.

    `llama-fast train export RUN FOLDER` has its own --help.
    """
    from ..config_file import read_config
    from ..train.config import TrainConfig
    from ..train.loop import Diverged, train
    from ..train.ranks import number_of_this, told_by_this

    try:
        outcome = train(read_config(config, TrainConfig, settings or []), show=_show)
    except KeyboardInterrupt:
        if number_of_this():
            raise typer.Exit(2) from None
        raise fail("interrupted before the checkpoint was written: the run goes on from the one before it") from None
    except (Diverged, OSError, ValueError) as error:
        raise fail(told_by_this(str(error))) from None
    show = _silent if number_of_this() else _show
    progress = outcome.progress
    best = "" if progress.best is None else f", best {progress.best:.4f} bits per byte at step {progress.best_step}"
    if outcome.interrupted is not None:
        show(f"{'saved' if progress.step else 'stopped'} after step {progress.step}{best}; the same command goes on")
        raise typer.Exit(128 + outcome.interrupted)
    show(f"done after step {progress.step}{best}")


@app.command(cls=Command)
def export(
    run_folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run (run.out).", show_default=False)
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new or empty folder.", show_default=False)],
    step: Annotated[
        int | None, typer.Option(min=1, help="Which checkpoint; the last one by default.", show_default=False)
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Only the adapter of a run with [lora], as PEFT's folder.")
    ] = False,
) -> None:
    """Write the model of a run, with its tokenizer, to a folder that `llama-fast generate` and transformers load.

    The adapters of a run with [lora] are merged into it.
    """
    from ..train.export import export as write

    try:
        taken = write(run_folder, folder, step=step, adapter=adapter)
    except (OSError, ValueError) as error:
        raise fail(str(error)) from None
    _show(f"{taken.name} written to {folder}")


def _show(line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _silent(line: str) -> None:
    pass
