"""generate(): every decoding method, padding, caches, streaming, the pipeline, and padded vocabulary ids."""

import threading

import pytest
import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LogitsProcessor, StaticCache, TextIteratorStreamer, pipeline

from geobased import BasedCache

METHODS = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled_beams": {"do_sample": True, "num_beams": 3},
}


@pytest.fixture(params=METHODS)
def method(request) -> dict:
    return METHODS[request.param]


def generate(model, *args, seed: int = 0, **kwargs):
    torch.manual_seed(seed)
    return model.generate(*args, **({"max_new_tokens": 20, "min_new_tokens": kwargs.get("max_new_tokens", 20)} | kwargs))


# decoding


@pytest.mark.parametrize("prompt", [1, 5, 8, 30])
def test_greedy_is_the_argmax_of_the_parallel_forward(make_model, make_ids, prompt):
    model, ids = make_model(), make_ids(2, prompt)
    output = generate(model, ids)
    for _ in range(20):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert output.tolist() == ids.tolist()


@pytest.mark.parametrize("prompt", [2, 15])
def test_cache_changes_nothing(make_model, make_ids, assert_near, method, prompt):
    model, ids = make_model(), make_ids(3, prompt)
    scores = {"output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (generate(model, ids, use_cache=use, **method, **scores) for use in (True, False))
    assert cached.sequences.tolist() == uncached.sequences.tolist()
    assert_near(torch.stack(cached.logits), torch.stack(uncached.logits), tolerance=1e-4, name="logits")
    assert isinstance(cached.past_key_values, BasedCache)
    assert cached.past_key_values.get_seq_length() == prompt + 19
    assert uncached.past_key_values is None


def test_many_returned_sequences(make_model, make_ids):
    model, ids = make_model(), make_ids(2, 6)
    assert generate(model, ids, do_sample=True, num_return_sequences=3).shape == (6, 26)
    assert generate(model, ids, num_beams=4, num_return_sequences=4, do_sample=False).shape == (8, 26)


@pytest.mark.parametrize("side", ["left", "left_odd"])
def test_left_padded_batches_equal_rows_alone(make_model, make_ids, assert_near, side):
    model = make_model(pad_token_id=0)
    lengths = (14, 3, 9, 1) if side == "left" else (33, 32, 7)
    rows = [make_ids(1, n, seed=n) for n in lengths]
    ids = torch.cat([F.pad(row, (max(lengths) - row.shape[1], 0)) for row in rows])
    mask = (ids != 0).long()
    outputs = generate(model, ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True)
    beams = generate(model, ids, attention_mask=mask, num_beams=3, do_sample=False)
    for i, row in enumerate(rows):
        alone = generate(model, row, return_dict_in_generate=True, output_logits=True)
        new = max(lengths)
        assert outputs.sequences[i, new:].tolist() == alone.sequences[0, row.shape[1] :].tolist()
        assert_near(torch.stack(outputs.logits)[:, i], torch.stack(alone.logits)[:, 0], tolerance=1e-4, name=f"logits of row {i}")
        alone_beams = generate(model, row, num_beams=3, do_sample=False)
        assert beams[i, new:].tolist() == alone_beams[0, row.shape[1] :].tolist(), f"beams of row {i} change with padding"


@pytest.mark.parametrize("first", [1, 4, 15])
def test_continuing_from_a_returned_cache(make_model, make_ids, first):
    model, ids = make_model(), make_ids(2, 6)
    whole = generate(model, ids, max_new_tokens=16)
    begun = generate(model, ids, max_new_tokens=first, return_dict_in_generate=True)
    rest = generate(model, begun.sequences, past_key_values=begun.past_key_values, max_new_tokens=16 - first)
    assert rest.tolist() == whole.tolist()


def test_a_conversation_over_one_cache(make_model, make_ids):
    model, first, second = make_model(), make_ids(1, 11), make_ids(1, 7, seed=4)
    answer = generate(model, first, max_new_tokens=5, return_dict_in_generate=True)
    longer = torch.cat([answer.sequences, second], 1)
    with_cache = generate(model, longer, past_key_values=answer.past_key_values, max_new_tokens=9)
    assert with_cache.tolist() == generate(model, longer, max_new_tokens=9).tolist()


@pytest.mark.parametrize("chunk", [1, 3, 8, 13])
def test_chunked_prefill(make_model, make_ids, chunk):
    model = make_model(pad_token_id=0)
    ids = make_ids(2, 21)
    ids[1, :16] = 0
    arguments = {"attention_mask": (ids != 0).long()}
    assert generate(model, ids, prefill_chunk_size=chunk, **arguments).tolist() == generate(model, ids, **arguments).tolist()


def test_inputs_embeds(make_model, make_ids):
    model, ids = make_model(), make_ids(2, 9)
    embeds = model.get_input_embeddings()(ids)
    expected = generate(model, ids)
    assert generate(model, inputs_embeds=embeds).tolist() == expected[:, 9:].tolist()
    assert generate(model, ids, inputs_embeds=embeds).tolist() == expected.tolist()


@pytest.mark.parametrize("beams", [1, 3])
def test_static_cache(make_model, make_ids, beams):
    model = make_model(pad_token_id=0)
    ids = make_ids(2, 12)
    ids[1, :5] = 0
    arguments = {"attention_mask": (ids != 0).long(), "num_beams": beams, "do_sample": False}
    static = generate(model, ids, cache_implementation="static", return_dict_in_generate=True, **arguments)
    assert isinstance(static.past_key_values, StaticCache)
    assert static.sequences.tolist() == generate(model, ids, **arguments).tolist()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_all_outputs(make_model, make_ids, implementation):
    model, ids = make_model(attn_implementation=implementation), make_ids(2, 5)
    outputs = generate(
        model,
        ids,
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_scores=True,
        output_hidden_states=True,
        output_attentions=implementation == "eager",
    )
    assert len(outputs.scores) == len(outputs.hidden_states) == 6
    assert [tuple(h.shape) for h in outputs.hidden_states[0]] == [(2, 5, 32)] * 4
    assert [tuple(h.shape) for h in outputs.hidden_states[3]] == [(2, 1, 32)] * 4
    if implementation == "eager":
        assert [tuple(a[0].shape) for a in outputs.attentions] == [(2, 2, 5, 5)] + [(2, 2, 1, n) for n in (6, 7, 8, 8, 8)]


def test_position_ids_may_be_given(make_model, make_ids):
    model, ids = make_model(), make_ids(2, 9)
    positions = torch.arange(9).expand(2, 9)
    assert generate(model, ids, position_ids=positions).tolist() == generate(model, ids).tolist()


def test_stopping_early_in_one_row_leaves_the_others_alone(make_model, make_ids):
    model, ids = make_model(pad_token_id=0), make_ids(3, 6)
    free = generate(model, ids)
    stop = free[1, 8].item()
    stopped = model.generate(ids, max_new_tokens=20, eos_token_id=stop, do_sample=False)
    for row in range(3):
        new = free[row, 6:].tolist()
        expected = new[: new.index(stop) + 1] if stop in new else new
        assert stopped[row, 6 : 6 + len(expected)].tolist() == expected
        assert set(stopped[row, 6 + len(expected) :].tolist()) <= {0}


# padded vocabulary ids


def prefer_padding_ids(model) -> None:
    """Makes the logits of ids 55 to 60 the largest of all."""
    bonus = torch.zeros(61).index_fill(0, torch.arange(55, 61), 100.0)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bonus)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
