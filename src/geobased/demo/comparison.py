"""A BASED model and an attention model of equal size, which read and continue the same text in turns, each with its clock."""

import inspect
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import geobased
from geobased.cli.errors import CommandError
from geobased.cli.sources import load_model, load_tokenizer, parse_device, resolve_model
from geobased.modeling_based.cache_based import stored_tensors

from .filler import filler_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_CONTEXT_TOKENS, MAX_WRITTEN_TOKENS = 16_384, 256
READ_AT_ONCE = 512
# long enough that the models do not push each other's weights out of the processor's caches at every token
TURN_SECONDS = 0.15
# a speed is the mean over so many of the newest tokens
SPEED_WINDOW = 8
WARM_UP_TOKENS, SPARE_TOKENS = 16, 16


@dataclass(frozen=True)
class Measurement:
    """What one model did so far; all of it measured.

    Attributes:
        name: of the model.
        parameters: their number, shared ones once.
        trained: whether its weights come from training; if not, only speed and memory say anything.
        prompt_tokens: tokens to read, filler included.
        read_tokens, new_tokens: tokens read and written so far.
        cache_bytes: tensors that it keeps of the text now.
        seconds_to_first_token: from the start to the first written token; None before.
        tokens_per_second: written tokens after the first over the time since the first; None until there are two.
        text: the continuation up to an end of text; None if untrained.
        memory: (tokens in the cache, bytes) after every step.
        speeds: (tokens written, tokens per second over the newest `SPEED_WINDOW` of them).
    """

    name: str
    parameters: int
    trained: bool
    prompt_tokens: int
    read_tokens: int
    new_tokens: int
    cache_bytes: int
    seconds_to_first_token: float | None
    tokens_per_second: float | None
    text: str | None
    memory: tuple[tuple[int, int], ...]
    speeds: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class ComparedModel:
    """A causal language model with its tokenizer, and whether its weights come from training."""

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    trained: bool = True

    @property
    def max_context_tokens(self) -> int:
        """Most tokens to read: BASED and the untrained model have no limit of their own; others have that of their positions."""
        if not self.trained or isinstance(self.model, geobased.BasedForCausalLM):
            return MAX_CONTEXT_TOKENS
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return MAX_CONTEXT_TOKENS if positions is None else min(MAX_CONTEXT_TOKENS, positions - MAX_WRITTEN_TOKENS)

    def encode(self, prompt: str, context_tokens: int) -> torch.Tensor:
        """Token ids [1, seq_len] of the prompt, after as much filler as makes them `context_tokens` if they are fewer."""
        ids = self._ids(prompt)
        if ids.shape[1] > self.max_context_tokens:
            raise CommandError(
                f"The prompt is too long: it has {ids.shape[1]:,} tokens for {self.name}, and at most"
                f" {self.max_context_tokens:,} are compared."
            )
        if (missing := context_tokens - ids.shape[1]) > 0:
            # a little more, as joined statements can have fewer tokens than they have one by one
            filler = filler_text(self.tokenizer, missing + missing // 8 + SPARE_TOKENS, beside=prompt)
            longer = self._ids(f"{filler}\n{prompt}")
            # the first token may be one that begins every text
            ids = torch.cat([longer[:, :1], longer[:, 1 - context_tokens :]], dim=1)
        return ids.to(self.model.device)

    def _ids(self, text: str) -> torch.Tensor:
        return self.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].long()


def untrained_attention_model(based: geobased.BasedForCausalLM) -> LlamaForCausalLM:
    """A Llama with random weights, of the same width, depth, heads, vocabulary, dtype and device.

    Its MLP is as wide as brings the number of parameters nearest to that of `based`, in steps of 8 that suit a GPU.
    """
    # transformers declares as optional what its configurations set by themselves
    config: Any = based.config
    attention = 4 * config.hidden_size * config.num_attention_heads * config.head_dim
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    norms = config.hidden_size * (2 * config.num_hidden_layers + 1)
    left = based.num_parameters() - embeddings - norms - config.num_hidden_layers * attention
    width = left / (3 * config.hidden_size * config.num_hidden_layers)
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=max(8, 8 * round(width / 8)),
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        max_position_embeddings=MAX_CONTEXT_TOKENS + MAX_WRITTEN_TOKENS,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(), torch.device(based.device):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(llama)
        return model.to(based.dtype).eval()


