"""The pages against the code."""
import ast
import importlib
import inspect
import pickle
import re
import shlex
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
from support.config import PRESETS, Sampling
from support.data import load, split, to_pixels
from support.test_data import decoded, idx
from support.test_docstrings import value_of
from support.testing import proved
from unet import PAPER, UNet, parameters

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.md"))}
README, READING, DATA, MEASURED = (
    PAGES[name] for name in ("README", "READING", "DATA", "MEASURED"))
ALL = re.sub(r" \\\n\s+", " ", "\n".join(PAGES.values()))        # a long command is one line


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
    links = re.findall(r"\[([^]]*)\]\((?!http)([\w./-]*)#?([\w-]*)\)", PAGES[name])
    for words, file, place in links:
        path = ROOT / (file or f"{name}.md")
        assert path.exists(), path
        text = path.read_text(encoding="utf-8") if place else ""
        if re.fullmatch(r"L\d+", place):                   # a proof is named in words
            target = words.strip("`") if words[0] == "`" else "test_" + re.sub(r"\W+", "_", words)
            line = text.splitlines()[int(place[1:]) - 1]
            assert re.match(rf"(def|class) {target}\b", line, re.I), (file, words)
        elif place:
            headings = re.findall("^#+ (.*)", text, re.M)
            assert place in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
    assert len(links) > {"READING": 120, "FAQ": 70, "ARTICLES": 50, "README": 20}.get(name, 6)
    for path in re.findall(r"`((?:\w+/)?[\w-]+\.(?:py|txt))`", PAGES[name]):
        assert (ROOT / path).exists(), path
    others = ("--hypothesis-profile --nproc_per_node --index-url --fid --gpu --input1 --input2 "
              "--derive --mark")
    flags = {*re.findall(r"(?<![\w-])(--[a-z][\w-]*)", PAGES[name])}
    assert flags <= {*train.arguments()._option_string_actions, *others.split(),
                     *sample.arguments()._option_string_actions}


def test_every_command_is_understood():
    """Pages: every `python train.py ...` and `python sample.py ...` is one that it understands."""
    commands = re.findall(r"python (train|sample)\.py(?! --help)([^`\n]*)", ALL)
    assert len(commands) > 30
    for script, options in commands:
        module = {"train": train, "sample": sample}[script]
        asked = vars(module.arguments().parse_args(shlex.split(options)))
        assert module is train or Sampling(**asked)


def test_what_the_pages_show_is_what_comes_out(trained):
    """README: the last lines of `python train.py`, but for figures; FAQ: the lines for Python."""
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
    path = re.search(r"## A path of 45 minutes\n(.*?)\n## ", READING, re.S)[1].replace("\\\n", "")
    start = [part for block in fenced(README[README.index("## Run it"):], "sh")
             for part in block.split(" && ")][:7]
    assert "pip install -r requirements.txt" in start and start[-1] == "pytest"
    commands = start + re.findall(r"^python .*|(?<=`)python .*?(?=`)", path, re.M)
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
GREY, BYTES = (RNG.integers(0, 256, (12, *size)).astype(np.uint8)
               for size in ((28, 28), (3, 32, 32)))
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
    emnist, flat = "emnist-letters-train-images-idx3-ubyte", GREY.reshape(12, 784)
    np.save("cat.npy", flat)
    np.savetxt("train.csv", np.c_[LABELS, flat], "%d", ",", header="label,pixels")
    np.savez("kmnist-train-imgs.npz", GREY)
    np.savez("kmnist-train-labels.npz", LABELS)
    Path(emnist).write_bytes(idx(GREY.transpose(0, 2, 1)))
    Path(emnist.replace("images-idx3", "labels-idx1")).write_bytes(idx(LABELS))
    np.r_[3074, 12, 8, LABELS.repeat(8)].astype(">i4").tofile("qmnist-train-labels-idx2-int")
    torch.save(torch.from_numpy(COLOUR).permute(0, 3, 1, 2) / 255, "x.pt")
    Path("data_batch_1").write_bytes(pickle.dumps({b"data": BYTES.reshape(12, -1)}))
    Path("cifar-10-batches-bin").mkdir()
    for k in range(1, 6):
        np.c_[LABELS, BYTES.reshape(12, -1)].astype(np.uint8).tofile(
            f"cifar-10-batches-bin/data_batch_{k}.bin")
    rows = rows_of(DATA, "What you have, and the two lines that make it right")
    for (words, cell), (kind, (x, images)) in zip(rows, KINDS.items(), strict=True):
        lines, names = re.findall("`(.*?)`", cell), dict(np=np, x=x, PATH=emnist)
        assert words.startswith(kind) and len(lines) == 2
        assert compile("; ".join(lines), kind, "exec")
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
    assert np.array_equal(images[12:24], BYTES.transpose(0, 2, 3, 1))
    assert [*labels[:12]] == [*LABELS]
    assert compile(folder, "folder", "exec") and 80 >= max(
        len(line) for page in PAGES.values() for block in fenced(page, "sh") + [folder, cifar]
        for line in block.splitlines())


