"""Random captioners: a random CNN followed by a random decoder, built from the choices of whoever picks.

``pick(options)`` chooses one of a sequence: hypothesis in the tests, a seeded generator in
``benchmarks/invariants.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from captionfix.unravel import POLICIES, Policy

Pick = Callable[[Sequence[Any]], Any]

WORDS, VECTOR, HIDDEN = 7, 5, 6

# All ways of following evidence that the invariants are held to.
FOLLOWED = {
    "default": POLICIES["default"],
    "paper": POLICIES["paper"],
    "marginal": POLICIES["marginal"],
    "winner": Policy(convolutions=1, winner=True),
    "centre": Policy(sums=1, convolutions=1, neurons=None, winner=True, linear=None, mass="set", location="centre"),
    "small": Policy(sums=2, convolutions=1, neurons=5),
    "full": Policy(sums=2, convolutions=2, neurons=20, full=16),
    "opposed": Policy(opposed="input"),
    "opposed paper": Policy(
        sums=1, convolutions=1, neurons=None, winner=True, linear=None, mass="set", opposed="input"
    ),
    "opposed marginal": Policy(sums=None, convolutions=None, neurons=None, opposed="input"),
    "even": Policy(sums=3, convolutions=None, neurons=50, mass="set"),
}


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    def __init__(self, body: nn.Module, inplace: bool):
        super().__init__()
        self.body, self.inplace = body, inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.inplace:
            y += x
            return F.relu_(y)
        return F.relu(x + y)


class Branches(nn.Module):
    def __init__(self, branches: Sequence[nn.Module]):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Squeeze(nn.Module):
    """A squeeze-and-excitation gate."""

    def __init__(self, channels: int, hard: bool, pooled: bool):
        super().__init__()
        self.down, self.up, self.pooled = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1), pooled
        self.gate: nn.Module = nn.Hardsigmoid() if hard else nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        s = F.adaptive_avg_pool2d(x, 1) if self.pooled else x.mean((2, 3), keepdim=True)
        return x * self.gate(self.up(F.relu(self.down(s))))


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def norm(channels: int) -> nn.BatchNorm2d:
    """Batch normalisation with random affine (scales of both signs) and running statistics."""
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_(std=0.3)
        layer.running_mean.normal_(std=0.3)
        layer.running_var.uniform_(0.3, 2.0)
    return layer


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    lambda: nn.ReLU6(inplace=True),
    nn.ReLU6,
    nn.Hardswish,
    lambda: nn.Hardswish(inplace=True),
    nn.SiLU,
    lambda: nn.LeakyReLU(0.1),
    lambda: nn.LeakyReLU(0.2, inplace=True),
    nn.GELU,
    nn.Tanh,
    nn.ELU,
]
BLOCKS = (
    "conv",
    "conv",
    "conv",
    "norm",
    "act",
    "act",
    "max",
    "avg",
    "adaptive",
    "adaptive max",
    "residual",
    "cat",
    "shuffle",
    "gate",
    "drop",
)
LOCAL = tuple(b for b in BLOCKS if b != "gate")


def convolution(pick: Pick, channels: int) -> nn.Conv2d:
    groups = pick([g for g in (1, 2, 3, channels) if channels % g == 0])
    out = groups * pick([1, 2, 3] if groups <= 3 else [1, 2])
    stride = pick([1, 1, 2, 3, (2, 1)])
    padding = pick([0, 1, (0, 1), (2, 1)] + (["same"] if stride == 1 else []))
    return nn.Conv2d(
        channels,
        out,
        pick([1, 3, 2, (1, 3), (3, 1), (2, 3)]),
        stride=stride,
        padding=padding,
        dilation=pick([1, 1, 2, (2, 1)]),
        groups=groups,
        bias=pick([True, False]),
    )


def block(kind: str, pick: Pick, channels: int) -> nn.Module:
    """One random block for so many channels."""
    if kind == "conv":
        return convolution(pick, channels)
    if kind == "norm":
        return norm(channels)
    if kind == "act":
        return pick(ACTIVATIONS)()
    if kind == "max":
        kernel = pick([2, 3, (3, 2)])
        return nn.MaxPool2d(kernel, stride=pick([1, 2, 3]), padding=pick([0, 1]), ceil_mode=pick([True, False]))
    if kind == "avg":
        return nn.AvgPool2d(
            pick([2, 3, (2, 3)]),
            stride=pick([1, 2, 3]),
            padding=pick([0, 1]),
            ceil_mode=pick([True, False]),
            count_include_pad=pick([True, False]),
        )
    if kind == "adaptive":
        return nn.AdaptiveAvgPool2d(pick([2, 5, (3, 4), 14]))  # 14 from fewer: overlapping bins
    if kind == "adaptive max":
        return nn.AdaptiveMaxPool2d(pick([3, (4, 2), 9]))
    if kind == "residual":
        body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), *([norm(channels)] if pick([True, False]) else [])
        )
        return Residual(body, pick([True, False]))
    if kind == "cat":
        return Branches(
            [
                nn.Sequential(nn.Conv2d(channels, 2, 1), nn.ReLU(inplace=True)),
                nn.Conv2d(channels, 3, 3, padding=1, bias=False),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(channels, 1, 1)),
            ]
        )
    if kind == "shuffle":
        return Shuffle() if channels % 2 == 0 else nn.ChannelShuffle(channels)
    if kind == "drop":
        return nn.Dropout2d(0.5, inplace=pick([True, False]))
    return Squeeze(channels, pick([True, False]), pick([True, False]))


def cnn(pick: Pick, size: tuple[int, int], blocks: Sequence[str] = BLOCKS, depth: int = 6) -> nn.Sequential:
    """A random stack of blocks that keeps at least one position and at most 14 x 14; in eval mode, default dtype."""
    probe = torch.zeros(1, 3, *size)
    layers: list[nn.Module] = []
    for kind in ["conv", *(pick(blocks) for _ in range(pick(range(1, depth + 1))))]:
        layer = block(kind, pick, probe.shape[1]).eval().to(probe.dtype)
        try:
            with torch.no_grad():
                after = layer(probe.clone())
        except RuntimeError:  # the window is larger than what is left of the picture
            continue
        if after.numel() and after.shape[1] <= 12 and max(after.shape[2:]) <= 14:
            layers.append(layer)
            probe = after
    if not layers:
        layers = [nn.Conv2d(3, 4, 3, padding=1)]
    return nn.Sequential(*layers).eval()


# decoders: (B, C, h, w) features and (B, T) tokens -> (B, T, WORDS) scores ------------------------------------------


class Decoder(nn.Module):
    """What all decoders have. ``head`` gives logits or log-probabilities."""

    def __init__(self, shape: Sequence[int], log: bool):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, VECTOR)
        self.head = nn.Linear(HIDDEN, WORDS)
        self.log = log

    def score(self, hidden: Tensor) -> Tensor:
        out = self.head(hidden)
        return F.log_softmax(out, -1) if self.log else out


class Sequence_(Decoder):
    """Show and Tell: the pooled image is the first word; nn.LSTM or nn.GRU over a padded or packed sequence."""

    def __init__(
        self, shape: Sequence[int], log: bool, kind: str, layers: int, batch_first: bool, packed: bool, flat: bool
    ):
        super().__init__(shape, log)
        self.flat, self.batch_first, self.packed = flat, batch_first, packed
        self.image = nn.Linear(shape[0] * shape[1] * shape[2] if flat else shape[0], VECTOR)
        self.rnn = (nn.LSTM if kind == "lstm" else nn.GRU)(
            VECTOR, HIDDEN, layers, batch_first=batch_first, dropout=0.2 if layers > 1 else 0
        )

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        pooled = torch.flatten(features, 1) if self.flat else features.mean((2, 3))
        steps = torch.cat([self.image(pooled).unsqueeze(1), self.embedding(tokens)], 1)
        if self.packed:
            lengths = [steps.shape[1] - i for i in range(len(steps))]
            packed = pack_padded_sequence(steps, lengths, batch_first=True)
            out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        elif self.batch_first:
            out, _ = self.rnn(steps)
        else:
            out = self.rnn(steps.transpose(0, 1))[0].transpose(0, 1)
        return self.score(out[:, 1:])


class Attend(Decoder):
    """Show, Attend and Tell: additive soft attention, a sigmoid gate, scores written into a tensor step by step."""

    def __init__(self, shape: Sequence[int], log: bool, kind: str, gated: bool):
        super().__init__(shape, log)
        channels = shape[0]
        self.kind, self.gated = kind, gated
        self.start_h, self.start_c = nn.Linear(channels, HIDDEN), nn.Linear(channels, HIDDEN)
        self.from_image, self.from_state, self.energy = nn.Linear(channels, 4), nn.Linear(HIDDEN, 4), nn.Linear(4, 1)
        self.beta = nn.Linear(HIDDEN, channels)
        self.cell = (nn.LSTMCell if kind == "lstm" else nn.GRUCell)(VECTOR + channels, HIDDEN)

    def look(self, cells: Tensor, h: Tensor) -> Tensor:
        energy = self.energy(torch.tanh(self.from_image(cells) + self.from_state(h).unsqueeze(1))).squeeze(2)
        return (cells * energy.softmax(1).unsqueeze(2)).sum(1)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        cells = features.flatten(2).permute(0, 2, 1)
        mean = cells.mean(1)
        h, c = self.start_h(mean), self.start_c(mean)
        words = self.embedding(tokens)
        predictions = torch.zeros(*tokens.shape, WORDS, dtype=features.dtype)
        for t in range(tokens.shape[1]):
            seen = self.look(cells, h)
            if self.gated:
                seen = torch.sigmoid(self.beta(h)) * seen
            step = torch.cat([words[:, t], seen], 1)
            if self.kind == "lstm":
                h, c = self.cell(step, (h, c))
            else:
                h = self.cell(step, h)
            b = len(h)
            predictions[:b, t] = self.score(h)
        return predictions


class DotAttend(Attend):
    """Attention by scaled dot products, fused (``F.scaled_dot_product_attention``) or ``nn.MultiheadAttention``."""

    def __init__(self, shape: Sequence[int], log: bool, kind: str, gated: bool, multihead: bool, weights: bool):
        super().__init__(shape, log, kind, gated)
        self.query = nn.Linear(HIDDEN, 4)
        self.key, self.value, self.back = nn.Linear(shape[0], 4), nn.Linear(shape[0], 4), nn.Linear(4, shape[0])
        self.heads = nn.MultiheadAttention(4, 2, batch_first=True) if multihead else None
        self.weights = weights

    def look(self, cells: Tensor, h: Tensor) -> Tensor:
        query, key, value = self.query(h).unsqueeze(1), self.key(cells), self.value(cells)
        if self.heads is not None:
            seen, _ = self.heads(query, key, key if self.weights else value, need_weights=self.weights)
        else:
            seen = F.scaled_dot_product_attention(query, key, value)
        return self.back(seen[:, 0])


DECODERS = ("sequence", "sequence", "attend", "dot")


def decoder(pick: Pick, shape: Sequence[int]) -> Decoder:
    kind, log, rnn = pick(DECODERS), pick([True, False]), pick(["lstm", "lstm", "gru"])
    if kind == "sequence":
        made: Decoder = Sequence_(
            shape, log, rnn, pick([1, 2]), pick([True, False]), pick([True, False]), pick([True, False])
        )
    elif kind == "attend":
        made = Attend(shape, log, rnn, pick([True, False]))
    else:
        made = DotAttend(shape, log, rnn, pick([True, False]), pick([True, False]), pick([True, False]))
    return made.eval()


class Captioning(nn.Module):
    """A CNN and a decoder."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, head

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        return self.decoder(self.encoder(pixels), tokens)


def captioner(pick: Pick) -> tuple[Captioning, Tensor, Tensor]:
    """A random captioner in eval mode, (B, 3, H, W) pixels for it and (B, T) tokens."""
    torch.manual_seed(pick(range(1000)))
    size = (pick([8, 9, 12]), pick([8, 11]))
    encoder = cnn(pick, size)
    pixels, tokens = torch.randn(pick([1, 2]), 3, *size), torch.randint(WORDS, (1, pick([1, 3])))
    tokens = tokens.expand(len(pixels), -1).contiguous()
    with torch.no_grad():
        shape = encoder(pixels.clone()).shape[1:]
    return Captioning(encoder, decoder(pick, shape)).eval(), pixels, tokens
