"""Plain classifiers, explained: what comes out, for which inputs, and that the module stays as it was."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import captionfix
from captionfix import explain_classes
from captionfix.captioners.preprocess import Preprocess
from captionfix.classify import _choose
from captionfix.errors import CaptionerError, CaptionError, ImageError, PolicyError, UnsupportedOperation
from captionfix.stacks import rendered

PLAIN = Preprocess(resize=(32, 48), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
COLOURS = ("red", "green", "blue, azure")


class Colours(nn.Module):
    """Which colour there is most of: each class's logit is the mean of one colour minus the two others."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_((2 * torch.eye(3) - 1)[:, :, None, None])
            self.conv.bias.fill_(-0.1)
            self.head.weight.copy_(10 * torch.eye(3))

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def squares(size=(96, 64), red=(10, 20, 30, 40), green=(60, 30, 80, 50)) -> Image.Image:
    """A grey picture with a red and a green rectangle (x0, y0, x1, y1)."""
    values = np.full((size[1], size[0], 3), 128, np.uint8)
    for (x0, y0, x1, y1), colour in ((red, (255, 0, 0)), (green, (0, 255, 0))):
        values[y0:y1, x0:x1] = colour
    return Image.fromarray(values)


def inside(word, box) -> float:
    x, y, mass = word.fixations.T
    return float(mass[(x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])].sum())


def net(channels: int = 3, classes: int = 5) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    )


@pytest.mark.parametrize("policy", ["default", "paper", "released", "marginal"])
def test_each_class_finds_its_own_place_in_original_pixels(policy):
    result = explain_classes(Colours(), squares(), ["red", 1], preprocess=PLAIN, labels=COLOURS, policy=policy)
    assert [(word.text, word.token) for word in result] == [("red", 0), ("green", 1)]
    assert inside(result["red"], (10, 20, 30, 40)) == pytest.approx(1, abs=1e-5)
    assert inside(result["green"], (60, 30, 80, 50)) == pytest.approx(1, abs=1e-5)
    if policy == "marginal":  # the others keep few of a mean's many summands
        np.testing.assert_allclose(result["green"].box(share=1.0), (60, 30, 80, 50), atol=2)
    x, y = result["red"].point()
    assert 10 < x < 30
    assert 20 < y < 40
    assert result["red"].image_share == pytest.approx(1, abs=1e-5)
    assert result["red"].feature_map.shape == (32, 48)
    assert result.caption == "red, green"
    assert result.captioner == "Colours"


def test_the_likeliest_classes_with_their_probabilities():
    model, picture = net().eval(), squares()
    result = explain_classes(model, picture, top=2, preprocess=PLAIN)
    expected = model(PLAIN(picture).pixels[None])[0].softmax(0).topk(5)
    assert [word.token for word in result] == expected.indices[:2].tolist()
    assert [word.probability for word in result] == pytest.approx(expected.values[:2].tolist(), rel=1e-5)
    assert [p for _, p in result[0].alternatives] == pytest.approx(expected.values.tolist(), rel=1e-5)
    assert result[0].text == f"class {expected.indices[0]}"
    assert all(word.image_share + word.other == pytest.approx(1, abs=1e-4) for word in result)
    assert result[0].feature_map.sum() == pytest.approx(1, abs=1e-4)


def test_the_default_preprocessing_is_torchvisions():
    from torchvision.models import ResNet18_Weights

    model, picture = net(), squares((310, 250))
    transform = ResNet18_Weights.DEFAULT.transforms()
    result, pixels = explain_classes(model, picture), transform(picture)[None]
    expected = model.eval()(pixels)[0].softmax(0).max().detach()
    assert result[0].probability == pytest.approx(expected.item(), rel=1e-4)
    assert result.grid == (224, 224)
    scale = 250 / 256
    left = round((int(256 * 310 / 250) - 224) / 2)
    assert result.window == pytest.approx((left * 310 / 317, 16 * scale, (left + 224) * 310 / 317, 240 * scale))
    x, y, _ = result[0].fixations.T
    assert x.min() > result.window[0]
    assert y.max() < result.window[3]
    given = explain_classes(model, picture, preprocess=transform)
    assert given.window == result.window
    np.testing.assert_array_equal(given[0].fixations, result[0].fixations)