# ── Figures: each is what a formula gives, and one figure on all pages ────────────────────────────

def figures():
    """{the words around figures, a group for each: what these must be wherever the words stand}"""
    ours, paper = PRESETS["digits"], PRESETS["cifar10"]
    linear, t = ddpm.linear(), np.arange(1, 1001)
    a1, root, sigma = posterior.A1(t, linear), linear.alpha_bar ** 0.5, linear.beta ** 0.5
    C_2, C_350 = (np.array([posterior.C(k, posterior.reverse_variance(choice, linear)[k], linear)
                            for choice in ("beta", "beta_tilde")]) for k in (2, 350))
    constant = posterior.matching_constant(t[1:], linear.beta[2:], linear)
    L_T = posterior.L_T(to_pixels(load()[0][:100]), ddpm.linear(50))
    undone = (linear.one_minus_alpha_bar[500] ** 0.5 - sigma[500]) ** 2 / linear.alpha[500]
    return {
        r"A1 is largest, (.*?), at \$t = (\d+)": (a1.max(), t[a1.argmax()]),
        r"([\d.]+) grey levels of noise|noise of ([\d.]+) grey": 127.5 * sigma[1],
        r"beta_1 = 0.01\$ it would be (\d+)": 127.5 * 0.01 ** 0.5,
        r"from ([\d,]+) at \$t = 1\$ through 1 at \$t = (\d+)\$ to ([\d.]+) at": (
            ddpm.snr(1, linear), t[abs(ddpm.snr(t, linear) - 1).argmin()], ddpm.snr(1000, linear)),
        r"bar\\alpha_T} = (0\.0\d*)": root[1000], r"(\d+)-fold\.": 1 / root[1000],
        r"T = 200\$ leave.*? = ([\d.]+)": ddpm.linear(200).alpha_bar[200] ** 0.5,
        r"takes (0\.\d+) from \$x_0": posterior.A2(3, linear),
        r"beta_t\$ (\d+)-fold": (C_2 / C_350)[0],
        r"(\d+)-fold from \$t = 2\$ to|which are (\d+) times as": (C_2 / C_350)[1],
        r"a constant ([\d.]+) bits": constant.sum() / np.log(2),
        r"L_T\$ is ([\d.]+) bits": posterior.bits_per_dim(L_T),
        r"it would be (0\.\d+), with the linear": linear.alpha_bar[1:].mean(),
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
        r"\| ([\d.]+); in the authors' code, .*? of ([\d,]+) steps \| ([\d.]+), and ([\d.]+) of "
        r"Muon, a warm-up of (\d+)": (paper.lr, paper.warmup, ours.lr, ours.muon_lr, ours.warmup),
        r"beta_2 = ([\d.]+)\$": ours.beta2,
        r"a decay of (0\.9999) \| .*? up to ([\d.]+) \|": (paper.ema_decay, ours.ema_decay),
        r"only after ([\d,]+) steps": round((10 * 0.9999 - 1) / (1 - 0.9999), -3),
        r"so that ([\d,]+) are trained on": len(split(50_000)[0]),
        r"on ([\d,]+) of the 10,000 digits": len(split(10_000)[0]),
        r"(?:million|train.py`) \| ([\d,]{7}) \|": parameters(UNet(replace(ours, num_classes=10))),
        r"\| ([\d.]+) million": parameters(UNet(PAPER)) / 1e6,
        r"([\d,]+) parameters for CIFAR10": parameters(UNet(PAPER)),
        r"has (\d+) times as many parameters and takes (\d+) times as many steps": (
            parameters(UNet(PAPER)) / parameters(UNet(replace(ours, num_classes=10))),
            paper.steps / ours.steps),
        r"one from each of (\d+) equal": ours.batch,
        r"Algorithm 2 with its ([\d,]+) steps, (\d+) digits": (Sampling().steps, Sampling().n)}


