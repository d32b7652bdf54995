"""Networks in files: our own checkpoints, and those that others have published.

A file may come from a stranger.  It is believed leaf by leaf: its settings are checked as those of
the command line are, a network of these settings is the template, and the file's values are copied
into new tensors of the template's shapes and types.  What differs from the template is refused by
its name, and no tensor of a file is ever used itself.
"""
import json
import pickletools
import re
import zipfile
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from support.config import Config
from support.images import parsing
from unet import UNet, parameters

PUBLISHED = "diffusion_pytorch_model.bin"
# What torch.save names for plain tensors and dictionaries; all else could build anything.
NAMED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2",
         "torch._utils _rebuild_parameter",
         *(f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Byte"))}


def read(path: Path, kind: str) -> dict:
    """What the file holds, unchecked; nothing in it is run, and it unpacks to its size at most."""
    with open(path, "rb") as file, parsing(path, kind):
        if file.read(4) != b"PK\x03\x04":                  # else torch would read another format
            raise ValueError("it is no zip file as torch.save writes it")
        with zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise ValueError("it would unpack to more than its size")
            if archive.testzip():
                raise ValueError("its checksums do not match")
            for name in (name for name in archive.namelist() if name.lower().endswith(".pkl")):
                named = {argument if code.name == "GLOBAL" else code.name
                         for code, argument, _ in pickletools.genops(archive.read(name))
                         if "GLOBAL" in code.name or "INST" in code.name}
                if named - NAMED:
                    raise ValueError(f"it names {min(named - NAMED)}")
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    return found


def copied(template, found, name: str):
    """The values of `found` in a copy of the template: new tensors of its shapes and types.

    The one entry of a list stands for any number of its kind.  Raises ValueError, with its name,
    for the first leaf that differs in kind, shape, layout or number.
    """
    if isinstance(template, Tensor):
        if not (isinstance(found, Tensor) and found.layout == torch.strided
                and found.is_contiguous() and found.device.type == "cpu"
                and found.shape == template.shape
                and (found.dtype == template.dtype
                     or found.is_floating_point() and template.is_floating_point())):
            raise ValueError(f"{name} is no tensor of {tuple(template.shape)}")
        return torch.empty(template.shape, dtype=template.dtype).copy_(found.detach())
    if not isinstance(found, type(template)) or (
            isinstance(template, tuple) and len(found) != len(template)):
        raise ValueError(f"{name} is no {type(template).__name__}")
    if isinstance(template, dict):
        for key in template.keys() ^ found.keys():
            raise ValueError(f"{name}.{key} is {'missing' if key in template else 'left over'}")
        return {key: copied(value, found[key], f"{name}.{key}") for key, value in template.items()}
    if isinstance(template, list):
        return [copied(template[0], value, f"{name}.{i}") for i, value in enumerate(found)]
    if isinstance(template, tuple):
        return tuple(copied(*both, name) for both in zip(template, found))
    return found


def load_network(path: str | Path, device: torch.device) -> tuple[UNet, Config]:
    """The averaged network of our own checkpoint, or a published one, and its settings."""
    path = Path(path) / PUBLISHED if Path(path).is_dir() else Path(path)
    published = path.name == PUBLISHED
    config = published_config(path.with_name("config.json")) if published else None
    found = read(path, "a published network" if published else "a checkpoint of train.py")
    net, config = network_of(found, path, config)
    return net.to(device, memory_format=torch.channels_last).eval(), config


def network_of(found: dict, path: Path, config: Config | None = None) -> tuple[UNet, Config]:
    """The network in what `path` holds.  config: a published one's settings; ours hold their own.

    Raises ValueError for a file that is not as large as the network that it describes.
    """
    published = config is not None
    with parsing(path, "a network that can be built"):
        if not published:
            if {*found.get("config", ())} != {f.name for f in fields(Config)}:
                raise ValueError("its settings are not those of this version")
            config, found = Config(**found["config"]), found.get("ema")
        with torch.device("meta"):    # shapes only: nothing is allocated before it has been checked
            net = UNet(config)
        if parameters(net) > path.stat().st_size:       # else one tensor could stand for them all
            raise ValueError("it is too small for the network that it describes")
        parts, template = {}, {}
        for name, value in net.state_dict().items():
            parts[name] = their_names(name, config.num_res_blocks) if published else [name]
            template |= zip(parts[name], value.chunk(len(parts[name])))     # q, k, v: one here
        if published:
            for old, new in OLD_NAMES.items():
                found = {name.replace(f".{old}.", f".{new}."): found[name] for name in found}
        good = copied(template, found, "it" if published else "ema")
        net.load_state_dict({name: torch.cat([good[part] for part in parts[name]])
                             for name in parts}, assign=True)
    return net, config


# A part of one of our names, and what diffusers calls it.
THEIR_NAMES = (
    (r"^time\.0", "time_embedding.linear_1"), (r"^time\.2", "time_embedding.linear_2"),
    (r"^norm_out", "conv_norm_out"), (r"^middle\.0\.attention", "mid_block.attentions.0"),
    (r"^middle", "mid_block.resnets"), (r"\.time\.", ".time_emb_proj."),
    (r"\.shortcut\.", ".conv_shortcut."), (r"(attentions\.\d+)\.norm", r"\1.group_norm"),
    (r"\.proj\.", ".to_out.0."),
)
# What it called them at first.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Settings that have only one value here.
SAME = dict(act_fn="silu", center_input_sample=False, class_embed_type=None,
            mid_block_scale_factor=1, resnet_time_scale_shift="default",
            time_embedding_type="positional")
STATED = dict(attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
              norm_eps=1e-6)                                # whose defaults are others


def published_config(path: Path) -> Config:
    """Our settings for theirs.  Raises ValueError for a network that unet.py does not compute.

    Theirs were trained with t = 0..T−1, so they are called with t − 1: `first_t` says so.
    """
    with open(path, "rb") as file, parsing(path, "the description of a published network"):
        theirs = json.load(file)
        for name, value in (SAME | STATED).items():
            if theirs.get(name, SAME.get(name, "missing")) != value:
                raise ValueError(f"its {name} is not {value}: that is another network")
        channels, size = theirs["block_out_channels"], theirs["sample_size"]
        attention = tuple(size >> level for level, kind in enumerate(theirs["down_block_types"])
                          if "Attn" in kind)
        return Config(
            labels=False, model_channels=channels[0], num_groups=theirs["norm_num_groups"],
            channel_mult=tuple(c // channels[0] for c in channels), patch_size=1, first_t=0,
            num_res_blocks=theirs["layers_per_block"], attention_resolutions=attention or (0,),
            dropout=float(theirs.get("dropout", 0.0)),
            image_shape=(theirs["in_channels"], size, size))


def their_names(name: str, blocks: int) -> list[str]:
    """What diffusers calls a tensor of unet.py, where levels are not folders of their own."""
    def place(match):
        way, count = match[1], blocks + 1 + (match[1] == "up")    # blocks, then a resampler
        level, k = divmod(int(match[2]), count)
        kind = f"attentions.{k}" if match[3] else f"resnets.{k}"
        return f"{way}_blocks.{level}.{kind if k < count - 1 else f'{way}samplers.0'}."

    name = re.sub(r"^(down|up)\.(\d+)\.(attention\.)?", place, name)
    for ours, theirs in THEIR_NAMES:
        name = re.sub(ours, theirs, name)
    parts = ("to_q", "to_k", "to_v") if "qkv" in name else ("",)
    return [name.replace("qkv", part) for part in parts]
