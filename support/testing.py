"""The arithmetic of proofs: how near is near, schedules to draw, letters, and what is proved."""
import functools
import inspect
import itertools
import math
import operator
import re
from collections import Counter
from fractions import Fraction
from numbers import Real

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from ddpm import Schedule

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


ONE_STEP = tables([0.3])
PAPER = evenly(1000, 1e-4, 0.02)

betas = st.floats(1e-7, 1 - 1e-7) | st.floats(-16, -0.001).map(math.exp)
schedules = (st.lists(betas, min_size=1, max_size=30)
             | st.builds(np.linspace, st.floats(1e-6, 0.01), st.floats(0.01, 0.5),
                         st.integers(1, 1000))).map(tables)
pixels = st.floats(-3, 3).map(lambda x: round(x, 9))            # whose squares do not underflow
images = arrays(np.float64, array_shapes(max_dims=3, max_side=3), elements=pixels)


@st.composite
def moments(draw_from, first=1):
    """A schedule and a time in first..T."""
    schedule = draw_from(schedules)
    return schedule, draw_from(st.integers(first, schedule.T))


# ── Letters ───────────────────────────────────────────────────────────────────────────────────────
# A monomial is a tuple of (letter, power), a polynomial a dict from monomials to fractions.

POSITIVE = "a_", "s_", "u_", "sigma", "v", "w"      # letters that begin so are > 0


def plus(p, q):
    return {m: c for m in {**p, **q} if (c := p.get(m, 0) + q.get(m, 0))}


def times(p, q):
    total = Counter()
    for (m, c), (n, d) in itertools.product(p.items(), q.items()):
        powers = dict(m)
        for letter, power in n:
            powers[letter] = powers.get(letter, 0) + power
        total[tuple(sorted(powers.items()))] += c * d
    return {m: c for m, c in total.items() if c}


