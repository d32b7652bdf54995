"""The second half of the reference: every "it can be shown" of the paper, shown.

In the paper's order, each test titled by its claim and shown by another road than the code's.

Most claims are identities between rational functions of √ᾱ_t, √(1−ᾱ_t), x and ε.  They are proved
by the shipped code itself in exact arithmetic, with == and no tolerance: with
√ᾱ_t = (1−m²)/(1+m²), and so √(1−ᾱ_t) = 2m/(1+m²), for rational 0 < m_1 < m_2 < … < 1 every
coefficient is a rational number, and `exactly` lends ddpm.py and posterior.py a `sqrt` that is
exact on squares.  An identity of degree d that is false holds at a point drawn from N values a
variable with probability at most d/N (Schwartz, Zippel).  Here N = 2³², d < 1000, and each is tried
at 60 points: what passes is false with probability below 10^−390.

What is left is shown numerically, with a tolerance that is derived where it is used: logarithms,
integrals, float64's own rounding of each formula, and PyTorch, held against NumPy on every device
that is here.

`pytest` takes the same examples each time; `pytest --hypothesis-profile=deep` hunts with thousands.
"""
import functools
import math
import random
import statistics
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import nn

import ddpm
import evaluate
import posterior
import sample
import train
from ddpm import (Schedule, cosine, draw, linear, log_normal, q_between, q_marginal, q_step,
                  schedule_of)
from posterior import A1, A2, C, beta_tilde, kl, reverse_mean, reverse_step
from support.checkpoint import their_names
from support.config import PRESETS, Config, Sampling
from support.devices import SharedGenerator
from support.drawing import image_noise, projection
from support.run import Muon, optimizers
from unet import Attention, Block, Downsample, Norm, UNet, parameters, time_embedding

# ── What is drawn, and how near is near ───────────────────────────────────────────────────────────

ROUNDING = 1e-12           # a few thousand roundings of 2⁻⁵²: the longest sums here have 1000 terms


def near(found, exact, condition=1.0, scale=0.0):
    """|found − exact| ≤ ROUNDING · condition · max(|exact|, scale).

    condition: how much the formula magnifies the rounding of its inputs.  scale: the size of terms
    that cancel in it.  Both are derived where they are used, and nothing else is ever loosened.
    """
    np.testing.assert_allclose(found, exact, rtol=ROUNDING * condition,
                               atol=ROUNDING * condition * scale)


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

def root(x, digits=0):
    """√x: exactly, for the square of a rational number; or to so many digits, for any other."""
    scale = 10 ** digits
    found = Fraction(math.isqrt(x.numerator * x.denominator * scale ** 2), x.denominator * scale)
    assert digits or found ** 2 == x, f"{x} is no square"
    return found


def log(x):
    """ln 1 = 0: no other logarithm of a rational number is rational."""
    assert x == 1
    return Fraction(0)


def rational(m):
    """The schedule with √ᾱ_t = (1 − m_t²)/(1 + m_t²), for m_0 = 0 and rational m_t."""
    alpha_bar = [((1 - x ** 2) / (1 + x ** 2)) ** 2 for x in m]
    alpha = [Fraction(1)] + [after / before for before, after in zip(alpha_bar, alpha_bar[1:])]
    return Schedule([1 - a for a in alpha], alpha, alpha_bar, [1 - a for a in alpha_bar])


def exactly(first=1):
    """claim(schedule, t, number), in rational arithmetic: any schedule of first to 6 steps, any t
    from first to T, and number() → any number, all drawn evenly from N = 2³² values.
    """
    def prove(claim):
        def proved(seed):
            rng = random.Random(seed)
            parts = [Fraction(rng.randint(1, 2 ** 32)) for _ in range(rng.randint(first, 6) + 1)]
            m = [sum(parts[:k], Fraction(0)) / sum(parts) for k in range(len(parts))]
            with pytest.MonkeyPatch.context() as patch:
                for module in (ddpm, posterior):
                    patch.setattr(module, "sqrt", root)
                    patch.setattr(module, "log", log)
                claim(rational(m), rng.randint(first, len(parts) - 1),
                      lambda: Fraction(rng.randint(1, 2 ** 32) - 2 ** 31, 10 ** 6))
        for name in ("__name__", "__qualname__", "__doc__", "__module__"):
            setattr(proved, name, getattr(claim, name))
        return given(st.integers(0, 2 ** 64 - 1))(proved)
    return prove


def best_eps(x_t, t, m, s2, schedule):
    """The best noise prediction for data from N(m, s²), in closed form; in whatever arithmetic."""
    kept, added = (root(x) if isinstance(x, Fraction) else x ** 0.5
                   for x in (schedule.alpha_bar[t], schedule.one_minus_alpha_bar[t]))
    return added * (x_t - kept * m) / (schedule.alpha_bar[t] * s2
                                       + schedule.one_minus_alpha_bar[t])


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
    lambda: schedule_of([-0.1]), lambda: schedule_of([1.5]), lambda: ddpm.respaced(PAPER, [1, 5]),
    lambda: ddpm.respaced(PAPER, [0, 5, 5]), lambda: ddpm.respaced(PAPER, [0, 5, 1001])])
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
    short = ddpm.respaced(schedule, times)
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
    assert walked([0] * t) == x0 and ddpm.naive_step(0, Fraction(1, 4), 1) == Fraction(1, 2)
    variance = sum((walked(unit) - x0) ** 2 for unit in np.eye(t, dtype=int).tolist())
    assert variance == sum(deviation ** 2 for deviation in deviations)


@exactly()
def test_the_scaled_diffuser_keeps_unit_variance(schedule, t, number):
    """V2, V4: α² + β² = 1 keeps a variance of 1; with α = √α_1, β = √β_1 the step is Ho (2)."""
    scale, deviation = root(schedule.alpha[1]), root(schedule.beta[1])
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
    assert abs(variance - 1) < abs(variance_0 - 1)


@exactly()
def test_composing_the_steps_gives_the_marginal(schedule, t, number):
    """Ho (4), N2, V3: t one-step kernels, means and variances multiplied out one by one."""
    mean, variance = x0, _ = number(), 0
    for s in range(1, t + 1):
        scale, added = q_step(1, s, schedule)
        mean, variance = scale * mean, scale ** 2 * variance + added
    assert q_marginal(x0, t, schedule) == (mean, variance)
    assert q_marginal(x0, 0, schedule) == (x0, 0)


@given(schedules, st.data(), pixels)
def test_any_two_times_compose(schedule, data, x0):
    """Ho (2, 4): q(x_t|x_s), s ≤ t, after q(x_s|x_0) gives q(x_t|x_0); neighbours give q_step."""
    s, t = sorted([data.draw(st.integers(0, schedule.T)), data.draw(st.integers(0, schedule.T))])
    mean_s, variance_s = q_marginal(x0, s, schedule)
    scale, added = q_between(1.0, s, t, schedule)
    mean_t, variance_t = q_marginal(x0, t, schedule)
    condition = 1 + abs(math.log(schedule.alpha_bar[t]))
    near(q_between(mean_s, s, t, schedule)[0], mean_t, condition)
    near(scale ** 2 * variance_s + added, variance_t, condition)
    if t < schedule.T:
        near(q_between(x0, t, t + 1, schedule), q_step(x0, t + 1, schedule))


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
    expected = q_between(1.0, s, t, schedule)[0] * q_marginal(0.0, s, schedule)[1]
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
    """Ho (13), section 3.2: σ_t² = β_t or β̃_t, but β̃_1 = 0 cannot be a density's variance: β̃_2
    stands for it, and β_1 where T = 1.
    """
    assert np.array_equal(posterior.reverse_variance("beta", schedule), schedule.beta)
    found, T = posterior.reverse_variance("beta_tilde", schedule), schedule.T
    assert found[2:].tolist() == [beta_tilde(t, schedule) for t in range(2, T + 1)]
    assert found[0] == 0 and found[1] == (found[2] if T > 1 else schedule.beta[1]) > 0


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

walkable = st.lists(st.floats(0.001, 0.9), min_size=1, max_size=8).map(tables)


@given(walkable, st.data())
@example(ONE_STEP, None)
def test_the_bound_telescopes_along_every_path(schedule, data):
    """Ho (3, 5), V7: log q(x_{1:T}|x_0)/p(x_{0:T}) is L_T + Σ L_{t−1} + L_0,
    for any path and any reverse.
    """
    number = (lambda: data.draw(pixels)) if data else (lambda: 0.7)
    path = [np.array([number(), number()]) for _ in range(schedule.T + 1)]
    slopes = [number() for _ in range(schedule.T + 1)]

    def reverse(x_t, t):
        return slopes[t] * x_t + 0.1, 0.2 + slopes[t] ** 2

    terms = posterior.path_terms(path, reverse, schedule)
    size = sum(1 / variance for t in range(1, schedule.T + 1)
               for variance in (schedule.beta[t], beta_tilde(t, schedule) if t > 1 else 1))
    near(sum(terms), posterior.path_bound(path, reverse, schedule), scale=100 * (1 + size))


