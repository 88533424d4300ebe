"""The constructions of the universality proofs, each with what it claims."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from geobased.modeling_sumformer.theory import (
    DiscreteSumformer,
    EquivariantPolynomial,
    EquivariantTerm,
    PowerSumSumformer,
    attention_as_sum,
    decode_multiset,
    decode_others,
    exact_float64_cells,
    find_collision,
    fit_equivariant_polynomial,
    latent_size_of_power_sums,
    newton_decode,
    newton_elementary,
    newton_extend,
    power_sum_jacobian_determinant,
)

from .conftest import FIXTURES


def power_sums(x: torch.Tensor, degree: int) -> torch.Tensor:
    """Numbers x [..., n] -> p_1, ..., p_degree."""
    return torch.stack([(x**power).sum(-1) for power in range(1, degree + 1)], dim=-1)


def kernel_density(x: torch.Tensor) -> torch.Tensor:
    """x [..., n, d] -> [..., n]: how many elements are near each."""
    return torch.exp(-torch.cdist(x, x).square() / 0.5).sum(-1)


# the continuous construction


def test_power_sums_have_the_reference_values():
    reference = load_file(FIXTURES / "sumformer_power_sums.safetensors")
    sumformer = PowerSumSumformer(num_elements=5, num_coordinates=2)
    assert torch.allclose(sumformer.phi(reference["x"]), reference["phi"], rtol=0, atol=1e-14)
    assert torch.allclose(sumformer.sums(reference["x"]), reference["Sigma"], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("n", "d", "expected"), [(5, 2, 20), (7, 1, 7), (4, 3, 34), (1, 3, 3)])
def test_the_latent_size_is_the_binomial(n, d, expected):
    assert PowerSumSumformer(n, d).latent_size == latent_size_of_power_sums(n, d) == math.comb(n + d, d) - 1 == expected


def test_newtons_identities():
    x = torch.tensor([1, 2, 5, -3], dtype=torch.float64)
    elementary = [sum(math.prod(c.tolist()) for c in torch.combinations(x, k)) for k in range(1, 5)]
    assert newton_elementary(power_sums(x, 4)).tolist() == elementary
    assert torch.equal(newton_extend(power_sums(x, 4), 9), power_sums(x, 9))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-8, 8), min_size=1, max_size=7, unique=True))
def test_newton_recovers_the_numbers(numbers):
    x = torch.tensor(sorted(numbers), dtype=torch.float64) / 8
    sums = power_sums(x, len(numbers))
    assert torch.allclose(newton_decode(sums), x, rtol=0, atol=1e-6)
    if len(numbers) > 1:  # what psi can do with one sum less, since it knows x_i
        assert torch.allclose(
            decode_others(x[2 % len(x)], sums[:-1]), torch.cat([x[: 2 % len(x)], x[2 % len(x) + 1 :]]), atol=1e-6
        )


def test_newton_refuses_what_are_no_power_sums_of_real_numbers():
    with pytest.raises(ValueError, match="not the power sums of 2 real numbers"):
        newton_decode(torch.tensor([0.0, -1.0], dtype=torch.float64))


def test_power_sums_of_points_recover_the_points():
    x = torch.rand(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    decoded = decode_multiset(PowerSumSumformer(4, 2).sums(x), 4, 2)
    assert torch.allclose(decoded[decoded[:, 0].argsort()], x[x[:, 0].argsort()], rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="cannot be told apart"):
        decode_multiset(PowerSumSumformer(3, 2).sums(torch.full((3, 2), 0.5, dtype=torch.float64)), 3, 2)


def test_polynomial_psi_has_the_reference_values():
    reference = load_file(FIXTURES / "sumformer_poly_target.safetensors")
    # sum of products of two others, plus x_i times the sum of the others' squares
    polynomial = EquivariantPolynomial([EquivariantTerm(0.5, (0,), ((1,), (1,))), EquivariantTerm(1.0, (1,), ((2,),))])
    x = reference["x"].unsqueeze(-1)
    assert torch.allclose(polynomial.sumformer(6)(x), reference["target"], rtol=0, atol=1e-12)
    assert torch.allclose(polynomial.evaluate(x), reference["target"], rtol=0, atol=1e-12)


exponents = st.tuples(st.integers(0, 2), st.integers(0, 2))
terms = st.builds(EquivariantTerm, st.integers(-5, 5), exponents, st.lists(exponents.filter(sum), max_size=3).map(tuple))


@settings(max_examples=30, deadline=None)
@given(st.lists(terms, min_size=1, max_size=3), st.integers(1, 5), st.integers(0, 2**31))
def test_polynomial_psi_is_exact(terms, num_elements, seed):
    # integers: any difference would show
    x = torch.randint(-4, 5, (3, num_elements, 2), generator=torch.Generator().manual_seed(seed))
    polynomial = EquivariantPolynomial(terms)
    assert torch.equal(polynomial.sumformer(num_elements)(x), polynomial.evaluate(x))


def test_in_one_dimension_n_power_sums_are_enough_for_any_degree():
    polynomial = EquivariantPolynomial(
        [EquivariantTerm(1.0, (1,), ((2,), (3,), (1,))), EquivariantTerm(-2.0, (0,), ((6,), (1,)))]
    )
    x = torch.rand(5, 4, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert polynomial.degree == 7 > 4
    assert torch.allclose(polynomial.sumformer(4)(x), polynomial.evaluate(x), rtol=0, atol=1e-12)


def test_polynomials_that_are_none_are_refused():
    with pytest.raises(ValueError, match="lengths"):
        EquivariantPolynomial([EquivariantTerm(1.0, (1,), ((1, 2),))])
    with pytest.raises(ValueError, match="exponent of another element is 0"):
        EquivariantPolynomial([EquivariantTerm(1.0, (1,), ((0,),))])


def test_the_error_of_fitted_polynomials_falls_with_the_degree():
    errors = [fit_equivariant_polynomial(kernel_density, 4, 1, degree, num_sets=500).sup_error for degree in (2, 4, 6)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 0.05
    x = torch.rand(1, 4, 1, dtype=torch.float64)
    fitted = fit_equivariant_polynomial(lambda x: x[..., 0] * x.sum((-1, -2)).unsqueeze(-1), 4, 1, 2, num_sets=50)
    assert torch.allclose(fitted(x), x[..., 0] * x.sum(), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="raise num_sets"):
        fit_equivariant_polynomial(kernel_density, 4, 2, 4, num_sets=5)


# the discontinuous construction


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6))
def test_one_integer_holds_a_set_of_cells(points):
    sumformer = DiscreteSumformer(lambda x: x, num_elements=6, num_coordinates=2, cells_per_axis=7)
    total = sum(sumformer.phi(point) for point in points)
    assert sumformer.latent_size == 1 and isinstance(total, int)
    assert sumformer.decode(total) == sorted(sumformer.cell(point) for point in points)
    x = torch.tensor(points, dtype=torch.float64)
    assert (sumformer(x) - x).abs().max() <= 0.5 / 7 + 1e-12


def test_finer_cells_come_closer():
    x = torch.rand(5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for cells in (4, 16, 64):
        errors.append((DiscreteSumformer(kernel_density, 5, 1, cells)(x) - kernel_density(x)).abs().max().item())
        # the density's slope is below 2 for each of the 4 others, and elements move by at most half a cell each
        assert errors[-1] <= 4 * 2 * 2 * 0.5 / cells
    assert errors[2] < errors[0]


def test_float64_holds_few_cells():
    assert [exact_float64_cells(n) for n in (8, 64)] == [16, 8]
    sumformer = DiscreteSumformer(lambda x: x, num_elements=8, num_coordinates=1, cells_per_axis=20)
    points = [[(cell + 0.5) / 20] for cell in (0, 3, 19)]
    rounded = int(sum(float(sumformer.phi(point)) for point in points))
    assert rounded != sum(sumformer.phi(point) for point in points)


def test_what_is_no_set_of_cells_is_refused():
    sumformer = DiscreteSumformer(lambda x: x, num_elements=2, num_coordinates=1, cells_per_axis=3)
    with pytest.raises(ValueError, match=r"no point of \[0, 1\]"):
        sumformer.phi([1.5])
    with pytest.raises(ValueError, match="27 is not the sum"):
        sumformer.decode(27)
    with pytest.raises(ValueError, match="a set of 3 elements"):
        sumformer(torch.rand(3, 1))


# one attention layer suffices


@pytest.mark.parametrize("mixer", ["softmax", "linformer", "performer"])
@pytest.mark.parametrize("aggregation", ["sum", "mean", "scaled"])
def test_one_attention_layer_is_a_given_sumformer(make_model, mixer, aggregation):
    plain = {"num_hidden_layers": 1, "use_norm": False, "use_residual": False, "aggregation": aggregation}
    model = make_model(hidden_size=3, latent_size=7, intermediate_size=9, phi_hidden_size=5, **plain)
    construction = attention_as_sum(model.layers[0].mixer, mixer, num_elements=6)
    x = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = model(inputs_embeds=x).last_hidden_state
    assert torch.allclose(construction(x), expected, rtol=0, atol=1e-12)
    assert (
        not construction.model.layers[1].mixer.q_proj.weight.any() and not construction.model.layers[1].mixer.k_proj.weight.any()
    )
    if aggregation == "mean" and mixer != "linformer":  # any number of elements
        mask = torch.tensor([[1, 1, 1, 1, 0, 0]]).expand(4, 6)
        masked = construction(x, attention_mask=mask)[:, :4]
        assert torch.allclose(masked, model(inputs_embeds=x[:, :4]).last_hidden_state, rtol=0, atol=1e-12)


def test_constructions_for_other_models_are_refused(make_model):
    mixer = make_model(hidden_size=4, phi_type="fourier").layers[0].mixer
    with pytest.raises(ValueError, match="phi_type='mlp'"):
        attention_as_sum(mixer, "softmax", 4)
    with pytest.raises(ValueError, match="mixer='sumformer' has no attention"):
        attention_as_sum(make_model(hidden_size=4).layers[0].mixer, "sumformer", 4)


# how narrow the sum can be


def smooth_phi(width: int):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, width)).double()
    return lambda x: network(4 * x.unsqueeze(-1))


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("kind", ["power sums", "network"])
def test_fewer_than_n_features_cannot_tell_all_sets_of_n_apart(n, kind):
    phi = smooth_phi(n - 1) if kind == "network" else lambda x: torch.stack([x**k for k in range(1, n)], dim=-1)
    collision = find_collision(phi, n)
    assert collision.sum_difference < 1e-12
    assert collision.distance > 0.2 / (n + 1)
    assert torch.allclose(phi(collision.first).sum(0), phi(collision.second).sum(0), rtol=0, atol=1e-12)
    # so no psi reads the largest element, or the n-th power sum, from the sum without an error
    assert collision.least_error(lambda x: (x**n).sum()) > 1e-6


def test_a_sumformer_needs_one_feature_less():
    # x_i is known to psi and shared by both sets; n - 2 features are too few for the n - 1 others, and n - 1 are enough
    collision = find_collision(smooth_phi(3), 5, num_fixed=1)
    assert collision.first[0] == collision.second[0]
    assert collision.sum_difference < 1e-12 and collision.distance > 0.04
    assert collision.least_error(lambda x: (x**4).sum()) > 1e-3
    with pytest.raises(ValueError, match="4 features for 4 free elements"):
        find_collision(smooth_phi(4), 5, num_fixed=1)


def test_n_power_sums_tell_distinct_numbers_apart():
    x = torch.rand(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: power_sums(x, 5), x)
    determinant = power_sum_jacobian_determinant(x)
    assert determinant != 0
    assert torch.allclose(torch.linalg.det(jacobian), determinant, rtol=1e-8)
