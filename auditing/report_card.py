"""What of a report goes into a model's card and into a repository's evaluation results on the Hub."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from geobased.whole_file import whole_file

TASKS = {"text": ("text-generation", "Text generation"), "image": ("image-classification", "Image geolocalization")}
METRIC = "audit_success_rate"
# between them stands what audits found; put there by a command, so not to be written by hand
BEGIN, END = "<!-- audits -->", "<!-- end of audits -->"
HEAD = re.compile(r"\A---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)


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
    return "\n".join(["---", model_card_data(content).to_yaml(), "---", "", "## Audit", "", _section(content)])


def _section(content: Mapping[str, Any]) -> str:
    question, results = content["question"], content["results"]
    lines = [
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


def card_with_audits(card: str, contents: Sequence[Mapping[str, Any]]) -> str:
    """A model's card (Markdown with metadata at its top) with what audits of the model found, in place of earlier audits.

    Results of other measurements in the metadata stay; with no audits, only earlier ones are taken out.

    Args:
        contents: of the reports (`AuditReport.content`), in the order in which they are to be told.

    Raises:
        ValueError: a card without metadata.
    """
    found = HEAD.match(card)
    data = yaml.safe_load(found[1]) if found else None
    if found is None or not isinstance(data, dict):
        raise ValueError("the card does not begin with metadata between two lines of ---")
    before, _, rest = card[found.end() :].partition(BEGIN)
    body = before.rstrip("\n") + "\n" + rest.partition(END)[2].lstrip("\n")
    blocks = [yaml.safe_load(model_card_data(content).to_yaml()) for content in contents]
    entries = data.pop("model-index", None) or []
    for entry in entries:
        entry["results"] = [
            result for result in entry["results"] if not any(metric["type"] == METRIC for metric in result["metrics"])
        ]
    audited = [result for block in blocks for entry in block["model-index"] for result in entry["results"]]
    if audited and not entries:
        entries = [{"name": blocks[0]["model-index"][0]["name"], "results": []}]
    if audited:
        entries[0]["results"] += audited
    data.pop("audit", None)
    if entries := [entry for entry in entries if entry["results"]]:
        data["model-index"] = entries
    if blocks:
        data["audit"] = [block["audit"] for block in blocks]
        sections = "\n".join(_section(content) for content in contents)
        body = f"{body}\n{BEGIN}\n## Audits\n\n{sections}{END}\n"
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)}---\n{body}"


def add_audits(folder: str | Path, reports: Sequence[str | Path]) -> None:
    """Puts what reports found into a model's card, README.md, in place of earlier audits.

    Raises:
        FileNotFoundError: a folder without a card, or without a report.
        ValueError: a report that is not what was signed, or not of this folder's files.
    """
    # a report holds a card's block, so that these modules need this one
    from .report import read_report
    from .verification import verify

    card = Path(folder) / "README.md"
    if not card.is_file():
        raise FileNotFoundError(f"{folder} holds no README.md")
    for report in reports:
        failed = [f"{check.name}: {check.detail}" for check in verify(report, model=folder).checks if check.passed is False]
        if failed:
            raise ValueError(f"{report} is no report of {folder} that can be relied on: {'; '.join(failed)}")
    text = card_with_audits(card.read_text(encoding="utf-8"), [read_report(report).content for report in reports])
    with whole_file(card) as written:
        written.write_text(text, encoding="utf-8")


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


__all__ = ["METRIC", "add_audits", "card_with_audits", "eval_results_yaml", "model_card_block", "model_card_data"]
