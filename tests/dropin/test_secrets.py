"""No secret is written anywhere, in whatever form it comes; and what is none stays as it is."""

from __future__ import annotations

import contextlib
import io
import json
import string
import sys
import time

import pytest
from conftest import read_json
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import run_script

import observability as obs

NAMES = [
    "token",
    "hf_token",
    "HF_TOKEN",
    "accessToken",
    "refresh-token",
    "auth_token",
    "token2",
    "secret",
    "client_secret",
    "clientSecret",
    "SECRET_KEY",
    "aws_secret_access_key",
    "AWS_SECRET_ACCESS_KEY",
    "private_key",
    "privateKey",
    "ssh_key",
    "api_key",
    "apiKey",
    "API-KEY",
    "openai_api_key",
    "access_key",
    "account_key",
    "encryption_key",
    "aws_access_key_id",
    "password",
    "passwd",
    "passphrase",
    "pwd",
    "db_pwd",
    "DB_PASS",
    "pass",
    "password_2",
    "credentials",
    "credential",
    "Authorization",
    "authorization",
    "auth",
    "basic_auth",
    "bearer",
    "jwt",
    "SLURM_JWT",
    "dsn",
    "SENTRY_DSN",
    "cookie",
    "session_cookie",
    "signature",
    "sig",
    "passwords",
    "secrets",
    "api_keys",
    "passphrases",
    "cookies",
    "jwts",
    "refresh_tokens",
    "accessTokens",
    "api-tokens",
    "HF_TOKENS",
    "pw",
    "db_pw",
    "pin",
    "PIN",
    "sim-pin",
    "otp",
]

ALPHABET = string.ascii_letters + string.digits
words = st.text(ALPHABET, min_size=20, max_size=40)
odd_words = st.text(ALPHABET + "+/=.~-_!$%", min_size=20, max_size=40)
url_words = st.text(ALPHABET + "=.~-_!$%:+", min_size=20, max_size=40)


def marked(make):
    """Each form gives what is written and what of it must nowhere be found."""
    return lambda secret: (make(secret), secret)


