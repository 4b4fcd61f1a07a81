"""The ready patches: nothing in them but our own lines, each of which the drop-in understands."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from conftest import ROOT, python
from lines import is_marked

import observability

FOLDER = ROOT / "patches"
MARK = "  # observability"
READY = {path.stem: path for path in sorted((FOLDER / "ready").glob("*.patch"))}
PATCHES = READY | {"mainrun": FOLDER / "mainrun.patch"}
HEAD = (
    r"# from: (\S+/\S+) (\S+)\n# commit: ([0-9a-f]{40})\n# target: (\S+)\n"
    r"# sha256: ([0-9a-f]{64})\n# patched-sha256: ([0-9a-f]{64})\n--- a/\4\n\+\+\+ b/\4\n"
)
HUNK = re.compile(r"@@ -(\d+),0 \+(\d+)(?:,(\d+))? @@")
TABLE = re.compile(
    r"^\| \[(\S+)\.patch\]\(ready/\1\.patch\) \| (\S+) (\S+) at `(\w+)` \| (\d+) \| (.+?) \|", re.M
)

SCRIPT = """import torch

model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(3):
    loss = model(torch.randn(4, 2)).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def read(name: str) -> str:
    return PATCHES[name].read_text(encoding="utf-8")


def added(name: str) -> list[str]:
    return [row[1:] for row in read(name).splitlines() if re.match(r"\+(?!\+\+)", row)]


def calls(name: str) -> list[ast.Call]:
    tree = ast.parse("\n".join(row.strip() for row in added(name)))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in found if ast.unparse(call.func).startswith("obs.")]


def keywords(name: str, called: str) -> list[ast.keyword]:
    return [k for call in calls(name) if call.func.attr == called for k in call.keywords]


@pytest.mark.parametrize("name", READY)
def test_a_ready_patch_holds_nothing_but_its_head_and_added_lines(name):
    head = re.match(HEAD, read(name))
    assert head
    assert head[2].endswith(head[4])
    assert head[5] != head[6]
    rows = read(name)[head.end() :].splitlines()
    others = [row for row in rows if not row.startswith("+")]
    assert all(HUNK.fullmatch(row) for row in others)
    assert all(row.endswith(MARK) for row in rows if row.startswith("+"))
    assert len(rows) - len(others) <= 10


@pytest.mark.parametrize("name", READY)
def test_its_hunks_come_in_order_and_count_their_lines(name):
    before, count = -1, 0
    for hunk in re.split(r"(?m)^(?=@@)", read(name))[1:]:
        at, goal, size = HUNK.match(hunk).groups()
        lines = hunk.count("\n+")
        assert (int(size or 1), int(goal)) == (lines, int(at) + count + 1)
        assert int(at) > before
        before, count = int(at), count + lines


@pytest.mark.parametrize("name", PATCHES)
def test_each_added_line_is_known_as_ours_and_is_python_by_itself(name):
    assert added(name)
    for row in added(name):
        assert row.endswith(MARK)
        assert is_marked(row.encode())
        ast.parse(row.strip())


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_removes_no_line(name):
    assert not [row for row in read(name).splitlines() if re.match(r"-(?!--)", row)]


@pytest.mark.parametrize("name", PATCHES)
def test_its_calls_fit_the_drop_in(name):
    for call in calls(name):
        assert call.func.attr in observability.__all__
        keywords = {k.arg: None for k in call.keywords if k.arg}
        known = inspect.signature(getattr(observability.Run, call.func.attr, observability.init))
        own = [None] * ("self" in known.parameters)
        known.bind(*own, *call.args, **keywords)


@pytest.mark.parametrize("name", READY)
def test_what_a_step_carries_is_asked_for_and_the_rest_is_read_off_the_script_by_its_name(name):
    resumed = {k.arg: ast.unparse(k.value) for k in keywords(name, "resume")}
    given = [key.value for k in keywords(name, "step") if k.arg == "carry" for key in k.value.keys]
    assert {*given} <= resumed.keys()
    # What no step carries is a variable of that name, bound by the very line that asks for it.
    bound = {
        target.id
        for row in added(name)
        if "obs.resume(" in row
        for target in ast.walk(ast.parse(row.strip()).body[0])
        if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store)
    }
    assert resumed.keys() - {*given} <= bound


@pytest.mark.parametrize("name", READY)
def test_its_lines_fit_a_hundred_columns(name):
    longest = max(map(len, added(name)))
    # The script's own names for "every so many micro-batches" leave no room there.
    assert longest <= (116 if name.startswith("minimind-") else 100)


def test_the_table_lists_every_patch_with_its_commit_lines_and_parts():
    rows = {row[0]: row[1:] for row in TABLE.findall((FOLDER / "README.md").read_text())}
    assert sorted(rows) == [*READY]
    for name, (repo, path, commit, lines, parts) in rows.items():
        head = re.match(HEAD, read(name))
        assert (repo, path, commit) == (head[1], head[2], head[3][:12])
        assert int(lines) == len(added(name))
        names = {call.func.attr for call in calls(name)}
        has = {
            "log": "step" in names,
            "validation": "validation" in names,
            "resume": bool(names & {"resume", "skip_epoch"}),
        }
        assert parts.split(", ") == [part for part, there in has.items() if there]


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def autopatch(*arguments: object):
    return python(FOLDER / "autopatch.py", *arguments)


@pytest.mark.parametrize("name", READY)
def test_a_patch_is_refused_on_another_file(script, name):
    done = autopatch(script, "--patch", READY[name])
    assert (done.returncode, "this patch was made for" in done.stderr) == (2, True)
    assert script.read_text() == SCRIPT


def test_a_patch_of_this_form_is_applied_and_taken_back(script):
    ready = script.with_suffix(".patch")
    head = f"# from: you/yours train.py\n# commit: {'0' * 40}\n"
    ready.write_text(head + autopatch(script, "--pin").stdout)
    assert re.match(HEAD, ready.read_text())
    assert autopatch(script, "--patch", ready).returncode == 0
    lines = script.read_text().splitlines()
    assert "".join(f"{row}\n" for row in lines if not row.endswith(MARK)) == SCRIPT
    assert any("obs.step(" in row for row in lines)
    assert script.with_name("observability.py").exists()
    assert autopatch(script, "--reverse").returncode == 0
    assert script.read_text() == SCRIPT


@pytest.mark.parametrize("tool", ["autopatch", "prove"])
def test_the_commands_of_the_page_have_only_options_that_exist(tool):
    page = (FOLDER / "README.md").read_text()
    shown = re.findall(rf"^\$ python patches/{tool}\.py [^#\n]*", page, re.M)
    known = python(FOLDER / f"{tool}.py", "--help").stdout
    assert shown
    assert all(option in known for row in shown for option in re.findall(r"--[a-z]+", row))
