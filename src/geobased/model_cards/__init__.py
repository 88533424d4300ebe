"""Templates of model cards, in Markdown and Jinja2; the top of each file lists its variables.

`based.md` is for BASED language models, `geolocalization.md` for PIGEON, StreetCLIP and other CLIPs, `reward.md` and
`superhf.md` for what `geobased train reward` and `superhf` train. Fill them from a model's
config.json and from what `geobased train` and `geobased evaluate` write:

    card_from_template("geolocalization", ModelCardData(license="apache-2.0"), model_name=..., repo_id=..., config=..., ...)
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_FOLDER = Path(__file__).parent
# as the comment at a template's top lists them: those needed, an empty line, the others
_VARIABLE = re.compile(r"^  (\w+) {2,}\S", re.MULTILINE)


def template_path(name: str) -> Path:
    """File of a template, as `ModelCard.from_template` takes it.

    Raises `ValueError` if there is no such template; the message lists those there are.
    """
    names = sorted(path.stem for path in _FOLDER.glob("*.md"))
    if name not in names:
        raise ValueError(f"no model card template is named {name!r}; there are: {', '.join(names)}")
    return _FOLDER / f"{name}.md"


def card_from_template(name: str, card_data: ModelCardData, **variables: Any) -> ModelCard:
    """A filled card, ready to `save` or `push_to_hub`.

    Unlike `ModelCard.from_template` it leaves no gap where a variable is missing or misspelt.

    Args:
        name: "based", "geolocalization", "reward" or "superhf".
        card_data: metadata at the top of the card: license, tags, datasets and so on.
        variables: those that the top of the template lists.

    Raises:
        ValueError: no such template, a variable that it needs is missing, or one that it does not have.
    """
    path = template_path(name)
    needed, others = (set(_VARIABLE.findall(part)) for part in _listed_variables(path))
    missing, unknown = needed - {"card_data", *variables}, variables.keys() - needed - others
    if missing:
        raise ValueError(f"the model card template {name!r} needs {', '.join(sorted(missing))} as well")
    if unknown:
        raise ValueError(
            f"the model card template {name!r} has no variable {', '.join(sorted(unknown))}; it has"
            f" {', '.join(sorted(needed | others))}"
        )
    return ModelCard.from_template(card_data, template_path=str(path), **variables)


def _listed_variables(path: Path) -> tuple[str, str]:
    """The comment at a template's top: its part on what is needed, and its part on the rest."""
    comment = path.read_text(encoding="utf-8").partition("-#}")[0]
    needed, _, others = comment.partition("Needed:")[2].partition("\n\n")
    return needed, others


__all__ = ["card_from_template", "template_path"]
