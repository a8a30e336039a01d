"""Images as rows: whatever an image may be, read and made to pixels; fixed views are kept, and a batch is read by threads."""

from __future__ import annotations

import io
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from pt_vl.preprocessing import Preprocessing

# Times the shorter side: resizing the latter to the model's makes gigabytes of an image of a few kilobytes.
LONGEST = 100


@dataclass(frozen=True)
class Cell:
    """An image of `datasets` that is read when it is asked for.

    Args:
        data: what `datasets` has loaded, images not decoded.
        column, row: where it is.
        state: what the data are known by.
    """

    data: Any = field(repr=False, compare=False)
    column: str
    row: int
    state: str

    def read(self) -> bytes:
        return cast(bytes, self.data[self.row][self.column]["bytes"])


Source = str | Path | bytes | np.ndarray[Any, Any] | Image.Image | Cell
T = TypeVar("T")
U = TypeVar("U")


def read_image(source: Source) -> Image.Image:
    """An image in RGB of 8 bits.

    Grey, palette, CMYK and transparent images are converted as CLIP's preprocessing does (transparency is dropped); values
    of 16 bits are scaled to 8, where a plain conversion would cut them off. EXIF's orientation is not applied, as in CLIP's
    released code (`datasets` applies it when it decodes).

    Args:
        source: a file, the bytes of one, uint8 [H, W, 3] or [H, W], an image of Pillow, which stays as it is, or one of
            `datasets`.

    Raises:
        OSError: the file is missing, damaged, truncated or no image, or one side is more than `LONGEST` times the other.
    """
    try:
        if isinstance(source, np.ndarray):
            return _no_strip(Image.fromarray(source)).convert("RGB")
        if isinstance(source, Image.Image):
            return _rgb(source)
        source = source.read() if isinstance(source, Cell) else source
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _rgb(image)
    # What Pillow's decoders raise.
    except (SyntaxError, ValueError, EOFError, RuntimeError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from error


def _rgb(image: Image.Image) -> Image.Image:
    _no_strip(image).load()
    if image.mode == "F":
        raise OSError("holds floating point values, whose scale is not known")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise OSError("holds integers of 32 bits, whose scale is not known")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535) // 257
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _no_strip(image: Image.Image) -> Image.Image:
    if max(image.size) > LONGEST * min(image.size):
        raise OSError(f"its sides of {image.width} and {image.height} pixels differ by more than a factor of {LONGEST}")
    return image


class Views:
    """Images as they are after resizing and cropping, uint8 [3, size, size]: the last ones that were asked for, up to a number
    of bytes.

    A file is known by what its file system says of it, so that splits and tasks of one process share what they have in
    common, and none holds a view that is no longer the file's. Arrays and Pillow's images may change, and are not kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._kept: OrderedDict[Hashable, tuple[Tensor, int]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def key(self, source: Source, how: Preprocessing) -> Hashable | None:
        """What the view of an image is known by; None where it is not kept.

        Raises:
            OSError: the file is missing.
        """
        geometry = (how.size, how.resize, how.squash, how.interpolation)
        if isinstance(source, str | Path):
            state = Path(source).stat()
            # Copying tools keep times, so the file itself is in it, and when anything of it changed.
            return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns, geometry
        return (source, geometry) if isinstance(source, bytes | Cell) else None

    def get(self, key: Hashable | None) -> Tensor | None:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def keep(self, key: Hashable | None, view: Tensor) -> None:
        # Bytes that are a key live as long as the view does.
        cost = view.nbytes + sum(len(part) for part in cast("tuple[Any, ...]", key or ()) if isinstance(part, bytes))
        if key is None or cost > self.limit:
            return
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = view, cost
            self.held += cost
            while self.held > self.limit:
                self.held -= self._kept.popitem(last=False)[1][1]


VIEWS = Views(2**30)
"""The fixed views that a process keeps: up to 1 GiB, some 7,000 of 224 x 224 pixels. What goes beyond is decoded again."""


def ahead(make: Callable[[T], U], items: Sequence[T]) -> Iterator[U]:
    """`make` of each item, in order, made by as many threads as torch uses (at most four), which are no more than so many items
    ahead: images of a camera are large when they are decoded. Pillow leaves the interpreter to others while it decodes."""
    count = min(4, torch.get_num_threads(), len(items))
    if count < 2:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(count) as pool:  # of one batch: a process that is forked off would inherit no threads
        pending = deque[Future[U]]()
        try:
            for item in items:
                pending.append(pool.submit(make, item))
                if len(pending) > count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


class ImageRows(Sequence[dict[str, Any]]):
    """Images that are opened when they are asked for, and their labels.

    Fixed views are decoded once, as far as `VIEWS` keeps them; crops are drawn in the order in which rows are asked for.

    Args:
        sources: one of each image.
        labels: class indices.
        preprocessing: of the backbone.
        crop_scale: area of a random crop, (least, most) of the image; the crop is flipped every other time and drawn anew
            whenever a row is read. None: the fixed view.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        labels: Sequence[int],
        preprocessing: Preprocessing,
        crop_scale: tuple[float, float] | None = None,
    ) -> None:
        self.sources, self.labels, self.preprocessing, self.crop_scale = sources, labels, preprocessing, crop_scale
        self._augment = None
        if crop_scale is not None:
            size, mode = preprocessing.size, preprocessing.mode
            crop = v2.RandomResizedCrop(size, scale=crop_scale, interpolation=mode, antialias=True)
            self._augment = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: Any) -> Any:
        return self._made([index])[0]

    def rows_at(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The rows at `indices`, decoded by several threads: what `Split.batch` asks for."""
        if type(self).__getitem__ is not ImageRows.__getitem__:  # somebody's own augmentation
            return [self[i] for i in indices]
        return self._made(indices)

    def _made(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        sources = [self.sources[i] for i in indices]
        if self._augment is not None:
            pixels = map(self.preprocessing.normalise, self._cropped(sources))
        elif type(self.preprocessing).__call__ is Preprocessing.__call__:
            pixels = map(self.preprocessing.normalise, self._fixed(sources))
        else:  # somebody's own preprocessing, of which nothing is known
            pixels = map(self.preprocessing, ahead(read_image, sources))
        return [{"pixels": made, "label": self.labels[i]} for made, i in zip(pixels, indices, strict=True)]

    def _fixed(self, sources: Sequence[Source]) -> Iterator[Tensor]:
        keys = [VIEWS.key(source, self.preprocessing) for source in sources]
        known = [VIEWS.get(key) for key in keys]
        absent = [source for source, view in zip(sources, known, strict=True) if view is None]
        made = ahead(self._view, absent)
        for key, view in zip(keys, known, strict=True):
            if view is None:
                VIEWS.keep(key, view := next(made))
            yield view

    def _view(self, source: Source) -> Tensor:
        return v2.functional.pil_to_tensor(self.preprocessing.view(read_image(source)))

    def _cropped(self, sources: Sequence[Source]) -> Iterator[Any]:
        assert self._augment is not None
        yield from map(self._augment, ahead(read_image, sources))

    def fixed(self) -> ImageRows:
        """The same images in the fixed view."""
        return ImageRows(self.sources, self.labels, self.preprocessing)
