"""The data sets that `--dataset` names without a download, made in memory."""

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features

from ..support.errors import DataError
from .cats import CREDIT, cats
from .options import DataOptions


def digits(options: DataOptions) -> dict[str, Dataset]:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, as "train"; their levels 0..16 become round(v * 255 / 16)."""
    from sklearn.datasets import load_digits

    if options.dataset_config is not None:
        raise DataError(f"--dataset_config {options.dataset_config!r}: the digits have no configurations; leave it out.")
    found = load_digits()
    features = Features({"image": datasets.Array2D((8, 8), "uint8"), "label": ClassLabel(names=list("0123456789"))})
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    return {"train": Dataset.from_dict({"image": list(images), "label": found.target.tolist()}, features=features)}


BUNDLED = {"cats": cats, "digits": digits}
CREDITS = {"cats": CREDIT}  # to be given with what is made of the data
