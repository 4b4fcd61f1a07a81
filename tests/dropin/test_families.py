"""What a run is: which one is gone on with, who may write it, and what is never touched."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import read_json
from faults.scripts import AUTO, SAVING, TRAINING, Ended, Script, of_runs, origin, refused, tree

import observability as obs


@pytest.fixture
def script(tmp_path):
    return Script(tmp_path / "work", TRAINING)


def names(folder: Path) -> list[str]:
    folders = folder.iterdir() if folder.exists() else ()
    return sorted(path.name for path in folders if path.is_dir() and not path.is_symlink())


def unlogged(files: dict[str, Any]) -> dict[str, Any]:
    """Without what the script printed."""
    return {path: bits for path, bits in files.items() if not path.startswith(".said")}


def ours(ended: list[Ended]) -> list[str]:
    return [
        line for each in ended for line in each.said.splitlines() if line[:14] == "observability:"
    ]


def curve(run_dir: Path) -> list[str]:
    """The losses of the journal, as the script prints them."""
    records = [r for r in obs.read_run(run_dir) if "loss/train" in r["metrics"]]
    return [f"{r['step']} {float(r['metrics']['loss/train']).hex()}" for r in records]


# --- Which run is gone on with --------------------------------------------------------------------


@pytest.mark.parametrize("named", [{"NAME": "run"}, {}])
def test_auto_goes_on_with_the_newest_run_that_holds_a_checkpoint(script, named):
    """Also once the first run of the family was killed before its first save."""
    script.killed(**{**AUTO, **named, "SAVE_INTERVAL": 5}, KILL_AT=2)
    [first] = names(script.out)
    before = tree(script.out / first)
    assert origin(script.killed(**AUTO, **named, KILL_AT=3)) == "0"
    assert origin(script.killed(**AUTO, **named, KILL_AT=5)) == "3"
    ended = script.run(**AUTO, **named)
    assert origin(ended) == "5"
    assert tree(script.out / first) == before
    assert len(names(script.out)) == 2
    assert names(script.out) == names(script.folder / "logs/tb")
    if named:
        assert names(script.out) == ["run", "run-2"]


def test_auto_without_a_name_takes_no_run_of_another_script(script):
    script.killed(**AUTO, KILL_AT=3)
    other = Script(script.folder, TRAINING, "other.py")
    assert origin(other.killed(**AUTO, KILL_AT=2)) == "0"
    assert origin(script.run(**AUTO)) == "3"
    assert origin(other.run(**AUTO)) == "2"


def test_a_name_belongs_to_one_script(script):
    script.killed(**AUTO, NAME="run", KILL_AT=3)
    before = tree(script.folder)
    other = Script(script.folder, TRAINING, "other.py")
    said = refused(other.run(1, **AUTO, NAME="run"))
    assert all(word in said for word in ("out/run", "train.py", "other.py"))
    assert tree(script.out) == {p[4:]: b for p, b in before.items() if p.startswith("out/")}
    assert origin(script.run(**AUTO, NAME="run")) == "3"


def test_a_folder_that_was_moved_is_still_itself(script):
    script.killed(**AUTO, NAME="run", KILL_AT=3)
    script.folder.rename(script.folder.with_name("moved"))
    moved = Script(script.folder.with_name("moved"), TRAINING)
    assert origin(moved.run(**AUTO, NAME="run")) == "3"
    assert names(moved.out) == names(moved.folder / "logs/tb") == ["run"]


@pytest.mark.parametrize("content", ['{"model_type": "gpt2"}', "[1]", "no json"])
def test_a_folder_of_the_scripts_own_among_the_runs_is_none_of_ours(script, content):
    script.killed(**AUTO, NAME="run", KILL_AT=3)
    model = script.out / "exported"
    model.mkdir()
    (model / "config.json").write_text(content)
    assert origin(script.run(**AUTO, NAME="run")) == "3"


def test_a_start_that_was_killed_at_once_keeps_no_other_from_going_on(script):
    """It has made its directory, and taken the lock, but written nothing."""
    script.killed(**AUTO, NAME="run", KILL_AT=3)
    for name in ("run-2", "run-3"):
        (script.out / name).mkdir()
    (script.out / "run-3" / ".lock").touch()
    assert origin(script.run(**AUTO, NAME="run")) == "3"


@pytest.mark.parametrize("document", ["config.json", "run_manifest.json"])
@pytest.mark.parametrize("content", [b"", b'{"schema": 1', None])
def test_a_run_whose_documents_are_torn_is_named_and_not_begun_anew(script, document, content):
    script.killed(**AUTO, NAME="run", KILL_AT=3)
    path = script.out / "run" / document
    path.unlink() if content is None else path.write_bytes(content)
    before = of_runs(script.out)
    assert f"run/{document}" in refused(script.run(1, **AUTO, NAME="run"))
    assert of_runs(script.out) == before


def test_a_path_of_a_run_goes_on_in_it(script):
    script.killed(**SAVING, NAME="run", KILL_AT=3)
    assert origin(script.run(**SAVING, OBS_RESUME="out/run")) == "3"
    assert names(script.out) == ["run"]
    [again] = read_json(script.out / "run/run_manifest.json")["resumed"]
    assert again["checkpoint"] == "step_00000003"
    assert again["pid"] != read_json(script.out / "run/run_manifest.json")["started"]["pid"]


@pytest.mark.parametrize("path", ["out", "out/run", "absent"])
def test_a_path_without_a_checkpoint_is_an_error_of_resume(script, path):
    script.run(STEPS=2, NAME="run")
    before = tree(script.folder)
    assert f"{path} holds no checkpoint" in refused(script.run(1, **SAVING, OBS_RESUME=path))
    assert unlogged(tree(script.folder)) == unlogged(before)


# --- A fork ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [{"KILL_AT": 5}, {}])
def test_a_path_of_a_checkpoint_begins_a_fork_and_leaves_its_parent_alone(script, end):
    straight = script.run(-9 if end else 0, **SAVING, NAME="run", KEEP_LAST=9, **end)
    parent, events = tree(script.out / "run"), tree(script.folder / "logs/tb/run")
    path = "out/run/checkpoints/step_00000003"
    fork = script.run(**SAVING, NAME="run", OBS_RESUME=path, KEEP_LAST=1, LR=0.01)
    assert (tree(script.out / "run"), tree(script.folder / "logs/tb/run")) == (parent, events)
    assert origin(fork) == "3"
    assert fork.lines("loss")[0] == straight.lines("loss")[3]
    manifest = read_json(script.out / "run-2/run_manifest.json")
    assert [each["parent"] for each in manifest["resumed"]] == [path]
    assert manifest["hyperparameters"] == {"steps": 6, "lr": 0.01}
    assert "lr was 0.05, is 0.01 (the checkpoint's holds)" in fork.said
    assert curve(script.out / "run-2") == fork.lines("loss")
    # And it is a run like another, that goes on with what it has come to.
    assert "has completed at step 6" in script.run(**AUTO, NAME="run").said


def test_a_fork_that_was_killed_goes_on_as_itself(script):
    straight = script.run(**SAVING, NAME="run", KEEP_LAST=9)
    path = "out/run/checkpoints/step_00000002"
    script.killed(**SAVING, NAME="run", OBS_RESUME=path, KILL_AT=4)
    ended = script.run(**AUTO, NAME="run")
    assert origin(ended) == "4"
    assert curve(script.out / "run-2") == straight.lines("loss")[2:]
    manifest = read_json(script.out / "run-2/run_manifest.json")
    assert [each.get("parent") for each in manifest["resumed"]] == [path, None]


# --- A completed run ------------------------------------------------------------------------------


def test_a_completed_run_is_passed_through_and_not_a_byte_of_it_changes(script):
    script.run(**AUTO, NAME="run")
    before = unlogged(tree(script.folder))
    for _ in range(2):
        ended = script.run(**AUTO, NAME="run")
        assert origin(ended) == "6"
        assert "has completed at step 6" in ended.said
        assert unlogged(tree(script.folder)) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_script_that_passes_through_a_completed_run_and_changes_nothing(
    script, number
):
    script.run(**AUTO, NAME="run")
    before = unlogged(tree(script.folder))
    running = script.start(**AUTO, NAME="run", HOLD=1).until("from")
    running.send(number).wait(-number if number == signal.SIGTERM else 1)
    after = unlogged(tree(script.folder))
    assert {path: bits for path, bits in after.items() if not path.endswith(".lock")} == {
        path: bits for path, bits in before.items() if not path.endswith(".lock")
    }


def test_a_signal_saves_what_a_script_does_beyond_a_completed_run(script):
    script.run(**AUTO, NAME="run")
    more = {**AUTO, "STEPS": 9}
    signalled = TRAINING.replace(
        "    run.settle()\n", "    if step == 7: os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    stopped = Script(script.folder, signalled).run(-signal.SIGTERM, **more, NAME="run")
    assert [line.split()[0] for line in stopped.lines("loss")] == ["7", "8"]
    ended = Script(script.folder, TRAINING).run(**more, NAME="run")
    assert origin(ended) == "8"
    assert names(script.out) == ["run", "run-2"]


def test_a_completed_run_that_is_given_more_to_do_is_forked(script):
    script.run(**AUTO, NAME="run")
    before = tree(script.out / "run")
    ended = script.run(**{**AUTO, "STEPS": 8}, NAME="run")
    assert [line.split()[0] for line in ended.lines("loss")] == ["7", "8"]
    assert tree(script.out / "run") == before
    assert curve(script.out / "run-2") == ended.lines("loss")
    manifest = read_json(script.out / "run-2/run_manifest.json")
    [parent] = [each["parent"] for each in manifest["resumed"]]
    assert parent.endswith("out/run/checkpoints/step_00000006")
    straight = Script(script.folder.with_name("straight"), TRAINING).run(**{**AUTO, "STEPS": 8})
    assert ended.lines("loss") == straight.lines("loss")[6:]


def test_a_failed_start_leaves_no_run_behind(script):
    for wish in ("never", "auto"):
        ended = script.run(1, OBS_RESUME=wish, SAVE_INTERVAL=1, STEPS="none", NAME="run")
        assert "ValueError" in ended.said
        assert names(script.out) == names(script.folder / "logs/tb") == []
    broken = Script(script.folder, TRAINING.replace("while step < steps:", "raise OSError\n"))
    broken.run(1, **AUTO, NAME="run")
    assert names(script.out) == names(script.folder / "logs/tb") == []


def test_a_failed_start_takes_nothing_from_the_run_that_it_resumed(script):
    script.killed(**AUTO, NAME="run", KILL_AT=3)
    before = tree(script.folder)
    Script(script.folder, TRAINING.replace("while step < steps:", "raise OSError\n")).run(
        1, **AUTO, NAME="run"
    )
    after = tree(script.folder)
    assert before.keys() <= after.keys()
    journal = "out/run/metrics.ndjson"
    assert after[journal].startswith(before[journal])
    again = Script(script.folder, TRAINING).run(**AUTO, NAME="run")
    assert origin(again) == "3"
    assert [line.split()[0] for line in curve(script.out / "run")] == list("123456")


# --- One process writes it ------------------------------------------------------------------------


def test_of_eight_resumes_at_once_one_goes_on_and_the_others_raise(script):
    script.killed(**AUTO, NAME="run", KILL_AT=3)
    started = [script.start(**AUTO, NAME="run", HOLD=1) for _ in range(8)]
    while sum(running.process.is_alive() for running in started) > 1:
        time.sleep(0.01)
    [winner] = [running for running in started if running.process.is_alive()]
    (script.folder / "go").touch()
    assert origin(winner.wait()) == "3"
    for running in started:
        if running is not winner:
            said = refused(running.wait(1))
            assert f"{script.out}/run is being written by process {winner.process.pid} " in said
    assert names(script.out) == names(script.folder / "logs/tb") == ["run"]
    assert len(read_json(script.out / "run/run_manifest.json")["resumed"]) == 1
    assert len(list((script.folder / "logs/tb/run").iterdir())) == 2
    assert [line.split()[0] for line in curve(script.out / "run")] == list("123456")


@pytest.mark.parametrize("wish", ["auto", "out/run"])
def test_a_run_that_is_alive_is_refused_by_name_and_pid(script, wish):
    alive = script.start(**AUTO, NAME="run", HOLD=1).until("from")
    said = refused(script.run(1, **SAVING, OBS_RESUME=wish, NAME="run"))
    assert f"out/run is being written by process {alive.process.pid} " in said
    assert origin(script.run(**SAVING, NAME="run")) == "0"  # without the wish it is another run
    assert names(script.out) == ["run", "run-2"]
    said = refused(script.run(1, **AUTO, NAME="run"))  # an older one of the family, too
    assert f"out/run is being written by process {alive.process.pid} " in said
    (script.folder / "go").touch()
    alive.wait()


def test_a_worker_that_outlives_its_run_does_not_hold_it(script):
    """A data loader's worker may hang on for a while after its parent was killed: here, until the
    run that goes on has ended."""
    ended = script.folder / "ended"
    worker = (
        "if os.fork() == 0:\n"
        f"    while not os.path.exists({str(ended)!r}): time.sleep(0.02)\n"
        "    os._exit(0)\n"
    )
    forking = TRAINING.replace("while step", f"{worker}while step", 1)
    try:
        Script(script.folder, forking).killed(**AUTO, NAME="run", KILL_AT=3)
        assert origin(Script(script.folder, TRAINING).run(**AUTO, NAME="run")) == "3"
    finally:
        ended.touch()


# --- A folder of checkpoints that two runs share --------------------------------------------------


def test_runs_that_share_a_folder_of_checkpoints_leave_each_others_alone(script):
    shared = {**AUTO, "OBS_CKPT_DIR": "all", "KEEP_LAST": 2}
    script.killed(**shared, NAME="a", KILL_AT=3)
    of_a = {path: bits for path, bits in tree(script.folder / "all").items() if "step_" in path}
    ended = script.killed(**{**shared, "STEPS": 9}, NAME="b", KILL_AT=7)
    assert "step_00000003 is another run's; give a ckpt_dir of its own" in ended.said
    everything = tree(script.folder / "all")
    assert of_a.items() <= everything.items()
    assert sorted(names(script.folder / "all")) == [f"step_0000000{n}" for n in (2, 3, 6, 7)]
    assert origin(script.run(**shared, NAME="a")) == "3"
    assert origin(script.run(**{**shared, "STEPS": 9}, NAME="b")) == "7"


# --- Several ranks --------------------------------------------------------------------------------

RANKS = """
import ctypes, os, platform, socket, time, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import observability as obs

