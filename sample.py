"""Algorithm 2, faster samplers, guidance and completion.         N4, N8, DDIM, DPM, CFG, completion

PyTorch, batched, on any device; test_math.py compares each step with the NumPy reference.

`python sample.py` is Algorithm 2: it draws 100 digits with the average of the weights in your last
checkpoint, or else in the file that ships.  `python sample.py --sampler dpm --steps 20` does so in
two seconds.
"""
import math
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm import Schedule, snr
from posterior import beta_tilde
from support.config import Config, Sampling, options
from support.console import Progress, run_script
from support.data import DIGITS, held_out_images, to_batch
from support.devices import autocast, choose_device, graphed
from support.drawing import image_noise, labels_for, projection
from support.forward import eps_from_x0, on_device, q_sample, schedule_from, x0_from_eps
from support.pictures import atomic_write, encode_png, image_grid, to_pictures
from support.weights import load_network
from unet import UNet

TRAINED, SHIPPED = Path("out/checkpoint.safetensors"), DIGITS.with_name("digits.safetensors")
COMPLETIONS = 4             # of each image, with --keep


# ── Algorithm 2 ───────────────────────────────────────────────────────────────────────────────────

def algorithm_2(step: Callable, T: int, noise: Callable) -> Iterator[tuple]:
    """x_T, x_{T−1}, …, x_0, each with the x̂_0 predicted on the way             Algorithm 2, N4, N8

    step(x_t, t, z, x̂_0 of the step before) → (x_{t−1}, x̂_0).  noise() → a fresh ε ~ N(0, I).
    >>> halved = algorithm_2(lambda x_t, t, z, _: (x_t / 2 + z, None), 2, lambda: torch.ones(1))
    >>> [x_t.item() for x_t, _ in halved]
    [1.0, 1.5, 0.75]
    """
    x_t, x0_hat = noise(), None                                 # 1: x_T ~ N(0, I)
    yield x_t, x0_hat
    for t in range(T, 0, -1):                                   # 2: for t = T, …, 1 do
        z = noise() if t > 1 else torch.zeros_like(x_t)         # 3:   z ~ N(0, I) if t > 1, else 0
        x_t, x0_hat = step(x_t, t, z, x0_hat)                   # 4:   x_{t−1} = μ_θ(x_t, t) + σ_t z
        yield x_t, x0_hat                                       # 5: end for, 6: return x_0


def sampler_step(eps_theta: Callable, schedule: Schedule, sampling: Sampling) -> Callable:
    """The step of Algorithm 2 that predicts ε_θ(x_t, t) and then takes one of the three below.

    clip: x̂_0 is clamped to [-1, 1], and ε computed anew so that it fits, since Ho (11) uses ε.
    Algorithm 2 has no such line; its authors' code has.
    """
    def step(x_t, t, z, x0_prev):
        eps = eps_theta(x_t, t)
        x0 = x0_from_eps(x_t, t, eps, schedule)
        if sampling.clip:
            x0 = x0.clamp(-1, 1)
            eps = eps_from_x0(x_t, t, x0, schedule)
        if sampling.sampler == "ddpm":
            return ddpm_step(x_t, t, eps, z, schedule, sampling.variance), x0
        if sampling.sampler == "ddim":
            return ddim_step(x_t, t, x0, z, schedule, sampling.eta), x0
        return dpm_step(x_t, t, x0, x0_prev, z, schedule, sampling.eta), x0
    return step


# With all T steps the schedule is the paper's.  With fewer it is respaced: t numbers the steps that
# remain, ᾱ_{t−1} is the level that the next one starts from, and β_t = 1 − ᾱ_t/ᾱ_{t−1}.

def ddpm_step(x_t, t, eps, z, schedule, variance="beta"):
    """x_{t−1} = (x_t − β_t/√(1−ᾱ_t) ε_θ)/√α_t + σ_t z             Algorithm 2, Ho (1, 11), N8, V6

    variance: σ_t² is β_t ("beta") or β̃_t ("beta_tilde").
    >>> ddpm_step(1.0, 2, 0.5, 1.0, on_device(schedule_of([0.5, 0.5]), "cpu")).item()
    1.713072
    """
    beta, alpha = schedule.beta[t], schedule.alpha[t]
    sigma2 = beta if variance == "beta" else beta_tilde(t, schedule)
    mean = (x_t - beta / schedule.one_minus_alpha_bar[t].sqrt() * eps) / alpha.sqrt()
    return mean + sigma2.sqrt() * z


def ddim_step(x_t, t, x0, z, schedule, eta=0.0):
    """x_{t−1} = √ᾱ_{t−1} x̂_0 + √(1−ᾱ_{t−1}−σ²) ε_θ + σ z         DDIM: Song et al. (2020) (12, 16)

    σ² = η² β̃_t: η = 0 adds no noise, η = 1 is Ho (6, 7).  ε_θ is that of x0, by Ho (15).
    Song's α_t is Ho's ᾱ_t.
    >>> ddim_step(1.0, 2, 0.5, 9.0, on_device(schedule_of([0.5, 0.5]), "cpu")).item()
    0.965926
    """
    sigma2 = eta ** 2 * beta_tilde(t, schedule)
    rest = (schedule.one_minus_alpha_bar[t - 1] - sigma2).clamp(min=0)     # rounding can go below 0
    eps = eps_from_x0(x_t, t, x0, schedule)
    return schedule.alpha_bar[t - 1].sqrt() * x0 + rest.sqrt() * eps + sigma2.sqrt() * z


