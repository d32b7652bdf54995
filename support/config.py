"""Every setting, once: its default, its range and its help.  The command lines are built from it.

A setting without help is no option; it is set from the data.  To compute something else, name the
settings that differ on the command line, or write another preset below.
"""
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ddpm import Schedule, cosine, linear
from unet import PAPER, Architecture, setting


def flag(name: str) -> str:
    return "-n" if name == "n" else "--" + name.rstrip("_").replace("_", "-")


def kind(default) -> type:
    """The type of a setting, or of each of its values; those without a default are text."""
    return type(default[0]) if isinstance(default, tuple) else (
        str if default is None else type(default))


def check(settings):
    """Raise ValueError for a value of another type than the default's, or outside its range."""
    for rule in fields(settings):
        value, of = getattr(settings, rule.name), kind(rule.default)
        low, high, choices = map(rule.metadata.get, ("low", "high", "choices"))
        parts = (value,)
        if isinstance(rule.default, tuple):
            parts = value if type(value) is tuple and value else (None,)
        if (value is None and rule.default is None) or all(
                type(part) is of and (low is None or low <= part <= high)
                and (choices is None or part in choices) for part in parts):
            continue
        wanted = f"one of {', '.join(choices)}" if choices else (
            f"{low} .. {high}" if low is not None else f"of type {of.__name__}")
        raise ValueError(f"{flag(rule.name)} must be {wanted}, not {value!r:.40}")


@dataclass(frozen=True)
class Config(Architecture):
    """All that decides what a training run computes, the network's sizes with it.

    The defaults, found by measurement, draw digits after minutes on two cores.
    """

    data: str | None = setting(None, "images: an .npz, .npy or IDX file (the digits in assets/)")
    labels: bool = setting(True, "learn the images' labels too, if they have any")
    flip: bool = setting(False, "mirror half of the images")
    steps: int = setting(2000, "steps of gradient descent", 1, 10**9)
    batch: int = setting(64, "images in each step, over all devices", 1, 10**5)
    lr: float = setting(6e-3, "largest learning rate", 1e-9, 1.0)
    muon_lr: float = setting(0.03, "the same of Muon, for hidden layers; 0: Adam for all", 0.0, 1.0)
    warmup: int = setting(100, "steps in which the learning rate rises", 1, 10**9)
    decay: bool = setting(True, "let the learning rate then fall to 0 in a straight line")
    beta2: float = setting(0.99, "Adam's second beta", 0.0, 0.999999)
    grad_clip: float = setting(1.0, "largest norm of the gradient", 1e-9, 1e9)
    ema_decay: float = setting(0.999, "largest decay of the weights' moving average, which grows "
                               "as (1 + step)/(10 + step)", 0.0, 1.0)
    stratified: bool = setting(True, "draw one t from each of as many equal parts of 1 .. T as "
                               "there are images; the paper draws each t alone")
    p_uncond: float = setting(0.1, "share of the images whose label is dropped", 0.0, 1.0)
    seed: int = setting(0, "of the weights, of the images' order and of the noise", 0, 2**62)
    float32: bool = setting(False, "compute in float32 even where bfloat16 is faster")

    schedule: str = setting("linear", "how beta grows", choices=("linear", "cosine"))
    T: int = setting(1000, "time steps", 1, 10**6)
    beta_1: float = setting(1e-4, "first beta of the linear schedule", 1e-9, 0.9999)
    beta_T: float = setting(0.02, "last beta of the linear schedule", 1e-9, 0.9999)

    fingerprint: str = setting("none")                       # of the data

    def __post_init__(self):
        check(self)
        if self.schedule == "cosine" and (self.beta_1, self.beta_T) != (1e-4, 0.02):
            raise ValueError("--beta-1 and --beta-T belong to --schedule linear")


PRESETS = {
    "digits": Config(),
    # Ho et al. (2020), section 4 and appendix B, and their code
    "cifar10": Config(
        labels=False, flip=True, steps=800_000, batch=128, lr=2e-4, muon_lr=0.0, warmup=5000,
        decay=False, beta2=0.999, ema_decay=0.9999, stratified=False, **asdict(PAPER)),
}


def schedule_from(config: Config) -> Schedule:
    """The schedule that the settings name, in float64."""
    return (cosine(config.T) if config.schedule == "cosine"
            else linear(config.T, config.beta_1, config.beta_T))


@dataclass(frozen=True)
class Training:
    """What is asked of one call of train.py, beside what the run computes."""

    preset: str = setting("digits", "the settings to begin with; cifar10 is the paper's",
                          choices=tuple(PRESETS))
    out: str = setting("out", "folder for checkpoint and pictures")
    resume: bool = setting(False, "continue the run whose checkpoint is in --out, exactly")
    from_: str | None = setting(None, "begin with the weights of this network, with its sizes and "
                                "its schedule: a file of ours, or a published network's folder")
    device: str | None = setting(None, "cuda, mps or cpu; by default the best one here")
    deterministic: bool = setting(False, "bit for bit repeatable on a GPU too; slower")
    compile: bool = setting(False, "use torch.compile: slow to start, then faster")


