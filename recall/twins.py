"""Equal twins: BASED, full attention and sliding windows, trained on the same tokens and compared on recall and speed.

A twin differs from the BASED model in its mixers alone, has as many parameters (the width of its MLPs makes up for the rest) and
sees the same rows in the same order. What is compared, for each model and seed:

- recall of facts about held-out places in contexts of 256 to 8,192 tokens (`gazetteer_benchmark`), and about the places whose
  real names stand in training documents, too: what is lost between them is lost to names
- perplexity of held-out text, apart for tokens that repeat a bigram of the context and for the others (`repeated_bigrams`)
- tokens per second of a batch that generates (`twin_throughput`), and the bytes of the state it keeps

`results.json` is written after every run; a later call with the same settings, or with more seeds, does what is missing.
"""

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from geobased.modeling_based.modeling_based import BasedForCausalLM
from geobased.recall.gazetteer_benchmark import BATCH_TOKENS, BenchmarkResult, evaluate_benchmark
from geobased.recall.gazetteer_documents import generate_documents
from geobased.recall.places import load_places
from geobased.recall.repeated_bigrams import SplitPerplexity, frequent_bigrams, split_perplexity_of_windows
from geobased.recall.state_size import state_bytes
from geobased.recall.twin_data import (
    LocatedExamples,
    PhaseSettings,
    Workers,
    document_rows,
    located_examples,
    text_tokens,
)
from geobased.recall.twin_plots import plot_throughput_against_recall, plot_twins
from geobased.recall.twin_settings import DEFAULT_MODELS, MODELS, PRESETS, TwinSettings, num_parameters, twin_config
from geobased.recall.twin_throughput import (
    GRAPHS,
    GRAPHS_SDPA,
    LLAMA_DYNAMIC,
    LLAMA_STATIC,
    LOOP,
    equal_llama,
    timed_generation,
    ways_to_generate,
)
from geobased.recall.twin_training import Rows, Trainer, TrainingRun, row_order, validation_losses
from geobased.training import artifacts
from geobased.training.artifacts import save_model_folder, versions, write_json
from geobased.training.perplexity import perplexity_windows
from geobased.training.text_files import read_text

PEER = "transformers_llama"
RESULTS_FILE = "results.json"
# of the documents for perplexity, which are of held-out places; and the windows in which it is taken
HELD_OUT_SEED, PERPLEXITY_CONTEXT = 103, 1024
# about what torch.compile takes for a Llama, what the evaluation of a model takes on a GPU, and a timing there, where none is
# known yet
COMPILE_SECONDS, EVALUATION_SECONDS, TIMING_SECONDS = 60.0, 10.0, 20.0
# settings that a later call may change: what is there stays as it is
EXTENSIBLE = ("num_seeds", "throughput_lengths", "compiled_llama")
# losses in the results are means of so many steps
LOGGED_STEPS = 10


