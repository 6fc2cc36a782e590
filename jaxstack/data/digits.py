"""scikit-learn's digits: 1,797 images of 8x8 pixels (Alpaydin and Kaynak, 1998), split by seed."""

from typing import Literal

import numpy as np

from jaxstack.core.errors import UserError

Split = Literal["train", "valid", "test"]
SHARES = {"train": (0.0, 0.7), "valid": (0.7, 0.85), "test": (0.85, 1.0)}


def digits(split: Split, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 8, 8, 1] uint8 in 0..16 and labels [N] int32 of a part of a random split.

    Args:
        split: "train" has 70% of the images, "valid" and "test" 15% each.
        seed: of the split.

    Raises:
        UserError: for an unknown part, or where scikit-learn, which holds the images, is missing.
    """
    if split not in SHARES:
        raise UserError(f"split={split!r}: expected one of {', '.join(SHARES)}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise UserError("digits: scikit-learn is missing; pip install 'jaxstack[data]'") from e
    x, y = (np.asarray(part) for part in load_digits(return_X_y=True))
    order = np.random.default_rng(seed).permutation(len(x))
    low, high = (round(share * len(x)) for share in SHARES[split])
    rows = order[low:high]
    return x[rows].astype(np.uint8).reshape(-1, 8, 8, 1), y[rows].astype(np.int32)
