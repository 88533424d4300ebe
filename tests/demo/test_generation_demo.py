"""The text generation demo: the page's endpoint as a client sees it, the generator behind it, the command, the Space's files."""

import asyncio
import importlib.util
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import geobased
from geobased.cli.errors import CommandError
from geobased.cli.main import app
from geobased.demo import generation
from geobased.demo.serving import launch, on_gpu

gradio_client = pytest.importorskip("gradio_client")

ROOT = Path(__file__).resolve().parent.parent.parent
SPACE = ROOT / "spaces" / "generation"
DEFAULT_PROMPT = generation.EXAMPLES["One fact"]
# https://huggingface.co/docs/hub/spaces-config-reference
SPACE_KEYS = {
    *("title", "emoji", "colorFrom", "colorTo", "short_description", "license", "tags", "thumbnail", "pinned", "header"),
    *("sdk", "sdk_version", "python_version", "app_file", "app_port", "base_path", "fullWidth", "disable_embedding"),
    *("suggested_hardware", "suggested_storage", "models", "datasets", "preload_from_hub", "startup_duration_timeout"),
    *("hf_oauth", "hf_oauth_scopes", "hf_oauth_expiration_minutes", "custom_headers"),
}
SPACE_COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address():
    page = generation.build_demo()
    yield launch(page, free_port())
    page.close(verbose=False)


@pytest.fixture(scope="module")
def client(address):
    return gradio_client.Client(address, verbose=False)


@pytest.fixture
def generator(tiny_model_dir):
    return generation.Generator.load(str(tiny_model_dir))


def greedy(folder: str, prompt: str, max_new_tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_endpoint_gives_what_generate_gives(client):
    text, table = client.predict(DEFAULT_PROMPT, max_new_tokens=12, api_name="/generate")
    assert text == greedy(geobased.checkpoint_path(), DEFAULT_PROMPT, 12)
    assert text.startswith(" 94,393\n")
    assert "39 tokens | 27 of the prompt, 12 new" in table
    assert re.search(r"[\d,]+ tokens/s \| measured", table)
    assert "609.9 kB | from the configuration; the same at any length" in table
    # 39 tokens x 8 layers x keys and values of width 256 x 4 bytes
    assert "639.0 kB | computed, not run" in table


def test_text_grows_while_it_streams(client):
    job = client.submit("Fellow citizens,", max_new_tokens=200, api_name="/generate")
    job.result()
    texts = [text for text, _ in job.outputs()]
    assert len(set(texts)) > 2
    assert all(after.startswith(before) for before, after in zip(texts, texts[1:], strict=False))


def test_a_seed_repeats_a_text(client):
    settings = {"max_new_tokens": 20, "temperature": 1.0, "api_name": "/generate"}
    first, table = client.predict("The city", seed=3, **settings)
    assert "| Seed | 3 |" in table
    assert client.predict("The city", seed=3, **settings)[0] == first
    assert client.predict("The city", seed=4, **settings)[0] != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": " \n"}, "The prompt is empty"),
        ({"prompt": "word " * 3000}, "The prompt is too long: it has .* tokens, and the model was made for 1,024"),
        ({"prompt": "A", "max_new_tokens": 10**9}, "greater than maximum value 512"),
        ({"prompt": "A", "temperature": -1}, "less than minimum value 0"),
        ({"prompt": "A", "temperature": 1, "seed": -1}, "less than minimum value 0"),
    ],
)
def test_errors_are_messages(client, arguments, message):
    with pytest.raises(gradio_client.exceptions.AppError, match=message):
        client.predict(**arguments, api_name="/generate")


def test_three_named_endpoints_are_public(client):
    api = client.view_api(return_format="dict", print_info=False)
    assert api["unnamed_endpoints"] == {}
    names = {
        endpoint: [parameter["parameter_name"] for parameter in description["parameters"]]
        for endpoint, description in api["named_endpoints"].items()
    }
    assert names == {
        "/generate": ["prompt", "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed"],
        "/compare": ["prompt", "context_tokens", "max_new_tokens"],
        "/answer": ["document", "question", "distances"],
    }
    assert all(endpoint["description"] for endpoint in api["named_endpoints"].values())


def test_cancelled_job_stops_generating(client):
    def workers() -> int:
        return sum("(work)" in thread.name for thread in threading.enumerate())

    job = client.submit("Fellow citizens,", max_new_tokens=512, api_name="/generate")
    while not job.outputs():
        time.sleep(0.01)
    assert workers() == 1
    job.cancel()
    deadline = time.monotonic() + 10
    while workers() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert workers() == 0
    assert client.predict("A", max_new_tokens=2, api_name="/generate")[0]


def test_notes_on_the_examples_are_true():
    folder = geobased.checkpoint_path()
    tokens = generation.Settings().max_new_tokens
    assert greedy(folder, generation.EXAMPLES["One fact"], tokens).startswith(" 94,393\n")
    assert greedy(folder, generation.EXAMPLES["Two facts"], tokens).startswith(" hot desert\n")
    assert not greedy(folder, generation.EXAMPLES["Three records"], tokens).startswith(" 9,314,685")
    assert "| answers recalled exactly, % | 28.6" in (Path(folder) / "README.md").read_text(encoding="utf-8")


def test_closing_the_stream_ends_the_work(generator):
    stream = generator.stream("the river", replace(generation.Settings(), max_new_tokens=100_000, temperature=1.0, seed=0))
    assert next(stream).new_tokens > 0
    stream.close()
    assert generator.idle(timeout=10)


