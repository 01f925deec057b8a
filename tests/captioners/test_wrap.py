"""`wrap`: what it recognises, what it refuses and how it says so, and that it leaves modules as they were."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, SIZE, WORDS, C, E, H, Pooled, SmallCNN
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import captionfix
from captionfix.captioners.preprocess import Preprocess
from captionfix.errors import CaptionerError

PREPROCESS = Preprocess((SIZE, SIZE))
V = len(WORDS)
TOKENS = torch.tensor([[1, 4, 5, 6], [1, 6, 7, 8], [1, 9, 4, 10]])


@pytest.fixture(autouse=True)
def _seeded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        yield
    torch.set_num_threads(threads)


def pixels(count=3):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def wrap(model, **options):
    return captionfix.wrap(model, options.pop("vocabulary", WORDS), PREPROCESS, **options)


class Decoder(nn.Module):
    """Image as first token. Subclasses say how captions are taken and what is returned."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, E)
        self.dropout = nn.Dropout(0.5)
        self.lstm = nn.LSTM(E, H, batch_first=True)
        self.fc = nn.Linear(H, V)

    def hidden(self, features, captions):
        x = torch.cat([features.unsqueeze(1), self.dropout(self.embed(captions))], 1)
        return self.lstm(x)[0]

    def forward(self, features, captions):
        return self.fc(self.hidden(features, captions))


# what is recognised: name -> (forward, words in the text) ------------------------------------------------------------


def captions_first(self, captions, features):
    return self.fc(self.hidden(features, captions))


def lengths_as_list(self, features, captions, lengths):
    assert isinstance(lengths, list)
    x = torch.cat([features.unsqueeze(1), self.embed(captions)], 1)
    return self.fc(self.lstm(pack_padded_sequence(x, lengths, batch_first=True))[0].data)


def lengths_as_vector(self, features, captions, lengths):
    lengths, order = lengths.sort(descending=True)
    out = self.fc(self.hidden(features[order], captions[order]))
    return out[:, : int(lengths.max())], order


def lengths_as_column(self, features, captions, caption_lens):
    caption_lens, _ = caption_lens.squeeze(1).sort(descending=True)
    return self.fc(self.hidden(features, captions))[:, : int(caption_lens[0])]


def reversed_batch(self, features, captions, lengths):
    """An order that is not the one that was given, and is returned."""
    order = torch.arange(len(captions) - 1, -1, -1)
    return {"order": order, "logits": self.fc(self.hidden(features[order], captions[order]))}


def flattened(self, features, captions):
    return self.fc(self.hidden(features, captions)).view(-1, V)


def words_in_the_middle(self, features, captions):
    return self.fc(self.hidden(features, captions)).permute(0, 2, 1)


def teacher_forced_by_a_share(self, features, captions, teacher_forcing_ratio=0.5):
    h = c = torch.zeros(len(features), H)
    outputs, word = [], self.embed(captions[:, 0])
    h, c = self.cell(features, h, c)
    for t in range(captions.shape[1]):
        if t > 0:
            forced = torch.rand(()) < teacher_forcing_ratio
            word = self.embed(captions[:, t] if forced else outputs[-1].argmax(1))
        h, c = self.cell(word, h, c)
        outputs.append(self.fc(h))
    return torch.stack(outputs, 1)


def cell(self, x, h, c):
    out, (h, c) = self.lstm(x.unsqueeze(1), (h[None], c[None]))
    return out[:, 0], c[0]


def log_softmax_head(self, features, captions, states=None):
    return F.log_softmax(self.fc(self.hidden(features, captions)), dim=2), states


def squeezed(self, features, captions):
    return self.fc(self.hidden(features.squeeze(), captions))


def last_word_cut_off(self, features, captions):
    return self.fc(self.hidden(features, captions[:, :-1]))


def decoder(forward):
    return type("Decoder", (Decoder,), {"forward": forward, "cell": cell})().eval()