def test_a_transform_of_ones_own_finds_its_window():
    from torchvision import transforms

    cut = transforms.Compose([transforms.Resize((40, 80)), transforms.CenterCrop((20, 40)), transforms.ToTensor()])
    picture = squares((160, 80), red=(60, 30, 80, 50), green=(0, 0, 5, 5))
    result = explain_classes(Colours(), picture, "red", preprocess=cut, labels=COLOURS)
    assert result.window == pytest.approx((40, 20, 120, 60), abs=1.0)
    assert inside(result["red"], (59, 29, 81, 51)) > 0.99
    given = explain_classes(Colours(), picture, "red", preprocess=cut, labels=COLOURS, window=(40, 20, 120, 60))
    assert inside(given["red"], (60, 30, 80, 50)) == pytest.approx(1, abs=1e-5)


def state(model: nn.Module) -> tuple:
    return (
        [(name, module.training, len(module._forward_hooks)) for name, module in model.named_modules()],
        {name: value.clone() for name, value in model.state_dict().items()},
        [(p.requires_grad, p.grad) for p in model.parameters()],
        sorted(vars(model)),
    )


def same(before: tuple, after: tuple) -> bool:
    return (
        before[0] == after[0]
        and before[2:] == after[2:]
        and all(torch.equal(value, after[1][name]) for name, value in before[1].items())
    )


class Failing(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.body, self.what = net(), what

    def forward(self, x):
        return self.what(self.body(x))


def boom(x):
    raise ValueError("no")


@pytest.mark.parametrize(
    ("what", "error"),
    [
        (lambda x: x, None),
        (boom, ValueError),
        (lambda x: x @ x, CaptionerError),  # shapes do not fit
        (lambda x: x[0], CaptionerError),
        (lambda x: x / 0, CaptionerError),
        (lambda x: x.prod(1, keepdim=True).expand(-1, 3), UnsupportedOperation),
    ],
)
def test_the_module_stays_as_it_was(what, error):
    model = Failing(what).train()
    model.body[4].eval()  # a mix, on purpose
    model.body[0].register_forward_hook(lambda *args: None)
    before, numbers = state(model), torch.get_rng_state()
    if error is None:
        for crops in (1, 10):
            explain_classes(model, squares(), crops=crops, preprocess=Preprocess(resize=40, crop=32))
    else:
        with pytest.raises(error):
            explain_classes(model, squares(), preprocess=PLAIN)
    assert same(before, state(model))
    assert torch.equal(numbers, torch.get_rng_state())


def test_the_fallback_may_be_asked_for():
    model = Failing(lambda x: x.prod(1, keepdim=True).expand(-1, 3))
    policy = {"fallback": "gradient", "opposed": "input"}
    result = explain_classes(model, squares(), preprocess=PLAIN, policy=policy)
    assert result[0].image_share + result[0].other == pytest.approx(1, abs=1e-4)


def test_classes_by_name_and_id():
    model, picture = Colours(), squares()

    def explained(classes, labels=COLOURS):
        return [w.token for w in explain_classes(model, picture, classes, preprocess=PLAIN, labels=labels)]

    assert explained("azure") == [2]
    assert explained(["Green", 0]) == [1, 0]
    assert explained("other", {2: "other"}) == [2]
    for wrong, text in (
        ("gren", "perhaps green"),
        (3, "ids go from 0 to 2"),
        ([], "empty"),
        (["red", 0], "twice"),
    ):
        with pytest.raises(CaptionError, match=text):
            explained(wrong)
    with pytest.raises(CaptionError, match="give one of the ids 0, 2"):
        explained("red", ["red", "green", "red"])
    with pytest.raises(CaptionError, match="2 labels for 3 classes"):
        explained("red", ["red", "green"])


def test_names_come_from_imagenet_or_from_the_configuration():
    result = explain_classes(net(classes=1000), squares(), ["tabby", 134], preprocess=PLAIN)
    assert [word.token for word in result] == [281, 134]
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", id2label={0: "cat", 1: "dog"}
    )
    result = explain_classes(ResNetForImageClassification(config), squares(), preprocess=PLAIN)
    assert result[0].text in ("cat", "dog")


def test_what_networks_may_return():
    model, picture = net(), squares()
    plain = explain_classes(model, picture, 2, preprocess=PLAIN)[0]
    for what in (
        lambda x: (x, None),
        lambda x: {"logits": x},
        lambda x: SimpleNamespace(logits=x),
        lambda x: x[:, :, None, None],
        lambda x: x.softmax(1),
        lambda x: x.log_softmax(1),
    ):
        word = explain_classes(Failing(what), picture, 2, preprocess=PLAIN)[0]
        assert word.probability == pytest.approx(plain.probability, rel=1e-5)
        np.testing.assert_allclose(word.fixations, plain.fixations, rtol=1e-4, atol=1e-6)


