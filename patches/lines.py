"""The marked lines of a script: what one is, weaving them in, and taking them out again.

    weave(data, {7: ["obs.init()  # observability"]}, name)    with lines before its line 7
    reverse(data)                                              without its marked lines
    pin(before, after, name), apply_pinned(data, patch, name)  a patch for exactly one file

A marked line is one whole statement on a line by itself, outside any string, bracket and
continuation; it is in one of the few forms that we write (`called_on` lists them), reaches the
drop-in by a name that a marked import of the same file binds, and ends in the comment
`# observability`, spelled exactly so. Any other line that ends in these words is the author's.

Nothing here changes a line of the author's: a script that cannot be read, or that would not come
back byte for byte, raises PatchError, and the file is as it was.
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import difflib
import functools
import hashlib
import io
import re
import tokenize
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["MARK", "PatchError", "is_marked", "marked_in", "marked_numbers", "reverse", "weave"]
__all__ += ["apply_pinned", "compiled", "decoded", "parse_error", "pin", "split_lines", "unified"]

MARK = "# observability"
LAYOUT = (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE, tokenize.NL, tokenize.ENDMARKER)
# What a parser raises at a script that it cannot read; a deep nesting is one of them.
UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


class PatchError(Exception):
    """The script cannot be read, patched or written; nothing was changed."""


# --- What a marked line is -------------------------------------------------------------------
def is_marked(row: bytes) -> bool:
    """Whether a line, by itself, has our form and our ending; its file may yet say otherwise."""
    text = row.decode("utf-8", "replace").rstrip("\r\n")
    return text.endswith(MARK) and called_on(statement(text)) != ""


def marked_numbers(data: bytes, name: str = "train.py") -> frozenset[int]:
    """The numbers of a script's marked lines, from 1; PatchError if it cannot be read."""
    if not re.search(rb"# observability(?:[\r\n]|\Z)", data):
        return frozenset()
    _, rows = decoded(data, name)
    found = {number: statement(rows[number - 1]) for number in ends_marked(rows, name)}
    bound = {called_on(s) for s in found.values() if isinstance(s, (ast.Import, ast.ImportFrom))}
    return frozenset(n for n, stmt in found.items() if called_on(stmt) in bound - {""})


@functools.cache
def marked_in(file: str) -> frozenset[int]:
    """The same of a file, read once; none if it is not there or cannot be read."""
    with contextlib.suppress(OSError, PatchError):
        return marked_numbers(Path(file).read_bytes(), file)
    return frozenset()


def statement(text: str) -> ast.stmt | None:
    """The one statement of a line; None where it holds several, a part of one, or none."""
    with contextlib.suppress(*UNPARSABLE):
        body = _parsed(text.strip()).body
        return body[0] if len(body) == 1 else None
    return None


def _parsed(source: str | bytes, flags: int = ast.PyCF_ONLY_AST) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compile(source, "the script", "exec", flags, dont_inherit=True)


def called_on(stmt: ast.stmt | None) -> str:
    """The name by which a statement of our forms binds or calls the drop-in; '' for others."""
    match stmt:
        case ast.Import(names=[alias]) | ast.ImportFrom(names=[alias]):
            known = alias.name == "observability" and alias.asname in (None, "obs")
            return (alias.asname or alias.name) if known else ""
        case ast.If(test=test, body=[ast.Continue() | ast.Break()], orelse=[]):
            return _called(test, ("skip_epoch", "skip_batch", "ended"))
        case ast.For(iter=source, body=[ast.Pass()], orelse=[]):
            return "".join({_called(node, ("resume",)) for node in ast.walk(source)})
        case ast.Assign(targets=[_], value=call):
            return _called(call, ("resume",))
        case ast.Expr(value=call) | ast.If(body=[ast.Expr(value=call)], orelse=[]):
            return _called(call)
        case ast.For(body=[ast.Expr(value=call)], orelse=[]):
            return _called(call)
    return ""


def _called(node: ast.AST, methods: Sequence[str] = ()) -> str:
    """`obs` of `obs.step(...)`, if it is one of these methods."""
    match getattr(node, "func", None):
        case ast.Attribute(value=ast.Name(id="obs" | "observability" as name), attr=method):
            return name if not methods or method in methods else ""
    return ""


