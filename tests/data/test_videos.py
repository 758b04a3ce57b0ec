import io

import av
import numpy as np
import pytest
import small_videos
from small_videos import grey, numbered, numbers_of, write_video

from revit_kernels.data import videos
from revit_kernels.data.images import ImageError
from revit_kernels.data.videos import SAME, Sampling, decode_clip


def shown(sampling: Sampling, times, duration: float, rate: float) -> list[int]:
    """The last frame that began by each of the sampled times."""
    wanted = sampling.times(duration, rate).ravel()
    return [int(np.searchsorted(times, time + SAME, "right")) - 1 for time in wanted]


@pytest.mark.parametrize("suffix", small_videos.CODECS)
@pytest.mark.parametrize("sampling", [Sampling(8), Sampling(5, 3), Sampling(4, 5, 3), Sampling(3, None, 2)], ids=str)
def test_frames_are_those_on_the_screen(tmp_path, suffix, sampling):
    path = write_video(tmp_path / f"a{suffix}", [numbered(i) for i in range(40)])
    clip = decode_clip(str(path), sampling)
    assert clip.pixels.shape == (sampling.views, sampling.frames, 48, 64, 3)
    assert clip.size == (48, 64)
    assert numbers_of(clip.pixels) == shown(sampling, np.arange(40) / 10, 4.0, 10.0)
    again = decode_clip(io.BytesIO(path.read_bytes()), sampling)
    assert np.array_equal(again.pixels, clip.pixels)


def test_variable_rate(tmp_path):
    times = [0, 0.1, 0.2, 0.3, 2.0, 2.1, 3.9]
    path = write_video(tmp_path / "a.mkv", [numbered(i) for i in range(7)], times=times)
    clip = decode_clip(str(path), Sampling(8))
    assert numbers_of(clip.pixels) == [int(np.searchsorted(times, time + SAME, "right")) - 1 for time in clip.times[0]]


def test_seeks(tmp_path, monkeypatch):
    """Far frames are found without decoding those between, and are the same frames."""
    path = write_video(tmp_path / "long.mp4", (grey(20 + i // 10) for i in range(2000)), rate=5, gop=10)
    decoded, original = [], videos._Video._decoded
    monkeypatch.setattr(videos._Video, "_decoded", lambda self: (decoded.append(1) or x for x in original(self)))
    found = decode_clip(str(path), Sampling(4)).pixels
    assert len(decoded) < 100
    monkeypatch.setattr(videos, "FAR", float("inf"))
    assert np.array_equal(decode_clip(str(path), Sampling(4)).pixels, found)
    assert len(decoded) > 1500


def test_one_keyframe_is_decoded_once(tmp_path, monkeypatch):
    path = write_video(tmp_path / "long.mp4", (grey(20 + i // 10) for i in range(1000)), rate=5, gop=1000)
    decoded, original = [], videos._Video._decoded
    monkeypatch.setattr(videos._Video, "_decoded", lambda self: (decoded.append(1) or x for x in original(self)))
    decode_clip(str(path), Sampling(8))
    assert len(decoded) <= 1000


@pytest.mark.parametrize("rotation, side", [(90, "left"), (-90, "right"), (180, "bottom"), (0, "top")])
def test_rotation(tmp_path, rotation, side):
    """A video whose upper half is dark, turned counter-clockwise."""
    picture = np.concatenate([grey(20, (24, 64)), grey(200, (24, 64))])
    path = write_video(tmp_path / "a.mp4", [picture] * 3, rotation=rotation)
    clip = decode_clip(str(path), Sampling(2))
    found = clip.pixels[0, 0].mean(-1)
    assert clip.size == found.shape == ((64, 48) if rotation in (90, -90) else (48, 64))
    halves = {"left": found[:, :20], "right": found[:, -20:], "top": found[:20], "bottom": found[-20:]}
    assert min(halves, key=lambda name: halves[name].mean()) == side


def test_square_pixels(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.sample_aspect_ratio = stream.codec_context.sample_aspect_ratio = 2
        for frame in [numbered(i) for i in range(3)]:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    assert decode_clip(str(path), Sampling(2)).size == (48, 128)


def test_reduced_while_decoded(tmp_path):
    path, held = write_video(tmp_path / "a.mp4", [grey(100, (480, 640))] * 3), []
    clip = decode_clip(str(path), Sampling(4), lambda size: (56, 56), held.append)
    assert clip.size == (480, 640) and clip.pixels.shape == (1, 4, 112, 149, 3)
    assert held == [clip.pixels.size]


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_frames_than_asked_for(tmp_path, count):
    clip = decode_clip(str(write_video(tmp_path / "a.mp4", [numbered(i) for i in range(count)])), Sampling(4))
    assert numbers_of(clip.pixels) == [0, 0, count - 1, count - 1]


def test_what_is_wrong_is_one_sentence(tmp_path):
    def refused(name: str) -> str:
        with pytest.raises(ImageError) as error:
            decode_clip(str(tmp_path / name), Sampling(8))
        assert str(tmp_path) not in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    def cut(name: str, share: float) -> None:
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"cut_{name}").write_bytes(data[: int(share * len(data))])

    write_video(tmp_path / "late.mp4", [numbered(i) for i in range(40)])
    write_video(tmp_path / "early.mp4", [numbered(i) for i in range(40)], options={"movflags": "faststart"})
    write_video(tmp_path / "a.webm", [numbered(i) for i in range(40)])
    write_video(tmp_path / "a.avi", [numbered(i) for i in range(40)])
    for name, share in (("late.mp4", 0.5), ("early.mp4", 0.7), ("a.webm", 0.5), ("a.avi", 0.1)):
        cut(name, share)
    assert "without its index" in refused("cut_late.mp4")
    assert "cut off: it ends after" in refused("cut_early.mp4")
    assert "cut off: it ends after" in refused("cut_a.webm")
    assert "cut off near its beginning" in refused("cut_a.avi")
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        small_videos.write_sound(file)
    assert refused("sound.mp4") == "it has no video, only sound"
    (tmp_path / "text.mp4").write_text("this is no video\n" * 20)
    (tmp_path / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n")
    assert refused("text.mp4") == refused("playlist.mp4") == "it is not a video, or of a format that is not supported"
    (tmp_path / "empty.mp4").touch()
    assert refused("empty.mp4") == "the file is empty"
    assert refused("none.mp4") == "there is no such file"
    assert refused(".") == "it is a folder"


def test_damage_is_passed_over_or_said(tmp_path):
    data = bytearray(write_video(tmp_path / "a.mp4", [numbered(i) for i in range(40)], gop=4).read_bytes())
    start = data.index(b"mdat") + 600
    rng = np.random.default_rng(0)
    for i in range(start, len(data) - 1500, 37):
        data[i] = rng.integers(256)
    try:
        clip = decode_clip(io.BytesIO(bytes(data)), Sampling(8))
    except ImageError:
        return
    assert clip.pixels.shape == (1, 8, 48, 64, 3)


def test_sound_that_lasts_longer(tmp_path):
    path = write_video(tmp_path / "a.mkv", [numbered(i) for i in range(3)], sound=True)
    assert numbers_of(decode_clip(str(path), Sampling(3)).pixels)[-1] == 2


def test_sampling_refuses():
    for wrong in ({"frames": 0}, {"frames": 4, "stride": 0}, {"frames": 4, "views": 0}, {"frames": 4, "stride": -1}):
        with pytest.raises(ValueError, match="at least 1"):
            Sampling(**wrong)
