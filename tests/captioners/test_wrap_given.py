"""What a user gives beside the model: vocabularies in their forms, preprocessing whose window is found."""

from __future__ import annotations

import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.transforms import functional as TF

from captionfix.captioners.captioner import Vocabulary
from captionfix.captioners.preprocess import Preprocess
from captionfix.captioners.vocabularies import read_vocabulary
from captionfix.captioners.window import Preparation
from captionfix.errors import CaptionerError

WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "dog"]
FOUND = Vocabulary(tuple(WORDS), 1, 2, 0, 3)


class Holder:
    def __init__(self, **tables):
        vars(self).update(tables)


class Tokenizer:
    def get_vocab(self):
        return {word: i for i, word in enumerate(WORDS)}


@pytest.mark.parametrize(
    "given",
    [
        WORDS,
        {word: i for i, word in enumerate(WORDS)},
        dict(enumerate(WORDS)),
        {str(i): word for i, word in enumerate(WORDS)},
        Holder(word2idx={word: i for i, word in enumerate(WORDS)}, idx=6),
        Holder(idx2word=dict(enumerate(WORDS)), word2idx={}),
        Holder(itos=WORDS),
        Holder(stoi={word: np.int64(i) for i, word in enumerate(WORDS)}),
        Holder(id2word=WORDS),
        Tokenizer(),
        FOUND,
    ],
    ids=lambda given: type(given).__name__,
)
def test_forms_of_vocabularies(given):
    assert read_vocabulary(given) == FOUND


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (("<S>", "</S>"), (0, 1)),
        (("<SOS>", "<EOS>", "<PAD>", "<UNK>"), (0, 1, 2, 3)),
        (("<s>", "</s>", "[UNK]"), (0, 1, None, 2)),
        (("startseq", "endseq"), (0, 1)),
    ],
)
def test_usual_names_are_found(names, ids):
    v = read_vocabulary([*names, "start", "end", "dog"])
    assert (v.start, v.end, v.pad, v.unknown) == (*ids, None, None)[:4]


def test_special_words_by_word_by_id_and_where_no_word_has_the_id():
    v = read_vocabulary(["go", "stop", "dog"], start="go", end=1)
    assert (v.start, v.end, v.pad) == (0, 1, None)
    # ids from 1 on; 0 begins and ends every caption, as in ImageCaptioning.pytorch
    v = read_vocabulary({"1": "a", "2": "dog", "3": "UNK"}, start=0, end=0, pad=0)
    assert v.words == ("<start>", "a", "dog", "UNK")
    assert (v.start, v.end, v.pad, v.unknown) == (0, 0, 0, 3)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (["a", "dog"], {}, r"which word begins a caption\? .* Give start="),
        (["<start>", "dog"], {}, r"which word ends a caption\? .* Give end="),
        (["<start>", "<s>", "<end>"], {}, "start could be <start> or <s>; give start="),
        (WORDS, {"start": "begin"}, "start='begin' is not among its 6 words"),
        (WORDS, {"end": -1}, "end=-1 is no id; the ids are 0 to 5"),
        (WORDS, {"end": True}, "end=True is no id"),
        ({"<start>": 0, "<end>": 1, "dog": 4}, {}, "no word has id 2, 3"),
        ({"<start>": 0, "<end>": 1, "dog": 1}, {}, "the id 1 belongs to both '<end>' and 'dog'"),
        ({"<start>": 0, "<end>": "x"}, {}, "{word: id} or {id: word}"),
        ({"x": "a", "y": "b"}, {}, "'x' .* is no id"),
        ({}, {}, "it is empty"),
        ([1, 2], {}, "a list must hold words"),
        (42, {}, "a int holds no table of words"),
        (FOUND, {"start": 1}, "says itself"),
    ],
)
def test_vocabularies_that_are_refused(given, options, message):
    with pytest.raises(CaptionerError, match=message):
        read_vocabulary(given, **options)


# windows -------------------------------------------------------------------------------------------------------------

NORMAL = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]


def composed(*steps):
    return transforms.Compose([*steps, *NORMAL])


def letterboxed(image):
    """The whole image in the middle of a black square."""
    return composed()(ImageOps.pad(image, (64, 64)))


def squared(w, h):
    """The window of that: it reaches beyond the image."""
    x, y = (w - max(w, h)) / 2, (h - max(w, h)) / 2
    return x, y, w - x, h - y


def caffe(image):
    """BGR, 0 to 255, without the mean; the shorter side 70, the middle 64."""
    small = TF.center_crop(TF.resize(image, 70), [64, 64])
    array = np.asarray(small, dtype=np.float32)[..., ::-1] - np.array([104.0, 117.0, 123.0], dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))[None]


def corner(image):
    return composed(transforms.Resize((80, 100)))(image)[:, 10:74, 30:94]


def by_processor(image):
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 48, "width": 48})
    return processor(image, return_tensors="pt")


