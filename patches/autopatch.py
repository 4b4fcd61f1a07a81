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
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
    targets,
    walk,
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
    """Something that was left out or is doubtful: where and why."""

    line: int
    text: str


@dataclass
class Plan:
    """What is to be added to a script, what was found, and what was not."""

    insertions: list[Insertion] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    parts: dict[str, str] = field(default_factory=dict)

    def note(self, where: ast.AST, text: str) -> None:
        note = Note(getattr(where, "lineno", 1), text)
        if note not in self.notes:
            self.notes.append(note)


def patch(
    source: bytes, name: str = "train.py", parts: Sequence[str] = PARTS, package: bool = False
) -> tuple[bytes, Plan]:
    """The patched source, of a script or a module of a package, and what was found.

    Raises PatchError, NothingToPatch.
    """
    script = Script(source, name)
    found = plan(script, parts, package)
    return patched(script, found.insertions), found


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
    r"(?:LR|Scheduler|ReduceLROnPlateau|WarmRestarts)$|(?:^|\.)get_\w*schedul|"
    r"(?:build|create|make|get)_(?:lr_)?sched\w*$",
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
ENV_NAME = re.compile(r"(?:^|_)envs?(?:_|\d|$)", re.I)
EVAL_NAME = re.compile(
    r"(?:^|_)(?:eval\w+|validat\w*|valid|val|test|dev|estimate_loss\w*)(?:_|\d|$)", re.I
)
NOT_EVAL_NAME = re.compile(
    r"load|data|transform|set$|iter|split|token|batch|dir$|path|freq|(?-i:^[A-Z])", re.I
)
LOSS_NAME = re.compile(
    r"loss|nll|ppl|perplex|bpb|(?:^|_)(?:err\w?|cost|elbo|mse|ce|bce|objective)(?:_|\d|$)|^err[DG]",
    re.I,
)
METRIC_NAME = re.compile(
    r"acc|score|bleu|auc|^f1|map\b|_map|dice|iou|metric|reward|fid|prec|recall|top|psnr", re.I
)
HELD_OUT = re.compile(r"val|test|eval|dev|held", re.I)
HELD_OUT_LOSS = re.compile(
    r"(?:^|_)(?:val?|vl|valid|validation|te|test|eval|dev|heldout)(?:_\w+)?_?loss"
    r"(?:_(?:accum|avg|mean|total|sum|epoch))?$|loss_?(?:val|test|valid|validation|eval|dev)$",
    re.I,
)
OF_TRAINING = re.compile(r"(?:^|_)(?:tr|trn|train|training)(?:_|loader|set|dl|\d|$)", re.I)
AVERAGE_NAME = re.compile(
    r"(?:^|_)(?:ema|swa|avg_model|model_avg|averaged?|shadow)(?:_|\d|$)", re.I
)
NOT_A_VALUE = re.compile(r"best|min|prev|last|patience|list|history", re.I)
ENGINE_NAME = re.compile(
    r"accelerat|fabric|booster|engine|strategy|autograd|^amp|scaler|trainer|^self$", re.I
)
MOVES_ON = re.compile(
    r"^(?:next\w*|get_batch|sample\w*|push\w*|pop\w*|query|add|append|put|store|update\w*|draw)$"
)
KEEPS_NO_STATE = re.compile(r"Meter|Metric|Log|Writer|Timer|Tracker|Board|tqdm|Progress|Prof")
NOT_CARRIED = re.compile(r"^pbar|progress_?bar|tqdm|writer$|logger$|^prof(?:iler)?$", re.I)
CLOCK = re.compile(r"^(?:time\.\w+|perf_counter|time|monotonic|datetime\.\S+|timeit\.\w+)$")
HOLDS_A_POSITION = {"iter", "open", "tqdm", "trange", "cycle", "enumerate", "zip", "deque"}
MUTATORS = {"append", "extend", "update", "pop", "insert", "clear"}


