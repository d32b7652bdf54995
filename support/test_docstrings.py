"""What docstrings and comments say, against what is computed: formulas read as they stand."""
import inspect
import re
from dataclasses import replace

import numpy as np
import torch

import ddpm
import posterior
import sample
import train
from support.config import PRESETS
from support.testing import FORMULAS, near, proved
from support.testing_letters import Letters
from unet import time_embedding


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
            "α_t": schedule.alpha[t], "β_t": schedule.beta[t], "½": Letters.of(0.5),
            "β̃_t": posterior.beta_tilde(t, schedule), "A1": posterior.A1(t, schedule),
            "A2": posterior.A2(t, schedule), **named}


SYMBOLS = dict(x_prev="x_{t−1}", x0="x_0", x0_hat="x̂_0", x_t="x_t", eps="ε", eps_hat="ε_θ",
               mu="μ_θ", mu_tilde="μ̃", sigma2="σ_t²", variance_0="Var x_0",
               score_t="∇ log q(x_t)")


@proved(first=2)
def test_a_docstring_s_formula_is_what_is_computed(
        schedule, t, x_prev, x0, x0_hat, x_t, eps, eps_hat, mu, mu_tilde, sigma2, variance_0,
        score_t):
    """Docstrings: the formula in the first line, read as it stands, gives what the function gives.
    """
    given = {**locals()}
    symbols = symbols_at(schedule, t, **{SYMBOLS[name]: given[name] for name in SYMBOLS})
    symbols |= {"C_t": posterior.C(t, given["sigma2"], schedule), "E[ε | x_t]": given["eps"]}
    for function in FORMULAS:
        arguments = given | (
            dict(eps=given["eps_hat"]) if function is posterior.reverse_mean else {})
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
        "ε_θ": ddpm.eps_from_x0(x_t, t, x0, schedule), "x̂_0": x0, "x̂_prev": x0_prev, "z": z,
        "η": eta, "½": 0.5, "v_1": 0.2, "v_2": 0.5, "m_1": 0.3, "m_2": -0.1, "x_t": x_t})
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
    ema, net = (torch.nn.ParameterList([torch.tensor([value])]) for value in (0.25, 0.75))
    train.update_ema(ema, net, 20, 0.9)
    d = said(train.update_ema, r"d = (.*\))", step=20, decay=0.9)
    config = replace(PRESETS["digits"], steps=40, warmup=8)
    for found, claimed in (
            (sample.ddim_step(x_t, t, x0, z, schedule, eta), said(sample.ddim_step, r"= (.*?)   ")),
            (sample.dpm_step(x_t, t, x0, x0_prev, z, schedule, eta),
             sample.ddim_step(x_t, t, D, z, schedule, eta)),
            (sample.guided(lambda x, t, c: torch.where(c > 0, label, null), one, one, one.long(),
                           1.5, 0),
             said(sample.guided, r"ε = (.*?)   ", ε_null=null, ε_label=label, s=1.5)),
            (1.5 * label - 0.5 * null,                               # their (6), with w = 0.5
             null + said(sample.guided, r"s = (1 \+ w)", w=0.5) * (label - null)),
            (x_0, said(sample.completed, r"(.*?),  known", **{"x_{t−1}": 7, "P": 0.25,
                                                              "known_{t−1}": 3})),
            (posterior.kl(0.3, 0.2, -0.1, 0.5), said(posterior.kl, r"= (½.*?\])")),
            (posterior.best_x0(np.array([[x_t]]), t, images, schedule),
             (w * images).sum() / w.sum()),
            (ddpm.cosine(9).beta[1:], [said(ddpm.cosine, r"β_t = (.*\)),", **{
                "f(t−1)": f[k - 1], "f(t)": f[k]}) for k in range(1, 10)]),
            (sample.times(1000, 20), np.rint(said(sample.times, r"τ_i = (.*?²\))", i=np.arange(21),
                                                  T=1000, N=20))),
            (time_embedding(torch.tensor([2]), 8)[0], np.r_[np.sin(2 * omega), np.cos(2 * omega)]),
            ([train.lr_scale(step, config) for step in (3, 30)], [
                said(train.lr_scale, r"^(.*?), the", step=k, steps=40, warmup=8) for k in (3, 30)]),
            (ema[0].item(), 0.25 * d + 0.75 * (1 - d)),
            (train.stratified(torch.from_numpy(draws + 1), 9),
             said(train.stratified, "← (.*?⌋)", k=draws, T=9, n=8, t_k=draws + 1)),
            (posterior.C(t, v, schedule), said(posterior.C, r"it is (.*)\.")),
            (posterior.matching_x0(1.0, 0.0, t, v, schedule),
             said(posterior.matching_x0, r"weight is (.*)\."))):
        np.testing.assert_allclose(found, claimed, rtol=1e-6)


@proved(first=2)
def test_the_posterior_is_derived_as_the_comment_says(schedule, t, x_prev, x0, x_t):
    """Ho (6, 7), V8: the comment above beta_tilde, line by line, with exact numbers."""
    comment = "\n".join(re.findall("^#(.*)", inspect.getsource(posterior), re.M))
    symbols = symbols_at(schedule, t, x_0=x0, x_t=x_t)
    exponent = re.search(r"= exp (−½ \[.*\])", comment)[1].replace("−½", "")
    P, P_again, left, right = re.search(
        r"P = (.*?) = (.*?) +\[(.*) = (.*)\]", comment).groups()
    R = re.search(r"R = (.*)", comment)[1]
    for said in (P_again, f"{P} + {left} − ({right})", "(1−ᾱ_t)/(1−ᾱ_t)" + f" ({P})"):
        assert value_of(said, symbols) == value_of(P, symbols)
    P, R = value_of(P, symbols), value_of(R, symbols)
    square, at_0 = (value_of(exponent, symbols | {"x_{t−1}": x}) for x in (x_prev, Letters.of(0)))
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
