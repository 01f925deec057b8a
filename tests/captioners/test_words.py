"""Captions to ids and back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captionfix.captioners.words import SPECIAL, split, vocabulary, word_tokenizer
from captionfix.errors import CaptionError


def test_split_keeps_inner_marks_only():
    assert split("A man's T-Shirt -- 'red', (two)!") == ["a", "man's", "t-shirt", "red", "two"]
    assert split("A man\u2019s dog\u2026") == ["a", "man's", "dog"]
    assert split(" .,! ") == []


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("abXé9 '-.,!?\u2019\t\u00a0\"/()"), max_size=24))
def test_tokeniser_and_split_are_the_same_words(text):
    words = sorted(set(split(text)))
    tokenizer = word_tokenizer([*SPECIAL, *words])
    ids = tokenizer(text)["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.convert_ids_to_tokens(ids[1:-1]) == split(text)


def test_vocabulary_orders_by_count_and_drops_rare_words():
    assert vocabulary(["a dog", "A cat.", "a dog runs"], at_least=2) == [*SPECIAL, "a", "dog"]


def test_round_trip(captioner):
    ids = captioner.tokenize("A red dog, runs!")
    assert captioner.text(ids) == "a red dog runs"
    v = captioner.vocabulary
    assert captioner.text((v.start, *ids, v.end, v.pad)) == "a red dog runs"
    assert [v.id(v.word(i)) for i in range(len(v))] == list(range(len(v)))
    assert v.special == {0, 1, 2, 3}


def test_unknown_words_are_listed_or_mapped(captioner):
    with pytest.raises(CaptionError, match=r"zebra.*zoo"):
        captioner.tokenize("a Zebra zoo dog")
    assert captioner.tokenize("a zebra dog", unknown="map") == (4, captioner.vocabulary.unknown, 6)


@pytest.mark.parametrize("special", ["<start>", "<end>", "a <pad> dog", "<unk>"])
def test_special_words_cannot_be_smuggled_in(captioner, special):
    with pytest.raises(CaptionError):
        captioner.tokenize(special)


@pytest.mark.parametrize("empty", ["", "  ", "...", "\n!"])
def test_empty_captions_are_refused(captioner, empty):
    with pytest.raises(CaptionError, match="no words"):
        captioner.tokenize(empty)


def test_too_long_captions_are_refused(captioner):
    assert len(captioner.tokenize("dog " * 8)) == 8
    with pytest.raises(CaptionError, match="9 words"):
        captioner.tokenize("dog " * 9)
