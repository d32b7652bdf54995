"""The forward process: how an image becomes noise.                              N1–N3, N5–N7, V1–V5

The reference, in NumPy and float64; training and sampling call these same functions.  Ho is Ho,
Jain, Abbeel, "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239), N is Nair's article, V
is Vizuara's (ARTICLES.md has them in full).  Each equation is one function, in Ho's symbols, with
one value to check by hand or by `pytest`; `grep -nE "Ho.*[( ]4[,)]" *.py` finds (4) and its proofs.

Time runs t = 1..T and index 0 is the clean image.  Pixels live in [-1, 1].  Images may have any
shape; t is one integer for all of them, or one for each, shaped (B, 1, 1, 1) beside (B, C, H, W).

`python ddpm.py` diffuses the letter T in two ways and draws both.
"""
from typing import NamedTuple

import numpy as np
from numpy import cos, exp, expm1, log, log1p, pi


def sqrt(x):
    """√x as a power: so a formula takes floats, arrays, tensors, and the proofs' letters."""
    return x ** 0.5


# ── Schedules: how much noise each step adds ──────────────────────────────────────────────────────

class Schedule(NamedTuple):
    """β_t and what follows from it, for t = 0..T.  Index 0 is the clean image: β_0 = 0, ᾱ_0 = 1."""

    beta: np.ndarray                  # β_t: the variance of the noise that step t adds
    alpha: np.ndarray                 # α_t = 1 − β_t
    alpha_bar: np.ndarray             # ᾱ_t = α_1 α_2 … α_t
    one_minus_alpha_bar: np.ndarray   # 1 − ᾱ_t, with full precision where ᾱ_t is nearly 1

    @property
    def T(self) -> int:
        return len(self.beta) - 1


def schedule_of(beta: np.ndarray) -> Schedule:
    """α_t = 1 − β_t,  ᾱ_t = ∏_{s≤t} α_s                                                Ho (4), N2

    beta: β_1..β_T, at least one, each inside (0, 1).  Raises ValueError otherwise.
    >>> schedule_of([0.5, 0.5]).alpha_bar
    array([1.  , 0.5 , 0.25])
    """
    beta = np.asarray(beta, dtype=np.float64)
    if beta.ndim != 1 or not beta.size or not np.all((0 < beta) & (beta < 1)):
        raise ValueError(f"beta_1 .. beta_T must be one or more, each inside (0, 1), not {beta}")
    beta = np.concatenate([[0.0], beta])
    log_alpha_bar = np.cumsum(log1p(-beta))
    return Schedule(beta, 1 - beta, exp(log_alpha_bar), -expm1(log_alpha_bar))


