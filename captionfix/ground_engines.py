"""What runs `captionfix.ground`: this process with others that read ahead, or a cluster of Ray's."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from captionfix.errors import ImageError, PolicyError
from captionfix.images import read_image

if TYPE_CHECKING:
    from captionfix.ground import Item, Options

Records = list[dict[str, Any]]
_SHARE = 0.5  # of the free memory, for a batch
_CHUNK = 8  # images that a worker of Ray's takes at once, where no batch is given


def local(
    todo: Sequence[Item], folder: Path, options: Options, device: str, workers: int, batch: int | None
) -> Iterator[Records]:
    """Batches in this process; others read the images ahead."""
    from torch.utils.data import DataLoader

    from captionfix.cli import load_on
    from captionfix.ground import LARGEST, LARGEST_ELSEWHERE, explained

    model = load_on(options.captioner, device)
    ahead: dict[str, Any] = {"prefetch_factor": 8} if workers else {}
    # batches are made here, not by the loader: their size may change on the way
    pictures: Any = _Pictures(todo)
    loader: Any = DataLoader(
        pictures, batch_size=None, num_workers=workers, collate_fn=_as_it_is,
        worker_init_fn=partial(_reader_begins, os.getpid()), **ahead,
    )  # fmt: skip
    size = batch or 1  # the first image alone tells what one needs
    waiting: list[Any] = []
    for place, picture in enumerate(loader):
        waiting.append((todo[place], picture))
        if len(waiting) < size and place + 1 < len(todo):
            continue
        while waiting:
            part = waiting[:size]
            before = _memory(device)
            try:
                records = explained(model, part, folder, options)
            except (RuntimeError, MemoryError) as error:
                if len(part) == 1 or not _out_of_memory(error):
                    raise
                size = len(part) // 2
                continue
            waiting = waiting[size:]
            if batch is None and size == 1:
                size = min(LARGEST.get(device, LARGEST_ELSEWHERE), _fitting(device, before))
            yield records


def ray(
    todo: Sequence[Item], folder: Path, options: Options, device: str, workers: int, batch: int | None
) -> Iterator[Records]:
    """Chunks of the images by Ray Data's actors; one that dies is started again and its chunk with it. The rows come
    here and are written here, so a chunk is written once, whoever did it.
    """
    try:
        import ray as cluster
        import ray.data
    except ImportError as error:
        raise PolicyError("engine 'ray' needs Ray (pip install 'captionfix[ray]')") from error
    if not cluster.is_initialized():
        cluster.init(log_to_driver=False)
    cluster.data.DataContext.get_current().enable_progress_bars = False
    length = batch or _CHUNK
    # items and records go as text: their columns differ from row to row, which Arrow does not take
    chunks = [
        {"items": json.dumps([asdict(item) for item in todo[first : first + length]])}
        for first in range(0, len(todo), length)
    ]
    explainer: Any = _Explainer
    done = cluster.data.from_items(chunks, override_num_blocks=len(chunks)).map(
        explainer,
        fn_constructor_kwargs={"folder": os.path.abspath(folder), "options": options, "device": device},
        compute=cluster.data.ActorPoolStrategy(size=workers or 1),
        num_gpus=1 if device.startswith("cuda") else 0,
        num_cpus=1,
    )
    for row in done.iter_rows():
        yield json.loads(row["records"])


ENGINES: dict[str, Callable[..., Iterator[Records]]] = {"local": local, "ray": ray}


class _Explainer:
    """What a worker of Ray's holds: the captioner, loaded once."""

    def __init__(self, folder: str, options: Options, device: str) -> None:
        from captionfix.cli import load_on

        self.folder, self.options = Path(folder), options
        self.model = load_on(options.captioner, device)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from captionfix.ground import Item, explained

        pairs = [(item, _picture(item)) for item in (Item(**fields) for fields in json.loads(row["items"]))]
        return {"records": json.dumps(explained(self.model, pairs, self.folder, self.options))}


class _Pictures:
    """A data set of the images, each read where it is asked for: a picture, or what is wrong with it."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> Any:
        return _picture(self.items[place])


def _picture(item: Item) -> Any:
    try:
        return read_image(item.file)
    except ImageError as error:
        return " ".join(str(error).split())


def _reader_begins(run: int, worker: int) -> None:
    """In a process that reads ahead: it neither holds the run's lock nor outlives the run, also where that is killed.

    torch's own watch over the parent is not enough: a killed run's worker ends only once its pictures have been taken
    out of its queue, and nobody does.
    """
    from captionfix.ground import let_go

    let_go()
    Thread(target=_ends_with, args=(run,), daemon=True).start()


def _ends_with(run: int) -> None:
    while os.getppid() == run:
        time.sleep(0.5)
    os._exit(1)


def _as_it_is(value: Any) -> Any:
    return value


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _memory(device: str) -> float:
    """Bytes that this process has held at most (CUDA: since now)."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _fitting(device: str, before: float) -> int:
    """How many images fit into the memory that is free, by what one needed."""
    import torch

    if device.startswith("cuda"):
        needed = torch.cuda.max_memory_allocated(device) - before
        free = float(torch.cuda.mem_get_info(device)[0])
    else:
        needed = _memory(device) - before
        try:
            free = float(os.sysconf("SC_AVPHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return 4
    return max(1, int(_SHARE * free / max(needed, 32 * 2.0**20)))