KEEP = ("left", "right", "top", "bottom", "centre", "coarse")


@dataclass(frozen=True)
class Sampling:
    """How images are drawn.  The defaults are Algorithm 2, with x̂_0 clipped."""

    sampler: str = setting("ddpm", "ddpm: Algorithm 2; ddim: deterministic with --eta 0; dpm: for "
                           "few steps", choices=("ddpm", "ddim", "dpm"))
    steps: int = setting(1000, "sampling steps, at most T", 1, 10**6)
    sigma2: str = setting("beta", "sigma_t^2 of ddpm", choices=("beta", "beta_tilde"))
    eta: float = setting(1.0, "noise that ddim and dpm add: 0 none, 1 that of beta_tilde", 0.0, 1.0)
    clip: bool = setting(True, "keep the predicted x0 in [-1, 1]")
    guidance: float = setting(1.0, "0 ignores the label, 1 follows it, more exaggerates it", 0.0,
                              100.0)
    label: str = setting("each", "a class; none; or each: all classes in turn, a column for each "
                         "(with --keep or --start: none)")
    start: int = setting(0, "take held-out images, noised to this t, back in four ways each; 0: "
                         "draw from noise alone", 0, 10**6)
    keep: str | None = setting(None, "keep a part of held-out images, complete each in four ways: "
                               f"{', '.join(KEEP)}; or a mask.npy, 1 where the image is kept")
    resample: int = setting(1, "with --keep: how often each step is taken", 1, 1000)
    n: int = setting(100, "how many images; with --keep or --start, how many held-out ones", 1,
                     10**6)
    batch: int = setting(100, "images at a time: fewer need less memory", 1, 10**5)
    weights: str | None = setting(None, "a network, a checkpoint or a published network's folder; "
                                  "by default out/checkpoint.safetensors, else the one that ships")
    out: str = setting("out/samples.png", ".png: a grid of the images; .npz: the arrays")
    animate: bool = setting(False, "an animated PNG of x_T to x_0, 41 frames at most; without "
                            "--keep, below each x_t the x0 predicted from it")
    data: str | None = setting(None, "with --keep or --start: where the images are from (what was "
                               "held out of the training)")
    device: str | None = setting(None, "cuda, mps or cpu; by default the best one here")
    seed: int = setting(0, "of the noise", 0, 2**62)

    def __post_init__(self):
        check(self)
        for wrong, reason in (
                (self.sigma2 != "beta" and self.sampler != "ddpm",
                 "--sigma2 belongs to --sampler ddpm"),
                (self.eta != 1 and self.sampler == "ddpm", "--eta belongs to ddim and dpm"),
                (self.resample > 1 and not self.keep, "--resample belongs to --keep"),
                (self.keep and self.start, "--keep and --start: name one of them"),
                (self.keep and self.keep not in KEEP and not self.keep.endswith(".npy"),
                 f"--keep must be one of {', '.join(KEEP)}, or an .npy file, not {self.keep!r}"),
                (self.keep and self.sampler == "dpm",       # its x0_prev would be of another image
                 "--keep works with --sampler ddpm or ddim"),
                (Path(self.out).suffix not in (".png", ".npz"),
                 f"--out must end in .png or .npz, not {self.out!r}")):
            if wrong:
                raise ValueError(reason)


def options(description: str, *settings: type, names: tuple = ()) -> ArgumentParser:
    """An option for each setting that has help, or for those named; the help shows its default."""
    parser = ArgumentParser(description=description, usage="%(prog)s [options]",
                            argument_default=SUPPRESS)      # only what was named is in the result
    own = [rule for each in settings for rule in fields(each)]
    for rule in sorted(own, key=lambda rule: rule.name in Architecture.__dataclass_fields__):
        if not rule.metadata["help"] or names and rule.name not in names:
            continue
        shown, how = rule.default, dict(type=kind(rule.default), choices=rule.metadata["choices"])
        if isinstance(shown, bool):
            how = dict(action=BooleanOptionalAction)
        elif isinstance(shown, tuple):
            shown, how["nargs"] = " ".join(map(str, shown)), "+"
        if rule.metadata["choices"] is None and "action" not in how:
            how["metavar"] = rule.name.strip("_").upper()
        parser.add_argument(flag(rule.name), dest=rule.name, **how, help=rule.metadata["help"] + (
            f" ({shown})" if shown is not None else ""))
    return parser


def named(parser: ArgumentParser, *settings: type) -> list[dict]:
    """What the command line names of each class of settings."""
    values = tuples(vars(parser.parse_args()))
    return [{name: values[name] for name in values if name in each.__dataclass_fields__}
            for each in settings]


def tuples(values: dict) -> dict:
    """Lists, as the command line and JSON have them, made tuples."""
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()}
