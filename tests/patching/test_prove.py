"""The prover: it finds a single random number, and it vouches for every shape that is patched."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from pickle import dumps

import prove
import pytest
import recorder
import torch
from conftest import MAINRUN, ROOT, forks, python
from lines import reverse

TOOLS = ROOT / "patches"
SHAPES = {path.stem: path for path in sorted((ROOT / "tests/shapes").glob("*.py"))}

SCRIPT = """
import os
import torch
import observability as obs  # observability
torch.manual_seed(1)
obs.init(system_interval=0)  # observability
data = torch.randn(40, 4)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(), torch.nn.Linear(4, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
obs.watch(model, optimizer=optimizer)  # observability
start = step = 0
start, step = obs.resume(start=start, step=step)  # observability
while step < 10:
    loss = model(data[start : start + 4]).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    start = start + 4
    step += 1
    obs.step(step, loss=loss, carry={"start": start, "step": step})  # observability
obs.finish()  # observability
"""


def in_a_fork(job: recorder.Job) -> None:
    """What a fresh Python does with the job, but for the import of torch."""
    os.chdir(job.folder)
    os.environ.update(prove.environment(job))
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{job.record}.{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.path.insert(0, "")
    del sys.modules["observability"]  # the one beside the script is meant
    torch.set_num_threads(1)
    code = recorder.record(job)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def run_in_a_fork(job: recorder.Job, tick) -> int:
    process = forks().Process(target=in_a_fork, args=(job,))
    process.start()
    process.join()
    return process.exitcode


def prove_script(script: Path, **options):
    return prove.prove(prove.Options(script, **options), run_in_a_fork)


def prove_wrong(script: Path, *changes: tuple[str, str], **options):
    """A patch that does more than a patch may, against the script without any."""
    mine = script.with_name("mine.py")
    mine.write_bytes(script.read_bytes())
    edit(mine, *changes)
    script.write_bytes(reverse(script.read_bytes()))
    return prove_script(script, patched=mine, **options)


def run_tool(*arguments, **environment):
    return python(TOOLS / "prove.py", *arguments, env={**os.environ, **environment})


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "folder" / "train.py"
    path.parent.mkdir()
    path.write_text(SCRIPT)
    return path


def edit(script: Path, *changes: tuple[str, str]) -> Path:
    text = script.read_text()
    for before, after in changes:
        assert text.count(before) == 1
        text = text.replace(before, after)
    script.write_text(text)
    return script


LAST = "    start = start + 4\n"


def say(script: Path, lines: str, before: str = "") -> Path:
    """Add lines at the end of the loop's body, and before it."""
    return edit(script, (LAST, LAST + lines), ("start = step = 0\n", f"{before}start = step = 0\n"))


# --- Verdicts -------------------------------------------------------------------------------------


def test_the_reference_recipe_is_identical():
    report = prove_script(MAINRUN / "train.py", steps=4)
    assert (report["verdict"], report["first_difference"]) == ("identical", None)
    assert report["counts"]["step"] == report["counts"]["loss"] == 4
    assert report["observed"]["train"] == 3  # the fourth ended before its step line


def test_a_single_random_number_is_found_with_its_step_and_both_values(script):
    line = "    start = start + 4\n"
    report = prove_wrong(script, (line, f"{line}    if step == 3: torch.rand(1)\n"))
    found = report["first_difference"]
    assert report["verdict"] == "differs"
    assert (found["step"], found["kind"]) == (5, "loss")
    ours, theirs = (float(found[side].split()[1]) for side in ("original", "patched"))
    assert ours != theirs


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model[0].bias.data.add_(1)", "Linear 0.bias"),
        ("optimizer.param_groups[0]['lr'] = 1.0", "Adam 0.param_groups.0.lr"),
        ("optimizer.state.clear()", "Adam 0."),
        ("torch.rand(1)", "random.torch"),
        ("__import__('random').random()", "random.python"),
    ],
    ids=["a weight", "a setting", "moments", "torch's generator", "python's generator"],
)
def test_a_change_after_the_last_step_is_found_by_its_name(script, change, said):
    report = prove_wrong(script, ("obs.finish()  #", f"obs.finish(); {change}  #"))
    assert (report["verdict"], report["first_difference"]["kind"]) == ("differs", "end")
    assert report["first_difference"]["place"].startswith(said)


