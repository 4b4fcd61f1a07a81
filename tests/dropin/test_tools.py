"""The commands: what each prints, when it exits with 0, 1 or 2, and that it says what to do."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from pathlib import Path

import pytest
from conftest import MAINRUN, ROOT, python

import observability as obs
import observability_tools as tools
from tests.dropin.test_records import tensorboard_points

COMMANDS = MAINRUN / "observability.py"
BASELINE = ROOT / "baseline.log"

# The published recipe on CUDA, its validation losses where they were written down.
CUDA_POINTS = {1: 2.097992, 44: 1.950204, 88: 1.887633, 440: 1.765790, 938: 1.7532881}

CHILD = """
import os, sys, observability as obs
run = obs.init("run", out_dir=sys.argv[1], tb_dir=sys.argv[2], system_interval=0)
for step in range(1, 6):
    obs.step(step, loss=1 / step, tokens=64)
obs.validation(0.5)
print("recorded", flush=True)
sys.stdin.read()
"""


def command(*arguments, status=0, **options):
    """The command's standard output, after its exit status was checked."""
    done = python(COMMANDS, *arguments, **options)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def verdict(run_dir):
    """What verify says is damaged, from within this process."""
    return tools.verify(run_dir)["damage"]


def refusal(*arguments):
    """What a command that could not answer wrote to standard error: one line."""
    done = python(COMMANDS, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    return line.removeprefix("observability: ")


@contextlib.contextmanager
def living_run(folder):
    """Another process that has recorded five steps and is still training."""
    arguments = [sys.executable, "-c", CHILD, folder / "out", folder / "tb"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": str(MAINRUN)}, **pipes) as it:
        assert it.stdout.readline() == b"recorded\n"
        yield it
        it.kill()


@pytest.fixture
def finished_run(open_run, run_dir, tiny_model):
    """Two epochs of three steps with evaluations, a rate, a NaN and a system record."""
    model, optimizer = tiny_model
    run = open_run()
    obs.watch(model, optimizer=optimizer)
    for epoch in (1, 2):
        obs.skip_epoch(epoch)
        for step in (1, 2, 3):
            model(model.weight).sum().backward()
            optimizer.step()
            obs.step(3 * (epoch - 1) + step, loss=1 / (epoch + step), tokens=64, odd=float("nan"))
        obs.validation(epoch / 4)
    run.recorder.record("system", run.global_step, {"system/rss_bytes": 5e8})
    obs.finish()
    return run_dir


@pytest.fixture
def resumed_run(open_run, run_dir, tiny_model):
    """Six steps with a NaN in each: killed after the fourth, gone on with from the second."""
    model, optimizer = tiny_model
    for first, last in ((1, 4), (3, 6)):
        run = open_run(resume="auto")
        obs.watch(model, optimizer=optimizer)
        obs.resume()
        for step in range(first, last + 1):
            if step == 2:
                obs.save()
            obs.step(step, loss=1 / step, odd=float("nan"))
            run.settle()
        obs.finish("failed: as by a kill" if last == 4 else "completed")
    return run_dir


@pytest.fixture
def two_streams(open_run, run_dir):
    """A run, and beside it the stream of its evaluations."""
    open_run()
    for step in (1, 2):
        obs.step(step, loss=1.0)
    obs.finish()
    open_run(metrics_filename="eval.ndjson")
    obs.validation(0.25, step=7)
    obs.finish()
    return run_dir


# --- summarize ------------------------------------------------------------------------------------


def test_help_names_every_command():
    text = command("--help")
    names = re.findall(r"^ {4}([a-z]+)\b", text, re.MULTILINE)
    expected = {"summarize", "verify", "rebuild", "export", "diff", "rm", "plot", "parity", "tb"}
    assert set(names) == expected | {"run"}
    for name in names:
        assert f"usage: observability.py {name}" in command(name, "--help")


def test_summarize_reads_train_eval_and_system_records(finished_run):
    [row] = json.loads(command("summarize", finished_run, "--json"))
    assert (row["run"], row["status"], row["steps"]) == ("run", "completed", 6)
    assert (row["train_loss"], row["lr"]) == (0.2, 0.5)
    assert (row["val_loss"], row["best_val_loss"], row["best_step"]) == (0.5, 0.25, 3)
    assert row["tokens_per_sec"] > 0
    assert row["wall_s"] > 0
    rss = [r["metrics"].get("system/rss_bytes") for r in obs.read_run(finished_run)]
    assert row["rss_mb"] == [number for number in rss if number][-1] / 1e6


def test_summarize_prints_one_table_in_three_forms(finished_run, tmp_path):
    with living_run(tmp_path / "other"):
        pass
    runs = [finished_run, tmp_path / "other" / "out" / "run"]
    rows = json.loads(command("summarize", *runs, "--json"))
    lines = command("summarize", *runs).splitlines()
    table = list(csv.DictReader(io.StringIO(command("summarize", *runs, "--csv"))))
    assert lines[0].split() == list(table[0]) == list(rows[0])
    assert [line.split()[:3] for line in lines[1:]] == [
        ["run", "completed", "6"],
        ["run", "killed", "5"],
    ]
    assert [float(row["val_loss"]) for row in table] == [0.5, 0.5]
    assert [row["val_loss"] for row in rows] == [0.5, 0.5]
    assert {len(line.split()) for line in lines} == {len(rows[0])}


def test_summarize_reads_several_shards_as_one(open_run, run_dir):
    open_run(shard_bytes=5_000)
    for step in range(1, 501):
        obs.step(step, loss=1 / step)
    obs.validation(3.0)
    obs.finish()
    assert len(list(run_dir.glob("metrics*.ndjson"))) > 1
    [row] = json.loads(command("summarize", run_dir, "--json"))
    assert (row["steps"], row["train_loss"], row["val_loss"]) == (500, 1 / 500, 3.0)


def test_summarize_tells_a_running_run_from_a_killed_one(tmp_path):
    run = tmp_path / "out" / "run"
    with living_run(tmp_path):
        [row] = json.loads(command("summarize", run, "--json"))
        assert (row["status"], row["steps"], row["val_loss"]) == ("running", 5, 0.5)
    [row] = json.loads(command("summarize", run, "--json"))
    assert (row["status"], row["steps"], row["val_loss"]) == ("killed", 5, 0.5)


def test_summarize_leaves_out_what_is_not_known(open_run, run_dir):
    open_run()
    obs.finish()
    [row] = json.loads(command("summarize", run_dir, "--json"))
    unknown = ("train_loss", "val_loss", "best_val_loss", "best_step", "lr", "tokens_per_sec")
    assert [row[name] for name in unknown] == [None] * len(unknown)
    assert command("summarize", run_dir).splitlines()[1].split()[3] == "-"


def test_summarize_keeps_an_evaluation_before_the_first_step(open_run, run_dir):
    open_run()
    obs.validation(2.0, step=0)
    obs.finish()
    [row] = json.loads(command("summarize", run_dir, "--json"))
    assert (row["best_val_loss"], row["best_step"]) == (2.0, 0)


@pytest.mark.parametrize("make", [False, True])
def test_a_missing_run_is_named(tmp_path, make):
    if make:
        (tmp_path / "nothing").mkdir()
    said = refusal("summarize", tmp_path / "nothing")
    assert said == f"{tmp_path / 'nothing'} holds no metrics.ndjson; give the directory of a run"


def test_what_is_no_run_is_said_and_passed_over(finished_run):
    weights = finished_run.with_name("pretrain_512.pth")
    weights.write_bytes(b"PK")
    done = python(COMMANDS, "summarize", finished_run, weights, "--json")
    assert (done.returncode, len(json.loads(done.stdout))) == (0, 1)
    assert done.stderr.count(str(weights)) == 1
    assert str(weights) in refusal("summarize", weights)


def test_each_stream_of_a_run_has_a_row(two_streams):
    rows = json.loads(command("summarize", two_streams, "--json"))
    assert [(row["run"], row["steps"], row["val_loss"]) for row in rows] == [
        ("run", 2, None),
        ("run:eval.ndjson", 7, 0.25),
    ]
    [row] = json.loads(command("summarize", two_streams / "eval.ndjson", "--json"))
    assert row == rows[1]


def test_a_run_that_was_killed_after_a_resume_is_not_what_it_was_before(resumed_run):
    [row] = json.loads(command("summarize", resumed_run, "--json"))
    assert (row["status"], row["steps"], row["train_loss"]) == ("completed", 6, 1 / 6)
    journal = resumed_run / "metrics.ndjson"
    results = obs.read_sealed(resumed_run / "results.json")
    del results["self_crc32"]
    (resumed_run / "results.json").write_bytes(obs.seal({**results, "records": 5}))
    assert tools.summary(resumed_run)["status"] == "killed"
    assert journal.exists()


def test_the_metrics_table_has_a_row_for_each_metric_by_phase(finished_run, tmp_path):
    command("summarize", finished_run, "--output", tmp_path / "metrics.csv")
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    numbers = ["count", "non_finite", "first", "last", "min", "max", "mean"]
    assert list(rows[0]) == ["run", "phase", "metric", *numbers]
    found = {(row["phase"], row["metric"]): row for row in rows}
    loss = found["train", "loss/train"]
    losses = [1 / (epoch + step) for epoch in (1, 2) for step in (1, 2, 3)]
    expected = [6, 0, losses[0], losses[-1], min(losses), max(losses), sum(losses) / 6]
    assert [float(loss[name]) for name in numbers] == pytest.approx(expected)
    assert list(found["train", "odd"].values())[3:] == ["6", "6", "nan", "nan", "", "", ""]
    assert found["eval", "loss/val"]["count"] == "2"
    assert found["system", "system/rss_bytes"]["last"] == "500000000.0"


def test_a_run_of_a_newer_schema_is_refused(finished_run):
    journal = finished_run / "metrics.ndjson"
    bodies = [line.rpartition(b',"crc":')[0] for line in journal.read_bytes().splitlines()]
    newer = [body.replace(b'"schema":1', b'"schema":2') for body in bodies]
    journal.write_bytes(b"".join(b'%b,"crc":%d}\n' % (body, zlib.crc32(body)) for body in newer))
    assert "schema 2, this file knows up to 1" in refusal("summarize", finished_run)


# --- verify ---------------------------------------------------------------------------------------


def checked_files(run_dir):
    """All that a run has, but what it only says to people."""
    found = [path for path in run_dir.rglob("*") if path.is_file() and not path.is_symlink()]
    found += [path for stream in tools.streams(run_dir) for path in stream.events()]
    return [p for p in found if p.stat().st_size and p.name != "training.log"]


def missed_flips(run_dir, count, seed=0):
    """Of so many single flipped bits, the ones that verify does not find."""
    choice, missed = random.Random(seed), []
    files = sorted(checked_files(run_dir))
    for number in range(count):
        path = files[number % len(files)]
        whole = path.read_bytes()
        at = choice.choice([choice.randrange(len(whole)), len(whole) - 1 - number % 20])
        flipped = bytearray(whole)
        flipped[at] ^= 1 << choice.randrange(8)
        path.write_bytes(flipped)
        if not verdict(run_dir):
            missed.append((path, at))
        path.write_bytes(whole)
    assert verdict(run_dir) == []
    return missed


FLIPS = int(os.environ.get("FLIPS", 120))  # more of them, to be surer


def test_every_flipped_bit_of_an_ended_run_is_found(resumed_run):
    assert missed_flips(resumed_run, FLIPS) == []


def test_every_flipped_bit_of_a_killed_run_is_found(tmp_path):
    with living_run(tmp_path):
        pass
    assert missed_flips(tmp_path / "out" / "run", FLIPS) == []


def test_every_flipped_bit_of_a_second_stream_is_found(two_streams):
    assert missed_flips(two_streams, FLIPS) == []


def test_a_flipped_bit_among_thousands_of_events_is_found(open_run, run_dir):
    open_run()
    for step in range(1, 3001):
        obs.step(step, loss=1 / step)
    obs.finish()
    [events] = tools.Stream(run_dir).events()
    whole = events.read_bytes()
    for at in (len(whole) // 3, len(whole) // 2, len(whole) - 5):
        events.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert len(verdict(run_dir)) == 1
    events.write_bytes(whole)
    assert verdict(run_dir) == []


def test_verify_says_what_it_checked_and_exits_by_what_it_found(resumed_run, tmp_path):
    said = command("verify", resumed_run)
    assert said == f"{resumed_run}: 1 checkpoints, 15 records, 2 event files: whole\n"
    (resumed_run / "checkpoints" / "step_00000002" / "model.pth").write_bytes(b"PK")
    lines = command("verify", resumed_run, status=1).splitlines()
    assert "step_00000002/model.pth is not what was written" in lines[0]
    assert lines[1].endswith("1 damaged")
    [found] = json.loads(command("verify", resumed_run, "--json", status=1))
    assert (found["count"], found["damage"]) == (1, lines[:1])
    assert "nothing holds no metrics.ndjson" in refusal("verify", tmp_path / "nothing")


def test_of_much_damage_some_is_printed_and_all_is_counted(finished_run):
    with (finished_run / "metrics.ndjson").open("a") as journal:
        journal.writelines("no record\n" for _ in range(5000))
    lines = command("verify", finished_run, status=1).splitlines()
    assert len(lines) == 22
    assert lines[-1].endswith("5001 damaged")  # and the size that the run noted at its end


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_what_is_cut_off_an_ended_runs_files_is_found(resumed_run, cut):
    for path in checked_files(resumed_run):
        whole = path.read_bytes()
        path.write_bytes(whole[: -min(cut, len(whole))])
        assert verdict(resumed_run), path
        path.write_bytes(whole)


def test_lines_cut_off_whole_are_missed_by_their_numbers(resumed_run):
    journal = resumed_run / "metrics.ndjson"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-3]))
    found = verdict(resumed_run)
    assert found[0] == "metrics.ndjson: records 13 to 15 are missing, steps 5 to 6"
    assert (
        found[1]
        == f"{journal} has {len(b''.join(lines[:-3]))} bytes, and had {sum(map(len, lines))}"
    )


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (slice(2, 4), "records 3 to 4 are missing, steps 2 to 3"),
        (slice(1, 2), "record 2 is missing, step 1"),
        (slice(3, 9), "records 4 to 9 are missing, steps 3 to 8"),
    ],
)
def test_missing_records_are_named_with_their_steps(tmp_path, gone, said):
    journal = make_journal(tmp_path / "run", range(1, 11))
    lines = journal.read_bytes().splitlines(keepends=True)
    del lines[gone]
    journal.write_bytes(b"".join(lines))
    assert f"metrics.ndjson: {said}" in verdict(tmp_path / "run")


