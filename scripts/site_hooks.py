"""What `mkdocs build` does beyond its plugins (mkdocs.yml names this file under `hooks`).

Pages that stand elsewhere in the repository (the README's guide, the changelog, the cards of models) get a place in the site, and
links out of docs/ lead to them or to a copy of the file. The API reference is laid out from the packages' `__all__`. Formulas
become MathML, which browsers draw without a script.
"""

import ast
import html
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ROOT / "build" / "packages" / "geobased"
CARDS = ("based-mini", "earthclip-mini", "earthclip-mini-clip")
# file of the repository -> page of the site
PAGES = {
    "README.md": "based.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "kernels/CARD.md": "model_cards/kernels.md",
    **{f"checkpoints/{name}/README.md": f"model_cards/{name}.md" for name in CARDS},
}
# the README's sections on BASED models, from the first of these headings up to the second
GUIDE_TITLE, GUIDE_FIRST, GUIDE_END = "# BASED models", "## Load a model", "## More"
REFERENCE = (
    "modeling_based",
    "modeling_streetclip",
    "modeling_pigeon",
    "pipelines",
    "geography",
    "kernels",
    "training",
    "recall",
    "auditing",
    "model_cards",
)
# where the other modules are machinery of the models
MODULES = {"modeling_based": ("convert_official_checkpoint", "export")}
# of kernels' modules, as their package has it
PRIVATE_SUFFIXES = ("_triton", "_launch", "_configs")
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^(?:```|~~~).*?^(?:```|~~~) *$", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that stand outside docs/ and those of the reference."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=guide(text) if source == "README.md" else text))
    for page, text in reference_pages().items():
        files.append(File.generated(config, page, content=text))
    # what the pages show or link to
    for file in list(files.documentation_pages()):
        source = repository_path(file.src_uri)
        for target in outside_targets(file.content_string, source):
            if files.get_file_from_path(copy_path(target)) is None:
                files.append(File.generated(config, copy_path(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lets links out of docs/ lead to the pages of the site."""
    source = repository_path(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target, _, anchor = match[2].partition("#")
        path = resolved(target, source)
        if path is None:
            return match[0]
        link = posixpath.relpath(site_path(path), here or ".")
        return f"{match[1]}{link}{'#' + anchor if anchor else ''}{match[3]}"

    return outside_fences(markdown, lambda text: LINK.sub(moved, text))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML."""

    def drawn(match: re.Match[str]) -> str:
        block = match[1] == "div"
        formula = convert(html.unescape(match[3]).strip(), display="block" if block else "inline")
        return f'<div class="formula">{formula}</div>' if block else formula

    return FORMULA.sub(drawn, content)


def guide(readme: str) -> str:
    """The README's part on BASED models as a page of its own."""
    first, end = readme.index(f"\n{GUIDE_FIRST}\n"), readme.index(f"\n{GUIDE_END}\n")
    return f"{GUIDE_TITLE}\n{readme[first:end]}"


def repository_path(page: str) -> str:
    """File of the repository, relative to its root, that a page of the site is made of."""
    return next((source for source, made in PAGES.items() if made == page), f"docs/{page}")


def site_path(path: str) -> str:
    """Where the site has a file of the repository."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else copy_path(path))


def copy_path(path: str) -> str:
    """Where the site has a copy of a file that is no page; a name with a dot for such as LICENSE, which browsers show as text."""
    return f"files/{path}" if posixpath.splitext(path)[1] in (".png", ".csv", ".json") else f"files/{path}.txt"


def resolved(target: str, source: str) -> str | None:
    """The repository's file, relative to its root, that a link in the file `source` names; None for other links."""
    if not target or "://" in target or target.startswith(("mailto:", "/")):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    return path if (ROOT / path).is_file() else None


def outside_targets(text: str, source: str) -> list[str]:
    found = {resolved(link.partition("#")[0], source) for _, link, _ in LINK.findall(FENCE.sub("", text))}
    return sorted(path for path in found if path is not None and not path.startswith("docs/") and path not in PAGES)


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """`text` with what stands outside of code blocks changed."""
    parts, end = [], 0
    for fence in FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def public_names(path: Path) -> list[str]:
    """`__all__` of a module, which is not imported; empty if it has none, or (kernels: all its modules) computes it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" and isinstance(node.value, ast.List):
            return list(ast.literal_eval(node.value))
    return []


def module_names(package: str, path: Path) -> list[str]:
    """What the reference has of a module: its `__all__`; of kernels' modules, few of which have one, what has a docstring."""
    names = public_names(path)
    if names or package != "kernels":
        return names
    body = ast.parse(path.read_text(encoding="utf-8")).body
    defined = (node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"))
    return [node.name for node in defined if ast.get_docstring(node)]


def summary(path: Path) -> str:
    """First paragraph of a module's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def reference_pages() -> dict[str, str]:
    """Page -> Markdown: an overview, the package's own names, and one page for each subpackage."""
    rows = [f"| [`geobased.{name}`]({name}.md) | {summary(PACKAGES / name / '__init__.py')} |" for name in REFERENCE]
    own = public_names(PACKAGES / "__init__.py")
    pages = {
        "reference/index.md": "\n".join(
            [
                "# API reference",
                "",
                "Public names are those in a module's `__all__`; before 1.0 a minor version may change them.",
                "",
                "`import geobased` gives, beside the subpackages:",
                "",
                *(f"- [`{name}`](geobased.md#geobased.{name})" for name in own),
                "",
                "| subpackage | |",
                "|---|---|",
                *rows,
                "",
            ]
        ),
        "reference/geobased.md": "\n".join(["# geobased", "", *directive("geobased", own)]),
    }
    for name in REFERENCE:
        folder = PACKAGES / name
        lines = [f"# geobased.{name}", ""]
        files = [path for path in sorted(folder.glob("[a-z]*.py")) if not path.stem.endswith(PRIVATE_SUFFIXES)]
        modules = {path.stem: module_names(name, path) for path in files if path.stem in MODULES.get(name, (path.stem,))}
        # a package's `__all__` names objects, or modules where it is a collection of them
        top = [item for item in public_names(folder / "__init__.py") if item not in modules]
        lines += directive(f"geobased.{name}", top)
        for module, names in modules.items():
            rest = [item for item in names if item not in top]
            if rest:
                lines += [f"## {module}", "", *directive(f"geobased.{name}.{module}", rest)]
        pages[f"reference/{name}.md"] = "\n".join(lines)
    return pages


def directive(module: str, names: list[str]) -> list[str]:
    """mkdocstrings' block for a module's names, under the module's own docstring."""
    members = f"[{', '.join(names)}]" if names else "false"
    options = ("show_root_heading: false", "show_root_toc_entry: false", f"members: {members}", "heading_level: 3")
    return [f"::: {module}", "    options:", *(f"      {option}" for option in options), ""]
