"""Every setting, once: its default, its check and its help.  The command lines are built from it.

A setting without help is no option: it follows from the data.  To compute something else than the
presets do, write another one below, or name the fields that differ on the command line.
"""
import math
from argparse import ArgumentParser, BooleanOptionalAction
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

DIGITS = Path(__file__).resolve().parents[1] / "assets" / "digits.npz"


KINDS = {int: "a whole number,", float: "a number,", str: "text of length", bool: "a bool,"}


def setting(default, help="", low=False, high=True, choices=None, kind=None):
    """A field: low .. high bound a number, each of several numbers, or the length of a text; those
    of a bool are False and True.
    """
    kind = kind or type(default[0] if isinstance(default, tuple) else default)
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices,
                                                kind=kind))


def flag(name: str) -> str:
    return "-n" if name == "n" else "--" + name.replace("_", "-")


def check(rule, value):
    """Raise ValueError for a value of another kind than the setting's, or outside its range."""
    kind, low, high, choices = map(rule.metadata.get, ("kind", "low", "high", "choices"))
    parts = value if isinstance(rule.default, tuple) else (value,)
    fits = type(parts) is tuple and 1 <= len(parts) <= 16 and all(
        type(part) is kind and (part in choices if choices else
                                low <= (len(part) if kind is str else part) <= high)
        for part in parts)
    if not fits and not (value is None and rule.default is None):
        wanted = f"one of {', '.join(choices)}" if choices else f"{KINDS[kind]} {low} .. {high}"
        raise ValueError(f"{flag(rule.name)} must be {wanted}, not {value!r:.40}")


DEVICE = setting(None, "cuda, mps or cpu; default: the best one here", 1, 64, kind=str)


@dataclass(frozen=True)
class Config:
    """All that decides what a training run computes.  The defaults draw digits in minutes."""

    preset: str = setting("digits", "the settings to begin with: these, or the paper's for CIFAR10",
                          choices=("digits", "cifar10"))
    data: str | None = setting(None, "IDX files, .npz, .npy or a folder (the digits in assets/)",
                               1, 4096, kind=str)
    labels: bool = setting(True, "learn the images' labels too, if they have any")
    flip: bool = setting(False, "mirror half of the images")
    steps: int = setting(2000, "steps of gradient descent", 1, 10**9)
    batch: int = setting(64, "images a step, over all devices", 1, 10**5)
    lr: float = setting(6e-3, "learning rate", 1e-9, 1.0)
    muon_lr: float = setting(0.03, "Muon's, for the hidden layers; 0: Adam for all", 0.0, 1.0)
    warmup: int = setting(100, "steps in which the learning rate rises", 1, 10**9)
    decay: bool = setting(True, "the learning rate then falls to 0 in a straight line")
    beta2: float = setting(0.99, "Adam's second beta", 0.0, 0.999999)
    grad_clip: float = setting(1.0, "the gradient's largest norm", 1e-9, 1e9)
    ema_decay: float = setting(0.999, "of the moving average of the parameters", 0.0, 1.0)
    p_uncond: float = setting(0.1, "share of the images whose label is dropped", 0.0, 1.0)
    seed: int = setting(0, "of the weights, images and noise", 0, 2**62)
    float32: bool = setting(False, "no bfloat16, even if the device can")

    schedule: str = setting("linear", "how beta grows", choices=("linear", "cosine"))
    T: int = setting(1000, "time steps", 1, 10**6)
    beta_1: float = setting(1e-4, "first beta of the linear schedule", 1e-9, 0.9999)
    beta_T: float = setting(0.02, "last beta of the linear schedule", 1e-9, 0.9999)

    model_channels: int = setting(16, "channels of the network's first level", 4, 4096)
    channel_mult: tuple[int, ...] = setting((1, 2), "each level's channels, times these", 1, 64)
    num_res_blocks: int = setting(1, "residual blocks per level", 1, 16)
    attention_resolutions: tuple[int, ...] = setting((0,), "heights at which there is attention; "
                                                     "0: none but the middle", 0, 8192)
    dropout: float = setting(0.0, "share of activations dropped in training", 0.0, 0.99)
    num_groups: int = setting(1, "groups of each GroupNorm", 1, 4096)
    patch_size: int = setting(2, "squares of pixels that become one; 1 is the paper", 1, 64)

    image_shape: tuple[int, ...] = setting((1, 28, 28), low=1, high=8192)      # channels first
    num_classes: int = setting(0, low=0, high=10**4)
    fingerprint: str = setting("none", low=1, high=64)                         # of the images
    first_t: int = setting(1, low=0, high=1)       # published networks count the steps from 0

    def __post_init__(self):
        for rule in fields(self):
            check(rule, getattr(self, rule.name))
        if self.schedule == "cosine" and (self.beta_1, self.beta_T) != (1e-4, 0.02):
            raise ValueError("--beta-1 and --beta-T belong to --schedule linear")
        if len(self.image_shape) != 3 or self.image_shape[0] not in (1, 3):
            raise ValueError(f"images are 1 or 3 channels, height, width, not {self.image_shape}")
        c = [27 * (2 * self.num_res_blocks + 1) * (mult * self.model_channels) ** 2
             for mult in self.channel_mult]         # weights of a level: two 3 x 3 a block, skips
        area = math.prod(self.image_shape[1:]) / self.patch_size ** 2
        work = sum(weights * area / 4 ** level for level, weights in enumerate(c))
        if sum(c) > 1e9 or work > 1e12:
            raise ValueError("images of {1} x {2}: {3:.0e} weights and {4:.0e} multiplications an "
                             "image and step are beyond 1e9 or 1e12: smaller images, a larger "
                             "--patch-size, fewer --model-channels".format(
                                 *self.image_shape, sum(c), work))


