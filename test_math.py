"""The second half of the reference: every "it can be shown" of the paper, shown.

In the paper's order, each test titled by its claim, and shown with the shipped functions themselves
in another way than they compute it.  It begins with three that can be done by hand.

`@proved` tries a claim on a dozen small schedules, whose numbers can be checked on paper, and then
proves it: √ᾱ_t, √(1−ᾱ_t), x_t, x_0, ε, … are letters, of which a formula makes a quotient of two
polynomials, and == says that both sides are the same one.  So the claim holds for all numbers and
every schedule at t = 1 and 2; and as no formula reads its tables but at t − 1 and t, which is shown
below, at every t of every T.  Sums and products over the steps are shown by induction: the claim is
its step.  Where a claim says <, it is shown by coefficients that have one sign, and logarithms are
letters too (support/testing_letters.py).

What is left is numeric: integrals, the exponential, figures of one schedule.  A tolerance has its
reason beside it, a published figure is compared as it is printed, and float64's own rounding is in
support/test_rounding.py.  The last half holds PyTorch against NumPy, on every device that is here.

`pytest` takes the same examples each time; `pytest --hypothesis-profile=deep` hunts with thousands.
"""
import copy
import inspect
import math
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given, strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

import ddpm
import posterior
import sample
import train
from ddpm import Schedule, cosine, draw, linear, log_normal, q_marginal, q_step, schedule_of
from posterior import A1, A2, C, beta_tilde, kl, reverse_mean, reverse_step
from support.config import Config, Sampling
from support.data import split
from support.testing_letters import Letters
from support.run import Run
from support.testing import (FORMULAS, PAPER, betas, evenly, images, in_letters, mean_of_quadratic,
                             near, of_numbers, pixels, proved, schedules, tables)
from unet import UNet

# ── By hand ───────────────────────────────────────────────────────────────────────────────────────
# With β_1 = 9/25 and β_2 = 7/16, α_1 = 16/25 and α_2 = 9/16, so ᾱ_1 = 16/25 and ᾱ_2 = 9/25, and all
# roots are known: √ᾱ_1 = 4/5, √(1−ᾱ_1) = 3/5, √ᾱ_2 = 3/5, √(1−ᾱ_2) = 4/5, √α_2 = 3/4.
BY_HAND = schedule_of([9 / 25, 7 / 16])


def test_x_t_by_hand():
    """Ho (4), N3: x_0 = 2 and ε = 1 give x_1 = 4/5 · 2 + 3/5 · 1 = 11/5 and x_2 = 6/5 + 4/5 = 2."""
    assert ddpm.q_sample(2, 1, 1, BY_HAND) == pytest.approx(11 / 5)
    assert ddpm.q_sample(2, 2, 1, BY_HAND) == pytest.approx(2)
    assert ddpm.x0_from_eps(11 / 5, 1, 1, BY_HAND) == pytest.approx(2)


def test_two_steps_by_hand():
    """Ho (2, 4): from x_0 = 2, step by step and at once.  The mean is 3/4 · (4/5 · 2) = 6/5, the
    variance 9/16 · 9/25 + 7/16 = 81/400 + 175/400 = 16/25.
    """
    mean, variance = q_step(2, 1, BY_HAND)
    assert (mean, variance) == pytest.approx((8 / 5, 9 / 25))
    scale, added = q_step(1, 2, BY_HAND)
    assert (scale * mean, scale ** 2 * variance + added) == pytest.approx((6 / 5, 16 / 25))
    assert q_marginal(2, 2, BY_HAND) == pytest.approx((6 / 5, 16 / 25))


def test_a_step_back_by_hand():
    """Ho (7, 11): A1 = 3/4 · (9/25)/(16/25) = 27/64 and A2 = 4/5 · (7/16)/(16/25) = 35/64, so
    x_2 = 2 and x_0 = 2 give (54 + 70)/64 = 31/16.  So does ε = 1, which says the same x_0:
    (2 − (7/16)/(4/5) · 1)/(3/4) = (128 − 35)/64 · 4/3 = 31/16.  β̃_2 = 9/16 · 7/16 = 63/256.
    """
    assert posterior.posterior(2, 2, 2, BY_HAND) == pytest.approx((31 / 16, 63 / 256))
    assert reverse_mean(2, 1, 2, BY_HAND) == pytest.approx(31 / 16)


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
        # ᾱ_t = exp(ln ᾱ_t): a relative rounding of ln ᾱ_t is one of ᾱ_t, |ln ᾱ_t| times as large
        near(schedule.alpha_bar[t], float(product), condition=1 - math.log(product))
        near(schedule.one_minus_alpha_bar[t], float(1 - product))


def test_linear_goes_from_beta_1_to_beta_T():
    """Ho section 4, linear, V4: β_1 = 1e-4 to β_T = 0.02 in 1000 equal steps, upwards."""
    schedule = linear()
    assert schedule.T == 1000 and np.all(np.diff(schedule.beta) > 0)
    for found, expected in zip(schedule, PAPER):
        near(found, expected, condition=1 - np.log(PAPER.alpha_bar))    # as above
    assert linear(1, 0.3, 0.4).beta.tolist() == [0, 0.3] and linear(1_000_000).T == 1_000_000


def test_cosine_has_its_published_values():
    """cosine: ᾱ_t = f(t)/f(0) up to the one clipped step; β_1 = 4.1284e-5, ᾱ_T = 2.4288e-9."""
    schedule = cosine(1000)
    assert f"{schedule.beta[1]:.4e} {schedule.alpha_bar[1000]:.4e}" == "4.1284e-05 2.4288e-09"
    assert np.count_nonzero(schedule.beta == 0.999) == 1 and schedule.beta[1000] == 0.999
    angle = (np.arange(1000) / 1000 + 0.008) / 1.008 * math.pi
    f = (1 + np.cos(angle)) / 2                       # at the end 1 and the cosine nearly cancel
    near(schedule.alpha_bar[:1000], f / f[0], condition=1 / f)


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


@proved(first=2)
def test_noise_only_grows(schedule, t):
    """V4: SNR_t = ᾱ_t/(1−ᾱ_t) falls at every step of any schedule."""
    now, before = ddpm.snr(t, schedule), ddpm.snr(t - 1, schedule)
    assert now < before
    signal = now / (1 + now)
    assert signal == schedule.alpha_bar[t]


# ── The forward process ───────────────────────────────────────────────────────────────────────────