@given(walkable, st.data(), st.floats(-1, 1), st.floats(0.1, 3))
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

    bound = posterior.path_bound(path, reverse, schedule)
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


# ── The score, and the network that cannot be better ──────────────────────────────────────────────

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


def finite_set(n=6):
    """n images of 2 x 2 pixels, uint8, and what best_x0 makes of them as a network."""
    images = np.random.default_rng(5).integers(0, 256, (n, 2, 2, 1), np.uint8)
    pixels = images.reshape(n, -1) / 127.5 - 1

    def perfect(x_t, t, schedule, known=slice(None)):
        flat = x_t.double().numpy().reshape(len(x_t), -1)
        x0 = posterior.best_x0(flat, t.numpy(), pixels[known], schedule)
        eps = ddpm.eps_from_x0(flat, t.numpy()[:, None], x0, schedule)
        return torch.tensor(eps, dtype=torch.float32).reshape(x_t.shape)
    return images, perfect


def test_the_least_loss_is_that_of_the_perfect_network():
    """score, Ho (14): least_loss is what L_simple averages to, by quarter of t, with best_x0 in the
    network's place; labels lower it to that of each label's images.

    Five standard errors of 40,000 draws a quarter; an error of a twentieth is found.
    """
    images, perfect = finite_set()
    labels, schedule = np.arange(6) % 3, evenly(20, 0.01, 0.5)
    config = Config(T=20, beta_1=0.01, beta_T=0.5, image_shape=(1, 2, 2), p_uncond=0.25)
    x0 = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    tables, generator = sample.on_device(schedule, "cpu"), torch.Generator().manual_seed(0)
    for told in (None, labels):
        found = evaluate.least_loss(images, told, config, draws=40_000)
        for quarter in range(4):
            t = torch.randint(5 * quarter + 1, 5 * quarter + 6, (40_000,), generator=generator)
            i = torch.randint(0, 6, (40_000,), generator=generator)
            eps = torch.randn(40_000, 1, 2, 2, generator=generator)
            known = torch.rand(40_000, generator=generator) >= 0.25

            def eps_theta(x_t, t, label):
                eps_hat = perfect(x_t, t, schedule)
                for c in range(0 if told is None else 3):
                    this = known & (i % 3 == c)
                    eps_hat[this] = perfect(x_t[this], t[this], schedule, labels == c)
                return eps_hat
            loss = train.l_simple(eps_theta, x0[i], t, eps, None, tables).double()
            error = loss.std().item() / 200
            assert abs(found[quarter] - loss.mean().item()) < 5 * error * math.sqrt(2) + 1e-6
            assert found[quarter] == 0 or error < 0.05 * found[quarter] or quarter == 0
    assert np.isnan(evaluate.least_loss(images, None, replace(config, T=2), 9)).tolist() == [
        False, True, False, True]


def test_the_perfect_network_has_the_least_bound():
    """score, Ho (5): on the images themselves no other prediction has a lower bound."""
    images, perfect = finite_set()
    x0, schedule = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1, evenly(50, 0.001, 0.3)

    def total(predict):
        terms = evaluate.bound(predict, schedule, x0, each=200)
        return {name: sum(mean for mean, _ in parts.values()) for name, parts in terms.items()}
    least = total(lambda x_t, t, i: perfect(x_t, t, schedule))
    for other in (lambda x_t, t, i: perfect(x_t, t, schedule) + 0.03,
                  lambda x_t, t, i: 0.97 * perfect(x_t, t, schedule),
                  lambda x_t, t, i: perfect(x_t, t, schedule, slice(5))):
        assert all(total(other)[name] > value for name, value in least.items())


@given(arrays(np.uint8, (3, 2, 2, 1)), arrays(np.uint8, (5, 2, 2, 1)))
def test_the_nearest_image_is_the_nearest(images, training):
    """Copies: the distance is the root of the mean square, pixels in [-1, 1]; 0 for a copy."""
    distance, index = evaluate.nearest(images, training)
    each = [[math.sqrt(((a / 127.5 - b / 127.5) ** 2).mean()) for b in training] for a in images]
    near(distance, np.min(each, axis=1), condition=10)
    near([row[i] for row, i in zip(each, index)], distance, condition=10)
    assert evaluate.nearest(training, training)[0].tolist() == [0] * 5


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
}


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
@given(beta=st.lists(betas, min_size=1, max_size=12), data=st.data(), a=pixels, b=pixels)
@example(beta=[1e-7, 1 - 1e-7, 1e-7, 0.5], data=None, a=1.0, b=0.5)
@example(beta=[1e-7] * 3, data=None, a=1.0, b=0.5)
def test_float64_keeps_its_digits(formula, beta, data, a, b):
    """Rounding: each formula, for any schedule, against its exact value (to sixty digits).

    The tables lose |ln ᾱ_t| roundings; the terms that cancel are as large as the formula's value
    for the signs of a and b that make it largest.
    """
    schedule = schedule_of(beta)
    alpha = [1 - Fraction(x) for x in schedule.beta.tolist()]
    alpha_bar = [math.prod(alpha[:t + 1]) for t in range(len(alpha))]
    exact = Schedule([1 - x for x in alpha], alpha, alpha_bar, [1 - x for x in alpha_bar])
    for t in [data.draw(st.integers(1, schedule.T))] if data else range(1, schedule.T + 1):
        with pytest.MonkeyPatch.context() as patch:
            for module in (ddpm, posterior):
                patch.setattr(module, "sqrt", functools.partial(root, digits=60 + 10 * len(beta)))
            value = float(formula(Fraction(a), Fraction(b), t, exact))
        near(formula(a, b, t, schedule), value, condition=1 + abs(math.log(alpha_bar[t])),
             scale=max(abs(formula(a, sign * b, t, schedule)) for sign in (1, -1)))


# ── Fewer steps: DDIM and DPM-Solver++ ────────────────────────────────────────────────────────────

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


@on_every_device
@given(schedule=mild, data=st.data())
def test_ddim_with_eta_1_is_the_posterior(device, schedule, data):
    """DDIM: η = 1 is a draw from q(x_{t−1}|x_t, x̂_0), Ho (6, 7), exactly."""
    t = data.draw(st.integers(1, schedule.T))
    (x_t, _, x0, _, z), (x_t32, _, x0_32, _, z32) = step_arguments(schedule, t, device)
    found = sample.ddim_step(x_t32, t, x0_32, z32, sample.on_device(schedule, device), eta=1.0)
    near32(found, draw(*posterior.posterior(x_t, x0, t, schedule), z), condition=10)


@given(schedule=mild, data=st.data(), eta=st.floats(0, 1))
def test_ddim_keeps_the_marginal_for_any_eta(schedule, data, eta):
    """DDIM: for the true x_0, √(1−ᾱ_{t−1}−σ²) ε + σ z has variance 1 − ᾱ_{t−1}:
    x_{t−1} is from q(x_{t−1}|x_0).
    """
    t = data.draw(st.integers(1, schedule.T))
    tables = Schedule(*map(torch.tensor, schedule))
    eps, z, x0 = torch.eye(3, dtype=torch.float64)         # three images, each fed one of the three
    x_t = tables.alpha_bar[t].sqrt() * x0 + tables.one_minus_alpha_bar[t].sqrt() * eps
    found = sample.ddim_step(x_t, t, x0, z, tables, eta).flatten().numpy()
    near((found[:2] ** 2).sum(), schedule.one_minus_alpha_bar[t - 1], scale=1e-3)
    near(found[2], math.sqrt(schedule.alpha_bar[t - 1]))
    near(found[1] ** 2, eta ** 2 * (beta_tilde(t, schedule)), scale=1e-3)


@on_every_device
@given(schedule=st.lists(st.floats(0.001, 0.7), min_size=3, max_size=6).map(tables),
       data=st.data())
def test_dpm_is_its_published_formula_and_with_eta_1_a_posterior_draw(device, schedule, data):
    """DPM: D looks half a step of λ ahead; then Lu's step, or with η = 1 a draw from
    q(x_{t−1}|x_t, D).
    """
    t = data.draw(st.integers(2, schedule.T - 1))
    (x_t, _, x0, x0_prev, z), (x_t32, _, x0_32, x0_prev32, z32) = step_arguments(
        schedule, t, device)
    past, now, ahead = (math.log(schedule.alpha_bar[u] / schedule.one_minus_alpha_bar[u]) / 2
                        for u in (t + 1, t, t - 1))
    D = x0 + (x0 - x0_prev) * ((ahead - now) / 2) / (now - past)
    (scale, variance), (_, variance_t) = (q_marginal(1.0, u, schedule) for u in (t - 1, t))
    exact = (math.sqrt(variance / variance_t) * x_t - scale * math.expm1(now - ahead) * D,
             draw(*posterior.posterior(x_t, D, t, schedule), z))
    # r is a quotient of differences of λ, and D magnifies its rounding
    digits_lost = max(abs(past), abs(ahead), 1) / min(ahead - now, now - past)
    condition = 10 + np.abs(D - x0).max() / np.abs(D).max() * digits_lost
    for eta, result in zip((0.0, 1.0), exact):
        found = sample.dpm_step(x_t32, t, x0_32, x0_prev32, z32,
                                sample.on_device(schedule, device), eta)
        near32(found, result, condition)