def line_of(seq, step, **tags):
    """As a run writes it."""
    metrics = {"loss/train": 0.5} if tags["phase"] == "train" else {}
    facts = {"seq": seq, "time": 1.0, "step": step, "metrics": metrics}
    return obs.Record.of({**facts, "tags": {"phase": tags.pop("phase"), "rank": 0, **tags}}).line()


def make_journal(run_dir, steps):
    """A journal of a start event and those steps, as a run writes it, and its config.json."""
    run_dir.mkdir(parents=True)
    config = {"run": run_dir.name, "id": "1", "config": {}, "tb_dir": "tb", "checkpoints": "saved"}
    (run_dir / "config.json").write_bytes(obs.seal(config))
    lines = [line_of(1, 0, phase="event", event="start")]
    lines += [line_of(seq, step, phase="train") for seq, step in enumerate(steps, 2)]
    (run_dir / "metrics.ndjson").write_bytes(b"".join(lines))
    return run_dir / "metrics.ndjson"


def test_steps_may_be_any_number(tmp_path):
    make_journal(tmp_path / "run", [-3, -2, -1, 0, 5, 5, 2**62])
    assert verdict(tmp_path / "run") == []


def test_a_fork_may_go_on_with_the_numbers_of_its_parent(tmp_path):
    journal = make_journal(tmp_path / "run", [])
    fork = {"event": "resume", "parent": "out/other", "supersedes_from": 99, "events": {}}
    lines = [line_of(100, 50, phase="event", **fork), line_of(101, 51, phase="train")]
    journal.write_bytes(b"".join(lines))
    assert verdict(tmp_path / "run") == []
    journal.write_bytes(b"".join([*lines, line_of(103, 53, phase="train")]))
    assert verdict(tmp_path / "run") == ["metrics.ndjson: record 102 is missing, step 52"]


