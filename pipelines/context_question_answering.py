"""Questions about a text, answered by a causal language model that reads the text once."""

import copy
from collections import defaultdict
from typing import Any

import torch
from transformers import Pipeline


class ContextQuestionAnsweringPipeline(Pipeline):
    """Answers questions from a context with any causal language model, by greedy decoding up to the end of the line.

    The context is read once; its cache is copied for each question. A BASED model's state has a constant size, so a context of
    any length costs its questions the same. Questions of equal length in tokens are answered as one batch, which is exact: no
    padding stands between the context and the question.

    Call it with `context` and `question` (a string or a list of strings), with a dictionary of the two, or with a list of such
    dictionaries. The result for a question is `{"question", "answer", "score"}`, score being the probability that the model
    gives to the answer's tokens; for a list of questions a list of them.

    Parameters (of the call or of `pipeline(...)`):
        question_template: text that follows the context; `{question}` stands for the question.
        max_new_tokens: most tokens of an answer.

    Example:

    ```python
    >>> import geobased
    >>> from transformers import pipeline
    >>> reader = pipeline("context-question-answering", model=geobased.checkpoint_path("based-mini"))
    >>> reader(context="The population of Lund is 94,393.", question="What is the population of Lund?")["answer"]
    '94,393'
    ```
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def _sanitize_parameters(
        self, question_template: str | None = None, max_new_tokens: int | None = None, **unknown: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise ValueError(
                f"unknown parameter {next(iter(unknown))!r}: this pipeline takes question_template and max_new_tokens"
            )
        if question_template is not None and "{question}" not in question_template:
            raise ValueError(f"question_template={question_template!r} does not say where the {{question}} stands")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        preprocess = {} if question_template is None else {"question_template": question_template}
        return preprocess, {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}, {}

    def __call__(  # type: ignore[override]
        self,
        inputs: dict[str, Any] | list[dict[str, Any]] | None = None,
        *,
        context: str | None = None,
        question: str | list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        if inputs is None:
            if context is None or question is None:
                raise ValueError("give context= and question=, or a dictionary of both")
            inputs = {"context": context, "question": question}
        elif context is not None or question is not None:
            raise ValueError("give either a dictionary or context= and question=, not both")
        if kwargs.get("batch_size", 1) > 1:
            raise ValueError("batch_size: questions of one context are batched by themselves; several contexts are not")
        return super().__call__(inputs, **kwargs)

    def preprocess(  # type: ignore[override]
        self, inputs: dict[str, Any], question_template: str = "Question: {question} Answer:"
    ) -> dict[str, Any]:
        if not isinstance(inputs, dict) or not {"context", "question"} <= inputs.keys():
            raise ValueError(f"an input is a dictionary with context and question, not {inputs!r:.80}")
        context, question = inputs["context"], inputs["question"]
        questions = [question] if isinstance(question, str) else list(question)
        if not context.strip():
            raise ValueError("the context is empty: give the text to answer from")
        if not questions or not all(text.strip() for text in questions):
            raise ValueError(f"question={question!r} is empty")
        prompts = [question_template.replace("{question}", text) for text in questions]
        return {
            "context_ids": self.tokenizer(context.rstrip() + "\n", return_tensors="pt").input_ids,
            "prompt_ids": [self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids for prompt in prompts],
            "questions": questions,
            "single": isinstance(question, str),
        }

    def _forward(self, model_inputs: dict[str, Any], max_new_tokens: int = 32) -> dict[str, Any]:  # type: ignore[override]
        context, prompts = model_inputs["context_ids"], model_inputs["prompt_ids"]
        cache = self.model(context, use_cache=True, logits_to_keep=1).past_key_values
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            by_length[prompt.shape[1]].append(index)
        answers: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(prompts)
        for indices in by_length.values():
            state = copy.deepcopy(cache)
            if len(indices) > 1:
                state.batch_repeat_interleave(len(indices))
            ids = torch.cat([context.expand(len(indices), -1), torch.cat([prompts[i] for i in indices])], dim=1)
            result = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=state,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                stop_strings=["\n"],
                tokenizer=self.tokenizer,
                pad_token_id=self._padding_id(),
                return_dict_in_generate=True,
                output_logits=True,
            )
            tokens = result.sequences[:, ids.shape[1] :]
            log_probabilities = torch.stack(result.logits, dim=1).float().log_softmax(-1)
            chosen = log_probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
            for row, index in enumerate(indices):
                answers[index] = (tokens[row], chosen[row])
        return {"answers": answers, "questions": model_inputs["questions"], "single": model_inputs["single"]}

    def _padding_id(self) -> int:
        if self.tokenizer.pad_token_id is not None:
            return self.tokenizer.pad_token_id
        end = self.model.generation_config.eos_token_id
        return end[0] if isinstance(end, list) else (end if end is not None else 0)

    def postprocess(self, model_outputs: dict[str, Any]) -> Any:  # type: ignore[override]
        results = []
        for question, (tokens, log_probabilities) in zip(model_outputs["questions"], model_outputs["answers"], strict=True):
            length = self._answer_length(tokens.tolist())
            text = self.tokenizer.decode(tokens[:length], skip_special_tokens=True).split("\n")[0].strip()
            score = log_probabilities[:length].sum().exp().item()
            results.append({"question": question, "answer": text, "score": score})
        return results[0] if model_outputs["single"] else results

    def _answer_length(self, tokens: list[int]) -> int:
        """Tokens before the one that ends the line or the text."""
        special = set(self.tokenizer.all_special_ids)
        for i, token in enumerate(tokens):
            if token in special or "\n" in self.tokenizer.decode([token]):
                return i
        return len(tokens)


__all__ = ["ContextQuestionAnsweringPipeline"]
