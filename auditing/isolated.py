"""A model in a process of its own, which serves granted verbs over a pipe: frames of JSON and safetensors, no pickles.

python -m geobased.auditing.isolated     # started by `open_isolated`, not by hand
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .access import AuditError, Capability, capability_names, parse_access
from .model_loading import ModelSource, load_source
from .model_server import ModelServer
from .wire import Message, read_message, write_message

STOP_SECONDS = 10.0


class IsolatedServer:
    """The auditor's end of the pipe to a model's process; `handle` as that of `ModelServer`.

    Raises `ValueError` or `AuditError` if the model cannot be loaded; the message is that of the other process.
    """

    def __init__(self, source: ModelSource, grant: Capability, outside: Mapping[str, list[str]]) -> None:
        # the module search path goes along: the process is to run this code, however it was found
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-m", "geobased.auditing.isolated"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        opening = {
            "source": {**asdict(source), "labels": list(source.labels)},
            "grant": capability_names(grant),
            "outside": dict(outside),
        }
        try:
            answer = self.handle(Message(opening))
        except BaseException:
            self.close()
            raise
        if "error" in answer.header:
            self.close()
            kind = ValueError if answer.header["error"] in ("ValueError", "FileNotFoundError", "OSError") else AuditError
            raise kind(answer.header["message"])

    def handle(self, request: Message) -> Message:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            write_message(self._process.stdin, request)  # type: ignore[arg-type]
            answer = read_message(self._process.stdout)  # type: ignore[arg-type]
        except (BrokenPipeError, ValueError) as error:
            raise AuditError(f"the model's process does not answer: {error}") from error
        if answer is None:
            raise AuditError(f"the model's process ended (exit code {self._process.wait()})")
        return answer

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main() -> None:
    """Serves the model that the first message names, until the pipe closes."""
    # frames alone go through the pipe; whatever the model's code prints goes to standard error
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
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


__all__ = ["IsolatedServer"]
