"""The patcher: what it finds in every shape of script, and that it can always be taken back."""

from __future__ import annotations

import json
import random
import re
import subprocess
import symtable
import sys
import types
from pathlib import Path

import autopatch
import pytest
from conftest import python
from hypothesis import given, settings
from hypothesis import strategies as st

import observability as obs

TESTS = Path(__file__).resolve().parents[1]
SHAPES = sorted((TESTS / "shapes").glob("*.py"))
TOOL = TESTS.parent / "patches" / "autopatch.py"

# What must be found: is the step logged, the evaluation recorded, a resume offered; and the
# arguments that the step line must hold. "none seen": the script evaluates nothing.
GOLDEN = {
    "accelerator": ("yes", "yes", "yes", "completed_steps, loss=loss * accumulation"),
    "accumulate_context": ("yes", "none seen", "no", "loss=loss"),
    "accumulation_continue": ("yes", "none seen", "yes", "step, loss=loss * K, batch=x"),
    "accumulation_or_last": ("yes", "none seen", "yes", "step, loss=loss, batch=x"),
    "accumulation_remainder": ("yes", "none seen", "yes", "loss=loss * args.accumulation_steps"),
    "agent_with_its_optimizer": ("yes", "none seen", "no", ""),
    "amp_flag": ("yes", "none seen", "yes", "loss=loss"),
    "average_before_wrap": ("yes", "none seen", "yes", "train_steps, loss=loss, batch=x"),
    "bptt_manual_sgd": ("yes", "yes", "yes", "loss=loss"),
    "branch_per_rank": ("yes", "none seen", "yes", "loss=loss_gen, loss_disc=loss_disc"),
    "branches_both_step": ("yes", "none seen", "no", "loss=loss"),
    "callable_trainer": ("yes", "none seen", "yes", "step, loss=loss, batch=x"),
    "counted_in_tokens": ("yes", "none seen", "no", "loss=loss, batch=batch"),
    "engine_module": ("yes", "none seen", "no", "loss=loss * accumulate"),
    "epoch_function": ("yes", "yes", "yes", "loss=loss, batch=data"),
    "fabric": ("yes", "yes", "yes", "iter_num, loss=loss"),
    "full_batch_globals": ("yes", "yes", "yes", "epoch"),
    "gan": ("yes", "none seen", "yes", "loss=errG, errD_real=errD_real, errD_fake=errD_fake"),
    "gan_critic": ("yes", "none seen", "yes", "step, loss=loss_G, loss_D=loss_D"),
    "gated_step_before_break": ("yes", "none seen", "no", "loss=loss"),
    "head_on_frozen_model": ("yes", "none seen", "yes", "loss=loss, batch=x"),
    "helper_without_state": ("yes", "none seen", "yes", "loss=loss, batch=images"),
    "inline_eval": ("yes", "yes", "yes", "loss=loss"),
    "interrupted_main": ("yes", "yes", "yes", "step, loss=loss, batch=x"),
    "layerwise": ("yes", "none seen", "no", "loss=loss"),
    "lbfgs": ("yes", "yes", "yes", "i"),
    "leaves_before_the_count": ("yes", "none seen", "no", "self.step, batch=batch"),
    "loss_scaler": ("yes", "none seen", "yes", "loss=loss, batch=samples"),
    "match_phase": ("yes", "none seen", "yes", "step, loss=loss, batch=x"),
    "micro_steps": ("yes", "yes", "yes", "step, loss=train_loss"),
    "nameless_loss": ("yes", "none seen", "yes", "step"),
    "nested_main": ("yes", "yes", "yes", "step, loss=loss"),
    "next_in_micro_steps": ("yes", "none seen", "no", "loss=loss, batch=x"),
    "optim_shadowed": ("yes", "none seen", "yes", "total_steps, loss=loss"),
    "optimizer_branches": ("yes", "none seen", "yes", "loss=loss"),
    "optimizer_per_call": ("yes", "yes", "no", "loss=loss, batch=x"),
    "optimizer_remade": ("yes", "none seen", "no", "epoch, loss=loss"),
    "optimizer_switched": ("yes", "yes", "no", "loss=loss, batch=data"),
    "optimizers_in_a_dict": ("yes", "none seen", "yes", "loss=loss, batch=x"),
    "optional_total": ("yes", "none seen", "yes", "step, loss=loss, batch=x"),
    "own_checkpoint": ("yes", "yes", "yes", "loss=loss, batch=images"),
    "phases": ("yes", "yes", "yes", "loss=loss, batch=inputs"),
    "reinforce": ("yes", "none seen", "no", "i_episode"),
    "scheduler_step_epoch": ("yes", "yes", "yes", "loss=loss, batch=x"),
    "several_evaluations": ("yes", "yes", "yes", "step, loss=loss, batch=x"),
    "several_processes": ("yes", "none seen", "no", "loss=loss"),
    "sharpness_aware": ("yes", "none seen", "yes", "loss=loss.mean()"),
    "summed_test_loss": ("yes", "yes", "yes", "step, loss=loss, batch=x"),
    "trainer_class": ("yes", "none seen", "no", "self.iter_num, loss=self.loss"),
    "trainer_epochs": ("yes", "yes", "yes", "loss=loss"),
    "traps": ("yes", "none seen", "yes", "loss=loss"),
    "tuple_factory": ("yes", "yes", "yes", "loss=loss"),
    "while_true": ("yes", "yes", "yes", "iter_num, loss=loss * gradient_accumulation_steps"),
    "wrapped_step": ("yes", "none seen", "yes", "step, loss=loss, batch=x"),
    "zero_based": ("yes", "yes", "yes", "step, loss=loss"),
    "mean_shown_in_loop": ("yes", "yes", "yes", "loss=loss, batch=x"),
    "phases_in_a_function": ("yes", "no", "no", "loss=loss)"),
    "several_generators": ("yes", "none seen", "yes", "loss=loss_G, loss_D_A=loss_D_A"),
    "sum_of_named_losses": ("yes", "none seen", "no", "loss=value_loss * 0.5 + action_loss"),
    "total_of_micro_steps": ("yes", "none seen", "no", "self.step, loss=total_loss"),
    "two_divisors": ("yes", "yes", "yes", "step, loss=loss * micro_batches"),
    "accuracy_in_line": ("yes", "yes", "yes", "loss=loss, batch=b_x"),
    "batch_beside_state": ("yes", "none seen", "yes", "loss=loss, batch=inputs"),
    "one_name_two_losses": ("yes", "yes", "no", "i)"),
    "perplexity_first": ("yes", "yes", "yes", "completed_steps, loss=loss, batch=x)"),
    "scores_in_a_tuple": ("yes", "yes", "yes", "epoch, loss=loss)"),
    "test_within_the_loop": ("yes", "yes", "yes", ")"),
    "wrapped_optimizer": ("yes", "yes", "no", "loss=loss, batch=src"),
}


