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
from dataclasses import asdict, fields, replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import ddpm
import support.run
import train
from conftest import TINY
from support import console, data as files, devices
from support.config import Config, schedule_from
from support.data import load
from support.devices import seed_from
from support.pictures import atomic_write
from support.run import Run, open_run
from support.test_data import CHANGES, changed
from support.weights import config_from, read_tensors, write_tensors
from unet import UNet

ROOT, CPU = Path(__file__).resolve().parents[1], torch.device("cpu")


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


def rewritten(trained, folder, tensors=None, **metadata):
    """The checkpoint of a run with these tensors and other metadata, in another folder."""
    found, ours = read_tensors(trained / "checkpoint.safetensors")
    Path(folder).mkdir(exist_ok=True)
    with open(Path(folder, "checkpoint.safetensors"), "wb") as file:
        write_tensors(file, tensors or found, ours | metadata)


def step_of(folder):
    return int(read_tensors(Path(folder, "checkpoint.safetensors"))[1]["step"])


@pytest.mark.parametrize("seed", range(int(os.environ.get("KILLS", 1))))
def test_a_stopped_run_goes_on_exactly(seed, tiny, call, short, monkeypatch):
    """Resume: stopped at any step by any of the three signals, and by a reader who has gone, and
    gone on with, a run ends in the same files: weights, average, optimizers, log and sheets.
    """
    argv = ["--data", tiny, "--steps", 12, *TINY, "--out"]
    assert call(train, *argv, "straight")[0] == 0
    chance, step_down = random.Random(seed), train.set_rates
    for first, number in ((1, signal.SIGINT), (4, signal.SIGTERM), (7, signal.SIGHUP), (9, 13)):
        there = Path("a b/checkpoint.safetensors").exists()
        last, count, begun = chance.randrange(first, first + 2), [0], step_of("a b") if there else 0

        def set_rates(optimizers, scale):
            count[0] += 1
            if count[0] == last - begun and number != 13:
                signal.raise_signal(number)
            step_down(optimizers, scale)

        def nobody_reads(progress, done, text, tell=console.Progress.__call__):
            if number == 13 and done >= last:
                raise BrokenPipeError
            tell(progress, done, text)
        with monkeypatch.context() as patch:
            patch.setattr(train, "set_rates", set_rates)
            patch.setattr(console.Progress, "__call__", nobody_reads)
            resume = ["--resume", "--out"] if there else argv
            status, text, _ = call(train, *resume, "a b", "--device", "cpu")
        assert status == 128 + number and step_of("a b") == last + last % 2
        assert not Path(f"a b/step-{last + last % 2:06}.png").exists()            # no time is lost
        assert (f"stopped and saved at step {last + last % 2}; to resume: python train.py --resume "
                '--out "a b"') in text
    assert call(train, "--resume", "--out", "a b", "--device", "cpu")[0] == 0
    straight, run = contents("straight"), contents("a b")
    assert "step-000012.png" in run and all(run[name] == straight[name] for name in run)


def test_a_run_cut_off_at_any_file_goes_on(tiny, call, short, monkeypatch):
    """Resume: cut off at any of the files that 4 steps write, the run is what it was at its last
    checkpoint; gone on with, it ends in all the files of a run that was left alone.
    """
    argv = ["--data", tiny, "--steps", 4, *TINY, "--out"]
    assert call(train, *argv, "straight")[0] == 0
    for cut in range(1, 9):                                # sheet, log, network, checkpoint
        with monkeypatch.context() as patch:
            count = iter(range(1, 100))

            def write(path):
                if next(count) == cut:
                    raise KeyboardInterrupt
                return atomic_write(path)
            for module in (support.run, support.pictures):
                patch.setattr(module, "atomic_write", write)
            with pytest.raises(KeyboardInterrupt):
                call(train, *argv, f"cut{cut}")
        there = Path(f"cut{cut}/checkpoint.safetensors").exists()
        assert there == (cut > 4)
        resume = ["--resume", "--out"] if there else argv
        assert call(train, *resume, f"cut{cut}", "--device", "cpu")[0] == 0
        assert contents(f"cut{cut}") == contents("straight")


