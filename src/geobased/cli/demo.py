"""`geobased demo`: web pages that try a model out."""

import sys
from typing import Annotated

import typer

from .options import Debug, Model, add_command, show_help
from .sources import DEFAULT_GEOLOCALIZER, DEFAULT_MODEL

app = typer.Typer(callback=show_help, invoke_without_command=True, help="Serve a web page that tries a model out.")
EXAMPLES = (
    "geobased demo generation",
    "geobased demo generation --model ./my-model --port 8000",
    "geobased demo generation --attention-model HuggingFaceTB/SmolLM2-135M",
)
GEOLOCALIZATION_EXAMPLES = (
    "geobased demo geolocalization",
    "geobased demo geolocalization --model geolocal/StreetCLIP",
    "geobased demo geolocalization --model ./my-pigeon --model earthclip-mini",
)
Port = Annotated[
    int | None,
    typer.Option("--port", "-p", min=1, max=65535, help="By default the first free one from 7860 on.", show_default=False),
]
Share = Annotated[
    bool,
    typer.Option("--share/--no-share", help="Open a public address too: what is entered there passes Gradio's servers."),
]
Mcp = Annotated[
    bool,
    typer.Option("--mcp/--no-mcp", help="Offer the page's endpoints as tools to MCP clients too. Needs the extra mcp."),
]


def generation(
    model: Model = DEFAULT_MODEL,
    attention_model: Annotated[
        str | None,
        typer.Option(
            help="A causal language model to compare it with, a folder or a Hub id; by default an untrained one of equal size,"
            " whose speed and memory alone are shown.",
            show_default=False,
        ),
    ] = None,
    port: Port = None,
    share: Share = False,
    mcp: Mcp = False,
    debug: Debug = False,
) -> None:
    """Serve a page that tries out a BASED model, until Ctrl-C.

    It continues text, runs beside an attention model of equal size, and answers questions about a document. Prints the page's
    address. Without --share only this machine reaches it. Needs the extra demo: pip install "geobased[demo]".
    """
    # here, not above: gradio takes seconds to import, and is an extra
    from geobased.demo.generation import build_demo
    from geobased.demo.serving import check_mcp, serve

    if mcp:
        check_mcp()
    page = build_demo(model, attention_model)
    print("serving until Ctrl-C", file=sys.stderr)
    serve(page, port, share, mcp=mcp)


def geolocalization(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="A shipped model, a folder or a Hub id: PIGEON, StreetCLIP or another CLIP. Given more than once, the first one"
            f" answers, and visitors may compare all of them. By default {DEFAULT_GEOLOCALIZER}.",
            show_default=False,
        ),
    ] = None,
    port: Port = None,
    share: Share = False,
    mcp: Mcp = False,
    debug: Debug = False,
) -> None:
    """Serve a page that tells where images may have been taken, until Ctrl-C.

    Prints the page's address. Without --share only this machine reaches it. Needs the extras demo and geo:
    pip install "geobased[demo,geo]"; --mcp needs the extra mcp too.
    """
    from geobased.demo.geolocalization import build_demo, serve_demo
    from geobased.demo.serving import check_mcp

    if mcp:
        check_mcp()
    page = build_demo(model or DEFAULT_GEOLOCALIZER)
    print("serving until Ctrl-C", file=sys.stderr)
    serve_demo(page, port, share, mcp)


add_command(app, "generation", generation, EXAMPLES)
add_command(app, "geolocalization", geolocalization, GEOLOCALIZATION_EXAMPLES)
