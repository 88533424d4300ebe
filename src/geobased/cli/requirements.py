"""What the installed package says it needs, and which of that is there."""

from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement


def requirements(extra: str | None = None) -> "list[Requirement]":
    """Requirements of geobased itself, or of one of its extras alone; those for other systems are left out."""
    from packaging.requirements import Requirement

    found = []
    for line in metadata.requires("geobased") or []:
        requirement = Requirement(line)
        base = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        wanted = base if extra is None else not base and requirement.marker.evaluate({"extra": extra})  # type: ignore[union-attr]
        if wanted and requirement.name != "geobased":
            found.append(requirement)
    return found


def extras() -> list[str]:
    return metadata.metadata("geobased").get_all("Provides-Extra") or []


def extra_of(package: str) -> str | None:
    """The extra that brings a package, if one does."""
    return next((extra for extra in extras() if package in {r.name.replace("-", "_") for r in requirements(extra)}), None)


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def unmet(requirement: "Requirement") -> str | None:
    """What is wrong with a requirement, in words, or None."""
    version = installed_version(requirement.name)
    if version is None:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version} is installed but geobased needs {requirement.name}{requirement.specifier}"
    return None
