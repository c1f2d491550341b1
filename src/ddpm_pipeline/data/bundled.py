"""The data sets that `--dataset` names without a download, made in memory from scikit-learn."""

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features


def digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey; their levels 0..16 become round(v * 255 / 16)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    features = Features({"image": datasets.Array2D((8, 8), "uint8"), "label": ClassLabel(names=list("0123456789"))})
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    return Dataset.from_dict({"image": list(images), "label": found.target.tolist()}, features=features)


BUNDLED = {"digits": digits}
