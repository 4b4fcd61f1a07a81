"""Add the observability call sites to a PyTorch training script, or take them away again.

    python autopatch.py train.py              print the diff; nothing is written
    python autopatch.py train.py --write      apply it, keep a backup, copy observability.py to it
    python autopatch.py train.py --reverse    give back the original, byte for byte
    python autopatch.py train.py --check      what was found, how surely, and what was left out;
                                              of a script with call sites what they lack
    python autopatch.py train.py --only log,resume
    python autopatch.py train.py --patch FILE     apply a ready patch, pinned by sha256

It reads the script's syntax tree and runs nothing. It only adds whole lines, each ending in
`# observability`; the script without them is the original. An added line uses names that are
certainly bound where it stands, calls no function of the script, reads no batch, and turns the
flow nowhere but in the guards `if obs.skip_epoch(): continue`, `if obs.skip_batch(): continue`.
Where that cannot be kept, the line is left out and said, with its number and the reason.

For other programs: `patch(source)` gives the patched bytes and the plan, `reverse(source)` the
original. Exit status: 0 found, 1 nothing to patch in this file (it says where to look) or, of
`--check`, a call site is missing, 2 error.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

from check import blanked, has_call_sites, omissions, report
from files import apply, drop_backup, in_package, write
from lines import (
    MARK,
    PatchError,
    apply_pinned,
    compiled,
    ends_a_line,
    is_marked,
    marked_numbers,
    parse_error,
    pin,
    reverse,
    split_lines,
    unified,
    weave,
)
from script import (
    DEFINITIONS,
    EXITS,
    FORS,
    FUNCTIONS,
    IMPORTS,
    LOOPS,
    WITHS,
    Binding,
    Flow,
    Function,
    Loop,
    Names,
    Scope,
    Script,
    Spot,
    arguments,
    assigned,
    called,
    dotted,
    is_range,
    last,
    loads,
    makers,
    method_call,
    names_in,
    own,
    own_all,
    own_set,
    root,
    targets,
    walk,
    written,
)

__all__ = [
    "Insertion",
    "PatchError",
    "Plan",
    "Script",
    "is_marked",
    "patch",
    "plan",
    "reverse",
    "split_lines",
]

COLUMNS = 100  # of an added line at most
LARGEST = 4_000_000  # bytes: more takes more than a few seconds, and no script has them
PARTS = ("log", "validation", "resume")
TO_BE_PROVED = "to be proved with prove.py --kill"
# Each kind of line and the part that it belongs to. Between the same two lines of the original,
# what is added stands in this order.
KINDS = {
    "import": "log",
    "init": "log",
    "watch": "log",
    "skip": "resume",
    "resume": "resume",
    "validation": "validation",
    "step": "log",
    "finish": "log",
}


class NothingToPatch(PatchError):
    """The file holds no training loop of its own."""


@dataclass(frozen=True)
class Insertion:
    """One added line: it goes before line `line` of the original (1-based)."""

    line: int
    indent: str
    kind: str
    code: str
    confidence: str = "sure"


@dataclass(frozen=True)
class Note:
    """Something that was left out or is doubtful: where, why, and what it costs the whole of."""

    line: int
    text: str
    part: str = ""  # "resume": it cannot be exact; "validation": an evaluation is not recorded


Found = Iterator[Insertion | Note]


@dataclass(frozen=True)
class Plan:
    """What is to be added to a script, what was found, and what was not."""

    insertions: list[Insertion]
    notes: list[Note]
    parts: dict[str, str]


def patch(
    source: bytes, name: str = "train.py", parts: Sequence[str] = PARTS, package: bool = False
) -> tuple[bytes, Plan]:
    """The patched source, of a script or a module of a package, and what was found.

    Raises PatchError, NothingToPatch.
    """
    script = Script(source, name)
    found = plan(script, parts, package)
    return patched(script, found.insertions), found


def plan(script: Script, parts: Sequence[str] = PARTS, package: bool = False) -> Plan:
    """Find the call sites of a script; raises NothingToPatch when it has no loop of its own."""
    roles = Roles(script)
    updates = find_updates(script, roles)
    nests = find_nests(script, updates)
    if not nests:
        raise NothingToPatch(where_to_look(script, roles, updates))
    obs = free_name(script)
    found: list[Insertion | Note] = [import_line(script, obs, package)]
    for nest in nests:
        loop = TrainingLoop(script, roles, nest, obs, len(nests) > 1, "resume" in parts)
        # What two loops evaluate by one function is recorded there once.
        taken = {each.line for each in found if getattr(each, "kind", "") == "validation"}
        mine = [each for rule in RULES for each in rule(loop)]
        found += [e for e in mine if getattr(e, "kind", "") != "validation" or e.line not in taken]
    return summed_up([*found, *uncounted(script, nests, updates)], {"log", *parts})


def summed_up(found: Sequence[Insertion | Note], wanted: set[str]) -> Plan:
    every = dict.fromkeys(each for each in found if isinstance(each, Insertion))
    notes = dict.fromkeys(each for each in found if isinstance(each, Note))
    order = list(KINDS)
    kinds, lost = {each.kind for each in every}, {note.part for note in notes}
    return Plan(
        sorted(
            (each for each in every if KINDS[each.kind] in wanted),
            key=lambda i: (i.line, -len(i.indent.expandtabs(8)), order.index(i.kind)),
        ),
        list(notes),
        {
            "log": "yes" if "step" in kinds else "no",
            "validation": "yes"
            if "validation" in kinds
            else "no"
            if "validation" in lost
            else "none seen",
            "resume": TO_BE_PROVED if kinds & {"skip", "resume"} else "no",
        },
    )


def note(where: ast.AST, text: str, part: str = "") -> Note:
    return Note(getattr(where, "lineno", 1), text, part)


def refusal(where: ast.AST, why: str) -> Note:
    return note(where, f"resume is left out: {why}", "resume")


def place(
    script: Script, spot: Spot, kind: str, code: str, confidence: str = "sure"
) -> list[Insertion]:
    """A line at a spot; none when the original has no room for a line there."""
    line = script.line_of(spot)
    indent = script.indent_of(spot.block)
    return [] if line is None else [Insertion(line, indent, kind, code, confidence)]


def patched(script: Script, insertions: Sequence[Insertion]) -> bytes:
    """The script with the lines added; it compiles, and without them it is the original."""
    added: dict[int, list[str]] = {}
    for item in insertions:
        added.setdefault(item.line, []).append(f"{item.indent}{item.code}  {MARK}")
    return compiled(weave(script.data, added, script.name), script.name)


# --- Of the whole file -----------------------------------------------------------------------
def free_name(script: Script) -> str:
    """`obs`, or the full name where the script uses `obs` for anything, a string included."""
    taken = {value for node in script.nodes for value in vars(node).values() if type(value) is str}
    taken |= {s.get_name() for table in script.tables.values() for s in table.get_symbols()}
    for name in ("obs", "observability"):
        if name not in taken:
            return name
    raise PatchError(
        f"{script.name}: uses both names, obs and observability, for something else; "
        f"rename one of them"
    )


def import_line(script: Script, obs: str, package: bool) -> Insertion:
    """Behind the first run of imports that has torch, or behind the last import."""
    body = script.tree.body
    imports = [i for i, stmt in enumerate(body) if isinstance(stmt, IMPORTS)]
    with_torch = [i for i in imports if "torch" in ast.unparse(body[i])]
    index = [*with_torch, *imports[-1:], -1][0]
    while index + 1 in imports:
        index += 1
    if not imports and ast.get_docstring(script.tree) is not None:
        index = 0
    start = "from . import" if package else "import"
    code = f"{start} observability" + (" as obs" if obs == "obs" else "")
    for at in range(index + 1, len(body) + 1):
        for found in place(script, Spot(body, at), "import", code):
            return found
    raise PatchError(f"{script.name}: no room for the import")


def uncounted(script: Script, nests: Sequence[Nest], updates: Sequence[Update]) -> Iterator[Note]:
    """An optimizer step that no loop which is observed makes; a wrapper's own is none."""
    counted = {update.call for nest in nests for update in nest.updates}
    text = (
        "this optimizer step is outside the loop that is observed (a remainder, or never called "
        "here); it is not counted"
    )
    for update in updates:
        within = getattr(script.scope_of(update.call), "name", "")
        if update.call not in counted and within != "step":
            yield note(update.call, text)


def where_to_look(script: Script, roles: Roles, updates: Sequence[Update]) -> str:
    """Why there is nothing to patch, and which file to try instead."""
    if updates:
        return (
            f"{script.name}:{updates[0].call.lineno}: an optimizer steps here, but no loop of "
            f"this file calls it; patch the script that has the loop"
        )
    files = dict.fromkeys(_trained_in(script, roles, call) for call in script.calls)
    if any(files):
        names = ", ".join(file for file in files if file)
        return f"{script.name}: the optimizer is stepped elsewhere: try {names}"
    for call in script.calls:
        name = script.resolve(call.func)
        if re.search(r"(?:^|\.)(?:\w*Trainer|Learner|fit|train)$", name):
            return (
                f"{script.name}:{call.lineno}: the loop is in {name}(), not in this file; "
                f"use its callbacks"
            )
    return f"{script.name}: no optimizer step in a loop was found"


def _trained_in(script: Script, roles: Roles, call: ast.Call) -> str:
    """The file of an imported function that is given an optimizer, or trains in a loop."""
    module = script.imports.get(root(dotted(call.func)), "")
    libraries = {"", "torch", "transformers", "numpy", "tqdm", "torchvision"}
    if root(module) in libraries or SCHEDULER_CALL.search(module):
        return ""
    trains = re.search(r"train|fit|run_epoch|learn", called(call), re.I)
    given = any(roles.optimizer(dotted(each)) for each in arguments(call))
    if given or (trains and script.loops_around(call)):
        return (module.rpartition(".")[0] or module).replace(".", "/") + ".py"
    return ""


