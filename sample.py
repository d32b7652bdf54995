"""Algorithm 2, faster samplers, guidance and completion.         N4, N8, DDIM, DPM, CFG, completion

PyTorch, batched, on any device; the tables come from ddpm.py in float64 and are cast once, and
test_math.py holds every step against the NumPy reference.

`python sample.py` draws a sheet of digits from your last checkpoint, or from the one that ships.
"""
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ddpm import Schedule, cosine, linear, respaced, snr, times
from posterior import beta_tilde
from support.checkpoint import load_network
from support.config import DIGITS, Config, Sampling, add_options, given
from support.console import Parser, one_line_errors
from support.devices import autocast, choose_device
from support.drawing import draw_all, image_noise, projection
from unet import UNet

LAST, SHIPPED = Path("out/checkpoint.pt"), DIGITS.with_name("digits.pt")


# ── The formulas of ddpm.py that are needed here, in PyTorch ──────────────────────────────────────
# t: one integer for all images; in q_sample and its inversions also a tensor with one for each.

def on_device(schedule: Schedule, device) -> Schedule:
    """The float64 tables of ddpm.py, cast to float32 once."""
    return Schedule(*(torch.tensor(table).to(torch.float32).to(device) for table in schedule))


def root(table: Tensor, t) -> Tensor:
    return table[t].sqrt().reshape(-1, 1, 1, 1)


def q_sample(x0, t, eps, schedule):
    """x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε                                                Ho (4), N3, V3"""
    return root(schedule.alpha_bar, t) * x0 + root(schedule.one_minus_alpha_bar, t) * eps


def x0_from_eps(x_t, t, eps, schedule):
    """x̂_0 = (x_t − √(1−ᾱ_t) ε_θ)/√ᾱ_t                                            Ho (9, 15), N5"""
    return (x_t - root(schedule.one_minus_alpha_bar, t) * eps) / root(schedule.alpha_bar, t)


def eps_from_x0(x_t, t, x0, schedule):
    """ε = (x_t − √ᾱ_t x̂_0)/√(1−ᾱ_t)                                              Ho (9, 15), N5"""
    return (x_t - root(schedule.alpha_bar, t) * x0) / root(schedule.one_minus_alpha_bar, t)


# ── Algorithm 2 ───────────────────────────────────────────────────────────────────────────────────

def algorithm_2(step: Callable, T: int, noise: Callable) -> Iterator[Tensor]:
    """x_T, x_{T−1}, …, x_0, one after another                                   Algorithm 2, N4, N8

    step(x_t, t, z) → x_{t−1}: by Ho (11), or faster, or guided.  noise() → a fresh ε ~ N(0, I).
    """
    x_t = noise()                                               # 1: x_T ~ N(0, I)
    yield x_t
    for t in range(T, 0, -1):                                   # 2: for t = T, …, 1 do
        z = noise() if t > 1 else torch.zeros_like(x_t)         # 3:   z ~ N(0, I) if t > 1, else 0
        x_t = step(x_t, t, z)                                   # 4:   x_{t−1} = μ_θ(x_t, t) + σ_t z
        yield x_t                                               # 5: end for, 6: return x_0


def sampler_step(eps_theta, schedule, sampling, watch=lambda x0: None) -> Callable:
    """step(x_t, t, z) → x_{t−1}, for one walk: ε_θ(x_t, t), then one of the three steps below.

    clip: x̂_0 is clamped to [-1, 1] and ε_θ recomputed from it, so that Ho (11) uses it too.
    Algorithm 2 has no such line; its authors' code has.  watch: sees each x̂_0.
    """
    x0_prev = None

    def step(x_t, t, z):
        nonlocal x0_prev
        eps = eps_theta(x_t, t)
        x0 = x0_from_eps(x_t, t, eps, schedule)
        if sampling.clip:
            x0 = x0.clamp(-1, 1)
            eps = eps_from_x0(x_t, t, x0, schedule)
        watch(x0)
        if sampling.sampler == "ddpm":
            return ddpm_step(x_t, t, eps, z, schedule, sampling.variance)
        # completion changes x_{t−1} after the step, so x0_prev is not of this path: no dpm_step
        if sampling.sampler == "ddim" or sampling.keep:
            return ddim_step(x_t, t, x0, z, schedule, sampling.eta_used)
        before, x0_prev = x0_prev, x0
        return dpm_step(x_t, t, x0, before, z, schedule, sampling.eta_used)
    return step


