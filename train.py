"""Algorithm 1: teach a network to predict the noise in an image.               N6, N7, V13, Ho (14)

`python train.py` trains on the digits in assets/ and draws new ones into out/, with the average of
its weights.  `--data PATH` takes other images, `--resume` continues a stopped run, `torchrun
--nproc_per_node=N train.py` uses N devices.
"""
import support                             # first: Ctrl-C while the rest is imported is quiet
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

import evaluate
from ddpm import Schedule, l_simple, q_sample
from sample import draw_images
from support import console, data, devices, pictures
from support.config import Config, Sampling, Training, named, options
from support.run import Run, lock, open_run

LOG_EVERY = 10              # steps; to read a loss is to wait for the device


# ── Algorithm 1 ───────────────────────────────────────────────────────────────────────────────────

def algorithm_1(run: Run, eps_theta: Callable, next_batch: Callable,
                schedule: Schedule) -> Iterator[torch.Tensor]:
    """Yields the loss of each step; the caller decides when to stop                     Algorithm 1

    Lines without a number are not in the paper: the rate, the norm's limit, the average.
    run: its network, average and optimizers are changed in place.  next_batch(step) → (x_0, label).
    eps_theta(x_t, t, label): the network's prediction of ε.  schedule: its tables on the device.
    """
    net, config, T = run.net, run.config, schedule.T
    while True:                                           # 1: repeat
        step = run.step + 1
        rng = run.rng(step)
        set_rates(run.optimizers, lr_scale(step, config))

        x0, label = next_batch(step)                      # 2:   x_0 ~ q(x_0)
        t = torch.randint(1, T + 1, x0.shape[:1],         # 3:   t ~ Uniform({1, …, T})
                          generator=rng, device=rng.device)
        t = stratified(t, T) if config.stratified else t  #      (not the paper's)
        eps = torch.randn(x0.shape,                       # 4:   ε ~ N(0, I)
                          generator=rng, device=rng.device)
        x_t = q_sample(x0, t.reshape(-1, 1, 1, 1), eps, schedule)
        loss = l_simple(eps, eps_theta(x_t, t, label))    # 5:   take a gradient descent step on
        net.zero_grad()                                   #      ∇_θ ‖ε − ε_θ(√ᾱ_t x_0 +
        loss.backward()                                   #                   √(1−ᾱ_t) ε, t)‖²
        nn.utils.clip_grad_norm_(net.parameters(), config.grad_clip)
        for optimizer in run.optimizers:
            optimizer.step()

        update_ema(run.ema, net, step, config.ema_decay)
        run.step = step
        yield loss.detach()                               # 6: until converged


def stratified(t: torch.Tensor, T: int) -> torch.Tensor:
    """t_k ← 1 + ⌊(k T + t_k − 1)/n⌋, k = 0, …, n − 1: one t from each n-th of 1..T

    Over all k and t_k the numbers k T + t_k − 1 are 0, …, n T − 1, each once, and n of them give
    each t: a t of the batch is as uniform as before.  The mean loss over one from each part has the
    same expectation as over n independent ones, and varies less.
    >>> stratified(torch.tensor([1, 1, 10, 10]), 10)
    tensor([ 1,  3,  8, 10])
    """
    k = torch.arange(len(t), device=t.device)
    return 1 + (k * T + t - 1) // len(t)


def lr_scale(step: int, config: Config) -> float:
    """min(1, step/warmup) · (1 − (step − 1)/steps), the second factor only with `decay`.

    >>> [lr_scale(step, Config(steps=4, warmup=3)) for step in (1, 2, 3, 4)]
    [0.333333, 0.5, 0.5, 0.25]
    """
    rise, fall = min(1.0, step / config.warmup), 1 - (step - 1) / config.steps
    return rise * fall if config.decay else rise


