"""Commands of `geobased recall` that measure at set lengths, with lm-evaluation-harness, or on repeated bigrams."""

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from geobased.whole_file import whole_file

from .errors import CommandError
from .options import Debug, Device, Json, Model
from .sources import DEFAULT_MODEL, load_model, load_tokenizer, parse_device, parse_dtype, quiet_transformers, resolve_model

BENCHMARK_EXAMPLES = (
    "geobased recall gazetteer-benchmark --lengths 256,512,1024",
    "geobased recall gazetteer-benchmark --model ./my-model --num-examples 250 --output recall.json --plot recall.png",
    "geobased recall gazetteer-benchmark --lengths 1024 --layouts table,card --no-contains --json",
)
HARNESS_EXAMPLES = (
    "geobased recall lm-eval --tasks geobased_gazetteer_256,geobased_gazetteer_512 --limit 50",
    "geobased recall lm-eval --model runs/superhf/final --before based-mini --tasks arc_easy,truthfulqa_mc2",
    "geobased recall lm-eval --model hazyresearch/based-360m --tasks based_swde,based_fda,based_squad --max-length 2048",
)
TASKS_EXAMPLES = (
    "geobased recall lm-eval-tasks",
    'lm_eval run --include_path "$(geobased recall lm-eval-tasks)" --tasks geobased_gazetteer_1024 \\\n'
    "    --model_args pretrained=./my-exported-model,trust_remote_code=True,max_length=8240",
)
BIGRAMS_EXAMPLES = (
    "geobased recall repeated-bigrams wikitext2_test.txt",
    "geobased recall repeated-bigrams held_out.txt --model ./my-model --training-text train.txt --threshold 1250 --json",
)
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts or windows at a time.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]