def ends_marked(rows: Sequence[str], name: str) -> Iterator[int]:
    """The lines that hold one logical line, whole and alone, and end in the marker."""
    begun = 1  # the line that begins anew: the one before it ends in no backslash, bracket, string
    first, comment = 0, ""  # of the logical line under way
    for token in _tokens(rows, name):
        kind, line = token.type, token.start[0]
        if kind == tokenize.COMMENT:
            comment = token.string
        elif kind not in LAYOUT:
            first = first or line
        if kind == tokenize.NEWLINE and begun == first == line and comment == MARK:
            yield line
        if kind in (tokenize.NEWLINE, tokenize.NL):
            begun, comment = line + 1, ""
            first = 0 if kind == tokenize.NEWLINE else first


def _tokens(rows: Sequence[str], name: str) -> Iterator[tokenize.TokenInfo]:
    number = 1
    try:
        for token in tokenize.generate_tokens(iter([f"{row}\n" for row in rows]).__next__):
            number = token.start[0]
            # An open quote or a stray sign; letters that only older tokenizers do not know pass.
            if token.type == tokenize.ERRORTOKEN and not token.string.isidentifier():
                raise SyntaxError(f"{token.string!r} has no meaning in Python there")
            yield token
    except (tokenize.TokenError, *UNPARSABLE) as error:
        why = getattr(error, "msg", None) or error.args[0]
        raise PatchError(
            f"{name}:{number}: cannot be read as Python from here on ({why}), so that no line "
            f"which ends in {MARK!r} is known to be ours; the file is as it was"
        ) from error


