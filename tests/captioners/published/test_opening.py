"""Which files make a captioner, and what is said where they do not."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import samples
import torch
from PIL import Image
from samples import CASES, save
from torch import nn

import captionfix
from captionfix.captioners.published import tensorflow
from captionfix.captioners.published.words import counted, in_order
from captionfix.cli import main
from captionfix.errors import CaptionerError


def rewrite(path: Path, change) -> None:
    value = torch.load(path, weights_only=False)
    save(change(value) or value, path)


def equal(a, b) -> bool:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    pixels, tokens = a.prepare(image).pixels[None], torch.tensor([[a.vocabulary.start, 4, 5]])
    with torch.no_grad():
        return torch.equal(a.logits(pixels, tokens), b.logits(pixels, tokens))


APART = {
    "yunjey": ("decoder-5-3000.pkl", "encoder-5-3000.pkl", "vocab.pkl"),
    "sgrvinod": (
        "BEST_checkpoint_coco_5_cap_per_img_5_min_word_freq.pth.tar",
        None,
        "WORDMAP_coco_5_cap_per_img_5_min_word_freq.json",
    ),
    "im2txt": ("model.ckpt-2000000", None, "word_counts.txt"),
    "im2txt, 2016": ("model.ckpt-2000000", None, "word_counts.txt"),
    "ruotianluo, Att2in2": ("model-best.pth", "resnet101.pth", "infos_att2in2-best.pkl"),
}


@pytest.mark.parametrize("name", APART)
def test_files_that_lie_apart(tmp_path, name):
    """Named one by one, they make what their folder makes."""
    (tmp_path / "all").mkdir()
    CASES[name](tmp_path / "all")
    together = captionfix.load(tmp_path / "all")
    places = []
    for i, file in enumerate(APART[name]):
        if file is None:
            places.append(None)
            continue
        (tmp_path / str(i)).mkdir()
        for part in (tmp_path / "all").glob(f"{file}*"):
            shutil.move(part, tmp_path / str(i) / part.name)
        places.append(tmp_path / str(i) / file)
    checkpoint, cnn, vocabulary = places
    assert equal(captionfix.load(checkpoint, cnn=cnn, vocabulary=vocabulary), together)
    with pytest.raises(CaptionerError, match="missing"):
        captionfix.load(checkpoint)
    with pytest.raises(CaptionerError, match="no file"):
        captionfix.load(checkpoint, vocabulary=tmp_path / "nowhere.pkl")
    with pytest.raises(CaptionerError, match="is a folder"):
        captionfix.load(tmp_path, vocabulary=vocabulary)


def test_on_the_command_line(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    CASES["yunjey"](tmp_path / "model")
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "i.png")
    wanted = ["explain", str(tmp_path / "i.png"), "--captioner", str(tmp_path / "model"), "--out"]
    with pytest.raises(SystemExit) as ended:
        main([*wanted, str(tmp_path / "out"), "--caption", "a red ball"])
    assert not ended.value.code
    result = captionfix.read(next(p.parent for p in (tmp_path / "out").rglob("*.json")))
    assert [word.text for word in result.words] == ["a", "red", "ball"]
    assert result.captioner == "yunjey/pytorch-tutorial"
    (tmp_path / "model" / "vocab.pkl").unlink()
    with pytest.raises(SystemExit) as ended:
        main([*wanted, str(tmp_path / "again")])
    assert ended.value.code == 2
    assert "vocabulary" in capsys.readouterr().err


def test_optimizers_and_training_state_are_left_aside(tmp_path):
    CASES["ruotianluo, with_finetune"](tmp_path)
    first = captionfix.load(tmp_path)
    (tmp_path / "histories_updown.pkl").write_bytes(pickle.dumps({"loss_history": {1: 2.0}}))
    (tmp_path / "cocotalk.json").write_text(json.dumps({"images": [], "ix_to_word": {"1": "a"}}))
    (tmp_path / "notes.txt").write_text("nothing\n")
    assert equal(captionfix.load(tmp_path), first)


def vocabulary_of(count: int):
    def change(folder: Path) -> None:
        words = ["<pad>", "<start>", "<end>", "<unk>", *map(str, range(count - 4))]
        samples.vocabulary_pickle(folder / "vocab.pkl", "build_vocab", words)

    return change


def infos_with(**options):
    def change(folder: Path) -> None:
        path = next(folder.glob("infos*"))
        infos = pickle.loads(path.read_bytes())
        vars(infos["opt"]).update(options)
        path.write_bytes(pickle.dumps(infos, 2))

    return change


def fewer_words(folder: Path) -> None:
    path = next(folder.glob("infos*"))
    infos = pickle.loads(path.read_bytes())
    del infos["vocab"]["9"]
    path.write_bytes(pickle.dumps(infos, 2))


def fewer_in_table(folder: Path) -> None:
    next(folder.glob("WORDMAP*")).write_text(json.dumps({"<pad>": 0, "<start>": 1, "<end>": 2}))


def lines(*words: str):
    return lambda folder: (folder / "word_counts.txt").write_text("".join(f"{word} 1\n" for word in words))


def unlink(*names: str):
    return lambda folder: [path.unlink() for name in names for path in folder.glob(name)]


def changed(name: str, **tensors: torch.Tensor | None):
    def change(folder: Path) -> None:
        def put(state):
            for key, tensor in tensors.items():
                key = key.replace("__", ".")
                if tensor is None:
                    del state[key]
                else:
                    state[key] = tensor

        rewrite(folder / name, put)

    return change


def other_cnn(folder: Path) -> None:
    from networks_of_others import ResNet

    save(ResNet(planes=(2, 3, 4, 7), caffe=True).state_dict(), folder / "resnet101.pth")


def real_cnn_stages(folder: Path) -> None:
    from networks_of_others import ResNet

    stages = nn.Sequential(*list(ResNet((3, 4, 6, 3), caffe=True).children())[:-2])
    save(stages.state_dict(), folder / "model-cnn-best.pth")
    infos_with(cnn_model="resnet101")(folder)


def unpacked(folder: Path) -> None:
    path = next(folder.glob("BEST*"))
    shutil.unpack_archive(path, folder, "zip")
    path.unlink()


def without_norm(folder: Path) -> None:
    rewrite(folder / "my_checkpoint.pth.tar", lambda checkpoint: checkpoint["state_dict"].pop(POOLED) is None)


def truncated(name: str):
    return lambda folder: [p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]) for p in folder.glob(name)]


def renamed(old: str, new: str):
    return lambda folder: (folder / old).rename(folder / new)


def second(old: str, new: str):
    return lambda folder: shutil.copy(folder / old, folder / new)


NAN = torch.full((12, 6), float("nan"))
GRU = {"lstm__weight_hh_l0": torch.zeros(24, 8), "lstm__weight_ih_l0": torch.zeros(24, 6)}
WIDER = {"linear__weight": torch.zeros(9, 20), "linear__bias": torch.zeros(9)}
DECODER, ENCODER = "decoder-5-3000.pkl", "encoder-5-3000.pkl"
POOLED = "encoderCNN.inception.Mixed_7c.branch_pool.bn.weight"
WRONG = {
    "another vocabulary": ("yunjey", vocabulary_of(9), "has 9 words.*are for 12"),
    "another table": ("sgrvinod", fewer_in_table, "has 3 words.*are for 12"),
    "another infos": ("ruotianluo, FC", fewer_words, "has 8 words.*are for 10"),
    "too few lines": ("im2txt", lines("<S>", "</S>", "."), "has 4 words.*are for 13"),
    "too many lines": ("im2txt", lines("<S>", "</S>", *map(str, range(30))), "has 33 words.*are for 13"),
    "no vocabulary": ("yunjey", unlink("vocab.pkl"), "yunjey.*missing: the vocabulary"),
    "no encoder": ("yunjey", unlink("encoder*"), "missing: .*encoder"),
    "no CNN": ("ruotianluo, FC", unlink("resnet101.pth"), "ImageCaptioning.*missing: the CNN"),
    "no infos": ("ruotianluo, FC", unlink("infos*"), "missing: infos"),
    "only the CNN": ("ruotianluo, FC", unlink("model*", "infos*"), "holds a CNN's weights"),
    "only words": ("yunjey", unlink("*coder*"), "only the vocabulary"),
    "torchvision's CNN": ("ruotianluo, FC", renamed("resnet101.pth", "resnet101-63fe2227.pth"), "torchvision's own"),
    "a CNN of other width": ("ruotianluo, FC", other_cnn, "reads 20,.*gives 28"),
    "a CNN of other depth": ("ruotianluo, with_finetune", real_cnn_stages, "ResNet-50, .*says ResNet-101"),
    "bottom-up features": ("ruotianluo, UpDown", infos_with(input_att_dir="data/cocobu_att"), "bottom-up"),
    "boxes": ("ruotianluo, UpDown", infos_with(use_box=1), "bottom-up"),
    "NaN": ("yunjey", changed(DECODER, embed__weight=NAN), "NaN or infinite"),
    "a tensor too many": ("yunjey", changed(DECODER, init_h__running=NAN), "another architecture"),
    "a second layer in front": ("yunjey", changed(ENCODER, other__weight=NAN), "instead of one linear layer"),
    "an LSTM without its state": ("yunjey", changed(DECODER, lstm__weight_hh_l0=None), "not a plain LSTM"),
    "a GRU": ("yunjey", changed(DECODER, **GRU), "24 rows for 8 units"),
    "a layer of other size": ("yunjey", changed(DECODER, linear__weight=torch.zeros(12, 9)), "reads 9,.*gives 8"),
    "an encoder of other size": ("yunjey", changed(ENCODER, linear__weight=torch.zeros(6, 24)), "reads 24,.*gives 20"),
    "an embedding of other size": ("yunjey", changed(ENCODER, **WIDER), "describes an image by 9"),
    "a hole in the CNN": ("yunjey", changed(ENCODER, **{"resnet.4.0.bn1.weight": None}), "do not fit together"),
    "no stage": ("yunjey", changed(ENCODER, **{"resnet.5.0.conv1.weight": None}), "no whole ResNet"),
    "several decoders": ("yunjey", second("decoder-5-3000.pkl", "decoder-4-3000.pkl"), "several files.*decoder-4-3000"),
    "an unpacked checkpoint": ("sgrvinod", unpacked, "that was unpacked"),
    "a truncated checkpoint": ("sgrvinod", truncated("BEST*"), "cut off"),
    "a truncated older checkpoint": ("sgrvinod, 2018", truncated("BEST*"), "cut off"),
    "a truncated encoder": ("yunjey", truncated("encoder*"), "missing.*cut off"),
    "no data": ("im2txt", unlink("*.data-*"), "data-00000-of-00001 is missing"),
    "no index": ("im2txt", unlink("*.index"), "needs its .index"),
    "a truncated index": ("im2txt", truncated("*.index"), "can't be read as a TensorFlow checkpoint"),
    "truncated data": ("im2txt", truncated("*.data-*"), "is cut off"),
    "a truncated single file": ("im2txt, 2016", truncated("model*"), "model.ckpt-2000000"),
    "no Inception": ("aladdinpersson", without_norm, "no Inception v3"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said(tmp_path, what):
    name, change, message = WRONG[what]
    CASES[name](tmp_path)
    change(tmp_path)
    with pytest.raises(CaptionerError, match=message):
        captionfix.load(tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("core.lstm.w2h.weight", "core.attention.fr_embed.weight"), "AdaAtt"),
        (("LanguageLSTM.weight_hh", "AdaLSTM.weight_ih"), "GridTD"),
        (("extractor.model.0.weight", "mlc.classifier.weight"), "Medical-Report"),
        (("something.weight",), "unknown kind"),
    ],
)
def test_what_is_not_read_is_named(tmp_path, keys, message):
    save({key: torch.zeros(2) for key in keys}, tmp_path / "model.pth")
    with pytest.raises(CaptionerError, match=message):
        captionfix.load(tmp_path)


def test_an_empty_folder_is_still_no_captioner(tmp_path):
    with pytest.raises(CaptionerError, match=r"config\.json"):
        captionfix.load(tmp_path)


def test_vocabularies_in_any_form():
    words = ["<start>", "a", "<end>"]
    forward, back = {word: i for i, word in enumerate(words)}, dict(enumerate(words))
    for form in (forward, back, words, {str(i): word for i, word in back.items()}):
        assert in_order(form) == tuple(words)
    for form in (None, {}, [], {"a": 0}, {0: "<start>", 2: "<end>"}, {"<start>": 0, "<end>": 0}, [1, 2], {"x": [1]}):
        assert in_order(form) is None


def test_words_that_python_3_has_written_as_bytes(tmp_path):
    (tmp_path / "w.txt").write_text("b'<S>' 3\nb'</S>' 3\nb\"man's\" 2\n' 2\nb'caf\\xc3\\xa9' 1\n")
    assert counted(tmp_path / "w.txt") == ("<S>", "</S>", "man's", "'", "café", "<UNK>")
    (tmp_path / "w.txt").write_text("nothing of the kind\n")
    assert counted(tmp_path / "w.txt") is None


@pytest.mark.parametrize("older", [False, True])
def test_tensorflow_s_variables(tmp_path, older):
    """Many variables: several blocks, keys that share beginnings."""
    from tensorflow_files import bundle, single

    generator = np.random.default_rng(0)
    variables = {
        f"InceptionV3/Mixed_{i // 9}/Branch_{i % 9}/weights": generator.normal(size=(3, i + 1)).astype(np.float32)
        for i in range(120)
    }
    variables["scalar"] = np.float32(2.5)
    (single if older else bundle)(tmp_path / "m", variables)
    path = tmp_path / ("m" if older else "m.index")
    assert tensorflow.is_table(path)
    found = tensorflow.open_checkpoint(path)
    assert set(found.shapes) == set(variables)
    assert all(np.array_equal(found.read(name).numpy(), value) for name, value in variables.items())
