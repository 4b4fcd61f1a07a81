"""A run's directory: its name, what is durable in it and when, and what a failed start leaves."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from conftest import read_json, records
from disks import after_power_cut
from scripts import run_script, start_script, wait_until

import observability as obs


def tree(folder: Path) -> dict[str, bytes]:
    """Each file below a folder, and what is in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "/etc",
        "../../up",
        "..",
        ".",
        "...",
        " ",
        "a\\b",
        "nul\0byte",
        "line\nbreak",
        "x" * 500,
        "π" * 500,
        "🜁" * 500,
        "\ud800",
        "a/" * 300,
        ".hidden",
        Path("a/b"),
    ],
    ids=repr,
)
def test_a_name_never_leaves_its_folder(open_run, tmp_path, capfd, name):
    run = open_run(name)
    obs.step(1, loss=1.0)
    obs.finish()
    assert run.dir.parent == tmp_path / "out"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tb"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [run.name]
    assert [path.name for path in (tmp_path / "tb").iterdir()] == [run.name]
    assert len(records(run.dir, "train")) == 1
    assert f"it is {run.name!r}" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["fit", "fit 2", "größe", "2024-01-01", "a.b", "x" * 200])
def test_a_plain_name_is_kept(open_run, tmp_path, capfd, name):
    assert open_run(name).name == name
    assert "it is" not in capfd.readouterr().err


def test_a_long_name_has_a_family_all_the_same(open_run):
    for number in ("", "-2", "-3"):
        run = open_run("y" * 500)
        obs.step(1, loss=1.0)
        assert run.name == "y" * 200 + number


def test_an_unnamed_run_is_named_by_time_and_commit(open_run, monkeypatch):
    monkeypatch.setenv("GIT_SHA", "0123456789")
    run = open_run(None)
    word, stamp, commit = run.name.split("_")
    assert time.strptime(stamp, "%Y-%m-%dT%H-%M-%S")
    assert (word, commit) == ("run", "0123456")


def test_runs_of_one_second_share_nothing(open_run, tmp_path):
    """Unnamed ones too: the directory and that of the events have one name, and it is its own."""
    runs = [open_run(None) for _ in range(20) if obs.step(1, loss=1.0) is None]
    obs.step(1, loss=1.0)
    obs.finish()
    names = {run.name for run in runs}
    assert len(names) == 20
    for folder in ("out", "tb"):
        assert {path.name for path in (tmp_path / folder).iterdir()} == names
    for run in runs:
        assert len(list((tmp_path / "tb" / run.name).iterdir())) == 1
        assert len(records(run.dir, "train")) == 1


def test_processes_that_start_at_once_share_nothing(tmp_path):
    children = [start_script(tmp_path, START_AT_ONCE, init="'x', enabled=False") for _ in range(6)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.close()
    names = [child.stdout.read().strip() for child in children]
    assert [child.wait() for child in children] == [0] * 6
    assert sorted(names) == ["run", *(f"run-{number}" for number in range(2, 7))]
    for name in names:
        [record] = records(tmp_path / "out" / name, "train")
        assert record["metrics"] == {"loss/train": 0.5}
        assert len(list((tmp_path / "logs/tb" / name).iterdir())) == 1


START_AT_ONCE = """
print("ready", flush=True)
sys.stdin.read()
run = obs.init("run")
obs.step(1, loss=0.5)
obs.finish()
print(run.name)
"""


def test_events_of_a_run_that_is_gone_are_not_added_to(open_run, tmp_path):
    (tmp_path / "tb" / "run").mkdir(parents=True)
    assert open_run().name == "run-2"


def test_a_run_is_never_written_over(open_run, tmp_path, capfd):
    open_run()
    obs.step(loss=1.0)
    open_run()
    obs.step(loss=2.0)
    obs.finish()
    assert [r["metrics"]["loss/train"] for r in records(tmp_path / "out/run", "train")] == [1.0]
    assert [r["metrics"]["loss/train"] for r in records(tmp_path / "out/run-2", "train")] == [2.0]
    assert "run-2" in capfd.readouterr().err


def test_a_directory_of_somebody_else_is_left_alone(open_run, run_dir):
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.ndjson").write_text("mine\n")
    before = tree(run_dir)
    open_run()
    obs.step(1, loss=1.0)
    obs.finish()
    assert tree(run_dir) == before


def test_a_start_line_and_an_end_line_say_where_a_run_lies(open_run, run_dir, capfd):
    open_run()
    obs.step(5, loss=1.0)
    assert capfd.readouterr().err == (f"observability: start at step 0: recording in {run_dir}\n")
    obs.finish()
    assert capfd.readouterr() == ("", f"observability: completed at step 5: {run_dir}\n")


# --- Starts that fail -----------------------------------------------------------------------------

FAILING = [
    "raise ValueError('no data')",
    "sys.exit('usage')",
    "import no_such_module",
    "obs.watch(None); obs.skip_epoch(1); raise KeyboardInterrupt",
    "obs.finish('failed: no data')",
]


@pytest.mark.parametrize("body", FAILING)
def test_a_start_that_fails_leaves_nothing(tmp_path, body):
    done = run_script(tmp_path, body)
    assert "observability" in done.stderr
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"train.py"}
    assert list((tmp_path / "out").iterdir()) == []
    assert list((tmp_path / "logs/tb").iterdir()) == []


