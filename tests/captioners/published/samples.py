"""Files of published captioners, in small: each case writes them and says what the author's code would compute."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import networks_of_others as others
import torch
from tensorflow_files import bundle, single
from torch import Tensor, nn
from torch.nn import functional as F

PLAIN = ["a", "dog", "on", "the", "beach", "red", "ball", "."]
TOKENS = 5


@dataclass
class Sample:
    """What was written.

    Attributes:
        structure: in words, for the table.
        scores: (B, 3, H, W) pixels and (B, T) tokens -> (B, T, V), what the author's own code gives: logits, or
            log-probabilities.
        start: id that begins.
        end: id that ends.
        words: by id.
        logits: whether `scores` are logits.
        side: of the CNN's square input, None where it has the image's own size.
        alphas: (B, T, N) attention on a grid of that side, if there is any.
    """

    structure: str
    scores: Callable[[Tensor, Tensor], Tensor]
    start: int
    end: int
    words: list[str]
    logits: bool = False
    side: int | None = 224
    alphas: Callable[[Tensor, Tensor], Tensor] | None = None


@contextmanager
def foreign(module: str, *classes: type) -> Iterator[None]:
    """Gives classes the address that they have in the author's repository, for as long as something is pickled."""
    before = sys.modules.get(module)
    place = ModuleType(module)
    old = [(cls.__module__, cls) for cls in classes]
    for cls in classes:
        cls.__module__ = module
        cls.__qualname__ = cls.__name__
        setattr(place, cls.__name__, cls)
    sys.modules[module] = place
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sources of classes can't be found
            yield
    finally:
        for name, cls in old:
            cls.__module__ = name
        del sys.modules[module]
        if before is not None:
            sys.modules[module] = before


def save(value: Any, path: Path, legacy: bool = False) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)


def bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As it was before norms counted their batches."""
    return type(state)((k, v) for k, v in state.items() if not k.endswith("num_batches_tracked"))


def vocabulary_pickle(path: Path, module: str, words: list[str], protocol: int = 2, **names: str) -> None:
    class Vocabulary:
        pass

    vocabulary = Vocabulary()
    setattr(vocabulary, names.get("forward", "word2idx"), {word: i for i, word in enumerate(words)})
    setattr(vocabulary, names.get("back", "idx2word"), dict(enumerate(words)))
    vocabulary.idx = len(words)
    with foreign(module, Vocabulary):
        path.write_bytes(pickle.dumps(vocabulary, protocol))


def pytorch_tutorial(folder: Path, legacy: bool, module: str) -> Sample:
    words = ["<pad>", "<start>", "<end>", "<unk>", *PLAIN]
    encoder = others.lively(others.Encoder(others.ResNet((1, 2, 3, 1)), 6, yunjey=True))
    decoder = others.lively(others.Decoder(("embed", "lstm", "linear"), (len(words), 6, 8)))
    for name, model in (("encoder-5-3000.pkl", encoder), ("decoder-5-3000.pkl", decoder)):
        save(bare(model.state_dict()) if legacy else model.state_dict(), folder / name, legacy)
    vocabulary_pickle(folder / "vocab.pkl", module, words)
    return Sample(
        f"encoder, decoder ({'older container' if legacy else 'zip'}), Vocabulary of {module}",
        lambda pixels, tokens: decoder(encoder(pixels), tokens)[:, 1:],
        1,
        2,
        words,
    )


def udacity(folder: Path, names: tuple[str, ...], layers: int, head: tuple[int, ...]) -> Sample:
    words = ["<start>", "<end>", "<unk>", *PLAIN]
    resnet = others.ResNet((2, 1, 1, 1), deep=False)
    encoder = others.lively(others.Encoder(resnet, 6, yunjey=False))
    decoder = others.lively(others.Decoder(names, (len(words), 6, 9), layers, head))
    save(bare(encoder.state_dict()), folder / "encoder-3.pkl", legacy=True)
    save(decoder.state_dict(), folder / "decoder-3.pkl", legacy=True)
    vocabulary_pickle(folder / "vocab.pkl", "vocabulary", words, protocol=4)
    return Sample(
        f"{'/'.join(names)}, {layers} LSTM layer{'s' * (layers > 1)}, older container",
        lambda pixels, tokens: decoder(encoder(pixels), tokens)[:, 1:],
        0,
        1,
        words,
    )


def attend_tutorial(folder: Path, legacy: bool) -> Sample:
    words = ["<pad>", *PLAIN, "<unk>", "<start>", "<end>"]
    grid = 14
    encoder = others.lively(others.Encoder2(others.ResNet(), grid))
    decoder = others.lively(others.DecoderWithAttention(7, 6, 8, len(words), 20))
    encoder.train()
    decoder.train()  # as it was saved
    optimizer = torch.optim.Adam(decoder.parameters())
    sum(parameter.sum() for parameter in decoder.parameters()).backward()
    optimizer.step()
    optimizer.zero_grad()
    checkpoint = {
        "epoch": 11,
        "epochs_since_improvement": 0,
        "bleu-4": 0.24,
        "encoder": encoder,
        "decoder": decoder,
        "encoder_optimizer": None,
        "decoder_optimizer": optimizer,
    }
    classes = (others.Encoder2, others.Attention, others.DecoderWithAttention, others.Block, others.ResNet)
    with foreign("models", *classes):
        save(checkpoint, folder / "BEST_checkpoint_coco_5_cap_per_img_5_min_word_freq.pth.tar", legacy)
    table = {word: i for i, word in enumerate(words)}
    (folder / "WORDMAP_coco_5_cap_per_img_5_min_word_freq.json").write_text(json.dumps(table))
    encoder.eval()
    decoder.eval()
    return Sample(
        f"whole modules and Adam, {'older container' if legacy else 'zip'}, WORDMAP",
        lambda pixels, tokens: decoder(encoder(pixels), tokens)[0],
        words.index("<start>"),
        words.index("<end>"),
        words,
        logits=True,
        side=256,
        alphas=lambda pixels, tokens: decoder(encoder(pixels), tokens)[1],
    )


def imagecaptioning(folder: Path, kind: str, finetuned: bool = False, use_bn: int = 0, protocol: int = 2) -> Sample:
    words = [*PLAIN, "UNK"]
    cnn = others.lively(others.ResNet(caffe=True))
    model = others.lively(others.Captioning(kind, len(words), 20, use_bn=use_bn))
    save(model.state_dict(), folder / "model-best.pth", legacy=finetuned)
    save(model.state_dict(), folder / "model.pth", legacy=finetuned)
    stages = nn.Sequential(*list(cnn.children())[:-2])
    if finetuned:
        save(bare(stages.state_dict()), folder / "model-cnn-best.pth", legacy=True)
        save(torch.optim.Adam(model.parameters()).state_dict(), folder / "optimizer.pth", legacy=True)
    else:
        save(cnn.state_dict(), folder / "resnet101.pth")
    options = argparse.Namespace(
        caption_model=kind,
        rnn_size=8,
        seq_length=16,
        vocab_size=len(words),
        use_bn=use_bn,
        input_att_dir="data/cocotalk_att",
    )
    infos = {
        "opt": options,
        "vocab": {str(i + 1): word for i, word in enumerate(words)},
        "iter": 7,
        "best_val_score": 0.9,
    }
    (folder / f"infos_{kind}-best.pkl").write_bytes(pickle.dumps(infos, protocol))

    def features(pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = stages(pixels)
        att = x if finetuned else F.adaptive_avg_pool2d(x, [14, 14])
        return x.mean(3).mean(2), att.permute(0, 2, 3, 1).flatten(1, 2)

    def scores(pixels: Tensor, tokens: Tensor) -> Tensor:
        return model(*features(pixels), tokens)

    def alphas(pixels: Tensor, tokens: Tensor) -> Tensor:
        scores(pixels, tokens)
        return torch.stack(model.weights, 1)

    return Sample(
        f"{kind}{' with_finetune' if finetuned else ''}{', use_bn' if use_bn else ''}, Caffe-style ResNet, infos of "
        f"protocol {protocol}",
        scores,
        0,
        0,
        ["<end>", *words],
        side=224 if finetuned else None,
        alphas=alphas if kind in ("att2in2", "updown") else None,
    )


def im2txt(folder: Path, cell: tuple[str, str], older: bool, quoted: bool) -> Sample:
    words = ["a", "<S>", "</S>", ".", *PLAIN[1:-1]]
    rows = len(words) + 3  # one of them is <UNK>
    generator = torch.Generator().manual_seed(3)
    variables: dict[str, Tensor] = {}

    def get(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in variables:
            fan = max(1, torch.Size(shape[:-1]).numel())
            value = torch.randn(shape, generator=generator) * (1.5 / fan**0.5)
            variables[name] = (
                value.abs() + 0.3 if name.endswith("variance") else value * (0.3 if len(shape) == 1 else 1)
            )
        return variables[name]

    def depth(width: int) -> int:
        return max(2, width // 32)

    def encode(pixels: Tensor) -> Tensor:
        return others.slim_inception(pixels, get, depth)

    channels = encode(torch.zeros(1, 3, 75, 75)).shape[1]
    get("image_embedding/weights", (channels, 6))
    get("seq_embedding/map", (rows, 6))
    get(f"lstm/{cell[0]}", (6 + 8, 32))
    get(f"lstm/{cell[1]}", (32,))
    get("logits/weights", (8, rows))
    get("logits/biases", (rows,))
    arrays: dict[str, Any] = {name: value.numpy() for name, value in variables.items()}
    if older:
        single(folder / "model.ckpt-2000000", arrays)
    else:
        bundle(folder / "model.ckpt-2000000", {**arrays, "global_step": torch.tensor(2000000).numpy()})
        (folder / "model.ckpt-2000000.meta").write_bytes(b"\n\x02")
        (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-2000000"\n')
    lines = [f"b'{word}' {9000 - i}" if quoted and i > 6 else f"{word} {9000 - i}" for i, word in enumerate(words)]
    (folder / "word_counts.txt").write_text("\n".join(lines) + "\n")
    return Sample(
        f"TensorFlow {'single file' if older else 'bundle'}, lstm/{cell[0]}",
        lambda pixels, tokens: others.tensorflow_decoder(encode(pixels), tokens, variables, cell),
        1,
        2,
        [*words, "<UNK>", "<unused 11>", "<unused 12>"],
        logits=True,
        side=299,
    )


def aladdinpersson(folder: Path) -> Sample:
    """Inception's own code is torchvision's; its channels are cut to a few."""
    from torchvision.models import Inception3

    words = ["<PAD>", "<SOS>", "<EOS>", "<UNK>", *PLAIN]
    inception = others.lively(thinned(Inception3(aux_logits=False, init_weights=False, transform_input=True)))
    inception.fc = nn.Linear(inception.fc.in_features, 6)
    decoder = others.lively(others.Decoder(("embed", "lstm", "linear"), (len(words), 6, 8)))
    state = {f"encoderCNN.inception.{name}": tensor for name, tensor in inception.state_dict().items()}
    state.update({f"decoderRNN.{name}": tensor for name, tensor in decoder.state_dict().items()})
    optimizer = torch.optim.Adam(decoder.parameters())
    save({"state_dict": state, "optimizer": optimizer.state_dict(), "step": 9}, folder / "my_checkpoint.pth.tar")
    vocabulary_pickle(folder / "vocab.pkl", "__main__", words, forward="stoi", back="itos")

    def scores(pixels: Tensor, tokens: Tensor) -> Tensor:
        return decoder(F.relu(inception(pixels)), tokens)[:, 1:]

    return Sample("state_dict and optimizer, Vocabulary with stoi and itos", scores, 1, 2, words, side=299)


def thinned(inception: nn.Module) -> nn.Module:
    """An Inception of the same shape with a thirtieth of the channels."""

    def width(channels: int) -> int:
        return 3 if channels == 3 else max(2, channels // 32)

    outs: dict[int, int] = {}  # of the concatenations, found by running once
    for module in inception.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(torch.zeros(width(module.out_channels), 0, *module.kernel_size))
        elif isinstance(module, nn.BatchNorm2d):
            few = width(module.num_features)
            module.weight, module.bias = nn.Parameter(torch.ones(few)), nn.Parameter(torch.zeros(few))
            module.running_mean, module.running_var = torch.zeros(few), torch.ones(few)

    def fit(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        shape = (len(module.weight), args[0].shape[1], *module.kernel_size)
        module.weight = nn.Parameter(torch.randn(shape) * (2 / torch.Size(shape[1:]).numel()) ** 0.5)
        outs[id(module)] = shape[0]

    handles = [m.register_forward_pre_hook(fit) for m in inception.modules() if isinstance(m, nn.Conv2d)]
    size: list[int] = []
    handles.append(inception.avgpool.register_forward_pre_hook(lambda _, args: size.append(args[0].shape[1])))
    inception.fc = nn.Identity()
    with torch.no_grad():
        inception.eval()(torch.zeros(1, 3, 75, 75))
    for handle in handles:
        handle.remove()
    inception.fc = nn.Linear(size[0], 4)
    return inception


_NEW, _MIDDLE, _OLD = (
    ("basic_lstm_cell/kernel", "basic_lstm_cell/bias"),
    ("basic_lstm_cell/weights", "basic_lstm_cell/biases"),
    ("BasicLSTMCell/Linear/Matrix", "BasicLSTMCell/Linear/Bias"),
)
CASES: dict[str, Callable[[Path], Sample]] = {
    "yunjey": lambda f: pytorch_tutorial(f, False, "__main__"),
    "yunjey, 2018": lambda f: pytorch_tutorial(f, True, "build_vocab"),
    "sgrvinod": lambda f: attend_tutorial(f, False),
    "sgrvinod, 2018": lambda f: attend_tutorial(f, True),
    "Udacity, two layers": lambda f: udacity(f, ("caption_embeddings", "lstm", "FC"), 2, ()),
    "Udacity, three layers behind": lambda f: udacity(f, ("embedded", "lstm", "fc1", "fc2", "fc3"), 1, (10, 7)),
    "im2txt": lambda f: im2txt(f, _MIDDLE, older=False, quoted=False),
    "im2txt, renamed": lambda f: im2txt(f, _NEW, older=False, quoted=True),
    "im2txt, 2016": lambda f: im2txt(f, _OLD, older=True, quoted=False),
    "ruotianluo, FC": lambda f: imagecaptioning(f, "fc"),
    "ruotianluo, NewFC": lambda f: imagecaptioning(f, "new_fc"),
    "ruotianluo, ShowTell": lambda f: imagecaptioning(f, "show_tell", protocol=0),
    "ruotianluo, Att2in2": lambda f: imagecaptioning(f, "att2in2"),
    "ruotianluo, UpDown": lambda f: imagecaptioning(f, "updown", use_bn=2),
    "ruotianluo, with_finetune": lambda f: imagecaptioning(f, "updown", finetuned=True),
    "aladdinpersson": aladdinpersson,
}


def difference(sample: Sample, captioner: Any, pixels: Tensor, tokens: Tensor) -> float:
    """The largest difference of the captioner's scores from the author's."""
    with torch.no_grad():
        ours, theirs = captioner.logits(pixels, tokens), sample.scores(pixels, tokens)
    if not sample.logits:
        ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


def some_tokens(sample: Sample, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, len(sample.words), (count, TOKENS), generator=generator)
    tokens[:, 0] = sample.start
    return tokens


def buffer(value: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()
