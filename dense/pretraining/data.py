"""Images and their classes from folders, tar files, lists and WebDataset shards."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank
from mmengine.registry import DATASETS
from PIL import Image
from timm.data import create_transform
from timm.data.readers import create_reader
from timm.data.readers.reader import Reader
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dense.images import to_rgb
from dense.openmmlab.config import ConfigError

_logger = logging.getLogger(__name__)


class TooManyUnreadable(RuntimeError):
    """More images do not decode than is allowed."""

    def __str__(self) -> str:
        # A loader's worker hands on its traceback, which ends with the reason.
        return super().__str__().strip().splitlines()[-1].rpartition("TooManyUnreadable: ")[2]


class ListReader(Reader):
    """Images named in a text file, one ``path<TAB>label`` a line, as Swin's 22K list has them.

    Args:
        root: the folder that the paths are below.
        list_file: the list; labels are class indices from 0.

    Raises:
        ConfigError: no such file, or a line of it is not of that form.
    """

    def __init__(self, root: str, list_file: str):
        super().__init__()
        self.root = Path(root)
        self.samples: list[tuple[str, int]] = []
        path = Path(list_file)
        if not path.is_file():
            raise ConfigError(f"no list of images at {list_file}")
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            name, tab, label = line.rpartition("\t")
            if not tab or not label.strip().isdigit():
                raise ConfigError(
                    f"{list_file}, line {number}: {line!r} is not a path, a tab and a class index"
                )
            self.samples.append((name, int(label)))
        if not self.samples:
            raise ConfigError(f"{list_file} is empty")
        self.class_to_idx = self._names()

    def __getitem__(self, index: int):
        name, label = self.samples[index]
        return open(self.root / name, "rb"), label

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self.samples[index][0]
        return Path(name).name if basename else name

    def _names(self) -> dict[str, int]:
        """Classes by the folder of their images where each has one of its own, else by number."""
        folders: dict[int, str] = {}
        for name, label in self.samples:
            if folders.setdefault(label, Path(name).parent.name) != Path(name).parent.name:
                return {str(label): label for label in range(max(folders) + 1)}
        if len(set(folders.values())) < len(folders):
            return {str(label): label for label in range(max(folders) + 1)}
        # A class without images keeps its number: ImageNet-22K's list has such.
        return {folders.get(label, str(label)): label for label in range(max(folders) + 1)}


@DATASETS.register_module()
class ImageDataset(Dataset):
    """Images by index: an ImageNet folder, tar files, or a list.

    An image that does not decode is named in the log and the next one takes its place.

    Args:
        root: the folder with a folder for every class, a ``.tar`` or a folder of them; with
            ``list_file``, the folder that the listed paths are below.
        transform: arguments of :func:`timm.data.create_transform`.
        list_file: a list of ``path<TAB>label``.
        num_classes: how many classes the config counts on; None takes what there are.
        classes: names in the order of their indices; None sorts the folders' names.
        unreadable_share: the share of all images that may fail to decode.

    Attributes:
        metainfo: ``classes``, what mmengine writes into checkpoints.

    Raises:
        ConfigError: no such folder, no images in it, or another number of classes.
    """

    def __init__(
        self,
        root: str,
        transform: dict[str, Any],
        list_file: str | None = None,
        num_classes: int | None = None,
        classes: list[str] | None = None,
        unreadable_share: float = 0.001,
    ):
        self.reader = _reader(root, list_file, classes)
        names = _class_names(self.reader)
        place = list_file or root
        if num_classes is not None and len(names) != num_classes:
            shown = ", ".join(names[:3])
            raise ConfigError(
                f"{place} has {len(names)} classes ({shown}, ...), the config {num_classes}: "
                "--num-classes, or another folder, is needed"
            )
        self.metainfo = {"classes": names}
        self.transform = create_transform(**transform)
        self.allowed = max(1, int(unreadable_share * len(self.reader)))
        # Shared with the loader's workers: each damaged file counts once, whoever meets it.
        self._unreadable = torch.zeros(len(self.reader), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """``(3, H, W)`` float32 normalised, its class, and the image's index.

        Raises:
            TooManyUnreadable: beyond the share of images that may fail, in this process and its
                workers.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        for offset in range(len(self)):
            found = (index + offset) % len(self)
            if self._unreadable[found]:
                continue
            try:
                file, label = self.reader[found]
                with file, Image.open(file) as opened:
                    image = to_rgb(opened)
            # A damaged file raises whatever its decoder meets first.
            except Exception as error:
                self._skip(found, error)
                continue
            return self.transform(image), label, found
        raise TooManyUnreadable("no image decodes")

    def filename(self, index: int) -> str:
        """The file's name without its folder."""
        return str(self.reader.filename(index, basename=True))

    def _skip(self, index: int, error: Exception) -> None:
        self._unreadable[index] = True
        name, count = self.reader.filename(index), int(self._unreadable.sum())
        _logger.warning(
            f"{name} cannot be read ({error}): left out, {count} so far, {self.allowed} allowed"
        )
        if count > self.allowed:
            raise TooManyUnreadable(
                f"{count} of {len(self)} images cannot be read, {name} for one: "
                "unreadable_share of the dataset allows more"
            )


