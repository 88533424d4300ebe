"""Options that several commands share, how commands are added, and the end of every help text."""

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from geobased.checkpoints import shipped_checkpoints

from .errors import BAD_INPUT

EXIT_CODES = """\b
Exit codes: 0 done; 1 failed while working (network, memory, a missing package);
            2 wrong usage or input; 130 interrupted."""
MODEL_HELP = "A folder, a checkpoint that ships with geobased, or a Hub id."


def complete_model(incomplete: str) -> list[str]:
    """Names of shipped checkpoints for shell completion; where none fits, the shell offers files."""
    return [name for name in shipped_checkpoints() if name.startswith(incomplete)]


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing destination.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …; auto takes a GPU where there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Model = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP, autocompletion=complete_model)]
Source = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=complete_model)]


class Command(TyperCommand):
    """A command that runs with geobased's models registered; help and completion do without."""

    def invoke(self, ctx: Any) -> Any:
        import geobased

        _ = geobased.__version__  # runs the package's __init__ if the script has put that off
        return super().invoke(ctx)


def add_command(
    app: typer.Typer,
    name: str,
    function: Callable[..., Any],
    examples: tuple[str, ...],
    group: str | None = None,
    **settings: Any,
) -> None:
    """Adds `function` as a command whose help ends with examples and exit codes.

    Args:
        app: the command it belongs to.
        name: of the command.
        function: whose parameters are the options.
        examples: command lines.
        group: heading in the help of `app`.
        settings: for typer.
    """
    settings = {"cls": Command, **settings}
    app.command(name, epilog=epilog(*examples), rich_help_panel=group, **settings)(function)


def show_help(context: typer.Context) -> None:
    """Called without a command: the help, and the exit code of wrong usage."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(BAD_INPUT)


def epilog(*examples: str) -> str:
    """Examples, then the exit codes; \\b keeps the lines as they are."""
    return "\n".join(["\b", "Examples:", *(f"  {example}" for example in examples), "", EXIT_CODES])
