"""The frame of a page, and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from dtrain.errors import UsageError


def document(title: str, parts: Iterable[str]) -> str:
    """Return a whole page. It needs no other file and no network.

    Args:
        title: the title, as plain text.
        parts: the content, as HTML.
    """
    own = files("dtrain.page")
    style = own.joinpath("style.css").read_text(encoding="utf-8")
    script = own.joinpath("script.js").read_text(encoding="utf-8")
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{style}</style></head><body>",
            *parts,
            f"<script>{script}</script></body></html>",
        ]
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int | None = None) -> str:
    """Return a table that scrolls on a narrow screen.

    Args:
        head: the headings, as plain text.
        rows: the cells, as HTML: a text is escaped, or a whole `<td>`.
        numbers: the column from which on cells are numbers. None means that none are.
    """

    def kind(column: int) -> str:
        return ' class="number"' if numbers is not None and column >= numbers else ""

    heading = "".join(f"<th{kind(k)}>{escape(each)}</th>" for k, each in enumerate(head))
    body = "".join(
        "<tr>"
        + "".join(
            each if each.startswith("<td") else f"<td{kind(k)}>{each}</td>"
            for k, each in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{heading}</tr>{body}</table></div>'


def folded(summary: str, content: str) -> str:
    """Return content that a reader can unfold."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Return a legend of (CSS class, label)."""
    parts = (f'<span><i class="{style}"></i>{escape(label)}</span>' for style, label in entries)
    return f'<p class="legend">{"".join(parts)}</p>'


def write(page: str, path: str | Path) -> None:
    """Write a page.

    Raises:
        UsageError: it cannot be written to this path.
    """
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}", code="file.not-writable"
        ) from error
