"""A page that tells where images may have been taken: maps, ranked places, a tree of countries, and files of the answers.

from geobased.demo.geolocalization import main

main()
"""

import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import geobased
from geobased.cli.errors import CommandError, explain
from geobased.cli.locate import OVERHEAD, load_geolocalizer
from geobased.cli.sources import DEFAULT_GEOLOCALIZER, quiet_transformers
from geobased.modeling_streetclip.image_decoding import UnreadableImageError, decode_picture
from geobased.pipelines.geolocalization_answers import NOWHERE
from geobased.pipelines.geolocalization_map import STYLE, ZOOM_SCRIPT, LocatedImage, map_fragment, thumbnail

from .serving import gr, on_gpu, serve

if TYPE_CHECKING:
    from geobased.pipelines import ImageGeolocalizationPipeline

MODEL_VARIABLE = "GEOBASED_GEOLOCALIZATION_MODEL"
MAX_IMAGES, MAX_SECTIONS, BATCH_SIZE = 256, 20, 16
COLUMNS = ("image", "rank", "latitude", "longitude", "score", "error_radius_km", "abstain", "country", "region", "city", "error")
NOTICE = (
    "**Not for** finding or following people, nor for decisions about anyone: a guess can put people at risk, and is often wrong"
    " in ways that look certain. Ask for a second source. EXIF data is removed from what you upload and never used."
)
OVERHEAD_NOTE = f"It knows {OVERHEAD}: for photos taken on the ground serve `geolocal/StreetCLIP` instead."
PROGRESS = gr.Progress()
EMPTY = '<div class="places"><p class="note">The map appears here.</p></div>'


def without_metadata(files: Sequence[str] | None) -> list[str]:
    """Upright copies of images that hold nothing but pixels; the originals are deleted. What is no image stays as it is."""
    copies = []
    for file in files or []:
        path = Path(file)
        try:
            picture = decode_picture(path)
        except UnreadableImageError:
            copies.append(file)
            continue
        folder = Path(tempfile.mkdtemp(dir=path.parent))
        # lossless: the model sees the pixels of the file
        copy = folder / f"{path.stem}.png"
        picture.save(copy)
        path.unlink(missing_ok=True)
        copies.append(str(copy))
    return copies


def country_tree(predictions: Sequence[dict[str, Any]]) -> str:
    """Nested lists of countries, regions and cities with the sums of their places' probabilities, as HTML."""
    tree: dict[str, Any] = {}
    for place in predictions:
        names = [place.get(level) for level in ("country", "region", "city")]
        node = tree
        for name in [name for name in names if name] or [NOWHERE]:
            entry = node.setdefault(name, {"score": 0.0, "below": {}})
            entry["score"] += place["score"]
            node = entry["below"]

    def listed(nodes: dict[str, Any], depth: int) -> str:
        rows = []
        for name, entry in sorted(nodes.items(), key=lambda item: -item[1]["score"]):
            label = f"{escape(name)} <b>{entry['score']:.1%}</b>"
            if entry["below"]:
                opened = " open" if depth == 0 and entry["score"] >= 0.5 else ""
                label = f"<details{opened}><summary>{label}</summary>{listed(entry['below'], depth + 1)}</details>"
            rows.append(f"<li>{label}</li>")
        return f"<ul>{''.join(rows)}</ul>"

    return f'<div class="places"><h2>By country</h2>{listed(tree, 0)}</div>'


