"""`geobased recall calibration`: whether a language model is right as often as it is sure."""

import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from geobased.whole_file import whole_file

from .errors import CommandError
from .options import Debug, Device, Json, Model
from .sources import DEFAULT_MODEL, load_model, load_tokenizer, parse_device, parse_dtype, resolve_model

EXAMPLES = (
    "geobased recall calibration",
    "geobased recall calibration --model runs/superhf/final --before based-mini --plot reliability.png",
    "geobased recall calibration questions.jsonl --normalization byte --adaptive --json",
    "geobased recall calibration --write-questions questions.jsonl --num-questions 1000",
)
LABELS = {
    "accuracy": "right answers",
    "mean_confidence": "mean confidence",
    "expected_calibration_error": "calibration error",
    "brier_score": "Brier score",
    "negative_log_likelihood": "loss of the right choice",
}


def calibration(
    questions: Annotated[
        Path | None,
        typer.Argument(
            metavar="[QUESTIONS]",
            help="JSON lines: question, choices, answer (index from 0 or text). Held-out places are asked for if not given.",
            show_default=False,
        ),
    ] = None,
    model: Model = DEFAULT_MODEL,
    before: Annotated[
        str | None, typer.Option(help="Another model to measure first, such as the one that training began with.")
    ] = None,
    num_questions: Annotated[int, typer.Option(min=1, help="Questions about held-out places.")] = 500,
    seed: Annotated[int, typer.Option(help="Of these questions.")] = 1,
    normalization: Annotated[str, typer.Option(help="Divide log-likelihoods by nothing (none), token or byte.")] = "none",
    bins: Annotated[int, typer.Option(min=1, help="Bins of the confidence.")] = 15,
    adaptive: Annotated[bool, typer.Option("--adaptive", help="Bins of equally many questions instead of equal width.")] = False,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longer questions lose their beginning.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Choices at a time.")] = 16,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
    device: Device = "auto",
    json_output: Json = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG to draw: accuracy over confidence.", show_default=False)] = None,
    write_questions: Annotated[
        Path | None,
        typer.Option(help="Write the questions to this JSON-lines file and evaluate nothing.", show_default=False),
    ] = None,
    debug: Debug = False,
) -> None:
    """Ask multiple-choice questions and compare a model's confidence with how often it is right.

    The confidence is the softmax over the log-likelihoods of a question's choices. Prints accuracy, calibration error and
    scores with their 95 % intervals.
    """
    for path in (output, plot, write_questions):
        if path is not None and not path.absolute().parent.is_dir():
            raise CommandError(f"{path} cannot be written: there is no folder {path.parent}")
    if plot is not None:
        importlib.import_module("matplotlib")  # an extra: better missed now than after the evaluation
    from geobased.training import calibration as module

    if normalization not in module.NORMALIZATIONS:
        raise CommandError(f"--normalization {normalization!r} is not one of {', '.join(module.NORMALIZATIONS)}")
    asked = module.read_multiple_choice(questions) if questions else module.gazetteer_questions(num_questions, seed)
    if write_questions is not None:
        module.write_multiple_choice(asked, write_questions)
        report: dict[str, Any] = {"questions": len(asked), "output": str(write_questions)}
        print(json.dumps(report) if json_output else f"{write_questions}: {len(asked):,} questions")
        return
    parse_dtype(dtype)
    place = parse_device(device)
    found = {}
    for name in [before, model] if before else [model]:
        source = resolve_model(name)
        tokenizer = load_tokenizer(name, source)
        found[name] = module.evaluate_calibration(
            load_model(name, source, dtype, place),
            tokenizer,
            asked,
            normalization=normalization,
            bins=bins,
            adaptive=adaptive,
            batch_size=batch_size,
            max_tokens=max_tokens,
        )
    settings = {"questions": str(questions) if questions else None, "num_questions": len(asked), "seed": seed}
    report = {
        "arguments": {**settings, "max_tokens": max_tokens, "device": str(place), "dtype": dtype},
        "calibration": {name: result.to_dict() for name, result in found.items()},
    }
    if output is not None:
        with whole_file(output) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        module.plot_reliability(found, plot)
    print(json.dumps(report) if json_output else _table(report["calibration"]))


def _table(found: dict[str, Any]) -> str:
    rows = []
    for name, result in found.items():
        rows.append(f"{name}: {result['num_questions']:,} questions, log-likelihood normalised by {result['normalization']}")
        for key, label in LABELS.items():
            entry = result[key]
            rows.append(f"  {label:<26}{entry['value']:>8.3f}   ({entry['low']:.3f} to {entry['high']:.3f})")
    return "\n".join(rows)
