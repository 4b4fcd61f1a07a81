"""Where the headlines come from: made here, read from a file, or fetched from the hub.

    TITLES unset    made by a seeded grammar: offline, the same text on every machine
    TITLES=PATH     a UTF-8 text file, plain or .gz, a title a line
    TITLES=hub      the Hacker News titles of the published run (needs `pip install datasets`)

Integers alone decide what the grammar writes, so no Python version and no CPU changes it.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

__all__ = ["Titles", "TitlesError", "is_published", "load", "make_titles"]

HUB_DATASET = "julien040/hacker-news-posts"
# The data set was refreshed after the published run; only this revision has its titles.
HUB_REVISION = "d210f96ddcc592f324c3108dd1d7b7edc03ca788"
PUBLISHED_TOKENS = 1_102_455
PUBLISHED_BATCHES = 134
FEWEST = 10  # below this, the last tenth that validates is empty


class TitlesError(Exception):
    """The titles cannot be had or cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Titles:
    """Titles in their order, and where they came from."""

    lines: list[str]
    source: str

    @property
    def sha256(self) -> str:
        """Digest of the titles as UTF-8 lines: equal exactly when the text is."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()


def load(where: str, count: int, seed: int) -> Titles:
    """The first `count` titles from `where`: "" makes them, "hub" fetches them, else a path.

    A file with fewer is taken whole. Raises TitlesError.
    """
    if not where:
        return Titles(make_titles(count, seed), "embedded")
    if where == "hub":
        return Titles(_fetch_titles(count, seed), f"{HUB_DATASET}@{HUB_REVISION[:12]}")
    path = Path(where).expanduser()
    return Titles(_read_titles(path, count), path.name)


def is_published(tokens: int, batches: int) -> bool:
    """Whether this many training tokens and batches an epoch are those of the published run."""
    return (tokens, batches) == (PUBLISHED_TOKENS, PUBLISHED_BATCHES)


# --- From a file and from the hub ---------------------------------------------------------


def _read_titles(path: Path, count: int) -> list[str]:
    lines = _read_bytes(path).removesuffix(b"\n").split(b"\n")[:count]
    titles = [_decode(line, path, number) for number, line in enumerate(lines, 1)]
    if len(titles) < FEWEST:
        raise TitlesError(
            f"{path} has {len(titles)} titles; give a file with at least {FEWEST}, one a line"
        )
    return titles


def _read_bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except FileNotFoundError:
        raise TitlesError(
            f"there is no file {path}; correct TITLES, or unset it to use the embedded titles"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise TitlesError(f"cannot read {path}: {error}; check the file named by TITLES") from error


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        title = line.decode().strip()
    except UnicodeDecodeError as error:
        raise TitlesError(
            f"{path}, line {number}: byte {error.start + 1} is not UTF-8; convert the file first, "
            f"for example with: iconv -f latin1 -t utf-8 {path.name}"
        ) from None
    if not title:
        raise TitlesError(f"{path}, line {number} is empty; delete it, every line is a title")
    return title


def _fetch_titles(count: int, seed: int) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise TitlesError(
            "TITLES=hub needs the package `datasets`; run: pip install datasets, "
            "or unset TITLES to use the embedded titles"
        ) from None
    try:
        rows = load_dataset(HUB_DATASET, revision=HUB_REVISION, split="train")
    except Exception as error:  # a stranger's code: what it raises without network varies
        raise TitlesError(
            f"cannot fetch {HUB_DATASET} at {HUB_REVISION[:12]}: {error}; check the network, "
            "or give a file with TITLES=PATH"
        ) from error
    shuffled = rows.shuffle(seed=seed)
    return [title.strip() for title in shuffled.select(range(min(count, len(rows))))["title"]]


# --- Made here ----------------------------------------------------------------------------
#
# A title is a template whose {slots} are filled with words. A few common words lead each
# list and thousands of composed ones follow; the word of rank r is drawn with weight
# 1 / (r + 3), as in natural text. Half of a title's nouns come from its topic's share of
# the list, so that words tell something about each other and not only about themselves.

TOPICS = 12

TEMPLATES = """
12 {adj} {nouns} {for} {noun} {nouns}
9 {Name} {does} {adj} {noun} {for} {nouns}
8 Show HN: {Product}, {a} {adj} {noun} {for} {nouns}
6 Show HN: {a} {noun} {noun} {in} {tool}
6 Ask HN: how do you {do} your {noun} {nouns}?
5 Ask HN: what is the {most} {adj} {noun} of {year}?
7 Why {nouns} {dont} {do} {nouns}
6 Why {Name} {does} its {noun} {nouns}
5 How {Name} {did} {number} {nouns} with {tool}
5 How to {do} {a} {noun} {for} {adj} {nouns}
6 {Name} {did} {Name} over {adj} {noun} {nouns}
6 {tool} {version} released with {adj} {nouns}
5 The {adj} {noun} that {did} the {noun}
5 The {noun} of {adj} {nouns} ({year})
4 {number} {nouns} every {noun} should {do}
4 {a} {adj} introduction to {noun} {nouns} ({year}) [pdf]
4 {Product}: {adj} {nouns} {in} {tool} [pdf]
4 {do} {nouns} with {tool} and {tool}
4 {Name} {does} {number} {nouns}, {does} {noun}
3 {Product} is {a} {adj} {noun} {in} {tool}
3 Is {noun} the new {noun}?
3 {Name} v. {Name}: the {noun} of {nouns} ({year}) [video]
"""

NOUNS = """code startup web app network browser language security API database service
engine model system phone market search game machine privacy design kernel compiler team cloud
server library chip company framework bug attack law file patent battery robot paper protocol
tool editor city bank developer test user trade energy camera car algorithm brain virus course
book museum satellite telescope climate economy job salary culture password terminal graph
parser cache thread query container cluster sensor driver signal job queue memory"""

VERBS = """use learn start scale fix replace deploy test open train measure hack kill secure
protect fund launch trust block move solve patch trace need power watch publish explain"""

ADJECTIVES = """open new fast simple free small better modern distributed secure functional
private static local real hidden tiny deep cheap quantum digital broken human future secret
realtime minimal lightweight beautiful decentralized wireless portable visual automatic"""

NAMES = """Google Apple Facebook Amazon Microsoft Twitter GitHub Uber Tesla Netflix Mozilla
Intel China NASA Airbnb Europe Stripe Dropbox Samsung Wikipedia Reddit IBM Oracle Boeing
Germany Japan London India Berlin California Sweden Cloudflare Debian"""

TOOLS = """Python JavaScript Rust Go C Linux Docker PostgreSQL Haskell Clojure Ruby Java Lisp
Kubernetes TypeScript Erlang SQLite Redis Emacs Vim CUDA Scala Swift OCaml WebAssembly"""

# Parts of composed words; "-" is no part at all.
ONSETS = "b br c ch cl d dr f fl g gr h j k l m n p pl pr qu r s sc st str t th tr v w z"
NUCLEI = "a e i o u ai ea io ou"
CODAS = "- l m n r s t x nd nt rk st ct"
NOUN_ENDINGS = "- er ism ity ment or ware tion ology graph"
VERB_ENDINGS = "- ate ify ize en"
ADJECTIVE_ENDINGS = "al ic ive ous able less y ed"
NAME_ENDINGS = "- ia ton berg ova son land ex"
PRODUCT_ENDINGS = "- .js .io ly DB Kit OS Hub Flow ML"


def make_titles(count: int, seed: int) -> list[str]:
    """`count` headlines from the grammar; the first n of them do not depend on `count`."""
    writer = _Writer(_Random(seed))
    return [writer.title() for _ in range(count)]


class _Random:
    """SplitMix64 (Steele, Lea, Flood 2014): `random` may change between Python versions."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def below(self, limit: int) -> int:
        self._state = state = (self._state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        return (state ^ (state >> 31)) * limit >> 64

    def pick(self, choices: str) -> str:
        """One of the words in `choices`; "-" stands for none."""
        words = choices.split()
        return words[self.below(len(words))].strip("-")


class _Weighted:
    """Draws an index with the given integer weights."""

    def __init__(self, weights: Sequence[int]) -> None:
        self._bounds = list(accumulate(weights))

    def draw(self, random: _Random) -> int:
        return bisect_right(self._bounds, random.below(self._bounds[-1]))


class _Words:
    """A list of words, the common ones first."""

    def __init__(self, common: str, endings: str, size: int, random: _Random) -> None:
        words = dict.fromkeys(common.split())
        while len(words) < size:
            words[_compose(random, endings)] = None
        self._words = list(words)
        self._ranks = _zipf(len(words))
        self._topic_ranks = _zipf(len(words) // TOPICS)

    def draw(self, random: _Random) -> str:
        return self._words[self._ranks.draw(random)]

    def draw_from(self, topic: int, random: _Random) -> str:
        return self._words[self._topic_ranks.draw(random) * TOPICS + topic]


def _zipf(size: int) -> _Weighted:
    return _Weighted([1_000_000_000 // (rank + 3) for rank in range(size)])


def _compose(random: _Random, endings: str) -> str:
    syllables = [_syllable(random) for _ in range(1 + random.below(2))]
    return "".join(syllables) + random.pick(CODAS) + random.pick(endings)


def _syllable(random: _Random) -> str:
    return random.pick(ONSETS) + random.pick(NUCLEI)


class _Writer:
    """Fills templates; `topic` and the number of the last noun are all it remembers."""

    def __init__(self, random: _Random) -> None:
        self._random = random
        self._nouns = _Words(NOUNS, NOUN_ENDINGS, 9000, random)
        self._verbs = _Words(VERBS, VERB_ENDINGS, 1500, random)
        self._adjectives = _Words(ADJECTIVES, ADJECTIVE_ENDINGS, 3000, random)
        self._names = _Words(NAMES, NAME_ENDINGS, 6000, random)
        self._tools = _Words(TOOLS, NAME_ENDINGS, 600, random)
        weights, self._templates = _parse(TEMPLATES)
        self._choice = _Weighted(weights)
        self._topic = 0
        self._fill: dict[str, Callable[[], str]] = {
            "noun": self._noun,
            "nouns": lambda: _plural(self._noun()),
            "do": lambda: self._verbs.draw(random),
            "does": lambda: _plural(self._verbs.draw(random)),
            "did": lambda: _past(self._verbs.draw(random)),
            "dont": lambda: random.pick("don't can't should never"),
            "adj": lambda: self._adjectives.draw(random),
            "Name": lambda: _capital(self._names.draw(random)),
            "Product": self._product,
            "tool": lambda: _capital(self._tools.draw(random)),
            "version": self._version,
            "year": lambda: str(2020 - _smaller(random, 20)),
            "number": lambda: str(1 + _smaller(random, 100)),
            "for": lambda: random.pick("for for in without and"),
            "in": lambda: random.pick("in in with for"),
            "most": lambda: random.pick("most least"),
            "a": lambda: random.pick("a a the my"),
        }

    def title(self) -> str:
        self._topic = self._random.below(TOPICS)
        pieces = self._templates[self._choice.draw(self._random)]
        # Literals stand at the even places, slots at the odd ones.
        filled = [self._fill[p]() if i % 2 else p for i, p in enumerate(pieces)]
        return _capital("".join(filled))

    def _noun(self) -> str:
        if self._random.below(2):
            return self._nouns.draw_from(self._topic, self._random)
        return self._nouns.draw(self._random)

    def _product(self) -> str:
        return _capital(self._nouns.draw(self._random)) + self._random.pick(PRODUCT_ENDINGS)

    def _version(self) -> str:
        return f"{_smaller(self._random, 12)}.{_smaller(self._random, 30)}"


def _parse(templates: str) -> tuple[list[int], list[list[str]]]:
    rows = [line.split(" ", 1) for line in templates.strip().splitlines()]
    pieces = [text.replace("}", "{").split("{") for _, text in rows]
    return [int(weight) for weight, _ in rows], pieces


def _smaller(random: _Random, limit: int) -> int:
    """Below `limit`, small numbers more often."""
    return random.below(1 + random.below(limit))


def _plural(word: str) -> str:
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh", "z")) else "s")


def _past(word: str) -> str:
    if word.endswith("fy"):
        return word[:-1] + "ied"
    return word + ("d" if word.endswith("e") else "ed")


def _capital(word: str) -> str:
    return word[:1].upper() + word[1:]