class Roles:
    """Which names are optimizers, schedulers, models."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self._optimizers: dict[str, bool] = {}
        used = [method_call(call) for call in script.calls]
        self.modules = list(
            dict.fromkeys(
                name
                for call, (name, method) in zip(script.calls, used, strict=True)
                if name not in ("", "self")
                and not self.optimizer(name)
                and (
                    method in {"parameters", "named_parameters"}
                    or (method in {"train", "eval", "zero_grad"} and not call.args)
                )
            )
        )

    def optimizer(self, name: str) -> bool:
        if name not in self._optimizers:
            self._optimizers[name] = bool(name) and self._is_optimizer(name)
        return self._optimizers[name]

    def scheduler(self, name: str) -> bool:
        return (
            bool(name)
            and not self.optimizer(name)
            and (bool(SCHEDULER_NAME.search(last(name))) or self.made_by(name, SCHEDULER_CALL))
        )

    def arguments(self, name: str) -> bool:
        """Command-line arguments: the result of `parse_args()`."""
        return any(
            called(call) in {"parse_args", "parse_known_args"} for call in self.script.made(name)
        )

    def _is_optimizer(self, name: str) -> bool:
        if SCHEDULER_NAME.search(last(name)) and not OPTIMIZER_CALL.search(last(name)):
            return False
        holder = name.rpartition(".")[0]
        return (
            self.made_by(name, OPTIMIZER_CALL)
            or (last(name) == "optimizer" and self.optimizer(holder))
            or (bool(OPTIMIZER_NAME.search(last(name))) and not self.arguments(name))
        )

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
                yield self._root(dotted(node.value))
            elif isinstance(node, ast.Name) and node.id in self.modules:
                if MODEL_NAME.search(node.id):
                    yield node.id
            elif isinstance(node, ast.Name) and depth and re.search("param|group", node.id, re.I):
                for binding in self.script.bindings.get(node.id, []):
                    yield from self._models_in(binding.value, depth - 1)

    def _root(self, name: str) -> str:
        """`model` for `model.fc`: the shortest prefix that the script assigns."""
        heads = (name[: dot.start()] for dot in re.finditer(r"\.|$", name))
        return next(
            (head for head in heads if head in self.script.bindings and not self.arguments(head)),
            name,
        )


# --- Where the optimizer steps, and the loops around it --------------------------------------
class Update(NamedTuple):
    """One optimizer step in the script: the call, whose it is, and the scaler it goes through."""

    call: ast.Call
    optimizer: str
    scaler: str = ""


@dataclass
class Nest:
    """The loops around an update, outermost first; `sites` are the nodes of the innermost loop's
    own function that step (the call itself, or the call of a helper that steps)."""

    loops: list[Loop]
    sites: list[ast.AST] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    doubtful: str = ""

    @property
    def inner(self) -> Loop:
        return self.loops[-1]


def find_updates(script: Script, roles: Roles) -> list[Update]:
    engines = {
        method_call(call)[0]
        for call in script.calls
        if method_call(call)[1] == "backward" and call.args
    }
    found = [update for call in script.calls if (update := _update(call, roles, engines))]
    spread = [
        Update(u.call, name, u.scaler)
        for u in found
        for name in looped_over(script, u.call, u.optimizer)
    ]
    return spread or _updates_by_hand(script)


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


def looped_over(script: Script, node: ast.AST, name: str) -> list[str]:
    """What `opt` is in `for opt in optimizers`, `in [a, b]`, also through zip and enumerate."""
    for loop in script.loops_around(node):
        if name not in targets(loop) or isinstance(loop, ast.While):
            continue
        pairs = [(loop.target, loop.iter)]
        if isinstance(loop.iter, ast.Call) and isinstance(loop.target, ast.Tuple):
            counted = [loop.iter] if dotted(loop.iter.func) == "enumerate" else []
            pairs = list(zip(loop.target.elts, [*counted, *loop.iter.args], strict=False))
        source = next((source for target, source in pairs if dotted(target) == name), None)
        if isinstance(source, (ast.List, ast.Tuple)):
            return [dotted(element) for element in source.elts]
        return [dotted(source) or name]
    return [name]


def _updates_by_hand(script: Script) -> list[Update]:
    """No optimizer at all: `p.data.add_(p.grad, alpha=-lr)` after a backward."""
    with_grad = {
        script.scope_of(n)
        for n in script.nodes
        if isinstance(n, ast.Attribute) and n.attr == "grad"
    }
    return [
        Update(call, "")
        for call in script.calls
        if method_call(call)[1] == "backward"
        and script.scope_of(call) in with_grad
        and script.loops_around(call)
    ]


class Nests:
    """From update calls to the loops that they stand in, through the functions that hold them."""

    def __init__(self, script: Script, updates: list[Update]) -> None:
        self.script = script
        by_loop: dict[Loop, Nest] = {}
        for update in updates:
            for site, loops, doubt in self._chains(update.call, ()):
                nest = by_loop.setdefault(loops[0], Nest(loops[::-1], doubtful=doubt))
                nest.sites.append(site)
                nest.updates.append(update)
        self.found = self._merged(list(by_loop.values()))

    def _chains(
        self, node: ast.AST, seen: tuple[ast.AST, ...]
    ) -> Iterator[tuple[ast.AST, list[Loop], str]]:
        """Each way into a loop: the node that steps there, the loops from the inside, a doubt."""
        scope = self.script.scope_of(node)
        loops = [lp for lp in self.script.loops_around(node) if not self._over_optimizers(lp)]
        ways: list[tuple[ast.AST, list[Loop], str]] = []
        if not isinstance(scope, ast.Module) and scope not in seen and len(seen) <= 5:
            for call in self.script.callers(scope):
                ways += self._chains(call, (*seen, scope))
        if not loops:
            yield from ways
            return
        doubt = self._perhaps_called(scope)
        if len({tuple(map(id, outer)) for _, outer, _ in ways}) > 1:
            doubt = "the training function is called from several loops"
        yield node, loops + (ways[0][1] if ways else []), doubt

    def _perhaps_called(self, scope: Scope) -> str:
        """A method of this name is called in a loop, on an object whose class is not known."""
        for call in self.script.calls if self.script.class_of(scope) else []:
            same = method_call(call)[1] == getattr(scope, "name", "")
            if (
                same
                and (call.args or call.keywords)
                and self.script.loops_around(call)
                and not self.script.definition(call)
            ):
                return f"line {call.lineno} may call this training several times"
        return ""

    def _over_optimizers(self, loop: Loop) -> bool:
        """`for opt in optimizers: opt.step()` is not a loop over batches."""
        names = set(targets(loop))
        return any(
            names & {name, *map(dotted, getattr(n, "args", []))}
            for n in own_all(loop.body)
            for name, method in [method_call(n)]
            if method in {"step", "zero_grad"}
        )

    def _merged(self, nests: list[Nest]) -> list[Nest]:
        """One nest per training loop: an inner loop of critic steps, or a remainder after it."""
        kept = list(nests)
        for small in nests:
            for big in nests:
                if small is big or small not in kept or big not in kept:
                    continue
                if small.inner not in big.loops:
                    continue
                if {u.optimizer for u in small.updates} <= {u.optimizer for u in big.updates}:
                    kept.remove(small)  # the remainder of an accumulation, around `big`
                elif self.script.inside(big.inner, small.inner):
                    kept.remove(big)  # critic steps inside the iteration
                    small.updates += big.updates
        return kept


# --- The patch -------------------------------------------------------------------------------
def plan(script: Script, parts: Sequence[str] = PARTS, package: bool = False) -> Plan:
    """Find the call sites of a script; raises NothingToPatch when it has no loop of its own."""
    return Patcher(script, parts, package).plan()


class Patcher:
    """Decides on the lines to add, loop by loop."""

    def __init__(self, script: Script, parts: Sequence[str], package: bool) -> None:
        self.script, self.wanted, self.package = script, {"log", *parts}, package
        self.roles = Roles(script)
        self.out = Plan(parts={"log": "no", "validation": "none seen", "resume": "no"})
        self.obs = self._free_name()
        self.keys: set[str] = set()
        self.validated: set[Function] = set()

    def plan(self) -> Plan:
        updates = find_updates(self.script, self.roles)
        nests = Nests(self.script, updates).found
        if not nests:
            raise NothingToPatch(where_to_look(self.script, self.roles, updates))
        self._import()
        for nest in nests:
            NestPatcher(self, nest, several=len(nests) > 1).patch()
        logged = {u.call for nest in nests for u in nest.updates}
        for update in updates:
            within = getattr(self.script.scope_of(update.call), "name", "")
            if update.call not in logged and within != "step":  # a wrapper's own
                self.out.note(
                    update.call,
                    "this optimizer step is outside the loop that is "
                    "observed (a remainder, or never called here); it is not counted",
                )
        kinds = list(KINDS)
        self.out.insertions = sorted(
            dict.fromkeys(self.out.insertions),
            key=lambda i: (i.line, -len(i.indent.expandtabs(8)), kinds.index(i.kind)),
        )
        return self.out

    def _free_name(self) -> str:
        """`obs`, or the full name where the script uses `obs` for anything, a string included."""
        values = [value for node in self.script.nodes for value in vars(node).values()]
        taken = {value for value in values if isinstance(value, str)}
        taken |= {
            name
            for node in self.script.nodes
            if isinstance(node, (ast.Global, ast.Nonlocal))
            for name in node.names
        }
        for name in ("obs", "observability"):
            if name not in taken | set(self.script.imports):
                return name
        raise PatchError(
            f"{self.script.name}: uses both names, obs and observability, for "
            f"something else; rename one of them"
        )

    def _import(self) -> None:
        """Behind the first run of imports that has torch, or behind the last import."""
        body = self.script.tree.body
        imports = [i for i, s in enumerate(body) if isinstance(s, (ast.Import, ast.ImportFrom))]
        with_torch = [i for i in imports if "torch" in ast.unparse(body[i])]
        index = with_torch[0] if with_torch else imports[-1] if imports else -1
        while index + 1 in imports:
            index += 1
        if not imports and ast.get_docstring(self.script.tree) is not None:
            index = 0
        start = "from . import" if self.package else "import"
        code = f"{start} observability" + (" as obs" if self.obs == "obs" else "")
        for place in range(index + 1, len(body) + 1):
            if self.add(Spot(body, place), "import", code):
                return
        raise PatchError(f"{self.script.name}: no room for the import")

    def add(self, spot: Spot, kind: str, code: str, confidence: str = "sure") -> bool:
        """Add a line at a spot; False when the original has no room for a line there."""
        line, indent = self.script.line_of(spot), self.script.indent_of(spot.block)
        if line is None:
            return False
        if KINDS[kind] in self.wanted:
            self.out.insertions.append(Insertion(line, indent, kind, code, confidence))
        return True


def where_to_look(script: Script, roles: Roles, updates: list[Update]) -> str:
    """Why there is nothing to patch, and which file to try instead."""
    if updates:
        return (
            f"{script.name}:{updates[0].call.lineno}: an optimizer steps here, but no loop of "
            f"this file calls it; patch the script that has the loop"
        )
    files = list(
        dict.fromkeys(file for call in script.calls if (file := _trained_in(script, roles, call)))
    )
    if files:
        return f"{script.name}: the optimizer is stepped elsewhere: try {', '.join(files)}"
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
    module = script.imports.get(dotted(call.func).partition(".")[0], "")
    libraries = {"", "torch", "transformers", "numpy", "tqdm", "torchvision"}
    if module.split(".")[0] in libraries or SCHEDULER_CALL.search(module):
        return ""
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    trains = re.search(r"train|fit|run_epoch|learn", called(call), re.I)
    if any(roles.optimizer(dotted(a)) for a in given) or (trains and script.loops_around(call)):
        return (module.rpartition(".")[0] or module).replace(".", "/") + ".py"
    return ""


class NestPatcher:
    """The lines for one training loop."""

    def __init__(self, patcher: Patcher, nest: Nest, several: bool) -> None:
        self.p, self.nest, self.several = patcher, nest, several
        self.script, self.roles = patcher.script, patcher.roles
        self.out, self.obs, self.add = patcher.out, patcher.obs, patcher.add
        self.inner = nest.inner
        self.scope = self.script.scope_of(nest.inner)
        self.optimizers = list(dict.fromkeys(u.optimizer for u in nest.updates if u.optimizer))
        self.loops = self._levels()
        self.spots = StepSpots(self)
        self.outer = self.loops[0]
        self.outer_scope = self.script.scope_of(self.outer)
        self.start = self.script.home[self.outer]
        # Another loop calls this one again and again: all of it is one run, that the exit ends.
        whole = self.script.scope_of(nest.loops[0])
        self.again = bool(nest.doubtful) or (self.loops != nest.loops and whole != self.outer_scope)
        self.at_start = self.script.bound(self.start)
        self.refusals: list[tuple[ast.AST, str]] = []
        self.models = self._visible_models()
        self.losses = Losses(self)

    def _levels(self) -> list[Loop]:
        """The loops of one run: those outside of which the optimizer is made."""
        made = [b for name in self.optimizers for b in self.script.bindings.get(name, [])]
        loops = self.nest.loops
        while len(loops) > 1 and any(self._made_within(b, loops) for b in made):
            loops = loops[1:]
        return loops

    def _made_within(self, made: Binding, loops: list[Loop]) -> bool:
        """Made inside the outermost of these loops, or in a function that this loop calls."""
        callees = {self.script.scope_of(loop) for loop in loops[1:]}
        return made.stmt in own_set(loops[0]) or (
            made.scope in callees - {self.script.scope_of(loops[0])}
        )

    def patch(self) -> None:
        self._init()
        self._watch()
        Evaluations(self).add()
        carry: dict[str, str] = {}
        if "resume" in self.p.wanted:
            self.refusals += refusals(self)
            resume = Carried(self)
            if not self.refusals:
                carry = resume.values
                resume.write()
                self.out.parts["resume"] = TO_BE_PROVED
        for where, why in self.refusals:
            self.out.note(where, f"resume is left out: {why}")
        self._steps(carry)
        self._finish()

    def refuse(self, where: ast.AST, why: str) -> None:
        self.refusals.append((where, why))

    # -- before and after
    def _init(self) -> None:
        args = []
        if worker := self._worker():
            args.append(f'f"worker{{{worker}}}"')
        elif self.several:
            args.append(f'"{getattr(self.outer_scope, "name", "line")}_{self.outer.lineno}"')
        if config := self._config():
            args.append(f"config={config}")
        once = f"if {self.obs}.current_run() is None: " if self.again else ""
        if not self.add(self.start, "init", f"{once}{self.obs}.init({', '.join(args)})"):
            raise PatchError(f"{self.script.name}:{self.outer.lineno}: no room before the loop")

    def _config(self) -> str:
        for name in sorted(self.at_start & set(self.script.bindings)):
            makes = {called(call) for call in self.script.made(name)}
            if makes == {"parse_args"} and "." not in name:
                return name if name in self.script.parameters(self.outer_scope) else f"vars({name})"
        known = self.script.bindings.keys() | self.script.locals_of(self.outer_scope)
        usual = ("args", "opt", "config", "cfg", "hparams", "hps", "self.config")
        return next(
            (
                name
                for name in usual
                if name in self.at_start
                and name in known
                and name not in self.script.imports
                and not self.roles.optimizer(name)
            ),
            "",
        )

    def _worker(self) -> str:
        """The rank of a process that runs this loop beside others, without torch.distributed."""
        if isinstance(self.outer_scope, ast.Module) or "init_process_group" in self.script.source:
            return ""
        for call in self.script.calls:
            given = [*call.args, *(keyword.value for keyword in call.keywords)]
            if called(call) in {
                "Process",
                "spawn",
                "start_processes",
            } and self.outer_scope.name in map(dotted, given):
                self.refuse(call, "several processes train at once, each by its own steps")
                return (
                    self.script.parameters(self.outer_scope)[0]
                    if self.outer_scope.args.args
                    else ""
                )
        return ""

    def _watch(self) -> None:
        if self.again:  # each call has an optimizer of its own, and the run would keep them all
            return
        optimizers = self._visible_optimizers()
        scalers = [u.scaler for u in self.nest.updates if u.scaler in self.at_start]
        keywords = {
            "optimizer": optimizers,
            "scheduler": self._schedulers(),
            "scaler": scalers,
            "loader": self._loader(),
        }
        args = list(self.models)
        for key, names in keywords.items():
            unique = list(dict.fromkeys(names))
            if unique:
                several = f"[{', '.join(unique)}]"
                args.append(f"{key}={several if len(unique) > 1 else unique[0]}")
        sure = "sure" if self.models and optimizers else "likely"
        for code in self.in_columns(self.start, args, self._watching):
            self.add(self.start, "watch", code, sure)
        if not self.models:
            self.refuse(self.outer, "no model was found that is bound before this loop")
        if self.optimizers and not optimizers:
            self.refuse(self.outer, "the optimizer has no name before this loop")

    def _visible_optimizers(self) -> list[str]:
        direct = [name for name in self.optimizers if name in self.at_start]
        if direct and len(direct) == len(self.optimizers):
            return direct
        made = [
            name
            for name in self.script.bindings
            if name in self.at_start and self.roles.made_by(name, OPTIMIZER_CALL)
        ]
        given = [
            name for name in self.script.parameters(self.outer_scope) if "optim" in name.lower()
        ]
        return [*direct, *(name for name in made or given if name not in direct)]

    def _visible_models(self) -> list[str]:
        optimizers = dict.fromkeys([*self.optimizers, *self._visible_optimizers()])
        given = [m for o in optimizers for m in self.roles.models_of(o) if m in self.at_start]
        usual = [
            name
            for name in self.roles.modules
            if name in self.at_start and name not in self.script.imports
        ]
        called_ones = [
            name
            for name in dict.fromkeys(dotted(c.func) for c in self.script.calls)
            if name in self.at_start
            and re.search("model$|^net|net$", last(name))
            and not self.script.is_function(name)
        ]
        found = given or [m for m in usual if MODEL_NAME.search(last(m))] or usual or called_ones
        copied = [
            name
            for call in self.script.calls  # a target network
            for name, method in [method_call(call)]
            if method == "load_state_dict"
            and call in own_set(self.outer)
            and name in self.at_start
            and not self.roles.optimizer(name)
        ]
        return list(dict.fromkeys([*self._of_scope(found), *copied, *self._averages(found)]))

    def _averages(self, models: list[str]) -> list[str]:
        """`ema = copy.deepcopy(model)` that the loop goes on with."""
        used = loads(own_set(self.outer))
        return [
            name
            for name in self.script.bindings
            if name in self.at_start and name in used and AVERAGE_NAME.search(last(name))
            for call in self.script.made(name)
            if called(call) in {"deepcopy", "AveragedModel"}
            and any(dotted(part) in models for part in own_all(arguments(call)))
        ]

    def _schedulers(self) -> list[str]:
        stepped = [
            name
            for call in self.script.calls
            for receiver, method in [method_call(call)]
            if method in {"step", "step_update"}
            for name in looped_over(self.script, call, receiver)
        ]
        return self._of_scope(
            [name for name in stepped if name in self.at_start and self.roles.scheduler(name)]
        )

    def _of_scope(self, names: list[str]) -> list[str]:
        """The function's own names, where it has any: a global one may be the same object."""
        local = self.script.locals_of(self.outer_scope)
        return [name for name in names if name.partition(".")[0] in local] or names

    def _loader(self) -> list[str]:
        name = loop_source(self.inner)
        made = any(called(call).endswith("DataLoader") for call in self.script.made(name))
        return [name] if made and name in self.at_start else []

    def _finish(self) -> None:
        """At the end of the block that holds the loop; at exit otherwise."""
        block, owner = self.start.block, self.script.parent[self.outer]
        while isinstance(owner, (*WITHS, ast.Try)):
            block, owner = self.script.home[owner].block, self.script.parent[owner]
        spot = Spot(block, len(block) - isinstance(block[-1], EXITS))
        line = self.script.line_of(spot) or 0
        # Behind a last line that does not end, the patch would change that line.
        unended = line > len(self.script.lines) and not ends_a_line(self.script.data)
        if not isinstance(owner, LOOPS) and not unended and not self.again:
            self.add(spot, "finish", f"{self.obs}.finish()")

    def _watching(self, some: Sequence[str]) -> str:
        return f"{self.obs}.watch({', '.join(some)})"

    def in_columns(
        self, spot: Spot, parts: Sequence[str], call: Callable[[Sequence[str]], str]
    ) -> list[str]:
        """Calls of ours that hold all the parts, as few as fit the width of a line."""
        codes: list[str] = []
        some: list[str] = []
        for part in parts:
            if some and not self.fits(spot, call([*some, part])):
                codes.append(call(some))
                some = []
            some.append(part)
        return [*codes, call(some)] if some else codes

    def fits(self, spot: Spot, code: str) -> bool:
        indent = self.script.indent_of(spot.block)
        return len(f"{indent.expandtabs(4)}{code}  {MARK}") <= COLUMNS

    # -- the step
    def _steps(self, carry: dict[str, str]) -> None:
        for spot, test, end in self.spots.found:
            last_ = end if self.out.parts["resume"] == TO_BE_PROVED else ""
            code, sure = self._step_call(spot, carry, test, last_), "likely" if test else "sure"
            if self.add(spot, "step", code, sure):
                self.out.parts["log"] = "yes"
        for update in self.nest.updates:
            if self.script.scope_of(update.call) is not self.scope and any(
                isinstance(test, ast.If) and not test.orelse
                for test, _ in self.script.above(update.call)
            ):
                self.out.note(
                    update.call,
                    "this function steps under a condition; every iteration "
                    "that calls it is counted as a step",
                )
        if self.out.parts["log"] == "no":
            self.out.note(
                self.inner,
                "no room for obs.step in this loop (its body is on the line of its header)",
            )

    def _step_call(self, spot: Spot, carry: dict[str, str], test: str, last: str) -> str:
        bound = self.script.bound(spot)
        *others, loss = self._losses_at(spot) or [""]
        needed = [*self.counter(bound), *filter(None, [loss])]
        # A plain name is read off this function itself, or off the one that calls it.
        unseen = {key: name for key, name in carry.items() if key != name}
        kept = [f'"{key}": {name}' for key, name in unseen.items() if name in bound]
        for name in unseen.values():
            if name not in bound:
                self.out.note(
                    self.inner, f"{name} may be unbound at the end of an iteration; not carried"
                )
        ends = [
            *([f"carry={{{', '.join(kept)}}}"] if kept else []),
            *([f"last={last}"] * bool(last)),
        ]
        guard, amount = f"if {test}: " if test else "", batch_of(self, bound)
        codes = [
            f"{guard}{self.obs}.step({', '.join([*needed, *more, *ends])})"
            for more in ([*others, *amount], others, amount, [])
        ]
        return next((code for code in codes if self.fits(spot, code)), codes[-1])

    def _losses_at(self, spot: Spot) -> list[str]:
        usable = [loss for loss in self.losses.found if self._usable(loss, spot)]
        keys = {key_of(loss.name): self._as_number(loss) for loss in usable[:-1]}
        taken = {"step", "loss", "batch", "batches", "tokens", "samples", "carry", "last"}
        others = [f"{key}={code}" for key, code in keys.items() if key not in taken]
        return others + [f"loss={self._as_number(loss)}" for loss in usable[-1:]]

    def _usable(self, loss: Loss, spot: Spot) -> bool:
        root, why = loss.name.partition("[")[0], ""
        if root not in self.script.bound(spot):
            why = "is not certainly bound where the step is logged"
        elif any(
            not any(dotted(n) == root for n in walk(b.value))  # `loss = loss.item()` keeps it
            for b in self._bound_again(root, self.last_site, self.script.line_of(spot) or 0)
        ):
            why = "is assigned again before the end of the iteration (an evaluation?)"
        if why:
            self.out.note(loss.call, f"the loss {root} {why}; it is left out")
        return not why

    def _as_number(self, loss: Loss) -> str:
        """`loss = loss.item()` after the backward: a number has no `.mean()`."""
        if self._bound_again(loss.name, loss.call.lineno):
            return re.sub(r"\.\w+\(\)", "", loss.code)
        return loss.code

    def _bound_again(self, name: str, after: int, before: int = sys.maxsize) -> list[Binding]:
        return [
            b
            for b in self.script.bindings.get(name, [])
            if b.stmt in own_set(self.inner) and after < b.stmt.lineno < before
        ]

    @property
    def last_site(self) -> int:
        return max(getattr(site, "lineno", 0) for site in self.nest.sites)

    def counter(self, bound: Names) -> list[str]:
        """The script's own count of steps: one that goes up by 1 an iteration and never back."""
        if self.again:
            return []
        for node in own_all(self.inner.body):
            if isinstance(node, ast.AugAssign) and self._counts_steps(node):
                name = dotted(node.target)
                return [name] if name in bound & self.at_start else []
        loop, conditions = self.inner, self.spots.conditions
        if len(self.loops) == 1 and isinstance(loop, ast.For) and not conditions:
            name = getattr(loop.target, "id", "")
            return [name] if name in bound and is_range(loop.iter) else []
        return []

    def _counts_steps(self, node: ast.AugAssign) -> bool:
        name = dotted(node.target)
        by_one = isinstance(node.op, ast.Add) and getattr(node.value, "value", None) == 1
        writes = [b for b in self.script.bindings.get(name, []) if b.stmt in own_set(self.outer)]
        if (
            not by_one
            or len(writes) != 1
            or not re.search(r"step|iter|batch|^[nit]$", last(name), re.I)
        ):
            return False
        mine, theirs = self._branches(node), self._branches(self.nest.sites[0])
        always = not self.spots.conditions
        return mine == theirs or (always and all(branch in theirs for branch in mine))

    def _branches(self, node: ast.AST) -> list[ast.AST]:
        return [n for n, _ in self.script.above(node) if isinstance(n, (ast.If, *LOOPS))]