rank, world, kill_at = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "KILL_AT"))
early, late, bare = (os.environ.get(name) for name in ("EARLY", "LATE", "BARE"))
runs = os.environ.get("RUNS", "run").split()
if rank and os.environ.get("ELSEWHERE"):  # on a host of another name
    assert ctypes.CDLL(None).unshare(0x04000000) == 0
    socket.sethostname("elsewhere")
    platform._uname_cache = None
    assert platform.node() == "elsewhere"
if early:  # before the ranks have met
    obs.init(runs[0])
if bare:  # as by mp.spawn, with the place of a process in its arguments
    del os.environ["RANK"], os.environ["WORLD_SIZE"]
    dist.init_process_group("gloo", rank=rank, world_size=world)
else:
    dist.init_process_group("gloo")
for name in runs:
    torch.manual_seed(len(name))
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    torch.manual_seed(100 + rank)
    model = DistributedDataParallel(net)
    opt = torch.optim.AdamW(model.parameters(), lr=0.05)
    if late == str(rank):
        time.sleep(0.5)
    if not early:
        obs.init(name)
    obs.watch(model, optimizer=opt)
    step = 0
    step = obs.resume(step=step)
    print("from", step)
    while step < 6:
        loss = model(torch.rand(8, 4)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        step += 1
        print("loss", step, loss.item().hex())
        obs.step(step, loss=loss)
        obs.current_run().settle()
        dist.barrier()
        if step == kill_at and name == runs[-1]:
            os.kill(os.getpid(), 9)
    obs.finish()
"""


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="to name a host takes root")


class Launch:
    """So many ranks of a script, as torchrun starts them."""

    def __init__(self, folder: Path) -> None:
        self.script = Script(folder, RANKS)
        with socket.socket() as probe:  # the same in each launch, as torchrun's 29500 is
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def run(self, world: int = 2, code: int | None = 0, **environment: Any) -> list[Ended]:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port, "WORLD_SIZE": world}
        started = [
            self.script.start(**{**AUTO, **place, **environment}, RANK=rank)
            for rank in range(world)
        ]
        return [running.wait(code) for running in started]


@pytest.mark.parametrize(
    "when",
    [
        {},
        {"LATE": 0},
        {"LATE": 1},
        {"EARLY": 1},
        {"EARLY": 1, "LATE": 0},
        {"BARE": 1},
        {"OBS_CKPT_DIR": "all"},
        pytest.param({"ELSEWHERE": 1}, marks=needs_root),
        pytest.param({"ELSEWHERE": 1, "LATE": 0}, marks=needs_root),
        pytest.param({"ELSEWHERE": 1, "EARLY": 1}, marks=needs_root),
    ],
)
def test_each_rank_goes_on_where_it_was_with_generators_of_its_own(tmp_path, when):
    """Also where one comes late, and over what an earlier launch of the same port has left."""
    straight = Launch(tmp_path / "straight").run()
    launch = Launch(tmp_path / "killed")
    killed = [*launch.run(code=-9, KILL_AT=2, **when), *launch.run(code=-9, KILL_AT=4, **when)]
    ended = launch.run(**when)
    assert [origin(each) for each in [*killed, *ended]] == ["0", "0", "2", "2", "4", "4"]
    for rank in (0, 1):
        losses = [line for each in (*killed[rank::2], ended[rank]) for line in each.lines("loss")]
        assert losses == straight[rank].lines("loss")
    assert straight[0].lines("loss") != straight[1].lines("loss")
    assert "exact" not in "".join(each.said for each in [*killed, *ended])
    assert not ours([*killed[1::2], ended[1]])  # a rank above 0 says nothing
    assert names(launch.script.out) == ["run"]


def test_ranks_that_save_only_when_asked_wait_for_none_of_each_other(tmp_path):
    asks = RANKS.replace("        obs.step(step", "        obs.save()\n        obs.step(step", 1)
    launch = Launch(tmp_path / "work")
    Script(launch.script.folder, asks)
    began = time.monotonic()
    launch.run(code=-9, SAVE_INTERVAL=0, OBS_RESUME="never", KILL_AT=4)
    assert time.monotonic() - began < 60  # a wait for rank 0 takes two minutes
    Script(launch.script.folder, RANKS)
    for ended in launch.run():
        assert origin(ended) == "4"
        assert "exact" not in ended.said


def test_ranks_that_train_one_run_after_another_take_each_for_itself(tmp_path):
    straight = Launch(tmp_path / "straight").run(RUNS="a bb")
    launch = Launch(tmp_path / "work")
    launch.run(code=-9, RUNS="a bb", KILL_AT=4)
    ended = launch.run(RUNS="a bb", LATE=0)
    for rank in (0, 1):
        assert ended[rank].lines("from") == ["6", "4"]
        assert ended[rank].lines("loss") == straight[rank].lines("loss")[10:]


@pytest.mark.parametrize("world", [1, 3])
def test_another_number_of_processes_is_an_error_that_names_both(tmp_path, world):
    launch = Launch(tmp_path / "work")
    launch.run(code=-9, KILL_AT=2)
    before = of_runs(launch.script.out)
    for ended in launch.run(world, code=1):
        assert f"is of 2 processes, this launch has {world}" in refused(ended)
    assert of_runs(launch.script.out) == before


def test_a_fork_of_several_ranks_keeps_all_of_their_generators(tmp_path):
    straight = Launch(tmp_path / "straight").run()
    launch = Launch(tmp_path / "work")
    launch.run(KEEP_LAST=9)
    path = "out/run/checkpoints/step_00000002"
    launch.run(code=-9, OBS_RESUME=path, KILL_AT=4)
    assert names(launch.script.out) == ["run", "run-2"]
    ended = launch.run()
    for rank in (0, 1):
        assert ended[rank].lines("loss") == straight[rank].lines("loss")[4:]


# --- Checkpoints of other tools -------------------------------------------------------------------

OTHER = """
import json, os, pathlib, random, sys
import numpy as np
import torch

torch.manual_seed(1)
model = torch.nn.Linear(4, 1)
opt = torch.optim.AdamW(model.parameters(), lr=0.05)
for step in range(1, 7):
    loss = model(torch.rand(8, 4)).square().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    print("loss", step, loss.item().hex())
    if step == 3:
        rng = {"python": random.getstate(), "torch": torch.get_rng_state()}
        rng |= {"numpy": np.random.get_state()} if os.environ["WITH"] == "numpy" else {}
        rng |= {"cuda": []} if os.environ["WITH"] == "cuda" else {}
        folder = pathlib.Path("saved/step_00000003")
        folder.mkdir(parents=True)
        torch.save(model.state_dict(), folder / "model.pth")
        torch.save({"optimizer": opt.state_dict()}, folder / "optimizer.pt")
        torch.save(rng, folder / "rng_state.pt")
        state = {"epoch": 0, "step_in_epoch": 3, "global_step": 3, "args": {"lr": 0.05}}
        state |= {"loss_history": [0.5, 0.25], "metadata": None}
        (folder / "state.json").write_text(json.dumps(state))
"""


@pytest.mark.parametrize("extra", ["", "numpy", "cuda"])
@pytest.mark.parametrize(
    "wish",
    [
        {"OBS_RESUME": "saved/step_00000003"},
        {"OBS_RESUME": "saved"},
        {"OBS_RESUME": "auto", "OBS_CKPT_DIR": "saved"},
    ],
)
def test_a_checkpoint_of_the_plain_layout_is_gone_on_from_with_a_warning(script, wish, extra):
    """Of the four files that others write; no digest vouches for them, and none is touched."""
    other = Script(script.folder, OTHER, "other.py").run(WITH=extra)
    before = tree(script.folder / "saved/step_00000003")
    ended = script.run(**{**SAVING, **wish}, NAME="run")
    assert origin(ended) == "3"
    assert ended.lines("loss") == other.lines("loss")[3:]
    assert "nothing vouches for its files" in ended.said
    assert "failed and the training goes on" not in ended.said
    assert curve(script.out / "run") == ended.lines("loss")
    assert tree(script.folder / "saved/step_00000003") == before


def test_a_checkpoint_of_the_plain_layout_knows_its_place_in_an_epoch(script):
    other = Script(script.folder, OTHER, "other.py").run(WITH="")
    loop = TRAINING.replace(
        "while step < steps:\n",
        "for epoch in range(1):\n  if obs.skip_epoch(epoch): continue\n"
        "  for _ in range(6):\n    if obs.skip_batch(): continue\n",
    )
    ended = Script(script.folder, loop).run(**SAVING, OBS_RESUME="saved", NAME="run")
    assert ended.lines("loss") == other.lines("loss")[3:]


@pytest.mark.parametrize("name", ["model.pth", "optimizer.pt", "rng_state.pt", "state.json"])
@pytest.mark.parametrize("content", [b"", b"torn"])
def test_one_of_the_plain_layout_that_is_torn_is_refused_and_not_touched(script, name, content):
    Script(script.folder, OTHER, "other.py").run(WITH="")
    path = script.folder / "saved/step_00000003" / name
    path.write_bytes(content)
    before = tree(script.folder / "saved")
    said = refused(script.run(1, **SAVING, OBS_RESUME="saved", NAME="run"))
    assert "saved" in said
    assert tree(script.folder / "saved") == before
    assert names(script.out) == []
