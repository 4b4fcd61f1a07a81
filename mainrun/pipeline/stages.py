"""Four small stages of training over the embedded titles, each from the weights of the one before.

pretrain  reads the titles, token after token
sft       learns to answer what kind of title one is; the answer alone counts in the loss
dpo       prefers the right answer to a wrong one, beside the frozen weights that it began with
r1        learns to write a teacher's reasoning before its answer; the tags weigh ten times

pipeline.sh runs them in this order; `stages.py sft --init mainrun/out/pretrain_64.pth` runs one.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import observability as obs  # observability
import titles
from train import EOS, GPT, SMALL, Hyperparameters, train_tokenizer

MAINRUN = Path(__file__).resolve().parents[1]
SIZES = replace(SMALL, batch_size=32, block_size=80, num_titles=3_000)
RECIPES = {
    "pretrain": replace(SIZES, lr=3e-3, epochs=6),
    "sft": replace(SIZES, lr=1e-3, epochs=2),
    "dpo": replace(SIZES, lr=1e-4, epochs=1),
    "r1": replace(SIZES, lr=2e-3, epochs=3),
}
KINDS = {"Show HN": "launch", "Ask HN": "question", "[pdf]": "paper", "[video]": "talk",
         "released": "release", "Why": "essay", "How": "guide"}
TAG_WEIGHT = 10.0
BETA = 0.1  # of DPO: how much a preference may move the model away from the reference

Loss = Callable[[GPT, "Rows"], Tensor]


def main() -> None:
    args = parse()
    recipe = recipe_of(args)
    torch.manual_seed(recipe.seed)
    obs.init(args.out.name, config=recipe, out_dir=args.out.parent, tb_dir=args.tb)  # observability

    train, val, vocab_size = make_rows(args.stage, recipe)
    model = GPT(vocab_size, recipe)
    if args.init:
        model.load_state_dict(torch.load(args.init, weights_only=True))
    loss_of = preference_loss(model) if args.stage == "dpo" else token_loss
    opt = torch.optim.AdamW(model.parameters(), lr=recipe.lr)
    steps = recipe.epochs * -(-len(train.ids) // recipe.batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=steps)
    obs.watch(model, optimizer=opt, scheduler=scheduler)  # observability

    obs.resume()  # observability
    for epoch in range(1, recipe.epochs + 1):
        if obs.skip_epoch(epoch): continue  # observability
        order = torch.randperm(len(train.ids))
        for at in range(0, len(order), recipe.batch_size):
            if obs.skip_batch(): continue  # observability
            batch = train.pick(order[at : at + recipe.batch_size])
            loss = loss_of(model, batch)
            opt.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            opt.step()
            scheduler.step()
            obs.step(loss=loss, batch=batch)  # observability
        val_loss, right = evaluate(model, val, loss_of)
        print(f"{args.stage} {epoch}/{recipe.epochs}  val {val_loss:.6f}  right {right:.3f}")
        obs.validation(val_loss, right=right)  # observability
    obs.finish()  # observability


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train one stage of the example.")
    parser.add_argument("stage", choices=RECIPES)
    parser.add_argument("--init", help="weights to begin with; without it they are random")
    parser.add_argument("--out", type=Path, help="directory of the run; default mainrun/out/STAGE")
    parser.add_argument("--tb", default=os.environ.get("TF_DIR") or MAINRUN / "logs" / "tb")
    parser.add_argument("--hidden", type=int, default=64, help="width of the model")
    parser.add_argument("--titles", type=int, default=SIZES.num_titles)
    parser.add_argument("--epochs", type=int, help="default: the stage's own")
    obs.add_arguments(parser)  # observability
    args = parser.parse_args()
    args.out = (args.out or MAINRUN / "out" / args.stage).resolve()
    return args


def recipe_of(args: argparse.Namespace) -> Hyperparameters:
    recipe = RECIPES[args.stage]
    epochs = args.epochs or recipe.epochs
    return replace(recipe, epochs=epochs, d_model=args.hidden, num_titles=args.titles)


def evaluate(model: GPT, val: Rows, loss_of: Loss) -> tuple[float, float]:
    """The mean loss, and in how many rows every token that counts is the likeliest one."""
    model.eval()
    with torch.no_grad():
        loss = loss_of(model, val).item()
        first = Rows(val.ids[:, :1], val.weights[:, :1])  # of a pair, the right answer
        likeliest = model(first.flat()[:, :-1]).argmax(-1)
        counts = first.weights[:, 0, 1:] > 0
        right = ((likeliest == first.flat()[:, 1:]) | ~counts).all(-1).float().mean().item()
    model.train()
    return loss, right


# --- Losses -------------------------------------------------------------------------------


def log_probs(model: GPT, rows: Rows) -> Tensor:
    """Of each sequence, (rows, k): the weighted sum over its tokens, each given those before."""
    ids = rows.flat()
    nll = F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
    return -(nll.view_as(rows.weights[..., 1:]) * rows.weights[..., 1:]).sum(-1)


def token_loss(model: GPT, rows: Rows) -> Tensor:
    """Cross-entropy over the tokens that count."""
    return -log_probs(model, rows).sum() / rows.weights[..., 1:].sum()


def preference_loss(model: GPT) -> Loss:
    """DPO (Rafailov et al. 2023, equation 7) against `model` as it is now."""
    reference = copy.deepcopy(model).eval().requires_grad_(False)

    def loss_of(model: GPT, rows: Rows) -> Tensor:
        gained = log_probs(model, rows) - log_probs(reference, rows)
        return -F.logsigmoid(BETA * (gained[:, 0] - gained[:, 1])).mean()

    return loss_of


# --- Data ---------------------------------------------------------------------------------

Parts = list[tuple[str, float]]  # texts, and what their tokens weigh in the loss


class Rows(NamedTuple):
    """Each row is k sequences: one, or for a preference the right and the wrong one."""

    ids: Tensor  # (rows, k, length)
    weights: Tensor  # of the same shape; 0 where a token does not count

    def pick(self, picked: Tensor | slice) -> Rows:
        return Rows(self.ids[picked], self.weights[picked])

    def flat(self) -> Tensor:
        return self.ids.flatten(0, 1)


def make_rows(stage: str, recipe: Hyperparameters) -> tuple[Rows, Rows, int]:
    """Rows to train on, rows to validate on, and the size of the vocabulary."""
    lines = titles.load("", recipe.num_titles, recipe.seed).lines
    # All stages need the same tokens: r1's text has every word that the others have.
    texts = ["".join(text for text, _ in sequences("r1", line)[0]) for line in lines]
    tokenizer = train_tokenizer(texts, recipe.vocab_size)
    coded = [encode(tokenizer, parts, recipe.block_size)
             for line in lines for parts in sequences(stage, line)]
    padded = [pad_sequence(list(each), batch_first=True) for each in zip(*coded, strict=True)]
    rows = Rows(*(each.view(len(lines), -1, each.size(1)) for each in padded))
    cut = len(lines) - len(lines) // 10
    return rows.pick(slice(cut)), rows.pick(slice(cut, None)), tokenizer.get_vocab_size()


def encode(tokenizer: Tokenizer, parts: Parts, limit: int) -> tuple[Tensor, Tensor]:
    """Ids and weights; of what is too long the end is kept, for there stands the answer."""
    tokens = [(id, weight) for text, weight in parts for id in tokenizer.encode(text).ids]
    ids, weights = zip(*tokens[-limit:], strict=True)
    return torch.tensor(ids), torch.tensor(weights)


def sequences(stage: str, title: str) -> list[Parts]:
    cue, kind = next((item for item in KINDS.items() if item[0] in title), ("nothing", "news"))
    asked, answer = (f"{title} What kind? ", 0.0), (f"{kind}{EOS}", 1.0)
    if stage == "pretrain":
        return [[(title + EOS, 1.0)]]
    if stage == "sft":
        return [[asked, answer]]
    if stage == "dpo":
        others = [other for other in (*KINDS.values(), "news") if other != kind]
        return [[asked, answer], [asked, (f"{others[len(title) % len(others)]}{EOS}", 1.0)]]
    thought = f"It says {cue}, so it is a {kind}."
    return [[asked, ("<think>", TAG_WEIGHT), (thought, 1.0), ("</think><answer>", TAG_WEIGHT),
             (kind, 1.0), (f"</answer>{EOS}", TAG_WEIGHT)]]


if __name__ == "__main__":
    main()