def test_results_save_read_and_draw_like_those_of_captions(tmp_path):
    result = explain_classes(Colours(), squares(), ["red", "green"], preprocess=PLAIN, labels=COLOURS)
    result.save(tmp_path / "saved")
    again = captionfix.read(tmp_path / "saved")
    np.testing.assert_array_equal(again["red"].heatmap(), result["red"].heatmap())
    assert "green" in str(again)
    result.figure(boxes=True).savefig(tmp_path / "figure.png")
    drawn = np.asarray(result["red"].overlay(), dtype=int)
    changed = np.abs(drawn - np.asarray(squares(), dtype=int)).sum(2)
    assert changed[25:35, 15:25].mean() > 2 * changed[:, 85:].mean()


# ten crops -----------------------------------------------------------------------------------------------------------


def test_ten_crops_take_those_that_agree():
    cropped = Preprocess(resize=32, crop=24, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    # red in the upper left corner alone: the crops that hold it say red
    picture = squares((96, 64), red=(0, 0, 14, 14), green=(85, 54, 96, 64))
    model = Colours()
    whole = torch.from_numpy(np.array(picture.resize((48, 32), Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
    places = [(0, 0), (0, 24), (8, 0), (8, 24), (4, 12)]
    views = torch.stack([whole[:, y : y + 24, x : x + 24] for y, x in places])
    chances = model(torch.cat([views, views.flip(3)])).softmax(1)
    expected = int(chances.mean(0).argmax())
    agreeing = [i for i in range(5) if int(chances[i].argmax()) == expected]
    assert 0 < len(agreeing) < 5
    result = explain_classes(model, picture, preprocess=cropped, labels=COLOURS, crops=10, policy="paper")
    assert result[0].token == expected
    assert result[0].probability == pytest.approx(float(chances[:, expected].mean()), rel=1e-5)
    found = []
    for i in agreeing:
        y, x = places[i]
        here = Preprocess(resize=None, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        part = Image.fromarray((views[i].permute(1, 2, 0) * 255).round().byte().numpy())
        single = explain_classes(model, part, [expected], preprocess=here, policy="paper")
        found += [((px + x) * 2, (py + y) * 2) for px, py, _ in single[0].fixations.tolist()]
    mine = [tuple(row[:2]) for row in result[0].fixations.tolist()]
    assert sorted(mine) == sorted(found)
    assert len(set(result[0].fixations[:, 2].tolist())) == 1  # a set: all weigh the same
    assert result.grid == (48, 32)
    assert result.window == (0, 0, 96, 64)


def test_ten_crops_where_no_upright_one_agrees():
    """The mean may favour a class that none of the five upright crops ranks first: the centre's counts."""
    chances = torch.full((10, 3), 0.1)
    chances[:5, 0], chances[:5, 1] = 0.5, 0.4
    chances[5:, 1] = 0.8
    assert _choose(chances, None, 1) == ([0], [[0, 1, 2, 3, 4]])
    assert _choose(chances, None, 2) == ([0, 1], [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]])
    assert _choose(chances, [2], 1) == ([2], [[0, 1, 2, 3, 4]])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"crops": 5}, "choose 1"),
        ({"crops": 10, "preprocess": PLAIN}, "crops=10 needs"),
        ({"crops": 10, "preprocess": Preprocess(resize=20, crop=30)}, "smaller than"),
        ({"policy": "papers"}, "no policy"),
    ],
)
def test_settings_that_do_not_exist(options, text):
    with pytest.raises(PolicyError, match=text):
        explain_classes(net(), squares(), **options)


# other data ----------------------------------------------------------------------------------------------------------


def test_a_sketch_of_one_channel():
    sketch = np.zeros((30, 40), np.float32)
    sketch[8:22, 10] = 1  # one stroke
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    for image in (sketch, sketch[..., None], torch.from_numpy(sketch)[None], torch.from_numpy(sketch)[None, None]):
        result = explain_classes(model, image, 0, policy="marginal")
        x, y, _ = result[0].fixations.T
        assert set(np.floor(x)) == {10}
        assert set(np.floor(y)) == set(range(8, 22))
        assert result.image.size == (40, 30)
        assert result.window == (0, 0, 40, 30)
    drawn = np.asarray(result.image)
    assert drawn[10, 10].tolist() == [255, 255, 255]
    assert drawn[0, 0].tolist() == [0, 0, 0]


