# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""The constructions of the universality proofs (Alberti et al. 2023), as code that runs and can be checked.

- `PowerSumSumformer`, `newton_decode`, `decode_multiset`: power sums of degree 1 to n determine a set, d' = C(n + d, d) - 1
- `EquivariantPolynomial`: every equivariant polynomial is a polynomial psi of x_i and the power sums, exactly;
  `fit_equivariant_polynomial` measures how well they approximate a function
- `DiscreteSumformer`: with discontinuous phi and psi one number is enough, d' = 1
- `attention_as_sum`: one attention layer of a Transformer, Linformer or Performer implements a given Sumformer
- `find_collision`, `decode_others`: how narrow the sum can be

docs/sumformer.md has the statements, and what is and is not proven.
"""

from .attention_as_sum import AttentionConstruction, attention_as_sum
from .discretisation import DiscreteSumformer, exact_float64_cells
from .lower_bound import Collision, find_collision, power_sum_jacobian_determinant
from .power_sums import (
    EquivariantPolynomial,
    EquivariantTerm,
    FittedPolynomial,
    PowerSumSumformer,
    decode_multiset,
    decode_others,
    fit_equivariant_polynomial,
    latent_size_of_power_sums,
    newton_decode,
    newton_elementary,
    newton_extend,
)

__all__ = [
    "AttentionConstruction",
    "Collision",
    "DiscreteSumformer",
    "EquivariantPolynomial",
    "EquivariantTerm",
    "FittedPolynomial",
    "PowerSumSumformer",
    "attention_as_sum",
    "decode_multiset",
    "decode_others",
    "exact_float64_cells",
    "find_collision",
    "fit_equivariant_polynomial",
    "latent_size_of_power_sums",
    "newton_decode",
    "newton_elementary",
    "newton_extend",
    "power_sum_jacobian_determinant",
]
