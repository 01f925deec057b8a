"""sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning: "Show, Attend and Tell", saved as whole modules.

The image reaches a word three ways: the initial state, the attended context and its gate.
"""

from __future__ import annotations

from captionfix.captioners.module import ModuleCaptioner
from captionfix.captioners.preprocess import Preprocess
from captionfix.captioners.published.cnn import NUMBERED, channels, depth, resnet
from captionfix.captioners.published.decoders import SoftAttention
from captionfix.captioners.published.finish import finished
from captionfix.captioners.published.parts import Words
from captionfix.captioners.published.weights import Weights, cell, embedding, linear, same
from captionfix.captioners.published.words import vocabulary
from captionfix.errors import CaptionerError

PREPROCESS = Preprocess((256, 256))  # scipy's imresize, which is PIL's bilinear on 8-bit pixels
GRID = 14  # as published


def attend_tutorial(encoder: Weights, decoder: Weights, words: Words) -> ModuleCaptioner:
    """A ResNet (101 as published) pooled to a grid of 14 x 14 and additive attention."""
    cnn = resnet(encoder, "resnet.", NUMBERED)
    encoder.refuse_rest()
    grid = encoder.settings.get("adaptive_pool.output_size", encoder.settings.get("enc_image_size", GRID))
    if not 1 <= grid <= 64:
        raise CaptionerError(
            f"{encoder.path} wants its feature map pooled to {grid} x {grid}, which is no sensible grid"
        )
    attention = {name: linear(decoder, f"attention.{name}") for name in ("encoder_att", "decoder_att", "full_att")}
    plain = {name: linear(decoder, name) for name in ("init_h", "init_c", "f_beta")}
    embed = embedding(decoder, "embedding")
    model = SoftAttention(
        cnn,
        grid,
        embedding=embed,
        decode_step=cell(decoder, "decode_step"),
        head=linear(decoder, "fc"),
        **attention,
        **plain,
    )
    decoder.refuse_rest()
    network = depth(encoder, "resnet.", NUMBERED)
    same(plain["init_h"].in_features, channels(cnn), f"the decoder in {decoder.path} reads", f"the {network} gives")
    vocab = vocabulary(words.words, embed.num_embeddings, words.path, decoder.path)
    paths = sorted({encoder.path, decoder.path})
    return finished(model, vocab, PREPROCESS, paths, max_words=50, length_power=0.0)
