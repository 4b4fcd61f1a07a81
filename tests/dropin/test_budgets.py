"""The house is small enough to be read: how many lines, how long, how deep, how many at once.

Lines are lines of code: blanks, comments and docstrings are welcome and do not count.
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest
from conftest import MAINRUN, ROOT

DROP_IN, TOOLS = MAINRUN / "observability.py", MAINRUN / "observability_tools.py"

# What each may come to at most; behind it, what is asked for where that is not reached yet.
LINES = {
    "Part I": 1753,  # 650
    "Part II": 1731,  # 650
    "observability.py": 3484,  # 1300
    "observability_tools.py": 911,  # 600
}
MEDIAN = 8  # lines of a function
NINE_IN_TEN = 20
LONGEST = 45
# Of a function: how many statements that hold others lie in one another.
NESTING = 3
# Of a class.
ATTRIBUTES = 15
# Handlers of whatever is raised.
BROAD = 8
COMMENTS = 0.15  # of the lines that are not blank at least so many have words
FORMATTER_REMARKS = 20  # lines of the whole tree; 5

FILES = {path.name: path for path in (DROP_IN, TOOLS)}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
HOLDS_OTHERS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


class Source(NamedTuple):
    """A file of ours, and which of its lines are code and which are words."""

    text: str
    tree: ast.Module
    code: frozenset[int]
    comments: dict[int, str]
    docstrings: frozenset[int]

    def size(self, first: int, last: int) -> int:
        return sum(first <= line <= last for line in self.code)


@cache
def source(name: str) -> Source:
    text = FILES[name].read_text(encoding="utf-8")
    tree = ast.parse(text)
    docstrings = {line for node in ast.walk(tree) for line in docstring_lines(node)}
    code, comments = set[int](), dict[int, str]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string
        elif token.type not in LAYOUT:
            code.update(range(token.start[0], token.end[0] + 1))
    return Source(text, tree, frozenset(code - docstrings), comments, frozenset(docstrings))


def docstring_lines(node: ast.AST) -> range:
    body = getattr(node, "body", None)
    if not isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) or not body:
        return range(0)
    first = body[0]
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    if not is_text or not isinstance(first.value.value, str):
        return range(0)
    return range(first.lineno, first.end_lineno + 1)


def functions(tree: ast.AST, within: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        name = f"{within}{getattr(node, 'name', '')}"
        if isinstance(node, FUNCTIONS):
            yield name, node
        inside = f"{name}." if isinstance(node, (ast.ClassDef, *FUNCTIONS)) else within
        yield from functions(node, inside)


def lengths(name: str) -> dict[str, int]:
    """Of each function, from its `def` to its end, by its path."""
    file = source(name)
    return {path: file.size(node.lineno, node.end_lineno) for path, node in functions(file.tree)}


def nesting(node: ast.AST) -> int:
    """How deep statements lie within statements; functions within it are looked at apart."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, *FUNCTIONS)):
            continue
        goes_on = isinstance(node, ast.If) and node.orelse == [child]  # an elif
        deeper = isinstance(child, HOLDS_OTHERS) and not goes_on
        deepest = max(deepest, nesting(child) + deeper)
    return deepest


def attributes(node: ast.AST) -> set[str]:
    """What is assigned to `self` there."""
    found = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store):
            found |= {each.attr} if ast.unparse(each.value) == "self" else set()
    return found


def fields(node: ast.ClassDef) -> set[str]:
    """Of a dataclass or a named tuple."""
    annotated = [each for each in node.body if isinstance(each, ast.AnnAssign)]
    return {each.target.id for each in annotated if "ClassVar" not in ast.unparse(each.annotation)}


def classes(name: str) -> list[ast.ClassDef]:
    return [node for node in ast.walk(source(name).tree) if isinstance(node, ast.ClassDef)]


def broad_handlers(name: str) -> list[int]:
    """The lines of `except Exception` and of what comes to the same."""
    broad, found = {"Exception", "BaseException"}, []
    for node in ast.walk(source(name).tree):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.walk(node.type) if node.type else [ast.Name("Exception")]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            caught = [each for argument in node.args for each in ast.walk(argument)]
        else:
            continue
        if any(isinstance(each, ast.Name) and each.id in broad for each in caught):
            found.append(node.lineno)
    return sorted(found)


