"""HTML and SVG as escaped text: whatever is not `Markup` is escaped, so a forgotten call cannot inject."""

import html
import re

_NOT_ALLOWED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """Text that is HTML already."""


def escape(value: object) -> Markup:
    """`value` as HTML text; characters that no HTML page may hold become U+FFFD.

    Examples:
        >>> escape("<b>")
        '&lt;b&gt;'
    """
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(_NOT_ALLOWED.sub("\ufffd", str(value))))


def join(*parts: object) -> Markup:
    """The parts one after the other, each escaped unless it is `Markup`; None is left out."""
    return Markup("".join(escape(part) for part in parts if part is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element, well-formed as HTML and as XML.

    Args:
        name: of the element.
        *children: text (escaped) or `Markup` (kept); None is left out.
        **attributes: `class_` is class, `aria_label` is aria-label; None is left out.

    Examples:
        >>> tag("p", "a < b", class_="note")
        '<p class="note">a &lt; b</p>'
    """
    opening = name
    for key, value in attributes.items():
        if value is not None:
            opening += f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
    if not children and name in _EMPTY:
        return Markup(f"<{opening}/>")
    return Markup(f"<{opening}>{join(*children)}</{name}>")


_EMPTY = frozenset({"circle", "input", "line", "meta", "path", "rect"})


def shorten(value: object, limit: int) -> str:
    """At most `limit` characters of the text, the middle left out: both ends of a path say most.

    Examples:
        >>> shorten("encoder.layers.12", 11)
        'encod…rs.12'
    """
    text = str(value)
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 2
    return text[: limit - 1 - tail] + "…" + text[len(text) - tail :]
