"""The bench runs, measures what it promises, and counts what a kill leaves as it should."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
PEERS = ("empty", "ours", "SummaryWriter", "json")  # those that need nothing of the bench's own
FIGURES = (
    "call_median_us",
    "call_p99_us",
    "call_mean_us",
    "train_median_us",
    "train_p99_us",
    "cpu_tight_us",
    "cpu_paced_us",
    "import_ms",
    "init_ms",
    "close_ms",
    "close_full_ms",
    "processes",
    "threads",
    "memory_growth_mib",
    "memory_steps",
)
KILLED = ("kills", "kill_steps", "kill_lost_median", "kill_lost_max", "kill_twice")
MACHINE = ("cpu", "cores", "python", "torch", "file_system")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What a quick run prints, and what it writes."""
    path = tmp_path_factory.mktemp("bench") / "step.json"
    done = _python("bench_step.py", "--quick", "--peers", ",".join(PEERS), "--json", path)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


def _python(script, *arguments):
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("peer", PEERS)
def test_every_figure_is_measured_for_every_peer(quick, peer):
    figures = quick[1]["peers"][peer]
    wanted = FIGURES if peer == "empty" else FIGURES + KILLED
    assert {name for name in wanted if not isinstance(figures.get(name), (int, float))} == set()
    # Net of the clock's own cost an empty call can come to nothing.
    assert figures["call_median_us"] >= 0 if peer == "empty" else figures["call_median_us"] > 0


def test_the_machine_is_described(quick):
    assert all(quick[1]["machine"][fact] for fact in MACHINE)


def test_a_ratio_is_the_peer_over_ours(quick):
    peers, ratios = quick[1]["peers"], quick[1]["ratios"]
    ours, writer = peers["ours"]["call_median_us"], peers["SummaryWriter"]["call_median_us"]
    assert ratios["SummaryWriter"]["call_median_us"] == pytest.approx(writer / ours)
    assert set(ratios) == set(PEERS) - {"ours"}


def test_the_table_names_every_peer_and_says_which_targets_are_missed(quick):
    printed, result = quick
    assert all(f"{peer}  " in printed for peer in PEERS)
    missed = [name for name, target in result["targets"].items() if not target["reached"]]
    assert printed.count("MISSED") == len(missed)


@pytest.mark.parametrize("peer", ["ours", "json"])
def test_a_kill_loses_no_step_that_was_written_through(quick, peer):
    figures = quick[1]["peers"][peer]
    assert figures["kill_steps"] > 0
    assert (figures["kill_lost_max"], figures["kill_twice"]) == (0, 0)


def test_an_unknown_peer_is_refused_with_the_known_ones():
    done = _python("bench_step.py", "--peers", "carrier-pigeon")
    assert done.returncode == 2
    assert "carrier-pigeon" in done.stderr
    assert "SummaryWriter" in done.stderr


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import peers

    return peers


@pytest.mark.parametrize("name", PEERS[1:])
def test_a_reader_counts_each_step_once(peers, name, tmp_path):
    peer = peers.PEERS[name]()
    peer.prepare()
    peer.load()
    peer.start(tmp_path)
    for step in range(1, 51):
        peer.step(step, 2.5 / step)
    peer.close()
    assert peer.count(tmp_path) == Counter(range(1, 51))


def test_a_torn_line_is_not_counted(peers, tmp_path):
    lines = '{"step": 1}\n{"step": 2}\n{"step": 3'
    (tmp_path / "metrics.ndjson").write_text(lines)
    assert peers.JsonLine().count(tmp_path) == Counter([1, 2])


def test_the_save_bench_finds_what_is_on_disk_to_be_what_was_in_memory(tmp_path):
    path = tmp_path / "save.json"
    done = _python("bench_save.py", "--quick", "--dir", tmp_path / "disk", "--json", path)
    assert done.returncode == 0, done.stderr
    [result] = json.loads(path.read_text())
    assert result["exact"]
    assert 0 < result["ways"]["ours"]["blocked"] < result["ways"]["ours"]["durable"]
    assert result["resume"]["resume"] > 0


def test_the_cuda_bench_runs_its_logic_on_a_cpu(tmp_path):
    path = tmp_path / "cuda.json"
    done = _python("bench_cuda.py", "--device", "cpu", "--quick", "--json", path)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["host"]["ours"]["median"] > 0
    assert len(result["recipe"]["ratio"]["all"]) == result["recipe"]["rounds"]
