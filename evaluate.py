"""How good is the network?  The bound on −log p(x_0), the least loss, copies.     Ho (5), V7, score

`python evaluate.py` prints for your last checkpoint the three terms of the bound of held-out
images, and how near its drawings come to the images that it was trained on.
"""
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ddpm
import posterior
from ddpm import Schedule
from sample import LAST, SHIPPED, generate, on_device, q_sample, schedule_from
from support.checkpoint import load_network
from support.config import Config, Sampling, add_options, given
from support.console import Parser, Progress, one_line_errors
from support.devices import autocast, choose_device
from support.images import (fingerprint, held_out_images, load, split, to_batch, to_pictures,
                            to_pixels)


@torch.no_grad()
def squared_errors(predict: Callable, schedule: Schedule, x0: Tensor, seed: int, each: int):
    """‖ε − ε_θ(x_t, t)‖² of `each` random images for every t > 1; x_1 and ε_θ(x_1, 1) of all.

    predict(x_t, t, i): ε_θ for images i of x0 (N, C, H, W).  Returns (T+1, each), x_1, ε_θ.
    """
    tables = on_device(schedule, x0.device)
    progress = Progress(schedule.T, first=1, images=each)
    generator = torch.Generator(x0.device).manual_seed(seed)

    def noisy(i, t):
        eps = torch.randn(x0[i].shape, device=x0.device, generator=generator)
        x_t = q_sample(x0[i], t, eps, tables)
        return eps, x_t, predict(x_t, torch.full((len(x_t),), t, device=x0.device), i)

    errors = np.zeros((schedule.T + 1, each))
    for t in range(2, schedule.T + 1):
        i = torch.randint(len(x0), (each,), device=x0.device, generator=generator)
        eps, _, eps_hat = noisy(i, t)
        errors[t] = (eps - eps_hat).square().mean((1, 2, 3)).cpu().numpy()
        progress(t, f"the bound: t = {t} of {schedule.T}")
    parts = [noisy(i, 1)[1:] for i in torch.arange(len(x0), device=x0.device).split(each)]
    return errors, *(torch.cat(part).cpu().double().numpy() for part in zip(*parts))


def bound(predict: Callable, schedule: Schedule, x0: Tensor, seed: int = 0, each: int = 32) -> dict:
    """L_T, Σ_{t>1} L_{t−1}, L_0 in bits per dimension, with Monte Carlo errors           Ho (5), V7

    L_{t−1} is estimated from `each` images for each t, L_0 from all, L_T exactly.
    Returns {variance: {term: (mean, standard error)}}, for σ_t² = β_t and β̃_t.
    """
    errors, x_1, eps_hat = squared_errors(predict, schedule, x0, seed, each)
    clean, t, terms = x0.cpu().double().numpy(), np.arange(2, schedule.T + 1), {}
    mean_0 = posterior.reverse_mean(x_1, eps_hat, 1, schedule)
    for variance in ("beta", "beta_tilde"):
        sigma2 = posterior.reverse_variance(variance, schedule)
        C_t = posterior.C(t, sigma2[t], schedule)
        constant = posterior.matching_constant(t, sigma2[t], schedule)
        matching = C_t * errors[t].mean(1) + constant
        error = np.sqrt((C_t ** 2 * errors[t].var(1, ddof=1) / each).sum())
        l_0 = posterior.L_0(clean, mean_0, sigma2[1], erfc).mean((1, 2, 3)) / np.log(2)
        terms[variance] = {
            "L_T": (posterior.bits_per_dim(posterior.L_T(clean, schedule)), 0.0),
            "L_{t-1}": (matching.sum() / np.log(2), error / np.log(2)),
            "L_0": (l_0.mean(), l_0.std(ddof=1) / np.sqrt(len(l_0)))}
    return terms


def erfc(x: np.ndarray) -> np.ndarray:
    """All pixels at once: NumPy has none, and math.erfc takes one number at a time."""
    return torch.special.erfc(torch.from_numpy(x)).numpy()


# ── The network that cannot be better, and copies ─────────────────────────────────────────────────

