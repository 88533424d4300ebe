"""How a comparison looks on the page: a card for each model, a sentence of what came out, and two charts."""

from html import escape

from geobased.cli.generate import format_bytes
from geobased.line_chart import Line, line_chart

from .comparison import SPEED_WINDOW, Measurement

BASED_CLASS, ATTENTION_CLASS = "based", "attention"
UNTRAINED = "Untrained, with random weights: only its speed and memory can be compared; its text is not shown."


def comparison_view(based: Measurement, attention: Measurement, max_new_tokens: int, trained_tokens: int) -> str:
    """The state of a comparison as HTML.

    Args:
        based, attention: what both models did so far.
        max_new_tokens: that each is to write.
        trained_tokens: length of context that the BASED model was trained on.
    """
    notes = []
    if based.prompt_tokens + max_new_tokens > trained_tokens:
        notes.append(
            f"{based.name} was trained on contexts of {trained_tokens:,} tokens. Its state, speed and time are measured beyond"
            " that as before; the quality of its text there is not claimed."
        )
    return (
        f'<div class="comparison"><p class="status" role="status">{escape(_status(based, attention, max_new_tokens))}</p>'
        f'<div class="side-by-side">{_card(based, "BASED", BASED_CLASS, max_new_tokens)}'
        f"{_card(attention, 'attention', ATTENTION_CLASS, max_new_tokens)}</div>"
        f'<div class="side-by-side">{_charts(based, attention, max_new_tokens)}</div>'
        f"{''.join(f'<p>{escape(note)}</p>' for note in notes)}</div>"
    )


def _status(based: Measurement, attention: Measurement, max_new_tokens: int) -> str:
    if working := [model for model in (based, attention) if model.new_tokens < max_new_tokens]:
        return f"{', '.join(f'{model.name} {_activity(model)}' for model in working)} …"
    less, more = sorted((based, attention), key=lambda model: model.cache_bytes)
    memory = f"{more.name} keeps {_times(more.cache_bytes / less.cache_bytes)} the memory of {less.name}"
    slow, fast = sorted((based, attention), key=lambda model: model.tokens_per_second or 0.0)
    speed = ""
    if slow.tokens_per_second and fast.tokens_per_second:
        speed = f", and {fast.name} writes {_times(fast.tokens_per_second / slow.tokens_per_second)} as fast as {slow.name}"
    return f"At {based.prompt_tokens + max_new_tokens:,} tokens {memory}{speed}."


def _activity(model: Measurement) -> str:
    return "writes" if model.new_tokens else "reads"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def _card(model: Measurement, kind: str, css_class: str, max_new_tokens: int) -> str:
    first = "…" if model.seconds_to_first_token is None else f"{model.seconds_to_first_token:,.2f} s"
    rate = "…" if model.tokens_per_second is None else f"{model.tokens_per_second:,.0f} tokens/s"
    done, total = model.read_tokens + model.new_tokens, model.prompt_tokens + max_new_tokens
    values = {
        "Memory kept": format_bytes(model.cache_bytes),
        "Time to first token": first,
        "Writing speed": rate,
        "Read and written": f"{model.read_tokens:,} + {model.new_tokens:,}",
    }
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in values.items())
    text = (
        f'<p class="note">{UNTRAINED}</p>'
        if model.text is None
        else f'<p class="text" tabindex="0">{escape(model.text) or "…"}</p>'
    )
    return (
        f'<section class="card {css_class}"><h3>{escape(model.name)}</h3>'
        f'<p class="note">{kind}, {model.parameters:,} parameters</p>'
        f'<progress value="{done}" max="{total}" aria-label="{escape(model.name)}: tokens read and written"></progress>'
        f"<dl>{rows}</dl>{text}</section>"
    )


def _charts(based: Measurement, attention: Measurement, max_new_tokens: int) -> str:
    def lines(attribute: str) -> list[Line]:
        pairs = ((based, BASED_CLASS), (attention, ATTENTION_CLASS))
        return [Line(model.name, css_class, getattr(model, attribute)) for model, css_class in pairs]

    def summary(what: str, values: tuple[str, str]) -> str:
        return f"{what}: {based.name} {values[0]}, {attention.name} {values[1]}"

    rates = tuple("not known yet" if not model.speeds else f"{model.speeds[-1][1]:,.0f}" for model in (based, attention))
    memory = line_chart(
        "Memory kept of the text",
        lines("memory"),
        "tokens read and written",
        max(based.prompt_tokens, attention.prompt_tokens) + max_new_tokens,
        lambda size: format_bytes(round(size)).replace(".0 ", " "),
        summary("Memory now", (format_bytes(based.cache_bytes), format_bytes(attention.cache_bytes))),
    )
    speed = line_chart(
        "Writing speed, tokens/s",
        lines("speeds"),
        f"tokens written (mean of the newest {SPEED_WINDOW})",
        max_new_tokens,
        lambda rate: f"{rate:,.0f}",
        summary("Tokens per second now", (rates[0], rates[1])),
    )
    return memory + speed
