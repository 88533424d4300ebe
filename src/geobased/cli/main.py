"""The `geobased` command."""

import sys
from typing import Annotated

import typer

from . import conversion, demo, doctor, evaluate, generate, locate, recall, train, train_geolocation
from .errors import ClearErrorsGroup
from .options import EXIT_CODES, epilog, show_help

app = typer.Typer(
    cls=ClearErrorsGroup,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=EXIT_CODES,
    invoke_without_command=True,
)
app.command("generate", epilog=epilog(*generate.EXAMPLES))(generate.generate)
app.command("locate", epilog=epilog(*locate.EXAMPLES))(locate.locate)
app.command("evaluate", epilog=epilog(*evaluate.EXAMPLES))(evaluate.evaluate)
app.command("convert", epilog=epilog(*conversion.CONVERT_EXAMPLES))(conversion.convert)
app.command("export", epilog=epilog(*conversion.EXPORT_EXAMPLES))(conversion.export)
app.command("push", epilog=epilog(*conversion.PUSH_EXAMPLES))(conversion.push)
app.command("doctor", epilog=epilog(*doctor.EXAMPLES))(doctor.doctor)
train_geolocation.register(train.app)
app.add_typer(train.app, name="train", epilog=EXIT_CODES)
app.add_typer(recall.app, name="recall", epilog=EXIT_CODES)
app.add_typer(demo.app, name="demo", epilog=EXIT_CODES)


def _print_version(wanted: bool) -> None:
    if wanted:
        from geobased import __version__

        print(f"geobased {__version__}")
        raise typer.Exit()


@app.callback()
def geobased(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """BASED language models and image geolocalization: generate, locate, convert, export, train and measure."""
    show_help(context)


def main() -> None:
    """Entry point of the `geobased` script."""
    # text may hold characters that the terminal's encoding lacks
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    app()


if __name__ == "__main__":
    main()
