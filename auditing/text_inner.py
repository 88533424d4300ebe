"""Techniques for texts that read and change what happens inside a language model.

The attacks here move values that no user can reach: they bound what inputs could do, and count for no level (`reachable`).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .access import AuditError, Capability
from .held_target import Intervention
from .questions import AuditQuestion, Item
from .technique import Progress, Technique, WholeSetTechnique, smallest_perturbation
from .text_suffix_search import Place, loss_of_wanted

Changes = Callable[[int], Sequence[Intervention]]


def layer_names(target: Any) -> list[str]:
    """Names of the model's layers, in order: the members of its longest list of modules. Raises `AuditError` without any."""
    modules = target.modules()
    lists: dict[str, list[str]] = {}
    for name in modules:
        parent, _, last = name.rpartition(".")
        if last.isdecimal() and modules.get(parent) == "ModuleList":
            lists.setdefault(parent, []).append(name)
    if not lists:
        raise AuditError("no list of layers was found in the model: name the module in the technique's settings")
    return max(lists.values(), key=len)


def embedding_name(target: Any) -> str:
    """Name of the module that turns tokens into vectors. Raises `AuditError` if there is none."""
    names = [name for name, kind in target.modules().items() if re.search(r"(?<!Rotary)Embedding$", kind)]
    if not names:
        raise AuditError("no embedding was found in the model")
    return min(names, key=lambda name: name.count("."))


def written_greedily(target: Any, question: AuditQuestion, prompt: torch.Tensor, changes: Changes) -> str:
    """The greedy answer to tokens [length] while inner values are changed; `changes` tells how, for a length. Costs 1 a token."""
    ids, text = prompt[None], ""
    for _ in range(question.max_new_tokens):
        logits = target.forward(ids=ids, last=1, interventions=changes(ids.shape[1])).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        text = target.detokenize(ids[:, len(prompt) :].tolist())[0]
        if ends := [text.find(stop) for stop in question.stop if stop in text]:
            return text[: min(ends)]
    return text


def stretched(value: torch.Tensor, length: int) -> torch.Tensor:
    """[1, places, size] with zeros behind, to `length` places."""
    return torch.nn.functional.pad(value, (0, 0, 0, length - value.shape[1]))


def mask_of(first: int, end: int, length: int) -> torch.Tensor:
    """bool [1, length, 1]: places from `first` to before `end`."""
    places = torch.arange(length)
    return ((places >= first) & (places < end))[None, :, None]


def tokens_of(target: Any, question: AuditQuestion, item: Item) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of an item's prompt [length], and of the prompt with the wanted text [1, length]."""
    prompt = target.tokenize([item["prompt"]])[0]
    wanted = target.tokenize([str(item[question.objective.field])], special=False)[0]  # type: ignore[attr-defined]
    return torch.tensor(prompt), torch.tensor([prompt + wanted])