def patch(data: bytes, name: str = "train.py") -> tuple[bytes, autopatch.Plan]:
    return autopatch.patch(data, name)


def run_tool(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def added(data: bytes) -> list[str]:
    return [row.decode().strip() for row in data.splitlines() if autopatch.is_marked(row)]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_bytes((TESTS / "shapes" / "nested_main.py").read_bytes())
    return path


# --- What is found ---------------------------------------------------------------------------
def test_every_shape_has_an_expectation():
    assert {p.stem for p in SHAPES} - {"loop_elsewhere"} == set(GOLDEN)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_shape_is_found_as_expected(name):
    _, found = patch((TESTS / "shapes" / f"{name}.py").read_bytes())
    log, validation, resume, step = GOLDEN[name]
    resume = resume.replace("yes", autopatch.TO_BE_PROVED)
    assert (found.parts["log"], found.parts["validation"], found.parts["resume"]) == (
        log,
        validation,
        resume,
    )
    steps = [i.code for i in found.insertions if i.kind == "step"]
    assert any(f".step({step}" in code for code in steps), steps
    assert resume != "no" or any("resume is left out" in n.text for n in found.notes)


# What a shape was written for: the line, and how often it stands there.
LINES = {
    "agent_with_its_optimizer": [
        ("obs.watch(model, optimizer=model.optimizer)", 1),
        ('obs.log({"loss/train": loss.mean()})', 1),
    ],
    "average_before_wrap": [("obs.watch(model, ema, optimizer=opt, loader=loader)", 1)],
    "branches_both_step": [("obs.step(", 2)],
    "gated_step_before_break": [("if accelerator.sync_gradients: obs.step(loss=loss)", 2)],
    "head_on_frozen_model": [("obs.watch(classifier, optimizer=optimizer", 1)],
    "optimizers_in_a_dict": [
        ("obs.watch(coder, critic, optimizer=opts, loader=loader)", 1),
        ("histories, sums = obs.resume(histories=histories, sums=sums)", 1),
    ],
    "optional_total": [("    total_loss = obs.resume(total_loss=total_loss)", 1)],
    "sharpness_aware": [("optimizer=[optimizer.base_optimizer, optimizer]", 1)],
}


@pytest.mark.parametrize("name", LINES)
def test_shape_gets_the_lines_that_it_was_written_for(name):
    result = patch((TESTS / "shapes" / f"{name}.py").read_bytes())[0].decode()
    assert {line: result.count(line) for line, _ in LINES[name]} == dict(LINES[name])


@pytest.mark.parametrize("path", SHAPES, ids=lambda p: p.stem)
def test_patched_shape_compiles_and_reverses_byte_for_byte(path):
    data = path.read_bytes()
    if path.stem == "loop_elsewhere":
        with pytest.raises(autopatch.NothingToPatch, match=r"engine\.py"):
            patch(data)
        return
    result, found = patch(data)
    compile(result, path.name, "exec")
    assert autopatch.reverse(result) == data
    kept = [
        row
        for row in result.splitlines(keepends=True)
        if not row.rstrip().endswith(b"# observability")
    ]
    assert b"".join(kept) == data
    assert len(added(result)) == len(found.insertions) >= 3


@pytest.mark.parametrize("path", [p for p in SHAPES if p.stem in GOLDEN], ids=lambda p: p.stem)
def test_added_lines_bind_no_name_that_was_not_the_scopes_own(path):
    data = path.read_bytes()
    before = scopes_and_their_names(data)
    after = scopes_and_their_names(patch(data)[0])
    assert after.keys() == before.keys()
    for scope, names in after.items():
        assert names - before[scope] <= {"obs", "observability"}


def scopes_and_their_names(data: bytes) -> dict[str, set[str]]:
    """Names that each function, and the module, binds."""
    found = {}
    tables = [symtable.symtable(data, "train.py", "exec")]
    for table in tables:
        tables += table.get_children()
        names = {s.get_name() for s in table.get_symbols() if s.is_local()}
        found[f"{table.get_name()}:{len(found)}"] = names
    return found


def test_taken_name_obs_gives_the_full_name():
    lines = added(patch((TESTS / "shapes" / "reinforce.py").read_bytes())[0])
    assert "import observability  # observability" in lines
    assert not any("obs." in line for line in lines)


def test_both_names_taken_is_an_error_that_says_so():
    data = (TESTS / "shapes" / "nameless_loss.py").read_bytes() + b"\nobs = observability = 1\n"
    with pytest.raises(autopatch.PatchError, match="rename one of them"):
        patch(data)


def test_reference_shape_gets_exactly_these_call_sites(script):
    assert [
        line.removesuffix("  # observability") for line in added(patch(script.read_bytes())[0])
    ] == [
        "import observability as obs",
        "obs.init()",
        "obs.watch(model, optimizer=opt, scheduler=scheduler)",
        "step, ptr = obs.resume(step=step, ptr=ptr)",
        "if obs.skip_epoch(epoch): continue",
        "if obs.skip_batch(): continue",
        "obs.validation(val_loss)",
        "obs.step(step, loss=loss, batch=xb)",
        "obs.finish()",
    ]


@pytest.mark.parametrize(
    ("name", "recorded"),
    [("val_loss", True), ("loss_valid", True), ("value_loss", False), ("best_val_loss", False)],
)
def test_evaluation_written_out_in_the_loop_is_known_by_its_name(name, recorded):
    source = LOOP.format(before="pass", after=f"{name} = held_out(w)")
    lines = added(patch(source.encode())[0])
    assert (f"obs.validation({name})  # observability" in lines) is recorded


@pytest.mark.parametrize(("block", "recorded"), [("try:", True), ("if True:", False)])
def test_evaluation_behind_the_block_that_finish_ends_is_left_out_and_said(block, recorded):
    rows = LOOP.format(before="pass", after="pass").splitlines()
    rest = ["except KeyboardInterrupt:", "    pass"] if recorded else []
    inside = [f"    {row}" for row in rows[3:]]
    rows = [*rows[:3], block, *inside, *rest, "test_loss = evaluate(w)", ""]
    result, found = patch("\n".join(rows).encode())
    assert (b'obs.log({"eval/test_loss": test_loss})' in result) is recorded
    assert any("after the end of the run" in note.text for note in found.notes) is not recorded


@pytest.mark.parametrize(("second", "resume"), [("step % 2", "yes"), ("step % 3", "no")])
def test_name_bound_and_read_under_the_same_test_is_not_carried(second, resume):
    source = SOURCES.format(make="None", first="pass", read="torch.zeros(1)") + (
        f"    if step % 2:\n        late = step\n    if {second}:\n        print(late)\n"
    )
    assert (patch(source.encode())[1].parts["resume"] != "no") is (resume == "yes")


def test_deleted_names_are_not_used():
    source = (TESTS / "shapes" / "accumulation_remainder.py").read_bytes()
    result = patch(source)[0].decode().splitlines()
    step = next(i for i, row in enumerate(result) if "obs.step(" in row)
    assert next(row for row in result[step + 1 :] if row.strip()).strip().startswith("del X, Y")


LOOP = """import torch
import torch.nn.functional as F
opt = torch.optim.SGD([w], 1)
for x, y in batches:
    loss = F.mse_loss(w, y)
    {before}
    loss.backward()
    opt.step()
    {after}
"""


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("pass", "pass", "obs.step(loss=loss, batch=x)"),
        ("y = y.numpy()", "pass", "obs.step(loss=loss, batch=x)"),
        ("pass", "del x; print(y)", "obs.step(loss=loss, batch=y)"),
        ("loss = loss / grad_accum", "pass", "obs.step(loss=loss * grad_accum, batch"),
        (
            "loss = loss / grad_accum",
            "loss = loss.item()",
            "obs.step(loss=loss * grad_accum, batch",
        ),
        ("pass", "loss = other(x)", "obs.step(batch=x)"),
        ("pass", "del loss, x; print(y)", "obs.step(batch=y)"),
    ],
)
def test_step_uses_only_values_that_are_sure(before, after, expected):
    source = LOOP.format(before=before, after=after)
    lines = added(patch(source.encode())[0])
    assert any(expected in line for line in lines), lines


