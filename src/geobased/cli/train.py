"""`geobased train`: each command hands its arguments to a training module."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
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
    arguments_class: type | tuple[type, ...],
    work: Callable[..., dict[str, Any]],
    examples: tuple[str, ...],
    *,
    settings_file: bool = False,
    defaults: tuple[str, ...] = (),
) -> None:
    """Reads the command's arguments into `arguments_class`, calls `work`, and prints what it returns.

    Of several classes `work` gets one object each. With `settings_file` there is an option --config: a YAML file of arguments,
    which those of the command line override. `defaults` are arguments that both override.

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
    classes = arguments_class if isinstance(arguments_class, tuple) else (arguments_class,)
    if "debug" not in {field.name for part in classes for field in dataclasses.fields(part)}:
        parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    words = list(context.args)
    if settings_file:
        parser.add_argument("--config", help="YAML file of these arguments; those of the command line override it.")
        words = _with_settings(words, context.command_path)
    words = [*defaults, *words]
    *arguments, shared, unknown = parser.parse_args_into_dataclasses(args=words, return_remaining_strings=True)
    if unknown:
        raise CommandError(f"No such option or argument: {unknown[0]} (see `{context.command_path} --help`)")
    with contextlib.redirect_stdout(sys.stderr):
        result = work(*arguments)
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes one prints
    print(json.dumps(result, ensure_ascii=False) if shared.json else "\n".join(_lines(result)))


def _with_settings(words: list[str], command: str) -> list[str]:
    """The arguments of the file after --config, if there is one, before those of the command line."""
    place = next((i for i, word in enumerate(words) if word == "--config" or word.startswith("--config=")), None)
    if place is None:
        return words
    named = words[place].partition("=")[2] or next(iter(words[place + 1 :]), "")
    path = Path(named)
    if not path.is_file():
        raise CommandError(f"--config: there is no file {named!r} (see `{command} --help`)")
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise CommandError(f"{path} is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise CommandError(f"{path} must hold names and values, such as `model: based-mini`")
    found: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        found += [f"--{name}", *map(str, values)] if values else []
    return [*found, *words]


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
