"""Algorithm 1: teach a network to see the noise in an image.                   N6, N7, V12, Ho (14)

`python train.py` trains on the digits in assets/ and draws new ones into out/.  `--data PATH` takes
other images, `--resume` goes on after a stop, `torchrun --nproc_per_node=N train.py` uses N
devices, `--evaluate` prints the bound on −log p(x_0) of the images that were held out.
"""
import copy
import io
import os
import signal
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import posterior
from data import (DIGITS, Arguments, Progress, duration, load, refuse, reported, require_writable,
                  sheet, sound, split, to_bytes, to_pixels, whole_file, write_png)
from sample import (autocast, build, choose_device, generate, load_network, on_device, q_sample,
                    read_checkpoint, schedule_of)
from unet import UNet, parameters

try:
    import fcntl
except ImportError:             # Windows: there two runs in one folder go unnoticed
    fcntl = None

COMMON = dict(schedule="linear", T=1000, beta_1=1e-4, beta_T=0.02, seed=0, drop_label=0.1,
              float32=False)
PRESETS = {
    # Found by measurement: the best digits after five minutes on two cores.
    "digits": dict(width=32, multipliers=(1, 2), blocks=1, attention=(7,), dropout=0.0, groups=4,
                   patch=2, labels=True, flip=False, lr=4e-3, decay=True, beta2=0.99, warmup=100,
                   batch=64, steps=2200, ema=0.999),
    # Ho et al. (2020), appendix B: without labels.
    "cifar10": dict(width=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.1,
                    groups=32, patch=1, labels=False, flip=True, lr=2e-4, decay=False,
                    beta2=0.999, warmup=5000, batch=128, steps=800_000, ema=0.9999),
}
NETWORK = ("width", "multipliers", "blocks", "attention", "dropout", "groups", "patch")
LOOK = 50                      # steps between two looks at the loss: each look waits for the device
RESIDENT = 1 << 30              # bytes: a smaller data set moves to the device as a whole


# ── Algorithm 1 ───────────────────────────────────────────────────────────────────────────────────

def l_simple(eps_theta, x0: Tensor, t: Tensor, eps: Tensor, label: Tensor | None, schedule):
    """L_simple = ‖ε − ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t)‖²                               Ho (14), N6, N7

    Mean over pixels and images.  x0, eps: (B, C, H, W);  t: (B,), in 1..T;  label: (B,) or None.
    """
    x_t = q_sample(x0, t, eps, schedule)
    return F.mse_loss(eps_theta(x_t, t, label), eps)


def draw_t(count: int, T: int, generator: torch.Generator) -> Tensor:
    """t ~ Uniform({1, …, T}), one from each of `count` equal parts of the range.

    The expected loss is that of independent uniform t; it only varies less.
    """
    part = torch.arange(count, device=generator.device)
    u = (part + torch.rand(count, device=generator.device, generator=generator)) / count
    return (u * T).long().clamp(max=T - 1) + 1


def learning_rate(step: int, settings: dict) -> float:
    """Rises for `warmup` steps; with `decay` it falls in a straight line, at last to lr/steps."""
    rise = min(1.0, step / settings["warmup"])
    fall = 1 - (step - 1) / settings["steps"] if settings["decay"] else 1.0
    return settings["lr"] * rise * fall


def gradient_step(run: "Run", loss: Tensor):
    """Down the clipped gradient with Adam; then the average of the parameters follows a little."""
    settings = run.config["train"]
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, settings)
    run.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.net.parameters(), 1.0)
    run.optimizer.step()
    decay = min(settings["ema"], (1 + run.step) / (10 + run.step))   # early on: the latest tenth
    with torch.no_grad():
        torch._foreach_lerp_(list(run.ema.parameters()), list(run.net.parameters()), 1 - decay)