@dataclass(frozen=True)
class _Experiment:
    """What all runs share: data on the device, examples, and how to run."""

    settings: TwinSettings
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    rows: list[Rows]
    validation: list[Rows]
    examples: dict[str, LocatedExamples]
    """Of held-out places under "recall", of training places under "recall_training_places"."""
    held_out: dict[str, list[tuple[torch.Tensor, int]]]
    """Windows of texts for perplexities."""
    frequent: torch.Tensor
    """Bigrams that occur so often in training that repeating them is no recall."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def orders(self, seed: int) -> list[torch.Tensor]:
        """For each phase the rows of every step; they depend on the seed, not on the model."""
        orders = []
        for number, (phase, rows) in enumerate(zip(self.settings.phases, self.rows, strict=True)):
            batch_size = max(1, self.settings.tokens_per_step // phase.context_length)
            steps = max(1, round(self.settings.tokens * phase.share / (batch_size * phase.context_length)))
            orders.append(row_order(rows, steps, batch_size, self.settings.text_share, 1000 * seed + number))
        return orders

    def train(self, name: str, seed: int, learning_rate: float, deadline: float | None) -> tuple[BasedForCausalLM, TrainingRun]:
        torch.manual_seed(seed)
        model: Any = BasedForCausalLM(twin_config(name, self.settings, self.tokenizer))
        model = model.to(self.device)
        trainer = Trainer(
            model,
            list(zip(self.rows, self.orders(seed), strict=True)),
            replace(self.settings.optimizer, learning_rate=learning_rate),
            pad_token_id=self.tokenizer.pad_token_id,
            dtype=self.dtype,
        )
        try:
            return model, trainer.run(deadline)
        finally:
            trainer.release()

    def validation_losses(self, model: BasedForCausalLM) -> dict[str, dict[str, float]]:
        """By row length, losses on documents of training places that were not trained on."""
        return {
            str(phase.context_length): validation_losses(model, rows, self.tokenizer.pad_token_id)
            for phase, rows in zip(self.settings.phases, self.validation, strict=True)
        }

    def evaluate(self, model: BasedForCausalLM) -> dict[str, Any]:
        """Losses on validation documents, recall by length, the same without the records, perplexities of held-out text, and the
        seconds that each of them took."""
        on_gpu = self.device.type == "cuda"
        results: dict[str, Any] = {}
        seconds: dict[str, float] = {}

        def timed(name: str, measure: Callable[[], Any]) -> None:
            start = time.perf_counter()
            results[name] = measure()
            seconds[name] = round(time.perf_counter() - start, 2)

        def recall(name: str) -> BenchmarkResult:
            return evaluate_benchmark(
                model,
                self.tokenizer,
                self.examples[name].examples,
                contains=False,
                batch_tokens=BATCH_TOKENS * (4 if on_gpu else 1),
                located=self.examples[name].located,
            )

        def perplexity(windows: list[tuple[torch.Tensor, int]]) -> SplitPerplexity:
            return split_perplexity_of_windows(model, windows, batch_size=64 if on_gpu else 16, frequent=self.frequent)

        timed("validation", lambda: self.validation_losses(model))
        for name in self.examples:
            timed(name, lambda name=name: recall(name).to_dict())  # type: ignore[misc]
        timed("perplexity", lambda: {name: perplexity(windows).to_dict() for name, windows in self.held_out.items()})
        return {**results, "evaluation_seconds": seconds}


def load_results(output_dir: str | Path) -> dict[str, Any]:
    """The results in a folder.

    Raises:
        FileNotFoundError: there are none.
    """
    return artifacts.load_results(output_dir, "train the twins first")


def run_twins(
    settings: TwinSettings,
    output_dir: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    models: Sequence[str] = DEFAULT_MODELS,
    device: str | torch.device = "cpu",
    text: Sequence[str | Path] = (),
    held_out_text: Sequence[str | Path] = (),
    cache_dir: str | Path | None = None,
    num_workers: int = 1,
    max_seconds: float | None = None,
    started: float | None = None,
    throughput: bool = True,
    keep_models: bool = False,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train, evaluate and time what `output_dir/results.json` does not hold yet.

    Args:
        models: of `MODELS`.
        text: text files that `settings.text_share` of the rows come from; none: documents alone.
        held_out_text: text files for the perplexities.
        cache_dir: of documents and tokens; `output_dir/data` by default.
        num_workers: processes that write and tokenise documents.
        max_seconds: no training or timing of generation begins that would probably last longer, and one that turns out to do so
            stops; `complete` is then false, and the next call goes on.
        started: what `max_seconds` counts from, of `time.perf_counter`; now by default.
        throughput: whether generation is timed.
        keep_models: save each model (bfloat16, with its tokenizer) in `output_dir/<model>-<seed>-<learning rate>`.
        report: called with a line for every step of the work.

    Returns:
        the content of results.json. `runs` has an entry for each model, seed and learning rate; `throughput` one for each
        model, length and way of generating; `rows` what plots need, one for each chosen run and length.

    Raises:
        FileNotFoundError: a text file is missing.
        ValueError: an unknown model, or results of other settings in `output_dir`.
        FloatingPointError: a training diverged.
    """
    started = time.perf_counter() if started is None else started
    device, folder = torch.device(device), Path(output_dir)
    for name in models:
        twin_config(name, settings, tokenizer)  # an unknown name had better be known now
    for path in (*text, *held_out_text):
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such text file: {path}")
    results = _open_results(folder, settings, text, held_out_text)
    before = results["seconds"]

    def save() -> None:
        results["seconds"] = round(before + time.perf_counter() - started, 1)
        results["rows"] = result_rows(results, settings, tokenizer)
        write_json(folder / RESULTS_FILE, results)

    work = _Work(settings, tokenizer, device, results, report, save, None if max_seconds is None else started + max_seconds)
    try:
        # the timings need no trained weights, and come first, lest trainings leave them no time; but for the compiled Llama
        if throughput:
            work.time_generation(models, [GRAPHS, GRAPHS_SDPA, LOOP, LLAMA_DYNAMIC])
        if _next_run(results, settings, models) is not None:
            data = (text, held_out_text, cache_dir or folder / "data", num_workers)
            work.train(
                models, _prepare(settings, tokenizer, device, *data, work.deadline, report), folder if keep_models else None
            )
        if throughput:
            work.time_generation(models, [LLAMA_STATIC])
        results["complete"] = True
    except TimeoutError as error:
        report(f"{max_seconds:g} seconds do not suffice for {error}: call again to go on")
        results["complete"] = False
    save()
    return results