@pytest.mark.parametrize(
    "line",
    [
        b"import numpy as obs",
        b"from somewhere import obs",
        b"def obs(): pass",
        b"class obs: pass",
        b"for obs in []: pass",
        b"f = lambda obs: obs",
        b"globals()['obs'] = 1",
    ],
)
def test_any_use_of_the_name_obs_counts(line):
    data = (TESTS / "shapes" / "nameless_loss.py").read_bytes()
    assert "import observability  # observability" in added(patch(data + line + b"\n")[0])


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("accuracy_in_line", ['obs.log({"val/accuracy": accuracy})']),
        ("perplexity_first", ["obs.validation(eval_loss)"]),
        ("mean_shown_in_loop", ["obs.validation(test_loss / len(held_out))"]),
        (
            "scores_in_a_tuple",
            [
                'obs.log({"train/train_acc": train_acc, "val/val_acc": val_acc})',
                'obs.log({"val/tmp_test_acc": tmp_test_acc})',
            ],
        ),
    ],
)
def test_an_evaluation_is_recorded_by_what_its_values_are_called(name, lines):
    _, found = patch((TESTS / "shapes" / f"{name}.py").read_bytes())
    assert [i.code for i in found.insertions if i.kind == "validation"] == lines


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("optimizer_per_call", "optim is made in each call of train_model(), which a loop calls"),
        ("optimizer_switched", "optimizer is made again inside the loop"),
        ("optimizer_remade", "optimizer is made again inside the loop"),
    ],
)
def test_why_a_resume_is_left_out_is_said_once_and_truly(name, why):
    _, found = patch((TESTS / "shapes" / f"{name}.py").read_bytes())
    assert [note.text for note in found.notes] == [f"resume is left out: {why}"]


def test_torchs_own_optim_is_not_watched_for_an_optimizer_of_that_name():
    lines = added(patch((TESTS / "shapes" / "optimizer_per_call.py").read_bytes())[0])
    assert "obs.watch(model, loader=loader)  # observability" in lines


def test_an_optimizer_that_not_every_path_makes_is_said_to_be_so():
    source = LOOP.format(before="pass", after="pass").replace("opt =", "if w:\n    opt =")
    why = "opt is not bound on every path to this loop"
    assert f"resume is left out: {why}" in [n.text for n in patch(source.encode())[1].notes]


