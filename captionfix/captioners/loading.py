"""Captioners by name or folder: reading and writing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captionfix.errors import CaptionerError

if TYPE_CHECKING:
    import torch
    from transformers import BaseImageProcessor, PreTrainedTokenizerFast

    from captionfix.captioners.captioner import Captioner
    from captionfix.captioners.models import CaptionerModel
    from captionfix.captioners.module import ModuleCaptioner

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from progress bars and from anything less than an error."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def bundled() -> dict[str, Path]:
    """The captioners that come with the package: name -> folder."""
    package = Path(__file__).resolve().parents[1]
    found: dict[str, Path] = {}
    for place in (package.parent / "models", package / "models"):  # a checkout; an installed wheel
        if (package.parent / "pyproject.toml").exists() or place.parent == package:
            found.update({p.parent.name: p.parent for p in sorted(place.glob("*/config.json"))})
    return found


def load(
    source: str | Path,
    device: str | torch.device | None = None,
    *,
    vocabulary: str | Path | None = None,
    cnn: str | Path | None = None,
) -> Captioner:
    """A captioner, ready for use: in eval mode, computing in float32.

    Args:
        source: the name of a bundled captioner ("scenes", "photos", ...); a folder that holds one, or the files of a
            published checkpoint (``docs/checkpoints.md``); a published checkpoint's file; or (if it is none of these)
            the id of a repository on the Hugging Face hub that holds a captioner of captionfix.
        device: where the weights go; None is the CPU.
        vocabulary: of a checkpoint that is given as a file: its vocabulary, or its infos.
        cnn: of a checkpoint that is given as a file: the CNN's or encoder's file, where that is another.

    Raises:
        CaptionerError: there is no such captioner, its files are missing, damaged or not of one training, it is
            another kind of model, or its weights are not all finite.
    """
    path = Path(source).expanduser()
    apart = [Path(file).expanduser() for file in (cnn, vocabulary) if file is not None]
    folders = bundled()
    if str(source) in folders and not apart:
        return _read(folders[str(source)], str(source), device)
    if apart or path.is_file() or _index(path).is_file():
        return _published_files([path if path.is_file() else _index(path), *apart], device)
    if path.is_dir():
        return _published_folder(path, device) or _read(path, path.resolve().name, device)
    name = str(source)
    if isinstance(source, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        known = ", ".join(folders) or "the bundled ones (none here)"
        raise CaptionerError(f"no captioner {source}: it is neither a folder nor one of {known}")
    return _read(_download(name, list(folders)), name, device)


def _index(path: Path) -> Path:
    """What lies beside the data of a TensorFlow checkpoint, whose name is given without either's ending."""
    return path.with_name(f"{path.name}.index") if path.name else path


def _published_files(paths: list[Path], device: str | torch.device | None) -> Captioner:
    from captionfix.captioners.published import open_files

    first = paths[0]
    shown = first.with_suffix("") if first.suffix == ".index" and not first.is_file() else first
    if shown.is_dir():
        raise CaptionerError(f"{shown} is a folder; give its files, or put all of them into it and give it alone")
    for path in (shown, *paths[1:]):
        if not path.is_file():
            raise CaptionerError(f"there is no file {path}")
    return _placed(open_files(paths), device)


def _published_folder(folder: Path, device: str | torch.device | None) -> Captioner | None:
    """Somebody else's captioner; None where the folder is one of captionfix, or of nobody."""
    from captionfix.captioners.published import open_folder

    if any((folder / file).is_file() for file in FILES):
        return None
    captioner = open_folder(folder)
    return None if captioner is None else _placed(captioner, device)


def _placed(captioner: ModuleCaptioner, device: str | torch.device | None) -> Captioner:
    if device is not None:
        captioner.model.to(device)
    return captioner


def _download(name: str, known: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptionerError(
            f"no captioner {name}: it is not a folder, not one of {', '.join(known) or 'none bundled'}, "
            f"and the hub does not give it ({first})"
        ) from error


def _read(folder: Path, name: str, device: str | torch.device | None) -> Captioner:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoImageProcessor, PreTrainedTokenizerFast

    from captionfix.captioners.models import FAMILIES
    from captionfix.captioners.pretrained import PretrainedCaptioner

    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise CaptionerError(f"{folder} is no complete captioner: {', '.join(missing)} missing")
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = settings.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CaptionerError(f"{folder / 'config.json'} can't be read as JSON settings: {error}") from error
    if kind not in FAMILIES:
        raise CaptionerError(
            f"{folder} holds a model of kind {kind!r}, not a captioner of captionfix ({', '.join(FAMILIES)}); "
            "any other CNN + LSTM captioner can be explained after wrapping its module"
        )
    family: Any = FAMILIES[kind]
    try:
        with quiet():  # its report on weights is checked below, not shown
            model, report = family.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CaptionerError(f"{folder} can't be read as a captioner: {error}") from error
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        if type(error) is not Exception and not type(error).__module__.startswith(("huggingface_hub", "transformers")):
            raise
        raise CaptionerError(f"{folder} can't be read as a captioner: {error}") from error
    for how_read in ("local_files_only", "is_local"):  # transformers would write them with the tokeniser
        tokenizer.init_kwargs.pop(how_read, None)
    wrong = [f"{len(report[key])} {key.replace('_', ' ')}" for key in report if key.endswith("keys") and report[key]]
    if wrong:
        example = next(sorted(map(str, report[key]))[0] for key in report if key.endswith("keys") and report[key])
        raise CaptionerError(f"weights in {folder} do not fit its config.json: {', '.join(wrong)}, such as {example}")
    bad = [key for key, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if bad:
        raise CaptionerError(
            f"{len(bad)} tensors in {folder} hold NaN or infinite weights, such as {bad[0]}; the file is damaged "
            "or its training diverged"
        )
    if len(tokenizer) != model.config.vocab_size:
        raise CaptionerError(
            f"the tokeniser in {folder} has {len(tokenizer)} words, its model {model.config.vocab_size}; "
            "they are not of one training"
        )
    if device is not None:
        model = model.to(device)
    return PretrainedCaptioner(model, tokenizer, processor, name, settings.get("explain"))


def write(
    folder: Path,
    model: CaptionerModel,
    tokenizer: PreTrainedTokenizerFast,
    processor: BaseImageProcessor,
    half: bool = False,
) -> None:
    """Writes a captioner's five files into `folder`, weights as safetensors; `half` stores them in 16 bits."""
    import torch

    state = model.state_dict()
    if half:
        state = {k: v.to(torch.float16) if v.is_floating_point() else v for k, v in state.items()}
    with quiet():
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float16" if half else "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes files that only their owner can read
