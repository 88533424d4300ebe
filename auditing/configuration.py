"""What an audit is run from: a YAML file that names the model, the access, the question and the techniques."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from geobased.checkpoints import checkpoint_path, shipped_checkpoints, shipped_organisms

from .access import NOTHING, Capability, access_name, parse_access
from .endpoint import Endpoint
from .model_loading import ModelSource
from .questions import AuditQuestion
from .runner import Findings, run_question
from .target import AuditTarget, Mode
from .technique import TECHNIQUES, Technique, make_technique

KEYS = ("model", "endpoint", "mode", "access", "outside", "question", "techniques", "seed", "pictures", "hub_dataset")


@dataclass(frozen=True)
class AuditConfiguration:
    """An audit, ready to run.

    Attributes:
        model: what is audited.
        levels: grants by name; the model is opened with all of them together.
        question, techniques, seed: what is done.
        mode: of `AuditTarget.open`; None for its default.
        outside: files of what lies outside the box, by capability.
        hub_dataset: {"id", "task"} of a data set on the Hub that holds the question, if there is one.
        pictures: of how many items the report shows pictures for each technique; None for all.
    """

    model: ModelSource | Endpoint
    levels: Mapping[str, Capability]
    question: AuditQuestion
    techniques: tuple[Technique, ...]
    seed: int = 0
    mode: Mode | None = None
    outside: Mapping[str, list[str]] = field(default_factory=dict)
    hub_dataset: Mapping[str, str] = field(default_factory=dict)
    pictures: int | None = None

    def __post_init__(self) -> None:
        if self.pictures is not None and self.pictures < 0:
            raise ValueError(f"pictures={self.pictures} must be a number of items, 0 or more")

    @property
    def grant(self) -> Capability:
        grant = NOTHING
        for level in self.levels.values():
            grant |= level
        return grant

    def to_dict(self) -> dict[str, Any]:
        """The reverse of `from_dict`, with items in place of their file."""
        model = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.model).items()}
        return {
            "endpoint" if isinstance(self.model, Endpoint) else "model": model,
            "access": [access_name(level) for level in self.levels.values()],
            "mode": self.mode,
            "outside": {what: list(paths) for what, paths in self.outside.items()},
            "question": self.question.to_dict(),
            "techniques": [technique.to_dict() for technique in self.techniques],
            "seed": self.seed,
            "hub_dataset": dict(self.hub_dataset),
            "pictures": self.pictures,
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any], folder: Path = Path(".")) -> "AuditConfiguration":
        """Reads a configuration; paths of items, images and outside files are relative to `folder`.

        Raises `ValueError` that names the entry and what is wrong with it.
        """
        if unknown := sorted(set(content) - set(KEYS)):
            raise ValueError(f"{unknown[0]!r} is unknown; a configuration has {', '.join(KEYS)}")
        if ("model" in content) == ("endpoint" in content):
            raise ValueError("give either model or endpoint")
        if missing := [name for name in ("access", "question") if name not in content]:
            raise ValueError(f"{missing[0]} is missing")
        model: ModelSource | Endpoint
        if "endpoint" in content:
            model = _settings("endpoint", Endpoint, content["endpoint"])
        else:
            named = content["model"]
            settings = {"name": named} if isinstance(named, str) else dict(named)
            if "name" in settings and (folder / settings["name"]).is_dir():
                settings["name"] = _shipped_name((folder / settings["name"]).resolve())
            model = _settings("model", ModelSource, settings)
        access = content["access"]
        words = [access] if isinstance(access, str) else list(access)
        levels = {access_name(grant): grant for grant in map(parse_access, words)}
        if not isinstance(content["question"], Mapping):
            raise ValueError("question must hold names and values")
        techniques = [make_technique(settings) for settings in content.get("techniques") or list(TECHNIQUES)]
        mode = content.get("mode")
        if mode not in (None, "in_process", "isolated", "endpoint"):
            raise ValueError(f"mode={mode!r} is none of in_process, isolated, endpoint")
        outside = {
            what: [str(folder / path) for path in ([paths] if isinstance(paths, str) else paths)]
            for what, paths in (content.get("outside") or {}).items()
        }
        question = AuditQuestion.from_dict(content["question"], folder)
        if not content.get("techniques"):
            techniques = [technique for technique in techniques if technique.by_default and technique.kind == question.kind]
        return AuditConfiguration(
            model,
            levels,
            question,
            tuple(techniques),
            int(content.get("seed", 0)),
            mode,
            outside,
            dict(content.get("hub_dataset") or {}),
            content.get("pictures"),
        )


def read_configuration(path: str | Path) -> AuditConfiguration:
    """Reads a YAML file. Raises `FileNotFoundError` and `ValueError`, which name the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration at {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold names and values, such as `model: based-mini`")
    try:
        return AuditConfiguration.from_dict(content, path.resolve().parent)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def run_configuration(
    configuration: AuditConfiguration, report: Callable[[str], None] | None = None
) -> tuple[Findings, list[dict[str, Any]], Mode]:
    """Opens the model, asks the question, and gives what was found, the ledger's rows, and the mode that the model ran in."""
    opened = AuditTarget.open(configuration.model, configuration.grant, mode=configuration.mode, outside=configuration.outside)
    with opened as target:
        findings = run_question(
            target,
            configuration.question,
            configuration.techniques,
            configuration.levels,
            seed=configuration.seed,
            report=report,
        )
        return findings, target.ledger(), target.mode


def _shipped_name(folder: Path) -> str:
    """The name of a model that ships with geobased, which is the same everywhere; other folders in full."""
    if folder.name in (*shipped_checkpoints(), *shipped_organisms()) and folder.samefile(checkpoint_path(folder.name)):
        return folder.name
    return str(folder)


def _settings(what: str, kind: Any, content: Any) -> Any:
    if not isinstance(content, Mapping):
        raise ValueError(f"{what} must hold names and values")
    try:
        return kind(**content)
    except TypeError as error:
        raise ValueError(f"{what}: {' '.join(str(error).split()).removeprefix(kind.__name__ + '.__init__() ')}") from error


__all__ = ["AuditConfiguration", "read_configuration", "run_configuration"]