# --- What the names stand for ----------------------------------------------------------------
OPTIMIZER_CALL = re.compile(
    r"^torch\.optim\.(?!lr_scheduler|swa_)|"
    r"(?:^|\.)(?!\w*(?i:param|group|state|zero|_lr|step|sched))(?:"
    r"\w*Adam\w*|\w*SGD\w*|RMSprop|Adagrad|Adadelta|Rprop|LBFGS|Lion\w*|\w*Muon\w*|Sophia\w*|"
    r"L[Aa][Mm][Bb]|LARS|Adafactor|Adan|SAM|\w*Shampoo|SOAP\w*|Prodigy|Ranger\w*|DAdapt\w*|"
    r"ScheduledOptim|NoamOpt|Optim|\w*[Oo]ptimizers?\w*|optim_cls|"
    r"(?:get|make|build|create|setup|configure)_optim\w*)$"
)
OPTIMIZER_NAME = re.compile(r"optim|(?:^|_)opt(?:s|_|\d|$)|^opt[A-Z]|Opt$|solver$", re.I)
SCHEDULER_CALL = re.compile(
    r"(?:LR|Scheduler|ReduceLROnPlateau|WarmRestarts)$|(?:^|\.)(?:build|create|make|get)_\w*sched",
    re.I,
)
SCHEDULER_NAME = re.compile(r"sched|^lr_decay$|warmup_lr", re.I)
SCALER_NAME = re.compile(r"scaler\w*$", re.I)
MODEL_NAME = re.compile(
    r"model|net|module|actor|critic|agent|encoder|decoder|generator|discriminator|policy|^[GD]$",
    re.I,
)
GIVES_PARAMETERS = re.compile(
    r"(?:named_|optim_)?parameters(?:_to_optimize)?$|configure_optimizers?$"
)
AVERAGE_NAME = re.compile(
    r"(?:^|_)(?:ema|swa|avg_model|model_avg|averaged?|shadow)(?:_|\d|$)", re.I
)
LOSS_NAME = re.compile(
    r"loss|nll|ppl|perplex|bpb|(?:^|_)(?:err\w?|cost|elbo|mse|ce|bce|objective)(?:_|\d|$)|^err[DG]",
    re.I,
)
METRIC_NAME = re.compile(
    r"acc|score|bleu|auc|^f1|map\b|_map|dice|iou|metric|reward|fid|prec|recall|top|psnr", re.I
)


class Roles:
    """Which names are optimizers, schedulers, models."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.optimizer = cache(self._is_optimizer)
        used = [(*method_call(call), bool(call.args)) for call in script.calls]
        self.modules = list(
            dict.fromkeys(
                name
                for name, method, is_given in used
                if method in {"parameters", "named_parameters"}
                or (method in {"train", "eval", "zero_grad"} and not is_given)
                if name not in ("", "self") and not self.optimizer(name)
            )
        )

    def _is_optimizer(self, name: str) -> bool:
        end = last(name)
        if not name or (SCHEDULER_NAME.search(end) and not OPTIMIZER_CALL.search(end)):
            return False
        return (
            self.made_by(name, OPTIMIZER_CALL)
            or (end == "optimizer" and self.optimizer(name.rpartition(".")[0]))
            or (bool(OPTIMIZER_NAME.search(end)) and not self.arguments(name))
        )

    def scheduler(self, name: str) -> bool:
        by_name = SCHEDULER_NAME.search(last(name)) or self.made_by(name, SCHEDULER_CALL)
        return bool(name and by_name) and not self.optimizer(name)

    def arguments(self, name: str) -> bool:
        """Command-line arguments: the result of `parse_args()`."""
        makes = {called(call) for call in self.script.made(name)}
        return bool(makes & {"parse_args", "parse_known_args"})

    def made_by(self, name: str, call_name: re.Pattern[str]) -> bool:
        own_name = SCHEDULER_NAME if call_name is SCHEDULER_CALL else OPTIMIZER_NAME
        return any(
            call_name.search(self._maker(call)) and (b.index is None or own_name.search(last(name)))
            for b in self.script.bindings.get(name, [])
            for call in makers(b.value)
        )

    def _maker(self, call: ast.Call) -> str:
        if isinstance(call.func, ast.Call) and call.func.args:  # getattr(torch.optim, x)(...)
            return self.script.resolve(call.func.args[0]) + ".X"
        return self.script.resolve(call.func)

    def models_of(self, optimizer: str) -> list[str]:
        """Models whose parameters an optimizer was given, as named where it was made."""
        found = [name for call in self.script.made(optimizer) for name in self._models_in(call, 3)]
        return list(dict.fromkeys(found))

    def _models_in(self, expr: ast.AST, depth: int) -> Iterator[str]:
        for node in walk(expr):
            if isinstance(node, ast.Attribute) and GIVES_PARAMETERS.match(node.attr):
                yield self._assigned(dotted(node.value))
            elif isinstance(node, ast.Name) and node.id in self.modules:
                if MODEL_NAME.search(node.id):
                    yield node.id
            elif isinstance(node, ast.Name) and depth and re.search("param|group", node.id, re.I):
                for binding in self.script.bindings.get(node.id, []):
                    yield from self._models_in(binding.value, depth - 1)

    def _assigned(self, name: str) -> str:
        """`model` for `model.fc`: the shortest prefix that the script assigns."""
        heads = [name[: dot.start()] for dot in re.finditer(r"\.|$", name)]
        made = [h for h in heads if h in self.script.bindings and not self.arguments(h)]
        return [*made, name][0]


# --- Where the optimizer steps, and the loops around it --------------------------------------
class Update(NamedTuple):
    """One optimizer step in the script: the call, whose it is, and the scaler it goes through."""

    call: ast.Call
    optimizer: str
    scaler: str = ""


@dataclass(frozen=True, eq=False)
class Nest:
    """The loops around an update, outermost first; `sites` are the nodes of the innermost loop's
    own function that step (the call itself, or the call of a helper that steps)."""

    loops: tuple[Loop, ...]
    sites: tuple[ast.AST, ...]
    updates: tuple[Update, ...]
    doubtful: str = ""

    @property
    def inner(self) -> Loop:
        return self.loops[-1]

    @property
    def optimizers(self) -> list[str]:
        return list(dict.fromkeys(u.optimizer for u in self.updates if u.optimizer))


def find_updates(script: Script, roles: Roles) -> list[Update]:
    uses = [(call, *method_call(call)) for call in script.calls]
    engines = {name for call, name, method in uses if method == "backward" and call.args}
    found = [update for call in script.calls if (update := _update(call, roles, engines))]
    spread = [
        Update(u.call, name, u.scaler)
        for u in found
        for name in looped_over(script, u.call, u.optimizer, roles.optimizer)
    ]
    # No optimizer at all: `p.data.add_(p.grad, alpha=-lr)` after a backward.
    by_hand = {script.scope_of(n) for n in script.nodes if getattr(n, "attr", "") == "grad"}
    return spread or [
        Update(call, "")
        for call, _, method in uses
        if method == "backward" and script.scope_of(call) in by_hand and script.loops_around(call)
    ]


def _update(call: ast.Call, roles: Roles, engines: set[str]) -> Update | None:
    receiver, method = method_call(call)
    given = next((dotted(arg) for arg in call.args if roles.optimizer(dotted(arg))), "")
    if given and method in {"step", "optimizer_step", "optimize", "step_optimizer"}:
        return Update(call, given, receiver if SCALER_NAME.search(receiver) else "")
    if given and SCALER_NAME.search(called(call)):  # loss_scaler(loss, optimizer, ...)
        return Update(call, given, dotted(call.func))
    if method not in {"step", "second_step", "step_and_update_lr"}:
        return None
    if roles.optimizer(receiver):
        holder = receiver.rpartition(".")[0]
        return Update(call, holder if roles.optimizer(holder) else receiver)
    plain = not re.search(r"scaler|accelerator|fabric", receiver, re.I)
    return Update(call, receiver) if receiver in engines and plain else None


def looped_over(
    script: Script, node: ast.AST, name: str, is_one: Callable[[str], bool]
) -> list[str]:
    """What `opt` is in `for opt in optimizers`, `in [a, b]`, also through zip and enumerate."""
    for loop in script.loops_around(node):
        if isinstance(loop, FORS) and name in targets(loop):
            return [n for n in map(dotted, walk(loop.iter)) if is_one(n)] or [name]
    return [name]


def find_nests(script: Script, updates: Sequence[Update]) -> list[Nest]:
    """From update calls to the loops that they stand in, through the functions that hold them."""
    by_loop: dict[Loop, Nest] = {}
    for update in updates:
        for site, loops, doubt in _ways(script, update.call, ()):
            new = Nest(tuple(loops[::-1]), (), (), doubt)
            nest = by_loop.get(loops[0], new)
            sites, made = (*nest.sites, site), (*nest.updates, update)
            by_loop[loops[0]] = replace(nest, sites=sites, updates=made)
    return _merged(script, list(by_loop.values()))


Way = tuple[ast.AST, list[Loop], str]


def _ways(script: Script, node: ast.AST, seen: tuple[ast.AST, ...]) -> list[Way]:
    """Each way into a loop: the node that steps there, the loops from the inside, a doubt."""
    scope = script.scope_of(node)
    loops = [loop for loop in script.loops_around(node) if not _is_over_optimizers(loop)]
    ways: list[Way] = []
    if isinstance(scope, FUNCTIONS) and scope not in seen and len(seen) <= 5:
        for call in script.callers(scope):
            ways += _ways(script, call, (*seen, scope))
    if not loops:
        return ways
    doubt = _perhaps_called(script, scope)
    if len({tuple(outer) for _, outer, _ in ways}) > 1:
        doubt = "the training function is called from several loops"
    return [(node, loops + (ways[0][1] if ways else []), doubt)]


def _perhaps_called(script: Script, scope: Scope) -> str:
    """A method of this name is called in a loop, on an object whose class is not known."""
    for call in script.calls if script.class_of(scope) else []:
        same = method_call(call)[1] == getattr(scope, "name", "") and arguments(call)
        if same and script.loops_around(call) and not script.definition(call):
            return f"line {call.lineno} may call this training several times"
    return ""


def _is_over_optimizers(loop: Loop) -> bool:
    """`for opt in optimizers: opt.step()` is not a loop over batches."""
    names = set(targets(loop))
    return any(
        names & {name, *map(dotted, getattr(n, "args", []))}
        for n in (own_all(loop.body) if names else [])
        for name, method in [method_call(n)]
        if method in {"step", "zero_grad"}
    )


def _merged(script: Script, nests: list[Nest]) -> list[Nest]:
    """One nest per training loop: an inner loop of critic steps, or a remainder after it."""
    for small, big in itertools.permutations(nests, 2):
        if small.inner not in big.loops:
            continue
        if {*small.optimizers} <= {*big.optimizers}:  # a remainder, around `big`
            return _merged(script, [n for n in nests if n is not small])
        if script.inside(big.inner, small.inner):  # critic steps inside the iteration
            whole = replace(small, updates=(*small.updates, *big.updates))
            rest = [whole if n is small else n for n in nests if n is not big]
            return _merged(script, rest)
    return nests


# --- The facts of one training loop ----------------------------------------------------------
@dataclass(frozen=True, eq=False)
class TrainingLoop:
    """What the rules ask about one nest of loops; each fact is worked out when it is asked for."""

    script: Script
    roles: Roles
    nest: Nest
    obs: str  # the name of the drop-in
    several: bool  # loops in this file
    wants_resume: bool

    # -- the loops
    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The loops of one run: those outside of which the optimizer is made."""
        made = [b for name in self.optimizers for b in self.script.bindings.get(name, [])]
        loops = self.nest.loops
        while len(loops) > 1 and any(self._is_made_within(b, loops) for b in made):
            loops = loops[1:]
        return loops

    def _is_made_within(self, made: Binding, loops: Sequence[Loop]) -> bool:
        """Made inside the outermost of these loops, or in a function that this loop calls."""
        callees = {self.script.scope_of(loop) for loop in loops[1:]}
        return made.stmt in own_set(loops[0]) or (
            made.scope in callees - {self.script.scope_of(loops[0])}
        )

    @property
    def inner(self) -> Loop:
        return self.nest.inner

    @property
    def outer(self) -> Loop:
        return self.loops[0]

    @cached_property
    def scope(self) -> Scope:
        return self.script.scope_of(self.inner)

    @cached_property
    def outer_scope(self) -> Scope:
        return self.script.scope_of(self.outer)

    @property
    def start(self) -> Spot:
        return self.script.home[self.outer]

    @cached_property
    def at_start(self) -> Names:
        return self.script.bound(self.start)

    @cached_property
    def again(self) -> bool:
        """Another loop calls this one again and again: all of it is one run, that the exit ends."""
        whole = self.script.scope_of(self.nest.loops[0])
        in_part = self.loops != self.nest.loops and whole != self.outer_scope
        return bool(self.nest.doubtful) or in_part

    @property
    def last_site(self) -> int:
        return max(getattr(site, "lineno", 0) for site in self.nest.sites)

    def holds(self, node: ast.AST) -> bool:
        return any(self.script.inside(node, loop) for loop in self.nest.loops)

    # -- what is trained
    @property
    def optimizers(self) -> list[str]:
        return self.nest.optimizers

    @cached_property
    def visible_optimizers(self) -> list[str]:
        """Those of its names that are bound before the loop, else what else may be one of them."""
        direct = [name for name in self.optimizers if name in self.at_start]
        if direct and len(direct) == len(self.optimizers):
            return direct
        bindings, given = self.script.bindings, self.script.parameters(self.outer_scope)
        seen = [name for name in bindings if name in self.at_start]
        made = [name for name in seen if self.roles.made_by(name, OPTIMIZER_CALL)]
        others = made or [name for name in given if "optim" in name.lower()]
        return list(dict.fromkeys([*direct, *others]))

    @cached_property
    def models(self) -> list[str]:
        """Those that an optimizer was given; else what is used as one, by its name or not."""
        seen, script = self.at_start, self.script
        optimizers = dict.fromkeys([*self.optimizers, *self.visible_optimizers])
        found = [m for o in optimizers for m in self.roles.models_of(o) if m in seen]
        used = [m for m in self.roles.modules if m in seen and m not in script.imports]
        found = found or [m for m in used if MODEL_NAME.search(last(m))] or used
        found = found or [
            name
            for name in dict.fromkeys(dotted(call.func) for call in script.calls)
            if name in seen and re.search("model$|^net|net$", last(name))
            if not script.is_function(name)
        ]
        copied = [
            name
            for call in script.calls  # a target network
            for name, method in [method_call(call)]
            if method == "load_state_dict" and name in seen and call in own_set(self.outer)
            if not self.roles.optimizer(name)
        ]
        return list(dict.fromkeys([*self._of_scope(found), *copied, *self._averages(found)]))

    def _averages(self, models: list[str]) -> list[str]:
        """`ema = copy.deepcopy(model)` that the loop goes on with."""
        used = loads(own_set(self.outer))
        return [
            name
            for name in self.script.bindings
            if name in self.at_start & used and AVERAGE_NAME.search(last(name))
            for call in self.script.made(name)
            if called(call) in {"deepcopy", "AveragedModel"}
            and any(dotted(part) in models for part in own_all(arguments(call)))
        ]

    @cached_property
    def schedulers(self) -> list[str]:
        stepped = [
            name
            for call in self.script.calls
            for receiver, method in [method_call(call)]
            if method in {"step", "step_update"}
            for name in looped_over(self.script, call, receiver, self.roles.scheduler)
        ]
        return self._of_scope(
            [name for name in stepped if name in self.at_start and self.roles.scheduler(name)]
        )

    def _of_scope(self, names: list[str]) -> list[str]:
        """The function's own names, where it has any: a global one may be the same object."""
        local = self.script.locals_of(self.outer_scope)
        return [name for name in names if root(name) in local] or names

    # -- what is worked out of the parts below
    @cached_property
    def losses(self) -> list[Loss]:
        found: dict[str, Loss] = {}
        for loss in losses_of(self):
            found.setdefault(loss.name, loss)
        return list(found.values())

    @cached_property
    def conditions(self) -> list[tuple[ast.If, bool]]:
        """The `if`s around the only update, outermost first, and the branch taken; none if each
        iteration steps."""
        ways = [tests_around(self, site) for site in self.nest.sites]
        return ways[-1] if all(ways) else []

    @cached_property
    def gate(self) -> str:
        """`with accelerator.accumulate(model)`: it steps where the gradients are whole."""
        for parent, _ in self.script.above(self.nest.sites[-1]):
            for item in parent.items if isinstance(parent, WITHS) else []:
                engine, method = method_call(item.context_expr)
                if method == "accumulate" and engine:
                    return f"{engine}.sync_gradients"
        return ""

    @cached_property
    def ends(self) -> list[StepSpot | Note]:
        return list(ends_of(self))

    @cached_property
    def carried(self) -> Carried:
        return carried_by(self)

    @cached_property
    def refusals(self) -> list[Note]:
        return [found for rule in REFUSALS for found in list(rule(self))[:1]]

    @property
    def resumes(self) -> bool:
        return self.wants_resume and not self.refusals

    # -- where a line goes
    def add(self, spot: Spot, kind: str, code: str, confidence: str = "sure") -> list[Insertion]:
        return place(self.script, spot, kind, code, confidence)

    def fits(self, spot: Spot, code: str) -> bool:
        indent = self.script.indent_of(spot.block)
        return len(f"{indent.expandtabs(4)}{code}  {MARK}") <= COLUMNS

    def in_columns(
        self, spot: Spot, parts: Sequence[str], call: Callable[[Sequence[str]], str]
    ) -> list[str]:
        """Calls of ours that hold all the parts, as few as fit the width of a line."""
        lines: list[list[str]] = []
        for part in parts:
            if lines and self.fits(spot, call([*lines[-1], part])):
                lines[-1].append(part)
            else:
                lines.append([part])
        return [call(some) for some in lines]

    def counter(self, bound: Names) -> str:
        """The script's own count of steps: one that goes up by 1 an iteration and never back."""
        for node in own_all([] if self.again else self.inner.body):
            if isinstance(node, ast.AugAssign) and self._counts_steps(node):
                name = dotted(node.target)
                return name if name in bound & self.at_start else ""
        loop = self.inner
        whole = not (self.again or self.conditions) and len(self.loops) == 1
        if whole and isinstance(loop, ast.For) and is_range(loop.iter):
            name = getattr(loop.target, "id", "")
            return name if name in bound else ""
        return ""

    def _counts_steps(self, node: ast.AugAssign) -> bool:
        name = dotted(node.target)
        by_one = isinstance(node.op, ast.Add) and getattr(node.value, "value", None) == 1
        all_of = self.script.bindings.get(name, [])
        once = [b.stmt for b in all_of if b.stmt in own_set(self.outer)] == [node]
        if not (by_one and once and re.search(r"step|iter|batch|^[nit]$", last(name), re.I)):
            return False
        mine, theirs = self._branches(node), self._branches(self.nest.sites[0])
        return mine == theirs or (not self.conditions and {*mine} <= {*theirs})

    def _branches(self, node: ast.AST) -> list[ast.AST]:
        return [n for n, _ in self.script.above(node) if isinstance(n, (ast.If, *LOOPS))]


