"""README.md, READING.md and MEASURED.md against the code; and the exercises."""
import ast
import collections
import importlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ddpm
import posterior
import sample
import train
from support import exercises
from support.config import PRESETS, Sampling
from support.data import split
from support.test_data import decoded
from test_math import Exact, exactly, near
from unet import UNet, parameters

ROOT = Path(__file__).resolve().parents[1]
PAGES = README, READING, MEASURED = [
    (ROOT / f"{name}.md").read_text(encoding="utf-8") for name in ("README", "READING", "MEASURED")]
QUICK_START = [part for block in re.findall(r"```sh\n(.*?)\n```", README) for part in
               block.split(" && ")]
PATH = re.search(r"## A path of 45 minutes\n(.*?)\n## ", READING, re.S)[1]


def rows_of(page, title):
    """The rows of the first table under a heading, each a list of its cells."""
    table = re.search(rf"^##+ {title}\n(?s:.*?)\n\| -.*\n((?:\|.*\n)+)", page, re.M)[1]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|(?= |$)", row)[1:-1]]
            for row in table.splitlines()]


# ── Links, commands, figures ──────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("page", PAGES, ids=["README", "READING", "MEASURED"])
def test_the_pages_name_only_what_exists(page):
    """Every link leads to the line of its function or proof, to a file or to a heading; every file
    and flag is there.
    """
    links = re.findall(r"\[([^]]+)\]\((?!http)([\w./-]*)#?([\w-]*)\)", page)
    for words, file, place in links:
        assert not file or (ROOT / file).exists(), file
        text = (ROOT / file).read_text(encoding="utf-8") if file[-3:] in (".py", ".md") else page
        if re.fullmatch(r"L\d+", place):                   # a proof is named in words
            name = words.strip("`") if words[0] == "`" else "test_" + re.sub(r"\W+", "_", words)
            line = text.splitlines()[int(place[1:]) - 1]
            assert re.match(rf"(def|class) {name}\b", line, re.I), (file, words)
        elif place:
            headings = re.findall("^#+ (.*)", text, re.M)
            assert place in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
    assert len(links) > {README: 15, READING: 150, MEASURED: 1}[page]
    for name in map("".join, re.findall(
            r"`((?:\w+/)?[\w-]+\.(?:py|npz|txt))`|\]\((assets/[\w./-]+)\)", page)):
        assert (ROOT / name).exists() or "/" not in name and name[-4:] == ".npz", name
    known = {option for parser in (train.arguments(), sample.arguments())
             for action in parser._actions for option in action.option_strings}
    for flag in re.findall(r"(?<![\w-])(--[a-z][\w-]*)", page):
        assert flag in known | {"--hypothesis-profile", "--nproc_per_node", "--index-url"}, flag


def test_every_command_is_understood():
    """Pages: every `python train.py ...` and `python sample.py ...` is one that it understands."""
    commands = re.findall(r"python ((?:train|sample)\.py[^`\n]*)", "".join(PAGES))
    assert len(commands) > 30
    for command in commands:
        script, *argv = shlex.split(command)
        if argv != ["--help"]:
            {"train.py": train, "sample.py": sample}[script].arguments().parse_args(argv)