PRESETS = {
    "digits": Config(),           # found by measurement: the best digits after minutes on two cores
    # Ho et al. (2020), appendix B
    "cifar10": Config(
        preset="cifar10", labels=False, flip=True, steps=800_000, batch=128, lr=2e-4, muon_lr=0.0,
        warmup=5000, decay=False, beta2=0.999, ema_decay=0.9999, model_channels=128,
        channel_mult=(1, 2, 2, 2), num_res_blocks=2, attention_resolutions=(16,), dropout=0.1,
        num_groups=32, patch_size=1, image_shape=(3, 32, 32)),
}


@dataclass(frozen=True)
class Sampling:
    """How images are drawn."""

    sampler: str = setting("dpm", "ddpm: Algorithm 2; ddim: fewer steps; dpm: the fewest",
                           choices=("ddpm", "ddim", "dpm"))
    steps: int | None = setting(None, "calls of the network, at most T; default T, and 20 for dpm",
                                1, 10**6, kind=int)
    variance: str = setting("beta", "sigma_t^2 of ddpm", choices=("beta", "beta_tilde"))
    eta: float | None = setting(None, "noise of ddim (0) and dpm (1): 0 (none) .. 1 (as ddpm)",
                                0.0, 1.0, kind=float)
    clip: bool = setting(True, "keep the predicted x0 in [-1, 1]")
    label: str | None = setting(None, "a class, 'all': a column each, or 'none'; default: all, "
                                "shuffled, and none with --keep", 1, 64, kind=str)
    guidance: float | None = setting(None, "s: 0 ignores the label, 1 follows it, a larger s "
                                     "exaggerates it (1 + w of Ho and Salimans); default 1, and "
                                     "1.1 for dpm", 0.0, 100.0, kind=float)
    keep: str | None = setting(None, "complete images of which half, the centre or the means over "
                               "4 x 4 pixels are kept", kind=str,
                               choices=("left", "right", "top", "bottom", "centre", "coarse"))
    resample: int = setting(1, "with --keep: times each step is walked", 1, 1000)
    n: int | None = setting(None, "how many images (100; with --keep 8)", 1, 10**6, kind=int)
    batch: int = setting(100, "images at a time: bounds memory", 1, 10**5)
    weights: str | None = setting(None, "a checkpoint, or a folder with a published network; "
                                  "default: out/checkpoint.pt, else the network that ships", 1,
                                  4096, kind=str)
    out: str = setting("out/samples.png", ".png: a sheet; .npz: the arrays", 1, 4096)
    animate: bool = setting(False, "the walk from x_T to x_0, as an animated PNG")
    data: str | None = setting(None, "to complete or to evaluate: images, of which the last "
                               "tenth is held out (those of the training)", 1, 4096, kind=str)
    device: str | None = DEVICE
    seed: int = setting(0, "of the noise, and of the order of the labels", 0, 2**62)

    def __post_init__(self):
        for rule in fields(self):
            check(rule, getattr(self, rule.name))
        if self.variance != "beta" and self.sampler != "ddpm":
            raise ValueError("--variance belongs to --sampler ddpm")
        if self.eta is not None and self.sampler == "ddpm":
            raise ValueError("--eta belongs to --sampler ddim and dpm")
        if self.resample > 1 and not self.keep:
            raise ValueError("--resample belongs to --keep")
        if self.keep and self.label is None and self.guidance not in (None, 1):
            raise ValueError("--guidance with --keep needs a --label")
        if Path(self.out).suffix not in (".png", ".npz"):
            raise ValueError(f"--out must end in .png or .npz, not {self.out!r}")

    def calls(self, T: int) -> int:
        """How often the network is called: steps, or what is usual."""
        return min(T, self.steps or (20 if self.sampler == "dpm" else T))

    @property
    def guidance_used(self) -> float:
        """guidance, or what is usual; without a label there is nothing to guide."""
        unlabelled = self.label == "none" or self.keep and self.label is None
        usual = 1.1 if self.sampler == "dpm" and not unlabelled else 1.0
        return usual if self.guidance is None else self.guidance

    @property
    def eta_used(self) -> float:
        """eta, or what is usual: the SDE form of dpm, the ODE of ddim."""
        return float(self.sampler == "dpm") if self.eta is None else self.eta


