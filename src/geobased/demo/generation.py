"""A page that tries out a BASED model: text as it grows, the model beside attention of equal size, and recall from a document.

from geobased.demo.generation import main

main()
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from geobased.cli.errors import CommandError, explain
from geobased.cli.generate import format_bytes
from geobased.cli.sources import DEFAULT_MODEL, MODEL_VARIABLE

from .comparison import MAX_WRITTEN_TOKENS, READ_AT_ONCE, ComparedModel, Comparison
from .comparison_view import UNTRAINED, comparison_view
from .generation_style import STYLE
from .recall_playground import DOCUMENTS, FILLER_TOKENS, MAX_QUESTION_CHARACTERS, Recall, RecallPlayground, recall_view
from .serving import gr, on_gpu, serve
from .text_generator import MAX_SEED, Generator, Progress, Settings

ATTENTION_VARIABLE = "GEOBASED_DEMO_ATTENTION_MODEL"
MAX_NEW_TOKENS, COMPARED_TOKENS, CONTEXT_TOKENS = 512, 64, 4096
# of a field of the page: more than the longest context has with any usual tokenizer
MAX_CHARACTERS = 200_000
EXAMPLES = {
    "One fact": "The population of Lund is 94,393. Question: What is the population of Lund? Answer:",
    "Two facts": (
        "The climate of Jeddah is hot desert. The climate of Nanjing is humid subtropical."
        " Question: What is the climate of Jeddah? Answer:"
    ),
    "Three records": f"{DOCUMENTS['Records'][0]}\n\nQuestion: What is the population of Nanjing? Answer:",
    "Free text": "Fellow citizens, the Congress of the United States",
}
SHIPPED_MODEL_NOTE = (
    "This small model was trained to recall what stands in its context, and is often wrong: it recalls 29% of the facts in the"
    " test of its model card. With the default settings it answers the first two examples rightly and the third wrongly. It goes"
    " on writing after an answer, knows no geography, and writes poor free text."
)
SHIPPED_RECALL_NOTE = (
    "**Often wrong.** In the test of its model card this small model recalls 54% of facts at up to 64 tokens between the fact"
    " and the answer, and 15% at 512 to 1,024. It was trained on records of towns and on questions about them; other texts were"
    " not tested. Of the examples it answers the first two rightly, the third with the value of another record, and the fourth"
    " with a value that stands nowhere. An answer that stands in the document can still be the wrong one."
)
COMPARISON_NOTE = (
    "Both read the same text and write the same number of tokens, greedily. They take turns and each has a clock of its own, so"
    " neither slows the other; the one whose clock is behind goes next. Memory is that of the tensors in the cache, speed that of"
    f" transformers on this machine; nothing is computed from a formula. The text is read {READ_AT_ONCE} tokens at a time, so"
    " that reading can be watched and stopped; that costs attention some time to its first token."
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


@contextlib.contextmanager
def _errors_as_messages() -> Iterator[None]:
    """What is raised within is shown on the page, or given to the client, as a sentence."""
    try:
        yield
    except CommandError as error:
        raise gr.Error(str(error), print_exception=False) from error
    except Exception as error:
        raise gr.Error(explain(error)[0]) from error


def _buttons(start_label: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        return gr.Button(start_label, variant="primary"), gr.Button("Stop")


def _examples(examples: Mapping[str, Sequence[str]], inputs: list[Any]) -> None:
    gr.Examples(
        [list(texts) for texts in examples.values()],
        inputs,
        example_labels=list(examples),
        cache_examples=False,
        api_visibility="private",
    )


def _run(function: Any, start: gr.Button, stop: gr.Button, submit: gr.Textbox, inputs: list[Any], outputs: list[Any]) -> None:
    """Runs `function` by button or key, named after it for clients; one run at a time among all that are wired here."""
    running = gr.on(
        [start.click, submit.submit],
        on_gpu(function),
        inputs=inputs,
        outputs=outputs,
        api_name=function.__name__,
        concurrency_limit=1,
        concurrency_id="model",
        show_progress="minimal",
    )
    stop.click(None, cancels=[running], api_visibility="private")


def build_demo(model_name: str = DEFAULT_MODEL, attention_model: str | None = None) -> gr.Blocks:
    """The page, with its models loaded; `CommandError` tells why one cannot be.

    Args:
        model_name: the BASED model.
        attention_model: a folder or Hub id of another causal language model to compare it with; by default a Llama of equal
            size with random weights.
    """
    generator = Generator.load(model_name)
    compared = ComparedModel(generator.name, generator.model, generator.tokenizer)
    comparison = Comparison(compared, attention_model, generator.lock)
    config, dtype = generator.model.config, str(generator.model.dtype).removeprefix("torch.")
    shipped = model_name == DEFAULT_MODEL
    with gr.Blocks(title="Text generation with BASED", analytics_enabled=False) as demo:
        gr.HTML(f"<style>{STYLE}</style>", padding=False)
        gr.Markdown(
            "# Text generation with BASED\n"
            "BASED mixes gated convolutions, Taylor linear attention and sliding windows, so that generation keeps a state of"
            " constant size, however long the text gets.\n\n"
            f"Model: `{generator.name}`, {generator.model.num_parameters():,} parameters, {config.num_hidden_layers} layers,"
            f" width {config.hidden_size}, on {generator.model.device.type} in {dtype}."
        )
        with gr.Tabs():
            with gr.Tab("Generate"):
                _generation_tab(generator, shipped)
            with gr.Tab("Compare"):
                _comparison_tab(comparison)
            with gr.Tab("Recall"):
                _recall_tab(RecallPlayground(compared, generator.lock), generator.max_prompt_tokens, shipped)
    return demo


def _generation_tab(generator: Generator, shipped: bool) -> None:
    def generate(
        prompt: str,
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        repetition_penalty: float,
        seed: int | None,
    ) -> Iterator[tuple[str, str]]:
        """Continue a prompt with a BASED model; yields the continuation so far and a Markdown table of statistics.

        Args:
            prompt: text to continue, at most as long as the context that the model was trained on.
            max_new_tokens: most tokens to write.
            temperature: 0 takes the likeliest token; higher values draw more freely.
            top_k: draw from this many likeliest tokens; 0 draws from all.
            top_p: draw from the likeliest tokens that share this probability.
            repetition_penalty: above 1, tokens that have occurred get less likely.
            seed: of drawing; empty means a new one.
        """
        settings = Settings(int(max_new_tokens), temperature, int(top_k), top_p, repetition_penalty, seed)
        with _errors_as_messages():
            for progress in generator.stream(prompt, settings):
                yield progress.text, statistics(progress)

    defaults = Settings()
    if shipped:
        gr.Markdown(SHIPPED_MODEL_NOTE)
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            prompt = gr.Textbox(
                EXAMPLES["One fact"],
                label="Prompt",
                info="Shift and Enter generate.",
                lines=4,
                max_lines=12,
                max_length=MAX_CHARACTERS,
            )
            _examples({name: [text] for name, text in EXAMPLES.items()}, [prompt])
            start, stop = _buttons("Generate")
            completion = gr.Textbox(label="Continuation", lines=7, max_lines=20, interactive=False)
            table = gr.Markdown(label="Statistics", container=False)
        with gr.Column(scale=2, min_width=260):
            max_new_tokens = gr.Slider(
                1, MAX_NEW_TOKENS, defaults.max_new_tokens, step=1, label="Most new tokens", info="The text can end before."
            )
            temperature = gr.Slider(
                0,
                2,
                defaults.temperature,
                step=0.05,
                label="Temperature",
                info="0 takes the likeliest token each time; above, tokens are drawn, the more freely the higher.",
            )
            top_k = gr.Slider(
                0, 200, defaults.top_k, step=1, label="Top-k", info="Draw from the k likeliest tokens; 0: from all."
            )
            top_p = gr.Slider(
                0.05,
                1,
                defaults.top_p,
                step=0.01,
                label="Top-p",
                info="Draw from the likeliest tokens that together have this probability; 1: from all.",
            )
            repetition_penalty = gr.Slider(
                1,
                2,
                defaults.repetition_penalty,
                step=0.05,
                label="Repetition penalty",
                info="Above 1, tokens that have occurred get less likely. It hinders recall, which repeats.",
            )
            seed = gr.Number(
                0,
                label="Seed",
                info="The same one repeats a text; empty: a new one each time.",
                precision=0,
                minimum=0,
                maximum=MAX_SEED,
            )
            gr.Markdown("Top-k, top-p and the seed count where the temperature is above 0.")
    inputs = [prompt, max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed]
    _run(generate, start, stop, prompt, inputs, [completion, table])


def _comparison_tab(comparison: Comparison) -> None:
    based, longest = comparison.based, comparison.max_context_tokens
    trained_tokens = based.model.config.max_position_embeddings

    def compare(prompt: str, context_tokens: int, max_new_tokens: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Run a BASED model and an attention model of equal size on the same text and measure their memory and speed.

        Yields a view as HTML, and the measurements of both models so far: bytes of the cache, seconds to the first token, tokens
        per second, and how they went.

        Args:
            prompt: text to read and to continue.
            context_tokens: tokens of the text; filler before the prompt fills it up to this length, 0 adds none.
            max_new_tokens: tokens that both write.
        """
        with _errors_as_messages():
            for pair in comparison.stream(prompt, int(context_tokens), int(max_new_tokens)):
                report = {kind: asdict(model) for kind, model in zip(("based", "attention"), pair, strict=True)}
                yield comparison_view(*pair, int(max_new_tokens), trained_tokens), report

    gr.Markdown(COMPARISON_NOTE)
    if comparison.attention_model is None:
        gr.Markdown(
            f"The attention model is a Llama of the same width and depth. {UNTRAINED} `--attention-model` takes a trained one."
        )
    else:
        gr.Markdown(f"The attention model is `{comparison.attention_model}`, as it was given when this page was started.")
    prompt = gr.Textbox(
        EXAMPLES["One fact"],
        label="Text to read and continue",
        info="Shift and Enter compare.",
        lines=2,
        max_lines=8,
        max_length=MAX_CHARACTERS,
    )
    with gr.Row():
        context = gr.Slider(
            0,
            longest,
            min(CONTEXT_TOKENS, longest),
            step=1 if longest < 256 else 256,
            label="Context, tokens",
            info=f"Filler before the text makes it this long; 0: none. The model was trained on {trained_tokens:,}.",
            min_width=280,
        )
        written = gr.Slider(
            2,
            MAX_WRITTEN_TOKENS,
            COMPARED_TOKENS,
            step=1,
            label="Tokens to write",
            info="Both models write as many.",
            min_width=280,
        )
    start, stop = _buttons("Compare")
    view = gr.HTML(label="Comparison", padding=False, apply_default_css=False)
    with gr.Accordion("Measurements as JSON", open=False):
        report = gr.JSON(label="Measurements", show_label=False)
    _run(compare, start, stop, prompt, [prompt, context, written], [view, report])