# Texts that hold a secret, wherever they stand.
TEXTS = {
    "url password": (url_words, marked("https://me:{}@host:8080/x?page=2".format)),
    "url user": (url_words, marked("https://{}@github.com/me/repo.git".format)),
    "dsn": (url_words, marked("postgresql+psycopg2://me:{}@db/train".format)),
    "redis": (url_words, marked("redis://:{}@cache:6379/0".format)),
    "url without a scheme": (url_words, marked("psql //me:{}@db/train".format)),
    "url without, with an at": (url_words, marked("//me:a@{}@db/train".format)),
    "url with a slash": (url_words, marked("postgres://me:a/{}@db/train".format)),
    "url with a slash after": (url_words, marked("redis://:{}/b@cache:6379/0".format)),
    "url with a space": (url_words, marked("postgres://me:a {} b@db/train".format)),
    "query": (words, marked("https://host/x?page=2&token={}&size=3".format)),
    "query first": (words, marked("https://host/x?access_token={}".format)),
    "signed url": (words, marked("https://bucket/x?X-Amz-Signature={}&x=1".format)),
    "sas": (words, marked("https://a.blob.core.windows.net/x?sv=2022&sig={}".format)),
    "in an exception": (
        url_words,
        marked("ConnectionError('https://me:{}@host/x refused')".format),
    ),
    "authorization": (odd_words, marked("Authorization: Bearer {}".format)),
    "token header": (odd_words, marked("Authorization: Token {}".format)),
    "basic": (odd_words, marked("authorization: Basic {}".format)),
    "bare authorization": (odd_words, marked("Authorization: {}".format)),
    "key header": (odd_words, marked("X-Api-Key: {}".format)),
    "cookies": (words, marked("Cookie: theme=dark; session={}".format)),
    "a mapping of cookies": (words, marked("cookies=theme=dark; session={}".format)),
    "curl": (odd_words, marked("curl -H 'Authorization: Bearer {}' https://host".format)),
    "assignment": (odd_words, marked("export AWS_SECRET_ACCESS_KEY={} && train".format)),
    "quoted": (st.text(ALPHABET + " ,;&", min_size=20), marked("password = '{}'".format)),
    "cut short": (words, marked('password="two {}'.format)),
    "json": (odd_words, marked('{{"user": "me", "api_key": "{}"}}'.format)),
    "json in json": (words, marked('{{\\"user\\": \\"me\\", \\"api_key\\": \\"{}\\"}}'.format)),
    "repr": (odd_words, marked("Config(lr=0.1, hf_token='{}', n=3)".format)),
    "bytes": (words, marked("{{'password': b'{}'}}".format)),
    "connection string": (words, marked("Server=db;Uid=me;Pwd={};Port=1".format)),
    "account key": (words, marked("AccountName=me;AccountKey={}==;x=y".format)),
    "command line": (words, marked("train.py --api-key={} --lr 3".format)),
    "option": (words, marked("train.py --api-key {} --lr 3".format)),
    "key option": (words, marked("train.py --key {} --lr 3".format)),
    "key assignment": (words, marked("train.py --key={} --lr 3".format)),
    "quoted option": (words, marked("train.py --password 'two {}' --lr 3".format)),
    "list of arguments": (words, marked("Command '['x', '--password', '{}']' failed".format)),
    "yaml": (words, marked("user: me\npassword: {}\nhost: db".format)),
    "github": (words, lambda s: (f"clone with github_pat_{s} please", s)),
    "github short": (words, lambda s: (f"(ghp_{s})", s)),
    "gitlab": (words, lambda s: (f"glpat-{s}", s)),
    "hub": (words, lambda s: (f"login hf_{s}", s)),
    "openai": (words, lambda s: (f"sk-proj-{s}7", s)),
    "slack": (words, lambda s: (f"xoxb-{s}", s)),
    "aws": (
        st.text(string.ascii_uppercase + "234567", min_size=16, max_size=16),
        lambda s: (f"id AKIA{s}.", s),
    ),
    "google": (words, lambda s: (f"AIza{s}", s)),
    "jwt": (words, lambda s: (f"eyJhbGciOiJI.{s}.{s}", s)),
    "pem": (
        words,
        marked("-----BEGIN RSA PRIVATE KEY-----\nMII\n{}\n-----END RSA PRIVATE KEY-----".format),
    ),
    "open pem": (words, marked("-----BEGIN OPENSSH PRIVATE KEY-----\n{}\n".format)),
    "pgp": (words, marked("-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n{}\n".format)),
}
texts = st.sampled_from(sorted(TEXTS)).flatmap(lambda kind: TEXTS[kind][0].map(TEXTS[kind][1]))

# Where a secret that has a name may stand in a configuration.
NESTED = [
    lambda name, secret: {name: secret},
    lambda name, secret: {name: [secret, secret]},
    lambda name, secret: {name: {"a": secret}},
    lambda name, secret: {name: {"a": [{"b": (secret,)}]}},
    lambda name, secret: {"servers": [{"host": "a", name: secret}]},
    lambda name, secret: {"a": {"b": {"c": {name: secret}}}},
    lambda name, secret: {name: secret.encode()},
    lambda name, secret: {"cmd": ["train.py", f"--{name}", secret, "--lr", "3"]},
    lambda name, secret: {"cmd": ("train.py", f"--{name}={secret}")},
    lambda name, secret: [(name, secret)],
    lambda name, secret: {"headers": [["Accept", "text"], [name, f"Bearer {secret}"]]},
]
# Where a text may stand.
AROUND = [lambda t: {"x": t}, lambda t: {"x": [t]}, lambda t: {t: 1}, lambda t: [{"y": (t,)}], str]


