"""Networks in files: safetensors, damaged ones, a stranger's, and those that others publish."""
import json
import re
import struct
import zlib
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import ddpm
import sample
from support.config import Config, Sampling, flag, schedule_from
from support.data import load, to_batch
from support.test_data import CHANGES, TRIES, changed
from support.weights import PUBLISHED, load_network, read_tensors, write_tensors
from test_math import generate
from unet import UNet

CPU, WEIGHTS = torch.device("cpu"), f"{PUBLISHED}.safetensors"
CONFIG = Config(image_shape=(1, 4, 4), model_channels=8, channel_mult=(1,), num_classes=2, T=3,
                patch_size=1, float32=True, beta_1=0.1, beta_T=0.2)


def network(config):
    """A network whose weights are all random."""
    torch.manual_seed(0)
    net = UNet(config).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def saved(path, tensors, **changes):
    """A file of ours: these tensors, and the settings of CONFIG, changed, or removed with `...`."""
    config = {k: v for k, v in (asdict(CONFIG) | changes).items() if v is not ...}
    with open(path, "wb") as file:
        write_tensors(file, tensors, dict(config=json.dumps(config), step="1"))
    return path


def by_hand(body, dtype="F32", shape=(2,), end=8, **more):
    """A file written without our writer: the tensor a, and whatever is named besides."""
    header = dict(a=dict(dtype=dtype, shape=shape, data_offsets=[0, end])) | more
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_the_file_is_what_the_format_says(tmp_path):
    """safetensors: length, header, bytes; both ways, by the format's own rules; their crc32."""
    tensors = dict(a=torch.arange(6.0).reshape(2, 3), b=torch.tensor(1.5, dtype=torch.float64),
                   none=torch.zeros(0, 2), half=torch.tensor([1.0, -2.0]).half())
    path = saved(tmp_path / "x.safetensors", tensors)
    raw = path.read_bytes()
    size, = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8:8 + size]), raw[8 + size:]
    assert size % 8 == 0 and int(header["__metadata__"]["crc32"], 16) == zlib.crc32(body)
    found, metadata = read_tensors(path)
    assert found.keys() == tensors.keys() and metadata["step"] == "1"
    for name, kind in dict(a="<f4", b="<f8", none="<f4", half="<f2").items():
        start, end = header[name]["data_offsets"]
        array = np.frombuffer(body[start:end], kind).reshape(header[name]["shape"])
        assert np.array_equal(array, tensors[name].numpy())
        assert torch.equal(found[name], tensors[name])
    path.write_bytes(by_hand(b"\x80\x3f\x00\xc0", "BF16", end=4))
    found, metadata = read_tensors(path)
    assert found["a"].tolist() == [1, -2] and metadata == {}


@pytest.mark.parametrize("body, says", [
    (b"", "Expecting value"), (b"PK\x03\x04" * 9, "DATA.md shows how to convert a .pt or .bin"),
    (struct.pack("<Q", 2 << 20) + b"[]," * (2 << 20), "DATA.md shows"),        # a header too large
    (by_hand(bytes(8), __metadata__=dict(crc32="0")), "checksum"),
    (by_hand(bytes(7)), "must be a multiple"), (by_hand(bytes(8), end=4), "shape '[2]' is invalid"),
    (by_hand(bytes(8), shape=(-1, -2)), "invalid shape dimension"),
    (by_hand(b"", a=7), "a part of it is missing or of another type: 'int' object"),
    (by_hand(b"", __metadata__=[]), "a part of it is missing or of another type: 'list' object")])
def test_what_the_format_forbids_is_refused(body, says, tmp_path):
    """safetensors: what is too short, or of another shape, type or checksum: one line."""
    (tmp_path / "x").write_bytes(body)
    with pytest.raises(OSError, match="cannot be read as a safetensors file: ") as caught:
        read_tensors(tmp_path / "x")
    assert says in str(caught.value) and caught.value.filename == str(tmp_path / "x")


@pytest.mark.parametrize("tensors, settings, says", [
    (dict(more=torch.ones(1)), {}, "more"), ({"conv_in.bias": None}, {}, "conv_in.bias"),
    ({"conv_in.bias": torch.ones(9)}, {}, "conv_in.bias"), ({}, dict(channel_mult=(64,)), "size"),
    ({}, dict(new=1), "setting left over: new"), ({}, dict(beta2=...), "setting missing: beta2"),
    ({}, dict(image_shape=(1,)), "not enough values to unpack"),
    *(({}, {name: value}, f"{flag(name)} must be ") for name, value in dict(
        model_channels=2**40, num_groups=4.0, attention_resolutions=0, lr=(0.1,), channel_mult=(),
        T=None, dropout=float("nan"), schedule="x").items())])
