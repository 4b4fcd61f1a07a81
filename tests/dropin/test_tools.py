"""The commands: what each prints, when it exits with 0, 1 or 2, and that it says what to do."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import MAINRUN, ROOT, python

import observability as obs
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
    run._record("system", run.global_step, obs.system_metrics())
    obs.finish()
    return run_dir


# --- summarize ------------------------------------------------------------------------------------


def test_help_names_every_command():
    text = command("--help")
    assert all(name in text for name in ("summarize", "parity", "rebuild", "tb"))
    for name in ("summarize", "parity", "rebuild", "tb"):
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


def test_summarize_reads_several_shards_as_one(open_run, run_dir, monkeypatch):
    monkeypatch.setattr(obs, "SHARD_BYTES", 5_000)
    open_run(drain_interval=0.005)
    for step in range(1, 501):
        obs.step(step, loss=1 / step)
        time.sleep(0.0002)
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


def test_a_run_of_a_newer_schema_is_refused(finished_run):
    journal = finished_run / "metrics.ndjson"
    journal.write_text(journal.read_text().replace('"schema":1', '"schema":2'))
    assert "schema 2, this file knows up to 1" in refusal("summarize", finished_run)


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
    published = obs.read_curve(BASELINE)
    return log_of(path, {**published.points, **CUDA_POINTS, **change}, published.dataset)


def test_the_published_recipe_on_cuda_matches_the_published_baseline(tmp_path):
    result = json.loads(command("parity", cuda_log(tmp_path / "log"), BASELINE, "--json"))
    assert (result["verdict"], result["points"]) == ("match", 23)
    assert result["largest"] == pytest.approx(2.6e-4, rel=0.01)
    command("parity", tmp_path / "log", BASELINE, "--exact", status=1)


@pytest.mark.parametrize(("step", "shift"), [(220, 6e-4), (220, -6e-4), (938, 1.1e-4), (1, 6e-4)])
def test_a_shift_beyond_the_drift_between_devices_differs(tmp_path, step, shift):
    points = shifted(shift, step, obs.read_curve(BASELINE).points)
    log = log_of(tmp_path / "log", points, obs.read_curve(BASELINE).dataset)
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


# --- rebuild --------------------------------------------------------------------------------------


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
        assert obs.rebuild(finished_run) == old.parent  # twice in one second, from one process
    left = sorted((tmp_path / "tb").rglob("*tfevents*"))
    assert others in left
    assert len(left) == 2
    assert events_of(tmp_path / "tb") == live


def test_rebuild_brings_back_what_a_sigkill_left_in_the_ring(tmp_path):
    with living_run(tmp_path):
        pass
    command("rebuild", tmp_path / "out" / "run")
    points = [
        (step, value)
        for step, tag, value in tensorboard_points(tmp_path / "tb")
        if tag == "loss/train"
    ]
    assert points == [(step, pytest.approx(1 / step)) for step in range(1, 6)]
    assert not (tmp_path / "out" / "run" / "metrics.ring").exists()


def test_rebuild_leaves_a_running_run_alone(tmp_path):
    with living_run(tmp_path):
        assert "is still being written" in refusal("rebuild", tmp_path / "out" / "run")
        [_] = (tmp_path / "tb").rglob("*tfevents*")


def test_rebuild_of_a_missing_run_names_it(tmp_path):
    assert "nothing holds no metrics.ndjson" in refusal("rebuild", tmp_path / "nothing")


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
    done = python("-I", "-S", COMMANDS, "tb")  # without the installed packages
    assert (done.returncode, done.stdout) == (2, "")
    install = f"{sys.executable} -m pip install tensorboard"
    assert done.stderr == f"observability: TensorBoard is not installed; {install}\n"


def test_tb_says_when_no_port_is_free():
    with contextlib.ExitStack() as stack:
        for port in range(50_000, 50_100):
            stack.enter_context(busy_port(port))
        assert "ports 50000 to 50099 are taken" in refusal("tb", "--port", "50000")


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
