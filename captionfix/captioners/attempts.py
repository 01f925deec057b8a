"""The ways in which a captioner may want to be run, from what a user gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from captionfix.captioners.calm import Calm
from captionfix.captioners.signatures import forms
from captionfix.errors import CaptionerError

Modules = nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module]


@dataclass(frozen=True)
class Parts:
    """What a user says of how a captioner works; see `captionfix.wrap`."""

    logits: Callable[..., Any] | None = None
    encode: Callable[..., Any] | None = None
    decode: Callable[..., Any] | None = None
    begin: Callable[..., Any] | None = None
    step: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if (self.decode is not None and self.encode is None) or (self.begin is None) != (self.step is None):
            raise CaptionerError("give decode= together with encode=, and begin= together with step=")
        if sum(given is not None for given in (self.logits, self.decode, self.step)) > 1:
            raise CaptionerError("give one of logits=, decode= and step=: they are three ways to say the same")
        if self.encode is not None and self.decode is None and self.step is None:
            raise CaptionerError("encode= needs decode=, or begin= and step=, to say how its features become words")

    @property
    def any(self) -> bool:
        return any(p is not None for p in (self.logits, self.decode, self.step))


@dataclass(frozen=True)
class Attempt:
    """A way of running the captioner.

    Attributes:
        text: as a person would write it.
        run: (source, captions) -> whatever comes back. The source is a batch of images, or of what `encode` returns.
        encode: images -> feature map, where the captioner is given in two parts.
    """

    text: str
    run: Callable[[Any, Tensor], Any]
    encode: Callable[[Tensor], Any] | None = None


def joined(model: Modules) -> nn.Module:
    """One module that holds all the modules, by name.

    Raises:
        CaptionerError: they are no modules.
    """
    if isinstance(model, nn.Module):
        return _plain(model)
    if isinstance(model, Mapping):
        parts = {str(key): part for key, part in model.items()}
    else:
        names = ("encoder", "decoder") if len(model) == 2 else tuple(f"part{i}" for i in range(len(model)))
        parts = dict(zip(names, model, strict=True))
    if not parts or not all(isinstance(part, nn.Module) for part in parts.values()):
        raise CaptionerError("wrap takes a module, a pair (encoder, decoder) or modules by name; these are no modules")
    holder = nn.ModuleDict({key: _plain(part) for key, part in parts.items()})
    holder.training = False
    return holder


def _plain(module: nn.Module) -> nn.Module:
    inner = getattr(module, "_orig_mod", module)  # torch.compile's wrapper would not meet stand-ins
    assert isinstance(inner, nn.Module)
    return inner


def attempts(model: Any, module: nn.Module, parts: Parts, calm: Calm, images: Tensor) -> list[Attempt]:
    """The ways to run a captioner, the likeliest first.

    Args:
        model: as the user gave it.
        module: all its modules in one.
        parts: what the user says.
        calm: what runs them.
        images: to try an encoder with.

    Raises:
        CaptionerError: the encoder fails or does not return what it must.
    """
    if parts.logits is not None:
        return [Attempt("logits(images, tokens)", calm.around(parts.logits))]
    pair = pair_of(model, module)
    encoder = parts.encode or (pair[0] if pair is not None else None)
    source = images if encoder is None else _encoded(encoder, calm, images)
    is_map = isinstance(source, Tensor) and source.dim() == 4
    if parts.decode is not None:
        if not is_map:
            shape = tuple(source.shape) if isinstance(source, Tensor) else f"a {type(source).__name__}"
            raise CaptionerError(
                f"encode= must return the CNN's feature map, (B, F, h, w), not {shape}: leave pooling, flattening and "
                "another order of axes to decode="
            )
        assert parts.encode is not None
        text = "decode(encode(images), tokens)"
        return [Attempt(text, calm.around(parts.decode), calm.around(parts.encode))]
    if parts.begin is not None and parts.step is not None:
        stepping = _stepping(parts.begin, parts.step)
        if parts.encode is not None and is_map:
            text = "begin(encode(images)), step(state, tokens)"
            return [Attempt(text, calm.around(stepping), calm.around(parts.encode))]
        text = f"begin({'images' if encoder is None else 'encoder(images)'}), step(state, tokens)"
        return [Attempt(text, calm.around(_composed(stepping, encoder)))]
    found = []
    if isinstance(model, nn.Module):
        found += [Attempt(form.text, calm.around(form)) for form in forms(module, "model", images, "images")]
    if pair is not None:
        ways = forms(pair[1], "decoder", source, "encoder(images)")
        found += [Attempt(form.text, calm.around(_composed(form, encoder))) for form in ways]
    return found


def pair_of(model: Any, module: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Encoder and decoder: as given, or as a module's two parts are called."""
    named = dict(module.named_children())
    if not isinstance(model, nn.Module):
        return (named["encoder"], named["decoder"]) if named.keys() == {"encoder", "decoder"} else None
    encoders = [key for key in named if "enc" in key.lower() or "cnn" in key.lower()]
    decoders = [key for key in named if "dec" in key.lower() or "rnn" in key.lower()]
    if len(encoders) == len(decoders) == 1 and encoders != decoders and _has_forward(named[decoders[0]]):
        return named[encoders[0]], named[decoders[0]]
    return None


