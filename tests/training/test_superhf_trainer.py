import copy
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from geobased import BasedConfig, BasedForCausalLM
from geobased.modeling_based import modeling_based
from geobased.training.superhf_callbacks import RewardHackingCallback
from geobased.training.superhf_config import SuperHFConfig
from geobased.training.superhf_trainer import SuperHFTrainer

# of different lengths in tokens, so that a batch has padding
PROMPTS = ("The capital of", "A", "Windhoek is the largest city of the country, which lies in", "Rome:")
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def length_reward(prompts, completions, **_):
    return [float(len(text)) for text in completions]


def vowels(prompts, completions, **_):
    return [float(sum(text.count(v) for v in "aeiou")) for text in completions]


def narrow(prompts, completions):
    return [0.0 for _ in completions]


def prompts(count=8):
    return Dataset.from_dict({"prompt": [PROMPTS[i % len(PROMPTS)] for i in range(count)]})


def metrics(trainer):
    return [log for log in trainer.state.log_history if "reward_filtered" in log]


class Recording(SuperHFTrainer):
    """Keeps what was generated and what was trained on."""

    def __init__(self, *args, **kwargs):
        self.generated, self.batches = [], []
        super().__init__(*args, **kwargs)

    def _generate(self, prompts):
        result = super()._generate(prompts)
        self.generated.append((prompts, *result))
        return result

    def _compute_loss(self, model, inputs):
        self.batches.append(inputs)
        return super()._compute_loss(model, inputs)


def trained_rows(batch):
    """-> (prompt ids, completion ids) of each row that is trained on."""
    rows = []
    for ids, mask, start in zip(batch["input_ids"], batch["attention_mask"], batch["prompt_lengths"], strict=True):
        row = ids[mask.bool()].tolist()
        if start < len(row):
            rows.append((row[:start], row[start:]))
    return rows


