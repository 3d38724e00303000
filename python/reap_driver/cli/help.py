"""How `--help` is laid out: paragraphs as wide as the terminal, what is indented as it is."""

import argparse
import re


class Help(argparse.RawDescriptionHelpFormatter):
    """Wraps the paragraphs of descriptions and epilogs; lines of examples stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        wrap = super(argparse.RawDescriptionHelpFormatter, self)._fill_text
        blocks = re.split(r"\n{2,}", text.strip("\n"))
        kept = (block if re.search(r"^ ", block, re.MULTILINE) else "" for block in blocks)
        return "\n\n".join(
            "\n".join(indent + line for line in same.splitlines()) or wrap(block, width, indent)
            for block, same in zip(blocks, kept, strict=True)
        )


def usage(parser: argparse.ArgumentParser) -> str:
    """What a command is called with: its arguments, and of its options those that must be given;
    `--help` lists the others.
    """
    shapes: dict[object, str] = {
        None: "{0}",
        argparse.OPTIONAL: "[{0}]",
        argparse.ONE_OR_MORE: "{0} [{0} ...]",
        argparse.PARSER: "[{0} ...]",
    }
    words = ["%(prog)s"]
    for action in parser._actions:
        name = str(action.metavar or action.dest)
        if not action.option_strings:
            words.append(shapes[action.nargs].format(name))
        elif action.required:
            words += [action.option_strings[-1], name]
    return " ".join([*words, "[options]"])
