"""The process of an isolated model, which serves granted verbs over its standard input and output.

`IsolatedServer` starts it as `python -m geobased.auditing.model_process`.
"""

import os
from typing import Any

from transformers.utils import logging

from .access import parse_access
from .model_loading import ModelSource, load_source
from .model_server import ModelServer
from .wire import Message, read_message, write_message


def main() -> None:
    """Serves the model that the first message names, until the pipe closes."""
    # frames alone go through the pipe; whatever the model's code prints goes to standard error
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    logging.disable_progress_bar()
    opening = read_message(requests)
    if opening is None:
        return
    try:
        header: dict[str, Any] = opening.header
        source = ModelSource(**header["source"])
        server = ModelServer(load_source(source), parse_access(header["grant"]), header["outside"])
    except Exception as error:  # whatever loading raises goes to the other side as a sentence
        write_message(answers, Message({"error": type(error).__name__, "message": str(error)}))
        return
    write_message(answers, Message({"result": "ready"}))
    while (request := read_message(requests)) is not None:
        write_message(answers, server.handle(request))


if __name__ == "__main__":
    main()
