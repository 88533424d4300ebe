"""Writes a BASED model as a folder that loads where only torch and transformers are installed."""

import shutil
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .modeling_based import BasedForCausalLM
from .whole_folder import refuse_existing, whole_folder

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- based
- linear-attention
- sliding-window-attention
- geobased
---

# {name}

A BASED language model (Arora et al. 2024, [arXiv:2402.18668](https://arxiv.org/abs/2402.18668)) with {parameters:,} parameters:
{num_layers} layers ({mixers}), hidden size {hidden_size}, feature dimension {feature_dim}, sliding window {window}.
Generation keeps {state:,} bytes per sequence in {dtype}, however long the sequence gets.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

With geobased installed (`import geobased`) `trust_remote_code` is not needed and the model runs on Triton kernels on a GPU;
without it, the plain PyTorch code in this folder runs.
Data, training and intended use of the weights are not recorded here: add them before publishing.
"""


def export_model(model: str | Path | BasedForCausalLM, destination: str | Path, *, overwrite: bool = False) -> Path:
    """Writes `model` to `destination` with its code, tokenizer and model card, and returns the folder.

    The folder loads with `trust_remote_code=True` without geobased and without Triton, and generates the same tokens. It holds
    `auto_map` entries for AutoConfig, AutoModel, AutoModelForCausalLM and AutoModelForSequenceClassification.

    Args:
        model: a folder, a Hub id, or a model in memory (which has no tokenizer to write).
        destination: folder to write; it appears complete or not at all.
        overwrite: whether an existing destination may be replaced.

    Raises `ValueError` if the destination exists or the model is not a BASED model.
    """
    destination = Path(destination)
    refuse_existing(destination, overwrite)
    tokenizer, card, pictures = None, None, []
    if isinstance(model, BasedForCausalLM):
        loaded = model
    else:
        source = str(model)
        loaded = _load(source)
        tokenizer = _tokenizer(source)
        card_file = cached_file(source, "README.md", _raise_exceptions_for_missing_entries=False)
        if card_file:
            card = Path(card_file).read_text(encoding="utf-8")
            pictures = [path for path in Path(card_file).parent.glob("*.png") if path.name in card]
    if card is None:
        card = _new_card(loaded, destination.name)
    with whole_folder(destination) as written:
        loaded.save_pretrained(written)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        (written / "README.md").write_text(card, encoding="utf-8")
        for picture in pictures:
            shutil.copyfile(picture, written / picture.name)
    return destination


def _load(source: str) -> BasedForCausalLM:
    config = AutoConfig.from_pretrained(source)
    if config.model_type != "based":
        raise ValueError(f"{source} is a {config.model_type!r} model; only BASED models can be exported")
    return BasedForCausalLM.from_pretrained(source)


def _tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    if cached_file(source, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False) is None:
        return None
    return AutoTokenizer.from_pretrained(source)


def _new_card(model: BasedForCausalLM, name: str) -> str:
    config = model.config
    counts = {kind: config.mixers.count(kind) for kind in dict.fromkeys(config.mixers)}
    return CARD.format(
        name=name,
        parameters=model.num_parameters(),
        num_layers=config.num_hidden_layers,
        mixers=", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in counts.items()),
        hidden_size=config.hidden_size,
        feature_dim=config.feature_dim,
        window=config.sliding_window,
        state=model.state_size_bytes(),
        dtype=str(model.dtype).removeprefix("torch."),
    )


__all__ = ["export_model"]
