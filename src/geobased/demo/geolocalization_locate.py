"""The tab that places a few images, each with its map, and shows on request what an answer rests on."""

import base64
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

import geobased
from geobased.cli.errors import CommandError
from geobased.cli.sources import DEFAULT_GEOLOCALIZER
from geobased.pipelines.geolocalization_answers import place_title
from geobased.pipelines.geolocalization_attribution import METHODS, Attribution, attribute, captum_is_installed, draw_attribution
from geobased.pipelines.geolocalization_map import map_fragment

from .geolocalization_models import Models
from .geolocalization_results import as_report, country_tree, located, save_answers, summary
from .geolocalization_uploads import MAX_IMAGES, checked, errors_as_messages, too_large, without_metadata
from .serving import MODEL_QUEUE, gr, on_gpu

PROGRESS = gr.Progress()
EMPTY = '<div class="places"><p class="note empty">{}</p></div>'
METHOD_CHOICES = [("Cover parts (occlusion)", METHODS[0]), ("Follow gradients (integrated gradients)", METHODS[1])]
NO_CAPTUM = 'The heat map needs captum, which is not installed here: `pip install "geobased[demo]"`.'
MEANING = {
    "occlusion": "<b>Red</b>: covering this part with grey makes the answer less likely. <b>Blue</b>: covering it makes the"
    " answer more likely.",
    "integrated_gradients": "<b>Red</b>: on the way from a grey image to this one, this part made the answer more likely."
    " <b>Blue</b>: it made the answer less likely.",
}
NOT_MEANT = (
    "It tells what this answer rests on. It does not tell whether the answer is right, nor what the model makes of the part: a"
    " coast that is red may be taken for another coast."
)


