"""Stop and go on: a run ends in the same files, whatever stopped it and wherever.

`KILLS=100 TRIES=2000 pytest support` kills a run a hundred times instead of once, and tries 2,000
damaged files of each kind instead of 150.
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import ddpm
import support.run
import train
from conftest import TINY
from support import console, devices
from support.config import Config
from support.data import load
from support.pictures import atomic_write
from support.run import Run, open_run
from support.test_data import CHANGES, changed
from support.test_weights import CONFIG, network, saved
from support.weights import read_tensors, write_tensors

ROOT, CPU = Path(__file__).resolve().parents[1], torch.device("cpu")
RESUME = ["--resume", "--device", "cpu", "--out"]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


def rewritten(trained, folder, tensors=None, **metadata):
    """The checkpoint of a run with these tensors and other metadata, in another folder."""
    found, ours = read_tensors(trained[0] / "checkpoint.safetensors")
    Path(folder).mkdir(exist_ok=True)
    with open(Path(folder, "checkpoint.safetensors"), "wb") as file:
        write_tensors(file, tensors or found, ours | metadata)


def started(folder, *argv, **environment):
    """train.py in a process of its own."""
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", *map(str, argv)], cwd=folder, text=True, env=os.environ
        | dict(environment, OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def step_of(folder):
    return int(read_tensors(Path(folder, "checkpoint.safetensors"))[1]["step"])


@pytest.mark.parametrize("seed", range(int(os.environ.get("KILLS", 1))))
def test_a_stopped_run_goes_on_exactly(seed, tiny, call, short, monkeypatch):
    """Resume: stopped at any step by a signal or a lost reader, a run ends in the same files."""
    argv = ["--data", tiny, "--steps", 12, *TINY, "--out"]
    assert call(train, *argv, "straight")[0] == 0
    chance, update = random.Random(seed), train.update_ema

    def update_ema(ema, net, step, decay):
        if step == last and number == 13:
            patch.setattr(console.Progress, "__call__", Mock(side_effect=BrokenPipeError))
        elif step == last:
            signal.raise_signal(number)
        update(ema, net, step, decay)
    for first, number in ((1, signal.SIGINT), (4, signal.SIGTERM), (7, signal.SIGHUP), (9, 13)):
        last = chance.randrange(first, first + 2)
        saved = last + last % 2
        with monkeypatch.context() as patch:
            patch.setattr(train, "update_ema", update_ema)
            status, text, _ = call(train, *(argv if first == 1 else RESUME), "a b")
        assert status == 128 + number and step_of("a b") == saved
        assert not Path(f"a b/step-{saved:06}.png").exists()                      # no time is lost
        assert (f"stopped and saved at step {saved}; to resume: python train.py --resume "
                '--out "a b"') in text
    assert call(train, *RESUME, "a b")[0] == 0
    straight, run = contents("straight"), contents("a b")
    assert "step-000012.png" in run and all(run[name] == straight[name] for name in run)


def test_a_run_cut_off_at_any_file_goes_on(tiny, call, short, monkeypatch):
    """Resume: with the disk full at any file that 4 steps write, it ends in the same files too."""
    argv = ["--data", tiny, "--steps", 4, *TINY, "--out"]
    assert call(train, *argv, "straight")[0] == 0
    for cut in range(8):                                        # sheet, log, network, checkpoint
        write = Mock(wraps=atomic_write, side_effect=[DEFAULT] * cut + [OSError(28, "full", "it")])
        with monkeypatch.context() as patch:
            for module in (support.run, support.pictures):
                patch.setattr(module, "atomic_write", write)
            assert call(train, *argv, f"{cut}")[::2] == (2, "train.py: it: full\n")
        assert Path(f"{cut}/checkpoint.safetensors").exists() == (cut > 3)
        assert call(train, *(RESUME if cut > 3 else argv), f"{cut}")[0] == 0
        assert contents(f"{cut}") == contents("straight")


def test_a_killed_run_leaves_a_whole_checkpoint(tiny, call, tmp_path):
    """SIGKILL at any instant: the checkpoint is absent or sound; what is half-written goes."""
    path, chance, steps = tmp_path / "run/checkpoint.safetensors", random.Random(0), [0]
    argv = ["--data", tiny, "--steps", 199, *TINY, "--out"]
    for attempt in range(int(os.environ.get("KILLS", 1))):
        process = started(tmp_path, *(RESUME if path.exists() else argv), "run")
        assert any(line.startswith("step") for line in process.stdout)       # it does go on
        while "KILLS" not in os.environ and process.poll() is None and not path.exists():
            time.sleep(0.01)
        time.sleep(chance.random() * ("KILLS" in os.environ))
        process.kill()
        process.communicate()
        steps.append(step_of("run") if path.exists() else 0)
        assert steps[-1] >= steps[-2] and steps[-1] in (*range(0, 199, 30), 199)
        if steps[-1] > 150:
            path.unlink()
            steps.append(0)
    assert max(steps) >= 30 or "KILLS" in os.environ
    for name in ("checkpoint.safetensors", "network.safetensors", "log.csv", "step-000001.png",
                 "samples.png"):
        path.with_name(f".{name}.1.part").write_bytes(b"half")               # what a kill can leave
    again = RESUME if path.exists() else argv
    assert call(train, *again, "run", "--steps", steps[-1] + 1)[0] == 0
    assert [left.name for left in path.parent.glob("*.part")] == [".samples.png.1.part"]
    assert step_of("run") == steps[-1] + 1


@pytest.mark.parametrize("extra, says", [
    (["--preset", "cifar10"], "--resume goes on with the settings of the run: only --steps"),
    (["--data", "other.npz"], "other images"), (["--data", "bare.npz"], "other images"),
    (["--out", "empty"], "start without --resume"),
    (["--out", "shared"], "cannot be read as the checkpoint of a run: "),
    *((["--out", f"{step}"], f"cannot be read as the checkpoint of a run: its step is {step}")
      for step in (-5, 0, 10**9 + 1))])
def test_what_would_change_the_run_is_refused_on_resume(extra, says, trained, tiny, call):
    """Resume: other settings, other data, no run: one line, and nothing is changed."""
    before, (images, labels) = contents(trained[0]), load(tiny)
    np.savez("other.npz", images=images[::-1], labels=labels)
    np.savez("bare.npz", images=images)                             # the same images, no labels
    if "its step is" in says:
        rewritten(trained, extra[1], step=extra[1])
    Path("shared").mkdir()
    Path("shared/checkpoint.safetensors").write_bytes(before["network.safetensors"])
    status, _, errors = call(train, "--data", tiny, *RESUME, trained[0], "--steps", 300, *extra)
    assert status == 2 and says in errors and errors.count("\n") == 1
    status, _, errors = call(train, "--out", trained[0], "--data", tiny)
    assert status == 2 and "go on with --resume" in errors and contents(trained[0]) == before


def test_a_run_goes_on_further_elsewhere_and_with_moved_data(trained, call, tiny, monkeypatch):
    """Resume: a complete run takes more --steps and moved --data, no other setting; without more it
    draws its last picture again.
    """
    for name in {f.name for f in fields(Config)} - {"steps", "data"}:
        with pytest.raises(ValueError, match="--resume goes on with the settings of the run"):
            open_run(trained[0], CPU, {name: getattr(Config(), name)}, resume=True)
    monkeypatch.setattr(console, "time", Mock(monotonic=Mock(side_effect=range(9))))    # seconds
    rewritten(trained, "run")
    assert read_tensors(Path("run/checkpoint.safetensors"))[0]["log"].dtype == torch.float64
    Path("moved.npz").write_bytes(tiny.read_bytes())
    status, text, errors = call(train, *RESUME, "run", "--steps", 102, "--data", "moved.npz")
    assert status == 0 and not errors and " · 32 images/s · 0:00:00 left" in text
    assert step_of("run") == 102 and Path("run/log.csv").read_text().count("\n") == 12
    before = contents("run")
    Path("run/step-000102.png").unlink()
    status, text, errors = call(train, *RESUME, "run")
    assert status == 0 and not errors and "drawn: run/step-000102.png" in text
    assert text.startswith("complete at step 102: a larger --steps trains it further\n")
    assert contents("run") == before


def test_a_folder_has_one_run_at_a_time(trained, call, monkeypatch):
    """Two runs: where one is at work, though it still reads its data, none goes on; links in the
    folder are not followed: a checkpoint is replaced, a lock is refused.
    """
    before = (trained[0] / "checkpoint.safetensors").read_bytes()
    Path("run").mkdir()
    Path("elsewhere").write_bytes(before)
    Path("run/checkpoint.safetensors").symlink_to("../elsewhere")
    more, late = [*RESUME, "run", "--steps", 110], []

    def slowly(*args):
        late.extend(late or call(train, *more))
        return load(*args)
    monkeypatch.setattr(support.run, "load", slowly)
    assert call(train, *more)[0] == 0 and Path("elsewhere").read_bytes() == before
    assert late[:2] == [2, ""] and "another run is at work in run: wait" in late[2]
    assert step_of("run") == 110
    Path("run/.lock").unlink()
    Path("run/.lock").symlink_to("../elsewhere")
    status, text, errors = call(train, *more)
    assert status == 2 and errors.startswith("train.py: run/.lock: ") and not text
    assert Path("elsewhere").read_bytes() == before


def test_a_second_signal_ends_at_once(call, monkeypatch):
    """Signals: the first asks to stop, the second ends all; what nohup ignores stays so."""
    asked = []

    def main():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        console.on_stop(asked.append)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            assert asked == [signal.SIGINT] * (number == signal.SIGTERM)
            signal.raise_signal(number)
    monkeypatch.setattr(os, "_exit", Mock(side_effect=SystemExit))
    assert call(Mock(__name__="x", main=main)) == (0, "", "") and asked == [signal.SIGINT]
    os._exit.assert_called_once_with(128 + signal.SIGTERM)


@pytest.mark.parametrize("name, value, says", [
    ("net.conv_in.weight", np.inf, "the loss is nan at step 110"),
    ("net.label_table", np.inf, "label_table is not finite at step 120"),
    ("ema.conv_in.weight", np.nan, "conv_in.weight is not finite at step 120"),
    ("ema.conv_in.weight", 1e6, "conv_in.weight is not finite at step 120"),        # in float16
    ("exp_avg_sq.label_table", np.inf, "exp_avg_sq.label_table is not finite at step 120")])
def test_numbers_that_are_none_stop_the_run(name, value, says, trained, call):
    """NaN: in the loss, or in anything that is written: the run ends, nothing is saved."""
    tensors, metadata = read_tensors(trained[0] / "checkpoint.safetensors")
    tensors[name][-1:] = value
    config = json.loads(metadata["config"]) | dict(p_uncond=0.0)     # no image without its label
    rewritten(trained, ".", tensors, config=json.dumps(config))
    before = contents(".")
    status, _, errors = call(train, *RESUME, ".", "--steps", 120)
    assert status == 2 and f"{says}: a smaller --lr or --muon-lr may help" in errors
    assert contents(".") == before


@pytest.mark.parametrize("steps, saved", [
    (25, [10, 20, 25]), (2000, [400, 800, 1200, 1600, 2000]),
    (32_001, [*range(5000, 30_001, 5000), 32_001])])
def test_a_run_is_saved_five_times_or_every_5000_steps(steps, saved, monkeypatch):
    """Resume: and always with a new entry of the log; a long run loses no more than 5,000 steps."""
    def algorithm_1(run, *_):
        for run.step in range(1, steps + 1):
            yield torch.zeros(())
    found, run = [], Mock(config=Config(steps=steps), step=0, device=CPU, schedule=ddpm.linear(3))
    run.save = lambda *_: found.append(run.step)
    monkeypatch.setattr(train, "algorithm_1", algorithm_1)
    monkeypatch.setattr(train, "reporter", lambda *_: lambda *_: 0)
    monkeypatch.setattr(train.evaluate, "held_out_loss", lambda *_: None)
    train.train(run, np.zeros((20, 28, 28, 1), np.uint8), None, Path())
    assert found == saved


def test_two_processes_average_their_gradients(tiny, tmp_path, monkeypatch):
    """Many devices: the weights are those of a replay that averages the gradients of two halves.
    With Adam alone: Muon's rounds magnify the rounding of a sum in another order.
    """
    argv = ["--data", tiny, "--steps", 10, *TINY, "--float32", "--muon-lr", 0, "--dropout", 0]
    port = f"{10_000 + os.getpid() % 20_000}"       # below those that the system gives to others
    both = [started(tmp_path, *argv, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2",       # as torchrun
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in "01"]
    printed = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert "device    cpu, float32, 2 processes" in printed[0] and not printed[1]
    two, images, labels = open_run(tmp_path / "out", CPU, {}, resume=True)
    schedule = train.on_device(ddpm.linear(20, 1e-4, 0.5), CPU)
    run, losses = Run(two.config, CPU), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for step in range(1, 11):
        run.net.zero_grad()
        for rank in "01":
            monkeypatch.setenv("RANK", rank)
            rng, (x0, label) = run.rng(step), train.batches(images, labels, run.config, CPU)(step)
            t = train.stratified(torch.randint(1, 21, (8,), generator=rng), 20)
            eps = torch.randn(x0.shape, generator=rng)
            x_t = ddpm.q_sample(x0, t.reshape(-1, 1, 1, 1), eps, schedule)
            losses.append(ddpm.l_simple(eps, run.net(x_t, t, label)) / 2)
            losses[-1].backward()
        train.set_rates(run.optimizers, train.lr_scale(step, run.config))
        nn.utils.clip_grad_norm_(run.net.parameters(), run.config.grad_clip)
        run.optimizers[0].step()
        train.update_ema(run.ema, run.net, step, run.config.ema_decay)
    for name, tensor in run.tensors().items():
        assert torch.allclose(two.tensors()[name], tensor, rtol=1e-3, atol=2e-4), name
    assert [row[:2] for row in two.log] == [(10, pytest.approx(sum(losses).item() / 10, rel=1e-4))]
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--batch 16 is no multiple of 3 processes"):
        open_run(Path("three"), CPU, dict(data=str(tiny), batch=16), resume=False)


def test_seed_step_and_process_decide_what_is_drawn(tmp_path, monkeypatch):
    """Many devices: images, t, ε and dropout have seeds of their own; rank 1 writes no file."""
    images, drawn = np.arange(5000, dtype=np.uint8).reshape(50, 10, 10, 1), []
    for step, seed, rank in ((5, 0, "0"), (6, 0, "0"), (5, 1, "0"), (5, 0, "1"), (5, 0, "1")):
        monkeypatch.setenv("RANK", rank)
        run = Run(Config(image_shape=(1, 8, 8), seed=seed), CPU)
        x0 = train.batches(images, None, run.config, CPU)(step)[0]
        noise, dropped = torch.rand(9, generator=run.rng(step)), torch.rand(9)
        drawn.append([tuple(each.flatten().tolist()) for each in (
            run.net.conv_in.weight, x0, noise, dropped)])
    assert [len(set(each)) for each in zip(*drawn)] == [2, 4, 4, 4] and drawn[3] == drawn[4]
    run.save(tmp_path / "out", Mock(side_effect=AssertionError))
    assert not (tmp_path / "out").exists()
    assert len({devices.seed_from(use, 0, 1) for use in ("data", "noise", "dropout")}) == 3


@pytest.mark.parametrize("classes, ours", [(2, 2), (3, 2), (0, 2), (3, 0)])
def test_a_network_is_trained_further(classes, ours, tiny, trained, call):
    """--from: its sizes and schedule; with no label it predicts what it did, with labels too if
    there are as many as before; else each begins as "no label".
    """
    theirs = dict(image_shape=(1, 8, 8), num_classes=classes, T=20)
    net = network(replace(CONFIG, **theirs))
    saved("net", net.state_dict(), **theirs)
    run, *_ = open_run(Path("a"), CPU, dict(data=str(tiny), labels=ours > 0), False, "net")
    found = [getattr(run.config, name) for name in (
        "model_channels", "patch_size", "T", "beta_1", "beta_T", "num_classes")]
    assert found == [8, 1, 20, 0.1, 0.2, ours]
    x, t, label = torch.randn(2, 1, 8, 8), torch.tensor([3, 17]), torch.tensor([0, 1])
    for module in (run.net, run.ema):
        assert torch.allclose(module(x, t), net(x, t), atol=1e-5)
        if ours:
            expected = net(x, t, label) if classes == ours else net(x, t)
            assert torch.allclose(module(x, t, label), expected, atol=1e-5)
    argv = ["--data", tiny, "--steps", 1, "--from", "net", "--device", "cpu"]
    status, _, errors = call(train, *argv, "--T", 7)
    assert status == 2 and "--T is 20 in net: leave it out" in errors
    assert "goes on with the settings of the run" in call(train, *argv, *RESUME, trained[0])[2]


def test_a_signal_to_one_process_stops_all(monkeypatch):
    """Many devices: over all processes the largest signal counts, and of the loss the sum."""
    others = {devices.dist.ReduceOp.MAX: torch.maximum, devices.dist.ReduceOp.SUM: torch.add}
    monkeypatch.setattr(devices.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(devices.dist, "all_reduce", lambda value, op: value.copy_(
        others[op](value, torch.tensor(15))))
    assert [devices.over_all(own, CPU, largest=True).item() for own in (0, 2, 15)] == [15, 15, 15]
    assert devices.over_all(2, CPU).item() == 17
    run = Mock(config=Config(), step=9, device=CPU, log=[])
    monkeypatch.setattr(console, "on_stop", lambda note: note(2))
    assert train.reporter(run, None)([torch.zeros(())], False) == 15


def test_each_process_has_a_gpu_of_its_own(call, monkeypatch):
    """Many devices: process k of a machine takes the k-th GPU; one that is missing is named."""
    for name, value in dict(RANK="0", LOCAL_RANK="99", WORLD_SIZE="100").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    status, text, errors = call(train)
    assert (status, text) == (2, "") and errors.count("\n") == 1
    assert errors.startswith("train.py: there is no device 'cuda:99' here: choose from ")


ODD = ["", "x", "-1", "1e9", "null", "[]", "{}", "9" * 30]


@settings(max_examples=int(os.environ.get("TRIES", 150)) // 5)
@given(kind=st.sampled_from(["tensor", "metadata", "setting", "bytes"]), data=st.data())
def test_any_run_goes_on_or_is_refused(trained, tmp_path_factory, kind, data):
    """Resume: any part of a run changed or removed: ValueError, OSError, or a run that goes on."""
    path = tmp_path_factory.getbasetemp() / "fuzz/checkpoint.safetensors"
    tensors, metadata = read_tensors(trained[0] / "checkpoint.safetensors")
    config = json.loads(metadata.pop("config")) | dict(steps=200)
    where = dict(tensor=tensors, metadata=metadata, setting=config).get(kind, {})
    for name in where and [data.draw(st.sampled_from(sorted(where)))]:
        where[name] = data.draw(dict(
            tensor=st.lists(st.integers(0, 3), max_size=3).map(torch.zeros),
            metadata=st.sampled_from(ODD), setting=st.none() | st.integers(-1, 9) | st.floats()
            | st.text(max_size=3) | st.just([]))[kind])
        if data.draw(st.booleans()):
            del where[name]
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        write_tensors(file, tensors, metadata | dict(config=json.dumps(config)))
    if kind == "bytes":
        path.write_bytes(changed(path.read_bytes(), data.draw(CHANGES)))
    try:
        run, images, labels = open_run(path.parent, CPU, {}, resume=True)
    except (ValueError, OSError):
        return
    x0, label = train.batches(images, labels, run.config, CPU)(1)
    run.net(x0, torch.ones(len(x0), dtype=torch.long), label)
