"""Invented explanations, for tests of what comes after the engine, and a browser to look at pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from captionfix.explanation import Explanation, Word

if "PYTEST_XDIST_WORKER" in os.environ:  # workers would wait for each other's threads
    torch.set_num_threads(1)

CAPTION = "a dog beside the ball"
PLACES = {"dog": (0.25, 0.5), "ball": (0.75, 0.25)}


def invented(
    caption: str = CAPTION, size: tuple[int, int] = (320, 240), window: tuple[float, float, float, float] | None = None
) -> Explanation:
    """Content words have their fixations around a place of their own, the others all over; the image is a grey ramp."""
    width, height = size
    edges = window or (0.0, 0.0, float(width), float(height))
    random = np.random.default_rng(0)
    words = []
    for index, text in enumerate(caption.split()):
        if text in PLACES:
            points = random.normal(PLACES[text], 0.05, (200, 2))
        else:
            points = random.random((200, 2))
        cells = (np.floor(np.clip(points, 0, 0.999) * 64) + 0.5) / 64
        x = edges[0] + cells[:, 0] * (edges[2] - edges[0])
        y = edges[1] + cells[:, 1] * (edges[3] - edges[1])
        words.append(
            Word(
                text=text,
                index=index,
                token=index + 4,
                probability=0.5 + 0.05 * index,
                fixations=np.stack([x, y, np.full(200, 1 / 200)], 1).astype(np.float32),
                feature_map=np.full((4, 4), 1 / 16, dtype=np.float32),
                image_share=0.7 if text in PLACES else float("nan"),
                language=(("<start>", 0.1), *((earlier, 0.05) for earlier in caption.split()[:index])),
                other=0.1,
                image_effect=1.25,
                alternatives=((text, 0.5 + 0.05 * index), ("cat", 0.2), ("<end>", 0.1)),
                contrast="cat" if text == "dog" else None,
            )
        )
    ramp = np.linspace(40, 215, width, dtype=np.uint8)[None, :, None]
    image = Image.fromarray(np.broadcast_to(ramp, (height, width, 3)).copy())
    return Explanation(
        image=image,
        words=tuple(words),
        caption=caption,
        captioner="invented",
        method="removal",
        policy={"sums": 16, "convolutions": 4, "neurons": None, "location": "location"},
        window=edges,
        grid=(64, 64),
    )


@pytest.fixture
def explanation() -> Explanation:
    return invented()


@pytest.fixture
def invent() -> Callable[..., Explanation]:
    return invented


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium, driven by playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    path = next((path for path in found if path), None)
    if path is None:
        pytest.skip("there is no Chromium here to look at pages with")
    # started without what would ask hosts of its maker at every start
    quiet = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync")  # fmt: skip
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=list(quiet))
        yield chromium
        chromium.close()