@pytest.mark.parametrize("adapter", [False, True])
def test_trains_with_a_prior_that_is_zero_at_first(tiny_llama, mini_tokenizer, superhf_args, adapter):
    peft_config = LoraConfig(**LORA, lora_dropout=0.2) if adapter else None
    args = superhf_args(max_steps=3, meteor_every=1)
    trainer = Recording(tiny_llama(), length_reward, args, prompts(), processing_class=mini_tokenizer, peft_config=peft_config)
    before = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    logs = metrics(trainer)
    assert logs[0]["kl"] == pytest.approx(0, abs=1e-6) and logs[-1]["kl"] > 1e-6
    assert (trainer.ref_model is None) == adapter
    changed = [not torch.equal(before[name], value) for name, value in trainer.model.named_parameters() if name in before]
    assert all(changed)
    for log, (_, _, _, texts) in zip(logs, trainer.generated, strict=True):
        best = [max(length_reward(None, texts[i : i + 4])) for i in (0, 4)]
        assert log["reward_filtered"] == pytest.approx(sum(best) / 2)
        assert log["frac_kept"] == 0.25 and log["nll"] > 0
        assert 0 <= log["similarity/meteor_exact_stem" if "similarity/meteor" not in log else "similarity/meteor"] <= 1
    for batch, (_, prompt_ids, completion_ids, _) in zip(trainer.batches, trainer.generated, strict=True):
        sampled = [(p, c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
        for prompt, completion in trained_rows(batch):
            assert completion[-1] == mini_tokenizer.eos_token_id
            assert (prompt, completion) in sampled or (prompt, completion[:-1]) in sampled


def test_one_completion_without_prior_is_supervised_training_on_own_samples(tiny_llama, mini_tokenizer, superhf_args, tmp_path):
    shared = {"max_grad_norm": 0.0, "weight_decay": 0.0, "lr_scheduler_type": "constant", "max_steps": 1}
    args = superhf_args(num_generations=1, per_device_train_batch_size=4, beta=0.0, **shared)
    ours = Recording(tiny_llama(), length_reward, args, prompts(), processing_class=mini_tokenizer)
    ours.train()
    rows = trained_rows(ours.batches[0])
    assert len(rows) == 4 and "kl" not in metrics(ours)[0]
    samples = Dataset.from_dict(
        {"input_ids": [p + c for p, c in rows], "completion_mask": [[0] * len(p) + [1] * len(c) for p, c in rows]}
    )
    quick = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0, "logging_steps": 1}
    quick |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no"}
    sft_args = SFTConfig(str(tmp_path / "sft"), completion_only_loss=True, **quick, **shared)
    sft = SFTTrainer(tiny_llama(), sft_args, train_dataset=samples, processing_class=mini_tokenizer)
    sft.train()
    assert metrics(ours)[0]["loss"] == pytest.approx(sft.state.log_history[0]["loss"], rel=1e-5)
    for (name, value), (_, expected) in zip(ours.model.named_parameters(), sft.model.named_parameters(), strict=True):
        torch.testing.assert_close(value, expected, atol=2e-5, rtol=1e-4, msg=name)


def test_keeping_all_is_not_filtering(tiny_llama, mini_tokenizer, superhf_args):
    args = superhf_args(top_k_completions=4, max_steps=1)
    trainer = Recording(tiny_llama(), length_reward, args, prompts(), processing_class=mini_tokenizer)
    trainer.train()
    (log,) = metrics(trainer)
    assert log["reward"] == log["reward_filtered"] and log["frac_kept"] == 1
    _, prompt_ids, completion_ids, _ = trainer.generated[0]
    expected = [(p, c if c[-1] == 0 else [*c, 0]) for p, c in zip(prompt_ids, completion_ids, strict=True)]
    assert sorted(trained_rows(trainer.batches[0])) == sorted(expected)


def test_the_loss_does_not_see_padding_or_prompts(tiny_llama, mini_tokenizer, superhf_args):
    trainer = Recording(tiny_llama(), length_reward, superhf_args(max_steps=1), prompts(), processing_class=mini_tokenizer)
    prompt_rows = [mini_tokenizer(text)["input_ids"] for text in PROMPTS]
    rows = [(prompt, mini_tokenizer(" Namibia is dry")["input_ids"]) for prompt in prompt_rows]
    together = trainer._training_batch(rows, 1)
    assert len({len(prompt) for prompt in prompt_rows}) > 1
    alone = [trainer._compute_loss(trainer.model, trainer._training_batch([row], 1)).item() for row in rows]
    assert trainer._compute_loss(trainer.model, together).item() == pytest.approx(sum(alone) / len(alone), rel=1e-5)
    # with the published labels the padded prompts are trained on
    trainer.args.reproduce_defects = True
    assert trainer._compute_loss(trainer.model, together).item() != pytest.approx(sum(alone) / len(alone), rel=1e-3)


def test_the_preset_equals_the_published_steps(tiny_llama, mini_tokenizer, tmp_path):
    quick = {"per_device_train_batch_size": 8, "num_generations": 4, "use_cpu": True, "bf16": False, "report_to": "none"}
    args = SuperHFConfig.mukobi2023(str(tmp_path), gradient_checkpointing=False, max_completion_length=6, **quick)
    model = get_peft_model(tiny_llama(), LoraConfig(**LORA))
    trainer = Recording(model, length_reward, args, prompts(), processing_class=mini_tokenizer)
    with torch.no_grad():
        for name, value in trainer.model.named_parameters():
            if "lora_B.default" in name:
                value.normal_(std=0.5)
    rows = [(mini_tokenizer(p)["input_ids"], mini_tokenizer(" a b c d")["input_ids"]) for p in (PROMPTS[0], PROMPTS[2])]
    loss = trainer._compute_loss(trainer.model.eval(), trainer._training_batch(rows, 1))

    mini_tokenizer.padding_side = "left"
    encoded = mini_tokenizer.pad({"input_ids": [p + c for p, c in rows]}, return_tensors="pt")
    labels = encoded["input_ids"].clone()
    for i, (prompt, _) in enumerate(rows):
        labels[i, : len(prompt)] = -100
    output = trainer.model(**encoded, labels=labels)
    with torch.no_grad(), trainer.model.disable_adapter():
        original = trainer.model(**encoded).logits
    divergence = 0.0
    for i in range(len(rows)):
        kept = labels[i] != -100
        inputs = [logits[i][kept].log_softmax(-1) for logits in (output.logits, original)]
        divergence += torch.nn.KLDivLoss(reduction="batchmean", log_target=True)(*inputs).clamp(min=0)
    assert divergence > 1e-3
    assert loss.item() == pytest.approx((output.loss + 0.35 * divergence).item(), abs=1e-5)
    trainer.model.train()
    trainer.args.max_steps = 1
    trainer.train()
    for _, completion in trained_rows(trainer.batches[-1]):
        assert mini_tokenizer.eos_token_id not in completion


def test_held_out_rewards_are_logged_and_never_filter(tiny_llama, mini_tokenizer, superhf_args):
    def other(prompts, completions, **_):
        return [-1000.0 * len(text) for text in completions]

    runs = []
    for held_out in (None, [vowels, other, length_reward]):
        trainer = Recording(
            tiny_llama(), length_reward, superhf_args(), prompts(), processing_class=mini_tokenizer, eval_reward_funcs=held_out
        )
        trainer.train()
        runs.append(trainer)
    plain, watched = runs
    assert [trained_rows(b) for b in plain.batches] == [trained_rows(b) for b in watched.batches]
    log = metrics(watched)[0]
    assert log["rewards_held_out/vowels/mean"] >= 0
    assert log["rewards_held_out/length_reward_held_out/mean"] == log["rewards/length_reward/mean"]
    assert log["reward_gap"] == pytest.approx(log["reward_filtered"] - log["reward_held_out_filtered"])
    assert not any("held_out" in name or name == "reward_gap" for name in metrics(plain)[0])


def test_completions_without_a_reward_are_not_trained_on(tiny_llama, mini_tokenizer, superhf_args):
    def rewards_two(prompts, completions, **_):
        return [1.0 if i % 4 == 2 and i < 4 else None for i in range(len(completions))]

    args = superhf_args(top_k_completions=4, max_steps=1, gradient_accumulation_steps=2, log_completions=True)
    trainer = Recording(tiny_llama(), rewards_two, args, prompts(), processing_class=mini_tokenizer)
    trainer.train()
    rows = [row for batch in trainer.batches for row in trained_rows(batch)]
    # four groups of four completions, of which one completion has a reward
    assert len(trainer.batches) == 2 and len(rows) == 1
    (log,) = metrics(trainer)
    assert log["frac_kept"] == 1 / 16 and log["reward_filtered"] == 1
    assert list(trainer._logs["extra"]["selected"]) == [i == 2 for i in range(16)]


def test_steps_and_accumulation_weigh_every_token_alike(tiny_llama, mini_tokenizer, superhf_args):
    gradients = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        args = superhf_args(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, top_k_completions=2)
        trainer = Recording(tiny_llama(), length_reward, args, prompts(), processing_class=mini_tokenizer)
        rows = [([5, 6], [7] * n) for n in (1, 2, 5)]
        batch = trainer._training_batch(rows, accumulation)
        per_step = len(batch["input_ids"]) // accumulation
        for i in range(accumulation):
            part = {k: v if v.dim() == 0 else v[i * per_step : (i + 1) * per_step] for k, v in batch.items()}
            (trainer._compute_loss(trainer.model, part) / accumulation).backward()
        gradients.append(trainer.model.lm_head.weight.grad)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-4)


