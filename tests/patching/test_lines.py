"""A marked line is a whole statement of ours; every other line of a script is its author's."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import lines
import pytest
from conftest import ROOT, python
from files import backup, drop_backup, write
from hypothesis import given, settings
from hypothesis import strategies as st

TOOL = ROOT / "patches" / "autopatch.py"
MARK = "  # observability"
IMPORT = f"import observability as obs{MARK}\n"
STEP = f"obs.step(loss=1){MARK}\n"


def numbers(text: str) -> list[int]:
    return sorted(lines.marked_numbers(text.encode()))


# --- What a marked line is ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import observability as obs",
        "from mingpt import observability as obs",
        "from . import observability as obs",
        "obs.init(config=vars(args))",
        "obs.add_arguments(parser)",
        "obs.log({'a': 1, \"b\": [2, (3)]})",
        "a = obs.resume(a=a)",
        "self.a, b = obs.resume(a=self.a, b=b)",
        "if obs.skip_epoch(epoch): continue",
        "if obs.skip_batch(): continue",
        "if obs.ended(): break",
        "if (step + 1) % n == 0: obs.step(loss=loss)",
        "if phase == 'val': obs.validation(loss)",
        "for k, v in found.items(): obs.log({k: v})",
        "for m, n in zip(meters, obs.resume(meters=[(m, 1) for m in meters])): pass",
    ],
)
def test_each_form_that_we_write_is_marked(code):
    assert lines.is_marked(f"    {code}{MARK}\r\n".encode())
    head = "while x:\n    pass\n"
    assert numbers(f"{IMPORT}{head}    {code}{MARK}\n    y = 1\n") == [1, 4]


@pytest.mark.parametrize("end", ["", ";", " #observability", "  # Observability", f"{MARK} ", " #"])
def test_an_ending_that_is_spelled_otherwise_makes_the_line_its_authors(end):
    assert numbers(f"{IMPORT}obs.step(){end}\n") == [1]


@pytest.mark.parametrize(
    "code",
    [
        "k = 1",
        "pass",
        "print('x')",
        "import observability as watch",
        "import observability, os",
        "from observability import step",
        "x = obs.step()",
        "obs.step(); x = 1",
        "x = 1; obs.step()",
        "obs.run.step()",
        "obs.step",
        "other.step()",
        "observability.step()",  # the import binds obs
        "return obs.step()",
        "if obs.skip_batch() or x: continue",
        "if obs.skip_batch(): return",
        "if x: obs.step(); continue",
        "if x: continue",
        "while x: obs.step()",
        "with obs.Run(): pass",
        "if obs.ended():",
        "else: obs.step()",
        "# obs.step()",
        "",
    ],
)
def test_any_other_line_with_the_ending_is_its_authors(code):
    data = f"{IMPORT}for x in y:\n    if z: a\n    {code}{MARK}\n    b\n"
    if code.endswith(":"):
        data = data.replace("    b\n", "        b\n")
    assert numbers(data) == [1]


@pytest.mark.parametrize(
    "text",
    [
        'text = """\n{0}"""\n',
        'def f():\n    """Of use.\n\n    {0}    """\n',
        "text = f'''\n{{x}}\n{0}'''\n",
        "call(\n{0})\n",
        "x = [\n    1,\n    {0}]\n",
        "x = y + \\\n{0}",
        "    \\\n{0}",
        "x = 1; \\\n{0}",
        "'a'; '''\n'''; {0}",
    ],
)
def test_inside_a_string_a_bracket_or_a_continued_line_nothing_is_marked(text):
    assert numbers(IMPORT + text.format(STEP)) == [1]
    assert numbers(f"{IMPORT}{text.format(STEP)}{STEP}")[-1] == text.format(STEP).count("\n") + 2


def test_a_comment_that_ends_in_a_backslash_continues_nothing():
    assert numbers(f"{IMPORT}# a \\\n{STEP}") == [1, 3]


@pytest.mark.parametrize("imported", ["", "import observability as obs\n", f"import obs{MARK}\n"])
def test_without_a_marked_import_a_call_is_its_authors(imported):
    assert numbers(imported + STEP) == []


def test_the_full_name_is_ours_where_the_import_binds_it():
    assert numbers(f"import observability{MARK}\n{STEP}observability.step(){MARK}\n") == [1, 3]


# --- Adding and taking out ------------------------------------------------------------------------

# Whole statements of an author's, and parts of one; each line may end in the marker.
PIECES = [
    "x = 1\n",
    f"k = 1{MARK}\n",
    "#\n",
    f"#{MARK}\n",
    "\n",
    "\x0c\n",
    "y = \\\n  1\n",
    f"call(\n{STEP})\n",
    f'"""\n{STEP}"""\n',
    f"y = 1 + \\\n  2{MARK}\n",
    "s = '\u00e9 \u2028 \x1c'\n",
    "if x:\n    y\nelse:\n\tz\n",
    "\x0cdef f():\n    return 2\n",
    "obs.step()\n",
    "obs.step()  #observability\n",
    f"import logging{MARK}\n",
]
ADDED = [IMPORT.rstrip(), STEP.rstrip(), f"if x: obs.step(){MARK}", f"k = obs.resume(k=k){MARK}"]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=7),
    st.lists(st.tuples(st.integers(0, 7), st.sampled_from(ADDED)), min_size=1, max_size=4),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.booleans(),
    st.booleans(),
)
def test_what_is_woven_in_comes_out_again_byte_for_byte(pieces, places, eol, mark, ended):
    text = "".join(pieces) + ("" if ended else "last = 1")
    data = b"\xef\xbb\xbf" * mark + text.replace("\n", eol).encode()
    starts = [1 + "".join(pieces[:at]).count("\n") for at in range(len(pieces) + 1)]
    added: dict[int, list[str]] = {starts[0]: [ADDED[0]]}
    for place, line in places:
        added.setdefault(starts[min(place, len(pieces))], []).append(line)
    result = lines.weave(data, added, "train.py")
    assert lines.reverse(result) == data
    assert len(lines.marked_numbers(result)) == 1 + len(places)
    patch = lines.pin(data, result, "train.py")
    if parses(result):
        assert lines.apply_pinned(data, patch, "train.py") == result
    assert not [row for row in patch.split("\n") if row.startswith("-") and row[:3] != "---"]


def parses(source: bytes) -> bool:
    return not lines.parse_error(source, 0)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_are_refused_or_come_back(data, ours):
    data += (b"\n" + IMPORT.encode()) * ours
    try:
        rest = lines.reverse(data)
    except lines.PatchError:
        return
    assert rest == data or (ours and data.startswith(rest.rstrip(b"\n\r")))
    assert lines.reverse(rest) == rest


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("# coding: latin-1\nx = 'caf\u00e9'\n{}l\u00f6ss = 1\n", "latin-1"),
        ("# coding: shift_jis\nx = '\u8868'\n{}l\u8868 = 1\n", "shift_jis"),
        ("# coding: cp1251\nx = '\u043f'\n{}", "cp1251"),
        ("x = '\u8868'\n\n{}", "utf-8-sig"),
    ],
)
def test_lines_stand_in_the_encoding_of_the_file(text, encoding):
    data = text.format("").encode(encoding)
    row = f"l{chr(0xF6)}ss = obs.resume(x=1){MARK}" if encoding == "latin-1" else STEP.rstrip()
    result = lines.weave(data, {3: [IMPORT.rstrip(), row]}, "train.py")
    assert result == text.format(f"{IMPORT}{row}\n").encode(encoding)
    assert lines.reverse(result) == data
    assert lines.apply_pinned(data, lines.pin(data, result, "a.py"), "a.py") == result


def test_a_line_that_does_not_fit_the_encoding_is_refused():
    with pytest.raises(lines.PatchError, match="does not fit its encoding"):
        lines.weave(b"# coding: ascii\n", {2: [f"obs.step('\u00e9'){MARK}"]}, "train.py")


def test_mixed_line_ends_do_not_run_together():
    data = b"a = 1\ra = 2\n\nb = 2\r\n\rc"
    added = {number: [IMPORT.rstrip(), STEP.rstrip()] for number in range(1, 8)}
    assert lines.reverse(lines.weave(data, added, "train.py")) == data


def test_a_line_that_would_not_come_out_again_is_not_woven_in():
    for line in ("x = 1", f"x = 1{MARK}", STEP.rstrip()):  # the last lacks its import
        with pytest.raises(lines.PatchError, match="cannot be taken back"):
            lines.weave(b"y = 1\n", {1: [line]}, "train.py")


def test_a_line_beyond_the_end_of_the_script_is_refused():
    with pytest.raises(lines.PatchError, match="has no line 4"):
        lines.weave(b"a\nb\n", {4: [IMPORT.rstrip()]}, "train.py")


# --- The command ----------------------------------------------------------------------------------

SCRIPT = f"import torch\n{IMPORT}for x in y:\n    k = 1{MARK}\n    {STEP}"
REVERSED = f"import torch\nfor x in y:\n    k = 1{MARK}\n"


def reverse(path: Path):
    return python(TOOL, path, "--reverse")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def test_reverse_takes_out_ours_and_leaves_the_authors(script):
    done = reverse(script)
    assert (done.returncode, "2 lines taken out" in done.stdout) == (0, True)
    assert script.read_text() == REVERSED
    assert "nothing to take out" in reverse(script).stdout


@pytest.mark.parametrize(
    "tail",
    [
        "x = 'open\n",
        'x = """open\n',
        "call(\n",
        "\x00\n",
        "!pip install torch 'nightly\n",
        "if x:\n        a\n    b\n",
    ],
)
def test_what_cannot_be_read_is_left_as_it_was_with_a_sentence(script, tail):
    before = (SCRIPT + tail).encode()
    script.write_bytes(before)
    done = reverse(script)
    assert (done.returncode, "cannot be read" in done.stderr) == (2, True)
    assert "Traceback" not in done.stderr
    assert script.read_bytes() == before


