"""Promises of the checkpoint store and of the saver."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import python
from torch import nn

import observability as obs


def put(store: obs.CheckpointStore, step: int, **state: Any) -> Path:
    return store.commit(step, {"model.pth": b"weights " * step}, lambda: state)


def watched(*models: Any, optimizer: Any = (), scheduler: Any = ()) -> dict[str, list[Any]]:
    given = {"model": models, "optimizer": optimizer, "scheduler": scheduler}
    return {kind: list(given.get(kind, ())) for kind in obs.KINDS}


def save(store: obs.CheckpointStore, step: int, parts: Any, saver: obs.Saver | None = None) -> bool:
    """To its end; False where it failed."""
    saver = saver or obs.Saver(store)
    before = saver.failed
    assert saver.save(step, lambda: {"rng_state.pt": {}, **parts}, dict, wait=60)
    return saver.failed == before


@contextmanager
def no_more_threads() -> Iterator[None]:
    """As where a limit on processes is reached: each would want more memory than there is."""
    before = threading.stack_size(1 << 46)
    try:
        yield
    finally:
        threading.stack_size(before)


@pytest.fixture
def store(tmp_path: Path) -> obs.CheckpointStore:
    return obs.CheckpointStore(tmp_path / "out" / "run" / "checkpoints", keep_last=2)


def steps(store: obs.CheckpointStore) -> list[int]:
    return sorted(int(path.name[5:]) for path in store.directory.glob("step_*"))


class Tied(nn.Module):
    """All that a state can hold: tied weights, views, strides, 0-d, mixed dtypes, a non-number."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 16)
        self.norm = nn.BatchNorm1d(16)
        self.low = nn.Linear(16, 16).bfloat16()
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.emb.weight
        wide = torch.randn(6, 8)
        self.register_buffer("strided", wide.t()[1:5:2])
        self.register_buffer("view", wide[2:4])
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("special", torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]))
        self.register_buffer("flags", torch.tensor([True, False, True]))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.emb(ids))
        return self.head(self.low(hidden.bfloat16()).float())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 50, (8,))
        loss = nn.functional.cross_entropy(model(ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def bits(tree: object) -> object:
    """A tree in a form that compares bit for bit."""
    if isinstance(tree, torch.Tensor):
        raw = tree.detach().contiguous().view(-1).view(torch.uint8) if tree.numel() else tree
        return str(tree.dtype), tuple(tree.shape), raw.tolist()
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    return [bits(item) for item in tree] if isinstance(tree, (list, tuple)) else tree


def test_a_snapshot_is_exact_though_training_goes_on(store):
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 2)
    saver = obs.Saver(store)
    for step in (1, 2, 3):  # the first makes the arena, the others use it again
        train(model, optimizer, 1)
        history = [torch.zeros(3), {"all": [1.0]}]
        state = watched(model, optimizer=[optimizer])
        parts = {**obs.capture(state), "rng_state.pt": {"carry": history, "own": [1, (2, 3)]}}
        expected = bits(copy.deepcopy(parts))
        assert saver.save(step, lambda parts=parts: parts, dict)
        train(model, optimizer, 3)
        history[0] += 1
        history[1]["all"].append(2.0)
        assert saver.wait(30)
        assert saver.failed == 0
        saved = {n: torch.load(store.path(step) / n, weights_only=True) for n in parts}
        assert bits(saved) == expected


def test_tied_weights_stay_tied_and_are_stored_once(store):
    model = Tied()
    assert save(store, 1, obs.capture(watched(model)))
    saved = torch.load(store.path(1) / "model.pth", weights_only=True)
    assert saved["emb.weight"].data_ptr() == saved["head.weight"].data_ptr()
    assert saved["strided"].stride() == model.strided.stride()
    assert saved._metadata == model.state_dict()._metadata
    own = sum(s.nbytes() for s in {t.untyped_storage() for t in model.state_dict().values()})
    assert (store.path(1) / "model.pth").stat().st_size < own + 500 * 20


def test_a_scheduler_s_milestones_are_saved_as_they_are(store):
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 3, 3])
    assert save(store, 1, obs.capture(watched(model, optimizer=[optimizer], scheduler=[scheduler])))
    saved = torch.load(store.path(1) / "optimizer.pt", weights_only=True)
    assert saved["scheduler"]["milestones"] == scheduler.milestones


