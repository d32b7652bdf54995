"""The pages against the code; and the exercises."""
import ast
import collections
import gzip
import importlib
import inspect
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm
import evaluate
import posterior
import sample
import train
from support import exercises
from support.config import PRESETS, Sampling
from support.data import load, split, to_pixels
from support.test_data import decoded, idx
from test_math import Exact, exactly, near
from unet import PAPER, UNet, parameters, time_embedding

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.md"))}
README, READING, DATA, MEASURED = (PAGES[name] for name in ("README", "READING", "DATA", "MEASURED"))
ALL = re.sub(r" \\\n\s+", " ", "\n".join(PAGES.values()))        # a long command is one line
PATH = re.search(r"## A path of 45 minutes\n(.*?)\n## ", READING, re.S)[1]


def fenced(page, kind):
    """The blocks of code of a page, without the indentation of a list."""
    return [inspect.cleandoc("\n" + block) for block in
            re.findall(rf"^ *```{kind}\n(.*?)^ *```", page, re.M | re.S)]


def rows_of(page, title):
    """The rows of the first table under a heading, each a list of its cells."""
    table = re.search(rf"^##+ {title}\n(?s:.*?)\n\| -.*\n((?:\|.*\n)+)", page, re.M)[1]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|(?= |$)", row)[1:-1]]
            for row in table.splitlines()]


# ── Links, commands, recipes ──────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("name", PAGES)
def test_the_pages_name_only_what_exists(name):
    """Every link leads to the line of its function or proof, to a file or to a heading; every file
    and flag is there.
    """
    links = re.findall(r"\[([^]]+)\]\((?!http)([\w./-]*)#?([\w-]*)\)", PAGES[name])
    for words, file, place in links:
        assert not file or (ROOT / file).exists(), file
        text = PAGES[Path(file).stem if file else name] if file[-3:] in ("", ".md") else (
            (ROOT / file).read_text(encoding="utf-8") if place else "")
        if re.fullmatch(r"L\d+", place):                   # a proof is named in words
            target = words.strip("`") if words[0] == "`" else "test_" + re.sub(r"\W+", "_", words)
            line = text.splitlines()[int(place[1:]) - 1]
            assert re.match(rf"(def|class) {target}\b", line, re.I), (file, words)
        elif place:
            headings = re.findall("^#+ (.*)", text, re.M)
            assert place in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
    assert len(links) > {"READING": 120, "FAQ": 70, "ARTICLES": 50, "README": 20}.get(name, 6)
    for path in map("".join, re.findall(
            r"`((?:\w+/)?[\w-]+\.(?:py|txt))`|\]\((assets/[\w./-]+)\)", PAGES[name])):
        assert (ROOT / path).exists(), path
    known = {option for parser in (train.arguments(), sample.arguments())
             for action in parser._actions for option in action.option_strings}
    others = "--hypothesis-profile --nproc_per_node --index-url --fid --gpu --input1 --input2"
    for flag in re.findall(r"(?<![\w-])(--[a-z][\w-]*)", PAGES[name]):
        assert flag in known | {*others.split()}, flag


def test_every_command_is_understood():
    """Pages: every `python train.py ...` and `python sample.py ...` is one that it understands."""
    commands = re.findall(r"python ((?:train|sample)\.py[^`\n]*)", ALL)
    assert len(commands) > 30
    for command in commands:
        script, *argv = shlex.split(command)
        if argv != ["--help"]:
            {"train.py": train, "sample.py": sample}[script].arguments().parse_args(argv)


def test_what_the_pages_show_is_what_comes_out(trained):
    """README: the last lines of `python train.py`, but for the figures; FAQ: the lines for Python."""
    out, text, _ = trained
    shown, printed = (re.sub(r"\d+(\.\d+)?", "0", page).splitlines()
                      for page in (fenced(README, "text")[0], text.replace(str(out), "out")))
    exec(fenced(PAGES["FAQ"], "python")[0], names := {})
    assert shown == printed[-len(shown):] and names["images"].dtype == np.uint8
    assert f"a uint8 array {names['images'].shape}" in ALL and names["images"].std() > 50


