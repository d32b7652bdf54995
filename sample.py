"""Algorithm 2, faster samplers, guidance and completion.         N4, N8, DDIM, DPM, CFG, completion

Images are PyTorch tensors (B, C, H, W), on any device; a schedule is ddpm.py's, and each formula of
ddpm.py and posterior.py is that of NumPy's arrays too.  Down to "The command" this file needs those
two, and nothing else of the repository.

`python sample.py` is Algorithm 2, with x̂_0 clipped as in its authors' code: it draws 100 digits
with the average of the weights in your last checkpoint, or else in the file that ships.
`python sample.py --sampler dpm --steps 20` does so in two seconds.
"""
if __name__ == "__main__":
    import support                         # first: Ctrl-C while the rest is imported is quiet
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

import ddpm
from posterior import beta_tilde, reverse_step, reverse_variance


# ── Algorithm 2 ───────────────────────────────────────────────────────────────────────────────────

def algorithm_2(eps_theta: Callable, schedule: ddpm.Schedule, sigma2: np.ndarray,
                noise: Callable, x_t: torch.Tensor | None = None,
                start: int | None = None) -> Iterator:
    """x_T, x_{T−1}, …, x_0                                                    Algorithm 2, N4, N8

    eps_theta(x_t, t) → ε_θ.  sigma2: σ_t², t = 0..T.  noise() → a fresh ε ~ N(0, I).
    With a given x_t and its t, `start`, it goes on from there: x_t, x_{t−1}, …, x_0.
    >>> schedule, one = ddpm.schedule_of([0.36, 0.36]), lambda: torch.ones(1)
    >>> walk = algorithm_2(lambda x_t, t: 0, schedule, schedule.beta, one)
    >>> [x_t.item() for x_t in walk]    # √α_t = 0.8, σ_t = 0.6: 1, 1/0.8 + 0.6, 1.85/0.8
    [1.0, 1.85, 2.3125]
    """
    x_t = noise() if x_t is None else x_t       # 1: x_T ~ N(0, I)
    yield x_t
    start = schedule.T if start is None else start
    for t in range(start, 0, -1):               # 2: for t = T, …, 1 do
        z = noise() if t > 1 else 0             # 3:   z ~ N(0, I) if t > 1, else z = 0
        # 4:   x_{t−1} = (x_t − β_t/√(1−ᾱ_t) ε_θ(x_t, t))/√α_t + σ_t z
        x_t = reverse_step(x_t, eps_theta(x_t, t), t, z, sigma2[t], schedule)
        yield x_t                               # 5: end for
    # 6: return x_0, the last one


def x0_predictor(eps_theta: Callable, schedule: ddpm.Schedule, clip: bool = True) -> Callable:
    """x̂_0(x_t, t) = (x_t − √(1−ᾱ_t) ε_θ(x_t, t))/√ᾱ_t, with clip kept in [-1, 1]           Ho (15)

    >>> x0_predictor(lambda x_t, t: 0, ddpm.schedule_of([0.36]))(torch.tensor([0.4, 2.0]), 1)
    tensor([0.5, 1.0])
    """
    def x0_theta(x_t, t):
        x0 = ddpm.x0_from_eps(x_t, t, eps_theta(x_t, t), schedule)
        return x0.clamp(-1, 1) if clip else x0
    return x0_theta


def clipped(eps_theta: Callable, schedule: ddpm.Schedule) -> Callable:
    """ε = (x_t − √ᾱ_t x̂_0)/√(1−ᾱ_t) for x̂_0 kept in [-1, 1]                               Ho (15)

    The ε for which Ho (15) gives the clipped x̂_0; in Ho (11) it gives the mean (7) at that x̂_0.
    Algorithm 2 has no such line; its authors' code has.
    >>> clipped(lambda x_t, t: 0, ddpm.schedule_of([0.36]))(torch.tensor([2.0]), 1)
    tensor([2.0])
    """
    x0_theta = x0_predictor(eps_theta, schedule)
    return lambda x_t, t: ddpm.eps_from_x0(x_t, t, x0_theta(x_t, t), schedule)


def image_noise(seed: int, indices: range, shape: tuple, device) -> Callable:
    """noise() → z ~ N(0, I), (len(indices), *shape).

    Each image has a stream of its own: its noise is the same in any batch and on any device.
    """
    streams = [np.random.default_rng((seed, i)) for i in indices]

    def draws():
        while True:                               # ten at a time: a GPU waits less for the host
            z = [stream.standard_normal((10, *shape), dtype=np.float32) for stream in streams]
            yield from torch.from_numpy(np.stack(z, axis=1)).to(device)
    return partial(next, draws())


