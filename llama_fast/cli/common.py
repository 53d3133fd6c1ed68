"""What every command of the command line shares: where it prints, how it fails, how it writes a file, options in groups."""

import errno
import os
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial, wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, help="CPU threads; PyTorch's choice by default.", callback=lambda n: _use_threads(n)
    ),
]

T = TypeVar("T")

console = Console()
errors = Console(stderr=True)


def fail(message: str) -> typer.Exit:
    """Prints an error for the user and gives the exit to raise."""
    errors.print(f"[red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(2)


def _use_threads(count: int | None) -> int | None:
    if count is not None:
        most = 4 * (os.cpu_count() or 1)  # more than CPUs only wait for each other; 100,000 end the process
        if count > most:
            raise fail(
                f"--threads: {count} are too many for the {os.cpu_count()} CPUs of this machine; give at most {most}"
            )
        import torch

        torch.set_num_threads(count)
    return count


def require_writable(option: str, path: Path, *, folder: bool = True) -> None:
    """Raises the exit for the user if no folder, or no file, can be written at `path`: before an hour of measuring, not after it."""
    if folder and path.exists() and not path.is_dir():
        raise fail(f"{option}: {path} is a file, and must be a folder")
    if not folder and path.is_dir():
        raise fail(f"{option}: {path} is a folder, and must be a file")
    there = path if path.is_dir() else path.absolute().parent
    if not there.is_dir():
        raise fail(f"{option}: the folder {there} does not exist")
    if not os.access(there, os.W_OK | os.X_OK):
        raise fail(f"{option}: no permission to write to {there}")


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes groups of options, for typer: each parameter that is a dataclass is given by its fields."""
    own = signature(command)
    groups: dict[str, Any] = {
        name: each.annotation for name, each in own.parameters.items() if is_dataclass(each.annotation)
    }
    spread = [
        option.replace(kind=Parameter.KEYWORD_ONLY)
        for name, each in own.parameters.items()
        for option in (signature(groups[name]).parameters.values() if name in groups else [each])
    ]

    @wraps(command)
    def run(**given: Any) -> None:
        made = {
            name: group(**{each.name: given.pop(each.name) for each in fields(group)}) for name, group in groups.items()
        }
        command(**made, **given)

    run.__signature__ = own.replace(parameters=spread)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in spread}
    return run


def has_input() -> bool:
    """Whether something comes from stdin: a pipe or a file is there, which is no terminal and was not closed."""
    return sys.stdin is not None and not sys.stdin.isatty()


def read_measured(path: Path, kind: type[T], made_by: str) -> T:
    """What another command has measured and written. Raises the exit for the user if it cannot be read or is something else."""
    from ..reports.jsonfile import read_json

    try:
        return read_json(path, kind)
    except FileNotFoundError:
        reason = f"{path} does not exist"
    except OSError as error:
        reason = f"{path} cannot be read: {error.strerror}"
    except ValueError as error:
        reason = str(error)
    raise fail(f"{reason}. Give a file that {made_by} has written")


def _only_choices(type_shown: Callable[..., str | None], *args: Any, **kwargs: Any) -> str | None:
    shown = type_shown(*args, **kwargs)
    return shown.strip("<>") if shown and "|" in shown else None


class _Context(typer.Context):
    @property
    def command_path(self) -> str:
        return super().command_path.rstrip()  # the name of a group's default command is empty


class _PlainHelp:
    """Help in words: of the types that typer shows beside an option only a list of choices says more than its text."""

    context_class: Any = _Context

    def get_params(self, ctx: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if hasattr(parameter, "display_type_rich"):  # of typer since 0.29
                parameter.display_type_rich = partial(_only_choices, parameter.display_type_rich)
                parameter._get_number_range_help_str = lambda: None
        return parameters


class Command(_PlainHelp, TyperCommand):
    """A command of ours. A wrong environment variable is its user's error, wherever it is found, and so is a full disk."""

    def invoke(self, ctx: Any) -> Any:
        from ..kernels.variables import EnvironmentVariableError

        try:
            return super().invoke(ctx)
        except EnvironmentVariableError as error:
            raise fail(str(error)) from None
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise fail(f"the disk is full: {error.filename or 'the output'} could not be written") from None


class Group(_PlainHelp, TyperGroup):
    """A group of commands."""


class GroupWithDefault(Group):
    """Commands of which the first one registered runs where none is named: `profile MODEL` beside `profile compare A B`.

    Its help is the group's, so it should name the others (`epilog=`).
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = [next(iter(self.commands)), *args]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return ("" if name == next(iter(self.commands)) else name), command, rest
