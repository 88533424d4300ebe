"""Which of a prompt's completions SuperHF trains on, and the checks of what reward functions return."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from trl.trainer.utils import get_callable_name, is_async_callable

CompletionFilter = Callable[[torch.Tensor], torch.Tensor]


def top_k_filter(scores: torch.Tensor, top_k: int, threshold: float | None = None) -> torch.Tensor:
    """The `top_k` best of each row of scores [prompts, completions] as a boolean mask; of equal ones the first.

    NaN is never kept, nor is a score below the threshold, so that a row may keep fewer.
    """
    eligible = ~scores.isnan()
    if threshold is not None:
        eligible &= scores >= threshold
    # two stable sorts put the eligible ones first, and keep -inf apart from what is excluded
    order = scores.nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, eligible.gather(1, order).int().argsort(dim=1, descending=True, stable=True))
    mask = torch.zeros_like(eligible).scatter_(1, order[:, :top_k], True)
    return mask & eligible


def select_completions(scores: torch.Tensor, completion_filter: CompletionFilter) -> torch.Tensor:
    """Boolean mask of the completions to train on, from scores [prompts, completions]; excluded ones (NaN) stay excluded.

    Raises:
        ValueError: the filter does not return a boolean tensor of the scores' shape.
    """
    mask = completion_filter(scores.clone())
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.shape != scores.shape:
        got = f"a {mask.dtype} tensor of shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else repr(mask)
        raise ValueError(f"completion_filter must return a boolean tensor of the scores' shape {tuple(scores.shape)}, got {got}")
    return mask.to(scores.device) & ~scores.isnan()


def penalized_scores(rewards: torch.Tensor, lengths: torch.Tensor, length_penalty: float) -> torch.Tensor:
    """Rewards less `length_penalty` times the logarithm of the completions' lengths in characters; all [completions]."""
    return rewards - length_penalty * lengths.clamp(min=1).to(rewards.dtype).log()


def trim_completion(text: str, stop_regex: str) -> str:
    """A completion up to the first match of `stop_regex`, without white space around it but for one leading character."""
    trimmed = re.split(stop_regex, text, maxsplit=1)[0].strip()
    return text[0] + trimmed if trimmed and text[0].isspace() else trimmed


def checked_reward_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose errors and whose results that are no list of numbers or None raise an error that names it.

    Raises (when called):
        RuntimeError: the function raised.
        ValueError: another number of rewards than completions, or a NaN.
        TypeError: rewards that are no numbers.
    """
    name = get_callable_name(function)
    # functools.wraps finds no name on a partial or an instance
    wrapped = functools.wraps(function, updated=())
    if is_async_callable(function):

        async def checked_async(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
            try:
                rewards = await function(prompts=prompts, completions=completions, **columns)
            except Exception as error:
                raise _failed(name, completions, error) from error
            return _checked_rewards(name, completions, rewards)

        checked_async.__name__ = name
        return wrapped(checked_async)

    def checked(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        try:
            rewards = function(prompts=prompts, completions=completions, **columns)
        except Exception as error:
            raise _failed(name, completions, error) from error
        return _checked_rewards(name, completions, rewards)

    checked.__name__ = name
    return wrapped(checked)


def _failed(name: str, completions: Sequence[Any], error: Exception) -> RuntimeError:
    return RuntimeError(
        f"the reward function {name!r} raised {type(error).__name__}: {error}. It was called with {len(completions)} "
        f"completions, the first being {completions[0]!r}; it must return a number or None for each"
    )


def _checked_rewards(name: str, completions: Sequence[Any], rewards: Any) -> list[float | None]:
    if isinstance(rewards, torch.Tensor):
        rewards = rewards.flatten().tolist()
    try:
        values = [None if reward is None else float(reward) for reward in rewards]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"the reward function {name!r} must return a list of numbers or None, one for each completion, got {rewards!r}"
        ) from error
    if len(values) != len(completions):
        raise ValueError(
            f"the reward function {name!r} returned {len(values)} rewards for {len(completions)} completions: it must return "
            "one for each"
        )
    for completion, value in zip(completions, values, strict=True):
        if value is not None and value != value:
            raise ValueError(
                f"the reward function {name!r} returned NaN for the completion {completion!r}: return None for a completion "
                "that it cannot score"
            )
    return values


__all__ = [
    "CompletionFilter",
    "checked_reward_function",
    "penalized_scores",
    "select_completions",
    "top_k_filter",
    "trim_completion",
]
