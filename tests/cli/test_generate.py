"""`geobased generate`: the text is that of `model.generate`, streamed or as JSON."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import geobased as package
from geobased.cli.generate import _times, format_bytes
from geobased.cli.streaming import TimedTextStreamer

PROMPT = "the river runs"


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def expected_text(model, tokenizer, prompt: str, **settings) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_json_is_greedy_generate(geobased, tiny_model_dir, model, tokenizer):
    result = geobased("generate", PROMPT, "--model", tiny_model_dir, "--max-new-tokens", 40, "--json")
    assert result.exit_code == 0 and result.stderr == ""
    report = json.loads(result.stdout)
    assert report["completion"] == expected_text(model, tokenizer, PROMPT, max_new_tokens=40, do_sample=False)
    assert report["text"] == PROMPT + report["completion"]
    assert report["prompt"] == PROMPT and report["model"] == str(tiny_model_dir)
    assert report["prompt_tokens"] == len(tokenizer(PROMPT)["input_ids"])
    assert report["finish_reason"] == ("length" if report["new_tokens"] == 40 else "stop")
    assert report["tokens_per_second"] > 0 and report["seconds"] >= report["prefill_seconds"] > 0
    assert report["state_bytes"] == model.state_size_bytes()
    assert (report["device"], report["dtype"], report["seed"]) == ("cpu", "float32", None)
    assert report["versions"]["geobased"] == package.__version__


def test_stream_and_statistics(geobased, tiny_model_dir, model, tokenizer):
    result = geobased("generate", PROMPT, "-m", tiny_model_dir, "-n", 25)
    assert result.exit_code == 0
    assert result.stdout == PROMPT + expected_text(model, tokenizer, PROMPT, max_new_tokens=25, do_sample=False) + "\n"
    speed, state = result.stderr.strip().splitlines()
    assert "25 new tokens, " in speed and "tokens/s on cpu in float32" in speed
    assert state == f"state: {format_bytes(model.state_size_bytes())} per sequence, whatever its length"


def test_one_token(geobased, tiny_model_dir):
    result = geobased("generate", PROMPT, "-m", tiny_model_dir, "-n", 1, "--json")
    report = json.loads(result.stdout)
    assert report["new_tokens"] == 1 and report["tokens_per_second"] > 0


def test_sampling_repeats_with_its_seed(geobased, tiny_model_dir):
    def sample(*arguments):
        result = geobased("generate", PROMPT, "-m", tiny_model_dir, "-n", 30, "--json", *arguments)
        return json.loads(result.stdout)

    first = sample("--do-sample", "--temperature", 1.5, "--top-k", 50, "--top-p", 0.9, "--repetition-penalty", 1.1)
    again = sample("--seed", first["seed"], "--temperature", 1.5, "--top-k", 50, "--top-p", 0.9, "--repetition-penalty", 1.1)
    other = sample("--seed", first["seed"] + 1, "--temperature", 1.5)
    assert first["completion"] == again["completion"] != other["completion"]


def test_prompt_from_standard_input(geobased, tiny_model_dir):
    result = geobased("generate", "-", "-m", tiny_model_dir, "-n", 3, "--json", stdin="the town\nat\n")
    assert json.loads(result.stdout)["prompt"] == "the town\nat"


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtype(geobased, tiny_model_dir, dtype):
    result = geobased("generate", PROMPT, "-m", tiny_model_dir, "-n", 3, "--dtype", dtype, "--json")
    assert json.loads(result.stdout)["dtype"] == dtype


def test_half_precision_checkpoint_runs_in_float32_on_the_cpu(geobased, tiny_copy, model):
    model.to(torch.bfloat16).save_pretrained(tiny_copy)
    model.to(torch.float32)
    result = geobased("generate", PROMPT, "-m", tiny_copy, "-n", 3, "--json")
    assert json.loads(result.stdout)["dtype"] == "float32"


def test_model_of_another_architecture(geobased, tiny_copy, tokenizer):
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, eos_token_id=None
    )
    LlamaForCausalLM(config).save_pretrained(tiny_copy)
    result = geobased("generate", PROMPT, "-m", tiny_copy, "-n", 10, "--json")
    report = json.loads(result.stdout)
    # the last token is not in the cache: nothing follows it
    tokens = report["prompt_tokens"] + report["new_tokens"] - 1
    assert report["state_bytes"] == 2 * 2 * tokens * 32 * 4
    statistics = geobased("generate", PROMPT, "-m", tiny_copy, "-n", 10).stderr
    assert "cache: " in statistics and "state: " not in statistics


def test_interrupting_keeps_the_text(geobased, tiny_model_dir, monkeypatch):
    count, put = 0, TimedTextStreamer.put

    def interrupted_put(self, value):
        nonlocal count
        count += 1
        put(self, value)
        if count == 6:  # the prompt and five tokens
            raise KeyboardInterrupt

    monkeypatch.setattr(TimedTextStreamer, "put", interrupted_put)
    result = geobased("generate", PROMPT, "-m", tiny_model_dir)
    assert result.exit_code == 130
    assert result.stdout.startswith(PROMPT)
    assert "5 new tokens until interrupted" in result.stderr and "state: " in result.stderr


def test_interrupting_the_prompt(tokenizer):
    streamer = TimedTextStreamer(tokenizer, print)
    streamer.end()
    assert _times(streamer, 0.0) == {"tokens_per_second": 0.0, "seconds": 0.0, "prefill_seconds": 0.0}


@pytest.mark.parametrize("text", ["the town", "déjà vu — 東京 🌍 done", "\n\n  spaces  \n"])
def test_streamer_gives_whole_characters(tokenizer, text):
    pieces: list[str] = []
    streamer = TimedTextStreamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([tokenizer("é")["input_ids"]]))
    for token in tokenizer(text)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    streamer.end()
    assert "".join(pieces) == streamer.text == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_streamer_ends_with_half_a_character(tokenizer):
    half = tokenizer("東")["input_ids"][:-1]
    streamer = TimedTextStreamer(tokenizer, lambda piece: None)
    streamer.put(torch.tensor([tokenizer("a")["input_ids"]]))
    for token in half:
        streamer.put(torch.tensor([token]))
    assert streamer.text == ""
    streamer.end()
    assert streamer.text == tokenizer.decode(half) != ""


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1_234_567, "1.2 MB"), (2_000, "2.0 kB"), (7_500_000_000, "7.5 GB")]
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text
