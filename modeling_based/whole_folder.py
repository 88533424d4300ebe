"""Folders that appear complete or not at all."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


def refuse_existing(destination: Path, overwrite: bool) -> None:
    """Raises ValueError, before any work is done, if a folder is there already and may not be replaced."""
    if destination.exists() and not overwrite:
        raise ValueError(f"{destination} exists already: choose another folder, or pass overwrite=True (--overwrite)")


@contextlib.contextmanager
def whole_folder(destination: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `destination` once the block has succeeded; an older one stays until then."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as staging:
        written, old = Path(staging) / "new", Path(staging) / "old"
        written.mkdir()
        yield written
        if destination.exists():
            destination.rename(old)
        try:
            written.rename(destination)
        except OSError:
            if old.exists():
                old.rename(destination)
            raise


__all__ = ["refuse_existing", "whole_folder"]