def train(run: "Run", images: np.ndarray, labels: np.ndarray | None, compile: bool = False) -> int:
    """Algorithm 1; around it are looks at the loss, pictures, checkpoints and an orderly stop.

    Returns the number of the signal that stopped it, or 0 when all steps are done.
    """
    settings, device, rank, world = run.config["train"], run.device, run.rank, run.world
    schedule = on_device(schedule_of(run.config), device)
    batch, T, shape = settings["batch"], schedule.T, (settings["batch"], *run.config["shape"])
    draw_x0 = batches(run, images, labels)
    eps_theta = DistributedDataParallel(run.net) if world > 1 else run.net
    eps_theta = torch.compile(eps_theta) if compile else eps_theta
    watch, stop = Watch(run), 0
    every = max(LOOK, min(settings["steps"] // 10, 5000))            # steps between two checkpoints

    while run.step < settings["steps"] and not stop:                   # 1: repeat
        run.step += 1
        x0, label = draw_x0()                                          # 2: x_0 ~ q(x_0)
        t = draw_t(batch, T, run.noise)[rank::world]                   # 3: t ~ Uniform({1, …, T})
        eps = torch.randn(shape, device=device, generator=run.noise)   # 4: ε ~ N(0, I)
        eps = eps[rank::world]
        with autocast(device, settings["float32"]):                    # 5: gradient step on
            loss = l_simple(eps_theta, x0, t, eps, label, schedule)    #    ∇ ‖ε − ε_θ(x_t, t)‖²
        gradient_step(run, loss)
        stop = watch(loss)                                             # 6: until converged
        if run.step % every == 0:
            save(run)
            picture(run, f"step-{run.step:06}.png")
    if run.step % every:
        save(run)
    return stop if run.step < settings["steps"] else 0


# ── Around it ─────────────────────────────────────────────────────────────────────────────────────

@dataclass
class Run:
    """All that a run is: what a checkpoint keeps, and where it takes place."""

    config: dict
    net: UNet
    ema: UNet
    optimizer: torch.optim.Optimizer
    device: torch.device
    out: Path
    rank: int                                   # which of `world` processes this is; 0 alone writes
    world: int
    choice: torch.Generator                        # images, labels and flips; on the host
    noise: torch.Generator                         # t and ε; on the device
    step: int = 0
    log: list = field(default_factory=list)        # [step, mean loss since the entry before]
    since: Tensor = None                           # the losses since the last entry, added up


def batches(run: Run, images: np.ndarray, labels: np.ndarray | None):
    """A function that draws (x_0, label): this rank's share of a batch, in [-1, 1], on the device.

    Nothing in it waits for the device, so the next batch is gathered while the device computes.
    """
    settings, device, rank, world = run.config["train"], run.device, run.rank, run.world
    resident = images.nbytes <= RESIDENT
    if resident:
        images = torch.from_numpy(np.array(images)).to(device)
    labels = None if labels is None else torch.from_numpy(labels)
    none = run.config["unet"]["labels"]

    def share(values: Tensor) -> Tensor:
        values = values[rank::world]
        if device.type == "cuda":
            values = values.pin_memory()
        return values.to(device, non_blocking=True)

    def draw():
        index = torch.randint(len(images), (settings["batch"],), generator=run.choice)
        drop = torch.rand(settings["batch"], generator=run.choice) < settings["drop_label"]
        flip = torch.rand(settings["batch"], generator=run.choice) < 0.5
        x0 = images[share(index)] if resident else share(torch.from_numpy(images[index.numpy()]))
        x0 = to_pixels(x0).permute(0, 3, 1, 2)
        if settings["flip"]:
            x0 = torch.where(share(flip)[:, None, None, None], x0.flip(3), x0)
        label = None if labels is None else share(torch.where(drop, none, labels[index]))
        return x0, label
    return draw


class Watch:
    """Looks at the loss every LOOK steps, tells, and ends a run whose loss is not a number.

    Returns the signal that asks to stop, or 0; of several processes all get the same answer.
    """

    def __init__(self, run: Run):
        self.run, self.first, self.start = run, run.step, time.monotonic()
        self.progress, self.asked = Progress(), stop_signals()

    def __call__(self, loss: Tensor) -> int:
        run, steps = self.run, self.run.config["train"]["steps"]
        run.since += loss.detach()
        stop = self.asked[0] if self.asked else 0
        if run.step % LOOK and run.step != steps:
            return stop if run.world == 1 else 0
        if run.world > 1:                                # what one rank is asked, all do; mean loss
            latest = torch.tensor(float(stop), device=run.device)
            dist.all_reduce(latest, dist.ReduceOp.MAX)
            dist.all_reduce(run.since)
            stop, run.since = int(latest), run.since / run.world
        mean = run.since.item() / (run.step - (run.log[-1][0] if run.log else 0))
        if not np.isfinite(mean):
            refuse(f"the loss is {mean} at step {run.step}; {last_good(run)}")
        run.log.append([run.step, mean])
        run.since = torch.zeros((), device=run.device)
        if run.rank == 0:
            rate = (run.step - self.first) / (time.monotonic() - self.start)
            self.progress(f"step {run.step} of {steps} · loss {mean:.4f} · "
                          f"{rate * run.config['train']['batch']:.0f} images/s · "
                          f"{duration((steps - run.step) / rate)} left", last=run.step == steps)
        return stop


def stop_signals() -> list:
    """A list, empty until SIGINT or SIGTERM asks to stop; a second one ends the process at once."""
    asked = []

    def ask(number, frame):
        if asked:
            os._exit(128 + number)
        asked.append(number)
    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return asked


def last_good(run: Run) -> str:
    path = run.out / "checkpoint.pt"
    if not path.exists():
        return "there is no checkpoint of it yet"
    return f"the last good checkpoint, of step {read_checkpoint(path)['step']}, is {path}"


def save(run: Run):
    """checkpoint.pt and log.csv, each whole or not at all; never weights that are not numbers."""
    if not all(torch.isfinite(p).all() for p in run.net.parameters()):
        refuse(f"the weights are no longer finite at step {run.step}; {last_good(run)}")
    if run.rank != 0:
        return
    random = dict(choice=run.choice.get_state(), noise=run.noise.get_state(),
                  dropout=torch.get_rng_state())
    if run.device.type == "cuda":
        random["dropout_cuda"] = torch.cuda.get_rng_state(run.device)
    buffer = io.BytesIO()
    torch.save(dict(config=run.config, step=run.step, device=run.device.type,
                    net=run.net.state_dict(),
                    ema=run.ema.state_dict(), optimizer=run.optimizer.state_dict(), random=random,
                    log=run.log, since=run.since), buffer)
    text = "step,loss\n" + "".join(f"{step},{loss!r}\n" for step, loss in run.log)
    for name, content in (("checkpoint.pt", buffer.getbuffer()), ("log.csv", text.encode())):
        try:
            with whole_file(run.out / name) as file:
                file.write(content)
        except OSError as error:
            refuse(f"{error.filename} could not be written: {error.strerror}; {last_good(run)}")


def share(run: Run):
    """network.pt: the averaged network alone, in float16, to give away or to sample from."""
    config = {key: run.config[key] for key in ("unet", "schedule", "shape", "float32")}
    ema = {name: value.half() for name, value in run.ema.state_dict().items()}
    with whole_file(run.out / "network.pt") as file:
        torch.save(dict(config=config, step=run.step, ema=ema), file)


def picture(run: Run, name: str):
    """A sheet of 100 images that the averaged network draws, its labels in order."""
    if run.rank == 0:
        labels = run.config["unet"]["labels"]
        label = torch.arange(100, device=run.device) * labels // 100 if labels else None
        *_, x0 = generate(run.ema, run.config, range(100), sampler="dpm", eta=1.0, label=label,
                          steps=min(20, run.config["schedule"]["T"]))
        write_png(run.out / name, sheet(to_bytes(x0.permute(0, 2, 3, 1).cpu().numpy()), columns=10))


# ── The bound on held-out images ──────────────────────────────────────────────────────────────────

@torch.no_grad()
def evaluate(predict, config: dict, x0: Tensor, seed: int = 0, each: int = 32) -> dict:
    """L_T, Σ_{t>1} L_{t−1}, L_0 in bits per dimension, with Monte Carlo errors           Ho (5), V7

    predict(x_t, t, i): ε_θ for images i of x0 (N, C, H, W).  Each t > 1 is estimated from `each`
    images, L_0 from all, L_T exactly.  Returns {variance: {term: (mean, error)}}, for β_t and β̃_t.
    """
    schedule, T = schedule_of(config), config["schedule"]["T"]
    tables, generator = on_device(schedule, x0.device), torch.Generator(x0.device).manual_seed(seed)

    def squared_error(i, t):
        eps = torch.randn(x0[i].shape, device=x0.device, generator=generator)
        x_t = q_sample(x0[i], t, eps, tables)
        eps_hat = predict(x_t, torch.full((len(x_t),), t, device=x0.device), i)
        return x_t, eps_hat, (eps - eps_hat).square().mean((1, 2, 3)).cpu().numpy()

    errors = np.zeros((T + 1, each))
    progress = Progress()
    for t in range(2, T + 1):
        i = torch.randint(len(x0), (each,), device=x0.device, generator=generator)
        errors[t] = squared_error(i, t)[2]
        progress(f"the bound: t = {t} of {T}", last=t == T)
    parts = [squared_error(i, 1)[:2] for i in torch.arange(len(x0), device=x0.device).split(each)]
    x_1, eps_hat = (torch.cat(part).cpu().double().numpy() for part in zip(*parts))
    clean = x0.cpu().double().numpy()

    l_T = posterior.bits_per_dim(posterior.L_T(clean, schedule))
    found, t = {}, np.arange(2, T + 1)
    for variance in ("beta", "beta_tilde"):
        sigma2 = posterior.reverse_variance(variance, schedule)
        weight = posterior.C(t, sigma2[2:], schedule)
        constant = posterior.matching_constant(t, sigma2[2:], schedule)
        spread = errors[2:].var(1, ddof=1) / each
        l_0 = posterior.L_0(clean, posterior.reverse_mean(x_1, eps_hat, 1, schedule), sigma2[1])
        l_0 = l_0.mean((1, 2, 3)) / np.log(2)
        found[variance] = {
            "L_T": (l_T, 0.0),
            "L_{t-1}": ((weight * errors[2:].mean(1) + constant).sum() / np.log(2),
                        np.sqrt((weight ** 2 * spread).sum()) / np.log(2)),
            "L_0": (l_0.mean(), l_0.std(ddof=1) / np.sqrt(len(l_0)))}
    return found


def print_bound(found: dict):
    """The terms as the paper reports them: rate and distortion, section 4.3."""
    print("\n−log p(x_0) of held-out images is at most, in bits per dimension:")
    print("sigma²        regularization L_T    matching Σ L_{t−1}   reconstruction L_0       total")
    for variance, terms in found.items():
        total = sum(mean for mean, _ in terms.values())
        error = np.sqrt(sum(error ** 2 for _, error in terms.values()))
        row = "".join(f"{mean:14.5f} ± {error:.4f}" for mean, error in terms.values())
        print(f"{variance:10} {row}{total:12.4f} ± {error:.4f}")
    print("rate = L_T + Σ L_{t−1}, distortion = L_0; ± one standard error of the estimate")


# ── The command ───────────────────────────────────────────────────────────────────────────────────

def arguments() -> Arguments:
    parser = Arguments(description="Train a denoising diffusion model; without options, on digits.")
    add = parser.add_argument
    add("--data", help="IDX files, .npz, .npy or a folder (the digits in assets/)")
    add("--out", type=Path, default=Path("out"), help="folder for checkpoint and pictures")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, exactly")
    add("--evaluate", action="store_true", help="print the bound on held-out images")
    add("--preset", choices=PRESETS, help="digits (default), or the paper's settings for cifar10")
    add("--steps", type=int)
    add("--batch", type=int, help="images a step, over all devices")
    add("--lr", type=float, help="learning rate")
    add("--schedule", choices=("linear", "cosine"))
    add("--T", type=int, help="time steps (1000)")
    add("--beta-1", type=float, help="first beta of the linear schedule (1e-4)")
    add("--beta-T", type=float, help="last beta of the linear schedule (0.02)")
    add("--seed", type=int)
    add("--device", help="cuda, mps or cpu; default: the best one here")
    add("--float32", action="store_true", default=None, help="no bfloat16, even if the device can")
    add("--deterministic", action="store_true", help="the same bits again on a GPU too; slower")
    add("--compile", action="store_true", help="torch.compile: slow to start, then faster")
    return parser


def configuration(given: dict, images: np.ndarray, labels: np.ndarray | None) -> dict:
    """All that decides what a run computes.  Raises ValueError for settings that make no sense."""
    preset = given.get("preset", "digits")
    train = COMMON | PRESETS[preset] | dict(preset=preset, data=str(DIGITS)) | given
    for name in ("steps", "batch"):
        if train[name] < 1:
            raise ValueError(f"--{name} must be at least 1, not {train[name]}")
    if not 0 < train["lr"] < np.inf:
        raise ValueError(f"--lr must be above 0, not {train['lr']}")
    if not 0 <= train["seed"] < 2**63:
        raise ValueError(f"--seed must be 0 .. 2^63 - 1, not {train['seed']}")
    if train["schedule"] == "cosine" and ("beta_1" in given or "beta_T" in given):
        raise ValueError("--beta-1 and --beta-T belong to --schedule linear")
    betas = ("T", "beta_1", "beta_T") if train["schedule"] == "linear" else ("T",)
    height, width, channels = images.shape[1:]
    config = dict(
        unet=dict(size=height, channels=channels, **{name: train.pop(name) for name in NETWORK},
                  labels=int(labels.max()) + 1 if train["labels"] and labels is not None else 0),
        schedule=dict(kind=train["schedule"], **{name: train[name] for name in betas}),
        shape=[channels, height, width], float32=train["float32"], train=train,
        images=fingerprint(images, labels))
    schedule_of(config)
    with torch.device("meta"):
        UNet(**config["unet"]).check_size(height, width)
    return config


def fingerprint(images: np.ndarray, labels: np.ndarray | None) -> list:
    """Tells one data set from another: their number, a checksum of the first and the labels."""
    first = zlib.crc32(np.ascontiguousarray(images[:1000]).tobytes())
    return [len(images), first if labels is None else zlib.crc32(labels.tobytes(), first)]


def start(config: dict, device: torch.device, out: Path, rank: int, world: int,
          checkpoint: dict | None = None) -> Run:
    """A new run, or the one that the checkpoint holds, exactly as it was."""
    settings = config["train"]
    torch.manual_seed(settings["seed"])
    if checkpoint:
        net, ema = (build(config, checkpoint[name], out) for name in ("net", "ema"))
    else:
        net = UNet(**config["unet"])
        ema = copy.deepcopy(net)
    net, ema = net.to(device), ema.to(device).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), settings["lr"], betas=(0.9, settings["beta2"]),
                                 fused=True)
    run = Run(config, net, ema, optimizer, device, out, rank, world,
              choice=torch.Generator().manual_seed(settings["seed"]),
              noise=torch.Generator(device).manual_seed(settings["seed"] + 1),
              since=torch.zeros((), device=device))
    torch.manual_seed(settings["seed"] + rank)               # dropout differs from rank to rank
    if checkpoint:
        with sound(out / "checkpoint.pt", "the checkpoint of a run"):
            optimizer.load_state_dict(checkpoint["optimizer"])
            random = checkpoint["random"]
            run.choice.set_state(random["choice"])
            run.noise.set_state(random["noise"])
            if rank == 0:
                torch.set_rng_state(random["dropout"])
                if device.type == "cuda":
                    torch.cuda.set_rng_state(random["dropout_cuda"], device)
            run.step, run.log = checkpoint["step"], checkpoint["log"]
            run.since = checkpoint["since"].to(device)
    return run