def test_a_network_is_the_one_that_its_settings_describe(tensors, settings, says, tmp_path):
    """Weights: what differs is refused by name, and nothing larger than the file is built."""
    found = {k: v for k, v in (network(CONFIG).state_dict() | tensors).items() if v is not None}
    path = saved(tmp_path / "x.safetensors", found, **settings)
    with pytest.raises(OSError, match=re.escape(says)):
        load_network(path, CPU)


@TRIES
@given(changes=CHANGES, in_header=st.booleans())
def test_any_bytes_are_a_network_or_refused(tmp_path_factory, changes, in_header):
    """Readers: bytes changed, removed or put in: OSError, or a network that draws."""
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    good = saved(path, network(CONFIG).state_dict()).read_bytes()
    path.write_bytes(changed(good[:6000], changes) + good[6000:] if in_header
                     else changed(good, changes))
    try:
        net, config = load_network(path, CPU)
    except OSError as error:
        assert error.filename == str(path)
        return
    label = torch.zeros(1, dtype=torch.long) if config.num_classes else None
    assert len(generate(net, config, Sampling(steps=1), range(1), label)) == 2


def test_the_network_that_ships_predicts_what_it_did(tmp_path, monkeypatch):
    """assets/digits.safetensors: it sees the noise in a digit, and less where t or label differ."""
    monkeypatch.chdir(tmp_path)                          # where no checkpoint of yours is in out/
    net, config = load_network(sample.default_weights(), CPU)
    images, labels = map(torch.from_numpy, load())
    x0, label = to_batch(images[:50]), labels[:50]
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    x_t = ddpm.q_sample(x0, 300, eps, schedule_from(config))
    with torch.no_grad():
        right, other_label, other_t = (
            (net(x_t, torch.full((50,), t), c) - eps).square().mean().item()
            for t, c in ((300, label), (300, (label + 1) % 10), (600, label)))
    assert right < 0.03 < 2 * right and other_label > 1.1 * right and other_t > 0.05


# ── Published networks ────────────────────────────────────────────────────────────────────────────

STEMS = {"conv_in": "conv_in", "time_mlp.0": "time_embedding.linear_1",
         "time_mlp.2": "time_embedding.linear_2", "down.0": "down_blocks.0.resnets.0",
         "down.1.conv": "down_blocks.0.downsamplers.0.conv", "down.2": "down_blocks.1.resnets.0",
         "down.2.attention": "down_blocks.1.attentions.0", "middle.0": "mid_block.resnets.0",
         "middle.0.attention": "mid_block.attentions.0", "middle.1": "mid_block.resnets.1",
         "up.0": "up_blocks.0.resnets.0", "up.0.attention": "up_blocks.0.attentions.0",
         "up.1": "up_blocks.0.resnets.1", "up.1.attention": "up_blocks.0.attentions.1",
         "up.2.conv": "up_blocks.0.upsamplers.0.conv", "up.3": "up_blocks.1.resnets.0",
         "up.4": "up_blocks.1.resnets.1", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
PARTS = dict(time="time_emb_proj", shortcut="conv_shortcut", norm="group_norm")
OLD = dict(q="query", k="key", v="value", proj="proj_attn")
NEW = dict(q="to_q", k="to_k", v="to_v", proj="to_out.0")
DESCRIBED = dict(sample_size=[8, 12], in_channels=3, block_out_channels=[8, 16], layers_per_block=1,
                 norm_num_groups=4, down_block_types=["DownBlock2D", "AttnDownBlock2D"],
                 freq_shift=1, attention_head_dim=None, downsample_padding=0, norm_eps=1e-6,
                 flip_sin_to_cos=False, dropout=0.25)
SCHEDULER = dict(num_train_timesteps=7, beta_start=0.01, beta_end=0.3, beta_schedule="linear")
THEIRS = Config(image_shape=(3, 8, 12), model_channels=8, attention_resolutions=(4,), num_groups=4,
                patch_size=1, labels=False, dropout=0.25)


def published(net, attention):
    """The network's tensors under diffusers' names, of its first version or of today's."""
    theirs = {}
    for name, p in net.state_dict().items():
        ours = max((stem for stem in STEMS if name.startswith(f"{stem}.")), key=len)
        part, _, kind = name.removeprefix(f"{ours}.").rpartition(".")
        parts = zip("qkv", p.chunk(3)) if part == "qkv" else [(part, p)]
        for part, tensor in parts:
            part = (PARTS | attention).get(part, part)
            theirs[".".join(filter(None, (STEMS[ours], part, kind)))] = tensor
    return theirs


@pytest.fixture
def folder(tmp_path):
    """A published network in its folder; returned beside it."""
    net = network(THEIRS)
    (tmp_path / "config.json").write_text(json.dumps(DESCRIBED))
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    saved(tmp_path / WEIGHTS, published(net, NEW))
    return tmp_path, net


@pytest.mark.parametrize("names", [OLD, NEW])
def test_published_networks_are_read(names, folder):
    """Published weights: diffusers' names, old and new, give the same network, which is called with
    t in 1..T where theirs is called with t − 1; T and betas are those beside it.
    """
    path, net = folder
    saved(path / WEIGHTS, published(net, names))
    x = torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    for place in (path, path / WEIGHTS):
        found, config = load_network(place, CPU)
        assert config == replace(THEIRS, T=7, beta_1=0.01, beta_T=0.3)
        with torch.no_grad():
            for t in (torch.tensor([1, 2, 7]), torch.tensor([400, 999, 1000])):
                expected = net(x, t - 1)
                assert (found(x, t) - expected).abs().max() < 1e-4 * expected.abs().max()
                assert (found(x, t - 1) - expected).abs().max() > 1e-3 * expected.abs().max()
    (path / "scheduler_config.json").unlink()
    assert load_network(path, CPU)[1] == THEIRS


def test_a_whole_pipeline_is_read(folder):
    """Published weights: unet/ and scheduler/, with cosine betas; attention in the middle alone."""
    path, net = folder
    (path / "unet").mkdir()
    (path / "scheduler").mkdir()
    saved(path / "unet" / WEIGHTS, {name: p for name, p in published(net, NEW).items()
                                    if "attentions" not in name or name.startswith("mid_block")})
    (path / "unet/config.json").write_text(json.dumps(
        DESCRIBED | dict(down_block_types=["DownBlock2D", "DownBlock2D"])))
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(
        SCHEDULER | dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50)))
    assert load_network(path, CPU)[1] == replace(THEIRS, T=50, schedule="cosine",
                                                 attention_resolutions=(0,))


