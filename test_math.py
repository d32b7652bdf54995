"""The second half of the reference: every "it can be shown" of the paper, shown.

In the paper's order, each test titled by its claim and shown by another road than the code's.

Most claims are identities between rational functions of √ᾱ_t, √(1−ᾱ_t), x and ε.  They are proved
with the shipped functions themselves, with == and no tolerance, on numbers that know their root:
with √ᾱ_t = (1−m²)/(1+m²), and so √(1−ᾱ_t) = 2m/(1+m²), for rational 0 < m_1 < m_2 < … < 1 every
coefficient is a rational number.  Each claim is tried first on a dozen schedules with numbers that
can be checked on paper, and then proved: an identity of degree d that is false holds at a point
drawn from N values a variable with probability at most d/N (Schwartz, Zippel).  Here N = 2³²,
d < 1000, and each is tried at 60 points: what passes is false with probability below 10^−390.

What is left is shown numerically, with a tolerance that is derived where it is used: logarithms,
integrals, float64's own rounding of each formula, and PyTorch, held against NumPy on every device
that is here.

`pytest` takes the same examples each time; `pytest --hypothesis-profile=deep` hunts with thousands.
"""
import copy
import math
import random
import re
from dataclasses import replace
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import nn

import ddpm
import posterior
import sample
import train
from ddpm import (Schedule, cosine, draw, linear, log_normal, q_marginal, q_step, schedule_of)
from posterior import A1, A2, C, beta_tilde, kl, reverse_mean, reverse_step
from support.config import Config, Sampling
from support.data import split
from support.run import Run
from unet import UNet

# ── What is drawn, and how near is near ───────────────────────────────────────────────────────────

ROUNDING = 1e-12           # a few thousand roundings of 2⁻⁵²: the longest sums here have 1000 terms


def near(found, claimed, condition=1.0, scale=0.0):
    """|found − claimed| ≤ ROUNDING · condition · max(|claimed|, scale).

    condition: how much the formula magnifies the rounding of its inputs.  scale: the size of terms
    that cancel in it.  Both are derived where they are used, and nothing else is ever loosened.
    """
    __tracebackhide__ = True
    found, claimed, scale, condition = np.broadcast_arrays(
        *(np.asarray(value, float) for value in (found, claimed, scale, condition)))
    error, size = np.abs(found - claimed), np.maximum(np.abs(claimed), scale)
    for k in np.argwhere(~(error <= ROUNDING * condition * size))[:1]:
        k = tuple(k)
        digits = -math.log10(max(error[k], 1e-300) / max(size[k], 1e-300))
        raise AssertionError(
            f"found {found[k]}, the claim says {claimed[k]}: {max(digits, 0):.0f} digits agree" + (
                "; right, but it loses digits where numbers nearly cancel: take 1 − ᾱ_t from the "
                "table, log1p, expm1" if digits > 6 else ""))


def tables(beta):
    """A schedule that owes nothing to ddpm.py: ᾱ_t as a product, 1 − ᾱ_t as a variance grows."""
    beta = np.concatenate([[0.0], beta])
    variance = np.zeros(len(beta))
    for t in range(1, len(beta)):
        variance[t] = (1 - beta[t]) * variance[t - 1] + beta[t]
    return Schedule(beta, 1 - beta, np.cumprod(1 - beta), variance)


def evenly(T, beta_1, beta_T):
    return tables(np.linspace(beta_1, beta_T, T))


betas = st.floats(1e-7, 1 - 1e-7) | st.floats(-16, -0.001).map(math.exp)
schedules = (st.lists(betas, min_size=1, max_size=30)
             | st.builds(np.linspace, st.floats(1e-6, 0.01), st.floats(0.01, 0.5),
                         st.integers(1, 1000))).map(tables)
pixels = st.floats(-3, 3).map(lambda x: round(x, 9))            # whose squares do not underflow
images = arrays(np.float64, array_shapes(max_dims=3, max_side=3), elements=pixels)

ONE_STEP = tables([0.3])
EXTREMES = tables([1e-7, 1 - 1e-7, 1e-7, 0.5])
PAPER = evenly(1000, 1e-4, 0.02)


@st.composite
def moments(draw_from, first=1):
    """A schedule and a time in first..T."""
    schedule = draw_from(schedules)
    return schedule, draw_from(st.integers(first, schedule.T))


def any_moment(*others):
    """The edges, beside what @given draws: T = 1, t = 1, t = T, β near 0 and near 1."""
    def add(test):
        for schedule, t in ((ONE_STEP, 1), (EXTREMES, 1), (EXTREMES, 4), (PAPER, 1), (PAPER, 1000)):
            test = example((schedule, t), *others)(test)
        return test
    return add


def grid(mean, variance, points=4001, widths=12):
    """Points and the width of their cells, wide enough around a Gaussian for 1e-12."""
    x = np.linspace(-widths, widths, points) * math.sqrt(variance) + mean
    return x, x[1] - x[0]


# ── Exact arithmetic ──────────────────────────────────────────────────────────────────────────────

class Exact(Fraction):
    """A rational number that has its root, if that is rational too, and the logarithm of 1.

    NumPy's functions call these methods, so numpy.sqrt(x), np.sqrt(x) and x ** 0.5 are exact.
    """

    def sqrt(self):
        found = Fraction(math.isqrt(self.numerator), math.isqrt(self.denominator))
        assert found ** 2 == self, f"{self} is no square"
        return Exact(found)

    def log(self):
        assert self == 1, f"ln {self} is not rational"
        return Exact(0)

    def log1p(self):
        return (self + 1).log()

    def __float__(self):
        raise TypeError("a float among exact numbers: write sqrt(x), and ½ as / 2")

    def __repr__(self):
        return str(self)


def keep_kind(name):
    """Arithmetic whose result is of the class of its operands; a float is refused."""
    def method(self, other=0, *more):
        if name == "__pow__" and other == 0.5:
            return self.sqrt()
        if isinstance(other, float):                    # a whole one, as √0 = 0.0 is, is exact
            whole = other == round(other) or isinstance(self, Precise)
            other = Fraction(other) if whole else float(self)
        found = getattr(Fraction, name)(self, *([] if name in ("__neg__", "__abs__") else [other]))
        return type(self)(found) if isinstance(found, Fraction) else found
    return method


for operator in ("add", "sub", "mul", "truediv", "radd", "rsub", "rmul", "rtruediv", "pow", "neg",
                 "abs"):
    setattr(Exact, f"__{operator}__", keep_kind(f"__{operator}__"))


class Precise(Exact):
    """The same to a hundred digits, with all functions: the exact value of a rounded formula."""

    __float__ = Fraction.__float__

    def to_digits(self, function):
        with localcontext(prec=100):
            return Precise(function(Decimal(self.numerator) / Decimal(self.denominator)))

    def sqrt(self):
        return self.to_digits(Decimal.sqrt)

    def log(self):
        return self.to_digits(Decimal.ln)

    def exp(self):
        return self.to_digits(Decimal.exp)

    def expm1(self):
        return self.exp() - 1


def rational(m):
    """The schedule with √ᾱ_t = (1 − m_t²)/(1 + m_t²), for m_0 = 0 and rational m_t."""
    alpha_bar = [((1 - x ** 2) / (1 + x ** 2)) ** 2 for x in m]
    alpha = [Exact(1)] + [after / before for before, after in zip(alpha_bar, alpha_bar[1:])]
    return Schedule([1 - a for a in alpha], alpha, alpha_bar, [1 - a for a in alpha_bar])


def exactly(first=1):
    """claim(schedule, t, number), in exact arithmetic: any schedule of `first` to 6 steps, any t
    from `first` to T, and number() → any number, drawn evenly from N values: from a few, twelve
    times, so that what is wrong fails on numbers for paper and pencil, and then from 2³².
    """
    def prove(claim):
        def proved():
            __tracebackhide__ = True
            for seed in range(12 + settings().max_examples):
                rng, drawn = random.Random(seed), []
                if seed < 12:                               # √ᾱ = 4/5, 3/5, 5/13
                    m = sorted(rng.sample([Exact(1, 3), Exact(1, 2), Exact(2, 3)],
                                          rng.randint(first, 3)))
                else:
                    parts = [rng.randint(1, 2 ** 32) for _ in range(rng.randint(first, 6) + 1)]
                    m = [Exact(sum(parts[:k]), sum(parts)) for k in range(1, len(parts))]
                schedule, t = rational([Exact(0), *m]), rng.randint(first, len(m))

                def number():
                    drawn.append(Exact(rng.choice([-3, -2, -1, 1, 2, 3])) if seed < 12 else
                                 Exact(rng.randint(1, 2 ** 32) - 2 ** 31, 10 ** 6))
                    return drawn[-1]
                try:
                    claim(schedule, t, number)
                except (AssertionError, TypeError) as wrong:
                    what = re.sub("^assert (.+) == (.+)$", r"found \1, the claim says \2",
                                  str(wrong).split("\n")[0])
                    alphas = ", ".join(f"α_{k} = {a}" for k, a in enumerate(schedule.alpha) if k)
                    given_numbers = f", numbers {', '.join(map(str, drawn))}" if drawn else ""
                    raise AssertionError(f"{claim.__doc__.split(':')[0]} at t = {t}, {alphas}"
                                         f"{given_numbers}: {what}") from None
        for name in ("__name__", "__qualname__", "__doc__", "__module__"):
            setattr(proved, name, getattr(claim, name))
        proved.claim = claim
        return proved
    return prove