# --- Lines and their ends --------------------------------------------------------------------
def split_lines(data: bytes) -> list[bytes]:
    """Lines with their ends, cut where Python cuts them: \\n, \\r\\n or \\r, and nowhere else."""
    return re.findall(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z", data)


def ends_a_line(data: bytes) -> bool:
    return data.endswith((b"\r", b"\n"))


def _end(row: bytes) -> bytes:
    return row[len(row.rstrip(b"\r\n")) :]


def decoded(data: bytes, name: str) -> tuple[str, list[str]]:
    """A script's encoding, and its lines without their ends and without a byte order mark."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        encoding, body = encoding.removesuffix("-sig"), data.removeprefix(codecs.BOM_UTF8)
        rows = [row.decode(encoding) for row in split_lines(body)]
        if "".join(rows) != body.decode(encoding):
            raise UnicodeError(f"the encoding {encoding} hides line ends")
    except (SyntaxError, UnicodeError, LookupError) as error:
        raise PatchError(f"{name}: cannot be read as text: {error}") from error
    return encoding, [row.rstrip("\r\n") for row in rows]


# --- Adding and removing lines ---------------------------------------------------------------
def weave(data: bytes, added: Mapping[int, Sequence[str]], name: str) -> bytes:
    """The script with lines added, each before the line of its number; checked both ways."""
    encoding, _ = decoded(data, name)
    try:
        lines = {at: [text.encode(encoding) for text in texts] for at, texts in added.items()}
    except UnicodeEncodeError as error:
        raise PatchError(f"{name}: {error.object!r} does not fit its encoding") from error
    mark, rows = _rows(data)
    if beyond := [number for number in lines if number > len(rows) + 1]:
        raise PatchError(f"{name}: the script has no line {beyond[0]}")
    out: list[bytes] = []
    eol = _end(rows[0] if rows else b"") or b"\n"
    for number, row in enumerate([*rows, b""], 1):
        for line in lines.get(number, ()):
            if out and not ends_a_line(out[-1]):  # `reverse` takes this end away again
                out[-1] += eol
                out.append(line)
            else:
                out.append(line + eol)
        # As the line before: a lone \r in front of a \n would become one end with it.
        eol = _end(row) or eol
        out.append(row)
    result = mark + b"".join(out)
    if reverse(result, name) != data:
        raise PatchError(
            f"{name}: cannot be taken back: lines of it are ours, or do not end in {MARK!r}"
        )
    return result


def reverse(data: bytes, name: str = "train.py") -> bytes:
    """The script without its marked lines; PatchError if it cannot be read."""
    marked = marked_numbers(data, name)
    mark, rows = _rows(data)
    kept = [row for number, row in enumerate(rows, 1) if number not in marked]
    if kept and len(rows) in marked and not ends_a_line(rows[-1]):
        kept[-1] = kept[-1].rstrip(b"\r\n")
    return mark + b"".join(kept)


def parse_error(source: bytes, flags: int = ast.PyCF_ONLY_AST) -> str:
    """Why Python cannot read a script; '' if it can."""
    try:
        _parsed(source, flags)
    except UNPARSABLE as error:
        return str(error)
    return ""


def compiled(source: bytes, name: str) -> bytes:
    """The source itself; PatchError if it does not compile, which asks for more than to parse."""
    if why := parse_error(source, 0):
        raise PatchError(f"{name}: the result would not compile ({why}); nothing was written")
    return source


def unified(before: bytes, after: bytes, name: str, context: int = 3) -> str:
    """The diff, to be read; it is of bytes that are cut where Python cuts them."""
    old, new = ([row.decode("utf-8", "replace") for row in split_lines(d)] for d in (before, after))
    lines = difflib.unified_diff(old, new, f"a/{name}", f"b/{name}", n=context)
    return "".join(re.sub(r"(?<!\n)\Z", "\n\\\\ No newline at end of file\n", x) for x in lines)


def _rows(data: bytes) -> tuple[bytes, list[bytes]]:
    """A byte order mark, which stays in front of all, and the lines behind it."""
    body = data.removeprefix(codecs.BOM_UTF8)
    return data[: len(data) - len(body)], split_lines(body)


# --- Ready patches, pinned to one file -------------------------------------------------------
def pin(before: bytes, after: bytes, name: str) -> str:
    """A patch that holds added lines only, and the sha256 of the one file that it fits."""
    head = f"# target: {name}\n# sha256: {_digest(before)}\n# patched-sha256: {_digest(after)}\n"
    return "\n".join([f"{head}--- a/{name}\n+++ b/{name}", *_hunks(after, name), ""])


def _hunks(after: bytes, name: str) -> Iterator[str]:
    _, rows = decoded(after, name)
    numbers = marked_numbers(after, name)
    for count, number in enumerate(sorted(numbers)):
        if number - 1 not in numbers:
            size = next(n for n in range(1, len(rows) + 1) if number + n not in numbers)
            yield f"@@ -{number - 1 - count},0 +{number}{f',{size}' if size > 1 else ''} @@"
        yield f"+{rows[number - 1]}"


def apply_pinned(data: bytes, patch: str, name: str) -> bytes:
    """Apply an add-only patch to exactly the file that it was made for, and check it both ways."""
    wanted = dict(re.findall(r"^# ([\w-]+): (\S+)", patch, re.M))
    if "sha256" not in wanted:
        raise PatchError("the patch does not say `# sha256: …` of the file that it fits")
    if (digest := _digest(data)) != (target := wanted["sha256"]):
        if _digest(reverse(data, name)) == target:
            raise PatchError(f"{name}: already patched; --reverse gives the original back")
        raise PatchError(
            f"{name}: sha256 {digest[:12]}… is not the {target[:12]}… that this patch was made "
            f"for; run autopatch.py on the file instead"
        )
    result = weave(data, _added_lines(patch), name)
    if wanted.get("patched-sha256", _digest(result)) != _digest(result):
        raise PatchError(f"{name}: the result is not what the patch promises; is it damaged?")
    return compiled(result, name)


def _added_lines(patch: str) -> dict[int, list[str]]:
    added: dict[int, list[str]] = {}
    line = 0
    for row in patch.split("\n"):
        if hunk := re.match(r"@@ -(\d+),0 \+\d+(?:,\d+)? @@", row):
            line = int(hunk[1]) + 1
        elif row.startswith("+") and not row.startswith("+++"):
            added.setdefault(line, []).append(row[1:])
        elif row.startswith(("-", "@@", " ")) and not row.startswith("---"):
            raise PatchError(
                "this patch removes a line or needs context; only added lines are taken"
            )
    return added


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
