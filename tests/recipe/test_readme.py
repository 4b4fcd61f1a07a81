"""README.md is true: its code runs, its commands exist, what it quotes has the form it says."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import MAINRUN, ROOT, python, read_json

import observability as obs
import observability_tools as tools

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z]+):.* ## ", MAKEFILE, re.MULTILINE)


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def shown():
    """Each command of the console blocks with the output that stands under it."""
    pairs = re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", "".join(blocks("console")), re.MULTILINE)
    assert pairs
    return pairs


def form(text):
    """Without what differs from run to run: numbers, and the width of a table's columns."""
    text = re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "N", text)
    return [re.sub(r" +", " ", line).strip() for line in text.strip().splitlines()]


def table(heading):
    """The rows of the first table under a heading, a list of cells each."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+) \|$", section, re.MULTILINE)
    assert rows
    return [row.split(" | ") for row in rows[1:]]


# --- Commands and code ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory):
    """The folder of a reader who copied the files, saved the script beside them and ran it."""
    folder = tmp_path_factory.mktemp("own")
    copy_files(folder)
    for line, output in shown():
        if line.startswith("python "):
            assert form(run(line, folder)) == form(output), line
    return folder


def copy_files(folder):
    for name in ("observability.py", "observability_tools.py"):
        shutil.copy(MAINRUN / name, folder)
    [script] = blocks("python")
    (folder / "fit.py").write_text(script)


def run(line, folder):
    """What a reader's shell shows for a line of the README, the folder's own path shortened."""
    words = line.replace("out/*", "out/fit out/fit-2").split()[1:]
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return (done.stderr + done.stdout).replace(str(folder.resolve()), "…")


def test_the_script_of_the_readme_and_its_commands_run(own_folder):
    lines = [line for line, _ in shown() if line.startswith("python ")]
    assert {line.split()[1] for line in lines} == {"fit.py", "observability.py"}
    assert {path.name for path in (own_folder / "out").iterdir()} == {"fit", "fit-2"}


def test_the_script_without_its_marked_lines_needs_nothing_of_ours(tmp_path):
    [script] = blocks("python")
    kept = [line for line in script.splitlines(keepends=True) if "# observability" not in line]
    (tmp_path / "fit.py").write_text("".join(kept))
    subprocess.run([sys.executable, "fit.py"], cwd=tmp_path, check=True, timeout=120)
    assert "obs" not in "".join(kept)


STEP = re.compile(r"^( +)obs\.step\(.*\n", re.MULTILINE)


def test_the_script_of_the_readme_goes_on_to_the_same_end_after_a_kill(tmp_path):
    """Killed behind a step in the middle, when it has a checkpoint."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        copy_files(tmp_path / name)
    script = tmp_path / "killed" / "fit.py"
    whole = script.read_text()
    [step] = STEP.finditer(whole)
    kill = f"{step[1]}if (run := obs.current_run()).steps == 10: run.settle(), os.kill(0, 9)\n"
    script.write_text(f"import os\n{whole[: step.end()]}{kill}{whole[step.end() :]}")
    environment = {**os.environ, "SAVE_INTERVAL": "1", "OBS_RESUME": "auto"}
    options = {"cwd": script.parent, "env": environment, "start_new_session": True}
    assert python("fit.py", **options).returncode == -signal.SIGKILL
    script.write_text(whole)
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        done = python("fit.py", cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr
    ended = [read_json(tmp_path / name / "out/fit/results.json") for name in ("whole", "killed")]
    assert re.search(r"resume at step \d", done.stderr)
    assert "exact" not in done.stderr
    for fact in ("steps", "final_train_loss", "final_val_loss", "best_val_loss"):
        assert ended[0][fact] == ended[1][fact], fact
    curves = [
        [(r["step"], r["metrics"]["loss/train"]) for r in records if "loss/train" in r["metrics"]]
        for records in (obs.read_run(tmp_path / name / "out/fit") for name in ("whole", "killed"))
    ]
    assert curves[0] == curves[1]


def test_the_tree_of_a_run_is_what_a_run_leaves(own_folder):
    tree, _ = blocks("text")
    for line in tree.splitlines():
        name = line.split()[0]
        if name.startswith("logs/tb/"):
            assert list((own_folder / name).glob("events.out.tfevents.*"))
        elif name != "out/fit/":
            assert (own_folder / "out" / "fit" / name).exists()
    left = {path.name for path in (own_folder / "out" / "fit").iterdir() if path.name[0] != "."}
    assert left == {line.split()[0] for line in tree.splitlines()[2:]}


def test_every_make_command_is_a_target():
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    lines = [line for line, _ in shown()] + re.findall(r"`([^`\n]+)`", text)
    made = [word for line in lines for word in re.findall(r"\bmake ([a-z]+)", line)]
    assert {"train", "tb", "test", "bench"} <= set(made)
    assert set(made) <= set(TARGETS)


def test_make_alone_lists_the_targets():
    environment = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(["make"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == TARGETS


def test_every_command_of_the_drop_in_is_described():
    with_help = python(MAINRUN / "observability.py", "--help").stdout
    commands = re.findall(r"^    ([a-z]+)(?: |$)", with_help, re.MULTILINE)
    described = [cells[0].strip("`").split()[0] for cells in table("What you get")]
    assert described == commands


# --- What is quoted -------------------------------------------------------------------------------


def output_of(command):
    [output] = [output for line, output in shown() if line == command]
    return output


def test_make_train_is_quoted_with_the_verdict_that_parity_gives():
    baseline = tools.read_curve(ROOT / "tests/baselines/baseline_small.log")
    log, end = "mainrun/logs/mainrun.log", max(baseline.points)
    own = tools.parity(baseline, baseline, 0, 0)
    assert form(f"{log} {tools.sentence(own)}")[0] in form(output_of("make train"))
    verdict = r"all (\d+) points.* at step (\d+): ([\d.]+) here, ([\d.]+) in"
    [(points, step, got, expected)] = re.findall(verdict, output_of("make train"))
    assert (int(points), int(step)) == (len(baseline.points), end)
    assert float(expected) == baseline.points[end]
    assert abs(float(got) - float(expected)) <= baseline.about["tolerance_last"]


def test_make_tb_is_quoted_as_it_is_printed():
    said = output_of("make tb").strip()
    assert re.fullmatch(
        r"http://127\.0\.0\.1:6006 shows \S+/mainrun/logs/tb "
        r"\(pid \d+; Ctrl-C ends it\)",
        said,
    )


BASELINES = ["baseline.log", *(f"tests/baselines/{p.name}" for p in ROOT.glob("tests/baselines/*"))]


@pytest.mark.parametrize("name", BASELINES)
def test_the_baselines_are_told_with_their_own_tolerances(name):
    [row] = [cells for cells in table("Baselines") if cells[0] == f"`{name}`"]
    curve = tools.read_curve(ROOT / name)
    assert [float(number) for number in row[3].split(",")] == [
        curve.about["tolerance"],
        curve.about["tolerance_last"],
    ]
    assert f"{max(curve.points)} steps" in row[1]
    ours = "recorded here" in curve.about["recorded"]
    assert row[2].startswith("recorded here" if ours else "others")


def test_the_drift_is_told_as_the_baselines_have_it():
    small = tools.read_curve(ROOT / "tests/baselines/baseline_small.log").about["drift"]
    assert f"the small one by at most {small['cuda']}" in README
    points = tools.read_curve(ROOT / "baseline.log").points
    assert f"{points[max(points)]:.4f} at the end" in README


@pytest.mark.parametrize("cells", table("What it promises")[1:], ids=lambda cells: cells[0])
def test_every_promise_names_a_test_that_exists(cells):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", cells[1])
    assert named
    for path, name in named:
        assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_every_setting_is_told_with_its_default():
    told = {cells[0].split("`")[1]: cells for cells in table("Settings")[1:]}
    for name, default in {**vars(obs.Settings()), **vars(obs.SaveSettings())}.items():
        cells = told[f"OBS_{name.upper()}"]
        known = cells[2] if isinstance(default, str) else float(cells[2])
        assert (cells[1].strip("`"), known) == (name, "none" if default == "" else default)


def test_the_picture_is_a_small_png():
    [path] = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    picture = (ROOT / path).read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    assert len(picture) < 150_000
