"""The `geobased` command."""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from . import audit, conversion, demo, doctor, evaluate, generate, locate, push, recall, train, train_alignment, train_geolocation
from .errors import ClearErrorsGroup
from .options import EXIT_CODES, add_command, show_help

LANGUAGE, PLACES, BOTH, SHARING = "Language models", "Geolocalization", "Language models and geolocalization", "Setup and sharing"
READ_ON = f"""\b
Read on:
  geobased COMMAND --help   options and examples of a command
  geobased doctor           whether all is set up here, and how to mend what is not
  README.md, docs/          in the source: models, kernels, measurements, limits

{EXIT_CODES}"""


class GroupedHelp(ClearErrorsGroup):
    """Shows the commands under headings."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for heading in (LANGUAGE, PLACES, BOTH, SHARING):
            with formatter.section(heading):
                commands = [pair for pair in self.commands.items() if getattr(pair[1], "rich_help_panel", None) == heading]
                # whole sentences, over several lines if need be
                formatter.write_dl([(name, command.get_short_help_str(200)) for name, command in commands])


app = typer.Typer(
    cls=GroupedHelp,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog=READ_ON,
    invoke_without_command=True,
)
add_command(app, "generate", generate.generate, generate.EXAMPLES, LANGUAGE)
app.add_typer(recall.app, name="recall", epilog=EXIT_CODES, rich_help_panel=LANGUAGE)
add_command(app, "convert", conversion.convert, conversion.CONVERT_EXAMPLES, LANGUAGE)
add_command(app, "export", conversion.export, conversion.EXPORT_EXAMPLES, LANGUAGE)
add_command(app, "locate", locate.locate, locate.EXAMPLES, PLACES)
add_command(app, "evaluate", evaluate.evaluate, evaluate.EXAMPLES, PLACES)
train_alignment.register()
train_geolocation.register()
app.add_typer(train.app, name="train", epilog=EXIT_CODES, rich_help_panel=BOTH)
app.add_typer(demo.app, name="demo", epilog=EXIT_CODES, rich_help_panel=BOTH)
app.add_typer(audit.app, name="audit", epilog=EXIT_CODES, rich_help_panel=BOTH)
# tells also why geobased's models cannot be registered, if they cannot
add_command(app, "doctor", doctor.doctor, doctor.EXAMPLES, SHARING, cls=TyperCommand)
add_command(app, "push", push.push, push.EXAMPLES, SHARING)


def _print_version(wanted: bool) -> None:
    if wanted:
        from geobased._version import __version__

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
    """BASED language models and image geolocalization.

    Two models ship with the package; these run at once, without a network:

    \b
      geobased generate "The population of Lund is 94,393. Question: What is the population of Lund? Answer:"
      geobased locate picture-from-space.png --map map.html
    """
    show_help(context)


def main() -> None:
    """Runs the command that the process was started with; the `geobased` script comes here by `geobased_command`."""
    # text may hold characters that the terminal's encoding lacks
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    app()


if __name__ == "__main__":
    main()
