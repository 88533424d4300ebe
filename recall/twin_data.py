"""What equal twins are trained on and asked: rows of documents and, if given, plain text; and the examples of the benchmark.

Documents are written and tokenised in the same processes, some at a time, and so are examples.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from geobased.recall.gazetteer_benchmark import BenchmarkExample, benchmark_examples
from geobased.recall.gazetteer_documents import GazetteerDocument, WriteDocumentsArguments, document_lines
from geobased.recall.gazetteer_recall import Located, closed_book_documents, locate_questions
from geobased.recall.places import load_places
from geobased.recall.twin_training import Rows
from geobased.training.packing import TextTokens, encode_lines, pack_encoded_documents, pack_text, plain_tokenizer

# of the sequences of documents: training, and the validation of learning rates (also of training places)
TRAINING_SEED, VALIDATION_SEED = 101, 102
# most documents, and contexts, that a process makes at a time
DOCUMENTS_AT_A_TIME, EXAMPLES_AT_A_TIME = 250, 5


@dataclass(frozen=True)
class PhaseSettings:
    """One stretch of training: rows of one length, and the documents in them, whose numbers of records are log-uniform."""

    context_length: int
    share: float
    """Of all training tokens."""
    num_documents: int
    max_words: int
    max_records: int
    num_validation: int = 200


class Workers:
    """Processes that share work; with `num_workers` 1, this process does it. Work that goes on after the deadline is given up.

    deadline: of `time.perf_counter`; None: as long as it takes.
    """

    def __init__(self, num_workers: int = 1, deadline: float | None = None) -> None:
        self.num_workers, self.deadline = num_workers, deadline
        self.pool = ProcessPoolExecutor(num_workers) if num_workers > 1 else None

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        """Results in the order of `items`; processes begin at once. They raise TimeoutError after the deadline."""
        if self.pool is None:
            return self._in_turn(function, items)
        return self.pool.map(function, items, timeout=None if self.deadline is None else max(0.0, self._seconds_left()))

    def _in_turn(self, function: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            if self.deadline is not None and self._seconds_left() <= 0:
                raise TimeoutError("the work was not done by the deadline")
            yield function(item)

    def _seconds_left(self) -> float:
        assert self.deadline is not None
        return self.deadline - time.perf_counter()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def _chunks(total: int, most: int, num_workers: int) -> list[tuple[int, int]]:
    """(first, number) of stretches of equal work, several for each process."""
    size = max(1, min(most, -(-total // (4 * num_workers))))
    return [(first, min(size, total - first)) for first in range(0, total, size)]


def _encoded_documents(
    arguments: WriteDocumentsArguments, serialized: str, max_tokens: int, chunk: tuple[int, int]
) -> tuple[list[np.ndarray], int]:
    return encode_lines(serialized, document_lines(arguments, chunk), f"document {chunk[0]} or after", max_tokens)


def document_rows(
    phase: PhaseSettings,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    workers: Workers,
    *,
    validation: bool = False,
    text: TextTokens | None = None,
    counterfactual: float = 0.9,
    counterfactual_names: float = 0.9,
) -> Rows:
    """Rows of whole documents of training places, packed in order of appearance, then rows of text.

    Documents in a row are separated by the end-of-text token and by nothing else: a model may look back into the one before,
    which helps no answer. Rows are the same for all models and seeds.

    Args:
        folder: keeps the rows for the next call.
        validation: documents of another sequence, as many as `num_validation`.
        text: appended, cut into rows; what is left over at the end is dropped.

    Raises:
        TimeoutError: the workers' deadline passed.
    """
    number, seed = (phase.num_validation, VALIDATION_SEED) if validation else (phase.num_documents, TRAINING_SEED)
    arguments = WriteDocumentsArguments(
        output="",
        num_documents=number,
        seed=seed,
        max_words=phase.max_words,
        max_records=phase.max_records,
        counterfactual=counterfactual,
        counterfactual_names=counterfactual_names,
    )
    length = phase.context_length

    def encode() -> tuple[list[np.ndarray], int]:
        work = partial(_encoded_documents, arguments, plain_tokenizer(tokenizer).to_str(), length - 1)
        results = list(workers.map(work, _chunks(number, DOCUMENTS_AT_A_TIME, workers.num_workers)))
        return list(chain.from_iterable(encoded for encoded, _ in results)), sum(dropped for _, dropped in results)

    blocks = pack_encoded_documents(encode, tokenizer, length, folder, asdict(arguments))
    tokens, answers = [np.asarray(blocks.tokens, np.int32)], [np.asarray(blocks.answers, bool)]
    if text is not None:
        num_text = text.num_tokens // length
        tokens.append(np.asarray(text.tokens[: num_text * length], np.int32).reshape(num_text, length))
        answers.append(np.zeros((num_text, length), bool))
    return Rows(torch.from_numpy(np.concatenate(tokens)), torch.from_numpy(np.concatenate(answers)), len(blocks.tokens))


def text_tokens(paths: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> TextTokens | None:
    """Tokens of the text files together; None where there are none."""
    return pack_text(paths, tokenizer, folder) if paths else None


@dataclass(frozen=True)
class LocatedExamples:
    """Examples of the benchmark, and the tokens of their documents with and without the records."""

    examples: list[BenchmarkExample]
    located: dict[GazetteerDocument, Located]


def _located_examples(
    split: str, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], chunk: tuple[int, int]
) -> tuple[list[BenchmarkExample], list[tuple[GazetteerDocument, Located]]]:
    examples = benchmark_examples(load_places(split), tokenizer, lengths, chunk[1], start=chunk[0])
    documents = [example.document for example in examples]
    documents += closed_book_documents(documents)
    return examples, [(document, locate_questions(document, tokenizer)) for document in documents]


def located_examples(
    split: str, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], num_examples: int, workers: Workers
) -> Callable[[], LocatedExamples]:
    """`benchmark_examples` about the places of a split. Processes begin at once; the function that is returned waits for them.

    Raises:
        TimeoutError: in the function that is returned: the workers' deadline passed.
    """
    work = partial(_located_examples, split, tokenizer, lengths)
    results = workers.map(work, _chunks(num_examples, EXAMPLES_AT_A_TIME, workers.num_workers))

    def collect() -> LocatedExamples:
        examples: list[BenchmarkExample] = []
        located: dict[GazetteerDocument, Located] = {}
        for some, tokens in results:
            examples += some
            located.update(tokens)
        return LocatedExamples(sorted(examples, key=lambda example: (example.length, example.index)), located)

    return collect


__all__ = ["LocatedExamples", "PhaseSettings", "Workers", "document_rows", "located_examples", "text_tokens"]
