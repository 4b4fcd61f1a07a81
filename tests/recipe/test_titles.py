"""Titles: the same text everywhere, files read as they are, and errors that say what to do."""

import gzip
import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import titles
from titles import TitlesError

MAINRUN = Path(titles.__file__).parent
# Of 8,000 titles with seed 1337; equal on Python 3.10, 3.11, 3.12 and 3.13.
SMALL_SHA256 = "519f61270048aa013092d6421cc959f7fd8c4c28ce0122818f146c4b19d6fc2a"
LINES = [f"title {number} naïve ü" for number in range(20)]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "titles.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


def failure(where: object) -> str:
    with pytest.raises(TitlesError) as caught:
        titles.load(str(where), 100, seed=0)
    return str(caught.value)


# --- Made here ----------------------------------------------------------------------------


def test_embedded_titles_are_the_same_text_on_every_machine():
    assert titles.load("", 8_000, seed=1337).sha256 == SMALL_SHA256


def test_digest_is_of_the_lines_as_utf8():
    made = titles.load("", 5, seed=1)
    assert made.sha256 == hashlib.sha256("\n".join(made.lines).encode()).hexdigest()


@pytest.mark.parametrize("count", [1, 10, 3_000])
def test_first_titles_do_not_depend_on_how_many_are_asked_for(count):
    made = titles.make_titles(count, seed=7)
    assert len(made) == count
    assert made == titles.make_titles(3_000, seed=7)[:count]


def test_another_seed_makes_other_titles():
    assert titles.make_titles(50, seed=1) != titles.make_titles(50, seed=2)


def test_embedded_titles_are_clean_lines_and_hardly_repeat():
    made = titles.make_titles(5_000, seed=3)
    assert all(line and line == line.strip() and "\n" not in line for line in made)
    assert not any(mark in line for line in made for mark in "{}<>")
    assert len(set(made)) > 4_900


def test_vocabulary_is_large_and_heavy_tailed():
    counts = Counter(" ".join(titles.make_titles(20_000, seed=3)).split())
    top = sum(count for _, count in counts.most_common(100))
    assert len(counts) > 15_000
    assert top > 0.4 * counts.total()
    assert sum(count == 1 for count in counts.values()) > 5_000


# --- From a file --------------------------------------------------------------------------


def test_plain_file_is_taken_in_order(plain):
    assert titles.load(str(plain), 100, seed=5).lines == LINES


def test_gzip_file_holds_the_same_titles(plain):
    packed = plain.with_suffix(".txt.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert titles.load(str(packed), 100, 0).sha256 == titles.load(str(plain), 100, 0).sha256


def test_only_the_first_titles_of_a_long_file_are_taken(plain):
    assert titles.load(str(plain), 12, seed=0).lines == LINES[:12]


def test_windows_line_ends_and_a_missing_last_one_do_no_harm(plain):
    plain.write_bytes("\r\n".join(LINES).encode())
    assert titles.load(str(plain), 100, seed=0).lines == LINES


def test_missing_file_is_named(tmp_path):
    message = failure(tmp_path / "none.txt")
    assert "none.txt" in message
    assert "unset it" in message


def test_folder_in_place_of_a_file_is_named(tmp_path):
    assert f"cannot read {tmp_path}" in failure(tmp_path)


@pytest.mark.parametrize("blank", [b"", b"   ", b"\r"])
def test_empty_line_is_named_by_its_number(plain, blank):
    lines = plain.read_bytes().split(b"\n")
    lines[6] = blank
    plain.write_bytes(b"\n".join(lines))
    assert "line 7 is empty; delete it" in failure(plain)


def test_bytes_that_are_not_utf8_are_named_by_line(plain):
    lines = plain.read_bytes().split(b"\n")
    lines[3] = "naïve".encode("latin-1")
    plain.write_bytes(b"\n".join(lines))
    message = failure(plain)
    assert "line 4: byte 3 is not UTF-8" in message
    assert "iconv" in message


@pytest.mark.parametrize("count", [1, 9])
def test_too_few_titles_are_counted(plain, count):
    plain.write_text("\n".join(LINES[:count]))
    assert f"has {count} titles" in failure(plain)


def test_empty_file_is_refused(plain):
    plain.write_bytes(b"")
    assert "line 1 is empty" in failure(plain)


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_torn_gzip_is_named(plain, keep):
    packed = gzip.compress(plain.read_bytes())
    torn = plain.with_suffix(".gz")
    torn.write_bytes(packed[: int(len(packed) * keep)] or b"no gzip at all")
    assert f"cannot read {torn}" in failure(torn)


# --- From the hub, and what is published --------------------------------------------------


def test_hub_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # the import then fails as without it
    assert "pip install datasets" in failure("hub")


def test_hub_package_is_imported_only_when_asked_for():
    code = "import sys, titles; titles.load('', 10, 0); assert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=MAINRUN, check=True)


@pytest.mark.parametrize(
    ("tokens", "batches", "published"),
    [(1_102_455, 134, True), (1_168_720, 142, False), (1_102_454, 134, False)],
)
def test_published_data_is_known_by_its_tokens_and_batches(tokens, batches, published):
    assert titles.is_published(tokens, batches) is published