@pytest.mark.parametrize(
    "tail", ["print 'two'\n", "%matplotlib inline\n", "\x0cx = 1\n", "x = = 1\n", "exec 'x' in {}"]
)
def test_what_has_whole_lines_is_reversed_though_it_may_not_parse(script, tail):
    script.write_text(SCRIPT + tail)
    assert reverse(script).returncode == 0
    assert script.read_text() == REVERSED + tail


@pytest.mark.parametrize("data", [b"\x00\xff\xfe", b"# coding: nope\nx = 1\n", b"x = 'open\n"])
def test_where_nothing_ends_in_the_marker_there_is_nothing_to_take_out(script, data):
    script.write_bytes(data)
    done = reverse(script)
    assert (done.returncode, "nothing to take out" in done.stdout) == (0, True)
    assert script.read_bytes() == data


@pytest.mark.parametrize("tail", [f"if x:\n    {STEP}y\n", f"def f():\n    {STEP}"])
def test_a_block_is_not_left_empty(script, tail):
    script.write_text(SCRIPT + tail)
    done = reverse(script)
    assert (done.returncode, "nothing but a marked line" in done.stderr) == (2, True)
    assert script.read_text() == SCRIPT + tail


def test_a_large_file_is_read_in_a_moment(script):
    text = SCRIPT + "x = call(1, 'two', [3])  # and so on\n" * 60_000
    script.write_text(text)
    assert reverse(script).returncode == 0
    assert script.read_text() == text.replace(SCRIPT, REVERSED)


