"""The scalar maths against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from metaopt.numerics import one_minus_power, rectification, safe_sqrt

F64 = torch.float64
EPS = torch.finfo(F64).eps
BETAS = [0.1, 0.35, 0.5, 0.6, 0.67, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999, 1 - 1e-5, 1 - 1e-6, 1 - 1e-7]
STEPS = [1, 2, 3, 4, 5, 6, 7, 10, 100, 1000]


def scalar(x: float) -> Tensor:
    return torch.tensor(x, dtype=F64)


def rho(beta2: Fraction, step: int) -> tuple[Fraction, Fraction]:
    """rho_t and rho_inf."""
    rho_inf = 2 / (1 - beta2) - 1
    power = beta2**step
    return rho_inf - 2 * step * power / (1 - power), rho_inf


def squared_factor(beta2: Fraction, step: int) -> Fraction:
    """r_t squared, a rational number."""
    rho_t, rho_inf = rho(beta2, step)
    return (rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t)


def exact_sqrt(x: Fraction) -> float:
    """Correct to the last bit or two, also where a float of ``x`` alone would not do."""
    scale = 10**60
    return float(Fraction(math.isqrt(x.numerator * scale**2 // x.denominator), scale))


class TestOneMinusPower:
    @pytest.mark.parametrize("beta", BETAS)
    def test_equals_the_rational_number_to_a_few_units_in_the_last_place(self, beta: float) -> None:
        for step in STEPS:
            expected = float(1 - Fraction(beta) ** step)
            got = one_minus_power(scalar(beta), torch.tensor(step)).item()
            assert abs(got - expected) <= 4 * EPS * expected, step

    @pytest.mark.parametrize("beta", BETAS)
    def test_its_derivative_is_minus_t_beta_to_the_t_minus_1(self, beta: float) -> None:
        for step in STEPS:
            b = scalar(beta).requires_grad_()
            (slope,) = torch.autograd.grad(one_minus_power(b, torch.tensor(step)), b)
            expected = float(-step * Fraction(beta) ** (step - 1))
            # expm1 has the derivative expm1 + 1, right to a few units of 1; its argument, to a few of t log(beta).
            relative = (4 + step * -math.log(beta)) * EPS
            assert abs(slope.item() - expected) <= relative * abs(expected) + 4 * EPS * step / beta, step

    @pytest.mark.parametrize("beta", [1e-300, 1e-17, 1e-9, 1e-3, 0.4, 0.5])
    def test_below_one_half_its_derivative_is_right_to_a_few_units_in_the_last_place(self, beta: float) -> None:
        """expm1 + 1 would have lost it: at 1e-17 and step 1 it is 0 in place of beta."""
        for step in (1, 2, 3):
            b = scalar(beta).requires_grad_()
            (slope,) = torch.autograd.grad(one_minus_power(b, torch.tensor(step)), b)
            expected = float(-step * Fraction(beta) ** (step - 1))
            assert abs(slope.item() - expected) <= 4 * EPS * abs(expected), step

    @pytest.mark.parametrize("step", [1, 2, 3, 10])
    def test_at_beta_0_it_is_1_with_the_polynomials_derivatives(self, step: int) -> None:
        b = torch.zeros((), dtype=F64, requires_grad=True)
        value = one_minus_power(b, torch.tensor(step, dtype=F64))
        (first,) = torch.autograd.grad(value, b, create_graph=True)
        assert value == 1
        assert first == (-1 if step == 1 else 0)
        if step > 1:
            (second,) = torch.autograd.grad(first, b)
            assert second == (-2 if step == 2 else 0)

    def test_a_batch_is_treated_element_by_element(self) -> None:
        betas = torch.tensor([0.0, 0.5, 0.999], dtype=F64, requires_grad=True)
        together = one_minus_power(betas, torch.tensor(3.0))
        alone = torch.stack([one_minus_power(beta, torch.tensor(3.0)) for beta in betas])
        assert torch.equal(together, alone)
        (slopes,) = torch.autograd.grad(together.sum(), betas)
        assert torch.equal(slopes, torch.autograd.grad(alone.sum(), betas)[0])


class TestRectification:
    @pytest.mark.parametrize("beta2", [0.0, *BETAS])
    def test_the_first_rectified_step_is_the_exact_one(self, beta2: float) -> None:
        for step in range(1, 40):
            expected = rho(Fraction(beta2), step)[0] > 5
            assert bool(rectification(scalar(beta2), torch.tensor(step))[0]) == expected, step

    def test_it_is_so_for_every_beta2_up_to_1_minus_1e_7(self) -> None:
        """As beta2 nears 1, rho_5 nears 5 from below, while its terms grow to 1e7."""
        exponents = torch.empty(2000, dtype=F64).uniform_(-7, -1)
        betas = 1 - 10**exponents
        for step in (5, 6):
            got = rectification(betas, torch.tensor(step))[0].tolist()
            assert got == [rho(Fraction(beta), step)[0] > 5 for beta in betas.tolist()]

    @pytest.mark.parametrize("beta2", [beta for beta in BETAS if beta >= 0.7])
    def test_the_factor_is_exact_up_to_the_cancellation_in_rho(self, beta2: float) -> None:
        """rho_t is a difference of numbers of the size of rho_inf, each of them right to a few units."""
        for step in range(6, 60):
            rho_t, rho_inf = rho(Fraction(beta2), step)
            if rho_t <= 5:
                continue
            got = rectification(scalar(beta2), torch.tensor(step))[1].item()
            expected = exact_sqrt(squared_factor(Fraction(beta2), step))
            assert abs(got - expected) <= 4 * EPS * float(rho_inf / (rho_t - 4)) * expected, step

    @pytest.mark.parametrize("beta2", [beta for beta in BETAS if beta >= 0.7])
    def test_its_derivative_is_that_of_the_rational_formula(self, beta2: float) -> None:
        """The difference quotient is taken in exact arithmetic, so that its step may be 1e-25 of 1 - beta2."""
        exact = Fraction(beta2)
        h = (1 - exact) / 10**25
        for step in (6, 8, 12, 40):
            rho_t, rho_inf = rho(exact, step)
            if rho_t <= 5:
                continue
            slope = (squared_factor(exact + h, step) - squared_factor(exact - h, step)) / (2 * h)
            expected = float(slope) / (2 * exact_sqrt(squared_factor(exact, step)))
            b = scalar(beta2).requires_grad_()
            (got,) = torch.autograd.grad(rectification(b, torch.tensor(step))[1], b)
            cancellation = float(rho_inf / (rho_t - 4))
            assert abs(got.item() - expected) <= (8 * cancellation * abs(expected) + 512) * EPS, step

    @pytest.mark.parametrize("beta2", [0.0, 1 / 3, 0.5, 0.6, 2 / 3, 0.9, 0.999])
    def test_an_unrectified_step_has_the_factor_1_with_derivative_0(self, beta2: float) -> None:
        """Where the root's argument would be negative or 0 / 0."""
        for step in (1, 2, 3, 4, 5):
            b = scalar(beta2).requires_grad_()
            rectified, factor = rectification(b, torch.tensor(step))
            first, *_ = torch.autograd.grad(factor, b, create_graph=True)
            assert not rectified
            assert factor == 1
            assert first == 0

    def test_a_batch_may_mix_rectified_and_other_steps(self) -> None:
        steps = torch.arange(1, 12, dtype=F64)
        beta2 = scalar(0.9).requires_grad_()
        rectified, factors = rectification(beta2, steps)
        assert rectified.tolist() == [step > 5 for step in steps]
        (slope,) = torch.autograd.grad(factors.sum(), beta2)
        alone = [rectification(beta2, step)[1] for step in steps]
        torch.testing.assert_close(slope, torch.autograd.grad(sum(alone), beta2)[0], rtol=1e-14, atol=0)


class TestSafeSqrt:
    def test_it_is_the_square_root(self) -> None:
        x = torch.tensor([0.0, 1e-300, 2.0, 1e300], dtype=F64)
        assert torch.equal(safe_sqrt(x), x.sqrt())

    def test_above_0_its_derivatives_are_the_square_roots(self) -> None:
        x = torch.tensor([1e-3, 0.5, 2.0], dtype=F64, requires_grad=True)
        (first,) = torch.autograd.grad(safe_sqrt(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        torch.testing.assert_close(first, 0.5 * x**-0.5, rtol=1e-14, atol=0)
        torch.testing.assert_close(second, -0.25 * x**-1.5, rtol=1e-14, atol=0)

    def test_at_0_its_derivatives_of_both_orders_and_modes_are_0(self) -> None:
        x = torch.zeros(2, dtype=F64, requires_grad=True)
        (first,) = torch.autograd.grad(safe_sqrt(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, materialize_grads=True)
        assert first.tolist() == second.tolist() == [0, 0]
        assert torch.func.jvp(safe_sqrt, (x.detach(),), (torch.ones_like(x),))[1].tolist() == [0, 0]
