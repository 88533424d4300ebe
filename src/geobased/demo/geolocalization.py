"""A page that tells where images may have been taken: maps, ranked places, comparisons, and how good the answers are.

from geobased.demo.geolocalization import main

main()
"""

import os
import threading
from collections.abc import Sequence

from geobased.cli.errors import CommandError
from geobased.cli.locate import OVERHEAD
from geobased.cli.sources import DEFAULT_GEOLOCALIZER, GEOLOCALIZER_VARIABLE
from geobased.pipelines.geolocalization_map import STYLE, ZOOM_SCRIPT, land_fragment

from .geolocalization_batch import batch_tab
from .geolocalization_blue_marble import blue_marble_tab
from .geolocalization_compare import compare_tab
from .geolocalization_evaluate import evaluate_tab
from .geolocalization_locate import locate_tab
from .geolocalization_models import Models
from .geolocalization_style import PAGE_CSS
from .geolocalization_uploads import UPLOAD_LIMIT
from .serving import gr, serve

NOTICE = (
    "**Not for** finding or following people, nor for decisions about anyone: a guess can put people at risk, and is often wrong"
    " in ways that look certain. Ask for a second source. EXIF data is removed from what you upload and never used."
)
OVERHEAD_NOTE = f"It knows {OVERHEAD}: for photos taken on the ground serve `geolocal/StreetCLIP` instead."


def build_demo(model_names: str | Sequence[str] = DEFAULT_GEOLOCALIZER) -> gr.Blocks:
    """The page, with the first model loaded; `CommandError` tells why it cannot be.

    Args:
        model_names: one model or several: the first one answers, and all of them and the shipped ones can be compared.
    """
    models = Models([model_names] if isinstance(model_names, str) else model_names)
    pipe = models.pipe(models.first)
    with gr.Blocks(title="Where was this taken?", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        gr.HTML(f"<style>{STYLE}{PAGE_CSS}</style>", padding=False, elem_classes="hidden-parts")
        land = gr.HTML(padding=False, elem_classes="hidden-parts")
        gr.Markdown(
            "# Where was this taken?\n"
            f"Model: `{models.first}`, {pipe.model.num_parameters():,} parameters, on {pipe.model.device.type}."
            + (f" {OVERHEAD_NOTE}" if models.first == DEFAULT_GEOLOCALIZER else "")
        )
        gr.Markdown(NOTICE, elem_classes="notice")
        # on a phone all tabs stay in sight
        with gr.Tabs(overflow_behavior="wrap"):
            with gr.Tab("Locate"):
                locate_tab(models)
            with gr.Tab("Blue Marble") as earth:
                opened = blue_marble_tab(models)
            with gr.Tab("Batch"):
                batch_tab(models)
            with gr.Tab("Compare two models"):
                compare_tab(models)
            with gr.Tab("Evaluate"):
                evaluate_tab(models)
        earth.select(opened, api_visibility="private")
        # all maps of the page refer to it; it takes seconds to make, and no map is asked for before
        demo.load(land_fragment, None, land, api_visibility="private", show_progress="hidden")
    threading.Thread(target=land_fragment, daemon=True).start()
    return demo


def serve_demo(demo: gr.Blocks, port: int | None = None, share: bool = False, mcp: bool = False) -> None:
    """Serves what `build_demo` made until interrupted. See `launch`."""
    serve(demo, port, share, ZOOM_SCRIPT, max_file_size=UPLOAD_LIMIT, mcp=mcp)


def main(model_names: str | Sequence[str] | None = None, port: int | None = None, share: bool = False) -> None:
    """Serves the page until interrupted; the models are those named here, or in `GEOBASED_GEOLOCALIZATION_MODEL`, separated by
    commas, or earthclip-mini."""
    variable = [name.strip() for name in os.environ.get(GEOLOCALIZER_VARIABLE, "").split(",") if name.strip()]
    try:
        serve_demo(build_demo(model_names or variable or DEFAULT_GEOLOCALIZER), port, share)
    except CommandError as error:
        raise SystemExit(f"error: {error}") from error
