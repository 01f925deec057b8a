"""What a training starts from: a new model, a pretrained CNN, or a captioner of the project's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from captionfix.errors import CaptionerError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from captionfix.captioners.models import CaptionerModel
    from captionfix.captioners.pretrained import PretrainedCaptioner

Family = Literal["show-attend-tell", "show-tell"]


def new_model(family: Family, cnn: dict[str, Any], pixels: int, seed: int, **settings: Any) -> CaptionerModel:
    """A captioner of random weights for images of ``pixels`` x ``pixels``; settings of the other family say nothing."""
    import torch
    from transformers import set_seed

    from captionfix.captioners import models

    set_seed(seed)
    config: models.CaptionerConfig
    probe = models.Encoder(models.CaptionerConfig(cnn=cnn)).eval()
    with torch.no_grad():
        shape = probe(torch.zeros(1, 3, pixels, pixels)).shape
    settings.update(cnn=cnn, image_size=pixels, feature_size=shape[1])
    if family == "show-tell":
        for key in ("positions", "value_size", "attention_size", "tie_words"):
            settings.pop(key, None)
        config = models.ShowTellConfig(**settings)
        model: CaptionerModel = models.ShowTellModel(config)
    else:
        settings.pop("pool", None)
        if settings.get("positions"):
            settings["positions"] = list(shape[2:])
        config = models.ShowAttendTellConfig(**settings)
        model = models.ShowAttendTellModel(config)
    return _channels_last(model)


def _channels_last(model: CaptionerModel) -> CaptionerModel:
    """Twice as fast on a CPU."""
    import torch

    for part in model.children():
        part.to(memory_format=torch.channels_last)
    return model


def pretrained_cnn(source: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and the weights of a `transformers` vision model.

    Raises:
        CaptionerError: it can't be read.
    """
    from transformers import AutoModel

    from captionfix.captioners.loading import quiet

    try:
        with quiet():  # a classifier's last layer is not wanted
            model = AutoModel.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CaptionerError(f"can't read the CNN {source}: {error}") from error
    unused = {"id2label", "label2id", "architectures", "dtype", "transformers_version", "_name_or_path", "problem_type"}
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in unused}
    return {**config, "model_type": model.config.model_type}, model.state_dict()


def take_cnn(model: CaptionerModel, start: str | Path) -> None:
    """Gives a model the CNN of a captioner.

    Raises:
        CaptionerError: that is none of the project's own, or has another CNN.
    """
    try:
        model.encoder.load_state_dict(own_captioner(start).model.encoder.state_dict())
    except RuntimeError as error:
        raise CaptionerError(f"{start} has another CNN than this training: {error}") from error


def started(start: str | Path, size: int, seed: int) -> tuple[CaptionerModel, PreTrainedTokenizerFast]:
    """A captioner's model and words, to be trained further on images of another size.

    Raises:
        CaptionerError: it is none of the project's own, or it learned a vector for each cell of its map.
    """
    from transformers import set_seed

    set_seed(seed)
    source = own_captioner(start)
    if getattr(source.model.config, "positions", None) and size != source.model.config.image_size:
        raise CaptionerError(f"{start} has learned where cells lie on images of {source.model.config.image_size}")
    source.model.config.image_size = size
    return _channels_last(source.model), source.tokenizer


def own_captioner(start: str | Path) -> PretrainedCaptioner:
    """A captioner of the project's own.

    Raises:
        CaptionerError: it is another's.
    """
    from captionfix.captioners.loading import load
    from captionfix.captioners.pretrained import PretrainedCaptioner

    source = load(start)
    if not isinstance(source, PretrainedCaptioner):
        raise CaptionerError(f"{start} is none of the project's own captioners; only those can be trained further")
    return source
