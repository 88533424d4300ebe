# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""Text embeddings of candidate places, computed once for a model and kept on disk."""

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers.utils import logging

logger = logging.get_logger(__name__)

DEFAULT_CACHE_DIR = Path(HF_HOME) / "geobased" / "label_embeddings"
FORMAT = 1  # part of every key: raise it when what is stored changes its meaning
PROBE = "A Street View photo in the region of São Tomé, Côte d'Ivoire."
PROGRESS_FROM = 2000  # texts; fewer take seconds


class LabelEmbedder:
    """Embeds texts with a CLIP's text tower; each set of texts is stored in a file and read from it the next time.

    A file is named by a hash of the texts, the weights of everything but the vision tower, and the tokenizer, so another
    checkpoint, a fine-tuned one, another precision or another prompt never meets a file that is not its own. Files are written
    whole or not at all; several processes can share a folder. A file that cannot be read is computed again, with a warning.

    Args:
        model: a `StreetCLIPModel`, `CLIPModel` or a model with their `get_text_features` and `logit_scale`. Make a new embedder
            after changing its weights.
        tokenizer: the model's.
        cache_dir: folder of the files; None keeps nothing on disk.
        batch_size: texts at once.

    Raises `ValueError` for a model that is no CLIP and a batch_size below 1.

    Example:

    ```python
    embedder = LabelEmbedder(model, tokenizer)
    [countries] = embedder.embed_sets([["A Street View photo in Chile.", "A Street View photo in Peru."]])
    ```
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        cache_dir: str | os.PathLike | None = DEFAULT_CACHE_DIR,
        batch_size: int = 256,
    ) -> None:
        if not hasattr(model, "get_text_features") or not hasattr(model, "logit_scale"):
            raise ValueError(f"{type(model).__name__} has no get_text_features and logit_scale: give a CLIP model")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.batch_size = batch_size

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of what the embeddings depend on beside the texts: weights and tokenizer."""
        digest = hashlib.sha256()
        digest.update(json.dumps([type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())]).encode())
        # the vocabulary does not tell how texts are normalised and split
        digest.update(json.dumps(self.tokenizer(PROBE).input_ids).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            if "vision_model." in name or "visual_projection." in name:
                continue
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def embed_sets(self, sets: Sequence[Sequence[str]]) -> list[torch.Tensor]:
        """Sets of texts -> for each float32 [texts, projection_dim] of length one, on the model's device.

        Sets that are not on disk are embedded together. Raises `ValueError` for an empty set and for a text that
        is longer than the model reads.
        """
        if not all(sets):
            raise ValueError(f"set {[bool(texts) for texts in sets].index(False)} of {len(sets)} has no texts")
        found = [self._read(texts) for texts in sets]
        missing = [texts for texts, embeddings in zip(sets, found, strict=True) if embeddings is None]
        if missing:
            unique = list(dict.fromkeys(text for texts in missing for text in texts))
            row = {text: i for i, text in enumerate(unique)}
            computed = self._embed(unique)
            for i, texts in enumerate(sets):
                if found[i] is None:
                    embeddings = found[i] = computed[[row[text] for text in texts]]
                    self._write(texts, embeddings)
        return [embeddings.to(self._device(), torch.float32) for embeddings in found if embeddings is not None]

    @torch.no_grad()
    def _embed(self, texts: list[str]) -> torch.Tensor:
        ids = [torch.tensor(x) for x in self.tokenizer(texts).input_ids]
        longest = self.model.config.text_config.max_position_embeddings
        for text, tokens in zip(texts, ids, strict=True):
            if len(tokens) > longest:
                raise ValueError(f"{text!r:.200} has {len(tokens)} tokens but the model reads {longest}: shorten the prompt")
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))  # texts of like length side by side: little padding
        embeddings = torch.empty(len(texts), self._width(), device=self._device())
        with tqdm(total=len(texts), desc="embedding labels", unit="label", disable=len(texts) < PROGRESS_FROM) as progress:
            for start in range(0, len(texts), self.batch_size):
                batch = order[start : start + self.batch_size]
                # The text tower is causal and pools at the end token, the first of them where there are several. So texts can be
                # filled up with it and need no mask, which keeps the kernels on their fast path.
                width = len(ids[batch[-1]])
                padded = torch.stack([torch.cat([ids[i], ids[i][-1:].expand(width - len(ids[i]))]) for i in batch])
                features = self.model.get_text_features(input_ids=padded.to(self._device())).pooler_output.float()
                embeddings[batch] = nn.functional.normalize(features, dim=-1)
                progress.update(len(batch))
        return embeddings

    def _device(self) -> torch.device:
        return self.model.logit_scale.device

    def _width(self) -> int:
        return self.model.config.projection_dim

    # --- files --------------------------------------------------------------------------------------------------------

    def _path(self, texts: Sequence[str]) -> Path | None:
        if self.cache_dir is None:
            return None
        key = json.dumps([FORMAT, self.fingerprint, list(texts)])
        return self.cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def _read(self, texts: Sequence[str]) -> torch.Tensor | None:
        path = self._path(texts)
        if path is None or not path.exists():
            return None
        try:
            return load_file(path)["embeddings"].view(len(texts), self._width())
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            logger.warning(f"{path} cannot be read ({error}); its labels are embedded again")
            return None

    def _write(self, texts: Sequence[str], embeddings: torch.Tensor) -> None:
        path = self._path(texts)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                save_file({"embeddings": embeddings.cpu().contiguous()}, Path(folder, path.name))
                os.replace(Path(folder, path.name), path)
        except (OSError, SafetensorError) as error:
            logger.warning_once(f"label embeddings are not kept: {self.cache_dir} cannot be written ({error})")


__all__ = ["DEFAULT_CACHE_DIR", "LabelEmbedder"]
