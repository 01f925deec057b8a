"""Show and Tell of tensorflow/models, ``research/im2txt``, out of a TensorFlow checkpoint.

Inception v3 as TF-Slim has it, whose tensors all fit torchvision's; a linear layer without bias; a BasicLSTMCell that
reads the image once from a zero state (what it says there is not used); a linear layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captionfix.captioners.module import ModuleCaptioner
from captionfix.captioners.published.cnn import inception
from captionfix.captioners.published.decoders import FirstToken
from captionfix.captioners.published.finish import finished
from captionfix.captioners.published.images import TensorFlow1
from captionfix.captioners.published.parts import Words
from captionfix.captioners.published.tensorflow import Variables
from captionfix.captioners.published.weights import filled, same
from captionfix.captioners.published.words import vocabulary
from captionfix.errors import CaptionerError

# TF-Slim's names of each block's convolutions, branch by branch, and torchvision's.
_A = {
    "Branch_0/Conv2d_0a_1x1": "branch1x1",
    "Branch_1/Conv2d_0a_1x1": "branch5x5_1",
    "Branch_1/Conv2d_0b_5x5": "branch5x5_2",
    "Branch_2/Conv2d_0a_1x1": "branch3x3dbl_1",
    "Branch_2/Conv2d_0b_3x3": "branch3x3dbl_2",
    "Branch_2/Conv2d_0c_3x3": "branch3x3dbl_3",
    "Branch_3/Conv2d_0b_1x1": "branch_pool",
}
_OTHER_NAMES = {"Branch_1/Conv2d_0a_1x1": "Branch_1/Conv2d_0b_1x1", "Branch_1/Conv2d_0b_5x5": "Branch_1/Conv_1_0c_5x5"}
_B = {
    "Branch_0/Conv2d_1a_1x1": "branch3x3",
    "Branch_1/Conv2d_0a_1x1": "branch3x3dbl_1",
    "Branch_1/Conv2d_0b_3x3": "branch3x3dbl_2",
    "Branch_1/Conv2d_1a_1x1": "branch3x3dbl_3",
}
_C = {
    "Branch_0/Conv2d_0a_1x1": "branch1x1",
    "Branch_1/Conv2d_0a_1x1": "branch7x7_1",
    "Branch_1/Conv2d_0b_1x7": "branch7x7_2",
    "Branch_1/Conv2d_0c_7x1": "branch7x7_3",
    "Branch_2/Conv2d_0a_1x1": "branch7x7dbl_1",
    "Branch_2/Conv2d_0b_7x1": "branch7x7dbl_2",
    "Branch_2/Conv2d_0c_1x7": "branch7x7dbl_3",
    "Branch_2/Conv2d_0d_7x1": "branch7x7dbl_4",
    "Branch_2/Conv2d_0e_1x7": "branch7x7dbl_5",
    "Branch_3/Conv2d_0b_1x1": "branch_pool",
}
_D = {
    "Branch_0/Conv2d_0a_1x1": "branch3x3_1",
    "Branch_0/Conv2d_1a_3x3": "branch3x3_2",
    "Branch_1/Conv2d_0a_1x1": "branch7x7x3_1",
    "Branch_1/Conv2d_0b_1x7": "branch7x7x3_2",
    "Branch_1/Conv2d_0c_7x1": "branch7x7x3_3",
    "Branch_1/Conv2d_1a_3x3": "branch7x7x3_4",
}
_E = {
    "Branch_0/Conv2d_0a_1x1": "branch1x1",
    "Branch_1/Conv2d_0a_1x1": "branch3x3_1",
    "Branch_1/Conv2d_0b_1x3": "branch3x3_2a",
    "Branch_1/Conv2d_0b_3x1": "branch3x3_2b",
    "Branch_2/Conv2d_0a_1x1": "branch3x3dbl_1",
    "Branch_2/Conv2d_0b_3x3": "branch3x3dbl_2",
    "Branch_2/Conv2d_0c_1x3": "branch3x3dbl_3a",
    "Branch_2/Conv2d_0d_3x1": "branch3x3dbl_3b",
    "Branch_3/Conv2d_0b_1x1": "branch_pool",
}
_BLOCKS = {
    "Mixed_5b": _A,
    "Mixed_5c": {_OTHER_NAMES.get(theirs, theirs): ours for theirs, ours in _A.items()},
    "Mixed_5d": _A,
    "Mixed_6a": _B,
    **{f"Mixed_6{letter}": _C for letter in "bcde"},
    "Mixed_7a": _D,
    "Mixed_7b": _E,
    "Mixed_7c": {theirs.replace("Branch_1/Conv2d_0b_3x1", "Branch_1/Conv2d_0c_3x1"): o for theirs, o in _E.items()},
}
CONVOLUTIONS = {
    **{n: n for n in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")},
    **{f"{block}/{theirs}": f"{block}.{ours}" for block, names in _BLOCKS.items() for theirs, ours in names.items()},
}
# What TensorFlow called the cell's variables before 1.0, before 1.2, and since.
_CELLS = ("BasicLSTMCell/Linear/Matrix", "basic_lstm_cell/weights", "basic_lstm_cell/kernel")
_BIASES = ("BasicLSTMCell/Linear/Bias", "basic_lstm_cell/biases", "basic_lstm_cell/bias")
_FORGET = 1.0  # BasicLSTMCell adds it; it is not in the file


def im2txt(variables: Variables, words: Words) -> ModuleCaptioner:
    """Show and Tell; its embedding has more rows (12000) than there are words (11520)."""
    embed = variables.read("seq_embedding/map")
    rows, width = embed.shape
    vocab = vocabulary(words.words, rows, words.path, variables.path, spare=True)
    image = variables.read("image_embedding/weights")
    weight, bias = variables.read("logits/weights"), variables.read("logits/biases")
    same(image.shape[1], width, f"{variables.path} describes an image by", "its LSTM reads")
    same(weight.shape[1], rows, f"{variables.path} scores", "it embeds")
    path = variables.path
    model = FirstToken(
        inception(_trunk(variables), path, transform_input=False, tensorflow=True),
        filled(lambda: nn.Linear(image.shape[0], width, bias=False), {"weight": image.T.contiguous()}, path),
        filled(lambda: nn.Embedding(rows, width), {"weight": embed}, path),
        _lstm(variables, width),
        filled(lambda: nn.Linear(weight.shape[0], rows), {"weight": weight.T.contiguous(), "bias": bias}, path),
    )
    return finished(model, vocab, TensorFlow1(), [path], length_power=0.0)


def _trunk(variables: Variables) -> dict[str, Tensor]:
    """Inception's tensors by torchvision's names: kernels turned from (h, w, in, out), the scale that is missing 1."""
    state: dict[str, Tensor] = {}
    for theirs, ours in CONVOLUTIONS.items():
        name = f"InceptionV3/{theirs}"
        missing = next((n for n in (f"{name}/weights", f"{name}/BatchNorm/beta") if n not in variables.shapes), None)
        if missing is not None:
            raise CaptionerError(f"{variables.path} holds no Inception v3 of TF-Slim: {missing} is missing")
        state[f"{ours}.conv.weight"] = variables.read(f"{name}/weights").permute(3, 2, 0, 1).contiguous()
        shift = state[f"{ours}.bn.bias"] = variables.read(f"{name}/BatchNorm/beta")
        gamma = f"{name}/BatchNorm/gamma"
        state[f"{ours}.bn.weight"] = variables.read(gamma) if gamma in variables.shapes else torch.ones_like(shift)
        state[f"{ours}.bn.running_mean"] = variables.read(f"{name}/BatchNorm/moving_mean")
        state[f"{ours}.bn.running_var"] = variables.read(f"{name}/BatchNorm/moving_variance")
    return state


def _lstm(variables: Variables, width: int) -> nn.LSTM:
    """TensorFlow's cell as torch's: its gates are in, candidate, forget, out; torch's in, forget, candidate, out."""
    kernel = next((name for name in _CELLS if f"lstm/{name}" in variables.shapes), None)
    offset = next((name for name in _BIASES if f"lstm/{name}" in variables.shapes), None)
    if kernel is None or offset is None:
        raise CaptionerError(f"{variables.path} has no lstm/{_CELLS[-1]} (or what that was called before)")
    both, bias = variables.read(f"lstm/{kernel}"), variables.read(f"lstm/{offset}")
    units = both.shape[1] // 4
    same(len(both), width + units, f"{variables.path}: the LSTM's kernel has rows", "inputs and units are")
    into, candidate, forget, out = both.T.split(units)
    weight = torch.cat([into, forget, candidate, out])
    into, candidate, forget, out = bias.split(units)
    state = {
        "weight_ih_l0": weight[:, :width].contiguous(),
        "weight_hh_l0": weight[:, width:].contiguous(),
        "bias_ih_l0": torch.cat([into, forget + _FORGET, candidate, out]),
        "bias_hh_l0": torch.zeros_like(bias),
    }
    return filled(lambda: nn.LSTM(width, units, batch_first=True), state, variables.path)