def test_what_an_added_line_reads_is_not_the_scripts_doing(script):
    edit(script, ("loss=loss,", "loss=loss.item(),"))
    report = prove_script(script)
    assert (report["verdict"], report["counts"]["value"]) == ("identical", 0)


MEAN = ".pow(2).mean()\n"
NOISE = ".pow(2).mean() + 1e-3 * int.from_bytes(os.urandom(4), 'big') / 2**32\n"


def test_a_script_that_differs_from_itself_is_said_to_and_by_how_far(script):
    edit(script, (MEAN, NOISE), ("step < 10", "step < 60"), ("randn(40,", "randn(240,"))
    say(script, "    print(f'loss {loss.item():.6f}')\n")
    report = prove_script(script, kill=1)
    assert report["verdict"] == "within own drift"
    assert report["own_difference"]["step"] == 1
    assert report["own_line"]["original"] != report["own_line"]["patched"]
    assert report["drift"]["original"] > 0
    assert report["resume"]["verdict"] == "unanswered"


def test_beyond_its_own_drift_a_script_still_differs(script):
    edit(script, (MEAN, NOISE))
    fault = ("obs.watch(", "model[2].bias.data.add_(100); obs.watch(")
    assert prove_wrong(script, fault)["verdict"] == "differs"


# --- What the script says -------------------------------------------------------------------------


def test_a_line_that_only_the_patched_script_prints_so_is_found_with_both_texts(script):
    line = "    print('seen', seen)\n"
    say(script, line, "seen = 1\n")
    report = prove_wrong(script, (line, f"    if step == 4: seen = 7\n{line}"))
    found = report["first_difference"]
    assert (report["verdict"], found["kind"], found["step"]) == ("differs", "line", 5)
    assert (found["original"], found["patched"]) == ("line seen 1", "line seen 7")


def test_a_number_beside_one_that_varies_is_still_compared(script):
    line = "    print(f'seen {seen} of {os.urandom(4)[0]}')\n"
    say(script, line, "seen = 1\n")
    report = prove_wrong(script, (line, f"    if step == 4: seen = 7\n{line}"))
    assert (report["verdict"], report["first_difference"]["step"]) == ("differs", 5)
    assert report["own_difference"] is None
    assert report["own_line"]["original"].startswith("line seen 1 of")


CLOCKS = {
    "the time": "    print(time.time(), f'{time.perf_counter():.3f} s')\n",
    "a name": "    print('kept in', tempfile.mkdtemp())\n",
    "now and then": "    if os.urandom(1)[0] % 2: print('still alive')\n",
    "a bar": "    print(f'\\r{time.time()}', end='', file=sys.stderr)\n",
    "a thread": "    t = threading.Thread(target=print, args=[time.time()]); t.start(); t.join()\n",
    "a warning": "    warnings.warn('once')\n",
    "its own line": "    print('train.py:%d' % sys._getframe().f_lineno)\n",
    "in a process": "    os.system(f'echo {time.time()}')\n",
    "in a file": "    open('now.txt', 'w').write(str(time.time()))\n",
    "a bar's log": (
        "    for _ in tqdm.tqdm(range(9), mininterval=1e-4, desc=str(time.time())):\n"
        "        tqdm.tqdm.write(f'step {step}'); logging.warning('step %d', step)\n"
    ),
    "a copy of itself": "    shutil.copy(__file__, 'copy.py')\n",
    "dots": "    print('.', end='' if step % 5 else None)\n",
    "drawn anew": "    print(f'\\rstep {step}', end='')\n",
    "a stamped log": "    open('t.log', 'a').write(f'{time.ctime()} step {step}\\n')\n",
    "a stamped pickle": "    pickle.dump((time.time(), step), open('p.pkl', 'wb'))\n",
    "a name by chance": (
        "    print('run', uuid.uuid4().hex); open(f'n{time.time_ns()}', 'w').write('x')\n"
    ),
    "in another folder": (
        "    os.makedirs('sub', exist_ok=True); os.chdir('sub')\n"
        "    open('x.txt', 'w').write(str(step)); os.chdir('..')\n"
    ),
    "beside the folder": "    open('../beside.txt', 'w').write(str(step))\n",
    "by descriptor": "    os.write(1, f'at {step}\\n'.encode())\n",
    "a heartbeat": (
        "    threading.Timer(0.01, sys.stdout.write, [f'alive {time.time()}\\n']).start()\n"
    ),
    "deaf to signals": "    signal.signal(signal.SIGTERM, lambda *_: None)\n",
    "padded": "    print(f'ms/batch {os.urandom(1)[0]:5d} |')\n",
    "once in a process": "    warning_once('deprecated')\n",
    "what lay there": "    print('old' if os.path.exists('f') else 'new'); open('f', 'w')\n",
}
MODULES = (
    "import logging, pickle, shutil, signal, subprocess, sys, tempfile, threading, time, tqdm\n"
    "import functools, uuid, warnings\n"
    "@functools.cache\n"
    "def warning_once(text): logging.warning(text)\n"
)