def test_the_quick_start_and_then_the_path_can_be_followed(call, tmp_path):
    """README, and in the same folder READING's path of 45 minutes: each command runs, made short
    where it takes long, and no later one finds an earlier one's files in its way.
    """
    start = [part for block in fenced(README[README.index("## Run it"):], "sh")
             for part in block.split(" && ")][:6]
    assert "pip install -r requirements.txt" in start and start[-1] == "pytest"
    commands = start + re.findall(r"^(python .*)|`(python .*?)`", PATH.replace("\\\n", ""), re.M)
    commands = ["".join(command) for command in commands]
    for command in commands:
        script, *argv = shlex.split(command)[1:] or [""]
        if script in ("train.py", "sample.py"):
            module, short = {"train.py": (train, ["--batch", 2, "--T", 2, "--beta-T", 0.9]),
                             "sample.py": (sample, ["-n", 10])}[script]
            assert call(module, *argv, *short, "--steps", 2)[0] == 0, command
        elif script == "evaluate.py":
            assert (tmp_path / argv[argv.index("--weights") + 1]).exists()
    assert {"python ddpm.py", "python posterior.py"} < {*commands}    # run in test_commands.py
    for name in ("1000.png", "step-000002.png", "mine/step-000002.png", "T50/step-000002.png"):
        assert decoded(tmp_path / "out" / name)[0].std() > 10