def gazetteer_benchmark(
    model: Model = DEFAULT_MODEL,
    lengths: Annotated[
        str, typer.Option(help="Tokens of a context with its question and answer.")
    ] = "256,512,1024,2048,4096,8192",
    num_examples: Annotated[int, typer.Option(min=1, help="Contexts of each length.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the contexts.")] = 1,
    layouts: Annotated[
        str | None, typer.Option(help="Some of prose, statements, card, bullets, table; all if not given.", show_default=False)
    ] = None,
    contains: Annotated[
        bool, typer.Option("--contains/--no-contains", help="Also decode, to see whether the answer occurs in what is written.")
    ] = True,
    batch_tokens: Annotated[int, typer.Option(min=1, help="About so many tokens are read at a time.")] = 16_384,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_output: Json = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG to draw: recall by length and depth.", show_default=False)] = None,
    debug: Debug = False,
) -> None:
    """Ask a model for one fact of a held-out place in contexts of set lengths, at set depths.

    Prints the share of answers that greedy decoding writes exactly, and that occur in the line it writes, by length, depth,
    layout and field, with 95 % intervals; what naming the value of a random record would get right; and the answers without
    any record.
    """
    for path in (output, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise CommandError(f"{path} cannot be written: there is no folder {path.parent}")
    if plot is not None:
        importlib.import_module("matplotlib")  # an extra: better missed now than after the evaluation
    parse_dtype(dtype)
    sizes = _lengths(lengths)
    place, source = parse_device(device), resolve_model(model)
    tokenizer = load_tokenizer(model, source)
    loaded = load_model(model, source, dtype, place)
    from geobased.recall.gazetteer_benchmark import benchmark_examples, evaluate_benchmark, plot_recall_heat_map
    from geobased.recall.gazetteer_documents import LAYOUTS
    from geobased.recall.places import load_places

    chosen = list(LAYOUTS) if layouts is None else [name.strip() for name in layouts.split(",")]
    examples = benchmark_examples(load_places("held_out"), tokenizer, sizes, num_examples, seed, chosen)
    with quiet_transformers():  # it warns of every context longer than those a model was trained on
        result = evaluate_benchmark(
            loaded, tokenizer, examples, contains=contains, batch_tokens=batch_tokens, progress=sys.stderr.isatty()
        )
    settings = {"model": model, "lengths": sizes, "num_examples": num_examples, "seed": seed, "layouts": chosen}
    report = {
        "arguments": settings | {"device": str(place), "dtype": str(loaded.dtype)},
        "max_position_embeddings": getattr(loaded.config, "max_position_embeddings", None),
        "benchmark": result.to_dict(),
    }
    if output is not None:
        with whole_file(output) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        name = Path(model).name
        panels = {f"{name}: exact": result.exact}
        plot_recall_heat_map(panels | ({f"{name}: contains": result.contains} if result.contains else {}), plot)
    print(json.dumps(report) if json_output else _benchmark_table(model, result.to_dict()))


def _lengths(lengths: str) -> list[int]:
    try:
        return sorted({int(length) for length in lengths.split(",")})
    except ValueError as error:
        raise CommandError(f"--lengths {lengths!r} is no list of numbers such as 256,1024") from error


def _benchmark_table(model: str, result: dict[str, Any]) -> str:
    metrics = [metric for metric in ("exact", "contains") if result[metric]]

    def row(label: str, groups: list[dict[str, Any]], after: str = "") -> str:
        cells = (f"{100 * g['accuracy']:>7.1f}  ({100 * g['low']:.1f} to {100 * g['high']:.1f})" for g in groups)
        return (f"  {label:<14}" + "".join(f"{cell:<26}" for cell in cells) + after).rstrip()

    heads = "".join(f"{name:<26}" for name in (f"{metric} %, 95 % interval" for metric in metrics))
    rows = [f"{model}: {result['num_examples']:,} questions about held-out places", f"  {'':<14}{heads}a random record's value %"]
    rows.append(row("overall", [result[metric]["overall"] for metric in metrics]))
    for title, key in (("tokens", "by_length"), ("depth", "by_depth"), ("layout", "by_layout"), ("field", "by_field")):
        rows.append(f"by {title}")
        for name in result["exact"][key]:
            after = f"{100 * result['random_record'][name]:.1f}" if key == "by_length" else ""
            rows.append(row(f"{int(name):,}" if key == "by_length" else name, [result[m][key][name] for m in metrics], after))
    rows.append("without any record")
    rows.append(row("overall", [result["closed_book"][metric]["overall"] for metric in metrics]))
    return "\n".join(rows)


def lm_eval_tasks(json_output: Json = False, debug: Debug = False) -> None:
    """Print the folder of task files for lm-evaluation-harness, for its option --include_path."""
    folder = _tasks_folder()
    tasks = sorted(path.stem for path in folder.glob("*.yaml"))
    print(json.dumps({"folder": str(folder), "tasks": tasks}) if json_output else folder)


def _tasks_folder() -> Path:
    import geobased.recall

    return Path(geobased.recall.__path__[0]) / "lm_eval_tasks"


def run_harness(
    model: Model = DEFAULT_MODEL,
    tasks: Annotated[
        str, typer.Option(help="Names or tags, of the harness or of `geobased recall lm-eval-tasks --json`.")
    ] = "geobased_gazetteer",
    before: Annotated[
        str | None, typer.Option(help="Another model to run first, such as the one that training began with.")
    ] = None,
    num_examples: Annotated[int, typer.Option(min=1, help="Contexts that each geobased_gazetteer task has.")] = 250,
    seed: Annotated[int, typer.Option(help="Of these contexts.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Run the first examples only.", show_default=False)] = None,
    max_length: Annotated[int, typer.Option(min=64, help="Longer prompts and answers lose their beginning.")] = 8240,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_output: Json = False,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results and each answer.", show_default=False)] = None,
    debug: Debug = False,
) -> None:
    """Run tasks of lm-evaluation-harness on a model, with geobased's own tasks and model types at hand.

    geobased_gazetteer_256 to geobased_gazetteer_8192 are the contexts of `geobased recall gazetteer-benchmark`; based_swde,
    based_fda and based_squad are the recall tasks of the BASED papers, whose data come from the Hub.
    """
    if output is not None and not output.absolute().parent.is_dir():
        raise CommandError(f"{output} cannot be written: there is no folder {output.parent}")
    from lm_eval.utils import make_table

    parse_dtype(dtype)
    place, names = parse_device(device), [name.strip() for name in tasks.split(",")]
    reports = {}
    for name in [before, model] if before else [model]:
        reports[name] = harness_report(
            name,
            names,
            place=place,
            dtype=dtype,
            num_examples=num_examples,
            seed=seed,
            limit=limit,
            max_length=max_length,
            batch_size=batch_size,
            log_samples=output is not None,
        )
    numbers: dict[str, Any] = {"model": model, **_harness_numbers(reports[model])}
    samples = {**numbers, "samples": reports[model].get("samples")}
    if before:
        differences = harness_differences(reports[before], reports[model])
        numbers |= {"before": {"model": before, **_harness_numbers(reports[before])}, "differences": differences}
        samples |= {key: numbers[key] for key in ("before", "differences")}
        samples["before"] = {**samples["before"], "samples": reports[before].get("samples")}
    if output is not None:
        with whole_file(output) as temporary:
            temporary.write_text(json.dumps(samples, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    if json_output:
        print(json.dumps(numbers, default=str))
        return
    if before:
        print(f"{before}\n{make_table(reports[before])}\n{model}")
    print(make_table(reports[model]))
    if before:
        print("\n".join(_difference_rows(numbers["differences"])))


def harness_report(
    model: str,
    tasks: list[str],
    *,
    place: Any,
    dtype: str = "auto",
    num_examples: int = 250,
    seed: int = 1,
    limit: int | None = None,
    max_length: int = 8240,
    batch_size: int = 8,
    log_samples: bool = False,
) -> dict[str, Any]:
    """What lm-evaluation-harness reports of a model on tasks, geobased's own among them."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    source = resolve_model(model)
    tokenizer = load_tokenizer(model, source)
    loaded = load_model(model, source, dtype, place)
    metadata = {"pretrained": source, "num_examples": num_examples, "seed": seed}
    manager = TaskManager(include_path=str(_tasks_folder()), metadata=metadata)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise CommandError(f"--tasks: lm-evaluation-harness knows no {', '.join(unknown)}; `lm_eval ls tasks` lists its own")
    with quiet_transformers():
        wrapped = HFLM(pretrained=loaded, tokenizer=tokenizer, max_length=max_length, batch_size=batch_size)
        return simple_evaluate(model=wrapped, tasks=tasks, task_manager=manager, limit=limit, log_samples=log_samples)


def _harness_numbers(report: dict[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("results", "versions", "n-samples")}


def harness_differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, dict[str, float | None]]]:
    """By task and metric: both values, their difference, and its standard error if the two were measured independently.

    The examples are the same, so the error of the difference is as a rule smaller than that.
    """
    differences: dict[str, dict[str, dict[str, float | None]]] = {}
    for task, results in after["results"].items():
        earlier = before["results"].get(task, {})
        for key, value in results.items():
            name, _, filtered = key.partition(",")
            if name.endswith("_stderr") or not isinstance(value, int | float) or not isinstance(earlier.get(key), int | float):
                continue
            if not filtered:
                continue  # counts, which belong to no metric
            error_key = f"{name}_stderr,{filtered}"
            errors = [part.get(error_key) for part in (earlier, results)]
            numeric = all(isinstance(error, int | float) for error in errors)
            differences.setdefault(task, {})[key] = {
                "before": earlier[key],
                "after": value,
                "difference": value - earlier[key],
                "standard_error": math.hypot(*errors) if numeric else None,
            }
    return differences


def _difference_rows(differences: dict[str, dict[str, dict[str, float | None]]]) -> list[str]:
    rows = ["difference (standard error)"]
    for task, metrics in differences.items():
        for metric, entry in metrics.items():
            error = "" if entry["standard_error"] is None else f" ({entry['standard_error']:.4f})"
            rows.append(
                f"  {task} {metric.partition(',')[0]}: {entry['before']:.4f} to {entry['after']:.4f},"
                f" {entry['difference']:+.4f}{error}"
            )
    return rows


def repeated_bigrams(
    text: Annotated[list[Path], typer.Argument(metavar="TEXT...", help="Text files in UTF-8; they do not see each other.")],
    model: Model = DEFAULT_MODEL,
    context_length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 1024,
    stride: Annotated[int | None, typer.Option(min=1, help="Of the windows; half their length.", show_default=False)] = None,
    training_text: Annotated[
        list[Path] | None,
        typer.Option(help="Text that the model was trained on: its frequent bigrams are no recall.", show_default=False),
    ] = None,
    threshold: Annotated[int, typer.Option(min=0, help="Bigrams seen more often in training are frequent.")] = 1250,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity apart on tokens that repeat a bigram of their context, and on all others.

    The first kind can be copied from the context, so that a model without recall loses there.
    """
    from geobased.training.text_files import read_text

    texts, training_texts = [read_text(path) for path in text], [read_text(path) for path in training_text or ()]
    parse_dtype(dtype)
    place, source = parse_device(device), resolve_model(model)
    tokenizer = load_tokenizer(model, source)
    loaded = load_model(model, source, dtype, place)
    from geobased.recall.repeated_bigrams import evaluate_split_perplexity, frequent_bigrams

    frequent = None
    if training_texts:
        sequences = (tokenizer(item, add_special_tokens=False, verbose=False)["input_ids"] for item in training_texts)
        frequent = frequent_bigrams(sequences, threshold)
    split = evaluate_split_perplexity(
        loaded, tokenizer, texts, context_length, stride, batch_size=batch_size, frequent=frequent
    ).to_dict()
    settings = {"model": model, "text": [str(path) for path in text], "context_length": context_length, "stride": stride}
    if json_output:
        for name in ("repeated", "other", "overall"):
            if not math.isfinite(split[name]["token_perplexity"]):
                split[name]["token_perplexity"] = None  # JSON has neither NaN nor infinity
        print(json.dumps({"arguments": settings | {"dtype": str(loaded.dtype), "threshold": threshold}, "perplexity": split}))
        return
    rows = [f"{model}: token perplexity"]
    for name, label in (("repeated", "repeated bigrams"), ("other", "other tokens"), ("overall", "all tokens")):
        share = split[name]["num_tokens"] / split["overall"]["num_tokens"]
        rows.append(
            f"  {label:<18}{split[name]['token_perplexity']:>10,.2f}   ({split[name]['num_tokens']:,} tokens, {share:.1%})"
        )
    print("\n".join(rows))
