"""Lays the packages out as Python imports them, as links under build/packages/geobased.

The folders at the top level of the repository become subpackages of `geobased` by setup.cfg's `package_dir`. Tools that read
files instead of importing modules (mypy, import-linter) cannot follow that table; they read this tree instead:

    python scripts/link_packages.py && MYPYPATH=build/packages mypy -p geobased
"""

import configparser
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
    shutil.rmtree(TARGET, ignore_errors=True)
    folders = set(package_folders().values())
    for name, folder in package_folders().items():
        package = TARGET.joinpath(*name.split("."))
        package.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir()):
            # data too, so that PYTHONPATH=build/packages runs this tree; packages are linked by their own line of the table
            if path.name != "__pycache__" and path not in folders:
                (package / path.name).symlink_to(os.path.relpath(path, package))


if __name__ == "__main__":
    main()
