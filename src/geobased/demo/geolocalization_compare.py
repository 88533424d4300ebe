"""The tab that asks two models about the same images."""

from collections.abc import Sequence
from html import escape
from typing import Any

from geobased.geography.coordinates import haversine_km
from geobased.pipelines.geolocalization_answers import place_title
from geobased.pipelines.geolocalization_map import LocatedImage, map_fragment

from .geolocalization_locate import EMPTY, PROGRESS, counted
from .geolocalization_models import Models
from .geolocalization_results import located
from .geolocalization_uploads import MAX_IMAGES, checked, errors_as_messages, without_metadata
from .serving import MODEL_QUEUE, gr, on_gpu

TOP_K = 5


def compare_tab(models: Models) -> None:
    """Builds the tab; its endpoint is /compare."""

    @on_gpu
    def compare(
        files: list[str] | None, first: str, second: str, progress: Any = PROGRESS
    ) -> tuple[str, str, str, list[dict[str, Any]]]:
        """Ask two models where images may have been taken, and tell how far apart their best places lie.

        Args:
            files: at most 20 images.
            first: name of a model that the page offers.
            second: name of another.

        Returns:
            A table of distances between the models' best places as HTML; each model's map as HTML, for the page that holds the
            countries' outlines; and for each image the best places of both and their distance in kilometres, as JSON.
        """
        with errors_as_messages():
            chosen = checked(files, MAX_IMAGES)
            answers = []
            for run, name in enumerate((first, second)):
                *_, images = located(models, name, chosen, TOP_K, counted(progress, run, 2))
                answers.append(images)
            maps = [map_fragment(images, MAX_IMAGES, with_land=False) for images in answers]
            rows = differences(*answers)
            return difference_table(first, second, rows), maps[0], maps[1], rows

    with gr.Row(equal_height=False):
        files = gr.File(
            label=f"Images, at most {MAX_IMAGES}",
            file_count="multiple",
            file_types=["image"],
            height=190,
            elem_id="compare-files",
        )
        with gr.Column():
            other = next((name for name in models.names if name != models.first), models.first)
            first = gr.Dropdown(models.names, value=models.first, label="First model")
            second = gr.Dropdown(models.names, value=other, label="Second model")
            start = gr.Button("Compare", variant="primary", elem_id="compare")
    table = gr.HTML(EMPTY.format("Both models' maps appear here, side by side."), padding=False)
    with gr.Row(equal_height=False):
        maps = []
        for label in ("First model", "Second model"):
            with gr.Column(min_width=320):
                maps.append(gr.HTML(label=label, padding=False))
    with gr.Accordion("Both answers as JSON", open=False):
        report = gr.JSON(show_label=False)
    files.upload(without_metadata, files, files, api_visibility="private")
    start.click(compare, [files, first, second], [table, *maps, report], api_name="compare", **MODEL_QUEUE)


def differences(first: Sequence[LocatedImage], second: Sequence[LocatedImage]) -> list[dict[str, Any]]:
    """For each image the best place of both models and how far apart they lie, in kilometres; its error if it has one."""
    rows: list[dict[str, Any]] = []
    for a, b in zip(first, second, strict=True):
        if not a.predictions or not b.predictions:
            rows.append({"image": a.name, "error": a.error or b.error})
            continue
        one, other = a.predictions[0], b.predictions[0]
        distance = float(haversine_km(one["latitude"], one["longitude"], other["latitude"], other["longitude"]))
        rows.append({"image": a.name, "first": one, "second": other, "distance_km": distance})
    return rows


def difference_table(first: str, second: str, rows: Sequence[dict[str, Any]]) -> str:
    """`differences` as an HTML table under the models' names."""

    def place(answer: dict[str, Any]) -> str:
        unsure = " (too uncertain to say)" if answer["abstain"] else ""
        return f"{escape(place_title(answer))}{unsure}"

    body = "".join(
        f'<tr><td>{escape(row["image"])}</td><td colspan="3">not readable: {escape(row["error"])}</td></tr>'
        if "error" in row
        else f"<tr><td>{escape(row['image'])}</td><td>{place(row['first'])}</td><td>{place(row['second'])}</td>"
        f"<td>{row['distance_km']:,.0f} km</td></tr>"
        for row in rows
    )
    return (
        '<div class="places wide"><table><thead><tr><th>image</th>'
        f"<th>{escape(first)}</th><th>{escape(second)}</th><th>apart</th></tr></thead><tbody>{body}</tbody></table></div>"
    )


__all__ = ["compare_tab", "difference_table", "differences"]