def resumed(given: dict, out: Path, device: torch.device) -> dict:
    """The checkpoint to go on from; refuses a setting that would make it another run."""
    path = out / "checkpoint.pt"
    if not path.exists():
        raise ValueError(f"{path} is not there: start without --resume")
    checkpoint = read_checkpoint(path)
    if "net" not in checkpoint:
        raise ValueError(f"{path} holds no training run, only a trained network")
    with sound(path, "the checkpoint of a run"):
        stored = checkpoint["config"]["train"]
        configured = COMMON | PRESETS[stored["preset"]]
        if not all(name in stored or name in NETWORK for name in configured):
            raise ValueError("it lacks some settings")
        checkpoint["device"], checkpoint["config"]["images"], stored["data"]
    if checkpoint["device"] != device.type:
        raise ValueError(f"{path} began on {checkpoint['device']}: go on there with --device")
    fixed = {name: value for name, value in given.items() if name not in ("steps", "data")}
    differ = [f"--{name.replace('_', '-')} was {stored[name]}, now {value}"
              for name, value in fixed.items() if stored[name] != value]
    if differ:
        raise ValueError(f"--resume goes on with the same run, but {'; '.join(differ)}: "
                         "leave that out, or begin another run with another --out")
    stored["steps"] = given.get("steps", stored["steps"])
    if stored["steps"] <= checkpoint["step"]:
        raise ValueError(f"{path} is complete at step {checkpoint['step']}: "
                         "a larger --steps trains it further")
    return checkpoint