def key_of(expr: str) -> str:
    """An identifier for an expression: `iter_num` for `self.iter_num`."""
    return re.sub(r"\W+", "_", expr.removeprefix("self.")).strip("_") or "value"


# --- Rules: the run is opened, what it trains is named, it is closed -------------------------
def opened(n: TrainingLoop) -> Iterator[Insertion]:
    """`obs.init(config=vars(args))` before the outermost loop."""
    args = []
    if _worker(n):
        rank = n.script.parameters(n.outer_scope)[:1]
        args += [f'f"worker{{{name}}}"' for name in rank]
    elif n.several:
        args.append(f'"{getattr(n.outer_scope, "name", "line")}_{n.outer.lineno}"')
    if config := _config(n):
        args.append(f"config={config}")
    once = f"if {n.obs}.current_run() is None: " if n.again else ""
    found = n.add(n.start, "init", f"{once}{n.obs}.init({', '.join(args)})")
    if not found:
        raise PatchError(f"{n.script.name}:{n.outer.lineno}: no room before the loop")
    yield from found


def _config(n: TrainingLoop) -> str:
    """`vars(args)` of what parse_args gave; else a name that a configuration usually has."""
    for name in sorted(n.at_start & n.script.bindings.keys()):
        if {called(call) for call in n.script.made(name)} == {"parse_args"} and "." not in name:
            return name if name in n.script.parameters(n.outer_scope) else f"vars({name})"
    known = n.at_start & (n.script.bindings.keys() | n.script.locals_of(n.outer_scope))
    for name in ("args", "opt", "config", "cfg", "hparams", "hps", "self.config"):
        if name in known and name not in n.script.imports and not n.roles.optimizer(name):
            return name
    return ""


def _worker(n: TrainingLoop) -> ast.Call | None:
    """`Process(target=train, args=(rank,))`: it runs beside others, without torch.distributed."""
    name = getattr(n.outer_scope, "name", "")
    starts = {"Process", "spawn", "start_processes"} if name else set()
    for call in n.script.calls if "init_process_group" not in n.script.source else []:
        if called(call) in starts and name in map(dotted, arguments(call)):
            return call
    return None


def watched(n: TrainingLoop) -> Iterator[Insertion]:
    """`obs.watch(model, optimizer=opt, scheduler=sched)`: what a checkpoint is to hold."""
    if n.again:  # each call has an optimizer of its own, and the run would keep them all
        return
    loader = _loader(n.inner)
    made = any(called(call).endswith("DataLoader") for call in n.script.made(loader))
    keywords = {
        "optimizer": n.visible_optimizers,
        "scheduler": n.schedulers,
        "scaler": [u.scaler for u in n.nest.updates if u.scaler in n.at_start],
        "loader": [loader] if made and loader in n.at_start else [],
    }
    args = list(n.models)
    for key, names in keywords.items():
        unique = list(dict.fromkeys(names))
        value = f"[{', '.join(unique)}]" if len(unique) > 1 else "".join(unique)
        args += [f"{key}={value}"] * bool(unique)
    sure = "sure" if n.models and n.visible_optimizers else "likely"
    for code in n.in_columns(n.start, args, lambda some: f"{n.obs}.watch({', '.join(some)})"):
        yield from n.add(n.start, "watch", code, sure)


