"""Captioners that others have published, read from their own files and recognised by what is in them.

Nothing in a file is run; see `safe_pickle`. ``docs/checkpoints.md`` says where each is to be had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captionfix.errors import CaptionerError

if TYPE_CHECKING:
    from captionfix.captioners.module import ModuleCaptioner
    from captionfix.captioners.published.parts import Part


@dataclass(frozen=True)
class Role:
    """What a file can be to a captioner, and how it is recognised.

    Attributes:
        name: of the role.
        about: in words, for messages.
        keys: names of tensors (or variables) that it has; one that ends in "*" stands for a beginning, one that begins
            so for an end.
    """

    name: str
    about: str
    keys: tuple[str, ...]

    def fits(self, names: Iterable[str]) -> bool:
        known = set(names)
        return all(_among(key, known) for key in self.keys)


def _among(key: str, names: set[str]) -> bool:
    if key.endswith("*"):
        return any(name.startswith(key[:-1]) for name in names)
    return any(name.endswith(key[1:]) for name in names) if key.startswith("*") else key in names


# The first that fits is the role.
ROLES = (
    Role("im2txt", "im2txt's checkpoint", ("seq_embedding/map", "image_embedding/weights")),
    Role("inception", "an Inception v3 of TF-Slim", ("InceptionV3/Conv2d_1a_3x3/weights",)),
    Role("aladdinpersson", "a CNNtoRNN of aladdinpersson's", ("encoderCNN.inception.*", "decoderRNN.*")),
    Role("attending decoder", "the tutorial's decoder", ("decode_step.weight_ih", "f_beta.weight", "init_h.weight")),
    Role("grid decoder", "its decoder (model*.pth)", ("core.a2c.weight", "core.i2h.weight", "ctx2att.weight")),
    Role("grid decoder", "its decoder (model*.pth)", ("core.att_lstm.weight_ih", "core.lang_lstm.weight_ih")),
    Role("grid decoder", "its decoder (model*.pth)", ("_core.i2h.weight", "fc_embed.weight", "logit.weight")),
    Role("grid decoder", "its decoder (model*.pth)", ("core.i2h.weight", "img_embed.weight")),
    Role("grid decoder", "its decoder (model*.pth)", ("core.weight_ih_l0", "img_embed.weight")),
    Role("tutorial encoder", "its encoder (encoder*)", ("resnet.0.weight", "linear.weight", "bn.running_mean")),
    Role("encoder", "an encoder: ResNet and linear layer", ("resnet.0.weight", "resnet.7.*")),
    Role("cnn", "the CNN (a ResNet's weights)", ("conv1.weight", "layer4.0.conv1.weight")),
    Role("cnn", "the CNN (model-cnn*.pth)", ("0.weight", "4.0.conv1.weight", "7.0.conv1.weight")),
    Role("decoder", "its decoder (decoder*)", ("*.weight_ih_l0",)),
)
# Recognised, but not read, and why.
UNREAD = (
    (("core.lstm.w2h.weight", "core.attention.fr_embed.weight"), "AdaAtt, whose sentinel is not read yet"),
    (("LanguageLSTM.*", "AdaLSTM.*"), "GridTD of LRP-imagecaptioning"),
    (("core.a2h.weight", "core.i2h.weight"), "Att2all2"),
    (("core.lstm0.*", "core.lstm1.*"), "StackAtt or DenseAtt"),
    (("model.encoder.layers.*",), "a transformer"),
    (("extractor.*", "mlc.*"), "Medical-Report-Generation"),
)


@dataclass(frozen=True)
class Source:
    """A published captioner: the roles of its files, and who reads them, in that order.

    Attributes:
        title: whose it is.
        roles: what files it takes; "words" and "infos" are a vocabulary and ImageCaptioning.pytorch's own.
        reader: module and function.
    """

    title: str
    roles: tuple[str, ...]
    reader: tuple[str, str]


SOURCES = (
    Source("yunjey/pytorch-tutorial", ("tutorial encoder", "decoder", "words"), ("tutorials", "pytorch_tutorial")),
    Source("the Udacity project", ("encoder", "decoder", "words"), ("tutorials", "udacity")),
    Source(
        "sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning",
        ("encoder", "attending decoder", "words"),
        ("attend_tutorial", "attend_tutorial"),
    ),
    Source(
        "ruotianluo/ImageCaptioning.pytorch",
        ("grid decoder", "cnn", "infos"),
        ("imagecaptioning", "imagecaptioning"),
    ),
    Source("im2txt", ("im2txt", "words"), ("im2txt", "im2txt")),
    Source("aladdinpersson/Machine-Learning-Collection", ("aladdinpersson", "words"), ("tutorials", "aladdinpersson")),
)
_ABOUT = {
    "words": "the vocabulary (vocab.pkl, WORDMAP*.json, word_counts.txt)",
    "infos": "infos*.pkl",
    **{role.name: role.about for role in reversed(ROLES)},
}


def open_folder(folder: Path) -> ModuleCaptioner | None:
    """The captioner whose files lie in a folder; None where there is nothing of one.

    Raises:
        CaptionerError: a part is missing, damaged, or does not fit the others.
    """
    from captionfix.captioners.published import parts

    paths = parts.candidates(folder)
    found: list[Part] = []
    trouble: list[str] = []
    for path in paths:
        try:
            found += parts.parts(path)
        except CaptionerError as error:
            trouble.append(str(error))
    for inside in (folder, *(child for child in sorted(folder.iterdir()) if child.is_dir())):
        if (inside / "data.pkl").is_file() and (inside / "data").is_dir():
            trouble.append(
                f"{inside} is a torch checkpoint that was unpacked; give the file itself, as it was downloaded"
            )
    orphans = [path.name for path in folder.glob("*.data-00000-of-*") if not list(folder.glob(f"{path.stem}.index"))]
    trouble += [f"{name} needs its .index file beside it" for name in orphans]
    if not found and not trouble:
        return None
    return _assembled(found, str(folder), trouble)


def open_files(paths: Sequence[Path]) -> ModuleCaptioner:
    """The captioner whose files are these.

    Raises:
        CaptionerError: a part is missing, damaged, or does not fit the others.
    """
    from captionfix.captioners.published import parts

    found: list[Part] = []
    for path in paths:
        inside = parts.parts(path)
        if not inside:
            raise CaptionerError(
                f"{path} is a file, but neither weights nor a vocabulary that captionfix knows; see docs/checkpoints.md"
            )
        found += inside
    return _assembled(found, ", ".join(str(path) for path in paths), [])


def role(part: Part) -> str | None:
    """What a part of a file is to a captioner."""
    from captionfix.captioners.published.parts import Infos, Words
    from captionfix.captioners.published.weights import Weights

    if isinstance(part, (Words, Infos)):
        return "words" if isinstance(part, Words) else "infos"
    names = part.tensors if isinstance(part, Weights) else part.shapes
    return next((r.name for r in ROLES if r.fits(names)), None)


def _assembled(found: Sequence[Part], place: str, trouble: Sequence[str]) -> ModuleCaptioner:
    from importlib import import_module

    from captionfix.captioners.published.parts import only

    by_role: dict[str, list[Any]] = {}
    for part in found:
        by_role.setdefault(role(part) or "", []).append(part)
    for source in SOURCES:
        if all(name in by_role for name in source.roles):
            chosen = [only(by_role[name], _ABOUT[name]) for name in source.roles]
            module, function = source.reader
            reader: Callable[..., ModuleCaptioner] = getattr(import_module(f"{__name__}.{module}"), function)
            captioner = reader(*chosen)
            captioner.name = source.title
            return captioner
    raise CaptionerError(_what_is_missing(by_role, place, trouble))


def _what_is_missing(by_role: dict[str, list[Any]], place: str, trouble: Sequence[str]) -> str:
    because = f" ({'; '.join(trouble)})" if trouble else ""
    for part in by_role.get("", ()):
        names = set(getattr(part, "tensors", ()) or getattr(part, "shapes", ()))
        for keys, name in UNREAD:
            if all(_among(key, names) for key in keys):
                return f"{part.path} is {name}: it is not read; wrap its own module with captionfix.wrap"
    present = {name for name in by_role if name}
    if not present - {"cnn", "inception", "words", "infos"}:
        if present & {"cnn", "inception"}:
            return f"{place} holds a CNN's weights, but no captioner's: add the file of its decoder{because}"
        if trouble:
            return "; ".join(trouble)
        what = " and ".join(_ABOUT[name] for name in sorted(present)) or "weights of an unknown kind"
        return f"{place} holds no captioner that captionfix knows, only {what}; see docs/checkpoints.md"
    likely = max(SOURCES, key=lambda s: (sum(name in present for name in s.roles), -len(s.roles)))
    missing = [_ABOUT[name] for name in likely.roles if name not in present]
    return f"{place} holds a part of a captioner of {likely.title}; missing: {', '.join(missing)}{because}"