def centre(size, resize, crop):
    return Preprocess(resize, crop)(Image.new("RGB", size)).window


@pytest.mark.parametrize("size", [(97, 61), (320, 240), (500, 731)])
@pytest.mark.parametrize(
    ("function", "window"),
    [
        (composed(transforms.Resize((64, 64))), lambda w, h: (0, 0, w, h)),
        (composed(transforms.Resize(72), transforms.CenterCrop(64)), lambda w, h: centre((w, h), 72, 64)),
        (composed(transforms.CenterCrop(48)), lambda w, h: centre((w, h), None, 48)),
        (composed(transforms.Grayscale(3), transforms.Resize((40, 50))), lambda w, h: (0, 0, w, h)),
        (letterboxed, squared),
        (caffe, lambda w, h: centre((w, h), 70, 64)),
        (corner, lambda w, h: (0.3 * w, 0.125 * h, 0.94 * w, 0.925 * h)),
        (by_processor, lambda w, h: (0, 0, w, h)),
    ],
    ids=["squash", "crop", "crop only", "grey", "letterbox", "caffe", "corner", "processor"],
)
def test_windows_are_found(function, window, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    prepared = Preparation(function)(image)
    wanted = window(*size)
    assert prepared.size == size
    made = function(image)
    made = made["pixel_values"] if not isinstance(made, torch.Tensor) else made
    assert torch.equal(prepared.pixels, made.reshape(prepared.pixels.shape))
    # one pixel of the input is several of the original; the rest is rounding of crops to whole pixels of 64
    assert prepared.window == pytest.approx(wanted, abs=max(0.6, 0.01 * max(size)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (composed(transforms.RandomHorizontalFlip()), "preprocess is random"),
        (composed(transforms.RandomResizedCrop(32)), "preprocess is random"),
        (composed(transforms.Resize((32, 32)), transforms.ColorJitter(0.5)), "preprocess is random"),
        (composed(transforms.Resize((32, 32)), transforms.RandomHorizontalFlip(1.0)), "mirrors the image along x"),
        (composed(transforms.Lambda(ImageOps.flip)), "mirrors the image along y"),
        (composed(transforms.Lambda(lambda i: i.rotate(90, expand=True))), "not linear in|more than scale and cut"),
        (composed(transforms.Lambda(lambda i: i.rotate(20))), "more than scale and cut"),
        (composed(transforms.Lambda(lambda i: TF.adjust_gamma(i, 2.2))), r"more than scale and cut.* window="),
        (lambda image: torch.zeros(3, 8, 8), "same for a black and for a white image"),
        (lambda image: np.asarray(image), "floating point"),
        (transforms.PILToTensor(), r"torch.uint8; .* \(ToTensor\(\)\)"),
        (lambda image: image, r"must return a \(C, H, W\) tensor for one image, not Image"),
        (lambda image: torch.zeros(3, 4), r"not shape \(3, 4\)"),
        (lambda image: 1 / 0, "failed on an RGB image of 96 x 64: ZeroDivisionError"),
    ],
)
def test_preprocessing_that_is_refused(function, message):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    with pytest.raises(CaptionerError, match=message):
        Preparation(function)(image)


def test_a_window_that_is_given_is_taken():
    image = Image.new("RGB", (90, 60))
    bent = composed(transforms.Lambda(lambda i: TF.adjust_gamma(i, 2.2)))
    assert Preparation(bent, window=(1, 2, 3, 4))(image).window == (1, 2, 3, 4)
    assert Preparation(bent, window=lambda w, h: (0, 0, w, h / 2))(image).window == (0, 0, 90, 30)
    assert Preparation(Preprocess((8, 8)), window=(1, 2, 3, 4))(image).window == (1, 2, 3, 4)
    assert Preparation(Preprocess((8, 8)))(image).window == (0, 0, 90, 60)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 200), (2000, 2)])
def test_small_and_thin_images(size):
    prepared = Preparation(composed(transforms.Resize((24, 24))))(Image.new("RGB", size))
    assert prepared.window == pytest.approx((0, 0, *size))


def test_random_numbers_are_left_alone():
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    with pytest.raises(CaptionerError):
        Preparation(lambda i: torch.rand(3, 4, 4) + random.random() + np.random.rand())(Image.new("RGB", (9, 9)))  # noqa: NPY002
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_an_object_without_an_index_may_carry_pixel_values():
    Batch = namedtuple("Batch", "pixel_values")
    made = Preparation(lambda i: {"pixel_values": [np.asarray(composed(transforms.Resize((8, 8)))(i))]})
    assert made(Image.new("RGB", (20, 10))).pixels.shape == (3, 8, 8)
    made = Preparation(lambda i: Batch(composed(transforms.Resize((8, 8)))(i)[None]))
    assert made(Image.new("RGB", (20, 10))).window == (0, 0, 20, 10)
