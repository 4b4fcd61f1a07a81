"""What stands in a script: the facts of its syntax that autopatch's rules ask for.

    script = Script(data, "train.py")
    script.bindings["loss"], script.made("optimizer"), script.callers(function)
    script.loops_around(node), script.bound(spot), script.line_of(spot)

All of it is read-only and runs nothing. Names are dotted (`self.model` is one); a subscript counts
as what it is taken from. A Spot is a place between two statements, where a line may be added;
"bound at a spot" is what has a value there on every path, "read unbound" what a block needs from
before it. Of an expression, `own` leaves out the code of functions and classes defined in it, as
that runs at another time. Which names are local to a function is what `symtable` says.
"""

from __future__ import annotations

import ast
import symtable
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

from lines import UNPARSABLE, PatchError, decoded

Function = ast.FunctionDef | ast.AsyncFunctionDef
Scope = ast.Module | ast.FunctionDef | ast.AsyncFunctionDef
Loop = ast.For | ast.AsyncFor | ast.While
Names = frozenset[str]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
FORS = (ast.For, ast.AsyncFor)
LOOPS = (*FORS, ast.While)
WITHS = (ast.With, ast.AsyncWith)
IMPORTS = (ast.Import, ast.ImportFrom)
EXITS = (ast.Break, ast.Continue, ast.Return)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# Where in an expression its value may come from.
CHOICES: dict[type, tuple[str, ...]] = {
    ast.IfExp: ("body", "orelse"),
    ast.BoolOp: ("values",),
    ast.List: ("elts",),
    ast.Tuple: ("elts",),
    ast.ListComp: ("elt",),
    ast.Dict: ("values",),
}


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


# --- Expressions and statements --------------------------------------------------------------
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


def root(name: str) -> str:
    return name.partition(".")[0]


def method_call(node: ast.AST) -> tuple[str, str]:
    """`("optimizer", "step")` for `optimizer.step()`; two empty strings for anything else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return dotted(node.func.value), node.func.attr
    return "", ""


def called(node: ast.AST | None) -> str:
    """The last name of the function that a call calls; '' for anything else."""
    return last(dotted(node.func)) if isinstance(node, ast.Call) else ""


def arguments(call: ast.Call) -> list[ast.expr]:
    return [*call.args, *(keyword.value for keyword in call.keywords)]


def walk(node: ast.AST, but: tuple[type, ...] = ()) -> Iterator[ast.AST]:
    """`node` and all in it, in the order of the source, but not what lies in types of `but`."""
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        if current is node or not isinstance(current, but):
            stack.extend(reversed(list(ast.iter_child_nodes(current))))


@lru_cache(maxsize=8192)
def own(node: ast.AST) -> tuple[ast.AST, ...]:
    """`node` and what is in it, but not the code of functions and classes defined there."""
    return tuple(walk(node, DEFINITIONS))


@lru_cache(maxsize=512)
def own_set(node: ast.AST) -> frozenset[ast.AST]:
    return frozenset(own(node))


def own_all(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    for node in nodes:
        yield from own(node)


def unpack(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr, int | None]]:
    """Each name of an assignment's target with its value, or with the whole and an index."""
    if isinstance(target, (ast.Tuple, ast.List)):
        paired = isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts)
        parts = getattr(value, "elts", []) if paired else [value] * len(target.elts)
        for index, (element, part) in enumerate(zip(target.elts, parts, strict=True)):
            for name, inner, deeper in unpack(element, part):
                yield name, inner, deeper if paired else index
    elif isinstance(target, ast.Starred):
        yield from unpack(target.value, value)
    elif isinstance(target, (ast.Name, ast.Attribute)) and dotted(target):
        yield dotted(target), value, None


def names_in(target: ast.expr) -> list[str]:
    return [name for name, _, _ in unpack(target, target)]


def assigned(node: ast.AST) -> list[ast.expr]:
    """The targets of a statement or a walrus that gives them a value."""
    if isinstance(node, ast.Assign):
        return node.targets
    if isinstance(node, (ast.AugAssign, ast.NamedExpr)) or (
        isinstance(node, ast.AnnAssign) and node.value is not None
    ):
        return [node.target]
    return []


