"""Other tools' methods: one interface, the captioner left alone, and the numbers that the tools themselves give."""

from __future__ import annotations

import operator
import sys

import numpy as np
import pytest
import torch
from torch import nn

import captionfix
from captionfix.errors import PolicyError
from captionfix.evaluate import methods
from captionfix.evaluate.methods import gradients, perturbations, relevance
from captionfix.evaluate.methods.autograd import differentiable, feature_gradients, pixel_gradients
from captionfix.word_to_map import Caption

CAPTION = "a red dog runs"
QUICK = {
    "rise": "rise:masks=24",
    "smoothgrad": "smoothgrad:samples=3",
    "integrated-gradients": "integrated-gradients:steps=4",
    "smoothgrad-shipped": "smoothgrad-shipped:samples=3",
    "integrated-gradients-shipped": "integrated-gradients-shipped:steps=4",
    "occlusion": "occlusion:window=0.25:stride=0.25",
    "occlusion-shipped": "occlusion-shipped:window=0.25:stride=0.25",
}


@pytest.fixture
def inputs(captioner, picture):
    """Captioner, pixels, features, caption: what every method takes."""
    ids = captioner.tokenize(CAPTION)
    pixels = captioner.prepare(picture).pixels[None]
    with torch.inference_mode():
        features = captioner.encode(pixels)
    return captioner, pixels, features, Caption(captioner.vocabulary.start, ids)


def state(captioner) -> tuple[dict[str, torch.Tensor], list[object]]:
    model = captioner.model
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    rest = [(m.training, *(len(getattr(m, h)) for h in hooks)) for m in model.modules()]
    rest += [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return {name: value.clone() for name, value in model.state_dict().items()}, rest


@pytest.mark.parametrize("name", [*methods.FIXATIONS, *methods.METHODS])
def test_every_method_gives_an_explanation_and_leaves_the_captioner_alone(captioner, picture, name, tmp_path):
    if name.startswith("attention") and captioner.name == "show-tell":
        with pytest.raises(PolicyError, match="no attention"):
            captionfix.explain(captioner, picture, caption=CAPTION, method=name)
        return
    before, rest = state(captioner)
    result = captionfix.explain(captioner, picture, caption=CAPTION, method=QUICK.get(name, name))
    after, rest_after = state(captioner)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert rest == rest_after
    maps = result.maps(specific=False)
    assert maps.shape == (4, 32, 32)
    assert (maps >= 0).all()
    np.testing.assert_allclose(maps.sum((1, 2)), 1, atol=1e-4)
    grid = tuple(captioner.encode(captioner.prepare(picture).pixels[None]).shape[2:])
    assert all(word.feature_map.shape == grid for word in result)
    assert all(word.feature_map.sum() == pytest.approx(1, abs=1e-4) for word in result)
    if name in methods.METHODS:
        assert all(np.isnan(word.image_share) and word.language == () for word in result)
        result.save(tmp_path / "saved")
        np.testing.assert_array_equal(captionfix.read(tmp_path / "saved").maps(False), maps)


@pytest.mark.parametrize("name", ["default", *(name for name in methods.METHODS if not name.endswith("-shipped"))])
def test_every_method_works_where_gradients_are_off(captioner, picture, name):
    if name.startswith("attention") and captioner.name == "show-tell":
        pytest.skip("no attention")
    plain = captionfix.explain(captioner, picture, caption=CAPTION, method=QUICK.get(name, name))
    with torch.inference_mode():
        result = captionfix.explain(captioner, picture, caption=CAPTION, method=QUICK.get(name, name))
    np.testing.assert_allclose(result.maps(specific=False), plain.maps(specific=False), atol=1e-5)


def test_score_gradients_are_those_of_the_log_probability(inputs):
    captioner, pixels, features, caption = inputs
    with differentiable(captioner):
        found = feature_gradients(captioner, features, caption)[:, 0]
        at_pixels = pixel_gradients(captioner, pixels, caption)[:, 0]
        for k, word in enumerate(caption.ids):  # one word at a time, straight through everything
            image = pixels.clone().requires_grad_()
            middle = captioner.encode(image)
            prefix = torch.tensor([[caption.start, *caption.ids[:k]]])
            score = captioner.decode(middle, prefix).log_softmax(-1)[0, -1, word]
            expected = torch.autograd.grad(score, [middle, image])
            torch.testing.assert_close(found[k], expected[0][0], rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(at_pixels[k], expected[1][0], rtol=1e-3, atol=1e-6)


def scaled(maps: torch.Tensor) -> torch.Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low)


@pytest.mark.parametrize("name", ["gradcam", "hirescam", "layercam"])
def test_cams_are_grad_cams(inputs, name):
    pytest.importorskip("pytorch_grad_cam")
    ours, shipped = (methods.resolve(f"{name}{end}")[0](*inputs) for end in ("", "-shipped"))
    # the library scales the small map and then the large one, the best form not at all
    torch.testing.assert_close(scaled(ours), scaled(shipped), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["input-x-gradient", "integrated-gradients", "occlusion"])
def test_attributions_are_captums(inputs, name):
    pytest.importorskip("captum")
    options = {"integrated-gradients": ":steps=4", "occlusion": ":window=0.2:stride=0.15"}.get(name, "")
    ours, shipped = (methods.resolve(f"{name}{end}{options}")[0](*inputs) for end in ("", "-shipped"))
    assert ours.max() > 0
    torch.testing.assert_close(ours, shipped, atol=1e-5, rtol=1e-3)


def test_guided_backprop_is_captums_where_every_relu_is_a_module(inputs):
    captum = pytest.importorskip("captum.attr")
    captioner, pixels, *_ = inputs
    network = captioner.model.encoder  # a ResNet whose ReLUs are modules
    library = captum.GuidedBackprop(network)
    with pytest.warns(UserWarning, match="hooks"), differentiable(captioner):
        expected = library.attribute(pixels.clone().requires_grad_(), target=(3, 1, 2))
    with differentiable(captioner), gradients.Replaced(gradients.GUIDED):
        image = pixels.clone().requires_grad_()
        (found,) = torch.autograd.grad(network(image)[0, 3, 1, 2], image)
    torch.testing.assert_close(found, expected)
    with differentiable(captioner):
        image = pixels.clone().requires_grad_()
        (plain,) = torch.autograd.grad(network(image)[0, 3, 1, 2], image)
    assert not torch.allclose(found, plain)


@pytest.mark.parametrize(
    "form",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.ReLU6(),
        nn.ReLU6(inplace=True),
        torch.relu,
        lambda x: x.relu(),
        lambda x: x.relu_(),
        nn.functional.relu6,
        lambda x: nn.functional.relu(x, True),
    ],
)
def test_every_form_of_relu_is_guided(form):
    x = torch.tensor([-1.0, 1.0, 2.0, 3.0], requires_grad=True)
    with gradients.Replaced(gradients.GUIDED):
        y = form(x * 1)
    torch.testing.assert_close(y.detach(), torch.tensor([0.0, 1.0, 2.0, 3.0]))
    (gradient,) = torch.autograd.grad(y, x, torch.tensor([5.0, -7.0, 2.0, -1.0]))
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, 2.0, 0.0]))