def best_eps(x_t, t, m, s2, schedule):
    """The best noise prediction for data from N(m, s²), in closed form; in whatever arithmetic."""
    return schedule.one_minus_alpha_bar[t] ** 0.5 * (x_t - schedule.alpha_bar[t] ** 0.5 * m) / (
        schedule.alpha_bar[t] * s2 + schedule.one_minus_alpha_bar[t])


# ── Schedules ─────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(betas, min_size=1, max_size=30) | st.just([1e-7, 1 - 1e-7, 1e-7, 0.5]))
def test_alpha_bar_is_the_exact_product(beta):
    """Ho (4), N2: ᾱ_t = ∏ (1 − β_s) and 1 − ᾱ_t, by exact fractions; index 0 is the clean image."""
    schedule, product = schedule_of(beta), Fraction(1)
    assert schedule.beta.tolist() == [0, *beta] and schedule.T == len(beta)
    assert schedule.alpha[0] == schedule.alpha_bar[0] == 1 and schedule.one_minus_alpha_bar[0] == 0
    for t in range(1, schedule.T + 1):
        product *= 1 - Fraction(schedule.beta[t])
        near(schedule.alpha[t], float(1 - Fraction(schedule.beta[t])))
        near(schedule.alpha_bar[t], float(product), condition=1 - math.log(product))
        near(schedule.one_minus_alpha_bar[t], float(1 - product))


def test_linear_goes_from_beta_1_to_beta_T():
    """Ho section 4, linear: β_1 = 1e-4 to β_T = 0.02 in 1000 equal steps."""
    schedule = linear()
    assert schedule.T == 1000
    near([schedule.beta[1], schedule.beta[1000]], [1e-4, 0.02])
    near(np.diff(schedule.beta[1:]), 0.0199 / 999, condition=0.02 / (0.0199 / 999))
    for found, expected in zip(schedule, PAPER):
        near(found, expected, condition=10)
    assert linear(1, 0.3, 0.4).beta.tolist() == [0, 0.3] and linear(1_000_000).T == 1_000_000


def test_cosine_has_its_published_values():
    """cosine: ᾱ_t = f(t)/f(0) up to the one clipped step; β_1 = 4.1284e-5, ᾱ_T = 2.4288e-9."""
    schedule = cosine(1000)
    assert schedule.beta[1] == pytest.approx(4.1284e-5, rel=1e-5)
    assert schedule.alpha_bar[1000] == pytest.approx(2.4288e-9, rel=1e-4)
    assert np.count_nonzero(schedule.beta == 0.999) == 1 and schedule.beta[1000] == 0.999
    angle = (np.arange(1000) / 1000 + 0.008) / 1.008 * math.pi
    f = (1 + np.cos(angle)) / 2
    near(schedule.alpha_bar[:1000], f / f[0], condition=1 / f.min())


@pytest.mark.parametrize("wrong", [
    lambda: linear(0), lambda: linear(-3), lambda: cosine(0), lambda: linear(10, 0.0),
    lambda: linear(10, 1e-4, 1.0), lambda: schedule_of([]),
    lambda: schedule_of([0.1, float("nan")]), lambda: schedule_of([[0.1]]),
    lambda: schedule_of([-0.1]), lambda: schedule_of([1.5]), lambda: sample.respaced(PAPER, [1, 5]),
    lambda: sample.respaced(PAPER, [0, 5, 5]), lambda: sample.respaced(PAPER, [0, 5, 1001])])
def test_a_schedule_that_cannot_be_is_refused(wrong):
    """T < 1, β outside (0, 1), times that do not increase: an error, never a table of NaN."""
    with np.errstate(invalid="ignore"), pytest.raises(ValueError):
        wrong()


@exactly(first=2)
def test_noise_only_grows(schedule, t, number):
    """V4: SNR_t = ᾱ_t/(1−ᾱ_t) falls at every step of any schedule; the linear β_t rise."""
    snr = ddpm.snr(t, schedule)
    assert snr < ddpm.snr(t - 1, schedule) and snr / (1 + snr) == schedule.alpha_bar[t]
    assert np.all(np.diff(linear().beta) > 0)


@given(schedules, st.data())
def test_respacing_keeps_the_noise_levels(schedule, data):
    """DDIM: fewer steps, the same ᾱ; β between two is that of all the steps between, composed."""
    times = [0] + sorted(data.draw(st.sets(st.integers(1, schedule.T), min_size=1)))
    short = sample.respaced(schedule, times)
    assert short.T == len(times) - 1
    log_alpha_bar = abs(math.log(schedule.alpha_bar[times[-1]]))
    assert np.array_equal(short.alpha_bar, schedule.alpha_bar[times])
    assert np.array_equal(short.one_minus_alpha_bar, schedule.one_minus_alpha_bar[times])
    near(short.alpha, 1 - short.beta, scale=1)
    assert short.beta[0] == 0 and short.alpha[0] == 1
    for k in range(1, len(times)):
        variance = 0.0
        for t in range(times[k - 1] + 1, times[k] + 1):
            variance = (1 - schedule.beta[t]) * variance + schedule.beta[t]
        near(short.beta[k], variance, condition=1 + log_alpha_bar / short.beta[k])


# ── The forward process ───────────────────────────────────────────────────────────────────────────


@given(pixels, st.floats(1e-6, 10))
def test_log_normal_is_a_density_with_its_mean_and_variance(mean, variance):
    """Ho (2): exp(log_normal) integrates to 1, and its first two moments are its arguments."""
    x, dx = grid(mean, variance)
    p = np.exp(log_normal(x, mean, variance)) * dx
    condition = 1 + abs(mean) / math.sqrt(variance)          # of x − mean
    near(p.sum(), 1, condition)
    near((p * x).sum(), mean, condition, scale=math.sqrt(variance))
    near((p * (x - mean) ** 2).sum(), variance, condition)


@given(images, betas, pixels)
def test_a_draw_is_the_mean_plus_scaled_noise(x, variance, eps):
    """Reparameterisation: a draw's z-score is its noise, its density the noise's, rescaled."""
    found = draw(x, variance, eps)
    near((found - x) / math.sqrt(variance), np.full_like(x, eps), 1 / math.sqrt(variance), scale=6)
    near(log_normal(found, x, variance), log_normal(eps, 0, 1) - math.log(variance) / 2,
         condition=1 / math.sqrt(variance), scale=30)


@exactly()
def test_a_step_scales_the_mean_and_adds_beta(schedule, t, number):
    """Ho (2), N1, V5: q(x_t|x_{t−1}) = N(√(1−β_t) x_{t−1}, β_t); scale² + variance = 1."""
    scale, variance = q_step(1, t, schedule)
    assert scale > 0 and variance == schedule.beta[t] and scale ** 2 + variance == 1
    x_prev = number()
    assert q_step(x_prev, t, schedule) == (scale * x_prev, variance)


@exactly()
def test_the_naive_diffuser_keeps_the_mean_and_piles_up_variance(schedule, t, number):
    """V1: x_t = x_{t−1} + √β ε, fed one noise at a time: mean x_0, variance Σ β, without end."""
    x0, deviations = number(), [abs(number()) for _ in range(t)]

    def walked(noise):
        x = x0
        for deviation, eps in zip(deviations, noise):
            x = ddpm.naive_step(x, deviation ** 2, eps)
        return x
    assert ddpm.naive_step(0, Exact(1, 4), 1) == Exact(1, 2)
    assert walked([0] * t) == x0
    variance = sum((walked(unit) - x0) ** 2 for unit in np.eye(t, dtype=int).tolist())
    assert variance == sum(deviation ** 2 for deviation in deviations)


@exactly()
def test_the_scaled_diffuser_keeps_unit_variance(schedule, t, number):
    """V2, V4: α² + β² = 1 keeps a variance of 1; with α = √α_1, β = √β_1 the step is Ho (2)."""
    scale, deviation = schedule.alpha[1] ** 0.5, schedule.beta[1] ** 0.5
    assert scale ** 2 + deviation ** 2 == 1
    x_prev, eps = number(), number()
    assert ddpm.scaled_step(x_prev, scale, deviation, eps) == draw(
        *q_step(x_prev, 1, schedule), eps)
    a, b = number(), number()
    assert (ddpm.scaled_step(1, a, b, 0), ddpm.scaled_step(0, a, b, 1)) == (a, b)


@exactly()
def test_the_variance_tends_to_one(schedule, t, number):
    """V2, V4: Var x_t = ᾱ_t s² + 1 − ᾱ_t, step by step; 1 stays 1, else the gap closes by α_t."""
    variance = variance_0 = abs(number())
    for s in range(1, t + 1):
        scale, added = q_step(1, s, schedule)
        variance = scale ** 2 * variance + added
    assert ddpm.variance_at(t, variance_0, schedule) == variance
    assert ddpm.variance_at(0, variance_0, schedule) == variance_0
    assert ddpm.variance_at(t, 1, schedule) == 1
    assert variance - 1 == math.prod(schedule.alpha[1:t + 1]) * (variance_0 - 1)


