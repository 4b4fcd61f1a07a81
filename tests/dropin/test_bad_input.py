"""Whatever a script hands over: nothing raises, what is sound is recorded, the rest is said."""

from __future__ import annotations

import collections
import itertools
import math
import os
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy
import pytest
import torch
from conftest import MAINRUN, python, read_json, records
from scripts import run_script

import observability as obs


def test_step_before_init_is_said_once():
    script = "import observability as obs\nfor _ in range(3): obs.step(1, loss=1.0)\nobs.finish()"
    done = python("-c", script, env={**os.environ, "PYTHONPATH": str(MAINRUN)})
    assert done.returncode == 0
    assert done.stderr == "observability: step() before init(): it is not recorded\n"


@pytest.mark.parametrize(
    "call",
    [
        lambda: obs.step(loss=1.0),
        lambda: obs.validation(1.0),
        lambda: obs.log({}),
        lambda: obs.skip_epoch(2),
    ],
)
def test_a_call_after_finish_is_said_and_harmless(open_run, run_dir, capfd, call):
    open_run()
    obs.finish()
    before = list(obs.read_run(run_dir))
    call()
    assert "after finish()" in capfd.readouterr().err
    assert list(obs.read_run(run_dir)) == before


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (torch.ones(4, requires_grad=True), "loss/train is not recorded"),
        (torch.ones(0), "loss/train is not recorded"),
        ("high", "loss/train is not recorded"),
        (object(), "loss/train is not recorded"),
        (torch.ones((), device="meta"), "loss/train is not recorded"),
    ],
    ids=["four", "none", "text", "object", "meta"],
)
def test_a_loss_that_is_no_number_is_left_out_and_said(open_run, run_dir, capfd, loss, said):
    open_run()
    obs.step(1, loss=loss, other=2.0)
    obs.finish()
    [record] = records(run_dir, "train")
    assert record["metrics"] == {"other": 2.0}
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("loss", "kept"),
    [
        (torch.tensor(2.5, requires_grad=True), 2.5),
        (torch.tensor([[2.5]], dtype=torch.float64), 2.5),
        (torch.tensor(0.1, dtype=torch.bfloat16), 0.10009765625),
        (3, 3.0),
        (True, 1.0),
        (math.nan, "NaN"),
        (math.inf, "Infinity"),
        (-math.inf, "-Infinity"),
        (1e300, 1e300),
        (5e-324, 5e-324),
    ],
)
def test_a_loss_is_kept_to_the_last_bit(open_run, run_dir, capfd, loss, kept):
    open_run()
    obs.step(1, loss=loss)
    obs.finish()
    [record] = records(run_dir, "train")
    assert record["metrics"] == {"loss/train": kept}
    assert "not recorded" not in capfd.readouterr().err


def test_a_loss_that_requires_grad_keeps_its_graph(open_run):
    open_run()
    weight = torch.ones(2, requires_grad=True)
    loss = (weight * 3).sum()
    obs.step(1, loss=loss)
    loss.backward()
    assert weight.grad.tolist() == [3.0, 3.0]


def test_a_step_that_goes_backwards_is_recorded_and_said(open_run, run_dir, capfd):
    open_run()
    for step in (5, 3, 4):
        obs.step(step, loss=1.0)
    obs.finish()
    assert [r["step"] for r in records(run_dir, "train")] == [5, 3, 4]
    assert "step 3 came after step 5" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["a/b c", 'quo"te', "per%cent", "new\nline", "π", "", "x" * 5000])
def test_any_metric_name_is_kept(open_run, run_dir, name):
    open_run()
    obs.step(1, **{name: 1.0})
    obs.finish()
    [record] = records(run_dir, "train")
    assert record["metrics"] == {name: 1.0}


def test_hundreds_of_metrics_in_a_step_are_all_kept(open_run, run_dir):
    open_run()
    given = {f"layer.{i}.attention.weight/norm": float(i) for i in range(500)}
    obs.step(1, **given)
    obs.finish()
    [record] = records(run_dir, "train")
    assert record["metrics"] == given


def test_ever_new_names_do_not_fill_the_memory(open_run):
    open_run(tensorboard=False)
    tracemalloc.start()
    try:
        for index in range(9000):
            obs.log({f"name {index}": 1.0})
        obs.finish()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 6e6  # at over 1 kB a name 9000 of them would be more


@pytest.mark.parametrize("where", ["out_dir", "tb_dir"])
def test_an_unwritable_directory_is_said_and_the_rest_is_written(tmp_path, capfd, where):
    (tmp_path / "file").write_text("in the way")
    folders = {"out_dir": tmp_path / "out", "tb_dir": tmp_path / "tb", where: tmp_path / "file"}
    run = obs.Run("run", **folders)
    run.step(1, loss=1.0)
    run.validation(1.0)
    run.finish()
    assert "off from step 0 on" in capfd.readouterr().err
    if where == "out_dir":
        assert list((tmp_path / "tb").rglob("events*"))
    else:
        assert len(records(tmp_path / "out/run", "train")) == 1
        assert "TensorBoard" in read_json(tmp_path / "out/run/run_manifest.json")["degraded"]


def test_unknown_and_bad_settings_are_said_and_the_defaults_stand(open_run, monkeypatch, capfd):
    monkeypatch.setenv("OBS_DRAIN_INTERVAL", "soon")
    run = open_run(tensorbord=False)
    said = capfd.readouterr().err
    assert "tensorbord" in said
    assert "drain_interval=soon" in said
    assert run.settings.drain_interval == 0.5


class Unshowable:
    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


class Odd(collections.UserDict):
    def items(self):
        raise RuntimeError("no items")


def deep(levels):
    value = {"end": 1}
    for _ in range(levels):
        value = {"in": value}
    return value


def cycle():
    value = {"lr": 0.1}
    value["self"] = [value]
    return value


@pytest.mark.parametrize(
    "config",
    [
        lambda: threading.Lock(),
        lambda: {"lock": threading.Lock(), "lr": 0.1},
        lambda: {"file": sys.stdout, "lr": 0.1},
        lambda: {"lr": 0.1, "it": itertools.count()},
        cycle,
        lambda: deep(2000),
        lambda: {"lr": 0.1, "bad": Unshowable(), Unshowable(): 1},
        lambda: {"lr": 0.1, "odd": Odd(a=1)},
        lambda: {"lr": 0.1, b"bytes": b"\xff", (1, 2): {3}, None: math.nan, "\ud800": "\ud800"},
        lambda: {"lr": 0.1, "text": "a" * 1_000_000, "also": "-----BEGIN PRIVATE KEY" * 9999},
        lambda: 5,
        lambda: object,
    ],
)
def test_a_configuration_of_whatever_kind_never_raises(open_run, run_dir, config):
    began = time.monotonic()
    open_run(config=config(), dataset=config())
    obs.step(1, loss=1.0)
    obs.finish()
    assert time.monotonic() - began < 10
    kept = read_json(run_dir / "config.json")
    assert kept["config"] == kept["dataset"]
    if isinstance(config(), dict) and "lr" in config():
        assert kept["config"]["lr"] == 0.1
    assert len(records(run_dir, "train")) == 1


@pytest.mark.parametrize(
    "given",
    [
        {"out_dir": None, "tb_dir": None},
        {"out_dir": object()},
        {"out_dir": "\0"},
        {"tb_dir": "\0"},
        {"out_dir": Unshowable()},
        {"run_name": Unshowable()},
        {"run_name": 5},
        {"enabled": numpy.array([1, 2])},
        {"save_interval": object()},
        {"keep_last": math.nan},
        {"shard_bytes": "many"},
        {"drain_interval": math.nan},
        {"drain_interval": -1},
        {"system_interval": math.nan},
        {"metrics_filename": "no/such/folder.ndjson"},
        {"metrics_filename": ""},
        {"resume": object()},
        {"resume": "\0"},
        {Unshowable: 1},
    ],
)
def test_init_raises_nothing_whatever_it_is_handed(tmp_path, monkeypatch, given):
    script = str(tmp_path / "train.py")  # which a worker of pytest-xdist has none of
    monkeypatch.setattr(sys.modules["__main__"], "__file__", script, raising=False)
    positional = [key for key in given if not isinstance(key, str)]
    obs.init(*positional, **{k: v for k, v in given.items() if isinstance(k, str)})
    obs.step(1, loss=1.0)
    obs.finish()


@pytest.mark.parametrize("rank", ["x", "", "-1", "1.5", "0x1"])
def test_a_rank_that_is_no_number_is_said_and_the_run_is_recorded(
    open_run, run_dir, monkeypatch, capfd, rank
):
    monkeypatch.setenv("RANK", rank)
    open_run()
    obs.step(1, loss=1.0)
    obs.finish()
    assert len(records(run_dir, "train")) == 1
    assert ("RANK" in capfd.readouterr().err) == bool(rank)


def test_an_argument_goes_before_the_environment(open_run, monkeypatch):
    monkeypatch.setenv("OBS_DRAIN_INTERVAL", "3")
    monkeypatch.setenv("OBS_TENSORBOARD", "off")
    run = open_run(drain_interval=2.0)
    assert (run.settings.drain_interval, run.settings.tensorboard) == (2.0, False)


def test_calls_with_nonsense_do_not_raise(open_run):
    open_run()
    obs.watch(object(), optimizer=object())
    obs.step("one", loss=1.0)
    obs.step(loss=1.0, tokens="many")
    obs.log(5)
    obs.validation(None)
    obs.skip_epoch(object())
    obs.finish(results=object())


@pytest.mark.parametrize("count", [4, 200])
def test_what_many_threads_log_is_all_there_once(open_run, run_dir, count):
    open_run(drain_interval=0.01)
    each = 20_000 // count
    start = threading.Barrier(count)

    def log(first):
        start.wait()
        for number in range(first, first + each):
            obs.log({"n": number})

    threads = [threading.Thread(target=log, args=[n * each]) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    obs.finish()
    values = sorted(r["metrics"]["n"] for r in records(run_dir, "train"))
    assert values == [float(n) for n in range(count * each)]
    assert [r["seq"] for r in obs.read_run(run_dir)] == list(range(1, count * each + 3))


@pytest.mark.parametrize("ending", ["", "raise ValueError('no')", "sys.exit(3)"])
def test_a_script_that_does_not_finish_is_finished_at_exit(tmp_path, ending):
    run_script(tmp_path, "obs.step(1, loss=1.0)\n" + ending)
    expected = "failed: ValueError('no')" if "raise" in ending else "unfinished"
    assert read_json(tmp_path / "out/run/results.json")["status"] == expected
    assert len(records(tmp_path / "out/run", "train")) == 1


def test_a_closed_stderr_does_no_harm(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import observability as obs\nobs.step()\nobs.init('run')\n"
        "obs.step(loss='x')\nobs.finish()\nprint('done')\n"
    )
    command = f'"{sys.executable}" "{script}" 2>&-'
    done = subprocess.run(
        command,
        shell=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(MAINRUN)},
    )
    assert done.stdout == "done\n"