def reduced(p, square="s_", other="a_"):
    """p with s² = 1 − a²: then {} alone is 0 for every schedule."""
    total = Counter()
    for m, c in p.items():
        part, kept = {(): c}, []
        for letter, power in m:
            if letter.startswith(square):
                rest = {(): 1, ((letter.replace(square, other), 2),): -1}
                part = functools.reduce(times, [rest] * (power // 2), part)
                power %= 2
            kept += [(letter, power)] * bool(power)
        total.update(times(part, {tuple(kept): 1}))
    return {m: c for m, c in total.items() if c}


def sign(p):
    """The sign of p in every schedule: with a_t = a_{t−1}/(1 + u_t), u_t > 0, its coefficients all
    have one.  If they have not, nothing is shown, and that is an error.
    """
    p, values, a = reduced(p), {}, Letters.of(1)
    for letter in sorted({letter for m in p for letter, _ in m}):
        values[letter] = Letters.of(letter)
        if letter.startswith("a_"):
            values[letter] = a = a / (1 + Letters.of(letter.replace("a_", "u_")))
    total = sum(c * math.prod(values[letter] ** power for letter, power in m) for m, c in p.items())
    signs = {1 if c > 0 else -1 for c in Letters.of(total).top.values()} or {0}
    if len(signs) > 1 or any(power % 2 and not letter.startswith(POSITIVE)
                             for m in p for letter, power in m):
        raise AssertionError(f"{Letters(p)} can have either sign")
    return signs.pop()


def root(p):
    """√p, where p is a square monomial as it stands, or with 1 − a² = s²."""
    for form in (p, reduced(p, "a_", "s_")):
        (m, c), *more = form.items() or [((), 0)]
        n, d = (math.isqrt(max(k, 0)) for k in Fraction(c).as_integer_ratio())
        if not more and c * d ** 2 == n ** 2 and all(
                power % 4 == 0 or power % 2 == 0 and letter.startswith(POSITIVE)
                for letter, power in m):
            return times({tuple((letter, power // 2) for letter, power in m): 1},
                         {(): Fraction(n, d)})
    raise AssertionError(
        f"√({Letters(p)}) is irrational: with the right symbols every root here is of ᾱ_t, 1 − ᾱ_t "
        "or α_t (α_t is not ᾱ_t), or of a variance")


class Sums:
    """− as + and ·, from either side."""

    def __radd__(self, other):
        return self + other

    def __rmul__(self, other):
        return self * other

    def __neg__(self):
        return self * -1

    def __sub__(self, other):
        return self + -1 * other

    def __rsub__(self, other):
        return -1 * self + other


@functools.total_ordering
class Letters(Sums):
    """An exact number, or in letters a quotient of two polynomials: a_t = √ᾱ_t, s_t = √(1−ᾱ_t), …

    == holds if both sides are the same function of the letters, < if the difference has one sign.
    """

    def __init__(self, top, bottom={(): 1}):
        common = functools.reduce(operator.and_, (Counter(dict(m)) for m in (*bottom, *top)))
        first, *more = bottom.values()
        unit = Fraction(abs(first) if more else first)
        self.top, self.bottom = ({tuple(sorted((Counter(dict(m)) - common).items())): c / unit
                                  for m, c in p.items()} for p in (top, bottom))

    @classmethod
    def of(cls, x):
        """A letter by its name, or an exact number; a float is the fraction that it is."""
        if isinstance(x, str):
            return cls({((x, 1),): 1})
        return cls({(): Fraction(x)} if x else {}) if isinstance(x, Real) else x

    def __add__(self, other):
        other = self.of(other)
        if not isinstance(other, Letters):
            return NotImplemented
        if self.bottom == other.bottom:
            return Letters(plus(self.top, other.top), self.bottom)
        return Letters(plus(times(self.top, other.bottom), times(other.top, self.bottom)),
                       times(self.bottom, other.bottom))

    def __mul__(self, other):
        other = self.of(other)
        if not isinstance(other, Letters):
            return NotImplemented
        return Letters(times(self.top, other.top), times(self.bottom, other.bottom))

    def __truediv__(self, other):
        return self * Letters.of(other) ** -1

    def __rtruediv__(self, other):
        return other * self ** -1

    def __pow__(self, power):
        if power < 0:
            if not reduced(self.top):
                raise ZeroDivisionError("division by 0")
            return Letters(self.bottom, self.top) ** -power
        if power % 1 == 0.5:
            return self ** (power - 0.5) * self.sqrt()
        return math.prod([self] * int(power), start=Letters.of(1))

    def sqrt(self):
        return Letters(root(self.top), root(self.bottom))

    def log(self):
        return Logs(0, (1, self))

    def log1p(self):
        return (self + 1).log()

    def __float__(self):
        raise TypeError("math.sqrt and math.log round: write sqrt(x), np.sqrt(x) or x ** 0.5, and "
                        "np.log(x)")

    def number(self):
        """The fraction that it is, or None if it is not the same for all letters."""
        top, bottom = reduced(self.top), reduced(self.bottom)
        c = Fraction(top.get(min(bottom), 0)) / bottom[min(bottom)]
        return c if top == {m: c * d for m, d in bottom.items() if c} else None

    def __eq__(self, other):
        other = self.of(other)
        return (not reduced((self - other).top)) if isinstance(other, Letters) else NotImplemented

    def __lt__(self, other):
        difference = self - other
        return sign(difference.top) * sign(difference.bottom) < 0

    def __repr__(self):
        top, bottom = (" + ".join(" ".join(
            [str(c) if c.denominator < 10 ** 6 else f"{float(c):.6g}"] * (c != 1 or not m)
            + [letter if power == 1 else f"{letter}^{power}" for letter, power in m])
            for m, c in p.items()) or "0" for p in (self.top, self.bottom))
        return top if bottom == "1" else f"({top})/({bottom})"


class Logs(Sums):
    """r + c_1 ln q_1 + c_2 ln q_2 + …, with rational c.

    Two are equal if r and the product of q^c are, but for numbers: ln 2π is a rounded one.
    """

    def __init__(self, r, *logs):
        self.r, self.logs = Letters.of(r), []
        for c, q in logs:
            same = [k for k, (_, other) in enumerate(self.logs) if other == q]
            c += sum(self.logs.pop(k)[0] for k in same)
            self.logs += [(c, q)] * bool(c)

    def __add__(self, other):
        other = other if isinstance(other, Logs) else Logs(other)
        return Logs(self.r + other.r, *self.logs, *other.logs)

    def __mul__(self, c):
        return Logs(self.r * c, *((k * Fraction(c), q) for k, q in self.logs))

    def __truediv__(self, c):
        return self * (1 / Fraction(c))

    def number(self):
        """Its value, or None if that is not the same in all schedules and for all numbers."""
        whole = math.lcm(*(c.denominator for c, _ in self.logs))
        product = math.prod((q ** int(c * whole) for c, q in self.logs), start=Letters.of(1))
        r, q = self.r.number(), product.number()
        return None if r is None or q is None else (
            float(r) + (math.log(q.numerator) - math.log(q.denominator)) / whole)

    def __eq__(self, other):
        number = (self - other).number()
        return number is not None and abs(number) < ROUNDING

    def __repr__(self):
        number = self.number()
        return (" + ".join([f"{self.r}", *(f"{c} ln({q})" for c, q in self.logs)])
                if number is None else f"{number:.6g}")


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
    small = [abs(x) if name.startswith(POSITIVE) else x for name, x in zip(free, NUMBERS)]
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