def test_relevance_is_zennits_where_it_knows_the_network():
    """torchvision's ResNet, for which zennit itself turns residual sums into modules and finds the batch norms."""
    pytest.importorskip("zennit")
    from torchvision.models.resnet import BasicBlock, ResNet
    from zennit.composites import EpsilonPlus
    from zennit.torchvision import ResNetCanonizer

    torch.manual_seed(0)
    resnet = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3, width_per_group=64).eval()
    layers = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2")

    class Cnn:
        model, name = resnet, "resnet"

        def encode(self, pixels):
            for layer in layers:
                pixels = getattr(resnet, layer)(pixels)
            return pixels

    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.weight.data.uniform_(0.5, 1.5)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        top = Cnn().encode(pixels)
    given = torch.rand(1, *top.shape[1:]) * top
    found = relevance.through_cnn(Cnn(), pixels, given)
    with EpsilonPlus(epsilon=1e-6, canonizers=[ResNetCanonizer()]).context(resnet):
        image = pixels.clone().requires_grad_()
        (expected,) = torch.autograd.grad(Cnn().encode(image), image, given)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(Cnn().encode(pixels), top, rtol=0, atol=0)


def test_smoothgrad_without_noise_is_the_gradient(inputs):
    captioner, pixels, _, caption = inputs
    with differentiable(captioner):
        expected = pixel_gradients(captioner, pixels, caption)[:, 0].abs().sum(1)
    torch.testing.assert_close(gradients.smoothgrad(*inputs, noise=0.0, samples=3), expected)
    assert not torch.allclose(gradients.smoothgrad(*inputs, samples=3), expected, rtol=1e-2)


def test_occlusion_is_the_mean_drop_under_the_squares_that_cover_a_pixel(inputs):
    captioner, pixels, _, caption = inputs
    found = perturbations.occlusion(*inputs, window=0.5, stride=0.25)
    tokens = caption.inputs(pixels.device)
    total, covered = torch.zeros(4, 32, 32), torch.zeros(32, 32)
    with torch.no_grad():
        whole = caption.scores(captioner.logits(pixels, tokens))[0]
        for y in (0, 8, 16):
            for x in (0, 8, 16):
                hidden = pixels.clone()
                hidden[..., y : y + 16, x : x + 16] = 0
                drop = whole - caption.scores(captioner.logits(hidden, tokens))[0]
                total[:, y : y + 16, x : x + 16] += drop[:, None, None]
                covered[y : y + 16, x : x + 16] += 1
    torch.testing.assert_close(found, (total / covered).clamp_min(0), atol=1e-5, rtol=1e-4)


def test_windows_reach_the_far_edges():
    places = list(perturbations.windows(10, 7, 0.3, 0.2))
    covered = np.zeros((10, 7), dtype=int)
    for rows, columns in places:
        covered[rows, columns] += 1
    assert covered.min() >= 1
    assert len(set(map(str, places))) == len(places)


