"""The marks: each function that you have written, tried alone, with ours in all other places.

Right: every proof that uses it passes.  Exact claims come first, and those of its own equation
first of all; the first that fails ends the mark.
"""
import ast
import dis
import functools
import importlib.util
import inspect
import itertools
import os
import re
import signal
import sys
import traceback
from operator import attrgetter
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import pytest
from hypothesis import Phase, settings

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "ours"), str(HERE)]
os.environ["CUDA_VISIBLE_DEVICES"] = ""                   # the same marks on every machine
settings.register_profile("marks", settings.get_profile("default"), max_examples=25,
                          report_multiple_bugs=False, phases=[Phase.explicit, Phase.generate])
settings.load_profile("marks")

import test_math  # noqa: E402  (ours, and with it our ddpm, posterior, unet and sample)
from support import test_network, test_rounding, test_samplers  # noqa: E402
from support.exercises import BLANK, FILES, functions, sessions  # noqa: E402

SECONDS = 20                                              # for one mark, which needs a few
TESTS = [test for module in (test_math, test_network, test_samplers, test_rounding)
         for name, test in vars(module).items()
         if name.startswith("test_") and "costs" not in name]       # its cost is in no equation
PROJECT = {"support", *(path.stem for path in (HERE / "ours").glob("*.py"))}
ORDER = sum(sessions(HERE / "ours"), [])
MARKS = {}                               # of file and name: right, lost, slow or wrong; a message


# ── What is written ───────────────────────────────────────────────────────────────────────────────

def written():
    """File and name of each exercise that is no longer blank, and what keeps it from being tried:
    it is gone, or its file, then named once, is no Python.
    """
    for file in FILES:
        try:
            theirs = functions((HERE / file).read_text(encoding="utf-8"), file)
        except (OSError, SyntaxError, ValueError) as error:
            yield file, "", (f"no function of {file} can be marked:\n"
                             + "".join(traceback.format_exception_only(error)))
            continue
        for name in [name for place, name, _ in ORDER if place == file]:
            code = [ast.unparse(line) for line in (theirs[name][1].body if name in theirs else [])
                    if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
            if code != [ast.unparse(ast.parse(BLANK))]:
                yield file, name, "" if name in theirs else f"{file} has no `def {name}` any more"


WRITTEN = list(written())


# ── The proofs of a function ──────────────────────────────────────────────────────────────────────

def undecorated(function):
    function = getattr(function, "claim", None) or inspect.unwrap(function)
    return getattr(getattr(function, "hypothesis", None), "inner_test", function)


def ours(file, name):
    return undecorated(attrgetter(name)(sys.modules[file.removesuffix(".py")]))


def words(text):
    return {*re.findall(r"\w+", text)}


EXERCISES = {ours(file, name): words(tag) for file, name, tag in ORDER}


def named(function):
    """The project's functions that the code of one names; for a class, all of its own."""
    codes, value = [function.__code__], None
    for code in codes:                                    # grows by the functions inside it
        codes += [part for part in code.co_consts if isinstance(part, CodeType)]
        for step in dis.get_instructions(code):
            if step.opname == "LOAD_GLOBAL":
                value = function.__globals__.get(step.argval)
            else:
                value = isinstance(value, ModuleType) and getattr(value, str(step.argval), None)
            for part in vars(value).values() if isinstance(value, type) else [value]:
                if isinstance(part, FunctionType) and part.__module__.split(".")[0] in PROJECT:
                    yield undecorated(part)


@functools.cache
def reached(proof, how):
    """What a proof names and what that names in turn, through the helpers of tests and the methods
    of a class (0), through all that is no exercise (1), or through all (2).
    """
    through = (lambda f: "test" in f.__module__ or "." in f.__qualname__,
               lambda f: f not in EXERCISES, lambda f: True)[how]
    found = [proof]
    for function in found:                                # grows
        if function is proof or through(function):
            found += [part for part in dict.fromkeys(named(function)) if part not in found]
    return found


@functools.cache
def cases():
    """Each test with each set of its parameters, and the functions whose code that is."""
    found = []
    for test in TESTS:
        marks = getattr(test, "pytestmark", [])
        sets = [mark.args for mark in marks if mark.name == "parametrize"]
        if any(mark.name == "skipif" and mark.args[0] for mark in marks):
            continue
        for values in itertools.product(*(values for _, values, *_ in sets)):
            given = {}
            for (names, *_), value in zip(sets, values):
                given |= zip(names.split(", "), value if "," in names else [value], strict=True)
            if {*given} == {*inspect.signature(test).parameters}:             # no fixtures
                code = [undecorated(test), *filter(inspect.isfunction, given.values())]
                found.append((test, given, code))
    return found


def proofs(target):
    """The cases that use the function, the clearest first: exact claims, then the others; those of
    its own equation, then those that name it early.  An exact claim may use it through others.
    """
    for how in (0, 1):
        found = []
        for test, given, code in cases():
            exact = hasattr(test, "claim")
            near, far = ([f for part in code for f in reached(part, k)] for k in (how, 2))
            if target in near or exact and target in far:
                tags = EXERCISES[target] & words(inspect.getdoc(test).split(":")[0])
                found.append(((not exact, -len(tags), far.index(target)), test, given))
        if len({test for _, test, _ in found}) > 1:
            break
    return [case[1:] for case in sorted(found, key=lambda case: case[0])]


# ── A mark ────────────────────────────────────────────────────────────────────────────────────────

def call_mine(*values, **names):
    return mine_alone(*values, **names)                   # noqa: F821  (put_alone defines it)


def put_alone(file, name, patch):
    """Put a reader's function in the place of ours; where it calls another, that is ours."""
    spec = importlib.util.spec_from_file_location(f"mine_{file[:-3]}", HERE / file)
    mine, target = importlib.util.module_from_spec(spec), ours(file, name)
    spec.loader.exec_module(mine)
    patch.setitem(target.__globals__, "mine_alone", attrgetter(name)(mine))
    for key, value in target.__globals__.items():
        if getattr(value, "__module__", "") == target.__module__:
            setattr(mine, key, value)
    patch.setattr(target, "__signature__", inspect.signature(target), raising=False)
    for part in ("__code__", "__defaults__", "__kwdefaults__"):
        patch.setattr(target, part, getattr(call_mine, part))


def own_line(file, name, error):
    """Where in a reader's files an error arose, or else the last line that returns something."""
    while error:
        for frame in traceback.extract_tb(error.__traceback__)[::-1]:
            if Path(frame.filename) in [HERE / file for file in FILES]:
                return f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"
        error = error.__cause__ or error.__context__
    text = (HERE / file).read_text(encoding="utf-8")
    node = functions(text)[name][1]
    line = max([part.lineno for part in ast.walk(node)
                if isinstance(part, (ast.Return, ast.Yield))], default=node.lineno)
    return f"{file}:{line}: {text.splitlines()[line - 1].strip()}"


def message(file, name, proof, error):
    """The function and the claim, what was found, and the reader's own line."""
    claim = " ".join((inspect.getdoc(proof) or f"{file} itself").split("\n\n")[0].split())
    text = str(error).strip().split("\n")[0].removeprefix(claim.split(":")[0]).strip()
    sides = re.fullmatch("assert (.+) == (.+)", text)
    off = re.search(r"(?s)Mismatched elements: (\d+) / (\d+).*?Max absolute difference[^:]*: (\S+)",
                    str(error))
    if off:
        text = "{} of {} numbers are off, by up to {}".format(*off.groups())
    elif sides and all(" and " not in side for side in sides.groups()):
        text = "found {}, the claim says {}".format(*sides.groups())
    elif text.startswith("assert "):
        text = "that does not hold"
    if not isinstance(error, (AssertionError, pytest.fail.Exception, Endless)):
        text = f"{type(error).__name__}: {text}"
    return f"{name}: {claim}\n    {text}\n    {own_line(file, name, error)}"


class Endless(BaseException):
    """No Exception, which Hypothesis would want to see again."""


def alarm(seconds):
    """Endless, after so many seconds of work: a busy machine makes no function slow."""
    def stop(*_):
        raise Endless(f"no end after {seconds} seconds")
    if hasattr(signal, "setitimer"):                      # Windows has none
        signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, seconds)