def test_the_figures_of_the_pages_are_the_code_s():
    """Pages: every figure that a formula or a default gives, rounded as it is printed; the charts
    of A1 and A2.
    """
    for words, values in figures().items():
        assert re.search(words, ALL), words
        for place in re.finditer(words, ALL):
            shown = [group.replace(",", "") for group in place.groups() if group]
            assert shown == [f"{value:.{len(each.partition('.')[2])}f}" for each, value in zip(
                shown, np.atleast_1d(values), strict=True)], words
    assert value_of(re.search(r"\$w = (s - 1)\$", ALL)[1], dict(s=1.5)) == 0.5         # of guidance
    ours, paper = PRESETS["digits"], PRESETS["cifar10"]         # in words, and no parameter counts
    assert (ours.num_groups, paper.num_groups, paper.attention_resolutions, paper.dropout,
            paper.flip) == (1, 32, (16,), 0.1, True)
    least, _ = evaluate.least_loss(*load(), replace(ours, num_classes=10))        # an estimate
    said = float(re.search(r"digits about (0\.\d+) is the least", ALL)[1])
    assert said == pytest.approx(least, 0.05)
    chart = re.search(r'"A1 \(blue\) and A2 \(red\)"\n(.*?)```', READING, re.S)[1]
    t, *lines = (np.array(ast.literal_eval(line)) for line in re.findall(r"\[.*\]", chart))
    computed = posterior.A1(t, ddpm.linear()), posterior.A2(t, ddpm.linear())
    np.testing.assert_allclose(lines, computed, atol=5.1e-7)


def test_a_measured_figure_is_one_figure():
    """Pages: what was measured and stands twice: bits, seconds, Fréchet distances."""
    bits = re.findall(r"(\d\.\d\d) against (\d\.\d\d)", ALL) + re.findall(
        r"default run: at most (\d\.\d\d) bits.*? (\d\.\d\d) with", ALL)
    assert len(bits) == 3 and len({*bits}) == 1
    _, *training, _ = zip(*rows_of(MEASURED, "Training")[:3])
    samplers = {options: figures for options, *figures, _ in rows_of(MEASURED, "Samplers")}
    assert [row[1::2] for row in rows_of(README, "Measured")] == [
        [", ".join(column) for column in training],
        samplers["none: Algorithm 2"], samplers["`--sampler dpm --steps 20`"]]


# ── Formulas: what a page says, what a docstring says, what is computed ───────────────────────────

