"""Reading of the two kinds of input: plain text, and documents as JSON lines."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the character ranges [start, end) of the answers in it."""

    text: str
    answers: tuple[tuple[int, int], ...] = ()


def read_text(path: str | Path) -> str:
    """A UTF-8 text file, line breaks as they are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: nothing but white space in it, or no UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such text file: {path}")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def parse_document(line: str, where: str = "document") -> Document:
    """A document from a JSON line `{"text": str, "answers": [[start, end], …]}`; `answers` may be left out.

    Raises:
        ValueError: no JSON object, no text, or answers outside of the text.
    """
    try:
        fields = json.loads(line)
        text = fields["text"]
        answers = tuple((int(start), int(end)) for start, end in fields.get("answers", ()))
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f'{where}: expected {{"text": …, "answers": [[start, end], …]}}: {error!r}') from error
    if not isinstance(text, str) or not text:
        raise ValueError(f"{where}: the text is empty")
    if any(not 0 <= start < end <= len(text) for start, end in answers):
        raise ValueError(f"{where}: an answer lies outside of the text")
    return Document(text, answers)


def numbered_lines(path: str | Path, content: str) -> list[tuple[str, str]]:
    """Where each line of a file stands, as "path:number", and the line; blank lines are left out.

    Args:
        content: what the file holds, for the message of an error.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no line that is not blank.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file of {content}: {path}")
    lines = path.read_text(encoding="utf-8").splitlines()
    numbered = [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path} is empty")
    return numbered


def read_documents(path: str | Path) -> Iterator[Document]:
    """Documents of a JSON-lines file, one by one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty file or a malformed line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such document file: {path}")
    number = 0
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):  # noqa: B007
            yield parse_document(line, f"{path}:{number}")
    if number == 0:
        raise ValueError(f"{path} is empty")


__all__ = ["Document", "numbered_lines", "parse_document", "read_documents", "read_text"]