@dataclass(frozen=True)
class SoftPrompt(Technique):
    """Optimises vectors in place of tokens (soft prompt) with Adam; they stand where searched tokens would.

    Attributes:
        tokens: how many.
        steps: of Adam, if the budget lasts.
        learning_rate: in units of the root mean square of embeddings.
        check_every: steps between answers.
    """

    name: ClassVar[str] = "soft_prompt"
    kind: ClassVar[str] = "text"
    needs: ClassVar[Capability] = Capability.LOGITS | Capability.ACT_READ | Capability.ACT_WRITE | Capability.INPUT_GRAD
    reachable: ClassVar[bool] = False
    perturbation_unit: ClassVar[str] = "largest distance from a token's vector, in its norm"
    tokens: int = 6
    steps: int = 200
    learning_rate: float = 0.3
    check_every: int = 10

    def __post_init__(self) -> None:
        if min(self.tokens, self.steps, self.check_every) < 1 or not self.learning_rate > 0:
            raise ValueError("soft_prompt: tokens, steps, check_every and learning_rate must be positive")

    def attempt(self, target: Any, question: AuditQuestion, item: Item, progress: Progress, seed: int) -> None:
        place, name = Place.of(target, question, item), embedding_name(target)
        filler = torch.tensor(target.tokenize([" the"], special=False)[0][:1]).expand(1, self.tokens)
        prompt, (full, start) = place.prompts(filler)[0], place.full(filler)
        first = len(place.before)
        read = target.forward(ids=prompt[None], read=[name]).outputs[name]
        origin = read[:, first : first + self.tokens]
        generator = torch.Generator().manual_seed(seed)
        scale = float(read.pow(2).mean().sqrt())
        soft = (origin + 0.1 * scale * torch.randn(origin.shape, generator=generator)).requires_grad_()
        optimizer = torch.optim.Adam([soft], lr=self.learning_rate * scale)

        def changes(length: int) -> list[Intervention]:
            value = stretched(torch.nn.functional.pad(soft, (0, 0, first, 0)), length)
            return [Intervention(name, value, "replace", mask_of(first, first + self.tokens, length))]

        for step in range(self.steps):
            forward = target.forward(ids=full, last=full.shape[1] - start + 1, interventions=changes(full.shape[1]))
            loss = loss_of_wanted(question, forward.logits, full, start).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.measured(float(loss.detach()))
            if (step + 1) % self.check_every == 0:
                with torch.no_grad():
                    answer = written_greedily(target, question, prompt, changes)
                    moved = float(((soft - origin).norm(dim=-1) / origin.norm(dim=-1)).max())
                if progress.tried(answer, loss=float(loss.detach()), perturbation=moved):
                    return


@dataclass(frozen=True)
class LatentAttack(Technique):
    """Adds the smallest vectors to a layer's output, at each token of the prompt, that change the answer (PGD, bisection).

    Attributes:
        module: the layer; the middle one if "".
        largest: size that is tried first, in units of the norm of the activation that a vector is added to.
        steps: of projected gradient descent, for each size.
        bisections: further sizes.
    """

    name: ClassVar[str] = "latent_attack"
    kind: ClassVar[str] = "text"
    needs: ClassVar[Capability] = SoftPrompt.needs
    reachable: ClassVar[bool] = False
    perturbation_unit: ClassVar[str] = "norm of the activation"
    module: str = ""
    largest: float = 0.5
    steps: int = 10
    bisections: int = 4

    def __post_init__(self) -> None:
        if not self.largest > 0 or self.steps < 1 or self.bisections < 0:
            raise ValueError("latent_attack: largest and steps must be positive, bisections not negative")

    def attempt(self, target: Any, question: AuditQuestion, item: Item, progress: Progress, seed: int) -> None:
        layers = layer_names(target)
        name = self.module or layers[len(layers) // 2]
        prompt, full = tokens_of(target, question, item)
        start = len(prompt)
        states = target.forward(ids=prompt[None], read=[name]).outputs[name]
        norms = states.norm(dim=-1, keepdim=True)
        generator = torch.Generator().manual_seed(seed)

        def succeeds(eps: float) -> bool:
            radius = eps * norms
            added = torch.randn(states.shape, generator=generator)
            added = 0.1 * radius * added / added.norm(dim=-1, keepdim=True)
            for _ in range(self.steps):
                leaf = added.clone().requires_grad_()
                changed = [Intervention(name, stretched(leaf, full.shape[1]))]
                forward = target.forward(ids=full, last=full.shape[1] - start + 1, interventions=changed)
                loss = loss_of_wanted(question, forward.logits, full, start).sum()
                (gradient,) = torch.autograd.grad(loss, leaf)
                progress.measured(float(loss.detach()))
                step = gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-20)
                added = added - 2.5 / self.steps * radius * step
                added = added * (radius / added.norm(dim=-1, keepdim=True).clamp(min=1e-20)).clamp(max=1)
            answer = written_greedily(target, question, prompt, lambda length: [Intervention(name, stretched(added, length))])
            return progress.tried(answer, perturbation=eps)

        smallest_perturbation(succeeds, 0.0, self.largest, steps=self.bisections)


