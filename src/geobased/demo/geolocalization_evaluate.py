"""The tab that measures the model on images whose places are known."""

import json
from collections import defaultdict
from dataclasses import replace
from html import escape
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from geobased.cli.errors import CommandError
from geobased.cli.evaluate import ImageList, ModelEvaluation, evaluate_images, metric_label, read_list
from geobased.pipelines.geolocalization_map import LocatedImage, map_fragment
from geobased.whole_file import whole_file

from .geolocalization_locate import EMPTY, PROGRESS
from .geolocalization_models import Models
from .geolocalization_results import new_folder
from .geolocalization_uploads import (
    LIMITS,
    MAX_BATCH,
    checked,
    errors_as_messages,
    too_large,
    unpacked,
    without_archives,
)
from .serving import MODEL_QUEUE, gr, on_gpu

HOW = (
    "A list of images with their true places, a CSV file with the columns `path`, `latitude`, `longitude` (and `country`, "
    "`region` if known), and the images it names. Images are found by their names, whatever folder the list says they are in."
    f" Limits: {LIMITS}."
)
CANDIDATES = (
    "Nearest candidate: what the model would reach if it always chose the nearest of its geocells' centres, or cities. Places"
    " between the centres, which some models answer with, can be better."
)


def evaluate_tab(models: Models) -> None:
    """Builds the tab; its endpoint is /evaluate."""

    @on_gpu
    def evaluate(
        table: str | None, files: list[str] | None, progress: Any = PROGRESS
    ) -> tuple[str, str, str, list[str], dict[str, Any]]:
        """Measure the model on images whose places are known, as `geobased evaluate` does.

        Args:
            table: a CSV file with the columns path, latitude, longitude, and country and region if known.
            files: the images it names, at most 256, or zip archives of them. They are found by their names alone.

        Returns:
            A sentence; the metrics with 95 % bootstrap intervals as an HTML table; a map of true and answered places as HTML, for
            the page that holds the countries' outlines; the paths of a report in HTML and one in JSON; and all numbers as JSON.
        """
        with errors_as_messages(table):
            if table is None:
                raise CommandError("there is no list: choose a CSV file first")
            progress(0, desc="reading the images")
            chosen = checked(unpacked(files), MAX_BATCH)
            listed, missing = matched(read_list(Path(table)), chosen)
            progress(0.2, desc="locating and measuring")
            found = evaluate_images(models.pipe(models.first), listed)
            progress(0.9, desc="writing the report")
            # names in place of the server's paths
            named = {path: Path(path).name for path in listed.images}
            left_out = {
                named[path]: reason.replace(str(Path(path).parent) + "/", "") for path, reason in found.left_out.items()
            } | missing
            found = replace(
                found, listed=replace(found.listed, images=[named[path] for path in found.listed.images]), left_out=left_out
            )
            return (
                sentence(found),
                metric_table(found),
                map_fragment(_on_map(found), 0, with_land=False),
                _reports(found, f"{models.first} on {Path(table).name}"),
                {"model": models.first, **found.numbers()},
            )

    def cleaned(files: list[str] | None) -> list[str]:
        with errors_as_messages():
            return without_archives(files)

    gr.Markdown(HOW)
    with gr.Row(equal_height=False):
        table = gr.File(label="List, a CSV file", file_count="single", file_types=[".csv"], height=150, elem_id="list")
        files = gr.File(
            label="Images, or a zip of them", file_count="multiple", file_types=["image", ".zip"], height=150, elem_id="listed"
        )
    start = gr.Button("Evaluate", variant="primary", elem_id="evaluate")
    status = gr.Markdown(elem_classes="status")
    metrics = gr.HTML(EMPTY.format("Metrics with intervals, a map and a report appear here."), padding=False)
    world = gr.HTML(label="Map", padding=False)
    downloads = gr.File(label="Report as HTML and JSON", file_count="multiple", interactive=False)
    with gr.Accordion("All numbers as JSON", open=False):
        numbers = gr.JSON(show_label=False)
    files.upload(cleaned, files, files, api_visibility="private")
    start.click(evaluate, [table, files], [status, metrics, world, downloads, numbers], api_name="evaluate", **MODEL_QUEUE)


