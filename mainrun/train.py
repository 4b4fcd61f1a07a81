"""Train a small GPT on headlines: seven epochs, one file, a validation curve to compare.

PRESET=full|small   the published recipe, or one of the same shape for a CPU (its default)
TITLES=PATH|hub     other headlines than the embedded ones: see titles.py
DEVICE=cpu|cuda     otherwise CUDA where there is one
LOG=PATH            JSON lines, an event each; default logs/mainrun.log beside this file
"""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import observability as obs  # observability
import titles

HERE = Path(__file__).resolve().parent
EOS = "<eos>"


@dataclass(frozen=True)
class Hyperparameters:
    """The published recipe; what is counted, is counted in tokens."""

    block_size: int = 128
    batch_size: int = 64
    vocab_size: int = 16_000
    n_layer: int = 6
    n_head: int = 8
    d_model: int = 512
    dropout: float = 0.1
    lr: float = 6e-3
    weight_decay: float = 0.0
    clip: float = 1.0
    evals_per_epoch: int = 3
    epochs: int = 7
    seed: int = 1337
    num_titles: int = 100_000
    val_frac: float = 0.10


FULL = Hyperparameters()
# The same recipe in about a minute on two cores: smaller in every size, steeper in its rate.
SMALL = Hyperparameters(
    block_size=32,
    batch_size=32,
    vocab_size=1_000,
    n_layer=2,
    n_head=4,
    d_model=64,
    lr=0.012,
    num_titles=8_000,
)


def main(args: Hyperparameters | None = None) -> GPT:
    """Train, log and return the model; without `args` the environment chooses the preset."""
    device = choose_device()
    args = args or choose_preset(device)
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    log = open_log(Path(os.environ.get("LOG") or HERE / "logs" / "mainrun.log"))
    log.info("hyperparameters_configured", **vars(args))
    log.info("device_info", device=device)
    obs.init(config=args)  # observability

    data = Corpus(titles.load(os.environ.get("TITLES", ""), args.num_titles, args.seed), args)
    batches = data.batches
    max_steps = args.epochs * batches
    eval_interval = batches // args.evals_per_epoch
    log.info("dataset_info", **data.describe())
    tqdm.write(data.sentence())

    train_ids, val_ids = data.train_ids.to(device), data.val_ids.to(device)
    model = GPT(data.vocab_size, args).to(device)
    log.info("model_info", parameters_count=sum(p.numel() for p in model.parameters()))
    opt = torch.optim.SGD(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=max_steps)
    obs.watch(model, optimizer=opt, scheduler=scheduler)  # observability

    def evaluate() -> float:
        """Nats per character of the validation text: comparable whatever the vocabulary."""
        model.eval()
        total = 0.0
        with torch.no_grad():
            for x, y in spans(val_ids, args):
                logits = model(x)
                total += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
        model.train()
        return total / data.val_chars

    def log_step(event: str, step: int, loss: float) -> None:
        log.info(event, step=step, max_steps=max_steps, loss=loss, elapsed_time=time.time() - t0)

    ptr = 0
    step = 0
    ptr, step = obs.resume(ptr=ptr, step=step)  # observability
    t0 = time.time()
    for epoch in range(1, args.epochs + 1):
        if obs.skip_epoch(epoch): continue  # observability
        for _ in tqdm(range(1, batches + 1), desc=f"epoch {epoch}/{args.epochs}"):
            if obs.skip_batch(): continue  # observability
            step += 1
            xb, yb, ptr = next_batch(train_ids, ptr, args)
            logits = model(xb)
            loss = F.cross_entropy(logits.flatten(0, 1), yb.flatten())
            opt.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            opt.step()
            scheduler.step()

            log_step("training_step", step, loss.item())
            if step == 1 or step % eval_interval == 0 or step == max_steps:
                val_loss = evaluate()
                log_step("validation_step", step, val_loss)
                tqdm.write(f"step {step:4d}/{max_steps}  val {val_loss:.6f}")
                obs.validation(val_loss)  # observability
            obs.step(step, loss=loss, batch=xb)  # observability
    obs.finish()  # observability
    return model


# --- Data ---------------------------------------------------------------------------------


class Corpus:
    """The titles as two rows of token ids: the first part trains, the rest validates."""

    def __init__(self, source: titles.Titles, args: Hyperparameters) -> None:
        self._source, self._args = source, args
        lines = source.lines
        self._train_count = int(len(lines) * (1 - args.val_frac))
        train, val = lines[: self._train_count], lines[self._train_count :]
        tokenizer = train_tokenizer(lines, args.vocab_size)
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.train_ids = encode(tokenizer, join(train))
        self.val_ids = encode(tokenizer, join(val))
        self.val_chars = len(join(val))
        self.batches = len(self.train_ids) // (args.batch_size * args.block_size)
        self._check_size()

    def describe(self) -> dict[str, Any]:
        return {
            "titles_count": self._train_count,
            "epochs": self._args.epochs,
            "batches_per_epoch": self.batches,
            "tokens_per_epoch": len(self.train_ids),
            "vocab_size": self.vocab_size,
            "source": self._source.source,
            "sha256": self._source.sha256,
            "published": titles.is_published(len(self.train_ids), self.batches),
        }

    def sentence(self) -> str:
        told = (
            f"{len(self._source.lines)} titles ({self._source.source}): {len(self.train_ids)} "
            f"tokens and {self.batches} batches an epoch"
        )
        if self.describe()["published"]:
            return f"{told}: the data of the published run"
        return f"{told}: not the data of the published run, its curve does not apply"

    def _check_size(self) -> None:
        args = self._args
        span = args.batch_size * args.block_size + 1
        if self.batches >= args.evals_per_epoch and len(self.val_ids) >= span:
            return
        raise titles.TitlesError(
            f"{len(self._source.lines)} titles from {self._source.source} are too few: they make "
            f"{self.batches} batches to train on and {len(self.val_ids)} tokens to validate on, "
            f"this preset needs {args.evals_per_epoch} and {span}; "
            "give more titles, or use PRESET=small"
        )


