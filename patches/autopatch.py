"""Add the observability call sites to a PyTorch training script, or take them away again.

    python autopatch.py train.py              print the diff; nothing is written
    python autopatch.py train.py --write      apply it, keep a backup, copy observability.py to it
    python autopatch.py train.py --reverse    give back the original, byte for byte
    python autopatch.py train.py --check      what was found, how surely, and what was left out
    python autopatch.py train.py --only log,resume
    python autopatch.py train.py --patch FILE     apply a ready patch, pinned by sha256

It reads the script's syntax tree and runs nothing. It only adds whole lines, each ending in
`# observability`; the script without them is the original. An added line uses names that are
certainly bound where it stands, calls no function of the script, reads no batch, and turns the
flow nowhere but in the guards `if obs.skip_epoch(): continue`, `if obs.skip_batch(): continue`.
Where that cannot be kept, the line is left out and said, with its number and the reason.

Exit status: 0 found, 1 nothing to patch in this file (it says where to look), 2 cannot do it.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

__all__ = ["Insertion", "PatchError", "Plan", "Script", "apply_pinned", "plan", "reverse"]

MARK = "# observability"
PARTS = ("log", "validation", "resume")
# Within one line of the original, what is added keeps this order.
ORDER = {
    "import": 0,
    "init": 1,
    "watch": 2,
    "skip": 3,
    "resume": 4,
    "validation": 5,
    "step": 6,
    "finish": 7,
}
OURS = re.compile(
    r"\s*(?:import observability\b|(?:if .*: |[\w.,\s]+ = )?(?:obs|observability)\.\w+\(|"
    r"if (?:obs|observability)\.skip_\w+\()"
)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Scope = ast.Module | ast.FunctionDef | ast.AsyncFunctionDef
Loop = ast.For | ast.AsyncFor | ast.While
LOOPS = (ast.For, ast.AsyncFor, ast.While)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
EXITS = (ast.Break, ast.Continue, ast.Return)


class PatchError(Exception):
    """The script cannot be read, patched or written; nothing was changed."""


class NothingToPatch(PatchError):
    """The file holds no training loop of its own."""


@dataclass(frozen=True)
class Insertion:
    """One added line: it goes before line `line` of the original (1-based)."""

    line: int
    indent: str
    kind: str
    code: str
    part: str
    why: str
    confidence: str = "sure"


@dataclass(frozen=True)
class Note:
    """Something that was left out or is doubtful: where and why."""

    line: int
    text: str


@dataclass
class Plan:
    """What is to be added to a script, what was found, and what was not."""

    insertions: list[Insertion] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    parts: dict[str, str] = field(default_factory=dict)

    def note(self, where: ast.AST | int, text: str) -> None:
        line = where if isinstance(where, int) else getattr(where, "lineno", 1)
        if Note(line, text) not in self.notes:
            self.notes.append(Note(line, text))


@dataclass(frozen=True)
class Spot:
    """A place between two statements of one block: before `block[index]`, or at its end."""

    block: list[ast.stmt]
    index: int


@dataclass(frozen=True)
class Binding:
    """One assignment of one name: its value, and which part of it when a tuple is taken apart."""

    name: str
    value: ast.expr
    index: int | None
    stmt: ast.stmt
    scope: Scope


# --- The script ------------------------------------------------------------------------------
class Script:
    """A parsed script: its lines, who contains whom, who binds and who calls what."""

    def __init__(self, data: bytes, name: str = "train.py") -> None:
        self.data, self.name = data, name
        self.rows = split_lines(data)
        text = self._decode()
        self.source = "".join(line.rstrip("\r\n") + "\n" for line in _text_lines(text))
        self.tree = self._parse()
        self.nodes = list(walk(self.tree))
        self.parent: dict[ast.AST, ast.AST] = {}
        self.home: dict[ast.stmt, Spot] = {}
        self.calls: list[ast.Call] = []
        self.functions: list[Function] = []
        self._index()
        self.logical = self._logical_lines()
        self.imports = self._imports()
        self.bindings: dict[str, list[Binding]] = {}
        for node in self.nodes:
            for binding in self._bindings_of(node):
                self.bindings.setdefault(binding.name, []).append(binding)

    def _decode(self) -> str:
        try:
            self.encoding, _ = tokenize.detect_encoding(io.BytesIO(self.data).readline)
            text = self.data.decode(self.encoding)
        except (SyntaxError, UnicodeDecodeError, LookupError) as error:
            raise PatchError(f"{self.name}: cannot be read as text: {error}") from error
        if len(_text_lines(text)) != len(self.rows):
            raise PatchError(f"{self.name}: its encoding {self.encoding} hides line ends")
        return text

    def _parse(self) -> ast.Module:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse(self.source, self.name)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = getattr(error, "lineno", None) or 1
            version = ".".join(map(str, sys.version_info[:2]))
            raise PatchError(
                f"{self.name}:{line}: Python {version} cannot parse this script ({error}); if it "
                f"needs another Python, run autopatch.py with that one"
            ) from error

    def _index(self) -> None:
        for node in self.nodes:
            for child in children(node):
                self.parent[child] = node
            for block in blocks(node):
                for index, stmt in enumerate(block):
                    self.home[stmt] = Spot(block, index)
            if isinstance(node, ast.Call):
                self.calls.append(node)
            elif isinstance(node, FUNCTIONS):
                self.functions.append(node)

    def _logical_lines(self) -> dict[int, tuple[int, int]]:
        """Physical line -> first and last line of the logical line that it belongs to."""
        lines: dict[int, tuple[int, int]] = {}
        skip = {tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT}
        first = 0
        try:
            for token in tokenize.generate_tokens(io.StringIO(self.source).readline):
                if token.type == tokenize.NEWLINE:
                    span = (first or token.start[0], token.end[0])
                    lines.update(dict.fromkeys(range(span[0], span[1] + 1), span))
                    first = 0
                elif token.type not in skip and not first:
                    first = token.start[0]
        except (tokenize.TokenError, SyntaxError) as error:
            raise PatchError(f"{self.name}: cannot be cut into lines: {error}") from error
        return lines

    def _imports(self) -> dict[str, str]:
        table: dict[str, str] = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    table[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    base = "." * node.level + (node.module or "")
                    table[alias.asname or alias.name] = f"{base}.{alias.name}".lstrip(".")
        return table

    def _bindings_of(self, node: ast.AST) -> Iterator[Binding]:
        if isinstance(node, ast.Assign):
            places: list[ast.expr] = node.targets
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.NamedExpr)):
            places = [node.target]
        else:
            return
        value = node.value
        if value is None:  # `x: int`
            return
        stmt = self.stmt_of(node)
        for target in places:
            for name, part, index in unpack(target, value):
                yield Binding(name, part, index, stmt, self.scope_of(stmt))

    # -- where things are
    def stmt_of(self, node: ast.AST) -> ast.stmt:
        while not (isinstance(node, ast.stmt) and node in self.home):
            node = self.parent[node]
        return node

    def scope_of(self, node: ast.AST) -> Scope:
        """The function whose code `node` is, or the module."""
        while node in self.parent:
            node = self.parent[node]
            if isinstance(node, FUNCTIONS):
                return node
        return self.tree

    def class_of(self, scope: ast.AST) -> ast.ClassDef | None:
        parent = self.parent.get(scope)
        return parent if isinstance(parent, ast.ClassDef) else None

    def above(self, node: ast.AST) -> Iterator[ast.AST]:
        """The nodes around `node`, from the inside, up to its own function."""
        while node in self.parent:
            node = self.parent[node]
            if isinstance(node, (*FUNCTIONS, ast.Lambda, ast.Module)):
                return
            yield node

    def inside(self, node: ast.AST, outer: ast.AST) -> bool:
        while node is not outer and node in self.parent:
            node = self.parent[node]
        return node is outer

    def loops_around(self, node: ast.AST) -> list[Loop]:
        found: list[Loop] = []
        child = node
        for parent in self.above(node):
            # The iterable and the `else` of a loop run once, not once an iteration.
            if isinstance(parent, LOOPS) and (
                child in parent.body or (isinstance(parent, ast.While) and child is parent.test)
            ):
                found.append(parent)
            child = parent
        return found

    def resolve(self, expr: ast.expr) -> str:
        """The dotted name of an expression with the import aliases undone, or ''."""
        name = dotted(expr)
        head, _, rest = name.partition(".")
        head = self.imports.get(head, head)
        return f"{head}.{rest}" if rest else head

    def callers(self, function: Function) -> list[ast.Call]:
        owner = self.class_of(function)
        return [
            call
            for call in self.calls
            if self.scope_of(call) is not function and self._calls(call, function, owner)
        ]

    def _calls(self, call: ast.Call, function: Function, owner: ast.ClassDef | None) -> bool:
        func = call.func
        if isinstance(func, ast.Name):
            return owner is None and func.id == function.name
        if owner is None or not isinstance(func, ast.Attribute) or func.attr != function.name:
            return False
        if dotted(func.value) == "self":
            scope = self.scope_of(call)
            return any(self.class_of(s) is owner for s in (scope, self.scope_of(scope)))
        makers = [b.value for b in self.bindings.get(dotted(func.value), [])] + [func.value]
        return any(isinstance(m, ast.Call) and last(dotted(m.func)) == owner.name for m in makers)

    def definition(self, call: ast.Call) -> Function | None:
        return next(
            (
                f
                for f in self.functions
                if f.name == last(dotted(call.func)) and self._calls(call, f, self.class_of(f))
            ),
            None,
        )

    # -- where a line can be added
    def own_line(self, stmt: ast.stmt) -> bool:
        """Whether `stmt` starts its own line (it is not behind a `;` or a one-line `if x:`)."""
        row = self.source_row(first_line(stmt))
        span = self.logical[first_line(stmt)]
        col = min([stmt.col_offset, *(d.col_offset for d in getattr(stmt, "decorator_list", []))])
        return span[0] == first_line(stmt) and not row.encode()[:col].strip(b" \t\f@")

    def source_row(self, line: int) -> str:
        return self._source_rows[line - 1]

    @cached_property
    def _source_rows(self) -> list[str]:
        return self.source.split("\n")

    def indent_of(self, block: list[ast.stmt]) -> str | None:
        if not self.own_line(block[0]):
            return None
        row = self.source_row(first_line(block[0]))
        return row[: len(row) - len(row.lstrip(" \t\f"))]

    def line_of(self, spot: Spot) -> int | None:
        """The line before which to add so that the new line stands at `spot`; None: no room."""
        block, index = spot.block, spot.index
        if self.indent_of(block) is None:
            return None
        if index == 0:
            return self._line_after_header(block[0])
        end = self.logical[block[index - 1].end_lineno or 1][1]
        if index < len(block) and first_line(block[index]) <= end:
            return None
        return end + 1

    def _line_after_header(self, stmt: ast.stmt) -> int:
        """Above the comments that stand over a block's first statement."""
        line = first_line(stmt)
        while line > 1 and (line - 1) not in self.logical:
            line -= 1
        return line


def split_lines(data: bytes) -> list[bytes]:
    """Lines with their ends, cut where Python cuts them: \\n, \\r\\n or \\r, and nowhere else."""
    return re.findall(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z", data)


def _text_lines(text: str) -> list[str]:
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z", text)


def blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
            yield block


def first_line(stmt: ast.stmt) -> int:
    lines: list[int] = [d.lineno for d in getattr(stmt, "decorator_list", [])]
    return min([stmt.lineno, *lines])


def dotted(expr: ast.AST | None) -> str:
    """`a.b.c` for a chain of names, '' for anything else; a subscript is passed over."""
    if isinstance(expr, ast.Name):
        return expr.id
    if isinstance(expr, ast.Subscript):
        return dotted(expr.value)
    if isinstance(expr, ast.Attribute) and not isinstance(expr.value, ast.Subscript):
        base = dotted(expr.value)
        return f"{base}.{expr.attr}" if base else ""
    return ""


def last(name: str) -> str:
    return name.rpartition(".")[2]


def unpack(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr, int | None]]:
    if isinstance(target, (ast.Tuple, ast.List)):
        same = isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts)
        for index, element in enumerate(target.elts):
            part = value.elts[index] if same else value  # type: ignore[attr-defined]
            for name, inner, deeper in unpack(element, part):
                yield name, inner, deeper if same else index
    elif isinstance(target, ast.Starred):
        yield from unpack(target.value, value)
    elif isinstance(target, (ast.Name, ast.Attribute)) and dotted(target):
        yield dotted(target), value, None


def children(node: ast.AST) -> tuple[ast.AST, ...]:
    """Kept on the node: the tree is walked many times and never changes."""
    try:
        return node._children  # type: ignore[attr-defined,no-any-return]
    except AttributeError:
        node._children = tuple(ast.iter_child_nodes(node))  # type: ignore[attr-defined]
        return node._children  # type: ignore[attr-defined,no-any-return]


def walk(node: ast.AST) -> Iterator[ast.AST]:
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        stack.extend(reversed(children(current)))


def own(node: ast.AST) -> tuple[ast.AST, ...]:
    """`node` and what is in it, but not the code of functions and classes defined there."""
    try:
        return node._own  # type: ignore[attr-defined,no-any-return]
    except AttributeError:
        node._own = tuple(_own(node))  # type: ignore[attr-defined]
        return node._own  # type: ignore[attr-defined,no-any-return]


def _own(node: ast.AST) -> Iterator[ast.AST]:
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        if current is node or not isinstance(current, (*FUNCTIONS, ast.ClassDef)):
            stack.extend(reversed(children(current)))


