"""Equal twins: BASED, full attention and sliding windows, trained on the same tokens and compared on recall and speed.

A twin differs from the BASED model in its mixers alone, has as many parameters (the width of its MLPs makes up for the rest) and
sees the same rows in the same order. What is compared, for each model and seed:

- recall of facts about held-out places in contexts of 256 to 8,192 tokens (`gazetteer_benchmark`)
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

from geobased.modeling_based.configuration_based import BasedConfig
from geobased.modeling_based.modeling_based import BasedForCausalLM
from geobased.recall.gazetteer_benchmark import BATCH_TOKENS, BenchmarkExample, benchmark_examples, evaluate_benchmark
from geobased.recall.gazetteer_documents import generate_documents
from geobased.recall.places import load_places
from geobased.recall.repeated_bigrams import evaluate_split_perplexity, frequent_bigrams
from geobased.recall.state_size import state_bytes
from geobased.recall.twin_data import PhaseSettings, document_rows, text_tokens
from geobased.recall.twin_plots import plot_throughput_against_recall, plot_twins
from geobased.recall.twin_throughput import LLAMA_STATIC, equal_llama, timed_generation, ways_to_generate
from geobased.recall.twin_training import OptimizerSettings, Rows, Trainer, TrainingRun, row_order, validation_losses
from geobased.training.artifacts import save_model_folder, versions, write_json
from geobased.training.text_files import read_text

MODELS = ("based", "attention", "sliding_window", "llama")
DEFAULT_MODELS = ("based", "attention", "sliding_window")
PEER = "transformers_llama"
RESULTS_FILE = "results.json"
# of the documents for perplexity, which are of held-out places; and the windows in which it is taken
HELD_OUT_SEED, PERPLEXITY_CONTEXT = 103, 1024
# about what torch.compile takes for a Llama
COMPILE_SECONDS = 60.0
# settings that a later call may change: what is there stays as it is
EXTENSIBLE = ("num_seeds", "throughput_lengths", "compiled_llama")
# losses in the results are means of so many steps
LOGGED_STEPS = 10


@dataclass(frozen=True)
class TwinSettings:
    """Everything that the results depend on, except the text files. Models have `blocks` times the four layers of `BLOCK`."""

    hidden_size: int = 384
    intermediate_size: int = 768
    num_attention_heads: int = 6
    feature_dim: int = 16
    sliding_window: int = 64
    blocks: int = 2
    tokens: int = 50_000_000
    """Of one run."""
    tokens_per_step: int = 32_768
    phases: tuple[PhaseSettings, ...] = (
        # recall is learnt on short documents, and stretched on long ones
        PhaseSettings(512, 0.25, num_documents=40_000, max_words=160, max_records=6),
        PhaseSettings(1024, 0.4, num_documents=48_000, max_words=400, max_records=24),
        PhaseSettings(8192, 0.35, num_documents=7_000, max_words=3200, max_records=250),
    )
    text_share: float = 0.1
    counterfactual: float = 0.9
    learning_rates: tuple[float, ...] = (2e-3,)
    """With more than one, seed 0 is trained with each, and the best on validation documents serves the other seeds."""
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=0.0, answer_weight=8.0)
    """`learning_rate` is set by `learning_rates`."""
    num_seeds: int = 3
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    num_examples: int = 125
    """Of each length."""
    num_held_out_documents: int = 200
    """For perplexity."""
    throughput_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Tokens of prompt and continuation together."""
    throughput_batch_size: int = 128
    new_tokens: int = 256
    compiled_llama: bool = True

    @property
    def context_length(self) -> int:
        return max(*(phase.context_length for phase in self.phases), *self.lengths)


BLOCK = ("conv", "linear_attention", "sliding_attention", "conv")
PRESETS = {
    # does everything run?
    "smoke": TwinSettings(
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=2,
        blocks=1,
        tokens=1_500_000,
        phases=(
            PhaseSettings(512, 0.6, num_documents=1_500, max_words=160, max_records=8, num_validation=50),
            PhaseSettings(2048, 0.4, num_documents=300, max_words=800, max_records=60, num_validation=20),
        ),
        num_seeds=1,
        lengths=(256, 1024),
        num_examples=20,
        num_held_out_documents=20,
        throughput_lengths=(512,),
        throughput_batch_size=16,
        new_tokens=64,
        compiled_llama=False,
    ),
    # a 14M model, for one large GPU
    "standard": TwinSettings(),
    # the same models with twice the tokens, and two learning rates
    "long": TwinSettings(tokens=100_000_000, learning_rates=(1e-3, 3e-3)),
}


