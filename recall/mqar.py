"""Multi-query associative recall (MQAR, Arora et al. 2023, "Zoology"): key-value pairs, then keys whose values are asked for.

An example is `k1 v1 k2 v2 ... kn vn` followed by slots of two tokens. Each key is asked once, in a slot drawn by a power law
that favours the first slots; its label is its value. Tokens that are no part of a pair or a query are random, or 0. Keys come
from the first half of the vocabulary (0 excepted), values from the second. Random tokens may be any of them.

`multiquery_associative_recall` gives the samples of the benchmark's own generator bit for bit, without numpy's and torch's global
generators. `sample_examples` draws from the same distribution on any device, for training on ever fresh examples.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from tqdm import tqdm

from geobased.whole_file import whole_file

IGNORED_LABEL = -100
CACHE_FORMAT = 1
# with fewer examples than this to generate, starting processes takes longer than they save
MIN_EXAMPLES_FOR_PROCESSES = 100_000


@dataclass(frozen=True, slots=True)
class Segment:
    """Examples of one size: tokens of an example, key-value pairs (and queries) of an example, number of examples."""

    input_seq_len: int
    num_kv_pairs: int
    num_examples: int


FIGURE2_TRAIN = (
    Segment(64, 4, 100_000),
    Segment(128, 8, 20_000),
    Segment(256, 16, 20_000),
    Segment(256, 32, 20_000),
    Segment(256, 64, 20_000),
)
FIGURE2_TEST = (
    Segment(64, 4, 1_000),
    Segment(64, 8, 1_000),
    Segment(64, 16, 1_000),
    Segment(128, 32, 1_000),
    Segment(256, 64, 1_000),
    Segment(512, 128, 1_000),
    Segment(1024, 256, 1_000),
)


@dataclass(frozen=True, slots=True)
class Examples:
    """N examples of T tokens with n queries each, int64.

    Query i of an example asks for its pair i: its key stands at `2 * i`, its value at `2 * i + 1`.
    """

    inputs: Tensor
    """[N, T]"""
    query_positions: Tensor
    """[N, n], not sorted"""
    targets: Tensor
    """[N, n]"""

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: slice | Tensor) -> "Examples":
        """The examples of a slice, or of a tensor of indices."""
        return Examples(self.inputs[rows], self.query_positions[rows], self.targets[rows])

    def to(self, device: torch.device | str) -> "Examples":
        return Examples(self.inputs.to(device), self.query_positions.to(device), self.targets.to(device))

    def to_labels(self) -> Tensor:
        """Labels [N, T]: the value at each query's position, -100 elsewhere. They are not shifted."""
        labels = torch.full_like(self.inputs, IGNORED_LABEL)
        return labels.scatter_(1, self.query_positions, self.targets)


def _check(vocab_size: int, segment: Segment, power_a: float) -> None:
    sizes = {"vocab_size": vocab_size} | asdict(segment)
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"{name}={size!r} must be a positive integer")
    length, pairs = segment.input_seq_len, segment.num_kv_pairs
    if length % 2:
        raise ValueError(f"input_seq_len={length} must be even: pairs and slots are two tokens wide")
    if 4 * pairs > length:
        raise ValueError(f"num_kv_pairs={pairs} needs input_seq_len of at least {4 * pairs}, not {length}")
    # at least 4n tokens, so there are always more keys and values to draw from than pairs
    if vocab_size <= length:
        raise ValueError(f"vocab_size={vocab_size} must be larger than input_seq_len={length}")
    if not 0 < power_a < float("inf"):
        raise ValueError(f"power_a={power_a} must be positive and finite")
    if not (_gap_probabilities(segment, power_a) > 0).all():
        raise ValueError(f"power_a={power_a} leaves slots of {segment} without probability: choose one nearer to 1")


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r} must be an integer from 0 to 2**32 - 1")


def _gap_probabilities(segment: Segment, power_a: float) -> np.ndarray:
    slots = (segment.input_seq_len - 2 * segment.num_kv_pairs) // 2
    with np.errstate(over="ignore", invalid="ignore"):
        weights = power_a * np.arange(1, slots + 1) ** (power_a - 1)
        return weights / weights.sum()


def _choices(random: np.random.RandomState, population: int, size: int, rows: int) -> np.ndarray:
    """`rows` times the first draws of a shuffled range, [rows, size]."""
    chosen = np.empty((rows, size), np.int64)
    for row in chosen:
        # what RandomState.choice(population, size, replace=False) computes
        row[:] = random.permutation(population)[:size]
    return chosen


