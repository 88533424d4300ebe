"""`geobased train`: each command hands its arguments to a training module."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from .errors import CommandError
from .options import add_command, epilog, show_help

app = typer.Typer(callback=show_help, invoke_without_command=True, help="Train models; see `geobased train lm --help`.")
# --help goes through as well: the training module knows its options
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
LM_EXAMPLES = (
    "geobased train lm --help",
    "geobased train lm --config config.json --tokenizer ./tokenizer --text book.txt --max_steps 1000 --output_dir runs/mini",
    "geobased train lm --config config.json --tokenizer ./tokenizer --text book.txt --output_dir runs/mini --resume",
    "geobased train lm --config config.json --tokenizer ./tokenizer --text book.txt --output_dir runs/mini --json > run.json",
)
SUMMARY = ("parameters", "steps", "stopped_early", "seconds", "tokens_per_second", "sources", "metrics")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the examples and shows defaults."""


def run_training(
    context: typer.Context,
    arguments_class: type,
    work: Callable[[Any], dict[str, Any]],
    examples: tuple[str, ...],
) -> None:
    """Reads the command's arguments into `arguments_class`, calls `work`, and prints what it returns.

    With `--json` that is one JSON document; everything that the training itself prints goes to standard error.
    """
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise CommandError(f"{message} (see `{context.command_path} --help`)")

    parser = Parser(
        arguments_class,  # type: ignore[arg-type]
        prog=context.command_path,
        description=context.command.help,
        epilog=epilog(*examples).replace("\b\n", ""),
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON document on standard output.")
    if "debug" not in {field.name for field in dataclasses.fields(arguments_class)}:
        parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    arguments, shared, unknown = parser.parse_args_into_dataclasses(args=context.args, return_remaining_strings=True)
    if unknown:
        raise CommandError(f"No such option or argument: {unknown[0]} (see `{context.command_path} --help`)")
    with contextlib.redirect_stdout(sys.stderr):
        result = work(arguments)
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes one prints
    print(json.dumps(result, ensure_ascii=False) if shared.json else "\n".join(_lines(result)))


def _lines(result: dict[str, Any], prefix: str = "") -> list[str]:
    """A line for each number, nested names joined by dots."""
    rows: list[str] = []
    for name, value in result.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = dict(enumerate(value, 1))
        if isinstance(value, dict):
            rows += _lines(value, f"{prefix}{name}.")
        else:
            shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            rows.append(f"{prefix}{name}: {shown}")
    return rows


def language_model(context: typer.Context) -> None:
    """Train a causal language model on text files and generated documents, with transformers' Trainer."""
    from geobased.training import language_modeling

    def work(arguments: Any) -> dict[str, Any]:
        log = language_modeling.train(arguments)
        # the mean training loss, and the last evaluation if there was one
        metrics = {name: value for entry in log["history"] for name, value in entry.items() if name.endswith("_loss")}
        return {key: value for key, value in (log | {"metrics": metrics}).items() if key in SUMMARY}

    run_training(context, language_modeling.LanguageModelingArguments, work, LM_EXAMPLES)


def add_training(name: str, function: Callable[[typer.Context], None], examples: tuple[str, ...]) -> None:
    """Adds a command whose arguments are read by `run_training`."""
    add_command(app, name, function, examples, context_settings=PASS_THROUGH, add_help_option=False)


add_training("lm", language_model, LM_EXAMPLES)