def test_which_file_of_a_folder_is_read(folder, capsys):
    """Published weights: float16 where there is no float32; all else is refused by its name."""
    path, net = folder
    whole, half, part, pickled = (path / f"{PUBLISHED}{kind}" for kind in (
        ".safetensors", ".fp16.safetensors", "-00001-of-00002.safetensors", ".bin"))
    saved(half, {name: p.half() for name, p in published(net, NEW).items()})
    saved(part, published(net, NEW) | {"a.more": torch.ones(1)})
    torch.save({}, pickled)
    assert torch.equal(load_network(path, CPU)[0].conv_in.bias, net.conv_in.bias)
    whole.unlink()
    (path / "scheduler_config.json").write_text(json.dumps(SCHEDULER | dict(clip_sample=False)))
    assert not capsys.readouterr().out
    assert torch.equal(load_network(path, CPU)[0].conv_in.bias, net.conv_in.bias.half().float())
    assert capsys.readouterr().out == "its scheduler does not clip: --no-clip draws as it does\n"
    for gone, says in ((half, "tensor left over: a.more.*-of-00002"),
                       (part, "convert a .pt or .bin.*model.bin"), (pickled, "Is a directory")):
        gone.unlink()
        with pytest.raises(OSError, match=says):
            load_network(path, CPU)


STATED = ["freq_shift", "attention_head_dim", "downsample_padding", "norm_eps", "flip_sin_to_cos"]


@pytest.mark.parametrize("name, value, says", [
    *((name, "absent", f"its {name} is not") for name in STATED),
    *((name, "other", f"its {name} is not") for name in [
        *STATED, "act_fn", "add_attention", "attn_norm_num_groups", "center_input_sample",
        "class_embed_type", "mid_block_scale_factor", "resnet_time_scale_shift",
        "time_embedding_type"]),
    ("layers_per_block", 2, "tensor missing: "), ("sample_size", -8, "must be 0 .. 8192"),
    ("layers_per_block", "absent", "a part of it is missing or of another type: 'layers_per_b"),
    ("block_out_channels", [8, 24], "size mismatch"), ("num_train_timesteps", 0, "--T must be"),
    ("block_out_channels", [], "not enough values to unpack"),
    ("sample_size", None, "its sample_size is null"),
    ("prediction_type", "v_prediction", "must predict epsilon"),
    *((name, value, "scheduler_config.json is not computed") for name, value in dict(
        beta_schedule="scaled_linear", trained_betas=[0.1], rescale_betas_zero_snr=True).items())])
def test_another_network_is_refused(name, value, says, folder):
    """Published weights: a description that is not computed here, or that is none."""
    for file in ("config.json", "scheduler_config.json"):
        path = folder[0] / file
        described = json.loads(path.read_text()) | {name: value}
        path.write_text(json.dumps({k: v for k, v in described.items() if v != "absent"}))
    with pytest.raises(OSError, match=re.escape(says)):
        load_network(folder[0], CPU)