def as_csv(images: Sequence[LocatedImage]) -> str:
    """A row for each place of each image, and one for each image that could not be read."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for image in images:
        for rank, place in enumerate(image.predictions, 1):
            writer.writerow({"image": image.name, "rank": rank, **place})
        if image.error is not None:
            writer.writerow({"image": image.name, "error": image.error})
    return file.getvalue()


def as_geojson(images: Sequence[LocatedImage]) -> str:
    """A point for each place of each image (RFC 7946: longitude first)."""
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Point", "coordinates": [place["longitude"], place["latitude"]]},
            "properties": {"image": image.name, "rank": rank}
            | {name: value for name, value in place.items() if name not in ("latitude", "longitude")},
        }
        for image in images
        for rank, place in enumerate(image.predictions, 1)
    ]
    return json.dumps({"type": "FeatureCollection", "features": features}, ensure_ascii=False)


def located(pipe: "ImageGeolocalizationPipeline", files: Sequence[str], top_k: int, progress: Any = None) -> list[LocatedImage]:
    """What the model answers to each file. Raises `CommandError` for no files, and for more than `MAX_IMAGES`."""
    if not files:
        raise CommandError("there are no images: choose some first")
    if len(files) > MAX_IMAGES:
        raise CommandError(f"{len(files):,} images are too many: at most {MAX_IMAGES:,} at a time")
    images = []
    with quiet_transformers():
        answers = pipe(iter(files), batch_size=min(BATCH_SIZE, len(files)), top_k=top_k)
        for number, (file, answer) in enumerate(zip(files, answers, strict=True), 1):
            name = Path(file).stem if Path(file).suffix == ".png" else Path(file).name
            if isinstance(answer, dict):
                # without the server's path
                images.append(LocatedImage(name, error=answer["error"].replace(str(Path(file).parent) + os.sep, "")))
            else:
                images.append(LocatedImage(name, answer, thumbnail=thumbnail(file) if number <= MAX_SECTIONS else None))
            if progress is not None:
                progress((number, len(files)), unit="images")
    return images


def summary(images: Sequence[LocatedImage]) -> str:
    """A sentence of what was answered."""
    answered = [image for image in images if image.predictions]
    uncertain = sum(bool(image.predictions[0]["abstain"]) for image in answered)
    parts = [f"{len(answered) - uncertain:,} of {len(images):,} located"]
    parts += [f"{uncertain:,} too uncertain to say"] if uncertain else []
    parts += [f"{len(images) - len(answered):,} not readable"] if len(answered) < len(images) else []
    return "; ".join(parts) + "."


def build_demo(model_name: str = DEFAULT_GEOLOCALIZER) -> gr.Blocks:
    """The page, with the model loaded; `CommandError` tells why a model cannot be."""
    pipe = load_geolocalizer(model_name, None, None, "auto", "auto")

    @on_gpu
    def locate(
        files: list[str] | None, top_k: int, progress: Any = PROGRESS
    ) -> tuple[str, str, str, list[dict[str, Any]], list[str]]:
        """Tell where images may have been taken.

        Returns a sentence, a map as HTML, a tree of countries as HTML, the places of every image as JSON, and the paths of a
        GeoJSON and a CSV file.
        """
        try:
            images = located(pipe, files or [], int(top_k), progress)
        except CommandError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            raise gr.Error(explain(error)[0]) from error
        places = [place for image in images for place in image.predictions]
        answered = max(1, sum(bool(image.predictions) for image in images))
        shares = [{**place, "score": place["score"] / answered} for place in places]
        folder = Path(tempfile.mkdtemp(prefix="geobased-"))
        paths = []
        for name, text in (("places.geojson", as_geojson(images)), ("places.csv", as_csv(images))):
            (folder / name).write_text(text, encoding="utf-8")
            paths.append(str(folder / name))
        report = [
            {"image": image.name, "predictions": image.predictions, **({"error": image.error} if image.error else {})}
            for image in images
        ]
        return summary(images), map_fragment(images, MAX_SECTIONS), country_tree(shares), report, paths

    example = Path(geobased.checkpoint_path(DEFAULT_GEOLOCALIZER), "example.png")
    with gr.Blocks(title="Where was this taken?", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        gr.HTML(f"<style>{STYLE}</style>", padding=False)
        gr.Markdown(
            "# Where was this taken?\n"
            f"Model: `{model_name}`, {pipe.model.num_parameters():,} parameters, on {pipe.model.device.type}."
            + (f" {OVERHEAD_NOTE}" if model_name == DEFAULT_GEOLOCALIZER else "")
        )
        with gr.Row():
            files = gr.File(label=f"Images, at most {MAX_IMAGES}", file_count="multiple", file_types=["image"], height=180)
            with gr.Column():
                top_k = gr.Slider(1, 20, 5, step=1, label="Places to show of each image")
                start = gr.Button("Locate", variant="primary")
                stop = gr.Button("Stop")
                if example.is_file():
                    show = gr.Button("Try a crop of NASA's Blue Marble")
        status = gr.Markdown()
        world = gr.HTML(EMPTY, label="Map", padding=False)
        with gr.Row():
            tree = gr.HTML(label="Countries", padding=False)
            downloads = gr.File(label="Places as GeoJSON and CSV", file_count="multiple", interactive=False)
        with gr.Accordion("All places as JSON", open=False):
            report = gr.JSON(show_label=False)
        gr.Markdown(NOTICE)
        files.upload(without_metadata, files, files, api_visibility="private")
        outputs = [status, world, tree, report, downloads]
        runs: list[Any] = [start.click(locate, [files, top_k], outputs, api_name="locate", concurrency_limit=1)]
        if example.is_file():
            # a copy, for Gradio serves only what lies in its own folders
            shown = show.click(lambda: without_metadata([_copied(example)]), None, files, api_visibility="private")
            runs.append(shown.then(locate, [files, top_k], outputs, api_visibility="private", concurrency_limit=1))
        stop.click(None, cancels=runs, api_visibility="private")
    return demo


def _copied(path: Path) -> str:
    return shutil.copy(path, tempfile.mkdtemp(prefix="geobased-"))


def main(model_name: str | None = None, port: int | None = None, share: bool = False) -> None:
    """Serves the page until interrupted; the model is the one named here, or in `GEOBASED_GEOLOCALIZATION_MODEL`, or
    earthclip-mini."""
    try:
        page = build_demo(model_name or os.environ.get(MODEL_VARIABLE) or DEFAULT_GEOLOCALIZER)
        serve(page, port, share, ZOOM_SCRIPT)
    except CommandError as error:
        raise SystemExit(f"error: {error}") from error