@pytest.mark.parametrize("name", ["SGD", "AdamW", "LBFGS"])
def test_a_restored_run_goes_on_to_the_same_digits(store, name):
    def build() -> dict[str, list[Any]]:
        torch.manual_seed(7)
        model = nn.Linear(20, 1)
        options = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=np.float64(0.01), **options)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
        return watched(model, optimizer=[optimizer], scheduler=[scheduler])

    def run(things: dict[str, list[Any]], count: int) -> list[float]:
        [model], [optimizer], [scheduler] = list(things.values())[:3]

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(x) - x.sum(1, keepdim=True) * random.random()).square().mean()
            loss.backward()
            return loss

        losses = []
        for _ in range(count):
            x = torch.rand(16, 20) + np.random.rand()
            losses.append(optimizer.step(closure).item())
            scheduler.step()
        return losses

    things = build()
    run(things, 5)
    saver = obs.Saver(store)
    saver.save(5, lambda: {**obs.capture(things), "rng_state.pt": obs.rng_state(())}, dict)
    expected = run(things, 5)
    assert saver.wait(60)
    again = build()
    _, rng = obs.restore(store.path(5), again)
    obs.set_rng_state(rng, ())
    assert run(again, 5) == expected


def test_saving_draws_no_random_number_and_changes_no_state(store):
    state = watched(Tied())
    before = bits([obs.capture(state), random.getstate(), torch.get_rng_state()])
    assert save(store, 1, obs.capture(state))
    assert bits([obs.capture(state), random.getstate(), torch.get_rng_state()]) == before


def test_a_different_model_is_named_before_anything_changes(store):
    save(store, 1, obs.capture(watched(nn.Linear(3, 4))))
    other = nn.ModuleDict({"weight": nn.Linear(1, 1)})
    with pytest.raises(obs.CheckpointError, match=r"missing: weight\.bias.*unexpected: bias"):
        obs.restore(store.path(1), watched(other))
    narrow = nn.Linear(2, 4)
    before = bits(narrow.state_dict())
    with pytest.raises(obs.CheckpointError, match=r"weight \(4, 3\), \(4, 2\)"):
        obs.restore(store.path(1), watched(narrow))
    assert bits(narrow.state_dict()) == before


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_what_is_watched_is_named_with_both_counts(store, count):
    models = [nn.Linear(2, 3) for _ in range(2)]
    save(store, 1, obs.capture(watched(*models)))
    others = [nn.Linear(2, 3) for _ in range(count)]
    before = bits([model.state_dict() for model in others])
    with pytest.raises(obs.CheckpointError, match=rf"2 of kind model.*was given {count}|different"):
        obs.restore(store.path(1), watched(*others))
    assert bits([model.state_dict() for model in others]) == before


def test_several_models_and_optimizers_come_back(store):
    models = [nn.Linear(2, 3), nn.Linear(4, 5)]
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1 + i) for i, m in enumerate(models)]
    save(store, 1, obs.capture(watched(*models, optimizer=optimizers)))
    twins = [nn.Linear(2, 3), nn.Linear(4, 5)]
    others = [torch.optim.Adam(m.parameters()) for m in twins]
    obs.restore(store.path(1), watched(*twins, optimizer=others))
    assert bits([m.state_dict() for m in twins]) == bits([m.state_dict() for m in models])
    assert [o.param_groups[0]["lr"] for o in others] == [0.1, 1.1]


