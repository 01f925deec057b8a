"""ruotianluo/ImageCaptioning.pytorch (and self-critical.pytorch): FC, NewFC, ShowTell, Att2in2, UpDown on grids.

The CNN is a file of its own: a ResNet of the Caffe kind whose tensors have torchvision's names, or (on the branch
``with_finetune``) the stages of one that was trained along.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from captionfix.captioners.captioner import Vocabulary
from captionfix.captioners.module import ModuleCaptioner
from captionfix.captioners.preprocess import Preprocess
from captionfix.captioners.published.cnn import NAMED, NUMBERED, channels, depth, resnet
from captionfix.captioners.published.decoders import Att2in, Attending, FirstToken, Maxout, UpDown
from captionfix.captioners.published.finish import finished
from captionfix.captioners.published.images import AsItIs
from captionfix.captioners.published.parts import Infos
from captionfix.captioners.published.weights import Weights, cell, embedding, linear, lstm, norm, same
from captionfix.errors import CaptionerError

GRID = 14
FINETUNED = Preprocess((256, 256), 224)
_TORCHVISION = re.compile(r"^resnet\d+-[0-9a-f]{8}\.")  # as torchvision's downloads are called
_BOTTOM_UP = re.compile(r"cocobu|bottom.?up|(^|[_-])bu([_-]|$)", re.IGNORECASE)


def imagecaptioning(decoder: Weights, cnn: Weights, infos: Infos) -> ModuleCaptioner:
    """Any of its models; the end is also the start and id 0, words begin at 1 and the last is the unknown one."""
    _refuse_other_features(decoder, infos)
    finetuned = "0.weight" in cnn.tensors
    names = NUMBERED if finetuned else NAMED
    network = depth(cnn, "", names)
    expected = str(infos.options.get("cnn_model", "")).lower().replace("resnet", "ResNet-")
    if finetuned and expected.startswith("ResNet-") and network.startswith("ResNet-") and network != expected:
        raise CaptionerError(f"{cnn.path} is a {network}, {infos.path} says {expected}: they are not of one training")
    if _TORCHVISION.match(cnn.path.name):
        raise CaptionerError(
            f"{cnn.path} is torchvision's own {network}: its tensors fit, but these captioners were trained on "
            "features of another, converted from Caffe; take the author's (his README says where)"
        )
    trunk = resnet(cnn, "", names, caffe=True)
    model, rows, reads = _model(decoder, trunk, None if finetuned else GRID)
    same(reads, channels(trunk), f"{decoder.path} reads", f"the {network} in {cnn.path} gives")
    decoder.refuse_rest()
    words = infos.words
    if len(words) + 1 != rows:
        raise CaptionerError(
            f"the vocabulary {infos.path} has {len(words)} words (and the end), the weights in {decoder.path} are for "
            f"{rows}: they are not of one training; take the infos that were published with these weights"
        )
    unknown = len(words) if words[-1] in ("UNK", "<unk>", "<UNK>") else None
    vocab = Vocabulary(("<end>", *words), start=0, end=0, pad=0, unknown=unknown)
    longest = infos.options.get("max_length") or infos.options.get("seq_length")
    return finished(
        model,
        vocab,
        FINETUNED if finetuned else AsItIs(),
        [decoder.path, cnn.path],
        max_words=longest if isinstance(longest, int) and longest > 0 else 20,
        length_power=0.0,
    )


def _refuse_other_features(decoder: Weights, infos: Infos) -> None:
    """Features of a detector's boxes have no pixels here to go back to."""
    used = ("input_fc_dir", "input_att_dir") if "ctx2att.weight" in decoder.tensors else ("input_fc_dir",)
    places = [str(infos.options.get(name) or "") for name in used]
    place = next((place for place in places if _BOTTOM_UP.search(Path(place).name)), None)
    if place is not None or infos.options.get("use_box"):
        raise CaptionerError(
            f"{decoder.path} was trained on bottom-up features, of a detector's boxes ({place or 'use_box'}), not on a "
            "ResNet's grid: its evidence can't be followed into pixels"
        )


