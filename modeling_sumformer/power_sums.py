# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""The continuous construction: power sums determine a set, and polynomials of them are all equivariant polynomials.

For sets of n elements x_1, ..., x_n of R^d and an exponent a of d numbers, the power sum p_a is sum_k x_k^a. The constructions
here are for float64 (or integer) tensors, and meant to be checked, not trained.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .features_sumformer import monomial_exponents, monomials

Exponent = tuple[int, ...]
# a product of the element's own powers and of power sums
Product = tuple[Exponent, tuple[Exponent, ...]]
Psi = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def latent_size_of_power_sums(num_elements: int, num_coordinates: int) -> int:
    """d' = C(n + d, d) - 1, the number of power sums of degree 1 to n."""
    return math.comb(num_elements + num_coordinates, num_coordinates) - 1


class PowerSumSumformer:
    """The Sumformer with phi(x) = (x^a) for 1 <= |a| <= degree, in lexicographic order of a.

    With `degree=None`, the number of elements, `latent_size` is C(n + d, d) - 1, and the sum determines the set
    (`decode_multiset`).

    Example:
        >>> PowerSumSumformer(num_elements=5, num_coordinates=2).latent_size
        20
    """

    def __init__(self, num_elements: int, num_coordinates: int = 1, degree: int | None = None):
        if num_elements < 1 or num_coordinates < 1 or (degree is not None and degree < 1):
            raise ValueError(f"{num_elements=}, {num_coordinates=} and {degree=} must be at least 1")
        self.exponents = monomial_exponents(num_coordinates, num_elements if degree is None else degree)

    @property
    def latent_size(self) -> int:
        return len(self.exponents)

    def phi(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n, d] -> [..., n, latent_size]."""
        return monomials(x, self.exponents)

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n, d] -> [..., latent_size]."""
        return self.phi(x).sum(-2)

    def __call__(self, x: torch.Tensor, psi: Psi) -> torch.Tensor:
        """psi(x_i, sum) for all i, where psi takes [..., n, d] and [..., latent_size]."""
        return psi(x, self.sums(x))


def newton_elementary(power_sums: torch.Tensor) -> torch.Tensor:
    """Newton's identities: p_1, ..., p_n [..., n] -> the elementary symmetric e_1, ..., e_n of the same n numbers."""
    elementary = [torch.ones_like(power_sums[..., 0])]
    for k in range(1, power_sums.shape[-1] + 1):
        terms = ((-1) ** (i - 1) * elementary[k - i] * power_sums[..., i - 1] for i in range(1, k + 1))
        elementary.append(sum(terms) / k)
    return torch.stack(elementary[1:], dim=-1)


def newton_extend(power_sums: torch.Tensor, degree: int) -> torch.Tensor:
    """p_1, ..., p_n of n numbers [..., n] -> p_1, ..., p_degree of the same numbers: a polynomial of the first n."""
    num_elements = power_sums.shape[-1]
    elementary = newton_elementary(power_sums)
    sums = list(power_sums.unbind(-1))
    while len(sums) < degree:
        sums.append(sum((-1) ** (i - 1) * elementary[..., i - 1] * sums[-i] for i in range(1, num_elements + 1)))
    return torch.stack(sums[:degree], dim=-1)


def newton_decode(power_sums: torch.Tensor, tolerance: float = 1e-6) -> torch.Tensor:
    """p_1, ..., p_n [..., n] of n real numbers -> the numbers, in ascending order [..., n].

    They are the roots of the polynomial whose coefficients Newton's identities give. Rounding errors grow with n, and more so
    where numbers are close to each other.

    Raises:
        ValueError: the decoded numbers have other power sums (by more than `tolerance`, relative to the largest): the input is
            not of n real numbers, or rounding errors have grown too large.
    """
    num_elements = power_sums.shape[-1]
    elementary = newton_elementary(power_sums)
    companion = elementary.new_zeros(*elementary.shape, num_elements)
    signs = elementary.new_tensor([(-1) ** k for k in range(num_elements)])
    companion[..., 0, :] = signs * elementary
    below = torch.arange(1, num_elements, device=power_sums.device)
    companion[..., below, below - 1] = 1
    numbers = torch.linalg.eigvals(companion).real.sort(-1).values
    again = monomials(numbers.unsqueeze(-1), monomial_exponents(1, num_elements)).sum(-2)
    error = (again - power_sums).abs().max().item() / power_sums.abs().max().clamp(min=1).item()
    if error > tolerance:
        raise ValueError(
            f"these are not the power sums of {num_elements} real numbers: the decoded numbers' differ by {error:.1e}"
        )
    return numbers