@dataclass(frozen=True)
class Session:
    """Where and how train.py works: nothing of it changes what is computed."""

    out: str = setting("out", "folder for checkpoint and pictures", 1, 4096)
    resume: bool = setting(False, "go on from the checkpoint in --out, exactly")
    evaluate: bool = setting(False, "print the bound on held-out images")
    device: str | None = DEVICE
    deterministic: bool = setting(False, "bit for bit repeatable on a GPU too; slower")
    compile: bool = setting(False, "torch.compile: slow to start, then faster")


def add_options(parser: ArgumentParser, settings, *names: str) -> ArgumentParser:
    """An option for each setting that has help, or for those named.  settings: a class of them, or
    an instance with other defaults.
    """
    for rule in fields(settings):
        if not rule.metadata["help"] or names and rule.name not in names:
            continue
        choices, shown = rule.metadata["choices"], getattr(settings, rule.name)
        how = dict(metavar=choices and f"{{{','.join(choices)}}}")
        if rule.metadata["kind"] is bool:              # a preset or the default may say yes: --no-
            how = (dict(action=BooleanOptionalAction) if shown or settings is Config
                   else dict(action="store_const", const=True))
        elif isinstance(shown, tuple):
            how, shown = dict(nargs="+"), " ".join(map(str, shown))
        parser.add_argument(flag(rule.name), **how, help=rule.metadata["help"] + (
            f" ({shown})" if shown is not None else ""))
    return parser


def given(args, settings) -> dict:
    """The settings that were named on the command line, checked."""
    named = {}
    for rule in (f for f in fields(settings) if getattr(args, f.name, None) is not None):
        value, kind = getattr(args, rule.name), rule.metadata["kind"]
        with suppress(ValueError):           # what is no value stays text, which `check` refuses
            if "_" not in str(value):                                 # int() would take 1_000
                value = tuple(map(kind, value)) if isinstance(value, list) else kind(value)
        check(rule, value)
        named[rule.name] = value
    return named
