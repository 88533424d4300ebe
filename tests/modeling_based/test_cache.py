"""BasedCache: the ring buffer, decoding equal to the parallel forward, batches, and what cannot work."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from geobased import BasedCache, BasedConfig, BasedForCausalLM, BasedModel
from geobased.modeling_based.cache_based import RingSlidingWindowLayer

EACH_ALONE_AND_TOGETHER = [
    ["conv"],
    ["linear_attention"],
    ["sliding_attention"],
    ["conv", "linear_attention", "sliding_attention"],
    ["linear_attention", "conv"],
]


def by_mixers(value) -> str | None:
    return "+".join(value) if isinstance(value, list) else None


@torch.no_grad()
def forward_in_chunks(model, input_ids, chunk_sizes, cache=None, attention_mask=None):
    """Logits of all tokens, fed chunk by chunk through one cache."""
    cache = BasedCache(model.config) if cache is None else cache
    logits, start = [], 0
    for size in chunk_sizes:
        mask = None if attention_mask is None else attention_mask[:, : start + size]
        outputs = model(input_ids[:, start : start + size], past_key_values=cache, attention_mask=mask)
        logits.append(outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state)
        start += size
    assert start == input_ids.shape[1], "the chunks do not cover the input"
    return torch.cat(logits, dim=1), cache


def positions_as_keys(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.float32).view(1, 1, count, 1).expand(2, 1, count, 2).clone()


@settings(max_examples=80, deadline=None)
@given(window=st.integers(1, 7), chunks=st.lists(st.integers(0, 12), min_size=1, max_size=12))
def test_ring_buffer_holds_the_last_window(window, chunks):
    """0 in `chunks` stores one token by `append`, other numbers so many by `update`."""
    layer, stored = RingSlidingWindowLayer(window), 0
    for chunk in chunks:
        new = max(chunk, 1)
        tokens = positions_as_keys(stored, new)
        expected_keys, first_key = layer.get_mask_sizes(new)
        if chunk == 0:
            keys, values = layer.append(tokens, -tokens)
            assert sorted(keys[0, 0, :, 0].tolist()) == list(range(max(0, stored + 1 - window), stored + 1))
            slots = layer.slot_positions(0, torch.device("cpu"))
            assert keys[0, 0, :, 0].tolist() == slots.tolist(), "slot_positions does not say what the slots hold"
        else:
            keys, values = layer.update(tokens, -tokens)
            assert keys[0, 0, :, 0].tolist() == list(range(max(0, stored - window + 1), stored + new))
            assert (keys.shape[2], first_key) == (expected_keys, int(keys[0, 0, 0, 0])), "get_mask_sizes disagrees with update"
        assert torch.equal(values, -keys)
        stored += new
        kept = list(range(max(0, stored - window), stored))
        assert layer.keys[0, 0, :, 0].tolist() == kept, "keys are not the last window, oldest first"
        assert torch.equal(layer.values, -layer.keys)
        assert layer.slot_positions(0, torch.device("cpu"))[torch.tensor(stored - 1) % window] == stored - 1
        assert (layer.get_seq_length(), layer.num_filled) == (stored, len(kept))
    layer.keys, layer.values = layer.keys, layer.values  # other code of transformers assigns them
    assert layer.keys[0, 0, :, 0].tolist() == kept
    layer.reset()
    assert (layer.get_seq_length(), layer.keys.shape[2]) == (0, 0)
    assert layer.update(positions_as_keys(0, 2), positions_as_keys(0, 2))[0].shape[2] == 2


def test_slot_positions_of_tokens_to_come():
    layer = RingSlidingWindowLayer(4)
    layer.update(positions_as_keys(0, 6), positions_as_keys(0, 6))
    assert layer.slot_positions(1, torch.device("cpu")).tolist() == [4, 5, 6, 3]


@pytest.mark.parametrize("mixers", EACH_ALONE_AND_TOGETHER, ids=by_mixers)
@pytest.mark.parametrize(
    "chunks",
    [[40], [1] * 40, [5, 7, 1, 1, 26], [9, 8, 8, 8, 7], [2, 1, 1, 36], [1, 38, 1], [8, 1, 16, 15], [7, 1, 32]],
    ids=lambda chunks: "-".join(map(str, chunks)) if len(chunks) < 10 else f"{len(chunks)}_steps",
)
def test_chunks_equal_the_parallel_forward(make_model, make_ids, assert_near, mixers, chunks):
    model, ids = make_model(mixers=mixers), make_ids(2, 40)
    expected = model(ids, use_cache=False).logits
    actual, cache = forward_in_chunks(model, ids, chunks)
    assert cache.get_seq_length() == 40
    assert_near(actual, expected, name="logits")


@pytest.mark.parametrize("window", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("kernel", [1, 2, 5])
@pytest.mark.parametrize("prompt", [1, 2, 4, 20])
def test_prompts_around_window_and_kernel(make_model, make_ids, assert_near, window, kernel, prompt):
    model, ids = make_model(sliding_window=window, conv_kernel=kernel), make_ids(2, 26)
    expected = model(ids, use_cache=False).logits
    assert_near(forward_in_chunks(model, ids, [prompt] + [1] * (26 - prompt))[0], expected, name="logits")


@pytest.mark.parametrize("pieces", [[9, 1, 1, 1, 5, 1, 12], [3, 27], [30], [12] + [1] * 18], ids=str)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_chunks_of_left_padded_rows_equal_the_rows_alone(make_model, make_ids, assert_near, pieces, attn_implementation):
    model = make_model(attn_implementation=attn_implementation)
    lengths, total = [30, 22, 3], 30
    rows = [make_ids(1, n, seed=n) for n in lengths]
    ids, mask = torch.zeros(3, total, dtype=torch.long), torch.zeros(3, total, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, total - lengths[i] :], mask[i, total - lengths[i] :] = row[0], 1
    logits, _ = forward_in_chunks(model, ids, pieces, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = model(row, use_cache=False).logits[0]
        assert_near(logits[i, total - lengths[i] :], alone, name=f"logits of row {i}")


@pytest.fixture(scope="module")
def long_decoding() -> tuple[BasedConfig, torch.Tensor]:
    config = BasedConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        feature_dim=16,
        sliding_window=129,
        mixers=["conv", "linear_attention", "sliding_attention"],
        initializer_range=0.1,
    )
    return config, torch.randint(0, 97, (1, 4096), generator=torch.Generator().manual_seed(0))


def test_decoding_4096_tokens_equals_the_parallel_forward(long_decoding, assert_near):
    config, ids = long_decoding
    torch.manual_seed(0)
    model = BasedForCausalLM(config).eval()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    actual, cache = forward_in_chunks(model, ids, [1] * 4096)
    assert cache.get_seq_length() == 4096
    assert_near(actual, expected, tolerance=1e-4, name="logits of all steps")
    assert_near(actual[:, -64:], expected[:, -64:], tolerance=1e-4, name="logits of the last steps")
    worst = (actual - expected).abs().max().item()
    assert worst <= 1e-4, f"largest difference of a logit is {worst:.2e}"


@pytest.mark.parametrize(("tokens", "chunks"), [(4096, [1000, 1584, 1000] + [1] * 512), (1024, [1] * 1024)], ids=["4096", "1024"])
def test_bfloat16_decoding_stays_within_one_percent(long_decoding, assert_near, tokens, chunks):
    config, ids = long_decoding
    torch.manual_seed(0)
    model = BasedForCausalLM(config).eval().bfloat16()
    ids = ids[:, :tokens]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    actual, _ = forward_in_chunks(model, ids, chunks)
    assert_near(actual, expected, tolerance=1e-2, name="bfloat16 logits")
    assert_near(actual[:, -256:], expected[:, -256:], tolerance=1e-2, name="bfloat16 logits of the last 256 steps")


def test_running_sums_are_float32_in_half_precision(make_model, make_ids):
    model = make_model().bfloat16()
    _, cache = forward_in_chunks(model, make_ids(2, 12), [10, 1, 1])
    state = cache.layers[1].recurrent_states[0]
    assert state.dtype == torch.float32
    assert state.shape == (2, 2, 9 * 10 // 2, 17)
    assert cache.layers[1].device == state.device, "offloading needs the layer's device"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mixers", EACH_ALONE_AND_TOGETHER, ids=by_mixers)
def test_size_is_constant_and_foretold(make_model, make_ids, dtype, mixers):
    model = make_model(mixers=mixers).to(dtype)
    cache = BasedCache(model.config)
    assert cache.size_bytes() == 0
    for length in (1, 7, 50):
        forward_in_chunks(model, make_ids(3, length), [length], cache=cache)
        assert cache.size_bytes() == model.state_size_bytes(3), f"size after {length} more tokens"


def continued(model, cache, ids) -> torch.Tensor:
    return forward_in_chunks(model, ids, [1] * ids.shape[1], cache=cache)[0]


@pytest.mark.parametrize("operation", ["batch_select_indices", "reorder_cache", "batch_repeat_interleave"])
@pytest.mark.parametrize("length", [5, 21], ids=["within_window", "past_window"])
def test_batch_operations(make_model, make_ids, assert_near, operation, length):
    model, ids, more = make_model(), make_ids(3, length), make_ids(6, 11, seed=5)
    _, cache = forward_in_chunks(model, ids, [length])
    if operation == "batch_repeat_interleave":
        chosen, arguments = torch.tensor([0, 0, 1, 1, 2, 2]), 2
    else:
        chosen = arguments = torch.tensor([2, 2, 0])
    getattr(cache, operation)(arguments)
    more = more[: len(chosen)]
    expected = model(torch.cat([ids[chosen], more], 1), use_cache=False).logits[:, length:]
    assert_near(continued(model, cache, more), expected, name=f"logits after {operation}")


@pytest.mark.parametrize("operation", ["batch_select_indices", "reorder_cache", "batch_repeat_interleave", "reset"])
def test_operations_on_an_empty_cache(make_config, operation):
    cache = BasedCache(make_config())
    arguments = {"batch_repeat_interleave": (2,), "reset": ()}.get(operation, (torch.tensor([1, 0]),))
    getattr(cache, operation)(*arguments)
    assert cache.get_seq_length() == 0


def test_reset_forgets_everything(make_model, make_ids, assert_near):
    model, ids = make_model(), make_ids(2, 19)
    _, cache = forward_in_chunks(model, make_ids(2, 23, seed=9), [20, 1, 2])
    cache.reset()
    assert cache.get_seq_length() == 0
    actual, _ = forward_in_chunks(model, ids, [4] + [1] * 15, cache=cache)
    assert_near(actual, model(ids, use_cache=False).logits, name="logits after reset")


def test_deep_copies_go_their_own_ways(make_model, make_ids, assert_near):
    model, ids = make_model(), make_ids(2, 14)
    _, cache = forward_in_chunks(model, ids, [14])
    branch = copy.deepcopy(cache)
    left, right = make_ids(2, 9, seed=2), make_ids(2, 9, seed=3)
    for name, which, more in (("original", cache, left), ("copy", branch, right)):
        expected = model(torch.cat([ids, more], 1), use_cache=False).logits[:, 14:]
        assert_near(continued(model, which, more), expected, name=f"logits of the {name}")


def test_cropping_raises_with_a_reason(make_model, make_ids):
    model = make_model()
    cache = model(make_ids(1, 9)).past_key_values
    with pytest.raises(ValueError, match="recurrent state is a sum"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="left the window are gone"):
        cache.layers[2].crop(-2)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache], ids=lambda kind: kind.__name__)
def test_transformers_own_caches_work(make_model, make_ids, assert_near, kind):
    model, ids = make_model(), make_ids(2, 24)
    cache = kind(config=model.config, **({"max_cache_len": 32} if kind is StaticCache else {}))
    actual, _ = forward_in_chunks(model, ids, [10, 1, 1, 6, 1, 1, 1, 1, 1, 1], cache=cache)
    assert_near(actual, model(ids, use_cache=False).logits, name="logits")


def test_base_model_continues_from_its_cache(make_model, make_ids, assert_near):
    model, ids = make_model(BasedModel), make_ids(2, 24)
    outputs = model(ids[:, :11], use_cache=True)
    more = model(ids[:, 11:], past_key_values=outputs.past_key_values)
    assert_near(more.last_hidden_state, model(ids, use_cache=False).last_hidden_state[:, 11:], name="hidden states")


def test_cache_of_another_batch_size_is_named(make_model, make_ids):
    model = make_model()
    cache = model(make_ids(2, 5)).past_key_values
    with pytest.raises(ValueError, match="holds a batch of 2 sequences but the input has 3"):
        model(make_ids(3, 1), past_key_values=cache)


def test_cache_of_another_model_is_named(make_model, make_ids):
    cache = make_model(mixers=["conv", "conv"])(make_ids(2, 5)).past_key_values
    with pytest.raises(ValueError, match="cache has 2 layers but the model has 3"):
        make_model()(make_ids(2, 1), past_key_values=cache)


def test_ring_names_another_batch_size():
    layer = RingSlidingWindowLayer(4)
    layer.update(torch.zeros(2, 1, 3, 2), torch.zeros(2, 1, 3, 2))
    for store in (layer.append, layer.update):
        with pytest.raises(ValueError, match="batch of 2 sequences but the input has 5"):
            store(torch.zeros(5, 1, 1, 2), torch.zeros(5, 1, 1, 2))