@given(pixels, st.floats(1e-6, 10))
def test_log_normal_is_a_density_with_its_mean_and_variance(mean, variance):
    """Ho (2): exp(log_normal) integrates to 1, and its first two moments are its arguments."""
    deviation = math.sqrt(variance)
    x = np.linspace(-12, 12, 4001) * deviation + mean      # 12 deviations leave out less than 1e-32
    p = np.exp(log_normal(x, mean, variance)) * (x[1] - x[0])
    condition = 1 + abs(mean) / deviation                  # x − mean loses so many digits
    near(p.sum(), 1, condition)
    near((p * x).sum(), mean, condition, scale=deviation)
    near((p * (x - mean) ** 2).sum(), variance, condition)


@proved
def test_a_draw_is_the_mean_plus_scaled_noise(x, eps, sigma):
    """Reparameterisation: a draw is σ ε from the mean, and its density the noise's, over σ."""
    moved, density = x + sigma * eps, log_normal(eps, 0, 1) - np.log(sigma)
    assert draw(x, sigma ** 2, eps) == moved
    assert log_normal(moved, x, sigma ** 2) == density


@proved
def test_a_step_scales_the_mean_and_adds_beta(schedule, t, x_prev):
    """Ho (2), N1, V5: q(x_t|x_{t−1}) = N(√(1−β_t) x_{t−1}, β_t); scale² + variance = 1."""
    scale, _ = q_step(1, t, schedule)
    assert scale > 0
    total = scale ** 2 + schedule.beta[t]
    assert total == 1
    assert q_step(x_prev, t, schedule) == (scale * x_prev, schedule.beta[t])


@proved
def test_the_naive_diffuser_keeps_the_mean_and_piles_up_variance(x_prev, eps, v, sigma):
    """V1: x_t = x_{t−1} + √β ε: mean x_0, variance Σ β without end, by induction: a step keeps the
    mean and adds β to the variance, as new noise is independent of the old.
    """
    beta, moved, larger = sigma ** 2, x_prev + sigma * eps, v ** 2 + sigma ** 2
    assert ddpm.naive_step(x_prev, beta, eps) == moved
    assert ddpm.naive_step(x_prev, beta, 0) == x_prev
    variance = ddpm.naive_step(v, beta, 0) ** 2 + ddpm.naive_step(0, beta, 1) ** 2
    assert variance == larger


@proved
def test_the_scaled_diffuser_keeps_unit_variance(schedule, x_prev, eps, a, sigma):
    """V2, V4: α² + β² = 1 keeps a variance of 1; with α = √α_1, β = √β_1 the step is Ho (2)."""
    moved = a * x_prev + sigma * eps
    assert ddpm.scaled_step(x_prev, a, sigma, eps) == moved
    scale, deviation = schedule.alpha[1] ** 0.5, schedule.beta[1] ** 0.5
    variance = (ddpm.scaled_step(1, scale, deviation, 0) ** 2
                + ddpm.scaled_step(0, scale, deviation, 1) ** 2)
    assert variance == 1
    step = ddpm.scaled_step(x_prev, scale, deviation, eps)
    assert step == draw(*q_step(x_prev, 1, schedule), eps)


@proved
def test_the_variance_tends_to_one(schedule, t, v):
    """V2, V4: Var x_t = ᾱ_t s² + 1 − ᾱ_t by induction; 1 stays 1, else the gap shrinks by α_t."""
    scale, added = q_step(1, t, schedule)
    before = ddpm.variance_at(t - 1, v, schedule)
    after, gap = scale ** 2 * before + added, 1 + schedule.alpha[t] * (before - 1)
    assert ddpm.variance_at(0, v, schedule) == v
    assert ddpm.variance_at(t, v, schedule) == after
    assert ddpm.variance_at(t, v, schedule) == gap
    assert ddpm.variance_at(t, 1, schedule) == 1


@proved
def test_composing_the_steps_gives_the_marginal(schedule, t, x0):
    """Ho (4), N2, V3: the mean and variance of q(x_t|x_0), by induction: x_0 and 0 at t = 0, and a
    step leads from those at t − 1 to those at t.  It is a Gaussian too: integrate Bayes' rule, Ho
    (6, 7) below, over x_{t−1}.
    """
    assert q_marginal(x0, 0, schedule) == (x0, 0)
    mean, variance = q_marginal(x0, t - 1, schedule)
    scale, added = q_step(1, t, schedule)
    assert q_marginal(x0, t, schedule) == (scale * mean, scale ** 2 * variance + added)


@given(schedules, st.data(), pixels)
def test_any_two_times_compose(schedule, data, x0):
    """Ho (2, 4), DDIM: a schedule with fewer times has the same ᾱ, and its steps, q(x_t|x_s), after
    q(x_s|x_0) give q(x_t|x_0); with all times it is the same schedule.
    """
    times = [0] + sorted(data.draw(st.sets(st.integers(1, schedule.T), min_size=1)))
    short = sample.respaced(schedule, times)
    assert np.array_equal(short.alpha_bar, schedule.alpha_bar[times])
    assert np.array_equal(short.one_minus_alpha_bar, schedule.one_minus_alpha_bar[times])
    assert short.T == len(times) - 1 and (short.beta[0], short.alpha[0]) == (0, 1)
    for k, t in enumerate(times[1:], 1):
        scale, added = q_step(1, k, short)
        mean, variance = q_marginal(x0, times[k - 1], schedule)
        condition = 1 - math.log(schedule.alpha_bar[t])    # of ᾱ_t/ᾱ_s = exp(ln ᾱ_t − ln ᾱ_s)
        near((scale * mean, scale ** 2 * variance + added), q_marginal(x0, t, schedule), condition)
    same = sample.respaced(schedule, range(schedule.T + 1))
    near(same.beta, schedule.beta, condition=1 - np.log(schedule.alpha_bar))


@proved
def test_the_jump_is_a_draw_from_the_marginal(schedule, t, x0, eps):
    """Ho (4), N3, V3: x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε; t = 0 gives x_0."""
    assert ddpm.q_sample(x0, t, eps, schedule) == draw(*q_marginal(x0, t, schedule), eps)
    assert ddpm.q_sample(x0, 0, eps, schedule) == x0


@proved
def test_knowing_the_noise_is_knowing_the_image(schedule, t, x0, eps, x_t):
    """Ho (9, 15), N5: round trips both ways, from any x_0 and ε and from any x_t."""
    jumped = ddpm.q_sample(x0, t, eps, schedule)
    assert ddpm.x0_from_eps(jumped, t, eps, schedule) == x0
    assert ddpm.eps_from_x0(jumped, t, x0, schedule) == eps
    x0_hat = ddpm.x0_from_eps(x_t, t, eps, schedule)
    assert ddpm.eps_from_x0(x_t, t, x0_hat, schedule) == eps


