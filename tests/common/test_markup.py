"""Text stays text in every markup, and names are no paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from llq_hf.common.markup import file_name, latex, markdown, markdown_code

EVIL = "a<b>&c|d`e`\n# f\\g[h](i)*j*$k$"


def test_markdown() -> None:
    assert markdown("group_size=64 (best)") == "group_size=64 (best)"
    assert markdown(EVIL) == (r"a&lt;b&gt;&amp;c\|d&#96;e&#96; # f\\g\[h\](i)\*j\*\$k\$")
    assert markdown_code("x`y`|z\nw") == r"`x'y'\|z w`"


def test_latex() -> None:
    assert latex("50% of a_b & {c}\n\\d") == r"50\% of a\_b \& \{c\} \textbackslash{}d"
    assert latex("~^<>#$") == (r"\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}\#\$")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("demo-gptq-3-1f00", "demo-gptq-3-1f00"),
        ("Meta-Llama-3.1_8B", "Meta-Llama-3.1_8B"),
        ("../../x", "x"),
        ("a/b\\c", "a-b-c"),
        ("..", "unnamed"),
        ("", "unnamed"),
        ("CON\0\n:x", "CON-x"),
    ],
)
def test_file_names(text: str, name: str) -> None:
    assert file_name(text) == name
    assert Path(name).name == name
