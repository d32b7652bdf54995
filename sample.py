"""Algorithm 2, and the faster and guided ways to walk from noise to an image.    N8, DDIM, DPM, CFG

One walk; a sampler is one step of it.  PyTorch, batched, on any device: the tables come from
ddpm.py in float64 and are cast once, and test_math.py holds every step against the NumPy reference.

`python sample.py` draws a sheet of digits from your last checkpoint, or from the one that ships.
"""
import functools
import json
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ddpm
from data import (DIGITS, Arguments, Progress, duration, load, reported, require_writable, sheet,
                  sound, split, to_bytes, to_pixels, whole_file, write_png)
from ddpm import Schedule
from unet import UNet

COMPLETIONS = 4             # of each digit, with --keep
PUBLISHED = "diffusion_pytorch_model.bin"
LAST, SHIPPED = Path("out/checkpoint.pt"), DIGITS.with_name("digits.pt")


# ── Algorithm 2 ───────────────────────────────────────────────────────────────────────────────────

def walk(predict, x_T: Tensor, schedule: Schedule, step, noise) -> Iterator[Tensor]:
    """x_T, x_{T−1}, …, x_0, one after another                                   Algorithm 2, N4, N8

    predict(x_t, t) → (ε_θ, x̂_0);  step: one of those below;  noise() → a fresh z, shaped like x_t.
    """
    x_t, before = x_T, None                                         # 1: x_T ~ N(0, I)
    yield x_t
    for t in range(schedule.T, 0, -1):                              # 2: for t = T, …, 1 do
        z = noise() if t > 1 else torch.zeros_like(x_t)      # 3:   z ~ N(0, I) if t > 1, else z = 0
        eps, x0 = predict(x_t, t)
        x_t = step(x_t, t, eps, x0, before, z, schedule)            # 4:   x_{t−1} = …
        before = x0
        yield x_t                                                   # 5: end for, 6: return x_0


# ── One step of each sampler: from x_t to x_{t−1} ─────────────────────────────────────────────────
# eps is ε_θ(x_t, t), x0 the image that it implies by Ho (15), before the x0 of the previous step
# (None at first), z the fresh noise.  Where steps are skipped, t counts the steps that are left and
# `schedule` is respaced: ᾱ_{t−1} is always the next noise level, β_t the variance between the two.

def ddpm_step(x_t, t, eps, x0, before, z, schedule, variance="beta"):
    """x_{t−1} = (x_t − β_t/√(1−ᾱ_t) ε_θ)/√α_t + σ_t z                         Ho (1, 11), N8, V6

    variance: σ_t² is β_t ("beta") or β̃_t ("beta_tilde").
    """
    beta, alpha = schedule.beta[t], schedule.alpha[t]
    sigma2 = beta
    if variance == "beta_tilde":
        sigma2 = schedule.one_minus_alpha_bar[t - 1] / schedule.one_minus_alpha_bar[t] * beta
    mean = (x_t - beta / schedule.one_minus_alpha_bar[t].sqrt() * eps) / alpha.sqrt()
    return mean + sigma2.sqrt() * z


def ddim_step(x_t, t, eps, x0, before, z, schedule, eta=0.0):
    """x_{t−1} = √ᾱ_{t−1} x̂_0 + √(1−ᾱ_{t−1}−σ²) ε_θ + σ z         DDIM: Song et al. (2020) (12, 16)

    σ = η √((1−ᾱ_{t−1})/(1−ᾱ_t)) √(1−ᾱ_t/ᾱ_{t−1}).  η = 0 adds no noise; η = 1 is Ho (6, 7).
    """
    rest, rest_next = schedule.one_minus_alpha_bar[t], schedule.one_minus_alpha_bar[t - 1]
    sigma = eta * (rest_next / rest).sqrt() * schedule.beta[t].sqrt()        # 1 − ᾱ_t/ᾱ_{t−1} = β_t
    root = (rest_next - sigma ** 2).clamp(min=0).sqrt()           # rounding can bring 0 below zero
    return schedule.alpha_bar[t - 1].sqrt() * x0 + root * eps + sigma * z