# ── The true posterior ────────────────────────────────────────────────────────────────────────────

@proved(first=2)
def test_posterior_is_bayes_rule(schedule, t, x0, x_prev, x_t):
    """Ho (6, 7), V8, V9: at any three points
    q(x_{t−1}|x_t,x_0) q(x_t|x_0) = q(x_t|x_{t−1}) q(x_{t−1}|x_0): the same exponent and the same
    factor on both sides, so given x_0 the reverse is exactly Gaussian.
    """
    left = ((x_prev, *posterior.posterior(x_t, x0, t, schedule)),
            (x_t, *q_marginal(x0, t, schedule)))
    right = (x_t, *q_step(x_prev, t, schedule)), (x_prev, *q_marginal(x0, t - 1, schedule))
    exponents = [sum((x - mean) ** 2 / variance for x, mean, variance in gaussians)
                 for gaussians in (left, right)]
    assert exponents[0] == exponents[1]
    factors = [math.prod(variance for _, _, variance in gaussians) for gaussians in (left, right)]
    assert factors[0] == factors[1]


@proved
def test_posterior_averaged_over_x_t_is_the_marginal(schedule, t, x0):
    """Ho (4, 6, 7): total mean and total variance over q(x_t|x_0) give q(x_{t−1}|x_0) back."""
    mean_t, variance_t = q_marginal(x0, t, schedule)
    mean, variance = posterior.posterior(mean_t, x0, t, schedule)
    slope = posterior.posterior(1, 0, t, schedule)[0]
    assert q_marginal(x0, t - 1, schedule) == (mean, slope ** 2 * variance_t + variance)


@proved
def test_at_t_1_the_posterior_is_the_image(schedule, x_t, x0):
    """Ho (7): A1 = 0, A2 = 1, β̃ = 0 at t = 1, T = 1 included."""
    assert A1(1, schedule) == 0
    assert A2(1, schedule) == 1
    assert beta_tilde(1, schedule) == 0
    assert posterior.posterior(x_t, x0, 1, schedule) == (x0, 0)


@proved
def test_the_posterior_lies_between_x_t_and_x_0(schedule, t):
    """Ho (7), V9: its mean A1 x_t + A2 x_0 has 0 ≤ A1 < 1 and 0 < A2 ≤ 1; 0 ≤ β̃_t ≤ β_t."""
    assert 0 <= A1(t, schedule) < 1
    assert 0 < A2(t, schedule) <= 1
    assert 0 <= beta_tilde(t, schedule) <= schedule.beta[t]


def test_how_A1_and_A2_change():
    """V14: towards t = 1, A2 rises from 0.000128 to 1;
    A1 from 0.98995 to 0.99415 at t = 462, then to 0.
    """
    t = np.arange(1, 1001)
    a1, a2 = A1(t, PAPER), A2(t, PAPER)
    assert np.all(np.diff(a2) < 0) and f"{a2[-1]:.6f}" == "0.000128"
    assert f"{a1[-1]:.5f} {a1.max():.5f} {t[a1.argmax()]}" == "0.98995 0.99415 462"
    assert np.all(np.diff(a1[:462]) > 0) and np.all(np.diff(a1[461:]) < 0)


@proved
def test_one_third(v):
    """V8: at t = 3 the posterior takes 1/3 from x_0 only for equal β → 0; linear() takes 0.3887.

    For equal β it takes α/(1 + α + α²), which tends to 1/3 as α tends to 1, and keeps 2/3 of x_t.
    """
    alpha, rest = v ** 2, 1 + v ** 2 + v ** 4
    equal = Schedule(*zip((0, 1, 1, 0), *[(1 - alpha, alpha, alpha ** t, 1 - alpha ** t)
                                          for t in (1, 2, 3)]))
    taken, kept = alpha / rest, v * (1 + alpha) / rest
    assert A2(3, equal) == taken
    assert A1(3, equal) == kept
    assert f"{A2(3, PAPER):.4f} {A1(3, PAPER):.4f}" == "0.3887 0.6113"


@pytest.mark.parametrize("beta, kurtosis", [(0.2, "-0.300"), (0.1, "-0.0744"), (0.05, "-0.0185")])
def test_without_x_0_the_reverse_is_gaussian_only_for_small_beta(beta, kurtosis):
    """N4: for x_0 = ±1, q(x_{t−1}|x_t) is two Gaussians;
    at ᾱ_t = 0.5, x_t = 0.1 its excess kurtosis falls like β².
    """
    schedule = tables([1 - 0.5 / (1 - beta), beta])
    x_t, x, p = 0.1, np.linspace(-6, 6, 20001), 0.0
    for x0 in (-1.0, 1.0):
        p = p + np.exp(log_normal(x_t, *q_marginal(x0, 2, schedule))
                       + log_normal(x, *posterior.posterior(x_t, x0, 2, schedule)))
    p /= p.sum()
    centred = x - (p * x).sum()
    excess = (p * centred ** 4).sum() / (p * centred ** 2).sum() ** 2 - 3
    assert f"{excess:#.3g}" == kurtosis


# ── The reverse step ──────────────────────────────────────────────────────────────────────────────

def best_eps(x_t, t, m, s2, schedule):
    """The best noise prediction for data from N(m, s²), in closed form; in whatever arithmetic."""
    return schedule.one_minus_alpha_bar[t] ** 0.5 * (x_t - schedule.alpha_bar[t] ** 0.5 * m) / (
        schedule.alpha_bar[t] * s2 + schedule.one_minus_alpha_bar[t])


@proved
def test_the_reverse_mean_is_the_posterior_mean_of_the_predicted_image(schedule, t, x_t, eps):
    """Ho (10, 11), N8: (x_t − β_t/√(1−ᾱ_t) ε)/√α_t = A1 x_t + A2 x_0(ε), ε right or wrong."""
    x0 = ddpm.x0_from_eps(x_t, t, eps, schedule)
    mean, _ = posterior.posterior(x_t, x0, t, schedule)
    assert reverse_mean(x_t, eps, t, schedule) == mean


@proved
def test_the_reverse_step_adds_sigma_z_but_not_at_t_1(schedule, t, x_t, eps, z, sigma):
    """Ho (1), N8, V6: x_{t−1} − μ_θ is σ_t z, σ_t a deviation, not a variance; nothing at t = 1."""
    step = reverse_step(x_t, eps, t, z, sigma ** 2, schedule)
    moved = reverse_mean(x_t, eps, t, schedule) + (sigma * z if t > 1 else 0)
    assert step == moved


