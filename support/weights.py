"""Networks in files: safetensors, our own and those that others have published.

The format: eight bytes of length, a JSON header that names each tensor's type, shape and place, the
bytes.  Nothing in it can be run.  A file may still be damaged, or a stranger's: its settings are
checked like those of the command line, and its tensors against the network that these describe.
"""
import json
import re
import zlib
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from support.config import Config, tuples
from support.data import parsing
from unet import UNet, time_embedding

PUBLISHED = "diffusion_pytorch_model"
LARGEST = 1 << 20                           # bytes of a header, or of a description beside it
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_tensors(file, tensors: dict[str, Tensor], metadata: dict[str, str]):
    """safetensors, with a crc32 of the bytes in the metadata."""
    names, header, body = {dtype: name for name, dtype in DTYPES.items()}, {}, bytearray()
    for name, tensor in tensors.items():
        start = len(body)
        body += tensor.detach().cpu().numpy().tobytes()
        header[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape),
                            data_offsets=[start, len(body)])
    header["__metadata__"] = metadata | dict(crc32=f"{zlib.crc32(body):08x}")
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.writelines((len(text).to_bytes(8, "little"), text, body))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata.  Raises OSError if it is none."""
    with open(path, "rb") as file, parsing(path, "a safetensors file"):
        size = int.from_bytes(file.read(8), "little")
        if size > LARGEST:
            raise ValueError("DATA.md shows how to convert a .pt or .bin; images belong to --data")
        header = json.loads(file.read(size))
        body, metadata, tensors = bytearray(file.read()), header.pop("__metadata__", {}), {}
        if zlib.crc32(body) != int(metadata.get("crc32", f"{zlib.crc32(body):x}"), 16):
            raise ValueError("its bytes do not match its checksum")
        for name, entry in header.items():
            (start, end), dtype = entry["data_offsets"], DTYPES[entry["dtype"]]
            flat = torch.frombuffer(memoryview(body)[start:end], dtype=dtype) if end > start else (
                torch.empty(0, dtype=dtype))
            tensors[name] = flat.reshape(entry["shape"])
    return tensors, metadata


def config_from(metadata: dict[str, str]) -> Config:
    """The settings in a file of ours.  Raises ValueError, naming those of another version."""
    values = json.loads(metadata.get("config", "{}"))
    for name in {f.name for f in fields(Config)} ^ values.keys():
        raise ValueError(f"setting {'left over' if name in values else 'missing'}: {name}")
    return Config(**tuples(values))


def load_network(path: str | Path, device: torch.device) -> tuple[UNet, Config]:
    """The averaged network of our own file, or a published one in its folder, and its settings."""
    path = Path(path)
    path = path / "unet" if (path / "unet").is_dir() else path                # a whole pipeline
    path = min(path.glob(f"{PUBLISHED}*"), default=path,         # float16's name is a longer one
               key=lambda file: (file.suffix != ".safetensors", len(file.name)))
    found, metadata = read_tensors(path)
    published = path.name.startswith(PUBLISHED)
    with parsing(path, "a network that can be built here"):
        config = published_config(path.parent) if published else config_from(metadata)
        with torch.device("meta"):                # only shapes: the memory is that of the file
            net = UNet(config)
        if published:
            found = our_tensors(found, net.state_dict(), config)
        ema = {name.removeprefix("ema."): tensor for name, tensor in found.items()
               if name.startswith("ema.")}                                    # of a whole run
        net.load_state_dict(ema or found, assign=True)
    return net.float().to(device).eval(), config


def relabelled(tensors: dict[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    """The tensors of a network for so many labels.  If it has others, each of the new ones begins
    as its "no label"; without labels that becomes a bias, and without a table it is 0.
    """
    table, bias = tensors.get("label_table"), tensors["time_mlp.2.bias"]
    if table is None or len(table) != num_classes + 1:
        null = torch.zeros_like(bias) if table is None else table[-1]
        tensors = {name: tensor for name, tensor in tensors.items() if name != "label_table"}
        if num_classes:
            tensors["label_table"] = null.repeat(num_classes + 1, 1)
        else:
            tensors["time_mlp.2.bias"] = bias + null
    return tensors


# ── Published networks ────────────────────────────────────────────────────────────────────────────

# Settings that have only one value here, and of those the ones whose default is another.
FIXED = dict(act_fn="silu", add_attention=True, attn_norm_num_groups=None,
             center_input_sample=False, class_embed_type=None, mid_block_scale_factor=1,
             resnet_time_scale_shift="default", time_embedding_type="positional")
STATED = dict(attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
              norm_eps=1e-6)


def published_config(folder: Path) -> Config:
    """Our settings for a network as diffusers describes it, and for the schedule beside it.

    Raises ValueError for what is not computed here.
    """
    theirs = json.loads((folder / "config.json").read_bytes()[:LARGEST])
    for name, value in (FIXED | STATED).items():
        if theirs.get(name, FIXED.get(name, "missing")) != value:
            raise ValueError(f"its {name} is not {value}: that is another network")
    c, *_ = channels = theirs["block_out_channels"]
    size = theirs["sample_size"]
    if size is None:
        raise ValueError("its sample_size is null: write the side of its images into config.json")
    height, width = size if isinstance(size, list) else (size, size)
    attention = tuple(height >> level for level, kind in enumerate(theirs["down_block_types"])
                      if "Attn" in kind)
    return Config(
        labels=False, model_channels=c, channel_mult=tuple(each // c for each in channels),
        num_groups=theirs["norm_num_groups"], num_res_blocks=theirs["layers_per_block"],
        attention_resolutions=attention or (0,), dropout=float(theirs.get("dropout", 0.0)),
        patch_size=1, image_shape=(theirs["in_channels"], height, width),
        **published_schedule(folder))


def published_schedule(folder: Path) -> dict:
    """Our settings for the schedule that lies beside the network, or in a folder beside its own."""
    for path in (folder, folder.parent / "scheduler"):
        path = path / "scheduler_config.json"
        if path.exists():
            theirs = json.loads(path.read_bytes()[:LARGEST])
            betas = dict(beta_1=theirs["beta_start"], beta_T=theirs["beta_end"])
            ours = {"linear": dict(schedule="linear", **betas),
                    "squaredcos_cap_v2": dict(schedule="cosine")}
            if (theirs.get("prediction_type", "epsilon") != "epsilon"
                    or theirs["beta_schedule"] not in ours
                    or theirs.get("trained_betas") or theirs.get("rescale_betas_zero_snr")):
                raise ValueError(f"{path.name} is not computed here: it must predict epsilon, with "
                                 "linear or squaredcos_cap_v2 betas")
            if theirs.get("clip_sample") is False:
                print("its scheduler does not clip: --no-clip draws as it does")
            return dict(T=theirs["num_train_timesteps"], **ours[theirs["beta_schedule"]])
    return {}


def our_tensors(found: dict[str, Tensor], names, config: Config) -> dict[str, Tensor]:
    """The tensors of a published network under our names, and its first layer for t = 1 .. T.

    Theirs counts t = 0 .. T − 1, and sin ω(t−1), cos ω(t−1) are sin ωt and cos ωt, rotated by ω:
    the rotation is put into the layer that takes them.  sin ω and cos ω are the embedding of t = 1.
    """
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"),
                     ("proj_attn", "to_out.0")):                     # what it called them at first
        found = {name.replace(f".{old}.", f".{new}."): tensor for name, tensor in found.items()}
    parts = {name: their_names(name, config.num_res_blocks) for name in names}
    for name in {part for each in parts.values() for part in each} ^ found.keys():
        raise ValueError(f"tensor {'left over' if name in found else 'missing'}: {name}")
    ours = {name: torch.cat([found[part].float() for part in parts[name]]) for name in names}
    sin_1, cos_1 = time_embedding(torch.tensor([1]), config.model_channels)[0].chunk(2)
    sin, cos = ours["time_mlp.0.weight"].chunk(2, dim=1)
    rotated = [sin * cos_1 + cos * sin_1, cos * cos_1 - sin * sin_1]
    ours["time_mlp.0.weight"] = torch.cat(rotated, dim=1)
    return ours


# A part of one of our names, and what diffusers calls it.
THEIR_NAMES = (
    (r"^time_mlp\.0", "time_embedding.linear_1"),
    (r"^time_mlp\.2", "time_embedding.linear_2"),
    (r"^norm_out", "conv_norm_out"), (r"^middle\.0\.attention", "mid_block.attentions.0"),
    (r"^middle", "mid_block.resnets"), (r"\.time\.", ".time_emb_proj."),
    (r"\.shortcut\.", ".conv_shortcut."), (r"(attentions\.\d+)\.norm", r"\1.group_norm"),
    (r"\.proj\.", ".to_out.0."),
)


def their_names(name: str, blocks: int) -> list[str]:
    """What diffusers calls a tensor of unet.py, whose levels are not numbered apart."""
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