@dataclass(frozen=True)
class _Work:
    """What adds to the results, and stops with a TimeoutError that names what would have come next."""

    settings: TwinSettings
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    results: dict[str, Any]
    report: Callable[[str], None]
    save: Callable[[], None]
    deadline: float | None

    def check(self, what: str, seconds: float) -> None:
        if self.deadline is not None and time.perf_counter() + seconds > self.deadline:
            raise TimeoutError(what)

    def time_generation(self, models: Sequence[str], ways: Sequence[str]) -> None:
        """All timings in some `ways` that are missing."""
        for name, length, way in _missing_speeds(self.results, self.settings, self.tokenizer, models, self.device):
            if way not in ways:
                continue
            # no model needs more than in proportion to the length
            before = [e["seconds"] * max(1.0, length / e["length"]) for e in self.results["throughput"] if e["way"] == way]
            unknown = COMPILE_SECONDS if way == LLAMA_STATIC else TIMING_SECONDS if self.device.type == "cuda" else 0.0
            self.check(f"the speed of {name} at {length:,} tokens", max(before, default=unknown))
            _measure(self.results, name, length, way, self.settings, self.tokenizer, self.device, self.report)
            self.save()
            _free(self.device)

    def train(self, models: Sequence[str], experiment: "_Experiment", folder: Path | None) -> None:
        """All trainings that are missing; models are saved to a folder if there is one."""
        while (planned := _next_run(self.results, self.settings, models)) is not None:
            name, seed, learning_rate = planned
            runs = self.results["runs"]
            evaluation = max((sum(run["evaluation_seconds"].values()) for run in runs), default=EVALUATION_SECONDS)
            training = max((run["wall_seconds"] for run in runs if run["model"] == name), default=0.0)
            self.check(f"{name}, seed {seed}", training + evaluation)
            try:
                model, run = experiment.train(
                    name, seed, learning_rate, None if self.deadline is None else self.deadline - evaluation
                )
            except TimeoutError as error:
                raise TimeoutError(f"{name}, seed {seed}") from error
            entry = {"model": name, "seed": seed, "learning_rate": learning_rate, "num_parameters": model.num_parameters()}
            entry |= _run_facts(run) | experiment.evaluate(model)
            runs.append(entry)
            self.report(_run_line(entry))
            if folder is not None:
                save_model_folder(model, [self.tokenizer], folder / f"{name}-{seed}-{learning_rate:g}", dtype="bfloat16")
            self.save()
            del model
            _free(self.device)


def _open_results(
    folder: Path, settings: TwinSettings, text: Sequence[str | Path], held_out_text: Sequence[str | Path]
) -> dict[str, Any]:
    # as JSON has it: lists, no tuples
    described = json.loads(json.dumps(asdict(settings) | {"text": _names(text), "held_out_text": _names(held_out_text)}))
    if (folder / RESULTS_FILE).is_file():
        results = load_results(folder)
        different = sorted(key for key in described if results["settings"].get(key) != described[key] and key not in EXTENSIBLE)
        if different:
            raise ValueError(f"{folder / RESULTS_FILE} has other settings ({', '.join(different)}): choose another folder")
        if results["device"] != versions()["device"]:
            raise ValueError(f"{folder / RESULTS_FILE} was measured on {results['device']}: choose another folder")
        results["settings"] = described
        return results
    return {
        "device": versions()["device"],
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": 0.0,
        "complete": False,
        "settings": described,
        "absent": [],
        "runs": [],
        "throughput": [],
        "rows": [],
    }


def _names(paths: Sequence[str | Path]) -> list[str]:
    return [Path(path).name for path in paths]


