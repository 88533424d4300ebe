"""The loop of whole steps: the same tokens, caches and streams as transformers' loop, run op by op on the CPU here.

`fast_generation = "eager"` runs the code that a CUDA graph captures, without the capture.
"""

import copy
import gc
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LogitsProcessor, StoppingCriteria

from geobased import BasedCache, BasedConfig, BasedForCausalLM
from geobased.modeling_based import decode_graph, fast_generation, modeling_based
from geobased.modeling_based.decode_graph import CAPACITY
from geobased.modeling_based.gpu_sampling import NotServed


class Tokens:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.put_values, self.ended = [], 0

    def put(self, value):
        assert value.device.type == "cpu"
        self.put_values.append(value.clone())

    def end(self):
        self.ended += 1


@pytest.fixture
def ways(make_model, monkeypatch):
    """(ordinary, fast): the same model with and without the loop of whole steps. The fast one may not fall back."""

    def make(**changes):
        ordinary, fast = make_model(**changes), make_model(**changes)
        ordinary.fast_generation, fast.fast_generation = False, "eager"
        served = fast_generation.fast_sample

        def count(*args, **kwargs):
            fast.calls = getattr(fast, "calls", 0) + 1
            return served(*args, **kwargs)

        monkeypatch.setattr(modeling_based, "fast_sample", count)
        return ordinary, fast

    return make


def reason_against(model, ids, **arguments) -> str:
    """Why `generate` does not run whole steps."""
    reasons = []
    plan = modeling_based.plan_generation

    def record(*args, **kwargs):
        try:
            return plan(*args, **kwargs)
        except NotServed as reason:
            reasons.append(str(reason))
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_based, "plan_generation", record)
        model.generate(ids, **({"max_new_tokens": 3, "do_sample": False} | arguments))
    assert len(reasons) == 1, "the call was served"
    return reasons[0]


def left_padded(make_ids, lengths):
    rows = [make_ids(1, n, seed=n) for n in lengths]
    ids = torch.cat([F.pad(row, (max(lengths) - row.shape[1], 0)) for row in rows])
    return ids, (ids != 0).long()


# the same tokens


@pytest.mark.parametrize("prompt", [1, 7, 30])
@pytest.mark.parametrize("new", [1, 2, CAPACITY, CAPACITY + 1, 3 * CAPACITY + 5])
def test_greedy_tokens(ways, make_ids, prompt, new):
    ordinary, fast = ways()
    ids = make_ids(3, prompt)
    expected = ordinary.generate(ids, max_new_tokens=new, do_sample=False)
    assert fast.generate(ids, max_new_tokens=new, do_sample=False).tolist() == expected.tolist()
    assert expected.shape[1] == prompt + new and fast.calls == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"mixers": ["conv"]},
        {"mixers": ["linear_attention", "linear_attention"]},
        {"mixers": ["sliding_attention", "conv"], "tie_word_embeddings": False},
        {"conv_proj_bias": False, "hidden_act": "gelu"},
        {"conv_kernel": 1, "sliding_window": 1},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16, "residual_in_fp32": False},
    ],
    ids=lambda c: "-".join(map(str, c.values()))[:40],
)
def test_other_models(ways, make_ids, changes):
    dtype = changes.pop("dtype", torch.float32)
    ordinary, fast = (model.to(dtype) for model in ways(**changes))
    ids = make_ids(2, 9)
    expected = ordinary.generate(ids, max_new_tokens=40, do_sample=False)
    result = fast.generate(ids, max_new_tokens=40, do_sample=False)
    assert fast.calls == 1 and result.shape == expected.shape
    # half precision rounds differently in another order of sums; tokens agree until two logits lie that close
    same = (result == expected).float().cumprod(1).sum(1) - 9
    assert same.min() >= (40 if dtype == torch.float32 else 8), same