def _loader(loop: Loop) -> str:
    """`loader` for `for i, x in enumerate(tqdm(loader))`."""
    expr = None if isinstance(loop, ast.While) else loop.iter
    while isinstance(expr, ast.Call) and expr.args:
        expr = expr.args[0]
    return dotted(expr)


def finished(n: TrainingLoop) -> Iterator[Insertion]:
    """`obs.finish()` at the end of the block that holds the loop; at exit otherwise."""
    block, owner = n.start.block, n.script.parent[n.outer]
    while isinstance(owner, (*WITHS, ast.Try)):
        block, owner = n.script.home[owner].block, n.script.parent[owner]
    spot = Spot(block, len(block) - isinstance(block[-1], EXITS))
    line = n.script.line_of(spot) or 0
    # Behind a last line that does not end, the patch would change that line.
    unended = line > len(n.script.lines) and not ends_a_line(n.script.data)
    if not isinstance(owner, LOOPS) and not unended and not n.again:
        yield from n.add(spot, "finish", f"{n.obs}.finish()")


# --- Where the step line goes ----------------------------------------------------------------
class StepSpot(NamedTuple):
    """Where a step line goes: the end of an iteration that made an optimizer step."""

    spot: Spot
    test: str = ""  # in words, where not every iteration steps
    last: str = ""  # when the loop breaks after it


Ends = Iterator[StepSpot | Note]  # with the exits behind a step that a resume cannot repeat


def tests_around(n: TrainingLoop, site: ast.AST) -> list[tuple[ast.If, bool]]:
    """Enclosing `if`s within the loop that do not step on every path, and the branch taken."""
    around = list(n.script.above(site))
    inside = around[: [parent for parent, _ in around].index(n.inner)]
    return [
        (parent, child in parent.body)
        for parent, child in reversed(inside)
        if isinstance(parent, ast.If) and not _always_steps(n, parent)
    ]


def _always_steps(n: TrainingLoop, stmt: ast.stmt) -> bool:
    """Both branches of an `if` step; anything else does where it holds a step."""
    if isinstance(stmt, ast.If):
        return all(any(_always_steps(n, s) for s in part) for part in (stmt.body, stmt.orelse))
    by_hand = isinstance(stmt, ast.For) and any(getattr(x, "attr", "") == "grad" for x in own(stmt))
    return by_hand or any(n.script.inside(site, stmt) for site in n.nest.sites)


def ends_of(n: TrainingLoop) -> Ends:
    """Every place where an iteration that stepped ends."""
    if n.gate:
        yield StepSpot(_end(n.inner.body), n.gate)
    elif n.conditions:
        yield from _conditional_ends(n)
    else:
        case = _case(n)
        sure = [site for site in n.nest.sites if not tests_around(n, site)]
        block, sites = (case, [n.nest.sites[-1]]) if case else (n.inner.body, sure)
        yield from _ends(n, block, min((n.script.index_in(block, s) for s in sites), default=0))


def _conditional_ends(n: TrainingLoop) -> Ends:
    """`if (i + 1) % k == 0: opt.step()`: behind all that follows the `if`, if that can be said
    again in the line's own words; else in the branch that steps."""
    outermost, (innermost, taken) = n.conditions[0][0], n.conditions[-1]
    place = Spot(n.inner.body, n.script.index_in(n.inner.body, outermost))
    rest = place.block[place.index :]
    branch = innermost.body if taken else innermost.orelse
    pure = all(_is_pure(test.test, rest) for test, _ in n.conditions)
    if len(rest) > 1 and pure and not _exits(n, rest[1:]):
        yield StepSpot(_end(place.block), _words(n.conditions))
        return
    breaks = [leave for leave in _exits(n, rest[1:]) if not isinstance(leave, ast.Continue)]
    known = {leave: test for leave in breaks if (test := _break_test(n, leave, rest[1:]))}
    later = " or ".join(f"({test})" if len(known) > 1 else test for test in known.values())
    yield from (_unseen(leave) for leave in breaks if leave not in known)
    if not n.script.own_line(branch[0]) and pure:
        yield StepSpot(n.script.behind(outermost), _words(n.conditions), later)
        return
    if any(not isinstance(stmt, ast.If) for stmt in rest[1:]):
        text = "more happens after the branch that steps; a checkpoint taken there has not seen it"
        yield note(innermost, text)
    sites = [site for site in n.nest.sites if n.script.inside(site, innermost)]
    for end in _ends(n, branch, min(n.script.index_in(branch, site) for site in sites)):
        yield end._replace(last=end.last or later) if isinstance(end, StepSpot) else end


def _case(n: TrainingLoop) -> list[ast.stmt]:
    """The body of the `case` that steps."""
    for parent, _ in n.script.above(n.nest.sites[-1]):
        if isinstance(parent, ast.match_case) and n.script.inside(parent, n.inner):
            return parent.body
    return []


def _break_test(n: TrainingLoop, leave: ast.stmt, rest: Sequence[ast.stmt]) -> str:
    """The test of a break that follows the step line, in words."""
    owner = n.script.parent[leave]
    if isinstance(leave, ast.Break) and isinstance(owner, ast.If) and owner in rest:
        said = leave in owner.body and _is_pure(owner.test, rest)
        return ast.unparse(owner.test) if said else ""
    return ""


def _unseen(leave: ast.stmt) -> Note:
    return refusal(leave, "the loop may end here, after its step, and a resumed run would go on")


def _ends(n: TrainingLoop, block: list[ast.stmt], first: int) -> Ends:
    """The end of `block`, and the exits from the loop after statement `first`."""
    exits = _exits(n, block[first:])
    yield from (_unseen(leave) for leave in exits if isinstance(leave, ast.Return))
    for leave in exits:
        if leave not in block:
            yield from _before(n, leave)
    end = _end(block)
    yield StepSpot(end, last=_is_last(*block[end.index : end.index + 1]))


def _is_last(*leave: ast.stmt) -> str:
    return "True" if leave and isinstance(leave[0], ast.Break) else ""


def _end(block: list[ast.stmt]) -> Spot:
    """Behind the last statement, but before an exit and before names are deleted."""
    index = len(block)
    while index > 1 and isinstance(block[index - 1], (*EXITS, ast.Delete)):
        index -= 1
    return Spot(block, index)


def _exits(n: TrainingLoop, stmts: Sequence[ast.stmt]) -> list[ast.stmt]:
    return [
        node
        for node in own_all(stmts)
        if isinstance(node, EXITS)
        and node.lineno > n.last_site
        and (isinstance(node, ast.Return) or n.script.loops_around(node)[0] is n.inner)
    ]


def _before(n: TrainingLoop, leave: ast.stmt) -> Ends:
    """Before an exit; of `if done: break` before the `if`, under its test."""
    spot, owner = n.script.home[leave], n.script.parent[leave]
    if n.script.line_of(spot) is not None:
        yield StepSpot(spot, last=_is_last(leave))
        return
    if isinstance(owner, ast.If) and spot.block is owner.body and _is_pure(owner.test, []):
        place = n.script.home[owner]
        if n.script.line_of(place) is not None:
            if len(owner.body) > 1:  # what else is done there
                yield _unseen(leave)
            yield StepSpot(place, ast.unparse(owner.test), _is_last(leave))
            return
    yield note(leave, "this exit leaves no room for a line; its step is not logged")


def _words(conditions: Sequence[tuple[ast.If, bool]]) -> str:
    texts = [
        ast.unparse(test.test) if taken else f"not ({ast.unparse(test.test)})"
        for test, taken in conditions
    ]
    return texts[0] if len(texts) == 1 else " and ".join(f"({text})" for text in texts)


def _is_pure(test: ast.expr, changing: Sequence[ast.stmt]) -> bool:
    """Only names, numbers and comparisons, none of them assigned in `changing`."""
    values = (ast.Name, ast.Attribute, ast.Constant, ast.BinOp, ast.UnaryOp, ast.BoolOp)
    signs = (ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context)
    parts = list(walk(test))
    simple = all(isinstance(part, (*values, *signs)) or called(part) == "len" for part in parts)
    return simple and not written(changing).keys() & {*map(dotted, parts)}


# --- The loss --------------------------------------------------------------------------------
class Loss(NamedTuple):
    """What is back-propagated: its name, the code that gives the value to log, and where."""

    name: str
    code: str
    call: ast.Call


ENGINE_NAME = re.compile(
    r"accelerat|fabric|booster|engine|strategy|autograd|^amp|scaler|trainer|^self$", re.I
)
ACCUMULATED = re.compile(r"accum|micro|grad")


def losses_of(n: TrainingLoop) -> Iterator[Loss]:
    """What the loop back-propagates, or is given by the helper that steps."""
    for call, expr in propagated_in(n):
        yield from _named(n, expr, call)
    for site in n.nest.sites:
        if isinstance(site, ast.Call):  # loss = train_step(batch)
            yield from (Loss(name, name, site) for name in losses_given(n.script, site))


def propagated_in(n: TrainingLoop) -> Iterator[tuple[ast.Call, ast.expr]]:
    """The calls of this loop that back-propagate, and what they do."""
    inner = own_set(n.inner)
    for call in n.script.calls:
        expr, scope = propagated(call, n.roles), n.script.scope_of(call)
        if expr is not None and call in inner:
            yield call, expr
        elif isinstance(scope, FUNCTIONS) and dotted(expr) in n.script.parameters(scope):
            names = [name for name in n.script.parameters(scope) if name != "self"]
            at = names.index(dotted(expr)) if dotted(expr) in names else sys.maxsize
            for given in n.script.callers(scope):  # backward(loss), a helper
                if given in inner and at < len(given.args):
                    yield given, given.args[at]


def propagated(call: ast.Call, roles: Roles) -> ast.expr | None:
    """What a call back-propagates: `loss.backward()`, `accelerator.backward(loss)`,
    `loss_scaler(loss, optimizer)`."""
    first = call.args[0] if call.args else None
    if isinstance(call.func, ast.Attribute) and call.func.attr == "backward":
        name = last(dotted(call.func.value))
        if first is None or not name or LOSS_NAME.search(name):
            return call.func.value
        if ENGINE_NAME.search(name) or LOSS_NAME.search(last(dotted(first))):
            return first
        return call.func.value if isinstance(first, ast.Call) else None  # its gradient
    handed = any(roles.optimizer(dotted(arg)) for arg in call.args[1:])
    return first if handed and SCALER_NAME.search(called(call)) else None