# Where steps are skipped `schedule` is respaced: t numbers the steps that remain, ᾱ_{t−1} is the
# next level, and β_t = 1 − ᾱ_t/ᾱ_{t−1}.

def ddpm_step(x_t, t, eps, z, schedule, variance="beta"):
    """x_{t−1} = (x_t − β_t/√(1−ᾱ_t) ε_θ)/√α_t + σ_t z             Algorithm 2, Ho (1, 11), N8, V6

    variance: σ_t² is β_t ("beta") or β̃_t ("beta_tilde").
    """
    beta, alpha = schedule.beta[t], schedule.alpha[t]
    sigma2 = beta if variance == "beta" else beta_tilde(t, schedule)
    mean = (x_t - beta / schedule.one_minus_alpha_bar[t].sqrt() * eps) / alpha.sqrt()
    return mean + sigma2.sqrt() * z


def ddim_step(x_t, t, x0, z, schedule, eta=0.0):
    """x_{t−1} = √ᾱ_{t−1} x̂_0 + √(1−ᾱ_{t−1}−σ²) ε_θ + σ z         DDIM: Song et al. (2020) (12, 16)

    σ² = η² β̃_t: η = 0 adds no noise, η = 1 is Ho (6, 7).  ε_θ is that of x0, by Ho (15).
    """
    sigma2 = eta ** 2 * beta_tilde(t, schedule)
    rest = (schedule.one_minus_alpha_bar[t - 1] - sigma2).clamp(min=0)     # rounding can go below 0
    eps = eps_from_x0(x_t, t, x0, schedule)
    return schedule.alpha_bar[t - 1].sqrt() * x0 + rest.sqrt() * eps + sigma2.sqrt() * z


def dpm_step(x_t, t, x0, x0_prev, z, schedule, eta=0.0):
    """x_{t−1} = √(1−ᾱ_{t−1})/√(1−ᾱ_t) x_t − √ᾱ_{t−1} (e^{−h} − 1) D              DPM-Solver++(2M)

    Lu et al. (2022), arXiv:2211.01095: λ = ln(√ᾱ/√(1−ᾱ)) = ½ ln SNR, h = λ_{t−1} − λ_t,
    r = h_prev/h, and from the two latest x̂_0 D = (1 + 1/(2r)) x̂_0 − 1/(2r) x̂_0 prev: x̂_0 as of
    half a step ahead.
    That is DDIM's step with D for x̂_0, and so it is written; η = 1 gives the solver's SDE form.
    D = x̂_0 where λ is infinite or x̂_0 has no predecessor: in the first step, in the last, and
    after ᾱ = 0 in float32.
    """
    if x0_prev is None or t == 1 or schedule.alpha_bar[t + 1] == 0:
        return ddim_step(x_t, t, x0, z, schedule, eta)
    ahead, now, past = (snr(i, schedule).log() / 2 for i in (t - 1, t, t + 1))             # λ
    r = (now - past) / (ahead - now)
    D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_prev
    return ddim_step(x_t, t, D, z, schedule, eta)


# ── Guidance, and completion: a step around a step ────────────────────────────────────────────────

