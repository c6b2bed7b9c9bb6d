"""Text of unknown origin inside Markdown, LaTeX and file names: it stays text, and one line.

Names of models, tasks, options and licences come from files of others. Here they lose the meaning
that a markup would give them.
"""

from __future__ import annotations

import re
from typing import Any

# As entities: what GitHub and the Hub would take for HTML or a link. Nothing else in Markdown does
# more than change the look.
_MARKDOWN = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": r"\|", "`": "&#96;", "\\": r"\\"}
    | {"*": r"\*", "[": r"\[", "]": r"\]", "$": r"\$"}
)
_LATEX = str.maketrans(
    {c: rf"\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}"}
    | {"▲": r"$\blacktriangle$", "▼": r"$\blacktriangledown$", "≈": r"$\approx$"}
)


def on_one_line(text: Any) -> str:
    """The text with single spaces in place of line breaks and other white space."""
    return " ".join(str(text).split())


def markdown(text: Any) -> str:
    """Text for a place in a Markdown line or table."""
    return on_one_line(text).translate(_MARKDOWN)


def markdown_code(text: Any) -> str:
    """A code span for a place in a Markdown line or table; backticks in it become quotes."""
    return "`" + on_one_line(text).replace("`", "'").replace("|", r"\|") + "`"


def latex(text: Any) -> str:
    """Text for a place in a LaTeX document, or in its comments."""
    return on_one_line(text).translate(_LATEX)


def file_name(text: Any) -> str:
    """A word for the name of a file or an anchor: letters, digits, "." "_" "-", and no path."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(text)).strip("-.") or "unnamed"
