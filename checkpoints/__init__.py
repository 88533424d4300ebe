"""Trained models that ship with the package, one folder each."""

from pathlib import Path

_FOLDER = Path(__file__).parent


def shipped_checkpoints() -> list[str]:
    """Names of the trained models that ship with this package."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/config.json"))


def shipped_organisms() -> list[str]:
    """Names of the adapters with a known plant that ship with this package, which audits are measured on."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/plant.json"))


def checkpoint_path(name: str = "based-mini") -> str:
    """Folder of a trained model (or adapter) that ships with this package; `from_pretrained` loads it without a network.

    Raises `ValueError` if there is no such model; the message lists those there are.
    """
    names = [*shipped_checkpoints(), *shipped_organisms()]
    if name not in names:
        raise ValueError(f"no checkpoint named {name!r} ships with geobased; there are: {', '.join(names) or 'none'}")
    return str(_FOLDER / name)


def checkpoint_or_name(model: str) -> str:
    """What `from_pretrained` is to load for a folder (itself), a shipped checkpoint (its folder) or a Hub id (itself)."""
    return checkpoint_path(model) if model in shipped_checkpoints() and not Path(model).is_dir() else model


__all__ = ["checkpoint_or_name", "checkpoint_path", "shipped_checkpoints", "shipped_organisms"]
