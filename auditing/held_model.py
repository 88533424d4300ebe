"""What text and image models have in common where the auditor's side holds them: inner values, gradients, parameters."""

import contextlib
import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .access import NOTHING, Capability
from .low_rank import low_rank_adapters
from .model_server import Answer, Call, Needs, Tensors, verb

# forwards of which a backward may still be asked
KEPT_GRAPHS = 4
INTERVENTION = "intervention."
MASK = ".mask"


@dataclass
class Graph:
    """A forward that can be gone back through."""

    outputs: Tensors
    leaves: Tensors
    parameters: dict[str, nn.Parameter]
    items: int


def needs_of_forward(input_needs: Callable[[Tensors], Capability] | None = None) -> Needs:
    """What a forward asks for, from its arguments and tensors; `input_needs` tells it of the inputs."""

    def needs_of(arguments: dict[str, Any], tensors: Tensors) -> Capability:
        needs = NOTHING if input_needs is None else input_needs(tensors)
        for name in arguments["read"]:
            own = {"logits": Capability.LOGITS, "embeddings": Capability.EMBED_READ}
            needs |= own.get(name, Capability.ACT_READ)
        if arguments.get("interventions"):
            needs |= Capability.ACT_WRITE
        if arguments.get("track"):
            needs |= Capability.INPUT_GRAD
        if arguments.get("parameters"):
            needs |= Capability.PARAM_GRAD
        return needs

    return needs_of


def _needs_of_backward(arguments: dict[str, Any], tensors: Tensors) -> Capability:
    inputs = Capability.INPUT_GRAD if arguments.get("wrt") else NOTHING
    return inputs | (Capability.PARAM_GRAD if arguments.get("parameters") else NOTHING)