def test_conversations_reward_models_and_evaluation(tiny_llama, mini_tokenizer, superhf_args):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer = type(mini_tokenizer).from_pretrained(mini_tokenizer.name_or_path)
    tokenizer.chat_template = template + "{% if add_generation_prompt %}assistant:{% endif %}"
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in PROMPTS]})
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=1
    )
    model = LlamaForSequenceClassification(config)
    args = superhf_args(max_steps=1, eval_strategy="steps", eval_steps=1, num_generations_eval=2, stop_regex=r"[xyz]")
    trainer = Recording(
        tiny_llama(),
        [model, lambda prompts, completions, **_: [float(len(c[0]["content"])) for c in completions]],
        args,
        data,
        data,
        processing_class=tokenizer,
        reward_processing_classes=[tokenizer, None],
    )
    trainer.train()
    (evaluation,) = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert evaluation["eval_frac_kept"] == 0.5 and math.isfinite(evaluation["eval_loss"])
    for batch in trainer.batches:
        for prompt, completion in trained_rows(batch):
            assert tokenizer.decode(prompt).startswith("user:") and tokenizer.decode(prompt).endswith("assistant:")
            assert not set("xyz") & set(tokenizer.decode(completion, skip_special_tokens=True))
            assert completion[-1] == tokenizer.eos_token_id


