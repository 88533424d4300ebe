"""Text from a BASED model as it grows, and what was measured about it."""

import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers

import geobased
from geobased.cli.errors import CommandError
from geobased.cli.sources import load_model, load_tokenizer, parse_device, quiet_transformers, resolve_model
from geobased.cli.streaming import TimedTextStreamer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UPDATE_SECONDS = 0.05
MAX_SEED = 2**31 - 1


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
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while the model works, here or elsewhere."""

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
        if free := self.lock.acquire(timeout=timeout):
            self.lock.release()
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
                with self.lock, quiet_transformers():
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
