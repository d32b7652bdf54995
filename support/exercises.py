"""Write it yourself: a copy of this repository with the equations left blank.

`python -m support.exercises mine` makes the folder mine/, in which the body of every function that
has a tag is yours to write, in ddpm.py, posterior.py, unet.py and sample.py.  `cd mine && pytest`
marks each function that you have filled in, by itself: all others are ours while it is tried.
"""
import ast
import shutil
from argparse import ArgumentParser
from pathlib import Path

from support.console import run_script

ROOT = Path(__file__).resolve().parents[1]
FILES = ("ddpm.py", "posterior.py", "unet.py", "sample.py")
BLANK = 'raise NotImplementedError("yours to write")'


def tagged(source: str) -> list[tuple[str, ast.FunctionDef]]:
    """The functions whose docstring begins with an equation and, far to the right, its tag, and the
    `forward` of such classes, each with its name, in the order of the file.
    """
    found = []
    for node in ast.parse(source).body:
        first = (isinstance(node, (ast.FunctionDef, ast.ClassDef))
                 and ast.get_docstring(node) or "").split("\n")[0]
        if "  " not in first:
            continue
        if isinstance(node, ast.FunctionDef):
            found.append((node.name, node))
        else:
            found += [(f"{node.name}.{part.name}", part) for part in node.body
                      if getattr(part, "name", "") == "forward"]
    return found


def blanked(source: str) -> str:
    """The source without the bodies of tagged functions; their docstrings stay."""
    lines = source.splitlines()
    for _, node in reversed(tagged(source)):
        body = node.body[1:] if ast.get_docstring(node) else node.body
        lines[body[0].lineno - 1:body[-1].end_lineno] = [" " * body[0].col_offset + BLANK]
    return "\n".join(lines) + "\n"


def main():
    parser = ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("folder", type=Path, help="a folder that is not there yet")
    folder = parser.parse_args().folder
    if folder.exists():
        raise ValueError(f"{folder} is there already: name another folder")
    for part in ("assets", "support"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "ours").mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt"]:
        for place in (folder, folder / "ours"):
            shutil.copy(path, place)
    shutil.copy(ROOT / "support/test_mine.py", folder / "test_mine.py")
    (folder / "pytest.ini").write_text("[pytest]\ntestpaths = test_mine.py\naddopts = -v --tb=line"
                                       "\nfilterwarnings = ignore\n")
    for name in FILES:
        source = blanked((ROOT / name).read_text(encoding="utf-8"))
        (folder / name).write_text(source, encoding="utf-8")
        print(f"{folder / name}: {source.count(BLANK)} functions to write")
    print(f"next: write one, then cd {folder} && pytest")


if __name__ == "__main__":
    run_script(main)