def twin_config(
    name: str, settings: TwinSettings, tokenizer: PreTrainedTokenizerBase, context_length: int | None = None
) -> BasedConfig:
    """Configuration of a model of `MODELS`, with as many parameters as "based" (to less than 1 %, for real sizes).

    - "sliding_window": windows in place of linear attention
    - "attention": attention over the whole context in place of linear attention and windows
    - "llama": such attention in place of everything: the architecture of Llama

    Args:
        context_length: the window of full attention; by default the longest that training and evaluation need.

    Raises:
        ValueError: another name.
    """
    if name not in MODELS:
        raise ValueError(f"there is no twin {name!r}; choose from {', '.join(MODELS)}")
    swaps: dict[str, dict[str, str]] = {
        "based": {},
        "sliding_window": {"linear_attention": "sliding_attention"},
        "attention": {"linear_attention": "sliding_attention"},
        "llama": dict.fromkeys(BLOCK, "sliding_attention"),
    }
    length = settings.context_length if context_length is None else context_length
    config = BasedConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.blocks * len(BLOCK),
        num_attention_heads=settings.num_attention_heads,
        feature_dim=settings.feature_dim,
        mixers=[swaps[name].get(mixer, mixer) for mixer in BLOCK] * settings.blocks,
        sliding_window=length if name in ("attention", "llama") else settings.sliding_window,
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if name != "based":
        missing = num_parameters(twin_config("based", settings, tokenizer)) - num_parameters(config)
        per_unit = 3 * settings.hidden_size * config.num_hidden_layers
        config.intermediate_size += round(missing / per_unit / 8) * 8
    return config


def num_parameters(config: BasedConfig) -> int:
    """Parameters of a model, which is not built."""
    with torch.device("meta"):
        model = BasedForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class _Experiment:
    """What all runs share: data on the device, examples, and how to run."""

    settings: TwinSettings
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    rows: list[Rows]
    validation: list[Rows]
    examples: list[BenchmarkExample]
    held_out: dict[str, list[str]]
    """Texts for perplexities."""
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

    def train(self, name: str, seed: int, learning_rate: float) -> tuple[BasedForCausalLM, TrainingRun]:
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
        return model, trainer.run()

    def validation_losses(self, model: BasedForCausalLM) -> dict[str, dict[str, float]]:
        """By row length, losses on documents of training places that were not trained on."""
        return {
            str(phase.context_length): validation_losses(model, rows, self.tokenizer.pad_token_id)
            for phase, rows in zip(self.settings.phases, self.validation, strict=True)
        }

    def evaluate(self, model: BasedForCausalLM) -> dict[str, Any]:
        """Recall by length, the same without the records, and perplexities of held-out text."""
        batch = BATCH_TOKENS * (4 if self.device.type == "cuda" else 1)
        recall = evaluate_benchmark(model, self.tokenizer, self.examples, contains=False, batch_tokens=batch)
        return {
            "recall": recall.to_dict(),
            "perplexity": {
                name: evaluate_split_perplexity(
                    model, self.tokenizer, texts, PERPLEXITY_CONTEXT, batch_size=16, frequent=self.frequent
                ).to_dict()
                for name, texts in self.held_out.items()
            },
        }


