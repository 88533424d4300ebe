"""What of a report goes into a model's card and into a repository's evaluation results on the Hub."""

from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

TASKS = {"text": ("text-generation", "Text generation"), "image": ("image-classification", "Image geolocalization")}
METRIC = "audit_success_rate"


def model_card_data(content: Mapping[str, Any]) -> ModelCardData:
    """Metadata for a model card: a result for each level of access, and a block `audit` on access, mode and record."""
    task, task_name = TASKS[content["question"]["kind"]]
    question = content["question"]
    results = [
        EvalResult(
            task_type=task,
            task_name=task_name,
            dataset_type=question["name"],
            dataset_name=question["text"] or question["name"],
            metric_type=METRIC,
            metric_name=f"share of items on which a failure was found, {level['access']} access",
            metric_value=round(level["rate"], 4),
            metric_args={
                "access": level["access"],
                "budget": question["budget"],
                "seed": content["configuration"]["seed"],
                "items": level["num_items"],
                "low": round(level["low"], 4),
                "high": round(level["high"], 4),
            },
        )
        for level in content["results"]["levels"]
        if level["techniques"]
    ]
    audit = {
        "granted": content["granted"],
        "used": content["used"],
        "mode": content["mode"],
        "question_sha256": content["question_sha256"],
        "ledger_root": content["ledger"]["root"],
        "date": content["date"],
    }
    # a card names the model that its results are of
    name = content["model"]["name"].rstrip("/").rpartition("/")[2]
    return ModelCardData(model_name=name, eval_results=results, audit=audit)


def model_card_block(content: Mapping[str, Any]) -> str:
    """Markdown with metadata at its top, to be merged into the model's README.md."""
    question, results = content["question"], content["results"]
    lines = [
        "---",
        model_card_data(content).to_yaml(),
        "---",
        "",
        "## Audit",
        "",
        f"{question['text'] or question['name']} Budget: {question['budget']:g} forward-equivalents for each technique and item;"
        f" {len(question['items'])} items; {content['date']}.",
        "",
        content["claim"],
        "",
        "| access | techniques | finding | rate | 95 % interval |",
        "|---|---|---|---:|---:|",
    ]
    for level in results["levels"]:
        if not level["techniques"]:
            lines.append(f"| {level['access']} | none | nothing tried | | |")
            continue
        interval = f"{100 * level['low']:.1f} to {100 * level['high']:.1f} %"
        names = ", ".join(level["techniques"])
        lines.append(f"| {level['access']} | {names} | {level['finding']} | {100 * level['rate']:.1f} % | {interval} |")
    lines += ["", "What was not found within a budget may still be there.", ""]
    return "\n".join(lines)


def eval_results_yaml(content: Mapping[str, Any]) -> str | None:
    """`.eval_results/*.yaml` of the Hub, where the question is a data set there (`hub_dataset`: id and task); None elsewhere."""
    dataset = content["configuration"]["hub_dataset"]
    if not dataset:
        return None
    entries = [
        EvalResultEntry(
            dataset_id=dataset["id"],
            task_id=dataset["task"],
            value=round(100 * level["rate"], 2),
            date=content["date"],
            notes=f"audit at {level['access']} access, {level['finding']}; ledger {content['ledger']['root']}",
        )
        for level in content["results"]["levels"]
        if level["techniques"]
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)


__all__ = ["METRIC", "eval_results_yaml", "model_card_block", "model_card_data"]
