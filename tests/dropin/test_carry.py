"""What the loop carries: where it is read, what comes back, and that looking changes nothing."""

from __future__ import annotations

import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
from faults.scripts import Script

import observability as obs
from tests.dropin.test_single_file import PYTHONS

HEAD = """
import collections, datetime, enum, os, pathlib, signal, weakref
import numpy as np
import torch
import observability as obs

torch.manual_seed(1)
model = torch.nn.Linear(4, 1)
opt = torch.optim.AdamW(model.parameters(), lr=0.05)
kill_at = int(os.environ.get("KILL_AT", "0"))


def update(step):
    loss = model(torch.rand(8, 4)).square().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    print("loss", int(step) + 1, loss.item().hex())
    return loss


def stop(step):
    obs.current_run().settle()
    if step == kill_at:
        os.kill(os.getpid(), 9)


class Own: pass
class Colour(enum.Enum): RED = 1
"""
SAVING = {"SAVE_INTERVAL": 2, "OBS_RESUME": "auto"}


def script_of(folder: Path, body: str) -> Script:
    return Script(folder, HEAD + textwrap.dedent(body))


# --- Where it is read -----------------------------------------------------------------------------

BODIES = {
    "a module": """
        obs.init("run")
        obs.watch(model, optimizer=opt)
        step, total = obs.resume(step=0, total=0.0)
        while step < 9:
            loss = update(step)
            total += loss.item()
            step += 1
            obs.step(step, loss=loss, total=total)
            stop(step)
        print("total", total.hex())
    """,
    "a function": """
        def main():
            obs.init("run")
            obs.watch(model, optimizer=opt)
            step, total = obs.resume(step=0, total=0.0)
            while step < 9:
                loss = update(step)
                total += loss.item()
                step += 1
                obs.step(step, loss=loss, total=total)
                stop(step)
            print("total", total.hex())
        main()
    """,
    "a method": """
        class Trainer:
            def fit(self):
                obs.init("run")
                obs.watch(model, optimizer=opt)
                step, total = obs.resume(step=0, total=0.0)
                while step < 9:
                    loss = update(step)
                    total += loss.item()
                    step += 1
                    obs.step(step, loss=loss, total=total)
                    stop(step)
                print("total", total.hex())
        Trainer().fit()
    """,
    "a method, in attributes": """
        class Trainer:
            def fit(self):
                self.step = self.total = 0
                obs.init("run")
                obs.watch(model, optimizer=opt)
                self.step, self.total = obs.resume(step=self.step, total=self.total)
                while self.step < 9:
                    self.iterate()
                print("total", self.total.hex())

            def iterate(self):
                loss = update(self.step)
                self.total += loss.item()
                self.step += 1
                carry = {"step": self.step, "total": self.total}
                obs.step(self.step, loss=loss, total=self.total, carry=carry)
                stop(self.step)
        Trainer().fit()
    """,
    "a function within a function": """
        def main():
            step = total = 0
            def loop():
                nonlocal step, total
                step, total = obs.resume(step=step, total=total)
                while step < 9:
                    loss = update(step)
                    total += loss.item()
                    step += 1
                    obs.step(step, loss=loss, total=total)
                    stop(step)
            obs.init("run")
            obs.watch(model, optimizer=opt)
            loop()
            print("total", total.hex())
        main()
    """,
    "a loop over a generator": """
        def batches(count):
            for number in range(count):
                if obs.skip_batch(): continue
                yield torch.rand(3)

        def main():
            obs.init("run")
            obs.watch(model, optimizer=opt)
            step, total = obs.resume(step=0, total=0.0)
            for epoch in range(3):
                if obs.skip_epoch(epoch): continue
                for batch in batches(3):
                    loss = update(step)
                    total += loss.item() * batch.sum().item()
                    step += 1
                    obs.step(step, loss=loss, total=total)
                    if step == 7: obs.save()
                    stop(step)
            print("total", total.hex())
        main()
    """,
    "a comprehension": """
        def main():
            obs.init("run")
            obs.watch(model, optimizer=opt)
            total = obs.resume(total=0.0)
            def iterate(step):
                nonlocal total
                loss = update(step)
                total += loss.item()
                obs.step(step + 1, loss=loss, total=total, carry={"total": total})
                stop(step + 1)
            [iterate(step) for step in range(obs.current_run().global_step, 9)]
            print("total", total.hex())
        main()
    """,
}