def dpm_step(x_t, t, x0, x0_prev, z, schedule, eta=0.0):
    """x_{t−1} = √(1−ᾱ_{t−1})/√(1−ᾱ_t) x_t − √ᾱ_{t−1} (e^{−h} − 1) D              DPM-Solver++(2M)

    Lu et al. (2022), arXiv:2211.01095: λ = ln(√ᾱ/√(1−ᾱ)) = ½ ln SNR, h = λ_{t−1} − λ_t,
    r = h_prev/h, and from the two latest x̂_0 D = (1 + 1/(2r)) x̂_0 − 1/(2r) x̂_prev: x̂_0
    extrapolated by half a step.  This is DDIM's step for η = 0 with D in place of x̂_0, and η = 1
    gives the solver's SDE form.
    D = x̂_0 in the first step, where x̂_0 has no predecessor, in the last, where h is infinite, and
    after ᾱ = 0 in float32, where h_prev is infinite.
    >>> dpm_step(1.0, 2, 0.5, 0.25, 9.0, on_device(schedule_of([0.5, 0.5, 0.5]), "cpu")).item()
    1.0
    """
    if x0_prev is None or t == 1:
        return ddim_step(x_t, t, x0, z, schedule, eta)
    ahead, now, past = (snr(i, schedule).log() / 2 for i in (t - 1, t, t + 1))             # λ
    r = ((now - past) / (ahead - now)).nan_to_num(math.inf, math.inf)      # ∞ − ∞ counts as ∞ too
    D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_prev
    return ddim_step(x_t, t, D, z, schedule, eta)


# ── Fewer steps ──────────────────────────────────────────────────────────────────────────────────────

def times(T: int, steps: int) -> np.ndarray:
    """τ_i = max(i, T (i/N)²), i = 0, …, N, rounded                                            DDIM

    Most of the N = steps lie where little noise is left, because fine detail appears there.  Song
    et al. (2020), appendix D.2, take ⌊c i²⌋; rounding, and keeping all times distinct, is ours.
    >>> times(1000, 5)
    array([   0,   40,  160,  360,  640, 1000])
    """
    i = np.arange(steps + 1)
    return np.maximum(i, np.rint(T * (i / steps) ** 2).astype(int))


def respaced(schedule: Schedule, tau: np.ndarray) -> Schedule:
    """β = 1 − ᾱ_t/ᾱ_s for neighbours s < t of τ: the same noise levels in fewer steps.   DDIM

    Nichol and Dhariwal (arXiv:2102.09672), section 4.
    tau: 0 = τ_0 < τ_1 < … < τ_N ≤ T → a schedule of N steps whose ᾱ_k is the old one's at τ_k.
    Raises ValueError when the times do not begin at 0, do not increase or go beyond T.
    >>> respaced(schedule_of([0.5, 0.5, 0.5]), [0, 1, 3]).beta
    array([0.  , 0.5 , 0.75])
    """
    tau = np.asarray(tau)
    if tau[0] != 0 or np.any(np.diff(tau) < 1) or tau[-1] > schedule.T:
        raise ValueError(f"times must increase from 0 to at most {schedule.T}, not {tau.tolist()}")
    log_alpha = np.add.reduceat(np.log1p(-schedule.beta[:tau[-1] + 1]), [0, *tau[:-1] + 1])
    return Schedule(-np.expm1(log_alpha), np.exp(log_alpha),
                    schedule.alpha_bar[tau], schedule.one_minus_alpha_bar[tau])


# ── Guidance and completion ───────────────────────────────────────────────────────────────────────

def guided(net: Callable, x_t: Tensor, t: Tensor, label: Tensor, scale: float, null: int) -> Tensor:
    """ε = ε_null + s (ε_label − ε_null)                                   CFG: Ho and Salimans 2022

    Line 3 of their Algorithm 2, on both predictions at once.  null: the label that means "none".
    s = 0 ignores the label, s = 1 follows it, s > 1 exaggerates it: s = 1 + w of their (6).
    >>> guided(lambda x_t, t, label: label, torch.ones(1), torch.ones(1), torch.tensor([3]), 2, 4)
    tensor([2])
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
    RePaint's Algorithm 1 with jump length 1, with ᾱ_{t−1}, √(1−ᾱ_{t−1}) in its line 5 and β_t in
    line 10, as its authors' code has them.
    >>> image, schedule = torch.ones(1, 1, 1, 1), on_device(schedule_of([0.5]), "cpu")
    >>> step = completed(lambda x_t, *_: (x_t, None), image, lambda x: x, schedule, lambda: image)
    >>> step(7 * image, 1, 0, None)[0].item()                              # at t = 1 all is known
    1.0
    """
    def complete(x_t, t, z, x0_prev):
        for u in range(1, resample + 1):
            x_prev, x0 = step(x_t, t, z, x0_prev)
            x_prev = x_prev + project(q_sample(known, t - 1, noise(), schedule) - x_prev)
            if u == resample or t == 1:
                return x_prev, x0
            x_t = schedule.alpha[t].sqrt() * x_prev + schedule.beta[t].sqrt() * noise()
            z = noise()
    return complete