def linear(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:
    """β_t rises in equal steps from β_1 to β_T.                           Ho section 4, V4 (linear)

    The default betas belong to T = 1000.  For another T they are not rescaled: L_T (posterior.py)
    tells how far x_T then is from noise.
    Raises ValueError for T < 1 and for a beta outside (0, 1).
    >>> linear().beta[[1, 500, 1000]]
    array([0.0001 , 0.01004, 0.02   ])
    """
    return schedule_of(np.linspace(beta_1, beta_T, T))


def cosine(T: int = 1000) -> Schedule:
    """β_t = min(1 − f(t)/f(t−1), 0.999),  f(t) = cos²((t/T + 0.008)/1.008 · π/2)           (cosine)

    The schedule of Nichol and Dhariwal (arXiv:2102.09672), for any T.  Raises ValueError for T < 1.
    >>> cosine().beta[[1, 500, 1000]]
    array([4.128422e-05, 3.145886e-03, 9.990000e-01])
    """
    t = np.arange(T + 1)
    f = cos((t / T + 0.008) / 1.008 * pi / 2) ** 2
    return schedule_of(np.minimum(1 - f[1:] / f[:-1], 0.999))


# ── One step ──────────────────────────────────────────────────────────────────────────────────────
# A Gaussian is a pair (mean, variance); every pixel has its own mean and they share the variance.

def draw(mean, variance, eps):
    """mean + √variance ε is a draw from N(mean, variance I) when ε is one from N(0, I).

    >>> draw(1.0, 0.25, -2.0)
    0.0
    """
    return mean + sqrt(variance) * eps


def log_normal(x, mean, variance):
    """log N(x; mean, variance) = −½ [(x − mean)²/variance + log(2π variance)], nats per pixel.

    >>> log_normal(1.0, 0.0, 1.0)
    -1.41894
    """
    return -0.5 * ((x - mean) ** 2 / variance + log(2 * pi * variance))


def naive_step(x_prev, beta, eps):
    """x_t = x_{t−1} + √β ε                                                                       V1

    The first idea: keep the pixel, add noise.  The mean stays x_0, so the structure never goes
    away, and the variance grows without end.
    >>> naive_step(1.0, 0.25, -1.0)
    0.5
    """
    return x_prev + sqrt(beta) * eps


def scaled_step(x_prev, scale, deviation, eps):
    """x_t = α x_{t−1} + β ε, in V's letters: α is a scale and β a standard deviation            V2

    Shrinks the pixel towards 0 while it adds noise.  α² + β² = 1 keeps a variance of 1:
    then it is Ho (2).
    >>> scaled_step(1.0, 0.8, 0.6, -1.0)
    0.2
    """
    return scale * x_prev + deviation * eps


def q_step(x_prev, t, schedule):
    """q(x_t | x_{t−1}) = N(√(1−β_t) x_{t−1}, β_t I)                              Ho (2), N1, V4, V5

    t: 1..T.  Returns (mean, variance).  1 − β_t is α_t.
    >>> q_step(2.0, 1, schedule_of([0.36]))
    (1.6, 0.36)
    """
    return sqrt(schedule.alpha[t]) * x_prev, schedule.beta[t]


# ── Many steps at once ────────────────────────────────────────────────────────────────────────────

def q_marginal(x0, t, schedule):
    """q(x_t | x_0) = N(√ᾱ_t x_0, (1−ᾱ_t) I)                                              Ho (4), N2

    t: 0..T.  Returns (mean, variance).  The steps compose: scales multiply to √(α_1 … α_t), and
    v_t = α_t v_{t−1} + 1 − α_t with v_0 = 0 gives v_t = 1 − α_t (1 − v_{t−1}) = 1 − α_1 … α_t.
    >>> q_marginal(2.0, 2, schedule_of([0.5, 0.5]))
    (1.0, 0.75)
    """
    return sqrt(schedule.alpha_bar[t]) * x0, schedule.one_minus_alpha_bar[t]


def q_sample(x0, t, eps, schedule):
    """x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε                                                   Ho (4), N3, V3

    Jump from the clean image to step t at once.  x0, eps: one shape;  t: 0..T, 0 gives x0 back.
    >>> q_sample(2.0, 500, -1.0, linear())
    -0.399234
    """
    return sqrt(schedule.alpha_bar[t]) * x0 + sqrt(schedule.one_minus_alpha_bar[t]) * eps


def variance_at(t, variance_0, schedule):
    """Var x_t = ᾱ_t Var x_0 + 1 − ᾱ_t: it stays 1 if it was 1, and tends to 1 otherwise.     V2, V4

    Nair's x_T is "completely independent" of x_0 only in this limit: √ᾱ_T = 0.006 remains.
    >>> variance_at(2, 3.0, schedule_of([0.5, 0.5]))
    1.5
    """
    return schedule.alpha_bar[t] * variance_0 + schedule.one_minus_alpha_bar[t]


def snr(t, schedule):
    """SNR_t = ᾱ_t / (1−ᾱ_t): signal to noise, falling with t; infinite at t = 0.              V4

    >>> snr(2, schedule_of([0.5, 0.5]))
    0.333333
    """
    return schedule.alpha_bar[t] / schedule.one_minus_alpha_bar[t]


# ── And back, if the noise is known ───────────────────────────────────────────────────────────────

def x0_from_eps(x_t, t, eps, schedule):
    """x_0 = (x_t − √(1−ᾱ_t) ε) / √ᾱ_t                                             Ho (9, 15), N5

    >>> x0_from_eps(1.0, 1, 0.5, schedule_of([0.36]))
    0.875
    """
    return (x_t - sqrt(schedule.one_minus_alpha_bar[t]) * eps) / sqrt(schedule.alpha_bar[t])


def eps_from_x0(x_t, t, x0, schedule):
    """ε = (x_t − √ᾱ_t x_0) / √(1−ᾱ_t), for t >= 1                                   Ho (9, 15), N5

    At one x_t and t, knowing ε is knowing x_0.
    >>> eps_from_x0(1.0, 1, 0.5, schedule_of([0.36]))
    1.0
    """
    return (x_t - sqrt(schedule.alpha_bar[t]) * x0) / sqrt(schedule.one_minus_alpha_bar[t])


def l_simple(eps, eps_hat):
    """L_simple = ‖ε − ε_θ(x_t, t)‖², the mean over all entries                 Ho (14), N6, N7, V13

    A mean, where the paper's ‖·‖² is a sum over the pixels.  eps, eps_hat: arrays, or tensors on
    any device: train.py minimises this very function.
    Predicting no noise, ε_θ = 0, costs 1.  A perfect prediction would cost 0, and no network
    reaches that, since x_t does not determine ε.  On N(0, 1) data the least is the mean over t of
    ᾱ_t, 0.2755 for linear(), T = 1000.
    >>> l_simple(np.array([1.0, -1.0]), np.array([0.5, -1.0]))
    0.125
    """
    return ((eps - eps_hat) ** 2).mean()


# ── The letter T ──────────────────────────────────────────────────────────────────────────────────

def main():
    """Document V's example: the letter T under V1 and under V2, 100 times each, and the figures."""
    from support.pictures import image_grid, to_bytes, write_png

    letter = -np.ones((32, 32))
    letter[5:9, 5:27] = letter[5:27, 14:18] = 1
    ink = letter > 0
    schedule, rng = linear(), np.random.default_rng(0)
    naive = scaled = np.stack([letter] * 100)
    shown, columns = [0, 50, 100, 200, 300, 500, 1000], []
    print("The letter T, pixels -1 and 1: the mean pixel of ink and of paper, over 100 draws\n")
    print("            naive: x + √β ε  (V1)      scaled: √(1−β) x + √β ε  (V2, Ho 2)")
    print("    t      ink   paper   variance        ink   paper   variance   SNR   (V4)")
    for t in range(schedule.T + 1):
        if t > 0:
            eps = rng.standard_normal(naive.shape)
            naive = naive_step(naive, schedule.beta[t], eps)
            scaled = draw(*q_step(scaled, t, schedule), eps)
        if t in shown:
            columns.append([naive[0], naive.mean(0), scaled[0], scaled.mean(0)])
            row = [f"{x[:, ink].mean():8.3f}{x[:, ~ink].mean():8.3f}{x.var():11.3f}"
                   for x in (naive, scaled)]
            print(f"{t:5d} {row[0]}   {row[1]}   {snr(t, schedule) if t else np.inf:10.3g}")
    # one grey scale for all, from -2 to 2, so that the growing variance can be seen
    images = to_bytes(np.swapaxes(columns, 0, 1).reshape(-1, *letter.shape) / 2)
    write_png("out/letter.png", image_grid(images, len(shown), zoom=3))
    print("\nnaive: the letter stays, under ever more noise; scaled: the letter goes, the variance "
          "tends to 1\ndrawn: out/letter.png, at these t, naive above; in each one draw, and under "
          "it the mean of 100; next: python posterior.py")


if __name__ == "__main__":
    from support.console import run_script

    run_script(main, __doc__)
