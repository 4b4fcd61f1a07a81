"""pipeline.sh: stages in their order, that go on where they ended; and its example."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MAINRUN, read_json

import observability as obs
from observability_tools import verify

PIPELINE = MAINRUN / "pipeline" / "pipeline.sh"
STAGES = ["pretrain", "sft", "dpo", "r1"]
# A stage that takes no time: it writes down that it ran and from what, and leaves its weights.
SHORT = 'echo "$STAGE from $INIT_WEIGHTS" >> "$OUT_DIR/ran"; echo "$STAGE" > "$OBS_WEIGHTS"'
# The example, small: 36 steps a stage.
SMALL = f"""exec "$PYTHON" "{PIPELINE.parent}/stages.py" "$STAGE" --out "$STAGE_OUT" --hidden 16 \
 --titles 300 --epochs 4 --init "$INIT_WEIGHTS" """


class Place:
    """A folder with an `out` of its own, and the pipeline's environment there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("OBS_", "TB_"))},
            **{name.upper(): SHORT for name in STAGES},
            "OUT_DIR": str(self.out),
            "TF_DIR": str(folder / "tb"),
            "PYTHON": sys.executable,
            "TB_AUTO": "0",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PIPELINE, *options],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def start(self, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [PIPELINE],
            env={**self.environment, **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def ran(self) -> list[str]:
        return (self.out / "ran").read_text().replace(f"{self.out}/", "").splitlines()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# --- Order, failures, reruns ----------------------------------------------------------------------


def test_the_stages_run_in_order_each_from_the_weights_of_the_one_before(place):
    assert place.run().returncode == 0
    assert place.ran() == [
        "pretrain from ",
        "sft from pretrain_64.pth",
        "dpo from sft_64.pth",
        "r1 from dpo_64.pth",
    ]


def test_a_failing_stage_stops_the_pipeline_with_its_name_and_a_rerun_continues_there(place):
    failed = place.run(DPO=f"{SHORT}; exit 3")
    assert failed.returncode == 3
    assert "dpo failed with exit code 3" in failed.stderr
    assert [line.split()[0] for line in place.ran()] == ["pretrain", "sft", "dpo"]
    assert place.run().returncode == 0
    assert [line.split()[0] for line in place.ran()[3:]] == ["dpo", "r1"]
    assert place.run().returncode == 0
    assert len(place.ran()) == 5


def test_a_stage_that_leaves_no_weights_is_said(place):
    failed = place.run(SFT="true")
    assert failed.returncode == 2
    assert "sft has left no weights" in failed.stderr


def test_a_stage_whose_command_is_empty_is_left_out(place):
    assert place.run(SFT="").returncode == 0
    assert place.ran()[1:] == ["dpo from pretrain_64.pth", "r1 from dpo_64.pth"]


def test_stages_may_have_other_names_and_directories(place):
    own = place.folder / "elsewhere"
    done = place.run(STAGES="warm-up main", WARM_UP=SHORT, MAIN=SHORT, MAIN_OUT=str(own))
    assert done.returncode == 0, done.stderr
    assert place.ran() == ["warm-up from ", "main from warm-up_64.pth"]
    assert (own / "done").exists()


def test_weights_newer_than_a_done_stage_are_said(place):
    place.run()
    shutil.rmtree(place.out / "pretrain")
    time.sleep(0.01)
    assert "warning: sft was trained from older weights" in place.run().stdout


def test_skip_pretrain_begins_with_sft_from_what_is_there(place):
    failed = place.run("--skip-pretrain")
    assert failed.returncode == 2
    assert "pretrain has left no weights" in failed.stderr
    (place.out / "pretrain_64.pth").write_text("by hand")
    assert place.run("--skip-pretrain").returncode == 0
    assert place.ran()[0] == "sft from pretrain_64.pth"


def test_an_unknown_option_is_refused_and_help_is_given(place):
    assert place.run("--skip-sft").returncode == 2
    assert "--skip-pretrain" in place.run("--help").stdout


def test_a_stage_that_left_no_run_begins_in_the_directory_that_it_had(place):
    keeps = 'mkdir -p "$STAGE_OUT"; echo "$STAGE" >> "$STAGE_OUT/own"'
    assert place.run(PRETRAIN=f"{keeps}; exit 1").returncode == 1
    assert place.run(PRETRAIN=f"{keeps}; {SHORT}").returncode == 0
    assert (place.out / "pretrain" / "own").read_text() == "pretrain\n" * 2


def test_a_stage_that_is_being_trained_is_left_alone(place, open_run):
    open_run("sft")
    failed = place.run()
    assert failed.returncode == 2
    assert "sft is being trained by another process" in failed.stderr
    obs.finish()


def test_a_second_pipeline_in_the_same_folder_is_refused_until_the_first_is_gone(place):
    waits = 'echo $$ > "$OUT_DIR/stage"; while :; do sleep 0.05; done'
    with place.start(PRETRAIN=waits) as pipeline:
        wait_for(lambda: (place.out / "stage").exists())
        refused = place.run()
        assert refused.returncode == 2
        assert f"another pipeline (pid {pipeline.pid}) is at work in {place.out}" in refused.stderr
        assert not (place.out / "ran").exists()
        pipeline.kill()
        pipeline.wait()
        try:  # the stage has survived, and holds nothing that the next pipeline needs
            assert place.run().returncode == 0
        finally:
            os.kill(int((place.out / "stage").read_text()), signal.SIGKILL)
    assert len(place.ran()) == 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_stage_which_may_save(place, number, code):
    saves = """trap 'echo it > "$OUT_DIR/saved"; exit 1' TERM; touch "$OUT_DIR/began"
               while :; do sleep 0.05; done"""
    with place.start(PRETRAIN=saves) as pipeline:
        wait_for(lambda: (place.out / "began").exists())
        pipeline.send_signal(number)
        assert pipeline.wait(20) == code
        assert "stopping pretrain" in pipeline.stdout.read()
    assert (place.out / "saved").exists()
    assert not (place.out / "pretrain" / "done").exists()


def wait_for(come: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not come():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.002)


# --- Checkpoints, with the example ----------------------------------------------------------------


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Place:
    """The four stages of the example, small, as they end when nothing happens."""
    place = Place(tmp_path_factory.mktemp("example"))
    place.environment |= {name.upper(): SMALL for name in STAGES}
    place.environment |= {"SAVE_INTERVAL": "1", "KEEP_LAST": "30", "HIDDEN": "16"}
    done = place.run()
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def before_dpo(example, place) -> Place:
    """The same with dpo and r1 yet to come."""
    shutil.copytree(example.out, place.out, ignore=shutil.ignore_patterns("dpo*", "r1*"))
    place.environment = {
        **example.environment,
        "STAGES": "pretrain sft dpo",
        "OUT_DIR": str(place.out),
        "TF_DIR": str(place.folder / "tb"),
    }
    return place


def test_each_stage_has_its_own_directory_and_its_plain_weights(example):
    for stage in STAGES:
        assert read_json(example.out / stage / "results.json")["status"] == "completed"
        newest = obs.latest_ckpt(example.out / stage / "checkpoints")
        plain = example.out / f"{stage}_16.pth"
        assert plain.read_bytes() == (newest / "model.pth").read_bytes()
    assert len(list((example.folder / "tb").iterdir())) == len(STAGES)


def test_every_stage_of_the_example_learns(example):
    for stage in STAGES:
        losses = [
            record["metrics"]["loss/val"]
            for record in obs.read_run(example.out / stage)
            if "loss/val" in record["metrics"]
        ]
        assert losses == sorted(losses, reverse=True), stage
        assert len(losses) == 4


def test_a_killed_stage_goes_on_from_the_newest_whole_checkpoint_to_the_same_weights(
    example, before_dpo
):
    place, checkpoints = before_dpo, before_dpo.out / "dpo" / "checkpoints"
    with place.start() as pipeline:
        wait_for(lambda: len(list(checkpoints.glob("step_*"))) >= 3)
        kill_the_stage(pipeline.pid)
        told = pipeline.communicate(timeout=60)[0]
    assert pipeline.returncode == 137, told
    assert "dpo failed with exit code 137" in told
    older, damaged = sorted(checkpoints.glob("step_*"))[-2:]
    assert damaged.name < "step_00000036"  # something is left to do
    flip_a_bit(damaged / "optimizer.pt")

    done = place.run()
    assert done.returncode == 0, done.stderr
    assert "pretrain is done" in done.stdout
    assert f"dpo goes on from {older}" in done.stdout
    assert len(list(checkpoints.glob(f".corrupt-{damaged.name}-*"))) == 1
    assert bits(place.out / "dpo_16.pth") == bits(example.out / "dpo_16.pth")


def test_a_stage_killed_before_its_first_checkpoint_begins_anew_under_its_name(example, place):
    place.environment |= {**example.environment, "OUT_DIR": str(place.out), "STAGES": "pretrain"}
    place.environment["TF_DIR"] = str(place.folder / "tb")
    for interval, come in (("1000", "metrics.ndjson"), ("1", "checkpoints/step_0000001*")):
        with place.start(SAVE_INTERVAL=interval) as pipeline:
            wait_for(lambda come=come: list((place.out / "pretrain").glob(come)))
            kill_the_stage(pipeline.pid)
            assert pipeline.wait(60) == 137
    done = place.run()
    assert done.returncode == 0, done.stderr
    assert "pretrain goes on from" in done.stdout
    assert bits(place.out / "pretrain_16.pth") == bits(example.out / "pretrain_16.pth")
    [aside] = [path for path in place.out.iterdir() if ".unsaved-" in path.name]
    assert {path.name for path in (place.folder / "tb").iterdir()} == {"pretrain", aside.name}
    for run in (place.out / "pretrain", aside):
        assert verify(run)["damage"] == []
        assert Path(run, read_json(run / "config.json")["tb_dir"]).resolve().name == run.name


def test_a_stage_that_is_removed_as_the_pipeline_says_is_trained_again(before_dpo):
    place, events = before_dpo, before_dpo.folder / "tb" / "sft"
    place.environment["STAGES"] = "pretrain sft"
    [remove] = re.findall(r"sft is done; to train it again: (.+)", place.run().stdout)
    subprocess.run(remove.split(), check=True)
    assert place.run().returncode == 0
    assert {path.name for path in place.out.glob("sft*")} == {"sft", "sft_16.pth"}
    shutil.rmtree(place.out / "sft")  # and not its events
    refused = place.run()
    assert refused.returncode == 2
    assert f"{events} has the events of another run; remove it" in refused.stderr


# Observed, by a name of its own and in a folder of its own; it dies once, in the middle.
TUNE = """
import os, pathlib, signal, torch
import observability as obs
torch.manual_seed(3)
model = torch.nn.Linear(3, 1)
opt = torch.optim.Adam(model.parameters(), lr=0.1)
obs.init("tuned")
obs.watch(model, optimizer=opt)
step = obs.resume(step=0)
dies = pathlib.Path(__file__).with_name("dies")
while step < 9:
    loss = model(torch.randn(8, 3)).square().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    step += 1
    obs.step(step, loss=loss)
    obs.current_run().settle()
    if step == 5 and dies.exists():
        dies.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
obs.finish()
"""


def test_an_observed_script_that_names_its_own_run_is_gone_on_with(place):
    script = place.folder / "own" / "tune.py"
    script.parent.mkdir()
    script.write_text(TUNE)
    place.environment |= {"STAGES": "sft", "SAVE_INTERVAL": "1", "SFT": f'"$PYTHON" "{script}"'}
    assert place.run(OUT_DIR=str(place.folder / "whole")).returncode == 0
    (script.parent / "dies").touch()
    assert place.run().returncode == 137
    done = place.run()
    assert done.returncode == 0, done.stderr
    assert "sft goes on from" in done.stdout
    assert bits(place.out / "sft_64.pth") == bits(place.folder / "whole" / "sft_64.pth")
    ended = script.parent.glob("out/*/results.json")
    assert [read_json(path)["steps"] for path in ended] == [9, 9]


def kill_the_stage(pipeline: int) -> None:
    children = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(pipeline)],
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    [stage] = re.findall(r"^ *(\d+) .*stages\.py", children, re.MULTILINE)
    os.kill(int(stage), signal.SIGKILL)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def bits(weights: Path) -> dict[str, bytes]:
    state = torch.load(weights, weights_only=True)
    return {name: tensor.numpy().tobytes() for name, tensor in state.items()}


def test_a_stage_is_told_its_run_and_its_newest_whole_checkpoint(before_dpo):
    place = before_dpo
    (place.out / "sft" / "done").unlink()
    tells = 'echo "$OBS_RESUME" "$RESUME_FROM" > "$OUT_DIR/told"'
    assert place.run(SFT=tells, STAGES="pretrain sft").returncode == 0
    newest = obs.latest_ckpt(place.out / "sft" / "checkpoints")
    assert (place.out / "told").read_text().split() == [str(place.out / "sft"), str(newest)]


def test_skip_pretrain_prefers_the_newest_whole_checkpoint(before_dpo):
    place = before_dpo
    checkpoints = place.out / "pretrain" / "checkpoints"
    newest, older = sorted(checkpoints.glob("step_*"))[:-3:-1]
    flip_a_bit(newest / "model.pth")
    shutil.rmtree(place.out / "sft")
    done = place.run("--skip-pretrain", STAGES="pretrain sft", SFT=SHORT)
    assert done.returncode == 0, done.stderr
    assert f"sft begins from {older}/model.pth" in done.stdout


def test_a_stage_with_nothing_but_damaged_checkpoints_does_not_begin_again(before_dpo):
    place = before_dpo
    for state in place.out.glob("sft/checkpoints/step_*/state.json"):
        flip_a_bit(state)
    (place.out / "sft" / "done").unlink()
    failed = place.run(SFT=SHORT)
    assert failed.returncode == 2
    assert f"no checkpoint in {place.out}/sft/checkpoints is whole" in failed.stderr
    assert not (place.out / "ran").exists()


# --- Settings and TensorBoard ---------------------------------------------------------------------


def python_that(place: Place, text: str) -> str:
    """A stand-in for PYTHON: a shell script that may hand on to this one as "$REAL"."""
    path = place.folder / "python"
    path.write_text(f'#!/bin/sh\nREAL="{sys.executable}"\n{text}\n')
    path.chmod(0o755)
    return str(path)


def test_settings_reach_the_example_as_options_and_any_other_script_as_variables(place):
    python = python_that(
        place,
        f"""case "$1" in
        *stages.py) shift; echo "$*" >> "$OUT_DIR/options"; {SHORT} ;;
        *) exec "$REAL" "$@" ;; esac""",
    )
    del place.environment["PRETRAIN"]
    del place.environment["SFT"]
    names = "OBS_|SAVE_|KEEP_|TB_|HIDDEN|STAGE|RESUME"
    tells = f"""env | grep -E '^({names})' > "$OUT_DIR/told"; {SHORT}"""
    done = place.run(
        PYTHON=python,
        DPO=tells,
        SAVE_INTERVAL="7",
        KEEP_LAST="2",
        HIDDEN="48",
        TB_PORT="7000",
        TB_HOST="localhost",
    )
    assert done.returncode == 0, done.stderr
    out = place.out
    common = (
        f"--hidden 48 --resume never --ckpt_dir {out}/%s/checkpoints --save_interval 7 "
        "--keep_last_checkpoints 2"
    )
    assert (out / "options").read_text().splitlines() == [
        f"pretrain --out {out}/pretrain --init  {common % 'pretrain'}",
        f"sft --out {out}/sft --init {out}/pretrain_48.pth {common % 'sft'}",
    ]
    told = dict(line.split("=", 1) for line in (out / "told").read_text().splitlines())
    assert told == {
        "OBS_RESUME": "never",
        "RESUME_FROM": "",
        "OBS_CKPT_DIR": f"{out}/dpo/checkpoints",
        "OBS_WEIGHTS": f"{out}/dpo_48.pth",
        "STAGE": "dpo",
        "STAGE_OUT": f"{out}/dpo",
        "SAVE_INTERVAL": "7",
        "KEEP_LAST": "2",
        "HIDDEN": "48",
        "TB_AUTO": "0",
        "TB_PORT": "7000",
        "TB_HOST": "localhost",
    }


def test_tensorboard_answers_while_the_stages_run_and_ends_with_them(place):
    asks = 'until (: <>"/dev/tcp/$TB_HOST/$TB_PORT") 2>/dev/null; do sleep 0.1; done; ' + SHORT
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        done = place.run(TB_AUTO="1", TB_PORT=str(taken), STAGES="sft", SFT=asks)
    assert done.returncode == 0, done.stderr
    said = re.search(r"TensorBoard \(pid (\d+)\) on http://127\.0\.0\.1:(\d+)", done.stdout)
    assert int(said[2]) > taken
    with pytest.raises(ProcessLookupError):
        os.kill(int(said[1]), 0)


def test_a_missing_tensorboard_is_a_warning(place):
    without_packages = python_that(place, 'exec "$REAL" -S "$@"')
    done = place.run(TB_AUTO="1", PYTHON=without_packages)
    assert done.returncode == 0, done.stderr
    assert "warning: no TensorBoard" in done.stdout
    assert len(place.ran()) == 4


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    found = subprocess.run(["shellcheck", PIPELINE], capture_output=True, text=True)
    assert found.stdout == ""