def test_the_epochs_that_another_file_counts_are_one_run_of_the_optimizers_own_steps(script):
    script.write_bytes((TESTS / "shapes" / "engine_module.py").read_bytes())
    run_tool(script, "--write")
    done = python(script, cwd=script.parent)
    [run] = script.parent.glob("out/*")
    rows = [row for row in obs.read_run(run) if "loss/train" in row["metrics"]]
    micro = [line.split() for line in done.stdout.splitlines() if line.startswith("micro")]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    said = [float(loss) for *_, at, loss in micro if at in "13"]
    assert [row["metrics"]["loss/train"] for row in rows] == pytest.approx(said)


ENGINE = """import torch
def train(net, loader, optimizer, scaler, amp, k):
    for i, (x, y) in enumerate(loader):
        loss = net(x, y)
        if amp:
            scaler(loss, optimizer, update_grad={said})
        else:
            loss.backward()
            if (i + 1) % k == 0:
                optimizer.step()
        print(i)
train(*sys.argv)
"""


@pytest.mark.parametrize(
    ("said", "sure"), [("(i + 1) % k == 0", True), ("i % k == 0", False)], ids=["same", "other"]
)
def test_a_scaler_is_told_when_to_step_as_the_other_branch_is(said, sure):
    lines = added(patch(ENGINE.format(said=said).encode())[0])
    assert any("if (i + 1) % k == 0: obs.step(loss=loss" in line for line in lines) is sure


def test_a_step_before_an_early_return_has_a_date_of_its_own(script):
    script.write_bytes((TESTS / "shapes" / "leaves_before_the_count.py").read_bytes())
    run_tool(script, "--write")
    python(script, cwd=script.parent)
    [run] = script.parent.glob("out/*")
    rows = [row["step"] for row in obs.read_run(run) if "lr" in row["metrics"]]
    assert rows == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("end", "closed"),
    [
        ("if w:\n        return 1\n    else:\n        return 2", False),
        ("if w:\n        return 1\n    return 2", True),
        ("sys.exit(0)", True),
    ],
    ids=["both", "one", "exit"],
)
def test_a_run_is_closed_where_control_comes(end, closed):
    rows = LOOP.format(before="pass", after="pass").splitlines()
    source = "\n".join(["def main():", *indented([*rows, end])])
    result, found = patch(source.encode())
    assert ("obs.finish()  # observability" in added(result)) is closed
    assert any("no obs.finish()" in note.text for note in found.notes) is not closed
    assert not re.search(rb"sys.exit\(0\)\n.*finish", result)


# --- Any spelling of a file ------------------------------------------------------------------
def plain_source() -> str:
    return (TESTS / "shapes" / "tuple_factory.py").read_text()


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.replace("    ", "\t").encode(),
        lambda s: s.replace("\n", "\r\n").encode(),
        lambda s: s.replace("\n", "\r").encode(),
        lambda s: b"\xef\xbb\xbf" + s.encode(),
        lambda s: b"\xef\xbb\xbf" + s.replace("\n", "\r\n").encode(),
        lambda s: ("# -*- coding: latin-1 -*-\n# caf\u00e9\n" + s).encode("latin-1"),
        lambda s: ("# coding: cp1251\nprint('\u043f\u0440\u0438\u0432\u0435\u0442')\n" + s).encode(
            "cp1251"
        ),
        lambda s: s.replace("loss", "l\u00f6ss").encode(),
        lambda s: s.replace("def main", "\x0c\ndef main").encode(),
        lambda s: s.replace(
            '    print("final"', "    text = '\u2028 \x1c'\n    print(\"final\""
        ).encode(),
        lambda s: s.rstrip("\n").encode(),
    ],
    ids=[
        "tabs",
        "crlf",
        "cr",
        "bom",
        "bom-crlf",
        "latin-1",
        "cp1251",
        "unicode-names",
        "form-feed",
        "line-separators-in-strings",
        "no-last-newline",
    ],
)
def test_file_format_survives(change):
    data = change(plain_source())
    result, found = patch(data)
    assert autopatch.reverse(result) == data
    assert found.parts["log"] == "yes"
    ends = {row[len(row.rstrip(b"\r\n")) :] for row in autopatch.split_lines(data)}
    assert {row[len(row.rstrip(b"\r\n")) :] for row in autopatch.split_lines(result)} <= ends


def test_loop_at_the_very_end_without_a_newline_reverses():
    data = b"import torch\nopt = torch.optim.SGD([w], 1)\nfor i in range(3):\n  opt.step()"
    result, _ = patch(data)
    assert b"obs.step(i)" in result
    assert autopatch.reverse(result) == data


def test_a_script_whose_last_line_does_not_end_is_closed_all_the_same(script):
    data = (TESTS / "shapes" / "zero_based.py").read_bytes().rstrip(b"\n")
    script.write_bytes(data)
    run_tool(script, "--write")
    done = python(script, cwd=script.parent)
    assert "completed at step 7" in done.stderr, done.stderr
    run_tool(script, "--reverse")
    assert script.read_bytes() == data


@pytest.mark.parametrize("body", ["opt.step()", "x = 1; opt.step()"])
def test_one_line_loop_has_no_room_and_says_so(body):
    start = "import torch\nopt = torch.optim.SGD([torch.zeros(1)], 1)\n"
    data = f"{start}for i in range(3): {body}\n".encode()
    result, found = patch(data)
    assert b"obs.step" not in result
    assert any("no room" in note.text for note in found.notes)


@pytest.mark.parametrize(
    "extra",
    [
        "match x:\n    case {'a': b}:\n        pass\n",
        "if (n := 3) > 2: pass\n",
        "def f(a, /, b, *, c): pass\n",
        "print(f'{1=}')\n",
        "async def g():\n    async for i in h(): pass\n",
    ],
    ids=["match", "walrus", "positional-only", "f-string", "async"],
)
def test_newer_syntax_parses(extra):
    data = f"x = {{}}\n{extra}{plain_source()}".encode()
    assert autopatch.reverse(patch(data)[0]) == data


