"""IDX files, by the description of their format."""

import numpy as np

NAMES = {
    ("train", "images"): "train-images-idx3-ubyte", ("train", "labels"): "train-labels-idx1-ubyte",
    ("val", "images"): "t10k-images-idx3-ubyte", ("val", "labels"): "t10k-labels-idx1-ubyte",
}  # fmt: skip


def packed(array: np.ndarray) -> bytes:
    """As the format is described: two zeros, the type, the dimensions, their sizes in big-endian, the bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()
