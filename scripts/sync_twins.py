"""Keeps the copies of the plain PyTorch twins in modeling_based/ identical to their source in the kernels' folder.

A saved model must load where geobased is not installed, so the modeling folder carries the twins that it imports as flat
siblings. The kernels' folder is the source:

    python scripts/sync_twins.py           # copy what differs
    python scripts/sync_twins.py --check   # only tell; exit status 1 if something differs
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "kernels" / "torch-ext" / "geobased_kernels"
COPIES = ROOT / "modeling_based"
SHARED_FILES = ("without_autocast.py",)  # what the twins import


def twin_names() -> list[str]:
    """Files that must be the same in both folders: what the models import, and what that imports."""
    names = set(SHARED_FILES)
    texts = [path.read_text(encoding="utf-8") for path in COPIES.glob("*.py") if not path.name.endswith("_reference.py")]
    while texts:
        found = {f"{module}.py" for module in re.findall(r"from \.(\w+_reference) import", texts.pop())} - names
        names |= found
        texts += [(SOURCE / name).read_text(encoding="utf-8") for name in found]
    return sorted(names)


def differences() -> list[str]:
    """One line for each copy that is missing, differs from its source, or has no source."""
    lines = []
    for name in twin_names():
        copy = COPIES / name
        if not copy.is_file():
            lines.append(f"{copy.relative_to(ROOT)} is missing")
        elif copy.read_bytes() != (SOURCE / name).read_bytes():
            lines.append(f"{copy.relative_to(ROOT)} differs from {(SOURCE / name).relative_to(ROOT)}")
    for copy in sorted(COPIES.glob("*_reference.py")):
        if not (SOURCE / copy.name).is_file():
            lines.append(f"{copy.relative_to(ROOT)} has no source in {SOURCE.relative_to(ROOT)}")
        elif copy.name not in twin_names():
            lines.append(f"{copy.relative_to(ROOT)} is imported by no model: delete it")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a copy differs")
    arguments = parser.parse_args()
    if not arguments.check:
        for name in twin_names():
            shutil.copyfile(SOURCE / name, COPIES / name)
    lines = differences()
    for line in lines:
        print(line, file=sys.stderr)
    if lines:
        print("run `make sync-twins`; edit only the kernels' copy", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