def announce(run: Run, images: np.ndarray, held_out: np.ndarray):
    """What is about to happen, and what loss to expect."""
    schedule, settings = schedule_of(run.config), run.config["train"]
    precision = "bfloat16" if autocast(run.device, settings["float32"])._enabled else "float32"
    several = f", {run.world} processes" if run.world > 1 else ""
    size = "x".join(map(str, images.shape[1:]))
    x0 = to_pixels(np.array(images[:1000], dtype=np.float64))
    l_T = posterior.bits_per_dim(posterior.L_T(x0, schedule))
    noise = "x_T is noise" if l_T < 0.01 else "x_T IS STILL THE IMAGE: more steps or larger betas!"
    print(f"device    {run.device}, {precision}{several}")
    print(f"images    {len(images)} of {size} to train on, {len(held_out)} held out, "
          f"{run.config['unet']['labels'] or 'no'} labels")
    print(f"network   {parameters(run.net):,} parameters")
    print(f"schedule  {settings['schedule']}, T = {schedule.T}: L_T = {l_T:.3g} bits/dim ({noise})")
    print(f"loss      1 knows nothing (ε_θ = 0); {schedule.alpha_bar[1:].mean():.4f} is the least "
          "for N(0, 1)\n          pixels; images come lower, and 0 is out of reach\n")