@pytest.mark.parametrize(
    ("forward", "said", "first"),
    [
        (Decoder.forward, "decoder(encoder(images), captions); outputs batch first", 1),
        (captions_first, "decoder(captions, encoder(images))", 1),
        (lengths_as_list, "lengths as a list); outputs packed", 1),
        (lengths_as_vector, "lengths as a vector", 1),
        (lengths_as_column, "lengths as a column", 1),
        (reversed_batch, "['logits']", 1),
        (flattened, "outputs flattened", 1),
        (words_in_the_middle, "outputs words in the middle", 1),
        (teacher_forced_by_a_share, "teacher_forcing_ratio=1.0", 0),
        (log_softmax_head, "in its place [0]", 1),
        (squeezed, "a single image is run as two equal ones", 1),
        (last_word_cut_off, "a further word is fed after the last", 1),
    ],
)
def test_forms_of_decoders(forward, said, first):
    encoder, part = Pooled(E).eval(), decoder(forward)
    captioner = wrap((encoder, part))
    assert said in str(captioner.recognised)
    assert captioner.recognised.first == first
    x = pixels()
    with torch.no_grad():
        wanted = Decoder.forward(part, encoder(x), TOKENS)[:, 1:].log_softmax(-1)
        torch.testing.assert_close(captioner.logits(x, TOKENS).log_softmax(-1), wanted)
        torch.testing.assert_close(captioner.logits(x[:1], TOKENS[:1]).log_softmax(-1), wanted[:1])