def key_of(expr: str) -> str:
    """An identifier for an expression: `iter_num` for `self.iter_num`."""
    return re.sub(r"\W+", "_", expr.removeprefix("self.")).strip("_") or "value"


def loop_source(loop: Loop) -> str:
    """`loader` for `for i, x in enumerate(tqdm(loader))`."""
    expr = None if isinstance(loop, ast.While) else loop.iter
    while isinstance(expr, ast.Call) and expr.args:
        expr = expr.args[0]
    return dotted(expr)


# --- Where the step line goes ----------------------------------------------------------------
class StepSpot(NamedTuple):
    """Where a step line goes."""

    spot: Spot
    test: str = ""  # in words, where not every iteration steps
    last: str = ""  # when the loop breaks after it


class StepSpots:
    """The ends of an iteration that made an optimizer step."""

    def __init__(self, nest: NestPatcher) -> None:
        self.n, self.script, self.loop = nest, nest.script, nest.inner
        ways = [self._tests(site) for site in nest.nest.sites]
        # The `if`s around the only update, outermost first; none if each iteration steps.
        self.conditions = ways[-1] if all(ways) else []
        self.first = min(
            [
                self.script.index_in(self.loop.body, site)
                for site, tests in zip(nest.nest.sites, ways, strict=True)
                if not tests
            ],
            default=0,
        )
        self.unseen: list[ast.stmt] = []  # exits after a step that a resumed run would not take
        self.found = self._find()

    def _find(self) -> list[StepSpot]:
        if gate := self._gate():
            return [StepSpot(self._end(self.loop.body), gate)]
        if not self.conditions:
            return self._ends(self._case() or self.loop.body, self.first)
        outermost, (innermost, taken) = self.conditions[0][0], self.conditions[-1]
        place = Spot(self.loop.body, self.script.index_in(self.loop.body, outermost))
        rest = place.block[place.index :]
        branch = innermost.body if taken else innermost.orelse
        pure = all(self._pure(test.test, rest) for test, _ in self.conditions)
        if len(rest) > 1 and pure and not self._exits(rest[1:]):
            return [StepSpot(self._end(place.block), self._words())]
        later = self._breaks(rest[1:])
        if not self.script.own_line(branch[0]) and pure:
            return [StepSpot(self.script.behind(outermost), self._words(), later)]
        if any(not isinstance(stmt, ast.If) for stmt in rest[1:]):
            self.n.out.note(
                innermost,
                "more happens after the branch that steps; a checkpoint "
                "taken there has not seen it",
            )
        first = min(
            self.script.index_in(branch, site)
            for site in self.n.nest.sites
            if self.script.inside(site, innermost)
        )
        return [found._replace(last=found.last or later) for found in self._ends(branch, first)]

    def _gate(self) -> str:
        """`with accelerator.accumulate(model)`: it steps where the gradients are whole."""
        for parent, _ in self.script.above(self.n.nest.sites[-1]):
            for item in parent.items if isinstance(parent, WITHS) else []:
                engine, method = method_call(item.context_expr)
                if method == "accumulate" and engine:
                    return f"{engine}.sync_gradients"
        return ""

    def _case(self) -> list[ast.stmt]:
        """The body of the `case` that steps."""
        for parent, _ in self.script.above(self.n.nest.sites[-1]):
            if parent is self.loop:
                break
            if isinstance(parent, ast.match_case):
                self.first = self.script.index_in(parent.body, self.n.nest.sites[-1])
                return parent.body
        return []

    @property
    def counts_all(self) -> bool:
        """Each iteration makes a step of its own."""
        return not (self.conditions or self._gate())

    def _breaks(self, rest: Sequence[ast.stmt]) -> str:
        """The test of a break in what follows the step line, in words."""
        tests = []
        for leave in self._exits(rest):
            owner = self.script.parent[leave]
            if (
                isinstance(leave, ast.Break)
                and isinstance(owner, ast.If)
                and owner in rest
                and (leave in owner.body and self._pure(owner.test, rest))
            ):
                tests.append(ast.unparse(owner.test))
            elif not isinstance(leave, ast.Continue):
                self.unseen.append(leave)
        return tests[0] if len(tests) == 1 else " or ".join(f"({test})" for test in tests)

    def _tests(self, site: ast.AST) -> list[tuple[ast.If, bool]]:
        """Enclosing `if`s within the loop that do not step on every path, and the branch taken."""
        around = list(self.script.above(site))
        inside = around[: [parent for parent, _ in around].index(self.loop)]
        return [
            (parent, child in parent.body)
            for parent, child in reversed(inside)
            if isinstance(parent, ast.If) and not self._always(parent)
        ]

    def _always(self, test: ast.If) -> bool:
        """Both branches step."""
        return all(any(map(self._steps, branch)) for branch in (test.body, test.orelse))

    def _steps(self, stmt: ast.stmt) -> bool:
        if isinstance(stmt, ast.If):
            return self._always(stmt)
        by_hand = isinstance(stmt, ast.For) and any(
            getattr(node, "attr", "") == "grad" for node in own(stmt)
        )
        return by_hand or any(self.script.inside(site, stmt) for site in self.n.nest.sites)

    def _ends(self, block: list[ast.stmt], first: int) -> list[StepSpot]:
        """The end of `block`, and the exits from the loop after statement `first`."""
        exits = self._exits(block[first:])
        self.unseen += [leave for leave in exits if isinstance(leave, ast.Return)]
        found = [spot for leave in exits if leave not in block for spot in self._before(leave)]
        end = self._end(block)
        return [*found, StepSpot(end, last=self._last(*block[end.index : end.index + 1]))]

    @staticmethod
    def _last(*leave: ast.stmt) -> str:
        return "True" if leave and isinstance(leave[0], ast.Break) else ""

    @staticmethod
    def _end(block: list[ast.stmt]) -> Spot:
        """Behind the last statement, but before an exit and before names are deleted."""
        index = len(block)
        while index > 1 and isinstance(block[index - 1], (*EXITS, ast.Delete)):
            index -= 1
        return Spot(block, index)

    def _exits(self, stmts: Sequence[ast.stmt]) -> list[ast.stmt]:
        return [
            node
            for node in own_all(stmts)
            if isinstance(node, EXITS)
            and node.lineno > self.n.last_site
            and (isinstance(node, ast.Return) or self.script.loops_around(node)[0] is self.loop)
        ]

    def _before(self, leave: ast.stmt) -> list[StepSpot]:
        spot, owner = self.script.home[leave], self.script.parent[leave]
        if self.script.line_of(spot) is not None:
            return [StepSpot(spot, last=self._last(leave))]
        if isinstance(owner, ast.If) and spot.block is owner.body and self._pure(owner.test, []):
            place = self.script.home[owner]
            if self.script.line_of(place) is not None:
                self.unseen += [leave] * (len(owner.body) > 1)  # what else is done there
                return [StepSpot(place, ast.unparse(owner.test), self._last(leave))]
        self.n.out.note(leave, "this exit leaves no room for a line; its step is not logged")
        return []

    def _words(self) -> str:
        texts = [
            ast.unparse(test.test) if taken else f"not ({ast.unparse(test.test)})"
            for test, taken in self.conditions
        ]
        return texts[0] if len(texts) == 1 else " and ".join(f"({text})" for text in texts)

    @staticmethod
    def _pure(test: ast.expr, changing: Sequence[ast.stmt]) -> bool:
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
        simple = all(isinstance(n, allowed) or called(n) == "len" for n in walk(test))
        written = {name for node in own_all(changing) for name in targets(node)}
        return simple and not any(dotted(n) in written for n in walk(test))


