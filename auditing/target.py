"""The auditor's side: a proxy of a model that offers what was granted, at a price, and nothing else.

with AuditTarget.open("based-mini", "black", mode="isolated") as target:
    with target.scope("my technique", "query", budget=20) as metered:
        metered.generate(["The capital of France is"])
        metered.spent, metered.left
        metered.logits(...)          # AccessDeniedError
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NoReturn, Protocol, TypeVar

import torch
from transformers import Pipeline, PreTrainedModel

from .access import (
    NOTHING,
    OUTSIDE,
    WHITE,
    AccessDeniedError,
    AuditError,
    BudgetExhaustedError,
    Capability,
    access_name,
    capability_names,
    parse_access,
)
from .endpoint import Endpoint, open_endpoint
from .isolated import IsolatedServer
from .ledger import CLOSE_SCOPE, OPEN_SCOPE
from .model_loading import ModelSource, load_source, serve
from .model_server import ModelServer
from .wire import Message

Mode = Literal["in_process", "isolated", "endpoint"]
CLAIMS: dict[str, str] = {
    "in_process": "The model ran in the auditor's own process. The ledger shows every use through the audited interface; code in"
    " the same process could have gone around it. This is evidence against mistakes, not against intent.",
    "isolated": "The model ran in a process of its own, which served granted uses alone, over a pipe that carries no code. If"
    " the host was honest, nothing but what the ledger lists was used.",
    "endpoint": "The model ran elsewhere, behind an address. The ledger shows every request of this audit; which model answered"
    " is known from its provider alone.",
}
ERRORS: dict[str, type[Exception]] = {
    error.__name__: error for error in (AccessDeniedError, BudgetExhaustedError, AuditError, ValueError)
}
Self = TypeVar("Self", bound="AuditTarget")


class Server(Protocol):
    """Either side of the pipe."""

    def handle(self, request: Message) -> Message: ...


class AuditTarget:
    """A model as an auditor with a grant may use it. `open` makes one; `dir()` lists the granted verbs.

    Verbs that are not granted raise `AccessDeniedError`, as does any other attribute: there is no way to the model from here. In
    mode "in_process" that keeps nobody who means to from the model's memory; in mode "isolated" the model is in another process.

    Attributes:
        kind: "text" or "image".
        mode: "in_process", "isolated" or "endpoint"; `CLAIMS` says what can be claimed of each.
        grant: what is granted here.
        info: what every auditor may know.
    """

    # verbs, and capabilities any of which offers them; what a call needs is for the model's side to tell
    needs: ClassVar[dict[str, Capability]] = {"outside": OUTSIDE, "read_outside": OUTSIDE}
    __slots__ = ("_ask", "_closing", "_left", "_scope", "_spent", "grant", "info", "kind", "mode")

    def __init__(self, ask: Any, closing: Any, mode: Mode, grant: Capability, info: dict[str, Any], scope: int = 0) -> None:
        self._ask, self._closing, self._scope = ask, closing, scope
        self.mode, self.grant, self.info, self.kind = mode, grant, info, info["kind"]
        self._spent = 0.0
        self._left: float | None = None

    @staticmethod
    def open(
        model: str | ModelSource | Endpoint | PreTrainedModel | Pipeline,
        grant: str | Capability | Iterable[str],
        *,
        mode: Mode | None = None,
        outside: Mapping[str, list[str]] | None = None,
        **parts: Any,
    ) -> "AuditTarget":
        """A `TextTarget` or `ImageTarget`.

        Args:
            model: a name (folder, shipped checkpoint, Hub id) or `ModelSource`, an `Endpoint`, or a model or pipeline in
                memory, which is put into evaluation mode.
            grant: levels and capabilities, such as "grey" or "black+docs".
            mode: "isolated" (by default where the model is given by name), "in_process" (by default for one in memory) or
                "endpoint".
            outside: files of what lies outside the box, by name of the capability.
            parts: for a model in memory: tokenizer, image_processor, labels, template.

        Raises:
            ValueError: a mode that does not go with the model, a grant that an endpoint cannot serve, a kind of model that cannot
                be audited.
            ModuleNotFoundError: the packages of the extra `audit` are missing.
        """
        granted, files = parse_access(grant), {name: list(paths) for name, paths in (outside or {}).items()}
        server: ModelServer | IsolatedServer
        if isinstance(model, Endpoint):
            if mode not in (None, "endpoint"):
                raise ValueError(f"mode={mode!r} does not go with an endpoint")
            served = Capability.QUERY | ~WHITE
            if granted & ~served:
                raise ValueError(
                    f"access {access_name(granted)} is more than an endpoint serves: grant black, and what is outside"
                )
            mode, server = "endpoint", ModelServer(open_endpoint(model), granted, files)
        elif isinstance(model, str | ModelSource):
            source = ModelSource(model, **parts) if isinstance(model, str) else model
            mode = mode or "isolated"
            if mode not in ("isolated", "in_process"):
                raise ValueError(f"mode={mode!r} is neither 'isolated' nor 'in_process'")
            if mode == "isolated":
                server = IsolatedServer(source, granted, files)
            else:
                server = ModelServer(load_source(source), granted, files)
        else:
            mode = mode or "in_process"
            if mode != "in_process":
                raise ValueError(f"mode={mode!r} needs the model by its name: save it to a folder, and give that")
            server = ModelServer(serve(model, **parts), granted, files)
        return _client(server, mode, granted)

    def __getattribute__(self, name: str) -> Any:
        needs = object.__getattribute__(self, "needs").get(name, NOTHING)
        if needs and not needs & object.__getattribute__(self, "grant"):
            # __getattr__ says why
            raise AttributeError(name)
        return object.__getattribute__(self, name)

    def __getattr__(self, name: str) -> NoReturn:
        if name in self.needs:
            raise AccessDeniedError(f"{name} is not granted: access is {access_name(self.grant)}")
        raise AccessDeniedError(f"this target offers no {name!r}; it offers {', '.join(dir(self))}")

    def __dir__(self) -> list[str]:
        granted = [name for name, needs in self.needs.items() if needs & self.grant]
        return sorted([*granted, "close", "grant", "info", "kind", "ledger", "left", "mode", "scope", "spent"])

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise AccessDeniedError("a target cannot be pickled or copied")

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the model's process, if it has one. A scope is closed by its context."""
        if self._scope == 0:
            self._closing()

    @property
    def spent(self) -> float:
        """Forward-equivalents that were spent in this scope."""
        return self._spent

    @property
    def left(self) -> float | None:
        """Forward-equivalents that this scope has left; None without a budget."""
        return self._left

    @contextlib.contextmanager
    def scope(
        self: Self,
        technique: str,
        capabilities: str | Capability | Iterable[str],
        *,
        budget: float,
        item: str = "",
        grant: Capability | None = None,
    ) -> Iterator[Self]:
        """A target for one technique on one item, with its declared capabilities alone and a budget in forward-equivalents.

        At its end changed parameters have their first values again. `grant` is that of the level, within this target's.

        Raises `AccessDeniedError` if the capabilities are not granted.
        """
        declared, level = parse_access(capabilities), self.grant if grant is None else grant
        arguments = {
            "technique": technique,
            "item": item,
            "capabilities": capability_names(declared),
            "granted": capability_names(level),
            "budget": float(budget),
        }
        number = self._request(OPEN_SCOPE, arguments)[0]
        inner = type(self)(self._ask, self._closing, self.mode, declared, self.info, number)
        inner._left = float(budget)
        try:
            yield inner
        finally:
            self._request(CLOSE_SCOPE, {}, scope=number)

    def ledger(self) -> list[dict[str, Any]]:
        """The rows that were written so far, as the side that holds the model wrote them."""
        return self._request("ledger", {})[0]

    def outside(self, what: str) -> list[str]:
        """Names of the files of "docs", "data", "code", "hparams", "checkpoints", "internal_evals" or "deployment"."""
        return self._request("outside", {"what": what})[0]

    def read_outside(self, what: str, name: str) -> bytes:
        """One of these files."""
        return self._request("outside", {"what": what, "name": name})[1]["content"].numpy().tobytes()

    def _request(
        self, verb: str, arguments: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None, scope: int | None = None
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        header = {"verb": verb, "scope": self._scope if scope is None else scope, "arguments": arguments}
        answer = self._ask(Message(header, {name: tensor.detach().cpu() for name, tensor in (tensors or {}).items()}))
        if "error" in answer.header:
            raise ERRORS[answer.header["error"]](answer.header["message"])
        if "spent" in answer.header:
            self._spent, self._left = answer.header["spent"], answer.header["left"]
        # as through a pipe: auditors need not know where the model is
        return answer.header["result"], {name: tensor.cpu() for name, tensor in answer.tensors.items()}


def _client(server: ModelServer | IsolatedServer, mode: Mode, grant: Capability) -> AuditTarget:
    from .image_target import ImageTarget
    from .text_target import TextTarget

    def ask(request: Message) -> Message:
        return server.handle(request)

    def close() -> None:
        if isinstance(server, IsolatedServer):
            server.close()

    info = ask(Message({"verb": "info", "scope": 0, "arguments": {}})).header["result"]
    kinds: dict[str, type[AuditTarget]] = {"text": TextTarget, "image": ImageTarget}
    return kinds[info["kind"]](ask, close, mode, grant, info)


__all__ = ["CLAIMS", "AuditTarget", "Mode"]