LATEX = [(r"\\(big|Big)\b|\\(mathrm|mathcal|text)\b|\\(?=min\b|ln\b|log\b)", ""),
         (r"\\bar\\alpha", "ᾱ"), (r"\\tilde\\beta", "β̃"), (r"\\tilde\\mu", "μ̃"),
         (r"\\hat x", "x̂"), (r"\\mathbb E", "E"), (r"\\sqrt", "√"), (r"\\mid\b", "|"),
         (r"\\[lr]?Vert", "‖"), (r"\\nabla", "∇"), (r"\\le\b", "≤"), (r"-", "−"), ("²", "^2"),
         ("½", "1/2"), *((rf"\\{name}", letter) for name, letter in dict(
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


LINES = {
    train.algorithm_1: "1: repeat 2: x_0 ~ q(x_0) 3: t ~ Uniform({1, …, T}) (not the paper's) "
                       "4: ε ~ N(0, I) 5: take a gradient descent step on "
                       "∇_θ ‖ε − ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t)‖² 6: until converged",
    sample.algorithm_2: "1: x_T ~ N(0, I) 2: for t = T, …, 1 do "
                        "3: z ~ N(0, I) if t > 1, else z = 0 "
                        "4: x_{t−1} = (x_t − β_t/√(1−ᾱ_t) ε_θ(x_t, t))/√α_t + σ_t z "
                        "5: end for 6: return x_0, the last one"}


@pytest.mark.parametrize("algorithm", LINES)
def test_the_algorithms_in_the_readme_are_the_source_and_the_paper_s(algorithm):
    """Algorithm 1, Algorithm 2: what the README shows is the function, without its docstring; its
    comments are the paper's lines.
    """
    source = re.sub(r'(?s)    """.*?"""\n', "", inspect.getsource(algorithm))
    assert source.strip() in fenced(README, "python")
    assert " ".join(re.findall("# (.*)", source)).split() == LINES[algorithm].split()


def test_every_equation_is_in_the_reading_guide():
    """Ho (1) to (16), N1 to N8 and V1 to V14 stand in its table; the articles' words before each
    formula in theirs; Ho (1) to (26), algorithms and appendices in that of the sections.
    """
    articles = [f"N{k}" for k in range(1, 9)] + [f"V{k}" for k in range(1, 15)]
    assert [row[0] for row in rows_of(PAGES["ARTICLES"], "Formula by formula")] == articles
    equations = tags(" ".join(row[0] for row in rows_of(READING, "Every equation")))
    assert equations == {f"Ho {k}" for k in range(1, 17)} | {*articles}
    sections = " ".join(row[0] for row in rows_of(READING, "The paper, section by section"))
    ranges = re.findall(r"\((\d+)\)(?: to \((\d+)\))?", sections)
    assert {k for first, last in ranges for k in range(int(first), int(last or first) + 1)} == {
        *range(1, 27)}
    assert {"appendix A", "appendix B", "appendices C"} <= {*re.findall(r"append\w+ \w", sections)}
    assert re.search("algorithms 1 and 2.*algorithms 3 and 4", sections)


def test_the_formulas_of_the_reading_guide_are_those_of_the_docstrings():
    """READING: each formula is its function's, symbol by symbol, and so are its tags."""
    of_page, of_docstring = {}, {}
    for equation, cell in rows_of(READING, "Every equation"):
        equation, (code, proof) = equation.split("<br>")[0], cell.split("<br>")
        assert re.fullmatch(r"\[.*\]\((support/)?test_\w+\.py#L\d+\)", proof), proof
        name, file = re.search(r"\[`(\w+)`\]\((\w+)\.py", code).groups()
        docstring = inspect.getdoc(getattr(importlib.import_module(file), name))
        said = tags(re.match(r"\*\*.*?\*\*|", equation)[0])
        of_page[name] = of_page.get(name, set()) | said
        of_docstring[name] = tags(docstring.split("\n")[0])
        latex = plain(", ".join(re.findall(r"\$(.*?)\$", equation)))
        assert latex in plain(docstring) or name in (            # these docstrings have it in words
            "scaled_step", "linear", "reverse_step", "reverse_variance", "trajectory_bound",
            "trajectory_terms"), (name, latex)
    assert of_page == of_docstring and len(of_page) > 35


@proved
def test_five_names_of_one_prediction(schedule, t, x0, other, x_t):
    """READING: ε, x̂_0, the score, v and the velocity of flow matching: each is what its row says,
    leads back to x_0, and has its squared error; and the straight path is x_t, scaled.
    """
    a, s = schedule.alpha_bar[t] ** 0.5, schedule.one_minus_alpha_bar[t] ** 0.5
    both = [dict(a=a, s=s, x_t=x_t, x0=each, eps=ddpm.eps_from_x0(x_t, t, each, schedule))
            for each in (x0, other)]
    snr, rows = ddpm.snr(t, schedule), rows_of(READING, "One prediction, five names")
    assert len(rows) == 5
    for name, (_, definition, back, weight) in zip(("eps", "x0", "score", "v", "u"), rows):
        definition, back, weight = (cell.strip("`") for cell in (definition, back, weight))
        found, theirs = (eval(definition, names) for names in both)
        assert eval(back, both[0] | {name: found}) == x0, name
        assert (found - theirs) ** 2 == eval(weight, dict(snr=snr, s=s)) * (x0 - other) ** 2, name
    r = s / (a + s)
    assert (1 - r) * x0 + r * both[0]["eps"] == x_t / (a + s)