class _Contender:
    """One model on its way through a text. `seconds` is its clock, which stands still while the other model works."""

    def __init__(self, compared: ComparedModel, ids: torch.Tensor, max_new_tokens: int) -> None:
        self.compared, self.ids, self.max_new_tokens = compared, ids, max_new_tokens
        self.cache: Any = None
        self.read = 0
        self.token_ids: list[int] = []
        self.token_times: list[float] = []
        self.memory: list[tuple[int, int]] = []
        self.seconds = 0.0
        forward = inspect.signature(compared.model.forward).parameters
        self._arguments = {"logits_to_keep": 1} if "logits_to_keep" in forward else {}

    @property
    def done(self) -> bool:
        return len(self.token_ids) >= self.max_new_tokens

    @torch.no_grad()
    def step(self) -> None:
        """Reads the next piece of the prompt, or the token written last, and writes a token once all is read."""
        started = time.perf_counter()
        reading = self.read < self.ids.shape[1]
        if reading:
            piece = self.ids[:, self.read : self.read + READ_AT_ONCE]
        else:
            piece = self.ids.new_tensor([[self.token_ids[-1]]])
        output = self.compared.model(piece, past_key_values=self.cache, use_cache=True, **self._arguments)
        self.cache = output.past_key_values
        self.read += piece.shape[1] if reading else 0
        # reading the number waits for the device
        token = int(output.logits[0, -1].argmax())
        self.seconds += time.perf_counter() - started
        if self.read == self.ids.shape[1]:
            self.token_ids.append(token)
            self.token_times.append(self.seconds)
        self.memory.append((self.read + max(0, len(self.token_ids) - 1), cache_bytes(self.cache)))

    def measurement(self) -> Measurement:
        count, times = len(self.token_ids), self.token_times
        elapsed = times[-1] - times[0] if count > 1 else 0.0
        compared = self.compared
        return Measurement(
            name=compared.name,
            parameters=compared.model.num_parameters(),
            trained=compared.trained,
            prompt_tokens=self.ids.shape[1],
            read_tokens=self.read,
            new_tokens=count,
            cache_bytes=self.memory[-1][1] if self.memory else 0,
            seconds_to_first_token=times[0] if times else None,
            tokens_per_second=(count - 1) / elapsed if elapsed > 0 else None,
            text=self._text() if compared.trained else None,
            memory=tuple(self.memory),
            speeds=tuple(
                (index + 1, (index - start) / (times[index] - times[start]))
                for index in range(1, count)
                if times[index] > times[start := max(0, index - SPEED_WINDOW)]
            ),
        )

    def _text(self) -> str:
        end = self.compared.tokenizer.eos_token_id
        ids = self.token_ids[: self.token_ids.index(end)] if end in self.token_ids else self.token_ids
        return str(self.compared.tokenizer.decode(ids, skip_special_tokens=True))


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors that a transformers cache holds now."""
    return sum(tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in stored_tensors(layer))


@dataclass
class Comparison:
    """A BASED model beside an attention model: the named one, or one with random weights that is made when first needed.

    Args:
        based: the BASED model.
        attention_model: a folder or a Hub id of a causal language model; `CommandError` tells why it cannot be used.
        lock: held while either model works.
    """

    based: ComparedModel
    attention_model: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.attention_model is not None:
            self.attention  # noqa: B018 - loads the model now, so that its errors end the start of the page

    @cached_property
    def attention(self) -> ComparedModel:
        if self.attention_model is None:
            assert isinstance(self.based.model, geobased.BasedForCausalLM)
            return ComparedModel("Llama", untrained_attention_model(self.based.model), self.based.tokenizer, trained=False)
        name, source = self.attention_model, resolve_model(self.attention_model)
        tokenizer = load_tokenizer(name, source)
        compared = ComparedModel(name, load_model(name, source, "auto", parse_device("auto")), tokenizer)
        if isinstance(compared.model, geobased.BasedForCausalLM):
            raise CommandError(f"{name} is a BASED model: --attention-model takes another kind of causal language model")
        if compared.max_context_tokens < 1:
            raise CommandError(f"{name} reads at most {MAX_WRITTEN_TOKENS + compared.max_context_tokens} tokens: too few")
        try:
            self._warm_up(compared)
        except (AttributeError, TypeError) as error:
            raise CommandError(f"{name} keeps no cache of transformers' kind, whose memory could be measured") from error
        return compared

    @property
    def max_context_tokens(self) -> int:
        """Most tokens that both models can read."""
        if self.attention_model is None:
            return self.based.max_context_tokens
        return min(self.based.max_context_tokens, self.attention.max_context_tokens)

    def stream(self, prompt: str, context_tokens: int, max_new_tokens: int) -> Iterator[tuple[Measurement, Measurement]]:
        """Measurements of both models after every turn. To stop, ask for no more: no model works between two of them.

        The model whose clock is behind works next, so both get on as if each had the device for itself. Both write
        `max_new_tokens`, by greedy decoding, past an end of text too: that keeps their lengths equal.
        """
        if not prompt.strip():
            raise CommandError("The prompt is empty: write some text first.")
        if not 0 <= context_tokens <= self.max_context_tokens:
            raise CommandError(
                f"A context of {context_tokens:,} tokens is out of range: choose 0 to {self.max_context_tokens:,}."
            )
        if not 1 <= max_new_tokens <= MAX_WRITTEN_TOKENS:
            raise CommandError(f"{max_new_tokens:,} new tokens are out of range: choose 1 to {MAX_WRITTEN_TOKENS}.")
        with self.lock:
            models = (self.based, self.attention)
            contenders = [_Contender(model, model.encode(prompt, context_tokens), max_new_tokens) for model in models]
            for model in models:
                self._warm_up(model)
        while unfinished := [contender for contender in contenders if not contender.done]:
            behind = min(unfinished, key=lambda contender: contender.seconds)
            until = behind.seconds + TURN_SECONDS
            with self.lock:
                while not behind.done and behind.seconds < until:
                    behind.step()
            yield contenders[0].measurement(), contenders[1].measurement()

    @staticmethod
    def _warm_up(compared: ComparedModel) -> None:
        """What happens at first use alone, such as compiling kernels, stays out of the times."""
        ids = torch.zeros((1, WARM_UP_TOKENS), dtype=torch.long, device=compared.model.device)
        contender = _Contender(compared, ids, 3)
        while not contender.done:
            contender.step()