def decode_others(own: torch.Tensor, power_sums: torch.Tensor) -> torch.Tensor:
    """x_i [...] and p_1, ..., p_{n-1} [..., n - 1] of n numbers -> the n - 1 others in ascending order.

    What psi can compute from n - 1 numbers, since it knows x_i: a Sumformer on sets of n numbers needs a sum of width n - 1 only.
    """
    powers = monomials(own.unsqueeze(-1), monomial_exponents(1, power_sums.shape[-1]))
    return newton_decode(power_sums - powers)


def decode_multiset(sums: torch.Tensor, num_elements: int, num_coordinates: int, seed: int = 0) -> torch.Tensor:
    """The power sums of degree 1 to n of n distinct points of R^d [C(n + d, d) - 1] -> the points [n, d], in some order.

    Numbers t_i = u.x_i along a direction u have power sums that are linear in the points': sum_i (u.x_i)^k is the sum of
    multinomial(a) u^a p_a over |a| = k. Newton's identities give the t_i, and then sum_i t_i^k x_ic for k < n is a linear system
    for each coordinate c.

    Raises:
        ValueError: a wrong number of sums, or points that coincide or are too close to each other to be told apart.
    """
    exponents = monomial_exponents(num_coordinates, num_elements)
    if sums.shape != (len(exponents),):
        raise ValueError(f"sums of shape {tuple(sums.shape)} must be [{len(exponents)}], one for each exponent")
    index = {exponent: i for i, exponent in enumerate(exponents)}

    def moment(direction: torch.Tensor, power: int, coordinate: int | None) -> torch.Tensor:
        """sum_i (u.x_i)^power, times x_ic if a coordinate is given."""
        total = sums.new_zeros(())
        for exponent in compositions(power, num_coordinates):
            weight = math.factorial(power) / math.prod(math.factorial(a) for a in exponent)
            moved = tuple(a + (c == coordinate) for c, a in enumerate(exponent))
            power_sum = sums[index[moved]] if any(moved) else num_elements
            total = total + weight * math.prod(u**a for u, a in zip(direction, exponent, strict=True)) * power_sum
        return total

    best, best_gap = None, 0.0
    generator = torch.Generator().manual_seed(seed)
    for _ in range(16):
        direction = torch.randn(num_coordinates, generator=generator, dtype=sums.dtype)
        direction = direction / direction.norm()
        try:
            along = newton_decode(torch.stack([moment(direction, k, None) for k in range(1, num_elements + 1)]))
        except ValueError:
            continue
        gap = along.diff().min().item() if num_elements > 1 else math.inf
        if gap > best_gap:
            best, best_gap = (direction, along), gap
    if best is None or best_gap < 1e-4:
        raise ValueError(f"the points cannot be told apart: along the best of 16 directions they are {best_gap:.1e} apart")
    direction, along = best
    moments = [torch.stack([moment(direction, k, c) for k in range(num_elements)]) for c in range(num_coordinates)]
    return torch.linalg.solve(torch.vander(along, N=num_elements, increasing=True).T, torch.stack(moments, dim=-1))