@pytest.mark.parametrize("line", CLOCKS.values(), ids=list(CLOCKS))
def test_what_varies_or_comes_in_no_order_makes_no_difference(script, line):
    report = prove_script(say(script, line, MODULES), kill=2)
    assert (report["verdict"], report["resume"]["verdict"]) == ("identical", "identical"), report


SHOWN = {
    "by descriptor": "    os.write(1, f'seen {seen}\\n'.encode())\n",
    "by a process": "    subprocess.run(['echo', f'seen {seen}'])\n",
    "as bytes": "    sys.stdout.buffer.write(f'seen {seen}\\n'.encode())\n",
    "drawn anew": "    print(f'\\rseen {seen}', end='' if step < 10 else None)\n",
    "in a line without an end": "    print('seen', seen, end=' ')\n",
    "beside what comes by the clock": (
        "    if os.urandom(1)[0] % 2: print('tick')\n    print('seen', seen)\n"
    ),
    "in a stamped log": "    open('t.log', 'a').write(f'{time.time()} seen {seen}\\n')\n",
    "beside the folder": "    open('../t.log', 'a').write(f'seen {seen}\\n')\n",
    "elsewhere": "    open(elsewhere, 'w').write(f'seen {seen}\\n')\n",
    "elsewhere, by torch": "    torch.save(seen, elsewhere)\n",
    "by what is deleted": "    if seen == 1 and os.path.exists('f.txt'): os.remove('f.txt')\n",
    "by what is made": "    if seen == 7: open('made.txt', 'w').close()\n",
}


@pytest.mark.parametrize("line", SHOWN.values(), ids=list(SHOWN))
def test_whatever_the_patch_changes_in_what_is_shown_is_found(script, tmp_path, line):
    script.with_name("f.txt").touch()
    say(script, line, f"{MODULES}seen, elsewhere = 1, {str(tmp_path / 'else.pt')!r}\n")
    report = prove_wrong(script, (line, f"    seen = 7\n{line}"))
    assert report["verdict"] == "differs", report


@pytest.mark.parametrize(
    "change",
    [
        ("lr=0.1", "lr=0.1000001"),
        ("obs.finish()  #", "obs.finish(); print('more')  #"),
        ("obs.finish()  #", "obs.finish(); os._exit(0)  #"),
        ("obs.finish()  #", "obs.finish(); raise SystemExit(3)  #"),
        ("    print('val', step)\n", "    if step != 5: print('val', step)\n"),
    ],
    ids=["its learning rate", "a line more", "its end", "its status", "an evaluation"],
)
def test_a_patch_that_changes_anything_differs(script, change):
    report = prove_wrong(say(script, "    print('val', step)\n"), change)
    assert report["verdict"] == "differs", report


