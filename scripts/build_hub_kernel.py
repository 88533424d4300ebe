"""Lays the kernels out as a Hub kernel repository, ready for upload. No network, nothing is compiled.

    python scripts/build_hub_kernel.py [--output build/geobased-kernels]
    hf upload geobased/geobased-kernels build/geobased-kernels --repo-type kernel --revision v1

The result is what the package `kernels` loads, by path or from the Hub:

    README.md                        from kernels/CARD.md
    build/torch-<backend>/           one for each backend in kernels/build.toml
        __init__.py, layers.py, …    the folder kernels/torch-ext/geobased_kernels
        metadata.json                name, version, licence, backend, and an identifier made from the sources
"""

import argparse
import hashlib
import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
SOURCE_METADATA = "metadata.json"  # lies beside the sources, so that a checkout loads without a build
MINIMUM_KERNELS = "0.16.0"


def build_settings() -> dict[str, Any]:
    """`[general]` of kernels/build.toml."""
    return tomllib.loads((KERNELS / "build.toml").read_text(encoding="utf-8"))["general"]


def sources() -> list[Path]:
    general = build_settings()
    return sorted((KERNELS / "torch-ext" / general["name"].replace("-", "_")).glob("*.py"))


def digest(files: list[Path]) -> str:
    """Changes whenever a source does: two versions in one process must not share a module name."""
    total = hashlib.sha256()
    for path in files:
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:8]


def metadata(backend: str, identifier: str) -> dict[str, Any]:
    """What `kernels` reads before it imports a build; `identifier` becomes the module's name."""
    general = build_settings()
    return {
        "name": general["name"],
        "id": identifier,
        "version": general["version"],
        "license": general["license"],
        "python-depends": general.get("python-depends", []),
        "backend": {"type": backend},
        "kernels-minver": MINIMUM_KERNELS,
    }


def source_metadata() -> str:
    """The file beside the sources: `kernels` loads that folder as it is, on any backend."""
    name = build_settings()["name"].replace("-", "_")
    return json.dumps(metadata("cuda", f"_{name}_source"), indent=2) + "\n"


def build(output: Path) -> list[Path]:
    """Writes the repository to `output`, replacing an earlier build of ours there, and returns the build folders.

    Raises ValueError if `output` holds something else.
    """
    if output.exists() and any(output.iterdir()):
        if not (output / "build").is_dir() or not (output / "README.md").is_file():
            raise ValueError(f"{output} is not empty and not an earlier build: choose another folder or remove it")
        shutil.rmtree(output)
    general, files = build_settings(), sources()
    name = general["name"].replace("-", "_")
    folders = []
    for backend in general["backends"]:
        folder = output / "build" / f"torch-{backend}"
        folder.mkdir(parents=True)
        for path in files:
            shutil.copyfile(path, folder / path.name)
        identifier = f"_{name}_{backend}_{digest(files)}"
        text = json.dumps(metadata(backend, identifier), indent=2) + "\n"
        (folder / SOURCE_METADATA).write_text(text, encoding="utf-8")
        folders.append(folder)
    shutil.copyfile(KERNELS / "CARD.md", output / "README.md")
    return folders


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "geobased-kernels")
    arguments = parser.parse_args()
    try:
        folders = build(arguments.output)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for folder in folders:
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
