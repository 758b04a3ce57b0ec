"""Video files, changed in their bytes, cut, and spliced."""

import random
import tempfile
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np

from revit_kernels.data.images import ImageError
from revit_kernels.data.videos import Sampling, decode_clip

from .images import changed

MADE = {}
SAMPLINGS = (Sampling(4), Sampling(2, stride=3), Sampling(8, views=2), Sampling(1))


def prepare():
    import av
    from small_videos import CODECS, numbered, write_video

    warnings.simplefilter("ignore")
    av.logging.set_level(av.logging.PANIC)
    folder = MADE["folder"] = tempfile.TemporaryDirectory(prefix="revit_campaign_")
    MADE["path"] = Path(folder.name)
    frames = [numbered(i) for i in range(30)]
    for suffix in CODECS:
        path = MADE["path"] / f"whole{suffix}"
        write_video(path, frames, rotation=90 if suffix == ".mov" else None, sound=suffix == ".mkv")
        MADE[suffix] = path.read_bytes()
    MADE["suffixes"] = tuple(CODECS)


def attempt(seed: int) -> str:
    r = random.Random(seed)
    suffix, sampling = r.choice(MADE["suffixes"]), r.choice(SAMPLINGS)
    data, whole = MADE[suffix], r.random() < 0.05
    if not whole:
        part = r.choice((200, 2000, len(data)))
        data = changed(r, data[:part]) + data[part:]
    target = r.choice((None, lambda size: (24, 32), lambda size: (1, 1)))
    path = MADE["path"] / f"x{suffix}"
    if r.random() < 0.5:
        source = BytesIO(data)
    else:
        path.write_bytes(data)
        source = str(path)
    try:
        found = decode_clip(source, sampling, target)
    except ImageError as error:
        assert not whole, f"a video that is whole is refused: {error}"
        assert str(error).strip() and "\n" not in str(error), repr(error)
        return "refused"
    assert found.pixels.dtype == np.uint8 and found.pixels.shape[:2] == (sampling.views, sampling.frames)
    assert found.pixels.shape[4] == 3 and min(found.pixels.shape) > 0 and min(found.size) > 0
    assert found.times.shape == (sampling.views, sampling.frames)
    return "decoded"
