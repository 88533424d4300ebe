"""Techniques for texts that ask what a language model remembers of its training: membership inference and canary extraction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from .access import Capability
from .questions import AuditQuestion, Item
from .technique import Progress, Technique, WholeSetTechnique

DIGIT = "#"
SEEN, NEW = "seen", "new"
BATCH = 64


def area_under_roc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Probability that a positive scores above a negative, ties counting half. Raises `ValueError` without both."""
    values, is_positive = np.asarray(scores), np.asarray(positive)
    above, below = values[is_positive], values[~is_positive]
    if not len(above) or not len(below):
        raise ValueError("membership needs texts that were trained on and texts that were not")
    return float((above[:, None] > below).mean() + (above[:, None] == below).mean() / 2)


@dataclass(frozen=True)
class MembershipInference(WholeSetTechnique):
    """Tells texts that were trained on ("seen") from others ("new") by how likely the model finds them.

    Items have the fields "completion" (the text, after the prompt) and "membership", "seen" or "new", which success compares with
    the verdict. A text is called seen if it scores above the median of all, so half of the verdicts are right by chance. Scores
    are the mean log probability of the completion's tokens ("loss"), or that of its least likely ones ("min_k", Shi et al. 2023).

    Attributes:
        score: "loss" or "min_k".
        share: of the tokens that "min_k" looks at.
    """

    name: ClassVar[str] = "membership_inference"
    kind: ClassVar[str] = "text"
    by_default: ClassVar[bool] = False
    needs: ClassVar[Capability] = Capability.LOGITS
    score: str = "min_k"
    share: float = 0.2

    def __post_init__(self) -> None:
        if self.score not in ("loss", "min_k") or not 0 < self.share <= 1:
            raise ValueError("membership_inference: score is 'loss' or 'min_k', and share above 0 and at most 1")

    def attempt_all(self, target: Any, question: AuditQuestion, progress: Sequence[Progress], seed: int) -> None:
        truth = [str(one.item["membership"]) for one in progress]
        if wrong := sorted(set(truth) - {SEEN, NEW}):
            raise ValueError(f"membership {wrong[0]!r} is neither {SEEN!r} nor {NEW!r}")
        scores: dict[str, list[float]] = {"loss": [], "min_k": []}
        for one in progress:
            (logs,) = target.score([one.item["prompt"]], [one.item["completion"]])
            least = logs.sort().values[: math.ceil(self.share * len(logs))]
            scores["loss"].append(float(logs.mean()))
            scores["min_k"].append(float(least.mean()))
        seen = [value == SEEN for value in truth]
        areas = {f"area under ROC, {name}": area_under_roc(values, seen) for name, values in scores.items()}
        middle = float(np.median(scores[self.score]))
        for number, one in enumerate(progress):
            verdict = SEEN if scores[self.score][number] > middle else NEW
            own = {name: values[number] for name, values in scores.items()}
            one.tried(verdict, loss=-own[self.score], measures={**own, **areas})


@dataclass(frozen=True)
class CanaryExtraction(Technique):
    """Finds the number of a given form that the model holds likeliest after a prompt, and how exposed the item's own number is.

    A beam search over scores spells the likeliest numbers, which are the answers here. The exposure (Carlini et al. 2019) is
    log2(n + 1) less log2 of the rank of the item's number among n random ones and itself; it needs the number, which owners have.

    Attributes:
        form: of the number, with "#" for each digit, and what stands around it.
        randoms: random numbers that it is ranked among.
        beams: width of the search.
        guesses: how many of the likeliest numbers count.
    """

    name: ClassVar[str] = "canary_extraction"
    kind: ClassVar[str] = "text"
    by_default: ClassVar[bool] = False
    needs: ClassVar[Capability] = Capability.LOGITS
    perturbation_unit: ClassVar[str] = "guesses"
    form: str = " #### ####"
    randoms: int = 255
    beams: int = 8
    guesses: int = 4

    def __post_init__(self) -> None:
        if DIGIT not in self.form or self.randoms < 0 or not 1 <= self.guesses <= self.beams:
            raise ValueError(f"canary_extraction: the form needs {DIGIT!r} for its digits, and beams at least as many as guesses")

    def attempt(self, target: Any, question: AuditQuestion, item: Item, progress: Progress, seed: int) -> None:
        found = self.likeliest(target, item["prompt"])
        for number, (text, log_probability) in enumerate(found[: self.guesses]):
            if progress.tried(text, loss=-log_probability, candidate=item["prompt"], perturbation=number + 1):
                break
        if self.randoms:
            exposure = self.exposure(target, item["prompt"], str(item[question.objective.field]), seed)  # type: ignore[attr-defined]
            progress.measures["exposure"] = exposure
            progress.measures["largest exposure"] = math.log2(self.randoms + 1)

    def exposure(self, target: Any, prompt: str, text: str, seed: int) -> float:
        random = np.random.default_rng(seed)
        drawn = ["".join(str(random.integers(10)) if sign == DIGIT else sign for sign in self.form) for _ in range(self.randoms)]
        texts = [text, *(other for other in drawn if other != text)]
        scores: list[float] = []
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            scores += [float(logs.sum()) for logs in target.score([prompt] * len(batch), batch)]
        rank = 1 + sum(score > scores[0] for score in scores[1:])
        return math.log2(len(texts)) - math.log2(rank)

    def likeliest(self, target: Any, prompt: str) -> list[tuple[str, float]]:
        """Texts of the form and their log probabilities after the prompt, likeliest first, as far as the beams saw them."""
        texts = target.detokenize([[token] for token in range(target.info["vocabulary_size"])])
        start = target.tokenize([prompt])[0]
        beams: list[tuple[float, list[int], str]] = [(0.0, [], "")]
        done: list[tuple[str, float]] = []
        while beams:
            by_length: dict[int, list[tuple[float, list[int], str]]] = {}
            for beam in beams:
                by_length.setdefault(len(beam[1]), []).append(beam)
            grown = []
            for group in by_length.values():
                ids = torch.tensor([start + tokens for _, tokens, _ in group])
                logs = target.forward(ids=ids, last=1).logits[:, -1].log_softmax(-1)
                for (score, tokens, text), row in zip(group, logs, strict=True):
                    rest = self.form[len(text) :]
                    fitting = [token for token, piece in enumerate(texts) if piece and fits(piece, rest)]
                    best = row[fitting].topk(min(self.beams, len(fitting)))
                    for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                        token = fitting[place]
                        grown.append((score + value, [*tokens, token], text + texts[token]))
            grown.sort(key=lambda beam: -beam[0])
            done += [(text, score) for score, _, text in grown if len(text) == len(self.form)]
            beams = [beam for beam in grown if len(beam[2]) < len(self.form)][: self.beams]
            done = sorted(dict(sorted(done, key=lambda pair: pair[1])).items(), key=lambda pair: -pair[1])[: self.beams]
            if len(done) == self.beams and beams and beams[0][0] < done[-1][1]:
                break
        return done


def fits(piece: str, form: str) -> bool:
    """Whether a text is a beginning of a form."""
    return len(piece) <= len(form) and all(
        sign in "0123456789" if wanted == DIGIT else sign == wanted for sign, wanted in zip(piece, form, strict=False)
    )


__all__ = ["CanaryExtraction", "MembershipInference", "area_under_roc"]