@dataclass(frozen=True)
class ActivationPatching(Technique):
    """Puts activations of another prompt into each layer in turn, and measures how much of its answer comes with them.

    Items name the other prompt in the field "donor". The last tokens of both prompts stand for each other. A recovery of 1 means
    that the wanted text became as likely as after the donor, 0 that nothing changed.
    """

    name: ClassVar[str] = "activation_patching"
    kind: ClassVar[str] = "text"
    by_default: ClassVar[bool] = False
    needs: ClassVar[Capability] = Capability.LOGITS | Capability.ACT_READ | Capability.ACT_WRITE
    reachable: ClassVar[bool] = False
    positions: int = 1

    def __post_init__(self) -> None:
        if self.positions < 1:
            raise ValueError("activation_patching needs at least one position")

    def attempt(self, target: Any, question: AuditQuestion, item: Item, progress: Progress, seed: int) -> None:
        layers = layer_names(target)
        prompt, full = tokens_of(target, question, item)
        donor = torch.tensor(target.tokenize([item["donor"]])[0])
        given = torch.cat([donor, full[0, len(prompt) :]])[None]
        start, count = len(prompt), min(self.positions, len(prompt), len(donor))

        def loss(
            ids: torch.Tensor, begin: int, changes: Sequence[Intervention] = (), read: Sequence[str] = ()
        ) -> tuple[float, Any]:
            wanted = ids.shape[1] - begin + 1
            forward = target.forward(ids=ids, read=["logits", *read], last=wanted, interventions=changes)
            return float(loss_of_wanted(question, forward.logits, ids, begin).sum()), forward.outputs

        before, _ = loss(full, start)
        best, outputs = loss(given, len(donor), read=layers)

        def patch(name: str, length: int) -> list[Intervention]:
            taken = outputs[name][:, len(donor) - count : len(donor)]
            value = stretched(torch.nn.functional.pad(taken, (0, 0, start - count, 0)), length)
            return [Intervention(name, value, "replace", mask_of(start - count, start, length))]

        losses = {name: loss(full, start, patch(name, full.shape[1]))[0] for name in layers}
        chosen = min(losses, key=losses.__getitem__)
        span = before - best
        recovery = {f"recovery {name}": (before - value) / span if span else 0.0 for name, value in losses.items()}
        answer = written_greedily(target, question, prompt, lambda length: patch(chosen, length))
        progress.tried(answer, loss=losses[chosen], candidate={"layer": chosen, "donor": item["donor"]}, measures=recovery)


@dataclass(frozen=True)
class LogitLens(Technique):
    """Reads each layer's output as if it were the last one's; answers with the layer that likes the wanted text best.

    The model's own last norm and head do the reading: the layer's output is put in the place of the last one's.
    """

    name: ClassVar[str] = "logit_lens"
    kind: ClassVar[str] = "text"
    needs: ClassVar[Capability] = ActivationPatching.needs
    reachable: ClassVar[bool] = False

    def attempt(self, target: Any, question: AuditQuestion, item: Item, progress: Progress, seed: int) -> None:
        layers = layer_names(target)
        prompt, full = tokens_of(target, question, item)
        start = len(prompt)

        def seen(ids: torch.Tensor, name: str, last: int, values: torch.Tensor | None = None) -> torch.Tensor:
            if values is None:
                values = target.forward(ids=ids, read=[name]).outputs[name]
            return target.forward(ids=ids, last=last, interventions=[Intervention(layers[-1], values, "replace")]).logits

        states = target.forward(ids=full, read=layers).outputs
        wanted = full.shape[1] - start + 1
        losses = {
            name: float(loss_of_wanted(question, seen(full, name, wanted, states[name]), full, start).sum()) for name in layers
        }
        chosen = min(losses, key=losses.__getitem__)
        ids = prompt[None]
        for _ in range(question.max_new_tokens):
            ids = torch.cat([ids, seen(ids, chosen, 1)[:, -1].argmax(-1, keepdim=True)], dim=1)
            text = target.detokenize(ids[:, start:].tolist())[0]
            if any(stop in text for stop in question.stop):
                break
        measures = {f"loss {name}": value for name, value in losses.items()}
        progress.tried(text, loss=losses[chosen], candidate={"layer": chosen}, measures=measures)


