"""Levels of access to a model, after Casper et al. 2024, "Black-Box Access is Insufficient for Rigorous AI Audits".

A grant is a set of capabilities. The presets are nested: `BLACK` (inputs and outputs) < `GREY` (scores, embeddings, activations)
< `DE_FACTO_WHITE` (also gradients, changed activations and fine-tuning, but never the weights themselves) < `WHITE`. What lies
outside the box (documents, data, code and so on) is a set of its own, `OUTSIDE`, which any level may be joined with.
"""

import enum
from collections.abc import Iterable


class Capability(enum.Flag):
    """One thing that an auditor may do."""

    QUERY = enum.auto()  # choose inputs, see outputs
    TOPK = enum.auto()  # scores of the best answers, and the tokens that they are of
    LOGITS = enum.auto()  # scores of all answers
    EMBED_READ = enum.auto()  # the embedding that the model ends in
    ACT_READ = enum.auto()  # outputs of inner modules
    ACT_WRITE = enum.auto()  # change outputs of inner modules; inputs that no user can give, such as soft tokens
    INPUT_GRAD = enum.auto()  # gradients with respect to inputs and changed activations
    PARAM_GRAD = enum.auto()  # gradients with respect to parameters
    FINETUNE = enum.auto()  # change the parameters, within the machine that holds the model
    WEIGHTS = enum.auto()  # read the parameters
    DOCS = enum.auto()
    DATA = enum.auto()
    CODE = enum.auto()
    HPARAMS = enum.auto()
    CHECKPOINTS = enum.auto()
    INTERNAL_EVALS = enum.auto()
    DEPLOYMENT = enum.auto()


NOTHING = Capability(0)
BLACK = Capability.QUERY
GREY = BLACK | Capability.TOPK | Capability.LOGITS | Capability.EMBED_READ | Capability.ACT_READ
DE_FACTO_WHITE = GREY | Capability.ACT_WRITE | Capability.INPUT_GRAD | Capability.PARAM_GRAD | Capability.FINETUNE
WHITE = DE_FACTO_WHITE | Capability.WEIGHTS
OUTSIDE = ~WHITE
LEVELS = {"black": BLACK, "grey": GREY, "de_facto_white": DE_FACTO_WHITE, "white": WHITE}
# whoever has the first has the second
IMPLIED = ((Capability.LOGITS, Capability.TOPK), (Capability.TOPK, Capability.QUERY))


class AuditError(Exception):
    """Something that an audit cannot do."""


class AccessDeniedError(AuditError, AttributeError):
    """A use of the model that was not granted. An `AttributeError`, so that `hasattr` tells what a target offers."""


class BudgetExhaustedError(AuditError):
    """A use of the model that the budget does not cover; nothing was computed."""


def parse_access(words: "str | Capability | Iterable[str]") -> Capability:
    """A grant from names of levels and capabilities, such as "grey", "black+docs" or ["black", "topk", "outside"].

    Raises `ValueError` for a name that is neither; the message lists those there are.
    """
    if isinstance(words, Capability):
        return _closed(words)
    known = {**LEVELS, "outside": OUTSIDE, **{name.lower(): capability for name, capability in Capability.__members__.items()}}
    grant = NOTHING
    for word in words.split("+") if isinstance(words, str) else words:
        name = str(word).strip().lower().replace("-", "_").replace(" ", "_")
        if name not in known:
            raise ValueError(f"access {word!r} is unknown: choose from {', '.join(known)}")
        grant |= known[name]
    if not grant:
        raise ValueError("no access is named: a level such as black is needed")
    return _closed(grant)


def _closed(grant: Capability) -> Capability:
    for first, second in IMPLIED:
        if first in grant:
            grant |= second
    return grant


def capability_names(capabilities: Capability) -> list[str]:
    """Names in lower case, in the order of `Capability`."""
    return [name.lower() for name, capability in Capability.__members__.items() if capability in capabilities]


def access_name(grant: Capability) -> str:
    """The highest level that a grant holds, and what it has beyond that: "grey", "black+topk+docs"; `parse_access` reads it."""
    held = [name for name, level in LEVELS.items() if level in grant]
    level = held[-1:]
    rest = grant & ~(LEVELS[held[-1]] if held else NOTHING)
    if OUTSIDE in rest:
        return "+".join([*level, *capability_names(rest & ~OUTSIDE), "outside"])
    return "+".join([*level, *capability_names(rest)])


__all__ = [
    "BLACK",
    "DE_FACTO_WHITE",
    "GREY",
    "LEVELS",
    "NOTHING",
    "OUTSIDE",
    "WHITE",
    "AccessDeniedError",
    "AuditError",
    "BudgetExhaustedError",
    "Capability",
    "access_name",
    "capability_names",
    "parse_access",
]