def is_rounding(proof, error, exact):
    """Does it lose digits, and no more?  What is exact, on letters, can only lose digits."""
    return isinstance(error, AssertionError) and ("loses digits" in str(error) or (
        exact and hasattr(proof, "hypothesis")
        and re.search("digits agree|Mismatched elements", str(error))))


def tried(file, name):
    """The mark of a function, and a message unless it is simply right."""
    found, proof, passed = proofs(ours(file, name)), None, False
    mark, text = "right", ""
    try:
        with pytest.MonkeyPatch.context() as patch:
            put_alone(file, name, patch)
            for proof, given in found:
                try:
                    proof(**given)
                except pytest.skip.Exception:
                    pass
                except AssertionError as error:
                    if not is_rounding(proof, error, hasattr(found[0][0], "claim")):
                        raise
                    mark, text = "lost", text or message(file, name, proof, error)
                passed = True
    except KeyboardInterrupt:
        raise
    except BaseException as error:                        # sys.exit() too, and Endless
        mark = "slow" if passed and isinstance(error, Endless) else "wrong"
        text = message(file, name, proof, error)
    return mark, text


@pytest.mark.parametrize("file, name, unfit", WRITTEN,
                         ids=[f"{file}: {name}".strip(": ") for file, name, _ in WRITTEN])
def test_mine(file, name, unfit, record_property):
    alarm(SECONDS)
    mark, text = MARKS[file, name] = ("wrong", unfit) if unfit else tried(file, name)
    alarm(0)
    record_property("mark", mark)
    if mark == "wrong":
        pytest.fail(text, pytrace=False)


def pytest_report_teststatus(report):
    mark = dict(report.user_properties).get("mark") if report.when == "call" else None
    return {"right": ("passed", ".", "RIGHT"), "wrong": ("failed", "F", "WRONG"),
            "lost": ("right, but losing digits", "d", "RIGHT, BUT IT LOSES DIGITS"),
            "slow": ("right, but slow", "s", "RIGHT, BUT SLOW")}.get(mark)


def pytest_unconfigure():
    right = {key: text for key, (mark, text) in MARKS.items() if mark != "wrong"}
    print(*[""] + [text for text in right.values() if text], sep="\n")
    if len(MARKS) == len(WRITTEN):                        # not if only some were asked for
        left = [f"; next: {name}, {tag}" for file, name, tag in ORDER if (file, name) not in right]
        print(f"{len(right)} of {len(ORDER)} right{''.join(left[:1])}")