# ── Fewer steps ───────────────────────────────────────────────────────────────────────────────────
# With all T steps the schedule is the paper's.  With fewer it is respaced: t numbers the steps that
# remain, ᾱ_{t−1} is the level that the next one starts from, and β_t = 1 − ᾱ_t/ᾱ_{t−1}.

def times(T: int, steps: int) -> np.ndarray:
    """τ_i = max(i, T (i/N)²), i = 0, …, N, rounded                                            DDIM

    Most of the N = steps lie where little noise is left, because fine detail appears there.  Song
    et al. (2020), appendix D.2, take ⌊c i²⌋; rounding, and keeping all times distinct, is ours.
    >>> times(1000, 5)
    array([   0,   40,  160,  360,  640, 1000])
    """
    i = np.arange(steps + 1)
    return np.maximum(i, np.rint(T * (i / steps) ** 2).astype(int))


def respaced(schedule: ddpm.Schedule, tau: np.ndarray) -> ddpm.Schedule:
    """β = 1 − ᾱ_t/ᾱ_s for neighbours s < t of τ: the same noise levels in fewer steps.   DDIM

    Nichol and Dhariwal (arXiv:2102.09672), section 4.
    tau: 0 = τ_0 < τ_1 < … < τ_N ≤ T → a schedule of N steps whose ᾱ_k is the old one's at τ_k.
    Raises ValueError when the times do not begin at 0, do not increase or go beyond T.
    >>> respaced(ddpm.schedule_of([0.5, 0.5, 0.5]), [0, 1, 3]).beta
    array([0.  , 0.5 , 0.75])
    """
    tau = np.asarray(tau)
    if tau[0] != 0 or np.any(np.diff(tau) < 1) or tau[-1] > schedule.T:
        raise ValueError(f"times must increase from 0 to at most {schedule.T}, not {tau.tolist()}")
    # ln ᾱ_t/ᾱ_s is the sum of ln α_u, s < u ≤ t: so no digits are lost
    log_alpha = np.add.reduceat(np.log1p(-schedule.beta[:tau[-1] + 1]), [0, *(tau[:-1] + 1)])
    return ddpm.Schedule(-np.expm1(log_alpha), np.exp(log_alpha),
                         schedule.alpha_bar[tau], schedule.one_minus_alpha_bar[tau])


def ddim_step(x_t, t, x0, z, schedule, eta=0.0):
    """x_{t−1} = √ᾱ_{t−1} x̂_0 + √(1−ᾱ_{t−1}−σ²) ε_θ + σ z         DDIM: Song et al. (2020) (12, 16)

    σ² = η² β̃_t: η = 0 adds no noise, η = 1 is Ho (6, 7).  ε_θ is that of x0, by Ho (15).
    Song's α_t is Ho's ᾱ_t.
    >>> ddim_step(1.0, 2, 0.5, 9.0, ddpm.schedule_of([0.5, 0.5]))
    0.965926
    """
    sigma2 = eta ** 2 * beta_tilde(t, schedule)
    rest = max(schedule.one_minus_alpha_bar[t - 1] - sigma2, 0)            # rounding can go below 0
    eps = ddpm.eps_from_x0(x_t, t, x0, schedule)
    return (ddpm.sqrt(schedule.alpha_bar[t - 1]) * x0 + ddpm.sqrt(rest) * eps
            + ddpm.sqrt(sigma2) * z)


def dpm_step(x_t, t, x0, x0_prev, z, schedule, eta=0.0):
    """DDIM's step to D = x̂_0 + (x̂_0 − x̂_prev) (λ_{t−1} − λ_t)/(2 (λ_t − λ_{t+1}))  DPM-Solver++

    Its 2M, Lu et al. (2022), arXiv:2211.01095: λ = ln(√ᾱ/√(1−ᾱ)) = ½ ln SNR.  D is x̂_0 as it will
    be half a step ahead, on the line through the two latest predictions.  η = 1 is the solver's
    SDE form.
    In the first step x̂_0 has no predecessor, in the last λ_0 is infinite, as is λ_{t+1} where
    ᾱ_{t+1} rounds to 0: there D = x̂_0.
    >>> dpm_step(1.0, 2, 0.5, 0.25, 9.0, ddpm.schedule_of([0.5, 0.5, 0.5]))
    1.0
    """
    if x0_prev is None or t == 1 or schedule.alpha_bar[t + 1] == 0:
        return ddim_step(x_t, t, x0, z, schedule, eta)
    ahead, now, past = (np.log(ddpm.snr(i, schedule)) / 2 for i in (t - 1, t, t + 1))       # λ
    D = x0 + (x0 - x0_prev) * ((ahead - now) / (2 * (now - past)))
    return ddim_step(x_t, t, D, z, schedule, eta)