def test_a_run_that_a_process_shows_otherwise_after_a_kill_differs(script):
    say(script, "    seen += 1; os.write(1, f'{seen} seen\\n'.encode())\n", "seen = 0\n")
    edit(script, ("step < 10", "step < 10 and seen < 12"))
    report = prove_script(script, kill=2)
    assert (report["verdict"], report["resume"]["verdict"]) == ("identical", "differs"), report


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("if step == 4: os._exit(0)", "by os._exit"),
        ("if step == 4: raise SystemExit(3)", "^the original fails with status 3"),
        ("input()", "EOFError"),
        ("raise OSError(28, os.strerror(28))", "a disk is full"),
    ],
)
def test_an_original_without_a_proper_end_has_no_verdict(script, line, said):
    with pytest.raises(prove.Unanswered, match=said):
        prove_script(say(script, f"    {line}\n"))


def test_a_script_that_ends_itself_in_the_middle_is_compared_to_there(script):
    report = prove_script(say(script, "    if step == 4: raise SystemExit(0)\n"))
    assert (report["verdict"], report["counts"]["step"]) == ("identical", 5)


def test_a_file_that_the_patch_changes_is_found_by_its_name(script):
    line = "open('seen.bin', 'wb').write(bytes([seen]))\n"
    say(script, "", "seen = 1\n")
    with script.open("a") as file:
        file.write(line)
    report = prove_wrong(script, (line, f"seen = 7\n{line}"))
    found = report["first_difference"]
    assert (report["verdict"], found["kind"], found["place"]) == ("differs", "file", "seen.bin")


def test_a_file_that_differs_from_run_to_run_is_named_as_not_compared(script):
    say(script, "    open('n.bin', 'wb').write(os.urandom(4)); open('m.bin', 'wb').write(b'm')\n")
    report = prove_script(script)
    assert (report["verdict"], report["counts"]["file"]) == ("identical", 1)
    assert report["not_compared"]["files"] == "n.bin"


def test_a_script_that_saves_its_weights_saves_the_same(script):
    with script.open("a") as file:
        file.write("torch.save([model.state_dict(), optimizer.state_dict()], 'end.pt')\n")
    report = prove_script(script, kill=2)
    assert (report["verdict"], report["resume"]["verdict"]) == ("identical", "identical")
    assert report["counts"]["file"] == 1


SHARED = [1.5, 2.5]


@pytest.mark.parametrize("save", [torch.save, lambda what, path: path.write_bytes(dumps(what))])
@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ([SHARED, SHARED], [SHARED, [1.5, 2.5]], True),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        ({"a": 1}, {"a": 1.0}, False),
        ({"a": 1}, {"b": 1}, False),
        ({1: 1}, {"1": 1}, False),
        (["1"], [1], False),
        ([None], [False], False),
        ([b"1"], ["1"], False),
        ([(1,)], [[1]], False),
        (Path("a"), Path("b"), False),
        (OrderedDict(a=1), {"a": 1}, False),
        (torch.ones(3), torch.nn.Parameter(torch.ones(3)), False),
        (torch.ones(3), torch.ones(3).nextafter(torch.tensor(2.0)), False),
        (torch.ones(3), torch.ones(3, dtype=torch.double), False),
        (torch.ones(4)[:2], torch.ones(4)[:3], False),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
    ],
)
def test_a_pickle_is_compared_by_the_values_that_it_holds(tmp_path, save, one, other, is_same):
    paths = tmp_path / "one.pt", tmp_path / "other.pt"
    for path, what in zip(paths, (one, other), strict=True):
        save(what, path)
    held = [[line.replace(p.stem, "") for line in prove.held_in(p)] for p in paths]
    assert all(held)
    assert (held[0] == held[1]) == is_same


class Mine:
    def __reduce__(self):
        return os.mkdir, ("made",)


