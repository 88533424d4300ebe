"""`geobased convert`, `geobased export` and `geobased push`: checkpoints from one place or format to another."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .errors import FAILURE, CommandError, one_line
from .options import MODEL_HELP, Debug, Overwrite
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
PUSH_EXAMPLES = ("geobased push ./my-model me/my-model", "geobased push based-mini me/based-mini --private")


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder in the official BASED format, or its Hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; that of SRC if not given.", show_default=False)
    ] = None,
    overwrite: Overwrite = False,
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
    print(written)


def export(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    destination: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Write a BASED model with its code, tokenizer and model card.

    The folder loads with trust_remote_code=True where only torch and transformers are installed.
    """
    print(_export(model, destination, overwrite))


def _export(model: str, destination: Path, overwrite: bool) -> Path:
    from geobased.modeling_based.export import export_model

    source = resolve_model(model)
    if destination.exists() and not overwrite:
        raise CommandError(f"{destination} exists already: choose another folder, or pass --overwrite")
    with loading(model, source):
        return export_model(source, destination, overwrite=overwrite)


def push(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Where to, such as me/my-model.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if it is new.")] = False,
    debug: Debug = False,
) -> None:
    """Export a BASED model and upload it to the Hugging Face Hub.

    Log in first with `hf auth login`, or set HF_TOKEN.
    """
    from huggingface_hub import HfApi, constants, get_token, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    source = resolve_model(model)
    if not hub_is_reachable():
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else f"{constants.ENDPOINT} cannot be reached"
        raise CommandError(f"{model} was not pushed to {repo_id}: pushing needs the network, and {why}", FAILURE)
    if get_token() is None:
        raise CommandError("you are not logged in to the Hub: run `hf auth login` or set HF_TOKEN", FAILURE)
    name = repo_id.rpartition("/")[2]
    with tempfile.TemporaryDirectory() as folder:
        written = _export(source, Path(folder) / name, overwrite=False)
        card = written / "README.md"
        # the card's example loads the folder's name; on the Hub it is the owner's
        text = card.read_text(encoding="utf-8").replace(f'from_pretrained("{name}"', f'from_pretrained("{repo_id}"')
        card.write_text(text, encoding="utf-8")
        print(f"uploading {model} to {repo_id}", file=sys.stderr)
        try:
            api = HfApi()
            target = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(repo_id=target, folder_path=written, commit_message=f"Upload {name} with geobased")
        except (HfHubHTTPError, OSError) as error:
            raise CommandError(f"{model} could not be pushed to {repo_id}: {one_line(error)}", FAILURE) from error
    print(commit.repo_url)
