"""Write it yourself: what is blank, in what order, and whether the marks are fair."""
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import exercises
from support.exercises import BLANK, FILES, ROOT, SESSIONS, functions, sessions

ORDER = sum(sessions(ROOT), [])
OTHER = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
ALL = "ALL" in os.environ
WAYS = [lambda k: False, lambda k: True] if ALL else [lambda k: k % 6 != 4]


def ours(file, name):
    """What we have in the place of a blank, each statement a tree."""
    node = functions((ROOT / file).read_text("utf-8"))[name][1]
    return node.body[1:] if ast.get_docstring(node) else node.body


def broken(body):
    """The same with one small mistake: its last sum, product, arguments or number is another."""
    *_, last = (part for line in body for part in ast.walk(line) if (
        isinstance(part, ast.BinOp) and type(part.op) in OTHER
        or isinstance(part, ast.Call) and len(part.args) > 1
        or isinstance(part, ast.Constant) and type(part.value) in (int, float)))
    if isinstance(last, ast.BinOp):
        last.op = OTHER[type(last.op)]()
    elif isinstance(last, ast.Call):
        last.args.reverse()
    else:
        last.value += 2
    return body


def fill(folder, file, name, body):
    """Write a body, as text or as trees, in the place of a blank."""
    path = Path(folder, file)
    lines, blank = path.read_text("utf-8").split("\n"), functions(path.read_text("utf-8"))[name][1]
    body = body if isinstance(body, str) else "\n".join(map(ast.unparse, body))
    lines[blank.end_lineno - 1] = re.sub("(?m)^", " " * blank.body[-1].col_offset, body)
    path.write_text("\n".join(lines), "utf-8")


def python(*argv, folder="mine"):
    return subprocess.run([sys.executable, *argv], cwd=folder, capture_output=True, text=True)


