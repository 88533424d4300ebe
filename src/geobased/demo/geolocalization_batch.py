"""The tab that places many images: a table, one map, and files of the answers."""

from collections.abc import Iterator
from typing import Any

from geobased.pipelines.geolocalization_map import map_fragment

from .geolocalization_locate import EMPTY, PROGRESS, counted
from .geolocalization_models import Models
from .geolocalization_results import answer_table, as_report, country_tree, located, save_answers, summary
from .geolocalization_uploads import LIMITS, MAX_BATCH, checked, errors_as_messages, unpacked, without_archives
from .serving import MODEL_QUEUE, gr, on_gpu


def batch_tab(models: Models) -> None:
    """Builds the tab; its endpoint is /locate_batch."""

    @on_gpu
    def locate_batch(
        files: list[str] | None, top_k: int, progress: Any = PROGRESS
    ) -> Iterator[tuple[Any, Any, Any, Any, Any, Any]]:
        """Tell where many images may have been taken. One that cannot be read is reported, and the others go on.

        Args:
            files: at most 256 images, or zip archives that hold no more.
            top_k: places of each image in the files, 1 to 20.

        Returns:
            A sentence; a table of each image's best place as HTML; a map of the world as HTML, for the page that holds the
            countries' outlines; a tree of countries as HTML; the places of every image as JSON; and the paths of a GeoJSON file,
            a CSV file, and a map in HTML that needs no network. The sentence and the table come after every few images, the rest
            at the end.
        """
        with errors_as_messages():
            chosen = checked(unpacked(files), MAX_BATCH)
            for images in located(models, models.first, chosen, int(top_k), counted(progress)):
                if len(images) < len(chosen):
                    yield summary(images, len(chosen)), answer_table(images), gr.skip(), gr.skip(), gr.skip(), gr.skip()
            world = map_fragment(images, 0, with_land=False)
            yield summary(images), answer_table(images), world, country_tree(images), as_report(images), save_answers(images)

    def cleaned(files: list[str] | None) -> list[str]:
        with errors_as_messages():
            return without_archives(files)

    gr.Markdown(f"Limits: {LIMITS}.", elem_classes="hint")
    with gr.Row(equal_height=False):
        files = gr.File(
            label="Images, or a zip of them",
            file_count="multiple",
            file_types=["image", ".zip"],
            height=190,
            elem_id="batch-files",
        )
        with gr.Column():
            top_k = gr.Slider(1, 20, 5, step=1, label="Places of each image in the files")
            start = gr.Button("Locate all", variant="primary", elem_id="locate-all")
            stop = gr.Button("Stop", elem_id="stop-batch")
    status = gr.Markdown(elem_classes="status", elem_id="batch-status")
    table = gr.HTML(label="Best place of each image", padding=False)
    world = gr.HTML(EMPTY.format("One map of all images appears here."), label="Map", padding=False)
    with gr.Row(equal_height=False):
        tree = gr.HTML(label="Countries", padding=False)
        downloads = gr.File(label="Places as GeoJSON and CSV, and the map", file_count="multiple", interactive=False)
    with gr.Accordion("All places as JSON", open=False):
        report = gr.JSON(show_label=False)
    files.upload(cleaned, files, files, api_visibility="private")
    run = start.click(
        locate_batch, [files, top_k], [status, table, world, tree, report, downloads], api_name="locate_batch", **MODEL_QUEUE
    )
    stop.click(None, cancels=[run], api_visibility="private")


__all__ = ["batch_tab"]