def ddim(x0_theta: Callable, schedule: ddpm.Schedule, eta: float, noise: Callable,
         x_t: torch.Tensor | None = None, start: int | None = None,
         multistep: bool = False) -> Iterator:
    """x_T, …, x_0 as algorithm_2 has them, by ddim_step; with multistep, by dpm_step.

    x0_theta(x_t, t) → x̂_0.  dpm_step without a predecessor of x̂_0 is ddim_step.
    """
    x_t, x0_prev = noise() if x_t is None else x_t, None
    yield x_t
    for t in range(schedule.T if start is None else start, 0, -1):
        z = noise() if t > 1 else 0
        x0 = x0_theta(x_t, t)
        x_t = dpm_step(x_t, t, x0, x0_prev, z, schedule, eta)
        x0_prev = x0 if multistep else None               # with no predecessor, the step is DDIM's
        yield x_t


# ── Guidance and completion ───────────────────────────────────────────────────────────────────────

def guided(net: Callable, x_t, t, label, scale: float, null: int) -> torch.Tensor:
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


def completed(walk: Callable, known: torch.Tensor, project: Callable, schedule: ddpm.Schedule,
              noise: Callable, resample: int = 1) -> Iterator:
    """x_{t−1} + P (known_{t−1} − x_{t−1}),  known_{t−1} ~ q(x_{t−1} | known)             completion

    P = `project` is what is known: some pixels (RePaint: Lugmayr et al. 2022, arXiv:2201.09865), or
    means over blocks (ILVR: Choi et al. 2021, arXiv:2108.02938).  The rest comes from
    walk(x_t, t) → x_t, x_{t−1}, …, of which one step is taken.
    resample > 1 goes back to x_t by Ho (2) and steps again, so that known and drawn parts agree.
    >>> image, schedule = torch.ones(1), ddpm.schedule_of([0.5])
    >>> walk = lambda x_t, t: iter([x_t, 7 * x_t])
    >>> [x.item() for x in completed(walk, image, lambda x: x, schedule, lambda: 3 * image)]
    [3.0, 1.0]
    """
    x_t = noise()
    yield x_t
    for t in range(schedule.T, 0, -1):
        for again in range(resample if t > 1 else 1):
            if again:                           # x_t is x_{t−1} by now: back to t by Ho (2)
                x_t = ddpm.draw(*ddpm.q_step(x_t, t, schedule), noise())
            _, x_prev = islice(walk(x_t, t), 2)
            known_prev = ddpm.q_sample(known, t - 1, noise(), schedule)
            x_t = x_prev + project(known_prev - x_prev)
        yield x_t


# ── The command ───────────────────────────────────────────────────────────────────────────────────

WAYS = 4                    # in which each held-out image is completed, with --keep or --start


def default_weights() -> Path:
    """Your last checkpoint, or else the network that ships."""
    trained = Path("out/checkpoint.safetensors")
    shipped = Path(__file__).resolve().parent / "assets" / "digits.safetensors"
    return trained if trained.exists() else shipped


def prediction(net, config, sampling, count: int, label=None) -> tuple:
    """ε_θ(x_t, t) of the network, guided, for `count` images with their labels (count,) or None;
    and the respaced schedule: the t of this ε_θ is an index into it.
    """
    from support import config as settings, devices

    device, full = next(net.parameters()).device, settings.schedule_from(config)
    T = sampling.start or full.T
    tau = times(T, min(T, sampling.steps))                  # the t-th step stands at time τ_t
    label = None if label is None else torch.as_tensor(label, device=device)

    def predict(x_t, t):
        with devices.autocast(device, config.float32):
            if label is None:
                return net(x_t, t)
            return guided(net, x_t, t, label, sampling.guidance, config.num_classes)
    launch = devices.graphed(predict, device, count, config)

    def eps_theta(x_t, t):
        return launch(x_t, torch.full((count,), int(tau[t]), device=device))
    return eps_theta, respaced(full, tau)


def trajectory(eps_theta: Callable, schedule: ddpm.Schedule, sampling, noise: Callable,
               known: torch.Tensor | None = None) -> Iterator:
    """x_T, …, x_0 by the sampler that the settings name.

    known: images of which `sampling.keep` is kept, or which are noised to the schedule's last
    level, `sampling.start`, and taken back.
    """
    from support import drawing

    if sampling.sampler == "ddpm":
        sigma2 = reverse_variance(sampling.sigma2, schedule)
        eps_theta = clipped(eps_theta, schedule) if sampling.clip else eps_theta
        walk = partial(algorithm_2, eps_theta, schedule, sigma2, noise)
    else:
        x0_theta = x0_predictor(eps_theta, schedule, sampling.clip)
        walk = partial(ddim, x0_theta, schedule, sampling.eta, noise,
                       multistep=sampling.sampler == "dpm")
    if sampling.keep:
        project = drawing.projection(sampling.keep, *known.shape[2:])
        return completed(walk, known, project, schedule, noise, sampling.resample)
    if sampling.start:
        return walk(ddpm.q_sample(known, schedule.T, noise(), schedule))
    return walk()