def locate_tab(models: Models) -> None:
    """Builds the tab; its endpoints are /locate and /heat_map."""

    @on_gpu
    def locate(files: list[str] | None, top_k: int, progress: Any = PROGRESS) -> Iterator[tuple[Any, Any, Any, Any, Any]]:
        """Tell where at most 20 images may have been taken, by their pixels alone. For more, /locate_batch.

        Args:
            files: images.
            top_k: places to give of each image, 1 to 20.

        Returns:
            A sentence; a map as HTML, for the page that holds the countries' outlines; a tree of countries as HTML; the places of
            every image as JSON, best first, with probability, error radius and whether the model would rather abstain; and the
            paths of a GeoJSON file, a CSV file, and a map in HTML that needs no network.
        """
        with errors_as_messages():
            chosen = checked(files, MAX_IMAGES, "; the tab Batch takes more")
            for images in located(models, models.first, chosen, int(top_k), counted(progress)):
                if len(images) < len(chosen):
                    yield summary(images, len(chosen)), gr.skip(), gr.skip(), gr.skip(), gr.skip()
            world = map_fragment(images, MAX_IMAGES, with_land=False)
            yield summary(images), world, country_tree(images), as_report(images), save_answers(images)

    @on_gpu
    def heat_map(file: str | None, method: str) -> str:
        """Show which parts of an image the best answer rests on. Takes seconds.

        Args:
            file: an image.
            method: "occlusion" covers parts of the image in turn; "integrated_gradients" follows the model's gradients.

        Returns:
            Two pictures with a legend of what they mean and do not mean, as HTML.
        """
        with errors_as_messages(file):
            if not captum_is_installed():
                raise CommandError(NO_CAPTUM.replace("`", ""))
            if file is None:
                raise CommandError("there is no image: choose one first")
            if reason := too_large(file):
                raise CommandError(reason)
            attribution = attribute(models.pipe(models.first), file, method)  # type: ignore[arg-type]
            return heat_fragment(Path(file).name, attribution, *draw_attribution(file, attribution))

    def choices(files: list[str] | None) -> Any:
        named = [(Path(file).name, number) for number, file in enumerate(files or [])]
        return gr.update(choices=named, value=0 if named else None)

    def chosen_file(files: list[str] | None, number: int | None) -> str | None:
        return files[number] if files and number is not None and 0 <= number < len(files) else None

    example = Path(geobased.checkpoint_path(DEFAULT_GEOLOCALIZER), "example.png")
    with gr.Row(equal_height=False):
        files = gr.File(
            label=f"Images, at most {MAX_IMAGES}", file_count="multiple", file_types=["image"], height=190, elem_id="files"
        )
        with gr.Column():
            top_k = gr.Slider(1, 20, 5, step=1, label="Places to show of each image")
            start = gr.Button("Locate", variant="primary", elem_id="locate")
            with gr.Row(elem_classes="keep"):
                stop = gr.Button("Stop")
                show = gr.Button("Try an example", elem_id="example", visible=example.is_file())
    status = gr.Markdown(elem_classes="status")
    world = gr.HTML(EMPTY.format("The map appears here."), label="Map", padding=False)
    with gr.Row(equal_height=False):
        tree = gr.HTML(label="Countries", padding=False)
        downloads = gr.File(label="Places as GeoJSON and CSV, and the map", file_count="multiple", interactive=False)
    with gr.Accordion("What did the model look at?", open=False):
        if captum_is_installed():
            with gr.Row(equal_height=False):
                number = gr.Dropdown([], label="Image", type="value")
                method = gr.Radio(METHOD_CHOICES, value=METHODS[0], label="How")
            one = gr.File(visible=False)
            explain = gr.Button("Draw the heat map", elem_id="explain")
            heat = gr.HTML(padding=False)
            files.change(choices, files, number, api_visibility="private")
            explain.click(chosen_file, [files, number], one, api_visibility="private").then(
                heat_map, [one, method], heat, api_name="heat_map", **MODEL_QUEUE
            )
        else:
            gr.Markdown(NO_CAPTUM)
            gr.Button("Draw the heat map", interactive=False)
    with gr.Accordion("All places as JSON", open=False):
        report = gr.JSON(show_label=False)
    files.upload(without_metadata, files, files, api_visibility="private")
    outputs = [status, world, tree, report, downloads]
    runs: list[Any] = [start.click(locate, [files, top_k], outputs, api_name="locate", **MODEL_QUEUE)]
    # a copy, for Gradio serves only what lies in its own folders
    shown = show.click(lambda: without_metadata([_copied(example)]), None, files, api_visibility="private")
    runs.append(shown.then(locate, [files, top_k], outputs, api_visibility="private", **MODEL_QUEUE))
    stop.click(None, cancels=runs, api_visibility="private")


def counted(progress: Any, before: int = 0, runs: int = 1) -> Callable[[int, int], None]:
    """What tells a progress bar how many images are done, in one of several runs over them, `before` runs being over."""

    def step(done: int, total: int) -> None:
        progress((before * total + done, runs * total), unit="images")

    return step


def heat_fragment(name: str, attribution: Attribution, plain: Image.Image, drawn: Image.Image) -> str:
    """Both pictures of an attribution, with what they mean, as HTML."""
    title = escape(place_title(attribution.place))
    pictures = "".join(
        f'<figure><img alt="{escape(name)}{said}" src="{_data_uri(picture)}"><figcaption>{caption}</figcaption></figure>'
        for picture, said, caption in (
            (plain, ": the part that the model saw", "What the model saw"),
            (drawn, f": what the answer {title} rests on", f"What the answer rests on: {title}"),
        )
    )
    certainty = ""
    if attribution.place["abstain"]:
        certainty = '<p class="abstains">The model would rather not say: this explains a mere guess.</p>'
    return (
        f'<div class="places heat">{certainty}<div class="pictures">{pictures}</div>'
        f'<div class="scale"><span>speaks against</span><i></i><span>supports</span></div>'
        f"<p>{MEANING[attribution.method]} {NOT_MEANT}</p></div>"
    )


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _copied(path: Path) -> str:
    return shutil.copy(path, tempfile.mkdtemp(prefix="geobased-"))


__all__ = ["EMPTY", "PROGRESS", "counted", "heat_fragment", "locate_tab"]
