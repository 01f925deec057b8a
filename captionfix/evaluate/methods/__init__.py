"""The methods that people use today, behind one interface, so that pictures, saving and metrics work for all of them.

A method is a function (captioner, (1, C, H, W) pixels, (1, F, h, w) features, caption of n words, options by name) ->
(n, H, W) maps on the CNN's input, not negative and not normalised. What a word's map explains is its log-probability
(its log-odds, where it has a contrast), teacher-forced with the words before it fixed. The captioner is left as it
was: no hooks, no gradients, no modes, the same weights to the bit.

Each is here in its best form: what does not depend on the word is computed once for all words. Those named
``-shipped`` are what captum, grad-cam and zennit do when they are asked for one word after another; the maps are the
same, the cost is not. The extra ``compare`` installs these libraries.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor

from ...errors import PolicyError
from ...explain import WITH_POLICY, Maps
from ...legs import METHODS as LEGS

# name -> module, function; the modules import other tools only when a method runs
METHODS: dict[str, tuple[str, str]] = {
    "attention-weights": ("baselines", "attention_weights"),
    "gradcam": ("cams", "gradcam"),
    "hirescam": ("cams", "hirescam"),
    "layercam": ("cams", "layercam"),
    "guided-backprop": ("gradients", "guided_backprop"),
    "input-x-gradient": ("gradients", "input_x_gradient"),
    "integrated-gradients": ("gradients", "integrated_gradients"),
    "smoothgrad": ("gradients", "smoothgrad"),
    "occlusion": ("perturbations", "occlusion"),
    "lrp": ("relevance", "lrp"),
    "rise": ("perturbations", "rise"),
    "region-feeding": ("perturbations", "region_feeding"),
    "centre": ("baselines", "centre"),
    "random": ("baselines", "random"),
    "gradcam-shipped": ("shipped", "gradcam"),
    "hirescam-shipped": ("shipped", "hirescam"),
    "layercam-shipped": ("shipped", "layercam"),
    "guided-backprop-shipped": ("shipped", "guided_backprop"),
    "input-x-gradient-shipped": ("shipped", "input_x_gradient"),
    "integrated-gradients-shipped": ("shipped", "integrated_gradients"),
    "smoothgrad-shipped": ("shipped", "smoothgrad"),
    "occlusion-shipped": ("shipped", "occlusion"),
}
FIXATIONS = ("default", *LEGS, *WITH_POLICY)
"""captionfix's own, which `captionfix.explain` knows by the same names."""
NAMES = (*FIXATIONS, *METHODS)
"""Every method, ours first."""


def resolve(name: str) -> tuple[Maps, dict[str, Any]]:
    """The method of a name such as ``"gradcam"`` or ``"rise:masks=500:seed=3"``, and all of its options' values.

    Raises:
        PolicyError: there is no such method, or it has no such option.
    """
    plain, *given = name.split(":")
    if plain not in METHODS:
        raise PolicyError(f"no method is named {plain!r}; choose one of {', '.join(NAMES)}")
    function = _function(plain)
    options = defaults(plain)
    for text in given:
        option, sign, value = text.partition("=")
        if option not in options or not sign:
            known = ", ".join(f"{key}={value}" for key, value in options.items()) or "none"
            raise PolicyError(f"method {plain!r} has no option {text!r}; its options are: {known}")
        try:
            options[option] = type(options[option])(value)
        except ValueError:
            kind = type(options[option]).__name__
            raise PolicyError(f"method {plain!r}, option {text!r}: {value!r} is no {kind}") from None
        if isinstance(options[option], int) and option != "seed" and options[option] < 1:
            raise PolicyError(f"method {plain!r}, option {text!r}: give a whole number from 1 up")
    return partial(function, **options), options


def defaults(name: str) -> dict[str, Any]:
    """The options of another tool's method; our own have none here."""
    plain = name.partition(":")[0]
    if plain not in METHODS:
        return {}
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(_function(plain)).parameters
    return {key: p.default for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def _function(plain: str) -> Callable[..., Tensor]:
    module, function = METHODS[plain]
    found: Callable[..., Tensor] = getattr(import_module(f"{__name__}.{module}"), function)
    return found
