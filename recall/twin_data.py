"""Training rows for equal twins: documents of training places and, where given, plain text, tokenised once and cached."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from geobased.recall.gazetteer_documents import WriteDocumentsArguments, write_documents
from geobased.recall.twin_training import Rows
from geobased.training.packing import TextTokens, pack_documents, pack_text

# of the sequences of documents: training, and the validation of learning rates (also of training places)
TRAINING_SEED, VALIDATION_SEED = 101, 102


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


def document_rows(
    phase: PhaseSettings,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    validation: bool = False,
    text: TextTokens | None = None,
    counterfactual: float = 0.9,
    num_workers: int = 1,
) -> Rows:
    """Rows of whole documents of training places, packed in order of appearance, then rows of text.

    Documents in a row are separated by the end-of-text token and by nothing else: a model may look back into the one before,
    which helps no answer. Rows are the same for all models.

    Args:
        folder: keeps the documents and their tokens for the next call.
        validation: documents of another sequence, as many as `num_validation`.
        text: appended, cut into rows; what is left over at the end is dropped.
    """
    number, seed = (phase.num_validation, VALIDATION_SEED) if validation else (phase.num_documents, TRAINING_SEED)
    name = f"documents-{seed}-{number}-{phase.max_words}-{phase.max_records}-{counterfactual}.jsonl"
    path = Path(folder, name)
    if not path.is_file():
        write_documents(
            WriteDocumentsArguments(
                output=str(path),
                num_documents=number,
                seed=seed,
                max_words=phase.max_words,
                max_records=phase.max_records,
                counterfactual=counterfactual,
                num_workers=num_workers,
            )
        )
    length = phase.context_length
    blocks = pack_documents(path, tokenizer, length, folder, num_workers)
    tokens, answers = [np.asarray(blocks.tokens, np.int32)], [np.asarray(blocks.answers, bool)]
    if text is not None:
        num_text = text.num_tokens // length
        tokens.append(np.asarray(text.tokens[: num_text * length], np.int32).reshape(num_text, length))
        answers.append(np.zeros((num_text, length), bool))
    return Rows(torch.from_numpy(np.concatenate(tokens)), torch.from_numpy(np.concatenate(answers)), len(blocks.tokens))


def text_tokens(paths: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> TextTokens | None:
    """Tokens of the text files together; None where there are none."""
    return pack_text(paths, tokenizer, folder) if paths else None


__all__ = ["PhaseSettings", "document_rows", "text_tokens"]
