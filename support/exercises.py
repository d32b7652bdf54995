"""Write it yourself: a copy of this repository with the equations left blank.

`python -m support.exercises mine` makes the folder mine/, in which the body of every function that
has a tag is yours to write; mine/START.md says in what order.  `cd mine && pytest` marks each
function that you have written, by itself: all others are ours while it is tried.
"""
import ast
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

from support.console import run_script

ROOT = Path(__file__).resolve().parents[1]
BLANK = 'raise NotImplementedError("yours to write")'
GIVEN = {"completed", "generate"}        # their order of draws is no equation
SESSIONS = (                             # of a file: from this function on, until another session's
    ("How an image becomes noise", "ddpm.py", "schedule_of", "ddpm.py"),
    ("The way back", "posterior.py", "beta_tilde", "posterior.py"),
    ("The network", "unet.py", "time_embedding", "unet.py"),
    ("Sampling", "sample.py", "algorithm_2", "sample.py --sampler dpm --steps 20"),
    ("The bound and the score", "posterior.py", "kl", "evaluate.py"))
FILES = ("ddpm.py", "posterior.py", "unet.py", "sample.py")
START = f"""# Write it yourself

The body of each function below is yours to write, in the place of `{BLANK}`.
Its docstring has the equation and one expected number.  `pytest` here marks what you have written,
each function by itself, with ours in all other places: begin anywhere, and a mistake in one is no
mistake in another.  The proofs use exact numbers and letters: write a root as `sqrt(x)`,
`np.sqrt(x)` or `x ** 0.5`.
"""


def functions(source: str, file: str = "") -> dict[str, tuple[str, ast.FunctionDef]]:
    """The functions of a file and the `forward` of its classes, by name, each with the first line
    of its docstring, or of its class's.
    """
    found = {}
    for node in ast.parse(source, file).body:
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(part, ast.FunctionDef) and (part is node or part.name == "forward"):
                name = node.name if part is node else f"{node.name}.forward"
                found[name] = (ast.get_docstring(node) or "").split("\n")[0], part
    return found


def exercises(source: str) -> dict[str, tuple[str, ast.FunctionDef]]:
    """Those whose first line is an equation and, far to the right, its tag; with this tag."""
    return {name: (line.split("  ")[-1].strip(), node)
            for name, (line, node) in functions(source).items()
            if "  " in line and name not in GIVEN}


def sessions(folder: Path) -> list[list[tuple[str, str, str]]]:
    """The file, name and tag of each exercise, in the order in which to write them."""
    parts, firsts = {}, [session[1:3] for session in SESSIONS]
    for file in FILES:
        for name, (tag, _) in exercises((folder / file).read_text(encoding="utf-8")).items():
            if (file, name) in firsts:
                part = parts[file, name] = []
            part.append((file, name, tag))
    return [parts[first] for first in firsts]


def blanked(source: str, derive: bool = False) -> str:
    """The source without the bodies of the exercises.  derive: also without what is to the right of
    the first = in each docstring, and without the derivations.
    """
    lines = source.splitlines()
    for _, node in reversed(exercises(source).values()):
        body = node.body[1:] if ast.get_docstring(node) else node.body
        lines[body[0].lineno - 1:body[-1].end_lineno] = [" " * body[0].col_offset + BLANK]
    text = "\n".join(lines) + "\n"
    if derive:
        text = re.sub(r'(?m)^( +""".*?=) .*?(?=: |, for |  )', r"\1 …", text)
        text = re.sub(r"(?m)^(# [^─].*\n|#\n)*#     .*\n(#.*\n)*", "", text)
    return text


def make(folder: Path, derive: bool = False):
    """The folder: the blanks, the answers in ours/, the marks."""
    answers = ROOT / "ours" if (ROOT / "ours").exists() else ROOT   # here, if this is such a folder
    for part in ("assets", "support"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for place in (folder, folder / "ours"):
        place.mkdir(exist_ok=True)
        for path in [*answers.glob("*.py"), ROOT / "requirements.txt"]:
            shutil.copy(path, place)
    for file in FILES:
        source = (answers / file).read_text(encoding="utf-8")
        (folder / file).write_text(blanked(source, derive), encoding="utf-8")
    shutil.copy(ROOT / "support/test_mine.py", folder)
    with open(folder / "conftest.py", "a") as file:
        file.write('\npytest_plugins = ["test_mine"]\n')
    (folder / "pytest.ini").write_text(
        "[pytest]\ntestpaths = test_mine.py\nfilterwarnings = ignore\n"
        "addopts = -v -rN --tb=short --show-capture=no --no-header\n")
    start = START
    for k, ((title, file, _, script), part) in enumerate(zip(SESSIONS, sessions(answers)), 1):
        start += f"\n## {k}. {title}: `{file}`\n\n" + "".join(
            f"- `{name}`: {tag}\n" for _, name, tag in part) + f"\nThen run `python {script}`.\n"
    (folder / "START.md").write_text(start, encoding="utf-8")


def mark(hand_in: Path) -> int:
    """Mark the four files of a hand-in, and nothing else of it, by our answers and proofs."""
    with tempfile.TemporaryDirectory() as place:
        make(Path(place))
        for file in FILES:
            shutil.copy(hand_in / file, place)
        return subprocess.run([sys.executable, "-m", "pytest"], cwd=place).returncode


def main():
    parser = ArgumentParser("python -m support.exercises", description=__doc__.split("\n\n")[1])
    parser.add_argument("folder", type=Path, help="a folder that is not there yet")
    parser.add_argument("--derive", action="store_true",
                        help="leave out the formulas and their derivations too")
    parser.add_argument("--mark", action="store_true",
                        help="mark a folder that is handed in, by the proofs and answers here")
    options = parser.parse_args()
    folder = options.folder
    if options.mark:
        raise SystemExit(mark(folder))
    if folder.exists():
        raise ValueError(f"{folder} is there already: name another folder")
    make(folder, options.derive)
    print(f"{sum(map(len, sessions(folder)))} functions to write, in the order of "
          f"{folder / 'START.md'}\nnext: write one, then cd {folder} && pytest")


if __name__ == "__main__":
    run_script(main)