@exactly()
def test_composing_the_steps_gives_the_marginal(schedule, t, number):
    """Ho (4), N2, V3: t one-step kernels, means and variances multiplied out one by one."""
    mean, variance = x0, _ = number(), 0
    for s in range(1, t + 1):
        scale, added = q_step(1, s, schedule)
        mean, variance = scale * mean, scale ** 2 * variance + added
    assert q_marginal(x0, t, schedule) == (mean, variance)
    assert q_marginal(x0, 0, schedule) == (x0, 0)


def between(x_s, s, t, schedule):
    """q(x_t | x_s): a step of the schedule that has no times but 0, s and t."""
    short = sample.respaced(schedule, sorted({0, s, t}))
    return q_step(x_s, short.T, short) if s < t else (x_s, 0.0)


@given(schedules, st.data(), pixels)
def test_any_two_times_compose(schedule, data, x0):
    """Ho (2, 4): q(x_t|x_s), s ≤ t, after q(x_s|x_0) gives q(x_t|x_0); neighbours give q_step."""
    s, t = sorted([data.draw(st.integers(0, schedule.T)), data.draw(st.integers(0, schedule.T))])
    mean_s, variance_s = q_marginal(x0, s, schedule)
    scale, added = between(1.0, s, t, schedule)
    mean_t, variance_t = q_marginal(x0, t, schedule)
    condition = 1 + abs(math.log(schedule.alpha_bar[t]))
    near(between(mean_s, s, t, schedule)[0], mean_t, condition)
    near(scale ** 2 * variance_s + added, variance_t, condition)
    if t < schedule.T:
        near(between(x0, t, t + 1, schedule), q_step(x0, t + 1, schedule))


@given(st.lists(betas, min_size=1, max_size=12).map(tables), st.data())
def test_covariance_of_two_times(schedule, data):
    """Ho (2, 4): Cov(x_s, x_t | x_0) = √(ᾱ_t/ᾱ_s) (1 − ᾱ_s), on a path fed one noise at a time."""
    s, t = sorted([data.draw(st.integers(1, schedule.T)), data.draw(st.integers(1, schedule.T))])
    covariance = 0.0
    for unit in np.eye(schedule.T + 1)[1:]:
        path = [0.0]
        for u in range(1, t + 1):
            path.append(draw(*q_step(path[-1], u, schedule), unit[u]))
        covariance += path[s] * path[t]
    expected = between(1.0, s, t, schedule)[0] * q_marginal(0.0, s, schedule)[1]
    near(covariance, expected, condition=1 + abs(math.log(schedule.alpha_bar[t])))


@exactly()
def test_the_jump_is_a_draw_from_the_marginal(schedule, t, number):
    """Ho (4), N3, V3: x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε; t = 0 gives x_0."""
    x0, eps = number(), number()
    assert ddpm.q_sample(x0, t, eps, schedule) == draw(*q_marginal(x0, t, schedule), eps)
    assert ddpm.q_sample(x0, 0, eps, schedule) == x0


def test_each_image_has_its_own_t():
    """Ho (4): an array of times broadcasts: each image jumps to its own."""
    x0, eps, t = np.ones((2, 3)), np.full((2, 3), 2.0), np.array([[0], [700]])
    both = ddpm.q_sample(x0, t, eps, PAPER)
    assert both.tolist() == [[1.0] * 3, ddpm.q_sample(x0[1], 700, eps[1], PAPER).tolist()]


@exactly()
def test_knowing_the_noise_is_knowing_the_image(schedule, t, number):
    """Ho (9, 15), N5: round trips both ways, from any x_0 and ε and from any x_t."""
    x0, eps, x_t = number(), number(), number()
    jumped = ddpm.q_sample(x0, t, eps, schedule)
    assert ddpm.x0_from_eps(jumped, t, eps, schedule) == x0
    assert ddpm.eps_from_x0(jumped, t, x0, schedule) == eps
    assert ddpm.eps_from_x0(x_t, t, ddpm.x0_from_eps(x_t, t, eps, schedule), schedule) == eps


def test_x_T_is_nearly_independent_of_x_0():
    """N2, Ho section 4: L_T of linear() is 2.911e-5 bits/dim at mean square 1; √ᾱ_T = 0.00635."""
    assert posterior.bits_per_dim(posterior.L_T(np.array([1.0, -1.0]), PAPER)) == pytest.approx(
        2.911e-5, rel=1e-3)
    assert math.sqrt(PAPER.alpha_bar[1000]) == pytest.approx(0.00635, abs=5e-6)
    fifty = evenly(50, 1e-4, 0.02)
    assert fifty.alpha_bar[50] == pytest.approx(0.60, abs=0.005)
    assert posterior.bits_per_dim(posterior.L_T(np.ones(1), fifty)) > 0.1   # needs other betas


# ── The true posterior ────────────────────────────────────────────────────────────────────────────


@exactly(first=2)
def test_posterior_is_bayes_rule(schedule, t, number):
    """Ho (6, 7), V8, V9: at any three points
    q(x_{t−1}|x_t,x_0) q(x_t|x_0) = q(x_t|x_{t−1}) q(x_{t−1}|x_0): the same exponent and the same
    factor on both sides, so given x_0 the reverse is exactly Gaussian.
    """
    x0, x_prev, x_t = number(), number(), number()
    left = ((x_prev, *posterior.posterior(x_t, x0, t, schedule)),
            (x_t, *q_marginal(x0, t, schedule)))
    right = (x_t, *q_step(x_prev, t, schedule)), (x_prev, *q_marginal(x0, t - 1, schedule))

    def exponent(gaussians):
        return sum((x - mean) ** 2 / variance for x, mean, variance in gaussians)
    assert exponent(left) == exponent(right)
    assert left[0][2] * left[1][2] == right[0][2] * right[1][2] and left[0][2] > 0


@exactly()
def test_posterior_averaged_over_x_t_is_the_marginal(schedule, t, number):
    """Ho (4, 6, 7): total mean and total variance over q(x_t|x_0) give q(x_{t−1}|x_0) back."""
    x0 = number()
    mean_t, variance_t = q_marginal(x0, t, schedule)
    mean, variance = posterior.posterior(mean_t, x0, t, schedule)
    slope = posterior.posterior(1, 0, t, schedule)[0]
    assert q_marginal(x0, t - 1, schedule) == (mean, slope ** 2 * variance_t + variance)


@exactly()
def test_at_t_1_the_posterior_is_the_image(schedule, t, number):
    """Ho (7): A1 = 0, A2 = 1, β̃ = 0 at t = 1, T = 1 included; at any t the mean is their sum."""
    x_t, x0 = number(), number()
    assert (A1(1, schedule), A2(1, schedule), beta_tilde(1, schedule)) == (0, 1, 0)
    assert posterior.posterior(x_t, x0, 1, schedule) == (x0, 0)
    assert posterior.posterior(x_t, x0, t, schedule) == (
        A1(t, schedule) * x_t + A2(t, schedule) * x0, beta_tilde(t, schedule))


def test_how_A1_and_A2_change():
    """V14: towards t = 1, A2 rises from 0.000128 to 1;
    A1 from 0.98995 to 0.99415 at t = 462, then to 0.
    """
    t = np.arange(1, 1001)
    a1, a2 = A1(t, PAPER), A2(t, PAPER)
    assert (np.all(np.diff(a2) < 0)
            and a2[-1] == pytest.approx(0.000128, abs=5e-7) and a2[0] == pytest.approx(1))
    assert (a1[-1] == pytest.approx(0.98995, abs=5e-6)
            and a1.max() == pytest.approx(0.99415, abs=5e-6))
    assert t[a1.argmax()] == 462 and a1[0] == 0
    assert np.all(np.diff(a1[:462]) > 0) and np.all(np.diff(a1[461:]) < 0)


def test_one_third():
    """V8: at t = 3 the posterior takes 1/3 from x_0 only for equal β → 0; linear() takes 0.3887."""
    tiny = tables([1e-9] * 3)
    assert (A2(3, tiny) == pytest.approx(1 / 3, abs=1e-8)
            and A1(3, tiny) == pytest.approx(2 / 3, abs=1e-8))
    assert (A2(3, PAPER) == pytest.approx(0.3887, abs=5e-5)
            and A1(3, PAPER) == pytest.approx(0.6113, abs=5e-5))


@pytest.mark.parametrize("beta, kurtosis", [(0.2, -0.300), (0.1, -0.0744), (0.05, -0.0185)])
def test_without_x_0_the_reverse_is_gaussian_only_for_small_beta(beta, kurtosis):
    """N4: for x_0 = ±1, q(x_{t−1}|x_t) is two Gaussians;
    at ᾱ_t = 0.5, x_t = 0.1 its excess kurtosis falls like β².
    """
    schedule = tables([1 - 0.5 / (1 - beta), beta])
    x_t, weights, x = 0.1, [], np.linspace(-6, 6, 20001)
    densities = []
    for x0 in (-1.0, 1.0):
        weights.append(np.exp(log_normal(x_t, *q_marginal(x0, 2, schedule))))
        densities.append(np.exp(log_normal(x, *posterior.posterior(x_t, x0, 2, schedule))))
    p = weights[0] * densities[0] + weights[1] * densities[1]
    p /= p.sum()
    centred = x - (p * x).sum()
    excess = (p * centred ** 4).sum() / (p * centred ** 2).sum() ** 2 - 3
    assert excess == pytest.approx(kurtosis, abs=5e-4 * abs(kurtosis) / 0.3 + 5e-5)