def dpm_step(x_t, t, eps, x0, before, z, schedule, eta=0.0):
    """x_{t−1} = σ_{t−1}/σ_t x_t − √ᾱ_{t−1} (e^{−h} − 1) D        DPM-Solver++(2M): Lu et al. (2022)

    σ = √(1−ᾱ), λ = ln(√ᾱ/σ), h = λ_{t−1} − λ_t, r = h_before/h, and from the two latest x̂_0
    D = (1 + 1/(2r)) x̂_0 − 1/(2r) x̂_0 before: x̂_0 as it would be half a step ahead.
    That is DDIM's step with D for x̂_0, and so it is written; η = 1 gives the solver's SDE form.
    The first step knows no x̂_0 before its own, the last ends at λ = ∞, and ᾱ = 0 in float32 is
    λ = −∞: there D = x̂_0.
    """
    alpha_bar, sigma = schedule.alpha_bar, schedule.one_minus_alpha_bar.sqrt()
    D = x0
    if before is not None and t > 1 and alpha_bar[t + 1] > 0:
        lambda_ = (alpha_bar.sqrt() / sigma).log()
        r = (lambda_[t] - lambda_[t + 1]) / (lambda_[t - 1] - lambda_[t])
        D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
    eps_D = (x_t - alpha_bar[t].sqrt() * D) / sigma[t]                                   # Ho (15)
    return ddim_step(x_t, t, eps_D, D, None, z, schedule, eta)


def repaint_step(x_t, t, eps, x0, before, z, schedule, step, predict, noise, known, keep,
                 resample=1):
    """x_{t−1} = keep · q(x_{t−1} | x_0) + (1 − keep) · p(x_{t−1} | x_t)                    RePaint

    A step around a step: the known pixels (keep = 1) come from the forward process, the others from
    `step`.  resample > 1 goes back to x_t by Ho (2) and walks again, so that the two parts agree.
    Lugmayr et al. (2022), arXiv:2201.09865; their line 5 has ᾱ_t for ᾱ_{t−1}, and 1 − ᾱ unrooted.
    The x̂_0 before is of another path, as the known pixels are drawn anew: `step` does not get it.
    """
    for again in reversed(range(resample)):
        x_prev = step(x_t, t, eps, x0, None, z, schedule)
        x_prev = torch.where(keep, q_sample(known, t - 1, noise(), schedule), x_prev)
        if again and t > 1:
            x_t = schedule.alpha[t].sqrt() * x_prev + schedule.beta[t].sqrt() * noise()
            eps, x0 = predict(x_t, t)
            z = noise()
    return x_prev


# ── What the network says ─────────────────────────────────────────────────────────────────────────

def q_sample(x0: Tensor, t, eps: Tensor, schedule: Schedule) -> Tensor:
    """x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε                                                   Ho (4), N3, V3

    t: one integer for all images, or a tensor with one for each.
    """
    def table(values):
        return values[t].sqrt().reshape(-1, 1, 1, 1)
    return table(schedule.alpha_bar) * x0 + table(schedule.one_minus_alpha_bar) * eps


def guided(net, x_t: Tensor, t: Tensor, label: Tensor | None, guidance: float) -> Tensor:
    """ε = ε_null + s (ε_label − ε_null)               CFG: Ho and Salimans (2022), arXiv:2207.12598

    s = 0 ignores the label, s = 1 is plain conditional, more insists.  One call gives both.
    """
    if label is None or guidance == 1:
        return net(x_t, t, label)
    null = torch.full_like(label, net.labels)
    if guidance == 0:
        return net(x_t, t, null)
    both = net(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([null, label]))
    eps_null, eps_label = both.chunk(2)
    return eps_null + guidance * (eps_label - eps_null)