@pytest.mark.parametrize("body", BODIES)
def test_it_is_read_where_it_stands(tmp_path, body):
    straight = script_of(tmp_path / "straight", BODIES[body]).run(**SAVING)
    script = script_of(tmp_path / "work", BODIES[body])
    said = [script.killed(**SAVING, KILL_AT=at) for at in (2, 5, 8)]
    said.append(script.run(**SAVING))
    losses = dict(line.split() for line in straight.lines("loss"))
    assert len(losses) == 9
    for line in (line for each in said for line in each.lines("loss")):
        assert losses[line.split()[0]] == line.split()[1], line
    assert said[-1].lines("total") == straight.lines("total")
    assert "exact" not in "".join(each.said for each in said)
    assert len(said[-1].lines("loss")) < 9


def test_what_is_counted_behind_a_helper_that_ends_in_step_is_exact_or_said(tmp_path):
    body = """
        def iterate(step):
            loss = update(step)
            obs.step(step + 1, loss=loss)
            stop(step + 1)

        obs.init("run")
        obs.watch(model, optimizer=opt)
        step = obs.resume(step=0)
        while step < 9:
            iterate(step)
            step += 1
    """
    straight = script_of(tmp_path / "straight", body).run(**SAVING)
    script = script_of(tmp_path / "work", body)
    killed, ended = script.killed(**SAVING, KILL_AT=5), script.run(None, **SAVING)
    if ended.lines("loss") != straight.lines("loss")[-len(ended.lines("loss")) :]:
        assert "a resume will not be exact" in killed.said


def test_to_look_keeps_nothing_alive(tmp_path):
    script = script_of(
        tmp_path / "work",
        """
        def main():
            obs.init("run")
            obs.watch(model, optimizer=opt)
            step = obs.resume(step=0)
            batch = seen = None
            while step < 6:
                batch = torch.rand(8, 4)
                if seen is not None:
                    print("alive" if seen() is not None else "gone")
                seen = weakref.ref(batch)
                loss = update(step)
                step += 1
                obs.step(step, loss=loss)
                del batch
                print("alive" if seen() is not None else "gone")
                stop(step)
        main()
        """,
    )
    said = script.run(**{**SAVING, "SAVE_INTERVAL": 1}).said
    assert said.count("gone") == 11
    assert "alive" not in said


def test_a_dict_that_the_script_has_from_locals_is_not_emptied(tmp_path):
    """Before Python 3.13 it is the one that everybody gets who looks."""
    script = script_of(
        tmp_path / "work",
        """
        def main(lr=0.5, width=3):
            config = locals()
            obs.init("run")
            obs.watch(model, optimizer=opt)
            step = obs.resume(step=0)
            while step < 3:
                loss = update(step)
                step += 1
                obs.step(step, loss=loss)
                stop(step)
                print("config", config["lr"], config["width"])
        main()
        """,
    )
    ended = script.run(**{**SAVING, "SAVE_INTERVAL": 1})
    assert ended.lines("config") == ["0.5 3"] * 3


FRAMES = """
import sys, types, weakref
import observability as obs

GLOBAL = 1

# A function of the file itself: what it looks at is the frame that calls it.
code = compile("def f(): return names_in(caller())", obs.__file__, "exec").co_consts[0]
look = types.FunctionType(code, vars(obs))

class Thing: pass

def plain(argument):
    local = argument + 1
    return look()

def closure():
    cell = 5
    def within():
        nonlocal cell
        cell += 1
        return look()
    return within()

def generator():
    inside = 7
    yield look()

class Method:
    def call(self):
        local = 8
        return look()

def freed():
    thing = Thing()
    seen = weakref.ref(thing)
    look()
    del thing
    return seen()

def kept():
    first = 9
    mine = locals()
    look()
    return mine["first"]

def twice():
    values = []
    for number in range(3):
        values.append(look()["number"])
    return values

got = plain(2)
assert (got["argument"], got["local"], got["GLOBAL"]) == (2, 3, 1), got
assert closure()["cell"] == 6
assert next(generator())["inside"] == 7
assert Method().call()["local"] == 8
assert look()["GLOBAL"] == 1
assert [look()["each"] for each in (4,)] == [4] if sys.version_info >= (3, 12) else True
assert freed() is None
assert kept() == 9
assert twice() == [0, 1, 2]
assert "got" in globals() and got["argument"] == 2
print("fine")
"""