def test_a_start_that_fails_deletes_no_file_of_the_scripts_own(tmp_path):
    body = "open(obs.current_run().dir / 'notes.txt', 'w').write('mine')\nraise ValueError"
    run_script(tmp_path, body)
    assert list(tree(tmp_path / "out")) == ["run/notes.txt"]
    assert list((tmp_path / "logs/tb").iterdir()) == []


@pytest.mark.parametrize(
    "body", ["obs.step(1, loss=1.0)", "obs.log({'a': 1})", "obs.validation(1)"]
)
def test_a_start_that_fails_with_something_recorded_is_kept(tmp_path, body):
    run_script(tmp_path, f"{body}\nraise ValueError('no')")
    assert read_json(tmp_path / "out/run/results.json")["status"] == "failed: ValueError('no')"


def test_a_run_that_completes_is_kept_though_it_recorded_nothing(tmp_path):
    run_script(tmp_path, "obs.finish()")
    assert read_json(tmp_path / "out/run/results.json")["status"] == "completed"


RESUMED = """
import torch
model = torch.nn.Linear(2, 1)
obs.watch(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
step = obs.resume(step=0)
print("from", step)
if step:
    raise ValueError("no data this time")
for step in range(1, 4):
    obs.current_run().settle()
    obs.step(step, loss=1 / step)
obs.current_run().settle()
raise ValueError("after three")
"""


def test_a_resume_that_fails_at_its_start_leaves_the_run_as_it_was(tmp_path):
    init = "'run', save_interval=1, resume='auto'"
    run_script(tmp_path, RESUMED, init=init)
    before = records(tmp_path / "out/run", "train")
    assert len(before) == 3
    done = run_script(tmp_path, RESUMED, init=init)
    assert done.stdout == "from 3\n", done.stderr
    assert records(tmp_path / "out/run", "train") == before
    assert read_json(tmp_path / "out/run/results.json")["status"].startswith("failed: ValueError")
    assert obs.latest_ckpt(tmp_path / "out/run/checkpoints")


# --- A second stream ------------------------------------------------------------------------------