@proved(first=2)
def test_the_two_variances_are_the_two_extremes(schedule, t, m, v, x_t):
    """Ho section 3.2: on N(m, s²) data q(x_{t−1}|x_t) has variance β_t v_{t−1}/v_t, β_t if s = 1
    and β̃_t if s = 0, and with the best ε its mean is Ho (11).
    """
    scale, beta = q_step(1, t, schedule)
    for variance_0, sigma2 in ((v, None), (1, beta), (0, beta_tilde(t, schedule))):
        v_prev, v_t = (ddpm.variance_at(u, variance_0, schedule) for u in (t - 1, t))
        exact = v_prev - (scale * v_prev) ** 2 / v_t              # conditioning a joint Gaussian
        said = beta * v_prev / v_t if sigma2 is None else sigma2
        assert exact == said
        mean = q_marginal(m, t - 1, schedule)[0] + scale * v_prev / v_t * (
            x_t - q_marginal(m, t, schedule)[0])
        assert reverse_mean(x_t, best_eps(x_t, t, m, variance_0, schedule), t, schedule) == mean


def variance_of(weights, values):
    """The variance of values that have these weights, any positive numbers."""
    mean, square = (sum(w * x ** k for w, x in zip(weights, values)) / sum(weights) for k in (1, 2))
    return square - mean ** 2


def mean_square(error, v):
    """The mean square of an error that is linear in x_0, of mean square v, and in ε ~ N(0, 1)."""
    return error(1, 0) ** 2 * v + error(0, 1) ** 2


@proved
def test_on_average_the_reverse_variance_lies_between_the_two(schedule, t, x_t, x_i, x_j, w_i, w_j,
                                                              w):
    """Ho section 3.2: for images x_i, x_j with any chances, Var(x_{t−1}|x_t) = β̃_t + A2²
    Var(x_0|x_t), and β_t = β̃_t + A2² (1−ᾱ_t).  Between the two lies its average over x_t, for
    pixels in [-1, 1]: E Var(x_0|x_t) ≤ E(x_0 − √ᾱ_t x_t)² ≤ 1 − ᾱ_t.  But at one x_t it can be more
    than β_t: given x_t = 0, an x_0 that is 1 or -1 has variance 1.
    """
    means, tilde = zip(*(posterior.posterior(x_t, x, t, schedule) for x in (x_i, x_j)))
    weight, rest = A2(t, schedule) ** 2, schedule.one_minus_alpha_bar[t]
    variance = tilde[0] + variance_of((w_i, w_j), means)
    said, largest, at_0 = (tilde[0] + weight * part for part in (
        variance_of((w_i, w_j), (x_i, x_j)), rest, 1))
    assert variance == said
    assert schedule.beta[t] == largest
    assert at_0 > largest
    square = 1 / (1 + w)                                           # E x_0², any number below 1
    average = mean_square(lambda x0, eps: x0 - schedule.alpha_bar[t] ** 0.5 * ddpm.q_sample(
        x0, t, eps, schedule), square)
    assert average <= rest


@given(schedules)
def test_sigma_is_one_of_two_and_never_0(schedule):
    """Ho (13), section 3.2: σ_t² = β_t or β̃_t; but β̃_1 = 0 cannot be a density's variance, and
    for both, as in the authors' code, β̃_2 stands at t = 1, or β_1 where T = 1.
    """
    T, tilde = schedule.T, [beta_tilde(t, schedule) for t in range(2, schedule.T + 1)]
    for choice, expected in (("beta", schedule.beta[2:].tolist()), ("beta_tilde", tilde)):
        found = posterior.reverse_variance(choice, schedule)
        assert found[2:].tolist() == expected and found[0] == 0
        assert found[1] == (tilde[0] if T > 1 else schedule.beta[1]) > 0


# ── The distance between two Gaussians, and the matching term ─────────────────────────────────────

@proved
def test_kl_is_the_integral(m_1, v_1, m_2, v_2):
    """KL: E [log N_1 − log N_2] over N_1, of which both are quadratic functions."""
    def difference(x):
        return log_normal(x, m_1, v_1) - log_normal(x, m_2, v_2)
    assert kl(m_1, v_1, m_2, v_2) == mean_of_quadratic(difference, m_1, v_1)


@given(pixels, st.floats(0.05, 4), pixels, st.floats(0.05, 4))
@example(0.5, 2.0, 0.5, 2.0)
@example(0.0, 1.0, 3.47e-07, 1.0)
def test_kl_is_zero_only_between_equals(m1, v1, m2, v2):
    """KL: 0 for the same Gaussian, above 0 for any other, and never below."""
    assert kl(m1, v1, m1, v1) == 0 <= kl(m1, v1, m2, v2)
    if abs(m1 - m2) > 1e-3 or abs(v1 - v2) > 1e-3:
        assert kl(m1, v1, m2, v2) > 0


@proved
def test_with_equal_variances_only_the_means_matter(mu_tilde, mu, sigma2):
    """Ho (8), V10: KL = ‖μ̃ − μ‖² / (2σ²)."""
    assert posterior.matching_mean(mu_tilde, mu, sigma2) == kl(mu_tilde, sigma2, mu, sigma2)


@proved(first=2)
def test_matching_in_x0(schedule, t, x_t, x0, x0_hat, sigma2):
    """V11: it is the KL of the posteriors given x_0 and given x̂_0;
    with β̃ the weight is (SNR_{t−1} − SNR_t)/2.
    """
    mu_tilde, tilde = posterior.posterior(x_t, x0, t, schedule)
    mu, _ = posterior.posterior(x_t, x0_hat, t, schedule)
    loss = posterior.matching_x0(x0, x0_hat, t, sigma2, schedule)
    assert loss == kl(mu_tilde, sigma2, mu, sigma2)
    weight = (ddpm.snr(t - 1, schedule) - ddpm.snr(t, schedule)) / 2
    assert posterior.matching_x0(1, 0, t, tilde, schedule) == weight


@proved(first=2)
def test_matching_in_eps(schedule, t, x_t, eps, eps_hat, sigma2):
    """Ho (12), V12: it is the KL of the two reverse means;
    with β̃ the weight is (SNR_{t−1}/SNR_t − 1)/2.
    """
    mu_tilde, mu = reverse_mean(x_t, eps, t, schedule), reverse_mean(x_t, eps_hat, t, schedule)
    loss = posterior.matching_eps(eps, eps_hat, t, sigma2, schedule)
    assert loss == kl(mu_tilde, sigma2, mu, sigma2)
    assert C(t, sigma2, schedule) > 0
    weight = (ddpm.snr(t - 1, schedule) / ddpm.snr(t, schedule) - 1) / 2
    assert C(t, beta_tilde(t, schedule), schedule) == weight


