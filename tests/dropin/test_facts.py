"""What a run says of itself: its manifest, its configuration, and the machine beneath it."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import subprocess
import sys
import time
import types
from datetime import datetime, timedelta
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch
from conftest import read_json, records
from scripts import run_script, wait_until

import observability as obs

SHA = "0123456789abcdef0123456789abcdef01234567"


def manifest_of(folder: Path) -> dict:
    return obs.read_sealed(folder / "out/run/run_manifest.json")


# --- The manifest ---------------------------------------------------------------------------------


def test_the_manifest_says_where_a_run_came_from(tmp_path):
    (tmp_path / "uv.lock").write_text("locked")
    run_script(
        tmp_path,
        "import torch\nobs.init('run')\nobs.finish()",
        "--token",
        "hush",
        "--api_key=hush",
        "--lr=1",
        init="'x', enabled=False",
        PYTHONHASHSEED="7",
        GIT_SHA="f00d",
        WANDB_API_KEY="hush",
        USER="me",
    )
    manifest = manifest_of(tmp_path)
    assert manifest["git_sha"] == "f00d"
    assert manifest["python"] == platform.python_version()
    assert manifest["torch"] == manifest["packages"]["torch"] == torch.__version__
    assert manifest["platform"] == platform.platform()
    assert manifest["env"]["PYTHONHASHSEED"] == "7"
    assert len(manifest["lock_sha256"]) == len(manifest["script_sha256"]) == 64
    assert manifest["script"] == "train.py"
    arguments = ["--token", "<redacted>", "--api_key=<redacted>", "--lr=1"]
    assert manifest["command_line"][1:] == arguments
    assert manifest["cpu"]
    assert manifest["device"] == obs.numerics()["device"]
    assert "hush" not in str(manifest)
    started = manifest["started"]
    assert (started["user"], started["host"]) == ("me", platform.node())
    assert started["command_line"][1:] == arguments
    assert started["pid"] > 1


def test_what_is_unknown_of_the_runbooks_keys_is_null(tmp_path):
    """Without torch, too: nothing asks for it."""
    run_script(tmp_path, "assert 'torch' not in sys.modules\nobs.finish()")
    manifest = manifest_of(tmp_path)
    assert {"python", "platform", "git_sha", "lock_sha256", "env"} < set(manifest)
    assert (manifest["git_sha"], manifest["lock_sha256"]) == (None, None)
    for name in ("PYTHONHASHSEED", "CODEX_AUDIT", "CODEX_DDP"):
        assert manifest["env"][name] == os.environ.get(name)


def test_times_are_readable_and_know_their_offset(open_run, run_dir):
    before = datetime.now().astimezone() - timedelta(seconds=1)
    open_run()
    obs.step(1, loss=1.0)
    obs.validation(1.0)
    obs.finish()
    manifest, results = (read_json(run_dir / f"{n}.json") for n in ("run_manifest", "results"))
    times = [manifest["started"]["time"], manifest["ended"], results["started"], results["ended"]]
    times.append(read_json(run_dir / "config.json")["created"])
    times += [eval(line)["time"] for line in (run_dir / "training.log").read_text().splitlines()]
    assert len(times) == 8
    for text in times:
        then = datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z")
        assert before <= then <= datetime.now().astimezone()


RESUMED = """
import torch
model = torch.nn.Linear(2, 1)
obs.watch(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
step = obs.resume(step=0)
while step < int(sys.argv[1]):
    step += 1
    obs.step(step, loss=1 / step)
    obs.current_run().settle()
if step < 6:
    raise ValueError
obs.finish()
"""


def test_the_manifest_says_who_resumed_it_and_when(tmp_path):
    for user, steps in (("anna", "2"), ("ben", "4"), ("carl", "6")):
        init = "'run', save_interval=1, resume='auto'"
        run_script(tmp_path, RESUMED, steps, init=init, USER=user)
    manifest = manifest_of(tmp_path)
    assert manifest["started"]["user"] == "anna"
    assert [each["user"] for each in manifest["resumed"]] == ["ben", "carl"]
    assert [each["checkpoint"] for each in manifest["resumed"]] == [
        "step_00000002",
        "step_00000004",
    ]
    assert [each["command_line"][1:] for each in manifest["resumed"]] == [["4"], ["6"]]
    times = [each["time"] for each in (manifest["started"], *manifest["resumed"])]
    assert sorted(times) == times
    assert manifest["ended"] >= times[-1]


def test_a_module_of_any_kind_does_not_keep_the_run_from_its_manifest(
    open_run, run_dir, monkeypatch
):
    class Lazy(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError(f"{name} would have been imported")

    monkeypatch.setitem(sys.modules, "absent", None)
    monkeypatch.setitem(sys.modules, "lazy", Lazy("lazy"))
    monkeypatch.setitem(sys.modules, "odd", object())
    open_run()
    obs.step(1, loss=1.0)
    obs.finish()
    assert read_json(run_dir / "run_manifest.json")["packages"]["numpy"] == numpy.__version__


def test_torch_that_is_imported_late_is_in_the_manifest_too(tmp_path):
    """And not before: the name of a device cannot be asked without starting CUDA."""
    run_script(
        tmp_path,
        """
        import time, torch
        obs.step(1, loss=1.0)
        path = obs.current_run().dir / "run_manifest.json"
        print(obs.read_sealed(path).get("device"))
        until = time.monotonic() + 30
        while "device" not in obs.read_sealed(path) and time.monotonic() < until:
            time.sleep(0.01)
        obs.finish()
        """,
        init="'run', drain_interval=0.02",
    )
    manifest = manifest_of(tmp_path)
    assert manifest["torch"] == torch.__version__
    assert manifest["device"]


# --- The commit -----------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def repository(folder: Path) -> Path:
    folder.mkdir()
    git(folder, "init")
    git(folder, "commit", "--allow-empty", "-m", "one")
    return folder


def plain(folder: Path) -> Path:
    return repository(folder / "repo")


def nested(folder: Path) -> Path:
    (inner := plain(folder) / "a" / "b").mkdir(parents=True)
    return inner


def packed(folder: Path) -> Path:
    repo = plain(folder)
    git(repo, "tag", "v1")
    git(repo, "tag", "-a", "v2", "-m", "annotated")  # its line is followed by that of the commit
    git(repo, "pack-refs", "--all")
    assert not (repo / ".git/refs/heads/main").exists()
    return repo


def detached(folder: Path) -> Path:
    repo = plain(folder)
    git(repo, "checkout", "--detach")
    git(repo, "commit", "--allow-empty", "-m", "two")
    return repo


def worktree(folder: Path) -> Path:
    repo = plain(folder)
    git(repo, "worktree", "add", "-b", "side", str(folder / "side"))
    git(folder / "side", "commit", "--allow-empty", "-m", "two")
    return folder / "side"


def packed_worktree(folder: Path) -> Path:
    side = worktree(folder)
    git(side, "pack-refs", "--all")
    return side


def moved_since_packed(folder: Path) -> Path:
    repo = packed(folder)
    git(repo, "commit", "--allow-empty", "-m", "three")
    return repo


def branch_with_slash(folder: Path) -> Path:
    repo = plain(folder)
    git(repo, "checkout", "-b", "me/fix/it")
    git(repo, "commit", "--allow-empty", "-m", "two")
    return repo


def submodule(folder: Path) -> Path:
    source, repo = repository(folder / "source"), plain(folder)
    git(repo, "-c", "protocol.file.allow=always", "submodule", "add", str(source), "part")
    return repo / "part"


@pytest.mark.parametrize(
    "kind",
    [
        plain,
        nested,
        packed,
        detached,
        worktree,
        packed_worktree,
        moved_since_packed,
        branch_with_slash,
        submodule,
    ],
    ids=lambda kind: kind.__name__,
)
def test_the_commit_is_read_from_git_without_a_process(tmp_path, kind):
    folder = kind(tmp_path)
    run_script(folder, "obs.finish()", PATH="/nowhere")
    commit = manifest_of(folder)["git_sha"]
    assert commit == git(folder, "rev-parse", "HEAD")
    assert len(commit) == 40


def test_the_commit_of_the_environment_goes_first(tmp_path):
    folder = plain(tmp_path)
    run_script(folder, "obs.finish()", GIT_SHA="f00d")
    assert manifest_of(folder)["git_sha"] == "f00d"


@pytest.mark.parametrize("how", ["no commit yet", "torn", "empty", "binary", "folder", "no ref"])
def test_a_git_folder_that_tells_no_commit_is_no_harm(tmp_path, how):
    folder = tmp_path / "repo"
    folder.mkdir()
    git(folder, "init")
    head = folder / ".git/HEAD"
    if how == "folder":
        head.unlink()
        head.mkdir()
    elif how != "no commit yet":
        head.write_bytes(
            {"torn": b"ref: ", "empty": b"", "binary": b"\xff\xfe\0", "no ref": b"x"}[how]
        )
    run_script(folder, "obs.step(1, loss=1.0)\nobs.finish()")
    assert manifest_of(folder)["git_sha"] is None
    assert len(records(folder / "out/run", "train")) == 1


# --- The configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda d: d,
        lambda d: argparse.Namespace(**d),
        lambda d: types.SimpleNamespace(**d),
        lambda d: dataclasses.make_dataclass("Config", d)(**d),
        lambda d: types.MappingProxyType(d),
    ],
    ids=["dict", "Namespace", "SimpleNamespace", "dataclass", "mapping"],
)
def test_a_configuration_of_any_kind_is_kept(open_run, run_dir, make):
    given = {"lr": 1e-3, "tokens": 4, "path": Path("a/b"), "of": {"x": [1, (2, None)], "y": {True}}}
    open_run(config=make(given), dataset=make({"name": "tinystories", "rows": 7}))
    obs.finish()
    kept = read_json(run_dir / "config.json")
    assert kept["config"] == {
        "lr": 1e-3,
        "tokens": 4,
        "path": "a/b",
        "of": {"x": [1, [2, None]], "y": [True]},
    }
    assert kept["dataset"] == {"name": "tinystories", "rows": 7}
    assert read_json(run_dir / "run_manifest.json")["hyperparameters"] == kept["config"]


def test_numbers_of_numpy_and_torch_are_numbers_in_the_configuration(open_run, run_dir):
    given = {"a": numpy.int64(3), "b": numpy.float32(0.5), "c": Fraction(1, 4)}
    open_run(config={**given, "d": torch.float16, "e": torch.ones(2, 3), "f": numpy.float64("nan")})
    obs.finish()
    kept = read_json(run_dir / "config.json")["config"]
    assert kept == {
        "a": 3,
        "b": 0.5,
        "c": 0.25,
        "d": "torch.float16",
        "e": "<tensor of (2, 3)>",
        "f": "NaN",
    }


def test_the_configuration_names_the_models_and_counts_their_parameters(open_run, run_dir):
    open_run()
    first, second = torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    obs.watch(first)
    obs.watch(first, [second])
    obs.step(1, loss=1.0)
    obs.finish()
    assert read_json(run_dir / "config.json")["models"] == [
        {"class": "Linear", "parameters": 9},
        {"class": "Sequential", "parameters": 16},
    ]
    watched = [r["tags"] for r in records(run_dir, "event") if r["tags"]["event"] == "watch"]
    assert [(tags["model"], tags["parameters"]) for tags in watched] == [
        ("Linear", "9"),
        ("Sequential", "16"),
    ]


def test_a_model_that_knows_no_shape_yet_is_watched(open_run, run_dir, capfd):
    open_run()
    obs.watch(torch.nn.LazyLinear(3), torch.nn.Linear(2, 1))
    obs.step(1, loss=1.0)
    obs.finish()
    models = read_json(run_dir / "config.json")["models"]
    assert [each["parameters"] for each in models] == [None, 3]
    assert "failed" not in capfd.readouterr().err


# --- The machine ----------------------------------------------------------------------------------


def system_record(run_dir: Path) -> dict[str, float]:
    wait_until(lambda: records(run_dir, "system"))
    return records(run_dir, "system")[0]["metrics"]


def test_system_records_come_by_the_timer(open_run, run_dir):
    open_run(drain_interval=0.01, system_interval=0.05)
    began, used = time.monotonic(), time.process_time()
    wait_until(lambda: len(records(run_dir, "system")) > 3)
    obs.finish()
    busy = (time.process_time() - used) / (time.monotonic() - began)
    metrics = records(run_dir, "system")[-1]["metrics"]
    assert 1e6 < metrics["system/rss_bytes"] <= metrics["system/peak_rss_bytes"] * 1.01
    assert metrics["system/cpu_seconds"] > 0
    assert metrics["system/cpu_percent"] == pytest.approx(100 * busy, abs=60)
    assert 0 <= metrics["system/host_cpu_percent"] <= 100
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert metrics["system/host_ram_bytes"] == pytest.approx(total, rel=0.01)
    assert 0 < metrics["system/host_ram_used_bytes"] < total
    assert metrics["system/host_swap_used_bytes"] >= 0
    assert metrics["system/host_load_1m"] == pytest.approx(os.getloadavg()[0], abs=5)
    assert not [name for name in metrics if "gpu" in name]


def test_an_interval_of_zero_takes_no_system_record(open_run, run_dir):
    open_run(drain_interval=0.01, system_interval=0)
    obs.step(1, loss=1.0)
    time.sleep(0.1)
    obs.finish()
    assert records(run_dir, "system") == []


NVML = """
count = {count}

class Facts:
    def __init__(self, **facts):
        self.__dict__.update(facts)

class NVMLError(Exception):
    pass

opened = False

def nvmlInit():
    global opened
    if opened: raise NVMLError("twice")
    opened = True
    {fails}

def nvmlDeviceGetCount(): return count
def nvmlDeviceGetHandleByIndex(at): return ("handle", at)
def nvmlDeviceGetMemoryInfo(handle): return Facts(used=1000 + handle[1], total=80000)
def nvmlDeviceGetUtilizationRates(handle): return Facts(gpu=50 + handle[1], memory=3)
def nvmlDeviceGetPowerUsage(handle): return 350500
def nvmlDeviceGetTemperature(handle, sensor): return 60
"""


@pytest.fixture
def nvml(tmp_path, monkeypatch):
    """Stands for the package nvidia-ml-py: this machine has no GPU to ask."""

    def write(count: int = 1, fails: str = "") -> None:
        (tmp_path / "pynvml.py").write_text(NVML.format(count=count, fails=fails))
        monkeypatch.setenv("CODEX_MONITORING_ENABLE_GPU", "1")

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    yield write
    sys.modules.pop("pynvml", None)


def test_gpu_keys_come_by_nvml_where_they_are_asked_for(open_run, run_dir, nvml):
    nvml(count=2)
    open_run(drain_interval=0.01, system_interval=0.02)
    wait_until(lambda: len(records(run_dir, "system")) > 1)
    obs.finish()
    for record in records(run_dir, "system"):
        gpus = {k: v for k, v in record["metrics"].items() if k.startswith("gpu_")}
        assert gpus == {
            "gpu_util_percent": 50.0,
            "gpu_memory_used_bytes": 1000.0,
            "gpu_memory_total_bytes": 80000.0,
            "gpu_power_watts": 350.5,
            "gpu_temperature_c": 60.0,
            "gpu_util_percent/1": 51.0,
            "gpu_memory_used_bytes/1": 1001.0,
            "gpu_memory_total_bytes/1": 80000.0,
            "gpu_power_watts/1": 350.5,
            "gpu_temperature_c/1": 60.0,
        }


@pytest.mark.parametrize("how", ["absent", "no driver", "no gpu"])
def test_without_a_gpu_the_rest_of_the_record_goes_on(
    open_run, run_dir, nvml, capfd, monkeypatch, how
):
    nvml(count=0, fails="raise NVMLError('Driver Not Loaded')" if how == "no driver" else "")
    if how == "absent":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    open_run(drain_interval=0.01, system_interval=0.02)
    wait_until(lambda: len(records(run_dir, "system")) > 2)
    obs.finish()
    assert "system/rss_bytes" in records(run_dir, "system")[-1]["metrics"]
    assert not [k for k in records(run_dir, "system")[-1]["metrics"] if "gpu" in k]
    said = capfd.readouterr().err
    assert said.count("no gpu_* keys") == (how != "no gpu")
    assert read_json(run_dir / "results.json")["degraded"] == {}


def test_gpu_keys_are_not_taken_unasked(open_run, run_dir, nvml, monkeypatch):
    nvml()
    monkeypatch.delenv("CODEX_MONITORING_ENABLE_GPU")
    open_run(drain_interval=0.01, system_interval=0.02)
    assert not [name for name in system_record(run_dir) if "gpu" in name]
    obs.finish()
    assert "pynvml" not in sys.modules
