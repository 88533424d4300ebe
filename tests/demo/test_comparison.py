"""BASED beside attention: what is measured, filler, the untrained and a given attention model, the view and its charts."""

import itertools
import json
import re
import threading
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from geobased.cli.errors import CommandError

pytest.importorskip("gradio_client")

from geobased.demo.comparison import (
    MAX_CONTEXT_TOKENS,
    MAX_WRITTEN_TOKENS,
    READ_AT_ONCE,
    ComparedModel,
    Comparison,
    cache_bytes,
)
from geobased.demo.comparison_view import UNTRAINED, comparison_view
from geobased.demo.filler import filler_text
from geobased.demo.text_generator import Generator
from geobased.line_chart import Line, line_chart, ticks

PROMPT = "The population of Lund is 94,393. Question: What is the population of Lund? Answer:"


@pytest.fixture(scope="module")
def mini() -> ComparedModel:
    generator = Generator.load("based-mini")
    return ComparedModel("based-mini", generator.model, generator.tokenizer)


@pytest.fixture(scope="module")
def comparison(mini) -> Comparison:
    return Comparison(mini)


def last(comparison: Comparison, *arguments):
    return list(comparison.stream(*arguments))[-1]


def test_untrained_model_has_equal_size(comparison):
    based, attention = comparison.based.model, comparison.attention.model
    assert attention.num_parameters() == pytest.approx(based.num_parameters(), rel=0.01)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert getattr(attention.config, name) == getattr(based.config, name)
    assert attention.dtype == based.dtype and not attention.training


def test_sizes_are_those_of_the_caches(comparison):
    based, attention = last(comparison, PROMPT, 700, 3)
    # 700 tokens and the first two written ones, x 8 layers x keys and values of width 256 x 4 bytes
    assert attention.cache_bytes == 702 * 8 * 2 * 256 * 4
    assert based.cache_bytes == comparison.based.model.state_size_bytes()
    assert [tokens for tokens, _ in attention.memory] == [READ_AT_ONCE, 700, 701, 702]
    assert len({size for _, size in based.memory}) == 1
    for model in (based, attention):
        assert (model.prompt_tokens, model.read_tokens, model.new_tokens) == (700, 700, 3)
        assert model.seconds_to_first_token > 0 and model.tokens_per_second > 0
        assert [number for number, _ in model.speeds] == [2, 3]


def test_pieces_and_turns_write_what_generate_writes(comparison):
    based, attention = last(comparison, PROMPT, 0, 12)
    ids = comparison.based.encode(PROMPT, 0)
    output = comparison.based.model.generate(ids, max_new_tokens=12, do_sample=False)
    assert based.text == comparison.based.tokenizer.decode(output[0, ids.shape[1] :])
    assert based.text.startswith(" 94,393") and based.trained
    assert attention.text is None and not attention.trained


def test_both_get_on_and_the_caller_can_stop(comparison):
    stream = comparison.stream(PROMPT, 2048, 64)
    measured = list(itertools.islice(stream, 4))
    stream.close()
    assert all(model.read_tokens > 0 for model in measured[-1])
    assert any(model.new_tokens < 64 for model in measured[-1])
    assert comparison.lock.acquire(timeout=1)
    comparison.lock.release()


def test_filler_comes_before_the_prompt_and_knows_nothing_of_it(mini):
    ids = mini.encode(PROMPT, 300)
    own = mini.encode(PROMPT, 0)
    assert ids.shape == (1, 300) and own.shape[1] < 60
    assert mini.tokenizer.decode(ids[0]).endswith(PROMPT)
    assert mini.encode(PROMPT, 5).equal(own)
    named = re.search(r"of (.+?) is", filler_text(mini.tokenizer, 1)).group(1)
    assert f" {named} is" not in filler_text(mini.tokenizer, 500, beside=f"I live in {named}.")
    assert filler_text(mini.tokenizer, 0) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((" \n", 0, 4), "The prompt is empty"),
        ((PROMPT, MAX_CONTEXT_TOKENS + 1, 4), "A context of 16,385 tokens is out of range: choose 0 to 16,384"),
        ((PROMPT, 0, MAX_WRITTEN_TOKENS + 1), "257 new tokens are out of range"),
        (("word " * 20_000, 0, 4), "The prompt is too long: it has .* tokens for based-mini, and at most 16,384"),
    ],
)
def test_wrong_input_is_a_message(comparison, arguments, message):
    with pytest.raises(CommandError, match=message):
        next(comparison.stream(*arguments))


