"""The reverse process and the bound: how noise becomes an image.                N4, N8, V6–V12, V14

The reference, in NumPy and float64: the true posterior q(x_{t−1} | x_t, x_0), which no network is
needed for, the reverse step that replaces x_0 by a prediction, and the bound on −log p(x_0) that
says how good the prediction must be.  Symbols, tags and shapes as in ddpm.py.

`python posterior.py` diffuses a digit to noise and takes it back with the true posterior.
"""
import math

import numpy as np
from numpy import log

from ddpm import Schedule, draw, linear, log_normal, q_marginal, q_step, sqrt


# ── The true posterior ────────────────────────────────────────────────────────────────────────────
# By Bayes' rule, as a function of x_{t−1}, up to a constant factor:
#
#     q(x_{t−1} | x_t, x_0) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x_0)
#         = exp −½ [ (x_t − √α_t x_{t−1})²/β_t + (x_{t−1} − √ᾱ_{t−1} x_0)²/(1−ᾱ_{t−1}) ]
#
# The exponent is a square in x_{t−1}: given x_0 the posterior is exactly Gaussian, not
# approximately.  Complete the square, −½ [ P x_{t−1}² − 2 R x_{t−1} + … ]:
#
#     P = α_t/β_t + 1/(1−ᾱ_{t−1}) = (1−ᾱ_t) / (β_t (1−ᾱ_{t−1}))      [α_t (1−ᾱ_{t−1}) + β_t = 1−ᾱ_t]
#     R = √α_t x_t/β_t + √ᾱ_{t−1} x_0/(1−ᾱ_{t−1})
#
# The variance is 1/P = β̃_t, and the mean R/P = A1 x_t + A2 x_0.

def beta_tilde(t, schedule: Schedule):
    """β̃_t = (1−ᾱ_{t−1})/(1−ᾱ_t) β_t                                                     Ho (7), V8

    t: 1..T.  0 at t = 1, where x_0 itself is given.
    >>> beta_tilde(3, schedule_of([0.5, 0.5, 0.5]))
    0.428571
    """
    return schedule.one_minus_alpha_bar[t - 1] / schedule.one_minus_alpha_bar[t] * schedule.beta[t]


def A1(t, schedule: Schedule):
    """A1 = √α_t (1−ᾱ_{t−1})/(1−ᾱ_t): how much of x_t the posterior mean keeps.   Ho (7), V9, V14

    >>> A1(3, schedule_of([0.5, 0.5, 0.5]))
    0.606092
    """
    return sqrt(schedule.alpha[t]) * (schedule.one_minus_alpha_bar[t - 1]
                                      / schedule.one_minus_alpha_bar[t])


def A2(t, schedule: Schedule):
    """A2 = √ᾱ_{t−1} β_t/(1−ᾱ_t): how much of x_0 the posterior mean takes.       Ho (7), V9, V14

    >>> A2(3, schedule_of([0.5, 0.5, 0.5]))
    0.285714
    """
    return sqrt(schedule.alpha_bar[t - 1]) * schedule.beta[t] / schedule.one_minus_alpha_bar[t]


def posterior(x_t, x0, t, schedule: Schedule):
    """q(x_{t−1} | x_t, x_0) = N(A1 x_t + A2 x_0, β̃_t I)                          Ho (6, 7), V8, V9

    t: 1..T.  Returns (mean, variance); at t = 1 they are x_0 and 0.
    >>> posterior(1.0, 0.0, 2, schedule_of([0.5, 0.5]))
    (0.471405, 0.333333)
    """
    return A1(t, schedule) * x_t + A2(t, schedule) * x0, beta_tilde(t, schedule)


# ── The reverse step ──────────────────────────────────────────────────────────────────────────────

def reverse_mean(x_t, eps, t, schedule: Schedule):
    """μ_θ = (x_t − β_t/√(1−ᾱ_t) ε_θ) / √α_t                                        Ho (10, 11), N8

    The posterior mean with x_0 replaced by what ε_θ says it is:
        A1 x_t + A2 (x_t − √(1−ᾱ_t) ε)/√ᾱ_t,
    where A1 + A2/√ᾱ_t = 1/√α_t  and  A2/√ᾱ_t = β_t/(√α_t (1−ᾱ_t)).
    >>> reverse_mean(1.0, 0.5, 1, schedule_of([0.36]))
    0.875
    """
    beta, alpha = schedule.beta[t], schedule.alpha[t]
    return (x_t - beta / sqrt(schedule.one_minus_alpha_bar[t]) * eps) / sqrt(alpha)


