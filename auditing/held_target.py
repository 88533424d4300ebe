"""The auditor's side of inner values, gradients and parameters, the same for texts and images.

A forward of inputs that require gradients can be gone back through with torch's own means: `loss.backward()`,
`torch.autograd.grad` and captum work on its outputs, and every backward is metered and written down.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .access import Capability
from .held_model import INTERVENTION, MASK
from .target import AuditTarget


@dataclass(frozen=True)
class Intervention:
    """A change of what an inner module gives.

    Attributes:
        module: its name, one of `modules()`.
        value: tensor that is added to the output or put in its place; it may be broadcast, and may require gradients.
        kind: "add" or "replace".
        mask: bool, broadcast to the output: where to change it; everywhere if None.
    """

    module: str
    value: torch.Tensor
    kind: str = "add"
    mask: torch.Tensor | None = None


@dataclass
class Forward:
    """What a forward gave.

    Attributes:
        outputs: float32 tensors by name: "logits", "embeddings", or names of inner modules.
        handle: number of the forward where gradients can be had, 0 elsewhere.
    """

    outputs: dict[str, torch.Tensor]
    handle: int = 0

    @property
    def logits(self) -> torch.Tensor:
        return self.outputs["logits"]

    @property
    def embeddings(self) -> torch.Tensor:
        return self.outputs["embeddings"]


class _Bridge(torch.autograd.Function):
    """Lets torch's gradients pass through the pipe."""

    @staticmethod
    def forward(ctx: Any, target: "HeldTarget", arguments: dict[str, Any], names: list[str], *values: torch.Tensor) -> Any:
        # the last value is there so that outputs require gradients; it goes nowhere
        tensors = dict(zip(names, values[:-1], strict=True))
        handle, outputs = target._request("forward", arguments, tensors)
        ctx.target, ctx.names, ctx.handle, ctx.read, ctx.track = target, names, handle, arguments["read"], arguments["track"]
        arguments["handle"] = handle
        return tuple(outputs[name] for name in arguments["read"])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        # asking for the gradients of parameters alone ends here
        found: dict[str, torch.Tensor] = {}
        if ctx.track:
            given = {name: value for name, value in zip(ctx.read, gradients, strict=True) if value is not None}
            found = ctx.target._request("backward", {"handle": ctx.handle, "wrt": list(ctx.track)}, given)[1]
        return None, None, None, *(found.get(name) for name in ctx.names), None


READING = Capability.LOGITS | Capability.EMBED_READ | Capability.ACT_READ


class HeldTarget(AuditTarget):
    """Verbs of models whose inner values are served."""

    __slots__ = ()
    needs = {
        **AuditTarget.needs,
        "forward": READING,
        "modules": Capability.ACT_READ,
        "parameter_gradients": Capability.PARAM_GRAD,
        "parameter_shapes": Capability.PARAM_GRAD,
        "weights": Capability.WEIGHTS,
        "randomise": Capability.FINETUNE,
        "restore": Capability.FINETUNE,
        "fine_tune": Capability.FINETUNE,
    }

    def _forward(
        self,
        inputs: dict[str, torch.Tensor],
        read: Sequence[str],
        interventions: Sequence[Intervention],
        parameters: Sequence[str],
        **options: Any,
    ) -> Forward:
        tensors = dict(inputs)
        for number, change in enumerate(interventions):
            tensors[f"{INTERVENTION}{number}"] = change.value
            if change.mask is not None:
                tensors[f"{INTERVENTION}{number}{MASK}"] = change.mask
        track = [name for name, value in tensors.items() if value.requires_grad and torch.is_grad_enabled()]
        arguments: dict[str, Any] = {
            "read": list(read),
            "interventions": [[change.module, change.kind] for change in interventions],
            "track": track,
            "parameters": list(parameters),
            **options,
        }
        if not track and not parameters:
            return Forward(self._request("forward", arguments, tensors)[1])
        # on the side: autograd must not see the handle
        given = dict(arguments)
        outputs = _Bridge.apply(self, given, list(tensors), *tensors.values(), torch.zeros(0, requires_grad=True))
        return Forward(dict(zip(read, outputs, strict=True)), given["handle"])

    def parameter_gradients(self, forward: Forward, loss: torch.Tensor, *, norms: bool = False) -> dict[str, torch.Tensor]:
        """Gradients of a scalar made of a forward's outputs, or their norms alone, for the `parameters` of that forward."""
        outputs = forward.outputs
        gradients = torch.autograd.grad(loss, list(outputs.values()), retain_graph=True, allow_unused=True)
        given = {name: value for name, value in zip(outputs, gradients, strict=True) if value is not None}
        arguments = {"handle": forward.handle, "parameters": True, "reduce": "norm" if norms else "none"}
        return self._request("backward", arguments, given)[1]

    def modules(self) -> dict[str, str]:
        """Inner modules: names and classes."""
        return self._request("modules", {})[0]

    def parameter_shapes(self) -> dict[str, list[int]]:
        return self._request("parameter_shapes", {})[0]

    def weights(self, *names: str) -> dict[str, torch.Tensor]:
        """Parameters whose names match one of these patterns."""
        return self._request("weights", {"names": list(names)})[1]

    def randomise(self, *names: str, seed: int = 0) -> list[str]:
        """Draws the parameters whose names match anew, until `restore` or the end of the scope; returns their names."""
        return self._request("randomise", {"parameters": list(names), "seed": seed})[0]

    def restore(self) -> None:
        """Gives all parameters their first values again."""
        self._request("restore", {})

    def _fine_tune(self, count: int, arguments: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> list[float]:
        return self._request("fine_tune", {"count": count, **arguments}, tensors)[1]["losses"].tolist()


__all__ = ["READING", "Forward", "HeldTarget", "Intervention"]