def compositions(total: int, parts: int) -> Iterator[Exponent]:
    """All tuples of `parts` numbers, 0 or more, that add up to `total`."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)


def _plus(a: Exponent, b: Exponent) -> Exponent:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def sum_over_distinct(parts: tuple[Exponent, ...]) -> Counter[tuple[Exponent, ...]]:
    """sum over distinct k_1, ..., k_s of x_{k_1}^{a_1} ... x_{k_s}^{a_s} as a polynomial in power sums.

    Returns products of power sums (each a sorted tuple of exponents) and their integer coefficients. The last index runs over all
    elements, less those that the others have taken, by which the last factor joins one of theirs.
    """
    if not parts:
        return Counter({(): 1})
    *rest, last = parts
    polynomial: Counter[tuple[Exponent, ...]] = Counter()
    for product, coefficient in sum_over_distinct(tuple(rest)).items():
        polynomial[tuple(sorted((*product, last)))] += coefficient
    for taken in range(len(rest)):
        joined = (*rest[:taken], _plus(rest[taken], last), *rest[taken + 1 :])
        for product, coefficient in sum_over_distinct(joined).items():
            polynomial[product] -= coefficient
    return polynomial


@dataclass(frozen=True)
class EquivariantTerm:
    """coefficient * x_i^own * (sum over distinct k_1, ..., k_s other than i of x_{k_1}^{a_1} ... x_{k_s}^{a_s})."""

    coefficient: float
    own: Exponent
    others: tuple[Exponent, ...] = ()


class EquivariantPolynomial:
    """A permutation-equivariant polynomial map of sets, f(x)_i = the sum of some `EquivariantTerm`s.

    Every equivariant polynomial has this form: f_i is symmetric in the other elements, so that monomials which differ in the
    others' order have equal coefficients.

    Args:
        terms: own and others' exponents have one number for each coordinate; those of others are not all 0.

    Raises:
        ValueError: no terms, exponents of different lengths, or an exponent of another element that is 0.

    Example:
        >>> polynomial = EquivariantPolynomial([EquivariantTerm(1, (1,), ((2,),))])  # x_i * sum of the others' squares
        >>> polynomial.psi_terms()
        {((1,), ((2,),)): 1, ((3,), ()): -1}
    """

    def __init__(self, terms: Sequence[EquivariantTerm]):
        lengths = {len(exponent) for term in terms for exponent in (term.own, *term.others)}
        if len(lengths) != 1:
            raise ValueError(f"exponents must have one number for each coordinate, but they have lengths {sorted(lengths)}")
        if any(sum(exponent) == 0 for term in terms for exponent in term.others):
            raise ValueError(
                "an exponent of another element is 0: leave it out, and multiply the coefficient by the number of choices"
            )
        self.terms = tuple(terms)
        self.num_coordinates = lengths.pop()
        self.degree = max(sum(map(sum, (term.own, *term.others))) for term in terms)

    def evaluate(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n, d] -> [..., n], term by term as they are defined; the time grows with n to the number of others."""
        columns = []
        for i in range(x.shape[-2]):
            total = torch.zeros_like(x[..., 0, 0])
            rest = [k for k in range(x.shape[-2]) if k != i]
            for term in self.terms:
                for chosen in itertools.permutations(rest, len(term.others)):
                    factors = zip((i, *chosen), (term.own, *term.others), strict=True)
                    total = total + term.coefficient * math.prod(
                        (monomials(x[..., k, :], (exponent,))[..., 0] for k, exponent in factors), start=torch.ones_like(total)
                    )
            columns.append(total)
        return torch.stack(columns, dim=-1)

    def psi_terms(self) -> dict[Product, float]:
        """The polynomial psi(x_i, p): products of own powers and power sums, and their coefficients.

        A power sum over the others is p_a - x_i^a.
        """
        polynomial: Counter[Product] = Counter()
        for term in self.terms:
            for product, coefficient in sum_over_distinct(term.others).items():
                # which factors are -x_i^a instead of p_a
                for own_part in itertools.product((False, True), repeat=len(product)):
                    own: Exponent = term.own
                    kept: list[Exponent] = []
                    for exponent, is_own in zip(product, own_part, strict=True):
                        own, kept = (_plus(own, exponent), kept) if is_own else (own, [*kept, exponent])
                    polynomial[own, tuple(kept)] += term.coefficient * coefficient * (-1) ** sum(own_part)
        return {product: coefficient for product, coefficient in polynomial.items() if coefficient}

    def sumformer(self, num_elements: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The same map of sets of `num_elements` as a Sumformer of power sums: x [..., n, d] -> [..., n].

        phi has degree n, hence d' = C(n + d, d) - 1, if the polynomial's degree is at most n, or if d is 1 (Newton's identities
        give psi the higher power sums). Otherwise it has the polynomial's degree.
        """
        by_newton = self.num_coordinates == 1 and self.degree > num_elements
        sums = PowerSumSumformer(
            num_elements, self.num_coordinates, num_elements if by_newton else max(num_elements, self.degree)
        )
        exponents = monomial_exponents(self.num_coordinates, max(num_elements, self.degree))
        index = {exponent: i for i, exponent in enumerate(exponents)}
        terms = self.psi_terms()

        def psi(x: torch.Tensor, power_sums: torch.Tensor) -> torch.Tensor:
            if by_newton:
                power_sums = newton_extend(power_sums, self.degree)
            return evaluate_products(x, power_sums, index, terms)

        return lambda x: sums(x, psi)


def evaluate_products(
    x: torch.Tensor, power_sums: torch.Tensor, index: dict[Exponent, int], terms: dict[Product, float]
) -> torch.Tensor:
    """The sum of coefficient * x_i^own * p_a p_b ...: x [..., n, d] and power sums [..., len(index)] -> [..., n]."""
    total = torch.zeros_like(x[..., 0])
    for (own, product), coefficient in terms.items():
        value = coefficient * monomials(x, (own,))[..., 0]
        for exponent in product:
            value = value * power_sums[..., index[exponent]].unsqueeze(-1)
        total = total + value
    return total


@dataclass(frozen=True)
class FittedPolynomial:
    """An equivariant polynomial fitted to a function: its psi, and the largest error on sets that the fit has not seen."""

    sumformer: PowerSumSumformer
    terms: dict[Product, float]
    sup_error: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n, d] in [0, 1] -> [..., n]."""
        index = {exponent: i for i, exponent in enumerate(self.sumformer.exponents)}
        centred = 2 * x - 1
        return evaluate_products(centred, self.sumformer.sums(centred) / x.shape[-2], index, self.terms)


def equivariant_products(num_coordinates: int, degree: int) -> list[Product]:
    """All products of own powers and power sums of total degree at most `degree`."""
    exponents = monomial_exponents(num_coordinates, degree)

    def products_of_sums(left: int, start: int) -> Iterator[tuple[Exponent, ...]]:
        yield ()
        for i in range(start, len(exponents)):
            if sum(exponents[i]) <= left:
                for rest in products_of_sums(left - sum(exponents[i]), i):
                    yield (exponents[i], *rest)

    zero = (0,) * num_coordinates
    return [(own, product) for own in (zero, *exponents) for product in products_of_sums(degree - sum(own), 0)]


def fit_equivariant_polynomial(
    function: Callable[[torch.Tensor], torch.Tensor],
    num_elements: int,
    num_coordinates: int,
    degree: int,
    *,
    num_sets: int = 2000,
    seed: int = 0,
) -> FittedPolynomial:
    """Least squares on all equivariant polynomials of a degree: what the universality theorem says goes to 0 can be watched.

    Args:
        function: x [sets, n, d] in [0, 1] -> [sets, n], permutation equivariant.
        num_elements, num_coordinates: n and d.
        degree: total degree in the coordinates.
        num_sets: uniformly random sets to fit, and as many others on which `sup_error` is measured.
        seed: of the sets.

    Raises:
        ValueError: more coefficients than values to fit.
    """
    products = equivariant_products(num_coordinates, degree)
    if len(products) > num_sets * num_elements:
        raise ValueError(
            f"degree={degree} has {len(products)} coefficients, more than {num_sets * num_elements} values: raise num_sets"
        )
    generator = torch.Generator().manual_seed(seed)
    seen, unseen = torch.rand(2, num_sets, num_elements, num_coordinates, generator=generator, dtype=torch.float64)
    sumformer = PowerSumSumformer(num_elements, num_coordinates, degree)
    index = {exponent: i for i, exponent in enumerate(sumformer.exponents)}
    # coordinates from -1 to 1 and means instead of sums: the same polynomials, with smaller rounding errors
    centred = 2 * seen - 1
    sums = sumformer.sums(centred) / num_elements
    columns = [evaluate_products(centred, sums, index, {product: 1.0}).flatten() for product in products]
    solution = torch.linalg.lstsq(torch.stack(columns, dim=-1), function(seen).flatten().unsqueeze(-1), driver="gelsd").solution
    fitted = FittedPolynomial(sumformer, dict(zip(products, solution[:, 0].tolist(), strict=True)), math.nan)
    error = (fitted(unseen) - function(unseen)).abs().max().item()
    return FittedPolynomial(sumformer, fitted.terms, error)