def reverse_step(x_t, eps, t, z, sigma2, schedule: Schedule):
    """x_{t−1} = μ_θ(x_t, t) + σ_t z, with z = 0 at t = 1        Ho (1, 11), Algorithm 2, N4, N8, V6

    A draw from p(x_{t−1} | x_t) = N(μ_θ, σ_t² I) for z from N(0, I).
    sigma2: σ_t², usually β_t or β̃_t.
    >>> reverse_step(1.0, 0.5, 1, 9.0, 0.36, schedule_of([0.36]))
    0.875
    """
    return draw(reverse_mean(x_t, eps, t, schedule), sigma2 if t > 1 else 0, z)


def reverse_variance(choice: str, schedule: Schedule) -> np.ndarray:
    """σ_t² = β_t ("beta") or β̃_t ("beta_tilde"), t = 0..T                           Ho section 3.2

    β_t is exact for data from N(0, I), β̃_t for a single image.  Algorithm 2 adds no noise at
    t = 1, but the decoder L_0 needs a σ_1², and β̃_1 = 0 would leave it no width: as in the
    authors' code, both choices have β̃_2 there (β_1 if T = 1).
    >>> reverse_variance("beta_tilde", schedule_of([0.5, 0.5]))
    array([0.      , 0.333333, 0.333333])
    """
    sigma2 = schedule.beta.copy()
    if choice == "beta_tilde":
        sigma2[2:] = beta_tilde(np.arange(2, schedule.T + 1), schedule)
    if schedule.T > 1:
        sigma2[1] = beta_tilde(2, schedule)
    return sigma2


# ── The distance between two Gaussians ────────────────────────────────────────────────────────────

def kl(mean_1, variance_1, mean_2, variance_2):
    """KL(N_1 ‖ N_2) = ½ [v_1/v_2 − 1 − ln(v_1/v_2) + (m_1−m_2)²/v_2], in nats per pixel       KL

    >>> kl(1.0, 2.0, 0.0, 1.0)
    0.653426
    """
    ratio = variance_1 / variance_2                  # near 1 this rounds by 1e-16 |ratio − 1| nats
    return (ratio - 1 - log(ratio) + (mean_1 - mean_2) ** 2 / variance_2) / 2


# ── The matching term L_{t−1}, three ways ─────────────────────────────────────────────────────────
# If both variances are σ_t², only the last part of KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)) is
# left.  Each form is the one above it with the means put in.  All are in nats per pixel.

def matching_mean(mu_tilde, mu, sigma2):
    """L_{t−1} = ‖μ̃ − μ_θ‖² / (2σ_t²)                                                Ho (8), V10

    >>> matching_mean(1.0, 0.5, 0.25)
    0.5
    """
    return (mu_tilde - mu) ** 2 / (2 * sigma2)


def matching_x0(x0, x0_hat, t, sigma2, schedule: Schedule):
    """L_{t−1} = A2²/(2σ_t²) ‖x_0 − x̂_0‖²                                                       V11

    The A1 x_t parts of the two means cancel.  With σ_t² = β̃_t the weight is (SNR_{t−1} − SNR_t)/2.
    >>> matching_x0(1.0, 0.0, 2, 1.0, schedule_of([0.5, 0.5]))
    0.111111
    """
    return A2(t, schedule) ** 2 / (2 * sigma2) * (x0 - x0_hat) ** 2


def C(t, sigma2, schedule: Schedule):
    """C_t = β_t² / (2σ_t² α_t (1−ᾱ_t))                                                Ho (12), V12

    It depends on t; V calls it a constant.  With σ_t² = β̃_t it is (SNR_{t−1}/SNR_t − 1)/2.
    >>> C(2, 1.0, schedule_of([0.5, 0.5]))
    0.333333
    """
    return schedule.beta[t] ** 2 / (
        2 * sigma2 * schedule.alpha[t] * schedule.one_minus_alpha_bar[t])


def matching_eps(eps, eps_hat, t, sigma2, schedule: Schedule):
    """L_{t−1} = C_t ‖ε − ε_θ‖²                                                         Ho (12), V12

    L_simple, Ho (14), is this with C_t set to 1: no longer the bound, and better pictures.
    >>> matching_eps(1.0, 0.5, 2, 1.0, schedule_of([0.5, 0.5]))
    0.0833333
    """
    return C(t, sigma2, schedule) * (eps - eps_hat) ** 2


def matching_constant(t, sigma2, schedule: Schedule):
    """½ [β̃_t/σ_t² − 1 + ln(σ_t²/β̃_t)], t > 1: the part of L_{t−1} without the means   constant

    >>> matching_constant(2, 0.5, schedule_of([0.5, 0.5]))
    0.0360659
    """
    return kl(0.0, beta_tilde(t, schedule), 0.0, sigma2)


