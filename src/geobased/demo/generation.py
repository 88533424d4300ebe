"""A page on which a BASED model continues text, beside what its state costs.

from geobased.demo.generation import main

main()
"""

import os
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers

import geobased
from geobased.cli.errors import CommandError, explain
from geobased.cli.generate import format_bytes
from geobased.cli.sources import (
    DEFAULT_MODEL,
    load_model,
    load_tokenizer,
    parse_device,
    quiet_transformers,
    resolve_model,
)
from geobased.cli.streaming import TimedTextStreamer

from .serving import gr, on_gpu, serve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_VARIABLE = "GEOBASED_DEMO_MODEL"
UPDATE_SECONDS = 0.05
MAX_NEW_TOKENS, MAX_SEED = 512, 2**31 - 1
RECORDS = (
    "Name: Guangzhou\nPopulation: 16,096,724\nClimate: dry-winter subtropical\nRegion: Guangdong\n\n"
    "Name: Nanjing\nPopulation: 9,314,685\nClimate: humid subtropical\nRegion: Jiangsu Sheng\n\n"
    "Name: Jeddah\nPopulation: 4,697,000\nClimate: hot desert\nRegion: Makkah\n\n"
)
EXAMPLES = {
    "One fact": "The population of Lund is 94,393. Question: What is the population of Lund? Answer:",
    "Two facts": (
        "The climate of Jeddah is hot desert. The climate of Nanjing is humid subtropical."
        " Question: What is the climate of Jeddah? Answer:"
    ),
    "Three records": RECORDS + "Question: What is the population of Nanjing? Answer:",
    "Free text": "Fellow citizens, the Congress of the United States",
}
SHIPPED_MODEL_NOTE = (
    "This small model was trained to recall what stands in its context, and is often wrong: it recalls 29 % of the facts in the"
    " test of its model card. With the default settings it answers the first two examples rightly and the third wrongly. It goes"
    " on writing after an answer, knows no geography, and writes poor free text."
)


