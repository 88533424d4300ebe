"""What every demo shares: how it is served, and a GPU of Hugging Face's where it runs on one."""

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from geobased.cli.errors import FAILURE, CommandError

try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'the demos need {error.name}, which is not installed: pip install "geobased[demo]"', name=error.name
    ) from error

Function = TypeVar("Function", bound=Callable[..., Any])

MOST_WAITING, MAX_FILE_SIZE = 256, "20mb"
# of all endpoints that run a model: one works at a time, whatever it is
MODEL_QUEUE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
CSS = """
.gradio-container { max-width: 60rem !important; margin: 0 auto !important; }
.gradio-container table td, .gradio-container table th {
  padding: 0.4rem !important; word-break: normal !important; overflow-wrap: break-word !important;
}
.gradio-container table td:nth-child(2) { white-space: nowrap; }
"""


def on_gpu(function: Function) -> Function:
    """`function` itself, or on a ZeroGPU Space one that borrows a GPU while it runs."""
    try:
        # absent from a mere folder of that name beside the script, which Python imports as well
        gpu = getattr(importlib.import_module("spaces"), "GPU", None)
    except ImportError:
        gpu = None
    return gpu(function) if gpu else function


def _theme() -> gr.themes.Base:
    """Fonts that every system has, and colours with enough contrast to be read."""
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return theme.set(
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )


def check_mcp() -> None:
    """Raises `CommandError` where the package that offers endpoints as tools is not installed."""
    if importlib.util.find_spec("mcp") is None:
        raise CommandError('--mcp needs mcp, which is not installed: pip install "geobased[demo,mcp]"', FAILURE)


def launch(
    demo: gr.Blocks,
    port: int | None = None,
    share: bool = False,
    script: str | None = None,
    *,
    max_file_size: str = MAX_FILE_SIZE,
    mcp: bool = False,
) -> str:
    """Starts to serve a page in the background and returns its address.

    Args:
        demo: the page; `close()` ends it.
        port: of the address; if not given, that in `GRADIO_SERVER_PORT` or the first free one from 7860 on.
        share: open a public address too, which leads through Gradio's servers, and return that.
        script: JavaScript that the page runs when it opens.
        max_file_size: of an upload; what is larger is refused with a message.
        mcp: offer the page's endpoints as tools too (Model Context Protocol).

    Raises `CommandError` for a taken port, and for mcp where its extra is not installed.
    """
    if mcp:
        check_mcp()
    demo.queue(default_concurrency_limit=1, max_size=MOST_WAITING)
    try:
        _, local, public = demo.launch(
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            max_file_size=max_file_size,
            mcp_server=mcp,
            ssr_mode=False,  # would start Node where that is installed
            theme=_theme(),
            css=CSS,
            head=None if script is None else f"<script>{script}</script>",
            footer_links=["api", "settings"],
        )
    except OSError as error:
        if "Cannot find empty port" not in str(error):
            raise
        where = f"port {port} is taken" if port else "no port is free"
        raise CommandError(f"{where}: choose another with --port or GRADIO_SERVER_PORT", FAILURE) from error
    return public or local


def serve(demo: gr.Blocks, port: int | None = None, share: bool = False, script: str | None = None, **options: Any) -> None:
    """Serves a page, prints its address, and ends when the program is interrupted. Arguments as `launch`."""
    try:
        address = launch(demo, port, share, script, **options)
        print(address, flush=True)
        if options.get("mcp"):
            print(f"MCP server: {address.rstrip('/')}/gradio_api/mcp/", file=sys.stderr)
        while True:
            time.sleep(1)
    finally:
        demo.close(verbose=False)
