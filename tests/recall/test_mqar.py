import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geobased.recall.mqar import (
    FIGURE2_TEST,
    FIGURE2_TRAIN,
    Segment,
    accuracy,
    generate_examples,
    generate_segments,
    multiquery_associative_recall,
    sample_examples,
    segment_seeds,
)

FIXTURES = Path(__file__).parents[1] / "fixtures" / "recall"
SIZES = json.loads((FIXTURES / "mqar_golden.json").read_text(encoding="utf-8"))
GOLDEN = np.load(FIXTURES / "mqar_golden.npz")
NAMES = [name for name, sizes in SIZES.items() if isinstance(sizes, dict)]
SMALL = (Segment(64, 4, 6), Segment(32, 8, 5))


@pytest.mark.parametrize("random_non_queries", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_samples_are_the_benchmarks_own(name, random_non_queries):
    # the samples were made after torch.manual_seed(0), whatever their own seed
    inputs, labels = multiquery_associative_recall(**SIZES[name], random_non_queries=random_non_queries, non_query_seed=0)
    assert inputs.dtype == labels.dtype == torch.int64
    np.testing.assert_array_equal(inputs.numpy(), GOLDEN[f"{name}.rnq{int(random_non_queries)}.inputs"])
    np.testing.assert_array_equal(labels.numpy(), GOLDEN[f"{name}.rnq{int(random_non_queries)}.labels"])


def _written_as_the_benchmark_draws(vocab_size, num_examples, length, seed, power_a, pairs):
    """Keys, values and gaps by numpy's own `choice`, row after row."""
    random = np.random.RandomState(seed)
    slots = (length - 2 * pairs) // 2
    weights = power_a * np.arange(1, slots + 1) ** (power_a - 1)
    rows = range(num_examples)
    keys = [random.choice(np.arange(1, vocab_size // 2), pairs, replace=False) for _ in rows]
    values = [random.choice(np.arange(vocab_size // 2, vocab_size), pairs, replace=False) for _ in rows]
    gaps = [random.choice(slots, pairs, replace=False, p=weights / weights.sum()) for _ in rows]
    return np.array(keys), np.array(values), np.array(gaps)


@pytest.mark.parametrize("length, pairs, power_a", [(64, 16, 0.01), (256, 64, 0.01), (512, 3, 2.5), (4, 1, 0.5)])
def test_many_rows_take_the_draws_of_numpys_choice(length, pairs, power_a):
    keys, values, gaps = _written_as_the_benchmark_draws(601, 40, length, 9, power_a, pairs)
    (examples,) = generate_examples([Segment(length, pairs, 40)], [9], 601, power_a=power_a, progress=False)
    np.testing.assert_array_equal(examples.query_positions, 2 * pairs + 2 * gaps)
    np.testing.assert_array_equal(examples.targets, values)
    np.testing.assert_array_equal(examples.inputs.gather(1, examples.query_positions), keys)


def _check_examples(inputs, labels, vocab_size, pairs):
    context, asked = inputs[:, : 2 * pairs], labels != -100
    assert (asked.sum(1) == pairs).all() and not asked[:, : 2 * pairs].any()
    keys, values = context[:, ::2], context[:, 1::2]
    assert (keys >= 1).all() and (keys < vocab_size // 2).all()
    assert (values >= vocab_size // 2).all() and (inputs < vocab_size).all() and (inputs >= 0).all()
    for row, column in asked.nonzero().tolist():
        (pair,) = (context[row] == inputs[row, column]).nonzero().flatten().tolist()
        assert pair % 2 == 0 and labels[row, column] == context[row, pair + 1]
        assert column % 2 == 0


@st.composite
def _sizes(draw):
    pairs = draw(st.integers(1, 12))
    length = draw(st.integers(2 * pairs, 2 * pairs + 20)) * 2
    return pairs, length, draw(st.integers(length + 1, length + 40)), draw(st.integers(1, 4))


@settings(deadline=None, max_examples=60)
@given(_sizes(), st.integers(0, 2**32 - 1), st.floats(0.005, 3), st.booleans())
def test_every_query_finds_its_key_once_and_its_value_after_it(sizes, seed, power_a, random_non_queries):
    pairs, length, vocab_size, count = sizes
    inputs, labels = multiquery_associative_recall(vocab_size, count, length, seed, power_a, pairs, random_non_queries)
    assert inputs.shape == labels.shape == (count, length)
    _check_examples(inputs, labels, vocab_size, pairs)
    if not random_non_queries:
        assert ((inputs != 0).sum(1) == 3 * pairs).all()
    fresh = sample_examples(
        Segment(length, pairs, count),
        vocab_size,
        generator=torch.Generator().manual_seed(seed),
        power_a=power_a,
        random_non_queries=random_non_queries,
    )
    _check_examples(fresh.inputs, fresh.to_labels(), vocab_size, pairs)
    torch.testing.assert_close(fresh.targets, fresh.inputs[:, 1 : 2 * pairs : 2])


def test_global_generators_are_left_alone():
    np.random.seed(5)
    torch.manual_seed(5)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    multiquery_associative_recall(200, 3, 64, seed=1)
    segment_seeds()
    sample_examples(SMALL[0], 200, generator=torch.Generator().manual_seed(0))
    assert (np.random.get_state()[1] == before[0]).all() and torch.equal(torch.get_rng_state(), before[1])


def test_random_tokens_follow_the_seed():
    first, second = (multiquery_associative_recall(200, 3, 64, seed=s)[0] for s in (1, 1))
    assert torch.equal(first, second)
    other = multiquery_associative_recall(200, 3, 64, seed=1, non_query_seed=2)[0]
    assert torch.equal(first[:, :16], other[:, :16]) and not torch.equal(first, other)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input_seq_len": 63}, "input_seq_len=63 must be even"),
        ({"num_kv_pairs": 17}, "num_kv_pairs=17 needs input_seq_len of at least 68, not 64"),
        ({"vocab_size": 64}, "vocab_size=64 must be larger than input_seq_len=64"),
        ({"num_examples": 0}, "num_examples=0 must be a positive integer"),
        ({"num_kv_pairs": 2.0}, "num_kv_pairs=2.0 must be a positive integer"),
        ({"power_a": 0.0}, "power_a=0.0 must be positive"),
        ({"power_a": 2000.0}, "without probability"),
        ({"seed": -1}, "seed=-1 must be an integer from 0"),
    ],
)
def test_impossible_sizes_are_named(changes, message):
    arguments = {"vocab_size": 8192, "num_examples": 2, "input_seq_len": 64, "seed": 0} | changes
    with pytest.raises(ValueError, match=message):
        multiquery_associative_recall(**arguments)


def test_segments_of_the_figure():
    train_seeds, test_seeds = segment_seeds(123)
    assert train_seeds == SIZES["figure2_train_seeds"] and test_seeds == SIZES["figure2_test_seeds"]
    assert len(train_seeds) == len(FIGURE2_TRAIN) and len(test_seeds) == len(FIGURE2_TEST)
    assert sum(s.input_seq_len * s.num_examples for s in FIGURE2_TRAIN) == 24_320_000


def test_segments_are_the_same_from_processes_and_from_the_cache(tmp_path):
    here = generate_segments(SMALL, [3, 4], 200, num_workers=1, progress=False)
    for segment, seed, (inputs, labels) in zip(SMALL, [3, 4], here, strict=True):
        wanted = multiquery_associative_recall(200, segment.num_examples, segment.input_seq_len, seed, 0.01, segment.num_kv_pairs)
        assert torch.equal(inputs, wanted[0]) and torch.equal(labels, wanted[1])
    cache = tmp_path / "new" / "cache"
    for num_workers in (2, None):
        found = generate_segments(SMALL, [3, 4], 200, num_workers=num_workers, cache_dir=cache, progress=False)
        assert all(torch.equal(a, b) for pair in zip(here, found, strict=True) for a, b in zip(*pair, strict=True))
        assert len(list(cache.iterdir())) == 2


def test_cache_files_are_compact_and_used(tmp_path):
    segment = Segment(64, 4, 100)
    (made,) = generate_examples([segment], [1], 8192, cache_dir=tmp_path, progress=False)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size < 2 * 100 * (64 + 4 + 4) + 1000
    stamp = file.stat().st_mtime_ns
    (again,) = generate_examples([segment], [1], 8192, cache_dir=tmp_path, progress=False)
    assert file.stat().st_mtime_ns == stamp and torch.equal(made.inputs, again.inputs)
    generate_examples([segment], [1], 8192, cache_dir=tmp_path, power_a=0.5, progress=False)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "bit", "other"])
def test_damaged_cache_file_is_made_again_with_a_warning(tmp_path, damage):
    (made,) = generate_examples(SMALL[:1], [1], 200, cache_dir=tmp_path, progress=False)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if damage == "other":
        generate_examples(SMALL[:1], [2], 200, cache_dir=tmp_path / "other", progress=False)
        broken = next((tmp_path / "other").iterdir()).read_bytes()
    else:
        broken = whole[:-10] if damage == "cut" else whole[:-1] + bytes([whole[-1] ^ 1])
    file.write_bytes(broken)
    with pytest.warns(UserWarning, match="is damaged .* generated again"):
        (again,) = generate_examples(SMALL[:1], [1], 200, cache_dir=tmp_path, progress=False)
    assert torch.equal(made.inputs, again.inputs) and file.read_bytes() == whole


def test_large_vocabularies_are_kept_whole(tmp_path):
    for _ in range(2):
        (examples,) = generate_examples([Segment(64, 4, 20)], [1], 100_000, cache_dir=tmp_path, progress=False)
        assert examples.inputs.max() > 65_535
        _check_examples(examples.inputs, examples.to_labels(), 100_000, 4)


def test_generate_segments_checks_before_it_draws():
    with pytest.raises(ValueError, match="2 segments need as many seeds, not 1"):
        generate_segments(SMALL, [1], 200)
    with pytest.raises(ValueError, match="vocab_size=64"):
        generate_segments(SMALL, [1, 2], 64)
    with pytest.raises(ValueError, match="num_workers=0"):
        generate_segments(SMALL, [1, 2], 200, num_workers=0)


def test_fresh_examples_fill_slots_as_often_as_the_benchmark():
    segment = Segment(64, 4, 20_000)
    fresh = sample_examples(segment, 256, generator=torch.Generator().manual_seed(0))
    slots = (fresh.query_positions - 8) // 2
    first = torch.bincount(slots[:, 0], minlength=28) / len(fresh)
    torch.testing.assert_close(first, torch.from_numpy(GOLDEN["gap_prob_T64_kv4"]).float(), rtol=0, atol=0.012)
    (own,) = generate_examples([segment], [0], 256, progress=False, num_workers=1)
    any_query = [torch.bincount(((e.query_positions - 8) // 2).flatten(), minlength=28) / len(e) for e in (fresh, own)]
    torch.testing.assert_close(*any_query, rtol=0, atol=0.02)
    for examples in (fresh, own):  # keys 1 to 127 and values 128 to 255, all equally likely
        assert torch.bincount(examples.inputs[:, 0], minlength=128)[1:].float().div(len(fresh)).sub(1 / 127).abs().max() < 0.004
        assert (
            torch.bincount(examples.targets[:, 3], minlength=256)[128:].float().div(len(fresh)).sub(1 / 128).abs().max() < 0.004
        )


def test_fresh_examples_are_reproducible_and_on_their_device():
    first, second = (sample_examples(SMALL[1], 100, generator=torch.Generator().manual_seed(7), device="cpu") for _ in range(2))
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("inputs", "query_positions", "targets"))
    assert first.inputs.device.type == "cpu"
    with pytest.raises(ValueError, match="generator is of device cpu"):
        sample_examples(SMALL[1], 100, generator=torch.Generator(), device="meta")


def test_examples_can_be_indexed():
    examples = sample_examples(SMALL[0], 100, generator=torch.Generator().manual_seed(7))
    assert len(examples) == 6 and len(examples[2:4]) == 2
    assert torch.equal(examples[torch.tensor([5, 0])].to("cpu").to_labels(), examples.to_labels()[[5, 0]])


def test_accuracy_weighs_examples_alike():
    targets = torch.tensor([[5, -100, -100, 6], [7, 8, 9, 4]])
    predictions = torch.tensor([[5, -100, 1, 0], [7, 8, 9, 0]])
    assert accuracy(predictions, targets) == pytest.approx((1 / 2 + 3 / 4) / 2)
    with pytest.raises(ValueError, match="of one shape"):
        accuracy(predictions[:1], targets)
    with pytest.raises(ValueError, match="example 1 has no query"):
        accuracy(targets, torch.tensor([[5, 6, 7, 8], [-100] * 4]))
