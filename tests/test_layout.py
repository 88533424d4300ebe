"""The repository's layout: what setup.cfg maps, what must not exist, and what documents must agree on."""

import configparser
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 600
# any of these folders may hold Python that setuptools must not miss
NOT_PACKAGES = {"benchmarks", "build", "dist", "docs", "runs", "scripts", "site", "spaces", "tests"}
SOURCE_SUFFIXES = {".py", ".md", ".toml", ".cfg", ".yml", ".yaml", ".sh", ".txt", ".json", ""}


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def listed_packages() -> dict[str, Path]:
    """Import name -> folder, for every package that setup.cfg ships."""
    options = setup_cfg()["options"]
    folders = dict(line.replace(" ", "").split("=") for line in options["package_dir"].strip().splitlines())
    return {name: ROOT / folders[name] for name in options["packages"].split()}


def repository_files() -> list[Path]:
    """Files of the repository: what git tracks or would add; in a source distribution, everything."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        names = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        return [path for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return [path for name in names if name and (path := ROOT / name).is_file()]


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_package_folder_is_listed():
    folders = set(listed_packages().values())
    for init in ROOT.rglob("__init__.py"):
        parts = init.relative_to(ROOT).parts
        if parts[0] in NOT_PACKAGES or parts[0].startswith(".") or "site-packages" in parts:
            continue
        assert init.parent in folders, f"{init.relative_to(ROOT)} is in no package that setup.cfg lists"


@pytest.mark.parametrize("name", listed_packages())
def test_listed_package_exists(name):
    folder = listed_packages()[name]
    assert (folder / "__init__.py").is_file(), f"setup.cfg lists {name} but {folder} has no __init__.py"


@pytest.mark.parametrize("folder", [".", "kernels", "kernels/torch-ext", "spaces", "tests", "benchmarks"])
def test_folder_is_no_package(folder):
    # `kernels` and `spaces` are packages of Hugging Face; a root __init__.py would run twice under pytest
    assert not (ROOT / folder / "__init__.py").exists()


def test_no_script_shadows_the_package_kernels():
    # a script's folder comes first on sys.path, and transformers imports `kernels` where it finds one
    shadows = [path for path in repository_files() if path.name in ("kernels.py", "spaces.py") and path.parent.name != "cli"]
    assert shadows == []


def test_no_source_file_is_long():
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in repository_files()
        if path.suffix == ".py"
    }
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_file_names_a_path_of_somebodys_machine():
    pattern = re.compile(r"(?<![\w.~-])/(?:work|home|root|Users|mnt)/[\w.]+")
    found = []
    for path in repository_files():
        if path.suffix in SOURCE_SUFFIXES and path.stat().st_size < 1_000_000:
            text = path.read_text(encoding="utf-8", errors="ignore")
            found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in pattern.finditer(text)]
    assert found == []


def test_kernels_use_no_block_pointers():
    # removed from Triton's main branch
    pattern = re.compile(r"tl\.(make_block_ptr|advance)\b")
    for path in listed_packages()["geobased.kernels"].glob("*.py"):
        assert not pattern.search(path.read_text(encoding="utf-8")), path.name


def test_kernels_import_relatively():
    # the folder is also a Hub kernel, which is imported under another name
    for path in listed_packages()["geobased.kernels"].glob("*.py"):
        assert not re.search(r"^\s*(from|import) geobased\b", path.read_text(encoding="utf-8"), re.MULTILINE), path.name


def test_twins_are_identical():
    assert load_script("sync_twins").differences() == []


def test_links_of_the_documents_lead_somewhere():
    assert load_script("check_links").broken_links() == []


def test_version_has_an_entry_in_the_changelog():
    version = re.search(r'"(.+)"', (ROOT / "src/geobased/_version.py").read_text(encoding="utf-8")).group(1)
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == version


def test_extras_exist():
    extras = setup_cfg()["options.extras_require"]
    assert {"triton", "demo", "mcp", "geo", "train", "audit", "eval", "docs", "dev"} <= set(extras)


def test_licence_files_exist():
    for name in setup_cfg()["metadata"]["license_files"].split():
        assert (ROOT / name).is_file()
