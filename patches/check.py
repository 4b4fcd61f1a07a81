"""What is missing or misplaced among the call sites that a script has, by hand or ours.

    rest = blanked(data, name)                      the statements that use the drop-in are gone
    omissions(data, rest, plan(Script(rest)).insertions)

All other statements keep their lines, and so what autopatch would add to the rest can be compared
with what was there. Nothing is run or written.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from lines import MARK, decoded, parse_error, split_lines

__all__ = ["Omission", "blanked", "has_call_sites", "omissions", "report"]

LOOPS = (ast.For, ast.AsyncFor, ast.While)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
GUARDS = ("skip_epoch", "skip_batch", "ended")
AVERAGE = re.compile("ema|swa|averag", re.I)


@dataclass(frozen=True)
class Omission:
    """What is wrong, and the line that cures it, which goes before line `line`."""

    line: int
    text: str
    add: str
    is_advice: bool = False  # a resume is exact without it, or the drop-in may find it for itself


class Added(Protocol):
    """A line that autopatch would add before line `line`."""

    @property
    def line(self) -> int: ...
    @property
    def indent(self) -> str: ...
    @property
    def code(self) -> str: ...


class Site(NamedTuple):
    """A call of the drop-in: its method, its place, and the statements around it."""

    method: str
    call: ast.Call
    around: tuple[ast.AST, ...]  # from the module inwards

    @property
    def line(self) -> int:
        return self.call.lineno

    @property
    def loop(self) -> int:
        return next((n.lineno for n in reversed(self.around) if isinstance(n, LOOPS)), 0)

    @property
    def scope(self) -> int:
        return next((n.lineno for n in reversed(self.around) if isinstance(n, FUNCTIONS)), 0)

    @property
    def is_conditional(self) -> bool:
        """Whether a condition stands between it and its loop."""
        around = self.around
        loops = [at for at, node in enumerate(around) if isinstance(node, LOOPS)]
        return any(isinstance(n, ast.If) for n in around[loops[-1] if loops else 0 :])


# --- What is there -------------------------------------------------------------------------------
def has_call_sites(data: bytes) -> bool:
    """Whether any statement of the script uses the drop-in; False if it cannot be read."""
    return b"observability" in data and not parse_error(data) and bool(sites(_tree(data)))


def _tree(data: bytes) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(data)


def names(tree: ast.Module) -> set[str]:
    """By which the drop-in is imported."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if alias.name == "observability"
    }


def sites(tree: ast.Module) -> list[Site]:
    return list(_sites(tree, names(tree), ()))


def _sites(node: ast.AST, known: set[str], around: tuple[ast.AST, ...]) -> Iterator[Site]:
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)) if name in known:
            yield Site(method, node, around)
    for child in ast.iter_child_nodes(node):
        inner = isinstance(node, (*LOOPS, *FUNCTIONS, ast.If))
        yield from _sites(child, known, (*around, node) if inner else around)


def blanked(data: bytes, name: str) -> bytes:
    """The script without the statements that use the drop-in; all others keep their lines."""
    _, rows = decoded(data, name)
    tree = _tree(data)
    known = names(tree)
    for block in _blocks(tree, known):
        ours = [stmt for stmt in block if _is_ours(stmt, known)]
        for stmt in ours:
            first, end = stmt.lineno - 1, stmt.end_lineno or stmt.lineno
            # A block that held nothing else goes on with a statement that does nothing.
            keeps = f"{' ' * stmt.col_offset}pass" if ours == block and stmt is block[0] else ""
            rows[first:end] = [keeps, *[""] * (end - first - 1)]
    return "".join(f"{row}\n" for row in rows).encode()