def train_tokenizer(lines: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, the three special ones first."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", EOS, "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def join(lines: list[str]) -> str:
    """One text; every title, the last too, ends in <eos>."""
    return EOS.join(lines) + EOS


def encode(tokenizer: Tokenizer, text: str) -> Tensor:
    return torch.tensor(tokenizer.encode(text).ids, dtype=torch.long)


def next_batch(ids: Tensor, ptr: int, args: Hyperparameters) -> tuple[Tensor, Tensor, int]:
    """The contiguous span at `ptr` as inputs and targets, and where the next one starts."""
    tokens = args.batch_size * args.block_size
    if ptr + tokens + 1 > len(ids):
        ptr = 0
    return *split(ids[ptr : ptr + tokens + 1], args), ptr + tokens


def spans(ids: Tensor, args: Hyperparameters) -> Iterator[tuple[Tensor, Tensor]]:
    """Every whole span, none overlapping another, as inputs and targets."""
    span = args.batch_size * args.block_size + 1
    for start in range(0, len(ids) - span + 1, span):
        yield split(ids[start : start + span], args)


def split(span: Tensor, args: Hyperparameters) -> tuple[Tensor, Tensor]:
    shape = args.batch_size, args.block_size
    return span[:-1].view(shape), span[1:].view(shape)


# --- Model --------------------------------------------------------------------------------


class GPT(nn.Module):
    """Ids of shape (batch, block) to logits of shape (batch, block, vocabulary)."""

    def __init__(self, vocab_size: int, args: Hyperparameters) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(vocab_size, args.d_model)
        self.pos_emb = nn.Parameter(torch.zeros(1, args.block_size, args.d_model))
        self.drop = nn.Dropout(args.dropout)
        self.blocks = nn.Sequential(*(Block(args) for _ in range(args.n_layer)))
        self.ln_f = nn.LayerNorm(args.d_model)
        self.head = nn.Linear(args.d_model, vocab_size, bias=False)
        self.apply(init_weights)
        self.head.weight = self.token_emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.drop(self.token_emb(ids) + self.pos_emb[:, : ids.size(1)])
        logits: Tensor = self.head(self.ln_f(self.blocks(x)))
        return logits


class Block(nn.Module):
    def __init__(self, args: Hyperparameters) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(args.d_model)
        self.ln2 = nn.LayerNorm(args.d_model)
        self.attn = Attention(args)
        self.mlp = nn.Sequential(
            nn.Linear(args.d_model, 4 * args.d_model),
            nn.GELU(),
            nn.Linear(4 * args.d_model, args.d_model),
            nn.Dropout(args.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        x = x + self.mlp(self.ln2(x))
        return x  # noqa: RET504


class Attention(nn.Module):
    """Causal self-attention, written out: the fused kernels' backward is not deterministic."""

    mask: Tensor

    def __init__(self, args: Hyperparameters) -> None:
        super().__init__()
        self.n_head = args.n_head
        self.qkv = nn.Linear(args.d_model, 3 * args.d_model)
        self.proj = nn.Linear(args.d_model, args.d_model)
        self.attn_drop = nn.Dropout(args.dropout)
        self.resid_drop = nn.Dropout(args.dropout)
        future = torch.ones(args.block_size, args.block_size, dtype=torch.bool).triu(1)
        self.register_buffer("mask", future, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, block, width = x.shape
        qkv = self.qkv(x).view(batch, block, 3, self.n_head, width // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        scores = scores.masked_fill(self.mask[:block, :block], float("-inf"))
        mixed = self.attn_drop(scores.softmax(dim=-1)) @ v
        out: Tensor = self.resid_drop(self.proj(mixed.transpose(1, 2).reshape(batch, block, width)))
        return out


def init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, mean=0.0, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


# --- Where it runs, and its log -----------------------------------------------------------


class UsageError(Exception):
    """An environment variable asks for what there is not."""


def choose_device() -> str:
    return os.environ.get("DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")


def choose_preset(device: str) -> Hyperparameters:
    presets = {"full": FULL, "small": SMALL}
    name = os.environ.get("PRESET") or ("full" if device.startswith("cuda") else "small")
    if name not in presets:
        raise UsageError(f"PRESET={name} is unknown; use PRESET=full or PRESET=small")
    return presets[name]


def open_log(path: Path) -> Any:
    """JSON lines, an event each, written through at once: a killed run has all its lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w", encoding="utf-8")
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    render = structlog.processors.JSONRenderer()
    return structlog.wrap_logger(structlog.WriteLogger(file), processors=[stamp, render])


if __name__ == "__main__":
    try:
        main()
    except (UsageError, titles.TitlesError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
