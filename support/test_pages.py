"""README.md and READING.md against the code; and the exercises."""
import ast
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ddpm
import evaluate
import posterior
import sample
import train
from support import exercises
from support.test_data import decoded

ROOT = Path(__file__).resolve().parents[1]
README, READING = ((ROOT / f"{name}.md").read_text(encoding="utf-8")
                   for name in ("README", "READING"))
QUICK_START = [part for block in re.findall(r"```sh\n(.*?)\n```", README) for part in
               block.split(" && ")]
PATH = re.search(r"## A path of 45 minutes\n(.*?)\n## ", READING, re.S)[1]
DEMONSTRATIONS = {"ddpm.py": ddpm, "posterior.py": posterior, "evaluate.py": evaluate}


@pytest.mark.parametrize("page", [README, READING], ids=["README", "READING"])
def test_the_pages_name_only_what_exists(page):
    """Every link leads to the line of its function or proof, to a file or to a heading; every file
    and flag is there.
    """
    links = re.findall(r'\[([^]]+)\]\((?!http)([\w./-]*)#?([\w-]*)(?: "(\w+)")?\)', page)
    for words, file, place, title in links:
        assert not file or (ROOT / file).exists(), file
        text = (ROOT / file).read_text(encoding="utf-8") if file[-3:] in (".py", ".md") else page
        if re.fullmatch(r"L\d+", place):
            name = title or words.strip("`")
            line = text.splitlines()[int(place[1:]) - 1]
            assert re.match(rf"(def|class) {name}\b", line), (file, name)
        elif place:
            headings = re.findall("^#+ (.*)", text, re.M)
            assert place in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
    proofs = [title for words, *_, title in links if words == "proof"]
    assert all(title.startswith("test_") for title in proofs)
    assert (len(links), len(proofs)) > ((100, 50) if page is READING else (15, 0))
    for name in map("".join, re.findall(
            r"`((?:\w+/)?[\w-]+\.(?:py|npz|txt))`|\]\((assets/[\w./-]+)\)", page)):
        assert (ROOT / name).exists() or "/" not in name and name[-4:] == ".npz", name
    known = {option for parser in (train.arguments(), sample.arguments())
             for action in parser._actions for option in action.option_strings}
    for flag in re.findall(r"(?<![\w-])(--[a-z][\w-]*)", page):
        assert flag in known | {"--hypothesis-profile", "--nproc_per_node", "--index-url"}, flag


def test_every_equation_is_in_the_reading_guide():
    """Ho (1) to (16), N1 to N8 and V1 to V14 stand in its table; in the next, the articles' words
    before each formula.
    """
    table, articles = (re.search(rf"## {title}\n.*?((?:^\|.*\n)+)", READING, re.M | re.S)[1]
                       for title in ("Every equation", "The articles, formula by formula"))
    tags = " ".join(re.findall(r"\*\*(.*?)\*\*", table))
    numbers = ", ".join(re.findall(r"Ho \(([\d, ]+)\)", tags)).split(", ")
    assert {int(number) for number in numbers} == set(range(1, 17))
    for letter, last in (("N", 8), ("V", 14)):
        every = {f"{letter}{k}" for k in range(1, last + 1)}
        assert set(re.findall(rf"{letter}\d+", tags)) == every
        assert set(re.findall(rf"^\| ({letter}\d+) \| \"", articles, re.M)) == every


@pytest.mark.parametrize("algorithm", [train.algorithm_1, sample.algorithm_2])
def test_the_algorithms_in_the_readme_are_the_source(algorithm):
    """Algorithm 1, Algorithm 2: the code beside the paper's lines is that of the two loops."""
    table = re.search(rf"^.*\[`{algorithm.__name__}`\].*\n((?:\|.*\n)+)", README, re.M)[1]
    source = inspect.getsource(algorithm)
    body = ast.parse(source).body[0].body[1:]                                # after the docstring
    lines = source.splitlines()[body[0].lineno - 1:]
    assert re.findall("`(.*?)`", table) == [line.split("  #")[0].strip() for line in lines]


def test_the_readme_shows_what_training_prints(trained):
    """README: the last lines of `python train.py`, but for the figures."""
    out, text, _ = trained
    shown = re.search(r"&& python train\.py\n```\n\n```text\n(.*?)```", README, re.S)[1]
    shown, printed = (re.sub(r"\d+(\.\d+)?", "0", page).splitlines()
                      for page in (shown, text.replace(str(out), "out")))
    assert shown == printed[-len(shown):]