class TwoFeatures(nn.Module):
    """The encoder gives a pooled vector and regions; both enter."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.cnn = SmallCNN()

        def forward(self, images):
            maps = self.cnn(images)
            return maps.mean((2, 3)), maps.flatten(2).transpose(1, 2)

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.cell = nn.Embedding(V, E), nn.LSTMCell(E + 2 * C, H)
            self.fc = nn.Linear(H, V)

        def forward(self, fc_feats, att_feats, captions):
            h = c = torch.zeros(len(captions), H)
            out = []
            for t in range(captions.shape[1]):
                best = att_feats.amax(1)
                h, c = self.cell(torch.cat([self.embed(captions[:, t]), fc_feats, best], 1), (h, c))
                out.append(self.fc(h))
            return torch.stack(out, 1)


def test_an_encoder_that_returns_several_things():
    pair = TwoFeatures.Encoder().eval(), TwoFeatures.Decoder().eval()
    captioner = wrap(pair)
    assert "decoder(encoder(images)[0], encoder(images)[1], captions)" in str(captioner.recognised)
    with torch.no_grad():
        torch.testing.assert_close(captioner.logits(pixels(), TOKENS), pair[1](*pair[0](pixels()), TOKENS))


def test_a_module_without_a_forward_of_its_own_is_a_pair_by_its_parts_names():
    model = nn.Module()
    model.encoder_cnn, model.decoder_rnn = Pooled(E), Decoder()
    captioner = wrap(model.eval())
    assert captioner.recognised.parts.name == "encoder_cnn.cnn"


def test_a_function_alone():
    encoder, part = Pooled(E).train(), Decoder().train()
    captioner = wrap(lambda images, tokens: part(encoder(images), tokens))
    assert encoder.training
    assert part.dropout.training
    assert set(dict(captioner.model.named_children())) == {"pooled", "decoder"}
    encoder.eval()
    part.eval()
    with torch.no_grad():
        torch.testing.assert_close(captioner.logits(pixels(), TOKENS), part(encoder(pixels()), TOKENS)[:, 1:])


def test_encode_and_decode_as_functions():
    encoder, part = Pooled(E).eval(), Decoder().eval()
    pooled = lambda maps: encoder.embed(maps.mean((2, 3)))  # noqa: E731
    captioner = wrap((encoder, part), encode=encoder.cnn, decode=lambda maps, tokens: part(pooled(maps), tokens)[:, 1:])
    with torch.no_grad():
        torch.testing.assert_close(captioner.logits(pixels(), TOKENS), part(encoder(pixels()), TOKENS)[:, 1:])


def test_steps_from_a_feature_map():
    model = FAMILIES["steps only"].model(V).eval()
    steps = FAMILIES["steps only"].given(model)
    begin = lambda maps: model.lstm(model.cnn.embed(maps.mean((2, 3))))  # noqa: E731
    captioner = wrap(model, encode=model.cnn.cnn, begin=begin, step=steps["step"], own=model.sample)
    with torch.no_grad():
        wanted = FAMILIES["steps only"].plain(model, pixels(), TOKENS)
        torch.testing.assert_close(captioner.logits(pixels(), TOKENS), wanted)


def test_attention_weights_that_are_returned_are_found():
    family = FAMILIES["additive attention"]
    model = family.model(V).eval()
    captioner = wrap(model)
    with torch.no_grad():
        features = captioner.encode(pixels())
        weights = captioner.attention(features, TOKENS)
        torch.testing.assert_close(weights.flatten(2), model(TOKENS, pixels())["alphas"])
    result = captionfix.explain(captioner, photograph(), caption="a red ball", method="attention")
    assert result[1].feature_map.sum() == pytest.approx(1, abs=1e-4)


# what is refused -----------------------------------------------------------------------------------------------------


def draws(self, features, captions):
    return self.fc(F.dropout(self.hidden(features, captions), 0.5))


def random_state(self, features, captions):
    x = torch.cat([features.unsqueeze(1), self.embed(captions)], 1)
    h = torch.randn(1, len(x), H)
    return self.fc(self.lstm(x, (h, h))[0])


def over_the_batch(self, features, captions):
    return F.softmax(self.fc(self.hidden(features, captions)), dim=0)


def looks_ahead(self, features, captions):
    return self.fc(self.hidden(features, captions).flip(1).cumsum(1).flip(1))


def ignores_words(self, features, captions):
    return self.fc(self.hidden(features, torch.zeros_like(captions)))


def ignores_the_image(self, features, captions):
    return self.fc(self.hidden(torch.zeros_like(features), captions))


def a_loss(self, features, captions):
    return self.fc(self.hidden(features, captions)).mean()


def two_answers(self, features, captions):
    out = self.fc(self.hidden(features, captions))
    return out, -out


def needs_cuda(self, features, captions):
    return self.fc(self.hidden(features, captions.to("cuda:0")))


def no_numbers(self, features, captions):
    return self.fc(self.hidden(features, captions)) / 0


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (draws, "draws random numbers"),
        (random_state, "a random initial state"),
        (over_the_batch, "change with image and words of another caption in the batch"),
        (looks_ahead, "does not read from left to right"),
        (ignores_words, "do not depend on the words .* begin= and step="),
        (ignores_the_image, "do not depend on the image"),
        (a_loss, r"it returned \(\) for 2 images .* logits=lambda"),
        (two_answers, r"several tensors that could be the logits \(\[0\], \[1\]\)"),
        (no_numbers, "not finite"),
        pytest.param(
            needs_cuda,
            "asks for a GPU by itself",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU"),
        ),
    ],
)
def test_what_does_not_decode_word_by_word_is_refused(forward, message):
    with pytest.raises(CaptionerError, match=message):
        wrap((Pooled(E).eval(), decoder(forward)))


def test_a_model_that_decodes_only_by_itself_is_told_how_to_step():
    with pytest.raises(CaptionerError, match=r"it has sample\(\).*begin= and step="):
        wrap(FAMILIES["steps only"].model(V).eval())


def test_weights_and_vocabulary_that_do_not_match_are_refused_with_both_numbers():
    with pytest.raises(CaptionerError, match=rf"for {V} words, but the vocabulary has {V - 2}"):
        wrap((Pooled(E).eval(), Decoder().eval()), vocabulary=WORDS[:-2])
    with pytest.raises(CaptionerError, match=rf"{V} rows, but the vocabulary has {V + 2} words"):
        wrap((Pooled(E).eval(), Decoder().eval()), vocabulary=[*WORDS, "two", "more"])


def test_a_first_step_that_is_not_is_refused():
    pair = Pooled(E).eval(), Decoder().eval()
    assert wrap(pair, first=1).recognised.first == 1
    with pytest.raises(CaptionerError, match=r"first=0, but .* is that of step 1"):
        wrap(pair, first=0)


def test_own_decoding_that_says_something_else_is_refused():
    model = FAMILIES["steps only"].model(V).eval()
    steps = FAMILIES["steps only"].given(model)
    wrap(model, own=model.sample, **steps)
    with pytest.raises(CaptionerError, match=r"captionfix decodes .* where the captioner's own decoding"):
        wrap(model, own=lambda images: (model.sample(images) + 1) % V, **steps)
    with pytest.raises(CaptionerError, match="'zebra', which is not in the vocabulary"):
        wrap(model, own=lambda images: ["a", "zebra"], **steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode": len}, "decode= together with encode="),
        ({"begin": len}, "begin= together with step="),
        ({"encode": len}, "encode= needs decode="),
        ({"logits": len, "begin": len, "step": len}, "one of logits=, decode= and step="),
        ({"features": "encoder.nowhere"}, "there is no such module; the last that give maps are .*encoder.cnn"),
        ({"features": "encoder.embed"}, r"must be a \(B, F, h, w\) map, not one of shape \(2, 10\)"),
        ({"features": "decoder.dropout"}, r"\(B, F, h, w\) map, not one of shape"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(CaptionerError, match=message):
        wrap((Pooled(E).eval(), Decoder().eval()), **options)


def test_encode_must_give_a_map():
    encoder, part = Pooled(E).eval(), Decoder().eval()
    with pytest.raises(CaptionerError, match=r"\(B, F, h, w\), not \(2, 10\)"):
        wrap((encoder, part), encode=encoder, decode=part)
    with pytest.raises(CaptionerError, match="no module ran"):
        captionfix.wrap(lambda images, tokens: images.mean() + F.one_hot(tokens, V), WORDS, PREPROCESS)
    with pytest.raises(CaptionerError, match="not a str"):
        captionfix.wrap("photos", WORDS)


# the feature map -----------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Its forward is given."""

    def __init__(self, forward):
        super().__init__()
        self.stem, self.cnn, self.embed = nn.Conv2d(3, 3, 1), SmallCNN(), nn.Linear(C, E)
        self.shortcut = nn.Linear(3, E)
        self.channels = nn.Linear(C, C)
        self._forward = forward

    def forward(self, images):
        return self._forward(self, images)


