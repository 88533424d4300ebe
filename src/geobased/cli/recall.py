"""`geobased recall`: what a model recalls of what stands in its context."""

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import recall_benchmark, recall_calibration, recall_mqar
from .errors import CommandError
from .options import Debug, Device, Json, Model, add_command, show_help
from .recall_twins import add_twins
from .sources import DEFAULT_MODEL, load_model, load_tokenizer, parse_device, parse_dtype, resolve_model

app = typer.Typer(callback=show_help, invoke_without_command=True, help="Measure recall from what stands in the context.")
EXAMPLES = (
    "geobased recall gazetteer",
    "geobased recall gazetteer --model ./my-model --num-documents 500 --json --plot recall.png",
    "geobased recall gazetteer --write-documents train.jsonl --num-documents 50000 --seed 7 --counterfactual 0.9"
    " --counterfactual-names 0.9",
)
NUM_EVALUATED, NUM_WRITTEN = 200, 10_000


def gazetteer(
    model: Model = DEFAULT_MODEL,
    num_documents: Annotated[
        int | None,
        typer.Option(min=1, help=f"Documents; {NUM_EVALUATED} to evaluate, {NUM_WRITTEN} to write.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the documents.")] = 1,
    max_words: Annotated[int, typer.Option(min=40, help="Most words of a document.")] = 400,
    max_records: Annotated[int, typer.Option(min=2, help="Most places in a document.")] = 24,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longer documents are left out of an evaluation.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents at a time.")] = 16,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
    device: Device = "auto",
    json_output: Json = False,
    plot: Annotated[Path | None, typer.Option(help="PNG to draw: recall over distance.", show_default=False)] = None,
    write_documents: Annotated[
        Path | None,
        typer.Option(help="Write documents for training to this JSON-lines file and evaluate nothing.", show_default=False),
    ] = None,
    split: Annotated[str, typer.Option(help="Places of written documents: train, held_out or all.")] = "train",
    counterfactual: Annotated[
        float, typer.Option(min=0, max=1, help="Share of written documents whose places carry values of other places.")
    ] = 0.0,
    counterfactual_names: Annotated[
        float, typer.Option(min=0, max=1, help="Share of written documents whose places carry names made of parts of real ones.")
    ] = 0.0,
    debug: Debug = False,
) -> None:
    """Ask a model for facts about held-out places that stand in its context, or write such documents.

    Prints the share of answers that greedy decoding gets exactly right, with its 95 % interval.
    """
    sizes: dict[str, Any] = {"seed": seed, "max_words": max_words, "max_records": max_records}
    if write_documents is not None:
        sizes |= {"counterfactual": counterfactual, "counterfactual_names": counterfactual_names}
        report = _write_documents(write_documents, num_documents or NUM_WRITTEN, split, sizes)
        print(json.dumps(report) if json_output else f"{write_documents}: {report['bytes']:,} bytes")
        return
    if plot is not None and not plot.resolve().parent.is_dir():
        raise CommandError(f"--plot {plot}: there is no folder {plot.parent}")
    if plot is not None:
        importlib.import_module("matplotlib")  # an extra: better missed now than after the evaluation
    parse_dtype(dtype)
    place, source = parse_device(device), resolve_model(model)
    tokenizer = load_tokenizer(model, source)
    loaded = load_model(model, source, dtype, place)
    from geobased.recall.gazetteer_documents import generate_documents
    from geobased.recall.gazetteer_recall import evaluate_recall, plot_recall_by_distance
    from geobased.recall.places import load_places

    number = num_documents or NUM_EVALUATED
    documents = list(generate_documents(load_places("held_out"), number, seed, max_words, max_records=max_records))
    recall = evaluate_recall(loaded, tokenizer, documents, batch_size=batch_size, max_tokens=max_tokens)
    if plot is not None:
        plot_recall_by_distance({Path(model).name: recall}, plot)
    settings = {
        "model": model,
        "num_documents": number,
        "max_tokens": max_tokens,
        "device": str(place),
        "dtype": str(loaded.dtype),
    }
    report = {"arguments": settings | sizes, "recall": recall.to_dict()}
    print(json.dumps(_without_nan(report)) if json_output else _table(model, report["recall"]))


add_command(app, "gazetteer", gazetteer, EXAMPLES)
add_command(app, "mqar", recall_mqar.mqar, recall_mqar.EXAMPLES)
add_command(app, "gazetteer-benchmark", recall_benchmark.gazetteer_benchmark, recall_benchmark.BENCHMARK_EXAMPLES)
add_command(app, "repeated-bigrams", recall_benchmark.repeated_bigrams, recall_benchmark.BIGRAMS_EXAMPLES)
add_command(app, "calibration", recall_calibration.calibration, recall_calibration.EXAMPLES)
add_command(app, "lm-eval", recall_benchmark.run_harness, recall_benchmark.HARNESS_EXAMPLES)
add_command(app, "lm-eval-tasks", recall_benchmark.lm_eval_tasks, recall_benchmark.TASKS_EXAMPLES)
add_twins(app)


def _write_documents(path: Path, num_documents: int, split: str, sizes: dict[str, Any]) -> dict[str, Any]:
    from geobased.recall.gazetteer_documents import WriteDocumentsArguments, write_documents

    if split not in ("train", "held_out", "all"):
        raise CommandError(f"--split {split!r} is not one of train, held_out, all")
    if split != "train":
        print("note: places that are held out must not be trained on", file=sys.stderr)
    return write_documents(WriteDocumentsArguments(output=str(path), num_documents=num_documents, split=split, **sizes))


def _without_nan(item: Any) -> Any:
    """JSON has no NaN, which stands for the accuracy of no questions."""
    if isinstance(item, dict):
        return {key: _without_nan(value) for key, value in item.items()}
    return None if isinstance(item, float) and math.isnan(item) else item


def _table(model: str, recall: dict[str, Any]) -> str:
    rows = [f"{model}: answers recalled exactly, {recall['num_documents']} documents of held-out places"]
    sections = (
        ("", {"overall": recall["overall"]}),
        ("by field", recall["by_field"]),
        ("by tokens between record and answer", recall["by_distance"]),
        ("without the record", {"overall": recall["closed_book"]["overall"]} if recall["closed_book"] else {}),
    )
    for title, section in sections:
        counted = {name: entry for name, entry in section.items() if entry["num_questions"]}
        rows += [title] if title and counted else []
        for name, entry in counted.items():
            interval = f"{100 * entry['low']:.1f} to {100 * entry['high']:.1f}"
            rows.append(f"  {name:<14}{100 * entry['accuracy']:>6.1f} %   ({interval}; {entry['num_questions']:,} questions)")
    return "\n".join(rows)