def test_rise_finds_the_pixels_that_matter():
    """A model whose word is the likelier the brighter one corner is: known without any other implementation."""

    class Corner:
        name = "corner"

        def encode(self, pixels):
            return pixels

        def decode(self, features, tokens):
            on = features[:, 0, :8, :8].mean((1, 2))
            return torch.stack([on * 4, torch.zeros_like(on)], 1)[:, None]

    pixels = torch.ones(1, 1, 32, 32)
    found = perturbations.rise(Corner(), pixels, pixels, Caption(0, (0,)), masks=400, cells=4)[0]
    assert found[:8, :8].mean() > 5 * found[12:, 12:].mean()


def test_region_feeding_feeds_one_cell_as_the_whole_image(inputs):
    captioner, pixels, features, caption = inputs
    found = perturbations.region_feeding(*inputs)
    worth = torch.zeros(4, *features.shape[2:])
    with torch.no_grad():
        for y in range(features.shape[2]):
            for x in range(features.shape[3]):
                alone = features[:, :, y : y + 1, x : x + 1].expand_as(features)
                worth[:, y, x] = caption.scores(captioner.decode(alone, caption.inputs(pixels.device)))[0]
    worth = scaled(worth)
    small = (worth - worth.mean((1, 2), keepdim=True)).clamp_min(0)
    cell = 32 // features.shape[2]
    for y, x in ((0, 0), (1, 2)):  # at a cell's centre the upsampled map is near the cell's own worth
        at = found[:, y * cell : (y + 1) * cell, x * cell : (x + 1) * cell].amax((1, 2))
        assert (at + 1e-6 >= small[:, y, x] * 0.7).all()
    assert found.amax((1, 2)).le(small.amax((1, 2)) + 1e-6).all()


@pytest.mark.parametrize("name", ["rise:masks=24", "smoothgrad:samples=3", "random"])
def test_chance_is_of_a_seed(inputs, name):
    one, again, other = (methods.resolve(f"{name}:seed={seed}")[0](*inputs) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("magic", "no method is named 'magic'.*gradcam.*centre"),
        ("rise:masks", "options are: masks=1000"),
        ("gradcam:steps=3", "its options are: none"),
        ("rise:masks=many", "'many' is no int"),
        ("rise:masks=0", "from 1 up"),
    ],
)
def test_bad_names_are_told(captioner, picture, name, says):
    with pytest.raises(PolicyError, match=says):
        captionfix.explain(captioner, picture, caption=CAPTION, method=name)


def test_a_policy_does_not_go_with_another_tools_method(captioner, picture):
    with pytest.raises(PolicyError, match="follows no policy"):
        captionfix.explain(captioner, picture, caption=CAPTION, method="gradcam", policy="paper")


def test_paper_is_the_flow_with_the_papers_policy(captioner, picture):
    by_method = captionfix.explain(captioner, picture, caption=CAPTION, method="paper")
    by_policy = captionfix.explain(captioner, picture, caption=CAPTION, method="flow", policy="paper")
    assert (by_method.method, by_method.policy) == (by_policy.method, by_policy.policy)
    np.testing.assert_array_equal(by_method.maps(False), by_policy.maps(False))


def test_a_missing_package_is_named(captioner, picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "zennit.composites", None)  # importing it raises ImportError
    with pytest.raises(PolicyError, match=r"needs zennit: pip install \"captionfix\[compare\]\""):
        captionfix.explain(captioner, picture, caption=CAPTION, method="lrp")


def test_a_captioner_without_gradients_is_told(captioner, picture, monkeypatch):
    decode = captioner.decode

    def without(features, tokens):
        with torch.no_grad():
            return decode(features, tokens)

    monkeypatch.setattr(captioner, "decode", without)
    with pytest.raises(PolicyError, match="can't be differentiated"):
        captionfix.explain(captioner, picture, caption=CAPTION, method="gradcam")
    assert captionfix.explain(captioner, picture, caption=CAPTION, method="occlusion:window=0.5:stride=0.5").words


@pytest.mark.parametrize("form", [lambda a, b: a + b, torch.add, lambda a, b: a.add_(b), operator.iadd])
def test_every_form_of_sum_shares_relevance(form):
    a = torch.tensor([1.0, 3.0, -1.0], requires_grad=True)
    b = torch.tensor([3.0, 0.0, 2.0], requires_grad=True)
    with gradients.Replaced(relevance.SHARED):
        total = form(a * 1, b * 1)
    torch.testing.assert_close(total.detach(), torch.tensor([4.0, 3.0, 1.0]))
    given = torch.tensor([8.0, 5.0, 1.0])
    at_a, at_b = torch.autograd.grad(total, [a, b], given)
    torch.testing.assert_close(at_a, torch.tensor([2.0, 5.0, -1.0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(at_a + at_b, given, rtol=1e-4, atol=1e-4)
