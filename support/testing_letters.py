"""Exact numbers and letters, with which a formula is run once for every schedule and all numbers.

√ᾱ_t is the letter a_t and √(1−ᾱ_t) is s_t, so s_t² = 1 − a_t².  What ddpm.py and posterior.py make
of these and of x_t, x_0, ε, … is a quotient of two polynomials, perhaps with logarithms of such.
"""
import functools
import itertools
import math
import operator
from collections import Counter
from fractions import Fraction
from numbers import Real

POSITIVE = "a_", "s_", "u_", "sigma", "v", "w"      # letters that begin so are > 0, others any

# A monomial is a tuple of (letter, power), a polynomial a dict from monomials to their numbers.


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
        number = Fraction(*(math.isqrt(max(k, 0)) for k in Fraction(c).as_integer_ratio()))
        if not more and number ** 2 == c and all(
                power % 4 == 0 or power % 2 == 0 and letter.startswith(POSITIVE)
                for letter, power in m):
            return times({tuple((letter, power // 2) for letter, power in m): 1}, {(): number})
    raise AssertionError(
        f"√({Letters(p)}) is irrational: with the right symbols every root here is of ᾱ_t, 1 − ᾱ_t "
        "or α_t (α_t is not ᾱ_t)")


class Sums:
    """Subtraction, and + and · with a number on the left, for a class that has + and ·."""

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
        if power % 1:
            raise TypeError(f"x ** {power} is no quotient of polynomials")
        return math.prod([self] * int(power), start=Letters.of(1))

    def sqrt(self):
        return Letters(root(self.top), root(self.bottom))

    def log(self):
        return Logs(0, (1, self))

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
        return number is not None and abs(number) < 1e-12

    def __repr__(self):
        number = self.number()
        return (" + ".join([f"{self.r}", *(f"{c} ln({q})" for c, q in self.logs)])
                if number is None else f"{number:.6g}")