def least_loss(images: np.ndarray, labels: np.ndarray | None, config: Config,
               draws: int = 400) -> np.ndarray:
    """min over all ε_θ of L_simple on these images, by quarter of t: that of best_x0.         score

    images: (N, H, W, C) uint8, of which the first 10,000 are taken.  Estimated from `draws` pairs
    of image and noise, with t spread evenly over 1..T.  A network that is told the label compares
    x_t with the images of that label alone.
    """
    schedule, rng = schedule_from(config), np.random.default_rng(config.seed)
    x = to_pixels(images[:10_000].astype(np.float64)).reshape(min(len(images), 10_000), -1)
    t = 1 + np.arange(draws) * schedule.T // draws
    i, dropped = rng.integers(len(x), size=draws), rng.random(draws) < config.p_uncond
    eps = rng.standard_normal((draws, x.shape[1]))
    x_t, best = ddpm.q_sample(x[i], t[:, None], eps, schedule), np.empty_like(eps)
    label = np.zeros(len(x), int) if labels is None else labels[:len(x)]
    told = np.where(dropped, -1, label[i])
    for this in np.unique(told):
        same = x[(label == this) | (this == -1)]
        best[told == this] = posterior.best_x0(x_t[told == this], t[told == this], same, schedule)
    errors = (eps - ddpm.eps_from_x0(x_t, t[:, None], best, schedule)) ** 2
    quarter = (t - 1) * 4 // schedule.T
    return np.array([errors[quarter == q].mean() if q in quarter else np.nan for q in range(4)])


def nearest(images: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """‖x − x_i‖/√D to the nearest x_i of `training`, in pixels of [-1, 1], and its index i.

    Both uint8, (…, H, W, C): whole numbers, so the distance between equal images is exactly 0.
    """
    x, best = images.reshape(len(images), -1).astype(np.float64), []
    for part in np.array_split(training.reshape(len(training), -1), -(-len(training) // 10_000)):
        x_i = part.astype(np.float64)
        best.append((x ** 2).sum(1)[:, None] - 2 * x @ x_i.T + (x_i ** 2).sum(1))
    squared = np.concatenate(best, axis=1)
    return np.sqrt(squared.min(1) / x.shape[1]) / 127.5, squared.argmin(1)


def print_copies(net, config: Config, images: np.ndarray, held_out: np.ndarray):
    """How near drawn images come to those of the training, beside how near held-out ones do."""
    labels = torch.arange(len(held_out), device=next(net.parameters()).device)
    label = labels % config.num_classes if config.num_classes else None
    *_, x0 = generate(net, config, Sampling(), range(len(held_out)), label)
    print(f"\nDistance to the nearest of {len(images)} training images, RMS per pixel:")
    print("                         least   median    (a copy: 0)")
    for name, shown in ((f"{len(held_out)} held-out images", held_out),
                        (f"{len(held_out)} drawn images", to_pictures(x0))):
        distance = nearest(shown, images)[0]
        print(f"{name:22}{distance.min():8.4f} {np.median(distance):8.4f}")


def print_bound(path: Path, data: str | None = None, device: str | None = None):
    """The terms for at most 1000 held-out images, as the paper reports them: section 4.3."""
    device = choose_device(device)
    net, config = load_network(path, device)
    training = load(data or config.data)
    known = fingerprint(*training) == config.fingerprint
    if data is None and not known:
        raise ValueError(f"{path} was trained on other images than those that ship: name images "
                         "that it has not seen with --data")
    images, labels = held_out_images(data, config, least=2, most=1000)
    if config.num_classes and (labels is None or labels.max() >= config.num_classes):
        raise ValueError(f"the network was trained with labels 0 .. {config.num_classes - 1}; "
                         "--data has others")
    x0 = to_batch(torch.from_numpy(images).to(device))
    label = torch.from_numpy(labels).to(device) if config.num_classes else None
    print(f"{path} on {device}: {len(x0)} held-out images")

    def predict(x_t, t, i):
        with autocast(device, config.float32):
            return net(x_t, t - 1 + config.first_t, None if label is None else label[i])
    found = bound(predict, schedule_from(config), x0)
    print("\n−log p(x_0) of held-out images is at most, in bits per dimension:")
    print("sigma²        regularization L_T    matching Σ L_{t−1}   reconstruction L_0       total")
    for variance, terms in found.items():
        total = sum(mean for mean, _ in terms.values())
        error = np.sqrt(sum(error ** 2 for _, error in terms.values()))
        row = "".join(f"{mean:14.5f} ± {error:.4f}" for mean, error in terms.values())
        print(f"{variance:10} {row}{total:12.4f} ± {error:.4f}")
    print("rate = L_T + Σ L_{t−1}, distortion = L_0; ± one standard error of the estimate")
    if known:
        print_copies(net, config, split(training[0])[0], images[:100])


@one_line_errors()
def main():
    parser = Parser(description="Print the bound on -log p(x_0) of held-out images, and how near "
                                "drawn ones come to those of the training.")
    add_options(parser, Sampling, "weights", "data", "device")
    chosen = Sampling(**given(parser.parse_args(), Sampling))
    path = chosen.weights or (LAST if LAST.exists() else SHIPPED)
    print_bound(path, chosen.data, chosen.device)


if __name__ == "__main__":
    main()
