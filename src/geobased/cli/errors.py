"""The one place where exceptions become a sentence on stderr and an exit code.

0: done. 1: something failed while working (the network, memory, a missing package). 2: the command or its input was wrong.
130: interrupted. With `--json` the sentence is also printed as {"error": …} on stdout; `--debug` adds the traceback.
"""

import json
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

FAILURE, BAD_INPUT, INTERRUPTED = 1, 2, 130
# what typer raises for unknown options and the like; it has no public name
UsageError = typer.BadParameter.__bases__[0]


class CommandError(Exception):
    """Ends a command with a sentence and an exit code."""

    def __init__(self, sentence: str, exit_code: int = BAD_INPUT) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


class ClearErrorsGroup(TyperGroup):
    """The root command: whatever a command raises ends in a sentence, never in a traceback."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        arguments = list(sys.argv[1:] if args is None else args)
        options = arguments[: arguments.index("--")] if "--" in arguments else arguments
        try:
            # one name in help and hints, however the command was started
            code = super().main(arguments, "geobased", **{**extra, "standalone_mode": False})
        except (KeyboardInterrupt, typer.Abort):
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except Exception as error:
            if "--debug" in options:
                traceback.print_exc()
            sentence, code = explain(error)
            print(f"error: {sentence}", file=sys.stderr)
            if "--json" in options:
                print(json.dumps({"error": sentence}, ensure_ascii=False))
        sys.exit(code if isinstance(code, int) else 0)


def one_line(error: BaseException) -> str:
    """The message of an exception as one line; its type where it has no message."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def explain(error: Exception) -> tuple[str, int]:
    """The sentence and the exit code for an exception that ended a command."""
    if isinstance(error, CommandError):
        return one_line(error), error.exit_code
    if isinstance(error, UsageError):
        hint = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""  # type: ignore[attr-defined]
        return " ".join(error.format_message().split()).rstrip(".") + hint, BAD_INPUT  # type: ignore[attr-defined]
    if isinstance(error, ModuleNotFoundError):
        return _missing_package(error), FAILURE
    if isinstance(error, ImportError):
        return one_line(error), FAILURE
    if isinstance(error, ConnectionError | TimeoutError):
        return one_line(error), FAILURE
    if isinstance(error, OSError):
        # an OSError of the system has a number; those without are messages of the loading code
        wrong_path = isinstance(error, FileNotFoundError | FileExistsError | IsADirectoryError | NotADirectoryError)
        return one_line(error), BAD_INPUT if wrong_path or error.errno is None else FAILURE
    if isinstance(error, ValueError):
        return one_line(error), BAD_INPUT
    if "torchvision" in str(error):  # transformers imports it where it is installed, whether it fits torch or not
        return f"{one_line(error)}: this torchvision does not fit torch; `geobased doctor` tells what to do", FAILURE
    if _is_out_of_memory(error):
        return f"the device is out of memory: {one_line(error)}", FAILURE
    return f"{type(error).__name__}: {one_line(error)} (run again with --debug for the traceback)", FAILURE


def _missing_package(error: ModuleNotFoundError) -> str:
    from .requirements import extra_of

    package = (error.name or "a package").partition(".")[0]
    extra = extra_of(package)
    install = f'pip install "geobased[{extra}]"' if extra else f"pip install {package}"
    return f"this command needs {package}, which is not installed: {install}"


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # what is not loaded raised nothing
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
