"""Memory that generation keeps per sequence, BASED beside attention, as a Markdown table.

BASED: what `state_size_bytes` counts for a bfloat16 model (float32 running sums; bfloat16 windows and convolution inputs).
Attention: keys and values of every layer in bfloat16 for a transformer of the same width and depth, with as many key heads as
query heads, and with grouped queries (four query heads to a key head). Weights and activations are not counted.

    python scripts/memory_table.py
"""

import torch

from geobased import BasedConfig, BasedForCausalLM

LENGTHS = (2_048, 32_768, 1_048_576)
BFLOAT16_BYTES = 2


def based_bytes(config: BasedConfig) -> int:
    """State of one sequence, whatever its length."""
    with torch.device("meta"):
        return BasedForCausalLM(config).to(torch.bfloat16).state_size_bytes()


def attention_bytes(config: BasedConfig, length: int, queries_per_key: int = 1) -> int:
    """Keys and values of `length` tokens in a transformer of the same width and depth."""
    return 2 * config.num_hidden_layers * config.hidden_size // queries_per_key * BFLOAT16_BYTES * length


def readable(number: int) -> str:
    """Bytes as MB or GB (powers of ten)."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def table() -> str:
    lines = ["| per sequence | " + " | ".join(f"{length:,} tokens" for length in LENGTHS) + " | equal at |"]
    lines.append("|---|" + "---:|" * (len(LENGTHS) + 1))
    for name, config in {"360M": BasedConfig.based_360m(), "1.3B": BasedConfig.based_1b()}.items():
        state = based_bytes(config)
        lines.append(f"| **BASED {name}** | " + " | ".join([readable(state)] * len(LENGTHS)) + " | |")
        for label, group in {"attention": 1, "attention, grouped queries": 4}.items():
            sizes = " | ".join(readable(attention_bytes(config, length, group)) for length in LENGTHS)
            lines.append(f"| {label}, {name} | {sizes} | {state / attention_bytes(config, 1, group):,.0f} tokens |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
