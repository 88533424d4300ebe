"""Lets the API reference show docstrings as they are written here: a griffe extension, which mkdocs.yml names."""

import re
from typing import Any

import griffe

# "Example:" heads a block of code, as "Examples:" does
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
# Hugging Face's: "name (`int`, *optional*): ..." in lists of arguments, and [`Class`] for a link
ARGUMENT = re.compile(r"^( +[\w, ]+ \()([^()\n]*`[^()\n]*)(\):)", re.MULTILINE)
# a list right below a line of text, which Markdown takes for more of that text
LIST = re.compile(r"^( *)(?!- )(\S.*)\n(?=\1- )", re.MULTILINE)
CLASS_LINK = re.compile(r"\[(`[\w.]+`)\](?![\[(])")


class Docstrings(griffe.Extension):
    """Rewrites each docstring before its sections are read."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = EXAMPLE.sub("Examples:", obj.docstring.value)
            text = ARGUMENT.sub(lambda match: match[1] + re.sub("[`*]", "", match[2]) + match[3], text)
            text = LIST.sub(r"\1\2\n\n", text)
            obj.docstring.value = CLASS_LINK.sub(r"\1", text)
