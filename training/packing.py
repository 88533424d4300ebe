"""Token blocks on disk: texts and documents are tokenised once, cached as arrays, and sliced into batches.

- `TextTokens`: one long array; an item is a stretch of it at a random offset.
- `DocumentBlocks`: rows of equal length; whole documents are packed into a row, none is cut, so that a question never
  loses the record that it asks about. A parallel array says which tokens belong to answers.
- `MixtureDataset`: item i of a virtual epoch is a pure function of (seed, i), which is what makes a resumed run see the
  same data as an uninterrupted one, whatever the number of workers.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from geobased.training.text_files import parse_document, read_text

CACHE_FORMAT = 1


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


@dataclass(frozen=True)
class TextTokens:
    """Tokens of one or more texts, each ended by the end-of-text token. tokens: (num_tokens,)."""

    tokens: np.ndarray

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.size)

    def rows(self, draws: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stretches at the offsets that uniform draws in [0, 1) point at: ids, answer mask (zeros), padding mask (zeros)."""
        offsets = (draws * (self.tokens.size - length + 1)).astype(np.int64)
        ids = self.tokens[offsets[:, None] + np.arange(length)]
        return ids.astype(np.int64), np.zeros(ids.shape, bool), np.zeros(ids.shape, bool)


@dataclass(frozen=True)
class DocumentBlocks:
    """Whole documents packed into rows of equal length.

    tokens: (num_blocks, length); answers: the same shape, 1 on tokens of an answer and on the one that ends it;
    lengths: (num_blocks,), tokens of a row that are no padding; dropped: documents longer than a row.
    """

    tokens: np.ndarray
    answers: np.ndarray
    lengths: np.ndarray
    num_documents: int
    dropped: int

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def rows(self, draws: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows that uniform draws in [0, 1) point at: ids, answer mask, padding mask."""
        rows = (draws * len(self.tokens)).astype(np.int64)
        padding = np.arange(length) >= self.lengths[rows, None]
        return self.tokens[rows].astype(np.int64), self.answers[rows].astype(bool), padding


def plain_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A copy of the tokenizer's backend without the padding and truncation that earlier calls may have left switched on."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_padding()
    plain.no_truncation()
    return plain


def _cache_key(paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps({"format": CACHE_FORMAT, **options}, sort_keys=True).encode())
    digest.update(plain_tokenizer(tokenizer).to_str().encode())
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:24]


def _publish(arrays: dict[str, np.ndarray], facts: dict[str, Any], folder: Path) -> None:
    """Write a cache entry so that other processes see all of it or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
        (temporary / "facts.json").write_text(json.dumps(facts))
        try:
            os.rename(temporary, folder)
        except OSError:
            # another process published the same entry first: same key, same content
            if not (folder / "facts.json").is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_files(paths: Sequence[str | Path]) -> list[Path]:
    files = [Path(path) for path in paths]
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"no such training file: {path}")
    return files


def pack_text(paths: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, cache_dir: str | Path) -> TextTokens:
    """Tokenise text files into one array, memory-mapped from the cache.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is empty.
    """
    files = _check_files(paths)
    folder = Path(cache_dir) / f"text-{_cache_key(files, tokenizer, {'kind': 'text'})}"
    if not (folder / "facts.json").is_file():
        dtype = token_dtype(len(tokenizer))
        plain = plain_tokenizer(tokenizer)
        pieces: list[np.ndarray] = []
        for path in files:
            # line by line: the tokenizer library works on them in parallel, and a line break is a token border anyway
            lines = read_text(path).splitlines(keepends=True)
            encoded = plain.encode_batch_fast(lines, add_special_tokens=False)
            pieces += [np.asarray(encoding.ids, dtype) for encoding in encoded]
            pieces.append(np.asarray([tokenizer.eos_token_id], dtype))
        _publish({"tokens": np.concatenate(pieces)}, {}, folder)
    return TextTokens(np.load(folder / "tokens.npy", mmap_mode="r"))


def encode_document(line: str, tokenizer: Any, where: str = "document") -> tuple[list[int], list[int]]:
    """Ids of a document and a mask of the same length, 1 on the tokens of its answers and on the one after each."""
    document = parse_document(line, where)
    encoding = tokenizer.encode(document.text, add_special_tokens=False)
    mask = [0] * len(encoding.ids)
    for start, end in document.answers:
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        if first is None or last is None:
            raise ValueError(f"{where}: the answer at characters {start} to {end} has no token of its own")
        for i in range(first, min(last + 2, len(mask))):
            mask[i] = 1
    return encoding.ids, mask


