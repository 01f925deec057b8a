"""A captioner out of functions: the same decoding, preprocessing as torchvision's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from captionfix.captioners.captioner import Vocabulary
from captionfix.captioners.module import ModuleCaptioner
from captionfix.captioners.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from captionfix.errors import CaptionError


def rebuilt(captioner, **options):
    return ModuleCaptioner(
        captioner.model, captioner.encode, captioner.decode, captioner.vocabulary, captioner.prepare, **options
    )


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_decoding_of_prefixes_equals_decoding_with_states(make, pixels, seed, beams):
    captioner = make("show-attend-tell", seed, max_words=6)
    found = rebuilt(captioner, max_words=6).generate(pixels, beams=beams)
    assert found == captioner.generate(pixels, beams=beams)
    assert all(found)


def test_sampling_repeats_with_its_seed_and_leaves_the_global_generator(make, pixels):
    captioner = rebuilt(make("show-tell"), max_words=6)
    before = torch.random.get_rng_state()
    first = captioner.generate(pixels, sample=True, seed=3)
    assert first == captioner.generate(pixels, sample=True, seed=3)
    assert len({*first, *captioner.generate(pixels, sample=True, seed=4)}) > 1
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("beams", "longest"), [(0, 5), (3, 0)])
def test_no_beam_or_no_word_is_refused(make, pixels, beams, longest):
    with pytest.raises(CaptionError, match="at least 1"):
        rebuilt(make("show-tell")).generate(pixels, beams=beams, max_words=longest)


def test_words_that_are_not_known(make):
    captioner = rebuilt(make("show-tell"), max_words=3)
    assert captioner.tokenize("A red dog!") == tuple(captioner.vocabulary.id(w) for w in ("a", "red", "dog"))
    with pytest.raises(CaptionError, match="does not know: cat, zebra"):
        captioner.tokenize("a zebra cat")
    assert captioner.tokenize("a cat", unknown="map")[1] == captioner.vocabulary.unknown
    with pytest.raises(CaptionError, match="at most 3"):
        captioner.tokenize("a red dog runs")
    with pytest.raises(CaptionError, match="no words"):
        captioner.tokenize(" ... ")


def test_without_an_unknown_word_there_is_nothing_to_map_to(make):
    captioner = rebuilt(make("show-tell"))
    captioner.vocabulary = Vocabulary(("<start>", "<end>", "dog"), 0, 1)
    with pytest.raises(CaptionError, match="does not know: cat"):
        captioner.tokenize("dog cat", unknown="map")


@pytest.fixture
def photograph() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 97, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Preprocess((40, 50)), [transforms.Resize((40, 50))]),
        (Preprocess(48, 32), [transforms.Resize(48), transforms.CenterCrop(32)]),
        (Preprocess(None, 33), [transforms.CenterCrop(33)]),
    ],
)
def test_preprocessing_equals_torchvision_s(photograph, ours, theirs):
    whole = transforms.Compose([*theirs, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    torch.testing.assert_close(ours(photograph).pixels, whole(photograph))


def test_the_window_is_what_the_crop_shows(photograph):
    # 97 x 61 -> 76 x 48, of which the middle 32 are kept
    x0, y0, x1, y1 = Preprocess(48, 32)(photograph).window
    assert (x0, x1) == pytest.approx((22 * 97 / 76, 54 * 97 / 76))
    assert (y0, y1) == pytest.approx((8 * 61 / 48, 40 * 61 / 48))
    assert Preprocess((40, 50))(photograph).window == (0, 0, 97, 61)
