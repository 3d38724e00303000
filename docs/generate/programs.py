"""A program of examples/ as a page shows it: the file that tests run, not a copy of it."""

from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def render(name: str) -> str:
    """The whole program.

    Args:
        name: of a file in examples/.
    """
    return f"```python\n{(EXAMPLES / name).read_text(encoding='utf-8')}```\n"
