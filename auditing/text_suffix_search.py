"""Search for tokens that, put into a prompt, make a language model answer in a certain way.

All searches work on the same problem at the same price, so that their budgets compare: they propose rows of tokens, the model
scores the wanted answer after each, and the best row is kept; when it has become better, the model answers, as any user would see
it. They differ in what they propose: `RandomSearch` and `CoordinateSearch` need scores alone (grey), `GCG` (Zou et al. 2023,
"Universal and Transferable Adversarial Attacks on Aligned Language Models") ranks replacements by gradients (white).

The tokens stand at the end of the prompt, or before its last part where an item names that in the field "after"; the field
"separator" names what is to come between them and that part. What stands before them is the same for all proposals and is read
once where the model's cache can be handed on, be it keys or recurrent states.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .access import AuditError, Capability
from .questions import AuditQuestion, Item
from .technique import Progress, Technique, WholeSetTechnique, derived_seed

AFTER, SEPARATOR = "after", "separator"
MOST_STARTS = 200


@dataclass(frozen=True)
class Place:
    """An item as tokens: `before` the searched ones, `after` them, and the text that the objective is about; and `opening` and
    `ending`, the texts of the first two."""

    item: Item
    before: torch.Tensor
    after: torch.Tensor
    wanted: torch.Tensor
    opening: str
    ending: str

    @staticmethod
    def of(target: Any, question: AuditQuestion, item: Item) -> "Place":
        """Raises `ValueError` if the prompt does not end in the item's "after"."""
        after = str(item.values.get(AFTER, ""))
        if not item["prompt"].endswith(after):
            raise ValueError(f"item {item.id!r}: the prompt does not end in {after!r}")
        opening, ending = item["prompt"].removesuffix(after), str(item.values.get(SEPARATOR, "")) + after
        wanted = str(item[question.objective.field])  # type: ignore[attr-defined]
        rows = [target.tokenize([opening])[0], *target.tokenize([ending, wanted], special=False)]
        tokens = [torch.tensor(row, dtype=torch.long) for row in rows]
        return Place(item, tokens[0], tokens[1], tokens[2], opening, ending)

    def prompts(self, rows: torch.Tensor) -> torch.Tensor:
        """Tokens of prompts [rows, length] with rows [rows, tokens] in their place."""
        count = len(rows)
        return torch.cat([self.before.expand(count, -1), rows, self.after.expand(count, -1)], dim=1)

    def full(self, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Prompts followed by the wanted text, and where that begins."""
        prompts = self.prompts(rows)
        return torch.cat([prompts, self.wanted.expand(len(rows), -1)], dim=1), prompts.shape[1]


class Search:
    """State of a search over the places of one or several items at once, whose mean loss is lowered."""

    def __init__(
        self, target: Any, question: AuditQuestion, places: Sequence[Place], settings: "SuffixSearch", seed: int
    ) -> None:
        self.target, self.question, self.places, self.settings = target, question, list(places), settings
        self.generator = torch.Generator().manual_seed(seed)
        self.allowed = allowed_tokens(target)
        self.row = self._start()
        self.loss = float(self.losses(self.row[None])[0])

    def _start(self) -> torch.Tensor:
        for _ in range(MOST_STARTS):
            row = self.draw((self.settings.tokens,))
            if len(self.kept(row[None])):
                return row
        raise AuditError("no row of tokens was found that stays the same when its text is split into tokens again")

    def draw(self, size: tuple[int, ...]) -> torch.Tensor:
        """Random tokens of those that may be used."""
        return self.allowed[torch.randint(len(self.allowed), size, generator=self.generator)]

    def kept(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows whose texts are split into the same tokens again: the others no user can write."""
        for place in self.places:
            again = self.target.tokenize(self.texts(rows, place))
            same = [ids == prompt for ids, prompt in zip(again, place.prompts(rows).tolist(), strict=True)]
            rows = rows[torch.tensor(same, dtype=torch.bool)]
        return rows

    def texts(self, rows: torch.Tensor, place: Place) -> list[str]:
        """Prompts of a place as texts."""
        return [place.opening + text + place.ending for text in self.target.detokenize(rows.tolist())]

    def losses(self, rows: torch.Tensor) -> torch.Tensor:
        """Mean loss over the places, [rows]."""
        total = torch.zeros(len(rows))
        for place in self.places:
            ids, start = place.full(rows)
            found = self.target.score_ids(ids, start, shared=len(place.before) if self.settings.reuse_prefix else 0)
            total += self.question.objective.score_loss(found)  # type: ignore[attr-defined]
        return total / len(self.places)

    def gradient(self, row: torch.Tensor) -> torch.Tensor:
        """Of the mean loss with respect to the weights of all tokens at each searched position, [tokens, vocabulary]."""
        total = torch.zeros(len(row), self.target.info["vocabulary_size"])
        for place in self.places:
            ids, start = place.full(row[None])
            weights = torch.nn.functional.one_hot(ids, total.shape[1]).float().requires_grad_()
            logits = self.target.forward(token_weights=weights, last=ids.shape[1] - start + 1).logits
            loss = loss_of_wanted(self.question, logits, ids, start).sum()
            first = len(place.before)
            total += torch.autograd.grad(loss, weights)[0][0, first : first + len(row)]
        return total / len(self.places)

    def run(self) -> Iterator[bool]:
        """Goes on for ever; tells after each step whether the best row became better."""
        propose = self.settings.proposals(self)
        while True:
            rows = self.kept(next(propose).unique(dim=0))
            if not len(rows):
                yield False
                continue
            losses = self.losses(rows)
            best = int(losses.argmin())
            better = float(losses[best]) < self.loss
            if better:
                self.row, self.loss = rows[best], float(losses[best])
            yield better


def loss_of_wanted(question: AuditQuestion, logits: torch.Tensor, ids: torch.Tensor, start: int) -> torch.Tensor:
    """The objective's loss of each row of ids [rows, length], whose wanted text begins at `start`.

    `logits` [rows, length - start + 1, vocabulary] are those from one position before it on.
    """
    found = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, start:, None]).squeeze(-1)
    return question.objective.score_loss(found)  # type: ignore[attr-defined]