# ── Whole images ──────────────────────────────────────────────────────────────────────────────────

@torch.no_grad()
def generate(net: UNet, config: Config, sampling: Sampling, indices: range, label=None,
             known=None) -> Iterator[tuple]:
    """Algorithm 2 for the images `indices`: each x_t (B, C, H, W), with x̂_0            Algorithm 2

    label: (B,) or None.  known: (B, C, H, W), of which `sampling.keep` is kept.
    """
    device, full = next(net.parameters()).device, schedule_from(config)
    tau = times(full.T, min(full.T, sampling.steps))        # the t-th step stands at time tau[t]
    schedule = on_device(respaced(full, tau), device)
    noise = image_noise(sampling.seed, indices, config.image_shape, device)
    label = None if label is None else torch.as_tensor(label, device=device)

    def predict(x_t, t_net):
        with autocast(device, config.float32):
            if label is None:
                return net(x_t, t_net)
            return guided(net, x_t, t_net, label, sampling.guidance, config.num_classes)
    predict = graphed(predict, device, len(indices), config)

    def eps_theta(x_t, t):
        return predict(x_t, torch.full((len(x_t),), int(tau[t]), device=device))

    step = sampler_step(eps_theta, schedule, sampling)
    if sampling.keep:
        project = projection(sampling.keep, *known.shape[2:])
        step = completed(step, known, project, schedule, noise, sampling.resample)
    yield from algorithm_2(step, schedule.T, noise)


def draw_images(net: UNet, config: Config, sampling: Sampling, labels: np.ndarray | None = None,
                known: Tensor | None = None,
                progress: Callable = lambda *_: None) -> list[np.ndarray]:
    """A list of frames, one unless animated, each sampling.n images (n, H, W, C), uint8.

    In an animation each image is x_t, and below it the x̂_0 predicted on the way there.
    """
    n, steps = sampling.n, min(config.T, sampling.steps)
    shown = (steps - times(steps, min(steps, 40)))[::-1] if sampling.animate else [steps]
    frames = {int(k): [] for k in shown}
    for first in range(0, n, sampling.batch):
        part = slice(first, min(first + sampling.batch, n))
        for k, (x_t, x0) in enumerate(generate(
                net, config, sampling, range(n)[part], None if labels is None else labels[part],
                None if known is None else known[part])):
            progress(first + (part.stop - first) * k / steps,
                     f"step {k} of {steps} · images {first + 1} to {part.stop} of {n}")
            if k in frames:
                if not torch.isfinite(x_t).all():
                    raise ValueError("some pixels are not finite: are the weights sound?  If so, "
                                     "take more --steps, or --sampler dpm")
                if sampling.animate and not sampling.keep:
                    x_t = torch.cat([x_t, torch.zeros_like(x_t) if x0 is None else x0], dim=2)
                frames[k].append(to_pictures(x_t))
    return [np.concatenate(parts) for parts in frames.values()]


def arguments() -> ArgumentParser:
    return options("Draw images with a trained network.", Sampling)


def main():
    sampling = Sampling(**vars(arguments().parse_args()))
    device, out = choose_device(sampling.device), Path(sampling.out)
    path = sampling.weights or (TRAINED if TRAINED.exists() else SHIPPED)
    net, config = load_network(path, device)
    labels, known = labels_for(sampling, config.num_classes), None
    by_label = labels is not None and sampling.label == "each"
    columns = config.num_classes if by_label else math.ceil(sampling.n ** 0.5)
    if sampling.keep:
        originals, _ = held_out_images(sampling.data, config, sampling.n, sampling.n)
        known = to_batch(torch.from_numpy(originals).to(device))
        kept = to_pictures(projection(sampling.keep, *known.shape[2:])(known))
        known, columns = known.repeat(COMPLETIONS, 1, 1, 1), sampling.n
        labels = None if labels is None else np.tile(labels, COMPLETIONS)
        sampling = replace(sampling, n=len(known))
    print(f"{path} on {device}: {sampling.sampler}, {min(config.T, sampling.steps)} steps"
          f"{' (the network has no more)' if sampling.steps > config.T else ''}")
    with atomic_write(out) as file:
        frames = draw_images(net, config, sampling, labels, known, Progress(sampling.n))
        if out.suffix == ".npz":
            used = labels is not None and sampling.guidance > 0 and max(labels) < config.num_classes
            np.savez_compressed(file, images=frames[-1], **dict(labels=labels) if used else {})
        else:
            above = [originals, kept] if sampling.keep else []
            file.write(encode_png([image_grid(np.concatenate([*above, frame]), columns)
                                   for frame in frames]))
    print(f"drawn: {out}")


if __name__ == "__main__":
    run_script(main)
