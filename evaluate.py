"""How good is the network?  The bound on −log p(x_0), the least loss, copies.     Ho (5), V7, score

`python evaluate.py` takes your last checkpoint: it draws with the best network there can be for the
training images, and with yours, from the same noise; it prints the three terms of the bound for
held-out images, and how near what is drawn comes to the images of the training.
"""
import support                             # first: Ctrl-C while the rest is imported is quiet
import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import ddpm
import posterior
from ddpm import Schedule
from sample import default_weights, draw_images, times
from support.config import Config, Sampling, options, schedule_from
from support.console import Progress, run_script
from support.data import DIGITS, held_out_images, load, split, to_batch, to_pixels, trained_on
from support.devices import autocast, choose_device
from support.pictures import image_grid, write_png
from support.weights import load_network


# ── The bound ─────────────────────────────────────────────────────────────────────────────────────

@torch.no_grad()
def squared_errors(predict: Callable, schedule: Schedule, x0: Tensor, seed: int = 0,
                   each: int = 32) -> tuple:
    """‖ε − ε_θ(x_t, t)‖² per pixel of `each` random images, (T+1, each), and μ_θ(x_1, 1) of all.

    predict(x_t, t, i): ε_θ for images i of x0 (N, C, H, W).  At t = 1 it sees all images, and the
    row has the first of them.
    """
    rng = torch.Generator(x0.device).manual_seed(seed)
    errors = np.zeros((schedule.T + 1, each))
    progress = Progress(schedule.T, images=each)
    for t in range(schedule.T, 0, -1):
        i = torch.arange(len(x0), device=x0.device)
        if t > 1:
            i = torch.randint(len(x0), (each,), generator=rng, device=x0.device)
        eps = torch.randn(x0[i].shape, generator=rng, device=x0.device)
        x_t = ddpm.q_sample(x0[i], t, eps, schedule)
        eps_hat = predict(x_t, torch.full((len(x_t),), t, device=x0.device), i)
        errors[t] = np.resize((eps - eps_hat).square().mean((1, 2, 3)).cpu().numpy(), each)
        progress(schedule.T - t + 1, f"the bound: t = {t}")
    x_1, eps_1 = (array.cpu().double().numpy() for array in (x_t, eps_hat))
    return errors, posterior.reverse_mean(x_1, eps_1, 1, schedule)


def bound(errors: np.ndarray, mean_0: np.ndarray, x0: np.ndarray, schedule: Schedule) -> dict:
    """L_T, Σ_{t>1} L_{t−1}, L_0 in bits per dimension, with Monte Carlo errors           Ho (5), V7

    errors, mean_0: of squared_errors.  L_{t−1} is estimated from the random images for each t, L_0
    from all, L_T exactly.
    Returns {σ_t²: {term: (mean, standard error)}}, for σ_t² = β_t and β̃_t.
    """
    terms, (_, each) = {}, errors.shape
    for choice in ("beta", "beta_tilde"):
        sigma2 = posterior.reverse_variance(choice, schedule)
        C_t, matching = matching_terms(errors, sigma2, schedule)
        error = np.sqrt((C_t ** 2 * errors.var(1, ddof=1) / each).sum())
        l_0 = posterior.L_0(x0, mean_0, sigma2[1]).mean((1, 2, 3)) / np.log(2)
        terms[choice] = {
            "L_T": (posterior.bits_per_dim(posterior.L_T(x0, schedule)), 0.0),
            "L_{t-1}": (matching.sum() / np.log(2), error / np.log(2)),
            "L_0": (l_0.mean(), l_0.std(ddof=1) / np.sqrt(len(l_0)))}
    return terms


def matching_terms(errors: np.ndarray, sigma2: np.ndarray, schedule: Schedule) -> np.ndarray:
    """C_t and L_{t−1} = C_t ‖ε − ε_θ‖² + constant, t = 0..T, in nats; 0 for t < 2       Ho (12)"""
    terms, t = np.zeros((2, schedule.T + 1)), np.arange(2, schedule.T + 1)
    terms[0, t] = posterior.C(t, sigma2[t], schedule)
    terms[1, t] = posterior.matching_constant(t, sigma2[t], schedule)
    terms[1] += terms[0] * errors.mean(1)
    return terms