def allowed_tokens(target: Any) -> torch.Tensor:
    """Tokens of visible ASCII characters and spaces alone, which any user can type."""
    count = target.info["vocabulary_size"]
    texts = target.detokenize([[token] for token in range(count)])
    special = {token for row in target.tokenize([""]) for token in row}
    plain = [
        token
        for token, text in enumerate(texts)
        if text.strip() and text.isascii() and text.isprintable() and token not in special and not text.startswith("<")
    ]
    if not plain:
        raise AuditError("the model has no tokens of visible ASCII characters")
    return torch.tensor(plain)


@dataclass(frozen=True)
class SuffixSearch(Technique):
    """What the searches have in common.

    Attributes:
        tokens: how many are searched.
        batch_size: proposals of a step.
        reuse_prefix: whether what stands before them is read once.
    """

    kind: ClassVar[str] = "text"
    needs: ClassVar[Capability] = Capability.LOGITS
    perturbation_unit: ClassVar[str] = "characters"
    tokens: int = 6
    batch_size: int = 64
    reuse_prefix: bool = True

    def __post_init__(self) -> None:
        if min(self.tokens, self.batch_size) < 1:
            raise ValueError(f"{self.name} needs at least one token and one proposal a step")

    @abstractmethod
    def proposals(self, search: Search) -> Iterator[torch.Tensor]:
        """Rows [proposals, tokens] for each step."""

    def attempt(self, target: Any, question: AuditQuestion, item: Item, progress: Progress, seed: int) -> None:
        search = Search(target, question, [Place.of(target, question, item)], self, seed)
        progress.measured(search.loss)
        if answered(search, search.places[0], progress):
            return
        for better in search.run():
            progress.measured(search.loss)
            if better and answered(search, search.places[0], progress):
                return


def answered(search: Search, place: Place, progress: Progress) -> bool:
    """Has the model answer the prompt with the best row so far; tells whether the answer counts."""
    question, text = search.question, search.texts(search.row[None], place)[0]
    answer = search.target.generate([text], max_new_tokens=question.max_new_tokens, stop=question.stop)[0][0]
    added = len(text) - len(place.item["prompt"])
    return progress.tried(answer, loss=search.loss, candidate=text, perturbation=added)


@dataclass(frozen=True)
class RandomSearch(SuffixSearch):
    """Changes random tokens of the best row so far, and keeps what scores better."""

    name: ClassVar[str] = "random_search"
    changes: int = 2

    def proposals(self, search: Search) -> Iterator[torch.Tensor]:
        while True:
            rows = search.row.repeat(self.batch_size, 1)
            # anywhere between one and `changes` of them
            count = torch.randint(1, self.changes + 1, (self.batch_size, 1), generator=search.generator)
            order = torch.rand(rows.shape, generator=search.generator).argsort(dim=1).argsort(dim=1)
            yield torch.where(order < count, search.draw(tuple(rows.shape)), rows)