def set_rates(optimizers: list[torch.optim.Optimizer], scale: float):
    """Each optimizer's learning rate is the one that it began with, times scale."""
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * scale


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, step: int, decay: float):
    """θ_ema ← d θ_ema + (1 − d) θ,  d = min(decay, (1 + step)/(10 + step))

    Until d reaches `decay` (0.999 after 8,990 steps: not in the default 2,000) the average spans
    the latest tenth of the steps.  A constant 0.999 would still give the random weights at the
    start a share of 0.135 after 2,000.
    """
    d = min(decay, (1 + step) / (10 + step))
    for average, weight in zip(ema.parameters(), net.parameters()):
        average.lerp_(weight, 1 - d)


def batches(images: np.ndarray, labels: np.ndarray | None, config: Config,
            device: torch.device) -> Callable:
    """next_batch(step) → x_0 ~ q(x_0), (B, C, H, W) in [-1, 1], and labels (B,) or None.

    The images are those that are not held out; of several processes each draws its own.  With
    probability p_uncond the label num_classes, for "no label", takes the place of an image's own.
    """
    training, _ = data.split(len(images))
    rank, world = devices.processes()
    share, async_copy = config.batch // world, device.type == "cuda"   # MPS would read it too late

    def next_batch(step):
        seed = devices.seed_from("data", config.seed, step, rank)
        rng = torch.Generator().manual_seed(seed)                                     # on the host
        rows = training[torch.randint(len(training), (share,), generator=rng).numpy()]
        mirrored = torch.rand(share, generator=rng) < 0.5
        dropped = torch.rand(share, generator=rng) < config.p_uncond
        pixels = torch.from_numpy(images[rows])
        if config.flip:
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(2), pixels)
        x0 = data.to_batch(pixels.to(device, non_blocking=async_copy))
        if labels is None:
            return x0, None
        label = torch.where(dropped, config.num_classes, torch.from_numpy(labels[rows]))
        return x0, label.to(device, non_blocking=async_copy)
    return next_batch


# ── The training run ──────────────────────────────────────────────────────────────────────────────

def on_device(schedule: Schedule, device) -> Schedule:
    """The float64 tables of ddpm.py, cast to float32 once, where each image looks up its own t."""
    return Schedule(*(torch.tensor(table).to(torch.float32).to(device) for table in schedule))


def predictor(run: Run, compile: bool) -> Callable:
    """eps_theta(x_t, t, label): the run's network; DDP averages the gradients of all processes."""
    net, config = run.net, run.config
    launch = nn.parallel.DistributedDataParallel(net) if devices.processes()[1] > 1 else net
    if compile:
        launch = torch.compile(launch)
    elif launch is net:
        launch = devices.graphed(net, run.device, config.batch, config, config.num_classes > 0)

    def eps_theta(x_t, t, label):
        with devices.autocast(run.device, config.float32):
            return launch(x_t, t) if label is None else launch(x_t, t, label)
    return eps_theta


