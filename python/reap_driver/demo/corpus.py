"""Text for the demo: Python's own library, in three splits that share no text.

Four domains, so that experts can specialize:

- ``code``: library sources without their docstrings,
- ``docstrings``: the docstrings of the same modules,
- ``reference``: the language reference that ``help()`` shows (``pydoc_data.topics``),
- ``tables``: the character tables of the ``encodings`` package.

A document's split depends only on a hash of its name, so a module that is held out under one Python
version is held out under all versions. Packages that some installations leave out (tkinter,
idlelib, ...) are used for training only; Python's test suite is not used at all.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sysconfig
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reap_kernels.errors import DataError

DOMAINS = ("code", "docstrings", "reference", "tables")
SPLITS = ("train", "calibration", "held_out")

# Missing in some installations: used for training, never to measure.
_OPTIONAL = frozenset({"distutils", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo"})
# Tests, third-party code, data generated for one machine, bundled wheels.
_EXCLUDED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages",
                       "ensurepip", "__phello__", "pydoc_data", "__pycache__"})  # fmt: skip
_EXCLUDED_PREFIXES = ("config-", "_sysconfigdata", "lib-dynload")
# Shorter paragraphs ("try:", "import sys") occur everywhere, so they count as no shared text.
_MIN_PARAGRAPH = 40
_MIN_DOCUMENTS = 20  # a stripped installation has only a few files


@dataclass(frozen=True)
class Document:
    """One text of the corpus. ``name`` determines ``split``; ``domain`` is one of ``DOMAINS``."""

    domain: str
    name: str
    split: str
    text: str


def split_of(name: str) -> str:
    """The split (80 % train, 10 % calibration, 10 % held out) of a document name, by hash."""
    bucket = int.from_bytes(hashlib.sha256(f"reap-demo:{name}".encode()).digest()[:8], "big") % 10
    return {8: "calibration", 9: "held_out"}.get(bucket, "train")


def load_corpus(
    splits: Sequence[str] = SPLITS[1:], *, stdlib: Path | None = None
) -> list[Document]:
    """Reads the documents of some splits from the running Python's library, or from ``stdlib``.

    A paragraph that occurs in several splits is kept in only one of them: the first of held-out,
    calibration, train. This does not depend on which splits are read.

    Raises:
        DataError: the folder holds no library sources.
    """
    root = Path(stdlib or sysconfig.get_paths()["stdlib"])
    # Later splits are read too, because their paragraphs are removed from those asked for.
    wanted = SPLITS[min(SPLITS.index(s) for s in splits) :]
    documents = [*_modules(root, wanted), *_topics(root, wanted)]
    found = {d.domain for d in documents}
    if len(documents) < _MIN_DOCUMENTS or found != set(DOMAINS):
        raise DataError(
            f"{root}: found {len(documents)} documents in the domains {sorted(found)}, the demo"
            f" needs Python's library sources (.py files) with all of {list(DOMAINS)}; use a Python"
            " installation that includes them (most do; embeddable and zipped ones do not)"
        )
    return [d for d in _without_shared_paragraphs(documents) if d.split in splits]


def _modules(root: Path, splits: Sequence[str]) -> Iterator[Document]:
    for path in _sources(root):
        parts = path.relative_to(root).with_suffix("").parts
        name, is_codec = ".".join(parts), parts[0] == "encodings"
        module = name if is_codec else _stable_name(parts[0])
        split = "train" if module in _OPTIONAL else split_of(module)
        if split in splits:
            texts = _codec_texts if is_codec else _module_texts
            for domain, text in texts(_read(path)):
                yield Document(domain, name, split, text)


def _sources(root: Path) -> Iterator[Path]:
    """Library files below ``root``, in a fixed order; excluded folders are not listed."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(f for f in subfolders if not _is_excluded(f))
        for name in sorted(files):
            if name.endswith(".py") and not _is_excluded(name):
                yield Path(folder, name)


def _is_excluded(name: str) -> bool:
    return name in _EXCLUDED or name.startswith(_EXCLUDED_PREFIXES)


def _stable_name(module: str) -> str:
    """A module's name in all Python versions: 3.12 moved ``datetime`` to ``_pydatetime``."""
    return re.sub(r"^_(py)?(?=.)", "", module)


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace")


def _parse(text: str) -> ast.Module | None:
    """The syntax tree; None for library files that are not valid Python on purpose."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def _codec_texts(source: str) -> Iterator[tuple[str, str]]:
    """The decoding table of a charmap codec, if it has one."""
    start = re.search(r"^decoding_(table|map) = ", source, re.MULTILINE)
    if start:
        yield "tables", source[start.start() :]


def _module_texts(source: str) -> Iterator[tuple[str, str]]:
    """A module's code and its docstrings; nothing for files that are not valid Python."""
    tree = _parse(source)
    if tree:
        code, docs = _separate(source, tree)
        if code.strip():
            yield "code", code
        if docs:
            yield "docstrings", docs


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """The module and its statements in the order of `ast.walk`, which visits expressions as well
    and takes several times as long.
    """
    todo: deque[ast.AST] = deque([tree])
    while todo:
        node = todo.popleft()
        yield node
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):
            todo.extend(getattr(node, block, ()))


def _separate(text: str, tree: ast.Module) -> tuple[str, str]:
    """Splits a source into its code without docstrings, and its docstrings."""
    drop: set[int] = set()
    docs = []
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in _statements(tree):
        if not isinstance(node, scopes):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        docs.append(docstring)
        if len(node.body) > 1:  # a docstring that is the whole body stays in the code
            first = node.body[0]
            drop.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = text.splitlines()
    code = "\n".join(line for i, line in enumerate(lines, 1) if i not in drop)
    code = re.sub(r"\n{4,}", "\n\n\n", code).strip() + "\n"
    return code, "\n\n".join(docs) + "\n" if docs else ""


def _topics(root: Path, splits: Sequence[str]) -> Iterator[Document]:
    path = root / "pydoc_data" / "topics.py"
    tree = _parse(_read(path)) if path.exists() else None
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            for name, text in sorted(topics.items()):
                if split_of(name) in splits:
                    yield Document("reference", name, split_of(name), text.strip() + "\n")


def _without_shared_paragraphs(documents: list[Document]) -> list[Document]:
    """Drops from each split the paragraphs that a later split of ``SPLITS`` has.

    Topics quote each other and modules share headers, so splitting by name is not enough.
    """
    seen: set[str] = set()
    kept: dict[int, Document] = {}
    for split in reversed(SPLITS):
        own: set[str] = set()
        for i, document in enumerate(documents):
            if document.split != split:
                continue
            paragraphs = document.text.split("\n\n")
            fresh = [p for p in paragraphs if p.strip() not in seen]
            own.update(p.strip() for p in fresh if len(p.strip()) >= _MIN_PARAGRAPH)
            if any(p.strip() for p in fresh):
                kept[i] = replace(document, text="\n\n".join(fresh))
        seen |= own
    return [kept[i] for i in sorted(kept)]