def test_a_killed_run_leaves_a_whole_checkpoint(tiny, call, tmp_path):
    """SIGKILL at any instant: the checkpoint is absent or sound, the run goes on from it, and what
    is left half-written is replaced.
    """
    path, chance, steps = tmp_path / "run/checkpoint.safetensors", random.Random(0), [0]
    argv = ["--data", tiny, "--steps", 199, *TINY]
    for attempt in range(int(os.environ.get("KILLS", 1))):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "--out", "run", "--device", "cpu",
             *map(str, ["--resume"] if path.exists() else argv)], cwd=tmp_path,
            stdout=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
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
    more = ["--resume"] if path.exists() else [*TINY, "--data", tiny]
    assert call(train, *more, "--steps", steps[-1] + 1, "--out", "run", "--device", "cpu")[0] == 0
    assert [left.name for left in path.parent.glob("*.part")] == [".samples.png.1.part"]
    assert step_of("run") == steps[-1] + 1


@pytest.mark.parametrize("extra, says", [
    (["--steps", 300, "--lr", 0.5], "--resume goes on with the settings of the run: only --steps"),
    (["--steps", 300, "--preset", "cifar10"], "only --steps"),
    (["--steps", 300, "--data", "other.npz"], "other images"),
    (["--steps", 300, "--data", "bare.npz"], "other images"),
    (["--out", "empty"], "start without --resume"), (["--out", "shared"], "checkpoint of a run"),
    *((["--out", f"step{step}"], f"cannot be read as the checkpoint of a run: its step is {step}")
      for step in (-5, 0, 10**9 + 1))])