def guided(net: Callable, x_t: Tensor, t: Tensor, label: Tensor, scale: float, null: int) -> Tensor:
    """ε = ε_null + s (ε_label − ε_null)               CFG: Ho and Salimans (2022), arXiv:2207.12598

    s = 0 ignores the label, s = 1 follows it, s > 1 exaggerates it: s = 1 + w of their (6).
    """
    nothing = torch.full_like(label, null)
    if scale in (0, 1):
        return net(x_t, t, label if scale else nothing)
    both = net(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([nothing, label]))
    eps_null, eps_label = both.chunk(2)
    return eps_null + scale * (eps_label - eps_null)


def completed(step: Callable, known: Tensor, project: Callable, schedule: Schedule,
              noise: Callable, resample: int = 1) -> Callable:
    """x_{t−1} + P (known_{t−1} − x_{t−1}),  known_{t−1} ~ q(x_{t−1} | known)             completion

    P = `project` is what is known: some pixels (RePaint: Lugmayr et al. 2022, arXiv:2201.09865), or
    means over blocks (ILVR: Choi et al. 2021, arXiv:2108.02938).  The rest comes from `step`.
    resample > 1 goes back to x_t by Ho (2) and steps again, so that known and drawn parts agree:
    RePaint's Algorithm 1, jump length 1, with ᾱ_{t−1}, √(1−ᾱ_{t−1}) in line 5 and β_t in line 10.
    """
    def complete(x_t, t, z):
        for u in range(1, resample + 1):
            x_prev = step(x_t, t, z)
            x_prev = x_prev + project(q_sample(known, t - 1, noise(), schedule) - x_prev)
            if u == resample or t == 1:
                return x_prev
            x_t = schedule.alpha[t].sqrt() * x_prev + schedule.beta[t].sqrt() * noise()
            z = noise()
    return complete


# ── Whole images ──────────────────────────────────────────────────────────────────────────────────

def schedule_from(config: Config) -> Schedule:
    return (cosine(config.T) if config.schedule == "cosine"
            else linear(config.T, config.beta_1, config.beta_T))


@torch.inference_mode()
def generate(net: UNet, config: Config, sampling: Sampling, indices: range, label=None, known=None,
             watch=lambda x0: None) -> Iterator[Tensor]:
    """Walk the images `indices` from x_T to x_0; yields each x_t (B, C, H, W)           Algorithm 2

    label: (B,).  known: (B, C, H, W), of which `sampling.keep` is kept.  watch: sees each x̂_0.
    """
    device, full = next(net.parameters()).device, schedule_from(config)
    tau = times(full.T, sampling.calls(full.T))           # step t of the walk is at tau[t] of 1..T
    schedule = on_device(respaced(full, tau), device)
    noise = image_noise(sampling.seed, indices, config.image_shape, device)

    def eps_theta(x_t, t):
        time = int(tau[t]) - 1 + config.first_t      # published networks count from first_t = 0
        time = torch.full((len(x_t),), time, device=device)
        with autocast(device, config.float32):
            if label is None:
                return net(x_t, time)
            return guided(net, x_t, time, label, sampling.guidance_used, config.num_classes)

    step = sampler_step(eps_theta, schedule, sampling, watch)
    if sampling.keep:
        project = projection(sampling.keep, *known.shape[2:])
        step = completed(step, known, project, schedule, noise, sampling.resample)
    yield from algorithm_2(step, schedule.T, noise)


def arguments() -> Parser:
    return add_options(Parser(description="Draw images from a trained network."), Sampling)


def main():
    with one_line_errors():
        sampling = Sampling(**given(arguments().parse_args(), Sampling))
        device = choose_device(sampling.device)
        path = sampling.weights or (LAST if LAST.exists() else SHIPPED)
        net, config = load_network(path, device)
        tau = times(config.T, sampling.calls(config.T))[::-1]               # of x_T, …, x_0
        print(f"{path} on {device}: {sampling.sampler}, {len(tau) - 1} steps")
        draw_all(partial(generate, net, config, sampling), sampling, config, device, tau,
                 snr(tau[:-1], schedule_from(config)))


if __name__ == "__main__":
    main()