def rate_distortion(errors: np.ndarray, x0: np.ndarray, schedule: Schedule) -> tuple:
    """L_T + Σ_{s>t} L_{s−1}, and √(‖ε − ε_θ‖²/SNR_t): rate and distortion          Ho section 4.3

    For each t, what a receiver of x_t has been sent, in bits per dimension with σ_t² = β_t, and how
    far x̂_0 is off, the root mean square in 0..255.  Two arrays, t = 0..T; index 0 is not used.
    """
    _, matching = matching_terms(errors, posterior.reverse_variance("beta", schedule), schedule)
    sent = posterior.L_T(x0, schedule).mean() + matching.sum() - np.cumsum(matching)
    distortion = np.zeros(schedule.T + 1)
    distortion[1:] = np.sqrt(errors.mean(1)[1:] / ddpm.snr(np.arange(1, schedule.T + 1), schedule))
    return sent / np.log(2), 127.5 * distortion


def print_bound(net, config: Config, images: np.ndarray, labels: np.ndarray | None):
    """The terms for these images, and rate and distortion over t: section 4.3, figure 5."""
    device, schedule = next(net.parameters()).device, schedule_from(config)
    x0 = to_batch(torch.from_numpy(images).to(device))
    label = None if labels is None else torch.from_numpy(labels).to(device)

    def predict(x_t, t, i):
        with autocast(device, config.float32):         # in parts as large as those of the training
            return torch.cat([net(x, t[:len(x)], None if label is None else label[j])
                              for x, j in zip(x_t.split(config.batch), i.split(config.batch))])
    errors, mean_0 = squared_errors(predict, schedule, x0)
    clean = x0.cpu().double().numpy()
    print(f"\n−log p(x_0) of {len(x0)} held-out images is at most, in bits per dimension:")
    print("sigma²        regularization L_T    matching Σ L_{t−1}   reconstruction L_0       total")
    for choice, terms in bound(errors, mean_0, clean, schedule).items():
        total = sum(mean for mean, _ in terms.values())
        error = np.sqrt(sum(error ** 2 for _, error in terms.values()))
        row = "".join(f"{mean:14.4f} ± {error:.4f}" for mean, error in terms.values())
        print(f"{choice:10} {row}{total:12.4f} ± {error:.4f}")
    print("rate = L_T + Σ L_{t−1}, distortion = L_0; ± one standard error of the estimate")
    rate, distortion = rate_distortion(errors, clean, schedule)
    print("\nThe loss at each t; and for who has been sent x_t, the bits per dimension so far, and "
          "how far\nx̂_0 is off, in grey levels:\n    t  ‖ε − ε_θ‖²      rate   distortion")
    for t in times(schedule.T, min(schedule.T, 10))[:0:-1]:
        print(f"{t:5d}{errors[t].mean():12.4f}{rate[t]:10.4f}{distortion[t]:13.2f}")


def bits_of_x_T(images: np.ndarray, schedule: Schedule) -> float:
    """L_T of uint8 images, in bits per dimension: near 0 if x_T is noise             Ho (5), N2"""
    return posterior.bits_per_dim(posterior.L_T(to_pixels(images), schedule))


# ── The best network that there can be, and copies ────────────────────────────────────────────────

