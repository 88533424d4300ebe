"""Searches for tokens: gradients, what is read once, what a user can write, and equal budgets."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from geobased.auditing import WHITE, AuditQuestion, AuditTarget, Item, Progress
from geobased.auditing.objectives import Contains, Elicit
from geobased.auditing.runner import run_question
from geobased.auditing.technique import make_technique
from geobased.auditing.text_suffix_search import (
    GCG,
    CoordinateSearch,
    Place,
    RandomSearch,
    Search,
    UniversalGCG,
    UniversalRandomSearch,
    allowed_tokens,
)

PROMPT = "the river runs past"


def question_of(*items: dict, budget: float = 60.0) -> AuditQuestion:
    return AuditQuestion(
        Elicit(), Contains(), tuple(Item(str(number), item) for number, item in enumerate(items)), budget, max_new_tokens=3
    )


@pytest.fixture
def question() -> AuditQuestion:
    return question_of({"prompt": f"{PROMPT} town", "target": " looks", "after": " town"})


def other_model(kind: str, size: int) -> torch.nn.Module:
    if kind == "transformer":
        config = LlamaConfig(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.2,
        )
        return LlamaForCausalLM(config)
    config = MambaConfig(vocab_size=size, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.2)
    return MambaForCausalLM(config)


@pytest.fixture(params=["based", "transformer", "mamba"])
def any_target(request: pytest.FixtureRequest, target, tiny_model_dir: Path):
    if request.param == "based":
        return target
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    return AuditTarget.open(other_model(request.param, len(tokenizer)).eval(), "white", tokenizer=tokenizer)


def test_reading_a_prefix_once_gives_the_same_scores(any_target) -> None:
    ids = torch.randint(2, 250, (5, 30))
    ids[:, :20] = ids[0, :20]
    with any_target.scope("whole", "logits", budget=100) as whole:
        full = whole.score_ids(ids, 24)
    with any_target.scope("shared", "logits", budget=100) as shared:
        reused = shared.score_ids(ids, 24, shared=20)
    torch.testing.assert_close(reused, full, atol=2e-5, rtol=1e-4)
    assert whole.spent == 5
    # the prefix once, and of each row the rest; all of it where the model keeps nothing to start from
    assert shared.spent in (pytest.approx((20 + 5 * 10) / 30), 5)


def test_recurrent_and_attention_states_are_handed_on(target) -> None:
    with target.scope("shared", "logits", budget=100) as shared:
        shared.score_ids(torch.ones(4, 12, dtype=torch.long), 10, shared=8)
    assert shared.spent == pytest.approx((8 + 4 * 4) / 12)
    with target.scope("wrong", "logits", budget=100) as wrong, pytest.raises(ValueError, match="have in common"):
        wrong.score_ids(torch.arange(24).reshape(2, 12), 10, shared=8)


def test_gradients_agree_with_finite_differences(any_target, question) -> None:
    with any_target.scope("check", "white", budget=1000) as metered:
        search = Search(metered, question, [Place.of(metered, question, question.items[0])], GCG(tokens=3), seed=0)
        gradient = search.gradient(search.row)
        ids, start = search.places[0].full(search.row[None])
        weights = torch.nn.functional.one_hot(ids, metered.info["vocabulary_size"]).float()
        first, step = len(search.places[0].before), 1e-2
        for place, token in [(0, 70), (1, 100), (2, 200)]:
            losses = []
            for sign in (1, -1):
                moved = weights.clone()
                moved[0, first + place, token] += sign * step
                logits = metered.forward(token_weights=moved).logits[:, start - 1 : -1]
                found = logits.log_softmax(-1).gather(-1, ids[:, start:, None])[..., 0]
                losses.append(float(question.objective.score_loss(found)))
            assert float(gradient[place, token]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=0.03, abs=2e-3)


def test_gradients_are_those_of_embeddings_projected_on_every_token(tiny_model_dir: Path, target, question) -> None:
    from transformers import AutoModelForCausalLM

    with target.scope("check", "white", budget=1000) as metered:
        search = Search(metered, question, [Place.of(metered, question, question.items[0])], GCG(tokens=3), seed=0)
        found = search.gradient(search.row)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    ids, start = search.places[0].full(search.row[None])
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    labels = ids.clone()
    labels[:, :start] = -100
    model(inputs_embeds=embedded, labels=labels).loss.backward()
    first = len(search.places[0].before)
    reference = embedded.grad[0, first : first + 3] @ model.get_input_embeddings().weight.detach().T
    torch.testing.assert_close(found, reference, atol=1e-5, rtol=1e-4)


def test_only_tokens_that_a_user_can_write_are_tried(target, question) -> None:
    tokenizer_splits = target.tokenize
    with target.scope("check", "white", budget=1000) as metered:
        search = Search(metered, question, [Place.of(metered, question, question.items[0])], RandomSearch(tokens=2), seed=1)
        rows = torch.tensor([*target.tokenize(["ZQ", "QZ"]), sum(target.tokenize(["o", "w"]), [])])
        # "ow" is one token: nobody can write it as two
        assert len(target.tokenize(["ow"])[0]) == 1
        kept = search.kept(rows)
        assert [row.tolist() for row in kept] == [row.tolist() for row in rows[:2]]
        texts = search.texts(kept, search.places[0])
        assert tokenizer_splits(texts) == search.places[0].prompts(kept).tolist()
        assert all(text.startswith(PROMPT) and text.endswith(" town") for text in texts)
        plain = metered.detokenize([[int(token)] for token in allowed_tokens(metered)])
    assert all(text.isascii() and text.isprintable() and text.strip() for text in plain)


class LinearTarget:
    """Scores each searched token by a table of its own, with one best token at each place; counts what is scored."""

    def __init__(self, tokens: int, size: int = 90) -> None:
        self.info = {"vocabulary_size": size + 1}
        self.table = torch.randn(tokens, size + 1, generator=torch.Generator().manual_seed(3))
        self.tokens, self.left = tokens, 0.0

    def tokenize(self, texts, *, special=True):
        return [[ord(sign) - 33 + 1 if sign != " " else 0 for sign in text] for text in texts]

    def detokenize(self, ids):
        return ["".join(chr(token - 1 + 33) if token else " " for token in row) for row in ids]

    def score_ids(self, ids, start, *, shared=0):
        self.left += len(ids)
        rows = ids[:, start - self.tokens : start]
        return torch.stack([self.table[torch.arange(self.tokens), row].sum() for row in rows])[:, None]

    def forward(self, *, token_weights, last):
        self.left += 3
        total = (token_weights[0, -self.tokens - 1 : -1] * self.table).sum()
        # the wanted token, number 1, has a log probability that grows with the total
        logits = torch.zeros(1, last, self.info["vocabulary_size"])
        return SimpleNamespace(logits=logits + total * torch.nn.functional.one_hot(torch.tensor(1), logits.shape[-1]))


def test_gradients_find_what_random_search_does_not_at_the_same_price() -> None:
    question = question_of({"prompt": " ", "target": "!"})
    lowest = {}
    for technique in (
        GCG(tokens=8, batch_size=16, top_k=4),
        RandomSearch(tokens=8, batch_size=16),
        CoordinateSearch(tokens=8, batch_size=16),
    ):
        target = LinearTarget(tokens=8)
        search = Search(target, question, [Place.of(target, question, question.items[0])], technique, seed=0)
        for _ in search.run():
            if target.left >= 400:
                break
        lowest[technique.name] = search.loss
    best = -float(LinearTarget(tokens=8).table[:, 1:].max(dim=1).values.sum())
    assert lowest["gcg"] < lowest["random_search"] and lowest["gcg"] < lowest["coordinate_search"]
    assert lowest["gcg"] == pytest.approx(best, rel=0.05)


@pytest.mark.parametrize("kind", [GCG, RandomSearch, CoordinateSearch])
def test_searches_keep_their_budget_and_repeat_with_their_seed(target, question, kind) -> None:
    technique = kind(tokens=3, batch_size=8)
    results = [run_question(target, question, [technique], {"white": WHITE}, seed=2).results["techniques"][0] for _ in range(2)]
    assert results[0]["items"] == results[1]["items"]
    (item,) = results[0]["items"]
    assert 0 < item["spent"] <= question.budget
    losses = [loss for _, loss in item["curve"]]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


@pytest.mark.parametrize("kind", [UniversalGCG, UniversalRandomSearch])
def test_universal_searches_try_a_row_on_items_that_it_was_not_searched_on(target, kind) -> None:
    items = [
        {"prompt": f"{word} runs past", "target": target_text}
        for word, target_text in zip("abcd", (" a", " b", " c", " d"), strict=True)
    ]
    question = question_of(*items, budget=40)
    technique = kind(tokens=3, batch_size=8)
    with target.scope(technique.name, technique.needs, budget=160) as metered:
        progress = [Progress(question, item, lambda: metered.spent) for item in question.items]
        technique.attempt_all(metered, question, progress, seed=0)
    added = [one.candidate.removeprefix(one.item["prompt"]) for one in progress]
    assert added[0] == added[2] != added[1] == added[3] != ""


def test_momentum_of_nought_is_no_momentum_and_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="momentum"):
        make_technique({"name": "gcg", "momentum": 1.0})
    with pytest.raises(ValueError, match="at least one token"):
        make_technique({"name": "random_search", "tokens": 0})
    assert make_technique("gcg") == GCG(momentum=0.0)