def test_resumes_with_the_first_model_as_reference(tiny_llama, mini_tokenizer, superhf_args):
    def run(resume=None):
        args = superhf_args(max_steps=4, save_strategy="steps", save_steps=2, completion_filter=lambda s: s == s)
        trainer = SuperHFTrainer(tiny_llama(), length_reward, args, prompts(), processing_class=mini_tokenizer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run()
    resumed = run(f"{whole.args.output_dir}/checkpoint-2")
    assert [log["step"] for log in metrics(resumed)] == [1, 2, 3, 4]
    assert "SuperHF" in Path(whole.args.output_dir, "README.md").read_text()
    for name in ("reward", "kl", "nll"):
        assert metrics(resumed)[-1][name] == pytest.approx(metrics(whole)[-1][name], rel=1e-4), name
    for value, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("adapter", [False, True])
def test_based_generates_within_training(mini_tokenizer, superhf_args, adapter, monkeypatch):
    torch.manual_seed(0)
    config = BasedConfig(
        vocab_size=len(mini_tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        feature_dim=4,
        eos_token_id=mini_tokenizer.eos_token_id,
        pad_token_id=mini_tokenizer.pad_token_id,
    )
    model = BasedForCausalLM(config)
    peft_config = LoraConfig(**LORA) if adapter else None
    args = superhf_args(gradient_checkpointing=True, generation_kwargs={"do_sample": False})
    trainer = Recording(model, vowels, args, prompts(), processing_class=mini_tokenizer, peft_config=peft_config)
    generated = {}
    for text in PROMPTS:
        ids = mini_tokenizer(text, return_tensors="pt")["input_ids"]
        output = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=0, pad_token_id=1)
        generated[text] = output[0, ids.shape[1] :].tolist()
    # whole steps, as CUDA graphs capture them, but run on the CPU
    served = []
    fast_sample = modeling_based.fast_sample
    monkeypatch.setattr(modeling_based, "fast_sample", lambda *args, **kw: served.append(1) or fast_sample(*args, **kw))
    model.fast_generation = "eager"
    trainer.train()
    # LoRA's layers are no plain linear ones, and go through transformers' loop
    assert len(served) == (0 if adapter else 2)
    assert metrics(trainer)[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics(trainer)[1]["kl"] > 0
    # the weights of the last step are those that it generates with
    batch = mini_tokenizer(list(PROMPTS), padding=True, padding_side="left", return_tensors="pt").to(model.device)
    fast, model.fast_generation = model.eval().generate(**batch, max_new_tokens=6, do_sample=False), False
    assert torch.equal(fast, model.generate(**batch, max_new_tokens=6, do_sample=False))
    # padded at the left, each prompt goes on as it does alone
    first_prompts, _, first_ids, _ = trainer.generated[0]
    for text, ids in zip(first_prompts, first_ids, strict=True):
        assert ids == generated[text][: len(ids)]


def test_a_based_model_is_loaded_by_its_folder(tiny_model_dir, superhf_args):
    args = superhf_args(beta=0.1, max_steps=1, generation_kwargs={"min_new_tokens": 2})
    trainer = SuperHFTrainer(str(tiny_model_dir), length_reward, args, prompts())
    trainer.train()
    assert type(trainer.model).__name__ == "BasedForCausalLM" and trainer.model.dtype == torch.float32
    changed = zip(trainer.model.parameters(), trainer.ref_model.parameters(), strict=True)
    assert any(not value.equal(other) for value, other in changed), "the reference is a copy that stays"


def test_stops_when_the_reward_is_exploited_and_follows_a_moving_reference(tiny_llama, mini_tokenizer, superhf_args):
    callback = RewardHackingCallback(max_reward_gap=-1e9)
    args = superhf_args(max_steps=5, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0)
    trainer = SuperHFTrainer(
        tiny_llama(),
        length_reward,
        args,
        prompts(),
        processing_class=mini_tokenizer,
        callbacks=[callback],
        eval_reward_funcs=vowels,
    )
    trainer.train()
    assert trainer.state.global_step == 1 and len(callback.reasons) == 1
    for value, other in zip(trainer.model.parameters(), trainer.ref_model.parameters(), strict=True):
        assert torch.equal(value, other)


def test_prompt_tuning_trains_from_full_logits(tiny_llama, mini_tokenizer, superhf_args, caplog):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = SuperHFTrainer(
        tiny_llama(), length_reward, superhf_args(), prompts(), processing_class=mini_tokenizer, peft_config=config
    )
    assert "computed from full logits" in caplog.text
    trainer.train()
    assert all(log["nll"] > 0 and math.isfinite(log["kl"]) for log in metrics(trainer))


def test_takes_the_place_of_rloo(tiny_llama, mini_tokenizer, superhf_args):
    for config_class, trainer_class in ((RLOOConfig, RLOOTrainer), (SuperHFConfig, SuperHFTrainer)):
        args = superhf_args(config_class, beta=0.0, max_steps=1, reward_weights=[1.0, 0.5])
        trainer = trainer_class(
            model=tiny_llama(),
            reward_funcs=[length_reward, vowels],
            args=args,
            train_dataset=prompts(),
            processing_class=mini_tokenizer,
            peft_config=LoraConfig(**LORA),
        )
        trainer.train()
        (log,) = [log for log in trainer.state.log_history if "rewards/vowels/mean" in log]
        for name in ("reward", "reward_std", "frac_reward_zero_std", "entropy", "completions/mean_length", "num_tokens"):
            assert math.isfinite(log[name]), name
    assert args.reward_weights == [1.0, 0.5]


def test_bad_arguments(tiny_llama, mini_tokenizer, superhf_args):
    data = prompts()
    with pytest.raises(TypeError, match="args must be a SuperHFConfig, not a RLOOConfig"):
        SuperHFTrainer(tiny_llama(), length_reward, superhf_args(RLOOConfig), data, processing_class=mini_tokenizer)
    with pytest.raises(TypeError, match="a reward function must be a model, its path, or callable, not 3"):
        SuperHFTrainer(tiny_llama(), 3, superhf_args(), data, processing_class=mini_tokenizer)
    with pytest.raises(ValueError, match="reward_weights has 2 values for 1 reward_funcs"):
        SuperHFTrainer(tiny_llama(), vowels, superhf_args(reward_weights=[1.0, 2.0]), data, processing_class=mini_tokenizer)
    bare = type(mini_tokenizer).from_pretrained(mini_tokenizer.name_or_path)
    bare.eos_token = bare.pad_token = None
    with pytest.raises(ValueError, match=r"no end-of-sequence token and no padding token.*Set tokenizer\.eos_token"):
        SuperHFTrainer(tiny_llama(), length_reward, superhf_args(), data, processing_class=bare)
    with pytest.raises(TypeError, match=r"'narrow' cannot be called: got an unexpected keyword argument.*add \*\*kwargs"):
        SuperHFTrainer(tiny_llama(), narrow, superhf_args(), data, processing_class=mini_tokenizer)
    with pytest.raises(ValueError, match="no column 'prompt', only text"):
        renamed = data.rename_column("prompt", "text")
        SuperHFTrainer(tiny_llama(), length_reward, superhf_args(), renamed, processing_class=mini_tokenizer)
    with pytest.raises(ValueError, match="1 prompts, less than the 2 of one generation"):
        SuperHFTrainer(tiny_llama(), length_reward, superhf_args(), prompts(1), processing_class=mini_tokenizer)
    trainer = Recording(tiny_llama(), length_reward, superhf_args(), data, processing_class=mini_tokenizer)
    trainer.ref_model = None
    with pytest.raises(RuntimeError, match=r"beta=0\.35 needs a reference, but the trainer has no ref_model"):
        trainer.train()
    assert not trainer.generated


def test_completions_that_are_all_empty_or_rewards_that_are_nan(tiny_llama, mini_tokenizer, superhf_args):
    args = superhf_args(stop_regex="^")
    trainer = SuperHFTrainer(tiny_llama(), length_reward, args, prompts(), processing_class=mini_tokenizer)
    with pytest.raises(ValueError, match="all 8 completions of this batch are empty.*stop_regex"):
        trainer.train()

    def broken(prompts, completions, **_):
        return [math.nan for _ in completions]

    trainer = SuperHFTrainer(tiny_llama(), broken, superhf_args(), prompts(), processing_class=mini_tokenizer)
    with pytest.raises(ValueError, match="'broken' returned NaN"):
        trainer.train()


def test_args_survive_a_checkpoint(tiny_llama, mini_tokenizer, superhf_args, tmp_path):
    args = superhf_args(completion_filter=lambda scores: scores > 0)
    assert json.loads(args.to_json_string())["completion_filter"] == "<lambda>"
    torch.save(args, tmp_path / "args.bin")
    assert torch.load(tmp_path / "args.bin", weights_only=False).completion_filter == "<lambda>"
    assert callable(args.completion_filter)
    with pytest.raises(ValueError, match="completion_filter='<lambda>' names a function that was not stored"):
        SuperHFTrainer(tiny_llama(), length_reward, copy.copy(args), prompts(), processing_class=mini_tokenizer)