# ── The reverse step ──────────────────────────────────────────────────────────────────────────────


@exactly()
def test_the_reverse_mean_is_the_posterior_mean_of_the_predicted_image(schedule, t, number):
    """Ho (10, 11), N8: (x_t − β_t/√(1−ᾱ_t) ε)/√α_t = A1 x_t + A2 x_0(ε), ε right or wrong."""
    x_t, eps = number(), number()
    x0 = ddpm.x0_from_eps(x_t, t, eps, schedule)
    assert reverse_mean(x_t, eps, t, schedule) == posterior.posterior(x_t, x0, t, schedule)[0]


@exactly()
def test_the_reverse_step_adds_sigma_z_but_not_at_t_1(schedule, t, number):
    """Ho (1), N8, V6: x_{t−1} − μ_θ is σ_t z, σ_t a deviation, not a variance; nothing at t = 1."""
    x_t, eps, z, sigma = number(), number(), number(), abs(number())
    step = reverse_step(x_t, eps, t, z, sigma ** 2, schedule)
    assert step - reverse_mean(x_t, eps, t, schedule) == (sigma * z if t > 1 else 0)


@pytest.mark.parametrize("s2, variance, result", [
    (1.0, "beta", 0.999900), (1.0, "beta_tilde", 0.991067),
    (0.25, "beta", 0.250752), (0.25, "beta_tilde", 0.246125)])
def test_algorithm_2_on_gaussian_data_in_numpy(s2, variance, result):
    """Algorithm 2, N8: with ε* exact for N(0, s²) the walk is linear, its output variance known."""
    x, sigma2 = np.eye(1001)[0], posterior.reverse_variance(variance, PAPER)
    for t in range(1000, 0, -1):                  # image k is fed one unit of noise, at step k only
        z = np.eye(1001)[t]
        x = reverse_step(x, best_eps(x, t, 0.0, s2, PAPER), t, z, sigma2[t], PAPER)
    assert (x ** 2).sum() == pytest.approx(result, abs=1e-6)


@exactly(first=2)
def test_the_two_variances_are_the_two_extremes(schedule, t, number):
    """Ho section 3.2: on N(m, s²) data q(x_{t−1}|x_t) has variance β_t v_{t−1}/v_t, β_t if s = 1
    and β̃_t if s = 0, and with the best ε its mean is Ho (11).
    """
    m, s2, x_t = number(), abs(number()), number()
    scale, beta = q_step(1, t, schedule)
    for variance_0, sigma2 in ((s2, None), (1, beta), (0, beta_tilde(t, schedule))):
        v_prev, v_t = (ddpm.variance_at(u, variance_0, schedule) for u in (t - 1, t))
        exact = v_prev - (scale * v_prev) ** 2 / v_t              # conditioning a joint Gaussian
        assert beta * v_prev / v_t == exact == (exact if sigma2 is None else sigma2)
        mean = q_marginal(m, t - 1, schedule)[0] + scale * v_prev / v_t * (
            x_t - q_marginal(m, t, schedule)[0])
        assert reverse_mean(x_t, best_eps(x_t, t, m, variance_0, schedule), t, schedule) == mean


@given(schedules)
def test_sigma_is_one_of_two_and_never_0(schedule):
    """Ho (13), section 3.2: σ_t² = β_t or β̃_t; but β̃_1 = 0 cannot be a density's variance, and for
    both, as in the authors' code, β̃_2 stands at t = 1, or β_1 where T = 1.
    """
    T, tilde = schedule.T, [beta_tilde(t, schedule) for t in range(2, schedule.T + 1)]
    for choice, expected in (("beta", schedule.beta[2:].tolist()), ("beta_tilde", tilde)):
        found = posterior.reverse_variance(choice, schedule)
        assert found[2:].tolist() == expected and found[0] == 0
        assert found[1] == (tilde[0] if T > 1 else schedule.beta[1]) > 0


# ── The distance between two Gaussians, and the matching term ─────────────────────────────────────


@given(pixels, st.floats(0.05, 4), pixels, st.floats(0.05, 4))
@example(0.0, 1.0, 3.47e-07, 1.0)
def test_kl_is_the_integral(m1, v1, m2, v2):
    """KL: ∫ N_1 (log N_1 − log N_2) dx, on a grid; never negative."""
    x, dx = grid(m1, v1)
    log_1, log_2 = log_normal(x, m1, v1), log_normal(x, m2, v2)
    p = np.exp(log_1) * dx
    cancelling = (p * (np.abs(log_1) + np.abs(log_2))).sum()          # where the two are nearly one
    near(kl(m1, v1, m2, v2), (p * (log_1 - log_2)).sum(), scale=cancelling)
    assert kl(m1, v1, m2, v2) >= 0


@given(pixels, st.floats(0.05, 4), pixels, st.floats(0.05, 4))
@example(0.5, 2.0, 0.5, 2.0)
def test_kl_is_zero_only_between_equals(m1, v1, m2, v2):
    """KL: 0 for the same Gaussian, above 0 for any other."""
    assert kl(m1, v1, m1, v1) == 0
    if abs(m1 - m2) > 1e-3 or abs(v1 - v2) > 1e-3:
        assert kl(m1, v1, m2, v2) > 0


@exactly(first=2)
def test_with_equal_variances_only_the_means_matter(schedule, t, number):
    """Ho (8), V10: KL = ‖μ̃ − μ‖² / (2σ²)."""
    mu_tilde, mu, sigma2 = number(), number(), abs(number())
    assert posterior.matching_mean(mu_tilde, mu, sigma2) == kl(mu_tilde, sigma2, mu, sigma2)


@exactly(first=2)
def test_matching_in_x0(schedule, t, number):
    """V11: it is the KL of the posteriors given x_0 and given x̂_0;
    with β̃ the weight is (SNR_{t−1} − SNR_t)/2.
    """
    x_t, x0, x0_hat, sigma2 = number(), number(), number(), abs(number())
    mu_tilde, tilde = posterior.posterior(x_t, x0, t, schedule)
    mu, _ = posterior.posterior(x_t, x0_hat, t, schedule)
    assert (posterior.matching_x0(x0, x0_hat, t, sigma2, schedule)
            == kl(mu_tilde, sigma2, mu, sigma2))
    assert posterior.matching_x0(1, 0, t, tilde, schedule) == (
        ddpm.snr(t - 1, schedule) - ddpm.snr(t, schedule)) / 2


@exactly(first=2)
def test_matching_in_eps(schedule, t, number):
    """Ho (12), V12: it is the KL of the two reverse means;
    with β̃ the weight is (SNR_{t−1}/SNR_t − 1)/2.
    """
    x_t, eps, eps_hat, sigma2 = number(), number(), number(), abs(number())
    mu_tilde, mu = reverse_mean(x_t, eps, t, schedule), reverse_mean(x_t, eps_hat, t, schedule)
    assert (posterior.matching_eps(eps, eps_hat, t, sigma2, schedule)
            == kl(mu_tilde, sigma2, mu, sigma2))
    assert C(t, beta_tilde(t, schedule), schedule) == (
        ddpm.snr(t - 1, schedule) / ddpm.snr(t, schedule) - 1) / 2


def test_C_is_no_constant():
    """V12 calls C a constant: for linear() it falls 120-fold from t = 2 to t = 350."""
    t = np.arange(2, 1001)
    weights = C(t, beta_tilde(t, PAPER), PAPER)
    assert weights[0] / weights.min() == pytest.approx(120.37, abs=0.01)
    assert t[weights.argmin()] == 350


@given(moments().filter(lambda m: m[1] > 1), pixels, pixels)
def test_the_constant_that_beta_leaves(moment, mu_tilde, mu):
    """constant: for σ² = β_t the KL has D/2 [β̃/β − 1 + ln(β/β̃)] beside the means; for β̃_t 0."""
    schedule, t = moment
    beta, tilde = schedule.beta[t], beta_tilde(t, schedule)
    left = kl(mu_tilde, tilde, mu, beta)
    near(left, posterior.matching_mean(mu_tilde, mu, beta)
         + posterior.matching_constant(t, beta, schedule), scale=1)
    assert posterior.matching_constant(t, tilde, schedule) == 0


def test_the_constant_is_half_a_bit_in_total():
    """constant: 0.486 bits/dim over all t > 1 of the linear schedule."""
    t = np.arange(2, 1001)
    total = posterior.matching_constant(t, PAPER.beta[2:], PAPER).sum() / math.log(2)
    assert total == pytest.approx(0.486, abs=5e-4)


# ── The bound ─────────────────────────────────────────────────────────────────────────────────────

short_schedules = st.lists(st.floats(0.001, 0.9), min_size=1, max_size=8).map(tables)


@given(short_schedules, st.data())
@example(ONE_STEP, None)
def test_the_bound_telescopes_along_every_trajectory(schedule, data):
    """Ho (3, 5), V7: log q(x_{1:T}|x_0)/p(x_{0:T}) is L_T + Σ L_{t−1} + L_0,
    for any path and any reverse.
    """
    number = (lambda: data.draw(pixels)) if data else (lambda: 0.7)
    path = [np.array([number(), number()]) for _ in range(schedule.T + 1)]
    slopes = [number() for _ in range(schedule.T + 1)]

    def reverse(x_t, t):
        return slopes[t] * x_t + 0.1, 0.2 + slopes[t] ** 2

    terms = posterior.trajectory_terms(path, reverse, schedule)
    size = sum(1 / variance for t in range(1, schedule.T + 1)
               for variance in (schedule.beta[t], beta_tilde(t, schedule) if t > 1 else 1))
    near(sum(terms), posterior.trajectory_bound(path, reverse, schedule), scale=100 * (1 + size))