@pytest.mark.parametrize("data", [dumps([1, Mine()]), dumps(1) + b"more", b"PK\3\4", b"\x80.", b""])
def test_no_code_of_a_pickle_is_run_and_what_is_none_is_compared_by_its_bytes(
    tmp_path, monkeypatch, data
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(data)
    assert bool(prove.held_in(Path("file"))) == (b"mkdir" in data)
    assert not Path("made").exists()


def test_a_file_of_torch_is_the_same_with_its_keys_in_another_order_and_other_hooks(script):
    say(script, "", "model.register_forward_hook(print).remove()\n")
    saved = "torch.save({'a': 1, 'b': seen}, 'end.pt')\n"
    with script.open("a") as file:
        file.write(f"seen = torch.nn.Linear(1, 1); seen.register_forward_hook(os.getcwd)\n{saved}")
    hook = "model.register_forward_hook(print).remove()\n"
    report = prove_wrong(
        script, ("'a': 1, 'b': seen", "'b': seen, 'a': 1"), ("seen =", f"{hook}seen =")
    )
    assert report["verdict"] == "identical", report
    report = prove_wrong(script, ("'a': 1, 'b': seen", "'b': seen, 'a': 2"))
    found = report["first_difference"]
    assert (found["place"], found["patched"]) == ("end.pt", "file end.pt ['a'] int 2")


# --- Kills ----------------------------------------------------------------------------------------


def test_three_kills_lead_to_the_same_end(script):
    resume = prove_script(script, kill=3)["resume"]
    assert (resume["verdict"], resume["first_difference"]) == ("identical", None)
    assert len(resume["runs"]) == 4
    assert any(run["resumed_at"] for run in resume["runs"])
    assert [run["killed_at"] is None for run in resume["runs"]] == [False] * 3 + [True]


def test_what_a_loader_reads_on_the_way_back_is_not_compared(script):
    loop = (
        "draws = (torch.rand(1).item() for _ in range(10))\nfor draw in draws:\n"
        "    if obs.skip_batch(): continue  # observability"
    )
    edit(script, ("while step < 10:", loop), (".pow(2).mean()", ".pow(2).mean() * draw"))
    report = prove_script(script, kill=2)
    assert (report["verdict"], report["resume"]["verdict"]) == ("identical", "identical")
    assert report["counts"]["value"] == 10


def test_a_save_behind_the_end_of_an_epoch_is_known_by_its_place(script):
    """The best weights are saved behind what the epoch's tail reads, at a step that was noted."""
    head, loop = SCRIPT.split("while step < 10:\n")
    body, end = loop.split("obs.finish()")
    inner = "        if obs.skip_batch(): continue  # observability\n"
    inner += "".join(f"    {row}\n" for row in body.splitlines())
    inner += "    val = model(data).abs().mean().item()\n    obs.validation(val)  # observability\n"
    skip = "    if obs.skip_epoch(epoch): continue  # observability\n"
    epochs = f"for epoch in range(3):\n{skip}    for batch in range(4):\n{inner}"
    script.write_text(f"{head}{epochs}obs.finish(){end}")
    report = prove_script(script, kill=6, seed=5)
    assert (report["verdict"], report["resume"]["verdict"]) == ("identical", "identical")
    assert report["resume"]["save_interval"] == 3
    assert {4, 8} & {run["resumed_at"] for run in report["resume"]["runs"]}


def test_kills_find_what_is_not_carried(script):
    edit(
        script,
        ("start, step = obs.resume(start=start, ", "step = obs.resume("),
        ('{"start": start, ', "{"),
    )
    report = prove_script(script, kill=1)
    assert report["verdict"] == "identical"
    assert report["resume"]["verdict"] == "differs"
    assert report["resume"]["first_difference"]["kind"] == "loss"


def test_kills_find_a_printed_counter_that_no_checkpoint_holds(script):
    say(script, "    seen += 1\n    print(f'{seen} seen')\n", "seen = 0\n")
    report = prove_script(script, kill=2)
    found = report["resume"]["first_difference"]
    assert (report["verdict"], report["resume"]["verdict"]) == ("identical", "differs")
    assert (found["kind"], found["original"].endswith(" seen")) == ("line", True)
    assert found["original"] != found["patched"]


def test_kills_find_a_file_that_lacks_what_came_before(script):
    say(script, "    seen.append(step)\n", "seen = []\n")
    with script.open("a") as file:
        file.write("open('seen.txt', 'w').write(str(seen))\n")
    resume = prove_script(script, kill=2)["resume"]
    assert (resume["verdict"], resume["first_difference"]["place"]) == ("differs", "seen.txt")


@pytest.mark.parametrize("mode", ["a", "w"])
def test_a_log_that_a_killed_run_goes_on_with_is_named_as_not_compared(script, mode):
    line = "    print(step, file=log, flush=True)\n"
    say(script, line, f"log = open('log.txt', '{mode}')\n")
    resume = prove_script(script, kill=9, seed=5)["resume"]
    assert (resume["verdict"], resume["files_not_compared"]) == ("identical", "log.txt")


def test_numbers_are_named_before_a_line_that_tells_what_lay_there(script):
    number = "number = sum(name[0] == 'r' for name in os.listdir())\n"
    number += "os.mkdir(f'r{number}'); print('in', number)\n"
    say(script, "    mean.weight.data += 1\n", f"mean = torch.nn.Linear(1, 1)\n{number}")
    resume = prove_script(script, kill=2)["resume"]
    found = resume["first_difference"]
    assert (resume["verdict"], found["kind"], found["place"]) == (
        "differs",
        "end",
        "Linear 2.weight",
    )


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_run_is_killed_after_a_save(script, steps):
    edit(script, ("step < 10", f"step < {steps}"))
    resume = prove_script(script, kill=1, seed=5)["resume"]
    assert (resume["verdict"], resume["save_interval"]) == ("identical", 1), resume


def test_a_save_that_failed_is_the_reason(script):
    edit(script, ('"step": step}', '"step": step, "of": open}'))
    done = run_tool(script, "--kill", 1)
    assert done.returncode == 2
    assert re.search(r"^  resume: unanswered: step \d was not saved: of is a ", done.stdout, re.M)
    assert "left a checkpoint" not in done.stdout


def test_a_run_that_fails_when_it_resumes_differs(script):
    begins = "while step < 10:\n"
    edit(script, (begins, f"if step: raise KeyError('late')  # observability\n{begins}"))
    resume = prove_script(script, kill=2)["resume"]
    assert (resume["verdict"], "KeyError: 'late'" in resume["why"]) == ("differs", True)


EPOCHS = """
for epoch in range(3):
    if obs.skip_epoch(epoch): continue  # observability
    for batch in range(4):
        if obs.skip_batch(): continue  # observability
"""


def test_kills_come_at_different_kinds_of_places_first(script):
    head, loop = SCRIPT.split("while step < 10:\n")
    body, end = loop.split("obs.finish()")
    inner = "".join(f"    {row}\n" for row in body.splitlines())
    val = "    val = [model(data[i:]).abs().mean().item() for i in range(3)][-1]\n"
    val += "    obs.validation(val)  # observability\n"
    script.write_text(f"{head}{EPOCHS}{inner}{val}obs.finish(){end}")
    resume = prove_script(script, kill=5)["resume"]
    assert resume["verdict"] == "identical", resume
    assert sorted(run["where"] for run in resume["runs"][:5]) == [
        "at an epoch's last step",
        "at the last step",
        "in an epoch",
        "in an evaluation",
        "right after a save",
    ]


def test_a_patch_that_cannot_resume_has_no_verdict_about_it(script):
    edit(script, ("start, step = obs.resume(start=start, step=step)  # observability\n", ""))
    resume = prove_script(script, kill=1)["resume"]
    assert (resume["verdict"], "never calls resume()" in resume["why"]) == ("unanswered", True)


# --- Command line ---------------------------------------------------------------------------------


def test_the_report_is_json_on_request_and_steps_end_both(script):
    unmarked = [row for row in SCRIPT.splitlines() if not row.endswith("# observability")]
    script.write_text("\n".join(unmarked))
    done = run_tool(script, "--steps", 3, "--json", OBS_DISABLE="1")
    report = json.loads(done.stdout)
    assert (done.returncode, report["verdict"], report["counts"]["step"]) == (0, "identical", 3)
    assert report["observed"]["train"] == 2
    assert "run patched" in done.stderr


RANKS = """
import time
import torch
import torch.distributed as dist
import observability as obs  # observability
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)
obs.init(system_interval=0)  # observability
model = torch.nn.Linear(4, 1)
for p in model.parameters(): dist.broadcast(p.data, 0)
model.register_buffer("seen", torch.zeros(()))
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
obs.watch(model, optimizer=optimizer)  # observability
step = 0
step = obs.resume(step=step)  # observability
while step < 6:
    loss = model(torch.randn(8, 4)).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    for p in model.parameters(): dist.all_reduce(p.grad)
    optimizer.step()
    step += 1
    if rank == 0: print("step", step, loss.item())
    obs.step(step, loss=loss, carry={"step": step})  # observability
obs.finish()  # observability
dist.barrier()
dist.destroy_process_group()
time.sleep(0.3)  # gloo's threads abort a process that exits at once, one time in ten
"""


def test_the_end_of_every_rank_is_compared(script):
    script.write_text(RANKS)
    options = ["--nproc", 2, "--json"]
    done = run_tool(script, *options, "--kill", 1)
    report = json.loads(done.stdout)
    resume = report["resume"]
    assert (report["verdict"], resume["verdict"]) == ("identical", "identical"), report
    assert resume["runs"][1]["resumed_at"]
    mine = script.with_name("mine.py")
    mine.write_text(RANKS.replace("obs.finish()  #", "model.seen += (rank == 1)\nobs.finish()  #"))
    script.write_bytes(reverse(script.read_bytes()))
    report = json.loads(run_tool(script, "--patched", mine, *options).stdout)
    assert report["verdict"] == "differs", report
    found = report["first_difference"]
    assert (found["kind"], found["place"]) == ("end", "rank 1 Linear 0.seen")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_a_terminal_shows_the_time_left(script):
    terminal, end = os.openpty()
    command = [sys.executable, TOOLS / "prove.py", script, "--steps", "3"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=end, check=False)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(end), os.close(terminal)
    assert (done.returncode, " s left, run " in shown) == (0, True), shown


def test_another_patch_can_be_given_and_status_1_says_that_it_differs(script):
    mine = script.with_name("mine.py")
    mine.write_text(SCRIPT.replace("obs.init(", "torch.rand(1); obs.init("))
    done = run_tool(script, "--patched", mine, "--steps", 1)
    assert (done.returncode, "first difference: step 1" in done.stdout) == (1, True)


def test_a_script_may_start_in_a_folder_of_its_project(script):
    script.parent.with_name("data.txt").write_text("3")
    edit(
        script,
        (
            "data = torch.randn(40, 4)",
            "data = torch.randn(40, 4) * float(open('../data.txt').read())",
        ),
    )
    options = {"root": script.parent.parent, "start": script.parent, "steps": 2}
    assert prove_script(script, **options)["verdict"] == "identical"


def test_a_script_that_fails_by_itself_has_no_verdict(script):
    edit(script, ("while step < 10:\n", "while step < 10:\n    1 // (2 - step)\n"))
    done = run_tool(script)
    assert (done.returncode, "ZeroDivisionError" in done.stdout) == (2, True)


def test_a_tensor_that_cannot_be_read_is_not_vouched_for(script):
    bits = []

    def peek(row):  # within vmap a tensor stands for many and has no memory
        bits.append(recorder.bits_of(row))
        return row

    torch.vmap(peek)(torch.ones(2, 2))
    entry = recorder.Entry(kind="loss", bits=bits[0], step=1)
    with pytest.raises(prove.Unanswered, match="cannot be read, loss"):
        prove.Recording(0, "", [entry], {}).check(script)


def test_a_loss_without_values_is_left_out(script):
    flops = "torch.nn.Linear(2, 2, device='meta')(torch.ones(1, 2, device='meta')).sum().backward()"
    report = prove_script(say(script, f"    {flops}\n"))
    assert (report["verdict"], report["counts"]["loss"]) == ("identical", 10)


@pytest.mark.parametrize("names_it", ["", "os.environ['MASTER_PORT'] = '{}'\n"])
def test_runs_at_once_that_are_a_group_each_find_a_port(script, monkeypatch, names_it):
    port = str(prove.free_port())
    group = "import torch.distributed as dist\nos.environ['MASTER_ADDR'] = 'localhost'\n"
    group += names_it.format(port)
    say(script, "", f"{group}dist.init_process_group('gloo', rank=0, world_size=1)\n")
    with script.open("a") as file:
        file.write("__import__('time').sleep(0.5); dist.destroy_process_group()\n")
    monkeypatch.setenv("MASTER_PORT", port)
    holder = (
        contextlib.nullcontext() if names_it else socket.create_server(("localhost", int(port)))
    )
    with holder:
        report = prove_script(script, kill=1)
    assert (report["verdict"], report["resume"]["verdict"]) == ("identical", "identical"), report


def test_parameters_that_have_no_values_yet_are_no_hindrance(script):
    empty = (
        "from torch._subclasses import FakeTensorMode\n"
        "with FakeTensorMode(): fake = torch.nn.Linear(2, 2)\n"
        "empty = [torch.nn.Linear(2, 2, device='meta'), torch.nn.LazyLinear(2)]\n"
    )
    edit(script, ("start = step = 0\n", f"start = step = 0\n{empty}"))
    assert prove_script(script)["verdict"] == "identical"


def test_a_patch_that_fails_differs(script):
    report = prove_wrong(script, ("obs.init(", "raise KeyError('mine'); obs.init("))
    assert (report["verdict"], "KeyError: 'mine'" in report["why"]) == ("differs", True)


def test_the_users_folder_is_left_as_it_was(script):
    (script.parent / "out").mkdir()
    before = {path: path.stat().st_mtime_ns for path in script.parent.rglob("*")}
    prove_script(script)
    assert {path: path.stat().st_mtime_ns for path in script.parent.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.py"], "No such file"),
        (["."], "cannot read the script"),
        (["train.py", "--patched", "missing.py"], "No such file"),
        (["train.py", "--link", "/"], "not in the subpath"),
        (["notes.py"], "autopatch.py cannot patch it"),
        (["train.py", "--kill", "0"], "0 is not a number from 1 on"),
    ],
)
def test_what_cannot_be_proved_is_a_sentence_and_status_2(
    script, capsys, monkeypatch, arguments, said
):
    script.with_name("notes.py").write_text("this is no Python\n")
    monkeypatch.chdir(script.parent)
    with contextlib.suppress(SystemExit):
        assert prove.main(arguments) == 2
    shown = capsys.readouterr()
    assert said in shown.out + shown.err


