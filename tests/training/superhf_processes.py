"""Trains for two steps on completions that do not depend on the number of processes; test_superhf_processes.py starts it.

Arguments: folder of a tokenizer, completions per process, file to write the result to.
"""

import json
import os
import random
import sys

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from geobased.training.superhf_config import SuperHFConfig
from geobased.training.superhf_trainer import SuperHFTrainer

GROUP = 4
PROMPTS = ("The capital of", "A", "Windhoek is the largest city of the country, which lies in", "Rome:")
UNSCORED = "A"


class FixedCompletions(SuperHFTrainer):
    """Draws completions by prompt and place in the group, and keeps the texts that it trains on."""

    def __init__(self, *args, **kwargs):
        self.kept = []
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        completions = []
        for i, ids in enumerate(prompt_ids):
            draw = random.Random(f"{ids} {i % GROUP}")
            completions.append([draw.randrange(10, 4000) for _ in range(draw.randint(1, 6))])
        return completions

    def _training_batch(self, rows, num_steps):
        self.kept.append(sorted(gather_object(rows)))
        return super()._training_batch(rows, num_steps)


def reward(prompts, completions, **_):
    # one of two processes has nothing to train on
    return [None if prompt == UNSCORED else float(len(text)) for prompt, text in zip(prompts, completions, strict=True)]


def held_out(prompts, completions, **_):
    return [float(text.count("e")) for text in completions]


def main(tokenizer_path, per_device, output):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    args = SuperHFConfig(
        output + ".run",
        num_generations=GROUP,
        top_k_completions=2,
        per_device_train_batch_size=int(per_device),
        max_steps=3,
        learning_rate=1e-2,
        warmup_steps=0,
        logging_steps=1,
        meteor_every=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        shuffle_dataset=False,
    )
    data = Dataset.from_dict({"prompt": list(PROMPTS)})
    model = LlamaForCausalLM(config)
    trainer = FixedCompletions(model, reward, args, data, processing_class=tokenizer, eval_reward_funcs=held_out)
    trainer.train()
    if trainer.accelerator.is_main_process:
        logs = [log for log in trainer.state.log_history if "reward_filtered" in log]
        weights = [float(value.detach().double().norm()) for value in trainer.model.parameters()]
        result = {"processes": trainer.accelerator.num_processes, "kept": trainer.kept, "logs": logs, "weights": weights}
        with open(output, "w", encoding="utf-8") as file:
            json.dump(result, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