@pytest.mark.parametrize("option", ["--reverse", "--write", "--check", "--pin"])
def test_a_file_of_ten_megabytes_is_no_script(script, option):
    script.write_text(SCRIPT + "x = 1\n" * 1_700_000)
    done = python(TOOL, script, option)
    assert (done.returncode, "no training script" in done.stderr) == (2, True)
    assert script.stat().st_size > 10_000_000


@pytest.mark.parametrize("option", ["--reverse", "--write"])
def test_a_read_only_file_is_left_as_it_was(script, option):
    shape = (ROOT / "tests/shapes/nested_main.py").read_text()
    before = SCRIPT if option == "--reverse" else shape
    script.write_text(before)
    script.chmod(0o444)
    done = python(TOOL, script, option)
    assert (done.returncode, "it is read-only" in done.stderr) == (2, True)
    assert script.read_text() == before
    assert os.listdir(script.parent) == ["train.py"]


def test_through_a_link_the_file_behind_it_is_written_and_the_link_stays(script, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    script.write_bytes((ROOT / "tests/shapes/nested_main.py").read_bytes())
    before = script.read_bytes()
    link = folder / "link.py"
    link.symlink_to(script)
    assert python(TOOL, link, "--write").returncode == 0
    assert lines.marked_numbers(script.read_bytes())
    assert os.listdir(folder) == ["link.py"]
    assert reverse(script).returncode == 0
    assert (script.read_bytes(), link.is_symlink()) == (before, True)
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "observability.py", "train.py"]


def test_a_write_that_fails_leaves_nothing_behind(script):
    with pytest.raises(lines.PatchError, match="cannot write"):
        write(script.parent / "gone.py", b"")
    assert os.listdir(script.parent) == ["train.py"]


def test_a_backup_is_found_again_whatever_the_name_is(tmp_path):
    path = tmp_path / "a[1]*.py"
    path.write_text("x")
    (tmp_path / "a[1]*.py.before-observability").mkdir()
    saved, fresh = backup(path, b"x")
    assert (saved.name, fresh) == ("a[1]*.py.before-observability-2", True)
    assert backup(path, b"x") == (saved, False)
    drop_backup(path, b"y")
    assert saved.exists()
    drop_backup(path, b"x")
    assert not saved.exists()


def test_one_module_alone_says_what_a_marked_line_is():
    for path in (ROOT / "patches").glob("*.py"):
        found = [
            n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)
        ]
        assert lines.MARK not in found or path.name == "lines.py"
