"""What proofs need: how near is near, schedules to draw, and `proved`, on numbers and letters."""
import functools
import inspect
import math
import re
from fractions import Fraction

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import ddpm
import posterior
from ddpm import Schedule
from support.testing_letters import POSITIVE, Letters

# ── Rounded numbers ───────────────────────────────────────────────────────────────────────────────

ROUNDING = 1e-12           # a few thousand roundings of 2⁻⁵²: the longest sums here have 1000 terms


def near(found, claimed, condition=1.0, scale=0.0):
    """|found − claimed| ≤ ROUNDING · condition · max(|claimed|, scale).

    condition: how much the formula magnifies the rounding of its inputs.  scale: the size of terms
    that cancel in it.  Where they are used, the reason stands beside them.
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


PAPER = evenly(1000, 1e-4, 0.02)

betas = st.floats(1e-7, 1 - 1e-7) | st.floats(-16, -0.001).map(math.exp)
schedules = (st.lists(betas, min_size=1, max_size=30)
             | st.builds(np.linspace, st.floats(1e-6, 0.01), st.floats(0.01, 0.5),
                         st.integers(1, 1000))).map(tables)
pixels = st.floats(-3, 3).map(lambda x: round(x, 9))            # whose squares do not underflow
images = arrays(np.float64, array_shapes(max_dims=3, max_side=3), elements=pixels)


# ── Formulas ──────────────────────────────────────────────────────────────────────────────────────

FORMULAS = [ddpm.q_step, ddpm.q_marginal, ddpm.q_sample, ddpm.variance_at, ddpm.snr,
            ddpm.x0_from_eps, ddpm.eps_from_x0, posterior.beta_tilde, posterior.A1, posterior.A2,
            posterior.posterior, posterior.reverse_mean, posterior.matching_mean,
            posterior.matching_x0, posterior.C, posterior.matching_eps, posterior.score,
            posterior.tweedie_mean]


def of_numbers(function, t, schedule, x, y, z):
    """A formula of any kind of numbers: x is x_t, y is x_0 or what is compared with x, z is ε."""
    given = dict(t=t, schedule=schedule, sigma2=schedule.beta[t], x_prev=x, x_t=x, x0=y, eps=z,
                 x0_hat=x, eps_hat=x, mu_tilde=y, mu=x, score_t=y, variance_0=y ** 2)
    return function(*(given[name] for name in inspect.signature(function).parameters))


# ── Claims ────────────────────────────────────────────────────────────────────────────────────────

NUMBERS = 2, 1, 3, -1, -2, -3, 4, 5, -4, -5, 6, 7
WHOLE = dict(schedule="", t="", T="", path="x_0 x_1 x_2 x_3", reverse="m_1 m_2 m_3 v_1 v_2 v_3")
ROOTS = [[Fraction(root) for root in roots.split()] for roots in (              # √ᾱ_1, √ᾱ_2, …
    "4/5 3/5", "4/5", "3/5", "5/13", "4/5 5/13", "3/5 5/13", "4/5 3/5 5/13")]


def exact_schedule(roots):
    """The schedule with these √ᾱ_1, √ᾱ_2, …: fractions, or letters "a_1", "a_2", …"""
    a = [Letters.of(x) for x in (1, *roots)]
    alpha = [a[0], *((now / before) ** 2 for before, now in zip(a, a[1:]))]
    one_minus = [Letters.of(x.replace("a_", "s_")) ** 2 if isinstance(x, str) else 1 - x ** 2
                 for x in (1, *roots)]
    return Schedule([1 - x for x in alpha], alpha, [x ** 2 for x in a],
                    [Letters.of(x) for x in one_minus])


def in_letters(T):
    """Every schedule of T steps at once."""
    return exact_schedule([f"a_{t}" for t in range(1, T + 1)])


def cases(names, first):
    """What a claim is tried on, in words and as its arguments: small numbers, then letters."""
    free = [part for name in names for part in WHOLE.get(name, name).split()]
    small = [abs(x) + 1 if name.startswith(POSITIVE) else x for name, x in zip(free, NUMBERS)]
    trials = [(exact_schedule(roots), t, small) for roots in ROOTS
              for t in range(len(roots), first - 1, -1)]
    for schedule, t, values in trials + [(in_letters(t), t, free) for t in range(first, 3)]:
        if "T" in names and t < schedule.T:
            continue
        given = dict(zip(free, map(Letters.of, values)))
        shown = [f"t = {t}"] + [f"α_{k} = {x}" for k, x in enumerate(schedule.alpha) if k]
        shown = shown * ("schedule" in names) + [f"{name} = {x}" for name, x in given.items()]
        whole = dict(schedule=schedule, t=t, T=t, path=[given.get(f"x_{k}") for k in range(t + 1)],
                     reverse=lambda x_t, t: (given[f"m_{t}"] * x_t, given[f"v_{t}"]))
        yield ", ".join(shown), {name: {**given, **whole}[name] for name in names}


def proved(claim=None, *, first=1):
    """The test that claim(schedule, t, x_0, …) is true, tried on small numbers, then proved.

    schedule, t: from t = `first` on, where the claim has them; a claim about t = T calls it T.
    path: any x_0 .. x_T.  reverse: x_t, t ↦ m_t x_t and v_t, which are any mean and variance, as
    m_t is any number.  Other parameters are any numbers, above 0 if they begin as in POSITIVE.
    """
    if claim is None:
        return functools.partial(proved, first=first)
    names = inspect.signature(claim).parameters

    def test():
        __tracebackhide__ = True
        for where, given in cases(names, first):
            try:
                claim(**given)
            except Exception as wrong:
                kind = "" if isinstance(wrong, AssertionError) else f"{type(wrong).__name__}: "
                what = re.sub("^assert (.+) (==|<=?|>=?) (.+)$", r"found \1, the claim says \2 \3",
                              str(wrong).split("\n")[0]).replace("says == ", "says ")
                raise AssertionError(f"{claim.__doc__.split(':')[0]} at {where}: {kind}{what}"
                                     ) from (wrong if kind else None)
    for name in ("__name__", "__qualname__", "__doc__", "__module__"):
        setattr(test, name, getattr(claim, name))
    test.claim = claim
    return test


def mean_of_quadratic(f, mean, variance):
    """E f(x) for x with this mean and variance and an f that is quadratic in x, exactly."""
    return f(mean) + variance * ((f(mean + 1) + f(mean - 1)) / 2 - f(mean))
