"""What all tests share: no network, fixed seeds, and a tiny BASED model with its tokenizer on disk."""

import os

# read when huggingface_hub is imported: a test that reaches for the network fails at once instead of hanging
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # read when triton is imported, which torch._dynamo does in tests that run before those of the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

CORPUS = ("the river runs past the town and the town looks at the river",) * 3


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random `BasedForCausalLM` (3 layers, one per mixer) with a byte-level BPE tokenizer.

    Its weights are large, so that it does not repeat one token. Copy the folder before changing it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from geobased import BasedConfig, BasedForCausalLM

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special_tokens = ["<|endoftext|>", "<|padding|>"]
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special_tokens,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special_tokens[0], pad_token=special_tokens[1])
    config = BasedConfig(
        vocab_size=300,
        unpadded_vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        feature_dim=8,
        sliding_window=16,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BasedForCausalLM(config)
    folder = tmp_path_factory.mktemp("tiny") / "tiny-based"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
