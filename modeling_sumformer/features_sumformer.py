# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""phi, what a Sumformer sums: an MLP, Fourier features, monomials or a linear map of each element."""

import functools

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_sumformer import SumformerConfig


@functools.lru_cache(maxsize=64)
def _exponents(num_variables: int, degree: int) -> tuple[tuple[int, ...], ...]:
    if num_variables == 0:
        return ((),)
    return tuple((first, *rest) for first in range(degree + 1) for rest in _exponents(num_variables - 1, degree - first))


def monomial_exponents(num_variables: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """Exponents a with 1 <= a_1 + ... + a_d <= degree in lexicographic order: C(degree + d, d) - 1 of them."""
    return _exponents(num_variables, degree)[1:]


def monomials(x: torch.Tensor, exponents: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """x [..., d] -> [..., len(exponents)], the product of x_c ** a_c over the d coordinates for each tuple a."""
    highest = max(max(powers) for powers in exponents)
    powers = [torch.ones_like(x), x]
    for _ in range(highest - 1):
        powers.append(powers[-1] * x)
    table = torch.stack(powers, dim=-2)
    return functools.reduce(
        torch.mul, (table[..., [a[variable] for a in exponents], variable] for variable in range(x.shape[-1]))
    )


class SumformerMLPFeatures(nn.Module):
    def __init__(self, config: SumformerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.phi_hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.phi_hidden_size, config.latent_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act_fn(self.fc1(x)))


class SumformerFourierFeatures(nn.Module):
    """Cosines and sines of learned frequencies: sums of them are inner products of shift-invariant kernels."""

    def __init__(self, config: SumformerConfig):
        super().__init__()
        self.frequencies = nn.Linear(config.hidden_size, config.latent_size // 2, bias=False)
        # uniform with a variance of fourier_scale^2 / fan-in
        self.frequencies.initial_scale = 3**0.5 * config.fourier_scale  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        phases = self.frequencies(x)
        return torch.cat([phases.cos(), phases.sin()], dim=-1)


class SumformerPolynomialFeatures(nn.Module):
    """All monomials of degree 1 to `phi_degree` of `phi_variables` linear functions of an element."""

    def __init__(self, config: SumformerConfig):
        super().__init__()
        self.variables = nn.Linear(config.hidden_size, config.phi_variables, bias=False)
        self.exponents = monomial_exponents(config.phi_variables, config.phi_degree)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return monomials(self.variables(x), self.exponents)


class SumformerLinearFeatures(nn.Linear):
    def __init__(self, config: SumformerConfig):
        super().__init__(config.hidden_size, config.latent_size)


PHI_CLASSES: dict[str, type[nn.Module]] = {
    "mlp": SumformerMLPFeatures,
    "fourier": SumformerFourierFeatures,
    "polynomial": SumformerPolynomialFeatures,
    "linear": SumformerLinearFeatures,
}