@pytest.mark.parametrize("name", ["loop_elsewhere", "several_processes"])
def test_what_cannot_be_patched_or_watched_has_no_verdict(name):
    with pytest.raises(prove.Unanswered, match=r"engine\.py|is not watched"):
        prove_script(SHAPES[name])


# --- Every shape that is patched ------------------------------------------------------------------


# Objects that count what the script shows: autopatch notes that they begin anew, and the prover
# sees the lines. What is learnt is the same to the last bit.
SHOWS_ANEW = {"own_checkpoint", "traps"}


@pytest.mark.parametrize("name", sorted(SHAPES.keys() - {"loop_elsewhere", "several_processes"}))
def test_a_patched_shape_is_identical_and_resumes_where_it_offers_to(tmp_path, name):
    patched = tmp_path / SHAPES[name].name
    patched.write_bytes(SHAPES[name].read_bytes())
    subprocess.run([sys.executable, TOOLS / "autopatch.py", "--write", patched], check=True)
    report = prove_script(SHAPES[name], patched=patched, kill=2, seed=3)
    assert (report["verdict"], report["first_difference"]) == ("identical", None)
    assert report["observed"]["train"] > 0
    if ".skip_" in patched.read_text() or ".resume(" in patched.read_text():
        resume = report["resume"]
        assert resume["said"] == [], resume
        if name in SHOWS_ANEW and resume["verdict"] == "differs":
            assert resume["first_difference"]["kind"] == "line", resume
        else:
            assert resume["verdict"] == "identical", resume


def test_a_folder_that_holds_the_temporary_one_is_not_copied_into_itself(tmp_path):
    (tmp_path / "train.py").write_bytes(SHAPES["lbfgs"].read_bytes())
    (tmp_path / "temporary").mkdir()
    env = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    done = python(TOOLS / "prove.py", tmp_path / "train.py", env=env)
    assert (done.returncode, "set TMPDIR to another" in done.stdout + done.stderr) == (2, True)
    assert not list((tmp_path / "temporary").iterdir())
