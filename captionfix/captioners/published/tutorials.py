"""Captioners of tutorials whose image is the LSTM's first token: readers that find each part's role by its shape.

- yunjey/pytorch-tutorial, ``tutorials/03-advanced/image_captioning``;
- the Udacity computer vision project, whose decoders its students wrote, under many names;
- aladdinpersson/Machine-Learning-Collection, ``ML/Pytorch/more_advanced/image_captioning``.

All of them were trained to say the start at the image's step, so a word comes one step later than it is said.
"""

from __future__ import annotations

from PIL import Image
from torch import nn

from captionfix.captioners.module import ModuleCaptioner
from captionfix.captioners.preprocess import Preprocess
from captionfix.captioners.published.cnn import NUMBERED, channels, depth, inception, resnet
from captionfix.captioners.published.decoders import FirstToken
from captionfix.captioners.published.finish import finished
from captionfix.captioners.published.parts import Words
from captionfix.captioners.published.weights import Weights, embedding, linear, lstm, norm, same
from captionfix.captioners.published.words import vocabulary
from captionfix.errors import CaptionerError

YUNJEY = Preprocess((224, 224), resample=Image.Resampling.LANCZOS)
UDACITY = Preprocess(256, 224)  # the project's own tests crop at random; this is the middle of what they see
ALADDIN = Preprocess((299, 299), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def pytorch_tutorial(encoder: Weights, decoder: Weights, words: Words) -> ModuleCaptioner:
    """yunjey's: a ResNet (152 as published), a linear layer and a batch norm; one LSTM layer."""
    return _first_token(encoder, decoder, words, YUNJEY)


def udacity(encoder: Weights, decoder: Weights, words: Words) -> ModuleCaptioner:
    """The Udacity project's: a ResNet (50) and a linear layer; an LSTM of any depth, one or more layers behind it."""
    return _first_token(encoder, decoder, words, UDACITY)


def aladdinpersson(model: Weights, words: Words) -> ModuleCaptioner:
    """aladdinpersson's: Inception v3, whose last layer is the projection, and a ReLU.

    Its images are normalised twice: by its own transform, and again inside torchvision's Inception, where
    ``pretrained=True`` had switched that on.
    """
    trunk = {n: t for n, t in model.take_under("encoderCNN.inception.").items() if not n.startswith(("fc.", "AuxLog"))}
    project = nn.Sequential(linear(model, "encoderCNN.inception.fc"), nn.ReLU())
    decoder = Weights(model.path, {n: t for n, t in model.tensors.items() if n.startswith("decoderRNN.")})
    embed, rnn, head = _speaker(decoder)
    vocab = vocabulary(words.words, embed.num_embeddings, words.path, model.path)
    cnn = inception(trunk, model.path, transform_input=True)
    return finished(FirstToken(cnn, project, embed, rnn, head), vocab, ALADDIN, [model.path], max_words=50)


def _first_token(encoder: Weights, decoder: Weights, words: Words, preprocess: Preprocess) -> ModuleCaptioner:
    cnn = resnet(encoder, "resnet.", NUMBERED)
    project = _projection(encoder)
    first = project[0]
    assert isinstance(first, nn.Linear)
    embed, rnn, head = _speaker(decoder)
    network = depth(encoder, "resnet.", NUMBERED)
    same(first.in_features, channels(cnn), f"the linear layer in {encoder.path} reads", f"its {network} gives")
    same(first.out_features, embed.embedding_dim, f"{encoder.path} describes an image by", f"{decoder.path} reads")
    vocab = vocabulary(words.words, embed.num_embeddings, words.path, decoder.path)
    return finished(FirstToken(cnn, project, embed, rnn, head), vocab, preprocess, [encoder.path, decoder.path])


def _projection(encoder: Weights) -> nn.Sequential:
    """The one linear layer that is not the CNN's, and the norm behind it if there is one."""
    names = {name.rsplit(".", 1)[0] for name in encoder.tensors if not name.startswith("resnet.")}
    norms = sorted(name for name in names if f"{name}.running_mean" in encoder.tensors)
    layers = sorted(names - set(norms))
    if len(layers) != 1 or len(norms) > 1:
        raise CaptionerError(
            f"{encoder.path} has {', '.join(sorted(names)) or 'nothing'} behind its CNN instead of one linear layer "
            "(and a norm); wrap its own module with captionfix.wrap"
        )
    return nn.Sequential(linear(encoder, layers[0]), *(norm(encoder, name) for name in norms))


def _speaker(decoder: Weights) -> tuple[nn.Embedding, nn.LSTM, nn.Module]:
    """Embedding, LSTM and the layers behind it, by their shapes: students name them as they like."""
    recurrent = [name.removesuffix(".weight_ih_l0") for name in decoder.tensors if name.endswith(".weight_ih_l0")]
    if len(recurrent) != 1:
        raise CaptionerError(f"{decoder.path} has {len(recurrent)} recurrent networks instead of one")
    rnn = lstm(decoder, recurrent[0])
    plain = [
        name.removesuffix(".weight")
        for name, tensor in decoder.tensors.items()
        if name.endswith(".weight") and tensor.dim() == 2 and not name.startswith(f"{recurrent[0]}.")
    ]
    embeddings = [
        name
        for name in plain
        if f"{name}.bias" not in decoder.tensors and decoder.tensors[f"{name}.weight"].shape[1] == rnn.input_size
    ]
    layers = [name for name in plain if name not in embeddings]
    if len(embeddings) != 1 or not layers:
        raise CaptionerError(
            f"{decoder.path}: one of {', '.join(plain) or 'nothing'} should be an embedding for the LSTM's "
            f"{rnn.input_size} inputs and the others layers behind it; wrap its own module with captionfix.wrap"
        )
    embed = embedding(decoder, embeddings[0])
    head: list[nn.Module] = []
    size = rnn.hidden_size
    for name in layers:  # in the order in which they were made
        layer = linear(decoder, name)
        same(layer.in_features, size, f"{decoder.path}: layer {name} reads", "what comes before it gives")
        head += [nn.ReLU(), layer] if head else [layer]
        size = layer.out_features
    same(size, embed.num_embeddings, f"{decoder.path} scores", "it embeds")
    decoder.refuse_rest()
    return embed, rnn, nn.Sequential(*head) if len(head) > 1 else head[0]