def _prepare(
    settings: TwinSettings,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    text: Sequence[str | Path],
    held_out_text: Sequence[str | Path],
    cache_dir: str | Path,
    num_workers: int,
    deadline: float | None,
    report: Callable[[str], None],
) -> _Experiment:
    started = time.perf_counter()
    shares: dict[str, Any] = {"counterfactual": settings.counterfactual, "counterfactual_names": settings.counterfactual_names}
    try:
        with Workers(num_workers, deadline) as workers:
            counts = {"held_out": settings.num_examples, "train": settings.num_training_examples}
            collect = [located_examples(split, tokenizer, settings.lengths, n, workers) for split, n in counts.items()]
            plain = text_tokens(text, tokenizer, cache_dir)
            documents = generate_documents(load_places("held_out"), settings.num_held_out_documents, HELD_OUT_SEED)
            texts = {"held_out_documents": [document.text for document in documents]}
            if held_out_text:
                texts["held_out_text"] = [read_text(path) for path in held_out_text]
            windows = {name: perplexity_windows(tokenizer, items, PERPLEXITY_CONTEXT) for name, items in texts.items()}

            def rows_of(phase: PhaseSettings, **options: Any) -> Rows:
                return document_rows(phase, tokenizer, cache_dir, workers, **shares, **options)

            rows = [rows_of(phase, text=plain).to(device) for phase in settings.phases]
            validation = [rows_of(phase, validation=True) for phase in settings.phases]
            held_out, training = (collected() for collected in collect)
    except TimeoutError as error:
        raise TimeoutError("the data") from error
    frequent = frequent_bigrams([row.tokens for row in rows]).cpu()
    number, num_examples = sum(r.tokens.numel() for r in rows), len(held_out.examples) + len(training.examples)
    report(f"{number:,} training tokens, {num_examples:,} examples: {time.perf_counter() - started:.0f} s")
    return _Experiment(
        settings,
        tokenizer,
        device,
        rows=rows,
        validation=validation,
        examples={"recall": held_out, "recall_training_places": training},
        held_out=windows,
        frequent=frequent,
    )


def _validation_loss(run: dict[str, Any]) -> float:
    return sum(losses["answers"] for losses in run["validation"].values())


def chosen_learning_rate(results: dict[str, Any], settings: TwinSettings, name: str) -> float | None:
    """The learning rate whose run of seed 0 has the lowest loss on answers of validation documents; None until all are there."""
    runs = {run["learning_rate"]: run for run in results["runs"] if run["model"] == name and run["seed"] == 0}
    if not all(rate in runs for rate in settings.learning_rates):
        return None
    return min(settings.learning_rates, key=lambda rate: _validation_loss(runs[rate]))


def _next_run(results: dict[str, Any], settings: TwinSettings, models: Sequence[str]) -> tuple[str, int, float] | None:
    """Model, seed and learning rate of the first run that is missing: all models of a seed before the next seed."""
    done = {(run["model"], run["seed"], run["learning_rate"]) for run in results["runs"]}
    for seed in range(settings.num_seeds):
        for name in models:
            chosen = chosen_learning_rate(results, settings, name)
            for rate in settings.learning_rates if seed == 0 or chosen is None else (chosen,):
                if (name, seed, rate) not in done:
                    return name, seed, rate
    return None


def _run_facts(run: TrainingRun) -> dict[str, Any]:
    facts = asdict(run)
    losses = torch.tensor(facts.pop("losses"))
    means = [
        [min(i + LOGGED_STEPS, run.steps), chunk.mean().item()]
        for i, chunk in zip(range(0, run.steps, LOGGED_STEPS), losses.split(LOGGED_STEPS), strict=True)
    ]
    return {**facts, "losses": means}