def test_a_run_killed_before_its_first_record_is_whole(tmp_path):
    make_journal(tmp_path / "run", []).write_bytes(b"")
    assert verdict(tmp_path / "run") == []


def test_records_in_another_order_and_doubles_are_damage(tmp_path):
    journal = make_journal(tmp_path / "run", range(1, 11))
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines, lines[5]]))
    assert verdict(tmp_path / "run") == ["metrics.ndjson: record 6 stands there twice"]
    lines[3], lines[4] = lines[4], lines[3]
    journal.write_bytes(b"".join(lines))
    swapped = ["metrics.ndjson, line 5: record 4 stands behind record 5"]
    assert verdict(tmp_path / "run") == swapped
    (tmp_path / "run" / "metrics.0001.ndjson").write_bytes(b"".join(lines[6:]))
    journal.write_bytes(b"".join(lines[:3]))
    assert "metrics.ndjson, line 1: record 1 stands behind record 11" in verdict(tmp_path / "run")


def test_what_threads_record_at_once_stands_in_order(open_run, run_dir):
    run = open_run(shard_bytes=20_000)
    threads = [
        threading.Thread(target=lambda: [run.log({"a": i}) for i in range(300)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for step in range(1, 301):
        obs.step(step, loss=1 / step)
    for thread in threads:
        thread.join()
    obs.finish()
    assert verdict(run_dir) == []
    assert "whole" in command("verify", run_dir)


def test_results_that_an_ended_run_had_are_missed_and_those_of_a_killed_one_are_not(
    two_streams, tmp_path
):
    for name in ("results.json", "results.eval.json"):
        whole = (two_streams / name).read_bytes()
        (two_streams / name).unlink()
        [said] = command("verify", two_streams, status=1).splitlines()[:-1]
        assert said == (
            f"{two_streams / name} is missing, though the run's manifest says that it had ended"
        )
        (two_streams / name).write_bytes(whole)
    assert verdict(two_streams) == []
    with living_run(tmp_path / "killed"):
        pass
    assert not (tmp_path / "killed/out/run/results.json").exists()
    assert verdict(tmp_path / "killed/out/run") == []


def test_a_torn_line_is_a_kills_only_at_the_end_or_before_a_resume(tmp_path):
    journal = make_journal(tmp_path / "run", range(1, 4))
    whole = journal.read_bytes()
    line = whole.splitlines()[-1].replace(b'"seq":4', b'"seq":5')
    for length in range(1, len(line)):
        journal.write_bytes(whole + line[:length])
        assert verdict(tmp_path / "run") == [], length
    after = line_of(5, 2, phase="event", event="resume", supersedes_from=3, events={})
    for length in range(1, len(line)):
        journal.write_bytes(whole + line[:length] + b"\n" + after)
        assert verdict(tmp_path / "run") == [], length
    journal.write_bytes(whole + line[:30] + b"\n" + line_of(5, 4, phase="train"))
    assert verdict(tmp_path / "run") == [
        "metrics.ndjson, line 5: a torn line, and no resume follows it"
    ]


def test_a_journal_older_than_a_checkpoint_lacks_records(resumed_run):
    (resumed_run / "results.json").unlink()
    journal = resumed_run / "metrics.ndjson"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:2]))
    assert "metrics.ndjson: records 3 to 4 are missing, steps 1 to 2" in verdict(resumed_run)