def _weighted_choices(random: np.random.RandomState, probabilities: np.ndarray, size: int, rows: int) -> np.ndarray:
    """`rows` times RandomState.choice(len(p), size, replace=False, p=p), [rows, size]; leaves `random` further on than that.

    `choice` draws as many as are missing, keeps the first of equal ones, takes their probability away and goes on. Nearly all
    of its time goes into checks and small arrays; the first round is the same distribution for all rows and is done at once.
    """
    first_bounds = np.cumsum(probabilities)
    first_bounds /= first_bounds[-1]
    block = max(size, min(2 * size * rows, 1 << 20))
    uniform, first_round, offset = np.empty(0), [], 0
    chosen = np.empty((rows, size), np.int64)
    for row in range(rows):
        found: dict[int, None] = {}
        bounds = first_bounds
        while (missing := size - len(found)) > 0:
            if offset + missing > len(uniform):
                uniform, offset = np.concatenate([uniform[offset:], random.random_sample(block)]), 0
                first_round = first_bounds.searchsorted(uniform, side="right").tolist()
            end = offset + missing
            if found:
                left = probabilities.copy()
                left[list(found)] = 0
                bounds = np.cumsum(left)
                bounds /= bounds[-1]
                found.update(dict.fromkeys(bounds.searchsorted(uniform[offset:end], side="right").tolist()))
            else:
                found.update(dict.fromkeys(first_round[offset:end]))
            offset = end
        chosen[row] = list(found)
    return chosen


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype}{arrays[name].shape}".encode())
        digest.update(arrays[name])  # type: ignore[arg-type]
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Task:
    """All that a segment's samples depend on."""

    segment: Segment
    vocab_size: int
    seed: int
    power_a: float
    random_non_queries: bool
    non_query_seed: int

    def arrays(self) -> dict[str, np.ndarray]:
        """Inputs [N, T], query positions and targets [N, n], uint16 where the numbers allow it."""
        pairs, length, count = self.segment.num_kv_pairs, self.segment.input_seq_len, self.segment.num_examples
        random = np.random.RandomState(self.seed)
        first_value = self.vocab_size // 2
        keys = 1 + _choices(random, first_value - 1, pairs, count)
        values = first_value + _choices(random, self.vocab_size - first_value, pairs, count)
        gaps = _weighted_choices(random, _gap_probabilities(self.segment, self.power_a), pairs, count)

        positions = 2 * pairs + 2 * gaps
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.int64
        inputs = np.zeros((count, length), dtype)
        inputs[:, 0 : 2 * pairs : 2] = keys
        inputs[:, 1 : 2 * pairs : 2] = values
        np.put_along_axis(inputs, positions, keys.astype(dtype), axis=1)
        if self.random_non_queries:
            generator = torch.Generator().manual_seed(self.non_query_seed)
            others = torch.randint(self.vocab_size, (count, length), generator=generator).numpy()
            np.copyto(inputs, others.astype(dtype), where=inputs == 0)
        return {"inputs": inputs, "query_positions": positions.astype(dtype), "targets": values.astype(dtype)}

    def parameters(self) -> dict[str, Any]:
        return {"format": CACHE_FORMAT} | asdict(self)

    def description(self, arrays: dict[str, np.ndarray]) -> str:
        """What a file says of itself. One string: safetensors writes several in any order, and equal files should be equal."""
        return json.dumps(self.parameters() | {"sha256": _checksum(arrays)})

    def cache_file(self, cache_dir: Path) -> Path:
        digest = hashlib.sha256(json.dumps(self.parameters()).encode()).hexdigest()[:12]
        size = self.segment
        return cache_dir / f"mqar-{size.input_seq_len}-{size.num_kv_pairs}-{size.num_examples}-{digest}.safetensors"


def _generate(task: _Task, cache_dir: Path | None) -> dict[str, np.ndarray]:
    arrays = task.arrays()
    if cache_dir is not None:
        with whole_file(task.cache_file(cache_dir)) as path:
            save_file(arrays, path, metadata={"mqar": task.description(arrays)})
    return arrays


def _read_cache(task: _Task, cache_dir: Path) -> dict[str, np.ndarray] | None:
    """A segment from the cache; nothing if it is not there or, with a warning, if it is not what was written."""
    path = task.cache_file(cache_dir)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            description = (file.metadata() or {}).get("mqar")
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        reason = str(error)
    else:
        if description == task.description(arrays):
            return arrays
        reason = "its contents do not have the checksum they were written with"
    warnings.warn(f"{path} is damaged ({reason}): the segment is generated again", stacklevel=3)
    return None


def _to_examples(arrays: dict[str, np.ndarray]) -> Examples:
    return Examples(**{name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()})


