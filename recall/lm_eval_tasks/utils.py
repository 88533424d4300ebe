"""What the task files of this folder call. lm-evaluation-harness loads this file by its path; it is in no package."""

from typing import Any

from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from geobased.recall.gazetteer_benchmark import benchmark_examples, contains_answer, is_exact_answer
from geobased.recall.places import load_places


def gazetteer(
    length: int,
    num_examples: int = 250,
    seed: int = 1,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    trust_remote_code: bool = False,
    **_: Any,
) -> DatasetDict:
    """Examples of `geobased recall gazetteer-benchmark` with contexts of `length` tokens, as the split "test".

    The harness passes a task's `dataset_kwargs` and `metadata`, and of the command line `--metadata` and `--model_args`, which
    name the tokenizer that contexts are measured with. Prompts begin with its beginning-of-text token if there is one.

    Raises:
        ValueError: no tokenizer named.
    """
    name = tokenizer or pretrained
    if not isinstance(name, str):
        raise ValueError('contexts are measured in a model\'s tokens: name it in --model_args, or in --metadata as "tokenizer"')
    loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    examples = benchmark_examples(load_places("held_out"), loaded, [int(length)], int(num_examples), int(seed))
    rows = [
        {
            "text": (loaded.bos_token or "") + example.prompt,
            "value": example.answer,
            "ending": example.ending,
            "key": example.field,
            "layout": example.layout,
            "depth": example.depth,
        }
        for example in examples
    ]
    return DatasetDict({"test": Dataset.from_list(rows)})


def contains(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The metric of SWDE, FDA and SQuAD completion: the value occurs in what the model wrote."""
    return {"contains": float(contains_answer(results[0], doc["value"].strip()))}


def contains_and_exact(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Also, whether what the model wrote is the value and what ends its line, and nothing else."""
    return {**contains(doc, results), "exact": float(is_exact_answer(results[0], doc["value"], doc["ending"]))}
