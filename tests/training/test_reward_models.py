import json

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from geobased.modeling_based import BasedForSequenceClassification
from geobased.training.reward_models import (
    RewardModelScorer,
    evaluate_preferences,
    load_reward_model,
    read_preferences,
    reward_name,
)

PROMPTS = ["the river", "the town looks at the river and the river runs past", "the", "past the town the river runs"]
COMPLETIONS = [" runs past the town", " town", " river runs past the town and the town looks at the river", ""]
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def small_model(kind, tiny_model_dir, tokenizer):
    torch.manual_seed(0)
    if kind == "based":
        return load_reward_model(str(tiny_model_dir))
    common = {"vocab_size": 300, "num_labels": 1, "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.3}
    if kind == "gpt2":
        return GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **common))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForSequenceClassification(LlamaConfig(**sizes, **common))


@pytest.mark.parametrize("kind", ["based", "llama", "gpt2"])
def test_padding_and_batches_change_no_score(kind, tiny_model_dir, tokenizer):
    model = small_model(kind, tiny_model_dir, tokenizer)
    alone = [RewardModelScorer(model, tokenizer, batch_size=1)([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert max(alone) - min(alone) > 1e-2
    for side in ("right", "left"):
        together = RewardModelScorer(model, tokenizer, batch_size=4, padding_side=side)(PROMPTS, COMPLETIONS)
        assert together == pytest.approx(alone, abs=2e-5)
    reversed_order = RewardModelScorer(model, tokenizer, batch_size=3)(PROMPTS[::-1], COMPLETIONS[::-1])
    assert reversed_order[::-1] == pytest.approx(alone, abs=2e-5)


def test_score_is_what_the_model_says_of_the_text_and_its_end(tiny_model_dir, tokenizer):
    model = small_model("based", tiny_model_dir, tokenizer).train()
    scorer = RewardModelScorer(model, tokenizer, name="rewarder")
    scores = scorer(PROMPTS[:1], COMPLETIONS[:1], completion_ids=[[1, 2]], trainer_state=None)
    assert model.training and scorer.__name__ == "rewarder"
    ids = tokenizer(PROMPTS[0] + COMPLETIONS[0] + tokenizer.eos_token, return_tensors="pt")
    with torch.no_grad():
        assert scores == pytest.approx([model.eval()(**ids).logits.item()], abs=1e-6)
    assert scorer(PROMPTS[:1], [COMPLETIONS[0] + tokenizer.eos_token]) == pytest.approx(scores, abs=1e-6)


def test_long_texts_lose_their_beginning(tiny_model_dir, tokenizer):
    scorer = RewardModelScorer(small_model("based", tiny_model_dir, tokenizer), tokenizer, max_length=8)
    ids = scorer.encode("the river runs past the town " * 5, " and the town")
    assert len(ids) == 8 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]).endswith(" and the town")
    assert RewardModelScorer(small_model("gpt2", tiny_model_dir, tokenizer), tokenizer).max_length == 64


def test_conversations_go_through_the_chat_template(tiny_model_dir, tokenizer):
    chat = AutoTokenizer.from_pretrained(tiny_model_dir)
    chat.chat_template = TEMPLATE
    scorer = RewardModelScorer(small_model("based", tiny_model_dir, tokenizer), chat)
    prompt, completion = [{"role": "user", "content": "the river"}], [{"role": "assistant", "content": "runs"}]
    assert chat.decode(scorer.encode(prompt, completion)) == "user: the river\nassistant: runs\n"
    assert len(scorer([prompt], [completion])) == 1
    with pytest.raises(ValueError, match="both be texts or both be conversations"):
        scorer([prompt], [" runs"])


def test_half_precision_gives_float32_scores_near_those_of_float32(tiny_model_dir, tokenizer):
    full = RewardModelScorer(small_model("llama", tiny_model_dir, tokenizer), tokenizer)(PROMPTS, COMPLETIONS)
    model = small_model("llama", tiny_model_dir, tokenizer)
    half = RewardModelScorer(model, tokenizer, dtype="bfloat16", device="cpu")(PROMPTS, COMPLETIONS)
    assert model.dtype == torch.bfloat16 and all(isinstance(score, float) for score in half)
    assert half == pytest.approx(full, abs=0.2) and half != full


def test_saved_reward_model_is_loaded_with_its_head(tiny_model_dir, tokenizer, tmp_path):
    folder = tmp_path / "rewarder" / "final"
    model = small_model("based", tiny_model_dir, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    scorer = RewardModelScorer(folder, device="cpu")
    assert isinstance(scorer.model, BasedForSequenceClassification) and scorer.__name__ == "rewarder" == reward_name(folder)
    expected = RewardModelScorer(model, tokenizer)(PROMPTS, COMPLETIONS)
    assert scorer(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-6)


def test_wrong_arguments_are_named(tiny_model_dir, tokenizer):
    model = small_model("based", tiny_model_dir, tokenizer)
    with pytest.raises(ValueError, match="needs the tokenizer"):
        RewardModelScorer(model)
    with pytest.raises(ValueError, match="padding_side is right or left, not 'both'"):
        RewardModelScorer(model, tokenizer, padding_side="both")
    with pytest.raises(ValueError, match="dtype is one of float32, bfloat16, float16, not 'int8'"):
        RewardModelScorer(model, tokenizer, dtype="int8")
    with pytest.raises(ValueError, match="2 prompts and 1 completions"):
        RewardModelScorer(model, tokenizer)(["a", "b"], ["c"])
    model.config.num_labels = 2
    with pytest.raises(ValueError, match="has one label, this one has 2"):
        RewardModelScorer(model, tokenizer)


def test_accuracy_counts_pairs_whose_chosen_completion_scores_higher(tiny_model_dir, tokenizer):
    scorer = RewardModelScorer(small_model("based", tiny_model_dir, tokenizer), tokenizer)
    scores = dict(zip(COMPLETIONS, scorer(["the"] * 4, COMPLETIONS), strict=True))
    ordered = sorted(COMPLETIONS, key=scores.__getitem__)
    pairs = [
        {"prompt": "the", "chosen": ordered[3], "rejected": ordered[0], "rejected_corruption": "empty+repeated"},
        {"prompt": "the", "chosen": ordered[2], "rejected": ordered[1], "rejected_corruption": "empty"},
        {"prompt": "the", "chosen": ordered[0], "rejected": ordered[1], "rejected_corruption": "empty"},
        {"prompt": "the", "chosen": ordered[1], "rejected": ordered[3]},
    ]
    result = evaluate_preferences(scorer, pairs)
    assert result.accuracy == 0.5 and result.low < 0.5 < result.high and result.num_pairs == 4
    assert result.by_corruption == {
        "empty": {"accuracy": pytest.approx(2 / 3), "num_pairs": 3},
        "repeated": {"accuracy": 1.0, "num_pairs": 1},
    }
    with pytest.raises(ValueError, match="no preferences"):
        evaluate_preferences(scorer, [])


def test_malformed_preferences_name_their_line(tmp_path):
    def reading(*rows):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        return read_preferences([path])

    text = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1}
    chat = {key: [{"role": "user", "content": key}] for key in ("prompt", "chosen", "rejected")}
    assert reading(text) == [text] and reading(chat) == [chat]
    for rows, message in (
        ([text, {"prompt": "a", "chosen": "b"}], "pairs.jsonl:2: expected"),
        ([text, "no JSON\n"], "pairs.jsonl:2: expected"),
        ([{**text, "chosen": chat["chosen"]}], "all texts or all lists of messages"),
        ([{**text, "chosen": "c"}], "chosen and rejected are the same"),
        ([text, chat], "give one kind"),
        ([], "is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            reading(*rows)
    with pytest.raises(FileNotFoundError, match="no such file of preferences"):
        read_preferences([tmp_path / "none.jsonl"])
