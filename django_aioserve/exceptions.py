"""Errors that a user can make; each says in one line what to change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ConfigurationError", "Problem"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in the configuration.

    ``where`` names the option as its source spells it (``--workers``,
    ``AIOSERVE_WORKERS``), ``source`` where the value came from, ``value`` what was
    found there and ``expected`` what would be right. ``id`` is the suffix of the
    system check that reports it (``E002``).
    """

    where: str
    source: str
    value: object
    expected: str
    id: str = "E002"

    def __str__(self) -> str:
        if isinstance(self.value, str):
            shown = self.value
            if not shown.isprintable():  # it stays one line, and does nothing to the terminal
                shown = shown.encode("unicode_escape").decode("ascii")
            quoted = f'"{shown}"'
        else:
            quoted = repr(self.value)
        end = "" if self.expected.endswith("?") else "."
        return f"{self.where} ({self.source}) is {quoted}; expected {self.expected}{end}"


class ConfigurationError(Exception):
    """The configuration holds one or more mistakes, all of them in ``problems``.

    .. versionadded:: 0.1
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)