def test_the_figures_of_the_pages_are_the_code_s():
    """Pages: defaults, sizes and counts; the charts of A1 and A2."""
    ours, paper, drawn = PRESETS["digits"], PRESETS["cifar10"], Sampling()
    rises_until = round((10 * paper.ema_decay - 1) / (1 - paper.ema_decay), -3)
    for page, says in (
            (README, f"takes {ours.steps:,} steps of {ours.batch} images where the paper takes "
                     f"{paper.steps:,} of {paper.batch}. It trains with Muon beside Adam "
                     fr"($\beta_2 = {ours.beta2}$)"),
            (README, f"its network has {ours.model_channels} channels, two levels with one block "
                     "each, one group for each norm, attention in the middle only, and sees "
                     f"squares of {ours.patch_size} x {ours.patch_size} pixels"),
            (README, f"a warm-up of {ours.warmup} steps instead of {paper.warmup:,}"),
            (README, f"{parameters(UNet(replace(ours, num_classes=10))):,} "
                     f"parameters in all instead of {parameters(UNet()) / 1e6:.1f} million"),
            (README, f"reaches its {paper.ema_decay} only after {rises_until:,.0f} steps"),
            (README, f"so that {len(split(50_000)[0]):,} are trained on"),
            (README, f"on {len(split(10_000)[0]):,} of the 10,000 digits"),
            (README, f"one $t$ from each of {ours.batch} equal parts"),
            (README, f"is Algorithm 2 with its {drawn.steps:,} steps, {drawn.n} digits"),
            (READING, f"{parameters(UNet()):,} parameters for CIFAR10"),
            (READING, f"from {ddpm.snr(1, ddpm.linear()):,.0f} at $t = 1$ through 1 at $t = 259$ "
                      f"to {ddpm.snr(1000, ddpm.linear()):.5f} at $t = 1000$")):
        assert says in page, says
    assert (ours.channel_mult, ours.num_res_blocks, ours.num_groups, ours.attention_resolutions
            ) == ((1, 2), 1, 1, (0,)) and abs(ddpm.snr(259, ddpm.linear()) - 1) < 0.01
    x, *lines = (ast.literal_eval(part) for part in re.findall(
        r"\[.*\]", re.search(r'"A1 \(blue\) and A2 \(red\)"\n(.*?)```', READING, re.S)[1]))
    for line, function in zip(lines, (posterior.A1, posterior.A2), strict=True):
        np.testing.assert_allclose(line, function(np.array(x), ddpm.linear()), atol=5.1e-7)


def test_the_readme_shows_what_training_prints(trained):
    """README: the last lines of `python train.py`, but for the figures."""
    out, text, _ = trained
    shown = re.search(r"&& python train\.py\n```\n\n```text\n(.*?)```", README, re.S)[1]
    shown, printed = (re.sub(r"\d+(\.\d+)?", "0", page).splitlines()
                      for page in (shown, text.replace(str(out), "out")))
    assert shown == printed[-len(shown):]


def test_the_lines_that_draw_from_python():
    """READING: what stands there for importers draws the digits it says."""
    names = {}
    exec(re.sub("^  ", "", re.search(r"```python\n(  import.*?)```", READING, re.S)[1],
                flags=re.M), names)
    assert names["images"].shape == (10, 28, 28, 1) and names["images"].dtype == np.uint8
    assert "a uint8 array (10, 28, 28, 1)" in READING and names["images"].std() > 50


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


# ── Formulas: what a page says, what a docstring says, what is computed ───────────────────────────

LATEX = [(r"\\(big|Big)\b|\\(mathrm|mathcal|text)\b|\\(?=min\b|ln\b|log\b)", ""),
         (r"\\bar\\alpha", "ᾱ"), (r"\\tilde\\beta", "β̃"), (r"\\tilde\\mu", "μ̃"),
         (r"\\hat x", "x̂"), (r"\\mathbb E", "E"), (r"\\sqrt", "√"), (r"\\mid\b", "|"),
         (r"\\[lr]?Vert", "‖"),
         (r"\\ldots", "…"), (r"\\sim", "~"), (r"\\lbrace|\\rbrace", ""), (r"\\nabla", "∇"),
         (r"\\le\b", "≤"), (r"\\tfrac", r"\\frac"), (r"-", "−"), ("²", "^2"), ("½", "1/2"),
         *((rf"\\{name}", letter) for name, letter in dict(
             alpha="α", beta="β", epsilon="ε", mu="μ", sigma="σ", theta="θ", sum="Σ",
             prod="∏").items())]
GROUP = r"(\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}|\S)"


def plain(formula):
    """A formula, in LaTeX or in plain symbols, without the spaces and brackets of either."""
    for found, symbol in LATEX:
        formula = re.sub(found, symbol, formula)
    while r"\frac" in formula:
        formula = re.sub(rf"\\frac{GROUP}{GROUP}", r"\1/\2", formula)
    return re.sub(r"[\s{}()\[\],.]|(?<=A)_", "", formula)


def tags(text):
    """{"Ho 4", "N2", …}"""
    numbers = ", ".join(re.findall(r"Ho \(([\d, ]+)\)", text)).split(", ")
    return {f"Ho {k}" for k in numbers if k} | set(re.findall(r"\b[NV]\d+\b", text))


