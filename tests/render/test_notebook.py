from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable

from PIL import Image

from captionfix.explanation import Explanation


def test_table_has_a_line_a_word(explanation: Explanation) -> None:
    lines = str(explanation).splitlines()
    assert lines[2].split()[:4] == ["word", "p", "image", "effect"]
    dog = next(line for line in lines if line.startswith("dog"))
    assert re.split(r"\s{2,}", dog) == [
        "dog (not cat)",
        "0.55",
        "70 %",
        "+1.25",
        "<start> 10 %, a 5 %",
        "cat 0.20, <end> 0.10",
    ]
    beside = next(line for line in lines if line.startswith("beside"))
    assert re.split(r"\s{2,}", beside)[2] == "-"


def test_html_is_self_contained(explanation: Explanation) -> None:
    html = explanation._repr_html_()
    found = re.search(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert found is not None
    assert Image.open(io.BytesIO(base64.b64decode(found[1]))).width > 600
    assert "://" not in html
    assert "srcdoc=" in html


def test_words_are_escaped(invent: Callable[..., Explanation]) -> None:
    html = invent('<script>alert("x")</script> dog')._repr_html_()
    assert "<script>" not in html
    assert 'alt="&lt;script&gt;alert(&quot;x&quot;)' in html


def test_png_for_front_ends_without_html(explanation: Explanation) -> None:
    assert Image.open(io.BytesIO(explanation._repr_png_())).format == "PNG"
    assert Image.open(io.BytesIO(explanation["dog"]._repr_png_())).size == (320, 240)