def chart(log: list, width: int = 72, height: int = 8) -> str:
    """The loss along the run, in text; the scale is logarithmic."""
    parts = np.array_split([loss for _, loss in log], min(width, len(log)))
    y = np.log10([part.mean() for part in parts])
    low, high = y.min(), max(y.max(), y.min() + 1e-3)
    level = np.rint((y - low) / (high - low) * (height - 1))
    rows = ["".join("●" if at == row else " " for at in level) for row in reversed(range(height))]
    marks = 10 ** np.linspace(high, low, height)
    return "\n".join(f"{mark:8.4f} │{row}" for mark, row in zip(marks, rows)) + (
        f"\n    loss └{'─' * len(y)} step {log[-1][0]}")


def prepare(args, given: dict, rank: int, world: int):
    """All that a user can get wrong is checked here, before anything is written."""
    device = choose_device(args.device)
    if device.type == "cuda" and world > 1:
        device = choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    checkpoint = resumed(given, args.out, device) if args.resume else None
    if not args.resume and (args.out / "checkpoint.pt").exists():
        raise ValueError(f"{args.out / 'checkpoint.pt'} is there already: go on with --resume, "
                         "or begin another run with another --out")
    path = given.get("data") or (checkpoint["config"]["train"]["data"] if checkpoint else DIGITS)
    images, labels = load(path)
    config = checkpoint["config"] if checkpoint else configuration(given, images, labels)
    if checkpoint and fingerprint(images, labels) != config["images"]:
        raise ValueError(f"{path} holds other images than those the run began with: "
                         "name them with --data")
    if config["train"]["batch"] % world:
        raise ValueError(f"--batch {config['train']['batch']} is no multiple of {world} processes")
    require_writable(args.out / "checkpoint.pt")
    images, held_out = split(images)
    labels = split(labels)[0] if config["unet"]["labels"] else None
    return start(config, device, args.out, rank, world, checkpoint), images, labels, held_out


