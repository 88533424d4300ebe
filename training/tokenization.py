"""A byte-level BPE tokenizer for small language models: any text survives a round trip, digits stay single tokens.

Numbers are split digit by digit, so that a model copies a number token by token instead of choosing among merges that
depend on where the number happens to be cut.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from geobased.training.text_files import read_documents, read_text

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 4096, *, model_max_length: int = 1024, min_frequency: int = 2
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same texts give the same tokenizer.

    Args:
        texts: strings, e.g. lines; consumed once.
        vocab_size: ids in all, the two special tokens and the 256 bytes among them.
        model_max_length: context length that the tokenizer names, in tokens.
        min_frequency: pairs seen less often are not merged.

    Returns:
        a tokenizer with `bos = eos = "<|endoftext|>"` (id 0), a pad token of its own (id 1) and left padding.

    Raises:
        ValueError: `vocab_size` below 258, or texts too short to fill it.

    Example:
        >>> tokenizer = train_tokenizer(["to be, or not to be"] * 2, vocab_size=260)
        >>> tokenizer.decode(tokenizer.encode("be 1604!"))
        'be 1604!'
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 258:
        raise ValueError(f"vocab_size={vocab_size} is below 258: 256 bytes and two special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the texts yield {tokenizer.get_vocab_size()} tokens only, fewer than vocab_size={vocab_size}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


@dataclass
class TrainTokenizerArguments:
    """Arguments of `train`."""

    output_dir: str = field(metadata={"help": "folder for the tokenizer's files"})
    text: list[str] = field(default_factory=list, metadata={"help": "text files"})
    documents: list[str] = field(default_factory=list, metadata={"help": "JSON-lines files with a text per line"})
    max_document_characters: int = field(
        default=1_000_000, metadata={"help": "of each JSON-lines file, so that generated documents do not outweigh text"}
    )
    vocab_size: int = field(default=4096, metadata={"help": "ids in all"})
    model_max_length: int = field(default=1024, metadata={"help": "context length in tokens"})


def _texts(arguments: TrainTokenizerArguments) -> Iterator[str]:
    for path in arguments.text:
        yield from read_text(path).splitlines(keepends=True)
    for path in arguments.documents:
        characters = 0
        for document in read_documents(path):
            yield from document.text.splitlines(keepends=True)
            characters += len(document.text)
            if characters >= arguments.max_document_characters:
                break


def train(arguments: TrainTokenizerArguments) -> dict[str, Any]:
    """Train a tokenizer from files and save it.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no file given, an empty file, or texts too short for the vocabulary.
    """
    if not arguments.text and not arguments.documents:
        raise ValueError("give text files (--text) or documents (--documents) to train the tokenizer on")
    tokenizer = train_tokenizer(_texts(arguments), arguments.vocab_size, model_max_length=arguments.model_max_length)
    Path(arguments.output_dir).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(arguments.output_dir)
    return {"output_dir": arguments.output_dir, "vocab_size": len(tokenizer)}


def main() -> None:
    """Command line: every field of `TrainTokenizerArguments` is an option."""
    from transformers import HfArgumentParser

    (arguments,) = HfArgumentParser(TrainTokenizerArguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    print(json.dumps(train(arguments), indent=1))


__all__ = ["END_OF_TEXT", "PADDING", "TrainTokenizerArguments", "train", "train_tokenizer"]


if __name__ == "__main__":
    main()