def predict_with(eps_theta, schedule: Schedule, clip: bool = True):
    """x̂_0 = (x_t − √(1−ᾱ_t) ε_θ)/√ᾱ_t: the function predict(x_t, t) → (ε_θ, x̂_0)      Ho (15), N5

    clip: x̂_0 is cut to [-1, 1] and ε_θ follows it, so every step, Ho (11) too, uses the cut image.
    """
    def predict(x_t, t):
        root, root_rest = schedule.alpha_bar[t].sqrt(), schedule.one_minus_alpha_bar[t].sqrt()
        eps = eps_theta(x_t, t)
        x0 = (x_t - root_rest * eps) / root
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (x_t - root * x0) / root_rest
        return eps, x0
    return predict


# ── Devices and checkpoints ───────────────────────────────────────────────────────────────────────

def choose_device(name: str | None) -> torch.device:
    """The named device, or the best one here: cuda, mps, cpu.  Raises ValueError if it is not."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    here += ["cpu"]
    try:
        device = torch.device(name or here[0])
    except RuntimeError:
        device = None
    if device is None or device.type not in here or (
            device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"there is no device {name!r} here: choose from {', '.join(here)}")
    return device


def autocast(device: torch.device, float32: bool = False):
    """bfloat16 for convolutions and matrix products where the device computes it natively."""
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        abilities = getattr(torch.cpu, "get_capabilities", dict)()
        native = bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))
    return torch.autocast(device.type, torch.bfloat16, enabled=native and not float32)


def schedule_of(config: dict) -> Schedule:
    make = {"linear": ddpm.linear, "cosine": ddpm.cosine}[config["schedule"]["kind"]]
    return make(**{name: value for name, value in config["schedule"].items() if name != "kind"})


def read_checkpoint(path: str | Path) -> dict:
    """What train.py saved: config, step and ema at least.  Raises ValueError or OSError.

    The file may come from a stranger: its checksums are verified, it cannot unpack to more than its
    own size, and nothing in it is run (weights_only).  `build` does not believe its tensors either.
    """
    path = Path(path)
    with open(path, "rb") as file, sound(path, "a checkpoint of train.py"):
        with zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise ValueError("it would unpack to more than its size")
            if archive.testzip():
                raise ValueError("its checksums do not match")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["config"], checkpoint["step"], checkpoint["ema"]
    return checkpoint


def build(config: dict, tensors: dict, path: str | Path) -> UNet:
    """The network that config describes, with these tensors.  Raises ValueError if they misfit."""
    with sound(path, "a network that can be built"):
        if config["unet"]["blocks"] * len(config["unet"]["multipliers"]) > len(tensors):
            raise ValueError("it has more blocks than tensors")
        with torch.device("meta"):    # shapes only: nothing is allocated before it has been checked
            net = UNet(**config["unet"])
        channels, height, width = config["shape"]
        if not all(type(size) is int and size > 0 for size in config["shape"]):
            raise ValueError(f"it draws images of {config['shape']}")
        if type(config["float32"]) is not bool or config.get("first_t", 1) not in (0, 1):
            raise ValueError("its settings are of the wrong kind")
        for tensor in tensors.values():         # a view can be larger than what the file holds
            if not tensor.is_floating_point() or tensor.layout != torch.strided or (
                    tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()):
                raise ValueError("it holds tensors that are not plain numbers")
        if channels != config["unet"]["channels"] or max(height, width) > 8192:
            raise ValueError(f"it draws images of {config['shape']}")
        net.check_size(height, width)
        if schedule_of(config).T != config["schedule"]["T"]:
            raise ValueError("it has no number of steps")
    wanted = {name: tensor.shape for name, tensor in net.state_dict().items()}
    found = {name: getattr(tensor, "shape", None) for name, tensor in tensors.items()}
    if wanted != found:
        wrong = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        is_, has = found.get(wrong[0], "missing"), wanted.get(wrong[0], "none of that name")
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit; {wrong[0]} is {is_}, "
                         f"the network has {has}")
    net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return net


def load_network(path: str | Path, device: torch.device) -> tuple[UNet, dict]:
    """The network and its config, from our own checkpoint (its EMA) or a published one."""
    path = Path(path)
    if path.is_dir() or path.name == PUBLISHED:
        net, config = load_published(path if path.is_dir() else path.parent)
    else:
        checkpoint = read_checkpoint(path)
        config = checkpoint["config"]
        net = build(config, checkpoint["ema"], path)
    return net.to(device, memory_format=torch.channels_last).eval(), config


def load_published(folder: Path) -> tuple[UNet, dict]:
    """The paper's networks as diffusers stores them: config.json and the weights beside it.

    They were trained with t = 0..T−1, so they are called with t − 1: config["first_t"] says so.
    Raises ValueError, naming what is missing or left over, when the files are not such a network.
    """
    weights = folder / PUBLISHED
    with sound(folder / "config.json", "the description of a published network"):
        theirs = json.loads((folder / "config.json").read_text())
        channels, blocks = theirs["block_out_channels"], theirs["layers_per_block"]
        size, levels = theirs["sample_size"], enumerate(theirs["down_block_types"])
        attention = tuple(size >> level for level, kind in levels if "Attn" in kind)
        unet = dict(size=size, channels=theirs["in_channels"], width=channels[0], blocks=blocks,
                    multipliers=tuple(c // channels[0] for c in channels), attention=attention,
                    dropout=theirs.get("dropout", 0.0), groups=theirs["norm_num_groups"])
    config = dict(unet=unet, shape=[unet["channels"], size, size], first_t=0, float32=False,
                  schedule=dict(kind="linear", T=1000, beta_1=1e-4, beta_T=0.02))
    with sound(weights, "a published network"):
        tensors = torch.load(weights, map_location="cpu", weights_only=True)
        if blocks * len(channels) > len(tensors):
            raise ValueError("it has fewer tensors than its description has blocks")

    names = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out",
             "time_embedding.linear_1": "time.0", "time_embedding.linear_2": "time.2",
             "mid_block.resnets.0": "middle.0", "mid_block.resnets.1": "middle.1",
             "mid_block.attentions.0": "middle.0.attention"}
    for way, count, between in (("down", blocks, "downsamplers"), ("up", blocks + 1, "upsamplers")):
        for level in range(len(channels)):
            first = level * (count + 1)                  # a level is its blocks and a resampler
            names[f"{way}_blocks.{level}.{between}.0.conv"] = f"{way}.{first + count}.conv"
            for k in range(count):
                names[f"{way}_blocks.{level}.resnets.{k}"] = f"{way}.{first + k}"
                names[f"{way}_blocks.{level}.attentions.{k}"] = f"{way}.{first + k}.attention"
    parts = {"time_emb_proj": "time", "conv_shortcut": "shortcut", "group_norm": "norm",
             "query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "proj",
             "to_out.0": "proj"}
    ours = {}
    for name, tensor in tensors.items():
        known = [old for old in names if name.startswith(old + ".")]
        name = names[known[0]] + name.removeprefix(known[0]) if known else name
        for old, new in parts.items():
            name = name.replace(f".{old}.", f".{new}.")
        ours[name] = tensor
    for name in [name for name in ours if ".to_q." in name]:   # three maps there are one in unet.py
        same = [name.replace("to_q", part) for part in ("to_q", "to_k", "to_v")]
        qkv = [ours.pop(key) for key in same if key in ours]
        ours[name.replace("to_q", "qkv")] = torch.cat(qkv)
    return build(config, ours, folder), config


# ── Whole images ──────────────────────────────────────────────────────────────────────────────────

def on_device(schedule: Schedule, device) -> Schedule:
    """The float64 tables of ddpm.py, cast to float32 once."""
    return Schedule(*(torch.tensor(table).to(torch.float32).to(device) for table in schedule))


def times(T: int, steps: int) -> np.ndarray:
    """τ_i = max(i, T (i/N)²), i = 0, …, N, rounded          DDIM: Song et al. (2020), appendix D.2

    Most of the N = steps stand where little noise is left, as the details come there.  No two are
    the same, and N = T takes them all.
    """
    i = np.arange(steps + 1)
    return np.maximum(i, np.rint(T * (i / steps) ** 2).astype(int))


def noise_of(seed: int, numbers: range, shape: tuple, device):
    """A function that draws z ~ N(0, I), (len(numbers), *shape).

    Each image has a stream of its own: its noise is the same in any batch and on any device.
    """
    streams = [np.random.default_rng((seed, i)) for i in numbers]

    def noise():
        z = np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])
        return torch.from_numpy(z).to(device)
    return noise


@torch.no_grad()
def generate(net: UNet, config: dict, numbers: range, seed: int = 0, sampler: str = "ddpm",
             steps: int | None = None, variance: str = "beta", eta: float = 0.0, clip: bool = True,
             label: Tensor | None = None, guidance: float = 1.0, known: Tensor | None = None,
             keep: Tensor | None = None, resample: int = 1) -> Iterator[Tensor]:
    """Walk the images `numbers` from x_T to x_0; yields each x_t (B, C, H, W)          Algorithm 2

    steps: 1..T calls of the network, T if None, at the `times` above.
    """
    device = next(net.parameters()).device
    full = schedule_of(config)
    tau = times(full.T, steps or full.T)
    schedule = on_device(ddpm.respaced(full, tau), device)
    tau = tau - (1 - config.get("first_t", 1))           # a published network counts from 0
    noise = noise_of(seed, numbers, tuple(config["shape"]), device)

    def eps_theta(x_t, t):
        # Kernels choose their order of summation by the batch's size, below 16 most of all: in full
        # sixteens a picture does not depend on how many others are drawn with it.
        every = torch.arange(-(-len(x_t) // 16) * 16, device=device).clamp(max=len(x_t) - 1)
        time_t = torch.full((len(every),), int(tau[t]), device=device)
        with autocast(device, config["float32"]):
            eps = guided(net, x_t[every], time_t, None if label is None else label[every], guidance)
        return eps[:len(x_t)]

    predict = predict_with(eps_theta, schedule, clip)
    step = {"ddpm": functools.partial(ddpm_step, variance=variance),
            "ddim": functools.partial(ddim_step, eta=eta),
            "dpm": functools.partial(dpm_step, eta=eta)}[sampler]
    if keep is not None:
        step = functools.partial(repaint_step, step=step, predict=predict, noise=noise, known=known,
                                 keep=keep, resample=resample)
    yield from walk(predict, noise(), schedule, step, noise)


# ── The command ───────────────────────────────────────────────────────────────────────────────────

def arguments() -> Arguments:
    parser = Arguments(description="Draw images from a trained network.")
    add = parser.add_argument
    add("--weights", type=Path, help="a checkpoint, or a folder with a published network; default: "
                                     f"{LAST} if it is there, else the network that ships")
    add("-n", type=int, help="how many images: to draw (100), or to complete (8)")
    add("--out", type=Path, default=Path("out/samples.png"), help=".png: a sheet; .npz: the arrays")
    add("--animate", action="store_true", help="the walk from x_T to x_0, as an animated PNG")
    add("--sampler", choices=("ddpm", "ddim", "dpm"), default="ddpm")
    add("--steps", type=int, help="calls of the network, 1 .. T; default T, and 20 for dpm")
    add("--variance", choices=("beta", "beta_tilde"), help="sigma_t^2 of ddpm (beta)")
    add("--eta", type=float, help="noise of ddim (0) and dpm (1): 0 (none) .. 1 (as ddpm)")
    add("--no-clip", action="store_true", help="let the predicted x0 leave [-1, 1]")
    add("--label", help="a class, or 'all': a row each; default: random, with --keep none")
    add("--guidance", type=float, default=1.0, help="0 ignores the label, 1 follows, more insists")
    add("--keep", choices=("left", "right", "top", "bottom"), help="complete half-known images")
    add("--resample", type=int, default=1, help="with --keep: times each step is walked")
    add("--data", type=Path, default=DIGITS, help="with --keep: images; its last tenth is taken")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=100, help="images at a time: bounds memory, changes nothing")
    add("--device", help="cuda, mps or cpu; default: the best one here")
    return parser


def check(args, net: UNet, config: dict):
    """Raise ValueError for what argparse cannot see; fill in what depends on the network."""
    T = config["schedule"]["T"]
    if args.steps is None:
        args.steps = min(20, T) if args.sampler == "dpm" else T
    if args.n is None:
        args.n = 8 if args.keep else 100
    for name, value in (("-n", args.n), ("--batch", args.batch), ("--resample", args.resample)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not 1 <= args.steps <= T:
        raise ValueError(f"--steps must be 1 .. {T}, not {args.steps}")
    if args.seed < 0:
        raise ValueError(f"--seed must not be negative, and is {args.seed}")
    if args.out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out must end in .png or .npz, not {args.out.name!r}")
    if args.animate and (args.out.suffix != ".png" or args.keep or args.n > args.batch):
        raise ValueError("--animate draws one batch into a .png: no --keep, and -n at most --batch")
    if args.variance and args.sampler != "ddpm":
        raise ValueError("--variance belongs to --sampler ddpm")
    if args.eta is None:
        args.eta = float(args.sampler == "dpm")
    elif args.sampler == "ddpm" or not 0 <= args.eta <= 1:
        raise ValueError("--eta belongs to --sampler ddim and dpm, and is 0 .. 1")
    if args.resample > 1 and not args.keep:
        raise ValueError("--resample belongs to --keep")
    if not net.labels and (args.label or args.guidance != 1):
        raise ValueError("this network knows no labels: leave --label and --guidance out")
    if not np.isfinite(args.guidance):
        raise ValueError(f"--guidance must be a number, not {args.guidance}")
    if args.keep and args.label is None and args.guidance != 1:
        raise ValueError("--guidance with --keep needs a --label")
    numeral = args.label is not None and args.label.isdecimal()
    if args.label not in (None, "all") and not (numeral and int(args.label) < net.labels):
        raise ValueError(f"--label must be 0 .. {net.labels - 1} or all, not {args.label!r}")
    if args.label == "all" and args.n % net.labels:
        raise ValueError(f"-n must be a multiple of {net.labels} with --label all, not {args.n}")
    require_writable(args.out)


def held_out_images(args, config: dict) -> np.ndarray:
    """The first n held-out images, (n, H, W, C): what --keep completes."""
    images = split(load(args.data)[0])[1]
    channels, height, width = config["shape"]
    if images.shape[1:] != (height, width, channels) or len(images) < args.n:
        raise ValueError(f"{args.data} has {len(images)} held-out images of {images.shape[1:]}; "
                         f"needed are {args.n} of {(height, width, channels)}")
    return np.array(images[:args.n])


def mask(side: str, height: int, width: int) -> np.ndarray:
    """True where a pixel is known: the named half of the image."""
    keep = np.zeros((height, width), dtype=bool)
    half = {"left": np.s_[:, :width // 2], "right": np.s_[:, width // 2:],
            "top": np.s_[:height // 2], "bottom": np.s_[height // 2:]}[side]
    keep[half] = True
    return keep


def labels_for(args, net: UNet, numbers: range, total: int) -> np.ndarray | None:
    """Each image's label: one class, a row per class, none, or one from its own stream."""
    if not net.labels:
        return None
    if args.label == "all":
        return np.array([i * net.labels // total for i in numbers])
    if args.label is not None:
        return np.full(len(numbers), int(args.label))
    if args.keep:
        return np.full(len(numbers), net.labels)
    streams = [np.random.default_rng((args.seed, i, 1)) for i in numbers]
    return np.array([stream.integers(net.labels) for stream in streams])


def draw(args, net: UNet, config: dict, held_out: np.ndarray | None):
    """Yield (images uint8 (B, H, W, C), labels, frames) batch by batch, and tell how it goes."""
    total = args.n * (COMPLETIONS if args.keep else 1)
    device, progress, start = next(net.parameters()).device, Progress(), time.monotonic()
    for first in range(0, total, args.batch):
        numbers, known, keep, frames = range(first, min(first + args.batch, total)), None, None, []
        labels = labels_for(args, net, numbers, total)
        label = None if labels is None else torch.from_numpy(labels).to(device)
        if args.keep:
            images = torch.from_numpy(held_out[np.array(numbers) // COMPLETIONS])
            known = to_pixels(images.to(device)).permute(0, 3, 1, 2)
            keep = torch.from_numpy(mask(args.keep, *config["shape"][1:])).to(device)
        steps = generate(net, config, numbers, args.seed, args.sampler, args.steps,
                         args.variance or "beta", args.eta, not args.no_clip, label,
                         args.guidance, known, keep, args.resample)
        for k, x_t in enumerate(steps):
            spent = max(time.monotonic() - start, 1e-9)
            done = (first + len(numbers) * k / args.steps) / total
            left = f"{duration(spent / done - spent)} left" if done else ""
            progress(f"step {k} of {args.steps} · images {first + 1} to {numbers[-1] + 1} of "
                     f"{total} · {total * done / spent:.1f} images/s · {left}", last=done == 1)
            if args.animate and (k == args.steps or k % max(1, args.steps // 40) == 0):
                frames.append(to_bytes(x_t.permute(0, 2, 3, 1).cpu().numpy()))
        if not torch.isfinite(x_t).all():
            raise ValueError("the walk led to pixels that are no numbers: are the weights sound? "
                             "else more --steps, or --sampler dpm")
        yield to_bytes(x_t.permute(0, 2, 3, 1).cpu().numpy()), labels, frames


def write_arrays(path: Path, batches, total: int, shape: list):
    """images (N, H, W) or (N, H, W, C) and labels (N,), written as they come: N has no limit."""
    channels, height, width = shape
    shape = (total, height, width) if channels == 1 else (total, height, width, channels)
    header = dict(descr="|u1", fortran_order=False, shape=shape)
    every = []
    with whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for images, labels, _ in batches:
                member.write(images.tobytes())
                every.append(labels)
        if labels is not None:
            with archive.open("labels.npy", "w") as member:
                np.lib.format.write_array(member, np.concatenate(every))


def write_sheet(path: Path, batches, args, net: UNet, held_out: np.ndarray | None):
    """One picture: images in rows, a row per class, or original, masked, completed."""
    batches = list(batches)
    images = np.concatenate([images for images, _, _ in batches])
    columns = int(np.ceil(np.sqrt(len(images))))
    if args.label == "all":
        columns = len(images) // net.labels
    if args.keep:
        columns = 2 + COMPLETIONS
        known = mask(args.keep, *images.shape[1:3])[:, :, None]
        masked = np.where(known, held_out, 128).astype(np.uint8)
        completed = images.reshape(args.n, COMPLETIONS, *images.shape[1:])
        rows = np.concatenate([held_out[:, None], masked[:, None], completed], axis=1)
        images = rows.reshape(-1, *images.shape[1:])
    frames = batches[0][2] if args.animate else [images]
    write_png(path, *(sheet(frame, columns) for frame in frames))


def main():
    args = arguments().parse_args()
    with reported():
        device = choose_device(args.device)
        path = args.weights or (LAST if LAST.exists() else SHIPPED)
        net, config = load_network(path, device)
        check(args, net, config)
        held_out = held_out_images(args, config) if args.keep else None
        print(f"{path} on {device}: {args.sampler}, {args.steps} steps")
        batches = draw(args, net, config, held_out)
        if args.out.suffix == ".npz":
            total = args.n * (COMPLETIONS if args.keep else 1)
            write_arrays(args.out, batches, total, config["shape"])
        else:
            write_sheet(args.out, batches, args, net, held_out)
        print(f"drawn: {args.out}")


if __name__ == "__main__":
    main()