def _blocks(node: ast.AST, known: set[str]) -> Iterator[list[ast.stmt]]:
    """Each block in a node, but none of a statement that goes whole."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        block = getattr(node, field, None)
        block = block if isinstance(block, list) else []
        if field not in ("handlers", "cases"):
            yield block
        for child in (child for child in block if not _is_ours(child, known)):
            yield from _blocks(child, known)


def _is_ours(stmt: ast.stmt, known: set[str]) -> bool:
    """Whether nothing is left of a statement without the drop-in."""
    match stmt:
        case ast.Import(names=[alias]) | ast.ImportFrom(names=[alias]):
            return alias.name == "observability"
        case ast.Expr(value=call) | ast.Assign(value=call):
            return any(site.call is call for site in _sites(call, known, ()))
        case ast.If(test=call, body=[ast.Continue() | ast.Break()], orelse=[]):
            return any(site.call is call for site in _sites(call, known, ()))
        case ast.If(body=body, orelse=[]) | ast.For(body=body, orelse=[]):
            return all(_is_ours(inner, known) for inner in body)
    return False


# --- What is missing -----------------------------------------------------------------------------
def omissions(data: bytes, rest: bytes, added: Sequence[Added]) -> list[Omission]:
    """What the call sites of a script lack of what autopatch would add to the rest of it."""
    tree = _tree(data)
    there, known = sites(tree), next(iter(names(tree)), "obs")
    found = list(_too_early(there))
    for item in added:
        site = _site(item, rest)
        line = _behind_ours(item, split_lines(data), split_lines(rest))
        found += _compared(line, f"{item.code}  {MARK}", site, there) if site else []
    found = [replace(o, add=re.sub(r"\bobs\b(?=\.)", known, o.add)) for o in found]
    return sorted(dict.fromkeys(found), key=lambda o: o.line)


def report(found: Sequence[Omission], name: str) -> str:
    rows = []
    for o in found:
        is_absent = re.search("missing|lacks", o.text)
        rows.append(f"{name}:{o.line}: {'advice: ' * o.is_advice}{o.text}")
        rows.append(f"    {'add before this line' if is_absent else 'as it should be'}: {o.add}")
    missing = sum(not o.is_advice for o in found)
    said = f"missing or misplaced: {missing}" if missing else "nothing is missing"
    return "\n".join([*rows, f"{name}: of the call sites {said}"])


def _behind_ours(item: Added, given: Sequence[bytes], rest: Sequence[bytes]) -> int:
    """The line of an added one, behind blanked ones that lie in a deeper block than it."""
    line = item.line
    while line <= len(given) and given[line - 1].strip() and not rest[line - 1].strip():
        if len(given[line - 1]) - len(given[line - 1].lstrip()) <= len(item.indent):
            break
        line += 1
    return line


def _site(item: Added, rest: bytes) -> Site | None:
    """The call of a line that autopatch would add, as if it stood there."""
    rows, depth = split_lines(rest), len(item.indent)

    def holds(node: ast.stmt) -> bool:
        # Behind a block's last line only its indentation says that a line is still in it.
        between = rows[node.end_lineno or node.lineno : item.line - 1]
        is_open = not any(row.strip() for row in between)
        return node.lineno < item.line and node.col_offset < depth and is_open

    nodes = [n for n in ast.walk(_tree(rest)) if isinstance(n, (*LOOPS, *FUNCTIONS, ast.If))]
    around = sorted(filter(holds, nodes), key=lambda n: (n.lineno, n.col_offset))
    known = {"obs", "observability"}
    calls = _sites(ast.parse(item.code), known, tuple(around))
    return next((site for site in calls if site.method != "current_run"), None)  # of a guard


def _compared(line: int, add: str, site: Site, there: Sequence[Site]) -> Iterator[Omission]:
    same = [other for other in there if other.method == site.method]
    if site.method in GUARDS:
        others = ("ended",) if site.method == "ended" else ("skip_epoch", "skip_batch")
        if not [other for other in there if other.method in others and other.loop == site.loop]:
            yield Omission(line, f"the loop at line {site.loop} lacks {site.method}()", add)
    elif site.method == "step":
        yield from _step(line, add, site, same)
    elif not same and site.method != "log":
        text = f"{site.method}() is missing"
        yield Omission(line, text, add, is_advice=site.method == "validation")
    elif site.method in ("watch", "resume"):
        yield from _unnamed(add, site, same)


def _step(line: int, add: str, site: Site, same: Sequence[Site]) -> Iterator[Omission]:
    within = [s for s in same if site.loop in {getattr(n, "lineno", 0) for n in s.around}]
    if not within and not [s for s in same if s.scope and not s.loop]:  # a function of one step
        yield Omission(line, f"the loop at line {site.loop} lacks step()", add)
    elif within and not site.is_conditional and all(s.is_conditional for s in within):
        text = "step() is under a condition, and the optimizer steps outside of it; move it"
        yield Omission(within[0].line, text, add)


def _unnamed(add: str, site: Site, same: Sequence[Site]) -> Iterator[Omission]:
    near = [s for s in same if (s.scope, s.loop) == (site.scope, site.loop)]
    given: set[str] = set().union(*map(_given, near or same))
    for missed in sorted(_asked(site) - given):
        text = f"{site.method}() does not name {missed}"
        average = site.method == "watch" and AVERAGE.search(missed)
        # Sums of an epoch may begin anew; what is in sight is found by the drop-in.
        sure = bool(near) and "." not in missed if site.method == "resume" else average
        yield Omission((near or same)[0].line, text, add, is_advice=not sure)


def _asked(site: Site) -> set[str]:
    """What a resume needs of those that the call names."""
    if site.method == "resume":
        return {k.arg for k in site.call.keywords if k.arg}
    named = [k.value for k in site.call.keywords if k.arg not in ("optimizer", "loader")]
    averages = [a for a in site.call.args if AVERAGE.search(ast.unparse(a))]
    return {name for value in (*named, *averages) for name in _names_in(value)}


def _given(site: Site) -> set[str]:
    keys = {k.arg for k in site.call.keywords if k.arg} if site.method == "resume" else set()
    values = [*site.call.args, *(k.value for k in site.call.keywords)]
    return keys | {name for value in values for name in _names_in(value)}


def _names_in(value: ast.expr) -> set[str]:
    nodes = ast.walk(value)
    return {ast.unparse(n) for n in nodes if isinstance(n, (ast.Name, ast.Attribute))} - {"self"}


def _too_early(there: Sequence[Site]) -> Iterator[Omission]:
    """A finish() within a loop, or before what is recorded later in the same function."""
    add = f"obs.finish()  {MARK}"
    for end in (site for site in there if site.method == "finish"):
        if end.loop and not end.is_conditional:
            yield Omission(end.line, "finish() is within a loop; move it behind", add)
        for site in there:
            records = site.method in ("validation", "step", *GUARDS)
            if records and site.line > end.line and site.scope == end.scope:
                text = f"finish() comes before {site.method}() at line {site.line}; move it behind"
                yield Omission(end.line, text, add)
                break