def load_results(output_dir: str | Path) -> dict[str, Any]:
    """The results in a folder.

    Raises:
        FileNotFoundError: there are none.
    """
    path = Path(output_dir, RESULTS_FILE)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: train the twins first")
    return json.loads(path.read_text(encoding="utf-8"))


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
        max_seconds: no training begins that would probably last longer, and no timing of generation after that; `complete`
            is then false, and the next call goes on.
        throughput: whether generation is timed.
        keep_models: save each model (bfloat16, with its tokenizer) in `output_dir/<model>-<seed>`.
        report: called with a line for every step of the work.

    Returns:
        the content of results.json. `runs` has an entry for each model, seed and learning rate; `throughput` one for each
        model, length and way of generating; `rows` what plots need, one for each chosen run and length.

    Raises:
        FileNotFoundError: a text file is missing.
        ValueError: an unknown model, or results of other settings in `output_dir`.
        FloatingPointError: a training diverged.
    """
    started = time.perf_counter()
    device, folder = torch.device(device), Path(output_dir)
    for name in models:
        twin_config(name, settings, tokenizer)  # an unknown name had better be known now
    results = _open_results(folder, settings, text, held_out_text)
    before = results["seconds"]

    def save() -> None:
        results["seconds"] = round(before + time.perf_counter() - started, 1)
        results["rows"] = result_rows(results, settings, tokenizer)
        write_json(folder / RESULTS_FILE, results)

    def is_late(seconds: float) -> bool:
        return max_seconds is not None and time.perf_counter() - started + seconds > max_seconds

    experiment: _Experiment | None = None
    longest: dict[str, float] = {}
    late = False
    while (planned := _next_run(results, settings, models)) is not None:
        name, seed, learning_rate = planned
        experiment = experiment or _prepare(
            settings, tokenizer, device, text, held_out_text, cache_dir or folder / "data", num_workers, report
        )
        expected = longest.get(name, max(longest.values(), default=0.0))
        if late := is_late(1.1 * expected):
            report(f"{max_seconds:g} seconds do not suffice for {name}, seed {seed}: call again to go on")
            break
        begun = time.perf_counter()
        model, run = experiment.train(name, seed, learning_rate)
        entry = {"model": name, "seed": seed, "learning_rate": learning_rate, "num_parameters": model.num_parameters()}
        entry |= _run_facts(run) | {"validation": experiment.validation_losses(model)} | experiment.evaluate(model)
        results["runs"].append(entry)
        longest[name] = max(longest.get(name, 0.0), time.perf_counter() - begun)
        report(_run_line(entry, longest[name]))
        if keep_models:
            save_model_folder(model, [tokenizer], folder / f"{name}-{seed}-{learning_rate:g}", dtype="bfloat16")
        save()
        del model
        _free(device)
    if throughput:
        for name, length, way in _missing_speeds(results, settings, tokenizer, models, device):
            if late or is_late(COMPILE_SECONDS if way == LLAMA_STATIC else 0.0):
                late = True
                break
            _measure(results, name, length, way, settings, tokenizer, device, report)
            save()
            _free(device)
    results["complete"] = not late
    save()
    return results


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
    report: Callable[[str], None],
) -> _Experiment:
    started = time.perf_counter()
    plain = text_tokens(text, tokenizer, cache_dir)
    options: dict[str, Any] = {"counterfactual": settings.counterfactual, "num_workers": num_workers}
    rows = [document_rows(phase, tokenizer, cache_dir, text=plain, **options) for phase in settings.phases]
    validation = [document_rows(phase, tokenizer, cache_dir, validation=True, **options) for phase in settings.phases]
    places = load_places("held_out")
    examples = benchmark_examples(places, tokenizer, settings.lengths, settings.num_examples)
    documents = generate_documents(places, settings.num_held_out_documents, HELD_OUT_SEED)
    held_out = {"held_out_documents": [document.text for document in documents]}
    if held_out_text:
        held_out["held_out_text"] = [read_text(path) for path in held_out_text]
    frequent = frequent_bigrams([row.tokens for row in rows])
    number = sum(r.tokens.numel() for r in rows)
    report(f"{number:,} training tokens, {len(examples):,} examples: {time.perf_counter() - started:.0f} s")
    return _Experiment(
        settings,
        tokenizer,
        device,
        rows=[r.to(device) for r in rows],
        validation=validation,
        examples=examples,
        held_out=held_out,
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


def _run_line(run: dict[str, Any], seconds: float) -> str:
    recall = run["recall"]["exact"]["by_length"]
    shown = ", ".join(f"{length}: {100 * accuracy['accuracy']:.0f} %" for length, accuracy in recall.items())
    speed = f"{run['tokens_per_second']:,.0f} tokens/s, " if run["tokens_per_second"] else ""
    return (
        f"{run['model']}, seed {run['seed']}, rate {run['learning_rate']:g}: {run['tokens'] / 1e6:.1f} M tokens, {speed}"
        f"loss {run['losses'][-1][1]:.3f}, recall {shown}; {seconds:.0f} s"
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
    try:
        speed = timed_generation(config, way, batch_size, length - new_tokens, new_tokens, device, dtype)
    except Exception as error:  # whatever a compiler or a driver raises: the other timings are worth having
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        results["absent"].append(case | {"reason": reason})
        report(f"{name} at {length:,} tokens, {way}: not timed, {reason}")
        return
    report(f"{name} at {length:,} tokens, {way}: {speed.tokens_per_second:,.0f} tokens/s")
    sizes = {"batch_size": batch_size, "prompt_length": length - new_tokens, "new_tokens": new_tokens}
    results["throughput"].append(case | sizes | {"state_bytes": state_bytes(config, length, bytes_per_number=2)} | asdict(speed))


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