@DATASETS.register_module()
class ImageStream(IterableDataset):
    """Images as they come out of WebDataset shards, by timm's reader.

    The reader shares the shards among processes and workers and shuffles them; a resumed run
    starts them anew.

    Args:
        root: the folder of the shards.
        name: timm's name of the data set, ``"wds/imagenet"``.
        split: timm's: ``"train"``, ``"validation"``, or a pattern of shards with their number of
            samples, ``"imagenet-train-{0000..1023}.tar|1281167"``.
        transform: arguments of :func:`timm.data.create_transform`.
        num_classes: how many classes the labels count.
        batch_size: images a process takes at a time; the reader makes epochs of whole batches.
        is_training: shuffle and repeat.
        seed: of the order of shards.
        classes: names in the order of their indices.

    Raises:
        ConfigError: no such folder, or ``webdataset`` is not installed.
    """

    def __init__(
        self,
        root: str,
        transform: dict[str, Any],
        num_classes: int,
        name: str = "wds/imagenet",
        split: str = "train",
        batch_size: int = 1,
        is_training: bool = False,
        seed: int = 42,
        classes: list[str] | None = None,
    ):
        if not Path(root).is_dir():
            raise ConfigError(f"no folder of shards at {root}")
        try:
            self.reader = create_reader(
                name,
                root=root,
                split=split,
                is_training=is_training,
                batch_size=batch_size,
                seed=seed,
            )
        except ImportError as error:
            raise ConfigError(f"{name}: {error}; pip install webdataset") from error
        except (FileNotFoundError, AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"{name} in {root}, split {split}: {error}") from error
        self.metainfo = {"classes": list(classes) if classes else _imagenet_names(num_classes)}
        self.transform = create_transform(**transform)

    def __iter__(self) -> Iterator[tuple[Tensor, int, int]]:
        for image, label in self.reader:
            if not isinstance(image, Image.Image):
                image = Image.open(image)
            # Nobody knows a sample's place in all shards.
            yield self.transform(to_rgb(image)), label, -1

    def __len__(self) -> int:
        return len(self.reader)

    def set_epoch(self, epoch: int) -> None:
        """Another order of the shards."""
        if hasattr(self.reader, "set_epoch"):
            self.reader.set_epoch(epoch)

    def filename(self, index: int) -> str:
        """Shards do not keep their names at hand."""
        return f"sample {index} of rank {get_rank()}"


def _reader(root: str, list_file: str | None, classes: list[str] | None) -> Reader:
    if list_file:
        return ListReader(root, list_file)
    path = Path(root)
    if not path.exists():
        raise ConfigError(f"no images at {root}: a folder with a folder for every class is needed")
    class_map = {name: index for index, name in enumerate(classes)} if classes else ""
    is_tar = path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar")))
    try:
        if is_tar and path.is_dir():
            from timm.data.readers.reader_image_in_tar import ReaderImageInTar

            return ReaderImageInTar(root, class_map=class_map)
        return create_reader("", root=root, class_map=class_map)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"no images in {root}: {error}") from error


def _class_names(reader: Reader) -> list[str]:
    indices = getattr(reader, "class_to_idx", None) or reader.class_name_to_idx
    return [name for name, _ in sorted(indices.items(), key=lambda entry: entry[1])]


def _imagenet_names(count: int) -> list[str]:
    from timm.data import ImageNetInfo

    subset = {1000: "imagenet-1k", 21841: "imagenet-22k"}.get(count)
    return ImageNetInfo(subset).label_names() if subset else [str(i) for i in range(count)]