class HeldModel(ABC):
    """A model in memory. A subclass tells how its inputs are read and what it computes from them."""

    kind: str

    def __init__(self, module: nn.Module, identity: dict[str, Any]) -> None:
        self.module, self._identity = module.eval(), identity
        self._graphs: dict[int, Graph] = {}
        self._forwards = 0
        self._originals: Tensors = {}

    def identity(self) -> dict[str, Any]:
        return self._identity

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @abstractmethod
    def read_inputs(self, tensors: Tensors) -> Tensors:
        """Checked inputs on the model's device; all but masks have a first dimension of items."""

    @abstractmethod
    def compute(self, inputs: Tensors, read: Sequence[str], last: int | None) -> Tensors:
        """ "logits" and, if it is to be read, "embeddings"."""

    @abstractmethod
    def example_loss(self, arguments: dict[str, Any], tensors: Tensors, chosen: Sequence[int]) -> torch.Tensor:
        """Mean loss of the chosen examples of a fine-tuning."""

    def forward(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """Values of the model for a batch.

        Arguments: read (names: "logits", "embeddings", inner modules), last (positions from the end whose logits are wanted),
        interventions ([module, "add" or "replace"]; the values are the tensors "intervention.<number>"), track (inputs and
        interventions whose gradients may be asked for), parameters (patterns of names, likewise).
        """
        read, kinds = list(arguments["read"]), list(arguments.get("interventions", ()))
        track, parameters = arguments.get("track", ()), self._parameters(arguments.get("parameters", ()))
        values = {name: value.to(self.device) for name, value in tensors.items() if name.startswith(INTERVENTION)}
        inputs = self.read_inputs({name: value for name, value in tensors.items() if name not in values})
        items = next(iter(inputs.values())).shape[0]
        call.spend(forward=items)
        leaves = {name: value.detach().requires_grad_(name in track) for name, value in {**inputs, **values}.items()}
        if missing := set(track) - leaves.keys():
            raise ValueError(f"gradients are asked of {sorted(missing)[0]!r}, which is no input of this call")
        keep = bool(track or parameters)
        with torch.set_grad_enabled(keep), self._hooked(read, kinds, leaves) as caught:
            outputs = self.compute({name: leaves[name] for name in inputs}, read, arguments.get("last"))
        outputs = {name: {**caught, **outputs}[name] for name in read}
        if not keep:
            return 0, {name: value.detach().float() for name, value in outputs.items()}
        self._forwards += 1
        self._graphs[self._forwards] = Graph(outputs, {name: leaves[name] for name in track}, parameters, items)
        if len(self._graphs) > KEPT_GRAPHS:
            del self._graphs[min(self._graphs)]
        return self._forwards, {name: value.detach().float() for name, value in outputs.items()}

    @verb(_needs_of_backward)
    def backward(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """Gradients of the sum of outputs times `tensors`, with respect to inputs (wrt) or parameters of a kept forward (handle).

        With reduce="norm" parameters give the norm of their gradients alone.
        """
        graph = self._graphs.get(arguments["handle"])
        if graph is None:
            raise ValueError(f"the last {KEPT_GRAPHS} forwards are kept; go back through a forward before calling more of them")
        wrt, reduce = list(arguments.get("wrt", ())), arguments.get("reduce", "none")
        if reduce not in ("none", "norm"):
            raise ValueError(f"reduce={reduce!r} is neither 'none' nor 'norm'")
        parameters = graph.parameters if arguments.get("parameters") else {}
        if missing := set(wrt) - graph.leaves.keys():
            raise ValueError(f"gradients are asked of {sorted(missing)[0]!r}, which the forward did not track")
        outputs = [graph.outputs[name] for name in tensors]
        cotangents = [value.to(output.device, output.dtype) for value, output in zip(tensors.values(), outputs, strict=True)]
        wanted = {**{name: graph.leaves[name] for name in wrt}, **parameters}
        call.spend(backward=2 * graph.items)
        gradients = torch.autograd.grad(outputs, list(wanted.values()), cotangents, retain_graph=True, allow_unused=True)
        found = {
            name: torch.zeros_like(value) if gradient is None else gradient
            for (name, value), gradient in zip(wanted.items(), gradients, strict=True)
        }
        if reduce == "norm":
            found |= {name: found[name].norm() for name in parameters}
        return None, {name: value.detach().float() for name, value in found.items()}

    @verb(Capability.ACT_READ)
    def modules(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """Names and classes of the inner modules."""
        return {name: type(module).__name__ for name, module in self.module.named_modules() if name}, {}

    @verb(Capability.PARAM_GRAD)
    def parameter_shapes(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        return {name: list(value.shape) for name, value in self.module.named_parameters()}, {}

    @verb(Capability.WEIGHTS)
    def weights(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """Parameters whose names match one of the patterns `names`."""
        return None, {name: value.detach().clone() for name, value in self._parameters(arguments["names"]).items()}

    @verb(Capability.FINETUNE)
    def fine_tune(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """Trains the parameters that match `parameters` (all by default) with AdamW for `steps`; returns the losses.

        With a `rank` low-rank adapters are trained instead, and added to those parameters at the end.
        """
        steps, size, count = int(arguments["steps"]), int(arguments["batch_size"]), int(arguments["count"])
        if min(steps, size, count) < 1:
            raise ValueError("fine-tuning needs examples, and steps and batch_size of at least 1")
        size = min(size, count)
        call.spend(forward=steps * size, backward=2 * steps * size)
        named = self._parameters(arguments.get("parameters") or ["*"])
        self._remember(named)
        rank, seed = int(arguments.get("rank") or 0), int(arguments["seed"])
        generator = torch.Generator().manual_seed(seed)
        losses, order = [], torch.empty(0, dtype=torch.long)
        trained = low_rank_adapters(self.module, named, rank, seed) if rank else contextlib.nullcontext(named)
        with trained as parameters, torch.enable_grad():
            optimizer = torch.optim.AdamW(parameters.values(), lr=float(arguments["learning_rate"]), weight_decay=0.0)
            for _ in range(steps):
                while len(order) < size:
                    order = torch.cat([order, torch.randperm(count, generator=generator)])
                chosen, order = order[:size].tolist(), order[size:]
                loss = self.example_loss(arguments, tensors, chosen)
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                losses.append(float(loss.detach()))
            for parameter in parameters.values():
                parameter.grad = None
        return None, {"losses": torch.tensor(losses)}

    @verb(Capability.FINETUNE)
    def randomise(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """Draws the parameters that match `parameters` anew, from normal distributions of their own mean and deviation."""
        parameters = self._parameters(arguments["parameters"])
        self._remember(parameters)
        generator = torch.Generator().manual_seed(int(arguments["seed"]))
        with torch.no_grad():
            for value in parameters.values():
                drawn = torch.randn(value.shape, generator=generator).to(value)
                value.copy_(value.mean() + drawn * value.std(correction=0))
        return sorted(parameters), {}

    @verb(Capability.FINETUNE)
    def restore(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """Gives changed parameters their first values again; the end of a scope does so too."""
        self.end_scope()
        return None, {}

    def end_scope(self) -> None:
        self._graphs.clear()
        with torch.no_grad():
            for name, value in self.module.named_parameters():
                if name in self._originals:
                    value.copy_(self._originals[name])
        self._originals.clear()

    def _remember(self, parameters: dict[str, nn.Parameter]) -> None:
        for name, value in parameters.items():
            self._originals.setdefault(name, value.detach().clone())

    def _parameters(self, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
        """Parameters whose names match a pattern, such as "model.layers.0.*"."""
        found: dict[str, nn.Parameter] = {}
        for pattern in patterns:
            matching = {name: value for name, value in self.module.named_parameters() if fnmatch.fnmatchcase(name, pattern)}
            if not matching:
                raise ValueError(f"no parameter of the model is named like {pattern!r}")
            found |= matching
        return found

    @contextlib.contextmanager
    def _hooked(self, read: Sequence[str], kinds: Sequence[Sequence[str]], values: Tensors) -> Iterator[Tensors]:
        """Within this context outputs of modules are changed, and those to be read are caught."""
        caught: Tensors = {}
        modules = dict(self.module.named_modules())
        handles = []

        def change(kind: str, value: torch.Tensor, mask: torch.Tensor | None, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            changed = first + value.to(first.dtype) if kind == "add" else value.to(first.dtype).expand_as(first)
            if mask is not None:
                changed = torch.where(mask.bool(), changed, first)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        def catch(name: str, output: Any) -> None:
            caught[name] = output[0] if isinstance(output, tuple) else output

        try:
            for number, (name, kind) in enumerate(kinds):
                if kind not in ("add", "replace"):
                    raise ValueError(f"an intervention is 'add' or 'replace', not {kind!r}")
                key = f"{INTERVENTION}{number}"
                value, mask = values[key], values.get(key + MASK)
                handles.append(
                    _module(modules, name).register_forward_hook(
                        lambda module, inputs, output, kind=kind, value=value, mask=mask: change(kind, value, mask, output)
                    )
                )
            for name in read:
                if name not in ("logits", "embeddings"):
                    # after the changes: what the model goes on with
                    handles.append(
                        _module(modules, name).register_forward_hook(
                            lambda module, inputs, output, name=name: catch(name, output)
                        )
                    )
            yield caught
        finally:
            for handle in handles:
                handle.remove()


def _module(modules: dict[str, nn.Module], name: str) -> nn.Module:
    if name not in modules or not name:
        raise ValueError(f"the model has no module {name!r}; modules() names them")
    return modules[name]


__all__ = ["INTERVENTION", "MASK", "HeldModel", "needs_of_forward"]