def test_a_picture_for_a_network_of_one_channel_needs_its_preprocessing():
    from torchvision import transforms

    model = net(channels=1)
    with pytest.raises(ImageError, match="give preprocess"):
        explain_classes(model, squares())
    grey = transforms.Compose([transforms.Grayscale(), transforms.Resize((32, 48)), transforms.ToTensor()])
    result = explain_classes(model, squares(), preprocess=grey)
    assert result.grid == (48, 32)
    assert result.window == pytest.approx((0, 0, 96, 64), abs=0.5)


@pytest.mark.parametrize("channels", [2, 4, 20])
def test_stacked_optical_flow(channels):
    """Something moves in one corner: there is the evidence, and the picture under it shows how much moves."""
    flow = np.zeros((40, 50, channels), np.float32)
    flow[5:15, 30:45] = np.linspace(-3, 3, channels) + 0.5
    model = nn.Sequential(
        nn.Conv2d(channels, 3, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    torch.manual_seed(0)
    with torch.no_grad():
        model[0].weight.normal_()
    result = explain_classes(model, flow)
    x, y, _ = result[0].fixations.T
    assert result[0].image_share == pytest.approx(1, abs=1e-4)
    assert x.min() >= 30
    assert x.max() <= 45
    assert y.min() >= 5
    assert y.max() <= 15
    drawn = np.asarray(result.image).astype(int)
    assert drawn[10, 40, 0] > 200
    assert drawn[30, 10].tolist() == [0, 0, 0]
    assert result[0].overlay().size == (50, 40)
    frame = Image.new("RGB", (100, 80), "white")
    over = explain_classes(model, torch.from_numpy(flow).permute(2, 0, 1), picture=frame)
    np.testing.assert_allclose(over[0].fixations[:, :2], result[0].fixations[:, :2] * 2, rtol=1e-6)
    assert over.window == (0, 0, 100, 80)


def test_a_stack_may_be_preprocessed():
    flow = np.zeros((40, 50, 4), np.uint8)
    flow[5:15, 30:45] = 200
    model = nn.Sequential(nn.Conv2d(6, 3, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def six(stack):
        values = torch.from_numpy(stack).permute(2, 0, 1).float() / 255
        return torch.cat([values, values[:2]])[:, ::2, ::2]

    result = explain_classes(
        model, np.concatenate([flow, flow], 2)[..., :5].astype(np.float32), preprocess=lambda s: six(s[..., :4])
    )
    assert result.grid == (25, 20)
    assert result.window == (0, 0, 50, 40)
    assert result[0].fixations[:, 0].min() >= 30


def test_an_input_that_is_normalised_already_is_used_as_it_is():
    model = net().eval()
    pixels = torch.randn(3, 31, 37)
    result = explain_classes(model, pixels)
    assert result[0].probability == pytest.approx(float(model(pixels[None]).softmax(1).max()), rel=1e-5)
    assert result.grid == (37, 31)
    low, high = pixels.min(), pixels.max()
    expected = ((pixels - low) / (high - low) * 255 + 0.5).byte().permute(1, 2, 0).numpy()
    np.testing.assert_allclose(np.asarray(result.image).astype(int), expected.astype(int), atol=1)


@pytest.mark.parametrize(
    ("image", "channels", "text"),
    [
        (np.zeros((10, 12, 5), np.float32), 3, "5 channels and the network takes 3"),
        (np.zeros((10, 12, 2), np.uint8), 2, "floating point"),
        (np.full((10, 12, 2), np.nan, np.float32), 2, "not finite"),
        (torch.zeros(2, 3, 4, 5, 6), 3, "is no input"),
        (torch.zeros(2, 0, 5), 2, "is no input"),
        ("missing.png", 3, "there is no such file"),
    ],
)
def test_inputs_that_do_not_fit(image, channels, text):
    with pytest.raises(ImageError, match=text):
        explain_classes(net(channels), image)
    with pytest.raises(PolicyError, match="cuts up a picture"):
        explain_classes(net(2), np.zeros((10, 12, 2), np.float32), crops=10)
    with pytest.raises(CaptionerError, match=r"torch\.nn\.Module"):
        explain_classes("resnet18", squares())


def test_a_constant_input_can_be_drawn():
    for channels in (1, 2, 3):
        assert np.asarray(rendered(torch.ones(channels, 4, 5))).max() == 0