@torch.no_grad()
def draw_images(net, config, sampling, labels: np.ndarray | None = None,
                known: torch.Tensor | None = None,
                progress: Callable = lambda *_: None) -> list[np.ndarray]:
    """A list of frames, one unless animated, each sampling.n images (n, H, W, C), uint8.

    In an animation each image is x_t, and below it the x̂_0 that the network sees in it.
    """
    from support.pictures import to_pictures

    n, device = sampling.n, next(net.parameters()).device
    steps = min(sampling.start or config.T, sampling.steps)
    shown = (steps - times(steps, min(steps, 40)))[::-1] if sampling.animate else [steps]
    frames = {int(k): [] for k in shown}
    for first in range(0, n, sampling.batch):
        part = range(n)[first:first + sampling.batch]
        label, original = (None if each is None else each[part.start:part.stop]
                           for each in (labels, known))
        eps_theta, schedule = prediction(net, config, sampling, len(part), label)
        x0_theta = x0_predictor(eps_theta, schedule, sampling.clip)
        noise = image_noise(sampling.seed, part, config.image_shape, device)
        for k, x_t in enumerate(trajectory(eps_theta, schedule, sampling, noise, original)):
            progress(first + len(part) * k / steps,
                     f"step {k} of {steps} · images {first + 1} to {part.stop} of {n}")
            if k in frames:
                if not torch.isfinite(x_t).all():
                    raise ValueError("some pixels are not finite: are the weights sound?  If so, "
                                     "take more --steps, or --sampler dpm")
                if sampling.animate and not sampling.keep:
                    x0 = x0_theta(x_t, steps - k) if k < steps else x_t
                    x_t = torch.cat([x_t, x0], dim=2)
                frames[k].append(to_pictures(x_t))
    return [np.concatenate(parts) for parts in frames.values()]


def arguments():
    from support.config import Sampling, options

    return options("Draw images with a trained network.", Sampling)


def known_images(sampling, config, device) -> tuple:
    """Two rows to show, held-out images and what is left of them; and each image WAYS times."""
    from support import config as settings, data, drawing, pictures

    if sampling.start > config.T:
        raise ValueError(f"--start must be 1 .. {config.T} with this network")
    originals, _ = data.held_out_images(sampling.data, config, sampling.n, sampling.n)
    known = data.to_batch(torch.from_numpy(originals).to(device))
    if sampling.keep:
        left = drawing.projection(sampling.keep, *known.shape[2:])(known)
    else:
        first_ways = range(0, WAYS * sampling.n, WAYS)
        noise = image_noise(sampling.seed, first_ways, config.image_shape, device)
        left = ddpm.q_sample(known, sampling.start, noise(), settings.schedule_from(config))
    return [originals, pictures.to_pictures(left)], known.repeat_interleave(WAYS, dim=0)


def main():
    from dataclasses import replace

    from support import config as settings, console, devices, drawing, pictures, weights

    sampling = settings.Sampling(**vars(arguments().parse_args()))
    device, out = devices.choose_device(sampling.device), Path(sampling.out)
    path = sampling.weights or default_weights()
    net, config = weights.load_network(path, device)
    if out.suffix == ".png" and config.image_shape[0] not in (1, 3):
        raise ValueError(f"images of {config.image_shape[0]} channels are no .png: name an .npz")
    labels = drawing.labels_for(sampling, config.num_classes)
    columns = drawing.columns_for(sampling, config.num_classes)
    above, known = [], None
    if sampling.keep or sampling.start:
        above, known = known_images(sampling, config, device)
        labels = None if labels is None else labels.repeat(WAYS)
        sampling = replace(sampling, n=len(known))
    steps = min(sampling.start or config.T, sampling.steps)
    print(f"{path} on {device}: {sampling.sampler}, {steps} steps"
          f"{' (there are no more)' if sampling.steps > steps else ''}")
    with pictures.atomic_write(out) as file:
        frames = draw_images(net, config, sampling, labels, known, console.Progress(sampling.n))
        if out.suffix == ".npz":
            used = labels is not None and sampling.guidance > 0 and max(labels) < config.num_classes
            np.savez_compressed(file, images=frames[-1], **dict(labels=labels) if used else {})
        else:
            rows = WAYS if above else 1                                      # one for each way
            sheets = [[*above, *(frame[way::rows] for way in range(rows))] for frame in frames]
            file.write(pictures.encode_png([pictures.image_grid(np.concatenate(sheet), columns)
                                            for sheet in sheets]))
    print(f"drawn: {out}, with --seed {sampling.seed}")


if __name__ == "__main__":
    from support.console import run_script

    run_script(main)