# --- The loss --------------------------------------------------------------------------------
class Loss(NamedTuple):
    """What is back-propagated: its name, the code that gives the value to log, and where."""

    name: str
    code: str
    call: ast.Call


class Losses:
    """The names of what is back-propagated in a loop."""

    def __init__(self, nest: NestPatcher) -> None:
        self.n, self.script, self.inner = nest, nest.script, own_set(nest.inner)
        self._counts = modulos(nest.inner)
        named = [loss for call, expr in self.propagated() for loss in self._named(expr, call)]
        found: dict[str, Loss] = {}
        for loss in [*named, *self._returned()]:
            found.setdefault(loss.name, loss)
        self.found = list(found.values())
        if not found and not self._in_helper():
            nest.out.note(
                nest.nest.sites[0],
                "the loss of this step has no name that can be logged; steps are logged without it",
            )

    def propagated(self) -> Iterator[tuple[ast.Call, ast.expr]]:
        """The calls of this loop that back-propagate, and what they do."""
        for call in self.script.calls:
            expr, scope = propagated(call, self.n.roles), self.script.scope_of(call)
            if expr is not None and call in self.inner:
                yield call, expr
            elif not isinstance(scope, ast.Module) and dotted(expr) in self.script.parameters(
                scope
            ):
                yield from self._given(scope, dotted(expr))

    def _given(self, helper: Function, parameter: str) -> Iterator[tuple[ast.Call, ast.expr]]:
        """`backward(loss)`, a helper: what the loop hands to it."""
        index = [name for name in self.script.parameters(helper) if name != "self"].index(parameter)
        for call in self.script.callers(helper):
            if call in self.inner and index < len(call.args):
                yield call, call.args[index]

    def _named(self, expr: ast.expr, call: ast.Call) -> Iterator[Loss]:
        """The names inside a back-propagated expression."""
        receiver, method = method_call(expr)
        if isinstance(expr, (ast.Name, ast.Attribute)) and dotted(expr):
            yield Loss(dotted(expr), self._unscaled(dotted(expr), call), call)
        elif isinstance(expr, ast.Subscript) and isinstance(expr.slice, ast.Constant):
            if isinstance(expr.value, ast.Name):
                yield Loss(ast.unparse(expr), ast.unparse(expr), call)
        elif isinstance(expr, ast.BinOp):
            sides = [expr.left, expr.right]
            if not isinstance(expr.op, (ast.Add, ast.Sub)):
                sides = sorted(sides, key=lambda s: not LOSS_NAME.search(last(dotted(s))))[:1]
            for side in sides:
                yield from self._named(side, call)
        elif method in {"mean", "sum"} and LOSS_NAME.search(last(receiver)):
            yield Loss(receiver, f"{receiver}.{method}()", call)
        elif method == "scale" and isinstance(expr, ast.Call) and expr.args:
            yield from self._named(expr.args[0], call)

    def _unscaled(self, name: str, call: ast.Call) -> str:
        """`loss * K`, where it was divided by what a step accumulates."""
        for binding in self.script.bindings.get(name, []):
            stmt, value = binding.stmt, binding.value
            if stmt in self.inner and stmt.lineno <= call.lineno:
                by_itself = isinstance(stmt, ast.AugAssign) and isinstance(stmt.op, ast.Div)
                divisor = dotted(value if by_itself else divided_by(value))
                if divisor and (ACCUMULATED.search(divisor) or divisor in self._counts):
                    return f"{name} * {divisor}"
        return name

    def _returned(self) -> Iterator[Loss]:
        """`loss = train_step(batch)`: the step is in a helper that returns the loss."""
        for site in self.n.nest.sites:
            stmt = self.script.stmt_of(site)
            if isinstance(site, ast.Call) and isinstance(stmt, ast.Assign) and stmt.value is site:
                yield from (
                    Loss(name, name, site) for name in targets(stmt) if LOSS_NAME.search(last(name))
                )

    def _in_helper(self) -> bool:
        """The step is in a helper that keeps the loss to itself: log it there."""
        for update in self.n.nest.updates:
            scope = self.script.scope_of(update.call)
            if scope is self.n.scope:
                continue
            spot = Spot(scope.body, len(scope.body) - isinstance(scope.body[-1], ast.Return))
            names = [
                dotted(propagated(call, self.n.roles))
                for call in self.script.calls
                if self.script.scope_of(call) is scope
            ]
            for name in names:
                if name and "." not in name and name in self.script.bound(spot):
                    return self.n.add(spot, "step", f'{self.n.obs}.log({{"loss/train": {name}}})')
        return False