@proved(first=2)
def test_the_constant_that_beta_leaves(schedule, t, mu_tilde, mu, sigma2):
    """constant: beside the means, the KL for any σ² has D/2 [β̃/σ² − 1 + ln(σ²/β̃)]; for β̃_t 0."""
    tilde = beta_tilde(t, schedule)
    both = posterior.matching_mean(mu_tilde, mu, sigma2) + posterior.matching_constant(
        t, sigma2, schedule)
    assert kl(mu_tilde, tilde, mu, sigma2) == both
    assert posterior.matching_constant(t, tilde, schedule) == 0


def test_the_figures_of_the_linear_schedule():
    """N2, V12, constant, Ho section 4: √ᾱ_T is 0.00635, L_T 2.911e-5 bits/dim at mean square 1, and
    0.67 with 50 steps; C, in V12 a constant, falls 120-fold from t = 2 to 350; with σ_t² = β_t the
    constants are 0.486 bits/dim in all.
    """
    bits, fifty = (posterior.bits_per_dim(posterior.L_T(np.array([1.0, -1.0]), schedule))
                   for schedule in (PAPER, evenly(50, 1e-4, 0.02)))
    assert f"{PAPER.alpha_bar[1000] ** 0.5:.5f} {bits:.3e} {fifty:.2f}" == "0.00635 2.911e-05 0.67"
    t = np.arange(2, 1001)
    weights = C(t, beta_tilde(t, PAPER), PAPER)
    assert f"{weights[0] / weights.min():.2f} {t[weights.argmin()]}" == "120.37 350"
    total = posterior.matching_constant(t, PAPER.beta[2:], PAPER).sum() / math.log(2)
    assert f"{total:.3f}" == "0.486"


# ── The bound ─────────────────────────────────────────────────────────────────────────────────────
# Claims about a whole path are shown for T = 1 and 2 in letters, for T = 3 in numbers; each further
# turn of the loops adds to both sides what Bayes' rule, proved above for any t, says is equal.


@proved
def test_the_bound_telescopes_along_every_trajectory(schedule, path, reverse, T):
    """Ho (3, 5), V7: log q(x_{1:T}|x_0)/p(x_{0:T}) is L_T + Σ L_{t−1} + L_0,
    for any path and any reverse.
    """
    total = sum(posterior.trajectory_terms(path, reverse, schedule))
    assert total == posterior.trajectory_bound(path, reverse, schedule)


@proved
def test_L_T_is_the_expected_first_term(schedule, path, reverse, T):
    """Ho (5), N2, V7: L_T is the first term's mean over x_T ~ q(x_T|x_0); bits are nats / ln 2."""
    def first(x_T):
        return posterior.trajectory_terms([*path[:T], x_T], reverse, schedule)[0]
    mean = mean_of_quadratic(first, *q_marginal(path[0], T, schedule))
    assert posterior.L_T(path[0], schedule) == mean
    near(posterior.bits_per_dim(np.log([2.0, 8.0])), 2)


@proved
def test_the_other_terms_are_divergences_and_reconstruction(schedule, path, reverse, T):
    """Ho (5), V7: L_0 is −log p(x_0|x_1), and Σ L_{t−1} is 0 for T = 1; for T = 2 its mean over
    x_1 ~ q(x_1|x_2,x_0) is KL(q(x_1|x_2,x_0) ‖ p(x_1|x_2)).
    """
    _, matching, l_0 = posterior.trajectory_terms(path, reverse, schedule)
    reconstruction = -log_normal(path[0], *reverse(path[1], 1))
    assert l_0 == reconstruction
    if T == 1:
        assert matching == 0
    if T == 2:
        exact = posterior.posterior(path[2], path[0], 2, schedule)
        mean = mean_of_quadratic(lambda x_1: posterior.trajectory_terms(
            [path[0], x_1, path[2]], reverse, schedule)[1], *exact)
        assert mean == kl(*exact, *reverse(path[2], 2))


def gaussian_data(m, v, schedule):
    """For data from N(m, v): q(x_t), and the exact reverse, both as functions of t."""
    def marginal(t):
        return q_marginal(m, t, schedule)[0], ddpm.variance_at(t, v, schedule)

    def reverse(x_t, t):
        sigma2 = schedule.beta[t] * marginal(t - 1)[1] / marginal(t)[1]
        return reverse_mean(x_t, best_eps(x_t, t, m, v, schedule), t, schedule), sigma2
    return marginal, reverse


@proved
def test_the_bound_is_that_of_an_autoregressive_model(schedule, m, v, path, reverse, T):
    """Ho (3, 16), V7: on N(m, s²) data, along every path and for any reverse, the bound is
    log q(x_T)/p(x_T) + Σ log q(x_{t−1}|x_t)/p(x_{t−1}|x_t) − log q(x_0), whose means over q are the
    divergences and the entropy; the exact reverse leaves only the prior's term and the entropy.
    """
    marginal, exact = gaussian_data(m, v, schedule)
    left = log_normal(path[T], *marginal(T)) - log_normal(path[T], 0, 1) - log_normal(path[0], m, v)
    assert posterior.trajectory_bound(path, exact, schedule) == left
    total = left + sum(log_normal(path[t - 1], *exact(path[t], t)) - log_normal(
        path[t - 1], *reverse(path[t], t)) for t in range(1, T + 1))
    assert posterior.trajectory_bound(path, reverse, schedule) == total


@given(st.lists(st.floats(0.01, 0.9), min_size=1, max_size=6).map(tables), pixels, st.data())
def test_the_bound_is_never_below_minus_log_p(schedule, x0, data):
    """Ho (3): −log p(x_0) ≤ E_q[log q(x_{1:T}|x_0)/p(x_{0:T})], if x_{t−1} = a_t x_t + b_t + √v_t z
    with any a_t, b_t, v_t.

    p(x_0) is a Gaussian then.  The bound f is a square in q's noises, so its mean over them is
    f(0) + Σ_i [(f(e_i) + f(−e_i))/2 − f(0)], exactly, e_i being one unit of noise at step i.
    """
    number = st.floats(-2, 2)
    lines = [(data.draw(number), data.draw(number), 0.1 + data.draw(number) ** 2)
             for _ in range(schedule.T)]

    def reverse(x_t, t):
        a, b, v = lines[t - 1]
        return a * x_t + b, v

    def f(noise):
        path = [x0]
        for t in range(1, schedule.T + 1):
            path.append(draw(*q_step(path[-1], t, schedule), noise[t - 1]))
        return posterior.trajectory_bound(path, reverse, schedule)
    at_0, mean, variance = f(np.zeros(schedule.T)), 0.0, 1.0
    pairs = [(f(e) + f(-e)) / 2 - at_0 for e in np.eye(schedule.T)]
    for a, b, v in reversed(lines):
        mean, variance = a * mean + b, a ** 2 * variance + v
    excess = at_0 + sum(pairs) + log_normal(x0, mean, variance)
    assert excess > -1e-12 * (1 + abs(at_0) + sum(map(abs, pairs)))         # of what cancels