def _named(n: TrainingLoop, expr: ast.expr, call: ast.Call) -> Iterator[Loss]:
    """The names inside a back-propagated expression: `a + b`, `loss / k`, `loss.mean()`."""
    receiver, method = method_call(expr)
    if isinstance(expr, (ast.Name, ast.Attribute)) and dotted(expr):
        yield Loss(dotted(expr), _unscaled(n, dotted(expr), call), call)
    elif isinstance(expr, ast.BinOp):
        sides = [expr.left, expr.right]
        if not isinstance(expr.op, (ast.Add, ast.Sub)):
            sides = sorted(sides, key=lambda side: not LOSS_NAME.search(last(dotted(side))))[:1]
        for side in sides:
            yield from _named(n, side, call)
    elif method in {"mean", "sum"} and LOSS_NAME.search(last(receiver)):
        yield Loss(receiver, f"{receiver}.{method}()", call)
    elif method == "scale" and isinstance(expr, ast.Call) and expr.args:
        yield from _named(n, expr.args[0], call)


def _unscaled(n: TrainingLoop, name: str, call: ast.Call) -> str:
    """`loss * K`, where it was divided by what a step accumulates."""
    for binding in n.script.bindings.get(name, []):
        stmt, value = binding.stmt, binding.value
        if stmt in own_set(n.inner) and stmt.lineno <= call.lineno:
            by_itself = isinstance(stmt, ast.AugAssign) and isinstance(stmt.op, ast.Div)
            divisor = dotted(value if by_itself else divided_by(value))
            if divisor and (ACCUMULATED.search(divisor) or divisor in _step_sizes(n.inner)):
                return f"{name} * {divisor}"
    return name


def divided_by(value: ast.AST) -> ast.expr | None:
    is_quotient = isinstance(value, ast.BinOp) and isinstance(value.op, ast.Div)
    return value.right if is_quotient else None  # type: ignore[attr-defined]


def _step_sizes(loop: Loop) -> set[str]:
    """`K` of `if (i + 1) % K == 0`, and of an inner `for _ in range(K)`."""
    nodes = list(own_all(loop.body))
    tests = [part for node in nodes if isinstance(node, ast.If) for part in walk(node.test)]
    mods = [p.right for p in tests if isinstance(p, ast.BinOp) and isinstance(p.op, ast.Mod)]
    return {ast.unparse(mod) for mod in mods} | {
        size for node in nodes if isinstance(node, FORS) for size in _range_size(node)
    }


def _range_size(loop: Loop) -> list[str]:
    """`K` of `for _ in range(K)`."""
    source = getattr(loop, "iter", None)
    if isinstance(source, ast.Call) and called(source) == "range":
        return [ast.unparse(size) for size in source.args[-1:]]
    return []


def losses_given(script: Script, call: ast.Call) -> list[str]:
    """The names that take a loss of what a call gives: by their names, or by what the function
    returns there. `l, a = evaluate()` where it ends in `return loss / n, correct / n`."""
    names, helper = names_given(script, call), script.definition(call)
    found = []
    for index, name in enumerate(names):
        value = _returned(helper, index if len(names) > 1 else None) if helper else None
        is_many = value is None or isinstance(value, (ast.Tuple, ast.Dict, ast.DictComp))
        parts = [] if is_many else [last(dotted(part)) for part in walk(value or call)]
        if any(map(LOSS_NAME.search, [last(name), *parts])):
            found.append(name)
    return found


def names_given(script: Script, call: ast.Call) -> list[str]:
    """`loss` and `acc` of `loss, acc = evaluate(model)`."""
    stmt = script.stmt_of(call)
    return targets(stmt) if isinstance(stmt, ast.Assign) and stmt.value is call else []


def _returned(helper: Function, index: int | None) -> ast.expr | None:
    """What a function returns; `index`, where its caller takes a tuple apart."""
    nodes = own_all(helper.body)
    value = next((n.value for n in nodes if isinstance(n, ast.Return) and n.value), None)
    if index is None:
        return value
    return {**dict(enumerate(getattr(value, "elts", [])))}.get(index)


# --- Rules: each step is recorded ------------------------------------------------------------
NOT_BATCH = re.compile(
    r"\.|loss|^(?:[ijk_]|it|idx|step|epoch|logits)$|^(?:out|pred|hid|batch_i|iter)"
)


def stepped(n: TrainingLoop) -> Found:
    """`obs.step(step, loss=loss, batch=x)` at each end of an iteration that stepped."""
    found: list[Insertion] = []
    for end in n.ends:
        if isinstance(end, StepSpot):
            found += n.add(end.spot, "step", _step(n, end), "likely" if end.test else "sure")
            yield from _left_out(n, end.spot)
        elif not end.part:
            yield end
    yield from found
    if not found:
        text = "no room for obs.step in this loop (its body is on the line of its header)"
        yield note(n.inner, text)


def counted_in_helper(n: TrainingLoop) -> Iterator[Note]:
    """`def update(): … if ready: opt.step()`: the loop cannot see whether it did."""
    for update in n.nest.updates:
        tests = [test for test, _ in n.script.above(update.call) if isinstance(test, ast.If)]
        elsewhere = n.script.scope_of(update.call) is not n.scope
        if elsewhere and not all(test.orelse for test in tests):
            text = "this function steps under a condition; every iteration that calls it is "
            yield note(update.call, f"{text}counted as a step")


def logged_in_helper(n: TrainingLoop) -> Found:
    """The step is in a helper that keeps the loss to itself: log it there."""
    if n.losses:
        return
    for update in n.nest.updates:
        scope = n.script.scope_of(update.call)
        if isinstance(scope, ast.Module) or scope is n.scope:
            continue
        spot = Spot(scope.body, len(scope.body) - isinstance(scope.body[-1], ast.Return))
        calls = [call for call in n.script.calls if n.script.scope_of(call) is scope]
        names = [dotted(propagated(call, n.roles)) for call in calls]
        for name in names:
            if name and "." not in name and name in n.script.bound(spot):
                yield from n.add(spot, "step", f'{n.obs}.log({{"loss/train": {name}}})')
                return
    text = "the loss of this step has no name that can be logged; steps are logged without it"
    yield note(n.nest.sites[0], text)


def _step(n: TrainingLoop, end: StepSpot) -> str:
    """The step line: its number and its loss, and of the rest what fits into the width."""
    bound = n.script.bound(end.spot)
    usable = [loss for loss in n.losses if not _why_not(n, loss, end.spot)]
    named = {key_of(loss.name): _as_number(n, loss) for loss in usable[:-1]}
    taken = {"step", "loss", "batch", "batches", "tokens", "samples", "carry", "last"}
    others = [f"{key}={code}" for key, code in named.items() if key not in taken]
    needed = [*filter(None, [n.counter(bound)])]
    needed += [f"loss={_as_number(n, loss)}" for loss in usable[-1:]]
    kept = [f'"{key}": {name}' for key, name in _unseen_by_step(n).items() if name in bound]
    ends = [f"carry={{{', '.join(kept)}}}"] * bool(kept)
    ends += [f"last={end.last}"] * bool(end.last and n.resumes)
    guard, amount = f"if {end.test}: " if end.test else "", _batch(n, bound)
    codes = [
        f"{guard}{n.obs}.step({', '.join([*needed, *more, *ends])})"
        for more in ([*others, *amount], others, amount, [])
    ]
    return next((code for code in codes if n.fits(end.spot, code)), codes[-1])


def _left_out(n: TrainingLoop, spot: Spot) -> Iterator[Note]:
    """What a step line does not hold, and why."""
    for loss in n.losses:
        if why := _why_not(n, loss, spot):
            yield note(loss.call, f"the loss {loss.name} {why}; it is left out")
    for name in _unseen_by_step(n).values():
        if name not in n.script.bound(spot):
            text = "may be unbound at the end of an iteration; not carried"
            yield note(n.inner, f"{name} {text}")


def _unseen_by_step(n: TrainingLoop) -> dict[str, str]:
    """What is carried, but no plain name; that is read off this function, or off its caller."""
    values = n.carried.values if n.resumes else {}
    return {key: name for key, name in values.items() if key != name}


def _why_not(n: TrainingLoop, loss: Loss, spot: Spot) -> str:
    """Why a loss cannot be logged at a spot; '' if it can."""
    if loss.name not in n.script.bound(spot) and root(loss.name) not in n.script.bound(spot):
        return "is not certainly bound where the step is logged"
    again = _bound_again(n, loss.name, n.last_site, n.script.line_of(spot) or 0)
    for binding in again:
        if not any(dotted(part) == loss.name for part in walk(binding.value)):
            return "is assigned again before the end of the iteration (an evaluation?)"
    return ""  # `loss = loss.item()` keeps it


def _as_number(n: TrainingLoop, loss: Loss) -> str:
    """`loss = loss.item()` after the backward: a number has no `.mean()`."""
    again = _bound_again(n, loss.name, loss.call.lineno)
    return re.sub(r"\.\w+\(\)", "", loss.code) if again else loss.code


def _bound_again(n: TrainingLoop, name: str, after: int, end: int = sys.maxsize) -> list[Binding]:
    bindings = [b for b in n.script.bindings.get(name, []) if b.stmt in own_set(n.inner)]
    return [b for b in bindings if after < b.stmt.lineno < end]


def _batch(n: TrainingLoop, bound: Names) -> list[str]:
    """What the iteration trained on, whose shape the run reads; not where it saw only a part."""
    if (n.conditions or n.gate) and not n.resumes:  # no skip line counts the batches
        return []
    names = [name for name in _batch_names(n.inner) if name in bound]
    # An inner `for _ in range(k)` back-propagates so often a step.
    loops = [n.script.loops_around(call) for call, _ in propagated_in(n)]
    within = [loop for around in loops for loop in around[: around.index(n.inner)]]
    counts = [size for loop in within for size in _range_size(loop) if re.match(r"[\w.]+$", size)]
    return [f"batch={names[0]}", *(f"batches={size}" for size in counts[:1])] if names else []


def _batch_names(loop: Loop) -> list[str]:
    """What the loop gives, and what its body takes out of a tuple."""
    names = [] if isinstance(loop, ast.While) or is_range(loop.iter) else targets(loop)
    if isinstance(loop, FORS) and called(loop.iter) == "enumerate":
        names = names[1:]
    for node in own_all(loop.body):
        if not isinstance(node, ast.Assign) or called(node.value) in {"step", "reset"}:
            continue  # of an environment
        if isinstance(node.value, (ast.Call, ast.Tuple)):
            tuples = [target for target in node.targets if isinstance(target, ast.Tuple)]
            names += [name for target in tuples for name in names_in(target)]
    return [name for name in names if not NOT_BATCH.search(name)]