@given(short_schedules, st.data(), st.floats(-1, 1), st.floats(0.1, 3))
def test_exact_reverse_kernels_leave_only_the_prior(schedule, data, m, s2):
    """Ho (3, 16), V7: for N(m, s²) data and its exact reverse,
    L + log q(x_0) = log q(x_T)/p(x_T) on every path.
    """
    path = [np.array([data.draw(pixels)]) for _ in range(schedule.T + 1)]

    def marginal(t):
        return math.sqrt(schedule.alpha_bar[t]) * m, ddpm.variance_at(t, s2, schedule)

    def reverse(x_t, t):
        sigma2 = schedule.beta[t] * marginal(t - 1)[1] / marginal(t)[1]
        return reverse_mean(x_t, best_eps(x_t, t, m, s2, schedule), t, schedule), sigma2

    bound = posterior.trajectory_bound(path, reverse, schedule)
    expected = (log_normal(path[-1], *marginal(schedule.T)) - log_normal(path[-1], 0, 1)
                - log_normal(path[0], m, s2)).sum()
    size = sum(1 / (schedule.beta[t] * min(1, marginal(t - 1)[1]))
               for t in range(1, schedule.T + 1))
    near(bound, expected, condition=10, scale=100 * (1 + size))


@given(schedules, st.lists(pixels, min_size=1, max_size=4).map(np.array))
def test_L_T_is_the_expected_first_term(schedule, x0):
    """Ho (5), N2, V7: L_T = E_q [log q(x_T|x_0) − log p(x_T)], integrated on a grid;
    and in bits per dimension.
    """
    expected = []
    for pixel in x0:
        mean, variance = q_marginal(pixel, schedule.T, schedule)
        x, dx = grid(mean, variance)
        log_q = log_normal(x, mean, variance)
        expected.append((np.exp(log_q) * (log_q - log_normal(x, 0, 1)) * dx).sum())
    size = 10 + abs(math.log(variance))
    condition = 10 + np.abs(x0).max() / math.sqrt(variance)                  # of x − mean
    near(posterior.L_T(x0, schedule), expected, condition, scale=size)
    near(posterior.bits_per_dim(posterior.L_T(x0, schedule)),
         sum(expected) / len(x0) / math.log(2), condition, scale=size)


@given(st.floats(-1.5, 1.5), st.floats(1e-5, 1))
@example(0.0, 1e-4)
@example(-1.0, 1.0)
@example(1.2, 1e-5)
def test_the_decoder_s_256_bins_sum_to_1(mean, sigma2):
    """Ho (13): the bins of 2/255, the outer two open, are a partition: probabilities sum to 1."""
    p = np.exp(-posterior.L_0(np.arange(256) / 127.5 - 1, mean, sigma2))
    near(p.sum(), 1)
    assert np.all(p >= 0)


@given(st.integers(0, 255), st.floats(0.01, 1), st.floats(-4, 4))
def test_the_decoder_integrates_the_density_over_a_bin(level, sigma, offset):
    """Ho (13): exp(−L_0) is ∫ N(x; μ, σ²) over (x_0 − 1/255, x_0 + 1/255), by Simpson's rule."""
    x0 = level / 127.5 - 1
    mean = x0 + offset * sigma
    left, right = x0 - 1 / 255, x0 + 1 / 255
    left = mean - 12 * sigma - 1 if level == 0 else left
    right = mean + 12 * sigma + 1 if level == 255 else right
    x = np.linspace(left, right, 20001)
    weights = np.where(np.arange(20001) % 2, 4.0, 2.0)
    weights[[0, -1]] = 1
    p = (weights * np.exp(log_normal(x, mean, sigma ** 2))).sum() * (x[1] - x[0]) / 3
    assert math.exp(-posterior.L_0(x0, mean, sigma ** 2)) == pytest.approx(p, rel=1e-6)


def test_the_decoder_is_exact_far_from_the_mean():
    """Ho (13): ten deviations off, on either side, the probability is tiny yet right, not 0."""
    both = [posterior.L_0(sign * 0.2 - 1 / 255 + sign / 255,
                          sign * 0.2 - 1 / 255 + sign / 255 - sign * 0.3, 0.03 ** 2)
            for sign in (1, -1)]
    assert both[0] == pytest.approx(both[1], rel=1e-9) and both[0] == pytest.approx(51.3, abs=1.5)


# ── The simple loss ───────────────────────────────────────────────────────────────────────────────


@given(images)
def test_l_simple_of_nothing_and_of_everything(eps):
    """Ho (14), N6, N7, V13: a perfect prediction costs 0, a zero one the noise's mean square: 1."""
    assert ddpm.l_simple(eps, eps) == 0
    near(ddpm.l_simple(eps, 0 * eps), sum(float(e) ** 2 for e in eps.flat) / eps.size)
    # signs do not cancel
    near(ddpm.l_simple(np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0, 3.0])), 2 / 3)


@pytest.mark.parametrize("s2, floor", [(1.0, 0.275513), (0.25, 0.173053)])
def test_l_simple_has_a_floor(s2, floor):
    """Ho (14): on N(0, s²) data no prediction has a mean loss below
    0.275513 (s² = 1) or 0.173053 (s² = 1/4).
    """
    losses = []
    for t in range(1, 1001):
        # ε − ε*(x_t) is linear in (x_0, ε), so its mean square is the sum of those of its two parts
        x_t = ddpm.q_sample(np.array([math.sqrt(s2), 0.0]), t, np.array([0.0, 1.0]), PAPER)
        losses.append(2 * ddpm.l_simple(np.array([0.0, 1.0]), best_eps(x_t, t, 0.0, s2, PAPER)))
    assert np.mean(losses) == pytest.approx(floor, abs=1e-6)
    if s2 == 1:
        assert np.mean(losses) == pytest.approx(PAPER.alpha_bar[1:].mean())


# ── The score, and the best network that there can be ─────────────────────────────────────────────

mixtures = st.lists(st.tuples(st.floats(0.1, 1), st.floats(-1, 1), st.floats(0.01, 0.5)),
                    min_size=1, max_size=3)


@given(st.lists(st.floats(0.01, 0.9), min_size=1, max_size=6).map(tables), st.data(),
       mixtures, st.floats(-2, 2))
def test_the_best_noise_prediction_is_the_score(schedule, data, mixture, x_t):
    """score: E[ε|x_t] = −√(1−ᾱ_t) ∇ log q_t, for data from any Gaussian mixture,
    against a numerical gradient.
    """
    t = data.draw(st.integers(1, schedule.T))
    x0 = np.linspace(-8, 8, 16001)
    q_0 = sum(w * np.exp(log_normal(x0, m, v)) for w, m, v in mixture)

    def log_q_t(x):
        joint = q_0 * np.exp(log_normal(x, *q_marginal(x0, t, schedule)))
        return math.log(joint.sum()), (joint * x0).sum() / joint.sum()
    gradient = (log_q_t(x_t - 2e-3)[0] - 8 * log_q_t(x_t - 1e-3)[0]
                + 8 * log_q_t(x_t + 1e-3)[0] - log_q_t(x_t + 2e-3)[0]) / 12e-3
    best = ddpm.eps_from_x0(x_t, t, log_q_t(x_t)[1], schedule)
    assert posterior.score(best, t, schedule) == pytest.approx(gradient, rel=1e-5, abs=1e-5)


@exactly()
def test_tweedie_gives_the_mean_of_the_previous_image(schedule, t, number):
    """score: E[x_{t−1}|x_t] = (x_t + β_t ∇ log q_t)/√α_t for any β and any data: with w_i the
    chances of the images x_i given x_t, the score is Σ w_i (√ᾱ_t x_i − x_t)/(1−ᾱ_t), and the mean
    that of the posteriors given each x_i.
    """
    x_t, x0, w = number(), [number() for _ in range(3)], [abs(number()) for _ in range(3)]
    w = [weight / sum(w) for weight in w]
    slope = sum(w_i * (q_marginal(x_i, t, schedule)[0] - x_t) for w_i, x_i in zip(w, x0)
                ) / schedule.one_minus_alpha_bar[t]
    best = ddpm.eps_from_x0(x_t, t, sum(w_i * x_i for w_i, x_i in zip(w, x0)), schedule)
    assert posterior.score(best, t, schedule) == slope
    assert posterior.tweedie_mean(x_t, slope, t, schedule) == sum(
        w_i * posterior.posterior(x_t, x_i, t, schedule)[0] for w_i, x_i in zip(w, x0))


sets = st.integers(1, 6).flatmap(lambda n: arrays(np.float64, (n, 2, 2), elements=pixels))


def posterior_weights(x_t, t, images, schedule):
    """w_i = q(x_i | x_t), by Bayes' rule from the densities themselves."""
    log_w = log_normal(x_t, *q_marginal(images, t, schedule)).reshape(len(images), -1).sum(1)
    w = np.exp(log_w - log_w.max())
    return w / w.sum(), np.abs(log_w).max()