# ── The bound ─────────────────────────────────────────────────────────────────────────────────────
#     −log p(x_0) ≤ E_q [ −log p(x_{0:T})/q(x_{1:T} | x_0) ]                                  Ho (3)
# Each forward factor turns around by Bayes' rule: for t > 1, given x_0,
#     q(x_t | x_{t−1}) = q(x_{t−1} | x_t, x_0) q(x_t | x_0) / q(x_{t−1} | x_0),
# and the quotients q(x_t | x_0)/q(x_{t−1} | x_0) telescope to q(x_T | x_0)/q(x_1 | x_0).
# What remains:
#     E_q [ KL(q(x_T | x_0) ‖ p(x_T))                                   L_T: regularization
#           + Σ_{t>1} KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t))      L_{t−1}: matching
#           − log p(x_0 | x_1) ]                                        L_0: reconstruction

def trajectory_bound(trajectory, reverse, schedule: Schedule):
    """log q(x_{1:T} | x_0) − log p(x_{0:T}) along one trajectory x_0 .. x_T          Ho (3, 16), V7

    reverse(x_t, t): the pair (mean, variance) of p(x_{t−1} | x_t).  Nats, summed over the pixels.
    >>> trajectory_bound([0.0, 1.0], lambda x_t, t: (0.0, 1.0), schedule_of([0.5]))
    0.765512
    """
    total = -log_normal(trajectory[-1], 0.0, 1.0)
    for t in range(1, schedule.T + 1):
        total = total + log_normal(trajectory[t], *q_step(trajectory[t - 1], t, schedule))
        total = total - log_normal(trajectory[t - 1], *reverse(trajectory[t], t))
    return np.sum(total)


def trajectory_terms(trajectory, reverse, schedule: Schedule):
    """The same, telescoped: (L_T, Σ_{t>1} L_{t−1}, L_0) along one trajectory             Ho (5), V7

    The three sum to trajectory_bound exactly; their expectations over q are the KL's above.
    >>> trajectory_terms([0.0, 1.0], lambda x_t, t: (0.0, 1.0), schedule_of([0.5]))
    (-0.153426, 0.0, 0.918939)
    """
    x0, x_T = trajectory[0], trajectory[-1]
    l_T = log_normal(x_T, *q_marginal(x0, schedule.T, schedule)) - log_normal(x_T, 0.0, 1.0)
    matching = np.zeros_like(x0)
    for t in range(2, schedule.T + 1):
        matching += log_normal(trajectory[t - 1], *posterior(trajectory[t], x0, t, schedule))
        matching -= log_normal(trajectory[t - 1], *reverse(trajectory[t], t))
    l_0 = -log_normal(x0, *reverse(trajectory[1], 1))
    return np.sum(l_T), np.sum(matching), np.sum(l_0)