def everything_written(folder, given):
    """All that a run writes which is handed the same thing at each of its doors."""
    said, name = io.StringIO(), f"run{time.time_ns()}"
    config, text = given
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(obs, "_said", set())
        patch.setattr(sys, "argv", ["train.py", "--note", text, f"--note={text}"])
        patch.setenv("SLURM_JOB_COMMENT", text.replace("\0", ""))
        run = obs.Run(
            name,
            config=config,
            dataset=config,
            out_dir=folder / "out",
            tb_dir=folder / "tb",
            system_interval=0,
            drain_interval=60,
            **{text: 1},
        )
        run.step(text, loss=text, tokens=text)
        run.log({"note": text, "all": config, "of": [config]})
        run.log({text: object()})
        run.validation({"val": 1.0, "of": text})
        run.finish(f"failed: {RuntimeError(text)!r}", note=text, all=config)
    files = [path for path in (folder / "out" / name).rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {
        "config.json",
        "run_manifest.json",
        "results.json",
        "training.log",
        "metrics.ndjson",
    }
    written = b"\n".join(path.read_bytes() for path in files).decode()
    return written + said.getvalue()


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(NAMES), odd_words, st.sampled_from(NESTED), texts, st.sampled_from(AROUND))
def test_no_secret_is_written_anywhere(tmp_path_factory, name, secret, nest, text, around):
    folder = tmp_path_factory.mktemp("secrets")
    content, hidden = text
    given = {"named": nest(name, secret), "told": around(content)}
    written = everything_written(folder, (given, content))
    assert "<redacted>" in written
    assert secret not in written
    assert hidden not in written


@pytest.mark.parametrize("name", NAMES)
def test_what_has_a_secrets_name_is_redacted(name):
    for nest in NESTED:
        assert "hush" not in json.dumps(obs.to_json(nest(name, "hush")))


@pytest.mark.parametrize("kind", TEXTS)
def test_what_looks_like_a_secret_is_redacted(kind):
    secret = "ABCDEFGHIJKLMNOP" if kind == "aws" else "abcdefghijklmnopqrstuvwxyz012345"
    content, hidden = TEXTS[kind][1](secret)
    assert hidden in content
    assert hidden not in obs.redacted(content)
    assert hidden not in obs.redacted(f"before {content}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--api-key", "hush"],
        ["--api_key=hush"],
        ["--token", "hush"],
        ["-token", "hush"],
        ["--header", "Authorization: Bearer hush-hush"],
        ["--header", "Authorization: Token hush"],
        ["-H", "X-Auth-Token: hush"],
        ["--db", "postgres://me:hush@db/x"],
        ["--set", "auth.password=hush"],
        ["--password", "hush", "--lr", "3"],
        ["--ssh-key", "hush"],
        ["--key", "hush"],
        ["--key=hush"],
        ["--pin", "hush"],
        ["--refresh-tokens", "hush"],
    ],
    ids=" ".join,
)
def test_a_command_line_is_kept_without_its_secrets(tmp_path, arguments):
    run_script(tmp_path, "obs.finish()", *arguments, "--epochs", "7", SLURM_JWT="hush")
    text = (tmp_path / "out/run/run_manifest.json").read_text()
    assert "hush" not in text
    assert "SLURM_JWT" in text
    assert read_json(tmp_path / "out/run/run_manifest.json")["command_line"][-2:] == [
        "--epochs",
        "7",
    ]


def test_an_exception_that_ends_the_script_tells_no_secret(tmp_path):
    body = "obs.step(1, loss=1.0)\nraise ConnectionError('https://me:hush@host/x?token=hush')"
    run_script(tmp_path, body)
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or b"hush" not in path.read_bytes()
    assert "ConnectionError" in read_json(tmp_path / "out/run/results.json")["status"]


