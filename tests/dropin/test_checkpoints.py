"""Promises of the checkpoint store and of the saver."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import observability as obs


def put(store: obs.CheckpointStore, step: int, **state: object) -> Path:
    return store.commit(step, {"model.pth": b"weights " * step}, state)


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
    saver = obs.Saver(store, [optimizer], warn=pytest.fail)
    for step in (1, 2, 3):  # the first makes the arena, the others use it again
        train(model, optimizer, 1)
        parts = obs.capture([model], [optimizer], carry={"batch": torch.arange(9.0)[::2]})
        expected = bits(copy.deepcopy(parts))
        assert saver.save(step, parts, {})
        train(model, optimizer, 3)
        assert saver.wait(30)
        saved = {n: torch.load(store.path(step) / n, weights_only=True) for n in parts}
        assert bits(saved) == expected


def test_tied_weights_stay_tied_and_are_stored_once(store):
    model = Tied()
    obs.Saver(store, warn=pytest.fail).save(1, obs.capture([model]), {}, wait=60)
    saved = torch.load(store.path(1) / "model.pth", weights_only=True)
    assert saved["emb.weight"].data_ptr() == saved["head.weight"].data_ptr()
    assert saved["strided"].stride() == model.strided.stride()
    assert saved._metadata == model.state_dict()._metadata
    own = sum(s.nbytes() for s in {t.untyped_storage() for t in model.state_dict().values()})
    assert (store.path(1) / "model.pth").stat().st_size < own + 500 * 20


@pytest.mark.parametrize("name", ["SGD", "AdamW", "LBFGS"])
def test_a_restored_run_goes_on_to_the_same_digits(store, name):
    def build() -> tuple[nn.Module, torch.optim.Optimizer, object]:
        torch.manual_seed(7)
        model = nn.Linear(20, 1)
        options = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=np.float64(0.01), **options)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)

    def run(model, optimizer, scheduler, count):
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

    model, optimizer, scheduler = build()
    run(model, optimizer, scheduler, 5)
    saver = obs.Saver(store, [optimizer], warn=pytest.fail)
    saver.save(5, obs.capture([model], [optimizer], [scheduler]), {}, wait=60)
    expected = run(model, optimizer, scheduler, 5)
    again = build()
    rng = obs.restore(store.path(5), *([thing] for thing in again))
    obs.set_rng_state(rng)
    assert run(*again, 5) == expected


def test_saving_draws_no_random_number_and_changes_no_state(store):
    model = Tied()
    before = bits([obs.capture([model]), random.getstate()])
    obs.Saver(store, warn=pytest.fail).save(1, obs.capture([model]), {}, wait=60)
    assert bits([obs.capture([model]), random.getstate()]) == before


def test_a_different_model_is_named_before_anything_changes(store):
    obs.Saver(store).save(1, obs.capture([nn.Linear(3, 4)]), {}, wait=60)
    other = nn.ModuleDict({"weight": nn.Linear(1, 1)})
    with pytest.raises(obs.CheckpointError, match=r"missing: weight\.bias.*unexpected: bias"):
        obs.restore(store.path(1), [other])
    narrow = nn.Linear(2, 4)
    before = bits(narrow.state_dict())
    with pytest.raises(obs.CheckpointError, match=r"weight \(4, 3\), \(4, 2\)"):
        obs.restore(store.path(1), [narrow])
    assert bits(narrow.state_dict()) == before


def test_several_models_and_optimizers_come_back(store):
    models = [nn.Linear(2, 3), nn.Linear(4, 5)]
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1 + i) for i, m in enumerate(models)]
    obs.Saver(store).save(1, obs.capture(models, optimizers), {}, wait=60)
    twins = [nn.Linear(2, 3), nn.Linear(4, 5)]
    others = [torch.optim.Adam(m.parameters()) for m in twins]
    obs.restore(store.path(1), twins, others)
    assert bits([m.state_dict() for m in twins]) == bits([m.state_dict() for m in models])
    assert [o.param_groups[0]["lr"] for o in others] == [0.1, 1.1]


def test_the_last_the_best_and_the_resumed_one_are_kept(store):
    store.resumed_from = put(store, 1)
    for step, loss in {2: 3.0, 3: 1.5, 4: 2.0, 5: float("nan"), 6: 1.6}.items():
        put(store, step, val_loss=loss)
    assert steps(store) == [1, 3, 5, 6]
    assert obs.best_ckpt(store.directory) == store.path(3)


def test_latest_follows_the_commits_not_the_clock_or_the_step(store):
    put(store, 10)
    put(store, 7)  # after a resume from further back
    os.utime(store.path(10))
    assert obs.latest_ckpt(store.directory) == store.path(7)


def test_a_step_that_is_redone_replaces_the_old_one(store):
    put(store, 3, version=1)
    put(store, 3, version=2)
    assert obs.read_state(store.path(3))["version"] == 2
    assert list(store.directory.iterdir()) == [store.path(3)]


def test_latest_skips_a_torn_step_and_never_starts_over(store):
    put(store, 1)
    put(store, 2)
    assert not list(store.directory.glob(".*"))
    os.truncate(store.path(2) / "model.pth", 3)
    said: list[str] = []
    assert obs.latest_ckpt(store.directory, warn=said.append) == store.path(1)
    assert "model.pth is not what was written" in said[0]
    (store.path(1) / "state.json").unlink()
    for _ in range(2):  # also when the bad ones are already set aside
        with pytest.raises(obs.CheckpointError, match="step_00000001"):
            obs.latest_ckpt(store.directory, warn=said.append)


def test_latest_is_none_where_nothing_was_saved(tmp_path):
    assert obs.latest_ckpt(tmp_path / "absent") is None
    (tmp_path / ".tmp-step_00000001-1-1").mkdir()
    assert obs.latest_ckpt(tmp_path) is None


def test_dead_leftovers_are_swept_and_live_ones_are_not(store):
    dead, live = store.directory / ".tmp-step_1-1-1", store.directory / ".tmp-step_2-1-1"
    dead.mkdir()
    live.mkdir()
    with obs._locked(live):
        obs.CheckpointStore(store.directory)
    assert not dead.exists()
    assert live.exists()


def test_state_json_is_strict_about_each_of_its_bytes(store):
    path = put(store, 1, epoch=3) / "state.json"
    assert json.loads(path.read_bytes())["epoch"] == 3
    path.write_bytes(path.read_bytes() + b"\n")
    assert not obs.is_valid_ckpt(path.parent)


def test_a_save_that_comes_too_early_is_skipped_and_counted_and_a_final_one_waits(store):
    gate, entered = threading.Event(), threading.Event()
    commit = store.commit

    class Slow(obs.CheckpointStore):
        def commit(self, *args, **kwargs):
            entered.set()
            assert gate.wait(30)
            return commit(*args, **kwargs)

    saved: list[Path] = []
    saver = obs.Saver(Slow(store.directory), warn=pytest.fail, on_saved=saved.append)
    parts = obs.capture([nn.Linear(2, 2)])
    assert saver.save(1, parts, {})
    assert entered.wait(30)
    assert not saver.save(2, parts, {})
    assert saver.skipped == 1
    assert not saver.wait(0.01)
    threading.Timer(0.1, gate.set).start()
    assert saver.save(3, parts, {}, wait=60)
    assert saved == [store.path(1), store.path(3)]
    assert not saver.save(3, parts, {}, wait=60)  # already there


def test_a_state_that_cannot_be_saved_is_a_warning_not_an_exception(store):
    said: list[str] = []
    saver = obs.Saver(store, warn=said.append)
    assert saver.save(1, obs.capture([nn.Linear(2, 2)]), {}, wait=60)
    saver.save(2, {"model.pth": {"hook": threading.Lock()}}, {}, wait=60)
    assert saver.failed == 1
    assert "step 2 was not saved" in said[0]
    assert obs.latest_ckpt(store.directory) == store.path(1)
    assert saver.save(2, obs.capture([nn.Linear(2, 2)]), {}, wait=60)


def test_a_state_that_would_not_load_as_data_is_not_called_saved(store):
    said: list[str] = []
    saver = obs.Saver(store, warn=said.append)
    saver.save(1, {"model.pth": {"path": Path("x")}}, {}, wait=60)
    assert "PosixPath" in said[0]
    assert steps(store) == []


def test_the_state_may_change_its_tensors_between_saves(store):
    saver = obs.Saver(store, warn=pytest.fail)
    for step, width in enumerate((4, 4, 900, 3), start=1):
        state = {"w": torch.randn(width, width), "small": torch.ones(step)}
        assert saver.save(step, {"model.pth": state}, {}, wait=60)
        saved = torch.load(store.path(step) / "model.pth", weights_only=True)
        assert bits(saved) == bits(state)


def test_the_store_works_without_torch(store):
    put(store, 1)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import observability as obs; print(obs.latest_ckpt(sys.argv[1]))"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(obs.__file__).parent)}
    command = [sys.executable, "-c", code, str(store.directory)]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(store.path(1))


def test_a_step_directory_lists_what_the_runbook_says(store):
    model = nn.Linear(2, 2)
    saver = obs.Saver(store, warn=pytest.fail)
    saver.save(12, {**obs.capture([model]), "run_manifest.json": b"{}"}, {}, wait=60)
    assert store.path(12).name == "step_00000012"
    names = {"model.pth", "optimizer.pt", "rng_state.pt", "state.json", "run_manifest.json"}
    assert {path.name for path in store.path(12).iterdir()} == names


def test_the_weights_alone_are_published_whole(store, tmp_path):
    model = nn.Linear(2, 2)
    obs.Saver(store, warn=pytest.fail).save(1, obs.capture([model]), {}, wait=60)
    target = tmp_path / "out" / "pretrain_512.pth"
    for _ in range(2):  # over an older one as well
        obs.publish_weights(store.path(1), target)
    assert bits(torch.load(target, weights_only=True)) == bits(model.state_dict())
    assert [p.name for p in target.parent.glob("*.pth")] == ["pretrain_512.pth"]


def test_the_writer_leaves_the_priority_of_the_loop_alone(store):
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    saver = obs.Saver(store, warn=pytest.fail)
    saver.prepare(obs.capture([nn.Linear(2, 2)]))
    deadline = time.monotonic() + 30
    assert saver.wait(deadline - time.monotonic())
    assert os.getpriority(os.PRIO_PROCESS, 0) == niceness