def _recall_tab(playground: RecallPlayground, trained_tokens: int, shipped: bool) -> None:
    def answer(document: str, question: str, distances: bool) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
        """Answer a question from a document with a BASED model. It is often wrong: check where the answer stands.

        Yields the answer, a view as HTML, and for each length of filler between document and question the answer, the
        probability that the model gave to its tokens (not that it is right), and the characters of the document that equal it.

        Args:
            document: text that holds the fact.
            question: what to look for in it.
            distances: whether to ask again with filler of several lengths between the document and the question.
        """
        with _errors_as_messages():
            recalls: list[Recall] = []
            for recall in playground.answers(document, question, FILLER_TOKENS if distances else FILLER_TOKENS[:1]):
                recalls.append(recall)
                view = recall_view(document, recalls, trained_tokens, shipped)
                yield recalls[0].answer, view, [asdict(recall) for recall in recalls]

    if shipped:
        gr.Markdown(SHIPPED_RECALL_NOTE)
    first_document, first_question = DOCUMENTS["Statements"]
    document = gr.Textbox(first_document, label="Document", lines=6, max_lines=16, max_length=MAX_CHARACTERS)
    question = gr.Textbox(first_question, label="Question", info="Enter asks.", max_lines=1, max_length=MAX_QUESTION_CHARACTERS)
    distances = gr.Checkbox(
        False,
        label="Compare distances",
        info=f"Ask again with filler of up to {FILLER_TOKENS[-1]} tokens between the document and the question.",
    )
    _examples(DOCUMENTS, [document, question])
    start, stop = _buttons("Ask")
    text = gr.Textbox(label="Answer", interactive=False)
    view = gr.HTML(label="Where it stands", padding=False, apply_default_css=False)
    with gr.Accordion("Answers as JSON", open=False):
        report = gr.JSON(label="Answers", show_label=False)
    _run(answer, start, stop, question, [document, question, distances], [text, view, report])


def main(model_name: str | None = None, port: int | None = None, share: bool = False, attention_model: str | None = None) -> None:
    """Serves the page until interrupted; what is not given is read from `GEOBASED_DEMO_MODEL` (or is based-mini) and
    `GEOBASED_DEMO_ATTENTION_MODEL` (or is an untrained model of equal size)."""
    try:
        page = build_demo(
            model_name or os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL,
            attention_model or os.environ.get(ATTENTION_VARIABLE) or None,
        )
        serve(page, port, share)
    except CommandError as error:
        raise SystemExit(f"error: {error}") from error