def L_T(x0, schedule: Schedule):
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)), in nats per pixel                            Ho (5), N2, V7

    It has no parameters; it says how far x_T is from independent of x_0.  0 would be independent.
    >>> L_T(1.0, schedule_of([0.5]))
    0.346574
    """
    return kl(*q_marginal(x0, schedule.T, schedule), 0.0, 1.0)


def L_0(x0, mean, sigma2):
    """L_0 = −log ∫ N(x; μ_θ(x_1, 1), σ_1²) dx over the bin of x_0, in nats per pixel        Ho (13)

    x0: pixels k/127.5 − 1, k = 0..255.  The bins are 2/255 wide, the first and last open outwards.
    >>> L_0(0.0, 0.0, 0.0001)
    1.18725
    """
    upper = np.where(x0 > 0.999, np.inf, (x0 + 1 / 255 - mean) / sqrt(sigma2))
    lower = np.where(x0 < -0.999, -np.inf, (x0 - 1 / 255 - mean) / sqrt(sigma2))
    erfc = np.vectorize(math.erfc, otypes=[float])
    # Φ(upper) − Φ(lower) loses all digits far right of the mean; there the mirror image is exact.
    mirrored = lower > 0
    upper, lower = np.where(mirrored, -lower, upper), np.where(mirrored, -upper, lower)
    p = (erfc(-upper / math.sqrt(2)) - erfc(-lower / math.sqrt(2))) / 2
    return -log(np.maximum(p, 1e-300))


def bits_per_dim(nats_per_pixel):
    """nats / ln 2, averaged over all pixels and colours                           Ho section 4.1

    >>> bits_per_dim(np.array([log(2), 3 * log(2)]))
    2.0
    """
    return np.mean(nats_per_pixel) / log(2)


# ── The score ─────────────────────────────────────────────────────────────────────────────────────

def score(eps, t, schedule: Schedule):
    """∇ log q(x_t) = −E[ε | x_t] / √(1−ᾱ_t): the best ε_θ points down the density.         score

    >>> score(1.0, 1, schedule_of([0.25]))
    -2.0
    """
    return -eps / sqrt(schedule.one_minus_alpha_bar[t])


def tweedie_mean(x_t, score_t, t, schedule: Schedule):
    """E[x_{t−1} | x_t] = (x_t + β_t ∇ log q(x_t)) / √α_t: Ho (11) once more.                  score

    Exact for any β_t and any data.  Nair's "the reverse is Gaussian too" (N4) holds for small β_t
    only: x_{t−1} given x_t alone has this mean, but a Gaussian shape only as β_t → 0.
    >>> tweedie_mean(1.0, -0.5, 1, schedule_of([0.36]))
    1.025
    """
    return (x_t + schedule.beta[t] * score_t) / sqrt(schedule.alpha[t])


def best_x0(x_t, t, images, schedule: Schedule):
    """E[x_0 | x_t] = Σ_i w_i x_i,  w = softmax_i(−‖x_t − √ᾱ_t x_i‖² / (2 (1−ᾱ_t)))            score

    The perfect network, for data that are a finite set: by Bayes' rule w_i = q(x_i | x_t), which
    is proportional to q(x_t | x_i), as each x_i is as likely as any other.  The mean has the least
    squared error, and ε follows by Ho (15).  A network this good draws nothing but the x_i.
    x_t: (B, …) at t >= 1, one for all or (B,);  images: (N, …) → (B, …).
    >>> best_x0(np.array([[0.1]]), 1, np.array([[-1.0], [1.0]]), schedule_of([0.5]))
    array([[0.140486]])
    """
    x, x_i = x_t.reshape(len(x_t), -1), images.reshape(len(images), -1)
    alpha_bar, variance = (np.reshape(table[t], (-1, 1)) for table in (
        schedule.alpha_bar, schedule.one_minus_alpha_bar))
    # −½‖x_t − √ᾱ_t x_i‖² without ‖x_t‖², which no w_i depends on
    log_w = (sqrt(alpha_bar) * (x @ x_i.T) - alpha_bar * np.sum(x_i ** 2, axis=1) / 2) / variance
    w = np.exp(log_w - log_w.max(axis=1, keepdims=True))
    return ((w @ x_i) / w.sum(axis=1, keepdims=True)).reshape(x_t.shape)


# ── A digit, there and back ───────────────────────────────────────────────────────────────────────

def main():
    """Document V's example: a digit taken back from x_T, x_0 given, and how A1 and A2 change."""
    from support.data import load, to_pixels
    from support.pictures import image_grid, to_bytes, write_png

    x0 = to_pixels(load()[0][7])
    schedule, rng = linear(), np.random.default_rng(0)
    shown = [601, 401, 201, 101, 51, 21, 11, 3, 1]
    x_t = draw(*q_marginal(x0, schedule.T, schedule), rng.standard_normal(x0.shape))
    trajectory = [x_t]

    print("Towards the image, t = 1000 .. 1:  x_{t−1} = A1 x_t + A2 x_0 + √β̃ z   (V8, V9, V14)\n")
    print("    t        A1          A2          β̃      ‖x_{t−1} − x_0‖")
    for t in range(schedule.T, 0, -1):
        x_t = draw(*posterior(x_t, x0, t, schedule), rng.standard_normal(x0.shape))
        if t in shown:
            trajectory.append(x_t)
            print(f"{t:5d}   {A1(t, schedule):9.6f}   {A2(t, schedule):9.6f}   "
                  f"{beta_tilde(t, schedule):.3e}   {sqrt(np.mean((x_t - x0) ** 2)):12.6f}")
    t = np.arange(1, schedule.T + 1)
    print(f"\nA2 only grows, from {A2(schedule.T, schedule):.6f} to 1.  A1 grows to "
          f"{A1(t, schedule).max():.5f} at t = {t[A1(t, schedule).argmax()]}, then falls to 0.\n"
          "At large t, x_{t−1} is nearly x_t; near the image x_0 decides, and at t = 1 x_0 alone.")
    write_png("out/posterior.png", image_grid(to_bytes(np.array(trajectory)), len(trajectory)))
    print("drawn: out/posterior.png, x_t before the first and after each of these steps; "
          "next: python train.py")


if __name__ == "__main__":
    from support.console import run_script

    run_script(main, __doc__)
