"""The command reference, made of the parser whenever the documentation is built."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1] / "build" / "tree"
PLACE = "<!-- the commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the commands where a page has the place for them."""
    if PLACE not in markdown:
        return markdown
    sys.path.insert(0, str(PACKAGE))
    from esm_packed.runners.cli.options import build_parser

    return markdown.replace(PLACE, "\n".join(_commands(build_parser())))


def _commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Sections of all commands, those of commands included."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _command(command)
                yield from _commands(command)


def _command(parser: argparse.ArgumentParser) -> Iterator[str]:
    formatter = parser._get_formatter()
    yield f"## {parser.prog.removeprefix('esm-packed ')}\n\n{_escaped(parser.description or '')}\n"
    yield _block(re.sub(r"^usage: ", "", parser.format_usage()))
    for group in parser._action_groups:
        shown = [a for a in group._group_actions if not isinstance(a, argparse._SubParsersAction)]
        if not shown:
            continue
        yield f"**{_escaped((group.title or '').capitalize())}**\n"
        for action in shown:
            invocation = formatter._format_action_invocation(action)
            text = formatter._expand_help(action) if action.help else ""
            yield f"`{invocation}`\n:   {_escaped(text) or '&nbsp;'}\n"
    if parser.epilog:
        yield _block(parser.epilog)


def _block(text: str) -> str:
    return f"```text\n{text.strip()}\n```\n"


def _escaped(text: str) -> str:
    """Help texts are plain, but for names between backticks."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\\*_<>\[\]#|])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)
