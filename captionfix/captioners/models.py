"""The project's own captioners as `transformers` models: Show and Tell, and Show, Attend and Tell.

Vinyals et al. 2015, "Show and Tell", and Xu et al. 2015, "Show, Attend and Tell". Both have an `encoder` (any CNN) that
ends in a feature map and a `decoder` (`captionfix.captioners.decoders`) that sees nothing of the image but this map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .decoders import Decoder, ShowAttendTellDecoder, ShowTellDecoder, State, in_order


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
        region_loss: weight, in training with regions, of a loss that grounds words in them. With attention it is -log
            of the share of a word's attention that lies in its region (Liu, Mao, Sha, Yuille 2017, "Attention
            Correctness in Neural Image Captioning"). Without, it contrasts the word's probability when the image is
            more of a patch in its region with that when it is more of one outside (as InfoNCE does: van den Oord, Li,
            Vinyals 2018, "Representation Learning with Contrastive Predictive Coding").
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
        region_loss: float = 0.0,
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
        self.region_loss = region_loss
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
        kwargs: see `CaptionerConfig`.
    """

    model_type = "captionfix_show_attend_tell"

    def __init__(
        self,
        value_size: int = 512,
        attention_size: int = 512,
        positions: list[int] | tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.value_size = value_size
        self.attention_size = attention_size
        self.positions = list(positions) if positions is not None else None
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
                that is not known; see `CaptionerConfig.region_loss`.
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
        if regions is not None:
            regions = regions.reshape(*labels.shape, -1)[order]
        logits, misplaced = self.decoder.packed(features, labels, steps, owner, regions)
        loss = F.cross_entropy(
            logits.float(),
            in_order(labels[:, 1:], steps),
            label_smoothing=self.config.label_smoothing if self.training else 0.0,
        )
        if misplaced is not None:
            loss = loss + self.config.region_loss * misplaced
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