@dataclass(frozen=True)
class Settings:
    """How to generate. Temperature 0 takes the likeliest token; top-k 0 and top-p 1 draw from all; no seed means a new one."""

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Progress:
    """The continuation so far, and what was measured or computed about it.

    Attributes:
        text: the continuation.
        prompt_tokens, new_tokens: lengths.
        tokens_per_second: tokens after the first over the time since the first; None until there are two.
        state_bytes: what this model keeps of the sequence, whatever its length.
        attention_bytes_per_token: what attention of equal width and depth would keep of each token: computed, not run.
        seed: of drawing; None if greedy.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float | None
    state_bytes: int
    attention_bytes_per_token: int
    seed: int | None


@dataclass
class Generator:
    """A BASED model with its tokenizer, for one text at a time."""

    name: str
    model: geobased.BasedForCausalLM
    tokenizer: "PreTrainedTokenizerBase"
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def load(cls, name: str) -> "Generator":
        """The model of that name: a folder, a checkpoint that ships with geobased, or a Hub id."""
        source = resolve_model(name)
        tokenizer = load_tokenizer(name, source)
        model = load_model(name, source, "auto", parse_device("auto"))
        if not isinstance(model, geobased.BasedForCausalLM):
            raise CommandError(f"{name} is of type {model.config.model_type}: this demo runs BASED models only")
        return cls(name, model, tokenizer)

    @property
    def max_prompt_tokens(self) -> int:
        """The length of context that the model was made for."""
        return self.model.config.max_position_embeddings

    @property
    def attention_bytes_per_token(self) -> int:
        """Keys and values of one token in a transformer of the same width, depth and dtype, with as many key as query heads."""
        config = self.model.config
        return 2 * config.num_hidden_layers * config.hidden_size * self.model.dtype.itemsize

    def encode(self, prompt: str) -> torch.Tensor:
        """Token ids [1, seq_len]; `CommandError` if there are none or too many."""
        if not prompt.strip():
            raise CommandError("The prompt is empty: write some text first.")
        ids = self.tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"].long()
        if ids.shape[1] > self.max_prompt_tokens:
            raise CommandError(
                f"The prompt is too long: it has {ids.shape[1]:,} tokens, and the model was made for {self.max_prompt_tokens:,}."
            )
        return ids.to(self.model.device)

    def idle(self, timeout: float = 0) -> bool:
        """Whether nothing is being generated, or stops being within `timeout` seconds."""
        if free := self._one_at_a_time.acquire(timeout=timeout):
            self._one_at_a_time.release()
        return free

    def stream(self, prompt: str, settings: Settings) -> Iterator[Progress]:
        """The continuation as it grows. Closing the iterator ends the generation; its errors are raised here."""
        ids = self.encode(prompt)
        seed = None
        if settings.temperature > 0:
            seed = secrets.randbelow(MAX_SEED + 1) if settings.seed is None else settings.seed
        streamer, stopped, errors = TimedTextStreamer(self.tokenizer, lambda piece: None), threading.Event(), []

        def work() -> None:
            try:
                with self._one_at_a_time, quiet_transformers():
                    if seed is not None:
                        transformers.set_seed(seed)
                    self.model.generate(ids, streamer=streamer, **self._arguments(ids, settings, stopped))
            except Exception as error:
                errors.append(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        shown = 0
        try:
            while worker.is_alive():
                worker.join(UPDATE_SECONDS)
                # the last state has its own place below, so that it is shown once and whole
                if worker.is_alive() and len(streamer.token_ids) > shown:
                    shown = len(streamer.token_ids)
                    yield self._progress(ids, streamer, seed)
            if errors:
                raise errors[0]
            yield self._progress(ids, streamer, seed)
        finally:
            stopped.set()

    def _arguments(self, ids: torch.Tensor, settings: Settings, stopped: threading.Event) -> dict[str, Any]:
        def stop(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), stopped.is_set(), device=input_ids.device)

        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        arguments = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": settings.max_new_tokens,
            "repetition_penalty": settings.repetition_penalty,
            "do_sample": settings.temperature > 0,
            "pad_token_id": pad,
            "stopping_criteria": transformers.StoppingCriteriaList([stop]),
        }
        if settings.temperature > 0:
            arguments |= {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
        return arguments

    def _progress(self, ids: torch.Tensor, streamer: TimedTextStreamer, seed: int | None) -> Progress:
        count, elapsed = len(streamer.token_ids), streamer.last_at - streamer.first_at
        return Progress(
            text=streamer.text,
            prompt_tokens=ids.shape[1],
            new_tokens=count,
            tokens_per_second=(count - 1) / elapsed if count > 1 and elapsed > 0 else None,
            state_bytes=self.model.state_size_bytes(),
            attention_bytes_per_token=self.attention_bytes_per_token,
            seed=seed,
        )


def statistics(progress: Progress) -> str:
    """A Markdown table of what was measured and computed."""
    length = progress.prompt_tokens + progress.new_tokens
    rate = "not known yet" if progress.tokens_per_second is None else f"{progress.tokens_per_second:,.0f} tokens/s"
    attention = format_bytes(progress.attention_bytes_per_token * length)
    equal = progress.state_bytes / progress.attention_bytes_per_token
    rows = [
        "| Quantity | Value | How it is known |\n|:---|---:|:---|",
        f"| Length | {length:,} tokens | {progress.prompt_tokens:,} of the prompt, {progress.new_tokens:,} new |",
        f"| Speed | {rate} | measured after the first token |",
        f"| State of this model | {format_bytes(progress.state_bytes)} | from the configuration; the same at any length |",
        f"| Attention's cache | {attention} | computed, not run: equal width, depth and dtype, this length |",
        f"| Both equal at | {equal:,.0f} tokens | computed; attention keeps less before, more after |",
    ]
    if progress.seed is not None:
        rows.append(f"| Seed | {progress.seed} | repeats this text, with the same settings |")
    return "\n".join(rows)


def build_demo(model_name: str = DEFAULT_MODEL) -> gr.Blocks:
    """The page, with the model loaded; `CommandError` tells why a model cannot be."""
    generator = Generator.load(model_name)
    config, dtype = generator.model.config, str(generator.model.dtype).removeprefix("torch.")

    @on_gpu
    def generate(
        prompt: str,
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        repetition_penalty: float,
        seed: int | None,
    ) -> Iterator[tuple[str, str]]:
        """Continue a prompt; yields the continuation so far and a table of statistics."""
        settings = Settings(int(max_new_tokens), temperature, int(top_k), top_p, repetition_penalty, seed)
        try:
            for progress in generator.stream(prompt, settings):
                yield progress.text, statistics(progress)
        except CommandError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            raise gr.Error(explain(error)[0]) from error

    defaults = Settings()
    with gr.Blocks(title="Text generation with BASED", analytics_enabled=False) as demo:
        gr.Markdown(
            "# Text generation with BASED\n"
            "BASED mixes gated convolutions, Taylor linear attention and sliding windows, so that generation keeps a state of"
            " constant size, however long the text gets.\n\n"
            f"Model: `{generator.name}`, {generator.model.num_parameters():,} parameters, {config.num_hidden_layers} layers,"
            f" width {config.hidden_size}, on {generator.model.device.type} in {dtype}."
        )
        if model_name == DEFAULT_MODEL:
            gr.Markdown(SHIPPED_MODEL_NOTE)
        prompt = gr.Textbox(EXAMPLES["One fact"], label="Prompt", info="Shift and Enter generate.", lines=4, max_lines=16)
        with gr.Row():
            start = gr.Button("Generate", variant="primary")
            stop = gr.Button("Stop")
        completion = gr.Textbox(label="Continuation", lines=6, max_lines=20, interactive=False)
        table = gr.Markdown(label="Statistics")
        with gr.Accordion("Settings", open=False):
            with gr.Row():
                max_new_tokens = gr.Slider(1, MAX_NEW_TOKENS, defaults.max_new_tokens, step=1, label="Most new tokens")
                temperature = gr.Slider(
                    0, 2, defaults.temperature, step=0.05, label="Temperature", info="0 takes the likeliest token."
                )
            with gr.Row():
                top_k = gr.Slider(
                    0, 200, defaults.top_k, step=1, label="Top-k", info="Draw from the k likeliest tokens; 0: from all."
                )
                top_p = gr.Slider(
                    0.05, 1, defaults.top_p, step=0.01, label="Top-p", info="Draw from those that share this probability."
                )
            with gr.Row():
                repetition_penalty = gr.Slider(
                    1, 2, defaults.repetition_penalty, step=0.05, label="Repetition penalty", info="1 changes nothing."
                )
                seed = gr.Number(0, label="Seed", info="Of drawing; empty: a new one.", precision=0, minimum=0, maximum=MAX_SEED)
            gr.Markdown("Top-k, top-p and the seed count where the temperature is above 0.")
        gr.Examples(
            [[text] for text in EXAMPLES.values()],
            prompt,
            example_labels=list(EXAMPLES),
            cache_examples=False,
            api_visibility="private",
        )
        running = gr.on(
            [start.click, prompt.submit],
            generate,
            inputs=[prompt, max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed],
            outputs=[completion, table],
            api_name="generate",
            concurrency_limit=1,
        )
        stop.click(None, cancels=[running], api_visibility="private")
    return demo


def main(model_name: str | None = None, port: int | None = None, share: bool = False) -> None:
    """Serves the page until interrupted; the model is the one named here, or in `GEOBASED_DEMO_MODEL`, or based-mini."""
    try:
        serve(build_demo(model_name or os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL), port, share)
    except CommandError as error:
        raise SystemExit(f"error: {error}") from error
