"""What equal twins are: their settings, presets, and the configuration of each model."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from geobased.modeling_based.configuration_based import BasedConfig
from geobased.modeling_based.modeling_based import BasedForCausalLM
from geobased.recall.twin_data import PhaseSettings
from geobased.recall.twin_training import OptimizerSettings

MODELS = ("based", "attention", "sliding_window", "llama")
DEFAULT_MODELS = ("based", "attention", "sliding_window")


@dataclass(frozen=True)
class TwinSettings:
    """Everything that the results depend on, except the text files. Models have `blocks` times the four layers of `BLOCK`."""

    hidden_size: int = 384
    intermediate_size: int = 768
    num_attention_heads: int = 6
    feature_dim: int = 16
    sliding_window: int = 64
    blocks: int = 2
    tokens: int = 50_000_000
    """Of one run."""
    tokens_per_step: int = 32_768
    phases: tuple[PhaseSettings, ...] = (
        # recall is learnt on short documents, and stretched on long ones
        PhaseSettings(512, 0.25, num_documents=40_000, max_words=160, max_records=6),
        PhaseSettings(1024, 0.4, num_documents=48_000, max_words=400, max_records=24),
        PhaseSettings(8192, 0.35, num_documents=7_000, max_words=3200, max_records=250),
    )
    text_share: float = 0.1
    counterfactual: float = 0.9
    counterfactual_names: float = 0.9
    """Shares of the documents for training and validation; held-out places keep their names and values."""
    learning_rates: tuple[float, ...] = (2e-3,)
    """With more than one, seed 0 is trained with each, and the best on validation documents serves the other seeds."""
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=0.0, answer_weight=8.0)
    """`learning_rate` is set by `learning_rates`."""
    num_seeds: int = 3
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    num_examples: int = 125
    """Of each length, about held-out places."""
    num_training_examples: int = 40
    """Of each length, about training places."""
    num_held_out_documents: int = 200
    """For perplexity."""
    throughput_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    """Tokens of prompt and continuation together."""
    throughput_batch_size: int = 128
    new_tokens: int = 256
    compiled_llama: bool = True

    @property
    def context_length(self) -> int:
        return max(*(phase.context_length for phase in self.phases), *self.lengths)


BLOCK = ("conv", "linear_attention", "sliding_attention", "conv")
PRESETS = {
    # does everything run?
    "smoke": TwinSettings(
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=2,
        blocks=1,
        tokens=1_500_000,
        phases=(
            PhaseSettings(512, 0.6, num_documents=1_500, max_words=160, max_records=8, num_validation=50),
            PhaseSettings(2048, 0.4, num_documents=300, max_words=800, max_records=60, num_validation=20),
        ),
        num_seeds=1,
        lengths=(256, 1024),
        num_examples=20,
        num_training_examples=10,
        num_held_out_documents=20,
        throughput_lengths=(512,),
        throughput_batch_size=16,
        new_tokens=64,
        compiled_llama=False,
    ),
    # a 14M model, for one large GPU
    "standard": TwinSettings(),
    # the same models with twice the tokens, and two learning rates
    "long": TwinSettings(tokens=100_000_000, learning_rates=(1e-3, 3e-3)),
}


def twin_config(
    name: str, settings: TwinSettings, tokenizer: PreTrainedTokenizerBase, context_length: int | None = None
) -> BasedConfig:
    """Configuration of a model of `MODELS`, with as many parameters as "based" (to less than 1 %, for real sizes).

    - "sliding_window": windows in place of linear attention
    - "attention": attention over the whole context in place of linear attention and windows
    - "llama": such attention in place of everything: the architecture of Llama

    Args:
        context_length: the window of full attention; by default the longest that training and evaluation need.

    Raises:
        ValueError: another name.
    """
    if name not in MODELS:
        raise ValueError(f"there is no twin {name!r}; choose from {', '.join(MODELS)}")
    swaps: dict[str, dict[str, str]] = {
        "based": {},
        "sliding_window": {"linear_attention": "sliding_attention"},
        "attention": {"linear_attention": "sliding_attention"},
        "llama": dict.fromkeys(BLOCK, "sliding_attention"),
    }
    length = settings.context_length if context_length is None else context_length
    config = BasedConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.blocks * len(BLOCK),
        num_attention_heads=settings.num_attention_heads,
        feature_dim=settings.feature_dim,
        mixers=[swaps[name].get(mixer, mixer) for mixer in BLOCK] * settings.blocks,
        sliding_window=length if name in ("attention", "llama") else settings.sliding_window,
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if name != "based":
        missing = num_parameters(twin_config("based", settings, tokenizer)) - num_parameters(config)
        per_unit = 3 * settings.hidden_size * config.num_hidden_layers
        config.intermediate_size += round(missing / per_unit / 8) * 8
    return config


def num_parameters(config: BasedConfig) -> int:
    """Parameters of a model, which is not built."""
    with torch.device("meta"):
        model = BasedForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())


__all__ = ["DEFAULT_MODELS", "MODELS", "PRESETS", "TwinSettings", "num_parameters", "twin_config"]