@pytest.mark.parametrize("algorithm", [train.algorithm_1, sample.algorithm_2])
def test_the_algorithms_in_the_readme_are_the_source(algorithm):
    """Algorithm 1, Algorithm 2: the code beside the paper's lines is that of the two loops."""
    table = re.search(rf"^.*\[`{algorithm.__name__}`\].*\n((?:\|.*\n)+)", README, re.M)[1]
    source = inspect.getsource(algorithm)
    body = ast.parse(source).body[0].body[1:]                                # after the docstring
    lines = source.splitlines()[body[0].lineno - 1:]
    assert re.findall("`(.*?)`", table) == [line.split("  #")[0].strip() for line in lines]


def test_the_algorithms_in_the_readme_are_the_paper_s():
    """Algorithm 1, Algorithm 2: the paper's lines, symbol by symbol."""
    tables = re.search(r"## Algorithms 1 and 2(?s:.*?)\n## ", README)[0]
    shown = [plain(re.sub(r"[*$]", "", cell)) for cell in re.findall(
        r"^\| [1-6, ]*\| (?!Algorithm)(.*?) \| `", tables, re.M)]
    assert shown == [plain(line) for line in (
        "repeat", "x_0 ~ q(x_0)", "t ~ Uniform({1, …, T})", "ε ~ N(0, I)",
        "take a gradient descent step on", "∇_θ ‖ε − ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t)‖²",
        "until converged", "x_T ~ N(0, I)", "for t = T, …, 1 do",
        "z ~ N(0, I) if t > 1, else z = 0",
        "x_{t−1} = 1/√α_t (x_t − (1−α_t)/√(1−ᾱ_t) ε_θ(x_t, t)) + σ_t z",
        "end for, return x_0")]


def test_every_equation_is_in_the_reading_guide():
    """Ho (1) to (16), N1 to N8 and V1 to V14 stand in its table; in the next, the articles' words
    before each formula; algorithms, figures and appendices in that of the sections.
    """
    equations = tags(" ".join(row[0] for row in rows_of(READING, "Every equation")))
    assert equations == ({f"Ho {k}" for k in range(1, 17)} | {f"N{k}" for k in range(1, 9)}
                         | {f"V{k}" for k in range(1, 15)})
    articles = [row[0] for row in rows_of(READING, "The articles, formula by formula")]
    assert articles == [f"N{k}" for k in range(1, 9)] + [f"V{k}" for k in range(1, 15)]
    sections = " ".join(row[0] for row in rows_of(READING, "The paper, section by section"))
    sections = re.sub(r"(\d+)\)? (?:and|to) \(?(\d+)", lambda m: ", ".join(
        map(str, range(int(m[1]), int(m[2]) + 1))), sections)
    numbers = {int(k) for k in re.findall(r"\d+", sections)}
    assert set(range(1, 27)) <= numbers and {"appendix A", "appendix B", "appendices C"} <= set(
        re.findall(r"append\w+ \w", sections))


def test_the_formulas_of_the_reading_guide_are_those_of_the_docstrings():
    """READING: each formula is its function's, symbol by symbol, and so are its tags."""
    of_page, of_docstring = collections.defaultdict(set), {}
    for equation, _, code, proof in rows_of(READING, "Every equation"):
        assert re.fullmatch(r"\[.*\]\((support/)?test_\w+\.py#L\d+\)", proof), proof
        name, file = re.search(r"\[`(\w+)`\]\((\w+)\.py", code).groups()
        docstring = inspect.getdoc(getattr(importlib.import_module(file), name))
        of_page[name] |= tags((re.match(r"\*\*(.*?)\*\*", equation) or ["", ""])[1])
        of_docstring[name] = tags(docstring.split("\n")[0])
        latex = plain(", ".join(re.findall(r"\$(.*?)\$", equation)))
        assert latex in plain(docstring) or name in (             # these docstrings have it in words
            "scaled_step", "linear", "reverse_step", "reverse_variance", "trajectory_bound",
            "trajectory_terms"), (name, latex)
    assert of_page == of_docstring and len(of_page) > 35


def value_of(formula, symbols):
    """What a formula in plain symbols comes to.  symbols: the value of each."""
    values = []
    for symbol in sorted(symbols, key=len, reverse=True):
        formula = formula.replace(symbol, chr(0xE000 + len(values)))
        values.append(symbols[symbol])
    code = re.sub("‖(.*?)‖", r"(\1)", formula).translate(str.maketrans("−[]", "-()"))
    code = re.sub(r"(?<=[\d)²\ue000-\uf8ff])\s*(?=[(√\ue000-\uf8ff])", "*", code)
    code = re.sub(r"√([\ue000-\uf8ff])", r"√(\1)", code).replace("√", "sqrt").replace("²", "**2")
    return eval(re.sub(r"[\ue000-\uf8ff]", lambda m: f"values[{ord(m[0]) - 0xE000}]", code),
                dict(values=values, sqrt=np.sqrt))


