"""The HTML of headings, tables and figures. Arguments are plain text, unless said otherwise."""

from collections.abc import Iterable, Sequence
from html import escape


def note(text: str) -> str:
    return f'<p class="note" role="note">{escape(text)}</p>'


def section(name: str, title: str, how: str, body: str, notes: Iterable[str] = ()) -> str:
    """A section with a heading and a "how to read this" line; `body` is HTML, all else is plain text."""
    how = f'<p class="how">{escape(how)}</p>\n' if how else ""
    return (
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(title)}</h2>\n{how}'
        f"{body}\n{''.join(map(note, notes))}\n</section>"
    )


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, *, final: str | None = None
) -> str:
    """A table of plain text: row headers, then right-aligned cells; the row named `final` is emphasised."""
    top = "".join(
        f'<th scope="col"{" class=number" if i else ""}>{escape(cell)}</th>' for i, cell in enumerate(head)
    )
    body = ""
    for name, *cells in rows:
        body += f'<tr{" class=final" if name == final else ""}><th scope="row">{escape(name)}</th>'
        body += "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells) + "</tr>\n"
    return (
        f'{scroll(caption)}<table class="lines"><caption class="sr">{escape(caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def scroll(label: str, css: str = "") -> str:
    """Start of a box that scrolls sideways where it is too wide, with the keyboard too."""
    return f'<div class="scroll {css}" role="region" tabindex="0" aria-label="{escape(label)}">'


def figure(svg: str, caption: str) -> str:
    """A figure; `svg` and `caption` are HTML."""
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"