@given(moments(), sets, arrays(np.float64, (2, 2), elements=pixels))
@any_moment(np.array([[[1.0, -1], [0, 1]], [[1, -1], [0, 0.5]]]), np.zeros((2, 2)))
def test_the_perfect_network_is_bayes_rule(moment, images, x_t):
    """score: best_x0 is Σ q(x_i|x_t) x_i; of one image that image, whatever x_t and t are."""
    schedule, t = moment
    w, size = posterior_weights(x_t, t, images, schedule)
    found = posterior.best_x0(np.stack([x_t, x_t]), np.array([t, t]), images, schedule)
    near(found[0], np.tensordot(w, images, 1), condition=10 * (1 + size), scale=3)
    assert np.array_equal(found[0], found[1])
    near(posterior.best_x0(x_t[None], t, images[:1], schedule)[0], images[0], scale=3)


@given(moments(), sets, arrays(np.float64, (2, 2), elements=pixels),
       arrays(np.float64, (2, 2), elements=pixels))
def test_no_other_prediction_has_a_lower_loss(moment, images, x_t, delta):
    """score, Ho (14): E‖x_0 − x̂_0‖² given x_t grows by exactly ‖δ‖² when best_x0 is off by δ."""
    schedule, t = moment
    w, size = posterior_weights(x_t, t, images, schedule)
    best = posterior.best_x0(x_t[None], t, images, schedule)[0]

    def loss(x0):
        return sum(w_i * ((x - x0) ** 2).sum() for w_i, x in zip(w, images))
    near(loss(best + delta) - loss(best), (delta ** 2).sum(), condition=10 * (1 + size), scale=300)


@given(st.floats(-2, 2), st.integers(200, 1000), st.integers(0, 99))
def test_of_many_gaussian_images_the_perfect_network_is_the_closed_form(x_t, t, seed):
    """score: for x_i from N(0, 1) best_x0 tends to √ᾱ_t x_t: 4,000 images, six standard errors of
    the weighted mean: a false alarm once in 10⁸; a mean off by 0.2 is found.
    """
    x = np.random.default_rng(seed).standard_normal((4000, 1))
    w, _ = posterior_weights(np.array([x_t]), t, x, PAPER)
    found = posterior.best_x0(np.array([[x_t]]), t, x, PAPER)[0, 0]
    error = math.sqrt((w ** 2 * (x[:, 0] - found) ** 2).sum())
    assert abs(found - math.sqrt(PAPER.alpha_bar[t]) * x_t) < 6 * error < 0.2


# ── float64's own rounding ────────────────────────────────────────────────────────────────────────

FORMULAS = {
    "Ho (2)": lambda a, b, t, s: q_step(a, t, s)[0],
    "Ho (4), mean": lambda a, b, t, s: q_marginal(a, t, s)[0],
    "Ho (4), variance": lambda a, b, t, s: q_marginal(a, t, s)[1],
    "Ho (4), x_t": lambda a, b, t, s: ddpm.q_sample(a, t, b, s),
    "V4, variance": lambda a, b, t, s: ddpm.variance_at(t, a ** 2, s),
    "V4, SNR": lambda a, b, t, s: ddpm.snr(t, s),
    "Ho (9), x_0": lambda a, b, t, s: ddpm.x0_from_eps(a, t, b, s),
    "Ho (9), eps": lambda a, b, t, s: ddpm.eps_from_x0(a, t, b, s),
    "Ho (7), A1": lambda a, b, t, s: A1(t, s),
    "Ho (7), A2": lambda a, b, t, s: A2(t, s),
    "Ho (7), beta_tilde": lambda a, b, t, s: beta_tilde(t, s),
    "Ho (7), mean": lambda a, b, t, s: posterior.posterior(a, b, t, s)[0],
    "Ho (11)": lambda a, b, t, s: reverse_mean(a, b, t, s),
    "Ho (11), step": lambda a, b, t, s: reverse_step(a, 0 * a, t, b, s.beta[t], s),
    "Ho (12)": lambda a, b, t, s: posterior.matching_eps(a, b, t, s.beta[t], s),
    "V11": lambda a, b, t, s: posterior.matching_x0(a, b, t, s.beta[t], s),
    "score": lambda a, b, t, s: posterior.score(a, t, s),
    "Tweedie": lambda a, b, t, s: posterior.tweedie_mean(a, b, t, s),
    "DDIM, respaced": lambda a, b, t, s: sample.respaced(s, [0, t]).beta[1],
}


def rational_tables(beta):
    """The schedule with exactly these betas, to a hundred digits."""
    alpha, product = [1 - Precise(x) for x in beta.tolist()], [Precise(1)]
    for a in alpha[1:]:
        product.append((product[-1] * a).to_digits(lambda x: x))
    return Schedule(*map(np.array, ([1 - a for a in alpha], alpha, product,
                                    [1 - p for p in product])))


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
@given(beta=st.lists(betas, min_size=2, max_size=12), data=st.data(), a=pixels, b=pixels)
@example(beta=[1e-7, 1 - 1e-7, 1e-7, 0.5], data=None, a=1.0, b=0.5)
@example(beta=[1e-7] * 3, data=None, a=1.0, b=0.5)
def test_float64_keeps_its_digits(formula, beta, data, a, b):
    """Rounding: each formula, for any schedule, against its exact value (to a hundred digits).

    The tables lose |ln ᾱ_t| roundings; the terms that cancel are as large as the formula's value
    for the signs of a and b that make it largest.
    """
    schedule = schedule_of(beta)
    exact = rational_tables(schedule.beta)
    for t in [data.draw(st.integers(1, schedule.T))] if data else range(1, schedule.T + 1):
        value = float(formula(Precise(a), Precise(b), t, exact))
        near(formula(a, b, t, schedule), value, condition=1 + abs(math.log(schedule.alpha_bar[t])),
             scale=max(abs(formula(a, sign * b, t, schedule)) for sign in (1, -1)))


@given(pixels, st.floats(1e-6, 10), pixels, st.floats(1e-6, 10) | st.floats(-1e-6, 1e-6))
@example(0.5, 1.0, 0.5, 1e-9)
def test_kl_keeps_its_digits(m1, v1, m2, v2):
    """KL, constant, Ho (5): where the variances are nearly equal, v_1/v_2 − 1 and its logarithm
    cancel, and the rounding is that of these.
    """
    v2 = v2 if v2 > 1e-6 else v1 * (1 + v2)
    exact = float(kl(*map(Precise, (m1, v1, m2, v2))))
    near(kl(m1, v1, m2, v2), exact, condition=1 + abs(m1 - m2) / v2, scale=abs(v1 / v2 - 1))


def test_the_constant_and_L_T_keep_their_digits():
    """constant, Ho (5): for every t of the linear schedule, though β̃_t/β_t comes as near to 1 as
    8e-7, and 1 − ᾱ_T as near as 4e-5.
    """
    schedule, exact = linear(), rational_tables(PAPER.beta)
    for t in range(2, 1001):
        value = posterior.matching_constant(t, exact.beta[t], exact)
        near(posterior.matching_constant(t, schedule.beta[t], schedule), float(value), condition=20,
             scale=1 - beta_tilde(t, PAPER) / PAPER.beta[t])
    near(posterior.L_T(0.5, schedule), float(posterior.L_T(Precise(0.5), exact)), condition=20,
         scale=schedule.alpha_bar[1000])


@settings(max_examples=20)
@given(st.lists(st.floats(1e-4, 0.9), min_size=1, max_size=4), st.data(), pixels,
       st.lists(pixels, min_size=1, max_size=3))
def test_the_best_network_keeps_its_digits(beta, data, x_t, images):
    """score: best_x0, whose exponents ‖x_t − √ᾱ_t x_i‖²/(2(1−ᾱ_t)) grow as noise falls."""
    schedule, t = schedule_of(beta), data.draw(st.integers(1, len(beta)))
    found, exact = (posterior.best_x0(np.array([[kind(x_t)]]), t,
                                      np.array([[kind(x)] for x in images]), tables_)[0, 0]
                    for kind, tables_ in ((float, schedule),
                                          (Precise, rational_tables(schedule.beta))))
    near(found, float(exact), condition=50 / schedule.one_minus_alpha_bar[t], scale=3)


# ══ PyTorch against NumPy ═════════════════════════════════════════════════════════════════════════

DEVICES = (["cpu"] + ["cuda"] * torch.cuda.is_available()
           + ["mps"] * torch.backends.mps.is_available())
on_every_device = pytest.mark.parametrize("device", DEVICES)
mild = st.lists(st.floats(0.001, 0.7), min_size=1, max_size=6).map(tables)


def near32(found: torch.Tensor, exact, condition=1.0):
    """As `near`, for float32: a few dozen roundings of 2⁻²⁴, relative to the largest value."""
    exact = np.asarray(exact)
    np.testing.assert_allclose(found.detach().cpu().double().numpy(), exact, rtol=0,
                               atol=3e-6 * condition * max(np.abs(exact).max(), 1e-30))


def batch_of(seed, *shape, device="cpu"):
    """The same standard normal numbers for both worlds: float64 for NumPy, their float32 tensor."""
    array = np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(np.float64)
    return array, torch.tensor(array, dtype=torch.float32, device=device)