def test_a_given_model_shows_its_text_within_its_positions(mini, tmp_path, tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_WRITTEN_TOKENS + 100,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    given = Comparison(mini, str(tmp_path), threading.Lock())
    assert given.max_context_tokens == 100
    _, attention = last(given, "the river", 90, 4)
    assert attention.trained and attention.text is not None
    # one of two heads keeps keys and values of width 8
    assert attention.cache_bytes == 93 * 2 * 2 * 8 * 4
    with pytest.raises(CommandError, match="choose 0 to 100"):
        next(given.stream("the river", 200, 4))


def test_a_model_without_a_cache_of_keys_is_refused(mini, tmp_path, tiny_model_dir):
    MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, state_size=4, num_hidden_layers=1)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    with pytest.raises(CommandError, match="keeps no cache of transformers' kind"):
        Comparison(mini, str(tmp_path))


def test_cache_bytes_counts_what_a_cache_holds():
    cache = DynamicCache()
    assert cache_bytes(cache) == 0
    cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 0)
    assert cache_bytes(cache) == 2 * 2 * 5 * 4 * 4


def test_view_says_what_was_measured_and_what_is_not_claimed(comparison):
    based, attention = last(comparison, PROMPT, 1500, 8)
    view = comparison_view(based, replace(attention, name="<b>"), 8, 1024)
    ElementTree.fromstring(view.replace("<br>", "<br/>"))
    assert "&lt;b&gt;" in view and "<b>" not in view
    assert "At 1,508 tokens" in view and UNTRAINED in view and "609.9 kB" in view
    assert "the quality of its text there is not claimed" in view
    assert "not claimed" not in comparison_view(*last(comparison, PROMPT, 0, 4), 4, 1024)
    slower = comparison_view(replace(based, tokens_per_second=100.0), replace(attention, tokens_per_second=8.0), 8, 1024)
    assert "At 1,508 tokens Llama keeps 40 times the memory of based-mini, and based-mini writes 12 times as fast as" in slower
    faster = comparison_view(replace(based, tokens_per_second=100.0), replace(attention, tokens_per_second=150.0), 8, 1024)
    assert "and Llama writes 1.5 times as fast as based-mini" in faster
    assert view.count("<svg") == 2 and "http" not in view


def test_ticks_are_round_and_few():
    assert ticks(0) == [0, 1]
    assert ticks(4.2) == [0, 1, 2, 3, 4, 5]
    assert ticks(68e6) == [0, 20e6, 40e6, 60e6, 80e6]
    for largest in (1e-3, 7, 999, 16_640, 3e9):
        assert ticks(largest)[-1] >= largest and 3 <= len(ticks(largest)) <= 6


def test_chart_holds_its_lines_and_tells_them_in_words():
    chart = line_chart("Speed", [Line("a & b", "x", [(0, 1), (10, 2)]), Line("none", "y", [])], "tokens", 10, str, "it grows")
    root = ElementTree.fromstring(chart.replace("<br>", "<br/>"))
    assert len(root.findall(".//polyline")) == 1 and root.find("svg").get("aria-label") == "it grows"
    numbers = [float(number) for number in re.findall(r"[\d.]+", root.find(".//polyline").get("points"))]
    assert max(numbers) <= 340 and min(numbers) >= 0


def test_endpoint_reports_numbers_as_json(comparison):
    gradio_client = pytest.importorskip("gradio_client")
    from geobased.demo import generation
    from geobased.demo.serving import launch

    page = generation.build_demo()
    try:
        client = gradio_client.Client(launch(page), verbose=False)
        view, report = client.predict(PROMPT, context_tokens=600, max_new_tokens=3, api_name="/compare")
        assert "At 603 tokens Llama keeps" in view
        assert json.loads(json.dumps(report))["attention"]["cache_bytes"] == 602 * 8 * 2 * 256 * 4
        assert report["based"]["trained"] and report["attention"]["text"] is None
        with pytest.raises(gradio_client.exceptions.AppError, match="The prompt is empty"):
            client.predict(" ", context_tokens=0, max_new_tokens=3, api_name="/compare")
    finally:
        page.close(verbose=False)