def test_what_would_change_the_run_is_refused_on_resume(extra, says, trained, tiny, call):
    """Resume: other settings, other data, a network without a run, a step that none can be at: one
    line, nothing changed; nor does a new run begin where another lies.
    """
    before, images = contents(trained[0]), files.load(tiny)[0]
    if "its step is" in says:
        rewritten(trained[0], extra[1], step=extra[1].removeprefix("step"))
    np.savez("other.npz", images=images[::-1], labels=np.arange(200) // 100)
    np.savez("bare.npz", images=images)                             # the same images, no labels
    Path("shared").mkdir()
    Path("shared/checkpoint.safetensors").write_bytes(before["network.safetensors"])
    extra = extra if "shared" not in extra else [*extra, "--data", tiny]
    status, _, errors = call(train, "--resume", "--out", trained[0], "--device", "cpu", *extra)
    assert status == 2 and says in errors and errors.count("\n") == 1
    status, _, errors = call(train, "--out", trained[0], "--data", tiny)
    assert status == 2 and "go on with --resume" in errors and contents(trained[0]) == before


def test_a_run_goes_on_further_elsewhere_and_with_moved_data(trained, call, short, tiny,
                                                             monkeypatch):
    """Resume: a complete run takes more --steps and --data at another place, and no setting but
    these two; its speed is that of the steps since then, 2 of 16 images, with a clock of our own.
    Without more steps it draws its last picture again, if that is gone.
    """
    for name in {f.name for f in fields(Config)} - {"steps", "data"}:
        with pytest.raises(ValueError, match="--resume goes on with the settings of the run"):
            open_run(trained[0], CPU, {name: getattr(Config(), name)}, resume=True)
    monkeypatch.setattr(console, "time", Mock(monotonic=Mock(side_effect=range(9))))
    rewritten(trained[0], "run"), Path("moved.npz").write_bytes(tiny.read_bytes())
    status, text, errors = call(train, "--resume", "--steps", 102, "--data", "moved.npz", "--out",
                                "run", "--device", "cpu")
    assert status == 0 and not errors and " · 32 images/s · 0:00:00 left" in text
    assert step_of("run") == 102 and Path("run/log.csv").read_text().count("\n") == 12
    before = contents("run")
    Path("run/step-000102.png").unlink()
    status, text, errors = call(train, "--resume", "--out", "run", "--device", "cpu")
    assert status == 0 and not errors and "drawn: run/step-000102.png" in text
    assert text.startswith("complete at step 102: a larger --steps trains it further\n")
    assert contents("run") == before


def test_a_folder_has_one_run_at_a_time(trained, tiny, call, monkeypatch):
    """Two runs: where one is at work, and be it that it still reads its data, no other begins or
    goes on.  Links in the folder are not followed: a checkpoint is replaced, a lock is refused.
    """
    before = (trained[0] / "checkpoint.safetensors").read_bytes()
    Path("run").mkdir(), Path("elsewhere").write_bytes(before)
    Path("run/checkpoint.safetensors").symlink_to("../elsewhere")
    argv, late = ["--resume", "--out", "run", "--steps", 110, "--device", "cpu"], []

    def slowly(*args):
        late.extend(late or call(train, *argv))
        return load(*args)
    monkeypatch.setattr(support.run, "load", slowly)
    assert call(train, *argv)[0] == 0 and Path("elsewhere").read_bytes() == before
    assert late[:2] == [2, ""] and "another run is at work in run: wait" in late[2]
    assert step_of("run") == 110
    Path("run/.lock").unlink(), Path("run/.lock").symlink_to("../elsewhere")
    status, text, errors = call(train, *argv)
    assert status == 2 and errors.startswith("train.py: run/.lock: ") and not text
    assert Path("elsewhere").read_bytes() == before


def test_a_second_signal_ends_at_once(call, monkeypatch):
    """Signals: the first asks for an orderly stop, the second does not wait for it; what nohup has
    ignored stays ignored.
    """
    asked = []

    def main():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        console.on_stop(asked.append)
        signal.raise_signal(signal.SIGHUP), signal.raise_signal(signal.SIGINT)
        assert asked == [signal.SIGINT]
        signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(os, "_exit", Mock(side_effect=SystemExit))
    assert call(Mock(__name__="x", main=main)) == (0, "", "") and asked == [signal.SIGINT]
    os._exit.assert_called_once_with(128 + signal.SIGTERM)


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits there")
def test_a_full_disk_keeps_the_last_good_checkpoint(trained, call):
    """Disk full while saving: the path is named, the run ends, the last checkpoint stays whole."""
    import resource
    Path("checkpoint.safetensors").write_bytes((trained[0] / "checkpoint.safetensors").read_bytes())
    before, (soft, hard) = contents("."), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        status, _, errors = call(train, "--resume", "--steps", 150, "--out", ".", "--device", "cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2 and "network.safetensors: File too large" in errors
    after = contents(".")
    assert before.items() <= after.items() and errors.count("\n") == 1


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
    rewritten(trained[0], ".", tensors, config=json.dumps(config))
    before = contents(".")
    status, _, errors = call(train, "--resume", "--steps", 120, "--out", ".", "--device", "cpu")
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
    """Many devices: each of two processes draws its own half of the batch, t and ε; the weights are
    those of a replay that averages both gradients, and a batch that cannot be halved is refused.

    With Adam alone: Muon's rounds magnify the rounding of a sum in another order.
    """
    common = ["--data", tiny, "--steps", 10, *TINY, "--float32", "--muon-lr", 0, "--dropout", 0]
    port = 10_000 + os.getpid() % 20_000            # below those that the system gives to others
    started = [subprocess.Popen(                                      # as torchrun does
        [sys.executable, str(ROOT / "train.py"), *map(str, common), "--out", "two"], text=True,
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | dict(
            OMP_NUM_THREADS="1", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))) for rank in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    assert "device    cpu, float32, 2 processes" in printed[0] and not printed[1]
    two, metadata = read_tensors(tmp_path / "two/checkpoint.safetensors")
    run, (images, labels) = Run(config_from(metadata), CPU), load(tiny)
    schedule, losses, seen = train.on_device(schedule_from(run.config), CPU), [], []
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
            seen += [tuple(x0.flatten().tolist()), tuple(eps.flatten().tolist()), tuple(t.tolist())]
        train.set_rates(run.optimizers, train.lr_scale(step, run.config))
        nn.utils.clip_grad_norm_(run.net.parameters(), run.config.grad_clip)
        run.optimizers[0].step()
        train.update_ema(run.ema, run.net, step, run.config.ema_decay)
    assert len(set(seen)) == 60                                       # no number is drawn twice
    for name, tensor in run.tensors().items():
        assert torch.allclose(two[name], tensor, rtol=1e-3, atol=2e-4), name
    assert two["log"][:, :2].tolist() == [
        pytest.approx([10, sum(map(torch.Tensor.item, losses)) / 10], rel=1e-4)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="no multiple of 3"):
        patch.setenv("WORLD_SIZE", "3")
        open_run(Path("three"), CPU, dict(data=str(tiny), batch=16), resume=False)


def test_seed_step_and_process_decide_what_is_drawn(tmp_path, monkeypatch):
    """Many devices: another seed, another step and another process draw other images, t, ε and
    dropout, each from a seed of its own; and rank 1 writes no file.
    """
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
    assert len({seed_from(use, 0, 1) for use in ("data", "noise", "dropout")}) == 3


@pytest.mark.parametrize("classes", [2, 3, 0])
def test_a_network_is_trained_further(classes, tiny, call, tmp_path):
    """--from: the first step is that of a new run with these weights; sizes and schedule are the
    network's, its labels too if there are as many, and else the new ones begin as "no label".
    """
    theirs = Config(image_shape=(1, 8, 8), model_channels=8, num_classes=classes, patch_size=1,
                    T=20, beta_T=0.5)
    torch.manual_seed(1)
    net = UNet(theirs)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    with open("net", "wb") as file:
        write_tensors(file, net.state_dict(), dict(config=json.dumps(asdict(theirs))))
    argv = ["--data", tiny, "--steps", 1, "--batch", 16, "--lr", 1e-3, "--device", "cpu",
            "--float32", "--from", "net", "--out"]
    assert call(train, *argv, "a")[0] == 0
    found, metadata = read_tensors(Path("a/checkpoint.safetensors"))
    config, (images, labels) = config_from(metadata), load(tiny)
    assert (config.model_channels, config.patch_size, config.T, config.beta_T) == (8, 1, 20, 0.5)
    run, tensors = Run(config, CPU), net.state_dict()
    if classes != 2:
        null = tensors["label_table"][-1] if classes else torch.zeros(32)
        tensors["label_table"] = torch.stack([null] * 3)
    for module in (run.net, run.ema):
        module.load_state_dict(tensors)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 17])
    assert torch.allclose(run.net(x, t), net(x, t), atol=1e-6)                   # with no label
    next(train.algorithm_1(run, run.net, train.batches(images, labels, config, CPU),
                           train.on_device(schedule_from(config), CPU)))
    for name, tensor in run.tensors().items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name
    status, _, errors = call(train, *argv, "b", "--T", 7)
    assert status == 2 and "--T is 20 in net: leave it out" in errors
    assert call(train, *argv, "a", "--resume")[0] == 2


