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
from support.config import Config, Sampling, schedule_from
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


def by_hand(tensors, offsets=None, body=None, **more):
    """A file written without our writer: little-endian float32, and whatever is named besides."""
    header, start, parts = {}, 0, b""
    for name, array in tensors.items():
        raw = np.asarray(array, "<f4").tobytes()
        header[name] = dict(dtype="F32", shape=list(np.shape(array)),
                            data_offsets=(offsets or {}).get(name, [start, start + len(raw)]))
        start, parts = start + len(raw), parts + raw
    text = json.dumps(header | more).encode()
    return struct.pack("<Q", len(text)) + text + (parts if body is None else body)


def test_the_file_is_what_the_format_says(tmp_path):
    """safetensors: length, header, bytes; both ways, by the format's own rules; the crc32 is of the
    bytes.
    """
    tensors = dict(a=torch.arange(6.0).reshape(2, 3), b=torch.tensor(1.5, dtype=torch.float64),
                   none=torch.zeros(0, 2), half=torch.tensor([1.0, -2.0]).half())
    path = saved(tmp_path / "x.safetensors", tensors)
    raw = path.read_bytes()
    size, = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8:8 + size]), raw[8 + size:]
    assert size % 8 == 0 and int(header["__metadata__"]["crc32"], 16) == zlib.crc32(body)
    for name, kind in dict(a="<f4", b="<f8", none="<f4", half="<f2").items():
        start, end = header[name]["data_offsets"]
        array = np.frombuffer(body[start:end], kind).reshape(header[name]["shape"])
        assert np.array_equal(array, tensors[name].numpy())
    found, metadata = read_tensors(path)
    assert found.keys() == tensors.keys() and metadata["step"] == "1"
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    other = dict(w=np.arange(4).reshape(2, 2), v=[1, 2, 3])
    path.write_bytes(by_hand(other))
    found, metadata = read_tensors(path)
    assert metadata == {} and all(np.array_equal(found[name], other[name]) for name in other)
    path.write_bytes(by_hand({}, w=dict(dtype="BF16", shape=[2], data_offsets=[0, 4]),
                             body=b"\x80\x3f\x00\xc0"))
    assert read_tensors(path)[0]["w"].tolist() == [1, -2]


@pytest.mark.parametrize("body, says", [
    (b"", "Expecting value"), (b"PK\x03\x04" * 9, "DATA.md shows how to convert a .pt or .bin"),
    (struct.pack("<Q", 2 << 20) + b"[]," * (2 << 20), "DATA.md shows"),        # a header too large
    (by_hand(dict(a=[1, 2]), body=b"0" * 7), "must be a multiple"),
    (by_hand(dict(a=[1, 2]), offsets={"a": [0, 4]}), "shape '[2]' is invalid for input of size 1"),
    (by_hand(dict(a=[1, 2]), __metadata__=dict(crc32="0")), "checksum"),
    (by_hand({}, a=dict(dtype="F32", shape=[-1, -2], data_offsets=[0, 8]), body=b"0" * 8),
     "invalid shape dimension"),
    *((body, "a part of it is missing or of another type") for body in (
        by_hand({}, a=dict(dtype="X", shape=[2], data_offsets=[0, 8])), by_hand({}, a=7),
        struct.pack("<Q", 2) + b"[]", by_hand({}, __metadata__=[])))])
def test_what_the_format_forbids_is_refused(body, says, tmp_path):
    """safetensors: what is too short, or of another shape, type or checksum: one line."""
    (tmp_path / "x").write_bytes(body)
    with pytest.raises(OSError, match="cannot be read as a safetensors file: ") as caught:
        read_tensors(tmp_path / "x")
    assert says in str(caught.value) and caught.value.filename == str(tmp_path / "x")