def sizes() -> dict[str, int]:
    drop_in = source(DROP_IN.name)
    rows = drop_in.text.splitlines()
    [second] = [at for at, row in enumerate(rows, 1) if row.startswith("# Part II:")]
    return {
        "Part I": drop_in.size(1, second - 1),
        "Part II": drop_in.size(second, len(rows)),
        DROP_IN.name: drop_in.size(1, len(rows)),
        TOOLS.name: source(TOOLS.name).size(1, sys.maxsize),
    }


# --- The budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", LINES)
def test_a_part_is_short_enough_to_be_read(part):
    assert sizes()[part] <= LINES[part]


def test_the_second_part_says_when_nothing_of_it_runs():
    sentence = "# Part II: checkpoints. Nothing below runs unless saving or resuming is on."
    assert sentence in source(DROP_IN.name).text.splitlines()


@pytest.mark.parametrize("name", FILES)
def test_functions_are_short(name):
    found = sorted(lengths(name).values())
    assert statistics.median(found) <= MEDIAN
    assert found[int(0.9 * len(found))] <= NINE_IN_TEN
    assert {path: size for path, size in lengths(name).items() if size > LONGEST} == {}


@pytest.mark.parametrize("name", FILES)
def test_statements_lie_in_one_another_no_deeper_than_can_be_followed(name):
    found = {path: nesting(node) for path, node in functions(source(name).tree)}
    assert {path: depth for path, depth in found.items() if depth > NESTING} == {}


@pytest.mark.parametrize("name", FILES)
def test_a_class_has_few_attributes(name):
    found = {node.name: len(attributes(node) | fields(node)) for node in classes(name)}
    assert {path: count for path, count in found.items() if count > ATTRIBUTES} == {}


@pytest.mark.parametrize("name", FILES)
def test_every_attribute_is_there_from_the_start(name):
    for node in classes(name):
        begins = [each for each in node.body if getattr(each, "name", "") == "__init__"]
        first = set().union(*map(attributes, begins))
        assert attributes(node) - first == set(), node.name


@pytest.mark.parametrize("name", FILES)
def test_broad_handlers_are_few_and_each_says_whom_it_fences(name):
    found = broad_handlers(name)
    assert len(found) <= BROAD
    assert [line for line in found if line not in source(name).comments] == []


@pytest.mark.parametrize("name", FILES)
def test_there_are_words_beside_the_code(name):
    file = source(name)
    rows = file.text.splitlines()
    share = len({*file.docstrings, *file.comments}) / sum(bool(row.strip()) for row in rows)
    assert share >= COMMENTS


# --- What the house is built of -------------------------------------------------------------------


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {each.name.partition(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_the_drop_in_needs_the_standard_library_and_torch():
    """wandb and nvidia-ml-py are asked for where they are switched on, the tools where they lie."""
    others = imported(source(DROP_IN.name).tree) - sys.stdlib_module_names
    assert others == {"torch", "wandb", "pynvml", "observability_tools"}


def test_no_other_file_of_the_product_uses_a_private_name_of_the_drop_in():
    folders = ("mainrun", "patches")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                is_ours = node.value.id in ("obs", "observability")
                assert not (is_ours and node.attr.startswith("_")), (path, node.lineno)


@pytest.mark.parametrize("name", FILES)
def test_no_module_is_written_into_and_no_default_remembers(name):
    for node in ast.walk(source(name).tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("globals", "vars"):
            assert ast.unparse(node.func) != "globals", node.lineno
        for default in getattr(getattr(node, "args", None), "defaults", ()) or ():
            assert not isinstance(default, (ast.List, ast.Dict, ast.Set)), node.lineno


@pytest.mark.parametrize("name", FILES)
def test_no_two_names_differ_by_an_underscore_or_a_letter(name):
    """Of a module's functions and classes: whoever reads one must not take it for the other."""
    tree = source(name).tree
    names = [n.name for n in tree.body if isinstance(n, (ast.ClassDef, *FUNCTIONS))]
    assert len(names) == len(set(names))
    plain = [each.strip("_").lower() for each in names]
    assert sorted({each for each in plain if plain.count(each) > 1}) == []


def test_the_formatter_is_the_law():
    remark = "# " + "fmt:"
    tree = (
        path for part in ("mainrun", "patches", "tests") for path in (ROOT / part).rglob("*.py")
    )
    found = [path for path in tree for row in path.open(encoding="utf-8") if remark in row]
    assert len(found) <= FORMATTER_REMARKS