HARMLESS = {
    "tokens": 128,
    "max_tokens": 1_000_000,
    "tokens_per_batch": 8,
    "num_tokens": 3.5,
    "token_dropout": 0.1,
    "tokenizer": "gpt2",
    "tokenizer_name": "hf-internal-testing/llama-tokenizer",
    "pad_token": 0,
    "pad_token_id": 50256,
    "eos_token": "<|endoftext|>",
    "bos_token": "<s>",
    "unk_token": "[UNK]",
    "special_tokens": ["<pad>", "</s>"],
    "use_auth_token": False,
    "token": None,
    "author": "anna",
    "authors": ["anna", "ben"],
    "authority": "x",
    "tokens_per_second": 1e5,
    "n_tokens": 7,
    "refresh_tokens": 5,
    "key": "value",
    "num_keys": 8,
    "key_dim": 64,
    "n_kv_heads": 4,
    "keyboard": "qwerty",
    "monkey": "see",
    "monkeys": ["see", "do"],
    "pin_memory": "yes",
    "pinned": "yes",
    "spin": "up",
    "top_p": 0.9,
    "power": "pwm",
    "hotp": "x",
    "sort_key": "length",
    "n_keys": 3,
    "keys": ["a", "b"],
    "passes": "cse,dce",
    "bypass": "no",
    "surpass": "all",
    "secretary": "problem",
    "cookies_eaten": 3,
    "signature_len": 4,
    "sigma": 0.5,
    "loader": "hf_streaming_dataset",
    "estimator": "sk-learn-pipeline-two",
    "region": "ASIAPACIFIC",
    "url": "https://host:8080/a?page=2&size=3",
    "clone": "git@github.com:me/repo.git",
    "mail": "me@example.org",
    "link": "http://host:8080/a is from me@example.org, http://host:80 too",
    "remark": "//todo: ask me@example.org",
    "ipv6": "http://[::1]:8080/me@x",
    "columns": ["input_ids", "labels"],
    "pairs": [["lr", "0.1"], ["token", 5], ["tokens", "many"]],
    "command": ["train.py", "--max-tokens", "128", "--sort-key", "length", "--pin-memory", "yes"],
    "line": "train.py --sort-key length --max-tokens 128 --top-p 0.9",
    "time": "12:30:00",
    "path": "/data/tokens:/more",
    "note": "the basic idea: a token is a word, a bearer of meaning",
    "sha": "0123456789abcdef0123456789abcdef01234567",
    "dtype": "torch.bfloat16",
    "sweep": "lr=0.1,tokens=128,epochs=3",
}


def test_what_is_no_secret_stays_as_it_is(tmp_path):
    arguments = ["--max-tokens", "128", "--tokenizer", "gpt2", "--pad-token", "0"]
    arguments += ["--eos-token", "<|endoftext|>", "--tokens=5", "--author", "anna"]
    init = f"'run', config={HARMLESS!r}"
    done = run_script(
        tmp_path, "obs.log(dict(a=1.0, sweep='tokens=128'))\nobs.finish()", *arguments, init=init
    )
    run_dir = tmp_path / "out/run"
    assert read_json(run_dir / "config.json")["config"] == HARMLESS
    assert read_json(run_dir / "run_manifest.json")["command_line"][1:] == arguments
    assert "redacted" not in done.stderr
    assert b"redacted" not in (run_dir / "metrics.ndjson").read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "a" * 200_000,
        "token" * 40_000,
        "a-" * 100_000,
        "://" * 70_000,
        "//a:b" * 40_000,
        "--key " * 30_000,
        "--token '" * 20_000,
        "eyJ" * 70_000,
        "-----BEGIN PRIVATE KEY" * 9000,
        "Bearer " * 30_000,
        "password=" * 22_000,
        "'\"" * 100_000,
        " " * 200_000,
        "\\" * 200_000,
    ],
    ids=lambda text: text[:9],
)
def test_a_long_text_is_looked_through_at_once(text):
    began = time.monotonic()
    obs.redacted(text)
    obs.redacted("short", text)
    assert time.monotonic() - began < 2