def test_files_that_a_run_names_and_that_are_gone_are_named(resumed_run):
    for path in [*tools.Stream(resumed_run).events(), resumed_run / "metrics.ndjson"]:
        whole = path.read_bytes()
        path.unlink()
        (resumed_run / "metrics.0001.ndjson").touch()  # else it is no run at all
        assert any(f"{path.name} has no bytes" in said for said in verdict(resumed_run))
        path.write_bytes(whole)
    (resumed_run / "config.json").unlink()
    assert any("config.json" in said for said in verdict(resumed_run))


def test_a_living_run_is_whole(tmp_path):
    with living_run(tmp_path):
        assert "whole" in command("verify", tmp_path / "out" / "run")


def replace_by_fifo(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def replace_by_directory(path):
    path.unlink()
    path.mkdir()


def replace_by_a_tebibyte(path):
    with path.open("r+b") as file:
        file.truncate(1 << 40)


def replace_by_deep_json(path):
    path.write_bytes(b'{"a":' * 100_000)


STRANGE = [
    replace_by_fifo,
    replace_by_device,
    replace_by_directory,
    replace_by_a_tebibyte,
    replace_by_deep_json,
]


@pytest.mark.parametrize("replace", STRANGE, ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    "name", ["metrics.ndjson", "config.json", "results.json", "model.pth", "state.json", "events"]
)
def test_what_is_no_file_of_ours_is_refused_by_name_at_once(resumed_run, name, replace):
    step = resumed_run / "checkpoints" / "step_00000002"
    path = (step if name in ("model.pth", "state.json") else resumed_run) / name
    if name == "events":
        path = tools.Stream(resumed_run).events()[0]
    replace(path)
    began = time.monotonic()
    assert any(path.name in said for said in verdict(resumed_run))
    assert time.monotonic() - began < 5  # a second, on a machine that is not busy


def test_lengths_that_lie_are_refused(resumed_run):
    events = tools.Stream(resumed_run).events()[0]
    length = (1 << 60).to_bytes(8, "little")
    events.write_bytes(events.read_bytes() + length + obs.masked_crc(length) + b"x")
    assert any("no event begins at byte" in said for said in verdict(resumed_run))


@pytest.mark.parametrize(
    "content",
    [
        {"records": "x", "last_step": None, "files": []},
        {"records": 1 << 62, "last_step": 1, "files": {"metrics.ndjson": "many"}},
        {"files": {"/dev/zero": 0}, "records": 13, "last_step": [6]},
        {},
    ],
)
def test_a_sealed_file_of_another_form_is_damage_and_no_traceback(resumed_run, content):
    (resumed_run / "results.json").write_bytes(obs.seal(content))
    verdict(resumed_run)
    (resumed_run / "config.json").write_bytes(obs.seal(content))
    assert verdict(resumed_run)


# --- parity ---------------------------------------------------------------------------------------

POINTS = {1: 3.0, 10: 2.0, 20: 1.0}
DATASET = {"titles_count": 900, "tokens_per_epoch": 1000, "batches_per_epoch": 10}


def log_of(path, points=POINTS, dataset=DATASET, about=None):
    """A training script's log: its data, its validation losses, training steps between."""
    lines = [{"event": "baseline_info", **about}] if about else []
    lines.append({"event": "dataset_info", **dataset})
    for step, loss in points.items():
        lines.append({"event": "training_step", "step": step, "loss": 9.0})
        lines.append({"event": "validation_step", "step": step, "loss": loss})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def baseline(tmp_path):
    return log_of(tmp_path / "baseline.log")


def shifted(by, step, points=POINTS):
    return {**points, step: points[step] + by}


def test_the_published_baseline_matches_itself_bit_for_bit():
    said = command("parity", BASELINE, BASELINE, "--exact")
    assert said == (
        f"{BASELINE} matches at all 23 points, at most 0.0e+00 apart; "
        "at step 938: 1.753258931249836 here, 1.753258931249836 in the baseline\n"
    )


def cuda_log(path, **change):
    """The published curve where CUDA's points are not known, theirs where they are."""
    published = tools.read_curve(BASELINE)
    return log_of(path, {**published.points, **CUDA_POINTS, **change}, published.dataset)


def test_the_published_recipe_on_cuda_matches_the_published_baseline(tmp_path):
    result = json.loads(command("parity", cuda_log(tmp_path / "log"), BASELINE, "--json"))
    assert (result["verdict"], result["points"]) == ("match", 23)
    assert result["largest"] == pytest.approx(2.6e-4, rel=0.01)
    command("parity", tmp_path / "log", BASELINE, "--exact", status=1)


@pytest.mark.parametrize(("step", "shift"), [(220, 6e-4), (220, -6e-4), (938, 1.1e-4), (1, 6e-4)])
def test_a_shift_beyond_the_drift_between_devices_differs(tmp_path, step, shift):
    points = shifted(shift, step, tools.read_curve(BASELINE).points)
    log = log_of(tmp_path / "log", points, tools.read_curve(BASELINE).dataset)
    assert f"differs from step {step} on" in command("parity", log, BASELINE, status=1)


@pytest.mark.parametrize(
    ("shift", "step", "verdict"),
    [(4e-4, 10, "match"), (6e-4, 10, "differs"), (0.9e-4, 20, "match"), (1.1e-4, 20, "differs")],
)
def test_default_tolerances_are_5e_4_anywhere_and_1e_4_at_the_end(
    tmp_path, baseline, shift, step, verdict
):
    log = log_of(tmp_path / "log", shifted(shift, step))
    status = 0 if verdict == "match" else 1
    result = json.loads(command("parity", log, baseline, "--json", status=status))
    assert result["verdict"] == verdict
    assert (result["tolerance"], result["last_tolerance"]) == (5e-4, 1e-4)


def test_the_first_step_that_is_off_is_named_with_both_values(tmp_path, baseline):
    log = log_of(tmp_path / "log", {1: 3.0, 10: 2.25, 20: 7.0})
    assert command("parity", log, baseline, status=1) == (
        f"{log} differs from step 10 on: 2.25 here, 2.0 in the baseline, 2.50e-01 apart\n"
    )
    result = json.loads(command("parity", log, baseline, "--json", status=1))
    assert [result[name] for name in ("step", "got", "expected", "off")] == [10, 2.25, 2.0, 0.25]


@pytest.mark.parametrize(
    ("shift", "step", "status"), [(0.009, 10, 0), (0.02, 10, 1), (0.0009, 20, 0), (0.002, 20, 1)]
)
def test_a_baseline_brings_its_own_tolerances(tmp_path, shift, step, status):
    own = {"tolerance": 0.01, "tolerance_last": 0.001}
    baseline = log_of(tmp_path / "baseline.log", about=own)
    command("parity", log_of(tmp_path / "log", shifted(shift, step)), baseline, status=status)


@pytest.mark.parametrize("step", [10, 20])
@pytest.mark.parametrize(("tolerance", "status"), [("0.2", 0), ("0.05", 1)])
def test_a_tolerance_that_is_given_holds_at_every_point(tmp_path, step, tolerance, status):
    baseline = log_of(tmp_path / "baseline.log", about={"tolerance": 9, "tolerance_last": 9})
    log = log_of(tmp_path / "log", shifted(0.1, step))
    command("parity", log, baseline, "--tolerance", tolerance, status=status)


def test_exact_means_equal_bits(tmp_path, baseline):
    command("parity", log_of(tmp_path / "log"), baseline, "--exact")
    next_float = log_of(tmp_path / "log", {**POINTS, 10: 2.0000000000000004})
    command("parity", next_float, baseline)
    assert "differs from step 10" in command("parity", next_float, baseline, "--exact", status=1)


def test_a_nan_is_off(tmp_path, baseline):
    log = log_of(tmp_path / "log", {**POINTS, 10: float("nan")})
    result = json.loads(command("parity", log, baseline, "--tolerance", "9", "--json", status=1))
    assert (result["verdict"], result["step"], result["got"]) == ("differs", 10, "NaN")


def test_a_log_that_has_not_got_there_yet_is_unfinished(tmp_path, baseline):
    log = log_of(tmp_path / "log", {1: 3.0, 10: 2.0})
    said = f"{log} unfinished: it matches so far, and has no validation loss at step 20\n"
    assert command("parity", log, baseline, status=1) == said


def test_a_step_left_out_differs(tmp_path, baseline):
    log = log_of(tmp_path / "log", {1: 3.0, 20: 1.0})
    said = command("parity", log, baseline, status=1)
    assert said == f"{log} differs: there is no validation loss at step 10\n"


@pytest.mark.parametrize("fact", DATASET)
def test_another_dataset_is_said_in_place_of_differs(tmp_path, baseline, fact):
    log = log_of(tmp_path / "log", {1: 9.0}, {**DATASET, fact: 7})
    said = command("parity", log, baseline, status=2)
    assert "another dataset, so the curves are not compared" in said
    assert f"{fact} 7 here, {DATASET[fact]} there" in said


def test_of_several_baselines_that_of_the_same_data_is_taken(tmp_path, baseline):
    log = log_of(tmp_path / "log", {5: 0.5}, {**DATASET, "tokens_per_epoch": 2000})
    fitting = log_of(tmp_path / "fitting.log", {5: 0.5}, {"tokens_per_epoch": 2000})
    for order in ([baseline, fitting], [fitting, baseline]):
        assert "matches at all 1 points" in command("parity", log, *order)
    assert "another dataset" in command("parity", log, BASELINE, baseline, status=2)


def test_a_run_directory_serves_as_a_log(finished_run, tmp_path):
    baseline = log_of(tmp_path / "baseline.log", {3: 0.25, 6: 0.5})
    assert "matches at all 2 points" in command("parity", finished_run, baseline, "--exact")
    off = log_of(tmp_path / "off.log", {3: 0.25, 6: 0.75})
    assert "differs from step 6 on: 0.5 here" in command("parity", finished_run, off, status=1)


def test_a_torn_last_line_is_passed_over(tmp_path, baseline):
    log = log_of(tmp_path / "log")
    log.write_text(log.read_text() + '{"event": "training_st')
    command("parity", log, baseline)


@pytest.mark.parametrize("torn", ['{"event": "traini', "epoch 1/7:  29%", "1", "[1, 2]"])
def test_a_line_within_that_is_no_json_object_is_named_by_its_number(tmp_path, baseline, torn):
    log = log_of(tmp_path / "log")
    log.write_text(torn + "\n" + log.read_text())
    assert refusal("parity", log, baseline).startswith(f"{log}, line 1 is no JSON object")


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"event": "training_step", "step": 1, "loss": 1.0}\n',
        '{"event": "validation_step", "step": 1, "val_loss": 1.0}\n',
    ],
)
def test_a_log_without_validation_losses_is_refused(tmp_path, baseline, content):
    log = tmp_path / "log"
    log.write_text(content)
    said = f"{log} holds no validation loss; give a script's log or a run directory"
    assert refusal("parity", log, baseline) == said
    assert refusal("parity", baseline, log) == said