# --- Rules: why a resume is left out ---------------------------------------------------------
ENV_NAME = re.compile(r"(?:^|_)envs?(?:_|\d|$)", re.I)
MOVES_ON = re.compile(
    r"^(?:next\w*|get_batch|sample\w*|push\w*|pop\w*|query|add|append|put|store|update\w*|draw)$"
)
KEEPS_NO_STATE = re.compile(r"Meter|Metric|Log|Writer|Timer|Tracker|Board|tqdm|Progress|Prof")


def refused(n: TrainingLoop) -> Iterator[Note]:
    """The first finding of each rule below."""
    yield from n.refusals if n.wants_resume else []


def several_runs(n: TrainingLoop) -> Iterator[Note]:
    """`for fold in folds: train(fold)`: which of them a checkpoint is of, nothing says."""
    if n.nest.doubtful:
        yield refusal(n.inner, n.nest.doubtful)
    if n.loops != n.nest.loops:
        text = "several trainings, one after the other, in this loop"
        yield refusal(n.nest.loops[0], text)
    if n.several:
        yield refusal(n.outer, "several training loops in one file")
    if not n.script.own_line(n.inner.body[0]):
        yield refusal(n.inner, "the loop's body is on the line of its header")


def several_processes(n: TrainingLoop) -> Iterator[Note]:
    """`Process(target=train, args=(rank, model))`, as in Hogwild training."""
    if call := _worker(n):
        yield refusal(call, "several processes train at once, each by its own steps")


def no_model(n: TrainingLoop) -> Iterator[Note]:
    if not n.again and not n.models:
        yield refusal(n.outer, "no model was found that is bound before this loop")


def no_optimizer(n: TrainingLoop) -> Iterator[Note]:
    if not n.again and n.optimizers and not n.visible_optimizers:
        yield refusal(n.outer, "the optimizer has no name before this loop")


def state_outside(n: TrainingLoop) -> Iterator[Note]:
    """What a checkpoint cannot hold: `env.step(action)`, `buffer.sample(32)`, `ema.update(model)`,
    `early_stopping(val_loss)`, an iterator that is made again when it is read to its end."""
    for node, name, method in _uses(n):
        if ENV_NAME.search(last(name)) and method in {"step", "reset"}:
            yield refusal(node, f"the state of {name} cannot be saved")
        elif name and _moves_on(n, name, method):
            call = name if method == "__call__" else f"{name}.{method}"
            yield refusal(node, f"{call}() changes {name}, whose state cannot be saved")
        elif called(node) == "iter" and n.inner in n.script.loops_around(node):
            text = "the iterator is made again in mid-loop; its position cannot be saved"
            yield refusal(node, text)


def _uses(n: TrainingLoop) -> Iterator[tuple[ast.Call, str, str]]:
    """The calls of the loops: on which name, by which method."""
    for node in own_all([*n.outer.body, *n.inner.body]):
        if isinstance(node, ast.Call):
            is_name = isinstance(node.func, ast.Name)
            name, method = (dotted(node.func), "__call__") if is_name else method_call(node)
            yield node, name, method


def _moves_on(n: TrainingLoop, name: str, method: str) -> bool:
    """An object made before the loop that changes with it: a batch source, a buffer."""
    if "ema" in method.split("_"):  # weights averaged where no name of the script shows them
        return True
    made = _objects(n, name)
    if any(map(KEEPS_NO_STATE.search, made)):
        return False
    return bool(made and MOVES_ON.search(method)) or any(
        f.name == method
        and getattr(n.script.class_of(f), "name", "") in made
        and any(name.startswith("self.") for name in written(f.body))
        for f in n.script.functions
    )


def _objects(n: TrainingLoop, name: str) -> dict[str, ast.Call]:
    """By their classes, the objects that a name stands for since before the loop; none if a
    checkpoint holds them."""
    roles = n.roles
    saved = name in n.models or SCALER_NAME.search(name) or root(name) in n.script.imports
    if saved or roles.scheduler(name) or roles.optimizer(name):
        return {}
    before = [b for b in n.script.bindings.get(name, []) if b.stmt not in own_set(n.outer)]
    made = [call for b in before for call in makers(b.value)]
    return {called(call): call for call in made[::-1] if called(call)[:1].isupper()}


def begins_anew(n: TrainingLoop) -> Iterator[Note]:
    """`meter.update(loss)`: what only shows something does not keep a resume from being exact."""
    for name in dict.fromkeys(name for _, name, _ in _uses(n)) if n.wants_resume else ():
        made = _objects(n, name)
        for kind in filter(KEEPS_NO_STATE.search, made):
            text = f"{name} begins anew in a resumed run, and so does what is shown of it"
            yield note(made[kind], text)
            break


def average_by_hand(n: TrainingLoop) -> Iterator[Note]:
    """`avg = [p.clone() for p in model.parameters()]`, and the loop moves it."""
    seen = n.script.bindings.keys() & n.at_start & loads(own_set(n.outer))
    names = [name for name in seen if re.search("avg|ema|shadow|average", name)]
    for binding in (b for name in sorted(names) for b in n.script.bindings[name]):
        is_collection = isinstance(binding.value, (ast.ListComp, ast.DictComp))
        if is_collection and {"clone", "deepcopy"} & {*map(called, walk(binding.value))}:
            text = f"{binding.name} holds an average; keep it in a module, to be saved"
            yield refusal(binding.stmt, text)


def optimizer_made_again(n: TrainingLoop) -> Iterator[Note]:
    """`if epoch == 10: optimizer = SGD(…)`: which of them a checkpoint is of, nothing says."""
    for name in n.optimizers:
        for binding in n.script.bindings.get(name, []):
            if binding.stmt in own_set(n.outer):
                yield refusal(binding.stmt, f"{name} is made again inside the loop")


def optimizer_without_state(n: TrainingLoop) -> Iterator[Note]:
    """`class NoamOpt:` of the script itself, without a `state_dict`."""
    made = {called(call): call for name in n.optimizers for call in n.script.made(name)}
    for node in n.script.nodes:
        if isinstance(node, ast.ClassDef) and node.name in made:
            known = any("ptim" in dotted(base) for base in node.bases)
            if not known and "state_dict" not in [getattr(f, "name", "") for f in node.body]:
                yield refusal(made[node.name], f"{node.name} has no state_dict to save")


def scheduler_steps_first(n: TrainingLoop) -> Iterator[Note]:
    """`for epoch in range(9): scheduler.step(); train()`."""
    for loop, inner in itertools.pairwise(n.loops):
        for node in own_all(_prelude(loop, inner)):
            name, method = method_call(node)
            if method == "step" and n.roles.scheduler(name):
                text = "the scheduler steps at the top of an epoch: a resumed epoch would step it "
                yield refusal(node, f"{text}twice")


def reads_in_the_middle(n: TrainingLoop) -> Iterator[Note]:
    """`x = next(it)` behind other work: what stands before the guard is done for each batch."""
    if any(map(_reads_next, n.inner.body[_first_unread(n.inner) :])):
        text = "next() is called in the middle of the iteration; a resumed run cannot pass over it"
        yield refusal(n.inner, text)


def left_unseen(n: TrainingLoop) -> Iterator[Note]:
    """`if done: return` behind the step."""
    yield from (end for end in n.ends if isinstance(end, Note) and end.part)


def unbound_before(n: TrainingLoop) -> Iterator[Note]:
    """`if step > 0: x = prev` and `prev = x`, where nothing gives `prev` a value before."""
    for loop in n.loops:
        direct = _needed(n, loop)[0] - n.script.bound(n.script.home[loop])
        names = [name for name in _on_the_way(n, loop) if name in direct]
        # A loss or a score is only shown.
        lost = [name for name in names if not (LOSS_NAME.search(name) or METRIC_NAME.search(name))]
        if lost:
            text = "not certainly bound before the loop"
            goes = f"{lost[0]} goes from one iteration to the next, but is"
            yield refusal(loop, f"{goes} {text}")


REFUSALS: tuple[Callable[[TrainingLoop], Iterator[Note]], ...] = (
    several_runs,
    several_processes,
    no_model,
    no_optimizer,
    state_outside,
    average_by_hand,
    optimizer_made_again,
    optimizer_without_state,
    scheduler_steps_first,
    reads_in_the_middle,
    left_unseen,
    unbound_before,
)


# --- What a resume gives back ----------------------------------------------------------------
class Carried(NamedTuple):
    """The loop-carried names by their keys, and the calls that give them back."""

    values: dict[str, str]  # of this function: the step line sees them
    lines: list[tuple[Spot, str]]


NOT_CARRIED = re.compile(r"^pbar|progress_?bar|tqdm|writer$|logger$|^prof(?:iler)?$", re.I)
CLOCK = re.compile(r"^(?:time\.\w+|perf_counter|time|monotonic|datetime\.\S+|timeit\.\w+)$")
HOLDS_A_POSITION = {"iter", "open", "tqdm", "trange", "cycle", "enumerate", "zip", "deque"}
MUTATORS = {"append", "extend", "update", "pop", "insert", "clear"}


def carried_by(n: TrainingLoop) -> Carried:
    """`step, best = obs.resume(step=step, best=best)` before each loop, of what it carries."""
    mine = [loop for loop in n.loops if n.script.scope_of(loop) is n.scope]
    names = {loop: _carried_names(n, loop) for loop in n.loops}
    groups: list[tuple[Spot, dict[str, str]]] = []
    for loop, inner in zip(mine, [*mine[1:], None]):
        # Set between this loop's head and the next one: given back only there.
        later = {*written(_prelude(loop, inner))} & {*names[inner]} if inner else set()
        known = {*later, *(name for _, defaults in groups for name in defaults)}
        defaults = {name: name for name in names[loop] if name not in known}
        if loop is mine[0]:
            tail = [name for name in _left_behind(n) if name not in defaults]
            defaults |= dict.fromkeys(tail, "None")
        groups.append((n.script.home[loop], defaults))
    outside = n.loops[: -len(mine)]
    groups += [(Spot(loop.body, 0), {name: name for name in names[loop]}) for loop in outside]
    keys = _keys([name for _, defaults in groups for name in defaults])
    lines: list[tuple[Spot, str]] = []
    values: dict[str, str] = {}
    for at, (spot, defaults) in enumerate(groups):
        some = {next(keys): name for name in defaults}
        lines += [(spot, code) for code in _give_back(n, spot, some, defaults)]
        values |= some if at < len(mine) else {}
    return Carried(values, lines)


def _keys(names: Sequence[str]) -> Iterator[str]:
    """An identifier for each; `step` and `step_2` for `self.step` and `step`."""
    bases = [key_of(name) for name in names]
    for at, base in enumerate(bases):
        count = bases[:at].count(base)
        yield f"{base}_{count + 1}" if count else base


