"""The command line: one thin command for each job."""

from typing import Annotated

import typer

from .. import __version__
from .bench import app as bench_app
from .chat import chat
from .common import Command, Group, console
from .data import app as data_app
from .demo import demo
from .env import env
from .eval import app as eval_app
from .generate import generate
from .inspect import inspect
from .profile import app as profile_app
from .tasks import answer, complete, summarize, translate
from .train import app as train_app

app = typer.Typer(
    cls=Group,
    help="Fused Triton kernels that make LLaMA-family decoders fast, and prove it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        console.print(f"llama-fast {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


app.add_typer(bench_app, name="bench")
app.add_typer(profile_app, name="profile")
app.add_typer(eval_app, name="eval")
app.add_typer(data_app, name="data")
app.add_typer(train_app, name="train")
for command in (demo, generate, chat, summarize, translate, answer, complete, env, inspect):
    app.command(cls=Command)(command)
