"""A causal language model as auditors see it."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .access import NOTHING, Capability
from .held_model import HeldModel, needs_of_forward
from .model_server import Answer, Call, Tensors, verb

INPUTS = ("ids", "token_weights", "embeddings")


def generation_cost(prompt_tokens: int, new_tokens: int) -> float:
    """Forward-equivalents: the prompt once, then each further token 1 / its position, as all before it is cached."""
    return 1.0 + sum(1.0 / (prompt_tokens + position) for position in range(1, new_tokens))


def input_needs(tensors: Tensors) -> Capability:
    """What inputs ask for: `ACT_WRITE` where no user can give them."""
    if "embeddings" in tensors:
        return Capability.ACT_WRITE
    if (weights := tensors.get("token_weights")) is not None:
        # otherwise than one token at each place
        plain = bool(((weights == 0) | (weights == 1)).all() and (weights.sum(-1) == 1).all())
        return NOTHING if plain else Capability.ACT_WRITE
    return NOTHING


class TextModel(HeldModel):
    """Args:
    module, tokenizer: of a causal language model.
    identity: what the ledger calls it.
    """

    kind = "text"

    def __init__(self, module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, identity: dict[str, Any]) -> None:
        super().__init__(module, identity)
        self.model, self.tokenizer = module, tokenizer
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._padding = int(padding or 0)

    def info(self) -> dict[str, Any]:
        return {"kind": self.kind, "model_type": self.model.config.model_type, "vocabulary_size": len(self._vocabulary)}

    @verb(Capability.QUERY)
    def generate(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """Continuations, a list of samples for each prompt; greedy at temperature 0."""
        prompts, samples = list(arguments["prompts"]), int(arguments["samples"])
        new_tokens, temperature, stop = int(arguments["max_new_tokens"]), float(arguments["temperature"]), arguments["stop"]
        if new_tokens < 1 or samples < 1 or temperature < 0:
            raise ValueError("max_new_tokens and samples must be at least 1, and temperature at least 0")
        encoded = [ids for ids in self._encode(prompts) for _ in range(samples)]
        call.require(sum(generation_cost(len(ids), new_tokens) for ids in encoded))
        ids, mask = _padded(encoded, self._padding, left=True)
        sampling: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            sampling |= {"temperature": temperature, "top_p": float(arguments["top_p"]), "top_k": 0}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(int(arguments["seed"]))
            sequences = self.model.generate(  # type: ignore[operator]
                ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=new_tokens,
                pad_token_id=self._padding,
                **({"stop_strings": list(stop), "tokenizer": self.tokenizer} if stop else {}),
                **sampling,
            )
        written = sequences[:, ids.shape[1] :].tolist()
        kept = [self._until_end(row) for row in written]
        call.spend(forward=sum(generation_cost(len(ids), len(row)) for ids, row in zip(encoded, kept, strict=True)))
        texts = [_before_stop(str(self.tokenizer.decode(row, skip_special_tokens=True)), stop) for row in kept]
        return [texts[start : start + samples] for start in range(0, len(texts), samples)], {}

    @verb(Capability.TOPK)
    def top_tokens(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """The `k` likeliest next tokens of each prompt: their texts, and tensors ids and log_probabilities [prompts, k]."""
        encoded, k = self._encode(list(arguments["prompts"])), int(arguments["k"])
        call.spend(forward=len(encoded))
        ids, mask = _padded(encoded, self._padding)
        with torch.no_grad():
            logits = self.compute({"ids": ids.to(self.device), "attention_mask": mask.to(self.device)}, (), None)["logits"]
        ends = mask.sum(1).to(logits.device) - 1
        best = logits[torch.arange(len(encoded), device=logits.device), ends].float().log_softmax(-1).topk(k, dim=-1)
        texts = [[self.tokenizer.decode([token]) for token in row] for row in best.indices.tolist()]
        return texts, {"ids": best.indices, "log_probabilities": best.values}

    @verb(Capability.TOPK)
    def tokenize(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        special = bool(arguments["special"])
        return [self.tokenizer(text, add_special_tokens=special).input_ids for text in arguments["texts"]], {}

    @verb(Capability.TOPK)
    def detokenize(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        return [self.tokenizer.decode(ids) for ids in arguments["ids"]], {}

    @verb(Capability.LOGITS)
    def score(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """Log probabilities of tokens given what precedes them, [items, most tokens], and how many of them are the item's.

        Of completions after prompts, or of the tensor ids [items, length] from position `start` on. If all rows begin with the
        same `shared` tokens, these are read once where the model's cache can be handed on, and then cost once.
        """
        if "ids" in tensors:
            start, shared = int(arguments["start"]), int(arguments.get("shared", 0))
            if shared and self._hands_on_cache:
                after = self._after_shared(call, tensors["ids"].to(self.device), start, shared)
                return [after.shape[1]] * len(after), {"log_probabilities": after.cpu()}
            rows = tensors["ids"].tolist()
            starts = [start] * len(rows)
        else:
            prompts = self._encode(list(arguments["prompts"]))
            ends = self._encode(list(arguments["completions"]), special=False)
            rows = [prompt + end for prompt, end in zip(prompts, ends, strict=True)]
            starts = [len(prompt) for prompt in prompts]
        if not rows or any(not 1 <= start < len(row) for row, start in zip(rows, starts, strict=True)):
            raise ValueError("scores need items, and at least one token before those that are scored")
        call.spend(forward=len(rows))
        with torch.no_grad():
            found = [logs.cpu() for logs in self._log_probabilities(rows, starts)]
        padded = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
        return [len(logs) for logs in found], {"log_probabilities": padded}

    @verb(needs_of_forward(input_needs))
    def forward(self, call: Call, arguments: dict[str, Any], tensors: Tensors) -> Answer:
        """See `HeldModel.forward`. Inputs are ids [items, length], token_weights [items, length, vocabulary] or embeddings
        [items, length, hidden_size], with an attention_mask [items, length] where rows are padded at their end."""
        return super().forward(call, arguments, tensors)

    def read_inputs(self, tensors: Tensors) -> Tensors:
        given = [name for name in INPUTS if name in tensors]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(INPUTS)}, not {', '.join(given) or 'none'}")
        value = tensors[given[0]]
        mask = tensors.get("attention_mask", torch.ones(value.shape[:2], dtype=torch.long))
        if value.ndim != (2 if given[0] == "ids" else 3) or not value.shape[1] or mask.shape != value.shape[:2]:
            raise ValueError(f"{given[0]} {list(value.shape)} and attention_mask {list(mask.shape)} do not fit each other")
        if given[0] == "ids" and not 0 <= int(value.min()) <= int(value.max()) < self._vocabulary.shape[0]:
            raise ValueError(f"ids must lie between 0 and {self._vocabulary.shape[0] - 1}")
        return {given[0]: value.to(self.device), "attention_mask": mask.to(self.device)}

    @property
    def _vocabulary(self) -> torch.Tensor:
        return self.model.get_input_embeddings().weight  # type: ignore[return-value]

    def compute(self, inputs: Tensors, read: Sequence[str], last: int | None) -> Tensors:
        mask = inputs["attention_mask"]
        if last is not None and not bool(mask.all()):
            raise ValueError("last= needs rows of equal length")
        if "ids" in inputs:
            given = {"input_ids": inputs["ids"]}
        elif "embeddings" in inputs:
            given = {"inputs_embeds": inputs["embeddings"].to(self.model.dtype)}
        else:
            weights = inputs["token_weights"].to(self._vocabulary.dtype)
            given = {"inputs_embeds": weights @ self._vocabulary[: weights.shape[-1]]}
        wants_states = "embeddings" in read
        output = self.model(**given, attention_mask=mask, use_cache=False, output_hidden_states=wants_states)
        found = {"logits": output.logits if last is None else output.logits[:, -last:]}
        return {**found, "embeddings": output.hidden_states[-1]} if wants_states else found

    def example_loss(self, arguments: dict[str, Any], tensors: Tensors, chosen: Sequence[int]) -> torch.Tensor:
        prompts = self._encode([arguments["prompts"][index] for index in chosen])
        ends = self._encode([arguments["completions"][index] for index in chosen], special=False)
        rows = [prompt + end for prompt, end in zip(prompts, ends, strict=True)]
        return -torch.cat(list(self._log_probabilities(rows, [len(prompt) for prompt in prompts]))).mean()

    def _log_probabilities(self, rows: list[list[int]], starts: list[int]) -> Iterator[torch.Tensor]:
        ids, mask = (tensor.to(self.device) for tensor in _padded(rows, self._padding))
        logits = self.compute({"ids": ids, "attention_mask": mask}, (), None)["logits"]
        for row, start, logs, tokens in zip(rows, starts, logits, ids, strict=True):
            yield -cross_entropy(logs[start - 1 : len(row) - 1].float(), tokens[start : len(row)], reduction="none")

    @functools.cached_property
    def _hands_on_cache(self) -> bool:
        """Whether what the model keeps of a prefix, keys or recurrent states, can be handed to several continuations."""
        with torch.no_grad():
            output = self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=True)
        return hasattr(getattr(output, "past_key_values", None), "batch_repeat_interleave")

    def _after_shared(self, call: Call, ids: torch.Tensor, start: int, shared: int) -> torch.Tensor:
        """Log probabilities [items, length - start] of rows with the same first `shared` tokens."""
        items, length = ids.shape
        if not 0 < shared < start < length or not bool((ids[:, :shared] == ids[0, :shared]).all()):
            raise ValueError(f"shared={shared} must be tokens that all rows have in common, before position start={start}")
        call.spend(forward=(shared + items * (length - shared)) / length)
        kept = length - start + 1
        with torch.no_grad():
            cache = self.model(input_ids=ids[:1, :shared], use_cache=True).past_key_values
            cache.batch_repeat_interleave(items)
            logits = self.model(input_ids=ids[:, shared:], past_key_values=cache, use_cache=True).logits[:, -kept:-1]
        return -cross_entropy(logits.float().transpose(1, 2), ids[:, start:], reduction="none")

    def _encode(self, texts: list[str], special: bool = True) -> list[list[int]]:
        if not texts:
            raise ValueError("no texts are given")
        encoded = [list(self.tokenizer(text, add_special_tokens=special).input_ids) for text in texts]
        if empty := [text for text, ids in zip(texts, encoded, strict=True) if not ids]:
            raise ValueError(f"a text has no tokens: {empty[0]!r}")
        return encoded

    def _until_end(self, row: list[int]) -> list[int]:
        """Tokens up to the first that ends the text, which was computed too."""
        end = self.model.generation_config.eos_token_id
        ends = {self._padding, *(end if isinstance(end, list) else [end])}
        return next((row[: place + 1] for place, token in enumerate(row) if token in ends), row)


def _padded(rows: Sequence[Sequence[int]], padding: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask [rows, most tokens]."""
    side = "left" if left else "right"
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in ids], batch_first=True, padding_side=side)
    return pad(ids, batch_first=True, padding_value=padding, padding_side=side), mask


def _before_stop(text: str, stop: Sequence[str] | None) -> str:
    ends = [place for word in stop or () if (place := text.find(word)) >= 0]
    return text[: min(ends)] if ends else text


__all__ = ["TextModel", "generation_cost"]