ACCUMULATED = re.compile(r"accum|micro|grad")


def divided_by(value: ast.AST) -> ast.expr | None:
    is_quotient = isinstance(value, ast.BinOp) and isinstance(value.op, ast.Div)
    return value.right if is_quotient else None  # type: ignore[attr-defined]


def modulos(loop: Loop) -> set[str]:
    """`K` of `if (i + 1) % K == 0`, and of an inner `for _ in range(K)`."""
    found = {
        ast.unparse(part.right)
        for node in own_all(loop.body)
        for part in walk(node.test if isinstance(node, ast.If) else ast.Pass())
        if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Mod)
    }
    inner = [node.iter for node in own_all(loop.body) if isinstance(node, FORS)]
    ranges = [call for call in inner if isinstance(call, ast.Call) and called(call) == "range"]
    return found | {ast.unparse(call.args[-1]) for call in ranges if call.args}


def propagated(call: ast.Call, roles: Roles) -> ast.expr | None:
    """What a call back-propagates, in any of its spellings."""
    first = call.args[0] if call.args else None
    if isinstance(call.func, ast.Attribute) and call.func.attr == "backward":
        name = last(dotted(call.func.value))
        if first is None or not name or LOSS_NAME.search(name):
            return call.func.value
        if isinstance(first, (ast.List, ast.Tuple)) and first.elts:  # autograd.backward([...])
            first = first.elts[0]
        if ENGINE_NAME.search(name) or LOSS_NAME.search(last(dotted(first))):
            return first
        return call.func.value if isinstance(first, ast.Call) else None
    handed = any(roles.optimizer(dotted(arg)) for arg in call.args[1:])
    return first if handed and SCALER_NAME.search(called(call)) else None