def test_other_tools_read_the_plain_state_dicts_of_one_model_and_one_optimizer(store):
    model = nn.Linear(2, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    save(store, 1, obs.capture(watched(model, optimizer=[optimizer])))
    nn.Linear(2, 3).load_state_dict(torch.load(store.path(1) / "model.pth"))
    saved = torch.load(store.path(1) / "optimizer.pt")
    torch.optim.Adam(nn.Linear(2, 3).parameters()).load_state_dict(saved["optimizer"])
    assert bits(saved["optimizer"]) == bits(optimizer.state_dict())


# --- What is kept ---------------------------------------------------------------------------------


def test_the_last_the_best_and_the_resumed_one_are_kept(store):
    store.keep = {put(store, 1)}
    for step in (2, 3, 4):
        put(store, step)
        if step == 3:
            store.link("best", store.path(3))
    put(store, 5)
    put(store, 6)
    assert steps(store) == [1, 3, 5, 6]
    assert obs.best_ckpt(store.directory) == store.path(3)


def test_links_are_relative_so_that_a_folder_may_be_moved(store):
    store.link("best", put(store, 1))
    put(store, 2)
    moved = store.directory.rename(store.directory.with_name("elsewhere"))
    assert (moved / "latest").resolve() == moved / "step_00000002"
    assert (moved / "best").resolve() == moved / "step_00000001"
    assert os.readlink(moved / "latest") == "step_00000002"


def test_what_is_not_exactly_a_step_of_ours_is_neither_read_nor_removed(store):
    for step in (1, 2):
        put(store, step)
    others = ["step_00000001_backup", "step_00000009.keep", "step_9", "my step_00000009"]
    for name in others:
        shutil.copytree(store.path(2), store.directory / name)
    for step in (3, 4, 5):
        put(store, step)
    assert obs.latest_ckpt(store.directory) == store.path(5)
    assert {path.name for path in store.directory.iterdir()} == {
        *others,
        "step_00000004",
        "step_00000005",
        "latest",
    }


def test_another_runs_step_in_the_same_folder_is_neither_replaced_nor_removed(tmp_path):
    one = obs.CheckpointStore(tmp_path, "one", keep_last=1)
    other = obs.CheckpointStore(tmp_path, "other", keep_last=1)
    mine = put(one, 5).joinpath("state.json").read_bytes()
    with pytest.raises(obs.CheckpointError, match="step_00000005 is another run's"):
        put(other, 5)
    put(other, 6)
    put(other, 7)
    assert steps(other) == [5, 7]
    assert one.path(5).joinpath("state.json").read_bytes() == mine
    put(one, 8)
    assert steps(one) == [7, 8]


def test_saving_goes_on_where_somebody_has_removed_the_folder(store):
    put(store, 1)
    shutil.rmtree(store.directory)
    put(store, 2)
    shutil.rmtree(store.directory.parent)
    put(store, 3)
    assert obs.latest_ckpt(store.directory) == store.path(3)


# --- Which is the newest --------------------------------------------------------------------------


def test_latest_follows_the_commits_not_the_clock_or_the_step(store):
    put(store, 10)
    put(store, 7)  # after a resume from further back
    os.utime(store.path(10))
    assert obs.latest_ckpt(store.directory) == store.path(7)
    again = obs.CheckpointStore(store.directory)  # as a new process has it
    put(again, 3)
    assert obs.latest_ckpt(store.directory) == store.path(3)


def test_a_step_that_is_redone_replaces_the_old_one(store):
    put(store, 3, version=1)
    put(store, 3, version=2)
    assert obs.read_state(store.path(3))["version"] == 2
    assert {path.name for path in store.directory.iterdir()} == {"step_00000003", "latest"}


def test_latest_skips_a_torn_step_and_never_starts_over(store, capfd):
    put(store, 1)
    put(store, 2)
    assert not list(store.directory.glob(".*"))
    os.truncate(store.path(2) / "model.pth", 3)
    assert obs.latest_ckpt(store.directory) == store.path(1)
    assert "model.pth is not what was written" in capfd.readouterr().err
    (store.path(1) / "state.json").unlink()
    with pytest.raises(obs.CheckpointError, match=r"no checkpoint in .* is whole"):
        obs.latest_ckpt(store.directory)
    for step in (1, 2):  # also when the bad ones are already set aside
        store.path(step).rename(store.directory / f".corrupt-step_0000000{step}-1")
    with pytest.raises(obs.CheckpointError, match=r"no checkpoint in .* is whole"):
        obs.latest_ckpt(store.directory)


def test_latest_is_none_where_nothing_was_saved(tmp_path):
    assert obs.latest_ckpt(tmp_path / "absent") is None
    (tmp_path / ".tmp-step_00000001-1-1").mkdir()
    assert obs.latest_ckpt(tmp_path) is None


def test_dead_leftovers_are_swept_and_live_ones_are_not(store):
    dead, live = store.directory / ".tmp-step_1-1-1", store.directory / ".tmp-step_2-1-1"
    dead.mkdir()
    live.mkdir()
    with obs.locked(live):
        obs.CheckpointStore(store.directory)
    assert not dead.exists()
    assert live.exists()


def test_state_json_is_strict_about_each_of_its_bytes(store):
    path = put(store, 1, epoch=3) / "state.json"
    assert json.loads(path.read_bytes())["epoch"] == 3
    path.write_bytes(path.read_bytes() + b"\n")
    assert not obs.is_valid_ckpt(path.parent)


# --- Saving behind the loop -----------------------------------------------------------------------


def test_a_save_that_comes_too_early_is_skipped_and_counted_and_a_final_one_waits(store):
    gate, entered = threading.Event(), threading.Event()

    def slow() -> dict[str, Any]:
        entered.set()
        assert gate.wait(30)
        return {}

    saved: list[Path] = []
    saver = obs.Saver(store)
    parts = obs.capture(watched(nn.Linear(2, 2)))
    assert saver.save(1, lambda: parts, slow, saved.append)
    assert entered.wait(30)
    assert not saver.save(2, lambda: parts, dict, saved.append)
    assert saver.skipped == 1
    assert not saver.wait(0.01)
    threading.Timer(0.1, gate.set).start()
    assert saver.save(3, lambda: parts, dict, saved.append, wait=60)
    assert saved == [store.path(1), store.path(3)]
    assert saver.save(3, lambda: parts, dict, saved.append, wait=60)  # already there
    assert len(saved) == 2


def test_a_state_that_cannot_be_saved_is_a_warning_not_an_exception(store, capfd):
    saver = obs.Saver(store)
    parts = obs.capture(watched(nn.Linear(2, 2)))
    assert save(store, 1, parts, saver)
    assert not save(store, 2, {"rng_state.pt": {"hook": threading.Lock()}}, saver)
    assert "step 2 was not saved" in capfd.readouterr().err
    assert obs.latest_ckpt(store.directory) == store.path(1)
    assert save(store, 2, parts, saver)


@pytest.mark.parametrize("name", ["model.pth", "optimizer.pt", "rng_state.pt"])
def test_a_state_that_would_not_load_as_data_is_not_called_saved(store, capfd, name):
    assert not save(store, 1, {name: {"path": Path("x")}})
    assert "PosixPath" in capfd.readouterr().err
    assert steps(store) == []


def test_the_state_may_change_its_tensors_between_saves(store):
    saver = obs.Saver(store)
    for step, width in enumerate((4, 4, 900, 3), start=1):
        state = {"w": torch.randn(width, width), "small": torch.ones(step)}
        assert save(store, step, {"model.pth": state}, saver)
        saved = torch.load(store.path(step) / "model.pth", weights_only=True)
        assert bits(saved) == bits(state)


def test_without_a_thread_to_be_had_the_loop_itself_saves(store):
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    saver = obs.Saver(store)
    parts = obs.capture(watched(nn.Linear(2, 2)))
    with no_more_threads():
        saver.prepare(parts)
        assert save(store, 1, parts, saver)
    assert save(store, 2, parts, saver)
    assert steps(store) == [1, 2]
    assert os.getpriority(os.PRIO_PROCESS, 0) == niceness


def test_the_store_works_without_torch(store):
    put(store, 1)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import observability as obs; print(obs.latest_ckpt(sys.argv[1]))"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(obs.__file__).parent)}
    done = python("-c", code, store.directory, env=env)
    assert done.stdout.strip() == str(store.path(1))


def test_a_step_directory_lists_what_the_runbook_says(store):
    parts = {**obs.capture(watched(nn.Linear(2, 2))), "run_manifest.json": b"{}"}
    save(store, 12, parts)
    assert store.path(12).name == "step_00000012"
    names = {"model.pth", "optimizer.pt", "rng_state.pt", "state.json", "run_manifest.json"}
    assert {path.name for path in store.path(12).iterdir()} == names


def test_the_weights_alone_are_published_whole(store, tmp_path):
    model = nn.Linear(2, 2)
    save(store, 1, obs.capture(watched(model)))
    target = tmp_path / "out" / "pretrain_512.pth"
    for _ in range(2):  # over an older one as well
        obs.publish_weights(store.path(1), target)
    assert bits(torch.load(target, weights_only=True)) == bits(model.state_dict())
    assert [p.name for p in target.parent.glob("*.pth")] == ["pretrain_512.pth"]


def test_a_script_that_writes_the_published_file_itself_does_not_write_into_a_checkpoint(
    store, tmp_path
):
    save(store, 1, obs.capture(watched(nn.Linear(2, 2))))
    target = tmp_path / "weights.pth"
    obs.publish_weights(store.path(1), target)
    torch.save({"other": torch.zeros(1)}, target)
    with open(target, "wb") as file:
        file.write(b"torn")
    assert obs.is_valid_ckpt(store.path(1))


def test_the_writer_leaves_the_priority_of_the_loop_alone(store):
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    saver = obs.Saver(store)
    saver.prepare(obs.capture(watched(nn.Linear(2, 2))))
    assert saver.wait(30)
    assert os.getpriority(os.PRIO_PROCESS, 0) == niceness