def bound_of(args, given: dict):
    """--evaluate: the bound of the averaged network on at most 1000 images that were held out."""
    device = choose_device(args.device)
    path = args.out / "checkpoint.pt"
    if not path.exists():
        raise ValueError(f"{path} is not there: train first, or name its folder with --out")
    net, config = load_network(path, device)
    images, labels = load(given.get("data") or config.get("train", {}).get("data", DIGITS))
    held_out = split(images)[1][:1000]
    if len(held_out) < 2 or list(held_out.shape[1:]) != config["shape"][1:] + config["shape"][:1]:
        raise ValueError(f"{len(held_out)} images of {held_out.shape[1:]} are held out: needed are "
                         f"two or more like those of the run, {config['shape']}")
    x0 = to_pixels(torch.from_numpy(np.array(held_out)).to(device)).permute(0, 3, 1, 2)
    if net.labels and (labels is None or labels.max() + 1 != net.labels):
        raise ValueError(f"the network was trained with labels 0 .. {net.labels - 1}; "
                         "--data has others")
    label = torch.from_numpy(split(labels)[1][:1000]).to(device) if net.labels else None
    print(f"{path} on {device}: {len(x0)} held-out images")

    def predict(x_t, t, i):
        return net(x_t, t, None if label is None else label[i])
    print_bound(evaluate(predict, config, x0))