def _run_line(run: dict[str, Any]) -> str:
    recall, of_training_places = (
        ", ".join(f"{length}: {100 * accuracy['accuracy']:.0f} %" for length, accuracy in run[name]["exact"]["by_length"].items())
        for name in ("recall", "recall_training_places")
    )
    speed = f"{run['tokens_per_second']:,.0f} tokens/s, " if run["tokens_per_second"] else ""
    return (
        f"{run['model']}, seed {run['seed']}, rate {run['learning_rate']:g}: {run['tokens'] / 1e6:.1f} M tokens, {speed}"
        f"loss {run['losses'][-1][1]:.3f}, recall {recall}; of training places {of_training_places}; training"
        f" {run['wall_seconds']:.0f} s, evaluation {', '.join(f'{k} {v:.1f} s' for k, v in run['evaluation_seconds'].items())}"
    )


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _timed_config(name: str, length: int, settings: TwinSettings, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Of a twin whose full attention sees `length` tokens, or of the Llama of equal size."""
    if name != PEER:
        return twin_config(name, settings, tokenizer, context_length=length)
    based = twin_config("based", settings, tokenizer)
    return equal_llama(num_parameters(based), based, length)


def _missing_speeds(
    results: dict[str, Any],
    settings: TwinSettings,
    tokenizer: PreTrainedTokenizerBase,
    models: Sequence[str],
    device: torch.device,
) -> list[tuple[str, int, str]]:
    """Model, length and way of generating of all timings that are missing and did not fail before."""
    done = {(entry["model"], entry["length"], entry["way"]) for entry in results["throughput"] + results["absent"]}
    # transformers' Llama is compiled anew for each length: the ends tell enough
    ends = dict.fromkeys((settings.throughput_lengths[0], settings.throughput_lengths[-1]))
    cases = [(name, length) for length in settings.throughput_lengths for name in models] + [(PEER, length) for length in ends]
    keys = [
        (name, length, way)
        for name, length in cases
        for way in ways_to_generate(
            _timed_config(name, length, settings, tokenizer), length, device, compiled=settings.compiled_llama
        )
    ]
    return [key for key in keys if key not in done]


def _measure(
    results: dict[str, Any],
    name: str,
    length: int,
    way: str,
    settings: TwinSettings,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    report: Callable[[str], None],
) -> None:
    """Adds to results["throughput"] or, with the reason, to results["absent"]."""
    config = _timed_config(name, length, settings, tokenizer)
    case = {"model": name, "length": length, "way": way}
    batch_size, new_tokens = settings.throughput_batch_size, settings.new_tokens
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    start = time.perf_counter()
    try:
        speed = timed_generation(config, way, batch_size, length - new_tokens, new_tokens, device, dtype)
    except Exception as error:  # whatever a compiler or a driver raises: the other timings are worth having
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        results["absent"].append(case | {"reason": reason})
        report(f"{name} at {length:,} tokens, {way}: not timed, {reason}")
        return
    report(f"{name} at {length:,} tokens, {way}: {speed.tokens_per_second:,.0f} tokens/s")
    case |= {"batch_size": batch_size, "prompt_length": length - new_tokens, "new_tokens": new_tokens}
    facts = {"state_bytes": state_bytes(config, length, bytes_per_number=2), "seconds": round(time.perf_counter() - start, 1)}
    results["throughput"].append(case | facts | asdict(speed))


def result_rows(results: dict[str, Any], settings: TwinSettings, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """One row for each model, seed and length, of the chosen learning rates: what plots and tables need."""
    rows = []
    for run in results["runs"]:
        chosen = chosen_learning_rate(results, settings, run["model"])
        if run["learning_rate"] != chosen:
            continue
        config = twin_config(run["model"], settings, tokenizer)
        exact = run["recall"]["exact"]["by_length"]
        for length in settings.lengths:
            accuracy, speed = exact[str(length)], fastest(results, run["model"], length)
            known = run["recall_training_places"]["exact"]["by_length"][str(length)]
            rows.append(
                {
                    "model": run["model"],
                    "seed": run["seed"],
                    "length": length,
                    "num_parameters": run["num_parameters"],
                    "trained_tokens": run["tokens"],
                    "steps": run["steps"],
                    "learning_rate": run["learning_rate"],
                    "training_seconds": run["seconds"],
                    "training_tokens_per_second": run["tokens_per_second"],
                    "final_loss": run["losses"][-1][1],
                    "accuracy": accuracy["accuracy"],
                    "low": accuracy["low"],
                    "high": accuracy["high"],
                    "num_questions": accuracy["num_questions"],
                    "training_places_accuracy": known["accuracy"],
                    "closed_book": run["recall"]["closed_book"]["exact"]["overall"]["accuracy"],
                    "perplexity": run["perplexity"],
                    "state_bytes": state_bytes(config, length, bytes_per_number=2),
                    "tokens_per_second": speed and speed["tokens_per_second"],
                    "way_to_generate": speed and speed["way"],
                    "training_peak_memory_bytes": run["peak_memory_bytes"],
                    "generation_peak_memory_bytes": speed and speed["peak_memory_bytes"],
                }
            )
    return rows


def fastest(results: dict[str, Any], name: str, length: int) -> dict[str, Any] | None:
    """The entry of the fastest way in which a model generated at a length; None if it was not timed."""
    entries = [entry for entry in results["throughput"] if entry["model"] == name and entry["length"] == length]
    return max(entries, key=lambda entry: entry["tokens_per_second"], default=None)


__all__ = [
    "DEFAULT_MODELS",
    "MODELS",
    "PRESETS",
    "RESULTS_FILE",
    "PhaseSettings",
    "TwinSettings",
    "chosen_learning_rate",
    "fastest",
    "load_results",
    "num_parameters",
    "plot_throughput_against_recall",
    "plot_twins",
    "result_rows",
    "run_twins",
    "twin_config",
]
