"""MNIST: 60,000 handwritten digits, 28x28, grey (LeCun, Cortes, Burges). The files are part of the package."""

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np

from gan_dist.errors import DataError, EnvironmentFault

NUM_CLASSES = 10

# MD5 of the unpacked files: the canonical content. A checksum against damage, not against an attacker.
_MD5 = {
    "train-images-idx3-ubyte.gz": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte.gz": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte.gz": "27ae3e4e09519cfbb04c329615203637",
}
# Bytes of header before the content: magic number and sizes, four bytes each.
_HEADER = {"images": 16, "labels": 8}


def load(split: str, folder: str = "") -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of a split.

    Args:
        split: `train` (60,000) or `t10k` (10,000, the test set).
        folder: Where the four files are; empty for those in the package.

    Returns:
        `[N, 28, 28, 1]` uint8, and `[N]` int32.

    Raises:
        EnvironmentFault: If the folder or a file in it is missing or cannot be read.
        DataError: If a file's content is not MNIST's.
    """
    home = Path(folder) if folder else Path(__file__).parent / "mnist_files"
    pixels = _content(home, f"{split}-images-idx3-ubyte.gz", _HEADER["images"])
    labels = _content(home, f"{split}-labels-idx1-ubyte.gz", _HEADER["labels"])
    return pixels.reshape(-1, 28, 28, 1), labels.astype(np.int32)


def _content(home: Path, name: str, header: int) -> np.ndarray:
    path = home / name
    way_out = "Take --data_dir out to use the files in the package, or install the package again."
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"--data_dir: {path} is truncated or damaged ({error}). {way_out}") from error
    except OSError as error:
        raise EnvironmentFault(f"--data_dir={home}: {name} cannot be read: {error.strerror}. {way_out}") from error
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != _MD5[name]:
        raise DataError(f"--data_dir: {path} is not MNIST's: MD5 {found}, expected {_MD5[name]}. {way_out}")
    return np.frombuffer(content, np.uint8, offset=header)
