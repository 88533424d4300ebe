"""`geobased push`: models, pipelines and Spaces to the Hugging Face Hub."""

import json
import shutil
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import BAD_INPUT, FAILURE, CommandError, one_line
from .generate import format_bytes
from .hub_files import CARD, CONFIG, Upload, problems_of, read_json, stage
from .hub_spaces import VARIABLES, write_space
from .options import Debug, Json, complete_model
from .sources import hub_is_reachable, loading, resolve_model

EXAMPLES = (
    "geobased push ./my-model me/my-model --license apache-2.0 --dry-run",
    "geobased push based-mini me/based-mini --private",
    "geobased push ./my-pigeon me/my-pigeon --as pipeline --card overwrite --evaluation report.json",
    "geobased push ./my-model someone/their-model --create-pr --message 'Weights after 2,000 more steps'",
    "geobased push geolocalization me/where --model me/my-pigeon",
)
WITH_CODE = ("based", "pigeon", "streetclip")  # save_pretrained writes their code beside the weights
DOWNLOADED = ("*.json", "*.safetensors", "*.md", "*.txt", "*.py", "*.png", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")


class Kind(StrEnum):
    model = "model"
    pipeline = "pipeline"
    space = "space"


class Card(StrEnum):
    keep = "keep"
    overwrite = "overwrite"


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
        bool, typer.Option("--dry-run", help="Show the files, the card and what is wrong; use no network.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if it is new.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="The branch to commit to, made if it is new; main if not given.", show_default=False)
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
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
    if not dry_run:
        _check_access(source, repo_id)
    with tempfile.TemporaryDirectory() as work:
        upload = _prepare(source, repo_id, kind, Path(work), card, license_id, evaluation, model, package)
        problems = _problems(upload)
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


def _prepare(
    source: str,
    repo_id: str,
    kind: Kind | None,
    work: Path,
    card: Card,
    license_id: str | None,
    evaluation: Path | None,
    model: str | None,
    package: str | None,
) -> Upload:
    """Everything that will be sent, laid out under `work`."""
    staged = work / "upload"
    staged.mkdir()
    folder = Path(source).expanduser()
    is_space = kind is Kind.space or (kind is None and _is_space(source, folder))
    if not is_space and (model is not None or package is not None):
        raise CommandError("--model and --package are for Spaces; SOURCE is the model that is pushed")
    if is_space:
        return _prepare_space(source, folder, work, staged, model, package)
    from geobased.training.run_control import FINAL_FOLDER

    called = source
    source = resolve_model(source)
    folder = _local_folder(called, source)
    complete = _with_code(called, folder, work / repo_id.rpartition("/")[2], kind is Kind.pipeline)
    is_pipeline = bool((read_json(complete / CONFIG) or {}).get("custom_pipelines"))
    if kind is Kind.model and is_pipeline:
        raise CommandError(f"{called} is a saved pipeline: push it without --as, or with --as pipeline")
    # `geobased train` writes the model into a folder of that name, and what it measured beside it
    records = folder.resolve().parent if folder.resolve().name == FINAL_FOLDER else None
    upload = stage(complete, staged, "pipeline" if is_pipeline else "model", records)
    _write_card(upload, folder, complete, repo_id, card, license_id, evaluation)
    return upload


def _is_space(source: str, folder: Path) -> bool:
    return (folder / "app.py").is_file() or (source in VARIABLES and not folder.is_dir())


def _prepare_space(source: str, folder: Path, work: Path, staged: Path, model: str | None, package: str | None) -> Upload:
    if folder.is_dir():
        if model is not None or package is not None:
            raise CommandError(f"--model and --package are for the Spaces that ship ({', '.join(VARIABLES)}), not for a folder")
        return stage(folder, staged, "space")
    if source not in VARIABLES:
        raise CommandError(f"there is no folder {source!r}, and no Space of that name ships; there are: {', '.join(VARIABLES)}")
    if model is not None and Path(model).expanduser().is_dir():
        raise CommandError(f"a Space cannot read {model} on this machine: push that first, and give its Hub id as --model")
    if model is not None:
        resolve_model(model)  # refuses what is no name of a model
    written = work / source
    write_space(source, written, model, package)
    return stage(written, staged, "space")


def _local_folder(called: str, source: str) -> Path:
    """The folder of a model; one of the Hub is downloaded, or taken from the cache."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    with loading(called, source):
        return Path(snapshot_download(source, allow_patterns=list(DOWNLOADED)))


def _with_code(called: str, folder: Path, destination: Path, as_pipeline: bool) -> Path:
    """A folder that holds the model with its code, and the pipeline's if wanted: `folder` itself if it does."""
    config = read_json(folder / CONFIG) or {}
    model_type = config.get("model_type")
    has_pipeline = bool(config.get("custom_pipelines"))
    if as_pipeline and model_type == "based":
        raise CommandError(f"{called} is a language model: --as pipeline is for image geolocalization")
    if has_pipeline or (not as_pipeline and (config.get("auto_map") or model_type not in WITH_CODE)):
        return folder
    with loading(called, str(folder)):
        _save_with_code(folder, destination, model_type, as_pipeline)
    # what the model does not write itself, such as the card, a tokenizer, an image processor and pictures
    for path in folder.iterdir():
        if path.is_file() and not (destination / path.name).exists() and path.suffix != ".safetensors":
            shutil.copyfile(path, destination / path.name)
    return destination


def _save_with_code(folder: Path, destination: Path, model_type: Any, as_pipeline: bool) -> None:
    from transformers import AutoModel, pipeline

    if as_pipeline:
        from geobased.pipelines import ImageGeolocalizationPipeline

        task: Any = "image-geolocalization"
        pipe = pipeline(task, model=str(folder), pipeline_class=ImageGeolocalizationPipeline, device="cpu", dtype="auto")
        pipe.save_pretrained(destination)
    elif model_type == "based":
        from geobased.modeling_based.export import export_model

        export_model(folder, destination)
        if not (folder / CARD).is_file():
            (destination / CARD).unlink()  # the one that comes next says more
    else:
        AutoModel.from_pretrained(folder, dtype="auto").save_pretrained(destination)


def _write_card(
    upload: Upload,
    folder: Path,
    complete: Path,
    repo_id: str,
    card: Card,
    license_id: str | None,
    evaluation: Path | None,
) -> None:
    from huggingface_hub import ModelCard

    from .hub_cards import FRONT_MATTER, name_repository, render_card

    path, text = upload.folder / CARD, upload.card
    if text and card is Card.keep:
        text = name_repository(text, [folder.name, str(folder), complete.name], repo_id)
        if license_id is not None and FRONT_MATTER.match(text):
            changed = ModelCard(text)
            changed.data["license"] = license_id
            text = str(changed)
        if evaluation is not None:
            upload.notes.append("--evaluation is for a new card: README.md is kept, give --card overwrite to use it")
    else:
        text = render_card(upload.folder, repo_id, license_id, evaluation, old_card=text)
    path.unlink(missing_ok=True)  # a link to the folder's own
    path.write_text(text, encoding="utf-8")


def _problems(upload: Upload) -> list[str]:
    from .hub_cards import card_problems

    found = problems_of(upload) + card_problems(upload.card, upload.kind == "space")
    if upload.kind == "space":
        from huggingface_hub import SpaceCard

        app = "app.py" if found else SpaceCard(upload.card).data.get("app_file")
        if app and not (upload.folder / app).is_file():
            found.append(f"{app} is missing: README.md names it as the Space's program")
    return found


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
        if settings["revision"] is not None and not settings["create_pr"]:
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