@dataclass(frozen=True)
class CoordinateSearch(SuffixSearch):
    """Goes through the places one by one, and tries random tokens at each."""

    name: ClassVar[str] = "coordinate_search"

    def proposals(self, search: Search) -> Iterator[torch.Tensor]:
        place = 0
        while True:
            rows = search.row.repeat(self.batch_size, 1)
            rows[:, place] = search.draw((self.batch_size,))
            yield rows
            place = (place + 1) % self.tokens


@dataclass(frozen=True)
class GCG(SuffixSearch):
    """Replaces single tokens by ones that the gradient ranks first (greedy coordinate gradient).

    Attributes:
        top_k: replacements that are considered at each place.
        momentum: share of the last step's gradient that is kept.
    """

    name: ClassVar[str] = "gcg"
    needs: ClassVar[Capability] = Capability.LOGITS | Capability.INPUT_GRAD
    top_k: int = 64
    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1 or not 0 <= self.momentum < 1:
            raise ValueError("gcg needs top_k of at least 1, and a momentum from 0 to below 1")

    def proposals(self, search: Search) -> Iterator[torch.Tensor]:
        kept = torch.zeros(())
        while True:
            kept = self.momentum * kept + search.gradient(search.row)
            yield self.replacements(search, kept)

    def replacements(self, search: Search, gradient: torch.Tensor) -> torch.Tensor:
        """Rows that differ from the best one in one token each, evenly spread over the places."""
        best = search.allowed[(-gradient[:, search.allowed]).topk(min(self.top_k, len(search.allowed)), dim=1).indices]
        rows = search.row.repeat(self.batch_size, 1)
        places = torch.arange(self.batch_size) * self.tokens // self.batch_size
        chosen = torch.randint(best.shape[1], (self.batch_size,), generator=search.generator)
        rows[torch.arange(self.batch_size), places] = best[places, chosen]
        return rows


@dataclass(frozen=True)
class UniversalSearch(WholeSetTechnique):
    """Searches one row of tokens for one half of the items, and tries it on the other half, and the reverse.

    A row that makes the model give *right* answers to items that it was not searched on has unlocked something; one that was
    searched for each item's own answer may just have spelt it. `share` of the budget goes into searching.
    """

    kind: ClassVar[str] = "text"
    by_default: ClassVar[bool] = False
    perturbation_unit: ClassVar[str] = "characters"
    search: ClassVar[type[SuffixSearch]]
    tokens: int = 6
    batch_size: int = 64
    searched_on: int = 4
    share: float = 0.9

    def __post_init__(self) -> None:
        if self.searched_on < 1 or not 0 < self.share < 1:
            raise ValueError(f"{self.name} needs searched_on of at least 1, and a share between 0 and 1")

    def attempt_all(self, target: Any, question: AuditQuestion, progress: Sequence[Progress], seed: int) -> None:
        if len(progress) < 2:
            raise ValueError(f"{self.name} needs at least two items")
        settings = self.search(tokens=self.tokens, batch_size=self.batch_size)
        budget = target.left
        folds = [list(progress[0::2]), list(progress[1::2])]
        for number, (searched, tried) in enumerate([(folds[0], folds[1]), (folds[1], folds[0])]):
            places = [Place.of(target, question, one.item) for one in searched[: self.searched_on]]
            search = Search(target, question, places, settings, derived_seed(seed, number))
            until = budget * (1 - (number + self.share) / 2)
            for _ in search.run():
                # what the last step cost is a measure of the next
                if target.left - len(places) * (self.batch_size + 3) < until:
                    break
            for one in tried:
                answered(search, Place.of(target, question, one.item), one)


@dataclass(frozen=True)
class UniversalRandomSearch(UniversalSearch):
    """Random search for one row of tokens that unlocks all items, tried on those that it was not searched on."""

    name: ClassVar[str] = "universal_random_search"
    needs: ClassVar[Capability] = RandomSearch.needs
    search: ClassVar[type[SuffixSearch]] = RandomSearch


@dataclass(frozen=True)
class UniversalGCG(UniversalSearch):
    """GCG for one row of tokens that unlocks all items, tried on those that it was not searched on."""

    name: ClassVar[str] = "universal_gcg"
    needs: ClassVar[Capability] = GCG.needs
    search: ClassVar[type[SuffixSearch]] = GCG


__all__ = [
    "GCG",
    "CoordinateSearch",
    "Place",
    "RandomSearch",
    "Search",
    "SuffixSearch",
    "UniversalGCG",
    "UniversalRandomSearch",
    "allowed_tokens",
    "loss_of_wanted",
]