def test_a_network_keeps_its_prediction_where_labels_are_lost():
    """--from: where the images have no labels, the network predicts what it did with none."""
    labelled = Config(image_shape=(1, 8, 8), model_channels=8, num_classes=3, patch_size=1)
    net, run = UNet(labelled), Run(replace(labelled, num_classes=0), CPU)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    run.begin_with(net, "net")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 17])
    for module in (run.net, run.ema):
        assert torch.allclose(module(x, t), net(x, t), atol=1e-5)


def test_a_signal_to_one_process_stops_all(monkeypatch):
    """Many devices: over all processes the largest signal counts, and of the loss the sum."""
    others = {devices.dist.ReduceOp.MAX: torch.maximum, devices.dist.ReduceOp.SUM: torch.add}
    monkeypatch.setattr(devices.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(devices.dist, "all_reduce", lambda value, op: value.copy_(
        others[op](value, torch.tensor(15))))
    assert [devices.over_all(own, CPU, largest=True).item() for own in (0, 2, 15)] == [15, 15, 15]
    assert devices.over_all(2, CPU).item() == 17


def test_each_process_has_a_gpu_of_its_own(call, monkeypatch):
    """Many devices: where there are GPUs, process k of a machine takes the k-th; one that is not
    there is named in one line.
    """
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "99"), ("WORLD_SIZE", "100")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    status, text, errors = call(train)
    assert (status, text) == (2, "") and errors.count("\n") == 1
    assert errors.startswith("train.py: there is no device 'cuda:99' here: choose from ")


ODD = ["", "x", "-1", "1e9", "null", "[]", "{}", "9" * 30]


@settings(max_examples=int(os.environ.get("TRIES", 150)) // 5)
@given(kind=st.sampled_from(["tensor", "metadata", "setting", "bytes"]), data=st.data())
def test_any_run_goes_on_or_is_refused(trained, tmp_path_factory, kind, data):
    """Resume: a tensor or a setting of a run changed or removed, or bytes of its file: only
    ValueError or OSError comes out, and what is accepted takes a step.
    """
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