@pytest.mark.parametrize("tensors, settings_, says", [
    (dict(more=torch.ones(1)), {}, "more"), ({"conv_in.bias": None}, {}, "conv_in.bias"),
    ({"conv_in.bias": torch.ones(9)}, {}, "conv_in.bias"), ({}, dict(channel_mult=(64,)), "size"),
    ({}, dict(model_channels=2**40), "--model-channels must be 4 .. 4096"),
    ({}, dict(num_groups=4.0), "--num-groups must be"), ({}, dict(new=1), "setting left over: new"),
    ({}, dict(beta2=...), "setting missing: beta2"),
    ({}, dict(attention_resolutions=0), "--attention-resolutions must be"),
    ({}, dict(lr=(0.1,)), "--lr must be"), ({}, dict(channel_mult=()), "--channel-mult must be"),
    ({}, dict(T=None), "--T must be"), ({}, dict(dropout=float("nan")), "--dropout must be"),
    ({}, dict(image_shape=(1,)), "not enough values to unpack"),
    ({}, dict(schedule="x"), "--schedule must be one of linear, cosine")])
def test_a_network_is_the_one_that_its_settings_describe(tensors, settings_, says, tmp_path):
    """Weights: what differs is refused by its name, and nothing is built that is larger than the
    file.
    """
    found = {k: v for k, v in (network(CONFIG).state_dict() | tensors).items() if v is not None}
    path = saved(tmp_path / "x.safetensors", found, **settings_)
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


def test_the_network_that_ships_predicts_what_it_did():
    """assets/digits.safetensors: it sees the noise in a digit, and less where t or label are
    others.
    """
    net, config = load_network(sample.default_weights(), CPU)
    images, labels = map(torch.from_numpy, load())
    x0, label = to_batch(images[:50]), labels[:50]
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    x_t = ddpm.q_sample(x0, 300, eps, schedule_from(config))

    def loss(t, label):
        with torch.no_grad():
            return (net(x_t, torch.full((50,), t), label) - eps).square().mean().item()
    assert loss(300, label) < 0.03 < 2 * loss(300, label)
    assert loss(300, (label + 1) % 10) > 1.1 * loss(300, label) and loss(600, label) > 0.05


# ── Published networks ────────────────────────────────────────────────────────────────────────────

OURS = {"conv_in": "conv_in", "time_embedding.linear_1": "time_mlp.0",
        "time_embedding.linear_2": "time_mlp.2", "down_blocks.0.resnets.0": "down.0",
        "down_blocks.0.downsamplers.0.conv": "down.1.conv", "down_blocks.1.resnets.0": "down.2",
        "down_blocks.1.attentions.0": "down.2.attention", "mid_block.resnets.0": "middle.0",
        "mid_block.attentions.0": "middle.0.attention", "mid_block.resnets.1": "middle.1",
        "up_blocks.0.resnets.0": "up.0", "up_blocks.0.attentions.0": "up.0.attention",
        "up_blocks.0.resnets.1": "up.1", "up_blocks.0.attentions.1": "up.1.attention",
        "up_blocks.0.upsamplers.0.conv": "up.2.conv", "up_blocks.1.resnets.0": "up.3",
        "up_blocks.1.resnets.1": "up.4", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
PARTS = {"norm1": "norm1", "conv1": "conv1", "time_emb_proj": "time", "norm2": "norm2",
         "conv2": "conv2", "conv_shortcut": "shortcut"}
OLD = dict(q="query", k="key", v="value", out="proj_attn")
NEW = dict(q="to_q", k="to_k", v="to_v", out="to_out.0")
DESCRIBED = dict(sample_size=[8, 12], in_channels=3, block_out_channels=[8, 16], layers_per_block=1,
                 norm_num_groups=4, down_block_types=["DownBlock2D", "AttnDownBlock2D"],
                 freq_shift=1, attention_head_dim=None, downsample_padding=0, norm_eps=1e-6,
                 flip_sin_to_cos=False, dropout=0.25)
SCHEDULER = dict(num_train_timesteps=7, beta_start=0.01, beta_end=0.3, beta_schedule="linear")
THEIRS = Config(image_shape=(3, 8, 12), model_channels=8, attention_resolutions=(4,), num_groups=4,
                patch_size=1, labels=False, dropout=0.25)


def published(net, attention):
    """The network's tensors under diffusers' names, of its first version or of today's."""
    tensors, theirs = net.state_dict(), {}
    for stem, our_stem in OURS.items():
        for kind in ("weight", "bias"):
            if "resnets" in stem:
                theirs |= {f"{stem}.{part}.{kind}": tensors[f"{our_stem}.{our_part}.{kind}"]
                           for part, our_part in PARTS.items()
                           if f"{our_stem}.{our_part}.{kind}" in tensors}
            elif "attentions" in stem:
                qkv = tensors[f"{our_stem}.qkv.{kind}"].chunk(3)
                theirs |= {f"{stem}.{attention[k]}.{kind}": part for k, part in zip("qkv", qkv)}
                theirs[f"{stem}.{attention['out']}.{kind}"] = tensors[f"{our_stem}.proj.{kind}"]
                theirs[f"{stem}.group_norm.{kind}"] = tensors[f"{our_stem}.norm.{kind}"]
            else:
                theirs[f"{stem}.{kind}"] = tensors[f"{our_stem}.{kind}"]
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
        assert replace(config, T=1000, beta_1=1e-4, beta_T=0.02) == THEIRS
        assert (config.T, config.beta_1, config.beta_T) == (7, 0.01, 0.3)
        with torch.no_grad():
            for t in (torch.tensor([1, 2, 7]), torch.tensor([400, 999, 1000])):
                expected = net(x, t - 1)
                assert (found(x, t) - expected).abs().max() < 1e-4 * expected.abs().max()
                assert (found(x, t - 1) - expected).abs().max() > 1e-3 * expected.abs().max()
    (path / "scheduler_config.json").unlink()
    assert load_network(path, CPU)[1] == THEIRS


def test_a_whole_pipeline_is_read(folder):
    """Published weights: unet/ and scheduler/ of a pipeline, with cosine betas, and with attention
    in the middle alone.
    """
    path, net = folder
    saved(path / WEIGHTS, {name: p for name, p in published(net, NEW).items()
                           if "attentions" not in name or name.startswith("mid_block")})
    (path / "config.json").write_text(json.dumps(
        DESCRIBED | dict(down_block_types=["DownBlock2D", "DownBlock2D"])))
    (path / "unet").mkdir(), (path / "scheduler").mkdir()
    for name in (WEIGHTS, "config.json"):
        (path / name).rename(path / "unet" / name)
    (path / "scheduler_config.json").unlink()
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(
        SCHEDULER | dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50)))
    assert load_network(path, CPU)[1] == replace(THEIRS, T=50, schedule="cosine",
                                                 attention_resolutions=(0,))


