"""Write it yourself: our formulas with their bodies taken out, and the proofs run on yours.

`python -m support.exercises mine` writes ddpm.py, posterior.py, unet.py and sample.py into mine/,
the body of each function that has a tag blank, its docstring kept.  `pytest --mine mine` proves
the claims on what you have filled in; a file that is not there is ours.  Write √ as `sqrt` and ½
as `/ 2`: the proofs are in exact fractions, and a float is none.
"""
import ast
import importlib.util
import re
import sys
import traceback
from pathlib import Path

import pytest
from hypothesis import Phase, settings

from support.console import Parser, one_line_errors
from support.images import atomic_write

ROOT, FILES = Path(__file__).resolve().parents[1], ("ddpm", "posterior", "unet", "sample")
TAG = re.compile(r"\(?(Ho \(|Ho \w+ [A-Z\d.]+|[NV]\d+|Algorithm \d|DDIM|DPM|CFG|KL\b|score|"
                 r"constant|completion|linear|cosine)")
BLANK = 'raise NotImplementedError("yours to write")'
FOUND = {}        # by claim, of each test: "proved", "blank: " and the function, or the test's name


def blanked(source: str) -> str:
    """The source without the bodies of tagged functions, and of `forward` in tagged classes."""
    lines = source.splitlines()

    def tagged(node):
        first = (ast.get_docstring(node) or "").split("\n")[0]
        return TAG.match(re.split(r"\s{2,}", first)[-1]) if "  " in first else None
    bodies = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and tagged(node):
            bodies.append(node.body[1:])
        elif isinstance(node, ast.ClassDef) and tagged(node):
            bodies += [part.body for part in node.body if getattr(part, "name", "") == "forward"]
    for body in reversed(bodies):
        space = " " * body[0].col_offset
        lines[body[0].lineno - 1:body[-1].end_lineno] = [space + BLANK]
    return "\n".join(lines) + "\n"


def blanks(source: str) -> list[str]:
    """The functions, and classes, that still are blank."""
    return [node.name for node in ast.parse(source).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and BLANK in ast.get_source_segment(source, node)]


# ── pytest --mine FOLDER ──────────────────────────────────────────────────────────────────────────

def pytest_addoption(parser):
    parser.addoption("--mine", metavar="FOLDER", type=Path, help="prove the claims on the ddpm.py, "
                     "posterior.py, unet.py or sample.py in FOLDER, in the place of ours")


def pytest_configure(config):
    """Put the reader's files in the place of ours, before any test imports them."""
    folder = config.getoption("--mine")
    if folder is None:
        return
    if not any((folder / f"{name}.py").exists() for name in FILES):
        raise pytest.UsageError(f"{folder} holds none of {', '.join(FILES)}.py: "
                                f"python -m support.exercises {folder} begins them")
    config.option.ignore = [config.rootpath / "support" / f"test_{name}.py"    # they need all
                            for name in ("scripts", "wiring")]                 # of ours
    for name in FILES:
        if (folder / f"{name}.py").exists():
            spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
            sys.modules[name] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(sys.modules[name])
            except SyntaxError as error:
                raise pytest.UsageError(f"{error.filename}, line {error.lineno}: {error.msg}")
    # the first example that fails is enough: a blank has no simpler one
    settings.register_profile("mine", settings.get_profile("default"),
                              phases=(Phase.explicit, Phase.generate), report_multiple_bugs=False)
    settings.load_profile("mine")


def claims(docstring: str) -> list[str]:
    """The claims that a test is titled by: 'Ho (6, 7), V8: …' → Ho (6), Ho (7)."""
    title = docstring.split(":")[0].replace("Ho Algorithm", "Algorithm")
    paper = [f"Ho ({n})" for group in re.findall(r"Ho \(([\d, ]+)\)", title)
             for n in group.split(", ")]
    tag = TAG.match(title)
    return paper or [tag[1] if tag else "what is around them"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Remember what each test says of its claims: proved, wrong, or the function that is blank, at
    which it is skipped.
    """
    if item.config.getoption("--mine") is None:
        return (yield)
    kind = item.name
    try:
        yield
        kind = "proved"
    except NotImplementedError as blank:
        *_, (frame, _) = traceback.walk_tb(blank.__traceback__)
        kind = f"blank: {frame.f_code.co_name}"
        raise pytest.skip.Exception(kind) from None
    finally:
        for claim in claims(item.function.__doc__):
            FOUND.setdefault(claim, []).append(kind)


def order(claim: str) -> tuple:
    """The paper's equations, its algorithms and appendices, and then the rest."""
    number = re.match(r"Ho \((\d+)\)", claim)
    return (0, int(number[1])) if number else (1 + (claim[:2] not in ("Al", "Ho")), claim)


def pytest_terminal_summary(terminalreporter, config):
    """The claims in the paper's order: proved, not proved, or waiting for what is still blank."""
    folder = config.getoption("--mine")
    if folder is None:
        return
    write = terminalreporter.write_line
    terminalreporter.section(f"the claims, on the files in {folder}")
    for claim in sorted(FOUND, key=order):
        kinds = FOUND[claim]
        wrong = sorted({kind for kind in kinds if kind != "proved" and kind[:5] != "blank"})
        waits = sorted({kind[7:] for kind in kinds if kind[:5] == "blank"})
        says = (f"NOT PROVED by {', '.join(wrong)}" if wrong
                else f"waits for {', '.join(waits)}" if waits else "proved")
        write(f"{claim:20} {kinds.count('proved'):3} of {len(kinds):3}  {says}")
    proved = sum(set(kinds) == {"proved"} for kinds in FOUND.values())
    write(f"{proved} of {len(FOUND)} claims proved")
    for name in FILES:
        path = folder / f"{name}.py"
        left = blanks(path.read_text(encoding="utf-8")) if path.exists() else []
        if left:
            write(f"still blank in {path}: {', '.join(left)}")


def main():
    parser = Parser(description="Write our files with the equations taken out, for you to fill in.")
    parser.add_argument("folder", type=Path, help="where; pytest --mine FOLDER then proves them")
    folder = parser.parse_args().folder
    with one_line_errors():
        for name in FILES:
            if (folder / f"{name}.py").exists():
                raise ValueError(f"{folder / name}.py is there already: name another folder")
        for name in FILES:
            source = blanked((ROOT / f"{name}.py").read_text(encoding="utf-8"))
            with atomic_write(folder / f"{name}.py") as file:
                file.write(source.encode())
            print(f"{folder / name}.py: {len(blanks(source))} to fill in")
    print(f"next: pytest --mine {folder}")


if __name__ == "__main__":
    main()
