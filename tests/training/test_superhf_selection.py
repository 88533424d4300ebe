import asyncio
import functools
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from geobased.training.superhf_config import MUKOBI_STOP_REGEX
from geobased.training.superhf_metrics import distinct_n, meteor_name, meteor_similarity, wordnet_is_installed
from geobased.training.superhf_selection import (
    checked_reward_function,
    penalized_scores,
    select_completions,
    top_k_filter,
    trim_completion,
)

GOLDEN = json.loads((Path(__file__).resolve().parent.parent / "fixtures" / "superhf" / "golden.json").read_text())
NAN = math.nan


def test_keeps_the_published_completions():
    case = GOLDEN["filter_top2"]
    mask = top_k_filter(torch.tensor([case["scores"]]), top_k=2)[0]
    kept = [(score, text) for score, text, keep in zip(case["scores"], case["completions"], mask, strict=True) if keep]
    assert [score for score, _ in kept] == case["out"][0]
    assert [text for _, text in kept] == case["out"][1][0]


@pytest.mark.parametrize(
    ("scores", "options", "expected"),
    [
        ([1.0, 3.0, 3.0, 2.0], {"top_k": 1}, [1]),
        ([1.0, NAN, 3.0, 2.0], {"top_k": 4}, [0, 2, 3]),
        ([NAN, NAN, NAN, NAN], {"top_k": 2}, []),
        ([NAN, -math.inf, NAN, NAN], {"top_k": 1}, [1]),
        ([1.0, 3.0, 3.0, 2.0], {"top_k": 4, "threshold": 2.0}, [1, 2, 3]),
        ([1.0, 3.0, 3.0, 2.0], {"top_k": 1, "threshold": 4.0}, []),
    ],
)
def test_filters(scores, options, expected):
    mask = select_completions(torch.tensor([scores]), functools.partial(top_k_filter, **options))
    assert mask[0].nonzero()[:, 0].tolist() == expected


def test_a_function_may_filter_but_never_keeps_what_is_excluded():
    scores = torch.tensor([[1.0, NAN, 2.0]])
    assert select_completions(scores, lambda s: torch.ones_like(s, dtype=torch.bool)).tolist() == [[True, False, True]]
    with pytest.raises(ValueError, match=r"boolean tensor of the scores' shape \(1, 3\), got a torch.float32 tensor"):
        select_completions(scores, lambda s: s)
    with pytest.raises(ValueError, match="got None"):
        select_completions(scores, lambda s: None)


def test_length_penalty():
    scores = penalized_scores(torch.tensor([1.0, 2.0]), torch.tensor([10, 100]), 0.1)
    assert scores.tolist() == pytest.approx(GOLDEN["length_penalty_0.1"], abs=1e-6)


def test_trims_like_the_published_code():
    case = GOLDEN["trimming"]
    prompt = "\n\nHuman: q?\n\nAssistant:"
    trimmed = [trim_completion(raw.removeprefix(prompt), MUKOBI_STOP_REGEX) for raw in case["raw"]]
    assert [prompt + text for text in trimmed] == case["trimmed"]
    assert [len(text.strip()) for text in trimmed] == case["lengths_chars"]
    assert trim_completion("Human", MUKOBI_STOP_REGEX) == ""


def reward_by_length(prompts, completions, **_):
    return [len(text) for text in completions]


async def async_reward(prompts, completions, **_):
    return [None for _ in completions]


class Constant:
    def __call__(self, prompts, completions, **_):
        return torch.full((len(completions),), 2.0)


def test_good_reward_functions_stay_as_they_are():
    call = {"prompts": ["a", "a"], "completions": ["b", "cc"]}
    by_length = checked_reward_function(reward_by_length)
    assert by_length(**call) == [1.0, 2.0] and by_length.__name__ == "reward_by_length"
    assert asyncio.run(checked_reward_function(async_reward)(**call)) == [None, None]
    constant = checked_reward_function(Constant())
    assert constant(**call) == [2.0, 2.0] and constant.__name__ == "Constant"
    assert checked_reward_function(functools.partial(reward_by_length, extra=1)).__name__ == "reward_by_length"


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ([1.0], ValueError, "'reward' returned 1 rewards for 2 completions"),
        ([1.0, NAN], ValueError, "'reward' returned NaN for the completion 'cc': return None"),
        (None, TypeError, "must return a list of numbers or None, one for each completion, got None"),
        (["x", 1.0], TypeError, "must return a list of numbers"),
        (KeyError("label"), RuntimeError, "'reward' raised KeyError: 'label'.*2 completions, the first being 'b'"),
    ],
)
def test_bad_reward_functions_are_named(result, error, message):
    def reward(prompts, completions, **_):
        if isinstance(result, Exception):
            raise result
        return result

    with pytest.raises(error, match=message):
        checked_reward_function(reward)(prompts=["a", "a"], completions=["b", "cc"])


def test_meteor_equals_the_published_numbers():
    case = GOLDEN["meteor_no_wordnet"]
    similarity = meteor_similarity(case["completions"], synonyms=False)
    assert similarity == pytest.approx(case["mean_over_ordered_pairs"], abs=1e-9)
    assert meteor_similarity(["one"]) is None
    assert meteor_similarity(["a b c d"] * 2, synonyms=False) > 0.95
    # many texts are sampled, not compared each with each
    assert meteor_similarity(["a b c d", "e f g h"] * 400, synonyms=False) == pytest.approx(0.5, abs=0.05)


def test_meteor_without_wordnet_has_another_name():
    assert meteor_name() == ("meteor" if wordnet_is_installed() else "meteor_exact_stem")


def test_distinct_n():
    assert distinct_n(["the cat", "The dog"], 1) == 3 / 4
    assert distinct_n(["a b a b"], 2) == 2 / 3
    assert distinct_n(["one"], 2) is None