def step_arguments(schedule, t, device="cpu", seed=0):
    """x_t, ε_θ, the x̂_0 it implies, the one before, and z: in NumPy and in PyTorch."""
    both = [batch_of(seed + i, 2, 1, 3, 3, device=device) for i in range(4)]
    (x_t, x_t32), (eps, eps32), (x0_prev, x0_prev32), (z, z32) = both
    x0 = ddpm.x0_from_eps(x_t, t, eps, schedule)
    x0_32 = torch.tensor(x0, dtype=torch.float32, device=device)
    return (x_t, eps, x0, x0_prev, z), (x_t32, eps32, x0_32, x0_prev32, z32)


SMALL = Config(image_shape=(1, 8, 8), model_channels=8, attention_resolutions=(4,), num_classes=3,
               patch_size=1)


def small_unet(seed=0, **changes):
    """A U-Net with a level, attention, labels and no weight that is zero."""
    torch.manual_seed(seed)
    net = UNet(replace(SMALL, **changes))
    for p in net.parameters():
        nn.init.normal_(p, std=0.15)
    return net.eval()


# ── Algorithm 1: training ─────────────────────────────────────────────────────────────────────────


@on_every_device
@pytest.mark.parametrize("made", [lambda: ONE_STEP, linear, cosine],
                         ids=["T=1", "linear", "cosine"])
def test_tables_are_cast_once_from_float64(made, device):
    """Ho (4): every table on the device is the float64 one, rounded to float32 and nothing else."""
    schedule = made()
    for found, exact in zip(train.on_device(schedule, device), schedule):
        assert np.array_equal(found.cpu().numpy(), exact.astype(np.float32))


@on_every_device
@given(seed=st.integers(0, 99), moment=moments(first=0))
@example(seed=0, moment=(PAPER, 1))
def test_torch_x_t_is_numpy_x_t(device, seed, moment):
    """Ho (4), N3: q_sample on tensors: with one t for all images and NumPy's
    tables, and with a t for each image and the tables on the device.
    """
    schedule, t = moment
    (x0, x0_torch), (eps, eps_torch) = (batch_of(seed + i, 2, 1, 4, 4, device=device)
                                        for i in (0, 100))
    each = np.array([t, schedule.T]).reshape(2, 1, 1, 1)
    for numpy_t, torch_t, tables_ in (
            (t, t, schedule),
            (each, torch.tensor(each, device=device), train.on_device(schedule, device))):
        near32(ddpm.q_sample(x0_torch, torch_t, eps_torch, tables_),
               ddpm.q_sample(x0, numpy_t, eps, schedule))


def test_the_loss_that_is_trained_is_numpy_s():
    """Ho (14), N6, N7, V13: l_simple of tensors is that of arrays, its gradient 2 (ε_θ − ε)/n."""
    for device in DEVICES:
        (eps, eps32), (eps_hat, eps_hat32) = (batch_of(i, 5, 1, 8, 8, device=device)
                                              for i in (0, 1))
        loss = ddpm.l_simple(eps32, eps_hat32.requires_grad_())
        loss.backward()
        near32(loss, ddpm.l_simple(eps, eps_hat))
        near32(eps_hat32.grad, 2 * (eps_hat - eps) / eps.size)


class Linear(nn.Module):
    """ε_θ(x_t, t) = w_t x_t: a network that can express the best prediction for N(0, s²) data."""

    def __init__(self, T):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(T + 1))

    def forward(self, x_t, t, label=None):
        return self.w[t].reshape(-1, 1, 1, 1) * x_t


def bare_run(net, optimizer, lr, **settings_):
    """A run of a network that is no U-Net, on the CPU."""
    run = Run.__new__(Run)
    run.config, run.device, run.step, run.log = Config(**settings_), torch.device("cpu"), 0, []
    run.net, run.ema = net, copy.deepcopy(net).requires_grad_(False)
    run.optimizers = [optimizer(net.parameters(), lr=lr)]
    return run


@pytest.mark.parametrize("stratified", [True, False])
def test_algorithm_1_is_its_six_lines(stratified):
    """Ho Algorithm 1: three steps, replayed in NumPy with the same random numbers: the next batch,
    t, ε, x_t, the loss, down its clipped gradient at the step's learning rate, and the average.
    """
    schedule, net = evenly(10, 0.01, 0.3), Linear(10)
    nn.init.normal_(net.w, generator=torch.Generator().manual_seed(0))
    run = bare_run(net, torch.optim.SGD, 0.1, steps=5, warmup=2, grad_clip=0.05,
                   ema_decay=0.25, stratified=stratified)
    data = [(batch_of(k, 5, 1, 2, 2), torch.arange(5) + k) for k in range(4)]
    w, ema, labels = net.w.detach().double().numpy().copy(), net.w.detach().double().numpy(), []

    def eps_theta(x_t, t, label):
        labels.append(label)
        return net(x_t, t)
    loop = train.algorithm_1(run, eps_theta, lambda step: (data[step][0][1], data[step][1]),
                             train.on_device(schedule, "cpu"))
    for step, loss in zip((1, 2, 3), loop):
        rng, ((x0, _), label) = run.rng(step), data[step]
        t = torch.randint(1, 11, (5,), generator=rng).numpy()
        eps = torch.randn(x0.shape, generator=rng).double().numpy()
        t = 1 + (10 * np.arange(5) + t - 1) // 5 if stratified else t
        x_t = ddpm.q_sample(x0, t.reshape(-1, 1, 1, 1), eps, schedule)
        eps_hat = w[t].reshape(-1, 1, 1, 1) * x_t
        near32(loss, ddpm.l_simple(eps, eps_hat), condition=3)
        gradient = np.zeros(11)
        np.add.at(gradient, t, (2 * (eps_hat - eps) * x_t).sum((1, 2, 3)) / eps.size)
        assert np.linalg.norm(gradient) > 0.05
        gradient *= 0.05 / np.linalg.norm(gradient)
        w -= 0.1 * min(1, step / 2) * (1 - (step - 1) / 5) * gradient
        d = min(0.25, (1 + step) / (10 + step))
        ema = d * ema + (1 - d) * w
        near32(net.w, w, condition=3)
        near32(run.ema.w, ema, condition=3)
        assert run.step == step == len(labels) and labels[-1] is label


def test_a_perfect_network_has_no_loss():
    """Ho (14), Algorithm 1: the noise in the loss is the noise in x_t: a network that knows x_0
    scores 0, silence scores 1.

    Five standard errors of 16,384 pixels: a false alarm once in 10⁶; a loss off by 6% is found.
    """
    (_, x0), net = batch_of(0, 64, 1, 16, 16), Linear(1000)
    tables = train.on_device(PAPER, "cpu")
    for knows, expected, error in ((1, 0, 1e-6), (0, 1, 5 * math.sqrt(2 / 16384))):
        def eps_theta(x_t, t, label):
            return knows * ddpm.eps_from_x0(x_t, t.reshape(-1, 1, 1, 1), x0, tables) + net(x_t, t)
        run = bare_run(net, torch.optim.SGD, 0.0)
        loss = next(train.algorithm_1(run, eps_theta, lambda step: (x0, None), tables))
        assert abs(loss.item() - expected) < error


def test_training_on_gaussian_data_reaches_the_floor_and_not_below():
    """Ho (14), Algorithm 1: the loop itself, with Adam and the average of the parameters, brings
    the expected loss on N(0, 1) to 0.2755, from above.
    """
    run = bare_run(Linear(1000), torch.optim.Adam, 0.05, steps=400, warmup=10)

    def next_batch(step):
        return torch.randn(1000, 1, 2, 2, generator=torch.Generator().manual_seed(step)), None
    for _ in zip(range(400), train.algorithm_1(run, run.net, next_batch,
                                               train.on_device(PAPER, "cpu"))):
        pass
    for trained in (run.net, run.ema):
        w = trained.w.detach().double().numpy()[1:]
        kept, added = np.sqrt(PAPER.alpha_bar[1:]), np.sqrt(PAPER.one_minus_alpha_bar[1:])
        expected = ((w * kept) ** 2 + (1 - w * added) ** 2).mean()
        assert 0.275513 - 1e-6 < expected < 0.2775


@pytest.mark.parametrize("n, T", [(1, 1), (1, 10), (3, 10), (64, 1000), (10, 3), (7, 7)])
def test_stratified_times_are_uniform_and_spread(n, T):
    """Ho Algorithm 1, line 3: over all n times and all draws t_k of 1..T, each t of 1..T comes
    equally often, T too; and the k-th lies in the k-th of n equal parts.
    """
    found = torch.stack([train.stratified(torch.full((n,), t), T) for t in range(1, T + 1)])
    assert np.bincount(found.flatten(), minlength=T + 1).tolist() == [0] + [n] * T
    part = (torch.arange(n) + 0.5) / n
    assert ((found - 0.5) / T - part).abs().max() <= 0.5 / T + 0.5 / n