def symbols_at(schedule, t, **named):
    """The values of ᾱ_t, α_t, … and of the other symbols of the formulas."""
    return {"ᾱ_{t−1}": schedule.alpha_bar[t - 1], "ᾱ_t": schedule.alpha_bar[t],
            "α_t": schedule.alpha[t], "β_t": schedule.beta[t], "½": Exact(1, 2),
            "β̃_t": posterior.beta_tilde(t, schedule), "A1": posterior.A1(t, schedule),
            "A2": posterior.A2(t, schedule), **named}


@exactly(first=2)
def test_a_docstring_s_formula_is_what_is_computed(schedule, t, number):
    """Docstrings: the formula in the first line, read as it stands, gives what the function gives.
    """
    x_0, x_0_hat, x_t, x_prev, eps, eps_hat, mu, mu_hat, sigma2, score = (
        number() for _ in range(10))
    symbols = symbols_at(schedule, t, **{
        "x_0": x_0, "x̂_0": x_0_hat, "x_t": x_t, "x_{t−1}": x_prev, "ε": eps, "ε_θ": eps_hat,
        "μ̃": mu, "μ_θ": mu_hat, "σ_t²": sigma2, "C_t": posterior.C(t, sigma2, schedule),
        "Var x_0": sigma2, "∇ log q(x_t)": score, "E[ε | x_t]": eps})
    for function, arguments, found in (
            (ddpm.q_step, "x_{t−1}", ddpm.q_step(x_prev, t, schedule)),
            (ddpm.q_marginal, "x_0", ddpm.q_marginal(x_0, t, schedule)),
            (ddpm.q_sample, "", ddpm.q_sample(x_0, t, eps, schedule)),
            (ddpm.variance_at, "", ddpm.variance_at(t, sigma2, schedule)),
            (ddpm.snr, "", ddpm.snr(t, schedule)),
            (ddpm.x0_from_eps, "", ddpm.x0_from_eps(x_t, t, eps, schedule)),
            (ddpm.eps_from_x0, "", ddpm.eps_from_x0(x_t, t, x_0, schedule)),
            (posterior.beta_tilde, "", posterior.beta_tilde(t, schedule)),
            (posterior.A1, "", posterior.A1(t, schedule)),
            (posterior.A2, "", posterior.A2(t, schedule)),
            (posterior.posterior, "", posterior.posterior(x_t, x_0, t, schedule)),
            (posterior.reverse_mean, "", posterior.reverse_mean(x_t, eps_hat, t, schedule)),
            (posterior.matching_mean, "", posterior.matching_mean(mu, mu_hat, sigma2)),
            (posterior.matching_x0, "", posterior.matching_x0(x_0, x_0_hat, t, sigma2, schedule)),
            (posterior.C, "", posterior.C(t, sigma2, schedule)),
            (posterior.matching_eps, "", posterior.matching_eps(eps, eps_hat, t, sigma2, schedule)),
            (posterior.score, "", posterior.score(eps, t, schedule)),
            (posterior.tweedie_mean, "", posterior.tweedie_mean(x_t, score, t, schedule))):
        formula = re.split(r"\s{3,}|: | = |, for", inspect.getdoc(function).split("\n")[0])[1]
        normal = re.match(r"N\((.*), (.*) I\)", formula)
        said = tuple(value_of(part, symbols) for part in normal.groups()) if normal else (
            value_of(formula, symbols))
        assert said == found, function.__name__


