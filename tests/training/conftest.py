import json
from pathlib import Path

import pytest
import torch

from geobased.recall.gazetteer_documents import document_json, generate_documents
from geobased.recall.places import load_places
from geobased.training.tokenization import train_tokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Folder with text.txt, documents.jsonl, validation.jsonl and tokenizer/ (400 ids)."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = list(generate_documents(load_places("train"), 60, seed=1, max_words=60, max_records=3))
    text = "".join(f"{place.name} lies in {place.region}, {place.country}.\n" for place in load_places("train")[:300])
    (folder / "text.txt").write_text(text, encoding="utf-8")
    for name, part in (("documents", documents[:50]), ("validation", documents[50:])):
        lines = "".join(document_json(document) + "\n" for document in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    train_tokenizer([text, *(d.text for d in documents)], vocab_size=400).save_pretrained(folder / "tokenizer")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "max_position_embeddings": 512,
                "tie_word_embeddings": True,
            }
        )
    )
    return folder


@pytest.fixture(scope="session")
def mini_tokenizer():
    """The tokenizer of based-mini, which ends and pads with different tokens."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(__file__).resolve().parents[2] / "checkpoints" / "based-mini")


@pytest.fixture
def tiny_llama(mini_tokenizer):
    """Function that makes the same random Llama each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**options):
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=len(mini_tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=mini_tokenizer.eos_token_id,
            pad_token_id=mini_tokenizer.pad_token_id,
            **options,
        )
        return LlamaForCausalLM(config)

    return make


@pytest.fixture
def superhf_args(tmp_path):
    """Function that makes a SuperHFConfig for a few fast steps on the CPU: two prompts of four completions each."""
    from geobased.training.superhf_config import SuperHFConfig

    def make(cls=SuperHFConfig, **options):
        quick = {
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "max_completion_length": 6,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "warmup_steps": 0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        return cls(str(tmp_path / "run"), **{**quick, **options})

    return make