@given(st.floats(-1.5, 1.5), st.floats(1e-5, 1))
@example(0.0, 1e-4)
@example(-1.0, 1.0)
@example(1.2, 1e-5)
def test_the_decoder_s_256_bins_sum_to_1(mean, sigma2):
    """Ho (13): the bins of 2/255, the outer two open, are a partition: probabilities sum to 1."""
    p = np.exp(-posterior.L_0(np.arange(256) / 127.5 - 1, mean, sigma2))
    near(p.sum(), 1)
    assert np.all(p >= 0)


@given(st.integers(0, 255), st.floats(0.01, 1), st.floats(-10, 10))
@example(150, 0.03, 10.0)
@example(150, 0.03, -10.0)
def test_the_decoder_integrates_the_density_over_a_bin(level, sigma, offset):
    """Ho (13): exp(−L_0) is ∫ N(x; μ, σ²) over (x_0 − 1/255, x_0 + 1/255), by Simpson's rule, and
    has its digits ten deviations off too, on either side.
    """
    x0 = level / 127.5 - 1
    mean = x0 + offset * sigma
    left, right = x0 - 1 / 255, x0 + 1 / 255
    left = min(mean, right) - 12 * sigma if level == 0 else left
    right = max(mean, left) + 12 * sigma if level == 255 else right
    x = np.linspace(left, right, 20001)                     # at most σ/500 apart: wrong by 1e-13
    weights = np.where(np.arange(20001) % 2, 4.0, 2.0) / 60000
    weights[[0, -1]] /= 2
    p = (weights * np.exp(log_normal(x, mean, sigma ** 2))).sum() * (right - left)
    # z = (x − μ)/σ is rounded by (|x| + |μ|)/σ roundings, and a Gaussian's tail by z times as many
    near(math.exp(-posterior.L_0(x0, mean, sigma ** 2)), p,
         condition=1 + (1 + abs(offset)) * (1 + abs(mean)) / sigma)


@proved
def test_the_density_at_t_1_is_a_term_of_l_simple(schedule, x0, eps, eps_hat, v):
    """Ho section 3.4: −log p(x_0|x_1), as a density, is C_1 ‖ε − ε_θ‖² + ½ ln 2πσ_1²."""
    x_1 = ddpm.q_sample(x0, 1, eps, schedule)
    density = -log_normal(x0, reverse_mean(x_1, eps_hat, 1, schedule), v)
    loss = posterior.matching_eps(eps, eps_hat, 1, v, schedule) + np.log(2 * math.pi * v) / 2
    assert density == loss


@pytest.mark.parametrize("sigma2, excess", [(PAPER.beta[1], "0.023"),
                                            (beta_tilde(2, PAPER), "0.039")])
def test_L_0_is_nearly_a_density(sigma2, excess):
    """Ho section 3.4: L_0 is larger than that density times the bin's width, 2/255, by 0.023 nats
    (σ_1² = β_1) or 0.039 (β̃_2), if ε_θ is off by a noise of deviation 0.3; in no open bin.
    """
    error, weights = np.polynomial.hermite_e.hermegauss(31)               # N(0, 1) in 31 points
    mean = reverse_mean(0.0, 0.3 * error, 1, PAPER)
    more = posterior.L_0(0 * mean, mean, sigma2) + log_normal(0, mean, sigma2) + math.log(2 / 255)
    assert f"{(more * weights).sum() / weights.sum():.3f}" == excess


# ── The simple loss ───────────────────────────────────────────────────────────────────────────────

@given(images)
def test_l_simple_of_nothing_and_of_everything(eps):
    """Ho (14), N6, N7, V13: a perfect prediction costs 0, a zero one the noise's mean square: 1."""
    assert ddpm.l_simple(eps, eps) == 0
    near(ddpm.l_simple(eps, 0 * eps), sum(float(e) ** 2 for e in eps.flat) / eps.size)
    # signs do not cancel
    near(ddpm.l_simple(np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0, 3.0])), 2 / 3)


@proved
def test_the_best_eps_is_the_best_line(schedule, t, v, k):
    """Ho (14): on N(0, s²) data ε_θ = k x_t has the mean loss ᾱ_t s²/v_t + v_t (k − k*)²: the least
    there is for ε*, whose k is k*.
    """
    loss = mean_square(lambda x0, eps: eps - k * ddpm.q_sample(x0, t, eps, schedule), v)
    v_t, best = ddpm.variance_at(t, v, schedule), best_eps(1, t, 0, v, schedule)
    said = schedule.alpha_bar[t] * v / v_t + v_t * (k - best) ** 2
    assert loss == said


@pytest.mark.parametrize("s2, floor", [(1.0, "0.275513"), (0.25, "0.173053")])
def test_l_simple_has_a_floor(s2, floor):
    """Ho (14): on N(0, s²) data no prediction has a mean loss below
    0.275513 (s² = 1) or 0.173053 (s² = 1/4), the mean over t of that least one.
    """
    def error(x0, eps):
        x_t = ddpm.q_sample(x0, np.arange(1, 1001), eps, PAPER)
        return eps - best_eps(x_t, np.arange(1, 1001), 0.0, s2, PAPER)
    assert f"{mean_square(error, s2).mean():.6f}" == floor
    if s2 == 1:
        near(mean_square(error, s2), PAPER.alpha_bar[1:])


# ── The score, and the best network that there can be ─────────────────────────────────────────────

mixtures = st.lists(st.tuples(st.floats(0.1, 1), st.floats(-1, 1), st.floats(0.01, 0.5)),
                    min_size=1, max_size=3)


@given(st.lists(st.floats(0.01, 0.9), min_size=1, max_size=6).map(tables), st.data(),
       mixtures, st.floats(-2, 2))
