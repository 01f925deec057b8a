from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable

import pytest
from PIL import Image

from captionfix.explanation import Explanation, Explanations


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


def test_jpeg_for_front_ends_without_html(invent: Callable[..., Explanation]) -> None:
    explanation = invent(size=(320, 240))
    assert Image.open(io.BytesIO(explanation._repr_jpeg_())).format == "JPEG"
    figure = explanation.figure(width=6)
    assert Image.open(io.BytesIO(figure._repr_jpeg_())).size == pytest.approx(figure.get_size_inches() * 110, abs=1)
    assert Image.open(io.BytesIO(explanation["dog"]._repr_jpeg_())).size == (320, 240)


def test_a_large_photographs_word_is_shown_smaller(invent: Callable[..., Explanation]) -> None:
    assert Image.open(io.BytesIO(invent(size=(2000, 1500))["dog"]._repr_jpeg_())).size == (640, 480)


def test_a_list_is_a_list_and_prints_a_line_each(invent: Callable[..., Explanation]) -> None:
    both = Explanations([invent(), invent("the ball")])
    assert isinstance(both, list)
    assert both[1].caption == "the ball"
    assert [one.caption for one in both[::-1]] == ["the ball", "a dog beside the ball"]
    assert repr(both).splitlines() == [
        "2 explanations",
        '0  "a dog beside the ball"  (least image effect: dog +1.25)',
        '1  "the ball"  (least image effect: ball +1.25)',
    ]
    assert repr(both[1:]).splitlines()[0] == "1 explanation"
    assert repr(both[2:]) == "0 explanations"
    assert both[2:]._repr_html_().count("<img") == 0


def test_a_list_shows_a_strip_each(invent: Callable[..., Explanation]) -> None:
    html = Explanations([invent(), invent("the ball")])._repr_html_()
    strips = [Image.open(io.BytesIO(base64.b64decode(found))) for found in re.findall(r"base64,([^\"]+)\"", html)]
    assert len(strips) == 2
    for picture in strips:
        assert picture.height == 190
        assert min(picture.crop((0, 30, 100, 110)).convert("L").getextrema()) < 60  # the ramp's dark end at the left
    assert html.count("<pre>") == 2
    assert "dog (not cat)" in html


def test_hundreds_stay_small(invent: Callable[..., Explanation]) -> None:
    many = Explanations([invent()] * 150)
    html = many._repr_html_()
    assert len(html) < 1_500_000
    assert html.count("<img") == 16
    assert html.count("a dog beside the ball") >= 100
    assert "134 more" in html
    assert "and 50 more; a slice such as [100:] shows them" in html
    assert len(repr(many).splitlines()) == 102


def test_a_lists_words_are_escaped(invent: Callable[..., Explanation]) -> None:
    html = Explanations([invent('<script>alert("x")</script> dog')] * 20)._repr_html_()
    assert "<script>" not in html
