"""The reference of the command line, from its parser."""

import argparse
import re

from reap_driver.cli.main import build_parser

_SPECIAL = re.compile(r"([\\`*_\[\]<>|])")


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command, in the order of `reap-kernels --help`."""
    [found] = [
        action.choices
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return dict(found)


def render() -> str:
    """Every command with its description, every option with its default, and the examples."""
    return "\n".join(_command(name, parser) for name, parser in commands().items())


def _command(name: str, parser: argparse.ArgumentParser, level: str = "##") -> str:
    """A command; those that it has itself follow it, one level below."""
    parts = [f"{level} {name}\n", _prose(parser.description or "")]
    below: list[str] = []
    for group in parser._action_groups:
        actions = [item for item in group._group_actions if "--help" not in item.option_strings]
        own = [item for item in actions if isinstance(item, argparse._SubParsersAction)]
        for word, sub in (pair for item in own for pair in item.choices.items()):
            below.append(_command(f"{name} {word}", sub, f"{level}#"))
        if actions and not own:
            title, anchor = _sentence(group.title or ""), _slug(group.title)
            parts.append(f"**{title}**{{ #{_slug(name)}-{anchor} }}\n")
            parts.append(_prose(group.description or ""))
            parts += [_action(_slug(name), parser, action) for action in actions]
    if parser.epilog:
        parts.append(f"**Examples**{{ #{_slug(name)}-examples }}\n")
        parts.append(_prose(parser.epilog.removeprefix("examples:\n")))
    return "\n".join(part for part in [*parts, *below] if part)


def _action(command: str, parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """One argument as an entry of a definition list."""
    formatter = parser._get_formatter()
    shape = formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
    if action.option_strings:
        spellings = [f"{option} {shape}".rstrip() for option in action.option_strings]
        anchor = action.option_strings[-1].lstrip("-")
    else:
        spellings = [formatter._format_args(action, action.dest)]
        anchor = action.dest
    terms = ", ".join(f"`{spelling}`" for spelling in spellings)
    text = _escaped(formatter._expand_help(action)) if action.help else ""
    default = action.default
    if "(default" not in text and default not in (None, False, [], argparse.SUPPRESS):
        text += f" (default: {_escaped(str(default))})"
    if getattr(action, "required", False) and action.option_strings:
        text += " (required)"
    return f"{terms} {{ #{command}-{_slug(anchor)} }}\n:   {_sentence(text)}\n"


def _prose(text: str) -> str:
    """Text of a parser as Markdown: what is indented by two spaces is commands."""
    parts, block = [], list[str]()
    for line in [*text.strip("\n").split("\n"), ""]:
        if line.startswith("  "):
            block.append(line[2:])
            continue
        if block:
            parts.append("```sh\n" + "\n".join(block) + "\n```")
            block = []
        # A code span keeps its characters.
        pieces = line.split("`")
        pieces[::2] = [_escaped(piece) for piece in pieces[::2]]
        parts.append("`".join(pieces))
    return "\n".join(parts).strip("\n") + "\n"


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _slug(text: str | None) -> str:
    return re.sub(r"\W+", "-", (text or "").lower()).strip("-")