def test_a_log_that_cannot_be_read_is_refused(tmp_path, baseline):
    assert "missing.log cannot be read: " in refusal("parity", tmp_path / "missing.log", baseline)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "binary cannot be read: " in refusal("parity", baseline, tmp_path / "binary")


# --- rebuild, export, diff, rm --------------------------------------------------------------------


def events_of(directory):
    """Each point with its time, to the microsecond that the journal keeps."""
    return sorted(map(str, tensorboard_points(directory)))


def test_rebuild_makes_the_same_events_from_the_journal_alone(finished_run, tmp_path):
    live = events_of(tmp_path / "tb")
    assert len(live) > 20
    [old] = (tmp_path / "tb").rglob("*tfevents*")
    old.unlink()
    [said] = command("rebuild", finished_run).splitlines()
    assert Path(said) == old.parent
    assert events_of(tmp_path / "tb") == live
    for name in ("config.json", "metrics.ndjson"):  # nothing else is needed
        (tmp_path / "copy" / "out" / "run").mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / "out" / "run" / name).write_bytes((finished_run / name).read_bytes())
    command("rebuild", tmp_path / "copy" / "out" / "run")
    assert events_of(tmp_path / "copy") == live


def test_rebuild_replaces_the_old_event_files_and_no_others(finished_run, tmp_path):
    live = events_of(tmp_path / "tb")
    [old] = (tmp_path / "tb").rglob("*tfevents*")
    others = old.with_name("events.out.tfevents.1.host.1.0")  # SummaryWriter's
    others.write_bytes(b"")
    for _ in range(2):
        command("rebuild", finished_run)
        assert tools.rebuild(finished_run) == old.parent  # twice in one second, from one process
    left = sorted((tmp_path / "tb").rglob("*tfevents*"))
    assert others in left
    assert len(left) == 2
    assert events_of(tmp_path / "tb") == live


