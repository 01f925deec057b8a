"""The project's own captioners as `transformers` models: Show and Tell, and Show, Attend and Tell.

Vinyals et al. 2015, "Show and Tell", and Xu et al. 2015, "Show, Attend and Tell". Both have an `encoder` (any CNN) that
ends in a feature map and a `decoder` that sees nothing of the image but this map. `forward` is made of plain operations
(linear, LSTM, sigmoid, tanh, softmax, products and sums), which an engine that records operations can follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

State = tuple[Tensor, ...]

ROWS = 8
"""Choices of cells whose attention is scored at once on a CPU: so few stay in its cache."""


class CaptionerConfig(PretrainedConfig):
    """What both families share.

    Args:
        cnn: the CNN: a `transformers` configuration as a dict with its `model_type`, or `{"torchvision": name}`.
        image_size: side of the CNN's square input in pixels.
        feature_size: channels of the CNN's last feature map.
        vocab_size: words known, special words included.
        word_size: numbers in a word's embedding.
        hidden_size: units of the LSTM.
        dropout: share of embeddings and of LSTM outputs dropped in training.
        tie_words: the output layer's word vectors are the embedding's.
        label_smoothing: share of the target probability spread over all words in training.
        frozen_norms: the CNN's batch norms keep their running statistics in training.
        max_words: longest caption, end not counted.
        beam_length_power: the beam search compares log-probabilities divided by length to this power.
        explain: the captioner's own settings for `captionfix.explain`, ``{"method": ..., "policy": ...}``.
    """

    def __init__(
        self,
        cnn: dict[str, Any] | None = None,
        image_size: int = 224,
        feature_size: int = 1280,
        vocab_size: int = 1000,
        word_size: int = 512,
        hidden_size: int = 512,
        dropout: float = 0.5,
        tie_words: bool = False,
        label_smoothing: float = 0.0,
        frozen_norms: bool = False,
        max_words: int = 20,
        beam_length_power: float = 1.0,
        explain: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.cnn = cnn if cnn is not None else {"model_type": "mobilenet_v2"}
        self.image_size = image_size
        self.feature_size = feature_size
        self.vocab_size = vocab_size
        self.word_size = word_size
        self.hidden_size = hidden_size
        self.dropout = dropout
        self.tie_words = tie_words
        self.label_smoothing = label_smoothing
        self.frozen_norms = frozen_norms
        self.max_words = max_words
        self.beam_length_power = beam_length_power
        self.explain = explain
        kwargs.setdefault("pad_token_id", 0)
        kwargs.setdefault("bos_token_id", 1)
        kwargs.setdefault("eos_token_id", 2)
        super().__init__(**kwargs)


class ShowTellConfig(CaptionerConfig):
    """Show and Tell. `pool` is the side of the grid to which the feature map is pooled for the image embedding."""

    model_type = "captionfix_show_tell"

    def __init__(self, pool: int = 1, **kwargs: Any) -> None:
        self.pool = pool
        super().__init__(**kwargs)


class ShowAttendTellConfig(CaptionerConfig):
    """Show, Attend and Tell.

    Args:
        value_size: numbers that a cell of the feature map is projected to before it is attended.
        attention_size: units of the additive attention.
        positions: height and width of the feature map if its cells get a learned position, else None.
        attention_loss: weight, in training with regions, of -log of the attention that lies in a word's region (its
            attention correctness: Liu, Mao, Sha, Yuille 2017, "Attention Correctness in Neural Image Captioning").
        kwargs: see `CaptionerConfig`.
    """

    model_type = "captionfix_show_attend_tell"

    def __init__(
        self,
        value_size: int = 512,
        attention_size: int = 512,
        positions: list[int] | tuple[int, int] | None = None,
        attention_loss: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.value_size = value_size
        self.attention_size = attention_size
        self.positions = list(positions) if positions is not None else None
        self.attention_loss = attention_loss
        super().__init__(**kwargs)


def torchvision_features(name: str) -> nn.Module:
    """A torchvision classifier of that name, without weights, cut after its last four-dimensional tensor."""
    import torchvision

    plain = {"inception_v3", "googlenet"}
    options = {"aux_logits": False, "init_weights": False} if name in plain else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    if hasattr(model, "features"):
        # DenseNet applies its last ReLU in the function after `features`.
        return nn.Sequential(model.features, nn.ReLU()) if name.startswith("densenet") else model.features
    kept = []
    for child in model.children():
        if isinstance(child, nn.AdaptiveAvgPool2d | nn.Linear | nn.Dropout):
            break
        kept.append(child)
    return nn.Sequential(*kept)


class Encoder(nn.Module):
    """A CNN: (B, 3, H, W) pixels -> (B, F, h, w) feature map."""

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        settings = dict(config.cnn)
        self.frozen_norms = config.frozen_norms
        self.cnn: nn.Module
        if "torchvision" in settings:
            self.cnn = torchvision_features(settings["torchvision"])
        else:
            self.cnn = AutoModel.from_config(AutoConfig.for_model(**settings))

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode)
        if self.frozen_norms:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = self.cnn(pixel_values)
        return features if isinstance(features, Tensor) else features.last_hidden_state


class Decoder(nn.Module):
    """What both decoders share: words in and words out."""

    def __init__(self, config: CaptionerConfig, output_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.word_size)
        self.drop = nn.Dropout(config.dropout)
        self.tied = config.tie_words
        if self.tied and output_size != config.word_size:
            raise ValueError(f"tie_words needs word_size {config.word_size} to equal the output's size {output_size}")
        if self.tied:
            self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        else:
            self.output = nn.Linear(output_size, config.vocab_size)

    def words(self, outputs: Tensor) -> Tensor:
        """(..., D) outputs -> (..., V) logits."""
        return F.linear(outputs, self.embedding.weight, self.output_bias) if self.tied else self.output(outputs)


def in_order(table: Tensor, lengths: list[int]) -> Tensor:
    """(B, T, ...) -> (sum of lengths, ...): the first `lengths[i]` entries of row i (longest first), those of all first
    words before those of the second ones."""
    return torch.cat([table[: sum(n > t for n in lengths), t] for t in range(max(lengths))])


class ShowTellDecoder(Decoder):
    """The pooled feature map is the LSTM's first input; that step's output is not used."""

    def __init__(self, config: ShowTellConfig) -> None:
        super().__init__(config, config.hidden_size)
        self.pool = nn.AdaptiveAvgPool2d(config.pool)
        self.image = nn.Linear(config.feature_size * config.pool**2, config.word_size)
        self.lstm = nn.LSTM(config.word_size, config.hidden_size, batch_first=True)

    def begin(self, features: Tensor) -> State:
        image = self.image(self.pool(features).flatten(1))
        _, (h, c) = self.lstm(image.unsqueeze(1))
        return h, c

    def step(self, state: State, token: Tensor) -> tuple[Tensor, State]:
        out, (h, c) = self.lstm(self.embedding(token).unsqueeze(1), (state[0], state[1]))
        return self.words(out[:, 0]), (h, c)

    @staticmethod
    def reorder(state: State, index: Tensor) -> State:
        return tuple(part.index_select(1, index) for part in state)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        return self._logits(self.image(self.pool(features).flatten(1)), tokens)

    def _logits(self, image: Tensor, tokens: Tensor) -> Tensor:
        words = self.drop(self.embedding(tokens))
        out, _ = self.lstm(torch.cat([self.drop(image).unsqueeze(1), words], 1))
        return self.words(self.drop(out[:, 1:]))

    def packed(self, features: Tensor, tokens: Tensor, lengths: list[int], owner: Tensor) -> tuple[Tensor, None]:
        """As `ShowAttendTellDecoder.packed`, without attention."""
        return in_order(self._logits(self.image(self.pool(features).flatten(1))[owner], tokens), lengths), None


class ShowAttendTellDecoder(Decoder):
    """Additive attention over the map's cells with the state before the word; a gate; a deep output."""

    def __init__(self, config: ShowAttendTellConfig) -> None:
        super().__init__(config, config.word_size)
        self.value = nn.Linear(config.feature_size, config.value_size)
        if config.positions is not None:
            height, width = config.positions
            self.position: nn.Parameter | None = nn.Parameter(torch.zeros(height * width, config.value_size))
        else:
            self.position = None
        self.key = nn.Linear(config.value_size, config.attention_size)
        self.query = nn.Linear(config.hidden_size, config.attention_size, bias=False)
        self.score = nn.Linear(config.attention_size, 1, bias=False)
        self.gate = nn.Linear(config.hidden_size, config.value_size)
        self.begin_h = nn.Linear(config.value_size, config.hidden_size)
        self.begin_c = nn.Linear(config.value_size, config.hidden_size)
        self.cell = nn.LSTMCell(config.word_size + config.value_size, config.hidden_size)
        self.output_h = nn.Linear(config.hidden_size, config.word_size)
        self.output_z = nn.Linear(config.value_size, config.word_size, bias=False)

    def begin(self, features: Tensor) -> State:
        """(B, F, h, w) features -> h, c, values (B, N, D) and keys (B, N, A) of the N = h w cells."""
        values, keys = self.project(features)
        return *self._from(values.mean(1)), values, keys

    def project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F, h, w) features -> values (B, N, D) and keys (B, N, A), each cell by itself."""
        cells = self.value(features.flatten(2).transpose(1, 2))
        if self.position is not None:
            cells = cells + self.position
        values = torch.relu(cells)
        return values, self.key(values)

    def _from(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """h and c before the first word, from the mean of the values (B, D)."""
        return torch.tanh(self.begin_h(mean)), torch.tanh(self.begin_c(mean))

    def advance(self, state: State, word: Tensor) -> tuple[Tensor, Tensor, State]:
        """One word further: embedded words (B, E) -> output (B, E), attention (B, N), state."""
        h, c, values, keys = state
        energy = self.score(torch.tanh(keys + self.query(h).unsqueeze(1))).squeeze(2)
        weights = torch.softmax(energy, 1)
        out, h, c = self._further(h, c, word, torch.bmm(weights.unsqueeze(1), values).squeeze(1))
        return out, weights, (h, c, values, keys)

    def _further(self, h: Tensor, c: Tensor, word: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output and state after a word, from what was attended (B, D)."""
        context = torch.sigmoid(self.gate(h)) * context
        h, c = self.cell(torch.cat([word, context], 1), (h, c))
        return torch.tanh(self.output_h(self.drop(h)) + self.output_z(context)), h, c

    def step(self, state: State, token: Tensor) -> tuple[Tensor, State]:
        out, _, state = self.advance(state, self.embedding(token))
        return self.words(out), state

    @staticmethod
    def reorder(state: State, index: Tensor) -> State:
        return tuple(part.index_select(0, index) for part in state)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        outs, _ = self.unroll(self.begin(features), tokens)
        return self.words(self.drop(torch.stack(outs, 1)))

    def without(self, features: Tensor, gone: Tensor, filling: Tensor, tokens: Tensor) -> Tensor:
        """As `Captioner.decode_without`. All choices share the cells' values and keys; what is gone is put right."""
        values, keys = self.project(torch.cat([features, filling.expand_as(features)]))
        row, cell = torch.nonzero(gone.flatten(1), as_tuple=True)
        change = values[1, cell] - values[0, cell]
        mean = values[0].mean(0) + change.new_zeros(len(gone), change.shape[1]).index_add(
            0, row, change / keys.shape[1]
        )
        h, c = self._from(mean)
        few = ROWS if features.device.type == "cpu" else len(gone)
        outs = []
        for word in self.drop(self.embedding(tokens[0])):
            query = self.query(h)
            energy = torch.cat([self.score((keys[:1] + part[:, None]).tanh_()) for part in query.split(few)])[..., 0]
            energy[row, cell] = self.score(torch.tanh(keys[1, cell] + query[row]))[:, 0]
            weights = torch.softmax(energy, 1)
            context = (weights @ values[0]).index_add(0, row, weights[row, cell, None] * change)
            out, h, c = self._further(h, c, word.expand(len(gone), -1), context)
            outs.append(out)
        return self.words(self.drop(torch.stack(outs, 1)))

    def attention(self, features: Tensor, tokens: Tensor) -> Tensor:
        """(B, T, h, w): the weights with which the word after `tokens[:, t]` is predicted."""
        _, weights = self.unroll(self.begin(features), tokens)
        return torch.stack(weights, 1).unflatten(2, features.shape[2:])

    def packed(self, features: Tensor, tokens: Tensor, lengths: list[int], owner: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (sum of lengths, V) and attention (sum of lengths, N) of the first `lengths[i]` words of row i, in the
        order of `in_order`.

        Row i is a caption of the image `features[owner[i]]`; a caption that has ended costs nothing any more.
        """
        state = self.reorder(self.begin(features), owner)  # several captions an image: the map is projected once
        outs, weights = self.unroll(state, tokens, lengths)
        return self.words(self.drop(torch.cat(outs))), torch.cat(weights)

    def unroll(
        self, state: State, tokens: Tensor, lengths: list[int] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and attention weights, word by word, from the state before the first; `lengths` as of `packed`."""
        words = self.drop(self.embedding(tokens))
        outs, weights = [], []
        for t in range(tokens.shape[1] if lengths is None else max(lengths)):
            word = words[:, t]
            if lengths is not None:
                active = sum(n > t for n in lengths)
                word = word[:active]
                if active < len(state[0]):  # a slice of everything would cost a copy in the backward pass
                    state = tuple(part[:active] for part in state)
            out, weight, state = self.advance(state, word)
            outs.append(out)
            weights.append(weight)
        return outs, weights


@dataclass
class CaptionerOutput(ModelOutput):
    """Loss in nats a word (where labels were given), logits, and the decoder's state for the next word."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: State | None = None


class CaptionerModel(PreTrainedModel, GenerationMixin):
    """Base of both families; see the module's text."""

    config: CaptionerConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    encoder: Encoder
    decoder: ShowTellDecoder | ShowAttendTellDecoder

    def _init_weights(self, module: nn.Module) -> None:
        from transformers import initialization as init

        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.word_size**-0.5)
        elif isinstance(module, nn.LSTM | nn.LSTMCell):
            for name, parameter in module.named_parameters():
                if "weight" in name:
                    init.xavier_uniform_(parameter)
                else:
                    init.zeros_(parameter)
        elif isinstance(module, ShowAttendTellDecoder) and module.position is not None:
            init.normal_(module.position, std=0.1)
        elif isinstance(module, Decoder) and module.tied:
            init.zeros_(module.output_bias)
        elif not isinstance(module, Decoder | Encoder):
            super()._init_weights(module)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        features: Tensor | None = None,
        state: State | None = None,
        labels: Tensor | None = None,
        regions: Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> CaptionerOutput:
        """Teacher-forced logits, the loss of captions, or one step from a state.

        Args:
            pixel_values: (B, 3, H, W); or give `features`.
            input_ids: (B, T) tokens that begin with the start.
            features: (B, F, h, w), what `encoder` returns.
            state: the decoder's state; then only the last token of `input_ids` is read.
            labels: (B, K, T) or (B, T): whole captions from start to end, filled up with pad; K captions an image.
            regions: (B, K, T, h, w): how much of each cell belongs to what a word of `labels` speaks of, all 0 where
                that is not known; see `ShowAttendTellConfig.attention_loss`.
            return_dict: accepted for `generate`; the output is always a `CaptionerOutput`.
        """
        if state is not None and input_ids is not None:
            logits, state = self.decoder.step(state, input_ids[:, -1])
            return CaptionerOutput(logits=logits.unsqueeze(1), state=state)
        if features is None:
            if pixel_values is None:
                raise ValueError("give pixel_values, features or state")
            features = self.encoder(pixel_values)
        if labels is not None:
            return self._loss(features, labels, regions)
        if input_ids is None:
            raise ValueError("give input_ids or labels")
        return CaptionerOutput(logits=self.decoder(features, input_ids))

    def _loss(self, features: Tensor, labels: Tensor, regions: Tensor | None) -> CaptionerOutput:
        images = len(features)
        labels = labels.reshape(-1, labels.shape[-1])
        lengths = (labels != self.config.pad_token_id).sum(1) - 1
        order = lengths.argsort(descending=True, stable=True)
        labels, lengths = labels[order], lengths[order]
        steps: list[int] = lengths.tolist()
        owner = order // (len(labels) // images)
        logits, attention = self.decoder.packed(features, labels[:, :-1], steps, owner)
        loss = F.cross_entropy(
            logits.float(),
            in_order(labels[:, 1:], steps),
            label_smoothing=self.config.label_smoothing if self.training else 0.0,
        )
        if regions is not None and attention is not None:
            where = in_order(regions.reshape(-1, *regions.shape[2:]).flatten(2)[order][:, 1:], steps)
            correct = (attention.float() * where).sum(1)[where.sum(1) > 0]
            tiny = torch.finfo(correct.dtype).tiny
            loss = loss - self.config.attention_loss * correct.clamp_min(tiny).log().sum() / max(len(correct), 1)
        return CaptionerOutput(loss=loss, logits=logits.detach())

    # What transformers' generation asks of a model.

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, features: Tensor | None = None, state: State | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        assert features is not None
        return {"input_ids": input_ids, "state": self.decoder.begin(features) if state is None else state}

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        # transformers hands an output named "state" on by itself up to 5.23, and no longer since
        kept: dict[str, Any] = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        return {**kept, "state": outputs["state"]}

    def _reorder_cache(self, state: State, beam_idx: Tensor) -> State:
        return self.decoder.reorder(state, beam_idx)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


class ShowTellModel(CaptionerModel):
    """Show and Tell: an image embedding as the LSTM's first input."""

    config_class = ShowTellConfig

    def __init__(self, config: ShowTellConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = ShowTellDecoder(config)
        self.post_init()


class ShowAttendTellModel(CaptionerModel):
    """Show, Attend and Tell: gated soft attention over the feature map."""

    config_class = ShowAttendTellConfig

    def __init__(self, config: ShowAttendTellConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = ShowAttendTellDecoder(config)
        self.post_init()


FAMILIES: dict[str, type[CaptionerModel]] = {
    config.model_type: model
    for config, model in ((ShowTellConfig, ShowTellModel), (ShowAttendTellConfig, ShowAttendTellModel))
}
