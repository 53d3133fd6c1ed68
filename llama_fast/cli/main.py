"""The command line: one thin command for each job."""

import typer

from .bench import app as bench_app
from .chat import chat
from .demo import demo
from .env import env
from .generate import generate
from .inspect import inspect
from .profile import app as profile_app

app = typer.Typer(
    help="Fused Triton kernels that make LLaMA-family decoders fast, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")
app.add_typer(profile_app, name="profile")
for command in (demo, generate, chat, env, inspect):
    app.command()(command)