def encode_lines(serialized: str, lines: list[str], where: str, max_tokens: int) -> tuple[list[np.ndarray], int]:
    """Documents as rows (2, num_tokens) of ids and answer mask, and how many were too long."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(serialized)
    encoded, dropped = [], 0
    for line in lines:
        ids, mask = encode_document(line, tokenizer, where)
        if len(ids) > max_tokens:
            dropped += 1
        else:
            encoded.append(np.array([ids, mask], np.uint32))
    return encoded, dropped


def _bins(sizes: Sequence[int], length: int, open_bins: int = 64) -> list[list[int]]:
    """Best-fit packing in order of appearance: lists of document indices whose sizes add up to `length` at most."""
    done: list[list[int]] = []
    current: list[tuple[int, list[int]]] = []
    for index, size in enumerate(sizes):
        fitting = [i for i, (used, _) in enumerate(current) if used + size <= length]
        if fitting:
            best = max(fitting, key=lambda i: current[i][0])
            used, members = current[best]
            members.append(index)
            current[best] = (used + size, members)
            continue
        if len(current) == open_bins:
            fullest = max(range(open_bins), key=lambda i: current[i][0])
            done.append(current.pop(fullest)[1])
        current.append((size, [index]))
    return done + [members for _, members in current]


def pack_documents(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, length: int, cache_dir: str | Path, num_workers: int = 1
) -> DocumentBlocks:
    """Tokenise a JSON-lines file and pack whole documents, each ended by the end-of-text token, into rows.

    Args:
        length: tokens in a row; longer documents are dropped and counted.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is empty or malformed, or no document fits.
    """
    (file,) = _check_files([path])
    folder = Path(cache_dir) / f"documents-{_cache_key([file], tokenizer, {'kind': 'documents', 'length': length})}"
    if not (folder / "facts.json").is_file():
        documents, dropped = _encode_file(file, tokenizer, length - 1, num_workers)
        if not documents:
            raise ValueError(f"{file}: no document fits into {length} tokens ({dropped} are longer)")
        _publish_blocks(documents, dropped, tokenizer, length, folder)
    return _load_blocks(folder)


def pack_encoded_documents(
    encode: Callable[[], tuple[list[np.ndarray], int]],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    cache_dir: str | Path,
    origin: dict[str, Any],
) -> DocumentBlocks:
    """`pack_documents` for documents that stand in no file.

    Args:
        encode: called where the cache has nothing; returns documents as `encode_lines` does, of at most `length` - 1 tokens.
        origin: all that the documents follow from, fit for JSON.

    Raises:
        ValueError: no document fits.
    """
    options = {"kind": "encoded documents", "length": length, "origin": origin}
    folder = Path(cache_dir) / f"documents-{_cache_key([], tokenizer, options)}"
    if not (folder / "facts.json").is_file():
        documents, dropped = encode()
        if not documents:
            raise ValueError(f"no document fits into {length} tokens ({dropped} are longer)")
        _publish_blocks(documents, dropped, tokenizer, length, folder)
    return _load_blocks(folder)


def _publish_blocks(
    documents: list[np.ndarray], dropped: int, tokenizer: PreTrainedTokenizerBase, length: int, folder: Path
) -> None:
    bins = _bins([document.shape[1] + 1 for document in documents], length)
    tokens = np.full((len(bins), length), tokenizer.pad_token_id, token_dtype(len(tokenizer)))
    answers = np.zeros((len(bins), length), np.uint8)
    lengths = np.zeros(len(bins), np.int32)
    for row, members in enumerate(bins):
        position = 0
        for index in members:
            ids, mask = documents[index]
            tokens[row, position : position + ids.size] = ids
            answers[row, position : position + ids.size] = mask
            tokens[row, position + ids.size] = tokenizer.eos_token_id
            position += ids.size + 1
        lengths[row] = position
    facts = {"num_documents": len(documents), "dropped": dropped}
    _publish({"tokens": tokens, "answers": answers, "lengths": lengths}, facts, folder)


def _load_blocks(folder: Path) -> DocumentBlocks:
    facts = json.loads((folder / "facts.json").read_text())
    tokens, answers, lengths = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "answers", "lengths"))
    return DocumentBlocks(tokens, answers, lengths, facts["num_documents"], facts["dropped"])


def _encode_file(
    path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int, num_workers: int
) -> tuple[list[np.ndarray], int]:
    serialized = plain_tokenizer(tokenizer).to_str()
    documents: list[np.ndarray] = []
    dropped = 0
    with open(path, encoding="utf-8") as file:
        chunks = list(iter(lambda: list(islice(file, 500)), []))
    if not chunks:
        raise ValueError(f"{path} is empty")
    arguments = (
        [serialized] * len(chunks),
        chunks,
        [f"{path}, after line {500 * i}" for i in range(len(chunks))],
        [max_tokens] * len(chunks),
    )
    if num_workers > 1:
        with ProcessPoolExecutor(num_workers) as pool:
            results = list(pool.map(encode_lines, *arguments))
    else:
        results = list(map(encode_lines, *arguments))
    for encoded, too_long in results:
        documents += encoded
        dropped += too_long
    return documents, dropped


@dataclass(frozen=True)
class MixtureSchedule:
    """Weights of the sources over the course of training: from `start` to `end`, linearly over `transition` of it."""

    start: tuple[float, ...]
    end: tuple[float, ...]
    transition: float

    def __post_init__(self) -> None:
        for weights in (self.start, self.end):
            if min(weights, default=-1.0) < 0 or sum(weights) <= 0:
                raise ValueError(f"mixture weights must be non-negative and not all zero, got {weights}")
        if len(self.start) != len(self.end):
            raise ValueError(f"{len(self.start)} mixture weights at the start but {len(self.end)} at the end")
        if not 0 <= self.transition <= 1:
            raise ValueError(f"the mixture's transition must lie in [0, 1], got {self.transition}")

    def cumulative(self, progress: np.ndarray) -> np.ndarray:
        """Cumulative probabilities (n, sources) at progress (n,) in [0, 1]."""
        share = np.clip(progress / self.transition, 0, 1) if self.transition else np.ones_like(progress)
        start, end = (np.asarray(weights) / sum(weights) for weights in (self.start, self.end))
        return np.cumsum((1 - share)[:, None] * start + share[:, None] * end, axis=1)


class MixtureDataset(Dataset):
    """Virtual epoch of `size` rows; `__getitems__` returns a whole batch of tensors, so nothing is collated in Python.

    A batch holds `input_ids`, `labels` (-100 on padding) and, where `answer_weight` is not 1, `loss_weights`, all
    (batch, context_length).
    """

    def __init__(
        self,
        sources: Sequence[TextTokens | DocumentBlocks],
        schedule: MixtureSchedule,
        *,
        size: int,
        context_length: int,
        seed: int,
        answer_weight: float = 1.0,
    ) -> None:
        if len(sources) != len(schedule.start):
            raise ValueError(f"{len(sources)} sources but {len(schedule.start)} mixture weights")
        for source in sources:
            if isinstance(source, TextTokens) and source.num_tokens < context_length:
                raise ValueError(f"context_length={context_length} is longer than the text, which has {source.num_tokens} tokens")
        self.sources = list(sources)
        self.schedule = schedule
        self.size = size
        self.context_length = context_length
        self.seed = seed
        self.answer_weight = answer_weight

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        draws = np.array([np.random.Philox(key=self.seed, counter=index).random_raw(2) for index in indices])
        uniform = (draws >> np.uint64(11)) * 2.0**-53
        cumulative = self.schedule.cumulative(np.asarray(indices) / max(self.size - 1, 1))
        chosen = np.minimum((uniform[:, :1] >= cumulative).sum(1), len(self.sources) - 1)
        shape = (len(indices), self.context_length)
        ids, answers, padding = np.empty(shape, np.int64), np.empty(shape, bool), np.empty(shape, bool)
        for number, source in enumerate(self.sources):
            rows = np.flatnonzero(chosen == number)
            if rows.size:
                ids[rows], answers[rows], padding[rows] = source.rows(uniform[rows, 1], self.context_length)
        batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(np.where(padding, -100, ids))}
        if self.answer_weight != 1.0:
            batch["loss_weights"] = torch.from_numpy(np.where(answers, self.answer_weight, 1.0).astype(np.float32))
        return batch


def identity_collator(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`MixtureDataset.__getitems__` has made the batch already."""
    return batch


__all__ = [
    "DocumentBlocks",
    "MixtureDataset",
    "MixtureSchedule",
    "TextTokens",
    "encode_document",
    "encode_lines",
    "identity_collator",
    "pack_documents",
    "pack_encoded_documents",
    "pack_text",
    "plain_tokenizer",
    "token_dtype",
]