@pytest.mark.parametrize(
    "data",
    [
        b"print 'two'\n",
        b"for\n",
        b"x = 'open\n",
        b"\x00",
        b"# coding: nope\n",
        b"\xff\xfe\x00",
        b"(" * 500,
        b"if 1:\nx\n",
    ],
)
def test_unreadable_script_is_an_error_with_its_place(data):
    with pytest.raises(autopatch.PatchError, match=r"train\.py"):
        patch(data)


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"", "no optimizer step"),
        (b"print(1)\n", "no optimizer step"),
        (b"from transformers import Trainer\nt = Trainer()\nt.train()\n", "transformers"),
        (
            b"from engine import fit\nimport torch\nopt = torch.optim.SGD([], 1)\nfit(opt)\n",
            r"engine\.py",
        ),
        (b"def update(opt):\n    opt.step()\n", "patch the script that has the loop"),
        (
            b"from losses import get_step_fn\nstep_fn = get_step_fn(optimizer)\n"
            b"for x in loader:\n    loss = step_fn(x)\n",
            r"train.py:4: step_fn\(\) steps in this loop.*get_step_fn",
        ),
    ],
)
def test_nothing_to_patch_says_where_to_look(data, where):
    with pytest.raises(autopatch.NothingToPatch, match=where):
        patch(data)


# --- Generated loops: each optimizer step is recorded once, and nothing else changes -----------
INDENT = "    "


def indented(rows: list[str]) -> list[str]:
    return [INDENT + row for row in rows]


simple = st.sampled_from(
    [
        "trace.append(('a', n))",
        "n += 1",
        "total = total + n",
        "pass",
        "best = max(best, n)",
        "trace.append(('b', total)); n += 2",
    ]
)
leave = st.sampled_from(
    [
        ["if n % 7 == 6:", "    n += 1", "    continue"],
        ["if n > 40: break"],
        ["if n > 50:", "    break"],
        ["if total > 300:", "    n += 1; break"],
    ]
)


@st.composite
def stepping(draw) -> list[str]:
    step = ["loss = Loss(n)", "loss.backward()", "opt.step()"]
    kind = draw(st.sampled_from(["plain", "modulo", "branches", "with", "try", "one-line"]))
    if kind == "modulo":
        return [
            *step[:2],
            "if n % 3 == 0:",
            *indented([step[2], *draw(st.lists(simple, max_size=2))]),
        ]
    if kind == "branches":
        return ["if n % 2:", *indented(step), "else:", *indented(step)]
    if kind == "with":
        return ["with context:", *indented(step)]
    if kind == "try":
        return ["try:", *indented(step), "finally:", INDENT + "pass"]
    if kind == "one-line":
        return ["; ".join(step)]
    return step


@st.composite
def bodies(draw) -> list[str]:
    before = draw(st.lists(simple, max_size=2))
    after = draw(st.lists(simple, max_size=2))
    rows = [
        *before,
        *(draw(leave) if draw(st.booleans()) else []),
        *draw(stepping()),
        *after,
        *(draw(leave) if draw(st.booleans()) else []),
        *draw(st.lists(simple, max_size=2)),
    ]
    return ["n += 1", *rows]


@st.composite
def nests(draw) -> str:
    rows = draw(bodies())
    head = draw(
        st.sampled_from(
            [
                "for i in range(9):",
                "for i, b in enumerate(range(9)):",
                "while n < 30:",
                "for b in bar(range(9)):",
            ]
        )
    )
    rows = [head, *indented(rows)]
    for outer in draw(
        st.lists(st.sampled_from(["for epoch in range(3):", "for _ in range(2):"]), max_size=2)
    ):
        rows = [
            outer,
            *indented(
                [*draw(st.lists(simple, max_size=1)), *rows, *draw(st.lists(simple, max_size=1))]
            ),
        ]
    start = ["n = 0", "total = 0", "best = 0"]
    if draw(st.booleans()):
        rows = [
            "def main():",
            *indented([*start, *rows, "return n, total, best"]),
            "result = main()",
        ]
    else:
        rows = [*start, *rows, "result = n, total, best"]
    head_rows = ["import torch", "trace = []", "opt = make_optimizer()"]
    return "\n".join([*head_rows, *rows]) + "\n"


