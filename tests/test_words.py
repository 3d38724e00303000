"""The field's words: no public name has an old word in it, and no prose an old idiom."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Words of names (the parts between underscores, hyphens and capitals), and the word to use.
NAMES = {
    r"(de)?quantis\w*": "quantize",
    r"(un)?normalis\w*": "normalize",
    r"tokenis\w*": "tokenize",
    r"(un)?initialis\w*": "initialize",
    r"specialis(e[drs]?|ing|ation)": "specialize",
    r"serialis\w*": "serialize",
    r"synchronis\w*": "synchronize",
    r"randomis\w*": "randomize",
    r"recognis\w*": "recognize",
    r"optimis\w*": "optimize",
    r"summaris\w*": "summarize",
    r"colours?": "color",
    r"neighbours?": "neighbor",
    r"behaviours?": "behavior",
    r"park(s|ed|ing)?": "offload",
    r"gates": "router_weights",
}
# Whole names in the packages, and the name to use. `gate` alone is the projection of a gated MLP.
WHOLE = {
    r"route": "sort_by_expert",
    r"gate_(weight|share|sum|mean)s?": "router_weight",
    r"gate_(formula|kind)|GateFormula|probe_gate\w*": "activation",
    r"[Ss]tages": "stage_kernels, or what they are",
}
# A part of every such name: only files with one of them are parsed.
STEMS = re.compile(
    r"(quant|normal|token|initial|special|serial|chron|random|recogn|optim|summar)is|[ob]our[s_(=:]"
    r"|park|gates|gate_[wfsmk]|gateformula|probe_gate|def _?route\b|\bstages\b",
    re.IGNORECASE,
)
# Idioms of prose, and what to write.
THINGS = (
    r"(expert|token|thread|warp|layer|block|slot|group|row|prediction|kernel|batch|program|process"
    r"|rank|projection|sequence|column|tile|element|measurement|channel|candidate|chunk|forward"
    r"|architecture|domain|round|source|tool|task)"
)
COUNTED = (
    r"(rows|one|once|lines?|bytes|registers|values|entries|elements|instructions|operations"
    r"|numbers?|weights|counts|sums)"
)
PROSE = {
    rf"{COUNTED} an? {THINGS}\b": "per",
    rf"\b(a|one) (row|line|warp|file|entry|shard|thread|number) an? {THINGS}\b": "one ... per",
    r"\b(more|less|the) worth(y|ier)\b": "a higher score",
    r"\bout of the race\b": "too slow",
    r"\bobeyed\b": "the request is served",
    r"\bspared what\b": "does not have to",
    r"\bwhose kernels\b": "the backend of a stage",
    r"\bwhat a disk may\b": "errors of the file system",
    r"\bwithout a word\b": "silently",
    r"\bwhat is said, and when\b": "raises",
    r"\b(states?|hidden states?) (lie|wait|park)s?\b": "are stored",
    r"\bpark(s|ed|ing)?\b": "offload",
    r"\b(hands?|handed) on\b": "pass on",
    r"\b(whomever|nobody knows)\b": "say what is unknown",
    r"\b(de|un)?(quanti|tokeni|seriali)s(e[drs]?|ing|ation|able)\b": "American spelling",
}


def sources() -> list[Path]:
    folders = ("python", "reap_kernels", "bench", "docs", "examples", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted({*files, ROOT / "setup.py"} - {Path(__file__)})


def pages() -> list[Path]:
    """The pages, and the sources in C++, of which only the prose is checked."""
    cpp = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *cpp])


def names(node: ast.AST, local: bool = False) -> Iterator[tuple[int, str]]:
    """Line and name of what a module defines: all but variables in functions, and its flags."""
    match node:
        case ast.FunctionDef() | ast.ClassDef():
            yield node.lineno, node.name
            local = isinstance(node, ast.FunctionDef)
        case ast.arg():
            yield node.lineno, node.arg
        case ast.Name(ctx=ast.Store()) if not local:
            yield node.lineno, node.id
        case ast.Attribute(ctx=ast.Store()):
            yield node.lineno, node.attr
        case ast.Constant(value=str(text)) if re.fullmatch(r"--[a-z][a-z-]*", text):
            yield node.lineno, text.removeprefix("--")
    for child in ast.iter_child_nodes(node):
        yield from names(child, local)


def words(name: str) -> list[str]:
    """The words of a name: router_weight, RouterWeight and router-weight have the same two."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)]


def old_name(name: str, *, packages: bool = True) -> str | None:
    """What to use instead of a name; None if it is fine. `packages`: the name is in one of ours."""
    for pattern, instead in WHOLE.items():
        if packages and re.fullmatch(pattern, name.strip("_")):
            return instead
    for pattern, instead in NAMES.items():
        if any(re.fullmatch(pattern, word) for word in words(name)):
            return instead
    return None


def prose(path: Path) -> str:
    """The text of a file in lower case and one line: of pages without their code, else all of it.

    Marks of comments and the quotes between the parts of a string are left out, so that an idiom
    is found across lines.
    """
    text = path.read_text()
    if path.suffix == ".md":
        text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    text = re.sub(r"\n\s*(#|//|\*)\s", " ", text)
    text = re.sub(r'"\s*\n\s*f?"', "", text)
    return " ".join(text.lower().split())


def test_names_have_the_words_of_the_field() -> None:
    old = []
    for path in sources():
        ours = path.relative_to(ROOT).parts[0] in ("python", "reap_kernels")
        text = path.read_text()
        if not STEMS.search(text + path.stem):
            continue
        for line, name in [(1, path.stem), *names(ast.parse(text))]:
            if instead := old_name(name, packages=ours):
                old.append(f"{path.relative_to(ROOT)}:{line}: {name}: use {instead}")
    assert not old, "\n".join(old)


def test_prose_has_no_idioms() -> None:
    old = []
    for path in [*sources(), *pages()]:
        text = prose(path)
        for pattern, instead in PROSE.items():
            old += [
                f"{path.relative_to(ROOT)}: {text[max(0, found.start() - 20) :][:60]!r}: {instead}"
                for found in re.finditer(pattern, text)
            ]
    assert not old, "\n".join(old)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("QuantisedExperts", "quantize"),
        ("normalise-scores", "normalize"),
        ("park_folder", "offload"),
        ("route", "sort_by_expert"),
        ("routed", None),
        ("gate_proj", None),
        ("sort_by_expert", None),
    ],
)
def test_an_old_name_is_found(name: str, instead: str | None) -> None:
    assert old_name(name) == instead


def test_an_old_idiom_is_found() -> None:
    said = "256 rows an expert, one line a kernel: what whoever asked wants"
    found = [instead for pattern, instead in PROSE.items() if re.search(pattern, said)]
    assert found == ["per", "one ... per"]