def _model(decoder: Weights, cnn: nn.Sequential, grid: int | None) -> tuple[FirstToken | Attending, int, int]:
    """The model, its embedding's rows, and how many channels it reads."""
    if "core.att_lstm.weight_ih" in decoder.tensors or "core.a2c.weight" in decoder.tensors:
        return _attending(decoder, cnn, grid)
    image = linear(decoder, "fc_embed" if "fc_embed.weight" in decoder.tensors else "img_embed")
    rnn: nn.Module
    if "core.weight_ih_l0" in decoder.tensors:
        rnn = lstm(decoder, "core")
    else:
        core = "_core" if "_core.i2h.weight" in decoder.tensors else "core"
        rnn = Maxout(*_maxout(decoder, core))
    embed = embedding(decoder, "embed")
    return FirstToken(cnn, image, embed, rnn, _head(decoder)), embed.num_embeddings, image.in_features


def _attending(decoder: Weights, cnn: nn.Sequential, grid: int | None) -> tuple[Attending, int, int]:
    relu = "embed.0.weight" in decoder.tensors
    words = embedding(decoder, "embed.0" if relu else "embed")
    values, reads = _values(decoder)
    inner = "core.attention." if "core.attention.h2att.weight" in decoder.tensors else "core."
    keys = linear(decoder, "ctx2att")
    shared: dict[str, nn.Module] = {
        "embed": nn.Sequential(words, nn.ReLU()) if relu else words,
        "att_embed": values,
        "ctx2att": keys,
        "h2att": linear(decoder, f"{inner}h2att"),
        "alpha_net": linear(decoder, f"{inner}alpha_net"),
        "head": _head(decoder),
    }
    model: Attending
    if "core.a2c.weight" in decoder.tensors:
        i2h, h2h = _maxout(decoder, "core")
        model = Att2in(cnn, grid, i2h=i2h, h2h=h2h, a2c=linear(decoder, "core.a2c"), **shared)
    else:
        model = UpDown(
            cnn,
            grid,
            fc_embed=nn.Sequential(linear(decoder, "fc_embed.0"), nn.ReLU()),
            att_lstm=cell(decoder, "core.att_lstm"),
            lang_lstm=cell(decoder, "core.lang_lstm"),
            **shared,
        )
    return model, words.num_embeddings, reads or keys.in_features


def _values(decoder: Weights) -> tuple[nn.Module, int]:
    """What makes cells of the grid the values that are attended to; and how many channels it reads.

    A norm may come before, and one behind (``use_bn``), which moves the linear layer's number. The first Att2in has
    nothing here.
    """
    numbers = sorted({int(n.split(".")[1]) for n in decoder.tensors if re.match(r"att_embed\.\d+\.", n)})
    made: list[nn.Module] = []
    reads = 0
    for number in numbers:
        name = f"att_embed.{number}"
        if f"{name}.running_mean" in decoder.tensors:
            made.append(norm(decoder, name))
        else:
            layer = linear(decoder, name)
            reads = reads or layer.in_features
            made += [layer, nn.ReLU()]
    return (nn.Sequential(*made) if made else nn.Identity()), reads


def _maxout(decoder: Weights, name: str) -> tuple[nn.Linear, nn.Linear]:
    i2h, h2h = linear(decoder, f"{name}.i2h"), linear(decoder, f"{name}.h2h")
    if not i2h.out_features == h2h.out_features == 5 * h2h.in_features:
        raise CaptionerError(
            f"{decoder.path}: {name}.i2h has {i2h.out_features} rows for {h2h.in_features} units, a maxout LSTM has 5 "
            "for each"
        )
    return i2h, h2h


def _head(decoder: Weights) -> nn.Module:
    if "logit.weight" in decoder.tensors:
        return linear(decoder, "logit")
    numbers = sorted({int(n.split(".")[1]) for n in decoder.tensors if re.match(r"logit\.\d+\.", n)})
    layers = [linear(decoder, f"logit.{number}") for number in numbers]
    if not layers:
        raise CaptionerError(f"{decoder.path} has no 'logit.weight', which a file of this kind has")
    made: list[nn.Module] = [layers[0]]
    for layer in layers[1:]:
        made += [nn.ReLU(), layer]
    return nn.Sequential(*made)
