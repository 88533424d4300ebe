"""Writes a BASED model as a folder that loads where only torch and transformers are installed."""

import shutil
from pathlib import Path

from huggingface_hub import ModelCardData
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from geobased.model_cards import card_from_template

from .modeling_based import BasedForCausalLM
from .whole_folder import refuse_existing, whole_folder


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
    tags = ["based", "linear-attention", "sliding-window-attention", "geobased"]
    card = card_from_template(
        "based",
        ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags),
        model_name=name,
        repo_id=name,
        config=model.config.to_dict(),
        parameters=model.num_parameters(),
        state_bytes=model.state_size_bytes(),
        dtype=str(model.dtype).removeprefix("torch."),
        remote_code=True,
    )
    return str(card)


__all__ = ["export_model"]