def functional_relu(self, x):
    """The feature map itself is a function's output, in place."""
    return self.embed(F.relu_(self.cnn(self.stem(x)) - 0.1).mean((2, 3)))


def in_place(self, x):
    x = self.stem(x)
    x += 1
    return self.embed(self.cnn(x).mean((2, 3)))


def looks_at_numbers(self, x):
    x = self.stem(x)
    if float(x.abs().sum()) == 0:
        raise ValueError("a black image")
    return self.embed(self.cnn(x).mean((2, 3)))


def channels_last(self, x):
    """A linear layer over channels that were put last: four axes, but not those of a map."""
    x = self.channels(self.cnn(self.stem(x)).permute(0, 2, 3, 1))
    return self.embed(x.flatten(1, 2).mean(1))


def twice_the_same(self, x):
    """The same module early and late."""
    x = self.stem(self.stem(x))
    return self.embed(self.cnn(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("forward", "left_out"),
    [
        (functional_relu, True),
        (in_place, True),
        (looks_at_numbers, False),
        (channels_last, True),
        (twice_the_same, True),
    ],
)
def test_feature_maps_in_the_way(forward, left_out):
    encoder, part = Encoder(forward).eval(), Decoder().eval()
    captioner = wrap((encoder, part))
    assert captioner.recognised.parts.name == "encoder.cnn"
    assert bool(captioner.recognised.parts.before) == left_out
    x = pixels()
    with torch.no_grad():
        torch.testing.assert_close(captioner.logits(x, TOKENS), part(encoder(x), TOKENS)[:, 1:])
        features = captioner.encode(x)
        kept = features.clone()
        captioner.decode(features, TOKENS)
        assert torch.equal(features, kept)


def test_a_feature_map_by_name():
    encoder, part = Encoder(twice_the_same).eval(), Decoder().eval()
    for features in ("encoder.cnn.body.3", encoder.cnn.body[3], "encoder.stem"):
        captioner = wrap((encoder, part), features=features)
        assert captioner.recognised.parts.module is (
            encoder.stem if features == "encoder.stem" else encoder.cnn.body[3]
        )
        with torch.no_grad():
            torch.testing.assert_close(captioner.logits(pixels(), TOKENS), part(encoder(pixels()), TOKENS)[:, 1:])


def test_a_named_feature_map_that_the_image_goes_past_is_refused():
    def past(self, x):
        return self.embed(self.cnn(self.stem(x)).mean((2, 3))) + self.shortcut(x.mean((2, 3)))

    with pytest.raises(CaptionerError, match="reaches the words by other ways too"):
        wrap((Encoder(past).eval(), Decoder().eval()), features="encoder.cnn")


def test_no_feature_map_at_all():
    def functions(self, x):
        x = F.conv2d(x, self.stem.weight, stride=4)
        return self.shortcut(F.relu(x).mean((2, 3)))

    with pytest.raises(CaptionerError, match=r"no feature map found.*features='encoder.layer4'"):
        wrap((Encoder(functions).eval(), Decoder().eval()))


def test_the_cnn_does_not_run_when_features_are_decoded():
    encoder, part = Encoder(twice_the_same).eval(), Decoder().eval()
    captioner = wrap((encoder, part))
    features = captioner.encode(pixels())
    ran = []
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, o, name=name: ran.append((name, o.abs().sum())))
    captioner.decode(features, TOKENS)
    assert all(total == 0 for _, total in ran)  # the stem's hooks see zeros that nobody computed
    assert not any(name.startswith("cnn.") for name, _ in ran)


def test_a_cnn_whose_features_are_huge():
    """As those of a deep one without trained weights: they saturate the decoder, which then is deaf to words."""
    model = FAMILIES["every step"].model(V).eval()
    with torch.no_grad():
        model.encoder.cnn.body[5].weight.mul_(1e9)
    assert wrap(model).recognised.first == 0


