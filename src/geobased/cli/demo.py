"""`geobased demo`: web pages that try a model out."""

import sys
from typing import Annotated

import typer

from .locate import Model as Geolocalizer
from .options import Debug, Model, add_command, show_help
from .sources import DEFAULT_GEOLOCALIZER, DEFAULT_MODEL

app = typer.Typer(callback=show_help, invoke_without_command=True, help="Serve a web page that tries a model out.")
EXAMPLES = (
    "geobased demo generation",
    "geobased demo generation --model ./my-model --port 8000",
)
GEOLOCALIZATION_EXAMPLES = (
    "geobased demo geolocalization",
    "geobased demo geolocalization --model geolocal/StreetCLIP",
)
Port = Annotated[
    int | None,
    typer.Option("--port", "-p", min=1, max=65535, help="By default the first free one from 7860 on.", show_default=False),
]
Share = Annotated[
    bool,
    typer.Option("--share/--no-share", help="Open a public address too: what is entered there passes Gradio's servers."),
]


def generation(
    model: Model = DEFAULT_MODEL,
    port: Port = None,
    share: Share = False,
    debug: Debug = False,
) -> None:
    """Serve a page on which a BASED model continues text, until Ctrl-C.

    Prints the page's address. Without --share only this machine reaches it. Needs the extra demo:
    pip install "geobased[demo]".
    """
    # here, not above: gradio takes seconds to import, and is an extra
    from geobased.demo.generation import build_demo
    from geobased.demo.serving import serve

    page = build_demo(model)
    print("serving until Ctrl-C", file=sys.stderr)
    serve(page, port, share)


def geolocalization(
    model: Geolocalizer = DEFAULT_GEOLOCALIZER,
    port: Port = None,
    share: Share = False,
    debug: Debug = False,
) -> None:
    """Serve a page that tells where images may have been taken, until Ctrl-C.

    Prints the page's address. Without --share only this machine reaches it. Needs the extras demo and geo:
    pip install "geobased[demo,geo]".
    """
    from geobased.demo.geolocalization import build_demo
    from geobased.demo.serving import serve
    from geobased.pipelines.geolocalization_map import ZOOM_SCRIPT

    page = build_demo(model)
    print("serving until Ctrl-C", file=sys.stderr)
    serve(page, port, share, ZOOM_SCRIPT)


add_command(app, "generation", generation, EXAMPLES)
add_command(app, "geolocalization", geolocalization, GEOLOCALIZATION_EXAMPLES)