@pytest.fixture
def living_run(tmp_path):
    """A training of another process, at its step 1."""
    process = start_script(
        tmp_path,
        """
        obs.step(1, loss=1.0)
        print(1, flush=True)
        sys.stdin.read()
        obs.step(2, loss=0.5)
        """,
    )
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def lost(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    """The files that are not as they were, with or without more at their end."""
    return [name for name in before if not after.get(name, b"").startswith(before[name])]


STREAM = "'run', metrics_filename='metrics_eval.ndjson'"


@pytest.mark.parametrize("name", ["metrics_eval.ndjson", "eval.ndjson"])
def test_an_evaluation_has_a_stream_beside_the_living_run_of_its_name(tmp_path, living_run, name):
    run_dir = tmp_path / "out/run"
    before = tree(run_dir)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    done = run_script(
        folder,
        "obs.validation({'val': 0.25, 'bleu': 3.0}, step=1)\nobs.finish()",
        init=f"'run', metrics_filename={name!r}",
        OBS_OUT_DIR=str(tmp_path / "out"),
        OBS_TB_DIR=str(tmp_path / "logs/tb"),
    )
    assert done.returncode == 0, done.stderr
    assert obs.alive(run_dir)
    after = tree(run_dir)
    assert lost(before, after) == []
    evaluations = [r for r in obs.read_run(run_dir, name) if r["tags"]["phase"] == "eval"]
    assert [r["metrics"] for r in evaluations] == [{"loss/val_step": 0.25, "bleu/val": 3.0}]
    assert json.loads(after["results.eval.json"])["status"] == "completed"
    assert list((tmp_path / "logs/tb/run/eval").glob("events*"))
    living_run.communicate()
    assert [r["step"] for r in records(run_dir, "train")] == [1, 2]
    assert (tmp_path / "logs/tb/run").exists()


def test_of_two_evaluations_at_once_the_second_says_that_the_stream_is_in_use(
    open_run, tmp_path, capfd
):
    open_run(metrics_filename="metrics_eval.ndjson")
    second = obs.Run(
        "run",
        out_dir=tmp_path / "out",
        tb_dir=tmp_path / "tb",
        metrics_filename="metrics_eval.ndjson",
    )
    assert "is being written by" in capfd.readouterr().err
    second.validation(1.0)
    second.finish()


@pytest.mark.parametrize("body", FAILING)
def test_an_evaluation_that_fails_takes_nothing_of_the_living_run(tmp_path, living_run, body):
    run_dir = tmp_path / "out/run"
    before = {n: content for n, content in tree(tmp_path).items() if not n.endswith(".py")}
    run_script(tmp_path, body, init=STREAM)
    after = tree(tmp_path)
    assert lost(before, after) == []
    assert not [n for n in after if "eval" in n]
    living_run.communicate()
    assert [r["step"] for r in records(run_dir, "train")] == [1, 2]


@pytest.mark.parametrize("name", ["../up.ndjson", "no/such/place.ndjson", "", "nul\0", "x" * 500])
def test_a_stream_never_leaves_the_directory_of_its_run(open_run, tmp_path, name):
    run = open_run(metrics_filename=name)
    obs.step(1, loss=1.0)
    obs.finish()
    found = [
        path for path in tmp_path.rglob("*") if path.is_file() and b'"seq":' in path.read_bytes()
    ]
    assert [path.parent for path in found] == [run.dir]


# --- Durable --------------------------------------------------------------------------------------


def test_config_and_manifest_survive_a_power_cut_right_after_init(tmp_path):
    def job(disk, cut):
        run = obs.Run("run", config={"lr": 0.1}, out_dir=disk / "out", tb_dir=disk / "tb")
        cut()
        run.finish()

    with after_power_cut(tmp_path, job) as disk:
        assert obs.read_sealed(disk / "out/run/config.json")["config"] == {"lr": 0.1}
        manifest = obs.read_sealed(disk / "out/run/run_manifest.json")
        assert manifest["started"]["pid"] == os.getpid()


def test_a_power_cut_costs_at_most_two_seconds(tmp_path):
    """And the event files can be made again, for they may be gone."""
    at = []

    def job(disk, cut):
        run = obs.Run("run", out_dir=disk / "out", tb_dir=disk / "tb", system_interval=0)
        until = time.monotonic() + 2.6
        while time.monotonic() < until:
            run.step(loss=1.0)
            time.sleep(0.001)
        at.append((time.time(), run.steps))
        cut()
        run.finish()

    with after_power_cut(tmp_path, job) as disk:
        found = records(disk / "out/run", "train")
        [(wall, steps)] = at
        assert found
        assert wall - found[-1]["time"] < 2
        assert [r["step"] for r in found] == list(range(1, len(found) + 1))
        assert len(found) < steps  # else the cut was none


def test_a_completed_run_survives_a_power_cut(tmp_path):
    def job(disk, cut):
        run = obs.Run("run", out_dir=disk / "out", tb_dir=disk / "tb", system_interval=0)
        run.step(1, loss=1.0)
        run.validation(0.5)
        run.finish()
        cut()

    with after_power_cut(tmp_path, job) as disk:
        assert obs.read_sealed(disk / "out/run/results.json")["status"] == "completed"
        assert [r["tags"]["phase"] for r in obs.read_run(disk / "out/run")] == [
            "event",
            "train",
            "eval",
            "event",
        ]
        assert len((disk / "out/run/training.log").read_text().splitlines()) == 3


# --- One process writes it ------------------------------------------------------------------------


def test_a_killed_run_is_dead_though_its_worker_lives(tmp_path):
    process = start_script(
        tmp_path,
        """
        import os
        obs.step(1, loss=1.0)
        if os.fork() == 0:
            print(os.getpid(), flush=True)
        sys.stdin.read()  # until the test ends
        """,
    )
    worker = int(process.stdout.readline())
    try:
        assert obs.alive(tmp_path / "out/run")
        process.kill()
        process.wait()
        assert not obs.alive(tmp_path / "out/run")
    finally:
        os.kill(worker, 9)
        process.communicate()


def test_a_run_that_reads_itself_is_still_known_to_be_alive(open_run, run_dir):
    open_run()
    list(obs.read_run(run_dir))
    assert obs.alive(run_dir)
    obs.finish()
    assert not obs.alive(run_dir)


def test_nothing_is_left_open_by_a_run_that_is_finished(open_run, tiny_model):
    def files() -> set[str]:
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return {os.readlink(link) for link in links if os.path.exists(link)}

    open_run(shard_bytes=300)
    for step in range(1, 20):
        obs.step(step, loss=1.0)
    run = obs.current_run()
    wait_until(lambda: len(obs.shards(run.dir)) > 3)
    obs.finish()
    assert not [name for name in files() if str(run.dir.parents[1]) in name]


# --- Beside another script's run ------------------------------------------------------------------


def test_a_script_that_never_asks_to_resume_is_recorded_all_the_same(tmp_path):
    """As a pipeline's evaluation is, with OBS_RESUME=auto for all of its stages."""
    run_script(tmp_path, RESUMED, init="'run', save_interval=1")
    before = tree(tmp_path / "out/run")
    done = run_script(tmp_path, "obs.validation(0.25)\nobs.finish()", OBS_RESUME="auto")
    assert "never calls resume()" in done.stderr
    [record] = records(tmp_path / "out/run-2", "eval")
    assert record["metrics"] == {"loss/val_step": 0.25}
    assert tree(tmp_path / "out/run") == before
