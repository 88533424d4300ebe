"""The gate before a model: what is granted is served and written down, all else is refused and written down as well."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from .access import (
    OUTSIDE,
    AccessDeniedError,
    AuditError,
    BudgetExhaustedError,
    Capability,
    access_name,
    capability_names,
    parse_access,
)
from .canonical import message_sha256
from .ledger import CLOSE_SCOPE, FAILED, OPEN, OPEN_SCOPE, REFUSED, SERVED, Ledger
from .wire import Message

Tensors = dict[str, torch.Tensor]
Answer = tuple[Any, Tensors]
# budgets are sums of floats
ROUNDING = 1e-9


class Call:
    """One use of a model, and what it costs in forward-equivalents.

    A forward pass over one item (a prompt, an image) is 1, a backward pass over it 2 more. Of an item that is read in part from a
    cache counts the share of its tokens that is computed, so a generated token costs 1 / its position.
    """

    def __init__(self, left: float | None = None) -> None:
        self.left = left
        self.forward = self.backward = 0.0

    def require(self, cost: float) -> None:
        """Raises `BudgetExhaustedError` if so much more is not left."""
        if self.left is not None and self.forward + self.backward + cost > self.left + ROUNDING:
            raise BudgetExhaustedError(f"this needs {cost:g} forward-equivalents more, of which {max(0.0, self.left):g} are left")

    def spend(self, forward: float = 0.0, backward: float = 0.0) -> None:
        """To be called before the work is done, but for `forward` that `require` has covered."""
        self.require(forward + backward)
        self.forward += forward
        self.backward += backward


Needs = Callable[[dict[str, Any], Tensors], Capability]
VerbMethod = Callable[[Call, dict[str, Any], Tensors], Answer]


def verb(needs: Capability | Needs) -> Callable[[Any], Any]:
    """Marks a method `(call, arguments, tensors) -> (result, tensors)` of a served model as one that auditors may call.

    Args:
        needs: capability, or a function that tells it from the arguments and tensors of a call.
    """

    def mark(method: Any) -> Any:
        method.needs = needs if callable(needs) else lambda arguments, tensors: needs
        return method

    return mark


class ServedModel(Protocol):
    """What stands behind the gate. Its verbs are the methods that `verb` marks."""

    kind: str

    def info(self) -> dict[str, Any]:
        """What every auditor may know: the kind of inputs and their size."""
        ...

    def identity(self) -> dict[str, Any]:
        """What is audited, as the ledger names it, with digests of its files where they are known."""
        ...

    def end_scope(self) -> None:
        """Undoes changes to the model and lets go of what was kept for later calls."""
        ...


class Scope:
    """A technique at work, with the capabilities that it declared and a budget."""

    def __init__(self, capabilities: Capability, budget: float | None) -> None:
        self.capabilities, self.budget, self.spent = capabilities, budget, 0.0

    @property
    def left(self) -> float | None:
        return None if self.budget is None else max(0.0, self.budget - self.spent)


def _needs_of_outside(arguments: dict[str, Any], tensors: Tensors) -> Capability:
    needs = parse_access([arguments["what"]])
    if needs & ~OUTSIDE:
        raise ValueError(f"{arguments['what']!r} does not lie outside the box: {', '.join(capability_names(OUTSIDE))} do")
    return needs


class ModelServer:
    """Serves one model to an auditor.

    Args:
        model: what is served.
        grant: what the auditor may do.
        outside: files of what lies outside the box, by the name of their capability ("docs", "data", …).
    """

    def __init__(self, model: ServedModel, grant: Capability, outside: Mapping[str, list[str]] | None = None) -> None:
        self.model, self.grant, self.ledger = model, parse_access(grant), Ledger()
        self._files = _outside_files(outside or {}, grant)
        self._scopes: dict[int, Scope] = {0: Scope(self.grant, None)}
        self._opened = 0
        details = {"granted": capability_names(self.grant), "access": access_name(self.grant), "model": model.identity()}
        self.ledger.append(OPEN, details=details)

    def handle(self, request: Message) -> Message:
        """The answer to a request `{"verb", "scope", "arguments"}`; errors are answers too. Never raises."""
        try:
            name, number = request.header["verb"], int(request.header["scope"])
            arguments = dict(request.header["arguments"])
            control = {
                OPEN_SCOPE: self._open_scope,
                CLOSE_SCOPE: self._close_scope,
                "ledger": lambda number, arguments: self.ledger.rows,
                "info": lambda number, arguments: self.model.info(),
            }
            if name in control:
                return Message({"result": control[name](number, arguments)})
            result, tensors, scope = self._use(name, number, arguments, request.tensors)
            return Message({"result": result, "spent": scope.spent, "left": scope.left}, tensors)
        except (AuditError, ValueError) as error:
            return Message({"error": type(error).__name__, "message": str(error)})
        except Exception as error:  # whatever a model raises is an answer; the server goes on
            return Message({"error": "AuditError", "message": f"the model failed: {type(error).__name__}: {error}"})

    def _open_scope(self, number: int, arguments: dict[str, Any]) -> int:
        declared, level = parse_access(arguments["capabilities"]), parse_access(arguments["granted"])
        budget = float(arguments["budget"])
        details = {
            "technique": str(arguments["technique"]),
            "item": str(arguments["item"]),
            "capabilities": capability_names(declared),
            "granted": capability_names(level),
            "budget": budget,
        }
        if beyond := (declared & ~level) | (level & ~self.grant):
            self.ledger.append(OPEN_SCOPE, outcome=REFUSED, details=details)
            raise AccessDeniedError(f"{', '.join(capability_names(beyond))} is not granted: access is {access_name(self.grant)}")
        self._opened += 1
        self._scopes[self._opened] = Scope(declared, budget)
        self.ledger.append(OPEN_SCOPE, scope=self._opened, details=details)
        return self._opened

    def _close_scope(self, number: int, arguments: dict[str, Any]) -> float:
        if number == 0:
            raise ValueError("scope 0 is that of the target itself, which stays open")
        spent = self._scope(number).spent
        del self._scopes[number]
        self.model.end_scope()
        self.ledger.append(CLOSE_SCOPE, scope=number, details={"spent": spent})
        return spent

    def _scope(self, number: int) -> Scope:
        if number not in self._scopes:
            raise AccessDeniedError(f"scope {number} is not open")
        return self._scopes[number]

    def _use(self, name: str, number: int, arguments: dict[str, Any], tensors: Tensors) -> tuple[Any, Tensors, Scope]:
        scope = self._scope(number)
        # of the class: whatever hangs on the model itself is no verb
        owner: Any = self if name == "outside" else self.model
        method: Any = getattr(type(owner), name, None)
        digest = message_sha256(arguments, tensors)
        if not hasattr(method, "needs"):
            self.ledger.append(f"unknown:{name}", scope=number, outcome=REFUSED, input_sha256=digest)
            raise AccessDeniedError(f"{name!r} is nothing that this target offers")
        needs = method.needs(arguments, tensors)
        if beyond := needs & ~scope.capabilities:
            self.ledger.append(name, scope=number, capabilities=needs, outcome=REFUSED, input_sha256=digest)
            raise AccessDeniedError(
                f"{name} needs {', '.join(capability_names(beyond))}, which is not granted: access is"
                f" {access_name(scope.capabilities)}"
            )
        call, outcome, output = Call(scope.left), FAILED, ""
        try:
            result, produced = method(owner, call, arguments, tensors)
            outcome, output = SERVED, message_sha256(result, produced)
        except BudgetExhaustedError:
            outcome = REFUSED
            raise
        finally:
            scope.spent += call.forward + call.backward
            self.ledger.append(
                name,
                scope=number,
                capabilities=needs,
                outcome=outcome,
                input_sha256=digest,
                output_sha256=output,
                forward=call.forward,
                backward=call.backward,
            )
        return result, produced, scope

    @verb(_needs_of_outside)
    def outside(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """Names of the files of a kind, or with `name` the bytes of one."""
        files = self._files.get(arguments["what"], {})
        name = arguments.get("name")
        if name is None:
            return sorted(files), {}
        if name not in files:
            raise ValueError(f"no file {name!r} was handed over as {arguments['what']}; there are: {', '.join(files) or 'none'}")
        content = bytearray(files[name].read_bytes())
        return len(content), {"content": torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0).byte()}


def _outside_files(outside: Mapping[str, list[str]], grant: Capability) -> dict[str, dict[str, Path]]:
    """Files by kind and name; those of a folder have the folder's name before theirs."""
    found: dict[str, dict[str, Path]] = {}
    for what, paths in outside.items():
        needs = parse_access([what])
        if needs & ~OUTSIDE:
            raise ValueError(f"outside: {what!r} is none of {', '.join(capability_names(OUTSIDE))}")
        if needs & ~grant:
            raise ValueError(f"outside: files are given as {what}, but access does not grant it: add {what} to the access")
        files = found.setdefault(what, {})
        for path in map(Path, [paths] if isinstance(paths, str) else paths):
            if not path.exists():
                raise FileNotFoundError(f"outside: there is no {what} at {path}")
            for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
                files[file.relative_to(path.parent).as_posix()] = file
    return found


__all__ = ["Answer", "Call", "ModelServer", "Needs", "ServedModel", "Tensors", "verb"]