# --- The batch -------------------------------------------------------------------------------
NOT_BATCH = re.compile(
    r"\.|loss|^(?:[ijk_]|it|idx|step|epoch|logits)$|^(?:out|pred|hid|batch_i|iter)"
)


def batch_of(n: NestPatcher, bound: Names) -> list[str]:
    """What the iteration trained on, whose shape the run reads; not where it saw only a part."""
    if (
        not n.spots.counts_all and n.out.parts["resume"] != TO_BE_PROVED
    ):  # no skip line counts the batches
        return []
    name = next((name for name in batch_names(n.inner) if name in bound), "")
    if not name:
        return []
    count = micro_batches(n)
    return [f"batch={name}", *([f"batches={count}"] if count else [])]


def batch_names(loop: Loop) -> list[str]:
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


def micro_batches(n: NestPatcher) -> str:
    """`accumulation_steps`, where an inner `for _ in range(…)` back-propagates so often a step."""
    counts: list[str] = []
    for call, _ in n.losses.propagated():
        loops = n.script.loops_around(call)
        for loop in loops[: loops.index(n.inner)]:
            if isinstance(loop, ast.For) and called(loop.iter) == "range":
                counts += map(ast.unparse, loop.iter.args[-1:])  # type: ignore[attr-defined]
    return next((count for count in counts if re.fullmatch(r"[\w.]+", count)), "")


def returned(helper: Function, index: int | None) -> ast.expr | None:
    """What a function returns; `index`, where its caller takes a tuple apart."""
    for node in own_all(helper.body):
        if isinstance(node, ast.Return) and node.value is not None:
            if index is None or not isinstance(node.value, ast.Tuple):
                return node.value if index is None else None
            return node.value.elts[index] if index < len(node.value.elts) else None
    return None


# --- What a resume needs ---------------------------------------------------------------------
Refusal = tuple[ast.AST, str]


def refusals(n: NestPatcher) -> list[Refusal]:
    """Why a resume of this loop could not be exact: the first finding of each rule."""
    rules = (
        _several_runs,
        _state_outside,
        _average_by_hand,
        _optimizer_made_again,
        _optimizer_without_state,
        _scheduler_steps_first,
        _reads_in_the_middle,
        _left_unseen,
    )
    return [found for rule in rules for found in list(rule(n))[:1]]


def _several_runs(n: NestPatcher) -> Iterator[Refusal]:
    if n.nest.doubtful:
        yield n.inner, n.nest.doubtful
    if n.loops != n.nest.loops:
        yield n.nest.loops[0], "several trainings, one after the other, in this loop"
    if n.several:
        yield n.outer, "several training loops in one file"
    if not n.script.own_line(n.inner.body[0]):
        yield n.inner, "the loop's body is on the line of its header"


def _left_unseen(n: NestPatcher) -> Iterator[Refusal]:
    for leave in n.spots.unseen:
        yield leave, "the loop may end here, after its step, and a resumed run would go on"