def least_loss(images: np.ndarray, labels: np.ndarray | None, config: Config,
               draws: int = 1000) -> tuple[float, int]:
    """min over all ε_θ of L_simple on these images, that of best_x0, and of how many of them. score

    images: (N, H, W, C) uint8, of which at most 10,000 training images are taken, and no more than
    fit into 128 MB.  Estimated from `draws` pairs of image and noise, with t spread evenly over
    1..T, and from fewer pairs of larger images.  A network that is given the label compares x_t
    with the images of that label alone.
    """
    schedule, pixels = schedule_from(config), images[0].size
    rng = np.random.default_rng(config.seed)
    chosen = rng.permutation(split(len(images))[0])[:min(10_000, max(2, 2 ** 24 // pixels))]
    draws = min(draws, max(4, 2 ** 22 // pixels))
    x = to_pixels(images[chosen]).reshape(len(chosen), -1)
    t = 1 + np.arange(draws) * schedule.T // draws
    i, dropped = rng.integers(len(x), size=draws), rng.random(draws) < config.p_uncond
    eps = rng.standard_normal((draws, pixels))
    x_t, best = ddpm.q_sample(x[i], t[:, None], eps, schedule), np.empty_like(eps)
    label = np.zeros(len(x), int) if labels is None else labels[chosen]
    given_label = np.where(dropped, -1, label[i])
    for c in np.unique(given_label):
        these, candidates = given_label == c, x[(label == c) | (c == -1)]
        best[these] = posterior.best_x0(x_t[these], t[these], candidates, schedule)
    return ddpm.l_simple(eps, ddpm.eps_from_x0(x_t, t[:, None], best, schedule)), len(x)


def held_out_loss(net, config: Config, images: np.ndarray, labels: np.ndarray | None) -> Callable:
    """() → L_simple of the network on held-out images, with the same t and ε at each call  Ho (14)

    On up to 256 of them, fewer of larger images, with t spread evenly over 1..T.  NaN if there are
    none.  Far above the loss of the training it shows images learned by heart.
    """
    chosen = split(len(images))[1][:min(256, max(1, 2 ** 22 // images[0].size))]
    schedule, rng = schedule_from(config), np.random.default_rng(config.seed)
    device, n = next(net.parameters()).device, len(chosen)
    t = 1 + np.arange(n) * config.T // max(n, 1)
    x0 = to_pixels(images[chosen]).transpose(0, 3, 1, 2)
    eps = rng.standard_normal(x0.shape)
    x_t = ddpm.q_sample(x0, t.reshape(-1, 1, 1, 1), eps, schedule)
    inputs = [torch.from_numpy(x_t).float(), torch.from_numpy(t)]
    if labels is not None:
        inputs.append(torch.from_numpy(labels[chosen]))

    @torch.no_grad()
    def loss() -> float:
        if not n:
            return float("nan")
        with autocast(device, config.float32):
            eps_hat = torch.cat([net(*(part.to(device) for part in parts)) for parts in zip(
                *(whole.split(config.batch) for whole in inputs))])
        return ddpm.l_simple(eps, eps_hat.cpu().double().numpy())
    return loss


def nearest(images: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """‖x − x_i‖/√D to the nearest x_i of `training`, in pixels of [-1, 1], and its index i.

    Both uint8, (…, H, W, C).
    """
    x, x_i = (torch.from_numpy(part).flatten(1).double() for part in (images, training))
    each = torch.cdist(x, x_i, compute_mode="donot_use_mm_for_euclid_dist")       # 0 for a copy
    distance, index = each.min(dim=1)
    return (distance / x.shape[1] ** 0.5 / 127.5).numpy(), index.numpy()


def draw_perfectly(net, config: Config, images: np.ndarray, labels: np.ndarray | None,
                   others: np.ndarray):
    """Ten images of the perfect network, the training images nearest to them, and ten of ours: from
    the same x_T and z, with the same labels.  Prints how near they come, and how near `others` do.
    """
    schedule, x = schedule_from(config), to_pixels(images.transpose(0, 3, 1, 2))
    label = np.resize(np.unique(labels), 10) if config.num_classes else None
    known = [x] * 10 if label is None else [x[labels == c] for c in label]

    def perfect(x_t, t, label=None):
        noisy, t = x_t.double().numpy(), int(t[0])
        x0 = np.concatenate([posterior.best_x0(noisy[k:k + 1], t, known[k], schedule)
                             for k in range(10)])
        return torch.from_numpy(ddpm.eps_from_x0(noisy, t, x0, schedule)).to(x_t)
    best = copy.deepcopy(net).cpu()                                # NumPy computes its ε
    best.forward = perfect
    print(f"RMS distance per pixel to the nearest of {len(images)} training images (a copy: 0):")
    rows, sampling = [], Sampling(steps=50, n=10)
    for name, network in (("others", None), ("perfect", best), ("ours", net)):
        drawn = draw_images(network, config, sampling, label)[-1] if network else others
        distance, index = nearest(drawn, images)
        print(f"{name:8}" + "".join(f"{d:7.3f}" for d in distance))
        rows += [drawn, images[index]] if network else []
    write_png("out/perfect.png", image_grid(np.concatenate(rows[:3]), columns=10))
    print("drawn: out/perfect.png: the perfect network's, the nearest training images, and ours")


def main():
    parser = options(__doc__.split("\n\n")[1], Sampling, names=("weights", "data", "device"))
    chosen = Sampling(**vars(parser.parse_args()))
    path = chosen.weights or default_weights()
    net, config = load_network(path, choose_device(chosen.device))
    most = max(2, 2 ** 21 // np.prod(config.image_shape))     # so many fit into 16 MB of float64
    images, labels = loaded = load(chosen.data or config.data, with_labels=config.num_classes > 0)
    if config.num_classes and (labels is None or labels.max() >= config.num_classes):
        raise ValueError(f"the network was trained with labels 0 .. {config.num_classes - 1}, and "
                         "these images have others")
    unseen = held_out_images(chosen.data or config.data or DIGITS, config, 2, min(1000, most),
                             loaded)
    training, others = split(len(images))
    training = np.random.default_rng(0).permutation(training)[:4 * most]
    print(f"{path} on {next(net.parameters()).device}")
    draw_perfectly(net, config, images[training], None if labels is None else labels[training],
                   images[others[:10]])
    if chosen.data is None and not trained_on(config, images):
        return print(f"no bound: {path} was trained on other images than the digits in assets/: "
                     "name some that it has not seen with --data")
    print_bound(net, config, *unseen)


if __name__ == "__main__":
    run_script(main)