def matched(listed: ImageList, files: list[str]) -> tuple[ImageList, dict[str, str]]:
    """The listed images that were uploaded, with the uploads' paths, and why the others are left out, by their names.

    Only names count: no path and no address of a list is ever opened.

    Raises `CommandError` if none was uploaded.
    """
    uploads: dict[str, list[str]] = defaultdict(list)
    for file in files:
        uploads[_key(file)].append(file)
    paths, rows, missing = [], [], {}
    for row, image in enumerate(listed.images):
        found = uploads.get(_key(image), [])
        name = PurePosixPath(image).name
        if len(found) > 1:
            missing[name] = f"{name}: {len(found)} uploaded images have this name"
        elif not found:
            missing[name] = f"{name}: no uploaded image has this name"
        elif reason := too_large(found[0]):
            missing[name] = reason
        else:
            rows.append(row)
            paths.append(found[0])
    if not rows:
        raise CommandError(f"none of the {len(listed.images)} listed images was uploaded: {next(iter(missing.values()))}")
    return replace(listed.select(rows), images=paths), missing


def _key(path: str) -> str:
    """What a name and the name that it has after upload have in common: only letters, digits and few signs survive it."""
    return "".join(sign for sign in PurePosixPath(path.replace("\\", "/")).name if sign.isalnum() or sign in "._-")


def sentence(found: ModelEvaluation) -> str:
    """How many images were measured, left out, and abstained from."""
    parts = [f"{found.measured.count:,} images measured"]
    if found.left_out:
        parts.append(f"{len(found.left_out):,} left out")
    if found.measured.answered is not None and (unsure := found.measured.count - found.measured.answered["count"]):
        parts.append(f"{unsure:,} too uncertain to say (they count all the same)")
    return "; ".join(parts) + "."


def metric_table(found: ModelEvaluation) -> str:
    """Metrics with intervals and the ceiling of the model's candidates as an HTML table, and the images that were left out."""
    measured = found.measured
    rows = []
    for name, estimate in measured.metrics.items():
        interval = "" if estimate.low is None else f"{estimate.low:,.1f} to {estimate.high:,.1f}"
        limit = f"{found.ceiling[name]:,.1f}" if name in found.ceiling else ""
        rows.append(f"<tr><td>{metric_label(name)}</td><td>{estimate.value:,.1f}</td><td>{interval}</td><td>{limit}</td></tr>")
    radii = "".join(
        f"<p>Error radius: {row['coverage'].value:.1%} of the true places lie inside (meant: {row['nominal']:.0%}).</p>"
        for row in measured.calibration["radius"]
    )
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in found.left_out.values())
    left_out = f"<h2>Left out</h2><ul>{reasons}</ul>" if reasons else ""
    return (
        '<div class="places numbers"><table><thead><tr><th>metric</th><th>value</th>'
        f"<th>{measured.settings['level']:.0%} interval</th><th>nearest candidate</th></tr></thead>"
        f'<tbody>{"".join(rows)}</tbody></table>{radii}<p class="note">{CANDIDATES}</p>{left_out}</div>'
    )


def _on_map(found: ModelEvaluation) -> list[LocatedImage]:
    truths = np.asarray(found.listed.coordinates).tolist()
    rows = zip(found.listed.images, found.answers, truths, strict=True)
    return [LocatedImage(name, [answer], truth=(truth[0], truth[1])) for name, answer, truth in rows]


def _reports(found: ModelEvaluation, title: str) -> list[str]:
    folder = new_folder()
    found.save_html(folder / "report.html", title=title)
    with whole_file(folder / "report.json") as temporary:
        text = json.dumps({**found.numbers(), "images": found.rows()}, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    return [str(folder / "report.html"), str(folder / "report.json")]


__all__ = ["evaluate_tab", "matched", "metric_table", "sentence"]
