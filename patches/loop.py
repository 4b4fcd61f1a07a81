"""A training loop: which names are optimizers, schedulers and models, where a step is made, what is
back-propagated there, and what one iteration leaves to the next.

    roles = Roles(script)
    nests = find_nests(script, find_updates(script, roles))
    loop = TrainingLoop(script, roles, nests[0], ...)
    loop.optimizers, loop.models, loop.losses, loop.ends, loop.carried

Facts only: nothing here decides on a line. What a name stands for is told by the call that made it
and by its own name, as the patterns below say; a fact that cannot be had is absent.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple

from lines import MARK
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
    called,
    dotted,
    is_range,
    last,
    loads,
    makers,
    method_call,
    own,
    own_all,
    own_set,
    root,
    targets,
    walk,
    written,
)

COLUMNS = 100  # of an added line at most


# --- What is said of a script ----------------------------------------------------------------
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
    r"loss|nll|bpb|(?:^|_)(?:err\w?|cost|elbo|mse|ce|bce|objective)(?:_|\d|$)|^err[DG]", re.I
)
METRIC_NAME = re.compile(
    r"acc|score|bleu|auc|(?:^|_)(?:f1|ap)(?:_|$)|map\b|_map|dice|iou|metric|reward|fid|prec|recall|"
    r"top|psnr|ppl|perplex",
    re.I,
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
                is_given = isinstance(
                    self.script.parent[node], ast.Call
                )  # set_optimizer(opt, head)
                if is_given or MODEL_NAME.search(node.id):
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
    if item := _item_of(call, roles):
        return Update(call, item)
    if roles.optimizer(receiver) or method == "step_and_update_lr":
        holder = receiver.rpartition(".")[0]
        return Update(call, holder if roles.optimizer(holder) else receiver)
    plain = not re.search(r"scaler|accelerator|fabric", receiver, re.I)
    return Update(call, receiver) if receiver in engines and plain else None


def _item_of(call: ast.Call, roles: Roles) -> str:
    """`opt` of `state["optimizer"].step()`, where it was `state = dict(optimizer=opt)`; else the
    dict, whose values are then all meant."""
    item = getattr(call.func, "value", None)
    key = getattr(getattr(item, "slice", None), "value", None)
    held = dotted(item)
    if not isinstance(key, str) or not (OPTIMIZER_NAME.search(key) or roles.optimizer(held)):
        return ""
    values = [v for b in roles.script.bindings.get(held, []) for v in [entries(b.value).get(key)]]
    names = [dotted(value) for value in values if value is not None]
    return next((name for name in names if name), held)


def entries(value: ast.expr) -> dict[str, ast.expr]:
    """The values of `{"a": x}` or `dict(a=x)` by their keys."""
    if isinstance(value, ast.Dict):
        keys = [getattr(key, "value", "") for key in value.keys]
        return dict(zip(keys, value.values, strict=True))
    is_dict = called(value) == "dict"
    return {word.arg or "": word.value for word in value.keywords} if is_dict else {}  # type: ignore


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
    doubt = _perhaps_called(script, scope) or ("" if ways else _is_an_epoch(script, loops))
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


EPOCH_FUNCTION = re.compile(r"epoch(?!s)|^update|step$", re.I)
EPOCH_NUMBER = re.compile(r"^(?:cur\w*_|i_?)?epoch(?:_(?:num\w*|i|id|idx|index|no))?$", re.I)


def _is_an_epoch(script: Script, loops: Sequence[Loop]) -> str:
    """`def train_one_epoch(…, epoch)` of an engine: the loop over the epochs is in another file."""
    tops, loaded = (
        [script.scope_of(loops[0])],
        own_all(getattr(x, "iter", x.body[0]) for x in loops),
    )
    for scope in tops:  # `train(epoch)` calls `self.iteration(epoch, …)`
        calls = script.callers(scope) if isinstance(scope, FUNCTIONS) and len(tops) < 9 else []
        tops += [script.scope_of(call) for call in calls]
    counted = loads(loaded)
    for scope in tops:
        if isinstance(scope, ast.Module) or script.callers(scope):
            continue
        given = [name for name in script.parameters(scope) if EPOCH_NUMBER.search(name)]
        if EPOCH_FUNCTION.search(scope.name) or any(name not in counted for name in given):
            return f"{scope.name}() is called by another file, which has the loop over the epochs"
    return ""


def _is_over_optimizers(loop: Loop) -> bool:
    """`for opt in optimizers: opt.step()`, or `scaler.step(opt)`, is not a loop over batches."""
    names = set(targets(loop))
    return any(
        name in names or (SCALER_NAME.search(name) and names & {*map(dotted, n.args)})
        for n in (own_all(loop.body) if names else [])
        if isinstance(n, ast.Call)
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
        """The loops of one run: each turn of a loop that makes all anew is a run of its own."""
        loops = self.nest.loops
        while len(loops) > 1 and self._makes_all_anew(*loops[:2]):
            loops = loops[1:]
        return loops

    def _makes_all_anew(self, loop: Loop, inner: Loop) -> bool:
        """`for fold in folds: optimizer = SGD(…)`, which nothing before that loop has made."""
        before, here = self.script.bound(self.script.home[loop]), own_set(loop)
        made = [b for name in self.optimizers for b in self.made_by_calls(name) if b.stmt in here]
        return inner in here and any(b.name not in before for b in made)

    def made_by_calls(self, name: str) -> list[Binding]:
        """Not `optimizer = optimizers[0]`, which makes nothing."""
        return [b for b in self.script.bindings.get(name, []) if any(makers(b.value))]

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

    @property
    def again(self) -> bool:
        """This loop is run again and again: all of it is one run, that the exit ends."""
        return bool(self.nest.doubtful)

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
        direct = [
            name
            for each in self.optimizers
            for name in self._outside_of_class(each, each)
            if self._is_here(name)
        ]
        if direct and len(direct) == len(self.optimizers):
            return [*direct, *self._wrapped_by(direct)]
        bindings, given = self.script.bindings, self.script.parameters(self.outer_scope)
        seen = [name for name in bindings if name in self.at_start and self._is_here(name)]
        made = [name for name in seen if self.roles.made_by(name, OPTIMIZER_CALL)]
        others = made or [name for name in given if "optim" in name.lower()]
        return list(dict.fromkeys([*direct, *others]))

    def _outside_of_class(self, name: str, optimizer: str) -> list[str]:
        """A name as it is called before the loop: `agent.optimizer` for the `self.optimizer` of
        `agent = Agent()`, of which the loop calls a method."""
        if name in self.at_start or root(name) != "self":
            return [name] * (name in self.at_start)
        made_in = [b.scope for b in self.script.bindings.get(optimizer, [])]
        kinds = {getattr(self.script.class_of(scope), "name", "") for scope in made_in}
        used = {method_call(node)[0] for node in own_set(self.outer)}
        return [
            agent + name.removeprefix("self")
            for agent in sorted(used & self.at_start)
            if kinds & {*map(called, self.script.made(agent))}
        ]

    def _wrapped_by(self, optimizers: list[str]) -> list[str]:
        """`optimizer.base_optimizer`, whose state is its own, where the script or its class has
        one by this name."""
        known = self.script.bindings.get("self.base_optimizer", [])
        owners = {getattr(self.script.class_of(b.scope), "name", "") for b in known}
        used = loads(self.script.nodes)
        return [
            f"{name}.base_optimizer"
            for name in optimizers
            if owners & {*map(called, self.script.made(name))} or f"{name}.base_optimizer" in used
        ]

    def _is_here(self, name: str) -> bool:
        """Not torch's own `optim`, which is an optimizer in another function."""
        bindings = self.script.bindings.get(name, [])
        return name not in self.script.imports or self.outer_scope in [b.scope for b in bindings]

    @cached_property
    def models(self) -> list[str]:
        """Those that an optimizer was given; else what is used as one, by its name or not."""
        seen, script = self.at_start, self.script
        optimizers = dict.fromkeys([*self.optimizers, *self.visible_optimizers])
        given = [(m, o) for o in optimizers for m in self.roles.models_of(o)]
        found = [model for model, _ in given if model in seen]
        found = found or [name for pair in given for name in self._outside_of_class(*pair)]
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
        """`ema = copy.deepcopy(model).to(device)` that the loop goes on with."""
        used = self.at_start & loads(own_set(self.outer)) - {*written(self.outer.body)}
        return [
            name
            for name, bindings in self.script.bindings.items()
            for binding in (bindings if name in used else [])
            for call in walk(binding.value)
            if isinstance(call, ast.Call) and called(call) in {"deepcopy", "AveragedModel"}
            if any(dotted(arg).removesuffix(".module") in models for arg in call.args[:1])
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
        """The one that the script shows comes last, a part of a sum first."""
        found: dict[str, Loss] = {}
        for loss in losses_of(self):
            found.setdefault(loss.name, loss)
        seen = loads(shown(own_all(self.scope.body)))
        return sorted(found.values(), key=lambda loss: (not loss.is_part, loss.name in seen))

    @cached_property
    def conditions(self) -> Conditions:
        """The `if`s around the last update, outermost first, and the branch taken; none if each
        iteration steps."""
        return self.ways[-1] if all(self.ways) else []

    @cached_property
    def ways(self) -> list[Conditions]:
        """Of each site the `if`s around it."""
        return [tests_around(self, site) for site in self.nest.sites]

    @cached_property
    def gate(self) -> str:
        """When it steps: `with accelerator.accumulate(model)`, where the gradients are whole;
        `loss_scaler(loss, optimizer, update_grad=(i + 1) % k == 0)`, where that is true."""
        for parent, _ in self.script.above(self.nest.sites[-1]):
            for item in parent.items if isinstance(parent, WITHS) else []:
                engine, method = method_call(item.context_expr)
                if method == "accumulate" and engine:
                    return f"{engine}.sync_gradients"
        return _said_to_scaler(self)

    @cached_property
    def ends(self) -> list[StepSpot | Note]:
        return list(ends_of(self))

    @cached_property
    def carried(self) -> Carried:
        return carried_by(self)

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


# --- Where the step line goes ----------------------------------------------------------------
class StepSpot(NamedTuple):
    """Where a step line goes: the end of an iteration that made an optimizer step."""

    spot: Spot
    test: str = ""  # in words, where not every iteration steps
    last: str = ""  # when the loop breaks after it


Conditions = list[tuple[ast.If, bool]]  # enclosing `if`s, outermost first, and the branch taken
Ends = Iterator[StepSpot | Note]  # with the exits behind a step that a resume cannot repeat


def tests_around(n: TrainingLoop, site: ast.AST) -> Conditions:
    """Enclosing `if`s within the loop that do not step on every path, and the branch taken."""
    around = list(n.script.above(site))
    inside = around[: [parent for parent, _ in around].index(n.inner)]
    return [
        (parent, child in parent.body)
        for parent, child in reversed(inside)
        if isinstance(parent, ast.If) and not _always_steps(n, parent)
    ]


def _said_to_scaler(n: TrainingLoop) -> str:
    """`scaler(loss, optimizer, update_grad=i % k == 0)`, with `if i % k == 0: optimizer.step()`
    in the other branch, if there is one."""
    tests: set[str] = set()
    branches: set[tuple[tuple[ast.If, bool], ...]] = set()
    said = False
    for site in n.nest.sites:
        around, is_scaler = tests_around(n, site), SCALER_NAME.search(called(site))
        given = getattr(site, "keywords", []) if is_scaler else []
        own_test = [k.value for k in given if re.search("update", k.arg or "")]
        said = said or bool(own_test)
        own_test = own_test or [around.pop()[0].test] if around else own_test
        tests |= {ast.unparse(test) for test in own_test if _is_pure(test, n.inner.body)} or {""}
        branches.add(tuple(around))
    whole = not any(branches) or [b[:-1] for b in branches] == [(), ()]
    whole = whole and len({parent for b in branches for parent, _ in b}) <= 1
    return tests.pop() if said and whole and len(tests) == 1 else ""


def _always_steps(n: TrainingLoop, stmt: ast.stmt) -> bool:
    """Both branches of an `if` step; anything else does where it holds a step."""
    if isinstance(stmt, ast.If):
        return all(any(_always_steps(n, s) for s in part) for part in (stmt.body, stmt.orelse))
    by_hand = isinstance(stmt, ast.For) and any(getattr(x, "attr", "") == "grad" for x in own(stmt))
    return by_hand or any(n.script.inside(site, stmt) for site in n.nest.sites)


def ends_of(n: TrainingLoop) -> Ends:
    """Every place where an iteration that stepped ends."""
    if n.gate:
        for end in _ends(n, n.inner.body, n.script.index_in(n.inner.body, n.nest.sites[0])):
            if isinstance(end, StepSpot):
                end = end._replace(test=" and ".join(filter(None, [n.gate, end.test])))
            yield end
    elif n.conditions:
        for way in _ways_apart(n):
            yield from _conditional_ends(n, way)
    else:
        case = _case(n)
        sure = [site for site in n.nest.sites if not tests_around(n, site)]
        block, sites = (case, [n.nest.sites[-1]]) if case else (n.inner.body, sure)
        yield from _ends(n, block, min((n.script.index_in(block, s) for s in sites), default=0))


def _ways_apart(n: TrainingLoop) -> Iterator[Conditions]:
    """The last update's, and those of the other branches of its `if`s, where those step too."""
    others = [(test, not taken) for test, taken in n.conditions]
    ways = [way for way in n.ways if {*way} & {*others}] + [n.conditions]
    for at, way in enumerate(ways):
        if way not in ways[:at]:
            yield way


def _conditional_ends(n: TrainingLoop, way: Conditions) -> Ends:
    """`if (i + 1) % k == 0: opt.step()`: behind all that follows the `if`, if that can be said
    again in the line's own words; else in the branch that steps."""
    outermost, (innermost, taken) = way[0][0], way[-1]
    place = Spot(n.inner.body, n.script.index_in(n.inner.body, outermost))
    rest = place.block[place.index :]
    branch = innermost.body if taken else innermost.orelse
    pure = all(_is_pure(test.test, rest) for test, _ in way)
    if len(rest) > 1 and pure and not _exits(n, rest[1:]):
        yield StepSpot(_end(place.block), _words(way))
        return
    breaks = [leave for leave in _exits(n, rest[1:]) if not isinstance(leave, ast.Continue)]
    known = {leave: test for leave in breaks if (test := _break_test(n, leave, rest[1:]))}
    later = " or ".join(f"({test})" if len(known) > 1 else test for test in known.values())
    yield from (_unseen(leave) for leave in breaks if leave not in known)
    if not n.script.own_line(branch[0]) and pure:
        yield StepSpot(n.script.behind(outermost), _words(way), later)
        return
    more = [s for s in rest[1:] if not isinstance(s, EXITS) and not {*own(s)} & known.keys()]
    yield from (refusal(s, "more happens after the branch that steps, unseen") for s in more[:1])
    sites = [site for site in n.nest.sites if any(n.script.inside(site, s) for s in branch)]
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

    name: str  # of a sum without a name, the sum
    code: str
    call: ast.Call
    is_part: bool = False  # of a sum: never the loss

    @property
    def reads(self) -> Names:
        return loads(walk(ast.parse(self.code, mode="eval")))


ENGINE_NAME = re.compile(
    r"accelerat|fabric|booster|engine|strategy|autograd|^amp|scaler|trainer|^self$", re.I
)
ACCUMULATED = re.compile(r"accum|micro|grad")


def losses_of(n: TrainingLoop) -> Iterator[Loss]:
    """What the loop back-propagates, or is given by the helper that steps."""
    for call, expr in propagated_in(n):
        yield from named(n, expr, call)
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


def named(n: TrainingLoop, expr: ast.expr, call: ast.Call) -> Iterator[Loss]:
    """The names inside a back-propagated expression: `a + b`, `loss / k`, `loss.mean()`."""
    receiver, method = method_call(expr)
    if isinstance(expr, (ast.Name, ast.Attribute)) and dotted(expr):
        yield _of_name(n, dotted(expr), call)
    elif isinstance(expr, ast.BinOp) and isinstance(expr.op, (ast.Add, ast.Sub)):
        for side in (expr.left, expr.right):
            yield from (part._replace(is_part=True) for part in named(n, side, call))
        if not any(isinstance(part, ast.Call) for part in walk(expr)):
            yield Loss(ast.unparse(expr), ast.unparse(expr), call)
    elif isinstance(expr, ast.BinOp):
        sides = [expr.left, expr.right]
        is_loss = [any(map(LOSS_NAME.search, loads(walk(side)))) for side in sides]
        yield from named(n, sides[is_loss == [False, True]], call)
    elif method in {"mean", "sum"} and LOSS_NAME.search(last(receiver)):
        yield Loss(receiver, f"{receiver}.{method}()", call)
    elif method == "scale" and isinstance(expr, ast.Call) and expr.args:
        yield from named(n, expr.args[0], call)


def _of_name(n: TrainingLoop, name: str, call: ast.Call) -> Loss:
    """Of `with amp.scale_loss(loss, optimizer) as scaled:` it is `loss`; of `total += loss` in the
    micro-batches, `total`, if the script shows that."""
    for parent, _ in n.script.above(call):
        for item in parent.items if isinstance(parent, WITHS) else []:
            if dotted(item.optional_vars) == name and isinstance(item.context_expr, ast.Call):
                name = next(filter(None, map(dotted, item.context_expr.args)), name)
    if total := _total(n, name):
        return Loss(total, as_shown(total, n.inner.body) or total, call)
    return Loss(name, _unscaled(n, name, call), call)


def _total(n: TrainingLoop, name: str) -> str:
    """`total`, which each iteration begins anew and a loop in it adds the losses to."""
    for node in own_all(n.inner.body):
        total = dotted(node.target) if isinstance(node, ast.AugAssign) else ""
        if total and isinstance(node.op, ast.Add) and name in loads(own(node.value)):  # type: ignore[attr-defined]
            begun = [b.stmt for b in n.script.bindings[total] if b.stmt in n.inner.body]
            inside = n.script.loops_around(node)[0] is not n.inner
            if inside and begun and total in loads(shown(own_all(n.inner.body))):
                return total
    return ""


def shown(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """What is printed, logged or kept: in texts, and given to calls whose result nobody takes."""
    for node in nodes:
        call = getattr(node, "value", None) if isinstance(node, ast.Expr) else None
        if isinstance(call, ast.Call) and called(call) != "backward":
            yield from (part for given in arguments(call) for part in walk(given))
        elif isinstance(node, ast.JoinedStr):
            yield from walk(node)


def as_shown(name: str, stmts: Sequence[ast.stmt]) -> str:
    """`total / len(loader)`, where a sum is divided only when it is shown; '' if the divisor is
    gone by then."""
    for part in shown(own_all(stmts)):
        count = divided_by(part)
        sum_ = getattr(part, "left", part)  # `total.item() / n` too
        if count is not None and name in (dotted(sum_), method_call(sum_)[0]):
            text = _count_at_end(count, stmts)
            return text and f"{name} / {text}"
    return name


def _count_at_end(count: ast.expr, stmts: Sequence[ast.stmt]) -> str:
    """A divisor behind the loops of `stmts`: `len(loader)` for the `i + 1` of its last turn."""
    text, source = ast.unparse(count), "\n".join(map(ast.unparse, stmts))
    for loop in (node for node in own_all(stmts) if isinstance(node, FORS)):
        if called(loop.iter) == "enumerate" and text == f"{targets(loop)[0]} + 1":
            text = f"len({dotted(loop.iter.args[0])})"  # type: ignore[attr-defined]
            return text if text in source else ""
    plain = (ast.Name, ast.Attribute, ast.Constant)
    return text if isinstance(count, plain) or called(count) == "len" else ""


def _unscaled(n: TrainingLoop, name: str, call: ast.Call) -> str:
    """`loss * K`, where it was divided by what a step accumulates since the forward pass."""
    every = n.script.bindings.get(name, [])
    made = [b for b in every if b.stmt in own_set(n.inner) and b.stmt.lineno <= call.lineno]
    fresh = [i for i, b in enumerate(made) if not _goes_on(b)]
    for binding in made[fresh[-1] if fresh else 0 :]:
        by_itself = isinstance(binding.stmt, ast.AugAssign) and isinstance(binding.stmt.op, ast.Div)
        divisor = dotted(binding.value if by_itself else divided_by(binding.value))
        if divisor and (ACCUMULATED.search(divisor) or divisor in _step_sizes(n.inner)):
            return f"{name} * {divisor}"
    return name


def _goes_on(binding: Binding) -> bool:
    """`loss = loss / k`: what it was before, in another form."""
    return isinstance(binding.stmt, ast.AugAssign) or binding.name in loads(own(binding.value))


def divided_by(value: ast.AST) -> ast.expr | None:
    is_quotient = isinstance(value, ast.BinOp) and isinstance(value.op, ast.Div)
    return value.right if is_quotient else None  # type: ignore[attr-defined]


def _step_sizes(loop: Loop) -> set[str]:
    """`K` of `if (i + 1) % K == 0`, and of an inner `for _ in range(K)`."""
    nodes = list(own_all(loop.body))
    tests = [part for node in nodes if isinstance(node, ast.If) for part in walk(node.test)]
    mods = [p.right for p in tests if isinstance(p, ast.BinOp) and isinstance(p.op, ast.Mod)]
    return {ast.unparse(mod) for mod in mods} | {
        size for node in nodes if isinstance(node, FORS) for size in range_size(node)
    }


def range_size(loop: Loop) -> list[str]:
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
        is_score = METRIC_NAME.search(last(name))  # `perplexity`, of exp(loss)
        if LOSS_NAME.search(last(name)) or (any(map(LOSS_NAME.search, parts)) and not is_score):
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
    under = [pair for loop in mine for pair in _made_under(n, loop).items()]
    groups += [(spot, {name: name}) for name, spot in under]
    outside = n.loops[: -len(mine)]
    groups += [(Spot(loop.body, 0), {name: name for name in names[loop]}) for loop in outside]
    keys = _keys([name for _, defaults in groups for name in defaults])
    lines: list[tuple[Spot, str]] = []
    values: dict[str, str] = {}
    for at, (spot, defaults) in enumerate(groups):
        some = {next(keys): name for name in defaults}
        lines += [(spot, code) for code in _give_back(n, spot, some, defaults)]
        values |= some if at < len(groups) - len(outside) else {}
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


def _made_under(n: TrainingLoop, loop: Loop) -> dict[str, Spot]:
    """`if args.tracking: total = 0` before the loop that adds to it under the same flag: it is
    given back there, where there is one."""
    home, needed = n.script.home[loop], passed_on(n, loop)
    found: dict[str, Spot] = {}
    for stmt in home.block[: home.index]:
        if isinstance(stmt, ast.If) and not stmt.orelse and _is_pure(stmt.test, n.outer.body):
            names = {*needed} & {*written(stmt.body)} & n.script.at_end(stmt.body)
            spot = Spot(stmt.body, len(stmt.body))
            found |= dict.fromkeys(sorted(names - n.script.bound(home)), spot)
    return found


def _carried_names(n: TrainingLoop, loop: Loop) -> list[str]:
    """Names bound before the loop, assigned in it, and read before they are assigned there."""
    script = n.script
    bound, own_names = script.bound(script.home[loop]), script.locals_of(script.scope_of(loop))
    names = [x for x in passed_on(n, loop) if x in bound and not object_made(n, x)]
    more = [x for x in filled_in(n, loop) if x in bound and ("." in x or x in own_names)]
    return list(dict.fromkeys([*names, *more]))


def filled_in(n: TrainingLoop, loop: Loop) -> dict[str, None]:
    """The lists and dicts that a loop fills: itself, as `h` of `for h in zip(…, histories)`, or by
    a function of the script that is given them."""

    def is_one(name: str) -> bool:
        return _is_container(n, name)

    nodes = list(own_all(loop.body))
    found = [_looped_from(n.script, node, name) for node in nodes for name in mutated(node)]
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        if helper := n.script.definition(call):
            inside = {name for node in own_all(helper.body) for name in mutated(node)}
            found += [dotted(v) for k, v in given_to(n.script, call, helper).items() if k in inside]
    return dict.fromkeys(filter(is_one, found))


def _looped_from(script: Script, node: ast.AST, name: str) -> str:
    """`histories`, of whose items `h` is one in `for net, h in zip(nets, histories)`."""
    for loop in script.loops_around(node):
        if isinstance(loop, FORS) and name in targets(loop):
            target, source = loop.target, loop.iter
            if called(source) == "enumerate" and isinstance(target, ast.Tuple):
                target, source = target.elts[1], source.args[0]  # type: ignore[attr-defined]
            zipped = called(source) == "zip" and isinstance(target, ast.Tuple)
            pairs = zip(target.elts, source.args) if zipped else [(target, source)]  # type: ignore
            return next((dotted(part) for one, part in pairs if dotted(one) == name), name)
    return name


def given_to(script: Script, call: ast.Call, helper: Function) -> dict[str, ast.expr]:
    """What a call gives to each parameter of a function of the script."""
    names = [name for name in script.parameters(helper) if name != "self"]
    words = {word.arg or "": word.value for word in call.keywords}
    return dict(zip(names, call.args)) | words


def passed_on(n: TrainingLoop, loop: Loop) -> list[str]:
    """Names that one iteration leaves to the next one, or to what follows the loop."""
    definitions = (*IMPORTS, *DEFINITIONS)
    bound = [node for node in own_all(loop.body) if not isinstance(node, definitions)]
    set_here = dict.fromkeys(name for node in bound for name in targets(node))
    needed = needed_by(n, loop)[1].union(
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


def needed_by(n: TrainingLoop, loop: Loop) -> tuple[Names, Names]:
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


def object_made(n: TrainingLoop, name: str) -> ast.Call | None:
    """The call that made what cannot be put into a checkpoint as it is."""
    for call in n.script.made(name):
        kind, of_class = called(call), re.search(r"(?:^|\.)[A-Z]\w*[a-z]\w*\.", dotted(call.func))
        is_object = kind[:1].isupper() or of_class  # Pipeline(…), Pipeline.from_pretrained(…)
        if kind in HOLDS_A_POSITION or (is_object and not kind.endswith("Tensor")):
            return call
    return None


def _is_container(n: TrainingLoop, name: str) -> bool:
    """`history = []`, which the loop fills; but not a dict of models."""
    values = [binding.value for binding in n.script.bindings.get(name, [])]
    literals = (ast.List, ast.Dict, ast.ListComp, ast.DictComp)
    makes = {"list", "dict", "defaultdict"}
    held = {dotted(part) for value in values for part in entries(value).values()}
    return (
        bool(values)
        and all(isinstance(value, literals) or called(value) in makes for value in values)
        and not held & {*n.models, *n.optimizers}
    )


def mutated(node: ast.AST) -> list[str]:
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
