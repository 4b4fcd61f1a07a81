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
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from check import blanked, has_call_sites, omissions, report
from files import apply, drop_backup, in_package, write
from lines import (
    MARK,
    PatchError,
    apply_pinned,
    compiled,
    is_marked,
    marked_numbers,
    parse_error,
    pin,
    reverse,
    split_lines,
    unified,
    weave,
)
from loop import (
    AVERAGE_NAME,
    LOSS_NAME,
    METRIC_NAME,
    SCALER_NAME,
    SCHEDULER_CALL,
    Insertion,
    Loss,
    Nest,
    Note,
    Roles,
    StepSpot,
    TrainingLoop,
    Update,
    as_shown,
    entries,
    filled_in,
    find_nests,
    find_updates,
    key_of,
    losses_given,
    mutated,
    named,
    names_given,
    needed_by,
    note,
    object_made,
    passed_on,
    place,
    propagated,
    propagated_in,
    range_size,
    refusal,
    shown,
)
from script import (
    FORS,
    IMPORTS,
    LOOPS,
    WITHS,
    Binding,
    Function,
    Loop,
    Names,
    Script,
    Spot,
    arguments,
    assigned,
    called,
    dotted,
    is_range,
    last,
    leaves,
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


Found = Iterator[Insertion | Note]


@dataclass(frozen=True)
class Plan:
    """What is to be added to a script, what was found, and what was not."""

    insertions: list[Insertion]
    notes: list[Note]
    parts: dict[str, str]


def patch(
    source: bytes,
    name: str = "train.py",
    parts: Sequence[str] = PARTS,
    package: bool = False,
    folder: Path | None = None,
) -> tuple[bytes, Plan]:
    """The patched source, of a script or a module of a package, and what was found. In `folder`
    lies what it imports of its own project.

    Raises PatchError, NothingToPatch.
    """
    script = Script(source, name, folder)
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
    for call in script.calls:  # `step_fn = get_step_fn(…)`, and `loss = step_fn(state, batch)`
        name = dotted(call.func)
        for maker in script.made(name) if re.search("step|^train", name) else []:
            if script.loops_around(call):
                return (
                    f"{script.name}:{call.lineno}: {name}() steps in this loop; what it trains is "
                    f"known to {called(maker)}() alone, which makes it: add the lines by hand"
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
        args += _keyword(n, key, list(dict.fromkeys(names)))
    sure = "sure" if n.models and n.visible_optimizers else "likely"
    for code in n.in_columns(n.start, args, lambda some: f"{n.obs}.watch({', '.join(some)})"):
        yield from n.add(n.start, "watch", code, sure)


def _keyword(n: TrainingLoop, key: str, names: list[str]) -> list[str]:
    """`optimizer=opt` or `optimizer=[opt_g, opt_d]`; several where one is too wide for a line."""
    head = f"{n.obs}.watch({key}="

    def call(some: Sequence[str]) -> str:
        return f"{head}[{', '.join(some)}])" if len(names) > 1 else f"{head}{some[0]})"

    codes = n.in_columns(n.start, names, call)
    return [f"{key}={code.removeprefix(head)[:-1]}" for code in codes]


def _loader(loop: Loop) -> str:
    """`loader` for `for i, x in enumerate(tqdm(loader))`."""
    expr = None if isinstance(loop, ast.While) else loop.iter
    while isinstance(expr, ast.Call) and expr.args:
        expr = expr.args[0]
    return dotted(expr)


def finished(n: TrainingLoop) -> Found:
    """`obs.finish()` at the end of the block that holds the loop; at exit otherwise."""
    block, owner = n.start.block, n.script.parent[n.outer]
    while isinstance(owner, (*WITHS, ast.Try)):
        block, owner = n.script.home[owner].block, n.script.parent[owner]
    ends = leaves(block[-1]) and not isinstance(block[-1], ast.Raise)
    spot = Spot(block, len(block) - ends)
    if isinstance(owner, LOOPS) or n.again:
        return
    if n.script.reached(spot):
        yield from n.add(spot, "finish", f"{n.obs}.finish()")
    else:
        yield note(block[-1], "the last lines all leave; no obs.finish(), the run ends unfinished")


# --- Rules: each step is recorded ------------------------------------------------------------
MODEL = re.compile(r"(?:model|net\w?|module|^[GD])$")
NOT_BATCH = re.compile(
    r"\.|loss|^(?:[ijk_]|it|idx|step|epoch|logits)$|^(?:out|pred|hid|batch_i|iter)"
)


def stepped(n: TrainingLoop) -> Found:
    """`obs.step(step, loss=loss, batch=x)` at each end of an iteration that stepped."""
    found: list[Insertion] = []
    if block := stepping_branch(n):
        yield from _step_in_helper(n, block)
        yield _missed(block[0], "where this function does not step, it may evaluate")
        return
    for end in n.ends:
        if isinstance(end, StepSpot):
            code = _step(n, end, resumes(n))
            found += n.add(end.spot, "step", code, "likely" if end.test else "sure")
            yield from _left_out(n, end)
        elif not end.part:
            yield end
    yield from found
    if not found:
        text = "no room for obs.step in this loop (its body is on the line of its header)"
        yield note(n.inner, text)


def _step_in_helper(n: TrainingLoop, block: list[ast.stmt]) -> Iterator[Insertion]:
    scope, spot = n.script.scope_of(block[0]), Spot(block, len(block))
    calls = [call for call in n.script.calls if n.script.scope_of(call) is scope]
    given = [(call, propagated(call, n.roles)) for call in calls]
    found = [loss for call, expr in given if expr for loss in named(n, expr, call)]
    codes = [x.code for x in found if {*map(root, x.reads)} <= n.script.bound(spot)]
    loss = "".join(f"loss={code}" for code in codes[-1:])
    yield from n.add(spot, "step", f"{n.obs}.step({loss})")


def stepping_branch(n: TrainingLoop) -> list[ast.stmt]:
    """The body of `if train:` in the function that steps: the loop cannot see whether it did."""
    for update in n.nest.updates:
        tests = [test for test, _ in n.script.above(update.call) if isinstance(test, ast.If)]
        elsewhere = n.script.scope_of(update.call) is not n.scope
        if elsewhere and tests and not all(test.orelse for test in tests):
            block = n.script.home[n.script.stmt_of(update.call)].block
            return block if n.script.own_line(block[0]) else []
    return []


def logged_in_helper(n: TrainingLoop) -> Found:
    """The step is in a helper that keeps the loss to itself: log it there."""
    if n.losses or stepping_branch(n):
        return
    found: dict[ast.AST, list[Insertion]] = {}
    for update in n.nest.updates:
        scope = n.script.scope_of(update.call)
        if isinstance(scope, ast.Module) or scope is n.scope:
            continue
        spot = Spot(scope.body, len(scope.body) - isinstance(scope.body[-1], ast.Return))
        calls = [call for call in n.script.calls if n.script.scope_of(call) is scope]
        given = [(call, propagated(call, n.roles)) for call in calls]
        for loss in (loss for call, expr in given if expr for loss in named(n, expr, call)):
            if not loss.is_part and {*map(root, loss.reads)} <= n.script.bound(spot):
                code = f'{n.obs}.log({{"loss/train": {loss.code}}})'
                found.setdefault(scope, n.add(spot, "step", code))
    if len(found) == 1:
        yield from next(iter(found.values()))
    else:
        text = (
            "several functions step, each by a loss of its own"
            if found
            else ("the loss of this step has no name that can be logged")
        )
        yield note(n.nest.sites[0], f"{text}; steps are logged without it")


def _step(n: TrainingLoop, end: StepSpot, is_resumed: bool) -> str:
    """The step line: its number and its loss, and of the rest what fits into the width."""
    bound = n.script.bound(end.spot)
    usable = [loss for loss in n.losses if not _why_not(n, loss, end.spot)]
    whole = [loss for loss in usable if not loss.is_part][-1:]
    whole = [x for x in whole if " " not in x.name or n.fits(end.spot, f"obs.step(loss={x.code})")]
    # Parts, other losses; of what has no name there is none.
    names = {key_of(x.name): _as_number(n, x) for x in usable if x not in whole and x.name in bound}
    taken = {"step", "loss", "batch", "batches", "tokens", "samples", "carry", "last"}
    others = [f"{key}={code}" for key, code in names.items() if key not in taken]
    needed = [*filter(None, [_number(n, end)])]
    needed += [f"loss={_as_number(n, loss)}" for loss in whole]
    kept = [f'"{key}": {name}' for key, name in _unseen_by_step(n).items() if name in bound]
    ends = [f"carry={{{', '.join(kept)}}}"] * bool(kept and is_resumed)
    ends += [f"last={end.last}"] * bool(end.last and is_resumed)
    guard, amount = f"if {end.test}: " if end.test else "", _batch(n, bound, is_resumed)
    codes = [
        f"{guard}{n.obs}.step({', '.join([*needed, *more, *ends])})"
        for more in ([*others, *amount], others, amount, [])
    ]
    return next((code for code in codes if n.fits(end.spot, code)), codes[-1])


def _number(n: TrainingLoop, end: StepSpot) -> str:
    """The script's own count; none where it has yet to go up and, elsewhere, has done so."""
    name = n.counter(n.script.bound(end.spot))
    lines = [n.script.line_of(e.spot) or 0 for e in n.ends if isinstance(e, StepSpot)]
    for binding in n.script.bindings.get(name, []):
        is_count = isinstance(binding.stmt, ast.AugAssign)
        if is_count and (n.script.line_of(end.spot) or 0) <= binding.stmt.lineno < max(lines):
            return ""
    return name


def _left_out(n: TrainingLoop, end: StepSpot) -> Found:
    """What a step line does not hold, and why."""
    for loss in n.losses:
        if why := _why_not(n, loss, end.spot):
            others = [x for x in n.losses if not (x.is_part or _why_not(n, x, end.spot))]
            earlier = [] if others or loss is not n.losses[-1] else _taken_before(n, loss, end)
            yield from earlier
            if not earlier:
                yield note(loss.call, f"the loss {loss.name} {why}; it is left out")
    for name in _unseen_by_step(n).values() if resumes(n) else ():
        if name not in n.script.bound(end.spot):
            text = "may be unbound at the end of an iteration; not carried"
            yield note(n.inner, f"{name} {text}")


def _taken_before(n: TrainingLoop, loss: Loss, end: StepSpot) -> list[Insertion]:
    """`obs.log({"loss/train": loss})`, before an evaluation gives the name another value."""
    line = n.script.line_of(end.spot) or 0
    again = [b.stmt for x in loss.reads for b in _bound_again(n, x, n.last_site, line)]
    for stmt in end.spot.block if again else []:
        spot = n.script.home[stmt]
        if stmt.lineno > n.last_site and any(n.script.inside(each, stmt) for each in again):
            guard = f"if {end.test}: " if end.test else ""
            code = f'{guard}{n.obs}.log({{"loss/train": {loss.code}}})'
            is_there = not _why_not(n, loss, spot) and not loss.is_part and n.fits(spot, code)
            return n.add(spot, "step", code) if is_there else []
    return []


def _unseen_by_step(n: TrainingLoop) -> dict[str, str]:
    """What is carried, but no plain name; that is read off this function, or off its caller."""
    return {key: name for key, name in n.carried.values.items() if key != name}


def _why_not(n: TrainingLoop, loss: Loss, spot: Spot) -> str:
    """Why a loss cannot be logged at a spot; '' if it can."""
    if not {*map(root, loss.reads)} <= n.script.bound(spot):
        return "is not certainly bound where the step is logged"
    for name in loss.reads:
        for binding in _bound_again(n, name, n.last_site, n.script.line_of(spot) or 0):
            if not any(dotted(part) == name for part in walk(binding.value)):
                return "is assigned again before the end of the iteration (an evaluation?)"
    return ""  # `loss = loss.item()` keeps it


def _as_number(n: TrainingLoop, loss: Loss) -> str:
    """`loss = loss.item()` after the backward: a number has no `.mean()`."""
    again = _bound_again(n, loss.name, loss.call.lineno)
    return re.sub(r"\.\w+\(\)", "", loss.code) if again else loss.code


def _bound_again(n: TrainingLoop, name: str, after: int, end: int = sys.maxsize) -> list[Binding]:
    bindings = [b for b in n.script.bindings.get(name, []) if b.stmt in own_set(n.inner)]
    return [b for b in bindings if after < b.stmt.lineno < end]


def _batch(n: TrainingLoop, bound: Names, is_resumed: bool) -> list[str]:
    """What the iteration trained on, whose shape the run reads; not where it saw only a part."""
    if (n.conditions or n.gate) and not is_resumed:  # no skip line counts the batches
        return []
    names = [name for name in batch_names(n) if name in bound]
    # An inner `for _ in range(k)` back-propagates so often a step.
    loops = [n.script.loops_around(call) for call, _ in propagated_in(n)]
    within = [loop for around in loops for loop in around[: around.index(n.inner)]]
    counts = [size for loop in within for size in range_size(loop) if re.match(r"[\w.]+$", size)]
    return [f"batch={names[0]}", *(f"batches={size}" for size in counts[:1])] if names else []


def batch_names(n: TrainingLoop) -> list[str]:
    """What the loop gives, and what it gives to a model; not what a model gave."""
    loop = n.inner
    names = [] if isinstance(loop, ast.While) or is_range(loop.iter) else targets(loop)
    if isinstance(loop, FORS) and called(loop.iter) == "enumerate":
        names = names[1:]
    results: set[str] = set()
    here = {*targets(loop), *written(loop.body)}
    for call in (node for node in own_all(loop.body) if isinstance(node, ast.Call)):
        names += targets(n.script.stmt_of(call)) if called(call) == "next" else []
        each = {dotted(call.func), method_call(call)[0]} - {""}
        if each & {*n.models, *n.roles.modules} or any(map(MODEL.search, each)):
            given = [dotted(arg) for arg in call.args if isinstance(arg, ast.Name)]
            names += [name for name in given if name in here]
            results |= {*targets(n.script.stmt_of(call))}
    # An evaluation may have named it again.
    kept = [name for name in names if not _bound_again(n, name, n.last_site)]
    return [name for name in kept if name not in results and not NOT_BATCH.search(name)]


# --- Rules: a resume gives back and passes over ----------------------------------------------
def given_back(n: TrainingLoop) -> Iterator[Insertion]:
    """`step = obs.resume(step=step)` before the loops."""
    if resumes(n):
        for spot, code in n.carried.lines:
            yield from n.add(spot, "resume", code, "likely")
        if n.outer is n.inner and not n.carried.lines:  # all else is put back
            yield from n.add(n.start, "resume", f"{n.obs}.resume()", "likely")


def passed_over(n: TrainingLoop) -> Iterator[Insertion]:
    """`if obs.skip_epoch(epoch): continue` and `if obs.skip_batch(): continue`, first in their
    loops, and `if obs.ended(): break` where the loop breaks right after a step."""
    if not resumes(n):
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
        for name in passed_on(n, loop):
            call = object_made(n, name)
            if call and name in n.script.bound(n.script.home[loop]):
                text = f"{name} is an object of {dotted(call.func)}; a resume does not restore it"
                yield note(call, text)


def _first_unread(loop: Loop) -> int:
    """Where the guard stands: behind `batch = next(it)`, a skipped batch is read all the same."""
    return sum(isinstance(s, (ast.Assign, ast.Expr)) and _reads_next(s) for s in loop.body)


def _reads_next(stmt: ast.stmt) -> bool:
    return any(map(_drawn_from, own(stmt)))


# --- Rules: why a resume is left out ---------------------------------------------------------
ENV_NAME = re.compile(r"(?:^|_)envs?(?:_|\d|$)", re.I)
MOVES_ON = re.compile(
    r"^(?:next\w*|get_batch|sample\w*|push\w*|pop\w*|query|add|append|put|store|update\w*|draw)$"
)
KEEPS_NO_STATE = re.compile(
    r"Meter|Metric|Log(?:ger|$)|Writer|Timer|Tracker|Board|tqdm|Progress|Prof"
)


def refused(n: TrainingLoop) -> Iterator[Note]:
    """What each rule below finds first."""
    yield from refusals(n) if n.wants_resume else ()


def several_runs(n: TrainingLoop) -> Iterator[Note]:
    """`for fold in folds: train(fold)`: which of them a checkpoint is of, nothing says."""
    if n.nest.doubtful:
        yield refusal(n.inner, n.nest.doubtful)
    if n.several:
        yield refusal(n.outer, "several training loops in one file")
    if not n.script.own_line(n.inner.body[0]):
        yield refusal(n.inner, "the loop's body is on the line of its header")


def several_processes(n: TrainingLoop) -> Iterator[Note]:
    """`Process(target=train, args=(rank, model))`, as in Hogwild training."""
    if call := _worker(n):
        yield refusal(call, "several processes train at once, each by its own steps")


def steps_in_helper(n: TrainingLoop) -> Iterator[Note]:
    """`def update(): … if ready: opt.step()`"""
    for stmt in stepping_branch(n)[:1]:
        yield refusal(stmt, "this function steps under a condition that its loop does not see")


def no_model(n: TrainingLoop) -> Iterator[Note]:
    if not (n.again or n.models or any(optimizer_made_again(n))):
        yield refusal(n.outer, "no model was found that is bound before this loop")


def no_optimizer(n: TrainingLoop) -> Iterator[Note]:
    """`if a: opt = Adam(…)`, `elif b: opt = SGD(…)`, or one that the script gives no name."""
    if n.again or n.visible_optimizers or any(optimizer_made_again(n)):
        return
    for name in n.optimizers[:1]:
        bindings = n.script.bindings.get(name, [])
        why = f"{name} is not bound on every path to this loop" if bindings else ""
        yield refusal(n.outer, why or "the optimizer has no name before this loop")


def state_outside(n: TrainingLoop) -> Iterator[Note]:
    """What a checkpoint cannot hold: `env.step(action)`, `buffer.sample(32)`, `ema.update(model)`,
    `early_stopping(val_loss)`, an iterator that is made again when it is read to its end."""
    for node, name, method in _uses(n):
        if ENV_NAME.search(last(name)) and method in {"step", "reset"}:
            yield refusal(node, f"the state of {name} cannot be saved")
        elif name and _moves_on(n, name, method):
            call = name if method == "__call__" else f"{name}.{method}"
            part = " beside its weights, which" if name in n.models else ", whose state"
            yield refusal(node, f"{call}() changes {name}{part} cannot be saved")
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
    kinds = {*map(called, n.script.made(name))} if name in n.models else made.keys()
    methods = [
        f
        for f in n.script.functions
        if f.name == method and getattr(n.script.class_of(f), "name", "") in kinds
    ]
    if name in n.models:  # `agent.put_data(x)`; what it only sets, it sets again
        return any(map(_collects, methods))
    return any(map(_changes_itself, methods)) if methods else bool(made and MOVES_ON.search(method))


def _collects(method: Function) -> bool:
    """Whether a method adds to what its object has: `self.data.append(x)`, `self.count += 1`."""
    nodes = list(own_all(method.body))
    names = [name for node in nodes for name in mutated(node)]
    names += [dotted(node.target) for node in nodes if isinstance(node, ast.AugAssign)]
    return any(name.startswith("self.") for name in names)


def _changes_itself(method: Function) -> bool:
    """Whether a method changes its object: it assigns to it or to a part of it; a method that is
    named like a change also where it calls one of a part, as `self.rng.choice()`."""
    nodes = list(own_all(method.body))
    names = [*written(method.body), *(name for node in nodes for name in mutated(node))]
    names += map(_drawn_from, nodes)
    if MOVES_ON.search(method.name):
        names += [method_call(node)[0] for node in nodes]
    return any(name.startswith("self.") for name in names)


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
    """`if epoch == 10: optimizer = SGD(…)`, or `optimizer = SGD(…)` in a function that is called
    for each epoch: which of them a checkpoint is of, nothing says."""
    inside = own_set(n.nest.loops[0]).union(*map(own_set, n.loops))
    functions = {n.script.scope_of(x) for x in n.loops} - {n.script.scope_of(n.nest.loops[0])}
    for binding in (b for name in n.optimizers for b in n.made_by_calls(name)):
        if binding.stmt in inside:
            yield refusal(binding.stmt, f"{binding.name} is made again inside the loop")
        elif binding.scope in functions:
            where = f"{getattr(binding.scope, 'name', '')}(), which a loop calls"
            yield refusal(binding.stmt, f"{binding.name} is made in each call of {where}")


def optimizer_without_state(n: TrainingLoop) -> Iterator[Note]:
    """`class NoamOpt:` of the script itself, or of a file beside it, without a `state_dict`."""
    for name in n.optimizers:
        for call in n.script.made(name):
            for node in n.script.classes(called(call)):
                known = any("ptim" in dotted(base) for base in node.bases)
                if not known and "state_dict" not in [getattr(f, "name", "") for f in node.body]:
                    yield refusal(call, f"{node.name} has no state_dict to save")


def optimizer_within(n: TrainingLoop) -> Iterator[Note]:
    """`from sam import SAM`: its `state_dict` leaves out what the optimizer in it has."""
    for update in n.nest.updates:
        watched = f"{update.optimizer}.base_optimizer" in n.visible_optimizers
        if method_call(update.call)[1] == "second_step" and not watched:
            text = "has an optimizer in it whose state its state_dict may leave out"
            yield refusal(update.call, f"{update.optimizer} {text}")


def filled_elsewhere(n: TrainingLoop) -> Iterator[Note]:
    """`def train(loader, history)`: what it fills is its caller's, and no line here reaches it."""
    for loop in n.loops:
        scope = n.script.scope_of(loop)
        for name in filled_in(n, loop):
            if name in n.script.parameters(scope):
                yield refusal(loop, f"{name} is filled here for the caller, which would not see it")


def state_in_a_dict(n: TrainingLoop) -> Iterator[Note]:
    """`state = dict(model=model, step=0)` and `state["step"] += 1`."""
    for node in own_all(n.outer.body):
        is_item = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)
        for binding in n.script.bindings.get(dotted(node), []) if is_item else []:
            held = {*map(dotted, entries(binding.value).values())} & {*n.models, *n.optimizers}
            if held:
                text = f"changes beside {min(held)}, which it holds; it cannot be given back"
                yield refusal(node, f"{binding.name} {text}")


def reads_in_the_middle(n: TrainingLoop) -> Iterator[Note]:
    """`x = next(it)` behind other work, in an inner loop, or in a function that the loop calls:
    what stands before the guard is done for each batch, and nothing else is."""
    rest = n.inner.body[_first_unread(n.inner) :]
    inside = [call for call in own_all(n.outer.body) if _drawn_from(call) in n.at_start]
    passed = inside if n.outer is not n.inner else []
    helpers = [
        call
        for function in _called_from(n)
        for call in own_all(function.body)
        if _drawn_from(call) and _drawn_from(call) not in written(function.body)
    ]
    if any(map(_reads_next, rest)) or passed or helpers:
        text = "next() is called in the middle of the iteration; a resumed run cannot pass over it"
        yield refusal([*passed, *helpers, n.inner][0], text)


def _drawn_from(node: ast.AST) -> str:
    """`it` of `next(it)`."""
    is_next = isinstance(node, ast.Call) and dotted(node.func) == "next" and node.args
    return dotted(node.args[0]) if is_next else ""  # type: ignore[attr-defined]


def _called_from(n: TrainingLoop) -> list[Function]:
    """The functions of the script that the loop calls, or that those call."""
    found: dict[Function, None] = {}
    left = [*n.outer.body, *n.inner.body]
    while left:
        for call in own(left.pop()):
            function = n.script.definition(call) if isinstance(call, ast.Call) else None
            if function and function not in found:
                found[function] = None
                left += function.body
    return list(found)


def left_unseen(n: TrainingLoop) -> Iterator[Note]:
    """`if done: return` behind the step."""
    yield from (end for end in n.ends if isinstance(end, Note) and end.part)


def unbound_before(n: TrainingLoop) -> Iterator[Note]:
    """`if step > 0: x = prev` and `prev = x`, where nothing gives `prev` a value before."""
    for loop in n.loops:
        direct = needed_by(n, loop)[0] - n.script.bound(n.script.home[loop])
        names = [name for name in passed_on(n, loop) if name in direct]
        # A loss or a score is only shown.
        lost = [name for name in names if not (LOSS_NAME.search(name) or METRIC_NAME.search(name))]
        if lost:
            text = "not certainly bound before the loop"
            goes = f"{lost[0]} goes from one iteration to the next, but is"
            yield refusal(loop, f"{goes} {text}")


def too_wide_to_carry(n: TrainingLoop) -> Iterator[Note]:
    """`obs.step(…, carry={"total": self.total, "best": self.best, …})`, which no one would read."""
    spots = [end for end in n.ends if isinstance(end, StepSpot)]
    narrow = [end for end in spots if n.fits(end.spot, _step(n, end, False))]
    names = ", ".join(_unseen_by_step(n).values())
    if names and any(not n.fits(end.spot, _step(n, end, True)) for end in narrow):
        yield refusal(n.inner, f"one line has no room to carry {names}")


REFUSALS: tuple[Callable[[TrainingLoop], Iterator[Note]], ...] = (
    several_runs,
    several_processes,
    steps_in_helper,
    no_model,
    no_optimizer,
    state_outside,
    average_by_hand,
    optimizer_made_again,
    optimizer_without_state,
    optimizer_within,
    filled_elsewhere,
    state_in_a_dict,
    reads_in_the_middle,
    left_unseen,
    unbound_before,
    too_wide_to_carry,
)


@lru_cache(maxsize=8)
def refusals(n: TrainingLoop) -> tuple[Note, ...]:
    """Of each rule the first finding."""
    return tuple(found for rule in REFUSALS for found in list(rule(n))[:1])


def resumes(n: TrainingLoop) -> bool:
    return n.wants_resume and not refusals(n)


# --- Rules: each evaluation is recorded ------------------------------------------------------
EVAL_NAME = re.compile(
    r"(?:^|_)(?:eval\w+|validat\w*|valid|val|test|dev|estimate_loss\w*)(?:_|\d|$)", re.I
)
NOT_EVAL_NAME = re.compile(
    r"load|data|transform|set$|iter|split|token|batch|dir$|path|freq|(?-i:^[A-Z])", re.I
)
HELD_OUT = re.compile(r"val|test|eval|dev|held", re.I)
HELD_OUT_WORD = re.compile(r"(?:^|_|\.)(?:val|valid\w*|test|eval|dev)(?:_|\d|\.|$)", re.I)
HELD_OUT_LOSS = re.compile(
    r"(?:^|_)(?:val?|vl|valid|validation|te|test|eval|dev|heldout)(?:_\w+)?_?loss"
    r"(?:_(?:accum|avg|mean|total|sum|epoch))?$|loss_?(?:val|test|valid|validation|eval|dev)$",
    re.I,
)
OF_TRAINING = re.compile(r"(?:^|_)(?:tr|trn|train|training)(?:_|loader|set|dl|\d|$)", re.I)
NOT_A_VALUE = re.compile(r"best|min|prev|last|patience|list|history", re.I)
GRADIENTLESS = {"no_grad", "inference_mode"}
VALUE_NAME = re.compile(f"{LOSS_NAME.pattern}|{METRIC_NAME.pattern}", re.I)


def evaluated(n: TrainingLoop) -> Found:
    """`obs.validation(val_loss)` behind `val_loss = evaluate(model)`, in `def validate()` where
    it keeps its loss to itself, and behind an evaluation that is written out in the loop."""
    calls = [call for call in n.script.calls if _evaluates(n, call)]
    found = [each for call in calls for each in _recorded(n, call)]
    found += _written_out(n) or _phases(n)
    yield from found
    known = {each.line for each in found}.union(call.lineno for call in calls)
    for stmts in _regions(n):  # all that is left
        lines = range(stmts[0].lineno, (stmts[-1].end_lineno or 0) + 2)
        if known.isdisjoint(lines):
            known |= {*lines}
            yield from _worked_out_under(n, stmts)


def _evaluates(n: TrainingLoop, call: ast.Call) -> bool:
    """Named like an evaluation or one by what it does, and called from the loops or behind them."""
    if not _is_seen(n, call):
        return False
    name, helper = called(call), n.script.definition(call)
    if name == "run":  # validate.run(...)
        name = last(method_call(call)[0])
    by_name = EVAL_NAME.search(name) and not NOT_EVAL_NAME.search(name)
    does = bool(helper and _worked_out(helper.body, VALUE_NAME) and _eval_mode(helper.body))
    if not (by_name or does) or _trains(n, call):
        return False
    return not n.script.resolve(call.func).startswith(("torch.", "numpy."))


def _is_seen(n: TrainingLoop, node: ast.AST) -> bool:
    """In the loops or behind them."""
    scope = n.script.scope_of(node)
    first = n.nest.loops[0] if n.again else n.outer
    behind = scope is n.script.scope_of(first) and getattr(node, "lineno", 0) > first.lineno
    return scope in {*map(n.script.scope_of, n.nest.loops)} and (n.holds(node) or behind)


def _eval_mode(stmts: list[ast.stmt]) -> bool:
    return any(map(_switches, own_all(stmts)))


def _switches(node: ast.AST, to: str = "eval") -> bool:
    """`model.eval()`"""
    return method_call(node)[1] == to and not arguments(node)  # type: ignore[arg-type]


def _trains(n: TrainingLoop, call: ast.Call) -> bool:
    """`values, entropy = policy.evaluate_actions(states)`: what is back-propagated comes of it."""
    names, inner = {*names_given(n.script, call)}, own_set(n.inner)
    helpers = {
        n.script.scope_of(part) for part in (*n.nest.loops, *(u.call for u in n.nest.updates))
    }
    if call in n.nest.sites or n.script.definition(call) in helpers:
        return True
    made = [b for x in n.losses for name in x.reads for b in n.script.bindings.get(name, [])]
    read = loads(part for b in made if b.stmt in inner for part in walk(b.value))
    direct = {name for x in n.losses for name in x.reads}
    return call.lineno < n.last_site and call in inner and bool(names & (read | direct))


def _regions(n: TrainingLoop) -> Iterator[list[ast.stmt]]:
    """The statements behind a `model.eval()`, up to a `model.train()` or the training itself; and
    those under `torch.no_grad()` that show a value of held-out data by its name."""
    for node in filter(lambda node: _is_seen(n, node), n.script.nodes):
        stmts: list[ast.stmt] = []
        if _switches(node):
            spot = n.script.home[n.script.stmt_of(node)]
            stmts = spot.block[spot.index :]
        elif isinstance(node, WITHS) and GRADIENTLESS & {*map(called, own(node.items[0]))}:
            stmts = node.body
        ends = (*n.nest.sites, *n.nest.loops)
        stops = [any(_switches(x, "train") or x in ends for x in own(stmt)) for stmt in stmts]
        stmts = stmts[: [*stops, True].index(True)]
        parts = list(shown(own_all(stmts)))
        words = [*loads(parts), *(str(vars(part).get("value", "")) for part in parts)]
        nodes = list(own_all(stmts))
        works = any(isinstance(x, (*LOOPS, *WITHS)) for x in nodes)
        read = [name for name in loads(nodes) if last(name) not in ("eval", "train")]
        held_out = any(map(HELD_OUT_WORD.search, read))
        valued = any(map(VALUE_NAME.search, words))
        if (_eval_mode(stmts) and (works or held_out or valued)) or (held_out and valued):
            yield stmts


def _worked_out_under(n: TrainingLoop, stmts: list[ast.stmt]) -> list[Insertion | Note]:
    """Record the loss or the score that is worked out and shown there."""
    spot = n.script.behind(stmts[-1])
    known = n.script.bound(spot) & loads(shown(own_all(stmts)))
    depth = len(n.script.loops_around(stmts[0]))
    for stmt in own_all(stmts):  # of one batch
        if isinstance(stmt, ast.Assign) and len(n.script.loops_around(stmt)) > depth:
            known -= {*targets(stmt)}
    losses = [name for name in _worked_out(stmts, LOSS_NAME) if name in known]
    scores = [name for name in _worked_out(stmts, METRIC_NAME, (ast.BinOp,)) if name in known]
    trained = [name for name in losses if any(name in loss.reads for loss in n.losses)]
    losses = trained[-1:] or (losses if len(losses) == 1 else [])  # of several, which one?
    value = as_shown(losses[0], stmts) if losses else ""
    if not _is_open(n, stmts[0]) or not (value or scores):
        text = "what is worked out here in eval mode or without gradients has no name of a loss"
        return [_missed(stmts[0], text)]
    if not n.holds(stmts[0]):
        return _line(n, spot, _scores(n, spot, losses or scores, "eval"), stmts[0])
    code = _validation(n, spot, value) if value else _scores(n, spot, scores)
    return _line(n, spot, code, stmts[0])


def _recorded(n: TrainingLoop, call: ast.Call) -> list[Insertion | Note]:
    """The line for one evaluation, or why there is none."""
    script, names = n.script, names_given(n.script, call)
    stmt, helper = script.stmt_of(call), script.definition(call)
    behind = script.behind(stmt)
    if not _is_open(n, call):
        return [_missed(call, "this evaluation comes after the end of the run")]
    values = [name for name in names if VALUE_NAME.search(last(name)) and "." not in name]
    if values and (_is_of_other_data(call, names) or not n.holds(call)):
        return _line(n, behind, _scores(n, behind, values, "eval"), call)
    if value := _entry(script, names, stmt) or next(iter(losses_given(script, call)), ""):
        return _line(n, behind, _validation(n, behind, value), call)
    if helper and (inside := _within(n, helper)):
        return inside
    if values:
        return _line(n, behind, _scores(n, behind, values), call)
    return [_missed(call, "an evaluation without a value that is a loss by name")]


def _missed(where: ast.AST, why: str) -> Note:
    return note(where, f"{why}; not recorded", "validation")


def _is_open(n: TrainingLoop, node: ast.AST) -> bool:
    """In the block that `finish` ends, or in one within it; all is, where the exit ends the run."""
    outer = n.script.parent[n.outer]
    while isinstance(outer, (*WITHS, *LOOPS, ast.Try)):
        outer = n.script.parent[outer]
    called_in_it = n.script.scope_of(node) is not n.outer_scope
    return n.again or called_in_it or n.script.inside(node, outer)


def _is_of_other_data(call: ast.Call, names: list[str]) -> bool:
    """Of the training data, or by an average of the weights: not the validation of this model."""
    given = [dotted(part) for part in own_all(arguments(call))]
    words = [last(name) for name in [*names, *given] if name]
    held_out = any(map(HELD_OUT.search, words))
    of_training = any(map(OF_TRAINING.search, words)) and not held_out
    return of_training or any(map(AVERAGE_NAME.search, words))


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


def _validation(n: TrainingLoop, spot: Spot, value: str) -> list[str]:
    """Before the step of its iteration dated as the script itself numbers it."""
    loops, line = n.script.loops_around(spot.block[0]), n.script.line_of(spot) or 0
    before = n.inner in loops and line <= n.last_site
    step = n.counter(n.script.bound(spot)) if before else ""
    return [f"{n.obs}.validation({value}{f', step={step}' if step else ''})"]


def _scores(n: TrainingLoop, spot: Spot, names: Sequence[str], group: str = "val") -> list[str]:
    groups = ["train" if group == "val" and OF_TRAINING.search(x) else group for x in names]
    pairs = [f'"{g}/{key_of(x)}": {x}' for g, x in zip(groups, names, strict=True)]
    return n.in_columns(spot, pairs, lambda some: f"{n.obs}.log({{{', '.join(some)}}})")


def _line(n: TrainingLoop, spot: Spot, codes: list[str], where: ast.AST) -> list[Insertion | Note]:
    found = [line for code in codes for line in n.add(spot, "validation", code, "likely")]
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
    losses = [name for name in _worked_out(block, LOSS_NAME) if name in bound]
    losses.sort(key=lambda name: bool(HELD_OUT.search(name)))
    meters = _meters(n.script, helper, bound)
    scores = [
        name for name in _worked_out(block, METRIC_NAME, (ast.BinOp, ast.Name)) if name in bound
    ]
    if losses and not any(map(n.holds, calls)):
        code = _scores(n, spot, losses[-1:], "eval")
    elif losses or meters:
        value = as_shown(losses[-1], block) if losses else meters[0]
        code = _validation(n, spot, value) if value else []
    else:
        code = _scores(n, spot, sorted(scores))
    if losses and not code:
        text = f"{losses[-1]} is shown divided by what is not certainly bound behind its loop"
        return [_missed(helper, text)]
    return _line(n, spot, code, helper) if code else []


def _worked_out(
    stmts: list[ast.stmt], pattern: re.Pattern[str], kinds: tuple[type, ...] = (ast.expr,)
) -> list[str]:
    """Names of plain numbers that statements work out themselves, the last written last."""
    found: dict[str, None] = {}
    containers = (ast.List, ast.Dict, ast.ListComp, ast.Lambda)
    for node in own_all(stmts):
        value = getattr(node, "value", None)
        made = isinstance(value, containers) or called(value)[:1].isupper()
        plain = assigned(node) and isinstance(value, kinds) and not made
        for name in targets(node) if plain else []:
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


def _written_out(n: TrainingLoop) -> list[Insertion | Note]:
    """Evaluation in the loop itself: behind the last `val_loss /= n`, `acc = (p == test_y).mean()`
    that is shown."""
    names = [x for x in n.script.bindings if "." not in x and not NOT_A_VALUE.search(x)]
    return [
        found
        for name in names
        if HELD_OUT_LOSS.search(name) or _is_held_out_score(n, name)
        for found in _after_last(n, name)
    ]


def _is_held_out_score(n: TrainingLoop, name: str) -> bool:
    """A number that is a score by its name, of held-out data by the words of what it is made of."""
    made = [b for b in n.script.bindings[name] if b.stmt in own_set(n.outer)]
    if LOSS_NAME.search(name) or not METRIC_NAME.search(name) or not made:
        return False
    words = loads(walk(made[-1].value)).union([name])
    seen = name in loads(shown(own_all(n.scope.body)))
    return seen and isinstance(made[-1].value, ast.BinOp) and any(map(HELD_OUT_WORD.search, words))


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
    if not mine or any(EVAL_NAME.search(called(c)) for b in mine for c in makers(b.value)):
        return []
    stmt: ast.stmt = max((b.stmt for b in mine), key=lambda s: s.lineno)
    loops = script.loops_around(stmt)
    inside = itertools.takewhile(lambda loop: loop not in n.nest.loops, loops)
    spot = script.behind([stmt, *inside][-1])
    if name not in script.bound(spot):
        return []
    if not HELD_OUT_LOSS.search(name):
        return _line(n, spot, _scores(n, spot, [name]), stmt)
    value = as_shown(name, spot.block[spot.index :])
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
            return _line(n, Spot(loop.body, index + 1), [code], loop)
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
        result, found = patch(data, path.name, options.only, in_package(path, data), path.parent)
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
    for each in found.notes:
        print(f"{path.name}:{each.line}: {each.text}", file=sys.stderr)


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