def test_half_precision_logits(ways, make_ids, assert_near):
    """Fed the same tokens, the step's logits are as near to float64 as the ordinary forward's."""
    _, fast = ways(initializer_range=0.1)
    ids = make_ids(2, 80)
    exact = copy.deepcopy(fast).double()(ids).logits[:, -40:]
    fast.to(torch.bfloat16)
    parallel = fast(ids).logits[:, -40:]
    begun = fast.generate(ids[:, :40], max_new_tokens=1, return_dict_in_generate=True)
    step = next(iter(fast_generation._steps[fast].values()))
    logits = []
    sample = step.sampler.sample
    step.sampler.sample = lambda scores, generated: (logits.append(scores.clone()), sample(scores, generated))[1]
    assert begun.past_key_values.get_seq_length() == 40
    for i in range(40, 80):
        step.tokens.copy_(ids[:, i])
        step.replay()
        if int(step.count) == CAPACITY:
            step.replay_fold()
    own = ((parallel.double() - exact).norm() / exact.norm()).item()
    assert_near(torch.stack(logits, 1), exact, tolerance=1.5 * own, name="logits")


@pytest.mark.parametrize("lengths", [(14, 3, 9, 1), (33, 32, 7)])
def test_left_padding(ways, make_ids, lengths):
    ordinary, fast = ways(pad_token_id=0)
    ids, mask = left_padded(make_ids, lengths)
    arguments = {"attention_mask": mask, "max_new_tokens": 70, "do_sample": False}
    assert fast.generate(ids, **arguments).tolist() == ordinary.generate(ids, **arguments).tolist()
    # the step is used again, by rows that are padded otherwise
    ids, mask = left_padded(make_ids, lengths[::-1])
    arguments["attention_mask"] = mask
    assert fast.generate(ids, **arguments).tolist() == ordinary.generate(ids, **arguments).tolist()
    assert fast.calls == 2 and len(fast_generation._steps[fast]) == 1


def test_a_step_serves_many_prompts(ways, make_ids):
    ordinary, fast = ways()
    for seed, (prompt, new) in enumerate([(5, 40), (50, 3), (2, 67)]):
        ids = make_ids(2, prompt, seed=seed)
        arguments = {"max_new_tokens": new, "do_sample": False}
        assert fast.generate(ids, **arguments).tolist() == ordinary.generate(ids, **arguments).tolist()
    assert len(fast_generation._steps[fast]) == 1


@pytest.mark.parametrize("padded", [False, True])
def test_norms_that_ride_along_with_products(ways, make_ids, monkeypatch, padded):
    monkeypatch.setattr(decode_graph.DecodeStep, "_few_rows_serve", lambda self: True)
    ordinary, fast = ways(pad_token_id=0)
    ids, mask = left_padded(make_ids, (14, 3, 9) if padded else (9, 9, 9))
    arguments = {"attention_mask": mask, "max_new_tokens": 70, "do_sample": False, "repetition_penalty": 1.2}
    assert fast.generate(ids, **arguments).tolist() == ordinary.generate(ids, **arguments).tolist()
    assert next(iter(fast_generation._steps[fast].values())).few_rows


# stopping