def multiquery_associative_recall(
    vocab_size: int,
    num_examples: int,
    input_seq_len: int,
    seed: int,
    power_a: float = 0.01,
    num_kv_pairs: int = 8,
    random_non_queries: bool = True,
    *,
    non_query_seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Examples of MQAR, the benchmark's own.

    Args:
        vocab_size: keys are drawn from 1 to `vocab_size // 2 - 1`, values from there to `vocab_size - 1`.
        num_examples: number of examples N.
        input_seq_len: tokens T of an example, even, at least `4 * num_kv_pairs` and less than `vocab_size`.
        seed: of keys, values and positions.
        power_a: slot i (from 1) is drawn with a probability proportional to `i ** (power_a - 1)`.
        num_kv_pairs: pairs, and queries, of an example.
        random_non_queries: whether tokens that are no part of a pair or a query are random instead of 0.
        non_query_seed: seed of those random tokens; `seed` if not given. The benchmark takes them from torch's global generator
            whatever its own seed: after `torch.manual_seed(s)` it gives the samples that `non_query_seed=s` gives here.

    Returns:
        Inputs and labels, int64 [N, T]. A label belongs to the position of its query (no shift), and is -100 elsewhere.

    Raises:
        ValueError: sizes that make no example; the message names them.

    Example:
        >>> inputs, labels = multiquery_associative_recall(8192, num_examples=4, input_seq_len=64, seed=123, num_kv_pairs=4)
        >>> (labels != -100).sum(1).tolist()
        [4, 4, 4, 4]
    """
    segment = Segment(input_seq_len, num_kv_pairs, num_examples)
    _check(vocab_size, segment, power_a)
    _check_seed(seed)
    other_seed = seed if non_query_seed is None else non_query_seed
    examples = _to_examples(_Task(segment, vocab_size, int(seed), power_a, random_non_queries, other_seed).arrays())
    return examples.inputs, examples.to_labels()


def segment_seeds(seed: int = 123, num_train: int = 5, num_test: int = 7) -> tuple[list[int], list[int]]:
    """Seeds of the training and the test segments: below and from 2**31, so that no two can be equal across them."""
    _check_seed(seed)
    random = np.random.RandomState(seed)
    train = random.randint(0, 2**31, num_train, dtype=np.int64).tolist()
    return train, random.randint(2**31, 2**32, num_test, dtype=np.int64).tolist()


def generate_examples(
    segments: Iterable[Segment],
    seeds: Sequence[int],
    vocab_size: int,
    *,
    power_a: float = 0.01,
    random_non_queries: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    num_workers: int | None = None,
    progress: bool = True,
) -> list[Examples]:
    """The examples of several segments, as `multiquery_associative_recall` makes them, in the order of `segments`.

    Args:
        segments: sizes, e.g. `FIGURE2_TRAIN`.
        seeds: one a segment, e.g. from `segment_seeds`.
        vocab_size, power_a, random_non_queries: as in `multiquery_associative_recall`.
        cache_dir: folder, made if need be, where each segment is kept in a file and looked for next time (59 MB for
            `FIGURE2_TRAIN`). A damaged file is replaced with a warning.
        num_workers: processes, each of which makes one segment at a time; by default one a core and segment, or none where they
            would not pay. With 1 this process makes all. Processes are spawned: a script needs its `__main__` guard.
        progress: whether a bar counts the examples.

    Raises:
        ValueError: sizes that make no example, or another number of seeds than of segments.
    """
    segments = list(segments)
    if len(segments) != len(seeds):
        raise ValueError(f"{len(segments)} segments need as many seeds, not {len(seeds)}")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers={num_workers} must be at least 1")
    for segment, seed in zip(segments, seeds, strict=True):
        _check(vocab_size, segment, power_a)
        _check_seed(seed)
    tasks = [
        _Task(segment, vocab_size, int(seed), power_a, random_non_queries, int(seed))
        for segment, seed in zip(segments, seeds, strict=True)
    ]
    folder = None if cache_dir is None else Path(cache_dir)
    made: dict[_Task, dict[str, np.ndarray]] = {}
    with tqdm(total=sum(s.num_examples for s in segments), unit=" examples", desc="MQAR", disable=not progress) as bar:

        def keep(task: _Task, arrays: dict[str, np.ndarray]) -> None:
            made[task] = arrays
            bar.update(task.segment.num_examples * tasks.count(task))

        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for task in dict.fromkeys(tasks):
                if (arrays := _read_cache(task, folder)) is not None:
                    keep(task, arrays)
        # the longest first, so that no process starts on it when the others are done
        missing = sorted({*tasks} - {*made}, key=lambda task: -task.segment.num_examples)
        if num_workers is None:
            few = sum(task.segment.num_examples for task in missing) < MIN_EXAMPLES_FOR_PROCESSES
            num_workers = 1 if few else os.cpu_count() or 1
        num_workers = min(num_workers, len(missing))
        if num_workers > 1:
            # not forked: a fork of a process that runs threads or CUDA can hang
            with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
                futures = {pool.submit(_generate, task, folder): task for task in missing}
                for future in as_completed(futures):
                    keep(futures[future], future.result())
        else:
            for task in missing:
                keep(task, _generate(task, folder))
    return [_to_examples(made[task]) for task in tasks]


def generate_segments(
    segments: Iterable[Segment],
    seeds: Sequence[int],
    vocab_size: int,
    *,
    power_a: float = 0.01,
    random_non_queries: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    num_workers: int | None = None,
    progress: bool = True,
) -> list[tuple[Tensor, Tensor]]:
    """Inputs and labels, int64 [N, T], of several segments; arguments and errors as in `generate_examples`."""
    made = generate_examples(
        segments,
        seeds,
        vocab_size,
        power_a=power_a,
        random_non_queries=random_non_queries,
        cache_dir=cache_dir,
        num_workers=num_workers,
        progress=progress,
    )
    return [(examples.inputs, examples.to_labels()) for examples in made]


def _distinct(low: int, high: int, shape: tuple[int, int], generator: torch.Generator, device: torch.device) -> Tensor:
    """Rows of distinct integers of [low, high), uniform over all such rows."""
    numbers = torch.randint(low, high, shape, generator=generator, device=device)
    while True:
        # drawing again whatever occurs twice treats all numbers alike, so all rows of distinct ones stay equally likely
        ordered, columns = numbers.sort(dim=1, stable=True)
        repeated = torch.zeros_like(numbers, dtype=torch.bool)
        repeated.scatter_(1, columns[:, 1:], ordered[:, 1:] == ordered[:, :-1])
        if not repeated.any():
            return numbers
        count = int(repeated.sum())
        numbers[repeated] = torch.randint(low, high, (count,), generator=generator, device=device)


def sample_examples(
    segment: Segment,
    vocab_size: int,
    *,
    generator: torch.Generator,
    device: torch.device | str | None = None,
    power_a: float = 0.01,
    random_non_queries: bool = True,
) -> Examples:
    """Fresh examples of a segment, drawn on a device: the distribution of `multiquery_associative_recall`, not its samples.

    Args:
        segment: sizes; `num_examples` may be a batch's.
        vocab_size, power_a, random_non_queries: as in `multiquery_associative_recall`.
        generator: torch's generator on `device`; the same state gives the same examples on the same kind of device.
        device: where the examples are made; the generator's by default.

    Raises:
        ValueError: sizes that make no example, or a generator of another device.
    """
    _check(vocab_size, segment, power_a)
    device = generator.device if device is None else torch.device(device)
    if device.type != generator.device.type:
        raise ValueError(f"generator is of device {generator.device}: make one with torch.Generator({str(device)!r})")
    shape, pairs = (segment.num_examples, segment.num_kv_pairs), segment.num_kv_pairs
    first_value = vocab_size // 2
    keys = _distinct(1, first_value, shape, generator, device)
    values = _distinct(first_value, vocab_size, shape, generator, device)
    # the first arrivals of a race at the slots' rates are successive draws without replacement (the Gumbel-top-k trick)
    rates = torch.from_numpy(_gap_probabilities(segment, power_a)).to(device, torch.float32)
    arrivals = torch.empty(shape[0], len(rates), device=device).exponential_(generator=generator) / rates
    positions = 2 * pairs + 2 * arrivals.topk(pairs, dim=1, largest=False).indices

    size = (segment.num_examples, segment.input_seq_len)
    if random_non_queries:
        inputs = torch.randint(vocab_size, size, generator=generator, device=device)
    else:
        inputs = torch.zeros(size, dtype=torch.int64, device=device)
    inputs[:, 0 : 2 * pairs : 2] = keys
    inputs[:, 1 : 2 * pairs : 2] = values
    inputs.scatter_(1, positions, keys)
    return Examples(inputs, positions, values)


def accuracy(predictions: Tensor, targets: Tensor) -> float:
    """The benchmark's metric: share of an example's queries answered correctly, averaged over the examples.

    Args:
        predictions: predicted ids, [N, n] at the queries or [N, T] at all positions.
        targets: of the same shape; positions with -100 do not count.

    Raises:
        ValueError: other shapes, or an example without a query.
    """
    if predictions.shape != targets.shape or targets.ndim != 2 or not len(targets):
        raise ValueError(
            f"predictions and targets must be of one shape [examples, positions], not {[*predictions.shape]}, {[*targets.shape]}"
        )
    asked = targets != IGNORED_LABEL
    queries = asked.sum(1)
    if not queries.all():
        raise ValueError(f"example {int((queries == 0).nonzero()[0])} has no query")
    right = ((predictions == targets) & asked).sum(1)
    return (right.double() / queries).mean().item()


__all__ = [
    "FIGURE2_TEST",
    "FIGURE2_TRAIN",
    "IGNORED_LABEL",
    "Examples",
    "Segment",
    "accuracy",
    "generate_examples",
    "generate_segments",
    "multiquery_associative_recall",
    "sample_examples",
    "segment_seeds",
]
