"""The reference of the settings, made from their table when the documentation is built.

MkDocs calls `on_page_markdown` for each page (``hooks`` in mkdocs.yml); the page that holds
`MARK` gets the reference in its place.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from django_aioserve.conf import OPTIONS, Boolean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django_aioserve.conf import Option

MARK = "<!-- the table of settings -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the reference where the page wants it."""
    return markdown.replace(MARK, reference()) if MARK in markdown else markdown


def reference() -> str:
    """Describe every option, group by group, in Markdown."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    group = ""
    for option in OPTIONS.values():
        if option.group != group:
            group = option.group
            yield f"## {group}\n"
        yield f"### `{option.setting}` {{ #{option.name} }}\n"
        yield f"{_text(option.help)}\n"
        yield f"- Default: {_default(option)}"
        yield f"- Expected: {_text(option.kind.expected)}"
        yield f"- {_flag(option)}\n"


def _text(text: str) -> str:
    return re.sub(r"([*_<`])", r"\\\1", text)


def _default(option: Option) -> str:
    return f"`{option.default_text}`" if option.default_text not in {"", "{}"} else "none"


def _flag(option: Option) -> str:
    if not option.flag:
        return "No flag and no environment variable: it is a dictionary"
    if isinstance(option.kind, Boolean):
        return f"Flags: `{option.flag_name}`, `{option.flag_name.replace('--', '--no-', 1)}`"
    return f"Flag: `{option.flag_name} {option.kind.metavar}`"