@pytest.mark.parametrize("version", PYTHONS)
def test_frames_are_read_right_by_each_python(tmp_path, version):
    (tmp_path / "frames.py").write_text(FRAMES)
    environment = {"PYTHONPATH": str(Path(obs.__file__).parent)}
    done = subprocess.run(
        [PYTHONS[version], "-S", tmp_path / "frames.py"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "fine\n", done.stderr


# --- What comes back ------------------------------------------------------------------------------

VALUES = {
    "a path": "pathlib.Path('a')",
    "an enum": "Colour.RED",
    "a date": "datetime.datetime(2020, 1, 1)",
    "a deque": "collections.deque([1, 2], maxlen=2)",
    "an object": "Own()",
    "a counter": "collections.Counter('aab')",
    "a dict with a default": "collections.defaultdict(int, a=1)",
    "an object in a list": "[1, {'a': Own()}]",
    "a lambda": "(lambda: 1)",
    "a generator": "(n for n in range(3))",
    "a file": "open(os.devnull)",
    "an ordered dict": "collections.OrderedDict(b=1, a=2)",
    "a set": "{1, 2, 'three'}",
    "a tuple": "(1, (2.5, None), b'x', True, 1j)",
    "a dict": "{'b': [1], 2: {3}, (4, 5): -0.0}",
    "a number of numpy": "np.float32(1.1)",
    "an array": "np.arange(6.0)[::2].reshape(3, 1)",
    "a text": "'über'",
    "a large number": "2**100",
    "infinity": "[float('inf'), -float('inf')]",
    "a tensor": "torch.arange(6.0).to(torch.bfloat16)[1::2]",
    "a parameter": "torch.nn.Parameter(torch.ones(2))",
    "a tensor with a gradient to come": "torch.ones(2, requires_grad=True)",
    "a loss with its graph": "model(torch.rand(1, 4)).sum()",
    "an empty list": "[]",
}
CHANGING = """
obs.init("run")
obs.watch(model, optimizer=opt)
odd = 0
step, odd = obs.resume(step=0, odd=odd)


def shown(odd):
    values = odd.tolist() if hasattr(odd, "tolist") else odd
    is_trained = getattr(odd, "requires_grad", False) and odd.is_leaf
    return type(odd).__name__, repr(values), getattr(odd, "dtype", ""), is_trained


print("has", *shown(odd))
while step < 8:
    loss = update(step)
    step += 1
    if step == 3:
        odd = VALUE
        print("made", *shown(odd))
    obs.step(step, loss=loss)
    stop(step)
"""


@pytest.mark.parametrize("value", VALUES)
def test_a_value_that_becomes_another_comes_back_so_or_is_not_called_saved(tmp_path, value):
    body = CHANGING.replace("VALUE", VALUES[value])
    script = script_of(tmp_path / "work", body)
    settings = {**SAVING, "SAVE_INTERVAL": 1, "KEEP_LAST": 1}
    killed = script.killed(**settings, KILL_AT=6)
    ended = script.run(**settings)
    if "was not saved" in killed.said:
        assert "step 3 was not saved: odd " in killed.said
        assert ended.lines("has") == ["int 0  False"]
        assert "resume at step 2" in ended.said
    else:
        assert ended.lines("has") == killed.lines("made")
        assert "resume at step 6" in ended.said
    losses = dict(line.split() for line in killed.lines("loss"))
    for line in ended.lines("loss"):
        assert losses.setdefault(line.split()[0], line.split()[1]) == line.split()[1]


@pytest.mark.parametrize("number", ["np.int64(step)", "torch.tensor(step)", "float(step)"])
def test_a_step_of_any_library_is_a_step_like_another(tmp_path, number):
    body = """
        obs.init("run")
        obs.watch(model, optimizer=opt)
        step = obs.resume(step=0)
        while step < 6:
            loss = update(step)
            step += 1
            obs.step(NUMBER, loss=loss)
            stop(step)
    """.replace("NUMBER", number)
    script = script_of(tmp_path / "work", body)
    killed, ended = script.killed(**SAVING, KILL_AT=4), script.run(**SAVING)
    assert "resume at step 4" in ended.said
    assert [line.split()[0] for line in killed.lines("loss") + ended.lines("loss")] == list(
        "123456"
    )
    records = [r for r in obs.read_run(script.out / "run") if "loss/train" in r["metrics"]]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert "failed and the training goes on" not in killed.said + ended.said


# --- What is put back in place --------------------------------------------------------------------

METER = """
class Meter:
    def __init__(self, name="loss"):
        self.name, self.shown = name, print
        self.sum, self.count, self.parts = 0.0, 0, []

    def update(self, value):
        self.sum += value
        self.count += 1
        self.parts.append(value)

    @property
    def mean(self):
        return self.sum / max(1, self.count)
"""
EPOCHS = """
obs.init("run")
obs.watch(model, optimizer=opt)
BEGIN
step = obs.resume(step=step)
for epoch in range(3):
    if obs.skip_epoch(epoch): continue
    EACH_EPOCH
    for batch in range(4):
        if obs.skip_batch(): continue
        loss = update(step)
        step += 1
        EACH_STEP
        obs.step(step, loss=loss)
        stop(step)
    END_OF_EPOCH
    if leave: break
print("end", step, AT_THE_END)
"""
IN_PLACE = {
    "a meter of the run": {
        "BEGIN": "total = Meter(); again = [total]; total = obs.resume(total=total)",
        "EACH_STEP": "total.update(loss.item())",
        "END_OF_EPOCH": "print('mean', epoch, again[0].mean, total.parts)",
    },
    "a meter that each epoch makes anew": {
        "EACH_EPOCH": "losses = Meter(); losses = obs.resume(losses=losses)",
        "EACH_STEP": "losses.update(loss.item())",
        "END_OF_EPOCH": "print('mean', epoch, losses.mean, losses.count)",
    },
    "meters in a dict": {
        "EACH_EPOCH": "found = {k: Meter(k) for k in 'ab'}; found = obs.resume(found=found)",
        "EACH_STEP": "[each.update(step * loss.item()) for each in found.values()]",
        "END_OF_EPOCH": "print('mean', epoch, [(k, v.name, v.mean) for k, v in found.items()])",
    },
    "an object that holds one": {
        "BEGIN": "own = Own(); own.meter, own.best = Meter(), None; own = obs.resume(own=own)",
        "EACH_STEP": "own.meter.update(loss.item()); own.best = loss.detach(); own.last = step",
        "END_OF_EPOCH": "print('mean', epoch, own.meter.mean, own.best, own.last)",
    },
    "lists of the history": {
        "BEGIN": "seen = {'train': [], 'val': []}; seen = obs.resume(seen=seen)",
        "EACH_STEP": "seen['train'].append(loss.item())",
        "END_OF_EPOCH": "seen['val'].append(max(seen['train'][-4:])); print('seen', seen)",
    },
    "an early stopper": {
        "BEGIN": "stopper = Stopper(model); stopper = obs.resume(stopper=stopper)",
        "END_OF_EPOCH": "stopper(-step); leave = stopper.stop; print('stop', *stopper.shown())",
    },
    "a dict with what is watched": {
        "BEGIN": """state = {"model": model, "optimizer": opt, "epoch": 0, "step": 0, "old": 1}
state = obs.resume(state=state)
model = state["model"]""",
        "EACH_STEP": """state["step"] += 1; state["epoch"] = epoch; state["new"] = [step]
        state.pop("old", None)""",
        "END_OF_EPOCH": "print('state', [*state], *[state[k] for k in ('step', 'epoch', 'new')])",
    },
}
# As many published scripts have it.
EPOCH_FUNCTION = """
def train(epoch):
    global step
    losses = Meter()
    losses = obs.resume(losses=losses)
    for batch in range(4):
        if obs.skip_batch(): continue
        loss = update(step)
        step += 1
        losses.update(loss.item())
        obs.step(step, loss=loss)
        stop(step)
    return losses.mean

obs.init("run")
obs.watch(model, optimizer=opt)
step, history = 0, {"train": []}
step, history = obs.resume(step=step, history=history)
for epoch in range(3):
    if obs.skip_epoch(epoch): continue
    history["train"].append(train(epoch))
    print("history", history)
"""
STOPPER = """
class Stopper:
    def __init__(self, model):
        self.model, self.best, self.counter, self.stop, self.kept = model, None, 0, False, None

    def __call__(self, score):
        if self.best is None or score > self.best:
            self.best, self.counter = score, 0
            self.kept = {n: t.clone() for n, t in self.model.state_dict().items()}
        else:
            self.counter += 1
            self.stop = self.counter >= 2

    def shown(self):
        return self.best, self.counter, self.stop, self.kept["bias"].item().hex()
"""


def epochs(parts: dict[str, str]) -> str:
    body = EPOCHS.replace("BEGIN", "step, leave = 0, False\n" + parts.get("BEGIN", ""))
    for place in ("EACH_EPOCH", "EACH_STEP", "END_OF_EPOCH"):
        body = body.replace(place, parts.get(place, "pass"))
    return METER + STOPPER + body.replace("AT_THE_END", "model.bias.item().hex()")


BODIES_IN_PLACE = {
    **{name: epochs(parts) for name, parts in IN_PLACE.items()},
    "a meter in a function of an epoch": METER + EPOCH_FUNCTION,
}


@pytest.mark.parametrize("name", BODIES_IN_PLACE)
def test_what_an_object_has_is_put_back_in_it_to_the_last_printed_line(tmp_path, name):
    body = BODIES_IN_PLACE[name]
    settings = {**SAVING, "SAVE_INTERVAL": 1}
    straight = script_of(tmp_path / "straight", body).run(**settings)
    script = script_of(tmp_path / "work", body)
    said = [script.killed(**settings, KILL_AT=at) for at in (2, 7, 8)] + [script.run(**settings)]
    assert "was not saved" not in straight.said
    assert "exact" not in "".join(each.said for each in said)
    assert printed(*said) == printed(straight)
    assert "resume at step 8" in said[-1].said


def printed(*ended: Any) -> list[str]:
    lines = [line for each in ended for line in each.said.splitlines()]
    return [line for line in lines if not line.startswith("observability: ")]


LEFT_OUT = {
    "slots": "class Odd:\n    __slots__ = 'a', '__dict__'",
    "a kind of dict": "class Odd(dict): pass",
    "a kind of number": "class Odd(int): pass",
    "a kind of generator": "import random\nclass Odd(random.Random): pass",
    "a state of its own": "class Odd:\n    def state_dict(self): return {}",
    "a file": "class Odd:\n    def __init__(self): self.file = open(os.devnull)",
    "a module": "def Odd(): return torch.nn.Linear(1, 1)",
    "a loader": "def Odd(): return torch.utils.data.DataLoader([1, 2])",
    "an optimizer": "def Odd(): return torch.optim.SGD(model.parameters(), lr=1)",
    "a module in a dict": "def Odd(): return {'a': torch.nn.Linear(1, 1)}",
    "an object three deep": """
class Odd:
    def __init__(self, depth=2):
        self.within = Odd(depth - 1) if depth else None
""",
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_cannot_be_put_back_is_not_called_saved(tmp_path, name):
    body = epochs({"BEGIN": "odd = Odd(); odd = obs.resume(odd=odd)"})
    script = script_of(tmp_path / "work", LEFT_OUT[name] + "\n" + body)
    said = script.run(**SAVING).said
    assert "step 2 was not saved: odd" in said
    assert "odd" in said.split("was not saved: ")[1].split(" is a ")[0]


def test_another_object_than_resume_gave_is_not_called_saved(tmp_path):
    begin = "odd = Meter(); odd = obs.resume(odd=odd)"
    body = epochs({"BEGIN": begin, "EACH_EPOCH": "odd = Meter()"})
    assert "step 2 was not saved: odd is a Meter" in script_of(tmp_path, body).run(**SAVING).said