def own_all(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    for node in nodes:
        yield from own(node)


def targets(node: ast.AST) -> Iterator[str]:
    """The names that a statement itself binds, header only for a compound one."""
    found: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        found = list(node.targets)
    elif isinstance(node, ast.AnnAssign):
        found = [node.target] if node.value is not None else []
    elif isinstance(node, (ast.AugAssign, ast.For, ast.AsyncFor, ast.NamedExpr)):
        found = [node.target]
    elif isinstance(node, (ast.With, ast.AsyncWith)):
        found = [item.optional_vars for item in node.items if item.optional_vars]
    elif isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        for alias in node.names:
            yield alias.asname or alias.name.split(".")[0]
    for target in found:
        yield from (name for name, _, _ in unpack(target, target))


# --- What is certainly bound -----------------------------------------------------------------
EVERYTHING = frozenset({"*"})  # "this path does not come back", the neutral element of `both`


def both(a: frozenset[str], b: frozenset[str]) -> frozenset[str]:
    if "*" in a:
        return b
    return a if "*" in b else a & b


def certain(block: Sequence[ast.stmt]) -> frozenset[str]:
    """Names that are bound whenever control comes out at the end of `block`."""
    names: set[str] = set()
    for stmt in block:
        names -= deleted(stmt)
        names |= certain_stmt(stmt) | evaluated(stmt)
        if isinstance(stmt, (*EXITS, ast.Raise)) or _is_exit_call(stmt):
            return EVERYTHING
    return frozenset(names)


@cache
def deleted(stmt: ast.stmt) -> frozenset[str]:
    """Names that a statement may unbind, at any depth."""
    return frozenset(
        name
        for node in own(stmt)
        if isinstance(node, ast.Delete)
        for target in node.targets
        for name, _, _ in unpack(target, target)
    )


def certain_stmt(stmt: ast.stmt) -> frozenset[str]:
    if isinstance(stmt, ast.If):
        return _certain_if(stmt)
    if isinstance(stmt, (ast.With, ast.AsyncWith)):
        return certain(stmt.body) | set(targets(stmt))
    if isinstance(stmt, ast.Try):
        result = certain([*stmt.body, *stmt.orelse])
        for handler in stmt.handlers:
            result = both(result, certain(handler.body))
        return result | certain(stmt.finalbody)
    if isinstance(stmt, (ast.For, ast.AsyncFor)):
        # An accumulation loop that back-propagates runs at least once, or nothing would be learned.
        return certain(stmt.body) | set(targets(stmt)) if _propagates(stmt) else frozenset()
    if isinstance(stmt, ast.While):
        return frozenset()
    return frozenset(targets(stmt))


@cache
def evaluated(stmt: ast.stmt) -> frozenset[str]:
    """Names that a statement always reads: behind it, they are bound."""
    if isinstance(stmt, (*FUNCTIONS, ast.ClassDef, ast.Delete, ast.Try)):
        return frozenset()
    heads: list[ast.AST] = [stmt]
    if isinstance(stmt, (ast.If, ast.While)):
        heads = [stmt.test]
    elif isinstance(stmt, (ast.For, ast.AsyncFor)):
        heads = [stmt.iter]
    elif isinstance(stmt, (ast.With, ast.AsyncWith)):
        heads = [item.context_expr for item in stmt.items]
    elif not isinstance(stmt, (ast.Expr, ast.Assign, ast.AugAssign, ast.Assert)):
        return frozenset()
    return frozenset(name for head in heads for name in _read_always(head)) - {""}


def _read_always(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
        yield dotted(node)
    later: Sequence[ast.AST] = children(node)
    if isinstance(node, ast.IfExp):
        later = [node.test]
    elif isinstance(node, ast.BoolOp):
        later = node.values[:1]
    elif isinstance(node, ast.Compare):
        later = [node.left, node.comparators[0]]
    elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        later = [node.generators[0].iter]
    elif isinstance(node, (ast.Lambda, ast.Assert)):
        later = [node.test] if isinstance(node, ast.Assert) else []
    for child in later:
        yield from _read_always(child)


def _certain_if(stmt: ast.If) -> frozenset[str]:
    if is_main_guard(stmt):
        return certain(stmt.body)
    return both(certain(stmt.body), certain(stmt.orelse))


def _propagates(loop: ast.AST) -> bool:
    return any(isinstance(n, ast.Attribute) and n.attr == "backward" for n in own(loop))


def _is_exit_call(stmt: ast.stmt) -> bool:
    return (
        isinstance(stmt, ast.Expr)
        and isinstance(stmt.value, ast.Call)
        and dotted(stmt.value.func) in {"sys.exit", "exit", "quit", "os._exit"}
    )


def is_main_guard(stmt: ast.stmt) -> bool:
    return (
        isinstance(stmt, ast.If)
        and isinstance(stmt.test, ast.Compare)
        and dotted(stmt.test.left) == "__name__"
    )


def parameters(scope: Scope) -> set[str]:
    if isinstance(scope, ast.Module):
        return set()
    spec = scope.args
    plain = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
    return {arg.arg for arg in [*plain, *filter(None, [spec.vararg, spec.kwarg])]}


@cache
def locals_of(scope: Scope) -> frozenset[str]:
    """Plain names that are local to a function (for the module: its own)."""
    names, declared = set(parameters(scope)), set()
    for node in own_all(scope.body):
        names |= {name for name in targets(node) if "." not in name}
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            declared |= set(node.names)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
    return frozenset(names - declared)


class Bound:
    """Answers which names are certainly bound at a spot."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self._module = certain(script.tree.body)
        self._cache: dict[tuple[int, int], frozenset[str]] = {}

    def at(self, spot: Spot) -> frozenset[str]:
        key = (id(spot.block), spot.index)
        if key not in self._cache:
            self._cache[key] = self._at(spot)
        return self._cache[key]

    def _at(self, spot: Spot) -> frozenset[str]:
        names: set[str] = set()
        gone: set[str] = set()  # unbound later on the way to the spot
        stmt = spot.block[0]
        block, index = spot.block, spot.index
        while True:
            here = certain(block[:index]) - {"*"}
            names |= here - gone
            gone |= {n for s in block[:index] for n in deleted(s)} - here
            owner = self.script.parent[stmt]
            if isinstance(owner, ast.ExceptHandler):
                owner = self.script.parent[owner]
            elif isinstance(owner, (*LOOPS, ast.With, ast.AsyncWith)) and block is owner.body:
                names |= set(targets(owner)) - gone
                names |= set(evaluated(owner)) - gone
                if isinstance(owner, LOOPS):  # unbound in the iteration before
                    gone |= deleted(owner) - names
            elif isinstance(owner, ast.If) and block is owner.body:
                names |= evaluated(owner) - gone
            if not isinstance(owner, ast.stmt) or isinstance(owner, (*FUNCTIONS, ast.ClassDef)):
                break
            stmt = owner
            block, index = self.script.home[owner].block, self.script.home[owner].index
        return frozenset(names | self._from_outside(owner) - gone)

    def _from_outside(self, scope: ast.AST) -> set[str]:
        if not isinstance(scope, FUNCTIONS):
            return set()
        names = set(parameters(scope))
        hidden = locals_of(scope)
        names |= self._attributes(scope)
        outer = self.script.scope_of(scope)
        if isinstance(outer, FUNCTIONS):
            names |= self.at(self.script.home[scope]) - hidden
        return names | {n for n in self._module if n.partition(".")[0] not in hidden}

    def _attributes(self, scope: Function) -> set[str]:
        """`self.x` that `__init__` always sets."""
        owner = self.script.class_of(scope)
        inits = (
            [f for f in owner.body if isinstance(f, FUNCTIONS) and f.name == "__init__"]
            if owner and scope.name != "__init__"
            else []
        )
        return {n for f in inits for n in certain(f.body) if n.startswith("self.")}


# --- What the names stand for ----------------------------------------------------------------
OPTIMIZER_CALL = re.compile(
    r"^(?:\w*Adam\w*|\w*SGD\w*|RMSprop|Adagrad|Adadelta|Rprop|LBFGS|Lion\w*|\w*Muon\w*|Sophia\w*|"
    r"L[Aa][Mm][Bb]|LARS|Adafactor|Adan|SAM|\w*Shampoo|SOAP\w*|Prodigy|Ranger\w*|DAdapt\w*|"
    r"ScheduledOptim|NoamOpt|Optim|ZeroRedundancyOptimizer)$|[Oo]ptimizers?\w*$|"
    r"(?:get|make|build|create|setup|configure)_optim\w*$|optimizer_class|optim_cls"
)
NOT_OPTIMIZER_CALL = re.compile(r"param|group|state|zero|_lr|step|scheduler|sched", re.I)
OPTIMIZER_NAME = re.compile(r"optim|(?:^|_)opt(?:s|_|\d|$)|^opt[A-Z]|Opt$|solver$", re.I)
SCHEDULER_CALL = re.compile(
    r"(?:LR|Scheduler|ReduceLROnPlateau|WarmRestarts)$|^get_\w*schedul|"
    r"(?:build|create|make|get)_(?:lr_)?sched\w*$",
    re.I,
)
SCHEDULER_NAME = re.compile(r"sched|^lr_decay$|warmup_lr", re.I)
SCALER_NAME = re.compile(r"scaler", re.I)
MODEL_NAME = re.compile(
    r"model|net|module|actor|critic|agent|encoder|decoder|generator|"
    r"discriminator|policy|^[GD]$",
    re.I,
)
ENV_NAME = re.compile(r"(?:^|_)envs?(?:_|\d|$)", re.I)
EVAL_NAME = re.compile(
    r"(?:^|_)(?:eval\w*|evaluate\w*|evaluation|validat\w*|valid|val|test|dev|"
    r"estimate_loss\w*)(?:_|\d|$)",
    re.I,
)
LOSS_NAME = re.compile(
    r"loss|nll|ppl|perplex|bpb|(?:^|_)(?:err\w?|cost|elbo|mse|ce|bce|objective)"
    r"(?:_|\d|$)|^err[DG]",
    re.I,
)
METRIC_NAME = re.compile(
    r"acc|score|bleu|auc|^f1|map\b|_map|dice|iou|metric|reward|fid|prec|recall|top|psnr", re.I
)
HELD_OUT = re.compile(r"val|test|eval|dev|held", re.I)
HELD_OUT_LOSS = re.compile(
    r"(?:^|_)(?:val|valid|validation|test|eval|dev|heldout)_?\w*loss|"
    r"loss_?(?:test|valid|validation|eval|dev)$",
    re.I,
)
ENGINE_NAME = re.compile(
    r"accelerat|fabric|booster|engine|strategy|autograd|^amp|scaler|trainer|^self$", re.I
)
MOVES_ON = re.compile(
    r"^(?:next\w*|get_batch|sample\w*|push\w*|pop\w*|query|add|append|put|store|update\w*|draw)$"
)
CLOCK = re.compile(
    r"^(?:time\.\w+|perf_counter|time|monotonic|datetime\.\S+|timer|"
    r"timeit\.default_timer)$"
)
LANGUAGE = re.compile(r"block_size|seq_len|vocab|bptt|context_len|n_ctx|tokenizer|token", re.I)
# Only what a numpy array or a batch object of a library has not.
TENSOR_METHODS = re.compile(r"^(?:float|long|unsqueeze|numel|permute|contiguous|pin_memory|size)$")
TENSOR_MAKERS = re.compile(
    r"^(?:stack|randn?|randint|tensor|from_numpy|zeros|ones|cat|arange|as_tensor|LongTensor|"
    r"FloatTensor|empty|normal|linspace)$"
)
TAKES_NO_TENSOR = re.compile(
    r"^(?:tensor|as_tensor|from_numpy|device|manual_seed|load|save|Size|no_grad)$"
)


class Roles:
    """Which names are optimizers, schedulers, scalers, models."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self._optimizers: dict[str, bool] = {}

    def made_by(self, name: str, test: re.Pattern[str], prefix: str = "\0") -> bool:
        for binding in self.script.bindings.get(name, []):
            for call in _makers(binding.value):
                full = self.script.resolve(call.func)
                if (
                    isinstance(call.func, ast.Call) and call.func.args
                ):  # getattr(torch.optim, x)(...)
                    full = self.script.resolve(call.func.args[0]) + ".X"
                if full.startswith(prefix) and ".lr_scheduler" not in full and ".swa_" not in full:
                    return True
                if test.search(last(full)) and (
                    test is not OPTIMIZER_CALL or not NOT_OPTIMIZER_CALL.search(last(full))
                ):
                    return binding.index is None or bool(self.named(name, test))
        return False

    @staticmethod
    def named(name: str, test: re.Pattern[str]) -> bool:
        by_name = {OPTIMIZER_CALL: OPTIMIZER_NAME, SCHEDULER_CALL: SCHEDULER_NAME}
        return bool(by_name.get(test, test).search(last(name)))

    def optimizer(self, name: str) -> bool:
        if name not in self._optimizers:
            self._optimizers[name] = self._is_optimizer(name)
        return self._optimizers[name]

    def _is_optimizer(self, name: str) -> bool:
        if not name or (
            SCHEDULER_NAME.search(last(name)) and not OPTIMIZER_CALL.search(last(name))
        ):
            return False
        if self.made_by(name, OPTIMIZER_CALL, "torch.optim."):
            return True
        holder = name.rpartition(".")[0]
        if last(name) == "optimizer" and holder and self.optimizer(holder):
            return True
        return bool(OPTIMIZER_NAME.search(last(name))) and not self.arguments(name)

    def arguments(self, name: str) -> bool:
        """Command-line arguments: the result of `parse_args()`."""
        return any(
            last(dotted(call.func)) in {"parse_args", "parse_known_args"}
            for b in self.script.bindings.get(name, [])
            for call in _makers(b.value)
        )

    def scheduler(self, name: str) -> bool:
        return (
            bool(name)
            and not self.optimizer(name)
            and (self.made_by(name, SCHEDULER_CALL) or bool(SCHEDULER_NAME.search(last(name))))
        )

    @cached_property
    def module_like(self) -> list[str]:
        """Names used as a module is: `.train()`, `.parameters()`, `.zero_grad()`."""
        found: dict[str, None] = {}
        for call in self.script.calls:
            func = call.func
            if not isinstance(func, ast.Attribute):
                continue
            name = dotted(func.value)
            plain = func.attr in {"parameters", "named_parameters"} or (
                func.attr in {"train", "zero_grad", "eval"} and not call.args
            )
            if name and plain and name != "self" and not self.optimizer(name):
                found[name] = None
        return list(found)

    def models_of(self, optimizer: str) -> list[str]:
        """Models whose parameters an optimizer was given, as named where it was made."""
        found: dict[str, None] = {}
        for binding in self.script.bindings.get(optimizer, []):
            for call in _makers(binding.value):
                self._models_in(call, found, 3)
        return list(found)

    def _models_in(self, expr: ast.AST, found: dict[str, None], depth: int) -> None:
        for node in walk(expr):
            if isinstance(node, ast.Attribute) and node.attr in {
                "parameters",
                "named_parameters",
                "configure_optimizers",
                "configure_optimizer",
                "optim_parameters",
                "parameters_to_optimize",
            }:
                found[self._root(dotted(node.value))] = None
            elif isinstance(node, ast.Name) and depth:
                if node.id in self.module_like and MODEL_NAME.search(node.id):
                    found[node.id] = None
                elif not OPTIMIZER_NAME.search(node.id):
                    for binding in self.script.bindings.get(node.id, []):
                        if "param" in node.id.lower() or "group" in node.id.lower():
                            self._models_in(binding.value, found, depth - 1)
        found.pop("", None)

    def _root(self, name: str) -> str:
        """`model` for `model.fc`: the shortest prefix that the script assigns."""
        parts = name.split(".")
        start = 2 if parts[0] == "self" else 1
        for size in range(start, len(parts)):
            head = ".".join(parts[:size])
            if head in self.script.bindings and not self.arguments(head):
                return head
        return name


def _makers(value: ast.expr) -> Iterator[ast.Call]:
    """The calls whose result a value is: through `a if c else b`, lists, and `a or b`."""
    if isinstance(value, ast.Call):
        yield value
    elif isinstance(value, ast.IfExp):
        yield from _makers(value.body)
        yield from _makers(value.orelse)
    elif isinstance(value, (ast.List, ast.Tuple)):
        for element in value.elts:
            yield from _makers(element)
    elif isinstance(value, ast.ListComp):
        yield from _makers(value.elt)
    elif isinstance(value, ast.BoolOp):
        for element in value.values:
            yield from _makers(element)


# --- Where the optimizer steps ---------------------------------------------------------------
@dataclass(frozen=True)
class Update:
    """One optimizer step in the script: the call, whose it is, and the scaler it goes through."""

    call: ast.Call
    optimizer: str
    scaler: str = ""


def find_updates(script: Script, roles: Roles) -> list[Update]:
    engines = {
        dotted(c.func.value)
        for c in script.calls
        if isinstance(c.func, ast.Attribute) and c.func.attr == "backward" and c.args
    }
    found = [update for call in script.calls if (update := _update(call, roles, engines))]
    return [each for update in found for each in _spread(script, update)] or _manual_updates(script)


def _spread(script: Script, update: Update) -> list[Update]:
    """`for opt in optimizers: opt.step()` steps what is looped over."""
    for loop in script.loops_around(update.call):
        if (
            isinstance(loop, ast.For)
            and update.optimizer in set(targets(loop))
            and isinstance(loop.iter, (ast.List, ast.Tuple))
        ):
            return [Update(update.call, dotted(e), update.scaler) for e in loop.iter.elts]
    name = looped_over(script, update.call, update.optimizer)
    return [Update(update.call, name, update.scaler)]


def looped_over(script: Script, node: ast.AST, name: str) -> str:
    """`optimizers` for the `opt` of `for opt in optimizers`, also through zip and enumerate."""
    for loop in script.loops_around(node):
        if not isinstance(loop, ast.For) or name not in set(targets(loop)):
            continue
        pairs = [(loop.target, loop.iter)]
        if isinstance(loop.iter, ast.Call) and isinstance(loop.target, ast.Tuple):
            given = loop.iter.args
            if dotted(loop.iter.func) == "enumerate":
                given = [loop.iter, *given]
            pairs = list(zip(loop.target.elts, given, strict=False))
        return (
            next((dotted(source) for target, source in pairs if dotted(target) == name), "") or name
        )
    return name


def _update(call: ast.Call, roles: Roles, engines: set[str]) -> Update | None:
    func = call.func
    method = func.attr if isinstance(func, ast.Attribute) else ""
    receiver = dotted(func.value) if isinstance(func, ast.Attribute) else ""
    given = [dotted(arg) for arg in call.args if roles.optimizer(dotted(arg))]
    if method in {"step", "optimizer_step", "optimize", "step_optimizer"} and given:
        return Update(call, given[0], receiver if SCALER_NAME.search(last(receiver)) else "")
    if method in {"step", "second_step", "step_and_update_lr"} and receiver:
        if roles.optimizer(receiver):
            holder = receiver.rpartition(".")[0]
            return Update(call, holder if roles.optimizer(holder) else receiver)
        engine = (
            receiver in engines
            and not SCALER_NAME.search(receiver)
            and ("accelerator" not in receiver and "fabric" not in receiver)
        )
        return Update(call, receiver) if engine else None
    if given and SCALER_NAME.search(last(dotted(func))):  # loss_scaler(loss, optimizer, ...)
        return Update(call, given[0], dotted(func))
    return None


def _manual_updates(script: Script) -> list[Update]:
    """No optimizer at all: `p.data.add_(p.grad, alpha=-lr)` after a backward."""
    touches_grad = {
        script.scope_of(n)
        for n in script.nodes
        if isinstance(n, ast.Attribute) and n.attr == "grad"
    }
    return [
        Update(call, "")
        for call in script.calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr == "backward"
        and script.scope_of(call) in touches_grad
        and script.loops_around(call)
    ]


# --- The loops around it ---------------------------------------------------------------------
@dataclass
class Nest:
    """The loops around an update, outermost first; `sites` are the nodes of the innermost loop's
    own function that step (the call itself, or the call of a helper that steps)."""

    loops: list[Loop]
    sites: list[ast.AST]
    updates: list[Update]
    doubtful: str = ""

    @property
    def inner(self) -> Loop:
        return self.loops[-1]


class Nests:
    """From update calls to the loops that they stand in, through the functions that hold them."""

    def __init__(self, script: Script, roles: Roles) -> None:
        self.script, self.roles = script, roles
        self.by_loop: dict[Loop, Nest] = {}

    def find(self, updates: list[Update]) -> list[Nest]:
        for update in updates:
            for site, loops, doubt in self._chains(update.call, ()):
                nest = self.by_loop.setdefault(loops[0], Nest(loops[::-1], [], [], doubt))
                nest.sites.append(site)
                nest.updates.append(update)
        return self._merge(list(self.by_loop.values()))

    def _chains(
        self, node: ast.AST, seen: tuple[ast.AST, ...]
    ) -> Iterator[tuple[ast.AST, list[Loop], str]]:
        scope = self.script.scope_of(node)
        loops = [loop for loop in self.script.loops_around(node) if not self._over_optimizers(loop)]
        if isinstance(scope, ast.Module) or scope in seen or len(seen) > 5:
            if loops:
                yield node, loops, ""
            return
        calls = self.script.callers(scope)
        if loops:
            outer, doubt = self._outer(calls, (*seen, scope))
            doubt = doubt or self._perhaps_called(scope)
            yield node, loops + outer, doubt
            return
        for call in calls:
            yield from self._chains(call, (*seen, scope))

    def _outer(self, calls: list[ast.Call], seen: tuple[ast.AST, ...]) -> tuple[list[Loop], str]:
        found = [loops for call in calls for _, loops, _ in self._chains(call, seen)]
        if len({tuple(map(id, loops)) for loops in found}) > 1:
            return found[0], "the training function is called from several loops"
        return (found[0], "") if found else ([], "")

    def _perhaps_called(self, scope: Function) -> str:
        """A method of this name is called in a loop, on an object whose class is not known."""
        if self.script.class_of(scope) is None:
            return ""
        for call in self.script.calls:
            func = call.func
            if (
                isinstance(func, ast.Attribute)
                and func.attr == scope.name
                and (
                    self.script.loops_around(call)
                    and not self.script.definition(call)
                    and not (func.attr in {"train", "eval"} and not call.args)
                )
            ):
                return f"line {call.lineno} may call this training several times"
        return ""

    def _over_optimizers(self, loop: Loop) -> bool:
        if isinstance(loop, ast.While):
            return False
        names = {name for name, _, _ in unpack(loop.target, loop.target)}
        steps = [
            n
            for n in own_all(loop.body)
            if isinstance(n, ast.Call)
            and isinstance(n.func, ast.Attribute)
            and n.func.attr in {"step", "zero_grad"}
        ]
        held = {dotted(n.func.value) for n in steps} | {dotted(a) for n in steps for a in n.args}  # type: ignore[attr-defined]
        return bool(names & held)

    def _merge(self, nests: list[Nest]) -> list[Nest]:
        """One nest per training loop: an inner loop of critic steps, or a remainder after it."""
        kept = list(nests)
        for small in nests:
            for big in nests:
                if small is big or small not in kept or big not in kept:
                    continue
                if small.inner in big.loops:  # `small` steps around `big`
                    mine = {u.optimizer for u in small.updates}
                    if mine <= {u.optimizer for u in big.updates}:
                        kept.remove(small)  # the remainder of an accumulation
                    elif self.script.inside(big.inner, small.inner):
                        kept.remove(big)  # critic steps inside the iteration
                        small.updates += big.updates
        return kept


# --- The patch -------------------------------------------------------------------------------
def plan(script: Script, parts: Sequence[str] = PARTS) -> Plan:
    """Find the call sites of a script; raises NothingToPatch when it has no loop of its own."""
    return Patcher(script, parts).plan()


class Patcher:
    """Decides on the lines to add, loop by loop."""

    def __init__(self, script: Script, parts: Sequence[str]) -> None:
        self.script, self.wanted = script, {"log", *parts}
        self.roles, self.bound = Roles(script), Bound(script)
        self.out = Plan()
        self.obs = self._free_name()
        self.keys: set[str] = set()
        self.validated: set[int] = set()

    def plan(self) -> Plan:
        updates = find_updates(self.script, self.roles)
        nests = Nests(self.script, self.roles).find(updates)
        if not nests:
            raise NothingToPatch(where_to_look(self.script, self.roles, updates))
        self._import()
        for nest in nests:
            self.out.parts.setdefault("validation", "none seen")
            NestPatcher(self, nest, several=len(nests) > 1).patch()
        self._unlogged(updates, nests)
        self.out.insertions = self._ordered()
        return self.out

    def _free_name(self) -> str:
        taken = {n.id for n in self.script.nodes if isinstance(n, ast.Name)}
        taken |= {n.arg for n in self.script.nodes if isinstance(n, ast.arg)}
        taken |= {
            n.name
            for n in self.script.nodes
            if isinstance(n, (*FUNCTIONS, ast.ClassDef, ast.ExceptHandler)) and n.name
        }
        taken |= {
            n.value
            for n in self.script.nodes
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        taken |= set(self.script.imports)
        for node in self.script.nodes:
            taken |= (
                set(getattr(node, "names", ()))
                if isinstance(node, (ast.Global, ast.Nonlocal))
                else set()
            )
            if type(node).__name__ in {"MatchAs", "MatchStar"} and getattr(node, "name", None):
                taken.add(node.name)  # type: ignore[attr-defined]
        for name in ("obs", "observability"):
            if name not in taken:
                return name
        raise PatchError(
            f"{self.script.name}: uses both names, obs and observability, for "
            f"something else; rename one of them"
        )

    def _import(self) -> None:
        body = self.script.tree.body
        imports = [i for i, s in enumerate(body) if isinstance(s, (ast.Import, ast.ImportFrom))]
        torch = [i for i in imports if "torch" in ast.unparse(body[i])]
        index = (torch or imports or [-1])[0 if torch else -1]
        while index + 1 < len(body) and index + 1 in imports:
            index += 1
        if (
            index < 0
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            index = 0
        spot = Spot(body, index + 1)
        while spot.index < len(body) and self.script.line_of(spot) is None:
            spot = Spot(body, spot.index + 1)
        alias = " as obs" if self.obs == "obs" else ""
        if not self.add(spot, "import", f"import observability{alias}", "log", "the drop-in"):
            raise PatchError(f"{self.script.name}: no room for the import")

    def _unlogged(self, updates: list[Update], nests: list[Nest]) -> None:
        logged = {u.call for nest in nests for u in nest.updates}
        for update in updates:
            if update.call not in logged:
                self.out.note(
                    update.call,
                    "this optimizer step is outside the loop that is observed "
                    "(a remainder, or never called here); it is not counted",
                )

    def add(
        self, spot: Spot, kind: str, code: str, part: str, why: str, confidence: str = "sure"
    ) -> bool:
        """Add a line at a spot; False when the original has no room for a line there."""
        line = self.script.line_of(spot)
        indent = self.script.indent_of(spot.block)
        if line is None or indent is None:
            return False
        if part in self.wanted:
            self.out.insertions.append(Insertion(line, indent, kind, code, part, why, confidence))
        return True

    def _ordered(self) -> list[Insertion]:
        unique = list(dict.fromkeys(self.out.insertions))
        return sorted(unique, key=lambda i: (i.line, -len(i.indent.expandtabs(8)), ORDER[i.kind]))


def where_to_look(script: Script, roles: Roles, updates: list[Update]) -> str:
    """Why there is nothing to patch, and which file to try instead."""
    if updates:
        line = updates[0].call.lineno
        return (
            f"{script.name}:{line}: an optimizer steps here, but no loop of this file calls it; "
            f"patch the script that has the loop"
        )
    files = _local_files(script, roles)
    if files:
        return f"{script.name}: the optimizer is stepped elsewhere: try {', '.join(files)}"
    for call in script.calls:
        name = script.resolve(call.func)
        if last(name) in {"Trainer", "SFTTrainer", "Seq2SeqTrainer", "Learner", "fit", "train"}:
            owner = next((script.imports[n] for n in script.imports if n in name.split(".")), "")
            return (
                f"{script.name}:{call.lineno}: the loop is in {name or 'a framework'}()"
                f"{f' of {owner}' if owner else ''}, not in this file; use its callbacks"
            )
    return f"{script.name}: no optimizer step in a loop was found"


def _local_files(script: Script, roles: Roles) -> list[str]:
    """Files of imported functions that are called in a loop, or are given an optimizer."""
    found: dict[str, None] = {}
    for call in script.calls:
        head = dotted(call.func).partition(".")[0]
        full = script.imports.get(head, "")
        given = [*call.args, *(k.value for k in call.keywords)]
        passed = any(
            roles.optimizer(dotted(a)) or roles.made_by(dotted(a), OPTIMIZER_CALL)
            for a in given
            if dotted(a)
        )
        trains = re.search(r"train|fit|run_epoch|learn", last(dotted(call.func)), re.I)
        if not full or full.split(".")[0] in {
            "torch",
            "transformers",
            "numpy",
            "tqdm",
            "torchvision",
        }:
            continue
        if (passed and not SCHEDULER_CALL.search(last(full))) or (
            trains and script.loops_around(call)
        ):
            module = full.rsplit(".", 1)[0] if "." in full else full
            found[module.replace(".", "/") + ".py"] = None
    return list(found)


class NestPatcher:
    """The lines for one training loop."""

    def __init__(self, patcher: Patcher, nest: Nest, several: bool) -> None:
        self.p, self.nest, self.several = patcher, nest, several
        self.script, self.roles, self.bound = patcher.script, patcher.roles, patcher.bound
        self.out, self.obs = patcher.out, patcher.obs
        self.scope = self.script.scope_of(nest.inner)
        self.loops = self._levels()
        self.optimizers = list(dict.fromkeys(u.optimizer for u in nest.updates if u.optimizer))
        self.losses = Losses(self).names()
        self.models: list[str] = []
        self.refusals: list[tuple[ast.AST, str]] = []

    def _levels(self) -> list[Loop]:
        """The loops of one run: those outside of which the optimizer is made."""
        made = [b for u in self.nest.updates for b in self.script.bindings.get(u.optimizer, [])]
        loops = self.nest.loops
        while len(loops) > 1 and any(self._within(b, loops) for b in made):
            loops = loops[1:]
        return loops

    def _within(self, made: Binding, loops: list[Loop]) -> bool:
        """Made inside the outermost of these loops, or in a function that this loop calls."""
        if made.stmt in own_set(loops[0]):
            return True
        called = {self.script.scope_of(loop) for loop in loops[1:]} - {
            self.script.scope_of(loops[0])
        }
        return made.scope in called

    def patch(self) -> None:
        outer = self.loops[0]
        start = self.script.home[outer]
        self._init(start)
        self._watch(start)
        Evaluations(self).add()
        resumable = self._check_resume() and "resume" in self.p.wanted
        carried = Carried(self).find() if resumable else Carry([], {})
        resumable = resumable and not self.refusals
        if resumable:
            carried.write(self)
            self._guards()
        else:
            carried.values.clear()
        self._steps(carried.values)
        self._finish(start)
        self._report(resumable)

    # -- before and after
    def _init(self, start: Spot) -> None:
        bound = self.bound.at(start)
        args = []
        worker = self._worker()
        if worker:
            args.append(f'f"worker{{{worker}}}"')
        elif self.several:
            name = getattr(self.script.scope_of(self.loops[0]), "name", "")
            args.append(f'"{name or "line"}_{self.loops[0].lineno}"')
        config = self._config(bound)
        if config:
            args.append(f"config={config}")
        ok = self.p.add(
            start, "init", f"{self.obs}.init({', '.join(args)})", "log", "opens the run"
        )
        if not ok:
            raise PatchError(f"{self.script.name}:{self.loops[0].lineno}: no room before the loop")

    def _config(self, bound: frozenset[str]) -> str:
        known = locals_of(self.script.scope_of(self.loops[0]))
        for name in self.script.bindings:
            if (
                self.roles.arguments(name)
                and name in bound
                and "." not in name
                and all(
                    last(dotted(c.func)) == "parse_args"
                    for b in self.script.bindings[name]
                    for c in _makers(b.value)
                )
            ):
                return (
                    f"vars({name})"
                    if name not in parameters(self.script.scope_of(self.loops[0]))
                    else name
                )
        for name in ("args", "opt", "config", "cfg", "hparams", "hps", "self.config"):
            if (
                name in bound
                and (name in known or name in self.script.bindings)
                and (name not in self.script.imports)
                and not self.roles.optimizer(name)
            ):
                return name
        return ""

    def _worker(self) -> str:
        """The rank of a process that runs this loop beside others, without torch.distributed."""
        scope = self.script.scope_of(self.loops[0])
        if isinstance(scope, ast.Module) or "init_process_group" in self.script.source:
            return ""
        starts = [
            c
            for c in self.script.calls
            if last(dotted(c.func)) in {"Process", "spawn", "start_processes"}
            and any(dotted(v) == scope.name for v in [*c.args, *(k.value for k in c.keywords)])
        ]
        if not starts or not scope.args.args:
            return ""
        self.refuse(starts[0], "several processes train at once, each by its own steps")
        return scope.args.args[0].arg

    def _watch(self, start: Spot) -> None:
        bound = self.bound.at(start)
        optimizers = self._visible_optimizers(bound)
        self.models = self._visible_models(bound)
        args = list(self.models)
        args += self._keyword("optimizer", optimizers)
        args += self._keyword("scheduler", self._schedulers(bound))
        scalers = {u.scaler: None for u in self.nest.updates if u.scaler in bound}
        args += self._keyword("scaler", [s for s in scalers if "." not in s or s in bound])
        args += self._keyword("loader", self._loader(bound))
        if args:
            self.p.add(
                start,
                "watch",
                f"{self.obs}.watch({', '.join(args)})",
                "log",
                "what a checkpoint holds",
                "sure" if self.models and optimizers else "likely",
            )
        if not self.models:
            self.refuse(self.loops[0], "no model was found that is bound before this loop")
        if self.optimizers and not optimizers:
            self.refuse(self.loops[0], "the optimizer has no name before this loop")

    @staticmethod
    def _keyword(key: str, names: list[str]) -> list[str]:
        if not names:
            return []
        return [f"{key}={names[0]}" if len(names) == 1 else f"{key}=[{', '.join(names)}]"]

    def _visible_optimizers(self, bound: frozenset[str]) -> list[str]:
        direct = [n for n in self.optimizers if n in bound]
        if direct and len(direct) == len(self.optimizers):
            return direct
        made = [
            n
            for n in self.script.bindings
            if n in bound and self.roles.made_by(n, OPTIMIZER_CALL, "torch.optim.")
        ]
        named = [
            n
            for n in sorted(bound)
            if "optim" in n.lower() and n in parameters(self.script.scope_of(self.loops[0]))
        ]
        return list(dict.fromkeys([*direct, *(made or named)]))

    def _visible_models(self, bound: frozenset[str]) -> list[str]:
        names = [
            m
            for o in [*self.optimizers, *self._visible_optimizers(bound)]
            for m in self.roles.models_of(o)
        ]
        found = [n for n in dict.fromkeys(names) if n in bound]
        usual = [n for n in self.roles.module_like if n in bound and n not in self.script.imports]
        called = [
            n
            for n in dict.fromkeys(dotted(c.func) for c in self.script.calls)
            if n in bound
            and re.search(r"model$|^net|net$", last(n))
            and n.partition(".")[0] not in self.script.imports
            and not any(f.name == last(n) for f in self.script.functions)
        ]
        found = self._of_scope(
            found or [n for n in usual if MODEL_NAME.search(last(n))] or usual or called
        )
        copied = {
            dotted(c.func.value)
            for c in self.script.calls  # a target network
            if isinstance(c.func, ast.Attribute)
            and c.func.attr == "load_state_dict"
            and c in own_set(self.loops[0])
            and not self.roles.optimizer(dotted(c.func.value))
        }
        return list(dict.fromkeys([*found, *sorted(copied & bound)]))

    def _schedulers(self, bound: frozenset[str]) -> list[str]:
        stepped = {
            looped_over(self.script, c, dotted(c.func.value)): None
            for c in self.script.calls
            if isinstance(c.func, ast.Attribute) and c.func.attr in {"step", "step_update"}
        }
        return self._of_scope([n for n in stepped if n in bound and self.roles.scheduler(n)])

    def _of_scope(self, names: list[str]) -> list[str]:
        """The function's own names, where it has any: a global one may be the same object."""
        local = locals_of(self.script.scope_of(self.loops[0]))
        return [n for n in names if n.partition(".")[0] in local] or names

    def _loader(self, bound: frozenset[str]) -> list[str]:
        name = loop_source(self.nest.inner)
        made = any(
            last(dotted(c.func)).endswith("DataLoader")
            for b in self.script.bindings.get(name, [])
            for c in _makers(b.value)
        )
        return [name] if made and name in bound else []

    def _finish(self, start: Spot) -> None:
        """At the end of the block that holds the loop; at exit otherwise."""
        block, owner = start.block, self.script.parent[self.loops[0]]
        while isinstance(owner, (ast.With, ast.AsyncWith)):
            block = self.script.home[owner].block
            owner = self.script.parent[owner]
        if isinstance(owner, LOOPS):
            return
        index = len(block)
        if isinstance(block[-1], EXITS):
            index -= 1
        line = self.script.line_of(Spot(block, index))
        if line is None or (
            line > len(self.script.rows) and not ends_with_newline(self.script.data)
        ):
            return
        self.p.add(Spot(block, index), "finish", f"{self.obs}.finish()", "log", "closes the run")

    # -- the step
    def _steps(self, carry: dict[str, str]) -> None:
        placed = False
        for spot, test in StepSpots(self).find():
            code = self._step_call(spot, carry)
            code = f"if {test}: {code}" if test else code
            placed |= self.p.add(
                spot, "step", code, "log", "one optimizer step", "likely" if test else "sure"
            )
        if not placed:
            self.out.note(
                self.nest.inner,
                "no room for obs.step in this loop (its body is on the line of its header)",
            )

    def _step_call(self, spot: Spot, carry: dict[str, str]) -> str:
        bound = self.bound.at(spot)
        args = self._counter(bound)
        args += self.losses_at(spot, bound)
        args += Batch(self).amount(spot, bound)
        if carry and "resume" in self.p.wanted:
            missing = [e for e in carry.values() if e not in bound]
            for name in missing:
                self.out.note(
                    self.nest.inner,
                    f"{name} may be unbound at the end of an iteration; not carried",
                )
            inner = ", ".join(f'"{k}": {e}' for k, e in carry.items() if e in bound)
            args += [f"carry={{{inner}}}"] if inner else []
        return f"{self.obs}.step({', '.join(args)})"

    def losses_at(self, spot: Spot, bound: frozenset[str]) -> list[str]:
        usable = [loss for loss in self.losses if self._usable(loss, spot, bound)]
        if not usable:
            return []
        main = self._as_number(usable[-1])
        taken = {"loss", "step", "tokens", "samples", "carry"}
        rest = {key_of(x.expr): self._as_number(x) for x in usable[:-1]}
        return [f"loss={main}", *(f"{k}={v}" for k, v in rest.items() if k not in taken)]

    def _usable(self, loss: Loss, spot: Spot, bound: frozenset[str]) -> bool:
        why = ""
        if loss.root not in bound:
            why = "is not certainly bound where the step is logged"
        elif Losses(self).overwritten(loss.root, spot):
            why = "is assigned again before the end of the iteration (an evaluation?)"
        if why:
            self.out.note(loss.line, f"the loss {loss.root} {why}; it is left out")
        return not why

    def _as_number(self, loss: Loss) -> str:
        """`loss = loss.item()` after the backward: a number has no `.detach()`."""
        again = [
            b
            for b in self.script.bindings.get(loss.root, [])
            if b.stmt in own_set(self.nest.inner) and b.stmt.lineno > loss.line
        ]
        if not again or ".detach()" not in loss.code:
            return loss.code
        return re.sub(r"\.detach\(\)(\.\w+\(\))?", "", loss.code)

    def _counter(self, bound: frozenset[str]) -> list[str]:
        """The script's own count of steps: one that goes up by 1 an iteration and never back."""
        outside = self.bound.at(self.script.home[self.loops[0]])
        for node in own_all(self.nest.inner.body):
            if (
                isinstance(node, ast.AugAssign)
                and isinstance(node.op, ast.Add)
                and isinstance(node.value, ast.Constant)
                and node.value.value == 1
            ):
                name = dotted(node.target)
                if (
                    isinstance(node.target, (ast.Name, ast.Attribute))
                    and name in bound
                    and name in outside
                    and self._counts_steps(node, name)
                    and re.search(r"step|iter|batch|^n$|^i$|^t$", last(name), re.I)
                ):
                    return [name]
        inner = self.nest.inner
        if (
            len(self.loops) == 1
            and isinstance(inner, ast.For)
            and isinstance(inner.target, ast.Name)
            and _is_range(inner.iter)
            and not self._conditional()
        ):
            return [inner.target.id] if inner.target.id in bound else []
        return []

    def _counts_steps(self, node: ast.AugAssign, name: str) -> bool:
        writes = [b for b in self.script.bindings.get(name, []) if b.stmt in own_set(self.loops[0])]
        if len(writes) != 1:
            return False
        site = self.script.stmt_of(self.nest.sites[0])
        mine = [n for n in self.script.above(node) if isinstance(n, (ast.If, *LOOPS))]
        theirs = [n for n in self.script.above(site) if isinstance(n, (ast.If, *LOOPS))]
        return mine == theirs or (all(n in theirs for n in mine) and not self._conditional())

    def _conditional(self) -> bool:
        return bool(StepSpots(self).conditions())

    # -- resume
    def refuse(self, where: ast.AST, why: str) -> None:
        self.refusals.append((where, why))

    def _check_resume(self) -> bool:
        if self.nest.doubtful:
            self.refuse(self.nest.inner, self.nest.doubtful)
        if len(self.loops) < len(self.nest.loops) and not self._also_called_once():
            self.refuse(self.nest.loops[0], "several trainings, one after the other, in this loop")
        if self.several:
            self.refuse(self.loops[0], "several training loops in one file")
        if not self.script.own_line(self.nest.inner.body[0]):
            self.refuse(self.nest.inner, "the loop's body is on the line of its header")
        self._state_elsewhere()
        self._unsavable_optimizer()
        self._early_scheduler()
        self._reads_by_hand()
        return not self.refusals

    def _also_called_once(self) -> bool:
        """The training function is called in a loop (a search over settings), and without one."""
        scope = self.script.scope_of(self.loops[0])
        return isinstance(scope, FUNCTIONS) and any(
            not self.script.loops_around(call) for call in self.script.callers(scope)
        )

    def _state_elsewhere(self) -> None:
        """What a checkpoint cannot hold: an environment, a half-read iterator, a new optimizer."""
        for node in own_all([*self.loops[0].body, *self.nest.inner.body]):
            if not isinstance(node, ast.Call):
                continue
            func = node.func
            name, _, method = dotted(func).rpartition(".")
            if name and ENV_NAME.search(last(name)) and method in {"step", "reset"}:
                self.refuse(node, f"the state of {name} cannot be saved")
                return
            if name and self._keeps_state(name, method):
                self.refuse(node, f"{name}.{method}() changes {name}, whose state cannot be saved")
                return
            if isinstance(func, ast.Name) and func.id == "iter" and self._remade(node):
                self.refuse(
                    node, "the iterator is made again in mid-loop; its position cannot be saved"
                )
                return
        for optimizer in self.optimizers:
            for binding in self.script.bindings.get(optimizer, []):
                if binding.stmt in own_set(self.loops[0]) and not isinstance(
                    binding.stmt, ast.AugAssign
                ):
                    self.refuse(binding.stmt, f"{optimizer} is made again inside the loop")

    def _unsavable_optimizer(self) -> None:
        """An optimizer that is an object of the script itself, without a `state_dict`."""
        makers = {
            last(dotted(c.func)): c
            for o in self.optimizers
            for b in self.script.bindings.get(o, [])
            for c in _makers(b.value)
        }
        for node in self.script.nodes:
            if (
                isinstance(node, ast.ClassDef)
                and node.name in makers
                and not any("ptim" in dotted(base) for base in node.bases)
                and not any(isinstance(f, FUNCTIONS) and f.name == "state_dict" for f in node.body)
            ):
                self.refuse(makers[node.name], f"{node.name} has no state_dict to save")

    def _keeps_state(self, name: str, method: str) -> bool:
        """An object made before the loop that moves on with it: a batch source, a buffer."""
        known = [*self.models, *self.optimizers]
        if name in known or self.roles.scheduler(name) or self.roles.optimizer(name):
            return False
        if SCALER_NAME.search(name) or name.partition(".")[0] in self.script.imports:
            return False
        made = [
            c
            for b in self.script.bindings.get(name, [])
            for c in _makers(b.value)
            if b.stmt not in own_set(self.loops[0])
        ]
        classes = [last(dotted(c.func)) for c in made if last(dotted(c.func))[:1].isupper()]
        if any(
            re.search(r"Meter|Metric|Log|Writer|Timer|Tracker|Board|tqdm|Progress|Prof", c)
            for c in classes
        ):
            return False
        if classes and MOVES_ON.search(method):
            return True
        return any(self._method_writes(c, method) for c in classes)

    def _method_writes(self, owner: str, method: str) -> bool:
        """Whether a method of a class of this file assigns attributes of its object."""
        return any(
            f.name == method
            and getattr(self.script.class_of(f), "name", "") == owner
            and any(t.startswith("self.") for n in own_all(f.body) for t in targets(n))
            for f in self.script.functions
        )

    def _remade(self, call: ast.Call) -> bool:
        return self.nest.inner in self.script.loops_around(call)

    def _early_scheduler(self) -> None:
        for loop, inner in zip(self.loops, self.loops[1:], strict=False):
            for stmt in prelude(self.script, loop, inner):
                for node in own(stmt):
                    if (
                        isinstance(node, ast.Call)
                        and isinstance(node.func, ast.Attribute)
                        and (
                            node.func.attr == "step"
                            and self.roles.scheduler(dotted(node.func.value))
                        )
                    ):
                        self.refuse(
                            node,
                            "the scheduler steps at the top of an epoch: a resumed "
                            "epoch would step it twice",
                        )

    def _guards(self) -> None:
        for loop in self.loops:
            if loop is self.nest.inner:
                self._guard_batches(loop)
            elif loop is self.loops[0]:
                named = isinstance(loop, ast.For) and isinstance(loop.target, ast.Name)
                label = loop.target.id if named else ""  # type: ignore[union-attr]
                self.p.add(
                    Spot(loop.body, 0),
                    "skip",
                    f"if {self.obs}.skip_epoch({label}): continue",
                    "resume",
                    "a resumed run passes what is done",
                )

    def _guard_batches(self, loop: Loop) -> None:
        if isinstance(loop, ast.While) and len(self.loops) == 1 and not reads_next(loop):
            return
        index = self._behind_next(loop)
        code = f"if {self.obs}.skip_batch(): continue"
        self.p.add(
            Spot(loop.body, index), "skip", code, "resume", "a resumed run passes what is done"
        )

    @staticmethod
    def _behind_next(loop: Loop) -> int:
        """The guard stands behind `batch = next(it)`: a skipped batch is read all the same."""
        return sum(isinstance(s, (ast.Assign, ast.Expr)) and reads_next([s]) for s in loop.body)

    def _reads_by_hand(self) -> None:
        loop = self.nest.inner
        if reads_next(loop) and reads_next(loop.body[self._behind_next(loop) :]):
            self.refuse(
                loop,
                "next() is called in the middle of the iteration; a resumed run cannot "
                "pass over it",
            )

    def _report(self, resumable: bool) -> None:
        parts = self.out.parts
        parts["log"] = "yes" if any(i.kind == "step" for i in self.out.insertions) else "no"
        parts["resume"] = "yes" if resumable else "no"
        for where, why in self.refusals:
            self.out.note(where, f"resume is left out: {why}")


def ends_with_newline(data: bytes) -> bool:
    return data.endswith((b"\n", b"\r"))


@cache
def own_set(node: ast.AST) -> frozenset[ast.AST]:
    return frozenset(own(node))


def key_of(expr: str) -> str:
    """An identifier for an expression: `loss_g` for `self.loss["g"]`-like names."""
    return re.sub(r"\W+", "_", expr.removeprefix("self.")).strip("_") or "value"


def _is_range(expr: ast.expr) -> bool:
    while isinstance(expr, ast.Call) and expr.args and dotted(expr.func) != "range":
        expr = expr.args[0]
    return isinstance(expr, ast.Call) and dotted(expr.func) == "range"


def loop_source(loop: Loop) -> str:
    """`loader` for `for i, x in enumerate(tqdm(loader))`."""
    expr = loop.iter if isinstance(loop, (ast.For, ast.AsyncFor)) else None
    while isinstance(expr, ast.Call) and expr.args:
        expr = expr.args[0]
    return dotted(expr)


def reads_next(where: Loop | Sequence[ast.stmt]) -> bool:
    nodes = where if isinstance(where, (list, tuple)) else where.body  # type: ignore[union-attr]
    return any(
        isinstance(n, ast.Call)
        and isinstance(n.func, ast.Name)
        and n.func.id == "next"
        and n.args
        and dotted(n.args[0])
        for n in own_all(nodes)
    )


def prelude(script: Script, loop: Loop, inner: ast.AST) -> list[ast.stmt]:
    """The statements of `loop`'s body that come before the one that holds `inner` in this scope."""
    for index, stmt in enumerate(loop.body):
        if inner in own_set(stmt):
            return loop.body[:index]
    return []


# --- Where the step line goes ----------------------------------------------------------------
class StepSpots:
    """The ends of an iteration that made an optimizer step."""

    def __init__(self, nest: NestPatcher) -> None:
        self.n, self.script, self.loop = nest, nest.script, nest.nest.inner

    def find(self) -> list[tuple[Spot, str]]:
        conditions = self.conditions()
        if not conditions:
            first = min(self._top(site) for site in self._steady())
            return self._ends(self.loop.body, first)
        return self._conditional(conditions[-1])

    def _top(self, site: ast.AST) -> int:
        return next(i for i, stmt in enumerate(self.loop.body) if self.script.inside(site, stmt))

    def _steady(self) -> list[ast.AST]:
        """Sites that every iteration reaches; all of them where both branches of an `if` step."""
        return [s for s in self.n.nest.sites if not self._tests(s)]

    def conditions(self) -> list[tuple[ast.If, bool]]:
        """The `if`s around the only update, outermost first; none if each iteration steps."""
        if self._steady():
            return []
        return self._tests(self.n.nest.sites[-1])

    def _tests(self, site: ast.AST) -> list[tuple[ast.If, bool]]:
        """Enclosing `if`s within the loop that do not step on every path, and the branch taken."""
        found: list[tuple[ast.If, bool]] = []
        child = site
        for parent in self.script.above(site):
            if parent is self.loop:
                break
            if isinstance(parent, ast.If) and not self._always(parent):
                found.append((parent, child in parent.body))
            child = parent
        return found[::-1]

    def _always(self, test: ast.If) -> bool:
        """Both branches step."""
        return all(any(self._steps(stmt) for stmt in branch) for branch in (test.body, test.orelse))

    def _steps(self, stmt: ast.stmt) -> bool:
        if isinstance(stmt, ast.If):
            return self._always(stmt)
        if isinstance(stmt, ast.For) and any(
            isinstance(n, ast.Attribute) and n.attr == "grad" for n in own(stmt)
        ):
            return True  # `for p in parameters: p.data.add_(p.grad, …)`
        return any(self.script.inside(site, stmt) for site in self.n.nest.sites)

    def _ends(self, block: list[ast.stmt], first: int) -> list[tuple[Spot, str]]:
        """The end of `block`, and the exits from the loop after statement `first`."""
        found: list[tuple[Spot, str]] = []
        for leave in self._exits(block[first:]):
            if leave in block:
                continue
            found += self._before(leave)
        return [*found, (self._end(block), "")]

    @staticmethod
    def _end(block: list[ast.stmt]) -> Spot:
        """Behind the last statement, but before an exit and before names are deleted."""
        index = len(block)
        while index > 1 and isinstance(block[index - 1], (*EXITS, ast.Delete)):
            index -= 1
        return Spot(block, index)

    def _exits(self, stmts: Sequence[ast.stmt]) -> list[ast.stmt]:
        last_site = max(getattr(s, "lineno", 0) for s in self.n.nest.sites)
        return [
            n
            for n in own_all(stmts)
            if isinstance(n, EXITS)
            and n.lineno > last_site
            and (isinstance(n, ast.Return) or self.script.loops_around(n)[0] is self.loop)
        ]

    def _before(self, leave: ast.stmt) -> list[tuple[Spot, str]]:
        home = self.script.home[leave]
        if self.script.line_of(home) is not None:
            return [(home, "")]
        owner = self.script.parent[leave]
        if isinstance(owner, ast.If) and owner in self.script.home and self._pure(owner.test, []):
            place = self.script.home[owner]
            if self.script.line_of(place) is not None and home.block is owner.body:
                return [(place, ast.unparse(owner.test))]
        self.n.out.note(leave, "this exit leaves no room for a line; its step is not logged")
        return []

    def _conditional(self, condition: tuple[ast.If, bool]) -> list[tuple[Spot, str]]:
        """Behind everything under the same tests, or at the end of the branch that steps."""
        tests = self.conditions()
        place = Spot(self.loop.body, self._top(tests[0][0]))
        rest = place.block[place.index :]
        after = place.block[place.index + 1 :]
        if (
            self._matter(after)
            and all(self._pure(t.test, rest) for t, _ in tests)
            and not self._exits(after)
        ):
            return [(self._end(place.block), " and ".join(self._text(tests)))]
        test, taken = condition
        branch = test.body if taken else test.orelse
        if self._matter(after):
            self.n.out.note(
                test,
                "more happens after the branch that steps; a checkpoint taken there "
                "has not seen it",
            )
        first = next(
            i
            for i, s in enumerate(branch)
            if any(self.script.inside(x, s) for x in self.n.nest.sites)
        )
        if self.script.indent_of(branch) is None and self._pure(test.test, [test]):
            return [(Spot(place.block, place.index + 1), " and ".join(self._text(tests)))]
        return self._ends(branch, first)

    @staticmethod
    def _text(tests: list[tuple[ast.If, bool]]) -> list[str]:
        texts = [ast.unparse(t.test) if yes else f"not ({ast.unparse(t.test)})" for t, yes in tests]
        return [f"({t})" if len(texts) > 1 and (" and " in t or " or " in t) else t for t in texts]

    @staticmethod
    def _matter(stmts: Sequence[ast.stmt]) -> bool:
        """Whether anything but printing follows."""
        return any(
            not (
                isinstance(s, ast.Pass)
                or (
                    isinstance(s, ast.Expr)
                    and isinstance(s.value, ast.Call)
                    and last(dotted(s.value.func)) in {"print", "info", "set_postfix"}
                )
            )
            for s in stmts
        )

    def _pure(self, test: ast.expr, changing: Sequence[ast.stmt]) -> bool:
        """Only names, numbers and comparisons, none of them assigned in `changing`."""
        allowed = (
            ast.Name,
            ast.Attribute,
            ast.Constant,
            ast.BinOp,
            ast.UnaryOp,
            ast.BoolOp,
            ast.Compare,
            ast.operator,
            ast.unaryop,
            ast.boolop,
            ast.cmpop,
            ast.expr_context,
        )
        for node in walk(test):
            is_len = isinstance(node, ast.Call) and dotted(node.func) == "len" and not node.keywords
            if not isinstance(node, allowed) and not is_len:
                return False
        written = {name for n in own_all(changing) for name in targets(n)}
        return not any(dotted(n) in written for n in walk(test) if dotted(n))


# --- The loss --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Loss:
    """What is back-propagated: the name, and the code that gives the value to log."""

    expr: str
    code: str
    line: int

    @property
    def root(self) -> str:
        return self.expr.partition("[")[0]


class Losses:
    """The names of what is back-propagated in a loop."""

    def __init__(self, nest: NestPatcher) -> None:
        self.n, self.script = nest, nest.script

    def names(self) -> list[Loss]:
        found: dict[str, Loss] = {}
        for call, expr in self._propagated():
            for loss in self._named(expr, call):
                found.setdefault(loss.expr, loss)
        for loss in self._returned():
            found.setdefault(loss.expr, loss)
        if not found and not self._in_helper():
            self.n.out.note(
                self.n.nest.sites[0],
                "the loss of this step has no name that can be logged; steps are logged without it",
            )
        return list(found.values())

    def _propagated(self) -> Iterator[tuple[ast.Call, ast.expr]]:
        inner = own_set(self.n.nest.inner)
        for call in self.script.calls:
            expr = propagated(call, self.n.roles)
            if expr is None:
                continue
            scope = self.script.scope_of(call)
            if call in inner and scope is self.n.scope:
                yield call, expr
            elif isinstance(scope, FUNCTIONS) and dotted(expr) in parameters(scope):
                yield from self._given(scope, dotted(expr), inner)

    def _given(
        self, helper: Function, parameter: str, inner: frozenset[ast.AST]
    ) -> Iterator[tuple[ast.Call, ast.expr]]:
        """`backward(loss)`, a helper: what the loop hands to it."""
        order = [arg.arg for arg in helper.args.args if arg.arg != "self"]
        for call in self.script.callers(helper):
            index = order.index(parameter) if parameter in order else len(call.args)
            if call in inner and index < len(call.args):
                yield call, call.args[index]

    def _named(self, expr: ast.expr, call: ast.Call) -> Iterator[Loss]:
        """The names inside a back-propagated expression."""
        if isinstance(expr, (ast.Name, ast.Attribute)) and dotted(expr):
            yield Loss(dotted(expr), self._scaled(dotted(expr), call), call.lineno)
        elif (
            isinstance(expr, ast.Subscript)
            and isinstance(expr.slice, ast.Constant)
            and isinstance(expr.value, ast.Name)
        ):
            yield Loss(ast.unparse(expr), ast.unparse(expr), call.lineno)
        elif isinstance(expr, ast.BinOp):
            if isinstance(expr.op, (ast.Add, ast.Sub)):
                yield from self._named(expr.left, call)
                yield from self._named(expr.right, call)
            else:
                sides = [expr.left, expr.right]
                likely = [s for s in sides if LOSS_NAME.search(last(dotted(s)) or "")]
                yield from self._named((likely or sides)[0], call)
        elif isinstance(expr, ast.Call) and isinstance(expr.func, ast.Attribute):
            if expr.func.attr in {"mean", "sum"} and dotted(expr.func.value):
                name = dotted(expr.func.value)
                if not name.startswith("torch") and LOSS_NAME.search(last(name)):
                    yield Loss(name, f"{name}.detach().{expr.func.attr}()", call.lineno)
            elif expr.func.attr == "scale" and expr.args:
                yield from self._named(expr.args[0], call)

    def _scaled(self, name: str, call: ast.Call) -> str:
        """Undo `loss = loss / accumulation` for the log."""
        inner = own_set(self.n.nest.inner)
        for binding in self.script.bindings.get(name, []):
            if binding.stmt not in inner or binding.stmt.lineno > call.lineno:
                continue
            divisor: ast.expr | None = None
            value = binding.value
            if isinstance(binding.stmt, ast.AugAssign):
                divisor = value if isinstance(binding.stmt.op, ast.Div) else None
            elif (
                isinstance(value, ast.BinOp)
                and isinstance(value.op, ast.Div)
                and (dotted(value.left) == name)
            ):
                divisor = value.right
            if (
                divisor is not None
                and isinstance(divisor, (ast.Name, ast.Attribute, ast.Constant))
                and (re.search(r"accum|micro|grad", ast.unparse(divisor)))
            ):
                return f"{name}.detach() * {ast.unparse(divisor)}"
        return name

    def _returned(self) -> Iterator[Loss]:
        """`loss = train_step(batch)`: the step is in a helper that returns the loss."""
        for site in self.n.nest.sites:
            stmt = self.script.stmt_of(site)
            if isinstance(stmt, ast.Assign) and stmt.value is site:
                for target in stmt.targets:
                    for name, _, _ in unpack(target, target):
                        if LOSS_NAME.search(last(name)):
                            yield Loss(name, name, stmt.lineno)

    def _in_helper(self) -> bool:
        """The step is in a helper that keeps the loss to itself: log it there."""
        for update in self.n.nest.updates:
            scope = self.script.scope_of(update.call)
            if scope is self.n.scope or not isinstance(scope, FUNCTIONS):
                continue
            block = scope.body
            spot = Spot(block, len(block) - isinstance(block[-1], ast.Return))
            for call in self.script.calls:
                expr = (
                    propagated(call, self.n.roles) if self.script.scope_of(call) is scope else None
                )
                name = dotted(expr) if expr is not None else ""
                if name and "." not in name and spot.index and name in self.n.bound.at(spot):
                    code = f'{self.n.obs}.log({{"loss/train": {name}}})'
                    return self.n.p.add(spot, "step", code, "log", "the loss, where it has a name")
        return False

    def overwritten(self, name: str, spot: Spot) -> bool:
        """Assigned again, after the backward and before `spot`, in a loop or without gradients."""
        last_site = max(getattr(s, "lineno", 0) for s in self.n.nest.sites)
        inner = own_set(self.n.nest.inner)
        end = self.script.line_of(spot) or 0
        return any(
            b.stmt in inner
            and last_site < b.stmt.lineno < end
            and not self._same_value(b.value, name)
            for b in self.script.bindings.get(name, [])
        )

    @staticmethod
    def _same_value(value: ast.expr, name: str) -> bool:
        """`loss = loss.item()` and the like keep it."""
        return any(dotted(n) == name for n in walk(value))


def propagated(call: ast.Call, roles: Roles) -> ast.expr | None:
    """What a call back-propagates, in any of its spellings."""
    func = call.func
    if isinstance(func, ast.Attribute) and func.attr == "backward":
        receiver, name = func.value, last(dotted(func.value))
        if not call.args or not name or LOSS_NAME.search(name):
            return receiver
        first = call.args[0]
        if (
            isinstance(first, (ast.List, ast.Tuple)) and first.elts
        ):  # torch.autograd.backward([...])
            first = first.elts[0]
        if ENGINE_NAME.search(name) or LOSS_NAME.search(last(dotted(first))):
            return first
        return receiver if isinstance(first, ast.Call) else None
    given = any(roles.optimizer(dotted(a)) for a in call.args)
    if given and SCALER_NAME.search(last(dotted(func))) and len(call.args) > 1:
        return call.args[0]
    return None


# --- The batch -------------------------------------------------------------------------------
class Batch:
    """How many tokens or samples a step took, where that can be read off."""

    def __init__(self, nest: NestPatcher) -> None:
        self.n, self.script = nest, nest.script

    def amount(self, spot: Spot, bound: frozenset[str]) -> list[str]:
        for name in self._candidates():
            if name in bound and self._is_tensor(name):
                times = self._accumulated(bound)
                if LANGUAGE.search(self.script.source):
                    return [f"tokens={name}.numel(){times}"]
                return [f"samples={name}.size(0){times}"]
        return []

    def _candidates(self) -> list[str]:
        loop = self.n.nest.inner
        names = []
        if isinstance(loop, (ast.For, ast.AsyncFor)) and not _is_range(loop.iter):
            names = [n for n, _, _ in unpack(loop.target, loop.target)]
        for node in own_all(loop.body):
            if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Call, ast.Tuple)):
                names += [
                    n
                    for target in node.targets
                    if isinstance(target, ast.Tuple)
                    for n, _, _ in unpack(target, node.value)
                ]
        return [
            n
            for n in names
            if "." not in n
            and not LOSS_NAME.search(n)
            and not re.search(
                r"^(?:i|j|k|idx|step|epoch|_|it|batch_idx|iteration|batch_i|out\w*|logits|pred\w*|hidden)$",
                n,
            )
        ]

    def _is_tensor(self, name: str) -> bool:
        """Certain only by use: a tensor's own method is called, torch takes it, torch made it."""
        scope = self.n.scope if name in locals_of(self.n.scope) else self.script.tree
        made = [b for b in self.script.bindings.get(name, []) if b.scope is scope]
        if any(re.search(r"numpy|tolist|item\(\)|\bnp\.", ast.unparse(b.value)) for b in made):
            return False
        calls = [n for n in own_all(self.n.scope.body) if isinstance(n, ast.Call)]
        return any(self._used_as_tensor(c, name) for c in calls) or any(
            self._makes_tensor(b, 2) for b in made
        )

    def _used_as_tensor(self, call: ast.Call, name: str) -> bool:
        func = call.func
        if isinstance(func, ast.Attribute) and dotted(func.value) == name:
            return bool(TENSOR_METHODS.match(func.attr))
        full = self.script.resolve(func)
        if not full.startswith(("torch.", "F.")) or TAKES_NO_TENSOR.match(last(full)):
            return False
        for arg in call.args:
            if isinstance(arg, ast.Call) and isinstance(arg.func, ast.Attribute):
                arg = arg.func.value  # F.cross_entropy(logits, y.flatten())
            if isinstance(arg, ast.Name) and arg.id == name:
                return last(full)[:1].islower() and ".utils." not in full
        return False

    def _makes_tensor(self, binding: Binding, depth: int) -> bool:
        value = binding.value
        if isinstance(value, ast.Subscript) and isinstance(value.value, ast.Name):
            made = self.script.bindings.get(value.value.id, [])
            cut = any(isinstance(n, ast.Slice) for n in walk(value.slice))
            return cut and depth > 0 and any(self._makes_tensor(b, depth - 1) for b in made)
        while (
            isinstance(value, ast.Call)
            and isinstance(value.func, ast.Attribute)
            and (value.func.attr in {"to", "cuda", "pin_memory", "long", "float"})
        ):
            if isinstance(value.func.value, ast.Name) and binding.name == value.func.value.id:
                return self._from_tuple(binding.name)
            value = value.func.value
        if not isinstance(value, ast.Call):
            return False
        full = self.script.resolve(value.func)
        if full.startswith("torch.") and TENSOR_MAKERS.match(last(full)):
            return True
        helper = self.script.definition(value)
        return bool(helper and depth and self._returns_tensor(helper, binding.index, depth))

    def _from_tuple(self, name: str) -> bool:
        """`for x, y in loader: x = x.to(device)`: an element of a batch tuple."""
        loop = self.n.nest.inner
        return isinstance(loop, (ast.For, ast.AsyncFor)) and any(
            isinstance(t, ast.Tuple)
            and any(dotted(e) == name for e in t.elts)
            and not (
                isinstance(loop.iter, ast.Call)
                and dotted(loop.iter.func) == "enumerate"
                and t is loop.target
            )
            for t in walk(loop.target)
        )

    def _returns_tensor(self, helper: Function, index: int | None, depth: int) -> bool:
        for node in own_all(helper.body):
            if isinstance(node, ast.Return) and node.value is not None:
                value = node.value
                if isinstance(value, ast.Tuple) and index is not None and index < len(value.elts):
                    value = value.elts[index]
                if not isinstance(value, ast.Name):
                    return False
                made = [b for b in self.script.bindings.get(value.id, []) if b.scope is helper]
                return bool(made) and self._makes_tensor(made[0], depth - 1)
        return False

    def _accumulated(self, bound: frozenset[str]) -> str:
        """` * n` when n batches make one step."""
        count = ""
        for call, _ in Losses(self.n)._propagated():
            loops = self.script.loops_around(call)
            inner = loops[: loops.index(self.n.nest.inner)] if self.n.nest.inner in loops else []
            for loop in inner:
                if (
                    isinstance(loop, ast.For)
                    and isinstance(loop.iter, ast.Call)
                    and dotted(loop.iter.func) == "range"
                    and len(loop.iter.args) == 1
                ):
                    count = ast.unparse(loop.iter.args[0])
        for test, _ in StepSpots(self.n).conditions():
            for node in walk(test.test):
                if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
                    count = ast.unparse(node.right)
        return f" * {count}" if re.fullmatch(r"[\w.]+", count) and count != "1" else ""


# --- What the loop carries -------------------------------------------------------------------
@dataclass
class Carry:
    """What a resume gives back: its lines, and key -> expression for the step line."""

    lines: list[tuple[Spot, str]]
    values: dict[str, str]

    def write(self, nest: NestPatcher) -> None:
        for spot, code in self.lines:
            nest.p.add(
                spot,
                "resume",
                code,
                "resume",
                "what the loop carries from one iteration to the next",
                "likely",
            )


NOT_CARRIED = re.compile(r"^pbar|progress_?bar|tqdm|writer$|logger$|^prof(?:iler)?$", re.I)


class Carried:
    """The loop-carried locals, and the lines that give them back."""

    def __init__(self, nest: NestPatcher) -> None:
        self.n, self.script, self.bound = nest, nest.script, nest.bound

    def find(self) -> Carry:
        result = self.result = Carry([], {})
        mine = [lp for lp in self.n.loops if self.script.scope_of(lp) is self.n.scope]
        done: set[str] = set()
        for loop, inner in zip(mine, [*mine[1:], None], strict=False):
            names = [
                n for n in self._carried(loop) if n not in done and not self._later(n, loop, inner)
            ]
            done |= set(names)
            defaults = {n: n for n in names}
            if loop is mine[0]:
                defaults |= {n: "None" for n in self._tail(mine) if n not in defaults}
            result.values |= self._resume(self.script.home[loop], defaults)
        for loop in self.n.loops:
            if loop not in mine and isinstance(loop, ast.For | ast.While):
                defaults = {n: n for n in self._carried(loop)}
                self._resume(Spot(loop.body, 0), defaults)
        return result

    def _resume(self, spot: Spot, defaults: dict[str, str]) -> dict[str, str]:
        if not defaults:
            return {}
        keys = {self._key(name): name for name in defaults}
        left = ", ".join(keys.values())
        right = ", ".join(f"{key}={defaults[name]}" for key, name in keys.items())
        self.result.lines.append((spot, f"{left} = {self.n.obs}.resume({right})"))
        return keys

    def _key(self, name: str) -> str:
        base = key = key_of(name)
        count = 2
        while key in self.n.p.keys:
            key, count = f"{base}_{count}", count + 1
        self.n.p.keys.add(key)
        return key

    def _later(self, name: str, loop: Loop, inner: Loop | None) -> bool:
        """Assigned between this loop's head and the next one: give it back only there."""
        if inner is None:
            return False
        before = prelude(self.script, loop, inner)
        return any(name in set(targets(n)) for n in own_all(before)) and name in self._carried(
            inner
        )

    def _carried(self, loop: Loop) -> list[str]:
        """Names bound before the loop, assigned in it, and read before they are assigned there."""
        outside = self.bound.at(self.script.home[loop])
        written: dict[str, None] = {}
        for node in own_all(loop.body):
            if isinstance(node, (ast.Import, ast.ImportFrom, *FUNCTIONS, ast.ClassDef)):
                continue
            written.update(dict.fromkeys(targets(node)))
        for name in [n for n in written if "." in n and n.partition(".")[0] in written]:
            del written[name]  # an attribute of a name that is bound anew each time
        reader = Exposed(self.script, self.n.scope)
        exposed = reader.of(loop)
        kept = [n for n in written if n in exposed and self._plain(n, loop, outside, reader.direct)]
        return [*kept, *self._mutated(loop, outside, set(kept))]

    def _plain(
        self, name: str, loop: Loop, outside: frozenset[str], direct: frozenset[str]
    ) -> bool:
        """Whether a value can be put into a checkpoint as it is."""
        roles = self.n.roles
        if (
            NOT_CARRIED.search(last(name))
            or name in self.n.optimizers
            or name in self.n.models
            or roles.made_by(name, OPTIMIZER_CALL, "torch.optim.")
            or roles.made_by(name, SCHEDULER_CALL)
        ):
            return False
        scope = self.script.scope_of(loop)
        if "." not in name and name not in locals_of(scope) and not self._declared(name, scope):
            return False
        if name not in outside:
            if name in direct and not LOSS_NAME.search(name) and not METRIC_NAME.search(name):
                self.n.refuse(
                    loop,
                    f"{name} goes from one iteration to the next, but is not "
                    f"certainly bound before the loop",
                )
            return False
        made = [c for b in self.script.bindings.get(name, []) for c in _makers(b.value)]
        if any(
            CLOCK.match(self.script.resolve(c.func)) or CLOCK.match(dotted(c.func)) for c in made
        ):
            return False
        strange = [c for c in made if self._is_object(c)]
        if strange:
            self.n.out.note(
                strange[0],
                f"{name} is an object of {dotted(strange[0].func)}; a resume does not restore it",
            )
            return False
        return True

    def _declared(self, name: str, scope: Scope) -> bool:
        return any(
            isinstance(n, (ast.Global, ast.Nonlocal)) and name in n.names
            for n in own_all(scope.body)
        )

    @staticmethod
    def _is_object(call: ast.Call) -> bool:
        name = last(dotted(call.func))
        return name in {"iter", "open", "tqdm", "trange", "cycle", "enumerate", "zip", "deque"} or (
            name[:1].isupper() and not name.endswith("Tensor")
        )

    def _mutated(self, loop: Loop, outside: frozenset[str], kept: set[str]) -> list[str]:
        """Lists and dicts made before the loop and filled in it."""
        found: dict[str, None] = {}
        for node in own_all(loop.body):
            name = ""
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and (node.func.attr in {"append", "extend", "update", "pop", "insert", "clear"})
            ):
                name = dotted(node.func.value)
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                name = dotted(node.value)
            if name and name in outside and name not in kept and self._is_container(name, loop):
                found[name] = None
        return list(found)

    def _is_container(self, name: str, loop: Loop) -> bool:
        made = [b for b in self.script.bindings.get(name, []) if b.value is not None]
        scope = self.script.scope_of(loop)
        local = "." in name or name in locals_of(scope) or self._declared(name, scope)
        return (
            local
            and bool(made)
            and all(
                isinstance(b.value, (ast.List, ast.Dict, ast.ListComp, ast.DictComp))
                or (isinstance(b.value, ast.Call) and dotted(b.value.func) in {"list", "dict"})
                for b in made
            )
            and not isinstance(scope, ast.Lambda)
        )

    def _tail(self, mine: list[Loop]) -> list[str]:
        """Names that only the batch loop binds and that are read after it: a run that resumes at
        the end of an epoch reads them before any batch has bound them."""
        inner = mine[-1]
        outside = self.bound.at(self.script.home[inner])
        written = {name for node in own_all(inner.body) for name in targets(node)}
        inside = certain(inner.body) & written & locals_of(self.n.scope)
        found: dict[str, None] = {}
        for stmt in self._after(mine):
            for node in own(stmt):
                name = dotted(node) if isinstance(node, ast.Name) else ""
                if (
                    name in inside
                    and name not in outside
                    and isinstance(node, ast.Name)
                    and isinstance(node.ctx, ast.Load)
                ):
                    found[name] = None
        made = set(targets(inner))
        return [n for n in found if n not in made and not self._rebound(n, mine)]

    def _after(self, mine: list[Loop]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for loop in mine:
            home: ast.AST = loop
            while isinstance(home, ast.stmt) and not isinstance(home, (*FUNCTIONS, ast.ClassDef)):
                spot = self.script.home[home]
                found += spot.block[spot.index + 1 :]
                home = self.script.parent[home]
        return found

    def _rebound(self, name: str, mine: list[Loop]) -> bool:
        inner = own_set(mine[-1])
        first = min(
            (
                n.lineno
                for s in self._after(mine)
                for n in own(s)
                if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)
            ),
            default=0,
        )
        return any(
            b.stmt not in inner
            and b.stmt.lineno < first
            and b.stmt.lineno > mine[-1].lineno
            and b.scope is self.n.scope
            for b in self.script.bindings.get(name, [])
        )


class Exposed:
    """Names that an iteration reads before it assigns them: they come from the one before."""

    def __init__(self, script: Script, scope: Scope) -> None:
        self.script, self.scope = script, scope
        self.found: set[str] = set()
        self.direct: frozenset[str] = frozenset()  # read in the loop itself, not behind it
        self.under: dict[str, set[str]] = {}  # bound wherever this test was true before

    def of(self, loop: Loop) -> set[str]:
        self.found = set()
        defined = set(targets(loop))
        if isinstance(loop, ast.While):
            self._reads(loop.test, defined)
        self._block(loop.body, defined)
        self.direct = frozenset(self.found)
        self._elsewhere(loop)
        return self.found

    def _elsewhere(self, loop: Loop) -> None:
        """Read by functions that close over the name, or after the loop."""
        for function in self.script.functions:
            hidden = locals_of(function)
            self.found |= {
                n.id
                for n in own_all(function.body)
                if isinstance(n, ast.Name)
                and isinstance(n.ctx, ast.Load)
                and n.id not in hidden
                and self.script.scope_of(loop) is not function
            }
        node: ast.AST = loop
        while isinstance(node, ast.stmt) and not isinstance(node, FUNCTIONS):
            spot = self.script.home[node]
            self._block(spot.block[spot.index + 1 :], set())
            node = self.script.parent[node]
            if isinstance(node, LOOPS):
                break

    def _reads(self, node: ast.AST, defined: set[str]) -> None:
        inside = {
            n.id
            for c in own(node)
            if isinstance(c, ast.comprehension)
            for n in walk(c.target)
            if isinstance(n, ast.Name)
        }
        inside |= {a.arg for c in own(node) if isinstance(c, ast.arguments) for a in c.args}
        for inner in own(node):
            if isinstance(inner, (ast.Name, ast.Attribute)) and isinstance(inner.ctx, ast.Load):
                name = dotted(inner)
                if name and name not in defined and name.partition(".")[0] not in inside:
                    self.found.add(name)
            if isinstance(inner, FUNCTIONS):
                self.found |= {n.id for n in walk(inner) if isinstance(n, ast.Name)} - defined

    def _block(self, block: Sequence[ast.stmt], defined: set[str]) -> set[str]:
        for stmt in block:
            self._stmt(stmt, defined)
        return defined

    def _stmt(self, stmt: ast.stmt, defined: set[str]) -> None:
        if isinstance(stmt, ast.If):
            self._reads(stmt.test, defined)
            test = ast.unparse(stmt.test)
            known = defined | self.under.get(test, set())
            taken = [self._block(stmt.body, set(known)), self._block(stmt.orelse, set(defined))]
            self.under[test] = self.under.get(test, set()) | taken[0]
            ends = [b and isinstance(b[-1], (*EXITS, ast.Raise)) for b in (stmt.body, stmt.orelse)]
            alive = [t for t, end in zip(taken, ends, strict=True) if not end] or taken
            defined |= set.intersection(*alive)
        elif isinstance(stmt, LOOPS):
            self._reads(stmt.test if isinstance(stmt, ast.While) else stmt.iter, defined)
            body = self._block(stmt.body, set(defined) | set(targets(stmt)))
            if _propagates(stmt):
                defined |= body
            self._block(stmt.orelse, set(defined))
        elif isinstance(stmt, (ast.With, ast.AsyncWith)):
            for item in stmt.items:
                self._reads(item.context_expr, defined)
            defined |= set(targets(stmt))
            self._block(stmt.body, defined)
        elif isinstance(stmt, ast.Try):
            before = set(defined)
            self._block([*stmt.body, *stmt.orelse], defined)
            for handler in stmt.handlers:
                end = self._block(handler.body, set(before))
                if not (handler.body and isinstance(handler.body[-1], (*EXITS, ast.Raise))):
                    defined &= end
            self._block(stmt.finalbody, defined)
        else:
            self._simple(stmt, defined)

    def _simple(self, stmt: ast.stmt, defined: set[str]) -> None:
        self._reads(stmt, defined)
        if isinstance(stmt, ast.AugAssign):
            name = dotted(stmt.target)
            if name and name not in defined:
                self.found.add(name)
        defined |= set(targets(stmt))
        for node in own(stmt):
            if isinstance(node, ast.NamedExpr):
                defined |= set(targets(node))


# --- Evaluations -----------------------------------------------------------------------------
class Evaluations:
    """The evaluations beside the training loop, and the line that records each value."""

    def __init__(self, nest: NestPatcher) -> None:
        self.n, self.script, self.out = nest, nest.script, nest.out
        self.helpers = {self.script.scope_of(u.call) for u in nest.nest.updates} - {nest.scope}
        self.scopes = {self.script.scope_of(loop) for loop in nest.nest.loops}

    def add(self) -> None:
        calls = self._calls()
        recorded = [self._call(call) for call in calls]
        recorded.append(self._inline())
        if any(recorded) or (calls and self.out.parts["validation"] != "yes"):
            self.out.parts["validation"] = "yes" if any(recorded) else "no"

    def _calls(self) -> list[ast.Call]:
        found = []
        for call in self.script.calls:
            name = last(dotted(call.func))
            if (
                not EVAL_NAME.search(name)
                or name[:1].isupper()
                or name == "eval"
                or (self.script.resolve(call.func).startswith(("torch.", "numpy.")))
            ):
                continue
            if re.search(
                r"load|data|transform|set$|iter|split|token|batch|dir$|path|freq", name, re.I
            ):
                continue
            if self.script.scope_of(call) in self.scopes and self._alive(call):
                found.append(call)
        return found

    def _alive(self, call: ast.Call) -> bool:
        """While the run is open: in the loop, or after it in the same function."""
        outer = self.n.loops[0]
        return (
            call in own_set(outer)
            or any(self.script.inside(call, lp) for lp in self.n.nest.loops)
            or (
                self.script.scope_of(call) is self.script.scope_of(outer)
                and call.lineno > outer.lineno
            )
        )

    def _call(self, call: ast.Call) -> bool:
        stmt = self.script.stmt_of(call)
        after = Spot(self.script.home[stmt].block, self.script.home[stmt].index + 1)
        names: list[str] = []
        if isinstance(stmt, ast.Assign) and stmt.value is call:
            names = [n for n, _, _ in unpack(stmt.targets[0], stmt.targets[0])]
        helper = self.script.definition(call)
        for index, name in enumerate(names):
            if LOSS_NAME.search(last(name)) and not self._is_mapping(name):
                return self._record(after, name, call)
            if helper and self._returns_loss(helper, index if len(names) > 1 else None):
                return self._record(after, name, call)
        if len(names) == 1 and self._entry(names[0], stmt):
            return self._record(after, self._entry(names[0], stmt), call)
        if helper and self._within(helper):
            return True
        for name in names:
            if METRIC_NAME.search(name) and "." not in name and not self._is_mapping(name):
                code = f'{self.n.obs}.log({{"val/{name}": {name}}})'
                return self._line(after, code, call)
        self.out.note(call, "an evaluation without a value that is a loss by name; not recorded")
        return False

    def _record(self, spot: Spot, value: str, where: ast.AST) -> bool:
        return self._line(spot, f"{self.n.obs}.validation({value})", where)

    def _line(self, spot: Spot, code: str, where: ast.AST) -> bool:
        if self.n.p.add(spot, "validation", code, "validation", "an evaluation's value", "likely"):
            return True
        self.out.note(where, "no room for a line after this evaluation; not recorded")
        return False

    def _is_mapping(self, name: str) -> bool:
        return any(
            (isinstance(n, ast.Subscript) and dotted(n.value) == name)
            or (
                isinstance(n, ast.Attribute)
                and n.attr in {"items", "keys", "get"}
                and dotted(n.value) == name
            )
            for n in self.script.nodes
        )

    def _entry(self, name: str, stmt: ast.stmt) -> str:
        """`losses["val"]` when the script itself reads it right after."""
        home = self.script.home[stmt]
        for later in home.block[home.index + 1 :]:
            if isinstance(later, (ast.If, *LOOPS)):
                continue
            for node in own(later):
                if (
                    isinstance(node, ast.Subscript)
                    and dotted(node.value) == name
                    and isinstance(node.slice, ast.Constant)
                    and isinstance(node.slice.value, str)
                    and (HELD_OUT.search(node.slice.value) or LOSS_NAME.search(node.slice.value))
                    and (isinstance(node.value, ast.Name))
                ):
                    return f"{name}[{node.slice.value!r}]"
        return ""

    def _returns_loss(self, helper: Function, index: int | None) -> bool:
        for node in own_all(helper.body):
            if isinstance(node, ast.Return) and node.value is not None:
                value = node.value
                if isinstance(value, ast.Tuple):
                    if index is None or index >= len(value.elts):
                        return False
                    value = value.elts[index]
                elif isinstance(value, (ast.Dict, ast.DictComp)) or index is not None:
                    return False
                return any(
                    LOSS_NAME.search(last(dotted(n)))
                    for n in walk(value)
                    if isinstance(n, (ast.Name, ast.Attribute))
                )
        return False

    def _within(self, helper: Function) -> bool:
        """Record inside the evaluating function, at its end: `test_loss`, or a meter's `.avg`."""
        if id(helper) in self.n.p.validated:
            return True
        block = helper.body
        while (
            isinstance(block[-1], (ast.With, ast.AsyncWith))
            and len(block) > 0
            and not any(LOSS_NAME.search(n) for n in certain(block))
        ):
            block = block[-1].body
        index = len(block) - isinstance(block[-1], ast.Return)
        spot = Spot(block, index)
        bound = self.n.bound.at(spot) if index or block else frozenset()
        names = [n for n in self._written(helper) if n in bound]
        value = self._best(names) or self._meter(helper, bound)
        if not value:
            return self._score(spot, helper, bound)
        if not self._record(spot, value, helper):
            return False
        self.n.p.validated.add(id(helper))
        return True

    def _score(self, spot: Spot, helper: Function, bound: frozenset[str]) -> bool:
        """No loss, but an accuracy or the like that the function works out."""
        names = {
            n
            for node in own_all(helper.body)
            if isinstance(node, (ast.Assign, ast.AugAssign))
            and isinstance(node.value, (ast.BinOp, ast.Name))
            for n in targets(node)
        }
        scores = sorted(n for n in names & bound if METRIC_NAME.search(n) and "." not in n)
        if not scores:
            return False
        self.n.p.validated.add(id(helper))
        pairs = ", ".join(f'"val/{n}": {n}' for n in scores)
        return self._line(spot, f"{self.n.obs}.log({{{pairs}}})", helper)

    @staticmethod
    def _written(helper: Function) -> list[str]:
        """Loss-like plain numbers that the function itself adds up."""
        found: dict[str, None] = {}
        for node in own_all(helper.body):
            if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
                value = node.value
                if isinstance(value, (ast.List, ast.Dict, ast.ListComp, ast.Lambda)) or (
                    isinstance(value, ast.Call) and last(dotted(value.func))[:1].isupper()
                ):
                    continue
                for name in targets(node):
                    if LOSS_NAME.search(name) and "." not in name:
                        found.pop(name, None)
                        found[name] = None
        return list(found)

    @staticmethod
    def _best(names: list[str]) -> str:
        held = [n for n in names if HELD_OUT.search(n)]
        return (held or names or [""])[-1]

    def _meter(self, helper: Function, bound: frozenset[str]) -> str:
        """`losses.avg` of a meter whose class, in this file, has that attribute."""
        read = {dotted(n) for n in own_all(helper.body) if isinstance(n, ast.Attribute)}
        if any(
            isinstance(n, ast.Attribute) and n.attr == "avg" and dotted(n.value) == "self"
            for n in self.script.nodes
        ):
            read |= {
                f"{name}.avg"
                for name, bindings in self.script.bindings.items()
                if any(b.scope is helper and "Meter" in ast.unparse(b.value) for b in bindings)
            }
        usable = [
            n
            for n in sorted(read)
            if last(n) in {"avg", "global_avg"}
            and n.partition(".")[0] in bound
            and LOSS_NAME.search(n)
        ]
        return (usable or [""])[0]

    # -- evaluation that is written out in the loop
    def _inline(self) -> bool:
        """`val_loss /= n` in the loop's own function."""
        done = False
        for name, bindings in self.script.bindings.items():
            mine = [
                b
                for b in bindings
                if (b.scope in self.scopes and self._in_nest(b.stmt))
                or (b.scope in self.helpers and not self.script.loops_around(b.stmt))
            ]
            if not mine or "." in name or not self._held_out_loss(name, mine[-1]):
                continue
            done = self._after_last(name, mine) or done
        return done or self._phases()

    def _in_nest(self, stmt: ast.stmt) -> bool:
        return any(self.script.inside(stmt, loop) for loop in self.n.nest.loops)

    def _held_out_loss(self, name: str, binding: Binding) -> bool:
        if not HELD_OUT_LOSS.search(name) or re.search(
            r"best|min|prev|last|patience|list|history|losses$", name, re.I
        ):
            return False
        return not any(EVAL_NAME.search(last(dotted(c.func))) for c in _makers(binding.value))

    def _after_last(self, name: str, mine: list[Binding]) -> bool:
        stmt: ast.stmt = max((b.stmt for b in mine), key=lambda s: s.lineno)
        for loop in self.script.loops_around(stmt):
            if loop in self.n.nest.loops:
                break
            stmt = loop
        home = self.script.home[stmt]
        spot = Spot(home.block, home.index + 1)
        if name not in self.n.bound.at(spot):
            return False
        return self._record(spot, name, stmt)

    def _phases(self) -> bool:
        """`for phase in ["train", "val"]`: record the epoch's value of the second."""
        for loop in self.n.nest.loops:
            if not (isinstance(loop, ast.For) and isinstance(loop.target, ast.Name)):
                continue
            words = [
                n.value
                for n in walk(loop.iter)
                if isinstance(n, ast.Constant)
                and isinstance(n.value, str)
                and HELD_OUT.search(n.value)
            ]
            names = [
                n
                for s in loop.body
                if not isinstance(s, LOOPS)
                for n in targets(s)
                if LOSS_NAME.search(n)
            ]
            if words and names:
                index = max(i for i, s in enumerate(loop.body) if names[-1] in targets(s)) + 1
                code = f'if {loop.target.id} == "{words[0]}": {self.n.obs}.validation({names[-1]})'
                return self._line(Spot(loop.body, index), code, loop)
        return False


# --- Adding and removing lines ---------------------------------------------------------------
def patched(script: Script, insertions: Sequence[Insertion]) -> bytes:
    """The script with the lines added; it compiles, and without them it is the original."""
    added: dict[int, list[bytes]] = {}
    for item in insertions:
        text = f"{item.indent}{item.code}  {MARK}"
        try:
            added.setdefault(item.line, []).append(text.encode(_plain_codec(script.encoding)))
        except UnicodeEncodeError as error:
            raise PatchError(
                f"{script.name}: {item.code!r} does not fit its encoding {script.encoding}"
            ) from error
    result = _weave(script.rows, added)
    if reverse(result) != script.data:
        raise PatchError(
            f"{script.name}: the patch could not be taken back byte for byte; nothing "
            f"was written. Does a line of the script itself end in {MARK!r}?"
        )
    _compile(result, script.name)
    return result


def _plain_codec(encoding: str) -> str:
    return "utf-8" if encoding == "utf-8-sig" else encoding


def _weave(rows: list[bytes], added: dict[int, list[bytes]]) -> bytes:
    out: list[bytes] = []
    for number in range(1, len(rows) + 2):
        near = rows[number - 2] if number > 1 else rows[0] if rows else b"\n"
        eol = near[len(near.rstrip(b"\r\n")) :] or _eol(rows)
        for text in added.get(number, []):
            if out and not out[-1].endswith((b"\n", b"\r")):
                # The original does not end its last line; `reverse` takes this end away again.
                out[-1] += eol
                out.append(text)
            else:
                out.append(text + eol)
        if number <= len(rows):
            out.append(rows[number - 1])
    return b"".join(out)


def _eol(rows: list[bytes]) -> bytes:
    first = rows[0] if rows else b"\n"
    return first[len(first.rstrip(b"\r\n")) :] or b"\n"


def reverse(data: bytes) -> bytes:
    """The lines that do not end in the marker."""
    rows = split_lines(data)
    kept = [row for row in rows if not is_marked(row)]
    if rows and kept and is_marked(rows[-1]) and not ends_with_newline(rows[-1]):
        kept[-1] = kept[-1].rstrip(b"\r\n")
    return b"".join(kept)


def is_marked(row: bytes) -> bool:
    return row.rstrip(b"\r\n").endswith(MARK.encode())


def _compile(data: bytes, name: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(data, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise PatchError(
            f"{name}: the patched script would not compile ({error}); nothing was written"
        ) from error


def unified(before: bytes, after: bytes, name: str, context: int = 3) -> str:
    old, new = ([row.decode("utf-8", "replace") for row in split_lines(d)] for d in (before, after))
    lines = []
    for line in difflib.unified_diff(old, new, f"a/{name}", f"b/{name}", n=context):
        lines.append(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n")
    return "".join(lines)


# --- Ready patches, pinned to one file -------------------------------------------------------
def pin(before: bytes, after: bytes, name: str) -> str:
    """A patch that holds added lines only, and the sha256 of the one file that it fits."""
    diff = unified(before, after, name, context=0)
    body = [re.sub(r"^(@@ .* @@).*", r"\1", line) for line in diff.splitlines()]
    return (
        "\n".join(
            [
                f"# target: {name}",
                f"# sha256: {_digest(before)}",
                f"# patched-sha256: {_digest(after)}",
                *body,
            ]
        )
        + "\n"
    )


def apply_pinned(data: bytes, patch: str, name: str) -> bytes:
    """Apply an add-only patch to exactly the file that it was made for, and check it both ways."""
    wanted = dict(re.findall(r"^# ([\w-]+): (\S+)", patch, re.M))
    if "sha256" not in wanted:
        raise PatchError("the patch does not say `# sha256: …` of the file that it fits")
    if _digest(reverse(data)) == wanted["sha256"] and data != reverse(data):
        raise PatchError(f"{name}: already patched; --reverse gives the original back")
    if _digest(data) != wanted["sha256"]:
        raise PatchError(
            f"{name}: sha256 {_digest(data)[:12]}… is not the {wanted['sha256'][:12]}… "
            f"that this patch was made for; run autopatch.py on the file instead"
        )
    result = _weave(split_lines(data), _added_lines(patch))
    if reverse(result) != data:
        raise PatchError(f"{name}: a line of the patch does not end in {MARK!r}")
    if wanted.get("patched-sha256", _digest(result)) != _digest(result):
        raise PatchError(
            f"{name}: the result is not what the patch promises; is the patch damaged?"
        )
    _compile(result, name)
    return result


def _added_lines(patch: str) -> dict[int, list[bytes]]:
    added: dict[int, list[bytes]] = {}
    line = 0
    for row in patch.splitlines():
        hunk = re.match(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,\d+)? @@", row)
        if hunk:
            if hunk[2] != "0":
                raise PatchError(
                    "this patch changes or needs lines of the script; only added lines "
                    "with no context are taken"
                )
            line = int(hunk[1]) + 1
        elif row.startswith("+") and not row.startswith("+++"):
            added.setdefault(line, []).append(row[1:].encode())
        elif row.startswith("-") and not row.startswith("---"):
            raise PatchError("this patch removes a line; only added lines are taken")
    return added


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- Files -----------------------------------------------------------------------------------
def write(path: Path, data: bytes) -> None:
    """Whole or not at all: beside the file, then over it; the mode is kept, a link is followed."""
    path = path.resolve()
    staging = path.with_name(f".{path.name}.autopatch-{os.getpid()}")
    try:
        staging.write_bytes(data)
        shutil.copymode(path, staging)
        os.replace(staging, path)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise PatchError(f"cannot write {path}: {error.strerror}") from error


def backup(path: Path, data: bytes) -> Path:
    """`train.py.before-observability`, numbered if that name holds something else."""
    count = 1
    while True:
        place = path.with_name(
            f"{path.name}.before-observability{'' if count == 1 else f'-{count}'}"
        )
        if not place.exists():
            place.write_bytes(data)
            return place
        if place.read_bytes() == data:
            return place
        count += 1


def drop_backup(path: Path, data: bytes) -> None:
    for place in path.parent.glob(f"{path.name}.before-observability*"):
        if place.read_bytes() == data:
            place.unlink()


def uncommitted(path: Path) -> str:
    """What git would lose if the file were overwritten; '' when committed, or outside of git."""
    command = ["git", "status", "--porcelain", "--", path.name]
    try:
        done = subprocess.run(
            command,
            cwd=path.resolve().parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    state = done.stdout[:2] if done.returncode == 0 else ""
    if not state.strip():
        return ""
    return "not in git yet" if state == "??" else "has uncommitted changes"


def place_drop_in(path: Path) -> str:
    source = Path(__file__).resolve().parent.parent / "mainrun" / "observability.py"
    goal = path.resolve().parent / "observability.py"
    if goal.exists():
        return f"{goal.name} is already beside it"
    if not source.exists():
        return f"copy observability.py beside it yourself: it is not at {source}"
    shutil.copyfile(source, goal)
    return f"copied {goal.name} beside it"


# --- Command line ----------------------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        return _run(options)
    except NothingToPatch as error:
        _say(options, {"found": False, "why": str(error)}, str(error))
        return 1
    except PatchError as error:
        print(f"autopatch: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough; the interpreter's last flush must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="exit status: 0 found, 1 nothing to patch, 2 error",
    )
    parser.add_argument("script", type=Path, help="the training script")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="apply it; a backup is kept")
    what.add_argument("--reverse", action="store_true", help="remove the added lines again")
    what.add_argument("--check", action="store_true", help="say what was found, and how surely")
    what.add_argument("--patch", type=Path, metavar="FILE", help="apply a ready, pinned patch")
    what.add_argument(
        "--pin",
        action="store_true",
        help="print the diff, or the lines that are there, as a ready patch",
    )
    parser.add_argument(
        "--only",
        type=_parts,
        default=PARTS,
        metavar="PARTS",
        help="how deep: log, validation, resume, separated by commas",
    )
    parser.add_argument("--json", action="store_true", help="with --check: as JSON")
    return parser


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; of {', '.join(PARTS)}")
    return parts


def _run(options: argparse.Namespace) -> int:
    path: Path = options.script
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PatchError(f"cannot read {path}: {error.strerror}") from error
    if options.reverse:
        return _reverse(path, data)
    if options.patch:
        return _apply_file(path, data, options.patch)
    marked = [i for i, row in enumerate(split_lines(data), 1) if is_marked(row)]
    if marked and options.pin:  # lines that were added or changed by hand
        print(pin(reverse(data), data, path.name), end="")
        return 0
    if marked:
        return _already(path, data, marked)
    script = Script(data, path.name)
    found = plan(script, options.only)
    result = patched(script, found.insertions)
    if options.check:
        _say(options, {"found": True, **as_dict(found)}, describe(found, path.name))
    elif options.write:
        _write(path, data, result, found)
    elif options.pin:
        print(pin(data, result, path.name), end="")
    else:
        sys.stdout.buffer.write(unified(data, result, path.name).encode("utf-8", "replace"))
        sys.stdout.flush()
        _tell(found, path.name)
    return 0


def _already(path: Path, data: bytes, marked: list[int]) -> int:
    rows = split_lines(data)
    foreign = [n for n in marked if not OURS.match(rows[n - 1].decode("utf-8", "replace"))]
    if foreign:
        raise PatchError(
            f"{path}:{foreign[0]}: this line ends in {MARK!r} but is not one of ours; "
            f"change its ending first"
        )
    print(
        f"{path}: already patched ({len(marked)} lines); --reverse takes them out", file=sys.stderr
    )
    return 0


def _write(path: Path, data: bytes, result: bytes, found: Plan) -> None:
    state = uncommitted(path)
    if state:
        print(f"{path}: {state}; the backup has it", file=sys.stderr)
    saved = backup(path, data)
    write(path, result)
    print(
        f"{path}: {len(found.insertions)} lines added; backup in {saved.name}; "
        f"{place_drop_in(path)}"
    )
    _tell(found, path.name)


def _reverse(path: Path, data: bytes) -> int:
    original = reverse(data)
    if original == data:
        print(f"{path}: nothing to take out")
        return 0
    write(path, original)
    drop_backup(path, original)
    print(f"{path}: {len(split_lines(data)) - len(split_lines(original))} lines taken out")
    return 0


def _apply_file(path: Path, data: bytes, patch: Path) -> int:
    try:
        text = patch.read_text(encoding="utf-8")
    except OSError as error:
        raise PatchError(f"cannot read {patch}: {error.strerror}") from error
    result = apply_pinned(data, text, path.name)
    saved = backup(path, data)
    write(path, result)
    print(
        f"{path}: patched from {patch.name}, checked both ways; backup in {saved.name}; "
        f"{place_drop_in(path)}"
    )
    return 0


def _say(options: argparse.Namespace, record: dict[str, Any], text: str) -> None:
    if options.json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        print(text)


def as_dict(found: Plan) -> dict[str, Any]:
    return {
        "parts": found.parts,
        "insertions": [asdict(i) for i in found.insertions],
        "notes": [asdict(n) for n in found.notes],
    }


def describe(found: Plan, name: str) -> str:
    rows = [f"{name}:{i.line:<5} {i.kind:<11}{i.confidence:<7} {i.code}" for i in found.insertions]
    parts = ", ".join(f"{part}: {state}" for part, state in found.parts.items())
    notes = [f"{name}:{n.line:<5} {n.text}" for n in found.notes]
    return "\n".join([parts, *rows, *(["left out or doubtful:"] if notes else []), *notes])


def _tell(found: Plan, name: str) -> None:
    for note in found.notes:
        print(f"{name}:{note.line}: {note.text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
