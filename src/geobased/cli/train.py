"""`geobased train`: each command hands its arguments to a training module."""

import argparse
import json

import typer

from .options import epilog, show_help

app = typer.Typer(callback=show_help, invoke_without_command=True, help="Train models; see `geobased train lm --help`.")
# --help goes through as well: the training module knows its options
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
LM_EXAMPLES = (
    "geobased train lm --help",
    "geobased train lm --config config.json --tokenizer ./tokenizer --text book.txt --max_steps 1000 --output_dir runs/mini",
    "geobased train lm --config config.json --tokenizer ./tokenizer --text book.txt --output_dir runs/mini --resume",
)
SUMMARY = ("parameters", "steps", "stopped_early", "seconds", "tokens_per_second", "sources")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the examples and shows defaults."""


@app.command("lm", context_settings=PASS_THROUGH, add_help_option=False, epilog=epilog(*LM_EXAMPLES))
def language_model(context: typer.Context) -> None:
    """Train a causal language model on text files and generated documents, with transformers' Trainer."""
    from transformers import HfArgumentParser

    from geobased.training import language_modeling

    parser = HfArgumentParser(
        language_modeling.LanguageModelingArguments,  # type: ignore[arg-type]
        prog=context.command_path,
        description=context.command.help,
        epilog=epilog(*LM_EXAMPLES).replace("\b\n", ""),
        formatter_class=_HelpFormatter,
    )
    (arguments,) = parser.parse_args_into_dataclasses(args=context.args)
    log = language_modeling.train(arguments)
    print(json.dumps({key: value for key, value in log.items() if key in SUMMARY}, indent=1))