def test_the_best_noise_prediction_is_the_score(schedule, data, mixture, x_t):
    """score: E[ε|x_t] = −√(1−ᾱ_t) ∇ log q_t, for data from any Gaussian mixture: the derivative is
    the imaginary part of log q_t(x_t + ih)/h, exact but for h².
    """
    t = data.draw(st.integers(1, schedule.T))
    weights, m, v = np.transpose(mixture)
    kept, v_t = math.sqrt(schedule.alpha_bar[t]), ddpm.variance_at(t, v, schedule)
    joint = weights * np.exp(log_normal(x_t + 1e-50j, kept * m, v_t))
    gradient = np.log(joint.sum()).imag / 1e-50
    x0 = (joint.real * (m + kept * v / v_t * (x_t - kept * m))).sum() / joint.real.sum()
    found = posterior.score(ddpm.eps_from_x0(x_t, t, x0, schedule), t, schedule)
    # ε is a difference of such numbers over √(1−ᾱ_t); exp magnifies its argument's rounding
    near(found, gradient, condition=1 + np.abs(np.log(joint)).max(),
         scale=(abs(x_t) + 1) / schedule.one_minus_alpha_bar[t])


@proved
def test_tweedie_gives_the_mean_of_the_previous_image(schedule, t, x_t, x_1, x_2, x_3, w_1, w_2,
                                                      w_3):
    """score: E[x_{t−1}|x_t] = (x_t + β_t ∇ log q_t)/√α_t for any β and any data: with w_i the
    chances of the images x_i given x_t, the score is Σ w_i ∇ log q(x_t|x_i), the slope of a square,
    and the mean that of the posteriors given each x_i.
    """
    def mean(f):
        return sum(w * f(x) for w, x in zip((w_1, w_2, w_3), (x_1, x_2, x_3))) / (w_1 + w_2 + w_3)

    def slope(x_i):
        marginal = q_marginal(x_i, t, schedule)
        return (log_normal(x_t + 1, *marginal) - log_normal(x_t - 1, *marginal)) / 2
    gradient = mean(lambda x_i: slope(x_i).r)
    best = ddpm.eps_from_x0(x_t, t, mean(lambda x_i: x_i), schedule)
    assert posterior.score(best, t, schedule) == gradient
    previous = mean(lambda x_i: posterior.posterior(x_t, x_i, t, schedule)[0])
    assert posterior.tweedie_mean(x_t, gradient, t, schedule) == previous


sets = st.integers(1, 6).flatmap(lambda n: arrays(np.float64, (n, 2, 2), elements=pixels))
squares = arrays(np.float64, (2, 2), elements=pixels)


@given(st.lists(st.floats(0.01, 0.9), min_size=1, max_size=6).map(tables), st.data(), sets, squares,
       squares)
def test_the_perfect_network_is_bayes_rule(schedule, data, images, x_t, delta):
    """score, Ho (14): best_x0 is Σ q(x_i|x_t) x_i, and E‖x_0 − x̂_0‖² given x_t grows by exactly
    ‖δ‖² when it is off by δ: no other prediction has a lower loss.  Of one image it is that image.
    """
    t = data.draw(st.integers(1, schedule.T))
    log_w = log_normal(x_t, *q_marginal(images, t, schedule)).sum((1, 2))
    w = np.exp(log_w - log_w.max())
    w, magnified = w / w.sum(), 1 + np.abs(log_w).max()            # exp magnifies log_w's rounding
    found = posterior.best_x0(np.stack([x_t, x_t]), np.array([t, t]), images, schedule)
    near(found[0], np.tensordot(w, images, 1), magnified, scale=3)
    assert np.array_equal(found[0], found[1])
    near(posterior.best_x0(x_t[None], t, images[:1], schedule)[0], images[0])

    def loss(x0):
        return sum(w_i * ((x - x0) ** 2).sum() for w_i, x in zip(w, images))
    larger = loss(found[0] + delta) - loss(found[0])
    near(larger, (delta ** 2).sum(), magnified, scale=324)          # a loss is at most 4 · (3 + 6)²


# ── What carries the proofs ───────────────────────────────────────────────────────────────────────

def test_letters_are_equal_only_if_they_always_are():
    """Letters: a = √ᾱ, s = √(1−ᾱ), x is any number, v any above 0; not always so is not so."""
    a, s, b, x, v = map(Letters.of, ("a_1", "s_1", "a_2", "x", "v"))
    assert a ** 2 + s ** 2 == 1 == (a + s * x) / (s * x + a) and a + s != 1 and x != -x and x != 0
    assert (1 - a ** 2) ** 0.5 == s and (x ** 4 / v ** 2) ** 0.5 == x ** 2 / v
    assert b < a < 1 < 1 / a and 0 < a - b and -x ** 2 / v < 0 < s and not b >= a
    assert np.log(a * v) + np.log(v / a) == 2 * np.log(v) != np.log(v) and np.log(a) / 2 != 0
    assert np.log(4 * a) - np.log(a) == math.log(4) and np.log(2 * a) != np.log(a)
    for unknown in (lambda: a < s, lambda: x < 1, lambda: x > 0, lambda: x ** 0.5,
                    lambda: (x ** 2) ** 0.5, lambda: (1 + a) ** 0.5, lambda: (2 * a ** 2) ** 0.5):
        with pytest.raises(AssertionError):
            unknown()


def test_formulas_read_their_tables_at_t_and_t_minus_1_alone():
    """Every t of every T: all that is proved at t holds in letters at t = 7 of a schedule that has
    no entries but those for t = 0, 6 and 7, and α and β for 6 neither.
    """
    two = in_letters(2)
    few = Schedule(*({0: table[0], 7: table[2]} for table in two[:2]),
                   *({0: table[0], 6: table[1], 7: table[2]} for table in two[2:]))
    claims = [test.claim for test in globals().values() if hasattr(test, "claim")]
    claims = [claim for claim in claims if "t" in inspect.signature(claim).parameters]
    assert len(claims) > 15
    for claim in claims:
        given = {name: Letters.of(name) for name in inspect.signature(claim).parameters}
        claim(**given | dict(schedule=few, t=7))


def test_the_terms_are_those_of_each_pixel():
    """Ho (5, 8, 12), V11, KL: in nats per pixel, each pixel's its own."""
    a, b = np.array([0.5, -1.0]), np.array([0.25, 2.0])
    for term in (lambda a, b: kl(a, 0.3, b, 0.2), lambda a, b: posterior.matching_mean(a, b, 0.3),
                 lambda a, b: posterior.matching_x0(a, b, 9, 0.3, PAPER),
                 lambda a, b: posterior.matching_eps(a, b, 9, 0.3, PAPER),
                 lambda a, b: posterior.L_0(a, b, 0.3), lambda a, b: posterior.L_T(a, PAPER)):
        near(term(a, b), [term(*pair) for pair in zip(a, b)])


# ══ PyTorch against NumPy ═════════════════════════════════════════════════════════════════════════

DEVICES = (["cpu"] + ["cuda"] * torch.cuda.is_available()
           + ["mps"] * torch.backends.mps.is_available())