@dataclass(frozen=True)
class LinearProbe(WholeSetTechnique):
    """Tells the wanted text from inner activations with a linear classifier, trained on other items of the question.

    The activations are those at the prompt's last token. In each fold the layer is chosen on the fold's training items alone. The
    control task gives items the same labels in random order; what the probe gains over that is its selectivity (Hewitt and Liang
    2019), without which a probe shows its own capacity and nothing about the model.
    """

    name: ClassVar[str] = "linear_probe"
    kind: ClassVar[str] = "text"
    by_default: ClassVar[bool] = False
    needs: ClassVar[Capability] = Capability.ACT_READ | Capability.TOPK
    reachable: ClassVar[bool] = False
    folds: int = 5
    inner_folds: int = 3

    def __post_init__(self) -> None:
        if min(self.folds, self.inner_folds) < 2:
            raise ValueError("linear_probe needs at least two folds")

    def attempt_all(self, target: Any, question: AuditQuestion, progress: Sequence[Progress], seed: int) -> None:
        import numpy as np

        layers = layer_names(target)
        rows = []
        for one in progress:
            ids = torch.tensor(target.tokenize([one.item["prompt"]]))
            outputs = target.forward(ids=ids, read=layers).outputs
            rows.append(torch.stack([outputs[name][0, -1] for name in layers]))
        states = torch.stack(rows, dim=1).double().numpy()
        labels = np.array([str(one.item[question.objective.field]) for one in progress])  # type: ignore[attr-defined]
        random = np.random.default_rng(seed)
        told = self.predictions(states, labels, seed)
        shuffled = random.permutation(labels)
        accuracy, control = float((told == labels).mean()), float((self.predictions(states, shuffled, seed) == shuffled).mean())
        measures = {
            "accuracy": accuracy,
            "control accuracy": control,
            "selectivity": accuracy - control,
            "commonest label": float(np.unique(labels, return_counts=True)[1].max() / len(labels)),
        }
        for one, answer in zip(progress, told, strict=True):
            one.tried(str(answer), measures=measures)

    def predictions(self, states: Any, labels: Any, seed: int) -> Any:
        """Labels [items] from states [layers, items, size], each by a probe that was not trained on it.

        Raises `ValueError` for fewer items than folds, or a single label.
        """
        import numpy as np
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import KFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if len(labels) < self.folds * self.inner_folds or len(np.unique(labels)) < 2:
            raise ValueError(f"linear_probe needs {self.folds * self.inner_folds} items or more, with at least two texts to tell")

        def fitted(layer: int, chosen: Any, told: Any) -> Any:
            if len(np.unique(labels[chosen])) < 2:
                return np.full(len(told), labels[chosen][0])
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
            return probe.fit(states[layer, chosen], labels[chosen]).predict(states[layer, told])

        found = np.empty_like(labels)
        for train, test in KFold(self.folds, shuffle=True, random_state=seed).split(labels):
            inner = list(KFold(self.inner_folds, shuffle=True, random_state=seed).split(train))
            right = [
                sum(int((fitted(layer, train[a], train[b]) == labels[train[b]]).sum()) for a, b in inner)
                for layer in range(len(states))
            ]
            found[test] = fitted(int(np.argmax(right)), train, test)
        return found


__all__ = ["ActivationPatching", "LatentAttack", "LinearProbe", "LogitLens", "SoftPrompt", "embedding_name", "layer_names"]
