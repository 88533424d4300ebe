"""Small random BASED models. Their weights are large, so that every layer shows in the output."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from geobased import BasedConfig, BasedForCausalLM
from geobased.modeling_based.convert_official_checkpoint import convert_official_checkpoint

TINY = Path(__file__).parents[1] / "fixtures" / "based" / "tiny_a"
ALL_MIXERS = ("conv", "linear_attention", "sliding_attention")


@pytest.fixture(scope="module")
def golden(reference_tensors) -> dict[str, torch.Tensor]:
    """Reference values of tiny_a, a small checkpoint in the official format."""
    return reference_tensors("based/tiny_a/golden")


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """tiny_a in transformers' format."""
    return convert_official_checkpoint(TINY, tmp_path_factory.mktemp("converted") / "tiny")


@pytest.fixture
def make_config() -> Callable[..., BasedConfig]:
    """A configuration of one layer per mixer with a window of 8, changed by keyword."""

    def make(**changes) -> BasedConfig:
        mixers = list(changes.pop("mixers", ALL_MIXERS))
        defaults = {
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": len(mixers),
            "num_attention_heads": 2,
            "feature_dim": 8,
            "sliding_window": 8,
            "conv_kernel": 3,
            "mixers": mixers,
            "initializer_range": 0.3,
        }
        return BasedConfig(**(defaults | changes))

    return make


@pytest.fixture
def make_model(make_config) -> Callable[..., PreTrainedModel]:
    def make(model_class: type[PreTrainedModel] = BasedForCausalLM, **changes) -> PreTrainedModel:
        attn_implementation = changes.pop("attn_implementation", "sdpa")
        torch.manual_seed(0)
        config = make_config(**changes)
        config._attn_implementation = attn_implementation
        return model_class(config).eval()

    return make


@pytest.fixture
def make_ids() -> Callable[..., torch.Tensor]:
    """Random token ids, [batch, seq_len]; never 0, which tests use for padding."""

    def make(*shape: int, vocab_size: int = 61, seed: int = 1) -> torch.Tensor:
        return torch.randint(1, vocab_size, shape, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def assert_near() -> Callable[..., None]:
    """Asserts that |actual - expected| / |expected| is at most `tolerance`, in the Frobenius norm."""

    def check(actual: torch.Tensor, expected: torch.Tensor, *, tolerance: float = 1e-5, name: str = "value") -> None:
        assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
        actual, expected = actual.detach().double(), expected.detach().double()
        error = ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()
        assert error <= tolerance, f"relative error of {name} is {error:.2e}, more than {tolerance:.0e}"

    return check


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Knows 57 made-up words and <pad>, <s>, </s>, <unk>: 61 ids, as many as the models of `make_config`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(57))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )
