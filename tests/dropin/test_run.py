"""The calls a script makes: what they record, and that they survive whatever they are handed."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import MAINRUN, python, read_json, records

import observability as obs


def train_one_step(model, optimizer):
    optimizer.zero_grad()
    loss = model(torch.ones(4, 2)).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def test_a_step_records_loss_lr_speed_and_what_else_is_given(open_run, run_dir, tiny_model):
    model, optimizer = tiny_model
    open_run()
    obs.watch(model, optimizer=optimizer)
    loss = train_one_step(model, optimizer)
    obs.step(7, loss=loss, tokens=128, samples=4, grad_norm=1.5)
    obs.finish()
    [record] = records(run_dir, "train")
    assert record["step"] == 7
    assert record["metrics"]["loss/train"] == loss.item()
    assert record["metrics"]["lr"] == 0.5
    assert record["metrics"]["grad_norm"] == 1.5
    tokens, samples = (record["metrics"][f"speed/{n}_per_sec_step"] for n in ("tokens", "samples"))
    assert tokens / samples == pytest.approx(32)
    assert record["tags"] == {"phase": "train", "rank": 0}
    assert abs(record["time"] - time.time()) < 60


def test_the_lr_is_that_of_this_step_not_of_the_next(open_run, run_dir, tiny_model):
    model, optimizer = tiny_model
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    open_run()
    obs.watch(model, optimizer=optimizer, scheduler=scheduler)
    for _ in range(3):
        train_one_step(model, optimizer)
        scheduler.step()
        obs.step()
    obs.finish()
    assert [r["metrics"]["lr"] for r in records(run_dir, "train")] == [0.5, 0.25, 0.125]


def test_every_optimizer_has_its_lr(open_run, run_dir, tiny_model):
    model, first = tiny_model
    second = torch.optim.Adam(model.parameters(), lr=0.1)
    open_run()
    obs.watch(model, optimizer=[first, second])
    train_one_step(model, first)
    train_one_step(model, second)
    obs.step()
    obs.finish()
    [record] = records(run_dir, "train")
    assert record["metrics"] == {"lr": 0.5, "lr/1": 0.1}


def test_nothing_is_left_in_the_optimizer(open_run, tiny_model):
    model, optimizer = tiny_model
    open_run()
    obs.watch(model, optimizer=optimizer)
    assert optimizer._optimizer_step_post_hooks
    obs.finish()
    assert not optimizer._optimizer_step_post_hooks


def test_an_optimizer_without_hooks_costs_its_lr_only(open_run, run_dir, tiny_model, capfd):
    open_run()
    obs.watch(tiny_model[0], optimizer=object())
    obs.step(1, loss=1.0)
    obs.finish()
    assert records(run_dir, "train")[0]["metrics"] == {"loss/train": 1.0}
    assert "lr is not recorded" in capfd.readouterr().err
    assert "watch" in [r["tags"]["event"] for r in records(run_dir, "event")]


def test_without_a_number_the_run_counts(open_run, run_dir):
    open_run()
    for _ in range(3):
        obs.step(loss=1.0)
    obs.finish()
    assert [r["step"] for r in records(run_dir, "train")] == [1, 2, 3]


def test_an_epoch_has_one_validation_point_its_last(open_run, run_dir):
    open_run()
    for epoch in (1, 2):
        assert not obs.skip_epoch(epoch)
        for step in (1, 2):
            obs.step(loss=1.0, tokens=100)
            obs.validation(epoch + step / 10, accuracy=0.5)
    obs.finish()
    evaluations = records(run_dir, "eval")
    per_epoch = [r for r in evaluations if "epoch" in r["tags"]]
    assert [r["tags"]["epoch"] for r in per_epoch] == [1, 2]
    assert [r["metrics"]["loss/val"] for r in per_epoch] == [1.2, 2.2]
    assert all(r["metrics"]["speed/tokens_per_sec"] > 0 for r in per_epoch)
    points = [r for r in evaluations if "loss/val_step" in r["metrics"]]
    assert [(r["step"], r["metrics"]["loss/val_step"]) for r in points] == [
        (1, 1.1),
        (2, 1.2),
        (3, 2.1),
        (4, 2.2),
    ]
    assert points[0]["metrics"]["accuracy/val"] == 0.5


def test_the_epoch_may_come_with_the_validation(open_run, run_dir):
    open_run()
    for epoch in (1, 2):
        obs.step(loss=1.0)
        obs.validation(epoch * 1.0, epoch=epoch)
    obs.finish()
    epochs = [r for r in records(run_dir, "eval") if "epoch" in r["tags"]]
    assert [r["metrics"]["loss/val"] for r in epochs] == [1.0, 2.0]


def test_a_step_with_an_evaluation_in_it_has_no_speed(open_run, run_dir):
    open_run()
    obs.step(loss=1.0, tokens=10)
    obs.step(loss=1.0, tokens=10)
    obs.validation(1.0)
    obs.step(loss=1.0, tokens=10)
    obs.step(loss=1.0, tokens=10)
    obs.finish()
    speeds = ["speed/tokens_per_sec_step" in r["metrics"] for r in records(run_dir, "train")]
    assert speeds == [False, True, False, True]


@pytest.mark.parametrize("before_step", [True, False])
def test_an_evaluation_is_at_the_step_whose_weights_it_saw(
    open_run, run_dir, tiny_model, before_step
):
    model, optimizer = tiny_model
    open_run()
    obs.watch(model, optimizer=optimizer)
    train_one_step(model, optimizer)
    if before_step:
        obs.validation(1.0)
    obs.step(1, loss=1.0)
    if not before_step:
        obs.validation(1.0)
    obs.finish()
    assert [r["step"] for r in records(run_dir, "eval")] == [1]


def test_log_records_anything_any_time(open_run, run_dir):
    open_run()
    obs.step(3, loss=1.0)
    obs.log({"grad/norm 2": 0.25, "weights/µ": 2})
    obs.log({"later": 1.0}, step=9)
    obs.finish()
    _, first, second = records(run_dir, "train")
    assert (first["step"], first["metrics"]) == (3, {"grad/norm 2": 0.25, "weights/µ": 2.0})
    assert second["step"] == 9


def test_results_tell_how_it_ended(open_run, run_dir):
    open_run()
    for step, value in enumerate([3.0, 1.0, 2.0], 1):
        obs.step(step, loss=value * 2)
        obs.validation(value)
    obs.finish(samples=["once upon"], accuracy=0.5)
    results = read_json(run_dir / "results.json")
    assert results["status"] == "completed"
    assert results["steps"] == 3
    assert (results["final_train_loss"], results["final_val_loss"]) == (4.0, 2.0)
    assert (results["best_val_loss"], results["best_val_step"]) == (1.0, 2)
    assert results["samples"] == ["once upon"]
    assert results["wall_s"] >= 0
    assert results["peak_rss_bytes"] > 1e6
    assert results["degraded"] == {}


@pytest.mark.parametrize(
    "make",
    [
        lambda d: d,
        lambda d: argparse.Namespace(**d),
        lambda d: dataclasses.make_dataclass("Config", d)(**d),
    ],
    ids=["dict", "Namespace", "dataclass"],
)
def test_a_configuration_of_any_kind_is_kept_without_its_secrets(open_run, run_dir, make):
    given = {"lr": 1e-3, "tokens": 4, "hf_token": "abc", "url": "https://me:pw@host/x"}
    open_run(config=make(given))
    obs.finish()
    kept = read_json(run_dir / "config.json")["config"]
    assert kept == {
        "lr": 1e-3,
        "tokens": 4,
        "hf_token": "<redacted>",
        "url": "https://<redacted>@host/x",
    }
    assert read_json(run_dir / "run_manifest.json")["hyperparameters"] == kept


def test_the_manifest_says_where_a_run_came_from(tmp_path):
    (tmp_path / "uv.lock").write_text("locked")
    script = tmp_path / "train.py"
    script.write_text("import torch, observability as obs\nobs.init('run')\nobs.finish()\n")
    environment = {
        **os.environ,
        "PYTHONPATH": str(MAINRUN),
        "PYTHONHASHSEED": "7",
        "GIT_SHA": "f00d",
        "WANDB_API_KEY": "hush",
    }
    done = python(script, "--token", "hush", "--api_key=hush", "--lr=1", env=environment)
    assert done.returncode == 0, done.stderr
    manifest = read_json(tmp_path / "out/run/run_manifest.json")
    assert manifest["git_sha"] == "f00d"
    assert manifest["python"] == sys.version.split()[0]
    assert manifest["torch"] == torch.__version__
    assert manifest["env"]["PYTHONHASHSEED"] == "7"
    assert len(manifest["lock_sha256"]) == len(manifest["script_sha256"]) == 64
    assert manifest["command_line"][1:] == [
        "--token",
        "<redacted>",
        "--api_key=<redacted>",
        "--lr=1",
    ]
    assert "hush" not in (tmp_path / "out/run/run_manifest.json").read_text()
    assert {"platform", "device", "script"} <= set(manifest)


def test_an_unnamed_run_is_named_by_time_and_commit(open_run, monkeypatch):
    monkeypatch.setenv("GIT_SHA", "0123456789")
    run = open_run(None)
    stamp, _, commit = run.name.partition("_")
    assert time.strptime(stamp, "%Y-%m-%dT%H-%M-%S")
    assert commit == "0123456"


def test_a_run_is_never_written_over(open_run, tmp_path, capfd):
    open_run()
    obs.step(loss=1.0)
    open_run()
    obs.step(loss=2.0)
    obs.finish()
    assert [r["metrics"]["loss/train"] for r in records(tmp_path / "out/run", "train")] == [1.0]
    assert [r["metrics"]["loss/train"] for r in records(tmp_path / "out/run-2", "train")] == [2.0]
    assert "run-2" in capfd.readouterr().err


def test_a_second_init_finishes_the_first(open_run, run_dir):
    first = open_run()
    open_run("other")
    assert read_json(run_dir / "results.json")["status"] == "superseded"
    assert not first._open


def test_a_run_is_a_context_manager(tmp_path):
    with contextlib.suppress(KeyError), obs.Run("run", out_dir=tmp_path / "out", tb_dir=tmp_path):
        raise KeyError("of the script's own")
    assert read_json(tmp_path / "out/run/results.json")["status"] == "failed: KeyError"


def test_system_records_come_by_the_timer(open_run, run_dir):
    open_run(drain_interval=0.01, system_interval=0.01)
    time.sleep(0.3)
    obs.finish()
    [first, *_] = records(run_dir, "system")
    assert first["metrics"]["system/rss_bytes"] > 1e6
    assert first["metrics"]["system/cpu_seconds"] > 0


def test_training_log_has_evaluations_and_events(open_run, run_dir):
    open_run()
    obs.step(loss=1.0)
    obs.validation(math.nan)
    obs.finish()
    lines = [json.loads(line) for line in (run_dir / "training.log").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "validation", "finish"]
    assert lines[1]["loss/val_step"] == "NaN"


def test_training_log_needs_no_structlog(open_run, run_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "structlog", None)  # as where it is not installed
    test_training_log_has_evaluations_and_events(open_run, run_dir)


# --- CUDA -----------------------------------------------------------------------------------------

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine")


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_cuda_loss_is_recorded_without_waiting(open_run, run_dir, dtype, shape):
    open_run()
    busy = torch.randn(4096, 4096, device="cuda")
    values = torch.arange(3000, device="cuda").to(dtype)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 3000):
            if step % 100 == 0:
                busy = busy @ busy
            obs.step(step, loss=values[step].reshape(shape), other=1.0)
        obs.validation(values[7].reshape(shape))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    obs.finish()
    got = [(r["step"], r["metrics"]["loss/train"]) for r in records(run_dir, "train")]
    assert got == [(step, float(torch.tensor(step, dtype=dtype))) for step in range(1, 3000)]
    assert records(run_dir, "eval")[0]["metrics"]["loss/val_step"] == 7.0


class OnDevice(torch.Tensor):
    """Stands for a CUDA tensor where there is no GPU: it says that it is one."""

    is_cuda = True


@pytest.fixture
def no_pinning(monkeypatch):
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory: plain(*size))
    obs._Landing._free.clear()
    yield
    obs._Landing._free.clear()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_device_values_land_in_their_order(open_run, run_dir, no_pinning, shape):
    open_run()
    for step in range(1, 1001):
        obs.step(step, loss=torch.full(shape, step / 8).as_subclass(OnDevice), other=1.0)
    obs.finish()
    got = [(r["step"], r["metrics"]["loss/train"]) for r in records(run_dir, "train")]
    assert got == [(step, step / 8) for step in range(1, 1001)]
    assert len(obs._Landing._free) == 256  # each cell came back


def test_a_value_that_never_lands_is_counted_as_lost(open_run, run_dir, no_pinning):
    run = open_run(close_timeout=0.2)
    obs.step(1, loss=torch.tensor(1.0).as_subclass(OnDevice))
    [flight] = run._in_flight
    flight[-1][0]._cell[1].value = obs._Landing._ABSENT  # as if the copy were still to come
    obs.step(2, loss=2.0)
    obs.finish()
    assert [r["step"] for r in records(run_dir, "train")] == [2]
    assert read_json(run_dir / "results.json")["lost_records"] == 1


# --- Off ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["argument", "OBS_DISABLE", "RANK"])
def test_a_disabled_run_writes_nothing(open_run, tmp_path, monkeypatch, capfd, how):
    if how != "argument":
        monkeypatch.setenv(how, "1")
    open_run(enabled=how != "argument")
    obs.watch(object())
    obs.skip_epoch(1)
    obs.step(loss=object())
    obs.validation(1.0)
    obs.log({"a": 1})
    obs.finish()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


def test_a_forked_worker_writes_nothing(open_run, run_dir):
    open_run()
    obs.step(1, loss=1.0)
    if (child := os.fork()) == 0:
        obs.step(2, loss=2.0)
        obs.finish()
        os._exit(0)
    os.waitpid(child, 0)
    obs.step(3, loss=3.0)
    obs.finish()
    assert [r["step"] for r in records(run_dir, "train")] == [1, 3]


# --- Bad input ------------------------------------------------------------------------------------


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
    assert capfd.readouterr().err == ""


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


@pytest.mark.parametrize("name", ["a/b c", 'quo"te', "per%cent", "new\nline", "π", "", "x" * 500])
def test_any_metric_name_is_kept(open_run, run_dir, name):
    open_run()
    obs.step(1, **{name: 1.0})
    obs.finish()
    [record] = records(run_dir, "train")
    assert record["metrics"] == {name: 1.0}


def test_a_name_that_fits_nowhere_is_said(open_run, run_dir, capfd):
    open_run()
    obs.step(1, **{"x" * 5000: 1.0})
    obs.step(2, loss=1.0)
    obs.finish()
    assert [r["step"] for r in records(run_dir, "train")] == [2]
    assert "too long a name" in capfd.readouterr().err


def test_hundreds_of_metrics_in_a_step_are_all_kept(open_run, run_dir):
    open_run()
    given = {f"layer.{i}.attention.weight/norm": float(i) for i in range(500)}
    obs.step(1, **given)
    obs.finish()
    parts = records(run_dir, "train")
    assert {r["step"] for r in parts} == {1}
    assert {k: v for r in parts for k, v in r["metrics"].items()} == given


def forms_in_memory():
    gc.collect()
    return sum(type(kept) is obs._Form for kept in gc.get_objects())


def test_ever_new_names_do_not_fill_the_memory(open_run):
    run, before = open_run(), forms_in_memory()
    for index in range(5000):
        obs.log({f"name {index}": 1.0})
    run.drain()
    assert forms_in_memory() - before <= 2100


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


def test_a_directory_of_a_newer_schema_is_left_alone(open_run, run_dir, capfd):
    run_dir.mkdir(parents=True)
    newer = '{"schema":2,"seq":1}\n'
    (run_dir / "metrics.ndjson").write_text(newer)
    with pytest.raises(obs.RunError, match="schema 2"):
        list(obs.read_run(run_dir))
    open_run()
    obs.step(1, loss=1.0)
    obs.finish()
    assert (run_dir / "metrics.ndjson").read_text() == newer


def test_unknown_and_bad_settings_are_said_and_the_defaults_stand(open_run, monkeypatch, capfd):
    monkeypatch.setenv("OBS_DRAIN_INTERVAL", "soon")
    run = open_run(tensorbord=False)
    said = capfd.readouterr().err
    assert "tensorbord" in said
    assert "drain_interval='soon'" in said
    assert run.settings.drain_interval == 0.5


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


def test_steps_from_several_threads_are_all_there_once(open_run, run_dir):
    open_run(drain_interval=0.01)
    threads = [
        threading.Thread(target=lambda n=n: [obs.log({"n": n * 10_000 + i}) for i in range(5000)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    obs.finish()
    values = sorted(r["metrics"]["n"] for r in records(run_dir, "train"))
    assert values == sorted(float(n * 10_000 + i) for n in range(4) for i in range(5000))


@pytest.mark.parametrize("ending", ["", "raise ValueError('no')", "sys.exit(3)"])
def test_a_script_that_does_not_finish_is_finished_at_exit(tmp_path, ending):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, observability as obs\nobs.init('run')\nobs.step(1, loss=1.0)\n" + ending
    )
    python(script, env={**os.environ, "PYTHONPATH": str(MAINRUN)})
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


def test_the_manifest_names_the_device_once_the_script_is_on_it(open_run, run_dir):
    """And not before: the name of a device cannot be asked without starting CUDA."""
    open_run(system_interval=0.05, drain_interval=0.05)
    started = read_json(run_dir / "run_manifest.json")
    assert started["device"] == obs.numerics()["device"]
    obs._run._manifest["device"] = "another"  # as before the script came to its device
    until = time.monotonic() + 30
    while obs._run._manifest["device"] == "another":
        assert time.monotonic() < until
        time.sleep(0.02)
    obs.finish()
    assert read_json(run_dir / "run_manifest.json") == started


@cuda
def test_opening_a_run_does_not_start_cuda(tmp_path):
    script = (
        f"import sys, time; sys.path.insert(0, {str(MAINRUN)!r}); import torch\n"
        "import observability as obs\n"
        f"obs.init('run', out_dir={str(tmp_path)!r}, tb_dir={str(tmp_path)!r})\n"
        "time.sleep(1); assert not torch.cuda.is_initialized(); obs.finish()"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