RNG, LABELS = np.random.default_rng(0), np.arange(12) % 10
GREY, BYTES = (RNG.integers(0, 256, (12, *size)).astype(np.uint8) for size in ((28, 28), (3, 32, 32)))
COLOUR, CLEAR = np.stack([GREY, GREY // 2, 255 - GREY], axis=3), LABELS[:, None, None, None] % 3 > 0
FRAME = np.outer(np.arange(28) % 27 > 0, np.arange(28) % 27 > 0)
# What lies in the file of each row, or what another package makes of it; and the images.
KINDS = {
    "numbers 0": (GREY / 255, GREY), "numbers -1": (to_pixels(GREY), GREY),
    "0 … 255": (GREY.astype(float), GREY), "16 bits": (257 * GREY.astype(np.uint16), GREY),
    "black and white": (GREY > 99, np.where(GREY > 99, 255, 0)),
    "channels first": (COLOUR.transpose(0, 3, 1, 2), COLOUR),
    "RGBA": (np.concatenate([COLOUR, np.where(CLEAR, GREY[..., None] | 255, 0)], axis=3),
             np.where(CLEAR, COLOUR, 255)),
    "colours that": (np.stack([GREY] * 3, axis=3), GREY),
    "sides": (GREY[:, 1:-1, 1:-1], GREY * FRAME),
    "one image": (COLOUR[3], COLOUR[3:4]), "rows of 784": (None, GREY), "a CSV": (None, GREY),
    "`arr_0`": (None, GREY), "EMNIST": (None, GREY), "QMNIST": (None, None),
    "PyTorch": (None, COLOUR), "CIFAR's": (None, BYTES.transpose(0, 2, 3, 1)),
    "`.mat`": (dict(X=COLOUR.transpose(1, 2, 3, 0), y=(LABELS + 10 * (LABELS == 0))[:, None]),
               COLOUR),
    "`.h5`": (dict(images=GREY, labels=LABELS), GREY), "Parquet": (None, None)}


def test_two_lines_make_it_right(tmp_path, monkeypatch):
    """DATA: each row of the table on a small file of its kind, and CIFAR-10's lines; what needs
    another package is given what that would read.  Recipes are 80 characters wide.
    """
    monkeypatch.chdir(tmp_path)
    np.save("cat.npy", GREY.reshape(12, 784))
    np.savetxt("train.csv", np.c_[LABELS, GREY.reshape(12, 784)], "%d", ",", header="label,pixels")
    np.savez("kmnist-train-imgs.npz", GREY)
    np.savez("kmnist-train-labels.npz", LABELS)
    emnist, digits = "emnist-letters-train-images-idx3-ubyte.gz", np.stack([LABELS] * 8, axis=1)
    Path(emnist).write_bytes(gzip.compress(idx(GREY.transpose(0, 2, 1))))
    Path(emnist.replace("images-idx3", "labels-idx1")).write_bytes(gzip.compress(idx(LABELS)))
    np.r_[3074, 12, 8, digits.ravel()].astype(">i4").tofile("qmnist-train-labels-idx2-int")
    torch.save(torch.from_numpy(COLOUR).permute(0, 3, 1, 2) / 255, "x.pt")
    Path("data_batch_1").write_bytes(pickle.dumps({b"data": BYTES.reshape(12, -1),
                                                   b"labels": [*LABELS]}))
    Path("cifar-10-batches-bin").mkdir()
    for k in range(1, 6):
        np.c_[LABELS, BYTES.reshape(12, -1)].astype(np.uint8).tofile(
            f"cifar-10-batches-bin/data_batch_{k}.bin")
    rows = rows_of(DATA, "What you have, and the two lines that make it right")
    for (words, cell), (kind, (x, images)) in zip(rows, KINDS.items(), strict=True):
        lines, names = re.findall("`(.*?)`", cell), dict(np=np, x=x, PATH=emnist)
        assert words.startswith(kind) and len(lines) == 2 and compile("; ".join(lines), kind, "exec")
        if isinstance(x, np.ndarray):
            np.save("x.npy", x)
        if kind != "Parquet":
            exec("\n".join(lines[isinstance(x, dict):]), names)
        assert "labels" not in names or [*np.ravel(names["labels"])] == [*LABELS], kind
        if images is not None:
            np.savez("mine.npz", images=names["images"])
            assert np.array_equal(load("mine.npz")[0], images.reshape(*images.shape[:3], -1)), kind
    folder, cifar, *_ = fenced(DATA, "python")
    exec(cifar, {})
    images, labels = load("cifar10.npz")
    assert np.array_equal(images[12:24], BYTES.transpose(0, 2, 3, 1)) and [*labels[:12]] == [*LABELS]
    assert compile(folder, "folder", "exec") and 80 >= max(
        len(line) for page in PAGES.values() for block in fenced(page, "sh") + [folder, cifar]
        for line in block.splitlines())


# ── Figures: each is what a formula gives, and one figure on all pages ────────────────────────────

def figures():
    """{the words around figures, a group for each: what these must be wherever the words stand}"""
    ours, paper, linear, t = PRESETS["digits"], PRESETS["cifar10"], ddpm.linear(), np.arange(1, 1001)
    a1, root, sigma = posterior.A1(t, linear), linear.alpha_bar ** 0.5, linear.beta ** 0.5
    C_2, C_350 = (np.array([posterior.C(k, posterior.reverse_variance(choice, linear)[k], linear)
                            for choice in ("beta", "beta_tilde")]) for k in (2, 350))
    constant = posterior.matching_constant(t[1:], linear.beta[2:], linear)
    (digits, labels), labelled = load(), replace(ours, num_classes=10)
    L_T = posterior.L_T(to_pixels(digits[:100]), ddpm.linear(50))
    undone = (linear.one_minus_alpha_bar[500] ** 0.5 - sigma[500]) ** 2 / linear.alpha[500]
    return {
        r"A1 is largest, (.*?), at \$t = (\d+)": (a1.max(), t[a1.argmax()]),
        r"([\d.]+) grey levels of noise|noise of ([\d.]+) grey": 127.5 * sigma[1],
        r"beta_1 = 0.01\$ it would be (\d+)": 127.5 * 0.01 ** 0.5,
        r"from ([\d,]+) at \$t = 1\$ through 1 at \$t = (\d+)\$ to ([\d.]+) at": (
            ddpm.snr(1, linear), t[abs(ddpm.snr(t, linear) - 1).argmin()], ddpm.snr(1000, linear)),
        r"bar\\alpha_T} = (0\.00\d)": root[1000], r"(\d+)-fold\.": 1 / root[1000],
        r"T = 200\$ leave.*? = ([\d.]+)": ddpm.linear(200).alpha_bar[200] ** 0.5,
        r"takes (0\.\d+) from \$x_0": posterior.A2(3, linear),
        r"beta_t\$ (\d+)-fold": (C_2 / C_350)[0], r"(\d+)-fold from \$t = 2\$ to": (C_2 / C_350)[1],
        r"a constant ([\d.]+) bits": constant.sum() / np.log(2),
        r"L_T\$ is ([\d.]+) bits": posterior.bits_per_dim(L_T),
        r"it would be (0\.\d+), with the linear": linear.alpha_bar[1:].mean(),
        r"digits (0\.\d+) is the least": evaluate.least_loss(digits, labels, labelled)[0],
        r"variance ([\d.]+) where \$x_\{499\}\$ has ([\d.]+)": (
            undone, linear.one_minus_alpha_bar[499]),
        r"alpha_2\$ is ([\d.]+), nearly": linear.one_minus_alpha_bar[2],
        r"beta_1 \\beta_2\$ is ([\d.]+\d)": linear.beta[1] * linear.beta[2],
        r"(\d+)% of it is still the random": 100 * 0.9999 ** 10_000,
        r"\((\d+) epochs; Fréchet": ours.steps * ours.batch / len(split(10_000)[0]),
        r"\((\d+) epochs; 1\.3": 40_000 * ours.batch / len(split(60_000)[0]),
        r"\(([\d,]+) epochs\)": paper.steps * paper.batch / 50_000,
        r"attention among ([\d,]+) pixels": 224 * 176 / 4,
        r"([\d,]+) steps of 64(?! equal)": ours.steps, r"([\d,]+) steps of 128": paper.steps,
        r"\| ([\d,]+) of (\d+) images \| ([\d,]+) of (\d+) \|": (
            paper.steps, paper.batch, ours.steps, ours.batch),
        r"\| ([\d.]+); in the authors' code, .*? of ([\d,]+) steps \| ([\d.]+) and ([\d.]+), "
        r"a warm-up of (\d+)": (paper.lr, paper.warmup, ours.lr, ours.muon_lr, ours.warmup),
        r"beta_2 = ([\d.]+)\$": ours.beta2,
        r"a decay of (0\.9999) \| .*? at most ([\d.]+) \|": (paper.ema_decay, ours.ema_decay),
        r"only after ([\d,]+) steps": round((10 * 0.9999 - 1) / (1 - 0.9999), -3),
        r"so that ([\d,]+) are trained on": len(split(50_000)[0]),
        r"on ([\d,]+) of the 10,000 digits": len(split(10_000)[0]),
        r"(?:million|train.py`) \| ([\d,]{7}) \|": parameters(UNet(labelled)),
        r"\| ([\d.]+) million": parameters(UNet(PAPER)) / 1e6,
        r"([\d,]+) parameters for CIFAR10": parameters(UNet(PAPER)),
        r"one from each of (\d+) equal": ours.batch,
        r"Algorithm 2 with its ([\d,]+) steps, (\d+) digits": (Sampling().steps, Sampling().n)}


def test_the_figures_of_the_pages_are_the_code_s():
    """Pages: every figure that a formula or a default gives, rounded as it is printed; the charts of
    A1 and A2.
    """
    for words, values in figures().items():
        places = [[group for group in place.groups() if group] for place in re.finditer(words, ALL)]
        for shown in places:
            decimals = [len(each.partition(".")[2]) for each in shown]
            assert [each.replace(",", "") for each in shown] == [
                f"{value:.{k}f}" for value, k in zip(np.atleast_1d(values), decimals)], words
        assert places, words
    ours, paper = PRESETS["digits"], PRESETS["cifar10"]                     # in words in the README
    assert (ours.model_channels, ours.channel_mult, ours.num_res_blocks, ours.num_groups,
            ours.attention_resolutions, ours.patch_size) == (16, (1, 2), 1, 1, (0,), 2)
    assert (paper.model_channels, len(paper.channel_mult), paper.num_res_blocks, paper.num_groups,
            paper.attention_resolutions, paper.dropout, paper.flip) == (
                128, 4, 2, 32, (16,), 0.1, True)
    x, *lines = (ast.literal_eval(part) for part in re.findall(
        r"\[.*\]", re.search(r'"A1 \(blue\) and A2 \(red\)"\n(.*?)```', READING, re.S)[1]))
    for line, function in zip(lines, (posterior.A1, posterior.A2), strict=True):
        np.testing.assert_allclose(line, function(np.array(x), ddpm.linear()), atol=5.1e-7)


def test_a_measured_figure_is_one_figure():
    """Pages: what was measured and stands twice: bits, seconds, Fréchet distances."""
    bits = re.findall(r"(\d\.\d\d) against (\d\.\d\d)", ALL) + re.findall(
        r"default run: at most (\d\.\d\d) bits.*? (\d\.\d\d) with", ALL)
    training, samplers = (rows_of(MEASURED, title) for title in ("Training", "Samplers"))
    measured = [[row[k] for row in training[:3]] for k in (1, 2)]
    (_, seconds, _, scores), algorithm_2, dpm = rows_of(README, "Measured")
    assert len(bits) == 3 and len({*bits}) == 1
    assert [cell.split(", ") for cell in (seconds, scores)] == measured
    for row, options in ((algorithm_2, "none: Algorithm 2"), (dpm, "`--sampler dpm --steps 20`")):
        assert [row[1], row[3]] in [each[1:3] for each in samplers if each[0] == options]


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


LINES = {train.algorithm_1: ("repeat", "x_0 ~ q(x_0)", "t ~ Uniform({1, …, T})", "ε ~ N(0, I)",
                             "take a gradient descent step on", "∇_θ ‖ε − ε_θ(", "‖²",
                             "until converged"),
         sample.algorithm_2: ("x_T ~ N(0, I)", "for t = T, …, 1 do", "z ~ N(0, I) if t > 1, else 0",
                              "x_{t−1} =", "+ σ_t z", "end for", "return x_0")}


@pytest.mark.parametrize("algorithm", LINES)
def test_the_algorithms_in_the_readme_are_the_source_and_the_paper_s(algorithm):
    """Algorithm 1, Algorithm 2: what the README shows is the function, without its docstring; its
    comments are the paper's lines, and line 4 is reverse_step.
    """
    lines, node = inspect.getsource(algorithm).splitlines(), ast.parse(inspect.getsource(algorithm))
    docstring = node.body[0].body[0]
    del lines[docstring.lineno - 1:docstring.end_lineno]
    assert "\n".join(lines) in fenced(README, "python")
    comments = " ".join(re.sub(r"^\d: ", "", part) for part in re.findall("# +(.*)", "\n".join(lines)))
    assert re.search(".*".join(re.escape(plain(line)) for line in LINES[algorithm]), plain(comments))
    if algorithm is sample.algorithm_2:
        schedule = ddpm.schedule_of([0.1, 0.3])
        said = re.search(r"x_\{t−1\} = (.*σ_t z)", comments)[1].replace("/ ", "/")
        assert value_of(said, symbols_at(schedule, 2, **{
            "ε_θ(x_t, t)": 0.7, "x_t": -0.2, "σ_t": 0.4, "z": 1.1})) == pytest.approx(
                posterior.reverse_step(-0.2, 0.7, 2, 1.1, 0.16, schedule))


def test_every_equation_is_in_the_reading_guide():
    """Ho (1) to (16), N1 to N8 and V1 to V14 stand in its table; the articles' words before each
    formula in theirs; algorithms, figures and appendices in that of the sections.
    """
    equations = tags(" ".join(row[0] for row in rows_of(READING, "Every equation")))
    assert equations == ({f"Ho {k}" for k in range(1, 17)} | {f"N{k}" for k in range(1, 9)}
                         | {f"V{k}" for k in range(1, 15)})
    articles = [row[0] for row in rows_of(PAGES["ARTICLES"], "Formula by formula")]
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
    for equation, cell in rows_of(READING, "Every equation"):
        equation, (code, proof) = equation.split("<br>")[0], cell.split("<br>")
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
    code = re.sub("‖(.*?)‖", r"(\1)", formula).translate(str.maketrans(
        {"−": "-", "[": "(", "]": ")", "·": "*", "^": "**", "⌊": "floor(", "⌋": ")"}))
    code = re.sub(r"(?<=[\d)²\ue000-\uf8ff])\s*(?=[(√\ue000-\uf8ff])", "*", code)
    code = re.sub(r"√([\ue000-\uf8ff])", r"√(\1)", code).replace("√", "sqrt").replace("²", "**2")
    return eval(re.sub(r"[\ue000-\uf8ff]", lambda m: f"values[{ord(m[0]) - 0xE000}]", code),
                dict(values=values, sqrt=np.sqrt, ln=np.log, min=np.minimum, max=np.maximum,
                     floor=np.floor))


def symbols_at(schedule, t, **named):
    """The values of ᾱ_t, α_t, … and of the other symbols of the formulas."""
    return {"ᾱ_{t−1}": schedule.alpha_bar[t - 1], "ᾱ_t": schedule.alpha_bar[t],
            "α_t": schedule.alpha[t], "β_t": schedule.beta[t], "½": Exact(1, 2),
            "β̃_t": posterior.beta_tilde(t, schedule), "A1": posterior.A1(t, schedule),
            "A2": posterior.A2(t, schedule), **named}


FORMULAS = (ddpm.q_step, ddpm.q_marginal, ddpm.q_sample, ddpm.variance_at, ddpm.snr, ddpm.x0_from_eps,
            ddpm.eps_from_x0, posterior.beta_tilde, posterior.A1, posterior.A2, posterior.posterior,
            posterior.reverse_mean, posterior.matching_mean, posterior.matching_x0, posterior.C,
            posterior.matching_eps, posterior.score, posterior.tweedie_mean)
SYMBOLS = dict(x_prev="x_{t−1}", x0="x_0", x0_hat="x̂_0", x_t="x_t", eps="ε", eps_hat="ε_θ", mu="μ_θ",
               mu_tilde="μ̃", sigma2="σ_t²", variance_0="Var x_0", score_t="∇ log q(x_t)")


@exactly(first=2)
def test_a_docstring_s_formula_is_what_is_computed(schedule, t, number):
    """Docstrings: the formula in the first line, read as it stands, gives what the function gives.
    """
    given = {name: number() for name in SYMBOLS} | dict(schedule=schedule, t=t)
    symbols = symbols_at(schedule, t, **{SYMBOLS[name]: given[name] for name in SYMBOLS})
    symbols |= {"C_t": posterior.C(t, given["sigma2"], schedule), "E[ε | x_t]": given["eps"]}
    for function in FORMULAS:
        arguments = given | (dict(eps=given["eps_hat"]) if function is posterior.reverse_mean else {})
        found = function(*(arguments[name] for name in inspect.signature(function).parameters))
        formula = re.split(r"\s{3,}|: | = |, for", inspect.getdoc(function).split("\n")[0])[1]
        normal = re.match(r"N\((.*), (.*) I\)", formula)
        said = tuple(value_of(part, symbols) for part in normal.groups()) if normal else (
            value_of(formula, symbols))
        assert said == found, function.__name__


def test_the_formulas_beside_the_paper_are_what_is_computed():
    """Docstrings: DDIM, DPM, guidance, completion, KL, the best network, the cosine, the times, the
    embedding of t, the rates, the average, stratified t; C_t and V11's weight in SNRs.
    """
    schedule, t, one, draws = ddpm.schedule_of([0.1, 0.3, 0.2, 0.5]), 3, torch.ones(1), np.arange(8)
    x_t, x0, x0_prev, z, eta, v = 0.3, -0.4, 0.7, 1.1, 0.6, posterior.beta_tilde(3, schedule)
    symbols = symbols_at(schedule, t, **{
        "ε_θ": ddpm.eps_from_x0(x_t, t, x0, schedule), "x̂_0": x0, "x̂_prev": x0_prev, "z": z, "η": eta,
        "½": 0.5, "v_1": 0.2, "v_2": 0.5, "m_1": 0.3, "m_2": -0.1, "x_t": x_t})
    for key, k in ("t", 3), ("{t−1}", 2), ("{t+1}", 4):
        symbols[f"SNR_{key}"] = ddpm.snr(k, schedule)
        symbols[f"λ_{key}"] = np.log(ddpm.snr(k, schedule)) / 2

    def said(function, pattern, **more):
        return value_of(re.search(pattern, inspect.getdoc(function))[1], symbols | more)
    symbols["σ²"] = said(sample.ddim_step, r"σ² = (.*?):")
    symbols["σ"] = symbols["σ²"] ** 0.5
    D = said(sample.dpm_step, r"D = (.*?\)\)) ")
    null, label = torch.tensor([0.5]), torch.tensor([2.0])
    *_, x_0 = sample.completed(lambda x_t, t: iter([x_t, 7 * x_t]), 3 * one, lambda x: 0.25 * x,
                               ddpm.schedule_of([0.5]), lambda: one)
    images = np.array([[-1.0], [0.2], [1.0]])
    w = np.exp(said(posterior.best_x0, r"softmax_i\((.*)\) ", x_i=images))
    f = [np.cos(said(ddpm.cosine, r"cos²\((.*)\) ", t=k, T=9, π=np.pi)) ** 2 for k in range(10)]
    omega = said(time_embedding, r"ω_k = (.*\)) ", k=np.arange(4), width=8)
    nets = ema, net = [torch.nn.Linear(1, 1) for _ in range(2)]
    before = [each.weight.item() for each in nets]
    train.update_ema(ema, net, 20, 0.9)
    d = said(train.update_ema, r"d = (.*\))", step=20, decay=0.9)
    config = replace(PRESETS["digits"], steps=40, warmup=8)
    for found, claimed in (
            (sample.ddim_step(x_t, t, x0, z, schedule, eta), said(sample.ddim_step, r"= (.*?)   ")),
            (sample.dpm_step(x_t, t, x0, x0_prev, z, schedule, eta),
             sample.ddim_step(x_t, t, D, z, schedule, eta)),
            (sample.guided(lambda x, t, c: torch.where(c > 0, label, null), one, one, one.long(), 1.5, 0),
             said(sample.guided, r"ε = (.*?)   ", ε_null=null, ε_label=label, s=1.5)),
            (null + 1.5 * (label - null),                            # Ho and Salimans' (6), by w
             label + value_of(re.search(r"\$w = (s - 1)\$", ALL)[1], dict(s=1.5)) * (label - null)),
            (x_0, said(sample.completed, r"(.*?),  known", **{"x_{t−1}": 7, "P": 0.25,
                                                              "known_{t−1}": 3})),
            (posterior.kl(0.3, 0.2, -0.1, 0.5), said(posterior.kl, r"= (½.*?\])")),
            (posterior.best_x0(np.array([[x_t]]), t, images, schedule), (w * images).sum() / w.sum()),
            (ddpm.cosine(9).beta[1:], [said(ddpm.cosine, r"β_t = (.*\)),", **{
                "f(t−1)": f[k - 1], "f(t)": f[k]}) for k in range(1, 10)]),
            (sample.times(1000, 20), np.rint(said(sample.times, r"τ_i = (.*?²\))", i=np.arange(21),
                                                  T=1000, N=20))),
            (time_embedding(torch.tensor([2]), 8)[0], np.r_[np.sin(2 * omega), np.cos(2 * omega)]),
            ([train.lr_scale(step, config) for step in (3, 30)], [
                said(train.lr_scale, r"^(.*?), the", step=k, steps=40, warmup=8) for k in (3, 30)]),
            (ema.weight.item(), np.dot(before, [d, 1 - d])),
            (train.stratified(torch.from_numpy(draws + 1), 9),
             said(train.stratified, "← (.*?⌋)", k=draws, T=9, n=8, t_k=draws + 1)),
            (posterior.C(t, v, schedule), said(posterior.C, r"it is (.*)\.")),
            (posterior.matching_x0(1.0, 0.0, t, v, schedule),
             said(posterior.matching_x0, r"weight is (.*)\."))):
        np.testing.assert_allclose(found, claimed, rtol=1e-6)


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
    a, s, both = schedule.alpha_bar[t] ** 0.5, schedule.one_minus_alpha_bar[t] ** 0.5, []
    for x0, x_t in ((number(), number()),) * 2:
        names = dict(a=a, s=s, x0=x0 if not both else number(), x_t=x_t)
        names["eps"] = ddpm.eps_from_x0(x_t, t, names["x0"], schedule)
        both.append(names)
    ours, other = both
    snr, rows = ddpm.snr(t, schedule), rows_of(READING, "One prediction, five names")
    assert len(rows) == 5
    for name, (_, definition, back, weight) in zip(("eps", "x0", "score", "v", "u"), rows):
        definition, back, weight = (cell.strip("`") for cell in (definition, back, weight))
        found, theirs = (eval(definition, names) for names in both)
        assert eval(back, ours | {name: found}) == ours["x0"], name
        assert (found - theirs) ** 2 == eval(weight, dict(snr=snr, s=s)) * (
            ours["x0"] - other["x0"]) ** 2, name
    r = s / (a + s)
    assert (1 - r) * ours["x0"] + r * ours["eps"] == ours["x_t"] / (a + s)


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
