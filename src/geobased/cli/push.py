"""`geobased push`: models, pipelines and Spaces to the Hugging Face Hub."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import BAD_INPUT, FAILURE, CommandError, one_line
from .generate import format_bytes
from .hub_files import CARD, Upload
from .hub_preparation import Card, Kind, Request, prepare
from .hub_spaces import VARIABLES
from .options import Debug, Json, complete_model
from .sources import hub_is_reachable, offline_if

EXAMPLES = (
    "geobased push ./my-model me/my-model --license apache-2.0 --dry-run",
    "geobased push based-mini me/based-mini --private",
    "geobased push ./my-pigeon me/my-pigeon --as pipeline --card overwrite --evaluation report.json",
    "geobased push ./my-model someone/their-model --create-pr --message 'Weights after 2,000 more steps'",
    "geobased push geolocalization me/where --model me/my-pigeon",
)


def complete_source(incomplete: str) -> list[str]:
    return complete_model(incomplete) + [name for name in VARIABLES if name.startswith(incomplete)]


def push(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A model or pipeline (a folder, a checkpoint that ships with geobased, or a Hub id), or a Space: the folder of"
            f" one, or {' or '.join(VARIABLES)}, which ship with geobased.",
            autocompletion=complete_source,
        ),
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="Where to, such as me/my-model.")],
    kind: Annotated[
        Kind | None,
        typer.Option(
            "--as",
            help="What SOURCE becomes; seen from it if not given. pipeline: an image geolocalization model with its pipeline's"
            " code, for trust_remote_code.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the files, the card and what is wrong, without the network.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if it is new.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="The branch to commit to, made if it is new; main if not given.", show_default=False)
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request against main instead of committing.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.", show_default=False)] = None,
    card: Annotated[Card, typer.Option(help="What becomes of a README.md that the folder has.")] = Card.keep,
    license_id: Annotated[
        str | None, typer.Option("--license", help="For the card, such as apache-2.0.", show_default=False)
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="What `geobased evaluate --report` wrote, for a new card; the folder's evaluation.json if not given.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="The model of a Space that ships: a Hub id or a shipped checkpoint; its own if not given.",
            show_default=False,
            autocompletion=complete_model,
        ),
    ] = None,
    package: Annotated[
        str | None,
        typer.Option(
            help="Address of a wheel or repository that a Space installs geobased from; the package index if not given.",
            show_default=False,
        ),
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Upload a model, a pipeline or a Space to the Hugging Face Hub.

    Models go with their code, so that they load where geobased is not installed. A card is written where there is none. Hidden
    files, pickled weights and the state of training runs stay here, paths on this machine are taken out of the records of
    training and evaluation, and nothing is sent while a check fails. Log in first with `hf auth login`, or set HF_TOKEN.
    """
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    if evaluation is not None and not evaluation.is_file():
        raise CommandError(f"there is no file {evaluation}")
    if create_pr and revision is not None:
        raise CommandError("--create-pr and --revision exclude each other: a pull request is opened against main")
    if not dry_run:
        _check_access(source, repo_id)
    request = Request(source, repo_id, kind, card, license_id, evaluation, model, package)
    with tempfile.TemporaryDirectory() as work:
        with offline_if(dry_run):
            upload = prepare(request, Path(work))
        problems = upload.problems
        settings = {
            "kind": upload.kind,
            "repo_type": upload.repo_type,
            "repo_id": repo_id,
            "private": private,
            "revision": revision,
            "create_pr": create_pr,
            "commit_message": message or f"Upload {repo_id.rpartition('/')[2]} with geobased",
        }
        report = settings | {
            "dry_run": dry_run,
            "files": upload.files(),
            "left_out": upload.left_out,
            "notes": upload.notes,
            "problems": problems,
            "card": upload.card,
            "url": None,
        }
        if not dry_run:
            if problems:
                raise CommandError(f"{source} was not pushed: {'; '.join(problems)}")
            for note in upload.notes:
                print(f"note: {note}", file=sys.stderr)
            print(f"uploading {len(upload.files())} files of {source} to {repo_id}", file=sys.stderr)
            report["url"] = _send(upload, settings, source)
    if json_output:
        print(json.dumps(report, ensure_ascii=False))
    else:
        print(_text(report) if dry_run else report["url"])
    if problems:
        raise typer.Exit(BAD_INPUT)


def _check_access(source: str, repo_id: str) -> None:
    from huggingface_hub import constants, get_token, is_offline_mode

    if not hub_is_reachable():
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else f"{constants.ENDPOINT} cannot be reached"
        advice = "; --dry-run works without"
        raise CommandError(f"{source} was not pushed to {repo_id}: pushing needs the network, and {why}{advice}", FAILURE)
    if get_token() is None:
        raise CommandError("you are not logged in to the Hub: run `hf auth login` or set HF_TOKEN", FAILURE)


def _send(upload: Upload, settings: dict[str, Any], source: str) -> str:
    """Uploads and returns the address of the pull request, or of the repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    repo_id, repo_type = settings["repo_id"], upload.repo_type
    api = HfApi()
    try:
        made = api.create_repo(
            repo_id,
            repo_type=repo_type,
            private=settings["private"] or None,
            exist_ok=True,
            space_sdk=_space_sdk(upload) if upload.kind == "space" else None,
        )
        if settings["revision"] is not None:
            api.create_branch(made.repo_id, branch=settings["revision"], repo_type=repo_type, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id,
            repo_type=repo_type,
            folder_path=upload.folder,
            commit_message=settings["commit_message"],
            revision=settings["revision"],
            create_pr=settings["create_pr"] or None,
        )
    except (HfHubHTTPError, OSError) as error:
        raise CommandError(f"{source} could not be pushed to {repo_id}: {_explain(error, repo_id)}", FAILURE) from error
    return str(commit.pr_url or commit.repo_url)


def _space_sdk(upload: Upload) -> str:
    from huggingface_hub import SpaceCard

    return str(SpaceCard(upload.card).data.get("sdk"))


def _explain(error: Exception, repo_id: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the Hub does not know your token: run `hf auth login` again, or set HF_TOKEN to a valid one"
    if status == 403:
        owner = repo_id.partition("/")[0]
        return f"your token may not write to {owner}: make one with write access, give another owner, or try --create-pr"
    return one_line(error)


def _text(report: dict[str, Any]) -> str:
    total = sum(report["files"].values())
    to = report["repo_id"] + (f", branch {report['revision']}" if report["revision"] else "")
    how = ", ".join(
        name for name, on in (("private if new", report["private"]), ("as a pull request", report["create_pr"])) if on
    )
    rows = [f"would push this {report['kind']} to {to}{f' ({how})' if how else ''}: {report['commit_message']}", ""]
    rows += [f"  {format_bytes(size):>10}  {name}" for name, size in report["files"].items()]
    rows += [f"  {format_bytes(total):>10}  in {len(report['files'])} files"]
    rows += ["", "stays here:", *(f"  {name}: {why}" for name, why in report["left_out"].items())] if report["left_out"] else []
    rows += ["", *(f"note: {note}" for note in report["notes"])] if report["notes"] else []
    rows += ["", f"{CARD}:", *(f"  {line}".rstrip() for line in report["card"].splitlines())]
    rows += (
        ["", "problems:", *(f"  {problem}" for problem in report["problems"])] if report["problems"] else ["", "problems: none"]
    )
    return "\n".join(rows)
