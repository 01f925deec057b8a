"""How good a captioner is: words and captions right on scenes, BLEU on captioned images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from captionfix.errors import DataError

if TYPE_CHECKING:
    from captionfix.captioners.captioner import Captioner
    from captionfix.train_data import Captioned


@dataclass(frozen=True)
class SceneScore:
    """On fresh scenes: shares of words right (teacher-forced) and of captions right to the word (greedy)."""

    scenes: int
    words: float
    captions: float
    kinds: dict[str, float]

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {share:.3f}" for kind, share in self.kinds.items())
        return f"{self.scenes} scenes: words {self.words:.4f} ({kinds}), captions {self.captions:.4f}"


@dataclass(frozen=True)
class CaptionScore:
    """Corpus BLEU against all references of an image."""

    images: int
    beams: int
    bleu: tuple[float, float, float, float]

    def __str__(self) -> str:
        parts = ", ".join(f"BLEU-{n} {value:.4f}" for n, value in enumerate(self.bleu, 1))
        return f"{self.images} images, beam {self.beams}: {parts}"


def score_scenes(captioner: Captioner, count: int = 1000, start: int = 0, split: Any = "test") -> SceneScore:
    """Scores on `count` scenes of a split that training never sees.

    Args:
        captioner: a captioner of scenes.
        count: how many scenes.
        start: the first one's seed.
        split: "test" or "held-out".
    """
    import torch
    from PIL import Image

    from captionfix.scenes import scene

    right: dict[str, list[bool]] = {}
    exact = 0
    for i in range(start, start + count, 50):
        drawn = [scene(k, split=split) for k in range(i, min(i + 50, start + count))]
        pixels = torch.stack([captioner.prepare(Image.fromarray(s.image)).pixels for s in drawn]).to(captioner.device)
        captions = [captioner.tokenize(s.caption) for s in drawn]
        tokens = torch.zeros(len(drawn), max(map(len, captions)), dtype=torch.long)
        for row, ids in zip(tokens, captions, strict=True):
            row[: len(ids)] = torch.tensor((captioner.vocabulary.start, *ids[:-1]))
        with torch.no_grad():
            features = captioner.encode(pixels)
            best = captioner.decode(features, tokens.to(captioner.device)).argmax(2).tolist()
        for s, ids, guess in zip(drawn, captions, best, strict=True):
            for kind, a, b in zip(s.kinds, ids, guess, strict=False):
                right.setdefault(kind, []).append(a == b)
        exact += sum(a == b for a, b in zip(captions, captioner.generate(pixels, beams=1), strict=True))
    every = [hit for hits in right.values() for hit in hits]
    kinds = {kind: float(np.mean(hits)) for kind, hits in right.items()}
    return SceneScore(count, float(np.mean(every)), exact / count, kinds)


def score_captions(captioner: Captioner, examples: Sequence[Captioned], beams: int = 3) -> CaptionScore:
    """Corpus BLEU (nltk) of generated captions; words lower-cased, punctuation removed, on both sides.

    Raises:
        DataError: there is no image.
    """
    import torch
    from nltk.translate.bleu_score import corpus_bleu

    from captionfix.captioners.words import split
    from captionfix.images import read_image

    if not examples:
        raise DataError("no image to score on")
    said = []
    for i in range(0, len(examples), 25):
        batch = [captioner.prepare(read_image(entry.image)).pixels for entry in examples[i : i + 25]]
        rows = captioner.generate(torch.stack(batch).to(captioner.device), beams=beams)
        said += [split(captioner.text(ids)) for ids in rows]
    references = [[split(caption) for caption in entry.captions] for entry in examples]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk says that no overlap is a score of 0
        scores = [float(corpus_bleu(references, said, weights=(1 / n,) * n)) for n in (1, 2, 3, 4)]
    return CaptionScore(len(examples), beams, (scores[0], scores[1], scores[2], scores[3]))
