"""Lays the packages out as Python imports them, as links under build/packages/geobased.

The folders at the top level of the repository become subpackages of `geobased` by setup.cfg's `package_dir`. Tools that read
files instead of importing modules (mypy, import-linter) cannot follow that table; they read this tree instead:

    python scripts/link_packages.py && MYPYPATH=build/packages mypy -p geobased
"""

import configparser
import contextlib
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "build" / "packages"


def package_folders() -> dict[str, Path]:
    """Import name -> folder, as setup.cfg has it."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    pairs = (line.split("=") for line in setup["options"]["package_dir"].strip().splitlines())
    return {name.strip(): ROOT / folder.strip() for name, folder in pairs}


def main() -> None:
    folders = package_folders()
    packages = {name: TARGET.joinpath(*name.split(".")) for name in folders}
    links: dict[Path, str] = {}
    for name, package in packages.items():
        for path in sorted(folders[name].iterdir()):
            # data too, so that PYTHONPATH=build/packages runs this tree; packages are linked by their own line of the table
            if path.name != "__pycache__" and path not in folders.values():
                links[package / path.name] = os.path.relpath(path, package)
    # only what differs changes: another process may be importing from the tree, or laying it out as well
    for folder, below, files in os.walk(TARGET, topdown=False):
        if "__pycache__" in Path(folder).parts:
            continue
        for path in (Path(folder, name) for name in (*below, *files) if name != "__pycache__"):
            if path.is_symlink() and links.get(path) != os.readlink(path):
                path.unlink(missing_ok=True)
            elif not path.is_symlink() and path not in packages.values():
                path.unlink(missing_ok=True) if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    for package in packages.values():
        package.mkdir(parents=True, exist_ok=True)
    for path, target in links.items():
        with contextlib.suppress(FileExistsError):
            path.symlink_to(target)


if __name__ == "__main__":
    main()