@exactly(first=2)
def test_the_posterior_is_derived_as_the_comment_says(schedule, t, number):
    """Ho (6, 7), V8: the comment above beta_tilde, line by line, with exact numbers."""
    comment = "\n".join(re.findall("^#(.*)", inspect.getsource(posterior), re.M))
    x_prev, symbols = number(), symbols_at(schedule, t, **{"x_0": number(), "x_t": number()})
    exponent = re.search(r"= exp (−½ \[.*\])", comment)[1].replace("−½", "")
    P, P_again, left, right = re.search(
        r"P = (.*?) = (.*?) +\[(.*) = (.*)\]", comment).groups()
    R = re.search(r"R = (.*)", comment)[1]
    for said in (P_again, f"{P} + {left} − ({right})", "(1−ᾱ_t)/(1−ᾱ_t)" + f" ({P})"):
        assert value_of(said, symbols) == value_of(P, symbols)
    P, R = value_of(P, symbols), value_of(R, symbols)
    square, at_0 = (value_of(exponent, symbols | {"x_{t−1}": x}) for x in (x_prev, Exact(0)))
    assert square - at_0 == P * x_prev ** 2 - 2 * R * x_prev
    assert "−½ [ P x_{t−1}² − 2 R x_{t−1} + … ]" in comment
    assert "The variance is 1/P = β̃_t, and the mean R/P = A1 x_t + A2 x_0" in comment
    assert (R / P, 1 / P) == posterior.posterior(symbols["x_t"], symbols["x_0"], t, schedule)


def test_the_bound_is_derived_as_the_comment_says():
    """Ho (3, 5), V7: the comment above trajectory_bound: each factor turned round, the telescope,
    and what remains, with the densities of one trajectory.
    """
    comment = "\n".join(re.findall("^#(.*)", inspect.getsource(posterior), re.M))
    schedule, x = ddpm.schedule_of([0.1, 0.3, 0.2, 0.5]), np.array([0.3, -0.2, 0.9, 0.4, -1.1])

    def q(t, s):                                                  # t = s: given x_0 and x_{t+1}
        law = (ddpm.q_step(x[s], t, schedule) if s == t - 1 else
               posterior.posterior(x[t + 1], x[0], t + 1, schedule) if s == t + 1 else
               ddpm.q_marginal(x[0], t, schedule))
        return np.exp(ddpm.log_normal(x[t], *law))
    turned = re.search(r"q\(x_t \| x_\{t−1\}\) = (.*),", comment)[1]
    quotient, telescoped = re.search(r"quotients (.*) telescope to (.*)\.", comment).groups()
    product = 1.0
    for t in range(2, 5):
        symbols = {"q(x_{t−1} | x_t, x_0)": q(t - 1, t), "q(x_t | x_0)": q(t, 0),
                   "q(x_{t−1} | x_0)": q(t - 1, 0)}
        near(value_of(turned, symbols), q(t, t - 1), scale=1)
        product *= value_of(quotient, symbols)
    near(value_of(telescoped, {"q(x_T | x_0)": q(4, 0), "q(x_1 | x_0)": q(1, 0)}), product, scale=1)
    for line, name in (("KL(q(x_T | x_0) ‖ p(x_T))", "L_T: regularization"),
                       ("Σ_{t>1} KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t))",
                        "L_{t−1}: matching"),
                       ("− log p(x_0 | x_1) ]", "L_0: reconstruction")):
        assert re.search(rf"{re.escape(line)} +{re.escape(name)}", comment)


@exactly()
def test_five_names_of_one_prediction(schedule, t, number):
    """READING: ε, x̂_0, the score, v and the velocity of flow matching: each is what its row says,
    leads back to x_0, and has its squared error; and the straight path is x_t, scaled.
    """
    alpha_bar, both = schedule.alpha_bar[t], []
    for x0, x_t in ((number(), number()),) * 2:
        names = dict(alpha_bar=alpha_bar, sqrt=np.sqrt, x0=x0 if not both else number(), x_t=x_t)
        names["eps"] = ddpm.eps_from_x0(x_t, t, names["x0"], schedule)
        both.append(names)
    ours, other = both
    snr, rows = ddpm.snr(t, schedule), rows_of(READING, "One prediction, five names")
    assert len(rows) == 5
    for name, (_, definition, back, weight) in zip(("eps", "x0", "score", "v", "u"), rows):
        definition, back, weight = (cell.strip("`") for cell in (definition, back, weight))
        found, theirs = (eval(definition, names) for names in both)
        assert eval(back, ours | {name: found}) == ours["x0"], name
        assert (found - theirs) ** 2 == eval(weight, dict(
            snr=snr, alpha_bar=alpha_bar, sqrt=np.sqrt)) * (ours["x0"] - other["x0"]) ** 2, name
    scale = np.sqrt(alpha_bar) + np.sqrt(1 - alpha_bar)
    r = np.sqrt(1 - alpha_bar) / scale
    assert (1 - r) * ours["x0"] + r * ours["eps"] == ours["x_t"] / scale


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