def targets(node: ast.AST) -> list[str]:
    """The names that a statement itself binds, header only for a compound one."""
    if isinstance(node, DEFINITIONS):
        return [node.name]
    if isinstance(node, IMPORTS):
        return [alias.asname or root(alias.name) for alias in node.names]
    found = assigned(node)
    if isinstance(node, FORS):
        found = [node.target]
    elif isinstance(node, WITHS):
        found = [item.optional_vars for item in node.items if item.optional_vars]
    return [name for target in found for name in names_in(target)]


def written(nodes: Iterable[ast.AST]) -> dict[str, None]:
    """The names that statements bind, at any depth, in their order."""
    return dict.fromkeys(name for node in own_all(nodes) for name in targets(node))


def deleted(stmt: ast.AST) -> Names:
    """Names that a statement may unbind, at any depth."""
    dels = [target for n in own(stmt) if isinstance(n, ast.Delete) for target in n.targets]
    return frozenset(name for target in dels for name in names_in(target))


def loads(nodes: Iterable[ast.AST], context: type = ast.Load) -> Names:
    return frozenset(
        dotted(n)
        for n in nodes
        if isinstance(n, (ast.Name, ast.Attribute)) and isinstance(n.ctx, context)
    ) - {""}


def makers(value: ast.expr) -> Iterator[ast.Call]:
    """The calls whose result a value is: through `a if c else b`, lists, and `a or b`."""
    if isinstance(value, ast.Call):
        yield value
    for key in CHOICES.get(type(value), ()):
        part = getattr(value, key)
        for choice in part if isinstance(part, list) else [part]:
            yield from makers(choice)


def leaves(stmt: ast.stmt) -> bool:
    """Whether control does not come out behind a simple statement."""
    exits = {"sys.exit", "exit", "quit", "os._exit"}
    value = getattr(stmt, "value", None)
    ends = isinstance(value, ast.Call) and dotted(value.func) in exits
    return isinstance(stmt, (*EXITS, ast.Raise)) or ends


def is_range(expr: ast.expr) -> bool:
    return any(called(node) in {"range", "trange"} for node in walk(expr))


def is_main(test: ast.expr) -> bool:
    """`__name__ == "__main__"`."""
    return isinstance(test, ast.Compare) and dotted(test.left) == "__name__"


def blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        block = getattr(node, name, None)
        if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
            yield block


def first_line(stmt: ast.stmt) -> int:
    lines: list[int] = [d.lineno for d in getattr(stmt, "decorator_list", [])]
    return min([stmt.lineno, *lines])


