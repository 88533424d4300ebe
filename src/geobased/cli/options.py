"""Options that several commands share, and the end of every help text."""

from typing import Annotated

import typer

from .errors import BAD_INPUT

EXIT_CODES = "\b\nExit codes: 0 done; 1 failed while working (network, memory); 2 wrong usage or input; 130 interrupted."

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing destination.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …; auto takes a GPU where there is one.")]
MODEL_HELP = "A folder, a checkpoint that ships with geobased, or a Hub id."


def show_help(context: typer.Context) -> None:
    """Called without a command: the help, and the exit code of wrong usage."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(BAD_INPUT)


def epilog(*examples: str) -> str:
    """Examples, then the exit codes; \\b keeps the lines as they are."""
    return "\n".join(["\b", "Examples:", *(f"  {example}" for example in examples), "", EXIT_CODES])
