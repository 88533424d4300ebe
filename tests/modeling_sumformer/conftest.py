"""Small random Sumformer models, in float64 where not said otherwise."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from geobased import SumformerConfig, SumformerModel

FIXTURES = Path(__file__).parents[1] / "fixtures" / "sumformer"
MIXERS = ("sumformer", "softmax", "linformer", "performer")
CAUSAL_MIXERS = ("sumformer", "softmax", "performer")
VOCAB_SIZE = 61


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    def make(
        mixer: str = "sumformer", model_class: type[PreTrainedModel] = SumformerModel, dtype=torch.float64, **changes
    ) -> PreTrainedModel:
        torch.manual_seed(0)
        defaults = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 16,
            "intermediate_size": 24,
            "latent_size": None if changes.get("phi_type") == "polynomial" else 12,
            "num_attention_heads": 2,
            "max_linformer_len": 24,
            "linformer_size": 5,
            "chunk_size": 4,
            "initializer_range": 0.5,
        }
        return model_class(SumformerConfig(mixer=mixer, **(defaults | changes))).to(dtype).eval()

    return make


@pytest.fixture
def make_ids() -> Callable[..., torch.Tensor]:
    """Random token ids, [batch, n]; never 0, which tests use for padding."""

    def make(*shape: int, seed: int = 1) -> torch.Tensor:
        return torch.randint(1, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))

    return make
