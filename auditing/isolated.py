"""The auditor's end of a pipe to a model in a process of its own: frames of JSON and safetensors go through it, no pickles."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict

from .access import AuditError, Capability, capability_names
from .model_loading import ModelSource
from .wire import Message, read_message, write_message

STOP_SECONDS = 10.0


class IsolatedServer:
    """The auditor's end of the pipe to a model's process; `handle` as that of `ModelServer`.

    Raises `ValueError` or `AuditError` if the model cannot be loaded; the message is that of the other process.
    """

    def __init__(self, source: ModelSource, grant: Capability, outside: Mapping[str, list[str]]) -> None:
        # the module search path goes along: the process is to run this code, however it was found
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-m", "geobased.auditing.model_process"]
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


__all__ = ["IsolatedServer"]
