import json

import numpy as np
import pytest
from PIL import Image
from small_videos import grey, write_video

from revit_kernels.data import motion
from revit_kernels.data.video_sets import open_clips
from revit_kernels.data.videos import Sampling


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, whose clips get brighter and darker."""
    root = tmp_path_factory.mktemp("sets")
    for split, count in (("train", 3), ("test", 2)):
        for name, step in (("brighter", 10), ("darker", -10)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                frames = [grey(128 + step * (t - 4) + i, (32, 32)) for t in range(8)]
                write_video(root / split / name / f"{name}{i}.mp4", frames)
    return root


def brighter(images, index: int) -> bool:
    pixels = images.pixels(index).astype(float)
    return pixels[-1].mean() > pixels[0].mean()


def right(images) -> bool:
    return all(brighter(images, i) == (images.classes[t] == "brighter") for i, t in enumerate(images.targets))


def test_folder(folder):
    images = open_clips(str(folder), Sampling(4), "test")
    assert images.classes == ("brighter", "darker") and len(images) == 4
    assert images.pixels(0).shape == (4, 32, 32, 3) and right(images)
    assert right(images.subset([3, 0]).reduced(lambda size: (8, 8)))


def test_tables(folder, tmp_path):
    rows = [f"{name}/{name}{i}.mp4" for name in ("brighter", "darker") for i in range(3)]
    table = tmp_path / "list.csv"
    table.write_text("path,label\n" + "".join(f"{folder}/train/{row},{row.split('/')[0]}\n" for row in rows))
    assert right(open_clips(str(table), Sampling(4)))
    plain = tmp_path / "train.txt"
    plain.write_text("".join(f"{row} {int(row.startswith('darker'))}\n" for row in rows))
    images = open_clips(f"{plain}#videos={folder / 'train'}", Sampling(4))
    assert images.classes == ("0", "1") and [brighter(images, i) for i in range(6)] == [True] * 3 + [False] * 3


def test_kinetics(folder, tmp_path):
    videos = tmp_path / "videos" / "brighter"
    videos.mkdir(parents=True)
    for name, of in (("abc_000003_000013", "brighter"), ("-x_y", "darker")):
        (videos / f"{name}.mp4").write_bytes((folder / "train" / of / f"{of}0.mp4").read_bytes())
    table = tmp_path / "k400.csv"
    head = "label,youtube_id,time_start,time_end,split\n"
    table.write_text(head + "brighter,abc,3,13,train\ndarker,-x_y,0,10,train\ndarker,gone,0,10,train\n")
    with pytest.warns(UserWarning, match="lacks 1 of the 3 videos"):
        images = open_clips(f"{table}#videos={tmp_path / 'videos'}", Sampling(4))
    assert list(images.keys) == ["abc_000003_000013", "-x_y_000000_000010"] and right(images)
    table.write_text(head + "brighter,gone,3,13,train\n")
    with pytest.raises(ValueError, match=r"has none of the 1 videos .* such as gone_000003_000013.mp4"):
        open_clips(str(table), Sampling(4))


def test_something_something(folder, tmp_path):
    names = {"Making [something] brighter": "0", "Making [something] darker": "1"}
    numbers = {name.replace("[", "").replace("]", ""): number for name, number in names.items()}
    (tmp_path / "something-something-v2-labels.json").write_text(json.dumps(numbers))
    rows = [{"id": str(7 + i), "template": name, "label": "", "placeholders": []} for i, name in enumerate(names)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    for i, step in enumerate((10, -10)):
        write_video(tmp_path / f"{7 + i}.webm", [grey(128 + step * (t - 4), (32, 32)) for t in range(8)])
    images = open_clips(str(tmp_path / "train.json"), Sampling(4))
    assert images.classes == tuple(numbers) and list(images.targets) == [0, 1]
    assert [brighter(images, i) for i in (0, 1)] == [True, False]
    rows[0]["template"] = "Eating [something]"
    (tmp_path / "train.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="do not fit: there is no 'Eating something'"):
        open_clips(str(tmp_path / "train.json"), Sampling(4))


@pytest.mark.parametrize(
    "source, why",
    [
        ("nowhere", "there is no set of videos 'nowhere'"),
        ("cifar10", "there is no set of videos 'cifar10'"),
        ("{folder}/train/brighter", "no folders of videos"),
        ("{tmp}/empty.txt", "has no videos"),
        ("{tmp}/wrong.txt", "line 1 of .* is no path and number"),
        ("{tmp}/wrong.json", "is no list of Something-Something|cannot be read"),
        ("{tmp}/wrong.txt#videos=/nowhere", "there is no folder /nowhere"),
        ("{tmp}/wrong.txt#frames=3", "behind the # may stand videos="),
    ],
)
def test_refuses(folder, tmp_path, source, why):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "wrong.txt").write_text("only words\n")
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(ValueError, match=why):
        open_clips(source.format(folder=folder, tmp=tmp_path), Sampling(4))


def test_broken_video_is_named(folder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"a/x.mp4 cannot be used: it is not a video"):
        open_clips(str(tmp_path), Sampling(4)).pixels(0)


# ---------------------------------------------------------------------- camera motion


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Noise that is smooth enough to be followed."""
    rng, found = np.random.default_rng(0), []
    for i in range(3):
        path = tmp_path_factory.mktemp("photographs") / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize((400, 300), Image.BICUBIC).save(path)
        found.append(path.read_bytes())
    return found