def test_padded_ids_are_never_picked(make_model, make_ids, method, use_cache):
    model, unprotected = make_model(unpadded_vocab_size=55), make_model()
    for each in (model, unprotected):
        prefer_padding_ids(each)
    ids = make_ids(3, 4, vocab_size=55)
    assert generate(unprotected, ids, do_sample=False)[:, 4:].min() >= 55, "the test does not test: other logits are larger"
    output = generate(model, ids, use_cache=use_cache, max_new_tokens=30, **method)
    assert output.max() < 55
    with_own_suppression = generate(model, ids, suppress_tokens=[1, 2, 3], max_new_tokens=30, **method)
    assert not set(with_own_suppression[:, 4:].flatten().tolist()) & {1, 2, 3, *range(55, 61)}
    with_config = generate(model, ids, generation_config=GenerationConfig(**method), max_new_tokens=30)
    assert with_config.max() < 55
    assert model.generation_config.suppress_tokens is None, "the model's own generation config must not change"


# streaming and the pipeline


def test_streaming(make_model, word_tokenizer):
    model = make_model(pad_token_id=0)
    inputs = word_tokenizer("w1 w2 w3", return_tensors="pt", return_token_type_ids=False)
    streamer = TextIteratorStreamer(word_tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=generate, args=(model,), kwargs={**inputs, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    expected = word_tokenizer.decode(generate(model, **inputs)[0, 3:])
    assert "".join(pieces).split() == expected.split()
    assert len(pieces) > 5, "the text came all at once"


def test_text_generation_pipeline(make_model, word_tokenizer):
    model = make_model(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    generator = pipeline("text-generation", model=model, tokenizer=word_tokenizer)
    arguments = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    prompts = ["w1 w2 w3 w4 w5 w6 w7 w8 w9 w10", "w5", "w7 w8 w3"]
    alone = [generator(prompt, **arguments)[0]["generated_text"] for prompt in prompts]
    assert all(text.startswith(prompt) for text, prompt in zip(alone, prompts, strict=True))
    batched = [result[0]["generated_text"] for result in generator(prompts, batch_size=3, **arguments)]
    assert batched == alone
    new_text = generator(prompts[0], return_full_text=False, **arguments)[0]["generated_text"]
    assert (prompts[0] + new_text).split() == alone[0].split()


# what cannot work, and bad input


@pytest.mark.parametrize("arguments", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": None}], ids=lambda a: next(iter(a)))
def test_assisted_decoding_raises(make_model, make_ids, arguments):
    model = make_model()
    if "assistant_model" in arguments:
        arguments = {"assistant_model": make_model()}
    with pytest.raises(ValueError, match="stateful"):
        generate(model, make_ids(1, 6), **arguments)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (torch.tensor([[3, 61]]), "61, which is outside the vocabulary"),
        (torch.tensor([[-5, 3]]), "-5, which is outside the vocabulary"),
        (torch.empty(1, 0, dtype=torch.long), "prompt is empty"),
        (torch.tensor([[0.5]]), "torch.float32"),
    ],
    ids=["too_large", "negative", "empty", "float"],
)
def test_bad_prompts_are_named(make_model, prompt, message):
    for arguments in ((prompt,), ()):
        with pytest.raises(ValueError, match=message):
            generate(make_model(), *arguments, **({} if arguments else {"input_ids": prompt}))


def test_cache_of_another_batch_size_is_named(make_model, make_ids):
    model = make_model()
    cache = generate(model, make_ids(2, 6), return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match="batch of 2 sequences but the input has 3"):
        generate(model, make_ids(3, 30), past_key_values=cache)


def test_custom_logits_processors_are_served(make_model, make_ids):
    class OnlySeven(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

    assert set(generate(make_model(), make_ids(1, 4), logits_processor=[OnlySeven()])[0, 4:].tolist()) == {7}
