"""Checks that every relative link in the repository's Markdown files leads to a file, and every #anchor to a heading.

python scripts/check_links.py
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".", "docs", "kernels", "benchmarks", "checkpoints", "tests")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


def markdown_files() -> list[Path]:
    found: set[Path] = set()
    for folder in FOLDERS:
        found.update((ROOT / folder).glob("*.md" if folder == "." else "**/*.md"))
    return sorted(found)


def anchors(text: str) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    names = (re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(FENCE.sub("", text)))
    return set(names)


def broken_links() -> list[str]:
    broken = []
    for document in markdown_files():
        text = document.read_text(encoding="utf-8")
        for link in LINK.findall(FENCE.sub("", text)):
            if "://" in link or link.startswith("mailto:"):
                continue
            target, _, anchor = link.partition("#")
            path = (document.parent / target).resolve() if target else document
            where = f"{document.relative_to(ROOT)}: {link}"
            if not path.exists():
                broken.append(f"{where}: no such file")
            elif anchor and path.suffix == ".md" and anchor not in anchors(path.read_text(encoding="utf-8")):
                broken.append(f"{where}: no such heading")
    return broken


def main() -> int:
    lines = broken_links()
    for line in lines:
        print(line, file=sys.stderr)
    print(f"{len(markdown_files())} Markdown files, {len(lines)} broken links")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