def _give_back(
    n: TrainingLoop, spot: Spot, keys: dict[str, str], defaults: dict[str, str]
) -> list[str]:
    def call(some: Sequence[str]) -> str:
        given = ", ".join(f"{key}={defaults[keys[key]]}" for key in some)
        return f"{', '.join(keys[key] for key in some)} = {n.obs}.resume({given})"

    return n.in_columns(spot, [*keys], call)


def _carried_names(n: TrainingLoop, loop: Loop) -> list[str]:
    """Names bound before the loop, assigned in it, and read before they are assigned there."""
    script = n.script
    bound, own_names = script.bound(script.home[loop]), script.locals_of(script.scope_of(loop))
    names = [x for x in _on_the_way(n, loop) if x in bound and not _of_an_object(n, x)]
    filled = dict.fromkeys(name for node in own_all(loop.body) for name in _mutated(node))
    more = [x for x in filled if x in bound and ("." in x or x in own_names)]
    return list(dict.fromkeys([*names, *(x for x in more if _is_container(n, x))]))


def _on_the_way(n: TrainingLoop, loop: Loop) -> list[str]:
    """Names that one iteration leaves to the next one, or to what follows the loop."""
    definitions = (*IMPORTS, *DEFINITIONS)
    bound = [node for node in own_all(loop.body) if not isinstance(node, definitions)]
    set_here = dict.fromkeys(name for node in bound for name in targets(node))
    needed = _needed(n, loop)[1].union(
        *(n.script.outside(f) for f in n.script.functions if f is not n.script.scope_of(loop))
    )
    return [
        name
        for name in set_here
        if name in needed
        # An attribute of a name that is bound anew each time is not carried itself.
        and not ("." in name and root(name) in set_here)
        and not _is_saved(n, name)
    ]


def _needed(n: TrainingLoop, loop: Loop) -> tuple[Names, Names]:
    """What an iteration reads before it binds it; and what it or the code behind it does."""
    flow = Flow(n.script)
    if isinstance(loop, ast.While):
        flow.read(loop.test, frozenset())
    flow.block(loop.body, frozenset(targets(loop)))
    direct = frozenset(flow.unbound)
    flow.block(n.script.after(loop, LOOPS), frozenset())
    return direct, frozenset(flow.unbound)


def _is_saved(n: TrainingLoop, name: str) -> bool:
    """What a checkpoint holds anyway, a time, or what shows something on a screen."""
    made = any(n.roles.made_by(name, calls) for calls in (OPTIMIZER_CALL, SCHEDULER_CALL))
    times = any(CLOCK.match(n.script.resolve(call.func)) for call in n.script.made(name))
    shows = NOT_CARRIED.search(last(name))
    return bool(made or shows or times) or name in [*n.optimizers, *n.models]


def _of_an_object(n: TrainingLoop, name: str) -> ast.Call | None:
    """The call that made what cannot be put into a checkpoint as it is."""
    for call in n.script.made(name):
        kind = called(call)
        if kind in HOLDS_A_POSITION or (kind[:1].isupper() and not kind.endswith("Tensor")):
            return call
    return None


def _is_container(n: TrainingLoop, name: str) -> bool:
    """`history = []`, which the loop fills."""
    values = [binding.value for binding in n.script.bindings.get(name, [])]
    literals = (ast.List, ast.Dict, ast.ListComp, ast.DictComp)
    return bool(values) and all(
        isinstance(value, literals) or called(value) in {"list", "dict"} for value in values
    )


def _mutated(node: ast.AST) -> list[str]:
    """The list or dict that a call or an assignment to an item fills."""
    receiver, method = method_call(node)
    if method in MUTATORS:
        return [receiver]
    is_item = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
    return [dotted(node)] if is_item else []


def _left_behind(n: TrainingLoop) -> list[str]:
    """Names that only the batch loop binds and that are read after it: a run that resumes at the
    end of an epoch reads them before any batch has bound them."""
    start = n.script.bound(n.script.home[n.inner]).union(targets(n.inner))
    flow = Flow(n.script)
    flow.block(n.script.after(n.inner), start)
    end = n.script.at_end(n.inner.body) & n.script.locals_of(n.scope) & {*written(n.inner.body)}
    return [name for name in flow.unbound if name in end - start]


def _prelude(loop: Loop, inner: ast.AST) -> list[ast.stmt]:
    """The statements of `loop`'s body that come before the one that holds `inner`."""
    at = [i for i, stmt in enumerate(loop.body) if inner in own_set(stmt)]
    return loop.body[: at[0]] if at else []


def _first_unread(loop: Loop) -> int:
    """Where the guard stands: behind `batch = next(it)`, a skipped batch is read all the same."""
    return sum(isinstance(s, (ast.Assign, ast.Expr)) and _reads_next(s) for s in loop.body)


def _reads_next(stmt: ast.stmt) -> bool:
    calls = [node for node in own(stmt) if isinstance(node, ast.Call) and node.args]
    return any(dotted(call.func) == "next" and dotted(call.args[0]) for call in calls)


# --- Rules: a resume gives back and passes over ----------------------------------------------
def given_back(n: TrainingLoop) -> Iterator[Insertion]:
    """`step = obs.resume(step=step)` before the loops."""
    if n.resumes:
        for spot, code in n.carried.lines:
            yield from n.add(spot, "resume", code, "likely")
        if n.outer is n.inner and not n.carried.lines:  # all else is put back
            yield from n.add(n.start, "resume", f"{n.obs}.resume()", "likely")


def passed_over(n: TrainingLoop) -> Iterator[Insertion]:
    """`if obs.skip_epoch(epoch): continue` and `if obs.skip_batch(): continue`, first in their
    loops, and `if obs.ended(): break` where the loop breaks right after a step."""
    if not n.resumes:
        return
    outer, inner = n.outer, n.inner
    if outer is not inner:
        label = getattr(getattr(outer, "target", None), "id", "")
        yield from n.add(Spot(outer.body, 0), "skip", f"if {n.obs}.skip_epoch({label}): continue")
    head = Spot(inner.body, _first_unread(inner))
    if any(isinstance(end, StepSpot) and end.last for end in n.ends):
        yield from n.add(head, "skip", f"if {n.obs}.ended(): break")
    counted = outer is inner and isinstance(inner, ast.While)  # by a step that is carried
    if not counted or any(map(_reads_next, inner.body)):
        yield from n.add(head, "skip", f"if {n.obs}.skip_batch(): continue")


def not_restored(n: TrainingLoop) -> Iterator[Note]:
    """`queue = deque()` that the loop binds again: an object is not put into a checkpoint."""
    for loop in n.loops if n.wants_resume else ():
        for name in _on_the_way(n, loop):
            call = _of_an_object(n, name)
            if call and name in n.script.bound(n.script.home[loop]):
                text = f"{name} is an object of {dotted(call.func)}; a resume does not restore it"
                yield note(call, text)


# --- Rules: each evaluation is recorded ------------------------------------------------------
EVAL_NAME = re.compile(
    r"(?:^|_)(?:eval\w+|validat\w*|valid|val|test|dev|estimate_loss\w*)(?:_|\d|$)", re.I
)
NOT_EVAL_NAME = re.compile(
    r"load|data|transform|set$|iter|split|token|batch|dir$|path|freq|(?-i:^[A-Z])", re.I
)
HELD_OUT = re.compile(r"val|test|eval|dev|held", re.I)
HELD_OUT_LOSS = re.compile(
    r"(?:^|_)(?:val?|vl|valid|validation|te|test|eval|dev|heldout)(?:_\w+)?_?loss"
    r"(?:_(?:accum|avg|mean|total|sum|epoch))?$|loss_?(?:val|test|valid|validation|eval|dev)$",
    re.I,
)
OF_TRAINING = re.compile(r"(?:^|_)(?:tr|trn|train|training)(?:_|loader|set|dl|\d|$)", re.I)
NOT_A_VALUE = re.compile(r"best|min|prev|last|patience|list|history", re.I)
SHOWN = {"print", "info", "log", "write", "format", "debug", "set_description", "set_postfix"}


def evaluated(n: TrainingLoop) -> Found:
    """`obs.validation(val_loss)` behind `val_loss = evaluate(model)`, in `def validate()` where
    it keeps its loss to itself, and behind an evaluation that is written out in the loop."""
    for call in n.script.calls:
        if _evaluates(n, call):
            yield from _recorded(n, call)
    yield from _written_out(n) or _phases(n)


def _evaluates(n: TrainingLoop, call: ast.Call) -> bool:
    """Named like an evaluation, and called from the loops or behind them."""
    name, scope = called(call), n.script.scope_of(call)
    scopes = {n.script.scope_of(loop) for loop in n.nest.loops}
    if not EVAL_NAME.search(name) or NOT_EVAL_NAME.search(name) or scope not in scopes:
        return False
    if n.script.resolve(call.func).startswith(("torch.", "numpy.")):
        return False
    return n.holds(call) or (scope is n.outer_scope and call.lineno > n.outer.lineno)


def _recorded(n: TrainingLoop, call: ast.Call) -> list[Insertion | Note]:
    """The line for one evaluation, or why there is none."""
    script, names = n.script, names_given(n.script, call)
    stmt, helper = script.stmt_of(call), script.definition(call)
    behind = script.behind(stmt)
    if not _is_open(n, call):
        return [_missed(call, "this evaluation comes after the end of the run")]
    if names and (_is_of_other_data(call, names) or not n.holds(call)):
        return _line(n, behind, _scores(n, names, "eval"), call)
    if value := _entry(script, names, stmt) or _the_loss(script, call, names):
        return _line(n, behind, _validation(n, behind, value), call)
    if helper and (inside := _within(n, helper)):
        return inside
    if scores := [name for name in names if METRIC_NAME.search(name) and "." not in name]:
        return _line(n, behind, _scores(n, scores[:1]), call)
    return [_missed(call, "an evaluation without a value that is a loss by name")]


def _missed(where: ast.AST, why: str) -> Note:
    return note(where, f"{why}; not recorded", "validation")


def _is_open(n: TrainingLoop, call: ast.Call) -> bool:
    """In the block that `finish` ends, or in one within it."""
    outer = n.script.parent[n.outer]
    while isinstance(outer, (*WITHS, *LOOPS, ast.Try)):
        outer = n.script.parent[outer]
    return n.script.inside(call, outer)


def _is_of_other_data(call: ast.Call, names: list[str]) -> bool:
    """Of the training data, or by an average of the weights: not the validation of this model."""
    given = [dotted(part) for part in own_all(arguments(call))]
    words = [last(name) for name in [*names, *given] if name]
    held_out = any(map(HELD_OUT.search, words))
    of_training = any(map(OF_TRAINING.search, words)) and not held_out
    return of_training or any(map(AVERAGE_NAME.search, words))


