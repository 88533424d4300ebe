"""Files that appear complete or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(destination: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, with the file's own name, which becomes `destination` once the block has succeeded.

    An older file stays until then. The folder must exist.
    """
    destination = Path(destination)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as folder:
        written = Path(folder, destination.name)
        yield written
        os.replace(written, destination)


__all__ = ["whole_file"]
