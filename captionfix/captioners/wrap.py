"""Any PyTorch captioner as it is: how it is called is found by trying, and what was found is checked by running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from captionfix.captioners.attempts import Modules, Parts, attempts, composed, discovered, joined
from captionfix.captioners.calm import Calm, buffers_kept, same_random_numbers
from captionfix.captioners.captioner import Prepared, Vocabulary
from captionfix.captioners.module import ModuleCaptioner
from captionfix.captioners.preprocess import Preprocess
from captionfix.captioners.recognise import Probe, Recognised, check_greedy, probe_captions, recognise
from captionfix.captioners.vocabularies import read_vocabulary
from captionfix.captioners.window import Box, Preparation
from captionfix.captioners.words import split as split_words
from captionfix.errors import CaptionerError


def wrap(
    model: Modules | Callable[[Tensor, Tensor], Any],
    vocabulary: Any,
    preprocess: Callable[[Any], Any] | None = None,
    *,
    logits: Callable[[Tensor, Tensor], Any] | None = None,
    encode: Callable[[Tensor], Any] | None = None,
    decode: Callable[[Tensor, Tensor], Any] | None = None,
    begin: Callable[[Any], Any] | None = None,
    step: Callable[[Any, Tensor], tuple[Tensor, Any]] | None = None,
    own: Callable[[Tensor], Any] | None = None,
    attention: Callable[[Tensor, Tensor], Tensor] | None = None,
    start: str | int | None = None,
    end: str | int | None = None,
    pad: str | int | None = None,
    unknown: str | int | None = None,
    first: int | None = None,
    features: str | nn.Module | None = None,
    window: Box | Callable[[int, int], Box] | None = None,
    name: str = "captioner",
    max_words: int = 20,
    words: Callable[[str], list[str]] = split_words,
    length_power: float = 1.0,
) -> WrappedCaptioner:
    """Makes a captioner of your own explainable, without a change to it.

    How it is called is recognised by trying the usual ways on probe images and captions: an encoder and a decoder, or
    one module; captions batch first or second, with or without their lengths (as a list, a vector, a column); outputs
    as a tensor, in a tuple or dictionary, packed, batch second, with or without the image's own step; logits,
    log-probabilities or probabilities. Which output predicts which word is found by changing words and looking where
    outputs change. All of it is checked by running, and `WrappedCaptioner.recognised` says what was found.

    The modules are left as they are. During captionfix's calls they act as in eval mode, whatever mode they are in,
    and get their own mode back after each call, also after an exception; parameters, buffers, hooks and attributes are
    not changed, and random numbers are drawn as if nothing had happened. Calls on wrapped captioners run one at a time.

    Args:
        model: the captioner: one module ``model(images, captions)``; a pair ``(encoder, decoder)``; modules by name; or
            a function ``(images, tokens) -> logits``. Paths of modules begin with ``encoder.`` and ``decoder.`` in a
            pair, with their names in a mapping.
        vocabulary: which word is which id: a list of words, ``{word: id}``, ``{id: word}``, ``{"1": word}``, an object
            with ``word2idx``, ``idx2word``, ``stoi``, ``itos`` or ``id2word``, or a `Vocabulary`.
        preprocess: an RGB image -> (C, H, W) float tensor, as torchvision's transforms do, or a `Preprocess`. None:
            squashed to 224 x 224, scaled to [0, 1], ImageNet's mean and deviation.
        logits: ``(images (B, C, H, W), tokens (B, T)) -> logits``, where the usual ways do not fit. ``tokens[:, 0]`` is
            the start.
        encode: ``images -> features``; with `decode` they must be the feature map, (B, F, h, w).
        decode: ``(features (B, F, h, w), tokens) -> logits``; needs `encode`.
        begin: for captioners that only decode word by word: what the encoder returns (what `encode` returns; the
            images, where there is neither) -> the state before the start is fed.
        step: ``(state, tokens (B,)) -> (logits (B, V) of the next word, next state)``.
        own: the captioner's own decoding, ``images (1, C, H, W) -> word ids`` (or words), greedy: compared on probe
            images with what captionfix decodes.
        attention: ``(features, tokens) -> (B, T, h, w)`` attention weights, for `explain`'s method of that name. None:
            those that the captioner returns beside its logits, if there is one a cell of the feature map.
        start: the word that begins captions, or its id; None: found by its usual name (``<start>``, ``<s>``, ...).
        end: the same of the word that ends them.
        pad: the same of the word that fills them up; there may be none.
        unknown: the same of the word for words that are not known; there may be none.
        first: at which output step the first word is predicted: 0 where outputs begin with it, 1 where the image's own
            step comes before it. None: found. It is checked either way.
        features: the module whose output is the CNN's last feature map, or its path (``"encoder.resnet.7"``). None:
            the last (B, F, h, w) output with several positions that every path from the image passes.
        window: which part of the original the input shows, (x0, y0, x1, y1) in its pixels, or a function of its width
            and height that says so. None: found by preparing ramps of brightness.
        name: shown in results.
        max_words: longest caption.
        words: splits a caption as the captioner's training did; by default lower case without punctuation.
        length_power: of the beam search: finished captions compare by log-probability / length to this power.

    Raises:
        CaptionerError: something could not be recognised, is ambiguous, or failed a check; the message says what was
            tried and which argument to give.
    """
    known = read_vocabulary(vocabulary, start, end, pad, unknown)
    is_module = isinstance(model, (nn.Module, Sequence, Mapping)) and not isinstance(model, str)
    if not is_module and not callable(model):
        raise CaptionerError(f"wrap takes a module, a pair of modules or a function, not a {type(model).__name__}")
    if not is_module and logits is None and decode is None and step is None:
        logits = model  # type: ignore[assignment]  # mypy does not follow is_module
    parts = Parts(logits, encode, decode, begin, step)
    prepare = Preparation(Preprocess() if preprocess is None else preprocess, window)
    with same_random_numbers():
        images = torch.stack([prepare(picture).pixels for picture in _pictures()])
    module = joined(model) if is_module else discovered(composed(parts), images, probe_captions(known, images.device))  # type: ignore[arg-type]
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else images.device
    images, captions = images.to(device), probe_captions(known, device)
    calm = Calm(module.modules())
    names = {id(part): path for path, part in module.named_modules()}
    with same_random_numbers(device), buffers_kept(module):
        ways = attempts(model, module, parts, calm, images)
        found = recognise(ways, Probe(images, captions, known, features, first, names), module)
        calm.learned()
        captioner = WrappedCaptioner(
            module,
            found,
            known,
            prepare,
            name=name,
            max_words=max_words,
            attention=found.attention if attention is None else calm.around(attention),
            words=words,
            length_power=length_power,
        )
        check_greedy(captioner, images, None if own is None else calm.around(own))
    return captioner


class WrappedCaptioner(ModuleCaptioner):
    """Somebody's captioner, as `wrap` returns it.

    Attributes:
        recognised: what was found out; its text says it in words.
    """

    def __init__(
        self,
        model: nn.Module,
        recognised: Recognised,
        vocabulary: Vocabulary,
        preprocess: Callable[[Image.Image], Prepared],
        **settings: Any,
    ) -> None:
        def encode(pixels: Tensor) -> Tensor:
            captions = torch.tensor([[vocabulary.start, vocabulary.end]], device=pixels.device)
            return recognised.encode(pixels, captions.expand(len(pixels), -1))

        super().__init__(model, encode, recognised.decode, vocabulary, preprocess, **settings)
        self.recognised = recognised

    def __repr__(self) -> str:
        return f"<captioner {self.name!r}: {self.recognised}>"


def _pictures() -> list[Image.Image]:
    """Two images unlike each other: coarse noise, the same each time."""
    numbers = np.random.default_rng(0)
    return [
        Image.fromarray(numbers.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            (320, 240), Image.Resampling.BICUBIC
        )
        for _ in range(2)
    ]
