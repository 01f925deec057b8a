"""The CNNs of published captioners, out of the tensors of a file: ResNets of any depth and width, Inception v3."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captionfix.captioners.published.weights import Weights, filled
from captionfix.errors import CaptionerError

NAMED = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")  # as torchvision names them
NUMBERED = ("0", "1", "4", "5", "6", "7")  # as in Sequential(*resnet.children())
_DEPTHS = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
_BASIC_DEPTHS = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34}


def blocks(weights: Weights, prefix: str, names: tuple[str, ...]) -> tuple[int, ...]:
    """How many blocks each of a ResNet's four stages has."""

    def count(stage: str) -> int:
        return next(i for i in itertools.count() if f"{prefix}{stage}.{i}.conv1.weight" not in weights.tensors)

    return tuple(count(stage) for stage in names[2:])


def depth(weights: Weights, prefix: str, names: tuple[str, ...]) -> str:
    """The ResNet's usual name, by its blocks."""
    count = blocks(weights, prefix, names)
    known = _DEPTHS if f"{prefix}{names[2]}.0.conv3.weight" in weights.tensors else _BASIC_DEPTHS
    return f"ResNet-{known[count]}" if count in known else f"ResNet with {'-'.join(map(str, count))} blocks"


def resnet(weights: Weights, prefix: str, names: tuple[str, ...], caffe: bool = False) -> nn.Sequential:
    """A ResNet up to its last feature map.

    Args:
        weights: where its tensors are.
        prefix: before their names.
        names: of the first convolution and norm and of the four stages: `NAMED` or `NUMBERED`.
        caffe: stages shrink at their first 1 x 1 convolution (not at the 3 x 3) and the max pooling is not padded, as
            in the networks converted from Caffe; the tensors are the same.

    Raises:
        CaptionerError: tensors are missing or do not fit.
    """
    from torchvision.models.resnet import BasicBlock, Bottleneck

    stem = weights.take(f"{prefix}{names[0]}.weight")
    counts = blocks(weights, prefix, names)
    if not all(counts):
        raise CaptionerError(
            f"{weights.path} holds no whole ResNet: its stages have {', '.join(map(str, counts))} blocks"
        )
    state: dict[str, Tensor] = {}
    for theirs, ours in zip(names, NAMED, strict=True):
        inner = weights.take_under(f"{prefix}{theirs}.")
        state.update({f"{ours}.{name}": tensor for name, tensor in inner.items()})

    def stage(number: int) -> nn.Sequential:
        made: list[nn.Module] = []
        for i in range(counts[number - 1]):
            name = f"layer{number}.{i}"
            first = state[f"{name}.conv1.weight"]
            deep = f"{name}.conv3.weight" in state
            last = state[f"{name}.conv3.weight" if deep else f"{name}.conv2.weight"]
            stride = 2 if number > 1 and i == 0 else 1
            shortcut = None
            if f"{name}.downsample.0.weight" in state:
                shortcut = nn.Sequential(
                    nn.Conv2d(first.shape[1], len(last), 1, stride, bias=False), nn.BatchNorm2d(len(last))
                )
            if not deep:
                made.append(BasicBlock(first.shape[1], len(last), stride, shortcut))
                continue
            planes = max(1, len(last) // 4)
            middle = state[f"{name}.conv2.weight"]
            groups = len(middle) // middle.shape[1]
            block = Bottleneck(first.shape[1], planes, stride, shortcut, groups, len(middle) * 64 // (groups * planes))
            if caffe:
                block.conv1.stride, block.conv2.stride = (stride, stride), (1, 1)
            made.append(block)
        return nn.Sequential(*made)

    def make() -> nn.Sequential:
        pool = nn.MaxPool2d(3, 2, 0, ceil_mode=True) if caffe else nn.MaxPool2d(3, 2, 1)
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(stem.shape[1], len(stem), 7, 2, 3, bias=False),
            bn1=nn.BatchNorm2d(len(stem)),
            relu=nn.ReLU(inplace=True),
            maxpool=pool,
        )
        parts.update((f"layer{n}", stage(n)) for n in range(1, 5))
        return nn.Sequential(parts)

    return filled(make, state, weights.path)


class TransformInput(nn.Module):
    """What torchvision's Inception does first with ``transform_input=True``: from ImageNet's mean and deviation to .5,
    .5. It comes on top of whatever normalisation the image already has."""

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip((0.229, 0.224, 0.225), (0.485, 0.456, 0.406), strict=True)
        return torch.cat([x[:, i : i + 1] * (s / 0.5) + (m - 0.5) / 0.5 for i, (s, m) in enumerate(pairs)], 1)


class Unpadded(nn.Module):
    """Makes a 3 x 3 average that counted its padding one over the pixels that there are, as TensorFlow's is."""

    def forward(self, x: Tensor) -> Tensor:
        return x / F.avg_pool2d(x.new_ones(1, 1, *x.shape[2:]), 3, 1, 1)


def inception(state: dict[str, Tensor], path: object, transform_input: bool, tensorflow: bool = False) -> nn.Sequential:
    """An Inception v3 up to its last feature map.

    Args:
        state: its tensors by torchvision's names; further ones are left out.
        path: where they are from.
        transform_input: torchvision's extra normalisation, see `TransformInput`.
        tensorflow: batch norm's epsilon is .001 as in torchvision, but average pooling does not count its padding.

    Raises:
        CaptionerError: tensors are missing or do not fit.
    """
    from torchvision.models import Inception3

    with torch.device("meta"):
        model = Inception3(aux_logits=False, init_weights=False)
    children = [(name, child) for name, child in model.named_children() if name not in ("avgpool", "dropout", "fc")]
    trunk = nn.Sequential(OrderedDict([("transform", TransformInput())] * transform_input + children))
    for place, module in trunk.named_modules():
        for name, expected in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            key = f"{place}.{name}"
            if name == "num_batches_tracked":
                module.register_buffer(name, torch.tensor(0))
                continue
            tensor = state.get(key)
            if tensor is None or tensor.dim() != expected.dim() or tensor.shape[2:] != expected.shape[2:]:
                found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
                raise CaptionerError(f"{path} holds no Inception v3: {key} is {found}")
            if name in ("weight", "bias"):
                setattr(module, name, nn.Parameter(tensor))
            else:
                module.register_buffer(name, tensor)
        if isinstance(module, nn.Conv2d):  # widths are the file's
            module.out_channels, module.in_channels = module.weight.shape[:2]
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features = len(module.weight)
    if tensorflow:
        for module in list(trunk.modules()):
            conv = getattr(module, "branch_pool", None)
            if isinstance(conv, nn.Module):
                setattr(module, "branch_pool", nn.Sequential(OrderedDict(unpadded=Unpadded(), conv=conv)))  # noqa: B010
    try:
        with torch.inference_mode():
            trunk.eval()(torch.zeros(1, 3, 75, 75))  # the smallest image that it takes
    except RuntimeError as error:
        raise CaptionerError(f"the convolutions in {path} do not fit together: {str(error).splitlines()[0]}") from error
    return trunk


def channels(cnn: nn.Module) -> int:
    """How many channels a ResNet's last feature map has."""
    return [module for module in cnn.modules() if isinstance(module, nn.BatchNorm2d)][-1].num_features