def _state_outside(n: NestPatcher) -> Iterator[Refusal]:
    """What a checkpoint cannot hold: an environment, a batch source, a half-read iterator."""
    for node in own_all([*n.outer.body, *n.inner.body]):
        name, method = method_call(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name, method = node.func.id, "__call__"  # `early_stopping(val_loss)`
        if ENV_NAME.search(last(name)) and method in {"step", "reset"}:
            yield node, f"the state of {name} cannot be saved"
        elif name and _moves_on(n, name, method):
            call = name if method == "__call__" else f"{name}.{method}"
            yield node, f"{call}() changes {name}, whose state cannot be saved"
        elif called(node) == "iter" and n.inner in n.script.loops_around(node):
            yield node, "the iterator is made again in mid-loop; its position cannot be saved"


def _moves_on(n: NestPatcher, name: str, method: str) -> bool:
    """An object made before the loop that changes with it: a batch source, a buffer."""
    if "ema" in method.split("_"):  # weights averaged where no name of the script shows them
        return True
    if (
        name in n.models
        or n.roles.scheduler(name)
        or n.roles.optimizer(name)
        or SCALER_NAME.search(name)
        or name.partition(".")[0] in n.script.imports
    ):
        return False
    made = [
        c
        for b in n.script.bindings.get(name, [])
        if b.stmt not in own_set(n.outer)
        for c in makers(b.value)
    ]
    classes = {called(call) for call in made if called(call)[:1].isupper()}
    if shown := [name for name in classes if KEEPS_NO_STATE.search(name)]:
        where = next(call for call in made if called(call) == shown[0])
        n.out.note(where, f"{name} begins anew in a resumed run, and so does what is shown of it")
        return False
    return bool(classes and MOVES_ON.search(method)) or any(
        f.name == method
        and getattr(n.script.class_of(f), "name", "") in classes
        and any(t.startswith("self.") for node in own_all(f.body) for t in targets(node))
        for f in n.script.functions
    )


def _average_by_hand(n: NestPatcher) -> Iterator[Refusal]:
    """`avg = [p.clone() for p in model.parameters()]`, and the loop moves it."""
    used = loads(own_set(n.outer))
    for name in n.script.bindings.keys() & n.at_start & used:
        for binding in n.script.bindings[name]:
            calls = map(called, walk(binding.value))
            is_collection = isinstance(binding.value, (ast.ListComp, ast.DictComp))
            copies = is_collection and bool({"clone", "deepcopy"} & {*calls})
            if copies and re.search("avg|ema|shadow|average", name):
                yield binding.stmt, f"{name} holds an average; keep it in a module, to be saved"


def _optimizer_made_again(n: NestPatcher) -> Iterator[Refusal]:
    for name in n.optimizers:
        for binding in n.script.bindings.get(name, []):
            if binding.stmt in own_set(n.outer):
                yield binding.stmt, f"{name} is made again inside the loop"


def _optimizer_without_state(n: NestPatcher) -> Iterator[Refusal]:
    """An optimizer that is an object of the script itself, without a `state_dict`."""
    made = {called(call): call for name in n.optimizers for call in n.script.made(name)}
    for node in n.script.nodes:
        if isinstance(node, ast.ClassDef) and node.name in made:
            known = any("ptim" in dotted(base) for base in node.bases)
            if not known and not any(getattr(f, "name", "") == "state_dict" for f in node.body):
                yield made[node.name], f"{node.name} has no state_dict to save"


def _scheduler_steps_first(n: NestPatcher) -> Iterator[Refusal]:
    for loop, inner in zip(n.loops, n.loops[1:], strict=False):
        for node in own_all(prelude(loop, inner)):
            name, method = method_call(node)
            if method == "step" and n.roles.scheduler(name):
                yield (
                    node,
                    (
                        "the scheduler steps at the top of an epoch: a resumed epoch would "
                        "step it twice"
                    ),
                )


def _reads_in_the_middle(n: NestPatcher) -> Iterator[Refusal]:
    if any(map(reads_next, n.inner.body[first_unread(n.inner) :])):
        yield (
            n.inner,
            ("next() is called in the middle of the iteration; a resumed run cannot pass over it"),
        )


def first_unread(loop: Loop) -> int:
    """Where the guard stands: behind `batch = next(it)`, a skipped batch is read all the same."""
    return sum(isinstance(s, (ast.Assign, ast.Expr)) and reads_next(s) for s in loop.body)


def reads_next(stmt: ast.stmt) -> bool:
    return any(
        isinstance(n, ast.Call) and dotted(n.func) == "next" and n.args and dotted(n.args[0])
        for n in own(stmt)
    )


def prelude(loop: Loop, inner: ast.AST) -> list[ast.stmt]:
    """The statements of `loop`'s body that come before the one that holds `inner`."""
    for index, stmt in enumerate(loop.body):
        if inner in own_set(stmt):
            return loop.body[:index]
    return []


class Carried:
    """The loop-carried locals, and the lines that give them back."""

    def __init__(self, nest: NestPatcher) -> None:
        self.n, self.script = nest, nest.script
        self.lines: list[tuple[Spot, str]] = []
        mine = [loop for loop in nest.loops if self.script.scope_of(loop) is nest.scope]
        carried = {loop: self._carried(loop) for loop in nest.loops}
        self.values: dict[str, str] = {}  # key -> expression, for the step line
        for loop, inner in zip(mine, [*mine[1:], None], strict=True):
            later = self._set_on_the_way(loop, inner) & set(carried.get(inner, [])) if inner else {}
            known = self.values.values()
            defaults = {n: n for n in carried[loop] if n not in known and n not in later}
            if loop is mine[0]:
                tail = [n for n in self._left_behind(mine[-1]) if n not in defaults]
                defaults |= dict.fromkeys(tail, "None")
            self.values |= self._resume(self.script.home[loop], defaults)
        for loop in nest.loops[: -len(mine)]:
            self._resume(Spot(loop.body, 0), {n: n for n in carried[loop]})

    def write(self) -> None:
        for spot, code in self.lines:
            self.n.add(spot, "resume", code, "likely")
        obs, loops, inner = self.n.obs, self.n.loops, self.n.inner
        if loops[0] is inner and not self.lines:  # nothing is carried, all else is put back
            self.n.add(self.script.home[inner], "resume", f"{obs}.resume()", "likely")
        if loops[0] is not inner:
            label = getattr(getattr(loops[0], "target", None), "id", "")
            code = f"if {obs}.skip_epoch({label}): continue"
            self.n.add(Spot(loops[0].body, 0), "skip", code)
        head = Spot(inner.body, first_unread(inner))
        if any(found.last for found in self.n.spots.found):
            self.n.add(head, "skip", f"if {obs}.ended(): break")
        counted = len(loops) == 1 and isinstance(inner, ast.While)  # by a step that is carried
        if not counted or any(map(reads_next, inner.body)):
            code = f"if {obs}.skip_batch(): continue"
            self.n.add(head, "skip", code)

    def _resume(self, spot: Spot, defaults: dict[str, str]) -> dict[str, str]:
        keys = {self._key(name): name for name in defaults}

        def call(some: Sequence[str]) -> str:
            given = ", ".join(f"{key}={defaults[keys[key]]}" for key in some)
            return f"{', '.join(keys[key] for key in some)} = {self.n.obs}.resume({given})"

        self.lines += [(spot, code) for code in self.n.in_columns(spot, [*keys], call)]
        return keys

    def _key(self, name: str) -> str:
        base = key = key_of(name)
        count = 2
        while key in self.n.p.keys:
            key, count = f"{base}_{count}", count + 1
        self.n.p.keys.add(key)
        return key

    @staticmethod
    def _set_on_the_way(loop: Loop, inner: Loop) -> set[str]:
        """Assigned between this loop's head and the next one: given back only there."""
        return {name for node in own_all(prelude(loop, inner)) for name in targets(node)}

    def _carried(self, loop: Loop) -> list[str]:
        """Names bound before the loop, assigned in it, and read before they are assigned there."""
        written = dict.fromkeys(
            name
            for node in own_all(loop.body)
            for name in targets(node)
            if not isinstance(node, (ast.Import, ast.ImportFrom, *DEFINITIONS))
        )
        flow = Flow(self.script)
        if isinstance(loop, ast.While):
            flow.read(loop.test, frozenset())
        flow.block(loop.body, frozenset(targets(loop)))
        direct = set(flow.unbound)
        flow.block(self.script.after(loop, LOOPS), frozenset())
        read = flow.unbound.keys() | self._closed_over(loop)
        bound = self.script.bound(self.script.home[loop])
        names = [
            name
            for name in written
            if name in read
            and self._is_local(name, loop)
            # An attribute of a name that is bound anew each time is not carried itself.
            and not ("." in name and name.partition(".")[0] in written)
            and not self._is_known(name)
        ]
        self._refuse_unbound(loop, [name for name in names if name in direct - bound])
        names = [name for name in names if name in bound and self._is_plain(name)]
        filled = dict.fromkeys(name for node in own_all(loop.body) for name in mutated(node))
        return [
            *names,
            *(
                name
                for name in filled
                if name in bound
                and name not in names
                and self._is_local(name, loop)
                and self._is_container(name)
            ),
        ]

    def _refuse_unbound(self, loop: Loop, names: list[str]) -> None:
        for name in names:
            if not LOSS_NAME.search(name) and not METRIC_NAME.search(name):  # only shown
                self.n.refuse(
                    loop,
                    f"{name} goes from one iteration to the next, but is not "
                    f"certainly bound before the loop",
                )

    def _closed_over(self, loop: Loop) -> Names:
        """Names of this scope that functions of the script read."""
        return frozenset(
            name
            for f in self.script.functions
            if f is not self.script.scope_of(loop)
            for name in loads(own_all(f.body)) - self.script.locals_of(f)
            if "." not in name
        )

    def _is_local(self, name: str, loop: Loop) -> bool:
        scope = self.script.scope_of(loop)
        return (
            "." in name
            or name in self.script.locals_of(scope)
            or any(
                name in n.names
                for n in own_all(scope.body)
                if isinstance(n, (ast.Global, ast.Nonlocal))
            )
        )

    def _is_known(self, name: str) -> bool:
        """What a checkpoint holds anyway, or what shows something on a screen."""
        roles = self.n.roles
        return bool(NOT_CARRIED.search(last(name))) or (
            name in [*self.n.optimizers, *self.n.models]
            or roles.made_by(name, OPTIMIZER_CALL)
            or roles.made_by(name, SCHEDULER_CALL)
        )

    def _is_plain(self, name: str) -> bool:
        """Whether a value can be put into a checkpoint as it is."""
        calls = self.script.made(name)
        if any(CLOCK.match(self.script.resolve(call.func)) for call in calls):
            return False
        for call in calls:
            kind = called(call)
            if kind in HOLDS_A_POSITION or (kind[:1].isupper() and not kind.endswith("Tensor")):
                self.n.out.note(
                    call,
                    f"{name} is an object of {dotted(call.func)}; a resume does not restore it",
                )
                return False
        return True

    def _is_container(self, name: str) -> bool:
        made = self.script.bindings.get(name, [])
        literals = (ast.List, ast.Dict, ast.ListComp, ast.DictComp)
        return bool(made) and all(
            isinstance(b.value, literals) or called(b.value) in {"list", "dict"} for b in made
        )

    def _left_behind(self, inner: Loop) -> list[str]:
        """Names that only the batch loop binds and that are read after it: a run that resumes at
        the end of an epoch reads them before any batch has bound them."""
        start = self.script.bound(self.script.home[inner]).union(targets(inner))
        written = {name for node in own_all(inner.body) for name in targets(node)}
        end = self.script.bound(Spot(inner.body, len(inner.body)))
        flow = Flow(self.script)
        flow.block(self.script.after(inner), start)
        return [
            name
            for name in flow.unbound
            if name in end & written & self.script.locals_of(self.n.scope) and name not in start
        ]


def mutated(node: ast.AST) -> list[str]:
    """The list or dict that a call or an assignment to an item fills."""
    receiver, method = method_call(node)
    if method in MUTATORS:
        return [receiver]
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
        return [dotted(node.value)]
    return []


# --- Evaluations -----------------------------------------------------------------------------
class Evaluations:
    """The evaluations beside the training loop, and the line that records each value."""

    def __init__(self, nest: NestPatcher) -> None:
        self.n, self.script, self.out = nest, nest.script, nest.out
        self.helpers = {self.script.scope_of(u.call) for u in nest.nest.updates} - {nest.scope}
        self.scopes = {self.script.scope_of(loop) for loop in nest.nest.loops}

    def add(self) -> None:
        calls = [call for call in self.script.calls if self._evaluates(call)]
        recorded = [self._call(call) for call in calls if self._open_at(call)]
        recorded.append(self._written_out() or self._phases())
        if any(recorded):
            self.out.parts["validation"] = "yes"
        elif calls and self.out.parts["validation"] != "yes":
            self.out.parts["validation"] = "no"

    def _evaluates(self, call: ast.Call) -> bool:
        """Named like an evaluation, and called while the run is open."""
        name, scope = called(call), self.script.scope_of(call)
        if (
            not EVAL_NAME.search(name)
            or NOT_EVAL_NAME.search(name)
            or scope not in self.scopes
            or self.script.resolve(call.func).startswith(("torch.", "numpy."))
        ):
            return False
        return self._in_nest(call) or (
            scope is self.n.outer_scope and call.lineno > self.n.outer.lineno
        )

    def _open_at(self, call: ast.Call) -> bool:
        """In the block that `finish` ends, or in one within it."""
        outer = self.script.parent[self.n.outer]
        while isinstance(outer, (*WITHS, *LOOPS, ast.Try)):
            outer = self.script.parent[outer]
        if not self.script.inside(call, outer):
            self.out.note(call, "this evaluation comes after the end of the run; not recorded")
            return False
        return True

    def _in_nest(self, node: ast.AST) -> bool:
        return any(self.script.inside(node, loop) for loop in self.n.nest.loops)

    def _call(self, call: ast.Call) -> bool:
        stmt, helper = self.script.stmt_of(call), self.script.definition(call)
        names = targets(stmt) if isinstance(stmt, ast.Assign) and stmt.value is call else []
        if names and self._is_another(call, names):
            return self._scores(self.script.behind(stmt), names, call, "eval")
        value = self._entry(names, stmt) or self._loss_of(names, helper)
        if value:
            return self._record(self.script.behind(stmt), value, call)
        if helper and self._within(helper):
            return True
        for name in names:
            if METRIC_NAME.search(name) and "." not in name:
                return self._scores(self.script.behind(stmt), [name], call)
        self.out.note(call, "an evaluation without a value that is a loss by name; not recorded")
        return False

    def _is_another(self, call: ast.Call, names: list[str]) -> bool:
        """Of the training data, of an average of the weights, or of a test behind the training."""
        return of_other_data(call, names) or not self._in_nest(call)

    def _loss_of(self, names: list[str], helper: Function | None) -> str:
        """The one of the assigned names that is a loss: by its name, by what is returned, or as
        the only one that is no score."""
        for index, name in enumerate(names):
            value = returned(helper, index if len(names) > 1 else None) if helper else None
            mapping = isinstance(value, (ast.Tuple, ast.Dict, ast.DictComp))
            by_return = (
                value is not None
                and not mapping
                and any(LOSS_NAME.search(last(dotted(n))) for n in walk(value))
            )
            if by_return or LOSS_NAME.search(last(name)):
                return name
        rest = [name for name in names if not METRIC_NAME.search(last(name))]
        return rest[0] if len(rest) == 1 and "." not in rest[0] and len(names) > 1 else ""

    def _entry(self, names: list[str], stmt: ast.stmt) -> str:
        """`losses["val"]` when the script itself reads it right after."""
        spot = self.script.behind(stmt)
        later = [s for s in spot.block[spot.index :] if not isinstance(s, (ast.If, *LOOPS))]
        for node in own_all(later):
            if isinstance(node, ast.Subscript) and [dotted(node.value)] == names:
                key = getattr(node.slice, "value", None)
                if isinstance(key, str) and (HELD_OUT.search(key) or LOSS_NAME.search(key)):
                    return f"{names[0]}[{key!r}]"
        return ""

    def _record(self, spot: Spot, value: str, where: ast.AST) -> bool:
        at = self.n.counter(self.script.bound(spot)) if self._in_iteration(spot) else []
        date = "".join(f", step={name}" for name in at)  # as the script itself numbers it
        return self._line(spot, f"{self.n.obs}.validation({value}{date})", where)

    def _in_iteration(self, spot: Spot) -> bool:
        return self.n.inner in self.script.loops_around(spot.block[0])

    def _scores(self, spot: Spot, names: list[str], where: ast.AST, group: str = "val") -> bool:
        pairs = ", ".join(f'"{group}/{key_of(name)}": {name}' for name in names)
        return self._line(spot, f"{self.n.obs}.log({{{pairs}}})", where)

    def _line(self, spot: Spot, code: str, where: ast.AST) -> bool:
        if self.n.add(spot, "validation", code, "likely"):
            return True
        self.out.note(where, "no room for a line after this evaluation; not recorded")
        return False

    def _within(self, helper: Function) -> bool:
        """Record inside the evaluating function, at its end."""
        calls = self.script.callers(helper)
        if helper in self.n.p.validated:
            return True
        if any(of_other_data(call, []) for call in calls):  # it prints the one as the other
            return False
        block = helper.body
        while isinstance(block[-1], WITHS):
            block = block[-1].body
        spot = Spot(block, len(block) - isinstance(block[-1], ast.Return))
        bound = self.script.bound(spot)
        losses = [n for n in worked_out(helper, LOSS_NAME) if n in bound]
        losses.sort(key=lambda n: bool(HELD_OUT.search(n)))
        meters = self._meters(helper, bound)
        scores = [n for n in worked_out(helper, METRIC_NAME, (ast.BinOp, ast.Name)) if n in bound]
        self.n.p.validated.add(helper)
        if losses and not any(map(self._in_nest, calls)):
            return self._scores(spot, losses[-1:], helper, "eval")
        if losses or meters:
            value = as_printed(losses[-1], block) if losses else meters[0]
            return self._record(spot, value, helper)
        return bool(scores) and self._scores(spot, sorted(scores), helper)

    def _meters(self, helper: Function, bound: Names) -> list[str]:
        """`losses.avg`, of a meter that the function fills and prints."""
        read = loads(own_all(helper.body))
        if "self.avg" in map(dotted, self.script.nodes):
            read |= {
                f"{name}.avg"
                for name in self.script.bindings
                for b in self.script.bindings[name]
                if b.scope is helper and called(b.value).endswith("Meter")
            }
        return sorted(
            name
            for name in read
            if last(name) in {"avg", "global_avg"}
            and name.partition(".")[0] in bound
            and LOSS_NAME.search(name)
        )

    def _written_out(self) -> bool:
        """Evaluation in the loop itself: behind the last `val_loss /= n`."""
        recorded = [
            self._after_last(name)
            for name in self.script.bindings
            if HELD_OUT_LOSS.search(name) and "." not in name and not NOT_A_VALUE.search(name)
        ]
        return any(recorded)

    def _after_last(self, name: str) -> bool:
        mine = [
            b
            for b in self.script.bindings[name]
            if (b.scope in self.scopes and self._in_nest(b.stmt))
            or (b.scope in self.helpers and not self.script.loops_around(b.stmt))
        ]
        if not mine or any(EVAL_NAME.search(called(c)) for c in makers(mine[-1].value)):
            return False
        stmt = max((b.stmt for b in mine), key=lambda s: s.lineno)
        for loop in self.script.loops_around(stmt):
            if loop in self.n.nest.loops:
                break
            stmt = loop
        spot = self.script.behind(stmt)
        if name not in self.script.bound(spot):
            return False
        return self._record(spot, as_printed(name, spot.block[spot.index :]), stmt)

    def _phases(self) -> bool:
        """`for phase in ["train", "val"]`: record the epoch's value of the second."""
        for loop in self.n.nest.loops:
            phase = getattr(getattr(loop, "target", None), "id", "")
            words = [
                n.value
                for n in walk(getattr(loop, "iter", loop.body[0]))
                if isinstance(n, ast.Constant) and HELD_OUT.search(str(n.value))
            ]
            found = [
                (i, name)
                for i, stmt in enumerate(loop.body)
                if not isinstance(stmt, LOOPS)
                for name in targets(stmt)
                if LOSS_NAME.search(name)
            ]
            if phase and words and found and isinstance(words[0], str):
                index, name = found[-1]
                code = f'if {phase} == "{words[0]}": {self.n.obs}.validation({name})'
                return self._line(Spot(loop.body, index + 1), code, loop)
        return False


def of_other_data(call: ast.Call, names: list[str]) -> bool:
    """Of the training data, or by an average of the weights: not the validation of this model."""
    given = [dotted(part) for part in own_all(arguments(call))]
    words = [last(name) for name in [*names, *given] if name]
    held_out = any(map(HELD_OUT.search, words))
    return any(map(AVERAGE_NAME.search, words)) or (
        any(map(OF_TRAINING.search, words)) and not held_out
    )


def as_printed(name: str, stmts: Sequence[ast.stmt]) -> str:
    """`total / len(loader)`, where a sum is divided only when it is shown."""
    for node in own_all(stmts):
        for part in walk(node) if called(node) in SHOWN else ():
            count = divided_by(part)
            is_name = dotted(count) or called(count) == "len"
            if is_name and dotted(part.left) == name:  # type: ignore[attr-defined]
                return ast.unparse(part)
    return name


SHOWN = {"print", "info", "log", "write", "format", "debug", "set_description", "set_postfix"}


def worked_out(
    helper: Function, pattern: re.Pattern[str], kinds: tuple[type, ...] = (ast.expr,)
) -> list[str]:
    """Names of plain numbers that a function works out itself, the last written last."""
    found: dict[str, None] = {}
    containers = (ast.List, ast.Dict, ast.ListComp, ast.Lambda)
    for node in own_all(helper.body):
        value: Any = getattr(node, "value", None)
        made = isinstance(value, containers) or called(value)[:1].isupper()
        assigns = isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign))
        if assigns and isinstance(value, kinds) and not made:
            for name in targets(node):
                if pattern.search(name) and "." not in name:
                    found.pop(name, None)
                    found[name] = None
    return list(found)


# --- Adding the lines ------------------------------------------------------------------------
def patched(script: Script, insertions: Sequence[Insertion]) -> bytes:
    """The script with the lines added; it compiles, and without them it is the original."""
    added: dict[int, list[str]] = {}
    for item in insertions:
        added.setdefault(item.line, []).append(f"{item.indent}{item.code}  {MARK}")
    return compiled(weave(script.data, added, script.name), script.name)


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


LARGEST = 4_000_000  # bytes: more takes more than a few seconds, and no script has them


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
