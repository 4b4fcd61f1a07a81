"""`--check` of a script that has call sites: each omission is said, and nothing that is well."""

from __future__ import annotations

import json
import re
from pathlib import Path

import autopatch
import check
import pytest
from conftest import ROOT, python
from lines import is_marked, marked_numbers, split_lines

TOOL = ROOT / "patches" / "autopatch.py"
SHAPES = {path.stem: path for path in sorted((ROOT / "tests/shapes").glob("*.py"))}
del SHAPES["loop_elsewhere"]
# Of tests/call_sites, those that resume exactly and hold a loop of their own.
EXACT = {path.stem: path for path in sorted((ROOT / "tests/call_sites").glob("*.py"))}
EXACT = {
    name: path for name, path in EXACT.items() if name not in ("late", "pieces", "readme_once")
}


def found(data: bytes, *, advice: bool = False) -> list[str]:
    rest = check.blanked(data, "train.py")
    added = autopatch.plan(autopatch.Script(rest)).insertions
    return [o.text for o in check.omissions(data, rest, added) if advice or not o.is_advice]


def patched(name: str) -> bytes:
    return autopatch.patch(SHAPES[name].read_bytes())[0]


def without(data: bytes, code: str) -> bytes:
    """A script without its first marked line that holds this."""
    rows = split_lines(data)
    [at, *_] = [n for n in sorted(marked_numbers(data)) if code.encode() in rows[n - 1]]
    return b"".join([*rows[: at - 1], *rows[at:]])


# --- Nothing is missing ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_what_autopatch_adds_is_well(name):
    assert found(patched(name), advice=True) == []


@pytest.mark.parametrize("name", EXACT)
def test_call_sites_by_hand_that_resume_exactly_are_well(name):
    assert found(EXACT[name].read_bytes()) == []


def test_the_reference_recipe_is_well():
    assert found((ROOT / "mainrun/train.py").read_bytes(), advice=True) == []


def test_the_readmes_example_is_well():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [example] = [block for block in blocks if "obs.init" in block and "obs.finish" in block][:1]
    assert found(example.encode()) == []


@pytest.mark.parametrize("name", SHAPES)
def test_blanking_the_call_sites_leaves_every_other_line_where_it_was(name):
    data = patched(name)
    rows = check.blanked(data, "train.py").decode().splitlines()
    given = data.decode().splitlines()
    assert len(rows) == len(given)
    for row, before in zip(rows, given, strict=True):
        assert row == before or (is_marked(before.encode()) and row.strip() in ("", "pass"))


# --- One thing is missing -------------------------------------------------------------------------


def once(*calls: str) -> list[tuple[str, str]]:
    """Each of the calls with each of the shapes that has it in one line."""
    pairs = [(name, call) for call in calls for name in SHAPES]
    return [(name, call) for name, call in pairs if patched(name).count(f".{call}(".encode()) == 1]


@pytest.mark.parametrize(
    ("name", "call"), once("init", "watch", "step", "finish", "skip_epoch", "skip_batch")
)
def test_a_call_that_is_left_out_is_missed(name, call):
    said = found(without(patched(name), f".{call}("))
    guard = "lacks skip_" if "skip" in call else f"{call}()"
    assert [text for text in said if guard in text], said


@pytest.mark.parametrize(("name", "call"), once("resume"))
def test_a_resume_that_is_left_out_is_missed(name, call):
    assert "resume() is missing" in found(without(patched(name), f".{call}("))


def test_an_evaluation_that_is_not_recorded_is_advice():
    data = without(patched("nested_main"), ".validation(")
    assert (found(data), found(data, advice=True)) == ([], ["validation() is missing"])


@pytest.mark.parametrize(
    ("shape", "before", "after", "said", "sure"),
    [
        ("nested_main", r", scheduler=\w+", "", r"watch\(\) does not name sched", False),
        ("loss_scaler", r", scaler=\w+", "", r"watch\(\) does not name .*scaler", False),
        (
            "nested_main",
            r"    obs\.step\(",
            "    if step % 2: obs.step(",
            "under a condition",
            True,
        ),
        (
            "nested_main",
            r"(\w+), (.* = obs\.resume\()\1=\1, ",
            r"\2",
            "resume.. does not name",
            True,
        ),
    ],
)
def test_what_a_call_does_not_say_is_missed(shape, before, after, said, sure):
    text = patched(shape).decode()
    changed = re.sub(before, after, text, count=1)
    assert changed != text
    assert [t for t in found(changed.encode(), advice=not sure) if re.search(said, t)]


LOOP = """import torch
import observability as obs
model = torch.nn.Linear(2, 1)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
obs.init()
obs.watch(model, optimizer=opt)
obs.resume()
for epoch in range(3):
    if obs.skip_epoch(epoch): continue
    for x in data:
        if obs.skip_batch(): continue
        loss = model(x).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        obs.step(loss=loss)
{end}"""


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("obs.finish()\n", []),
        ("", ["finish() is missing"]),
        ("    obs.finish()\n", ["finish() is within a loop; move it behind"]),
        (
            "obs.finish()\nobs.validation(evaluate(model))\n",
            ["finish() comes before validation() at line 18; move it behind"],
        ),
    ],
)
def test_the_finish_stands_behind_all_that_is_recorded(end, said):
    assert found(LOOP.format(end=end).encode()) == said


def test_a_name_of_its_own_is_kept_in_the_line_to_add():
    text = LOOP.format(end="").replace("observability as obs", "observability as o")
    data = text.replace("obs.", "o.").encode()
    rest = check.blanked(data, "train.py")
    [one] = check.omissions(data, rest, autopatch.plan(autopatch.Script(rest)).insertions)
    assert one.add == "o.finish()  # observability"


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(LOOP.format(end=""))
    return path


def test_it_says_the_line_to_add_and_where_and_exits_1(script):
    done = python(TOOL, script, "--check")
    assert done.returncode == 1
    assert (
        "train.py:17: finish() is missing\n    add before this line: obs.finish()  # observability"
        in done.stdout
    )
    record = json.loads(python(TOOL, script, "--check", "--json").stdout)
    assert [(each["line"], each["is_advice"]) for each in record["omissions"]] == [(17, False)]


def test_where_all_is_well_it_says_so_and_exits_0(script):
    script.write_text(LOOP.format(end="obs.finish()\n"))
    done = python(TOOL, script, "--check")
    assert (done.returncode, "nothing is missing" in done.stdout) == (0, True)
