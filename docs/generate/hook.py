"""What mkdocs calls while it builds the site: fills in the parts that come from the code.

A page asks for one by `<!-- generated NAME ARGUMENTS -->`, alone on a line.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]  # hooks are loaded by path

from docs.generate import api, cli, exchange, fields, layers, programs  # noqa: E402

GENERATORS: dict[str, Callable[..., str]] = {
    "api": api.render,
    "cli": cli.render,
    "exchange": exchange.render,
    "fields": fields.render,
    "layers": layers.render,
    "program": programs.render,
    "versions": fields.versions,
}
BLOCK = re.compile(r"^<!-- generated ([^\n]+?) -->$", re.MULTILINE)
# Blocks that tests do not run carry a word that Markdown does not know.
NO_RUN = re.compile(r"^(```\w+) no-run$", re.MULTILINE)
# Pages of the site that lie at the root of the repository, where hosts of repositories look.
ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "RELEASE.md", "SECURITY.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the root and the JSON Schema of plans."""
    for name in ROOT_PAGES:
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        for other in ROOT_PAGES:
            text = text.replace(f"]({other})", f"]({other.lower()})")
        files.append(File.generated(config, name.lower(), content=text))
    schema = json.dumps(fields.plan_schema(), indent=2) + "\n"
    files.append(File.generated(config, "schema/plan.json", content=schema))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces what a page asks for."""

    def generated(match: re.Match[str]) -> str:
        name, *arguments = match[1].split()
        if name not in GENERATORS:
            raise PluginError(f"{page.file.src_uri}: nothing generates {name!r}")
        return GENERATORS[name](*arguments)

    for root in ROOT_PAGES:
        markdown = markdown.replace(f"../{root}", root.lower())
    return BLOCK.sub(generated, NO_RUN.sub(r"\1", markdown))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Ends the build where a fence of a code block was not understood, which is no warning."""
    if "```" in html:
        raise PluginError(f"{page.file.src_uri}: a code block is not understood: its fence shows")
    return html