@given(schedule=mild, data=st.data())
def test_the_first_dpm_step_is_ddim(schedule, data):
    """DPM: with no x̂_0 before, and in the last step, DPM-Solver++ is DDIM with η = 0."""
    t = data.draw(st.integers(1, schedule.T))
    _, (x_t, _, x0, x0_prev, z) = step_arguments(schedule, t)
    tables = sample.on_device(schedule, "cpu")
    ddim = sample.ddim_step(x_t, t, x0, z, tables)
    assert torch.equal(sample.dpm_step(x_t, t, x0, None, z, tables), ddim)
    near32(sample.dpm_step(x_t, 1, x0, x0_prev, z, tables), x0.numpy())


@given(schedule=st.lists(st.floats(0.001, 0.7), min_size=2, max_size=6).map(tables),
       data=st.data())
def test_dpm_is_exact_where_the_prediction_does_not_change(schedule, data):
    """DPM: for constant x̂_0 the step lands on √ᾱ_{t−1} x̂_0 + σ_{t−1}/σ_t (x_t − √ᾱ_t x̂_0),
    for any step sizes.
    """
    t = data.draw(st.integers(1, schedule.T))
    tables = Schedule(*map(torch.tensor, schedule))
    x_t, x0 = (torch.tensor([0.3, -1.2], dtype=torch.float64),
               torch.tensor([0.5, 0.25], dtype=torch.float64))
    x0_prev = x0 if t < schedule.T else None
    found = sample.dpm_step(x_t, t, x0, x0_prev, torch.zeros(2), tables).flatten()
    (mean, variance), (mean_prev, variance_prev) = (q_marginal(x0.numpy(), u, schedule)
                                                    for u in (t, t - 1))
    near(found.numpy(), mean_prev + math.sqrt(variance_prev / variance) * (x_t.numpy() - mean),
         condition=100, scale=3)


def gaussian_walk(sampling, schedule, m, s2, noises):
    """The walk of Algorithm 2 with the exact ε* for N(m, s²) data, in float64."""
    tables, noises = Schedule(*map(torch.tensor, schedule)), iter(noises)
    step = sample.sampler_step(lambda x_t, t: best_eps(x_t, t, m, s2, tables), tables, sampling)
    return [x_t.flatten() for x_t in
            sample.algorithm_2(step, schedule.T, lambda: next(noises).reshape(-1, 1, 1, 1))]


@pytest.mark.parametrize("sampling, s2, result", [
    (Sampling("ddpm", clip=False), 1.0, 0.999900),
    (Sampling("ddpm", clip=False), 0.25, 0.250752),
    (Sampling("ddpm", variance="beta_tilde", clip=False), 1.0, 0.991067),
    (Sampling("ddpm", variance="beta_tilde", clip=False), 0.25, 0.246125),
    (Sampling("ddim", clip=False), 1.0, 0.996252),
    (Sampling("ddim", clip=False), 0.25, 0.248498)])
def test_the_walk_on_gaussian_data(sampling, s2, result):
    """Algorithm 2, N8, DDIM: with the exact ε* the output variance is known to six digits,
    image k fed noise k.
    """
    x0 = gaussian_walk(sampling, PAPER, 0.0, s2, torch.eye(1000, dtype=torch.float64))[-1]
    assert (x0 ** 2).sum().item() == pytest.approx(result, abs=1e-6)


GOLDEN = np.array([-2, -0.5, 0.1, 1.5])
ALL, TWENTY = np.arange(1001), np.array([0, *range(1, 952, 50)])


@pytest.mark.parametrize("times, sampling, x_0", [
    (ALL, Sampling("ddpm"), [-0.024291897992953844, -0.0012977612748805542, 0.006858829319140749,
                             0.009794089081326758]),
    (ALL, Sampling("ddpm", clip=False), [-18.586702693842323, -0.04818612309637783,
                                         0.00474202651982024, 0.5858823933833934]),
    (ALL, Sampling("ddpm", variance="beta_tilde"),
     [-0.02346455512009724, -0.004628555412516057, 0.004247353607453527, 0.01172704648171584]),
    (ALL, Sampling("ddpm", variance="beta_tilde", clip=False),
     [-18.58585917182956, -0.051514292110084556, 0.0021308849068037757, 0.5877906780099192]),
    (TWENTY, Sampling("ddim"), [-1.0, -0.46810051712500694, 0.4585122993046461, 1.0]),
    (TWENTY, Sampling("ddim", clip=False), [-105.12857411250327, -9.573844393777103,
                                            0.14926231514005536, 56.70111635388783]),
    (TWENTY, Sampling("ddim", eta=0.5), [-0.9977774239225512, -0.2088157325125671,
                                         0.2435664420670385, 0.9532946599353627]),
    (TWENTY, Sampling("ddim", eta=0.5, clip=False),
     [-73.01705732273072, -13.176709585402529, -1.180064905157027, 42.828992493696035]),
    (TWENTY, Sampling("ddim", eta=1.0), [-0.008345831832168717, 0.09911717748400926,
                                         0.2987623354987424, 0.3428354631399322]),
    (TWENTY, Sampling("ddim", eta=1.0, clip=False),
     [-19.138793141220678, -4.8085040837095425, -0.27967749681909343, 7.4462202238265425])])
def test_the_walk_is_that_of_diffusers(times, sampling, x_0):
    """Algorithm 2, DDIM: diffusers 0.42.1 ends in the same four pixels, in float64: ε_θ is
    tanh(0.7 x + 0.3 sin t), x_T as below, z of the i-th step cos(1.3 j + i).
    """
    tables_64 = Schedule(*map(torch.tensor, ddpm.respaced(PAPER, times)))
    noises = iter([GOLDEN, *(np.cos(1.3 * np.arange(4) + i) for i in range(1000))])
    step = sample.sampler_step(lambda x, t: torch.tanh(0.7 * x + 0.3 * math.sin(times[t])),
                               tables_64, sampling)
    *_, found = sample.algorithm_2(step, len(times) - 1,
                                   lambda: torch.tensor(next(noises)).reshape(4, 1, 1, 1))
    # without clipping x̂_0 begins at x_T/√ᾱ_T, 157 times as large as x_T
    near(found.flatten().numpy(), x_0, scale=1 if sampling.clip else 300)


