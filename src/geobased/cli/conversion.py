"""`geobased convert` and `geobased export`: checkpoints from one format to another."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import FAILURE, CommandError
from .options import Debug, Json, Overwrite, Source
from .sources import (
    check_hub_id,
    hub_is_reachable,
    loading,
    not_cached,
    offline_if,
    parse_dtype,
    quiet_transformers,
    resolve_model,
)

CONVERT_EXAMPLES = (
    "geobased convert hazyresearch/based-360m ./based-360m",
    "geobased convert ./official-checkpoint ./based --dtype bfloat16",
)
EXPORT_EXAMPLES = ("geobased export based-mini ./my-model", "geobased export ./runs/mini/final ./my-model --overwrite")


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder in the official BASED format, or its Hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; that of SRC if not given.", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint of the official BASED code into the format that AutoModelForCausalLM loads."""
    if dtype is not None:
        parse_dtype(dtype)
    from geobased.modeling_based.convert_official_checkpoint import convert_official_checkpoint

    unreachable = False
    if not Path(source).exists():
        check_hub_id(source)
        unreachable = not hub_is_reachable()
    try:
        with offline_if(unreachable), quiet_transformers():
            written = convert_official_checkpoint(source, destination, dtype=dtype, overwrite=overwrite)
    except ValueError as error:
        if unreachable and error.__cause__ is not None:  # the cause is the Hub client's
            raise CommandError(not_cached(source), FAILURE) from error
        raise
    _print_written(source, written, json_output)


def export(
    model: Source,
    destination: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
    overwrite: Overwrite = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Write a BASED model with its code, tokenizer and model card.

    The folder loads with trust_remote_code=True where only torch and transformers are installed.
    """
    from geobased.modeling_based.export import export_model

    source = resolve_model(model)
    if destination.exists() and not overwrite:
        raise CommandError(f"{destination} exists already: choose another folder, or pass --overwrite")
    with loading(model, source):
        written = export_model(source, destination, overwrite=overwrite)
    _print_written(model, written, json_output)


def _print_written(source: str, folder: Path, json_output: bool) -> None:
    """The folder's name, or what is in it."""
    if not json_output:
        print(folder)
        return
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    report: dict[str, Any] = {"source": source, "folder": str(folder), "dtype": config.get("dtype"), "files": files}
    print(json.dumps(report, ensure_ascii=False))
