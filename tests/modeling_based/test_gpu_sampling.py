"""The sampler that a CUDA graph holds, against transformers' own logits processors."""

import math

import pytest
import torch
from transformers.generation import logits_process

from geobased.modeling_based.gpu_sampling import NotServed, TokenSampler, plan_sampling

WARPERS = {
    "temperature": [logits_process.TemperatureLogitsWarper(0.7)],
    "top_k": [logits_process.TopKLogitsWarper(6)],
    "top_p": [logits_process.TopPLogitsWarper(0.8)],
    "min_p": [logits_process.MinPLogitsWarper(0.1)],
    "top_k_p": [
        logits_process.TemperatureLogitsWarper(1.3),
        logits_process.TopKLogitsWarper(9),
        logits_process.TopPLogitsWarper(0.7),
        logits_process.MinPLogitsWarper(0.05),
    ],
    "top_p_k": [logits_process.TopPLogitsWarper(0.9), logits_process.TopKLogitsWarper(4)],
    "suppressed": [
        logits_process.SuppressTokensLogitsProcessor([0, 3, 27, 28, 29]),
        logits_process.TopKLogitsWarper(50),
        logits_process.TopPLogitsWarper(0.9),
    ],
}


@pytest.mark.parametrize("name", WARPERS)
def test_distribution(name):
    """Frequencies of 200,000 draws against the probabilities of transformers' own processors."""
    vocab, draws = 30, 200_000
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(1, vocab, generator=generator) * 2).bfloat16()
    logits[0, 11] = logits[0].topk(6).values[-1]  # a tie with the sixth, which top-k of 6 keeps
    ids = torch.zeros(1, 1, dtype=torch.long)
    scores = logits.float()
    for processor in WARPERS[name]:
        scores = processor(ids, scores)
    expected = scores.softmax(-1)[0]
    plan = plan_sampling(WARPERS[name], do_sample=True, vocab_size=vocab, prompt_length=1)
    sampler = TokenSampler(plan, draws, vocab, torch.device("cpu"))
    sampler.load(plan, ids.expand(draws, 1))
    torch.manual_seed(0)
    picked = sampler.sample(logits.expand(draws, vocab).clone(), torch.zeros(1, dtype=torch.int32))
    counts = torch.bincount(picked, minlength=vocab).double()
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    wanted = draws * expected[possible].double()
    chi_square = ((counts[possible] - wanted) ** 2 / wanted).sum().item()
    freedom = int(possible.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * max(freedom, 1)), (chi_square, freedom)


def test_a_sampler_takes_other_numbers_of_the_same_kind():
    """One graph serves every temperature, penalty and list of as many ids: only `load` is called again."""
    scores = torch.tensor([[3.0, 2.9, 1.0, 0.0]])

    def plan(penalty, banned):
        processors = [
            logits_process.RepetitionPenaltyLogitsProcessor(penalty),
            logits_process.SuppressTokensLogitsProcessor([banned]),
        ]
        return plan_sampling(processors, do_sample=False, vocab_size=4, prompt_length=1)

    generated = torch.zeros(1, dtype=torch.int32)
    first = plan(2.0, 2)
    sampler = TokenSampler(first, 1, 4, torch.device("cpu"))
    for numbers, seen, expected in (((2.0, 2), 0, 1), ((1.01, 2), 0, 0), ((1.01, 0), 1, 1), ((4.0, 0), 1, 2)):
        other = plan(*numbers)
        assert other.signature == first.signature
        sampler.load(other, torch.tensor([[seen]]))
        assert sampler.sample(scores.clone(), generated).tolist() == [expected], numbers


def test_trailing_suppressed_ids_are_never_looked_at():
    suppress = logits_process.SuppressTokensLogitsProcessor([6, 7])
    ends = logits_process.MinNewTokensLengthLogitsProcessor(3, 2, [1, 7])
    plan = plan_sampling([ends, suppress], do_sample=False, vocab_size=8, prompt_length=3)
    assert plan.width == 6 and [step.kind for step in plan.steps] == ["minimum"] and plan.steps[0].tokens == (1,)
    sampler = TokenSampler(plan, 1, 8, torch.device("cpu"))
    sampler.load(plan, torch.zeros(1, 3, dtype=torch.long))
    scores = torch.arange(8.0)[None].index_fill(1, torch.tensor([1]), 9.0)
    picked = [sampler.sample(scores.clone(), torch.tensor([n], dtype=torch.int32)).item() for n in range(4)]
    assert picked == [5, 5, 1, 1]


@pytest.mark.parametrize(
    ("processors", "reason"),
    [
        ([logits_process.TypicalLogitsWarper(0.5)], "TypicalLogitsWarper"),
        ([logits_process.TopKLogitsWarper(3, filter_value=-1e4)], "filter_value"),
        ([logits_process.TopPLogitsWarper(0.5, min_tokens_to_keep=2)], "min_tokens_to_keep"),
        ([logits_process.TopKLogitsWarper(3), logits_process.SuppressTokensLogitsProcessor([1])], "after top-k"),
        ([logits_process.RepetitionPenaltyLogitsProcessor(1.5)] * 2, "two repetition penalties"),
        ([logits_process.RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=9)], "more than the prompt"),
        ([logits_process.SuppressTokensLogitsProcessor(list(range(8)))], "every id"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_known_exactly_is_refused(processors, reason):
    with pytest.raises(NotServed, match=reason):
        plan_sampling(processors, do_sample=True, vocab_size=8, prompt_length=4)