def test_which_file_of_a_folder_is_read(folder, capsys):
    """Published weights: float16 where there is no float32; or else what there is, a part of many,
    a .bin or nothing, is named.  That their scheduler does not clip is told.
    """
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


@pytest.mark.parametrize("file, change, says", [
    *(("config.json", {name: "absent"}, f"its {name} is not") for name in STATED),
    *(("config.json", {name: "other"}, f"its {name} is not") for name in [
        *STATED, "act_fn", "add_attention", "attn_norm_num_groups", "center_input_sample",
        "class_embed_type", "mid_block_scale_factor", "resnet_time_scale_shift",
        "time_embedding_type"]),
    ("config.json", dict(layers_per_block=2), "tensor missing: "),
    ("config.json", dict(layers_per_block="absent"), "missing or of another type: 'layers_per_b"),
    ("config.json", dict(block_out_channels=[8, 24]), "size mismatch"),
    ("config.json", dict(block_out_channels=[]), "not enough values to unpack"),
    ("config.json", dict(sample_size=-8), "must be 0 .. 8192"),
    ("config.json", dict(sample_size=None), "its sample_size is null"),
    ("scheduler_config.json", dict(prediction_type="v_prediction"), "must predict epsilon"),
    ("scheduler_config.json", dict(beta_schedule="scaled_linear"), "config.json is not computed"),
    ("scheduler_config.json", dict(trained_betas=[0.1, 0.2]), "config.json is not computed"),
    ("scheduler_config.json", dict(rescale_betas_zero_snr=True), "config.json is not computed"),
    ("scheduler_config.json", dict(num_train_timesteps=0), "--T must be")])
def test_another_network_is_refused(file, change, says, folder):
    """Published weights: a description that is not computed here, or that is none."""
    path, _ = folder
    described = json.loads((path / file).read_text()) | change
    (path / file).write_text(json.dumps({k: v for k, v in described.items() if v != "absent"}))
    with pytest.raises(OSError, match=re.escape(says)):
        load_network(path, CPU)