class Counter:
    """Stands for everything that a generated script calls, and counts the optimizer's steps."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> None:
        self.steps += 1


def execute(source: bytes, recorded: list[str]) -> tuple[object, object, int]:
    """Run a generated script; a spy in the place of the drop-in writes down the calls."""
    spy = types.ModuleType("observability")
    for name in ("init", "watch", "validation", "log", "finish", "step"):
        setattr(spy, name, lambda *a, _n=name, **k: recorded.append(_n))
    spy.skip_epoch = spy.skip_batch = lambda *a: False
    spy.resume = lambda **d: next(iter(d.values())) if len(d) == 1 else tuple(d.values())
    optimizer = Counter()
    scope = {
        "make_optimizer": lambda: optimizer,
        "bar": lambda x: x,
        "Loss": lambda n: types.SimpleNamespace(backward=lambda: None),
        "context": Context(),
    }
    saved = {name: sys.modules.get(name) for name in ("observability", "torch")}
    sys.modules.update(observability=spy, torch=types.ModuleType("torch"))
    try:
        exec(compile(source, "generated", "exec"), scope)
    finally:
        sys.modules.update({k: v for k, v in saved.items() if v is not None})
        for name in [k for k, v in saved.items() if v is None]:
            del sys.modules[name]
    return scope["trace"], scope["result"], optimizer.steps


class Context:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


@settings(max_examples=300, deadline=None)
@given(nests())
def test_each_step_of_a_generated_loop_is_recorded_once(source):
    data = source.encode()
    result, found = patch(data)
    assert autopatch.reverse(result) == data
    recorded: list[str] = []
    before, after = execute(data, []), execute(result, recorded)
    assert after == before
    silent = any("leaves no room" in n.text for n in found.notes)
    steps = recorded.count("step")
    assert steps == before[2] or (silent and steps < before[2]), result.decode()


# --- Random edits ----------------------------------------------------------------------------
def random_edit(rows: list[str], rng: random.Random) -> list[str]:
    rows = list(rows)
    for _ in range(rng.randint(1, 4)):
        at, other = rng.randrange(len(rows)), rng.randrange(len(rows))
        kind = rng.randrange(7)
        if kind == 0:
            del rows[at]
        elif kind == 1:
            rows.insert(at, rows[other])
        elif kind == 2:
            rows[at], rows[other] = rows[other], rows[at]
        elif kind == 3:
            rows[at] = rows[at].replace("    ", "", 1)
        elif kind == 4:
            rows[at] = "    " + rows[at]
        elif kind == 5:
            rows[at] = rows[at].rstrip("\n") + rng.choice(
                [" \\\n", "; pass\n", "  # observability\n", "\r"]
            )
        else:
            rows[at] = rows[at].replace(
                rng.choice(["loss", "step", "(", "optimizer", "for", "in"]),
                rng.choice(["del x", "self.x", "[0]", "lambda: ", "", "obs"]),
                1,
            )
        if not rows:
            return ["\n"]
    return rows


@pytest.mark.parametrize("path", SHAPES, ids=lambda p: p.stem)
def test_random_edits_never_crash_it_nor_break_the_file(path):
    rng = random.Random(path.stem)
    rows = path.read_text().splitlines(keepends=True)
    outcomes = set()
    for _ in range(40):
        data = "".join(random_edit(rows, rng)).encode()
        try:
            result, _ = patch(data)
        except autopatch.PatchError:
            outcomes.add("refused")
            continue
        compile(result, "edited", "exec")
        assert autopatch.reverse(result) == data
        outcomes.add("patched")
    assert outcomes


# --- Command line ----------------------------------------------------------------------------
def test_default_prints_a_diff_of_added_lines_and_writes_nothing(script):
    before = script.read_bytes()
    done = run_tool(script)
    assert done.returncode == 0
    body = [
        row for row in done.stdout.splitlines() if row[:1] in "+-" and row[:3] not in ("+++", "---")
    ]
    assert len(body) == 9
    assert all(row.startswith("+") and row.endswith("# observability") for row in body)
    assert script.read_bytes() == before
    assert sorted(p.name for p in script.parent.iterdir()) == ["train.py"]


def test_write_then_reverse_gives_the_original_and_keeps_its_mode(script):
    before = script.read_bytes()
    script.chmod(0o755)
    assert run_tool(script, "--write").returncode == 0
    assert script.read_bytes() != before
    assert (script.parent / "train.py.before-observability").read_bytes() == before
    assert run_tool(script, "--reverse").returncode == 0
    assert script.read_bytes() == before
    assert script.stat().st_mode & 0o777 == 0o755
    assert not list(script.parent.glob("*.before-observability*"))


def test_reverse_keeps_what_the_user_edited_meanwhile(script):
    run_tool(script, "--write")
    edited = script.read_bytes().replace(b"lr=0.1", b"lr=0.2") + b"print('mine')\n"
    script.write_bytes(edited)
    original = (TESTS / "shapes" / "nested_main.py").read_bytes()
    assert run_tool(script, "--reverse").returncode == 0
    assert script.read_bytes() == original.replace(b"lr=0.1", b"lr=0.2") + b"print('mine')\n"
    assert (script.parent / "train.py.before-observability").exists()


def test_second_write_changes_nothing(script):
    run_tool(script, "--write")
    once = script.read_bytes()
    done = run_tool(script, "--write")
    assert done.returncode == 0
    assert "already patched" in done.stderr
    assert script.read_bytes() == once


def test_write_through_a_link_changes_the_file_behind_it(script):
    link = script.parent / "link.py"
    link.symlink_to(script)
    run_tool(link, "--write")
    assert link.is_symlink()
    assert b"obs.step" in script.read_bytes()


def test_uncommitted_changes_are_reported(script):
    def git(*args: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args],
            cwd=script.parent,
            check=True,
            capture_output=True,
        )

    git("init", "-q")
    git("add", "train.py")
    git("commit", "-qm", "x")
    assert "uncommitted" not in run_tool(script, "--write").stderr
    run_tool(script, "--reverse")
    script.write_bytes(script.read_bytes() + b"# mine\n")
    assert "has uncommitted changes" in run_tool(script, "--write").stderr


def test_backup_never_overwrites_another(script):
    other = script.parent / "train.py.before-observability"
    other.write_text("something else")
    run_tool(script, "--write")
    assert other.read_text() == "something else"
    assert (script.parent / "train.py.before-observability-2").exists()


@pytest.mark.parametrize(
    ("only", "present", "absent"),
    [
        ("log", ["obs.step(step, loss=loss"], ["skip_", "resume(", "validation("]),
        ("validation", ["obs.validation("], ["skip_", "resume("]),
        ("log,resume", ["skip_epoch", "resume("], ["validation("]),
    ],
)
def test_only_chooses_how_deep(script, only, present, absent):
    diff = run_tool(script, "--only", only).stdout
    assert all(text in diff for text in present)
    assert not any(text in diff for text in absent)


def test_unknown_part_is_a_usage_error(script):
    assert run_tool(script, "--only", "everything").returncode == 2


def test_check_says_what_was_found_and_how_surely(script):
    text = run_tool(script, "--check").stdout
    assert "resume: to be proved with prove.py --kill" in text
    record = json.loads(run_tool(script, "--check", "--json").stdout)
    assert record["found"]
    assert {i["kind"] for i in record["insertions"]} >= {
        "init",
        "watch",
        "step",
        "validation",
        "skip",
    }
    assert {i["confidence"] for i in record["insertions"]} <= {"sure", "likely"}


def test_check_of_a_script_without_a_loop_names_the_file_and_exits_1(tmp_path):
    path = tmp_path / "train.py"
    path.write_bytes((TESTS / "shapes" / "loop_elsewhere.py").read_bytes())
    done = run_tool(path, "--check", "--json")
    assert done.returncode == 1
    assert "engine.py" in json.loads(done.stdout)["why"]


@pytest.mark.parametrize("args", [["missing.py"], ["."]])
def test_unreadable_path_is_exit_2(tmp_path, args):
    done = run_tool(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot read" in done.stderr


def test_an_authors_line_with_the_marker_stays_and_is_in_nobodys_way(script):
    before = script.read_bytes() + b"print('x')  # observability\n"
    script.write_bytes(before)
    assert run_tool(script, "--write").returncode == 0
    assert script.read_bytes() != before
    assert run_tool(script, "--reverse").returncode == 0
    assert script.read_bytes() == before


MODULE = """import torch
{first}
class Trainer:
    def __init__(self, model):
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run(self):
        for step in range(3):
            loss = self.model(torch.randn(2, 4)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        print("trained", step + 1)
"""


OF_MAIN = """import argparse
import torch


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr={lr})
    for step in range(3):
        loss = model(torch.ones(2, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    args = parser.parse_args()
    train(torch.nn.Linear(4, 1))
"""


def test_a_function_is_given_nothing_that_only_a_file_that_is_run_has(tmp_path):
    path = tmp_path / "trainer.py"
    path.write_text(OF_MAIN.format(lr=0.1))
    assert run_tool(path, "--write").returncode == 0
    main = tmp_path / "main.py"
    main.write_text("import torch, trainer\ntrainer.train(torch.nn.Linear(4, 1))\n")
    done = python(main, cwd=tmp_path)
    assert "completed at step 2" in done.stderr, done.stderr


def test_a_function_that_reads_the_arguments_of_main_itself_keeps_them():
    result, _ = patch(OF_MAIN.format(lr="args.lr").encode())
    assert b"obs.init(config=vars(args))" in result


@pytest.mark.parametrize("first", ["", "from .bits import Bits"], ids=["absolute", "relative"])
@pytest.mark.parametrize("init", [True, False], ids=["package", "namespace"])
@pytest.mark.parametrize(
    "use",
    [
        "from mini.trainer import Trainer",
        "import mini.trainer\nTrainer = mini.trainer.Trainer",
        "from mini import trainer\nTrainer = trainer.Trainer",
    ],
)
def test_a_module_of_a_package_finds_the_drop_in_by_its_package(tmp_path, use, init, first):
    package = tmp_path / "mini"
    package.mkdir()
    (package / "bits.py").write_text("Bits = 1\n")
    if init:
        (package / "__init__.py").touch()
    (package / "trainer.py").write_text(MODULE.format(first=first))
    main = tmp_path / "main.py"
    main.write_text(f"import torch\n{use}\nTrainer(torch.nn.Linear(4, 1)).run()\n")
    assert run_tool(package / "trainer.py", "--write").returncode == 0
    done = python(main, cwd=tmp_path)
    assert "trained 3" in done.stdout, done.stderr
    assert "completed at step 2" in done.stderr


@pytest.mark.parametrize("guard", ["", 'if __name__ == "__main__":\n    pass\n'])
def test_a_script_beside_an_init_file_is_still_a_script(tmp_path, guard):
    (tmp_path / "__init__.py").touch()
    path = tmp_path / "train.py"
    path.write_bytes((TESTS / "shapes" / "nameless_loss.py").read_bytes() + guard.encode())
    assert "+import observability as obs" in run_tool(path).stdout


# --- Ready patches ---------------------------------------------------------------------------
@pytest.fixture
def pinned(script) -> Path:
    path = script.parent / "train.patch"
    path.write_text(run_tool(script, "--pin").stdout)
    return path


def test_pinned_patch_holds_added_lines_only_and_gives_the_same_file(script, pinned):
    rows = pinned.read_text().splitlines()
    assert all(row.startswith(("+", "@@", "# ", "--- ")) for row in rows)
    assert all(",0 +" in row for row in rows if row.startswith("@@"))
    expected, _ = patch(script.read_bytes())
    before = script.read_bytes()
    assert run_tool(script, "--patch", pinned).returncode == 0
    assert script.read_bytes() == expected
    assert run_tool(script, "--reverse").returncode == 0
    assert script.read_bytes() == before


def test_pinned_patch_is_refused_on_any_other_file(script, pinned):
    script.write_bytes(b"\n" + script.read_bytes())
    before = script.read_bytes()
    done = run_tool(script, "--patch", pinned)
    assert done.returncode == 2
    assert "sha256" in done.stderr
    assert script.read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("+    obs.finish()  # observability", "+    obs.finish()", "do not end in"),
        (
            "+    obs.finish()  # observability",
            "-    obs.finish()  # observability",
            "removes a line",
        ),
        ("+    obs.finish()", "+        obs.finish()", "damaged"),
        ("# sha256", "# sha512", "does not say"),
    ],
)
def test_damaged_patch_is_refused(script, pinned, old, new, why):
    pinned.write_text(pinned.read_text().replace(old, new))
    before = script.read_bytes()
    done = run_tool(script, "--patch", pinned)
    assert done.returncode == 2
    assert why in done.stderr
    assert script.read_bytes() == before


def test_pinned_patch_says_when_it_is_already_applied(script, pinned):
    run_tool(script, "--patch", pinned)
    assert "already patched" in run_tool(script, "--patch", pinned).stderr


def test_pin_of_a_patched_file_keeps_what_was_changed_by_hand(script, tmp_path):
    original = script.read_bytes()
    run_tool(script, "--write")
    observed = script.read_bytes().replace(b"obs.init()", b'obs.init("mine")')
    script.write_bytes(observed)
    ready = tmp_path / "hand.patch"
    ready.write_text(run_tool(script, "--pin").stdout)
    script.write_bytes(original)
    assert run_tool(script, "--patch", ready).returncode == 0
    assert script.read_bytes() == observed


BESIDE = """import torch
from {module} import Paced
model = torch.nn.Linear(1, 1)
opt = Paced(torch.optim.SGD(model.parameters(), 1))
for step in range(9):
    {first}
    loss = model(torch.zeros(1)).sum()
    loss.backward()
    opt.{method}()
"""


@pytest.mark.parametrize(
    ("module", "first", "method", "reason"),
    [
        ("parts.pace", "pass", "step_and_update_lr", "Paced has no state_dict to save"),
        ("elsewhere", "pass", "step_and_update_lr", ""),
        ("elsewhere", "pass", "second_step", "whose state its state_dict may leave out"),
        ("elsewhere", "opt.base_optimizer.zero_grad()", "second_step", ""),
    ],
)
def test_an_imported_optimizer_is_resumed_unless_something_is_known_against_it(
    tmp_path, module, first, method, reason
):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "pace.py").write_text("class Paced:\n    def step(self): pass\n")
    source = BESIDE.format(module=module, first=first, method=method)
    _, found = autopatch.patch(source.encode(), folder=tmp_path)
    assert [note.text.endswith(reason) for note in found.notes] == [True] * bool(reason)


def test_resume_is_left_out_where_a_line_would_be_too_wide_to_carry():
    source = (TESTS / "shapes" / "branches_both_step.py").read_text()
    result, found = patch(source.replace("updates", "updates_" + "x" * 20).encode())
    assert found.parts["resume"] == "no"
    assert "no room to carry self.updates_x" in "".join(note.text for note in found.notes)
    assert max(map(len, added(result))) <= 100


def test_resume_is_left_out_where_more_happens_behind_a_branch_that_steps():
    source = (TESTS / "shapes" / "branches_both_step.py").read_text()
    rest = source[source.index("            if self.updates % 2") : source.index("    def train(")]
    said = [note.text for note in patch(source.encode())[1].notes]
    assert said == ["resume is left out: more happens after the branch that steps, unseen"]
    whole = patch(source.replace(rest, "\n").encode())[1]
    assert (whole.notes, whole.parts["resume"]) == ([], autopatch.TO_BE_PROVED)


FILLS = """import torch
model = torch.nn.Linear(1, 1)
opt = torch.optim.SGD(model.parameters(), 1)
state = dict(model=model, optimizer=opt, step=0)
batches = iter(loader)
def draw(batches):
    return next(batches)
def train(seen):
    for step in range(9):
        {first}
        loss = model({read}).sum()
        loss.backward()
        {step}.step()
seen = []
train(seen)
"""


@pytest.mark.parametrize(
    ("first", "read", "step", "reason"),
    [
        ("pass", "torch.zeros(1)", "opt", ""),
        ("pass", "torch.zeros(1)", 'state["optimizer"]', ""),
        ("pass", "draw(batches)", "opt", "next() is called in the middle"),
        ("seen.append(step)", "torch.zeros(1)", "opt", "seen is filled here for the caller"),
        (
            'state["step"] += 1',
            "torch.zeros(1)",
            'state["optimizer"]',
            "state changes beside model",
        ),
    ],
)
def test_resume_is_left_out_where_no_line_could_give_the_state_back(first, read, step, reason):
    source = FILLS.format(first=first, read=read, step=step)
    result, found = patch(source.encode())
    assert b"obs.watch(model, optimizer=opt)" in result
    assert [reason in note.text for note in found.notes] == [True] * bool(reason)


SOURCES = """import torch
class Loader:
    def __init__(self): self.position = 0
    def batch(self):
        self.position += 1
        return torch.zeros(1)
class Patience:
    def __init__(self): self.count = 0
    def __call__(self, step): self.count += 1
model = torch.nn.Linear(1, 1)
opt = torch.optim.SGD(model.parameters(), 1)
source = {make}
for step in range(9):
    {first}
    x = {read}
    loss = model(x).sum()
    loss.backward()
    opt.step()
"""


@pytest.mark.parametrize(
    ("make", "first", "read", "resume"),
    [
        ("Loader()", "pass", "source.batch()", "no"),
        ("Buffer()", "pass", "source.sample(3)", "no"),
        ("ModelEMA(model)", "source.update(model)", "torch.zeros(1)", "no"),
        ("make_task(model)", "source.update_ema(model)", "torch.zeros(1)", "no"),
        ("AverageMeter()", "source.update(1)", "torch.zeros(1)", "yes"),
        ("Patience()", "source(step)", "torch.zeros(1)", "no"),
        ("1; avg = [p.clone() for p in model.parameters()]", "print(avg)", "torch.zeros(1)", "no"),
        ("iter(loader)", "print(step)", "next(source)", "no"),
        ("iter(loader)", "y = next(source)", "next(source)", "yes"),
    ],
)
def test_resume_is_left_out_where_state_lies_elsewhere(make, first, read, resume):
    source = SOURCES.format(make=make, first=first, read=read)
    result, found = patch(source.encode())
    assert (found.parts["resume"] != "no") is (resume == "yes")
    if "next(" in read and resume == "yes":
        rows = result.decode().splitlines()
        assert "skip_batch" in rows[rows.index("    x = next(source)") + 1]