@pytest.mark.parametrize("num_ends", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_ends(ways, make_ids, num_ends, padded):
    ordinary, fast = ways(pad_token_id=0)
    ids, mask = left_padded(make_ids, (9, 4, 6) if padded else (9, 9, 9))
    free = ordinary.generate(ids, attention_mask=mask, max_new_tokens=60, do_sample=False)
    lengths = set()
    for column in (0, 1, 5, 17, 33, 45):
        ends = sorted({*free[:, 9 + column].tolist()})[:num_ends]
        arguments = {"attention_mask": mask, "max_new_tokens": 60, "do_sample": False, "eos_token_id": ends}
        expected = ordinary.generate(ids, **arguments)
        assert fast.generate(ids, **arguments).tolist() == expected.tolist(), column
        lengths.add(expected.shape[1])
    assert num_ends == 1 or min(lengths) < 69, "the test does not test: no batch ended early"


@pytest.mark.parametrize("column", [0, 1, 6, 40])
def test_the_returned_cache_can_be_gone_on_from(ways, make_ids, assert_near, column):
    ordinary, fast = ways(pad_token_id=0)
    ids, more = make_ids(1, 7), make_ids(1, 4, seed=5)
    end = ordinary.generate(ids, max_new_tokens=50, do_sample=False)[0, 7 + column].item()
    results = []
    for model in (ordinary, fast):
        arguments = {"do_sample": False, "return_dict_in_generate": True}
        begun = model.generate(ids, max_new_tokens=50, eos_token_id=end, **arguments)
        length = begun.past_key_values.get_seq_length()
        longer = torch.cat([begun.sequences, more], 1)
        rest = model.generate(longer, past_key_values=copy.deepcopy(begun.past_key_values), max_new_tokens=50, **arguments)
        results.append((begun, length, rest))
    (begun, length, rest), (fast_begun, fast_length, fast_rest) = results
    assert fast_begun.sequences.tolist() == begun.sequences.tolist() and fast_length == length == begun.sequences.shape[1] - 1
    assert fast_rest.sequences.tolist() == rest.sequences.tolist()
    assert isinstance(fast_begun.past_key_values, BasedCache) and fast.calls == 2
    for layer, fast_layer in zip(begun.past_key_values.layers, fast_begun.past_key_values.layers, strict=True):
        for a, b in zip(modeling_tensors(layer), modeling_tensors(fast_layer), strict=True):
            assert_near(without_unread_inputs(b), without_unread_inputs(a), tolerance=1e-5, name=type(layer).__name__)


def without_unread_inputs(state):
    """Of a convolution's last inputs, [batch, channels, kernel], no later token reads the oldest."""
    return state[..., 1:] if state.dim() == 3 else state


def modeling_tensors(layer):
    if hasattr(layer, "conv_states"):
        return [t for t in (layer.conv_states[0], layer.recurrent_states[0]) if t is not None]
    return [layer.keys[:, :, 1:] if layer.num_filled == layer.sliding_window else layer.keys, layer.values[:, :, 1:]]


def test_a_callers_cache_is_kept_up(ways, make_ids):
    """Also without return_dict_in_generate, and when the cache came out of `generate` itself."""
    ordinary, fast = ways()
    ids = make_ids(2, 6)
    whole = ordinary.generate(ids, max_new_tokens=30, do_sample=False)
    cache, sequences = BasedCache(fast.config), ids
    for new in (4, 26):
        sequences = fast.generate(sequences, past_key_values=cache, max_new_tokens=new, do_sample=False)
        assert cache.get_seq_length() == sequences.shape[1] - 1
    assert sequences.tolist() == whole.tolist() and fast.calls == 2
    begun = fast.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    rest = fast.generate(begun.sequences, past_key_values=begun.past_key_values, max_new_tokens=5, do_sample=False)
    assert begun.past_key_values.get_seq_length() == 13 and rest.tolist() == whole[:, :14].tolist()


def test_max_time(ways, make_ids):
    _, fast = ways()
    start = time.time()
    output = fast.generate(make_ids(1, 5), max_new_tokens=100_000, max_time=0.3, do_sample=False)
    assert 6 <= output.shape[1] < 50_000 and time.time() - start < 20 and fast.calls == 1


def test_streaming(ways, make_ids):
    ordinary, fast = ways(pad_token_id=0)
    ids = make_ids(2, 5)
    free = ordinary.generate(ids, max_new_tokens=70, do_sample=False)
    for end in (None, free[0, 5 + 50].item(), free[0, 5].item()):
        streams = []
        for model in (ordinary, fast):
            streamer = Tokens()
            output = model.generate(ids, max_new_tokens=70, do_sample=False, eos_token_id=end, streamer=streamer)
            assert streamer.ended == 1
            streams.append([value.tolist() for value in streamer.put_values])
        assert streams[0] == streams[1]
        assert torch.tensor(streams[1][1:]).T.tolist() == output[:, 5:].tolist()


def test_tokens_are_streamed_while_the_loop_runs(ways, make_ids):
    _, fast = ways()

    class Impatient(Tokens):
        def put(self, value):
            super().put(value)
            if len(self.put_values) == 20:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        fast.generate(make_ids(1, 5), max_new_tokens=10**6, do_sample=False, streamer=Impatient())
    assert fast.generate(make_ids(1, 5), max_new_tokens=2, do_sample=False).shape == (1, 7), "the step is not free again"


# processors


PROCESSING = {
    "repetition": {"repetition_penalty": 1.7},
    "minimum": {"min_new_tokens": 12, "eos_token_id": [3, 7, 9, 11, 20, 30, 40]},
    "min_length": {"min_length": 20, "eos_token_id": [3, 7, 9, 11, 20, 30, 40]},
    "suppress": {"suppress_tokens": [1, 5, 17, 60]},
    "finite": {"remove_invalid_values": True},
    "all": {"repetition_penalty": 0.8, "min_new_tokens": 9, "eos_token_id": 4, "suppress_tokens": [2, 8]},
}


@pytest.mark.parametrize("vocabulary", [None, 50])
@pytest.mark.parametrize("name", PROCESSING)
def test_processors(ways, make_ids, name, vocabulary):
    ordinary, fast = ways(pad_token_id=0, unpadded_vocab_size=vocabulary)
    ids, mask = left_padded(make_ids, (9, 4, 6))
    ids = ids.clamp(max=49)
    arguments = {"attention_mask": mask, "max_new_tokens": 45, "do_sample": False} | PROCESSING[name]
    assert fast.generate(ids, **arguments).tolist() == ordinary.generate(ids, **arguments).tolist()
    assert fast.calls == 1


def test_sampling_is_seeded_and_stays_in_the_candidates(ways, make_ids):
    ordinary, fast = ways()
    ids = make_ids(4, 5)
    arguments = {"max_new_tokens": 40, "do_sample": True, "top_k": 5, "temperature": 1.5}
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(fast.generate(ids, **arguments))
    assert runs[0].tolist() == runs[1].tolist() != runs[2].tolist()
    logits = ordinary(runs[0]).logits[:, 4:-1]
    ranks = (logits > logits.gather(-1, runs[0][:, 5:, None])).sum(-1)
    assert ranks.max() == 4 and fast.calls == 3
    torch.manual_seed(3)  # with the whole vocabulary the draws are those of torch.multinomial
    expected = ordinary.generate(ids, max_new_tokens=40, do_sample=True, top_k=0)
    torch.manual_seed(3)
    assert fast.generate(ids, max_new_tokens=40, do_sample=True, top_k=0).tolist() == expected.tolist()


# what is not served takes the ordinary loop


class OnlySeven(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"logits_processor": [OnlySeven()]}, "OnlySeven"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGram"),
        ({"do_sample": True, "typical_p": 0.5}, "TypicalLogitsWarper"),
        ({"stopping_criteria": [Never()]}, "Never"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
        ({"use_cache": False}, "NoneType"),
        ({"cache_implementation": "static"}, "StaticCache"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_calls_that_are_not_served(make_model, make_ids, arguments, reason):
    model = make_model()
    model.fast_generation = "eager"
    assert reason in reason_against(model, make_ids(2, 5), **arguments)


def test_right_padding_and_holes_are_not_served(make_model, make_ids):
    model, ids = make_model(pad_token_id=0), make_ids(2, 5)
    model.fast_generation = "eager"
    for row in ([1, 1, 1, 1, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]):
        mask = torch.tensor([[1] * 5, row])
        assert "not at the left" in reason_against(model, ids, attention_mask=mask)


def test_models_that_are_not_served(make_model, make_ids):
    ids = make_ids(2, 5)

    def changed(change, **config):
        model = make_model(**config)
        model.fast_generation = "eager"
        change(model)
        return reason_against(model, ids)

    class Other(nn.Linear):
        pass

    def replace(model):
        model.model.layers[0].mlp.up_proj = Other(32, 48, bias=False)

    assert "lm_head has a hook" in changed(lambda m: m.lm_head.register_forward_hook(lambda module, inputs, y: y))
    assert "up_proj is a Other" in changed(replace)
    assert "float64" in changed(lambda m: m.double())
    assert "training" in changed(lambda m: m.train(), attention_dropout=0.5)
    assert "'dynamic'" in changed(lambda m: None, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    assert "off" in changed(lambda m: setattr(m, "fast_generation", False))
    assert "on cpu" in changed(lambda m: setattr(m, "fast_generation", True))
    assert "'eager'" in changed(lambda m: None, attn_implementation="eager")
    model = make_model()
    model.fast_generation = "eager"
    with torch.autocast("cpu"):
        assert "autocast" in reason_against(model, ids)


def test_inputs_embeds_take_the_ordinary_loop(ways, make_ids):
    ordinary, fast = ways()
    ids = make_ids(2, 9)
    embeds = fast.get_input_embeddings()(ids)
    expected = ordinary.generate(ids, max_new_tokens=9)[:, 9:]
    assert fast.generate(inputs_embeds=embeds, max_new_tokens=9).tolist() == expected.tolist()


# what is left behind


def test_generation_in_inference_mode_leaves_a_model_that_trains(ways, make_ids):
    ordinary, fast = ways()
    ids = make_ids(2, 5)
    with torch.inference_mode():
        tokens = fast.generate(ids, max_new_tokens=40, do_sample=False)
    assert tokens.tolist() == ordinary.generate(ids, max_new_tokens=40, do_sample=False).tolist() and fast.calls == 1
    fast(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in fast.parameters())
    assert fast.generate(ids, max_new_tokens=40, do_sample=False).tolist() == tokens.tolist()


def test_models_are_not_kept_alive(make_model, make_ids):
    model = make_model()
    model.fast_generation = "eager"
    model.generate(make_ids(1, 3), max_new_tokens=2, do_sample=False)
    assert model in fast_generation._steps
    clone = copy.deepcopy(model)
    assert clone not in fast_generation._steps
    count = len(fast_generation._steps)
    del model
    gc.collect()
    assert len(fast_generation._steps) == count - 1


def test_few_steps_are_kept(make_model, make_ids):
    model = make_model()
    model.fast_generation = "eager"
    for batch in range(1, 8):
        model.generate(make_ids(batch, 3), max_new_tokens=2, do_sample=False)
    kept = fast_generation._steps[model]
    assert [key[0] for key in kept] == [4, 5, 6, 7]
    fast_generation.release_generation_buffers(model)
    assert model not in fast_generation._steps


# long prompts


@pytest.mark.parametrize("fast", [False, "eager"])
def test_long_prompts_are_read_in_chunks(make_model, make_ids, monkeypatch, fast):
    model = make_model(pad_token_id=0)
    model.fast_generation = fast
    ids, mask = left_padded(make_ids, (50, 31, 7))
    arguments = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(ids, **arguments)
    lengths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    ) if not fast else None
    monkeypatch.setattr(modeling_based, "PREFILL_TOKENS", 3 * 16)
    assert model.generate(ids, **arguments).tolist() == expected.tolist()
    if not fast:
        assert lengths[:4] == [16, 16, 16, 2]
    alone = model.generate(ids[:1], max_new_tokens=20, do_sample=False)
    assert alone[0].tolist() == expected[0].tolist()
    # going on from a cache with a long addition
    begun = model.generate(ids[:1], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([begun.sequences, make_ids(1, 60, seed=9)], 1)
    rest = model.generate(longer, past_key_values=begun.past_key_values, max_new_tokens=5, do_sample=False)
    monkeypatch.undo()
    assert rest.tolist() == model.generate(longer, max_new_tokens=5, do_sample=False).tolist()


# on a GPU, captured


@pytest.fixture(scope="module")
def gpu_model() -> BasedForCausalLM:
    torch.manual_seed(0)
    config = BasedConfig(
        vocab_size=512,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        feature_dim=12,
        sliding_window=65,
        mixers=["conv", "linear_attention", "sliding_attention"] * 2,
        initializer_range=0.06,
    )
    return BasedForCausalLM(config).eval().cuda()


def both_ways(model, ids, **arguments):
    results = []
    for mode in (False, True):
        model.fast_generation = mode
        results.append(model.generate(ids, **arguments))
    return results


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 5])
def test_captured_tokens(gpu_model, batch):
    ids = torch.randint(1, 512, (batch, 40), generator=torch.Generator().manual_seed(1)).cuda()
    expected, tokens = both_ways(gpu_model, ids, max_new_tokens=150, do_sample=False)
    assert torch.equal(tokens, expected)
    step = next(iter(fast_generation._steps[gpu_model].values()))
    assert step.step_graph is not None
    again = gpu_model.generate(ids.flip(1), max_new_tokens=70, do_sample=False)
    gpu_model.fast_generation = False
    assert torch.equal(again, gpu_model.generate(ids.flip(1), max_new_tokens=70, do_sample=False))


@pytest.mark.gpu
def test_captured_ends_padding_streaming_and_cache(gpu_model):
    ids = torch.randint(1, 512, (3, 40), generator=torch.Generator().manual_seed(1)).cuda()
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    free, _ = both_ways(gpu_model, ids, attention_mask=mask, max_new_tokens=60, do_sample=False)
    for column in (0, 3, 37):
        end = free[:, 40 + column].tolist()
        arguments = {"attention_mask": mask, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
        streams, sequences, caches = [], [], []
        for mode in (False, True):
            gpu_model.fast_generation = mode
            streamer = Tokens()
            output = gpu_model.generate(ids, max_new_tokens=60, streamer=streamer, return_dict_in_generate=True, **arguments)
            streams.append(torch.stack(streamer.put_values[1:]))
            sequences.append(output.sequences)
            caches.append(output.past_key_values)
        assert torch.equal(sequences[0], sequences[1]) and torch.equal(streams[0], streams[1])
        assert caches[0].get_seq_length() == caches[1].get_seq_length()
        for layer, other in zip(caches[0].layers, caches[1].layers, strict=True):
            for a, b in zip(modeling_tensors(layer), modeling_tensors(other), strict=True):
                a, b = without_unread_inputs(a), without_unread_inputs(b)
                assert (a - b).norm() <= 1e-4 * a.norm()


@pytest.mark.gpu
def test_captured_sampling_is_seeded(gpu_model):
    gpu_model.fast_generation = True
    ids = torch.randint(1, 512, (4, 10), generator=torch.Generator().manual_seed(1)).cuda()
    runs = []
    for seed in (0, 0, 1):  # the first call captures: that must not change the draws
        torch.manual_seed(seed)
        runs.append(gpu_model.generate(ids, max_new_tokens=50, do_sample=True, top_k=50, top_p=0.9, repetition_penalty=1.1))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.gpu
def test_moving_a_model_frees_its_steps(gpu_model):
    model = copy.deepcopy(gpu_model)
    model.fast_generation = True
    ids = torch.randint(1, 512, (2, 10)).cuda()
    tokens = model.generate(ids, max_new_tokens=20, do_sample=False)
    model.to("cpu").to("cuda")
    assert model not in fast_generation._steps
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), tokens)
