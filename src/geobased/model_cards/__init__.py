"""Templates of model cards, in Markdown and Jinja2; the top of each file lists its variables.

`based.md` is for language models, `geolocalization.md` for PIGEON, StreetCLIP and other CLIPs. Fill them from a model's
config.json and from what `geobased train` and `geobased evaluate` write:

    card_from_template("geolocalization", ModelCardData(license="apache-2.0"), model_name=..., repo_id=..., config=..., ...)
"""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

_FOLDER = Path(__file__).parent


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

    Unlike `ModelCard.from_template` it does not leave gaps: a variable that the template needs must be given.

    Args:
        name: "based" or "geolocalization".
        card_data: metadata at the top of the card: license, tags, datasets and so on.
        variables: those that the top of the template lists.

    Raises:
        ValueError: no such template.
        jinja2.UndefinedError: a variable that the template needs is missing; the message names it.
    """
    template = Environment(undefined=StrictUndefined).from_string(template_path(name).read_text(encoding="utf-8"))
    return ModelCard(template.render(card_data=card_data.to_yaml(), **variables) + "\n")


__all__ = ["card_from_template", "template_path"]