def test_batches_are_images_with_their_labels():
    """Ho Algorithm 1, line 2: x_0 ~ q(x_0), images in [-1, 1] in any order, each with its label,
    none that is held out; a tenth of the labels is dropped, half of the images mirrored.

    Five standard errors of 8,000: a false alarm once in 10⁶; shares off by 0.02 and 0.03 are found.
    """
    images = np.zeros((40, 2, 2, 3), np.uint8)                  # image k: 5 k, its right half 255
    images[:] = 5 * np.arange(40)[:, None, None, None]
    images[:, :, 1] = 255
    config = Config(batch=400, num_classes=7, flip=True)
    for device in DEVICES:
        next_batch = train.batches(images, np.arange(40) % 7, config, torch.device(device))
        batches = [[part.cpu() for part in next_batch(step)] for step in range(20)]
        assert all(map(torch.equal, next_batch(3), next_batch(3)))
        x0, label = (torch.cat(parts) for parts in zip(*batches))
        assert x0.shape == (8000, 3, 2, 2) and x0.min() == -1 and x0.max() == 1
        flipped = x0[:, 0, 0, 0] == 1
        k = torch.where(flipped, x0[:, 0, 0, 1], x0[:, 0, 0, 0])
        k = torch.round((k + 1) * 127.5 / 5).long()
        dropped = label == 7
        assert torch.equal(label[~dropped], k[~dropped] % 7)
        assert set(k.tolist()) == set(split(40)[0].tolist())
        for found, expected in ((flipped, 0.5), (dropped, 0.1), (dropped[flipped], 0.1)):
            deviation = math.sqrt(expected * (1 - expected) / len(found))
            assert abs(found.float().mean() - expected) < 5 * deviation
        assert all(0 < (label == 7).sum() < 400 for _, label in batches)
        assert np.bincount(k)[split(40)[0]].min() > 100                 # of 222 each
        assert len({tuple(x0.flatten().tolist()) for x0, _ in batches}) == 20
        plain = train.batches(images, None, Config(batch=400), torch.device(device))
        x0, label = plain(1)
        assert label is None and torch.all(x0[:, :, :, 1] == 1)


# ── Algorithm 2: sampling ─────────────────────────────────────────────────────────────────────────


@on_every_device
@pytest.mark.parametrize("choice", ["beta", "beta_tilde"])
@given(schedule=mild, data=st.data())
def test_torch_reverse_step_is_numpy_s(device, choice, schedule, data):
    """Ho (1, 11), N8, V6: one step of Algorithm 2, with the same noise, σ_t² = β_t and β̃_t."""
    t = data.draw(st.integers(1, schedule.T))
    (x_t, eps, _, _, z), (x_t32, eps32, _, _, z32) = step_arguments(schedule, t, device)
    sigma2 = posterior.reverse_variance(choice, schedule)[t]
    near32(reverse_step(x_t32, eps32, t, z32, sigma2, schedule),
           reverse_step(x_t, eps, t, z, sigma2, schedule), condition=10)


def test_what_is_proved_is_what_trains_and_what_draws(monkeypatch):
    """Ho (4, 7, 11, 14, 15): replace a formula of ddpm.py or posterior.py by a wrong one, and the
    loss of algorithm_1 or the image of a sampler is another.
    """
    schedule = evenly(6, 0.05, 0.3)

    def results():
        run = bare_run(Linear(6), torch.optim.SGD, 0.1)
        nn.init.ones_(run.net.w)
        x0, noises = batch_of(0, 4, 1, 2, 2)[1], [batch_of(k, 4, 1, 2, 2)[1] for k in range(9)]
        yield next(train.algorithm_1(run, run.net, lambda step: (x0, None),
                                     train.on_device(schedule, "cpu"))).item()
        for sampling in (Sampling(), Sampling(clip=False), Sampling("ddim"), Sampling("dpm"),
                         Sampling(sigma2="beta_tilde")):
            left = iter(noises)
            *_, image = sample.trajectory(lambda x_t, t: x_t / 2, schedule, sampling,
                                          lambda: next(left))
            yield image.mean().item()
    right = list(results())
    changed = {}
    for module, name in ((ddpm, "q_sample"), (ddpm, "l_simple"), (ddpm, "x0_from_eps"),
                         (ddpm, "eps_from_x0"), (posterior, "reverse_step"),
                         (posterior, "beta_tilde"), (posterior, "reverse_variance")):
        with monkeypatch.context() as patch:
            ours = getattr(module, name)
            for user in (module, train, sample):
                if hasattr(user, name):
                    patch.setattr(user, name, lambda *args, ours=ours: 1.1 * ours(*args))
            changed[name] = [a != b for a, b in zip(results(), right)]
    assert changed == {       # the loss; ddpm, the same without clipping, ddim, dpm, beta_tilde
        "q_sample": [True] + 5 * [False], "l_simple": [True] + 5 * [False],
        "x0_from_eps": [False, True, False, True, True, True],
        "eps_from_x0": [False, True, False, True, True, True],
        "reverse_step": [False, True, True, False, False, True],
        "beta_tilde": [False, False, False, True, True, True],
        "reverse_variance": [False, True, True, False, False, True]}


def gaussian_trajectory(sampling, schedule, m, s2, noises):
    """The trajectory of Algorithm 2 with the exact ε* for N(m, s²) data, in float64."""
    left = list(noises)[::-1]

    def noise():
        assert left, f"Algorithm 2 draws {schedule.T} noises: x_T, and z for t > 1; not one more"
        return left.pop().reshape(-1, 1, 1, 1)
    walk = sample.trajectory(lambda x_t, t: best_eps(x_t, t, m, s2, schedule), schedule, sampling,
                             noise)
    return [x_t.flatten() for x_t in walk]


@pytest.mark.parametrize("sampling, s2, result", [
    (Sampling("ddpm", clip=False), 1.0, 0.999900),
    (Sampling("ddpm", clip=False), 0.25, 0.250752),
    (Sampling("ddpm", sigma2="beta_tilde", clip=False), 1.0, 0.991067),
    (Sampling("ddpm", sigma2="beta_tilde", clip=False), 0.25, 0.246125),
    (Sampling("ddim", eta=0.0, clip=False), 1.0, 0.996252),
    (Sampling("ddim", eta=0.0, clip=False), 0.25, 0.248498)])
def test_algorithm_2_on_gaussian_data(sampling, s2, result):
    """Algorithm 2, N8, DDIM: with the exact ε* the output variance of algorithm_2 is known to six
    digits, image k fed noise k.
    """
    trajectory = gaussian_trajectory(sampling, PAPER, 0.0, s2, torch.eye(1000, dtype=torch.float64))
    assert (trajectory[-1] ** 2).sum().item() == pytest.approx(result, abs=1e-6)
    assert len(trajectory) == 1001 and trajectory[0].tolist() == [1.0] + [0.0] * 999


def test_a_walk_can_begin_anywhere():
    """Algorithm 2: from x_t at t = 3 of six, each sampler that remembers nothing goes on as it
    would have from x_T.
    """
    schedule = evenly(6, 0.05, 0.3)
    noises = [batch_of(k, 2, 1, 2, 2)[1] for k in range(6)]
    for walk in (partial(sample.algorithm_2, lambda x_t, t: x_t / t, schedule, schedule.beta),
                 partial(sample.ddim, lambda x_t, t: x_t / t, schedule, 1.0)):
        whole = list(walk(iter(noises).__next__))
        rest = list(walk(iter(noises[4:]).__next__, whole[3], 3))
        assert len(whole) == 7 and len(rest) == 4 and all(map(torch.equal, rest, whole[3:]))


SHORT = replace(SMALL, T=12, beta_1=0.01, beta_T=0.3, float32=True, num_classes=0)


def generate(net, config, sampling, indices, label=None, known=None):
    """Each x_t of the images `indices`, as sample.py draws them."""
    with torch.no_grad():
        eps_theta, schedule = sample.prediction(net, config, sampling, len(indices), label)
        device = next(net.parameters()).device
        noise = sample.image_noise(sampling.seed, indices, config.image_shape, device)
        return list(sample.trajectory(eps_theta, schedule, sampling, noise, known))


@on_every_device
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("choice", ["beta", "beta_tilde"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_whole_trajectory_through_a_network_is_numpy_s(device, clip, choice, seed):
    """Algorithm 2, N4, N8: what sample.py draws against reverse_step on arrays: same network, same
    noise, every x_t.
    """
    net, schedule = small_unet(seed, num_classes=0).to(device), evenly(12, 0.01, 0.3)
    found = generate(net, SHORT, Sampling("ddpm", sigma2=choice, clip=clip, seed=seed), range(5, 7))
    assert len(found) == 13
    streams = [np.random.default_rng((seed, i)) for i in (5, 6)]
    x_t = np.stack([s.standard_normal((1, 8, 8), dtype=np.float32)
                    for s in streams]).astype(np.float64)
    near32(found[0], x_t)
    for t in range(12, 0, -1):
        with torch.no_grad():
            eps = net(torch.tensor(x_t, dtype=torch.float32, device=device),
                      torch.full((2,), t, device=device))
        eps = eps.cpu().double().numpy()
        if clip:
            x0 = np.clip(ddpm.x0_from_eps(x_t, t, eps, schedule), -1, 1)
            eps = ddpm.eps_from_x0(x_t, t, x0, schedule)
        z = (np.stack([s.standard_normal((1, 8, 8), dtype=np.float32) for s in streams])
             if t > 1 else 0.0)
        x_t = reverse_step(x_t, eps, t, z, posterior.reverse_variance(choice, schedule)[t],
                           schedule)
        near32(found[13 - t], x_t, condition=30)