# modules stay as they were -------------------------------------------------------------------------------------------


def photograph():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))


def state(*modules):
    parts = [m for module in modules for m in module.modules()]
    return (
        [m.training for m in parts],
        [sorted(vars(m)) for m in parts],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in parts],
        [p.requires_grad for m in modules for p in m.parameters()],
        [id(p) for m in modules for p in m.parameters()],
        [t.clone() for m in modules for t in m.state_dict().values()],
        torch.get_rng_state(),
        [m.inplace for m in parts if hasattr(m, "inplace")],
    )


def equal(a, b):
    return all(
        torch.equal(x, y)
        if isinstance(x, torch.Tensor)
        else len(x) == len(y)
        and all(torch.equal(*p) if isinstance(p[0], torch.Tensor) else p[0] == p[1] for p in zip(x, y, strict=True))
        for x, y in zip(a, b, strict=True)
    )


class Keeps(Decoder):
    """Keeps its last state and weights in attributes, as many do."""

    def forward(self, features, captions):
        x = torch.cat([features.unsqueeze(1), self.dropout(self.embed(captions))], 1)
        out, self.last = self.lstm(x, getattr(self, "last", None))
        self.__dict__.setdefault("history", []).append(out)
        return self.fc(out)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [Decoder, Keeps])
def test_modules_are_as_before(training, kind):
    encoder, part = Pooled(E).train(training), kind().train(training)
    part.lstm.eval()  # a mixed state
    encoder.cnn.body[0].weight.requires_grad_(False)
    part.fc.register_forward_hook(lambda module, args, output: None)
    before = state(encoder, part)
    captioner = wrap((encoder, part))
    assert equal(state(encoder, part), before)
    captionfix.explain(captioner, photograph(), caption="a red ball")
    assert equal(state(encoder, part), before)
    with pytest.raises(IndexError):
        captioner.logits(pixels(), TOKENS + 100)
    with pytest.raises(RuntimeError):
        captioner.encode(torch.zeros(1, 5, SIZE, SIZE))
    assert equal(state(encoder, part), before)
    with torch.no_grad():
        found = captioner.logits(pixels(), TOKENS)
        assert equal(state(encoder, part), before)
        torch.testing.assert_close(found, Decoder.forward(part.eval(), encoder.eval()(pixels()), TOKENS)[:, 1:])


def test_a_failure_to_wrap_leaves_modules_too():
    encoder, part = Pooled(E).train(), decoder(draws).train()
    before = state(encoder, part)
    with pytest.raises(CaptionerError):
        wrap((encoder, part))
    assert equal(state(encoder, part), before)


class Counts(Decoder):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, features, captions):
        self.seen += 1
        return super().forward(features, captions)


def test_a_forward_that_writes_into_its_buffers_is_refused_and_put_back():
    part = Counts().eval()
    with pytest.raises(CaptionerError, match=r"writes into its own decoder\.seen"):
        wrap((Pooled(E).eval(), part))
    assert part.seen == 0


def test_others_meet_the_module_s_own_forward_while_it_is_replaced():
    """Another thread calls the encoder while the decoder runs on features that are put in its place."""
    encoder, part = Pooled(E).eval(), Decoder().eval()
    x, seen = pixels(), []
    with torch.no_grad():
        wanted = encoder(x)

    def elsewhere():
        with torch.no_grad():
            seen.append(encoder(x))

    def logits(images, tokens):
        features = encoder(images)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return part(features, tokens)

    captioner = wrap((encoder, part), logits=logits)
    seen.clear()
    captioner.decode(torch.ones(3, C, 4, 4), TOKENS)
    assert len(seen) == 1
    assert torch.equal(seen[0], wanted)


def test_gradients_pass_for_those_who_want_them():
    captioner = wrap((Pooled(E).eval(), Decoder().eval()))
    features = captioner.encode(pixels(1)).detach().requires_grad_()
    captioner.decode(features, TOKENS[:1])[0, 2, 5].backward()
    assert features.grad.abs().sum() > 0


def test_captions_are_generated_and_read():
    captioner = wrap((Pooled(E).eval(), Decoder().eval()), max_words=4, name="mine")
    (ids,) = captioner.generate(pixels(1), beams=2)
    assert 1 <= len(ids) <= 4
    assert captioner.tokenize("A red ball.") == (4, 5, 6)
    assert repr(captioner).startswith("<captioner 'mine': called as decoder(encoder(images), captions)")
