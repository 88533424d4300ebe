"""Low-rank adapters (LoRA) for the length of a fine-tuning."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def low_rank_adapters(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], rank: int, seed: int
) -> Iterator[dict[str, nn.Parameter]]:
    """Adapters of the linear layers among `parameters`, to be trained in this context; then they are added to the weights.

    Args:
        parameters: by their names in `module`; those that are no weights of linear layers are left alone.
        rank: of the adapters; they are scaled by 2.
        seed: of their first values.

    Raises:
        ValueError: no linear layer is among them, or PEFT is missing.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise ValueError("fine-tuning with a rank needs the package peft: pip install geobased[audit]") from error
    tied = {id(value.weight) for value in module.modules() if isinstance(value, nn.Embedding)}
    linear = [
        name
        for name, value in module.named_modules()
        if isinstance(value, nn.Linear) and f"{name}.weight" in parameters and id(value.weight) not in tied
    ]
    if not linear:
        raise ValueError("no linear layer is among the parameters that are to be trained with a rank")
    trainable = {name: value.requires_grad for name, value in module.named_parameters()}
    devices = [value for value in {p.device for p in module.parameters()} if value.type == "cuda"]
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear)
        tuner: Any = LoraModel(module, {"default": config}, "default")
    merged = False
    try:
        yield {name: value for name, value in module.named_parameters() if value.requires_grad}
        tuner.merge_and_unload()
        merged = True
    finally:
        if not merged:
            tuner.unload()
        for name, value in module.named_parameters():
            value.requires_grad_(trainable[name])


__all__ = ["low_rank_adapters"]