def test_rebuild_writes_a_killed_run_whole_and_leaves_it_whole(tmp_path):
    with living_run(tmp_path):
        pass
    command("rebuild", tmp_path / "out" / "run")
    points = [
        (step, value)
        for step, tag, value in tensorboard_points(tmp_path / "tb")
        if tag == "loss/train"
    ]
    assert points == [(step, pytest.approx(1 / step)) for step in range(1, 6)]
    command("verify", tmp_path / "out" / "run")


def test_rebuilt_events_are_one_curve_and_the_run_is_still_whole(resumed_run, tmp_path):
    tools.rebuild(resumed_run)
    losses = [p[0] for p in tensorboard_points(tmp_path / "tb") if p[1] == "loss/train"]
    assert losses == [1, 2, 3, 4, 5, 6]
    assert verdict(resumed_run) == []
    [events] = tools.Stream(resumed_run).events()
    events.write_bytes(events.read_bytes()[:-1])
    assert any(events.name in said for said in verdict(resumed_run))


def test_rebuild_leaves_a_running_run_alone(tmp_path):
    with living_run(tmp_path):
        assert "is still being written" in refusal("rebuild", tmp_path / "out" / "run")
        [_] = (tmp_path / "tb").rglob("*tfevents*")


def test_rebuild_of_a_missing_run_names_it(tmp_path):
    assert "nothing holds no config.json of ours" in refusal("rebuild", tmp_path / "nothing")


