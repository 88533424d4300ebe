"""`geobased demo`: web pages that try a model out."""

import sys
from typing import Annotated

import typer

from .locate import Model
from .options import MODEL_HELP, Debug, epilog, show_help
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


@app.command("generation", epilog=epilog(*EXAMPLES))
def generation(
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)] = DEFAULT_MODEL,
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
    from geobased.demo.serving import serve

    page = build_demo(model, attention_model)
    print("serving until Ctrl-C", file=sys.stderr)
    serve(page, port, share, mcp=mcp)


@app.command("geolocalization", epilog=epilog(*GEOLOCALIZATION_EXAMPLES))
def geolocalization(
    model: Model = DEFAULT_GEOLOCALIZER,
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