def _has_forward(module: nn.Module) -> bool:
    return not isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.ModuleList, nn.ModuleDict))


def _composed(decoder: Callable[[Any, Tensor], Any], encoder: Callable[..., Any] | None) -> Callable[..., Any]:
    if encoder is None:
        return decoder
    return lambda images, captions: decoder(encoder(images), captions)


def _encoded(encoder: Callable[..., Any], calm: Calm, images: Tensor) -> Any:
    try:
        with torch.no_grad():
            return calm(encoder, images)
    except Exception as error:
        raise CaptionerError(
            f"the encoder failed on images {tuple(images.shape)}: {line(error)}. Is this what preprocess= should give?"
        ) from error


def _stepping(begin: Callable[..., Any], step: Callable[..., Any]) -> Callable[[Any, Tensor], Tensor]:
    def run(source: Any, tokens: Tensor) -> Tensor:
        state = begin(source)
        scores = []
        for t in range(tokens.shape[1]):
            result = step(state, tokens[:, t])
            if not isinstance(result, (tuple, list)) or len(result) != 2 or not isinstance(result[0], Tensor):
                raise CaptionerError("step(state, tokens) must return (logits (B, V), next state)")
            scores.append(result[0].reshape(len(tokens), -1))
            state = result[1]
        return torch.stack(scores, 1)

    return run


def composed(parts: Parts) -> Callable[[Tensor, Tensor], Any]:
    """The functions that a user gave, as one of images and tokens."""
    if parts.logits is not None:
        return parts.logits
    if parts.decode is not None:
        return _composed(parts.decode, parts.encode)
    assert parts.begin is not None
    assert parts.step is not None
    return _composed(_stepping(parts.begin, parts.step), parts.encode)


def discovered(run: Callable[[Tensor, Tensor], Any], images: Tensor, captions: Tensor) -> nn.Module:
    """The modules that a function runs, found by running it once; each is in eval mode before it runs, and has its own
    mode after it.

    Raises:
        CaptionerError: none ran.
    """
    found: list[nn.Module] = []
    training: list[nn.Module] = []

    def entered(module: nn.Module, args: Any) -> None:
        for part in module.modules():
            if part.training:
                training.append(part)
                part.training = False
        if not any(module is part for known in found for part in known.modules()):
            inside = set(module.modules())
            found[:] = [*(known for known in found if known not in inside), module]

    hook = register_module_forward_pre_hook(entered)
    problem = ""
    try:
        with torch.no_grad():
            run(images, captions)
    except Exception as error:
        problem = f" ({line(error)})"
    finally:
        hook.remove()
        for module in training:
            module.training = True
    if not found:
        raise CaptionerError(
            f"no module ran when the function was called{problem}: give the modules that it uses first, "
            "wrap((encoder, decoder), vocabulary, logits=...)"
        )
    names: dict[str, nn.Module] = {}
    for module in found:
        base = type(module).__name__.lower()
        names[base if base not in names else f"{base}{len(names)}"] = module
    return joined(names)


def line(error: BaseException) -> str:
    """An error's type and first line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else '(no message)'}"
