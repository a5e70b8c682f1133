import numpy as np
import pytest

from pipeline.embedded import digits
from pipeline.sources.base import UnreadableImageError
from pipeline.sources.digits import DigitsSource
from pipeline.sources.images import decode
from tests.pipeline.sources.pictures import LIMIT


def test_the_train_split_pixel_for_pixel():
    images, labels, names = digits.load("train")
    source = DigitsSource()
    rows = source.index().to_pylist()
    assert [(row["key"], row["label"]) for row in rows] == sorted(zip(names, labels.tolist(), strict=True))
    for row in rows[::100]:
        rgb = decode(source.read(row["location"], row["offset"], row["size"]), max_pixels=LIMIT)
        assert np.array_equal(rgb, images[row["offset"]])
    assert not {row["key"] for row in rows} & set(digits.load("test")[2])
    with pytest.raises(UnreadableImageError, match="not one of"):
        source.read("digit-0000x", 0, None)