def train(run: Run, images: np.ndarray, labels: np.ndarray | None, folder: Path,
          compile: bool = False) -> int:
    """Take steps until all are done, or a signal asks to stop; returns that signal, or 0."""
    if run.step >= run.config.steps:                # a complete run, whose picture may be missing
        draw_samples(run, folder)
        return 0
    config, losses = run.config, []
    report = reporter(run, evaluate.held_out_loss(run.ema, config, images, labels))
    # each fifth of the run, or each 5,000 steps if that is sooner, and always with a log entry
    save_every = LOG_EVERY * max(1, min(config.steps // 5, 5000) // LOG_EVERY)
    schedule = on_device(run.schedule, run.device)
    next_batch = batches(images, labels, config, run.device)
    for loss in algorithm_1(run, predictor(run, compile), next_batch, schedule):
        losses.append(loss)
        done = run.step == config.steps
        if run.step % LOG_EVERY and not done:
            continue
        saving = done or run.step % save_every == 0
        stop = report(losses, saving)
        losses = []
        if saving or stop:
            run.save(folder, draw_samples if done or not stop else None)
        if done or stop:
            return 0 if done else stop


def reporter(run: Run, held_out_loss: Callable) -> Callable:
    """report(losses, saving): log their mean over all processes and, when saving, the average's
    loss on held-out images; print one line.  Returns the signal that asks any to stop, or 0.
    """
    (rank, world), device, signals = devices.processes(), run.device, []
    console.on_stop(signals.append)                          # noted here, and acted on after a step
    progress = console.Progress(run.config.steps, run.step, run.config.batch)
    known = [held_out for _, _, held_out in run.log if not np.isnan(held_out)]

    def report(losses, saving):
        loss = devices.over_all(torch.stack(losses).mean(), device).item() / world
        if not np.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {run.step}: a smaller --lr or --muon-lr "
                             "may help")
        held_out = held_out_loss() if saving and rank == 0 else np.nan
        run.log.append((run.step, loss, held_out))
        known.extend([] if np.isnan(held_out) else [held_out])
        try:
            progress(run.step, f"step {run.step} of {run.config.steps} · loss {loss:.4f}"
                     + (f" · held out {known[-1]:.4f}" if known else ""))
        except OSError:                  # stdout is closed, as by `| head`: a stop like Ctrl-C
            signals.append(console.SIGPIPE)
        return int(devices.over_all(max(signals, default=0), device, largest=True))
    return report


def draw_samples(run: Run, folder: Path):
    """100 images, drawn with the average of the weights in 10 steps of dpm; labels in order."""
    rank, world = devices.processes()
    if rank == 0:
        config, classes = run.config, run.config.num_classes
        sampling = Sampling("dpm", steps=10, batch=config.batch // world)
        label = np.arange(100) * classes // 100 if classes else None
        sheet = pictures.image_grid(draw_images(run.ema, config, sampling, label)[-1], columns=10)
        pictures.write_png(folder / f"step-{run.step:06}.png", sheet)


def announce(run: Run, images: np.ndarray, labels: np.ndarray | None):
    """What is about to happen, and what loss to expect."""
    config, (training, held_out) = run.config, data.split(len(images))
    some = images[training[:100]]
    l_T = evaluate.bits_of_x_T(some, run.schedule)
    verdict = "x_T is noise" if l_T < 0.01 else (
        "x_T IS NOT YET NOISE: take more steps, or larger betas")
    least, known = evaluate.least_loss(images, labels, config)
    world = devices.processes()[1]
    print(f"device    {run.device}, {devices.precision(run.device, config.float32)}"
          f"{f', {world} processes' if world > 1 else ''}")
    print(f"images    {len(training)} of {'x'.join(map(str, images.shape[1:]))} to train on, "
          f"{len(held_out)} held out, {config.num_classes or 'no'} labels, "
          f"pixels {some.min()} .. {some.max()}")
    for c in set(range(config.num_classes)) - set([] if labels is None else labels[training]):
        print(f"          label {c} has no image to train on: all of its images are held out")
    print(f"network   {sum(p.numel() for p in run.net.parameters()):,} parameters")
    print(f"schedule  {config.schedule}, T = {config.T}: L_T = {l_T:.3g} bits/dim ({verdict})")
    print(f"loss      1 for a network that predicts no noise; {least:.4f}, the least there is for "
          f"{known} of\n          these images, for one that draws nothing but copies of them\n")


def arguments():
    return options("Train a denoising diffusion model; by default, on digits.", Training, Config)


def main():
    how, settings = named(arguments(), Training, Config)
    asked = Training(**how)
    out = Path(asked.out)
    device = devices.start_processes(asked.device, asked.deterministic)
    if "preset" in how:
        settings["preset"] = asked.preset
    with lock(out):
        run, images, labels = open_run(out, device, settings, asked.resume, asked.from_)
        announce(run, images, labels)
        stopped = train(run, images, labels, out, asked.compile)
    if stopped:
        print(f"\nstopped and saved at step {run.step}; "
              f"to resume: python train.py --resume --out {console.quoted(out)}")
        raise SystemExit(128 + stopped)
    print(f"\ndrawn: {out}/step-{run.step:06}.png\n"
          "beside it: checkpoint.safetensors, network.safetensors, log.csv\n"
          f"next: python sample.py --weights {console.quoted(out / 'checkpoint.safetensors')}")


if __name__ == "__main__":
    console.run_script(main)