def test_the_exercises_are_ours_without_the_equations(call):
    """Exercises: every tagged function is blank, its docstring and all the rest are kept; START.md
    names each once; what a reader has written is never overwritten, nor copied as ours.
    """
    status, text, _ = call(exercises, "mine")
    assert status == 0 and text.startswith(f"{len(ORDER)} functions to write") and len(ORDER) > 40
    start = Path("mine/START.md").read_text("utf-8")
    assert re.findall("^- `(.*)`: (.*)$", start, re.M) == [(name, tag) for _, name, tag in ORDER]
    call(exercises, "blank")
    for file, name, _ in ORDER:
        fill("mine", file, name, ours(file, name))
    status, _, errors = call(exercises, "mine")
    assert status == 2 and "is there already" in errors
    python("-X", "warn_default_encoding", "-W", "error::EncodingWarning", "-m",
           "support.exercises", "again")
    for file in FILES:
        before, blank, written = texts = [
            Path(folder, file).read_text("utf-8") for folder in (ROOT, "blank", "mine")]
        assert ast.dump(ast.parse(before)) == ast.dump(ast.parse(written))
        assert [Path("mine", folder, file).read_text("utf-8") for folder in (
            "ours", "again/ours", "again")] == [before, before, blank]
        names = [name for place, name, _ in ORDER if place == file]
        assert [text.count(BLANK) for text in texts] == [0, len(names), 0] and len(names) > 5
        docs = {node.name: ast.get_docstring(node) for node in ast.parse(before).body
                if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert all(">>> " in docs[name.split(".")[0]] for name in names)       # an expected value
        assert {name for name, (line, _) in functions(before).items() if "Ho (" in line} <= {*names}


def test_what_is_to_be_derived_is_not_printed(call):
    """Exercises, --derive: no right-hand side in the first lines, no derivation; tags, words and
    code as they are.
    """
    call(exercises, "given"), call(exercises, "mine", "--derive")
    for file in FILES:
        given, mine = (Path(folder, file).read_text("utf-8") for folder in ("given", "mine"))
        lines = [line for line in given.splitlines() if line not in mine.splitlines()]
        assert all(line.startswith("#") or '"""' in line and " = " in line for line in lines)
        for line, _ in functions(mine).values():
            assert "  " not in line or " = " not in line or " = …" in line, line
        assert [*functions(given)] == [*functions(mine)]
    text = Path("mine/posterior.py").read_text("utf-8")
    assert "A1 = …: how much of x_t the posterior mean keeps" in text
    assert "∝" not in text and "telescope to" not in text and "ways ────" in text


def test_after_each_session_its_script_runs(call):
    """Exercises: each script needs nothing that comes later in START.md.  Two here; ALL=1, all."""
    call(exercises, "mine")
    for (*_, script), part in zip(SESSIONS if ALL else SESSIONS[:2], sessions(ROOT)):
        for file, name, _ in part:
            fill("mine", file, name, ours(file, name))
        done = python(*script.split())
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("wrong", WAYS)
def test_every_answer_is_right_and_every_mistake_is_found(call, wrong):
    """Exercises: of our own bodies each is right; with one mistake each is wrong.  Here each sixth
    is tried as it is, and the others with a mistake; with ALL=1 all of them both ways.
    """
    call(exercises, "mine")
    for k, (file, name, _) in enumerate(ORDER):
        fill("mine", file, name, broken(ours(file, name)) if wrong(k) else ours(file, name))
    done = python("-m", "pytest")
    assert re.findall(r"\[(\S+): (\S+)\] (.*?)  ", done.stdout) == [
        (file, name, "WRONG" if wrong(k) else "RIGHT")
        for file in FILES for k, (place, name, _) in enumerate(ORDER) if place == file], done.stdout


def test_a_hand_in_is_marked_by_our_proofs_and_in_words(call):
    """Exercises, --mark: whatever else is in the folder, each function written has its mark, and a
    wrong one is named, with the claim and the reader's line.
    """
    call(exercises, "mine")
    Path("mine/test_mine.py").write_text(""), Path("mine/ours/ddpm.py").unlink()
    bodies = {
        ("naive_step", "WRONG"): "x_t = np.sqr(beta)\nreturn x_t",
        ("x0_from_eps", "WRONG"): "return x_t - schedule.alpha[t] * eps",
        ("snr", "RIGHT, BUT IT LOSES DIGITS"):
            "return schedule.alpha_bar[t] / (1 - schedule.alpha_bar[t])",
        ("variance_at", "RIGHT"):
            "print('noise ' * 99)\na = schedule.alpha_bar[t]\n"
            "return a * variance_0 + schedule.one_minus_alpha_bar[t]\n" + BLANK,
        **({("l_simple", "WRONG"): "while True:\n    pass"} if ALL else {})}
    for (name, _), body in bodies.items():
        fill("mine", "ddpm.py", name, body)
    text = Path("mine/ddpm.py").read_text("utf-8").replace("def cosine", "def cosinus")
    text = re.sub('(?s)    """Var x_t.*?"""\n', "", text)                # a docstring is deleted
    Path("mine/ddpm.py").write_text(text, "utf-8")
    fill("mine", "sample.py", "times", "return np.arange(")
    done = python("-m", "support.exercises", "--mark", Path("mine").resolve(), folder=ROOT)
    marks = dict(re.findall(r"\[(\S+(?:: \S+)?)\] ([A-Z ,]+?)  ", done.stdout))
    assert done.returncode == 1 and marks == {"ddpm.py: cosine": "WRONG", "sample.py": "WRONG"} | {
        f"ddpm.py: {name}": mark for name, mark in bodies}, done.stdout
    for said in ("ddpm.py has no `def cosine` any more", "naive_step: V1: ", ": x_t = np.sqr(beta)",
                 "has no attribute 'sqr'", "x0_from_eps: Ho (9, 15), N5: ", ", the claim says ",
                 ": return x_t - schedule.alpha[t] * eps", 'File "sample.py", line ',
                 f"2 of {len(ORDER)} right; next: schedule_of, Ho (4), N2"):
        assert said in done.stdout, (said, done.stdout)
    assert "noise noise" not in done.stdout