on_every_device = pytest.mark.parametrize("device", DEVICES)
mild = st.lists(st.floats(0.001, 0.7), min_size=1, max_size=6).map(tables)


def near32(found, exact, condition=1.0):
    """As `near`, for float32: a few dozen roundings of 2⁻²⁴, relative to the largest value."""
    found, exact = torch.as_tensor(found).detach().cpu().double().numpy(), np.asarray(exact)
    assert found.shape == exact.shape
    near(found, exact, 3e6 * condition, scale=max(np.abs(exact).max(), 1e-30))


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
@pytest.mark.parametrize("formula", FORMULAS)
@given(schedule=mild, data=st.data())
def test_tensors_are_computed_as_arrays(device, formula, schedule, data):
    """Tensors: each formula on float32 tensors is that on float64 arrays, with one t and NumPy's
    tables, and with a t for each image and tables that are cast, and nothing else.
    """
    t = data.draw(st.integers(1, schedule.T))
    each, cast = np.reshape([t, schedule.T], (2, 1, 1, 1)), train.on_device(schedule, device)
    for found, exact in zip(cast, schedule):
        assert np.array_equal(found.cpu().numpy(), exact.astype(np.float32))
    xyz, xyz32 = zip(*(batch_of(k, 2, 1, 3, 3, device=device) for k in range(3)))
    for numpy_t, torch_t, tables_ in (
            (t, t, schedule), (each, torch.tensor(each, device=device), cast)):
        found = of_numbers(formula, torch_t, tables_, *xyz32)
        exact = of_numbers(formula, numpy_t, schedule, *xyz)
        for pair in zip(found, exact) if isinstance(exact, tuple) else [(found, exact)]:
            near32(*pair)


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
    """Ho Algorithm 1, line 2: x_0 ~ q(x_0): each image to train on equally often, in another order
    at each step, with its label; a tenth of the labels is dropped, half of the images mirrored.

    Five standard errors of 8,000: a false alarm once in 10⁶; shares off by 0.02 and 0.03 are found.
    """
    images = np.zeros((40, 2, 2, 1), np.uint8)                  # image k: 5 k, its right half 255
    images[:] = 5 * np.arange(40)[:, None, None, None]
    images[:, :, 1] = 255
    config = Config(batch=400, num_classes=40, flip=True)
    for device in DEVICES:
        next_batch = train.batches(images, np.arange(40), config, torch.device(device))
        assert all(map(torch.equal, next_batch(3), next_batch(3)))
        x0, label = (torch.stack(parts).cpu() for parts in zip(*map(next_batch, range(20))))
        assert len({tuple(batch.flatten().tolist()) for batch in x0}) == 20
        left, right = x0[..., 0, :].flatten(0, 2).T
        k = torch.round((torch.minimum(left, right) + 1) * 127.5 / 5).long()
        dropped, flipped = label.flatten() == 40, left == 1
        assert torch.equal(label.flatten()[~dropped], k[~dropped])
        for found, expected in ((flipped, 0.5), (dropped, 0.1), (dropped[flipped], 0.1)):
            deviation = math.sqrt(expected * (1 - expected) / len(found))
            assert abs(found.float().mean() - expected) < 5 * deviation
        count = np.bincount(k, minlength=40)
        assert count[split(40)[0]].min() > 100 and count[split(40)[1]].max() == 0       # 222 each
        x0, label = train.batches(images, None, Config(batch=400), torch.device(device))(1)
        assert label is None and torch.all(x0[..., 1] == 1)


# ── Algorithm 2: sampling ─────────────────────────────────────────────────────────────────────────

def test_what_is_proved_is_what_trains_and_what_draws(monkeypatch):
    """Ho (4, 7, 11, 14, 15): replace a formula of ddpm.py or posterior.py by a wrong one, and the
    loss of algorithm_1 or the image of a sampler is another.
    """
    schedule = evenly(6, 0.05, 0.3)

    def results():
        run = bare_run(Linear(6), torch.optim.SGD, 0.1)
        nn.init.ones_(run.net.w)
        x0, *noises = (batch_of(k, 4, 1, 2, 2)[1] for k in range(9))
        yield next(train.algorithm_1(run, run.net, lambda step: (x0, None),
                                     train.on_device(schedule, "cpu"))).item()
        for sampling in (Sampling(), Sampling(clip=False), Sampling(sigma2="beta_tilde"),
                         Sampling("ddim"), Sampling("dpm")):
            *_, image = sample.trajectory(lambda x_t, t: x_t / 2, schedule, sampling,
                                          iter(noises).__next__)
            yield image.mean().item()
    right, changed = list(results()), {}
    expected = dict(         # x: another loss; ddpm, without clipping, with beta_tilde; ddim, dpm
        q_sample="x.....", l_simple="x.....", x0_from_eps=".x.xxx", eps_from_x0=".x.xxx",
        reverse_step=".xxx..", beta_tilde="...xxx", reverse_variance=".xxx..")
    for name in expected:
        ours = getattr(ddpm, name, getattr(posterior, name, None))
        with monkeypatch.context() as patch:
            for user in (ddpm, posterior, train, sample):
                if hasattr(user, name):
                    patch.setattr(user, name, lambda *args, ours=ours: 1.1 * ours(*args))
            changed[name] = "".join(".x"[a != b] for a, b in zip(results(), right))
    assert changed == expected


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
def test_the_whole_trajectory_through_a_network_is_numpy_s(device, clip, choice):
    """Algorithm 2, N4, N8: what sample.py draws against reverse_step on arrays: same network, same
    noise, every x_t.
    """
    net, schedule = small_unet(num_classes=0).to(device), evenly(12, 0.01, 0.3)
    found = generate(net, SHORT, Sampling("ddpm", sigma2=choice, clip=clip, seed=1), range(5, 7))
    streams = [np.random.default_rng((1, i)) for i in (5, 6)]

    def noise():
        return np.stack([s.standard_normal((1, 8, 8), dtype=np.float32) for s in streams])
    x_t = noise().astype(np.float64)
    for t in range(12, 0, -1):
        near32(found[12 - t], x_t, condition=30)
        with torch.no_grad():
            eps = net(torch.tensor(x_t, dtype=torch.float32, device=device),
                      torch.full((2,), t, device=device)).cpu().double().numpy()
        if clip:
            x0 = np.clip(ddpm.x0_from_eps(x_t, t, eps, schedule), -1, 1)
            eps = ddpm.eps_from_x0(x_t, t, x0, schedule)
        x_t = reverse_step(x_t, eps, t, noise() if t > 1 else 0.0,
                           posterior.reverse_variance(choice, schedule)[t], schedule)
    near32(found[12], x_t, condition=30)
    assert len(found) == 13