# --- The script ------------------------------------------------------------------------------
class Script:
    """A parsed script: its lines, who contains whom, who binds and who calls what."""

    def __init__(self, data: bytes, name: str = "train.py", folder: Path | None = None) -> None:
        self.data, self.name, self.folder = data, name, folder
        _, self.lines = decoded(data, name)
        self.source = "".join(line + "\n" for line in self.lines)
        self.tree, table = self._parse()
        self.tables = {(t.get_name(), t.get_lineno()): t for t in _within(table)}
        self.nodes = list(walk(self.tree))
        self.calls = [node for node in self.nodes if isinstance(node, ast.Call)]
        self.functions = [node for node in self.nodes if isinstance(node, FUNCTIONS)]
        self.parent: dict[ast.AST, ast.AST] = {}
        self.home: dict[ast.AST, Spot] = {}
        for node in self.nodes:
            self.parent.update(dict.fromkeys(ast.iter_child_nodes(node), node))
            for block in blocks(node):
                self.home.update({stmt: Spot(block, i) for i, stmt in enumerate(block)})
        self.imports = dict(pair for node in self.nodes for pair in _imported(node))
        self.bindings: dict[str, list[Binding]] = {}
        for binding in (b for node in self.nodes for b in self._bindings_of(node)):
            self.bindings.setdefault(binding.name, []).append(binding)
        self.flow = cache(self._flow)  # of a function, or of the module

    def _parse(self) -> tuple[ast.Module, symtable.SymbolTable]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(self.source, self.name)
                return tree, symtable.symtable(self.source, self.name, "exec")
        except UNPARSABLE as error:
            line = getattr(error, "lineno", None) or 1
            version = ".".join(map(str, sys.version_info[:2]))
            raise PatchError(
                f"{self.name}:{line}: Python {version} cannot parse this script ({error}); if it "
                f"needs another Python, run autopatch.py with that one"
            ) from error

    def _bindings_of(self, node: ast.AST) -> Iterator[Binding]:
        value: Any = getattr(node, "value", None)
        for target in assigned(node):
            for name, part, index in unpack(target, value):
                yield Binding(name, part, index, self.stmt_of(node), self.scope_of(node))

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

    def above(self, node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
        """What is around `node`, up to its own function, each with its child on the way."""
        while node in self.parent:
            node, child = self.parent[node], node
            if isinstance(node, (*FUNCTIONS, ast.Lambda, ast.Module)):
                return
            yield node, child

    def inside(self, node: ast.AST, outer: ast.AST) -> bool:
        while node is not outer and node in self.parent:
            node = self.parent[node]
        return node is outer

    def index_in(self, block: Sequence[ast.stmt], node: ast.AST) -> int:
        """Which statement of `block` holds `node`."""
        return next(i for i, stmt in enumerate(block) if self.inside(node, stmt))

    def loops_around(self, node: ast.AST) -> list[Loop]:
        """From the inside; the iterable and the `else` of a loop run once, not once a turn."""
        return [
            parent
            for parent, child in self.above(node)
            if isinstance(parent, LOOPS)
            and (child in parent.body or child is getattr(parent, "test", None))
        ]

    def behind(self, stmt: ast.AST) -> Spot:
        return Spot(self.home[stmt].block, self.home[stmt].index + 1)

    def after(self, stmt: ast.AST, end: tuple[type, ...] = ()) -> list[ast.stmt]:
        """The statements that come behind `stmt` in its function, or up to an owner in `end`."""
        found: list[ast.stmt] = []
        while stmt in self.home and not isinstance(stmt, DEFINITIONS):
            spot = self.behind(stmt)
            found += spot.block[spot.index :]
            stmt = self.parent[stmt]
            if isinstance(stmt, end):
                break
        return found

    # -- what names mean
    def _table(self, scope: Scope) -> symtable.SymbolTable:
        if isinstance(scope, ast.Module):
            return self.tables["top", 0]
        return self.tables[scope.name, scope.lineno]

    def locals_of(self, scope: Scope) -> Names:
        """Plain names that are local to a function (for the module: its own)."""
        return frozenset(s.get_name() for s in self._table(scope).get_symbols() if s.is_local())

    def outside(self, function: Function) -> Names:
        """Plain names that a function takes from around it."""
        symbols = self._table(function).get_symbols()
        return frozenset(s.get_name() for s in symbols if not s.is_local())

    def parameters(self, scope: Scope) -> list[str]:
        return [s.get_name() for s in self._table(scope).get_symbols() if s.is_parameter()]

    def resolve(self, expr: ast.expr) -> str:
        """The dotted name of an expression with the import aliases undone, or ''."""
        head, _, rest = dotted(expr).partition(".")
        head = self.imports.get(head, head)
        return f"{head}.{rest}" if rest else head

    def made(self, name: str) -> list[ast.Call]:
        """The calls that a name's values come from."""
        return [call for b in self.bindings.get(name, []) for call in makers(b.value)]

    def is_function(self, name: str) -> bool:
        """Whether a name is imported, or defined here as a function."""
        defined = any(f.name == last(name) for f in self.functions)
        return root(name) in self.imports or defined

    def classes(self, name: str) -> list[ast.ClassDef]:
        """The classes of this name: in the script, or in a file beside it that it is imported
        from, which is read and not run."""
        nodes, module = self.nodes, self.imports.get(name, "").rpartition(".")[0]
        path = self.folder / (module.replace(".", "/") + ".py") if self.folder and module else None
        if path and path.is_file():
            try:
                nodes = list(walk(ast.parse(path.read_bytes())))
            except (OSError, *UNPARSABLE):
                return []
        return [node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name]

    def callers(self, function: Function) -> list[ast.Call]:
        return [
            call
            for call in self.calls
            if self._calls(call, function) and self.scope_of(call) is not function
        ]

    def definition(self, call: ast.Call) -> Function | None:
        return next((f for f in self.functions if self._calls(call, f)), None)

    def _calls(self, call: ast.Call, function: Function) -> bool:
        owner, func = self.class_of(function), call.func
        if owner is None:
            is_name = isinstance(func, ast.Name)
            return is_name and function.name in (dotted(func), *self._wrapped(dotted(func)))
        if function.name == "__call__":
            return owner.name in map(called, self.made(dotted(func)))
        if not isinstance(func, ast.Attribute) or func.attr != function.name:
            return False
        if dotted(func.value) == "self":
            scope = self.scope_of(call)
            return owner in (self.class_of(scope), self.class_of(self.scope_of(scope)))
        return owner.name in map(called, [func.value, *self.made(dotted(func.value))])

    def _wrapped(self, name: str) -> Iterator[str]:
        """`train_step` of `step = torch.compile(train_step)`, `partial(train_step, model)`, and
        of `step = make_step()` where that returns it."""
        for maker in self.made(name):
            for factory in (f for f in self.functions if f.name == dotted(maker.func)):
                nodes = own_all(factory.body)
                yield from (dotted(node.value) for node in nodes if isinstance(node, ast.Return))
            if called(maker) in {"compile", "partial", "script", "jit"} and maker.args:
                yield dotted(maker.args[0])

    # -- what has a value
    def bound(self, spot: Spot) -> Names:
        """The names that are certainly bound at a spot."""
        flow = self.flow(self.scope_of(spot.block[0]))
        return flow.before.get((id(spot.block), spot.index), frozenset()) - DEAD

    def reached(self, spot: Spot) -> bool:
        """Whether control comes to a spot: not behind an `if` and `else` that both return."""
        flow = self.flow(self.scope_of(spot.block[0]))
        return not flow.before.get((id(spot.block), spot.index), frozenset()) >= DEAD

    def at_end(self, block: list[ast.stmt]) -> Names:
        return self.bound(Spot(block, len(block)))

    def _flow(self, scope: Scope) -> Flow:
        flow = Flow(self)
        flow.block(scope.body, self._at_entry(scope))
        return flow

    def _at_entry(self, scope: Scope) -> Names:
        """Parameters, what the enclosing functions and the module bind, and `self.x`."""
        if isinstance(scope, ast.Module):
            return frozenset()
        outer = self.at_end(self.tree.body) - (self._of_main - self.outside(scope))
        if isinstance(self.scope_of(scope), FUNCTIONS):
            outer |= self.bound(self.home[scope])
        hidden = self.locals_of(scope)
        names = {name for name in outer if root(name) not in hidden}
        owner = self.class_of(scope)
        for f in owner.body if owner and scope.name != "__init__" else []:
            if isinstance(f, FUNCTIONS) and f.name == "__init__":
                names |= {name for name in self.at_end(f.body) if name.startswith("self.")}
        return frozenset(names.union(self.parameters(scope)))

    @cached_property
    def _of_main(self) -> Names:
        """Names that are there only where the file is run, not where it is imported."""
        mains = [s for s in self.tree.body if isinstance(s, ast.If) and is_main(s.test)]
        only = (frozenset(written(s.body)) - self.bound(self.home[s]) for s in mains)
        return frozenset().union(*only)

    # -- where a line can be added
    def own_line(self, stmt: ast.stmt) -> bool:
        """Whether `stmt` starts its own line (it is not behind a `;` or a one-line `if x:`)."""
        columns = [d.col_offset for d in getattr(stmt, "decorator_list", [])]
        before = self.lines[first_line(stmt) - 1].encode()[: min([stmt.col_offset, *columns])]
        return not before.strip(b" \t\f@")

    def indent_of(self, block: list[ast.stmt]) -> str:
        row = self.lines[first_line(block[0]) - 1]
        return row[: len(row) - len(row.lstrip(" \t\f"))]

    def line_of(self, spot: Spot) -> int | None:
        """The line before which to add so that the new line stands at `spot`; None: no room."""
        block, index = spot.block, spot.index
        if not self.own_line(block[0]):
            return None
        if index == 0:  # above the comments that stand over a block's first statement
            line = first_line(block[0])
            while line > 1 and not self.lines[line - 2].partition("#")[0].strip():
                line -= 1
            return line
        end = block[index - 1].end_lineno or 1
        return None if index < len(block) and first_line(block[index]) <= end else end + 1


def _within(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    """A table and those in it; a function comes behind the table of its type parameters."""
    yield table
    for child in table.get_children():
        yield from _within(child)


def _imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Each name that an import binds, and what it stands for."""
    for alias in node.names if isinstance(node, IMPORTS) else []:
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield alias.asname or alias.name, f"{module}.{alias.name}".lstrip(".")
        else:
            head = root(alias.name)
            yield alias.asname or head, alias.name if alias.asname else head


# --- What is bound, and what is read unbound -------------------------------------------------
DEAD = frozenset({"*"})  # added to the names of a path that does not come back


def meet(a: Names, b: Names) -> Names:
    """The names bound on both of two paths, of those that come back."""
    if a >= DEAD:
        return b
    return a if b >= DEAD else a & b


class Flow:
    """One pass over statements: the names bound before each, and those read while unbound."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.before: dict[tuple[int, int], Names] = {}
        self.unbound: dict[str, None] = {}
        # What a test's branch bound is there when the same test is true again: presumed, not sure.
        self.under: dict[str, Names] = {}
        self.presumed: Names = frozenset()

    def block(self, block: Sequence[ast.stmt], bound: Names) -> Names:
        """Returns what is bound at its end; `bound` is what is bound at its start."""
        for index, stmt in enumerate(block):
            self.before[id(block), index] = bound
            bound = self._stmt(stmt, bound)
        self.before[id(block), len(block)] = bound
        return bound

    def _stmt(self, stmt: ast.stmt, bound: Names) -> Names:
        if isinstance(stmt, ast.If):
            return self._if(stmt, self.read(stmt.test, bound))
        if isinstance(stmt, LOOPS):
            return self._loop(stmt, bound)
        if isinstance(stmt, WITHS):
            for item in stmt.items:
                bound = self.read(item.context_expr, bound)
            return self.block(stmt.body, bound.union(targets(stmt)))
        if hasattr(stmt, "handlers"):
            return self._try(stmt, bound)
        if isinstance(stmt, ast.Match):
            bound = self.read(stmt.subject, bound)
            for case in stmt.cases:
                self.block(case.body, bound)
            return bound - deleted(stmt)
        return self._simple(stmt, bound)

    def _simple(self, stmt: ast.stmt, bound: Names) -> Names:
        if isinstance(stmt, DEFINITIONS):  # it may be called at once, and reads what is not its own
            hidden = self.script.locals_of(stmt) if isinstance(stmt, FUNCTIONS) else frozenset()
            self.unbound |= dict.fromkeys(loads(walk(stmt)) - bound - hidden)
            return bound.union(targets(stmt))
        if isinstance(stmt, ast.AugAssign) and dotted(stmt.target) not in bound:
            self.unbound[dotted(stmt.target)] = None
        bound = self.read(stmt, bound).union(targets(stmt)) - deleted(stmt)
        return bound | DEAD if leaves(stmt) else bound

    def _if(self, stmt: ast.If, bound: Names) -> Names:
        test, presumed = ast.unparse(stmt.test), self.presumed
        self.presumed |= self.under.get(test, frozenset())
        taken = self.block(stmt.body, bound)
        self.under[test] = self.under.get(test, frozenset()) | taken
        self.presumed = presumed
        other = self.block(stmt.orelse, bound)
        return taken if is_main(stmt.test) else meet(taken, other)

    def _loop(self, loop: Loop, bound: Names) -> Names:
        bound = self.read(loop.test if isinstance(loop, ast.While) else loop.iter, bound)
        bound -= deleted(loop)  # in the turn before
        end = self.block(loop.body, bound.union(targets(loop)))
        self.block(loop.orelse, bound)
        # A loop over batches that back-propagates runs at least once, or nothing is learned.
        learns = any(isinstance(n, ast.Attribute) and n.attr == "backward" for n in own(loop))
        return end if isinstance(loop, FORS) and learns and not end >= DEAD else bound

    def _try(self, stmt: Any, bound: Names) -> Names:
        end = self.block(stmt.orelse, self.block(stmt.body, bound))
        bound -= deleted(stmt)
        for handler in stmt.handlers:
            end = meet(end, self.block(handler.body, bound | {handler.name or ""}))
        return end | self.block(stmt.finalbody, bound)

    def read(self, node: ast.AST, bound: Names) -> Names:
        """Returns the names that are bound once `node` has been evaluated."""
        inside = {arg.arg for n in own(node) if isinstance(n, ast.arguments) for arg in n.args}
        for part in own(node):
            if isinstance(part, ast.comprehension):
                inside |= loads(walk(part.target), ast.Store)
        for name in sorted(loads(own(node)) - bound - self.presumed):
            if root(name) not in inside:
                self.unbound[name] = None
        return bound | always(node)


def always(node: ast.AST) -> Names:
    """Names that are read or bound whenever `node` is evaluated: behind it, they are bound."""
    sometimes = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.Assert, *COMPREHENSIONS)
    if isinstance(node, sometimes):
        return frozenset()
    sure = [n for n in walk(node, sometimes) if not isinstance(n, sometimes)]
    return loads(sure) | {name for n in sure for name in targets(n)}
