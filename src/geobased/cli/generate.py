"""`geobased generate`: text from a language model, streamed."""

import json
import platform
import secrets
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import INTERRUPTED, CommandError
from .options import Debug, Device, Json, Model
from .sources import DEFAULT_MODEL, load_model, load_tokenizer, parse_device, parse_dtype, quiet_transformers, resolve_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .streaming import TimedTextStreamer

EXAMPLES = (
    'geobased generate "The capital of France is"',
    "geobased generate - --json < prompt.txt",
    'geobased generate "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1',
    'geobased generate "The weather" --model ./my-model --max-new-tokens 300 --device cuda',
)
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Generation:
    """What `--json` prints.

    text: prompt and completion; seconds: from the prompt to the last token; prefill_seconds: to the first token;
    tokens_per_second: the tokens after the first over the time from the first to the last (with a single token: one over
    the time to it), so neither loading nor the prompt counts; state_bytes: what generation keeps of the sequence (for a
    BASED model whatever its length, for others the cache at the end, None if interrupted); finish_reason: "stop" (the
    model ended the text), "length" or "interrupted"; seed: of sampling, None if greedy.
    """

    text: str
    completion: str
    prompt: str
    model: str
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float
    seconds: float
    prefill_seconds: float
    state_bytes: int | None
    finish_reason: str
    seed: int | None
    device: str
    dtype: str
    versions: dict[str, str]


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from standard input.")],
    model: Model = DEFAULT_MODEL,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens to generate.")] = 100,
    do_sample: Annotated[
        bool | None,
        typer.Option(
            "--do-sample/--greedy",
            help="Draw tokens, or take the likeliest. By default as the model's generation_config.json says (mostly greedy);"
            " giving a temperature, top-k, top-p or seed means drawing.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Above 0; below 1 is more certain.", show_default=False)] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest tokens.", show_default=False)] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens that share this probability.", show_default=False)
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: tokens that have occurred get less likely.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of drawing; by default a new one.", show_default=False)] = None,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16, float16 or float64; auto: the checkpoint's, on a CPU float32.")
    ] = "auto",
    device: Device = "auto",
    json_output: Json = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that comes with a model of an unknown type.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Continue PROMPT with a language model.

    The text streams to standard output, the prompt first; tokens per second and the size of the generation state follow on
    standard error. Tokens per second counts the tokens after the first, over the time from the first token to the last:
    neither loading nor the prompt. Ctrl-C ends the text early.
    """
    prompt = _read_prompt(prompt)
    settings = _sampling_settings(do_sample, temperature, top_k, top_p, repetition_penalty, seed)
    parse_dtype(dtype)
    source, place = resolve_model(model), parse_device(device)
    tokenizer = load_tokenizer(model, source, trust_remote_code)
    loaded = load_model(model, source, dtype, place, trust_remote_code)
    input_ids = _encode(prompt, tokenizer, loaded)

    show = (lambda text: None) if json_output else _write
    show(prompt)
    with quiet_transformers():
        settings["max_new_tokens"] = max_new_tokens
        result = _generate(loaded, tokenizer, input_ids, prompt, model, settings, seed, show)
    if json_output:
        print(json.dumps(asdict(result), ensure_ascii=False))
    else:
        _write("\n")
        print(_statistics(result, loaded), file=sys.stderr)
    if result.finish_reason == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _read_prompt(prompt: str) -> str:
    """The prompt; `-` stands for standard input without its last line break."""
    try:
        if prompt == "-":
            prompt = sys.stdin.read().removesuffix("\n")
        prompt.encode()
    except UnicodeError:
        raise CommandError("the prompt is not valid UTF-8 text") from None
    if not prompt:
        raise CommandError("the prompt is empty: give at least one character of text")
    return prompt


def _sampling_settings(
    do_sample: bool | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
) -> dict[str, Any]:
    """Arguments for `model.generate`; what was not given is left to the model's own generation config."""
    if temperature is not None and not temperature > 0:
        raise CommandError(f"--temperature {temperature} must be above 0; use --greedy for the likeliest tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise CommandError(f"--top-p {top_p} must be above 0 and at most 1")
    if repetition_penalty is not None and not repetition_penalty > 0:
        raise CommandError(f"--repetition-penalty {repetition_penalty} must be above 0; 1 changes nothing")
    drawing = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    given = {name: value for name, value in drawing.items() if value is not None}
    if given and do_sample is False:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise CommandError(f"{names} cannot be used with --greedy, which always takes the likeliest token")
    if do_sample is None and (given or seed is not None):
        do_sample = True
    settings = given | {"do_sample": do_sample, "repetition_penalty": repetition_penalty}
    return {name: value for name, value in settings.items() if value is not None}


def _encode(prompt: str, tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> "torch.Tensor":
    """Token ids [1, seq_len] of the prompt on the model's device."""
    from geobased.modeling_based.input_checks import check_input_ids

    input_ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"].long()
    if input_ids.numel() == 0:
        raise CommandError("the prompt is empty: the tokenizer makes no token of it")
    check_input_ids(input_ids, model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    return input_ids.to(model.device)


def _generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    input_ids: "torch.Tensor",
    prompt: str,
    name: str,
    settings: dict[str, Any],
    seed: int | None,
    show: Any,
) -> Generation:
    import torch
    import transformers

    import geobased

    from .streaming import TimedTextStreamer

    is_based = isinstance(model, geobased.BasedPreTrainedModel)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if model.generation_config.pad_token_id is None:
        settings["pad_token_id"] = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if model.device.type == "cuda":
        # kernels are compiled on first use; compiling is not decoding, so it stays out of the time
        model.generate(**inputs, **settings | {"max_new_tokens": min(WARM_UP_TOKENS, settings["max_new_tokens"])})  # type: ignore[operator]
    sampling = settings.get("do_sample", model.generation_config.do_sample)
    if sampling:
        seed = secrets.randbelow(2**31) if seed is None else seed
        transformers.set_seed(seed)

    streamer = TimedTextStreamer(tokenizer, show)
    state_bytes = model.state_size_bytes() if is_based else None  # type: ignore[operator]
    started, interrupted = time.perf_counter(), False
    try:
        output = model.generate(**inputs, **settings, streamer=streamer, return_dict_in_generate=not is_based)  # type: ignore[operator]
        if not is_based:
            state_bytes = _tensor_bytes(output.past_key_values)
    except KeyboardInterrupt:
        interrupted = True
    streamer.end()
    return Generation(
        text=prompt + streamer.text,
        completion=streamer.text,
        prompt=prompt,
        model=name,
        prompt_tokens=input_ids.shape[1],
        new_tokens=len(streamer.token_ids),
        **_times(streamer, started),
        state_bytes=state_bytes,
        finish_reason="interrupted"
        if interrupted
        else "length"
        if len(streamer.token_ids) >= settings["max_new_tokens"]
        else "stop",
        seed=seed if sampling else None,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        versions={
            "geobased": geobased.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    )


def _times(streamer: "TimedTextStreamer", started: float) -> dict[str, float]:
    count = len(streamer.token_ids)
    if count == 0:  # interrupted during the prompt
        return {"tokens_per_second": 0.0, "seconds": 0.0, "prefill_seconds": 0.0}
    prefill, decode = streamer.first_at - started, streamer.last_at - streamer.first_at
    rate = (count - 1) / decode if count > 1 and decode > 0 else 1 / prefill
    return {
        "tokens_per_second": round(rate, 2),
        "seconds": round(prefill + decode, 4),
        "prefill_seconds": round(prefill, 4),
    }


def _tensor_bytes(item: Any, seen: set[int] | None = None) -> int:
    """Bytes of all tensors in a cache of any kind, each storage once."""
    import torch

    seen = set() if seen is None else seen
    if id(item) in seen:
        return 0
    seen.add(id(item))
    if isinstance(item, torch.Tensor):
        return item.numel() * item.element_size()
    if isinstance(item, dict):
        return sum(_tensor_bytes(value, seen) for value in item.values())
    if isinstance(item, list | tuple):
        return sum(_tensor_bytes(value, seen) for value in item)
    if type(item).__module__.startswith("transformers.cache_utils"):
        return _tensor_bytes(vars(item), seen)
    return 0


def _statistics(result: Generation, model: "PreTrainedModel") -> str:
    import geobased

    count = f"{result.new_tokens} new token{'' if result.new_tokens == 1 else 's'}"
    if result.finish_reason == "interrupted":
        count += " until interrupted"
    lines = [f"{count}, {result.tokens_per_second:,.1f} tokens/s on {result.device} in {result.dtype}"]
    if isinstance(model, geobased.BasedPreTrainedModel):
        lines.append(f"state: {format_bytes(result.state_bytes)} per sequence, whatever its length")
    elif result.state_bytes:
        lines.append(f"cache: {format_bytes(result.state_bytes)} at {result.prompt_tokens + result.new_tokens} tokens")
    return "\n".join(lines)


def format_bytes(count: int | None) -> str:
    """A number of bytes for people: 1.2 MB."""
    value = float(count or 0)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
