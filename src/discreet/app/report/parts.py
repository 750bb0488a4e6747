"""The page's building blocks. Arguments called ``markup`` are trusted page code; every other string is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from discreet.app.report.style import STYLE
from discreet.app.report.text import named, percent, plain, safe

MOST_ROWS = 200
LONGEST_SENTENCE = 2000
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Content security policy: the page may use its own style sheet, and nothing else, from nowhere else."""


@dataclass(frozen=True)
class Share:
    """One part of a bar: a label, and its share between 0 and 1."""

    label: str
    share: float


def page(*, title: str, markup: Sequence[str]) -> str:
    """A whole document around the given blocks."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            '<meta name="robots" content="noindex">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{safe(title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            *markup,
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def section(heading: str, *, markup: Sequence[str]) -> str:
    """A titled part of the page; nothing at all when it has no content."""
    content = [block for block in markup if block]
    if not content:
        return ""
    return "\n".join(["<section>", f"<h2>{safe(heading)}</h2>", *content, "</section>"])


def paragraph(markup: str, *, role: str = "") -> str:
    """A paragraph of trusted markup, with an optional style role."""
    return f'<p class="{role}">{markup}</p>' if role else f"<p>{markup}</p>"


def listing(items: Sequence[str], *, role: str = "") -> str:
    """A list of plain texts."""
    if not items:
        return ""
    shown = [f"<li>{sentence(item)}</li>" for item in items[:MOST_ROWS]]
    more = [f"<li>and {plain(len(items) - MOST_ROWS)} more</li>"] if len(items) > MOST_ROWS else []
    return "\n".join([f'<ul class="{role}">' if role else "<ul>", *shown, *more, "</ul>"])


def table(header: Sequence[str], *, rows: Sequence[Sequence[str]], numeric: Sequence[int] = (), role: str = "") -> str:
    """A table of trusted cells; columns in ``numeric`` are aligned as figures. Nothing when there are no rows."""
    if not rows:
        return ""
    kinds = ["num" if column in numeric else "" for column in range(len(header))]
    head = "".join(f'<th scope="col"{_class(kind)}>{safe(name)}</th>' for name, kind in zip(header, kinds, strict=True))
    body = [
        "<tr>" + "".join(f"<td{_class(kind)}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows[:MOST_ROWS]
    ]
    more = len(rows) - MOST_ROWS
    rest = [f'<tr><td colspan="{len(header)}">and {plain(more)} more rows</td></tr>'] if more > 0 else []
    opening = f'<div class="scroll"><table{_class(role)}>'
    return "\n".join([opening, f"<thead><tr>{head}</tr></thead>", "<tbody>", *body, *rest, "</tbody></table></div>"])


def facts(pairs: Sequence[tuple[str, str, str]]) -> str:
    """Large figures side by side: (label, trusted figure, note)."""
    cells = [
        f'<div><dt>{safe(label)}</dt><dd>{figure}</dd><dd class="note">{safe(note)}</dd></div>'
        for label, figure, note in pairs
    ]
    return "\n".join(['<dl class="facts">', *cells, "</dl>"])


def bar(shares: Sequence[Share]) -> str:
    """A horizontal bar cut into shares, with a legend that repeats every figure in words."""
    total = sum(part.share for part in shares)
    if not shares or not total > 0:
        return ""
    cuts, keys = [], []
    for index, part in enumerate(shares):
        width = part.share / total
        cuts.append(f'<span class="tone{index % 4}" style="width:{100 * width:.4f}%"></span>')
        keys.append(
            f'<li><span class="key tone{index % 4}"></span>{named(part.label)}'
            f'<span class="figure">{percent(width)}</span></li>'
        )
    return "\n".join(
        [
            '<div class="bar" role="img" aria-label="shares, listed below">',
            *cuts,
            "</div>",
            '<ul class="legend">',
            *keys,
            "</ul>",
        ]
    )


def figure(markup: str, *, caption: str) -> str:
    """A drawing with its caption."""
    return f"<figure>{markup}<figcaption>{sentence(caption)}</figcaption></figure>" if markup else ""


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def sentence(text: str) -> str:
    """A plain text that may be longer than a name: escaped piece by piece, up to `LONGEST_SENTENCE` characters."""
    pieces = [text[start : start + 100] for start in range(0, min(len(text), LONGEST_SENTENCE), 100)]
    return "".join(safe(piece) for piece in pieces) + ("…" if len(text) > LONGEST_SENTENCE else "")