def test_orders_of_the_solvers():
    """DDIM is of order 1, DPM-Solver++(2M) of order 2:
    half the step, half (a quarter of) the error, from 80 steps on.
    """
    m, s2 = 0.3, 0.25
    fine = evenly(12800, 1e-4 / 12.8, 0.02 / 12.8)
    errors = {}
    for name in ("ddim", "dpm"):
        for steps in (80, 160, 320):
            # end at t_1 = 1/80 of the way, where λ is finite:
            # what is left is one first-order step for both
            times = np.concatenate(
                [[0], np.linspace(12800 // 80, 12800, steps + 1).round().astype(int)])
            short = ddpm.respaced(fine, times)
            noises = [torch.ones(1, dtype=torch.float64)] + [torch.zeros(1)] * steps
            *_, x_1, _ = gaussian_walk(Sampling(name, eta=0.0, clip=False), short, m, s2, noises)
            v = [ddpm.variance_at(t, s2, short) for t in (short.T, 1)]
            root = np.sqrt(short.alpha_bar[[short.T, 1]])
            # the flow scales with √v
            exact = root[1] * m + math.sqrt(v[1] / v[0]) * (1.0 - root[0] * m)
            errors[name, steps] = abs(x_1.item() - exact)
    assert errors["ddim", 80] / errors["ddim", 160] == pytest.approx(2, abs=0.1)
    assert errors["ddim", 160] / errors["ddim", 320] == pytest.approx(2, abs=0.1)
    assert errors["dpm", 80] / errors["dpm", 160] == pytest.approx(4, abs=0.5)
    assert errors["dpm", 160] / errors["dpm", 320] == pytest.approx(4, abs=0.4)
    assert errors["dpm", 80] < errors["ddim", 320]


@given(st.integers(1, 1000), st.data())
@example(1, None)
@example(1000, None)
def test_the_times_are_distinct_and_go_from_0_to_T(T, data):
    """DDIM: N steps stand at N different times for any N ≤ T, evenly in √t where there is room."""
    steps = data.draw(st.integers(1, T)) if data else T
    tau = ddpm.times(T, steps)
    assert tau[0] == 0 and tau[-1] == T and len(tau) == steps + 1 and np.all(np.diff(tau) >= 1)
    for i, t in enumerate(tau.tolist()):
        assert t == i or abs(t - Fraction(T * i * i, steps * steps)) <= Fraction(1, 2)
    assert ddpm.times(1000, 10).tolist() == [0, 10, 40, 90, 160, 250, 360, 490, 640, 810, 1000]


# ══ PyTorch against NumPy ═════════════════════════════════════════════════════════════════════════

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
    for found, exact in zip(sample.on_device(schedule, device), schedule):
        assert np.array_equal(found.cpu().numpy(), exact.astype(np.float32))


@on_every_device
@given(seed=st.integers(0, 99), moment=moments(first=0))
@example(seed=0, moment=(PAPER, 1))
def test_torch_x_t_is_numpy_x_t(device, seed, moment):
    """Ho (4), N3: q_sample in both worlds, with one t for all images and with a t for each."""
    schedule, t = moment
    (x0, x0_torch), (eps, eps_torch) = (batch_of(seed + i, 2, 1, 4, 4, device=device)
                                        for i in (0, 100))
    tables = sample.on_device(schedule, device)
    near32(sample.q_sample(x0_torch, t, eps_torch, tables), ddpm.q_sample(x0, t, eps, schedule))
    each = np.array([t, schedule.T])
    near32(sample.q_sample(x0_torch, torch.tensor(each, device=device), eps_torch, tables),
           ddpm.q_sample(x0, each.reshape(2, 1, 1, 1), eps, schedule))


@on_every_device
def test_torch_loss_and_its_gradient_are_numpy_s(device):
    """Ho (14), N6, N7: the loss is ddpm.l_simple of the same noise, its gradient 2(ε_θ − ε)/n."""
    (x0, x0_torch), (eps, eps_torch) = (batch_of(i, 5, 1, 8, 8, device=device) for i in (0, 1))
    t = np.array([1, 2, 500, 999, 1000])
    label = torch.tensor([0, 1, 2, 3, 0], device=device)
    net, outputs = small_unet().to(device), []

    def eps_theta(x_t, t, label):
        outputs.append(net(x_t, t, label))
        outputs[0].retain_grad()
        return outputs[0]

    loss = train.l_simple(eps_theta, x0_torch, torch.tensor(t, device=device), eps_torch, label,
                          sample.on_device(PAPER, device))
    loss.mean().backward()
    x_t = ddpm.q_sample(x0, t.reshape(-1, 1, 1, 1), eps, PAPER)
    with torch.no_grad():
        eps_hat = net(torch.tensor(x_t, dtype=torch.float32, device=device),
                      torch.tensor(t, device=device), label)
    eps_hat = eps_hat.cpu().double().numpy()
    near32(loss, [ddpm.l_simple(*pair) for pair in zip(eps, eps_hat)], condition=3)
    near32(outputs[0].grad, 2 * (eps_hat - eps) / eps.size, condition=3)


def test_a_perfect_network_has_no_loss():
    """Ho (14): the noise in the loss is the noise in x_t:
    a network that knows it scores 0, silence scores 1.
    """
    (_, x0), (_, eps) = batch_of(0, 64, 1, 8, 8), batch_of(1, 64, 1, 8, 8)
    t, tables = torch.arange(1, 65), sample.on_device(PAPER, "cpu")

    def knows(x_t, t, label):
        root, rest = (table[t].sqrt().reshape(-1, 1, 1, 1)
                      for table in (tables.alpha_bar, tables.one_minus_alpha_bar))
        return (x_t - root * x0) / rest
    assert train.l_simple(knows, x0, t, eps, None, tables).max() < 1e-8
    silent = train.l_simple(lambda x_t, t, label: 0 * x_t, x0, t, eps, None, tables)
    near32(silent, eps.double().square().mean((1, 2, 3)).numpy())


@given(st.integers(1, 64), st.integers(1, 3))
def test_several_processes_draw_what_one_draws(count, world):
    """Ho Algorithm 1, lines 2 to 4: the parts of all processes, dealt in turn, are one's whole."""
    one = SharedGenerator(7)
    parts = [SharedGenerator(7, "cpu", rank, world) for rank in range(world)]
    for numbers in (lambda rng, n: rng.integers(0, 9, n), lambda rng, n: rng.uniform(n),
                    lambda rng, n: train.stratified_t(n, 1000, rng),
                    lambda rng, n: rng.standard_normal((n, 2, 3))):
        whole, dealt = numbers(one, count * world), [numbers(rng, count) for rng in parts]
        assert torch.equal(torch.stack(dealt, 1).reshape(whole.shape), whole)


@given(st.integers(1, 300), st.sampled_from([1, 2, 10, 1000]), st.integers(0, 10**6))
def test_t_is_drawn_from_1_to_T(count, T, seed):
    """Ho Algorithm 1, line 3: every t in 1..T, and T too; the k-th draw is in the k-th part."""
    t = train.stratified_t(count, T, SharedGenerator(seed)).numpy()
    assert t.min() >= 1 and t.max() <= T and len(t) == count
    assert np.all(np.abs((t - 0.5) / T - (np.arange(count) + 0.5) / count)
                  <= 0.5 / T + 0.5 / count + 1e-6)


def test_the_largest_uniform_is_still_a_time(monkeypatch):
    """Ho Algorithm 1, line 3: u may round up to 1 in float32, and t = T + 1 is in no table."""
    monkeypatch.setattr(torch, "rand", lambda shape, **to: torch.full(shape, 1 - 2.0 ** -24))
    assert train.stratified_t(64, 1000, SharedGenerator(0))[-1] == 1000


def test_every_t_is_equally_likely():
    """Ho Algorithm 1, line 3: of 20,000 draws of 1..10 in batches of 3 each is about a tenth.

    Six standard errors of 0.0021: a false alarm once in 10⁸; a t that is never drawn, or drawn by
    an eighth too often, is found.
    """
    noise = SharedGenerator(0)
    t = torch.cat([train.stratified_t(3, 10, noise) for _ in range(20000 // 3)])
    fractions = np.bincount(t.numpy(), minlength=11)[1:] / len(t)
    assert np.all(np.abs(fractions - 0.1) < 6 * math.sqrt(0.09 / 20000))


def test_algorithm_1_is_its_six_lines():
    """Ho Algorithm 1: each step takes the next batch, then t, then ε from the noise, descends once
    on the mean loss of these, and yields t and each image's loss.
    """
    tables, noise, replay = sample.on_device(PAPER, "cpu"), SharedGenerator(3), SharedGenerator(3)
    data = [(torch.randn(5, 1, 2, 2), torch.arange(5) + k) for k in range(3)]
    batches, descended, seen = iter(data), [], []

    def eps_theta(x_t, t, label):
        seen.append((x_t, t, label))
        return 0.5 * x_t
    loop = train.algorithm_1(eps_theta, lambda: next(batches), tables, noise, descended.append)
    for k, (times, loss) in zip(range(3), loop):
        t, eps = train.stratified_t(5, 1000, replay), replay.standard_normal((5, 1, 2, 2))
        x0, label = data[k]
        x_t = sample.q_sample(x0, t, eps, tables)
        assert torch.equal(seen[k][0], x_t) and torch.equal(seen[k][1], t) and len(seen) == k + 1
        assert seen[k][2] is label and torch.equal(times, t) and len(descended) == k + 1
        assert torch.equal(loss.mean(), descended[k]) and loss.shape == (5,)
        near32(descended[k], ddpm.l_simple(eps.double().numpy(), 0.5 * x_t.double().numpy()),
               condition=3)


class Linear(nn.Module):
    """ε_θ(x_t, t) = w_t x_t: a network that can express the best prediction for N(0, s²) data."""

    def __init__(self, T):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(T + 1))

    def forward(self, x_t, t, label=None):
        return self.w[t].reshape(-1, 1, 1, 1) * x_t


def test_training_on_gaussian_data_reaches_the_floor_and_not_below():
    """Ho (14), Algorithm 1: the loop itself, with Adam and the average of the parameters, brings
    the expected loss on N(0, 1) to 0.2755, from above.
    """
    config, noise, data = Config(lr=0.05, steps=400, warmup=10), *map(SharedGenerator, (0, 1))
    net, ema, step = Linear(1000), Linear(1000), 0
    adam = [torch.optim.Adam([dict(params=net.parameters(), initial_lr=config.lr)],
                             betas=(0.9, config.beta2))]

    def descend(loss):
        nonlocal step
        step += 1
        train.gradient_step(loss, net, adam, step, config)
        train.update_ema(ema, net, step, config.ema_decay)
    for _ in zip(range(400), train.algorithm_1(
            net, lambda: (data.standard_normal((1000, 1, 2, 2)), None),
            sample.on_device(PAPER, "cpu"), noise, descend)):
        pass
    for trained in (net, ema):
        w = trained.w.detach().double().numpy()[1:]
        root, rest = np.sqrt(PAPER.alpha_bar[1:]), np.sqrt(PAPER.one_minus_alpha_bar[1:])
        expected = ((w * root) ** 2 + (1 - w * rest) ** 2).mean()
        assert 0.275513 - 1e-6 < expected < 0.2775


def test_the_gradient_step_goes_down_the_clipped_gradient():
    """Ho Algorithm 1, line 5: the gradient's norm is at most grad_clip, whatever was before."""
    net, config = Linear(3), Config(steps=1000, warmup=1, grad_clip=2.0, decay=False)
    group = dict(params=net.parameters(), initial_lr=0.1)
    sgd = [torch.optim.SGD([group], lr=9)]              # whose step is lr times the gradient
    for step in (1, 2):
        train.gradient_step((net.w * torch.tensor([0.0, 300.0, 0.0, 400.0])).sum(), net,
                            sgd, step, config)
        np.testing.assert_allclose(net.w.detach(), step * np.array([0, -0.12, 0, -0.16]), atol=1e-6)


def test_the_average_follows_the_parameters_alone():
    """EMA: d = min(decay, (1 + step)/(10 + step)); buffers are left alone."""
    net, ema = Linear(3), Linear(3)
    net.register_buffer("table", torch.ones(1))
    ema.register_buffer("table", torch.zeros(1))
    nn.init.normal_(net.w)
    train.update_ema(ema, net, step=1, decay=0.75)
    np.testing.assert_allclose(ema.w.detach(), net.w.detach() * (1 - 2 / 11), atol=1e-6)
    before = ema.w.detach().clone()
    train.update_ema(ema, net, step=500, decay=0.75)
    np.testing.assert_allclose(ema.w.detach(), 0.75 * before + 0.25 * net.w.detach(), atol=1e-6)
    assert ema.table == 0


def test_the_learning_rate_rises_and_falls():
    """Warmup in a straight line; with decay down to the last step's 1/steps; without, constant."""
    config = Config(warmup=10, steps=100)
    assert train.learning_rate(1, config) == pytest.approx(0.1)
    assert train.learning_rate(10, config) == pytest.approx(0.91)
    assert train.learning_rate(100, config) == pytest.approx(0.01)
    assert train.learning_rate(100, replace(config, decay=False)) == 1


def test_muon_steps_are_orthogonal_and_adam_has_the_rest():
    """Muon: each hidden matrix moves by lr √max(1, rows/columns) times an orthogonal matrix along
    its gradient's; every parameter has one optimizer; the paper's has Adam alone.

    Five rounds of Newton-Schulz leave singular values of 0.6 to 1.3 where the gradient has those of
    at least a hundredth of the largest.
    """
    net = small_unet()
    config = replace(SMALL, lr=0.0625, muon_lr=0.125, warmup=1, decay=False, grad_clip=1e9)
    adam, muon = found = optimizers(net, config)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    train.gradient_step(sum((p ** 2).sum() for p in net.parameters()), net, found, 1, config)
    matrices = 0
    for name, p in net.named_parameters():
        step = before[name] - p.detach()
        if name.startswith(("down", "middle", "up")) and p.ndim > 1:
            matrices += 1
            rows, columns = step.flatten(1).shape
            step = step.flatten(1) / (0.125 * math.sqrt(max(1, rows / columns)))
            values = torch.linalg.svdvals(before[name].flatten(1))
            large = torch.linalg.svdvals(step)[values > 0.01 * values[0] * len(values)]
            assert 0.55 < large.min() and large.max() < 1.35
            assert (step * before[name].flatten(1)).sum() > 0.5 * values.sum()
        else:                                                   # Adam's first step is lr sign(g)
            near32(step, 0.0625 * before[name].sign().numpy(), condition=1000)
    assert matrices == len(muon.param_groups[0]["params"]) > 10
    assert len(adam.param_groups[0]["params"]) + matrices == len(list(net.parameters()))
    assert [type(o).__name__ for o in optimizers(net, replace(SMALL, muon_lr=0.0))] == ["Adam"]
    assert PRESETS["cifar10"].muon_lr == 0


def test_muon_is_pytorch_s_in_float32():
    """Muon: three steps on a wide, a tall and a square matrix are torch.optim.Muon's, which rounds
    to bfloat16, and to a convolution they are those to its matrix.
    """
    torch.manual_seed(0)
    shapes = [(8, 24), (24, 8), (16, 16), (8, 4, 3, 3)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().flatten(1).clone()) for p in ours]
    mine = Muon([dict(params=ours)])
    mine.param_groups[0]["lr"] = 0.1
    other = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.flatten(1).clone()
        mine.step(), other.step()
    for p, q in zip(ours, theirs):
        difference = (p.detach().flatten(1) - q.detach()).norm() / 0.3 / min(q.shape) ** 0.5
        assert 0 < difference < 0.03                       # of the path; bfloat16 has 2⁻⁸ = 0.004


@pytest.mark.parametrize("resident", [True, False])
def test_batches_are_images_with_their_labels(resident, monkeypatch):
    """Ho Algorithm 1, line 2: x_0 ~ q(x_0), images in [-1, 1] in any order, each with its label;
    a tenth of the labels is dropped, one by one, and half of the images mirrored.

    Five standard errors of 8,000: a false alarm once in 10⁶; shares off by 0.02 and 0.03 are found.
    """
    monkeypatch.setattr(train, "RESIDENT", resident * 10**6)
    images = np.zeros((40, 2, 2, 3), np.uint8)                  # image k: 5 k, its right half 255
    images[:] = 5 * np.arange(40)[:, None, None, None]
    images[:, :, 1] = 255
    config = Config(batch=400, num_classes=7, flip=True)
    next_batch = train.batches(images, np.arange(40) % 7, config, SharedGenerator(0),
                               torch.device("cpu"))
    batches = [next_batch() for _ in range(20)]
    x0, label = (torch.cat(parts) for parts in zip(*batches))
    assert x0.shape == (8000, 3, 2, 2) and x0.min() == -1 and x0.max() == 1
    flipped = x0[:, 0, 0, 0] == 1
    k = torch.round((torch.where(flipped, x0[:, 0, 0, 1], x0[:, 0, 0, 0]) + 1) * 127.5 / 5).long()
    dropped = label == 7
    assert torch.equal(label[~dropped], k[~dropped] % 7)
    for found, expected in ((flipped, 0.5), (dropped, 0.1)):
        deviation = math.sqrt(expected * (1 - expected) / 8000)
        assert abs(found.float().mean() - expected) < 5 * deviation
    assert all(0 < (label == 7).sum() < 400 for _, label in batches)
    assert np.bincount(k, minlength=40).min() > 100                 # of 200 each
    assert len({tuple(x0.flatten().tolist()) for x0, _ in batches}) == 20
    plain = train.batches(images, None, Config(batch=400), SharedGenerator(0), torch.device("cpu"))
    x0, label = plain()
    assert label is None and torch.all(x0[:, :, :, 1] == 1)


# ── The U-Net ─────────────────────────────────────────────────────────────────────────────────────

def test_the_paper_s_network_has_the_paper_s_size():
    """Ho appendix B: 35.7 million parameters for CIFAR10, to the last; 113.7 million at 256x256."""
    paper = PRESETS["cifar10"]
    with torch.device("meta"):
        assert parameters(UNet(paper)) == 35_746_307
        assert parameters(UNet(replace(paper, image_shape=(3, 256, 256),
                                       channel_mult=(1, 1, 2, 2, 4, 4)))) == 113_673_219


@pytest.mark.parametrize("config, output, entries", [
    (Config(image_shape=(3, 16, 16), model_channels=8, channel_mult=(1, 2, 2), num_res_blocks=2,
            attention_resolutions=(8,), num_groups=4, patch_size=1, labels=False),
     (-0.24860960936457846, 0.6530918757364437),
     {0: -0.33475942927347047, 1: 0.1290635530323906, 512: -0.7026060780287101,
      768: -0.7830392976813665, 1535: 0.07227366757321466}),
    (Config(image_shape=(1, 8, 8), model_channels=8, channel_mult=(1, 1), num_res_blocks=1,
            attention_resolutions=(0,), num_groups=2, patch_size=1, labels=False),
     (-0.8725843307705227, 1.4990473403226252),
     {0: -0.16148422860925232, 1: 0.03736881844926068, 42: -2.0820145439076807,
      64: 0.05764875054820978, 127: -0.5198524678073337})], ids=["attention", "small"])
def test_the_network_is_that_of_diffusers(config, output, entries):
    """Ho appendix B: diffusers 0.42.1 computes the same output (its mean, mean square and some
    entries) from weights that a rule makes: a swapped skip, a missing activation, q, k and v in
    another order, other padding, groups or epsilon would show.
    """
    net = UNet(config).eval()
    weights = net.state_dict()
    names = {theirs: (name, part) for name in weights
             for part, theirs in enumerate(their_names(name, config.num_res_blocks))}
    for n, theirs in enumerate(sorted(names)):
        name, part = names[theirs]
        tensor = weights[name].chunk(3)[part] if "qkv" in name else weights[name]
        v = np.sin(n + np.arange(tensor.numel()) ** 2.0).reshape(tensor.shape)
        if tensor.ndim > 1:
            v = v * math.sqrt(3 / tensor[0].numel())
        else:
            v = 0.1 * v + theirs.endswith("weight")
        tensor.copy_(torch.tensor(v, dtype=torch.float32))
    shape = (2, *config.image_shape)
    x = torch.tensor(np.cos(0.11 * np.arange(math.prod(shape))).reshape(shape),
                     dtype=torch.float32)
    with torch.no_grad():
        found = net(x, torch.tensor([3, 870])).flatten().double()
    near32(torch.stack([found.mean(), found.square().mean()]), output, condition=3)
    near32(found[list(entries)], list(entries.values()), condition=3)


def test_the_time_embedding_is_sines_then_cosines():
    """Ho appendix B: sin and cos of t · 10000^(−k/(half−1)), against plain float powers."""
    t = torch.tensor([1, 2, 500, 1000])
    found = time_embedding(t, 8)
    for row, time in zip(found, t.tolist()):
        angles = [time * 10000 ** (-k / 3) for k in range(4)]
        near32(row, [math.sin(a) for a in angles] + [math.cos(a) for a in angles], condition=100)


def test_attention_is_the_softmax_of_dot_products():
    """Ho appendix B: x + proj(softmax(Q Kᵀ/√C) V), written out in NumPy."""
    torch.manual_seed(0)
    attention = Attention(8, groups=2)
    nn.init.normal_(attention.norm.weight), nn.init.normal_(attention.norm.bias)
    x, x_torch = batch_of(0, 2, 8, 3, 3)
    weights = {name: p.detach().double().numpy() for name, p in attention.named_parameters()}
    for found, image in zip(attention(x_torch), x):
        groups = image.reshape(2, -1)
        groups = ((groups - groups.mean(1, keepdims=True))
                  / np.sqrt(groups.var(1, keepdims=True) + 1e-6))
        pixels = (groups.reshape(8, 9).T * weights["norm.weight"] + weights["norm.bias"])
        q, k, v = np.split(pixels @ weights["qkv.weight"].T + weights["qkv.bias"], 3, axis=1)
        attends = np.exp(q @ k.T / math.sqrt(8))
        attends /= attends.sum(1, keepdims=True)
        h = attends @ v @ weights["proj.weight"].T + weights["proj.bias"]
        near32(found, image + h.T.reshape(8, 3, 3), condition=10)


def test_a_block_is_its_equation():
    """Ho appendix B: norm, act, conv, + Linear(act(temb)), norm, act, conv, + shortcut,
    with plain operations.
    """
    torch.manual_seed(1)
    block = Block(4, 8, 6, groups=2, dropout=0.0, attention=False)
    for p in block.parameters():
        nn.init.normal_(p)
    x, temb = torch.randn(2, 4, 5, 5), torch.randn(2, 6)

    def norm(x, weight, bias):
        g = x.reshape(2, 2, -1)
        g = (g - g.mean(2, keepdim=True)) / (g.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
        return g.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]

    def act(x):
        return x / (1 + torch.exp(-x))

    h = block.conv1(act(norm(x, block.norm1.weight, block.norm1.bias)))
    h = h + (act(temb) @ block.time.weight.T + block.time.bias)[:, :, None, None]
    h = block.conv2(act(norm(h, block.norm2.weight, block.norm2.bias)))
    near32(block(x, temb), (h + block.shortcut(x)).detach().numpy(), condition=10)


@pytest.mark.parametrize("groups", [1, 4])
def test_norms_of_bfloat16_have_exact_sums(groups):
    """Ho appendix B: GroupNorm of bfloat16 is that of exact numbers but for its last rounding, also
    of pixels far from 0, where sums in bfloat16 would be off by whole units.
    """
    norm, generator = Norm(groups, 16, eps=1e-6), torch.Generator().manual_seed(0)
    x = (20 + 3 * torch.randn(2, 16, 8, 8, generator=generator)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x.contiguous(memory_format=torch.channels_last))
    grouped = x.double().reshape(2, groups, -1)
    exact = ((grouped - grouped.mean(2, keepdim=True))
             / (grouped.var(2, correction=0, keepdim=True) + 1e-6).sqrt()).reshape(x.shape)
    assert found.dtype == torch.bfloat16
    np.testing.assert_allclose(found.detach().double(), exact, rtol=2**-8, atol=1e-4)


def test_downsampling_pads_right_and_bottom_only():
    """Ho appendix B: conv3 with stride 2 sees nothing above-left, and a zero beyond the last."""
    down = Downsample(1)
    nn.init.zeros_(down.conv.bias), nn.init.zeros_(down.conv.weight)
    down.conv.weight.data[0, 0, 0, 0] = 1
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(down(x, None), x[:, :, ::2, ::2])
    down.conv.weight.data[0, 0] = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 1.0]])
    assert down(x, None)[0, 0].tolist() == [[10, 0], [0, 0]]


def test_an_untrained_network_predicts_no_noise_and_every_parameter_counts():
    """Ho appendix B: the output begins at 0; with any other weights, every one is used."""
    torch.manual_seed(0)
    net = UNet(SMALL)
    for block in (m for m in net.modules() if isinstance(m, Block)):       # each begins as nothing
        h, temb = torch.randn(2, block.norm1.num_channels, 4, 4), torch.randn(2, 32)
        assert torch.equal(block(h, temb), block.shortcut(h))
    x, t, label = torch.randn(4, 1, 8, 8), torch.tensor([1, 5, 9, 1000]), torch.tensor([0, 1, 2, 3])
    assert torch.count_nonzero(net(x, t, label)) == 0
    channels = net.middle[0].attention.proj.in_features
    for weight in net.middle[0].attention.qkv.weight.chunk(3):    # uniform of variance 1/fan_avg
        assert 0.9 < weight.abs().max() / math.sqrt(3 / channels) <= 1
    net = small_unet()
    net(x, t, label).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_the_network_sees_t_and_the_label():
    """N6: ε_θ(x_t, t) depends on t; a label changes it, the one after the last stands for none."""
    net, x = small_unet(), torch.randn(1, 1, 8, 8).repeat(4, 1, 1, 1)
    with torch.no_grad():
        by_t = net(x, torch.tensor([1, 2, 500, 1000]), torch.zeros(4, dtype=torch.long))
        by_label = net(x, torch.full((4,), 7), torch.tensor([0, 1, 2, 3]))
    for outputs in (by_t, by_label):
        assert min((outputs[i] - outputs[j]).abs().max() for i in range(4) for j in range(i)) > 1e-4


@pytest.mark.parametrize("shape, patch", [((1, 8, 8), 1), ((3, 12, 20), 1), ((1, 28, 28), 2),
                                          ((3, 32, 32), 4)])
def test_any_size_that_can_be_halved(shape, patch):
    """Ho appendix B: the output has the input's shape; other sizes are refused."""
    net = small_unet(image_shape=shape, num_classes=0, patch_size=patch)
    x = torch.randn(2, *shape)
    assert net(x, torch.tensor([1, 2])).shape == x.shape
    with pytest.raises(ValueError, match=f"multiples of {2 * patch}"):
        small_unet(image_shape=(shape[0], shape[1] + 1, shape[2]), patch_size=patch)
    with pytest.raises(ValueError, match="groups"):
        UNet(replace(SMALL, model_channels=102, num_groups=4))


# ── Algorithm 2: sampling ─────────────────────────────────────────────────────────────────────────

@on_every_device
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@given(schedule=mild, data=st.data())
def test_torch_reverse_step_is_numpy_s(device, variance, schedule, data):
    """Ho (1, 11), N8, V6: one step of Algorithm 2, with the same noise, σ_t² = β_t and β̃_t."""
    t = data.draw(st.integers(1, schedule.T))
    (x_t, eps, _, _, z), (x_t32, eps32, _, _, z32) = step_arguments(schedule, t, device)
    sigma2 = posterior.reverse_variance(variance, schedule)[t]
    found = sample.ddpm_step(x_t32, t, eps32, z32 * (t > 1), sample.on_device(schedule, device),
                             variance)
    near32(found, reverse_step(x_t, eps, t, z, sigma2, schedule), condition=10)


WALK = replace(SMALL, T=12, beta_1=0.01, beta_T=0.3, float32=True, num_classes=0)


@on_every_device
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_whole_walk_through_a_network_is_numpy_s(device, clip, variance, seed):
    """Algorithm 2, N4, N8: generate() against reverse_step: same network, same noise, every x_t."""
    net, schedule = small_unet(seed, num_classes=0).to(device), evenly(12, 0.01, 0.3)
    sampling = Sampling("ddpm", variance=variance, clip=clip, seed=seed)
    found = list(sample.generate(net, WALK, sampling, range(5, 7)))
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
        x_t = reverse_step(x_t, eps, t, z, posterior.reverse_variance(variance, schedule)[t],
                           schedule)
        near32(found[13 - t], x_t, condition=30)


def test_clipping_changes_the_mean_it_claims_to_change():
    """Ho (10, 15): with clip the mean is the posterior's with x̂_0 in [-1, 1]; without it, x̂_0."""
    tables, x_t = sample.on_device(PAPER, "cpu"), torch.full((1, 1, 2, 2), 5.0)
    x0 = 5 / math.sqrt(PAPER.alpha_bar[900])
    for clip, x0_hat in ((True, 1.0), (False, x0)):
        for name in ("ddpm", "ddim"):
            sampling = Sampling(name, clip=clip, eta=None if name == "ddpm" else 1.0)
            step = sample.sampler_step(lambda x_t, t: 0 * x_t, tables, sampling)
            near32(step(x_t, 900, torch.zeros_like(x_t)), np.full(
                x_t.shape, posterior.posterior(5.0, x0_hat, 900, PAPER)[0]), condition=10)


class Half(nn.Module):
    """ε_θ = x_t/2: no network, but one that `generate` can call, and a record of its calls."""

    def __init__(self):
        super().__init__()
        self.factor, self.calls = nn.Parameter(torch.tensor(0.5)), []

    def forward(self, x_t, t, label=None):
        self.calls.append((x_t, t, label))
        return self.factor * x_t


POINT = Config(image_shape=(1, 1, 1), float32=True)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
@given(st.builds(dict, schedule=st.just("cosine"), T=st.integers(1, 4000))
       | st.builds(dict, T=st.integers(1, 4000), beta_T=st.floats(0.001, 0.5)),
       st.integers(1, 30), st.floats(0, 1))
@example(dict(schedule="cosine", T=1000), 5, 1.0)
@example(dict(T=2, beta_1=4.802559792604222e-09, beta_T=0.561), 2, 1.0)     # 1 − ᾱ − σ² below 0
@example(dict(T=1000, beta_T=0.5), 20, 1.0)                       # ᾱ_t is 0 in float32, twice
@example(dict(T=1000, beta_T=0.5), 20, 0.0)
def test_no_schedule_leads_to_an_image_that_is_no_number(sampler, schedule, steps, eta):
    """DDIM, DPM: whatever rounds to zero or below in float32, every x_t is finite."""
    sampling = Sampling(sampler, steps=steps, eta=eta)
    walk = sample.generate(Half(), replace(POINT, **schedule), sampling, range(1))
    assert all(torch.isfinite(x_t).all() for x_t in walk)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
@given(st.integers(1, 30), st.data())
@example(1, None)
def test_any_number_of_steps_calls_the_network_that_often(sampler, T, data):
    """DDIM, DPM: N steps from 1 to T: N calls, from T down, no t twice, and the walk ends at 0."""
    steps = data.draw(st.integers(1, T)) if data else 1
    config, sampling = replace(POINT, T=T, beta_1=0.01, beta_T=0.3), Sampling(sampler, steps=steps)
    for first_t in (1, 0):                                    # published networks count from 0
        net = Half()
        images = list(sample.generate(net, replace(config, first_t=first_t), sampling, range(2)))
        called = [t[0].item() for _, t, _ in net.calls]
        assert len(images) == steps + 1 and all(torch.isfinite(x).all() for x in images)
        assert called == [t - 1 + first_t for t in ddpm.times(T, steps)[:0:-1]]
    assert Sampling(sampler).calls(T) == Sampling(sampler, steps=999).calls(T) or sampler == "dpm"
    assert Sampling("dpm").calls(1000) == 20 and Sampling("dpm").calls(7) == 7


@on_every_device
def test_guidance_is_the_line_through_two_predictions(device):
    """CFG: s = 0 is unconditional, s = 1 conditional, all on a line; guiding ε is guiding x̂_0."""
    net = small_unet().to(device)
    x_t, t, label = (torch.randn(3, 1, 8, 8, device=device),
                     torch.tensor([1, 5, 9], device=device), torch.tensor([0, 1, 2], device=device))
    with torch.no_grad():
        null, conditional = net(x_t, t, torch.full_like(label, 3)), net(x_t, t, label)
        for s in (0.0, 1.0, 0.5, 3.0):
            expected = (1 - s) * null + s * conditional
            near32(sample.guided(net, x_t, t, label, s, null=3), expected.cpu().numpy(),
                   condition=10)
    x0 = [ddpm.x0_from_eps(x_t.cpu().numpy(), 5, e.cpu().numpy(), PAPER)
          for e in (null, conditional)]
    near32(torch.tensor(x0[0] + 3 * (x0[1] - x0[0])), ddpm.x0_from_eps(
        x_t.cpu().numpy(), 5, (null + 3 * (conditional - null)).cpu().numpy(), PAPER),
        condition=100)


def test_guidance_costs_twice_only_where_it_needs_both():
    """CFG: s = 0, s = 1 and no labels at all see each image once, any other s sees it twice; each
    image keeps its label, and the second half is without.
    """
    config, label, both = replace(POINT, num_classes=5), torch.tensor([3, 0, 4]), [5, 5, 5, 3, 0, 4]
    for sampling, rows, labels in (
            (Sampling(guidance=0.0), 3, [5, 5, 5]), (Sampling(guidance=1.0), 3, [3, 0, 4]),
            (Sampling(guidance=2.0), 6, both), (Sampling(), 6, both),
            (Sampling("ddpm"), 3, [3, 0, 4]), (Sampling("ddim"), 3, [3, 0, 4]),
            (Sampling(label="none"), 3, [3, 0, 4])):        # the caller's labels: they would be 5
        net = Half()
        list(sample.generate(net, config, replace(sampling, steps=2), range(3), label))
        assert len(net.calls) == 2 and [c[2].tolist() for c in net.calls] == [labels, labels]
        assert all(len(x_t) == len(t) == rows for x_t, t, _ in net.calls)
    net = Half()
    list(sample.generate(net, POINT, Sampling(guidance=2.0, steps=2), range(3)))
    assert [(len(x_t), label) for x_t, _, label in net.calls] == [(3, None)] * 2
    assert Sampling().guidance_used == Sampling(keep="top", label="3").guidance_used == 1.1
    assert Sampling(keep="top").guidance_used == 1


# ── Completion ────────────────────────────────────────────────────────────────────────────────────

KINDS = ("left", "right", "top", "bottom", "centre", "coarse")


@pytest.mark.parametrize("keep", KINDS)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_what_is_kept_is_a_projection(keep, rows, columns, seed):
    """completion: P is linear, P P = P, and it keeps what it says: the named half, the centre, or
    the means over 4 x 4 pixels.
    """
    height, width = 4 * rows, 4 * columns
    P = projection(keep, height, width)
    (x, x32), (_, y32) = (batch_of(seed + i, 2, 3, height, width) for i in (0, 1))
    near32(P(P(x32)), P(x32).numpy())
    near32(P(2 * x32 - y32), (2 * P(x32) - P(y32)).numpy(), condition=3)
    expected = np.zeros_like(x)
    for i in range(height):
        for j in range(width):
            known = dict(left=j < width / 2, right=j >= width / 2, top=i < height / 2,
                         bottom=i >= height / 2, coarse=True,
                         centre=abs(i + 0.5 - height / 2) < height / 4
                         and abs(j + 0.5 - width / 2) < width / 4)[keep]
            block = np.s_[:, :, i // 4 * 4:i // 4 * 4 + 4, j // 4 * 4:j // 4 * 4 + 4]
            expected[:, :, i, j] = known * (x[block].mean((2, 3)) if keep == "coarse"
                                            else x[:, :, i, j])
    near32(P(x32), expected)


def test_a_coarse_image_needs_whole_blocks():
    """completion: sides that are no multiples of 4 have no 4 x 4 means."""
    with pytest.raises(ValueError, match="multiples of 4"):
        projection("coarse", 8, 6)


@pytest.mark.parametrize("keep", KINDS)
@pytest.mark.parametrize("resample", [1, 3])
def test_completion_keeps_what_is_known(keep, resample):
    """completion: P x_t follows P q(x_t|x_0), its mean and variance, at every step, and at t = 0 it
    is P x_0; the rest differs.

    Five standard errors of at least 3,200 draws: a false alarm once in 10⁶, and a mean off by 0.1
    or a variance by an eighth is found.
    """
    schedule, P = evenly(12, 0.01, 0.3), projection(keep, 8, 8)
    known = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).repeat(800, 1, 1, 1)
    sampling = Sampling("dpm", keep=keep, resample=resample, steps=12)
    walk = list(sample.generate(Half(), WALK, sampling, range(800), known=known))
    near32(P(walk[-1]), P(known).numpy())
    assert (walk[-1] - known - P(walk[-1] - known)).abs().mean() > 0.1
    deviation = 0.25 if keep == "coarse" else 1.0                # of the mean over 16 pixels
    grid = np.s_[:, 0, ::4, ::4]
    if keep != "coarse":
        grid = np.s_[:, 0, P(torch.ones(1, 1, 8, 8))[0, 0] > 0]
    for t in (11, 6, 1):
        mean, variance = q_marginal(P(known)[grid].double().numpy(), t, schedule)
        z = (P(walk[12 - t])[grid].double().numpy() - mean) / math.sqrt(variance) / deviation
        assert abs(z.mean()) < 5 / math.sqrt(z.size)
        assert abs(z.var() - 1) < 5 * math.sqrt(2 / z.size)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
@given(schedule=mild, data=st.data())
def test_where_nothing_is_known_completion_is_the_plain_step(sampler, schedule, data):
    """completion: the rest is a step of the sampler inside; dpm's without the x̂_0 before, which is
    of another path: that is DDIM's.
    """
    t = data.draw(st.integers(1, schedule.T))
    _, (x_t, eps, x0, _, z) = step_arguments(schedule, t)
    tables = sample.on_device(schedule, "cpu")
    sampling = Sampling(sampler, keep="left", clip=False)
    step = sample.sampler_step(lambda x_t, t: eps, tables, sampling)
    step(z, t, z)                                                         # another path
    found = sample.completed(step, x0, lambda x: 0 * x, tables, lambda: z)(x_t, t, z)
    expected = (sample.ddpm_step(x_t, t, eps, z, tables) if sampler == "ddpm" else
                sample.ddim_step(x_t, t, sample.x0_from_eps(x_t, t, eps, tables), z, tables,
                                 eta=float(sampler == "dpm")))
    assert torch.equal(found, expected)


def test_resampling_goes_back_by_the_forward_step():
    """RePaint, Ho (2): between rounds x_t is a draw from q(x_t|x_{t−1}), with this step's β_t, and
    the step is taken from there with fresh noise; from x_0 there is no way back.
    """
    def image(value):
        return torch.full((1, 1, 2, 2), value)
    on_cpu = sample.on_device(tables([0.1, 0.36, 0.2]), "cpu")
    for t, rounds in ((2, [[2, -1.0, -5.0], [2, 0.8 * 2 + 0.6 * 2, 3.0]]),
                      (1, [[1, -1.0, -5.0]])):
        walked, noises = [], iter(map(image, [1.0, 2.0, 3.0, 4.0]))

        def step(x_t, t, z):
            walked.append([t, float(x_t.mean()), float(z.mean())])
            return image(2.0)
        complete = sample.completed(step, image(0.0), lambda x: 0 * x, on_cpu,
                                    lambda: next(noises), resample=2)
        complete(image(-1.0), t, image(-5.0))
        np.testing.assert_allclose(walked, rounds, rtol=1e-6)


def test_every_image_has_its_own_noise():
    """Determinism: picture i is the same in any batch;
    the noise is N(0, 1) and differs between images and seeds.

    Five standard errors of 16,384 draws: a false alarm once in 10⁶; a mean off by 0.04 or a
    variance off by a twentieth is found.
    """
    together = image_noise(3, range(64), (1, 16, 16), "cpu")
    apart = [image_noise(3, range(i, i + 16), (1, 16, 16), "cpu") for i in range(0, 64, 16)]
    for _ in range(3):
        z = together()
        assert torch.equal(z, torch.cat([noise() for noise in apart]))
    assert abs(z.mean()) < 5 / 128 and abs(z.var() - 1) < 5 * math.sqrt(2) / 128
    assert len({tuple(image.flatten().tolist()) for image in z}) == 64
    assert not torch.equal(image_noise(4, range(64), (1, 16, 16), "cpu")(),
                           image_noise(3, range(64), (1, 16, 16), "cpu")())


# ── The bound, estimated ──────────────────────────────────────────────────────────────────────────

def test_the_estimated_bound_is_the_closed_form_on_gaussian_data():
    """Ho (5, 12, 13), V7: bound with the exact ε* for N(0, s²):
    its three terms within five errors.

    A false alarm once in 10⁶; Σ L_{t−1} off by a quarter is found: an error is at most a twentieth.
    """
    s2, T = 0.04, 50
    schedule = evenly(T, 1e-3, 0.3)
    x0 = np.rint((np.random.default_rng(0).standard_normal((400, 1, 8, 8)) * math.sqrt(s2) + 1)
                 * 127.5) / 127.5 - 1
    s2 = x0.var()
    found = evaluate.bound(lambda x_t, t, i: best_eps(x_t, t[0].item(), 0.0, s2, schedule),
                           schedule, torch.tensor(x0, dtype=torch.float32), each=200)
    for variance, terms in found.items():
        sigma2 = posterior.reverse_variance(variance, schedule)
        matching = 0.0
        for t in range(2, T + 1):      # KL of the means' difference: its mean square in closed form
            v_t = ddpm.variance_at(t, s2, schedule)
            error = schedule.alpha_bar[t] * s2 / v_t
            slope = abs(reverse_mean(0.0, 1.0, t, schedule))
            matching += kl(0.0, beta_tilde(t, schedule), slope * math.sqrt(error), sigma2[t])
        mean, error = terms["L_{t-1}"]
        assert 0 < error < 0.05 * mean and abs(mean - matching / math.log(2)) < 5 * error
        expected = posterior.bits_per_dim(posterior.L_T(x0, schedule))
        assert terms["L_T"][0] == pytest.approx(expected, rel=1e-5)
        mean, error = terms["L_0"]
        # x_0 given x_1 has variance β_1 s²/v_1 around the reverse mean:
        # the code length of a bin of 2/255
        true = schedule.beta[1] * s2 / ddpm.variance_at(1, s2, schedule)
        expected = (true / sigma2[1] / 2 + 0.5 * math.log(2 * math.pi * sigma2[1])
                    + math.log(127.5)) / math.log(2)
        assert 0 < error < 0.05 and abs(mean - expected) < 5 * error + 0.01


def known_errors(delta, schedule, x0):
    """A network that sees x_0 and whose ε is off by delta[i] on image i, and the calls of it."""
    calls = []

    def predict(x_t, t, i):
        assert len(t) == len(i) == len(x_t)
        calls.append((t[0].item(), i.tolist()))
        ab = schedule.alpha_bar[calls[-1][0]]
        return (x_t - math.sqrt(ab) * x0[i]) / math.sqrt(1 - ab) + delta[i].reshape(-1, 1, 1, 1)
    return predict, calls


def test_the_estimated_bound_is_exact_for_a_network_off_by_a_constant():
    """Ho (5, 12, 13): no noise is left in the estimate where every image has the same error."""
    schedule = evenly(6, 0.05, 0.6)
    x0 = (torch.arange(3 * 2 * 2) * 20).float().reshape(3, 1, 2, 2) / 127.5 - 1
    predict, calls = known_errors(torch.full((3,), 0.3), schedule, x0)
    found = evaluate.bound(predict, schedule, x0, each=2)
    assert [t for t, _ in calls] == [2, 3, 4, 5, 6, 1, 1]
    assert [i for t, i in calls if t == 1] == [[0, 1], [2]] and len(calls[0][1]) == 2
    for variance, terms in found.items():
        sigma2, matching = posterior.reverse_variance(variance, schedule), 0.0
        for t in range(2, 7):
            off = 0.3 * reverse_mean(0.0, 1.0, t, schedule)
            matching += kl(0.0, beta_tilde(t, schedule), off, sigma2[t]) / math.log(2)
        assert terms["L_{t-1}"] == pytest.approx((matching, 0), rel=1e-5, abs=1e-5)
        clean = x0.double().numpy()
        mean = clean + 0.3 * reverse_mean(0.0, 1.0, 1, schedule)
        each = [posterior.bits_per_dim(image) for image in posterior.L_0(clean, mean, sigma2[1])]
        assert terms["L_0"] == pytest.approx(
            (sum(each) / 3, statistics.stdev(each) / math.sqrt(3)), rel=1e-4)
        assert terms["L_T"] == (posterior.bits_per_dim(posterior.L_T(clean, schedule)), 0)


def test_the_stated_error_is_the_spread_of_the_estimates():
    """Ho (5): over 300 seeds Σ L_{t−1} scatters as much as its error says.

    Five standard errors: a false alarm once in 10⁶; a stated error off by a fifth is found.
    """
    schedule = evenly(3, 0.1, 0.2)
    x0 = torch.zeros(8, 1, 1, 1)
    predict, _ = known_errors(torch.linspace(0.1, 3, 8), schedule, x0)
    found = [evaluate.bound(predict, schedule, x0, seed, each=16) for seed in range(300)]
    for variance in ("beta", "beta_tilde"):
        means, errors = zip(*(terms[variance]["L_{t-1}"] for terms in found))
        assert statistics.stdev(means) == pytest.approx(np.mean(errors), rel=5 / math.sqrt(600))