def test_errors_of_the_model_are_raised(generator, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no room")

    monkeypatch.setattr(generator.model, "generate", broken)
    with pytest.raises(RuntimeError, match="no room"):
        list(generator.stream("the river", generation.Settings()))


def test_state_does_not_grow_and_attention_does(generator):
    short, long = (list(generator.stream("the river " * n, generation.Settings(4)))[-1] for n in (1, 20))
    assert short.state_bytes == long.state_bytes == generator.model.state_size_bytes()
    assert "the same at any length" in generation.statistics(long)
    assert long.attention_bytes_per_token == 2 * 3 * 32 * 4  # keys and values, layers, width, float32


def test_other_models_are_refused(tmp_path, tiny_model_dir):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    with pytest.raises(CommandError, match="type llama: this demo runs BASED models only"):
        generation.build_demo(str(tmp_path))


def test_gpu_is_asked_for_where_spaces_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "spaces", None)
    assert on_gpu(len) is len
    module = type(sys)("spaces")
    monkeypatch.setitem(sys.modules, "spaces", module)
    assert on_gpu(len) is len  # a folder of that name
    module.GPU = lambda function: ("borrowed", function)
    assert on_gpu(len) == ("borrowed", len)


def test_command_serves_the_page(tiny_model_dir, tmp_path):
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "geobased.cli.main",
        "demo",
        "generation",
        "--model",
        str(tiny_model_dir),
        "--port",
        str(port),
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as process:
        try:
            assert process.stdout.readline().strip() == f"http://127.0.0.1:{port}/"
            text, _ = gradio_client.Client(f"http://127.0.0.1:{port}/", verbose=False).predict(
                "the river", max_new_tokens=5, api_name="/generate"
            )
            assert text == greedy(str(tiny_model_dir), "the river", 5)
        finally:
            process.terminate()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "nowhere/to be found"], "error: there is no folder 'nowhere/to be found'"),
        (["--attention-model", "./nowhere"], "error: there is no folder './nowhere'"),
        (["--attention-model", "based-mini"], "error: based-mini is a BASED model: --attention-model takes another kind"),
        (["--port", "0"], "error: Invalid value for '--port'"),
    ],
)
def test_wrong_use_is_a_sentence(arguments, sentence):
    result = CliRunner().invoke(app, ["demo", "generation", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(sentence)


def test_taken_port_is_a_sentence(address, tiny_model_dir):
    port = address.strip("/").rpartition(":")[2]
    result = CliRunner().invoke(app, ["demo", "generation", "--model", str(tiny_model_dir), "--port", port])
    assert result.exit_code == 1
    assert f"error: port {port} is taken: choose another" in result.stderr


def test_without_gradio_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("geobased.demo.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["demo", "generation"])
    assert result.exit_code == 1
    assert result.stderr == 'error: this command needs gradio, which is not installed: pip install "geobased[demo]"\n'


def test_endpoints_are_tools_of_mcp(tiny_model_dir):
    pytest.importorskip("mcp")
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def asked(address: str) -> tuple[set[str], str]:
        async with streamablehttp_client(f"{address}gradio_api/mcp/") as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            tools = {tool.name for tool in (await session.list_tools()).tools}
            question = {"document": "the river runs", "question": "what runs?", "distances": False}
            return tools, (await session.call_tool("answer", question)).content[0].text

    page = generation.build_demo(str(tiny_model_dir))
    try:
        tools, text = asyncio.run(asked(launch(page, free_port(), mcp=True)))
    finally:
        page.close(verbose=False)
    assert tools == {"generate", "compare", "answer"} and "filler_tokens" in text


def test_mcp_without_its_extra_is_a_sentence(tiny_model_dir, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "mcp" else find_spec(name, *rest))
    result = CliRunner().invoke(app, ["demo", "generation", "--model", str(tiny_model_dir), "--mcp"])
    assert result.exit_code == 1
    assert result.stderr == 'error: --mcp needs mcp, which is not installed: pip install "geobased[demo,mcp]"\n'


def test_nothing_is_lost_with_64_clients_at_once(client):
    settings, reference = generation.Settings(max_new_tokens=3), generation.Generator.load("based-mini")
    prompts = [f"The population of Lund is {10 + i},000. Question: What is the population of Lund? Answer:" for i in range(64)]
    with ThreadPoolExecutor(64) as pool:
        jobs = [pool.submit(client.predict, prompt, max_new_tokens=3, api_name="/generate") for prompt in prompts]
        answers = [job.result(timeout=120)[0] for job in jobs]
    assert answers == [list(reference.stream(prompt, settings))[-1].text for prompt in prompts]
    assert len(set(answers)) > 1


def test_header_of_the_space_is_valid():
    _, header, text = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(header)
    assert set(card) <= SPACE_KEYS
    assert card["sdk"] == "gradio" and (SPACE / card["app_file"]).is_file()
    assert {card["colorFrom"], card["colorTo"]} <= SPACE_COLOURS
    assert len(card["short_description"]) <= 60
    assert int(card["sdk_version"].partition(".")[0]) >= 6
    assert generation.MODEL_VARIABLE in text


def test_space_needs_geobased_alone_and_starts_its_page():
    assert (SPACE / "requirements.txt").read_text(encoding="utf-8").split() == ["geobased[demo]"]
    assert "from geobased.demo.generation import main" in (SPACE / "app.py").read_text(encoding="utf-8")
