"""float64's own rounding: each formula keeps its digits, against its value to a hundred digits."""
import math
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

import posterior
import sample
from ddpm import Schedule, linear, schedule_of
from posterior import beta_tilde, kl
from support.testing import FORMULAS, PAPER, betas, near, of_numbers, pixels

DIGITS = Context(prec=100, Emin=MIN_EMIN, Emax=MAX_EMAX)


class Precise(Decimal):
    """A number to a hundred digits, for the exact value of a rounded formula."""

    def __neg__(self):
        return Precise(DIGITS.minus(self))

    def log(self):
        return Precise(DIGITS.ln(self))

    def log1p(self):
        return (self + 1).log()

    def exp(self):
        return Precise(DIGITS.exp(self))

    def expm1(self):
        return self.exp() - 1

    def sqrt(self):
        return self ** 0.5


def to_digits(operation):
    return lambda x, y: NotImplemented if isinstance(y, np.ndarray) else Precise(
        operation(x, Decimal(y)))


for name, operation in (("add", DIGITS.add), ("sub", DIGITS.subtract), ("mul", DIGITS.multiply),
                        ("truediv", DIGITS.divide), ("pow", DIGITS.power)):
    setattr(Precise, f"__{name}__", to_digits(operation))
    setattr(Precise, f"__r{name}__", to_digits(lambda x, y, operation=operation: operation(y, x)))


precise = np.vectorize(Precise, otypes=[object])


def precise_tables(beta):
    """The schedule with exactly these betas, to a hundred digits; β_0 = 0 included."""
    alpha = 1 - precise(beta)
    alpha_bar = np.multiply.accumulate(alpha)
    return Schedule(1 - alpha, alpha, alpha_bar, 1 - alpha_bar)


@pytest.mark.parametrize("formula", [
    *FORMULAS, lambda t, schedule: sample.respaced(schedule, [0, t]).beta[1]])
@given(beta=st.lists(betas, min_size=2, max_size=12), data=st.data(), x=pixels, y=pixels, z=pixels)
@example(beta=[1e-7, 1 - 1e-7, 1e-7, 0.5], data=None, x=1.0, y=0.5, z=0.5)
@example(beta=[1e-7] * 3, data=None, x=1.0, y=0.5, z=0.5)
def test_float64_keeps_its_digits(formula, beta, data, x, y, z):
    """Rounding, Ho (2, 4, 7, 8, 9, 11, 12, 15), N5, V4, V9, V11, V12, score: each formula, for any
    schedule, against its exact value (to a hundred digits).

    The tables lose |ln ᾱ_t| roundings; the terms that cancel are as large as the formula's value
    for the signs of y and z that make it largest.
    """
    schedule = schedule_of(beta)
    exact = precise_tables(schedule.beta)
    for t in [data.draw(st.integers(1, schedule.T))] if data else range(1, schedule.T + 1):
        terms = [np.abs(of_numbers(formula, t, schedule, x, a, b))
                 for a in (y, -y) for b in (z, -z)]
        near(of_numbers(formula, t, schedule, x, y, z),
             of_numbers(formula, t, exact, *map(Precise, (x, y, z))),
             condition=1 - math.log(schedule.alpha_bar[t]), scale=np.max(terms, axis=0))


@given(pixels, st.floats(1e-6, 10), pixels, st.floats(1e-6, 10) | st.floats(-1e-6, 1e-6))
@example(0.5, 1.0, 0.5, 1e-9)
def test_kl_keeps_its_digits(m1, v1, m2, v2):
    """KL, constant, Ho (5): where the variances are nearly equal, v_1/v_2 − 1 and its logarithm
    cancel, and the rounding is that of these.
    """
    v2 = v2 if v2 > 1e-6 else v1 * (1 + v2)
    near(kl(m1, v1, m2, v2), kl(*map(Precise, (m1, v1, m2, v2))), scale=abs(v1 / v2 - 1))


def test_the_constant_and_L_T_keep_their_digits():
    """constant, Ho (5): for every t of the linear schedule, though β̃_t/β_t comes as near to 1 as
    8e-7, and 1 − ᾱ_T as near as 4e-5.
    """
    schedule, exact = linear(), precise_tables(PAPER.beta)
    lost = 1 - np.log(PAPER.alpha_bar)                            # roundings, by the tables
    for t in range(2, 1001):
        near(posterior.matching_constant(t, schedule.beta[t], schedule),
             posterior.matching_constant(t, exact.beta[t], exact), condition=lost[t],
             scale=1 - beta_tilde(t, PAPER) / PAPER.beta[t])
    near(posterior.L_T(0.5, schedule), posterior.L_T(Precise(0.5), exact), condition=lost[1000],
         scale=schedule.alpha_bar[1000])


@settings(max_examples=20)
@given(st.lists(st.floats(1e-4, 0.9), min_size=1, max_size=4), st.data(), pixels,
       st.lists(pixels, min_size=1, max_size=3))
def test_the_best_network_keeps_its_digits(beta, data, x_t, images):
    """score: best_x0, whose exponents ‖x_t − √ᾱ_t x_i‖²/(2(1−ᾱ_t)), up to 6²/2 over 1 − ᾱ_t,
    magnify the rounding of the tables.
    """
    schedule, t = schedule_of(beta), data.draw(st.integers(1, len(beta)))
    x_t, images = np.array([[x_t]]), np.reshape(images, (-1, 1))
    near(posterior.best_x0(x_t, t, images, schedule),
         posterior.best_x0(precise(x_t), t, precise(images), precise_tables(schedule.beta)),
         condition=(1 - math.log(schedule.alpha_bar[t])) * (
             1 + 18 / schedule.one_minus_alpha_bar[t]), scale=3)
