"""The recipe: its sizes, its batches, its schedule, and the log that it leaves."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import titles
import train
from train import FULL, SMALL, Hyperparameters

ROOT = Path(train.__file__).parent.parent
TINY = Hyperparameters(
    block_size=8,
    batch_size=4,
    vocab_size=300,
    n_layer=1,
    n_head=2,
    d_model=16,
    epochs=2,
    num_titles=60,
)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def named(records: list[dict], event: str) -> list[dict]:
    return [record for record in records if record["event"] == event]


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    """Trains TINY and returns its model and its log."""

    def run(**changes):
        log = tmp_path / "run.log"
        monkeypatch.setenv("LOG", str(log))
        monkeypatch.setenv("DEVICE", "cpu")
        monkeypatch.setenv("OBS_DISABLE", "1")
        monkeypatch.delenv("TITLES", raising=False)
        return train.main(dataclasses.replace(TINY, **changes)), read(log)

    return run


# --- Model --------------------------------------------------------------------------------


def test_full_recipe_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = train.GPT(16_000, FULL)
    assert sum(parameter.numel() for parameter in model.parameters()) == 27_172_864


def test_head_is_tied_positions_and_biases_start_at_zero():
    model = train.GPT(300, TINY)
    assert model.head.weight is model.token_emb.weight
    assert model.pos_emb.abs().sum() == 0
    assert all(p.abs().sum() == 0 for name, p in model.named_parameters() if "bias" in name)


@pytest.mark.parametrize("pattern", ["qkv.weight", "proj.weight", "mlp.0.weight", "token_emb"])
def test_weights_start_normal_with_the_stated_deviation(pattern):
    torch.manual_seed(0)
    model = train.GPT(2_000, dataclasses.replace(TINY, d_model=128))
    weights = torch.cat([p.flatten() for n, p in model.named_parameters() if pattern in n])
    assert weights.std().item() == pytest.approx(0.02, rel=0.03)


def test_every_dropout_has_the_recipe_s_probability():
    model = train.GPT(300, FULL)
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates == [0.1] * (1 + 3 * FULL.n_layer)


def test_logits_have_the_batch_s_shape_and_no_token_sees_the_future():
    model = train.GPT(300, TINY).eval()
    ids = torch.randint(0, 300, (4, 8))
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 300
    before, after = model(ids), model(changed)
    assert before.shape == (4, 8, 300)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


# --- Data ---------------------------------------------------------------------------------


def test_batches_are_contiguous_and_wrap_when_too_little_is_left():
    ids = torch.arange(100)
    starts, ptr = [], 0
    for _ in range(5):
        x, y, ptr = train.next_batch(ids, ptr, TINY)
        assert x.shape == y.shape == (4, 8)
        assert torch.equal(x.flatten() + 1, y.flatten())
        starts.append(x[0, 0].item())
    assert starts == [0, 32, 64, 0, 32]


def test_evaluation_spans_do_not_overlap_and_are_whole():
    found = list(train.spans(torch.arange(100), TINY))
    assert [(x[0, 0].item(), y[-1, -1].item()) for x, y in found] == [(0, 32), (33, 65), (66, 98)]


def test_tokenizer_keeps_any_text_and_its_special_tokens_first():
    tokenizer = train.train_tokenizer(titles.make_titles(200, seed=0), 400)
    assert [tokenizer.token_to_id(t) for t in ("<pad>", "<eos>", "<unk>")] == [0, 1, 2]
    text = "Why startups use Rust (2016)"
    ids = train.encode(tokenizer, train.join([text, text])).tolist()
    assert ids.count(1) == 2
    assert ids[-1] == 1
    assert tokenizer.decode(ids[: ids.index(1)]).strip() == text


# --- A whole run --------------------------------------------------------------------------


def test_evaluates_at_the_steps_of_the_published_run(tiny_run):
    _, records = tiny_run(num_titles=222, epochs=7)
    assert named(records, "dataset_info")[0]["batches_per_epoch"] == 134
    ours = [(r["step"], r["max_steps"]) for r in named(records, "validation_step")]
    theirs = named(read(ROOT / "baseline.log"), "validation_step")
    assert ours == [(r["step"], r["max_steps"]) for r in theirs]
    assert [step for step, _ in ours] == [1, *range(44, 925, 44), 938]


def test_log_has_the_events_of_a_run_in_their_order(tiny_run):
    model, records = tiny_run()
    events = [record["event"] for record in records]
    head = ["hyperparameters_configured", "device_info", "dataset_info", "model_info"]
    assert events[:4] == head
    (data,) = named(records, "dataset_info")
    steps = data["epochs"] * data["batches_per_epoch"]
    training, validation = named(records, "training_step"), named(records, "validation_step")
    assert [record["step"] for record in training] == list(range(1, steps + 1))
    assert [record["step"] for record in validation] == [1, 11, 22, 33, 44, 55, 66]
    assert len(records) == 4 + len(training) + len(validation)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert named(records, "model_info")[0]["parameters_count"] == count


def test_this_log_and_the_published_baseline_name_their_fields_alike(tiny_run):
    _, records = tiny_run()
    for theirs in read(ROOT / "baseline.log")[1:]:
        ours = named(records, theirs["event"])[0]
        assert theirs.keys() - {"event"} <= ours.keys()


def test_two_runs_are_equal_bit_for_bit(tiny_run):
    first, first_log = tiny_run()
    second, second_log = tiny_run()
    losses = [[r["loss"] for r in log if "loss" in r] for log in (first_log, second_log)]
    assert losses[0] == losses[1]
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("change", [{"lr": 6.06e-3}, {"seed": 1}, {"dropout": 0.2}])
def test_a_changed_recipe_changes_the_losses(tiny_run, change):
    base, changed = tiny_run()[1], tiny_run(**change)[1]
    assert named(base, "validation_step")[-1] != named(changed, "validation_step")[-1]


def test_evaluating_draws_no_random_number(tiny_run):
    seldom = tiny_run(evals_per_epoch=1)[1]
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    often = tiny_run(evals_per_epoch=9)[1]
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    losses = [[r["loss"] for r in named(log, "training_step")] for log in (seldom, often)]
    assert losses[0] == losses[1]
    assert len(named(often, "validation_step")) > len(named(seldom, "validation_step"))


def test_validation_loss_is_nats_per_character(tiny_run):
    _, records = tiny_run(lr=0.0)
    data = train.Corpus(titles.load("", TINY.num_titles, TINY.seed), TINY)
    covered = len(list(train.spans(data.val_ids, TINY))) * 32
    # Untrained, each token costs about ln(vocabulary) nats.
    expected = covered * torch.tensor(data.vocab_size).log().item() / data.val_chars
    assert named(records, "validation_step")[0]["loss"] == pytest.approx(expected, rel=0.02)


def test_too_small_a_corpus_says_what_it_makes_and_what_is_needed(tiny_run):
    with pytest.raises(titles.TitlesError, match=r"too few: they make .* this preset needs 3"):
        tiny_run(num_titles=10)


def test_small_baseline_is_of_this_preset_and_these_titles():
    records = read(ROOT / "tests/baselines/baseline_small.log")
    (stated,) = named(records, "hyperparameters_configured")
    assert {key: stated[key] for key in vars(SMALL)} == vars(SMALL)
    (data,) = named(records, "dataset_info")
    assert data["sha256"] == titles.load("", SMALL.num_titles, SMALL.seed).sha256
    corpus = train.Corpus(titles.load("", SMALL.num_titles, SMALL.seed), SMALL)
    assert corpus.describe() == {key: data[key] for key in corpus.describe()}


# --- The command line ---------------------------------------------------------------------


def command(cwd: Path, **env: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("TITLES", "PRESET", "DEVICE", "LOG")}
    return subprocess.run(
        [sys.executable, str(ROOT / "mainrun" / "train.py")],
        cwd=cwd,
        env={**kept, "DEVICE": "cpu", "OBS_DISABLE": "1", **env},
        capture_output=True,
        text=True,
    )


def test_bad_titles_end_the_script_with_one_line_and_status_2(tmp_path):
    done = command(tmp_path, TITLES="none.txt", LOG=str(tmp_path / "run.log"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("train.py: there is no file none.txt; correct TITLES")


def test_unknown_preset_is_refused(tmp_path):
    done = command(tmp_path, PRESET="huge", LOG=str(tmp_path / "run.log"))
    assert done.returncode == 2
    assert "use PRESET=full or PRESET=small" in done.stderr


@pytest.mark.parametrize(
    ("name", "device", "preset"),
    [("", "cpu", SMALL), ("", "cuda", FULL), ("full", "cpu", FULL), ("small", "cuda:1", SMALL)],
)
def test_preset_is_the_named_one_or_fits_the_device(monkeypatch, name, device, preset):
    monkeypatch.setenv("PRESET", name)
    assert train.choose_preset(device) is preset
