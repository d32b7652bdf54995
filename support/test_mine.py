"""The marks: each function that you have written, tried alone, with ours in all other places.

Right: every proof that names it passes with it.
"""
import ast
import functools
import importlib.util
import inspect
import itertools
import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "ours"), str(HERE)]

import test_math  # noqa: E402  (ours, and with it our ddpm, posterior, unet and sample)
from support import test_network, test_samplers  # noqa: E402
from support.exercises import BLANK, FILES, tagged  # noqa: E402

PROOFS = {key: test for module in (test_math, test_network, test_samplers)
          for key, test in vars(module).items() if key.startswith("test_")}


def written():
    """The functions that are no longer blank, as file and name."""
    for file in FILES:
        source = (HERE / file).read_text(encoding="utf-8")
        for name, node in tagged(source):
            if BLANK not in ast.get_source_segment(source, node):
                yield pytest.param(file, name, id=f"{file}: {name}")


def proofs(name):
    """Each proof that names the function, with each set of its parameters."""
    first = name.split(".")[0]
    word = re.compile(rf"\b{first}\b|small_{first.lower()}\b")
    for test in PROOFS.values():
        sets = [mark.args for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        names = [words.split(", ") for words, *_ in sets]
        needed = {*inspect.signature(test).parameters}
        source = inspect.getsource(getattr(test, "claim", test))
        if word.search(source) and needed == {*sum(names, [])}:
            for values in itertools.product(*(values for _, values, *_ in sets)):
                given = (zip(n, v if len(n) > 1 else [v]) for n, v in zip(names, values))
                yield functools.partial(test, **dict(itertools.chain(*given)))


@pytest.mark.parametrize("file, name", list(written()))
def test_mine(file, name):
    spec = importlib.util.spec_from_file_location("mine", HERE / file)
    mine, ours = importlib.util.module_from_spec(spec), sys.modules[file.removesuffix(".py")]
    spec.loader.exec_module(mine)
    target, source = (inspect.unwrap(functools.reduce(getattr, name.split("."), module))
                      for module in (ours, mine))
    for key, value in vars(mine).items():
        vars(ours).setdefault(key, value)                     # what it imports or defines besides
    kept = target.__code__
    target.__code__ = source.__code__
    try:
        for proof in proofs(name):
            proof()
    finally:
        target.__code__ = kept
