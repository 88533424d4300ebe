"""What auditors may do with a language model."""

from collections.abc import Sequence

import torch

from .access import Capability
from .held_target import READING, Forward, HeldTarget, Intervention


class TextTarget(HeldTarget):
    """A causal language model, or a server of one.

    Costs in forward-equivalents: a prompt that is read 1, each token generated after the first 1 / its position, a backward 2 per
    item, a step of fine-tuning 3 per example; tokens, names and weights nothing.
    """

    __slots__ = ()
    needs = {
        **HeldTarget.needs,
        "generate": Capability.QUERY,
        "top_tokens": Capability.TOPK,
        "tokenize": Capability.TOPK,
        "detokenize": Capability.TOPK,
        "score": Capability.LOGITS,
        "score_ids": Capability.LOGITS,
        "forward": READING,
    }

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        samples: int = 1,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[list[str]]:
        """Continuations, a list of samples for each prompt, each up to the first of the strings `stop`. QUERY.

        Greedy at temperature 0.
        """
        arguments = {
            "prompts": list(prompts),
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "samples": samples,
            "seed": seed,
            "stop": list(stop),
        }
        return self._request("generate", arguments)[0]

    def top_tokens(self, prompts: Sequence[str], k: int = 5) -> tuple[list[list[str]], torch.Tensor, torch.Tensor]:
        """The `k` likeliest next tokens: texts, ids [prompts, k] and log probabilities [prompts, k]. TOPK."""
        texts, found = self._request("top_tokens", {"prompts": list(prompts), "k": k})
        return texts, found["ids"], found["log_probabilities"]

    def tokenize(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Token ids, with the special tokens that a prompt begins with if `special`. TOPK."""
        return self._request("tokenize", {"texts": list(texts), "special": special})[0]

    def detokenize(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Texts of token ids. TOPK."""
        return self._request("detokenize", {"ids": [list(row) for row in ids]})[0]

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> list[torch.Tensor]:
        """Log probabilities (nats) of the completions' tokens after the prompts, one tensor [tokens] each. LOGITS."""
        lengths, found = self._request("score", {"prompts": list(prompts), "completions": list(completions)})
        return [row[:length] for row, length in zip(found["log_probabilities"], lengths, strict=True)]

    def score_ids(self, ids: torch.Tensor, start: int = 1, *, shared: int = 0) -> torch.Tensor:
        """Log probabilities [items, length - start] of the tokens from position `start` on; ids [items, length]. LOGITS.

        The first `shared` tokens are the same in all rows: they are computed, and cost, once, unless the model keeps nothing that
        several continuations can start from.
        """
        return self._request("score", {"start": start, "shared": shared}, {"ids": ids})[1]["log_probabilities"]

    def forward(
        self,
        *,
        ids: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        read: Sequence[str] = ("logits",),
        last: int | None = None,
        interventions: Sequence[Intervention] = (),
        parameters: Sequence[str] = (),
    ) -> Forward:
        """Values of the model for tokens.

        Args:
            ids: [items, length].
            token_weights: instead of ids, [items, length, vocabulary]: each position's embedding is the sum of all tokens' so
                weighted. One-hot rows are plain tokens, which may require gradients (INPUT_GRAD); others ask for ACT_WRITE.
            embeddings: instead of ids, [items, length, hidden_size]. ACT_WRITE.
            attention_mask: [items, length], 0 for padding, which belongs at the end of a row.
            read: "logits" [items, length, vocabulary] (LOGITS), "embeddings" of the last layer [items, length, hidden_size]
                (EMBED_READ), and names of inner modules (ACT_READ).
            last: give the logits of so many positions at the end alone.
            interventions: changes of inner modules (ACT_WRITE), whose values may require gradients (INPUT_GRAD).
            parameters: patterns of names whose gradients `parameter_gradients` shall give (PARAM_GRAD).
        """
        given = {"ids": ids, "token_weights": token_weights, "embeddings": embeddings, "attention_mask": attention_mask}
        inputs = {name: value for name, value in given.items() if value is not None}
        return self._forward(inputs, read, interventions, parameters, last=last)

    def fine_tune(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        *,
        steps: int,
        learning_rate: float = 1e-4,
        batch_size: int = 8,
        parameters: Sequence[str] = (),
        rank: int = 0,
        seed: int = 0,
    ) -> list[float]:
        """Trains on completions (not on prompts) until `restore` or the end of the scope; the loss of each step. FINETUNE.

        `parameters` are patterns of the names that are trained, all by default. With a `rank` they get low-rank adapters (LoRA),
        which are added to them at the end, in place of being trained themselves.
        """
        arguments = {
            "prompts": list(prompts),
            "completions": list(completions),
            "steps": steps,
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "parameters": list(parameters),
            "rank": rank,
            "seed": seed,
        }
        return self._fine_tune(len(prompts), arguments)


__all__ = ["TextTarget"]