def test_every_command_is_understood():
    """Pages: every `python train.py ...` and `python sample.py ...` is one that it understands."""
    commands = re.findall(r"python ((?:train|sample)\.py[^`\n]*)", README + READING)
    assert len(commands) > 20
    for command in commands:
        script, *argv = shlex.split(command)
        if argv != ["--help"]:
            {"train.py": train, "sample.py": sample}[script].arguments().parse_args(argv)


def test_the_quick_start_and_then_the_path_can_be_followed(call, tmp_path):
    """README, and in the same folder READING's path of 45 minutes: each command runs, made short
    where it takes long, and no later one finds an earlier one's files in its way.
    """
    assert "pip install -r requirements.txt" in QUICK_START and QUICK_START[-1] == "pytest"
    commands = [*QUICK_START, *re.findall(r"`(python .*?)`", PATH)]
    for command in commands:
        script, *argv = shlex.split(command)[1:] or [""]
        if script in ("train.py", "sample.py"):
            module, short = {"train.py": (train, ["--batch", 2, "--T", 2, "--beta-T", 0.9]),
                             "sample.py": (sample, ["-n", 10])}[script]
            assert call(module, *argv, *short, "--steps", 2)[0] == 0, command
        elif script == "evaluate.py":
            assert (tmp_path / argv[argv.index("--weights") + 1]).exists()
    assert {"python ddpm.py", "python posterior.py"} < {*commands}    # run in test_commands.py
    for name in ("samples.png", "step-000002.png", "mine/step-000002.png", "T50/step-000002.png"):
        assert decoded(tmp_path / "out" / name)[0].std() > 10


# ── Write it yourself ─────────────────────────────────────────────────────────────────────────────

def test_the_exercises_are_ours_without_the_equations(call):
    """Exercises: every tagged function is blank, its docstring and all the rest are kept; what a
    reader has written is never overwritten.
    """
    status, text, _ = call(exercises, "mine")
    assert status == 0
    for name in exercises.FILES:
        ours, theirs = ((folder / name).read_text(encoding="utf-8")
                        for folder in (ROOT, Path("mine")))
        blank = [name for name, _ in exercises.tagged(ours)]
        assert theirs.count(exercises.BLANK) == len(blank) > 5
        assert f"{Path('mine', name)}: {len(blank)} functions to write" in text
        for before, after in zip(exercises.tagged(ours), exercises.tagged(theirs), strict=True):
            assert ast.unparse(before[1].args) == ast.unparse(after[1].args)
            assert ast.get_docstring(before[1]) == ast.get_docstring(after[1])
        docs = {node.name: ast.get_docstring(node) or "" for node in ast.parse(ours).body
                if hasattr(node, "name")}                        # an expected value beside each
        assert all(">>> " in docs[each.split(".")[0]] for each in blank if each != "generate")
        formulas = {node.name for node in ast.parse(ours).body if isinstance(node, ast.FunctionDef)
                    and "Ho (" in (ast.get_docstring(node) or "").split("\n")[0]}
        assert formulas <= {*blank} and exercises.BLANK not in ours
        assert (Path("mine/ours") / name).read_text(encoding="utf-8") == ours
    status, _, errors = call(exercises, "mine")
    assert status == 2 and "is there already" in errors


def test_what_a_reader_fills_in_is_marked_by_itself(call):
    """Exercises: one function right, in other words than ours, and two wrong: those two alone are
    marked wrong, and the others wait.
    """
    call(exercises, "mine")
    blank = f"    {exercises.BLANK}\n"
    for file, name, body in (
            ("ddpm.py", "q_sample", "kept = np.sqrt(schedule.alpha_bar[t])\n    return kept * x0 + "
             "schedule.one_minus_alpha_bar[t] ** 0.5 * eps"),
            ("ddpm.py", "q_marginal", "import math\n    return math.sqrt(schedule.alpha_bar[t])"
             " * x0, 1 - schedule.alpha_bar[t]"),
            ("unet.py", "time_embedding", "return torch.zeros(len(t), width)")):
        head, rest = re.split(rf"(?=def {name}\()", Path("mine", file).read_text("utf-8"))
        Path("mine", file).write_text(head + rest.replace(blank, f"    {body}\n", 1), "utf-8")
    done = subprocess.run([sys.executable, "-m", "pytest"], cwd="mine", capture_output=True,
                          text=True)
    assert done.returncode == 1
    assert re.findall(r"py: (\w+)\] (PASSED|FAILED)", done.stdout) == [
        ("q_marginal", "FAILED"), ("q_sample", "PASSED"), ("time_embedding", "FAILED")], done.stdout
    assert "write sqrt(x)" in done.stdout or "it loses digits" in done.stdout
    shutil.rmtree("mine")
