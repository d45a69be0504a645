"""Classification data sets: folders, tar files, lists and WebDataset shards."""

import json
import logging
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.dist import get_rank
from mmengine.registry import DATASETS
from PIL import Image
from timm.data import create_transform
from timm.data.readers import create_reader
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from backbones.checkpoints import imagenet_classes
from dense.images import Skipped, TooManyUnreadable, to_rgb
from dense.openmmlab.config import ConfigError

_logger = logging.getLogger(__name__)


class ListReader(Reader):
    """timm reader of a text file with lines ``path<TAB>label``, or of a JSON list of pairs.

    Args:
        root: folder that the paths are relative to.
        list_file: path of the list; labels are class indices from 0. Swin's 22K list is JSON,
            ``[[path, label], ...]``, which is recognised by its content.

    Raises:
        ConfigError: the file does not exist, is empty, or has a malformed entry.
    """

    def __init__(self, root: str, list_file: str):
        super().__init__()
        self.root = Path(root)
        path = Path(list_file)
        if not path.is_file():
            raise ConfigError(f"no list of images at {list_file}")
        text = path.read_text()
        is_json = re.match(r"\s*\[\s*[\[\]]", text)
        self.samples = list((_json_pairs if is_json else _line_pairs)(text, list_file))
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
        """Class names: the images' folder if it is unique to each class, else the index."""
        pairs = {(label, Path(name).parent.name) for name, label in self.samples}
        folders = dict(pairs)
        count = max(folders) + 1
        if not len(pairs) == len(folders) == len(set(folders.values())):
            folders = {}
        # ImageNet-22K's list has classes without images, which are named by index.
        return {folders.get(label, str(label)): label for label in range(count)}


def _line_pairs(text: str, list_file: str) -> Iterator[tuple[str, int]]:
    for number, line in enumerate(text.splitlines(), start=1):
        name, tab, label = line.rpartition("\t")
        if not tab or not label.strip().isdigit():
            raise ConfigError(
                f"{list_file}, line {number}: {line!r} is not a path, a tab and a class index"
            )
        yield name, int(label)


def _json_pairs(text: str, list_file: str) -> Iterator[tuple[str, int]]:
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{list_file} is not JSON: {error}") from error
    for number, entry in enumerate(entries, start=1):
        match entry:
            case [str() as name, label] if str(label).isdigit():
                yield name, int(label)
            case _:
                raise ConfigError(
                    f"{list_file}, entry {number}: {entry!r} is not a path and a class index"
                )


@DATASETS.register_module()
class ImageDataset(Dataset):
    """Image classification data set of class folders, tar files, or a list.

    An image that cannot be decoded is logged and replaced by the next one.

    >>> ImageDataset("photos/train", transform=dict(input_size=224, is_training=True))

    Args:
        root: a folder with a subfolder per class, a ``.tar`` or a folder of ``.tar`` files; with
            ``list_file``, the folder that the listed paths are relative to.
        transform: arguments of :func:`timm.data.create_transform`.
        list_file: a file with lines ``path<TAB>label``, or JSON: see :class:`ListReader`.
        num_classes: the expected number of classes; None skips the check.
        classes: class names, by index; None sorts the folder names.
        unreadable_share: fraction of the images that may fail to decode; at least one may.

    Attributes:
        metainfo: ``{"classes": names}``, which mmengine saves in checkpoints.

    Raises:
        ConfigError: ``root`` does not exist, has no images, or another number of classes.
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
                "set --num-classes or take another folder"
            )
        self.metainfo = {"classes": names}
        self.transform = create_transform(**transform)
        self._skipped = Skipped(len(self.reader), unreadable_share)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """The normalised image ``(3, H, W)``, float32, its class index, and the image's index.

        Raises:
            TooManyUnreadable: too many images failed in this process and its workers.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        for offset in range(len(self)):
            found = (index + offset) % len(self)
            try:
                file, label = self.reader[found]
                with file, Image.open(file) as opened:
                    image = to_rgb(opened)
            # The type of exception depends on the decoder and the damage.
            except Exception as error:
                self._skipped.note(self.reader.filename(found), error)
                continue
            return self.transform(image), label, found
        raise TooManyUnreadable("no image decodes")

    def filename(self, index: int) -> str:
        """The file name without its folder."""
        return str(self.reader.filename(index, basename=True))


@DATASETS.register_module()
class ImageStream(IterableDataset):
    """Iterable data set of WebDataset shards, read by timm.

    timm's reader distributes the shards among processes and workers and shuffles them. A resumed
    run restarts the current epoch.

    Args:
        root: the folder of the shards.
        transform: arguments of :func:`timm.data.create_transform`.
        num_classes: number of classes.
        name: timm's name of the data set, ``"wds/<name>"``.
        split: ``"train"``, ``"validation"``, or shards with their number of samples, as timm has
            it: ``"imagenet-train-{0000..1023}.tar|1281167"``.
        batch_size: images per process and batch; an epoch has whole batches.
        is_training: shuffle and repeat.
        seed: seed of the shuffling.
        classes: class names, by index; None takes ImageNet's for 1000 or 21841 classes, else the
            indices.

    Raises:
        ConfigError: the folder does not exist, timm cannot read the split, or ``webdataset`` is not
            installed.
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
        names = classes or imagenet_classes(num_classes) or map(str, range(num_classes))
        self.metainfo = {"classes": list(names)}
        self.transform = create_transform(**transform)

    def __iter__(self) -> Iterator[tuple[Tensor, int, int]]:
        for image, label in self.reader:
            if not isinstance(image, Image.Image):
                image = Image.open(image)
            # -1: a sample's index over all shards is unknown.
            yield self.transform(to_rgb(image)), label, -1

    def __len__(self) -> int:
        return len(self.reader)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which seeds the order of the shards."""
        if hasattr(self.reader, "set_epoch"):
            self.reader.set_epoch(epoch)

    def filename(self, index: int) -> str:
        """A label for messages; shards have no file names by index."""
        return f"sample {index} of rank {get_rank()}"


def _reader(root: str, list_file: str | None, classes: list[str] | None) -> Reader:
    if list_file:
        return ListReader(root, list_file)
    path = Path(root)
    if not path.exists():
        raise ConfigError(f"no images at {root}: expected a folder with a subfolder per class")
    class_map = {name: index for index, name in enumerate(classes)} if classes else ""
    try:
        if path.is_dir() and any(path.glob("*.tar")):
            return ReaderImageInTar(root, class_map=class_map)
        return create_reader("", root=root, class_map=class_map)
    except (RuntimeError, AssertionError, OSError, tarfile.TarError) as error:
        raise ConfigError(f"no images in {root}: {error}") from error


def _class_names(reader: Reader) -> list[str]:
    indices = getattr(reader, "class_to_idx", None) or reader.class_name_to_idx
    return [name for name, _ in sorted(indices.items(), key=lambda entry: entry[1])]