def shift(first, last) -> np.ndarray:
    """(down, right) in pixels that the picture moved, by phase correlation."""
    spectrum = np.fft.fft2(first.mean(-1)).conj() * np.fft.fft2(last.mean(-1))
    peak = np.fft.ifft2(spectrum / (np.abs(spectrum) + 1e-9)).real
    found = np.array(np.unravel_index(peak.argmax(), peak.shape))
    return np.where(found > np.array(peak.shape) / 2, found - peak.shape, found)


def test_motion_is_what_the_class_says(photographs):
    clips = motion.MotionSet("m", photographs, [], 60, 4, 0, side=64)
    assert clips.classes == motion.CLASSES
    for i, target in enumerate(clips.targets):
        name, pixels = clips.classes[target], clips.pixels(i).astype(float)
        down, right = shift(pixels[0], pixels[1])
        if name == "static":
            assert abs(down) <= 1 and abs(right) <= 1
        if name in ("pan left", "pan right"):  # the picture goes the other way
            assert abs(down) <= 1 and right * (1 if name == "pan left" else -1) >= 0
        if name in ("tilt up", "tilt down"):
            assert abs(right) <= 1 and down * (1 if name == "tilt up" else -1) >= 0
    moved = [abs(shift(*clips.pixels(i).astype(float)[[0, 3]])).max() for i in range(60) if clips.targets[i] < 4]
    assert max(moved) > 5


def test_zoom_and_rotation():
    """The window against the directions of its own definition, at the ends of a clip."""
    moment = np.array([0.0, 1.0])
    paths = {name: motion.window(name, np.random.default_rng(0), moment) for name in motion.CLASSES}
    assert paths["zoom in"].side[1] < paths["zoom in"].side[0]
    assert paths["zoom out"].side[1] > paths["zoom out"].side[0]
    assert paths["rotate cw"].angle[1] > 0 > paths["rotate ccw"].angle[1]
    corner = np.zeros((100, 100, 3), np.uint8)
    corner[:50, 50:] = 255  # above, on the right
    found = motion._cut(Image.fromarray(corner), 50, 50, 40, np.pi / 2, 20)
    assert found[:10, :10].mean() > 250 and found[10:].mean() < 5  # turned clockwise, the camera sees it on the left


def test_motion_is_seeded_and_stays_inside(photographs, tmp_path):
    one, other = (motion.MotionSet("m", photographs, [], 20, 4, 0, side=32) for _ in range(2))
    assert all(np.array_equal(one.pixels(i), other.pixels(i)) for i in (3, 7, 19))
    white = tmp_path / "white.png"
    Image.new("RGB", (90, 60), "white").save(white)
    clips = motion.MotionSet("m", [white.read_bytes()], [], 40, 4, 0, side=16)
    assert min(clips.pixels(i).min() for i in range(40)) >= 250  # outside of the picture it is black


def test_motion_goes_on_from_a_number(photographs):
    whole = motion.MotionSet("m", photographs, [], 16, 4, 0, side=16)
    rest = motion.MotionSet("m", photographs, [], 4, 4, 0, side=16, first=12)
    assert list(rest.keys) == list(whole.keys)[12:] and np.array_equal(rest.targets, whole.targets[12:])
    assert all(np.array_equal(rest.pixels(i), whole.pixels(12 + i)) for i in range(4))


def test_motion_is_drawn_no_larger_than_it_is_seen(photographs):
    clips = motion.MotionSet("m", photographs, [], 1, 2, 0, side=32)
    small = clips.reduced(lambda size: (16, 12))
    assert clips.pixels(0).shape == (2, 32, 32, 3) and small.pixels(0).shape == (2, 16, 16, 3)
    averaged = clips.pixels(0).reshape(2, 16, 2, 16, 2, 3).mean((2, 4))
    assert np.abs(averaged - small.pixels(0)).mean() < 3  # of 255: the same picture
    assert clips.reduced(lambda size: (64, 64)).side == 32


def test_a_mirrored_window_is_a_window_onto_the_mirror_image():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8))
    turned = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    expected = motion._cut(turned, 40, 30, 25, 0.4, 16)
    assert np.array_equal(motion._cut(picture, 40, 30, 25, 0.4, 16, mirrored=True), expected)


def test_footage(photographs, tmp_path):
    video = write_video(tmp_path / "a.mp4", [grey(40 + 4 * i, (60, 80)) for i in range(40)]).read_bytes()
    clips = motion.MotionSet("m", photographs[:1], [video], 40, 4, 0, side=16)
    grew = [clips.pixels(i)[-1].mean() - clips.pixels(i)[0].mean() > 20 for i in range(40)]
    assert 0 < sum(grew) < 20


def test_motion_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match="revit data groceries"):
        open_clips("motion", Sampling(4), root=tmp_path)
    with pytest.raises(ValueError, match="open them one by one"):
        open_clips("motion", Sampling(4), "all", root=tmp_path)
    with pytest.raises(ValueError, match="first must be a whole number, got 'x'"):
        open_clips("motion#first=x", Sampling(4), root=tmp_path)
