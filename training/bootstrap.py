"""Bootstrap intervals of means, and of differences between means."""

import torch


def mean_interval(values: torch.Tensor, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of values [units], units resampled.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("no values to take an interval of")
    generator = torch.Generator().manual_seed(seed)
    values = values.double().cpu()
    return _interval(values[torch.randint(len(values), (samples, len(values)), generator=generator)].mean(1))


def difference_interval(
    first: torch.Tensor, second: torch.Tensor, samples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `first` less mean of `second`, and its 95 % interval.

    Both are [runs, prompts], of the same prompts. The runs of each are resampled, and the prompts of both together: the interval
    is about other seeds and other prompts. Of few runs it is rather too narrow.

    Raises:
        ValueError: other prompts in one than in the other, or no values.
    """
    if first.shape[1] != second.shape[1] or not first.numel() or not second.numel():
        raise ValueError(f"need runs on the same prompts, got [runs, prompts] {[*first.shape]} and {[*second.shape]}")
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(first.shape[1], (samples, first.shape[1]), generator=generator)

    def means(runs: torch.Tensor) -> torch.Tensor:
        chosen = torch.randint(len(runs), (samples, len(runs)), generator=generator)
        weights = torch.nn.functional.one_hot(chosen, len(runs)).double().mean(1)
        return (weights @ runs.double()).gather(1, prompts).mean(1)

    difference = (first.double().mean() - second.double().mean()).item()
    return difference, *_interval(means(first) - means(second))


def _interval(draws: torch.Tensor) -> tuple[float, float]:
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


__all__ = ["difference_interval", "mean_interval"]