def test_export_gives_every_record_to_the_byte(resumed_run):
    journal = b"".join(path.read_bytes() for path in obs.shards(resumed_run)).decode()
    assert command("export", resumed_run) == journal
    assert "NaN" in journal


def test_a_clean_export_has_each_step_once(resumed_run, tmp_path):
    command("export", resumed_run, "--clean", "--output", tmp_path / "clean.ndjson")
    lines = (tmp_path / "clean.ndjson").read_bytes().splitlines(keepends=True)
    found = [obs.parse_line(line) for line in lines]
    steps = [record["step"] for record in found if "loss/train" in record["metrics"]]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [record["tags"]["event"] for record in found if not record["metrics"]].count(
        "resume"
    ) == 1


def test_a_reader_that_has_seen_enough_is_no_error(finished_run):
    asked = f"{sys.executable} {COMMANDS} export {finished_run} | head -n 1"
    done = subprocess.run(asked, shell=True, capture_output=True, text=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_diff_names_what_differs_and_exits_by_the_configuration(open_run, run_dir):
    for name, lr, steps in (("run", 0.1, 2), ("same", 0.1, 3), ("other", 0.2, 2)):
        open_run(name, config={"lr": lr, "layers": [1, 2], "api_key": "hidden"})
        for step in range(1, steps + 1):
            obs.step(step, loss=1.0)
        obs.finish()
    same, other = run_dir.with_name("same"), run_dir.with_name("other")
    found = json.loads(command("diff", run_dir, same, "--json"))
    assert found["results.steps"] == [2, 3]
    assert not any(name.startswith("config.") for name in found)
    assert "config.config.lr  0.1" in command("diff", run_dir, other, status=1)
    assert json.loads(command("diff", other, same, "--json", status=1))["config.config.lr"] == [
        0.2,
        0.1,
    ]
    assert "holds no config.json of ours" in refusal("diff", run_dir, run_dir.parent)


def test_rm_takes_a_run_with_its_events_and_nothing_else(open_run, finished_run, tmp_path):
    open_run("other")
    obs.step(1, loss=1.0)
    obs.finish()
    [events] = tools.Stream(finished_run).events()
    others = events.with_name("events.out.tfevents.1.host.1.0")  # SummaryWriter's
    others.write_bytes(b"")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("")
    (finished_run / "plots").symlink_to(outside)
    assert command("rm", finished_run) == f"removed {finished_run}\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["other"]
    assert others.exists()
    assert not events.exists()
    assert (outside / "kept").exists()
    command("verify", tmp_path / "out" / "other")


def test_rm_refuses_what_lives_and_what_is_no_run_and_then_removes_nothing(finished_run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"run": "mine", "config": {}, "tb_dir": ".."}')
    (tmp_path / "link").symlink_to(finished_run)
    journal = finished_run / "metrics.ndjson"
    for other in (tmp_path / "mine", tmp_path / "link", tmp_path, tmp_path / "nothing", journal):
        assert python(COMMANDS, "rm", finished_run, other).returncode == 2
    with living_run(tmp_path / "living"):
        said = refusal("rm", finished_run, tmp_path / "living" / "out" / "run")
        assert "is still being written" in said
    assert verdict(finished_run) == []
    assert (tmp_path / "mine" / "config.json").exists()


def test_rm_does_not_reach_through_a_link_for_the_events(finished_run, tmp_path):
    [events] = tools.Stream(finished_run).events()
    events.parent.rename(tmp_path / "elsewhere")
    events.parent.symlink_to(tmp_path / "elsewhere")
    command("rm", finished_run)
    assert (tmp_path / "elsewhere" / events.name).exists()


# --- tb -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def busy_port(port):
    """Something listens there: ours, or another's that was there before."""
    with socket.socket() as taken:
        with contextlib.suppress(OSError):
            taken.bind(("127.0.0.1", port))
            taken.listen()
        yield


def answer(url):
    """The status of the first answer; TensorBoard needs seconds to start."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return urllib.request.urlopen(url, timeout=30).status
        except OSError:
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.2)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_tb_starts_tensorboard_on_the_next_free_port_and_ends_it(finished_run, tmp_path, ending):
    arguments = [sys.executable, COMMANDS, "tb", tmp_path / "tb"]
    with (
        busy_port(6006),
        subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as tb,
    ):
        said = re.fullmatch(
            r"http://127\.0\.0\.1:(\d+) shows (\S+) \(pid (\d+); Ctrl-C ends it\)",
            tb.stdout.readline().strip(),
        )
        port, folder, pid = said.groups()
        assert (folder, int(port) > 6006) == (str(tmp_path / "tb"), True)
        assert answer(f"http://127.0.0.1:{port}") == 200
        tags = urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/scalars/tags").read()
        assert b"loss/train" in tags
        tb.send_signal(ending)
        assert tb.wait(60) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_tb_says_how_to_install_tensorboard_where_it_is_missing():
    done = python("-E", "-S", COMMANDS, "tb")  # without the installed packages
    assert (done.returncode, done.stdout) == (2, "")
    install = f"{sys.executable} -m pip install tensorboard"
    assert done.stderr == f"observability: TensorBoard is not installed; {install}\n"


def test_tb_refuses_a_folder_that_is_not_there(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nothing", tmp_path / "file"):
        said = f"{path} is no folder; give the one that holds the runs' events"
        assert refusal("tb", path) == said


def test_tb_says_when_no_port_is_free(tmp_path):
    with contextlib.ExitStack() as stack:
        for port in range(50_000, 50_100):
            stack.enter_context(busy_port(port))
        assert "no free port from 50000 to 50099" in refusal("tb", tmp_path, "--port", "50000")


def test_tb_takes_host_and_port_from_the_environment(tmp_path):
    others = {**os.environ, "TB_HOST": "192.0.2.1", "TB_PORT": "50000"}
    done = python(COMMANDS, "tb", tmp_path, env=others)
    assert (done.returncode, done.stdout) == (2, "")
    assert "192.0.2.1 has no free port from 50000" in done.stderr
    assert "invalid int value: 'x'" in python(COMMANDS, "tb", env={**others, "TB_PORT": "x"}).stderr


# --- make -----------------------------------------------------------------------------------------


def test_make_parity_without_a_log_fails_and_says_what_writes_it(tmp_path):
    log = tmp_path / "missing.log"
    done = subprocess.run(
        ["make", "-o", ".venv/.stamp", "parity", f"LOG={log}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"{log} is missing; make train writes it" in done.stderr