def lock(out: Path):
    """Hold the folder for one run; the system lets go when the process ends, however it ends."""
    file = open(out / ".lock", "w")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing to {out}: name another --out") from None
    return file


def main():
    args = arguments().parse_args()
    names = ("data", "preset", "steps", "batch", "lr", "schedule", "T", "beta_1", "beta_T", "seed",
             "float32")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_float32_matmul_precision("high")                 # TF32 where there is no bfloat16
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with reported():
        if args.evaluate:
            return bound_of(args, given)
        run, images, labels, held_out = prepare(args, given, rank, world)
        held = lock(args.out) if rank == 0 else None          # for as long as the name lives
    if world > 1:
        dist.init_process_group("nccl" if run.device.type == "cuda" else "gloo")
    if rank == 0:
        announce(run, images, held_out)
    with reported():
        stopped = train(run, images, labels, args.compile)
        if rank == 0 and not stopped:
            share(run)
            picture(run, "samples.png")
    if world > 1:
        dist.destroy_process_group()
    if rank == 0 and stopped:
        print(f"\nstopped and saved at step {run.step}; "
              f"to go on: python train.py --resume --out {args.out}")
    elif rank == 0:
        print(f"\n{chart(run.log)}\n")
        print(f"drawn: {args.out / 'samples.png'}; beside it: checkpoint.pt, log.csv, network.pt")
        how = "--sampler dpm --guidance 2" if run.config["unet"]["labels"] else "--sampler dpm"
        print(f"next: python sample.py --weights {args.out / 'checkpoint.pt'} {how}")
    raise SystemExit(128 + stopped if stopped else 0)


if __name__ == "__main__":
    main()