def _the_loss(script: Script, call: ast.Call, names: list[str]) -> str:
    """The one of the names that is a loss, or the only one of several that is no score."""
    rest = [name for name in names if not METRIC_NAME.search(last(name))]
    alone = rest if len(rest) == 1 < len(names) and "." not in rest[0] else []
    return [*losses_given(script, call), *alone, ""][0]


def _entry(script: Script, names: list[str], stmt: ast.stmt) -> str:
    """`losses["val"]` when the script itself reads it right after."""
    spot = script.behind(stmt)
    later = [s for s in spot.block[spot.index :] if not isinstance(s, (ast.If, *LOOPS))]
    for node in own_all(later):
        if isinstance(node, ast.Subscript) and [dotted(node.value)] == names:
            key = getattr(node.slice, "value", None)
            if isinstance(key, str) and (HELD_OUT.search(key) or LOSS_NAME.search(key)):
                return f"{names[0]}[{key!r}]"
    return ""


def _validation(n: TrainingLoop, spot: Spot, value: str) -> str:
    """Within an iteration dated as the script itself numbers it."""
    in_iteration = n.inner in n.script.loops_around(spot.block[0])
    step = n.counter(n.script.bound(spot)) if in_iteration else ""
    return f"{n.obs}.validation({value}{f', step={step}' if step else ''})"


def _scores(n: TrainingLoop, names: Sequence[str], group: str = "val") -> str:
    pairs = ", ".join(f'"{group}/{key_of(name)}": {name}' for name in names)
    return f"{n.obs}.log({{{pairs}}})"


def _line(n: TrainingLoop, spot: Spot, code: str, where: ast.AST) -> list[Insertion | Note]:
    found = n.add(spot, "validation", code, "likely")
    return [*found] or [_missed(where, "no room for a line after this evaluation")]


def _within(n: TrainingLoop, helper: Function) -> list[Insertion | Note]:
    """Record inside the evaluating function, at its end."""
    calls = n.script.callers(helper)
    if any(_is_of_other_data(call, []) for call in calls):  # it prints the one as the other
        return []
    block = helper.body
    while isinstance(block[-1], WITHS):
        block = block[-1].body
    spot = Spot(block, len(block) - isinstance(block[-1], ast.Return))
    bound = n.script.bound(spot)
    losses = [name for name in _worked_out(helper, LOSS_NAME) if name in bound]
    losses.sort(key=lambda name: bool(HELD_OUT.search(name)))
    meters = _meters(n.script, helper, bound)
    scores = [name for name in _worked_out(helper, METRIC_NAME) if name in bound]
    if losses and not any(map(n.holds, calls)):
        code = _scores(n, losses[-1:], "eval")
    elif losses or meters:
        value = _as_printed(losses[-1], block) if losses else meters[0]
        code = _validation(n, spot, value)
    else:
        code = _scores(n, sorted(scores)) if scores else ""
    return _line(n, spot, code, helper) if code else []


def _worked_out(helper: Function, pattern: re.Pattern[str]) -> list[str]:
    """Names of plain numbers that a function works out itself, the last written last."""
    found: dict[str, None] = {}
    containers = (ast.List, ast.Dict, ast.ListComp, ast.Lambda)
    for node in own_all(helper.body):
        value = getattr(node, "value", None)
        made = isinstance(value, containers) or called(value)[:1].isupper()
        for name in targets(node) if assigned(node) and not made else []:
            if pattern.search(name) and "." not in name:
                found.pop(name, None)
                found[name] = None
    return list(found)


def _meters(script: Script, helper: Function, bound: Names) -> list[str]:
    """`losses.avg`, of a meter that the function fills and prints."""
    read = loads(own_all(helper.body))
    if "self.avg" in script.bindings:
        bindings = [b for made in script.bindings.values() for b in made if b.scope is helper]
        read |= {f"{b.name}.avg" for b in bindings if called(b.value).endswith("Meter")}
    averages = [name for name in read if last(name) in {"avg", "global_avg"}]
    return sorted(name for name in averages if root(name) in bound and LOSS_NAME.search(name))


def _as_printed(name: str, stmts: Sequence[ast.stmt]) -> str:
    """`total / len(loader)`, where a sum is divided only when it is shown."""
    shown = [node for node in own_all(stmts) if called(node) in SHOWN]
    for part in (part for node in shown for part in walk(node)):
        count = divided_by(part)
        is_name = dotted(count) or called(count) == "len"
        if is_name and dotted(part.left) == name:  # type: ignore[attr-defined]
            return ast.unparse(part)
    return name


def _written_out(n: TrainingLoop) -> list[Insertion | Note]:
    """Evaluation in the loop itself: behind the last `val_loss /= n`."""
    return [
        found
        for name in n.script.bindings
        if HELD_OUT_LOSS.search(name) and "." not in name and not NOT_A_VALUE.search(name)
        for found in _after_last(n, name)
    ]


def _after_last(n: TrainingLoop, name: str) -> list[Insertion | Note]:
    script = n.script
    scopes = {script.scope_of(loop) for loop in n.nest.loops}
    helpers = {script.scope_of(update.call) for update in n.nest.updates} - {n.scope}
    mine = [
        b
        for b in script.bindings[name]
        if (b.scope in scopes and n.holds(b.stmt))
        or (b.scope in helpers and not script.loops_around(b.stmt))
    ]
    if not mine or any(EVAL_NAME.search(called(call)) for call in makers(mine[-1].value)):
        return []
    stmt: ast.stmt = max((b.stmt for b in mine), key=lambda s: s.lineno)
    loops = script.loops_around(stmt)
    inside = itertools.takewhile(lambda loop: loop not in n.nest.loops, loops)
    spot = script.behind([stmt, *inside][-1])
    if name not in script.bound(spot):
        return []
    value = _as_printed(name, spot.block[spot.index :])
    return _line(n, spot, _validation(n, spot, value), stmt)


def _phases(n: TrainingLoop) -> list[Insertion | Note]:
    """`for phase in ["train", "val"]`: record the epoch's value of the second."""
    for loop in n.nest.loops:
        source, phase = getattr(loop, "iter", loop.body[0]), getattr(loop, "target", None)
        words = [str(part.value) for part in walk(source) if isinstance(part, ast.Constant)]
        words = [f'"{word}"' for word in words if HELD_OUT.search(word)]
        found = [
            (i, name)
            for i, stmt in enumerate(loop.body)
            if not isinstance(stmt, LOOPS)
            for name in targets(stmt)
            if LOSS_NAME.search(name)
        ]
        if isinstance(phase, ast.Name) and words and found:
            index, name = found[-1]
            code = f"if {phase.id} == {words[0]}: {n.obs}.validation({name})"
            return _line(n, Spot(loop.body, index + 1), code, loop)
    return []


# --- The rules -------------------------------------------------------------------------------
RULES: tuple[Callable[[TrainingLoop], Found], ...] = (
    opened,
    watched,
    evaluated,
    refused,
    begins_anew,
    not_restored,
    given_back,
    passed_over,
    stepped,
    logged_in_helper,
    counted_in_helper,
    finished,
)


# --- Command line ----------------------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        return _run(options, options.script)
    except NothingToPatch as error:
        print(json.dumps({"found": False, "why": str(error)}) if options.json else error)
        return 1
    except (PatchError, OSError) as error:
        reason = f"cannot read or write: {error}" if isinstance(error, OSError) else error
        print(f"autopatch: {reason}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="exit status: 0 found, 1 nothing to patch or a call site is missing, 2 error",
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
    if unknown := set(parts) - set(PARTS):
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; of {', '.join(PARTS)}")
    return parts


def _run(options: argparse.Namespace, path: Path) -> int:
    if (size := path.stat().st_size) > LARGEST:
        raise PatchError(f"{path}: {size / 1e6:.1f} MB are no training script; it is as it was")
    data = path.read_bytes()
    if options.check and has_call_sites(data):
        return _check(options, path.name, data)
    if options.reverse:
        _reverse(path, data)
    elif options.patch:
        result = apply_pinned(data, options.patch.read_text(encoding="utf-8"), path.name)
        print(f"{path}: patched from {options.patch.name}; {apply(path, data, result)}")
    elif marked := marked_numbers(data, path.name):
        _already_patched(options, path, data, len(marked))
    else:
        result, found = patch(data, path.name, options.only, in_package(path, data))
        _show(options, path, data, result, found)
    return 0


def _check(options: argparse.Namespace, name: str, data: bytes) -> int:
    """What is missing or misplaced in a script that has call sites already."""
    rest = blanked(data, name)
    found = omissions(data, rest, plan(Script(rest, name), options.only).insertions)
    record = {"found": True, "omissions": [asdict(each) for each in found]}
    print(json.dumps(record, indent=2) if options.json else report(found, name))
    return int(any(not each.is_advice for each in found))


def _show(options: argparse.Namespace, path: Path, data: bytes, result: bytes, found: Plan) -> None:
    if options.check:
        record = json.dumps({"found": True, **asdict(found)}, indent=2, ensure_ascii=False)
        print(record if options.json else describe(found, path.name))
        return
    if options.pin:
        print(pin(data, result, path.name), end="")
    elif options.write:
        print(f"{path}: {len(found.insertions)} lines added; {apply(path, data, result)}")
    else:
        sys.stdout.buffer.write(unified(data, result, path.name).encode("utf-8", "replace"))
        sys.stdout.flush()
    for note in found.notes:
        print(f"{path.name}:{note.line}: {note.text}", file=sys.stderr)


def _reverse(path: Path, data: bytes) -> None:
    original = reverse(data, path.name)
    if original == data:
        print(f"{path}: nothing to take out")
        return
    if (why := parse_error(original)) and not parse_error(data):
        raise PatchError(
            f"{path}: without its marked lines it would not be Python ({why}): a block holds "
            f"nothing but a marked line; the file is as it was"
        )
    write(path, original)
    drop_backup(path, original)
    print(f"{path}: {len(split_lines(data)) - len(split_lines(original))} lines taken out")


def _already_patched(options: argparse.Namespace, path: Path, data: bytes, count: int) -> None:
    if options.pin:  # lines that were added or changed by hand
        print(pin(reverse(data, path.name), data, path.name), end="")
        return
    print(f"{path}: already patched ({count} lines); --reverse takes them out", file=sys.stderr)


def describe(found: Plan, name: str) -> str:
    rows = [f"{name}:{i.line:<5} {i.kind:<11}{i.confidence:<7} {i.code}" for i in found.insertions]
    parts = ", ".join(f"{part}: {state}" for part, state in found.parts.items())
    notes = [f"{name}:{note.line:<5} {note.text}" for note in found.notes]
    return "\n".join([parts, *rows, *(["left out or doubtful:"] if notes else []), *notes])


if __name__ == "__main__":
    sys.exit(main())
