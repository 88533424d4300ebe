"""Measures of reward hacking: how alike and how varied a batch of completions is."""

import itertools
import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

from nltk.corpus import wordnet
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import meteor_score

logger = logging.getLogger(__name__)

# each is compared with each: 32 completions make 992 pairs
MAX_COMPARED = 32


class _NoSynonyms:
    """Stands in for WordNet where it is not installed."""

    def synsets(self, word: str) -> list[Any]:
        return []


class _CachedStemmer(PorterStemmer):
    """Porter's stemmer, which sees the same words again in every pair."""

    def __init__(self) -> None:
        super().__init__()
        self._stem = cache(super().stem)

    def stem(self, word: str, to_lowercase: bool = True) -> str:
        return self._stem(word, to_lowercase)


@cache
def wordnet_is_installed() -> bool:
    """Whether nltk finds the WordNet corpus on this machine; nothing is downloaded."""
    try:
        wordnet.synsets("word")
    except LookupError:
        logger.warning(
            "nltk's WordNet corpus is not installed: METEOR counts exact and stem matches only, and is reported as "
            "similarity/meteor_exact_stem. `python -m nltk.downloader wordnet` adds synonyms."
        )
        return False
    return True


def meteor_name() -> str:
    """`meteor`, or `meteor_exact_stem` without WordNet: the two are not comparable."""
    return "meteor" if wordnet_is_installed() else "meteor_exact_stem"


def meteor_similarity(texts: Sequence[str], *, synonyms: bool | None = None) -> float | None:
    """Mean METEOR score over all ordered pairs of texts, words split at white space; None for less than two texts.

    Near 0 for unrelated texts; rises towards 1 where a policy gives one answer to everything. Of more than 32 texts, 32 at
    even distances are compared.

    Args:
        synonyms: count words that share a WordNet entry as matches; by default where the corpus is installed.
    """
    if len(texts) < 2:
        return None
    if len(texts) > MAX_COMPARED:
        texts = [texts[i * len(texts) // MAX_COMPARED] for i in range(MAX_COMPARED)]
    corpus: Any = wordnet if (wordnet_is_installed() if synonyms is None else synonyms) else _NoSynonyms()
    words, stemmer = [text.split() for text in texts], _CachedStemmer()
    scores = [meteor_score([a], b, stemmer=stemmer, wordnet=corpus) for a, b in itertools.permutations(words, 2)]
    return sum(scores) / len(scores)


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Different n-grams of words as a share of all n-grams of the texts (Li et al. 2016); None where there are none."""
    words = [text.lower().split() for text in texts]
    grams = [tuple(row[i : i + n]) for row in words for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


__all__ = ["distinct_n", "meteor_name", "meteor_similarity", "wordnet_is_installed"]
