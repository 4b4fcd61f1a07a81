"""The calls a script makes: what they record, and that they survive whatever they are handed."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import math
import os
import time
import types
from collections.abc import Callable
from typing import Any, ClassVar

import numpy
import pytest
import torch
from conftest import MAINRUN, python, read_json, records
from scripts import run_script, wait_until

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


def test_step_and_loss_may_come_by_position(open_run, run_dir):
    open_run()
    obs.step(3, 4.0)
    obs.finish()
    [record] = records(run_dir, "train")
    assert (record["step"], record["metrics"]) == (3, {"loss/train": 4.0})


@pytest.mark.parametrize(
    "step",
    [
        4,
        4.0,
        numpy.int64(4),
        numpy.float32(4),
        numpy.array(4),
        torch.tensor(4),
        torch.tensor([4.0]),
    ],
    ids=lambda step: type(step).__name__,
)
def test_a_step_is_counted_in_whatever_counts(open_run, run_dir, step):
    open_run()
    obs.step(step, loss=1.0)
    obs.step(step + 1, loss=1.0)
    obs.step(loss=1.0)
    obs.finish()
    assert [r["step"] for r in records(run_dir, "train")] == [4, 5, 6]
    assert [type(r["step"]) for r in records(run_dir, "train")] == [int] * 3


@pytest.mark.parametrize(
    "step",
    ["1", 1.5, math.nan, math.inf, object(), [1], torch.tensor([1, 2]), numpy.zeros(0)],
    ids=lambda step: str(step)[:12],
)
def test_a_step_that_is_no_number_is_said_and_the_run_counts(open_run, run_dir, capfd, step):
    open_run()
    obs.step(7, loss=1.0)
    obs.step(step, loss=2.0)
    obs.finish()
    assert [r["step"] for r in records(run_dir, "train")] == [7, 8]
    assert capfd.readouterr().err.count("is no whole number") == 1


def test_a_loop_that_counts_from_zero_has_all_its_steps(open_run, run_dir):
    open_run()
    for step in range(3000):
        obs.step(step, loss=1.0)
    obs.finish()
    results = read_json(run_dir / "results.json")
    assert (results["steps"], results["last_step"]) == (3000, 2999)


@pytest.mark.parametrize(
    ("batch", "given", "tokens", "samples"),
    [
        (torch.zeros(4, 8, dtype=torch.int64), {}, 32, None),
        (torch.zeros(4, 8, dtype=torch.int32), {}, 32, None),
        (numpy.zeros((4, 8), dtype="int64"), {}, 32, None),
        (torch.zeros(4, 8, dtype=torch.uint8), {}, None, 4),
        (torch.zeros(4, 8), {}, None, 4),
        (torch.zeros(4, dtype=torch.int64), {}, None, 4),
        (torch.zeros(4, 3, 8, dtype=torch.int64), {}, None, 4),
        ((torch.zeros(4, 8), torch.zeros(2)), {}, None, 4),
        ([torch.zeros(4, 8, dtype=torch.int64), torch.zeros(2)], {}, 32, None),
        ({"y": torch.zeros(2), "input_ids": torch.zeros(4, 8, dtype=torch.int64)}, {}, 32, None),
        ({"id": ["a", "b"], "x": torch.zeros(4, 8)}, {}, None, 4),
        (collections.UserDict(input_ids=torch.zeros(4, 8, dtype=torch.int64)), {}, 32, None),
        (torch.zeros(4, 8), {"tokens": 7}, 7, None),
        (torch.zeros(4, 8, dtype=torch.int64), {"samples": 5}, None, 5),
        (torch.zeros(4, 8), {"tokens": numpy.int64(7), "samples": torch.tensor(3)}, 7, 3),
        (torch.tensor(3.0), {}, None, None),
        (["a", "b"], {}, None, None),
        ([], {}, None, None),
        ({}, {}, None, None),
        (object(), {}, None, None),
    ],
)
def test_a_rate_is_of_what_the_shape_of_the_batch_tells(
    open_run, run_dir, capfd, batch, given, tokens, samples
):
    open_run()
    obs.step(1, loss=1.0)
    obs.step(2, loss=1.0, batch=batch, one=1.0, **given)
    obs.finish()
    metrics = records(run_dir, "train")[1]["metrics"]
    counts = {"tokens": tokens, "samples": samples}
    names = {f"speed/{name}_per_sec_step": count for name, count in counts.items() if count}
    assert {name for name in metrics if "speed" in name} == set(names)
    rates = {metrics[name] / count for name, count in names.items()}
    assert not rates or max(rates) == pytest.approx(min(rates))
    assert metrics["one"] == 1.0
    assert "failed" not in capfd.readouterr().err


def test_a_batch_tells_how_much_was_trained_on(open_run, run_dir):
    """By the rate of an epoch, that divides by all that passed in it."""
    open_run()
    obs.skip_epoch(1)
    began = time.perf_counter()
    for step in range(1, 51):
        obs.skip_batch()
        obs.step(step, loss=1.0, batch=torch.zeros(4, 8, dtype=torch.int64))
    took = time.perf_counter() - began
    obs.finish()
    [record] = [r for r in records(run_dir, "eval") if "epoch" in r["tags"]]
    assert record["metrics"]["speed/tokens_per_sec"] <= 50 * 32 / took
    assert record["metrics"]["speed/tokens_per_sec"] > 0


def test_of_micro_batches_that_were_not_all_seen_there_is_no_rate(open_run, run_dir):
    open_run()
    for step in (1, 2):
        for _ in range(3):
            obs.skip_batch()
        obs.step(step, loss=1.0, batch=torch.zeros(4, 8, dtype=torch.int64))
    obs.finish()
    assert [r["metrics"] for r in records(run_dir, "train")] == [{"loss/train": 1.0}] * 2


@pytest.mark.parametrize("tokens", ["many", object(), [1], math.nan])
def test_tokens_that_are_no_number_cost_the_rate_only(open_run, run_dir, capfd, tokens):
    open_run()
    obs.step(1, loss=1.0, tokens=5)
    obs.step(2, loss=1.0, tokens=tokens)
    obs.finish()
    assert records(run_dir, "train")[1]["metrics"] == {"loss/train": 1.0}
    assert "tokens=" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "loss", "others"),
    [
        (0.5, 0.5, {}),
        (numpy.float32(0.5), 0.5, {}),
        (torch.tensor(0.5), 0.5, {}),
        (torch.tensor([[0.5]], requires_grad=True), 0.5, {}),
        ({"train": 2.0, "val": torch.tensor(0.5)}, 0.5, {"train/val": 2.0}),
        ({"acc": 0.25, "val_loss": 0.5}, 0.5, {"acc/val": 0.25}),
        ({"acc": 0.25, "loss": 0.5}, 0.5, {"acc/val": 0.25}),
        ({"perplexity": 0.5, "acc": 0.25}, 0.5, {"acc/val": 0.25}),
        (collections.UserDict(loss=0.5), 0.5, {}),
        ((0.5, 0.25), 0.5, {"1/val": 0.25}),
        ([torch.tensor(0.5), 3], 0.5, {"1/val": 3.0}),
        ((0.5,), 0.5, {}),
    ],
    ids=str,
)
def test_an_evaluation_is_whatever_evaluate_returned(open_run, run_dir, given, loss, others):
    open_run()
    obs.step(1, loss=1.0)
    obs.validation(given, extra=2.0)
    obs.finish()
    [record] = records(run_dir, "eval")
    assert record["metrics"] == {"loss/val_step": loss, **others, "extra/val": 2.0}
    assert read_json(run_dir / "results.json")["best_val_loss"] == loss


@pytest.mark.parametrize("given", [None, {}, (), "low", object(), torch.ones(3), {"val": "low"}])
def test_an_evaluation_that_returned_no_number_is_said(open_run, run_dir, capfd, given):
    open_run()
    obs.step(1, loss=1.0)
    obs.validation(given)
    obs.validation(0.5)
    obs.finish()
    points = [r["metrics"]["loss/val_step"] for r in records(run_dir, "eval") if r["metrics"]]
    assert points == [0.5]
    assert "loss/val" in capfd.readouterr().err
    assert read_json(run_dir / "results.json")["best_val_loss"] == 0.5


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


@pytest.mark.parametrize("ending", ["raise ValueError", "sys.exit(1)", "obs.finish('failed: x')"])
def test_an_epoch_that_was_interrupted_has_no_validation_point(tmp_path, ending):
    run_script(
        tmp_path,
        f"""
        for epoch in (1, 2):
            obs.skip_epoch(epoch)
            obs.step(loss=1.0)
            obs.validation(0.5)
            if epoch == 2: {ending}
        """,
    )
    found = records(tmp_path / "out/run", "eval")
    assert [r["tags"]["epoch"] for r in found if "epoch" in r["tags"]] == [1]
    assert len(found) == 3


@pytest.mark.parametrize("fails_at", [5, 6, 7, 8])
def test_a_resumed_epoch_has_one_validation_point_its_last(open_run, tiny_model, fails_at):
    """Though the evaluation, in the middle of each epoch, may lie before the interruption."""
    model, optimizer = tiny_model
    for ending in ("failed: here", "completed"):
        run = open_run(save_interval=1, resume="auto")
        obs.watch(model, optimizer=optimizer)
        step = obs.resume(step=0)
        for epoch in (1, 2, 3):
            if obs.skip_epoch(epoch):
                continue
            for batch in (1, 2, 3, 4):
                if obs.skip_batch():
                    continue
                train_one_step(model, optimizer)
                if batch == 2:
                    obs.validation(epoch / 4)
                step += 1
                run.settle()
                obs.step(step, loss=1 / step)
                if (step, ending) == (fails_at, "failed: here"):
                    break
            if (step, ending) == (fails_at, "failed: here"):
                break
        run.settle()
        obs.finish(ending)
    found = records(run.dir, "eval")
    points = [(r["tags"]["epoch"], r["metrics"]) for r in found if "epoch" in r["tags"]]
    assert points == [(epoch, {"loss/val": epoch / 4}) for epoch in (1, 2, 3)]
    results = read_json(run.dir / "results.json")
    assert (results["best_val_loss"], results["final_val_loss"]) == (0.25, 0.75)
    assert [r["step"] for r in found if "epoch" not in r["tags"]] == [2, 6, 10]


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


def test_a_structured_value_is_kept_in_the_tags(open_run, run_dir, capfd):
    open_run()
    obs.step(1, loss=1.0)
    obs.log({"norm": 2.0, "layers": [1, {"a": 0.5}], "phase of moon": "full", "map": {"k": (1, 2)}})
    obs.finish()
    record = records(run_dir, "train")[-1]
    assert record["metrics"] == {"norm": 2.0}
    kept = {"layers": [1, {"a": 0.5}], "phase of moon": "full", "map": {"k": [1, 2]}}
    assert record["tags"] == {"phase": "train", "rank": 0, **kept}
    assert "not recorded" not in capfd.readouterr().err


def test_a_structure_cannot_pass_for_a_tag_of_ours(open_run, run_dir):
    open_run()
    obs.log({"phase": "event", "rank": "9", "event": "resume", "supersedes_from": [0], "a": 1.0})
    obs.finish()
    assert [r["metrics"] for r in records(run_dir, "train")] == [{"a": 1.0}]
    assert records(run_dir, "train")[0]["tags"]["rank"] == 0


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
    assert results["peak_rss_bytes"] > 1e6
    assert results["degraded"] == {}


def test_a_second_init_finishes_the_first(open_run, run_dir):
    first = open_run()
    obs.step(1, loss=1.0)
    open_run("other")
    assert read_json(run_dir / "results.json")["status"] == "superseded"
    first.step(2, loss=1.0)
    assert [r["step"] for r in records(run_dir, "train")] == [1]


def test_a_run_is_a_context_manager(tmp_path):
    run = obs.Run("run", out_dir=tmp_path / "out", tb_dir=tmp_path)
    with contextlib.suppress(KeyError), run:
        run.step(1, loss=1.0)
        raise KeyError("of the script's own")
    assert read_json(tmp_path / "out/run/results.json")["status"] == "failed: KeyError"


CALLS = ["watched", "stepped", "evaluating", "evaluated", "saving", "resumed", "finishing"]


class Listener:
    """Keeps what it is told, and fails every time it is asked to."""

    def __init__(self, fails=False):
        self.told, self.fails = [], fails

    def __getattr__(self, name):
        if name not in CALLS:
            raise AttributeError(name)

        def tell(*facts):
            self.told.append((name, *facts))
            if self.fails:
                raise LookupError(name)
            return {"kept": len(self.told)}

        tell.__name__ = name
        return tell


def listened(run, listener, model, optimizer):
    """A training with a save in it, as the listener is told of it."""
    run.add_listener(listener)
    obs.watch(model, optimizer=optimizer)
    obs.resume()
    for epoch in (1, 2):
        if obs.skip_epoch(epoch):
            continue
        obs.skip_batch()
        train_one_step(model, optimizer)
        obs.step(epoch, loss=1 / epoch)
        obs.validation(0.5)
    obs.finish()
    return [name for name, *_ in listener.told]


@pytest.mark.parametrize("fails", [False, True])
def test_a_listener_is_told_of_everything_and_can_break_nothing(
    open_run, run_dir, tiny_model, capfd, fails
):
    run, listener = open_run(save_interval=1, keep_last=5), Listener(fails)
    told = listened(run, listener, *tiny_model)
    once = ["stepped", "saving", "evaluating", "evaluated"]
    assert [name for name in told if name != "saving"] == [
        "watched",
        *[n for n in 2 * once if n != "saving"],
        "finishing",
    ]
    assert "saving" in told
    facts = dict(reversed([(name, facts) for name, *facts in listener.told]))
    assert facts["watched"] == [run]
    assert facts["stepped"][0] == 1
    assert facts["stepped"][1]["loss/train"] == 1.0
    assert facts["evaluated"] == [1, {"loss/val_step": 0.5}]
    assert facts["saving"] == [1]
    assert facts["finishing"] == ["completed"]
    assert len(records(run_dir, "train")) == 2
    assert obs.latest_ckpt(run_dir / "checkpoints").name == "step_00000002"
    assert ("LookupError" in capfd.readouterr().err) == fails


@pytest.mark.parametrize("fails", [False, True])
def test_a_listener_gets_back_what_it_gave_the_checkpoint(open_run, tiny_model, fails):
    run = open_run(save_interval=1)
    listened(run, Listener(), *tiny_model)
    (run.dir / "results.json").unlink()  # as if it had been killed at its end
    listener = Listener(fails)
    again = open_run(resume="auto", save_interval=1)
    listened(again, listener, *tiny_model)
    assert again.dir == run.dir
    [kept] = [facts for name, *facts in listener.told if name == "resumed"]
    assert kept[0]["kept"] > 0


def test_a_listener_need_not_hear_everything(open_run, run_dir):
    run = open_run()
    run.add_listener(types.SimpleNamespace(stepped=lambda step, metrics: None))
    run.add_listener(object())
    obs.step(1, loss=1.0)
    obs.validation(1.0)
    obs.finish()
    assert len(records(run_dir, "train")) == 1


def test_training_log_has_evaluations_and_events(open_run, run_dir):
    open_run()
    obs.step(loss=1.0)
    obs.validation(math.nan)
    obs.finish()
    lines = [json.loads(line) for line in (run_dir / "training.log").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "validation", "finish"]
    assert lines[1]["loss/val_step"] == "NaN"


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
    """Stands for a CUDA tensor where there is no GPU: a copy to the host ends in its own time."""

    is_cuda = True
    on_their_way: ClassVar[list[Callable[[], Any]]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_:
            copy = functools.partial(super().__torch_function__, function, types, args)
            cls.on_their_way.append(copy)
            return args[0]
        return super().__torch_function__(function, types, args, kwargs)


def on_device(value, *shape):
    return torch.full(shape, value).as_subclass(OnDevice)


@pytest.fixture
def copies(monkeypatch):
    """What is on its way from the stand-in of a device; a call makes it arrive."""
    if not torch.cuda.is_available():  # nor can memory be pinned
        plain = torch.empty
        monkeypatch.setattr(
            torch, "empty", lambda *size, dtype, pin_memory: plain(*size, dtype=dtype)
        )
    monkeypatch.setattr(OnDevice, "on_their_way", [])
    return OnDevice.on_their_way


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_device_values_are_recorded_in_the_order_of_the_calls(open_run, run_dir, copies, shape):
    """However late each arrives, and whatever plain numbers come in between."""
    open_run(drain_interval=60)
    for step in range(1, 1001):
        obs.step(step, loss=on_device(step / 8, *shape) if step % 3 else step / 8, other=1.0)
        while len(copies) > step % 7:
            copies.pop(0)()
    while copies:
        copies.pop(0)()
    obs.finish()
    got = [(r["step"], r["metrics"]["loss/train"]) for r in records(run_dir, "train")]
    assert got == [(step, step / 8) for step in range(1, 1001)]
    assert [r["seq"] for r in obs.read_run(run_dir)] == list(range(1, 1003))


def test_the_timer_writes_what_has_arrived(open_run, run_dir, copies):
    open_run(drain_interval=0.02)
    obs.step(1, loss=on_device(1.5))
    assert records(run_dir, "train") == []
    copies.pop()()
    wait_until(lambda: records(run_dir, "train"))
    assert records(run_dir, "train")[0]["metrics"] == {"loss/train": 1.5}


def test_a_value_that_never_arrives_is_counted_as_lost(open_run, run_dir, copies):
    open_run(close_timeout=0.2)
    obs.step(1, loss=1.0)
    obs.step(2, loss=on_device(2.0))
    obs.step(3, loss=3.0)
    obs.finish()
    assert [r["step"] for r in records(run_dir, "train")] == [1]
    assert read_json(run_dir / "results.json")["lost_records"] == 2


def test_a_validation_loss_may_go_on_changing_on_the_device(open_run, run_dir, copies):
    open_run(close_timeout=0.2)
    for epoch in (1, 2):
        obs.skip_epoch(epoch)
        total = on_device(2.0)
        obs.step(loss=1.0)
        obs.validation(total)
        while copies:
            copies.pop(0)()
        total.mul_(100)
    obs.finish()
    epochs = [r["metrics"] for r in records(run_dir, "eval") if "epoch" in r["tags"]]
    assert epochs == [{"loss/val": 2.0}]  # of the second one the copy never ends


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


# --- Off ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["argument", "OBS_DISABLE", "RANK"])
def test_a_disabled_run_writes_nothing(open_run, tmp_path, monkeypatch, capfd, how):
    if how != "argument":
        monkeypatch.setenv(how, "1")
    open_run(enabled=how != "argument")
    obs.watch(torch.nn.Linear(2, 1))
    obs.skip_epoch(1)
    obs.step(loss=1.0)
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


def test_a_rate_on_the_device_that_two_steps_share_comes_to_both(open_run, run_dir, copies):
    weight = torch.nn.Parameter(torch.ones(1))
    opt = torch.optim.SGD([weight], lr=0.1)
    open_run(drain_interval=60)
    obs.watch(optimizer=opt)
    for number in range(1, 9):
        opt.param_groups[0]["lr"] = on_device(number / 8)
        weight.grad = None  # the step moves nothing: its hook is what counts
        opt.step()
        obs.step(loss=on_device(float(number)))
        obs.step(loss=on_device(number + 0.5))
        while copies:
            copies.pop(0)()
    obs.finish()
    got = [(r["metrics"]["loss/train"], r["metrics"]["lr"]) for r in records(run_dir, "train")]
    assert got == [(n + half, n / 8) for n in range(1, 9) for half in (0, 0.5)]


def test_a_value_on_the_device_is_right_whatever_the_default_dtype_is(open_run, run_dir, copies):
    torch.set_default_dtype(torch.float64)
    try:
        open_run(drain_interval=60)
        obs.PendingValue._free.clear()
        obs.step(loss=on_device(0.1))
        copies.pop()()
        obs.finish()
    finally:
        torch.set_default_dtype(torch.float32)
    assert records(run_dir, "train")[0]["metrics"]["loss/train"] == pytest.approx(0.1, rel=1e-6)


def test_a_validation_that_is_no_number_is_not_taken_for_the_next_one(open_run, run_dir):
    open_run()
    obs.step(1, loss=1.0)
    obs.validation("none yet")
    obs.step(2, loss=1.0)
    obs.validation(0.5, accuracy=0.75)
    obs.validation([], top5=0.9)
    obs.finish()
    results = read_json(run_dir / "results.json")
    assert (results["best_val_loss"], results["best_val_step"]) == (0.5, 2)
    assert [r["metrics"] for r in records(run_dir, "eval")] == [
        {"loss/val_step": 0.5, "accuracy/val": 0.75},
        {"top5/val": 0.9},
    ]


@pytest.mark.parametrize(
    ("given", "recorded"),
    [
        ({"acc1": 0.5, "ppl": 3.0}, {"loss/val_step": 3.0, "acc1/val": 0.5}),
        ({"acc1": 0.5, "eval_loss": 2.0}, {"loss/val_step": 2.0, "acc1/val": 0.5}),
        ({"acc1": 0.5, "f1": 0.25}, {"acc1/val": 0.5, "f1/val": 0.25}),
        ({"loss": 1.0, "val": 2.0}, {"loss/val_step": 2.0, "other_loss/val": 1.0}),
    ],
)
def test_of_a_dict_the_loss_is_what_sounds_like_one(open_run, run_dir, given, recorded):
    open_run()
    obs.validation(given)
    obs.finish()
    assert [r["metrics"] for r in records(run_dir, "eval")] == [recorded]
