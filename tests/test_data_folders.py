"""A folder per class: which folder is which class, what happens to a picture, and what is refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unbackdoor.data.folders import class_order, load_folder, natural
from unbackdoor.data.pictures import to_pixels
from unbackdoor.errors import ConfigError, DataError

SIDE = 4


def picture(colour: int | tuple[int, ...] = (10, 20, 30), mode: str = "RGB", size: int = SIDE) -> Image.Image:
    return Image.new(mode, (size, size), colour)


def put(path: Path, image: Image.Image | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path)
    return path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    put(tmp_path / "cat" / "a.png", picture((255, 0, 0)))
    put(tmp_path / "dog" / "b.png", picture((0, 255, 0)))
    return tmp_path


def test_names_give_labels_in_natural_order_and_pixels_are_kept(two: Path) -> None:
    loaded = load_folder(two)
    samples = loaded.samples
    assert samples.class_names == ("cat", "dog")
    assert samples.labels.tolist() == [0, 1]
    assert samples.inputs.dtype == torch.uint8
    assert samples.inputs.shape == (2, 3, SIDE, SIDE)
    assert samples.inputs[0, :, 0, 0].tolist() == [255, 0, 0]
    assert loaded.notes == ()


def test_every_suffix_in_any_case_nested_and_not_hidden(tmp_path: Path) -> None:
    names = ["a.PNG", "b.jpg", "c.JPEG", "d.bmp", "e.webp", "f.gif", "g.tif", "h.ppm", "deep/er/i.Tiff"]
    for name in names:
        put(tmp_path / "0" / name)
    put(tmp_path / "1" / "x.png")
    put(tmp_path / "1" / ".hidden.png")
    put(tmp_path / "1" / ".cache" / "y.png")
    put(tmp_path / ".git" / "z.png")
    (tmp_path / "1" / "notes.txt").write_text("no picture")
    assert load_folder(tmp_path).samples.counts().tolist() == [len(names), 1]


def test_integer_names_are_the_indices_so_that_absent_classes_keep_their_places(tmp_path: Path) -> None:
    for name in ("10", "2", "007"):
        put(tmp_path / name / "a.png")
    loaded = load_folder(tmp_path, num_classes=12)
    assert loaded.samples.labels.tolist() == [2, 7, 10]
    assert loaded.samples.num_classes == 12
    assert any("no sample of class 0, class 1, class 3" in n for n in loaded.notes)
    assert any("fewer samples (3) than classes (12)" in n for n in loaded.notes)
    assert load_folder(tmp_path).samples.num_classes == 11


def test_natural_order_is_noted_where_the_alphabet_differs(tmp_path: Path) -> None:
    for name in ("class10", "class2", "class1"):
        put(tmp_path / name / "a.png")
    loaded = load_folder(tmp_path)
    assert loaded.samples.class_names == ("class1", "class2", "class10")
    assert any("ImageFolder numbers them alphabetically (class1, class10, class2)" in n for n in loaded.notes)
    assert natural("x9y") < natural("x10")


@pytest.mark.parametrize("form", ["list", "txt", "json list", "json mapping"])
def test_given_order_of_classes(two: Path, tmp_path_factory: pytest.TempPathFactory, form: str) -> None:
    names = ["dog", "bird", "cat"]
    folder = tmp_path_factory.mktemp("names")
    classes: list[str] | Path = names
    if form == "txt":
        classes = folder / "names.txt"
        classes.write_text("dog\nbird\n\ncat\n")
    elif form.startswith("json"):
        classes = folder / "names.json"
        classes.write_text(json.dumps(names if form == "json list" else {"cat": 2, "dog": 0, "bird": 1}))
    samples = load_folder(two, classes=classes).samples
    assert samples.class_names == ("dog", "bird", "cat")
    assert samples.labels.tolist() == [0, 2]
    assert samples.inputs[0, 1, 0, 0] == 255  # the dog's green


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1", "no JSON"),
        ('{"a": 0, "b": 2}', "0..1"),
        ("3", "JSON list"),
        ('["a", "a"]', "more than once"),
        ("[]", "0 "),
    ],
)
def test_bad_class_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "names.json"
    file.write_text(content)
    with pytest.raises(DataError, match=re.escape(message)):
        class_order(file)


def test_missing_empty_and_misplaced(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is empty"):
        load_folder(tmp_path / "empty")
    file = put(tmp_path / "flat" / "a.png")
    with pytest.raises(DataError, match="is a file"):
        load_folder(file)
    with pytest.raises(DataError, match=r"1 images \(a.png\) but no class folders"):
        load_folder(tmp_path / "flat")
    (tmp_path / "hollow" / "a").mkdir(parents=True)
    (tmp_path / "hollow" / "b").mkdir()
    with pytest.raises(DataError, match="holds no picture: its class folders a, b are empty"):
        load_folder(tmp_path / "hollow")
    put(tmp_path / "split" / "train" / "a" / "x.png")
    put(tmp_path / "split" / "test" / "a" / "x.png")
    with pytest.raises(DataError, match="holds the splits test, train"):
        load_folder(tmp_path / "split")


def test_empty_class_folder_keeps_its_place_and_loose_images_are_noted(two: Path) -> None:
    (two / "crow").mkdir()
    put(two / "loose.png")
    loaded = load_folder(two)
    assert loaded.samples.class_names == ("cat", "crow", "dog")
    assert loaded.samples.labels.tolist() == [0, 2]
    assert "no sample of class 1 (crow)" in loaded.notes
    assert any("loose.png" in n for n in loaded.notes)


def test_one_class_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "3" / "a.png")
    with pytest.raises(DataError, match=r"all 1 samples are of one class \(class 3\)"):
        load_folder(tmp_path, num_classes=10)
    put(tmp_path / "named" / "cat" / "a.png")
    with pytest.raises(DataError, match=r"one class folder \(cat\)"):
        load_folder(tmp_path / "named")


def test_labels_out_of_range_and_counts_that_do_not_fit(tmp_path: Path, two: Path) -> None:
    numbered = tmp_path / "numbered"
    for name in ("1", "2", "3"):
        put(numbered / name / "a.png")
    with pytest.raises(
        DataError, match=r"folder 3 is out of range: 3 classes are numbered 0\.\.2; if they count from 1"
    ):
        load_folder(numbered, num_classes=3)
    put(numbered / "03" / "a.png")
    with pytest.raises(DataError, match="both name class 3"):
        load_folder(numbered)
    with pytest.raises(DataError, match="not among the 2 classes given: cat"):
        load_folder(two, classes=["bird", "dog"])


def test_named_folders_that_are_too_few_need_an_order(two: Path) -> None:
    with pytest.raises(DataError, match=r"2 class folders for 10 classes.*classes="):
        load_folder(two, num_classes=10)
    with pytest.raises(DataError, match="3 class names were given for 10"):
        load_folder(two, num_classes=10, classes=["cat", "dog", "crow"])


def test_corrupt_picture_is_named_or_counted(two: Path) -> None:
    whole = (two / "cat" / "a.png").read_bytes()
    (two / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (two / "dog" / "text.jpg").write_text("not a picture")
    with pytest.raises(DataError, match=r"cut\.png cannot be read as a picture.*on_corrupt=skip"):
        load_folder(two)
    loaded = load_folder(two, on_corrupt="skip")
    assert len(loaded.samples) == 2
    assert any(n.startswith("2 damaged and left out: ") and "cut.png" in n and "text.jpg" in n for n in loaded.notes)


def test_only_corrupt_pictures(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"")
    with pytest.raises(DataError, match="none of its 2 pictures can be read"):
        load_folder(tmp_path, on_corrupt="skip")


def test_sizes_must_agree_or_be_given(two: Path) -> None:
    put(two / "dog" / "big.png", picture((0, 255, 0), size=9))
    with pytest.raises(DataError, match=r"differ in size.*4×4.*9×9.*image_size"):
        load_folder(two)
    loaded = load_folder(two, image_size=6)
    assert loaded.samples.image_shape == (3, 6, 6)
    assert "3 pictures resized to 6×6 (bicubic)" in loaded.notes


@pytest.mark.parametrize(
    ("option", "value"), [("channels", 4), ("resample", "cubic"), ("on_corrupt", "ignore"), ("image_size", 0)]
)
def test_unknown_options(two: Path, option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=option):
        load_folder(two, **{option: value})  # type: ignore[arg-type]


def test_grey_pictures_stay_grey_unless_there_is_colour(tmp_path: Path) -> None:
    put(tmp_path / "0" / "a.png", picture(7, "L"))
    put(tmp_path / "1" / "a.png", picture(9, "L"))
    assert load_folder(tmp_path).samples.image_shape == (1, SIDE, SIDE)
    assert load_folder(tmp_path, channels=3).samples.inputs[0, :, 0, 0].tolist() == [7, 7, 7]
    put(tmp_path / "1" / "b.png", picture((1, 2, 3)))
    mixed = load_folder(tmp_path).samples
    assert mixed.image_shape == (3, SIDE, SIDE)
    assert mixed.inputs[0, :, 0, 0].tolist() == [7, 7, 7]
    assert mixed.inputs[2, :, 0, 0].tolist() == [1, 2, 3]


def pixels(image: Image.Image, size: tuple[int, int] | None = None, channels: int | None = None) -> np.ndarray:
    return to_pixels(image, size, channels, "bicubic", Counter())


def test_modes_become_eight_bit_grey_or_rgb() -> None:
    red = picture((255, 0, 0))
    assert pixels(red.convert("P"))[0, 0].tolist() == [255, 0, 0]
    assert pixels(red.convert("CMYK"))[0, 0].tolist() == [255, 0, 0]
    assert pixels(red, channels=1)[0, 0] == round(0.299 * 255)
    assert pixels(picture(1, "1"))[0, 0] == 255
    assert pixels(picture((200, 255), "LA"))[0, 0] == 200
    sixteen = Image.fromarray(np.full((SIDE, SIDE), 32896, np.uint16))
    assert pixels(sixteen)[0, 0] == 128  # 32896 = 128 · 257
    assert pixels(Image.fromarray(np.full((SIDE, SIDE), 0.2, np.float32)))[0, 0] == 51


def test_sixteen_bit_png_from_a_file(tmp_path: Path) -> None:
    for name, value in (("0", 257), ("1", 65535)):
        put(tmp_path / name / "a.png", Image.fromarray(np.full((SIDE, SIDE), value, np.uint16)))
    loaded = load_folder(tmp_path)
    assert loaded.samples.inputs[:, 0, 0, 0].tolist() == [1, 255]
    assert "2 pictures scaled to 8 bits from 16-bit or floating values" in loaded.notes


def test_values_of_unknown_range_are_refused() -> None:
    with pytest.raises(DataError, match=r"-1.*floats in \[0, 1\]"):
        pixels(Image.fromarray(np.full((SIDE, SIDE), -1.0, np.float32)))
    with pytest.raises(DataError, match="70000"):
        pixels(Image.fromarray(np.full((SIDE, SIDE), 70000, np.int32)))


def test_transparency_is_laid_over_black_and_counted() -> None:
    seen: Counter[str] = Counter()
    half = to_pixels(picture((200, 100, 0, 128), "RGBA"), None, None, "bicubic", seen)
    np.testing.assert_allclose(half[0, 0], [100, 50, 0], atol=1)
    assert seen["laid over black where they are transparent"] == 1
    palette = Image.new("P", (1, 1), 3)
    palette.putpalette([0, 0, 0, 1, 1, 1, 2, 2, 2, 90, 80, 70])
    assert pixels(palette)[0, 0].tolist() == [90, 80, 70]
    palette.info["transparency"] = 3
    assert pixels(palette)[0, 0].tolist() == [0, 0, 0]
    opaque: Counter[str] = Counter()
    assert to_pixels(picture((9, 8, 7, 255), "RGBA"), None, None, "bicubic", opaque)[0, 0].tolist() == [9, 8, 7]
    assert not opaque


def test_exif_orientation_is_followed(tmp_path: Path) -> None:
    upright = np.zeros((2, 3, 3), np.uint8)
    upright[0, 0] = 255  # top left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90° clockwise
    path = tmp_path / "turned.png"
    Image.fromarray(upright).save(path, exif=exif)
    with Image.open(path) as image:
        turned = pixels(image)
    assert turned.shape == (3, 2, 3)
    np.testing.assert_array_equal(turned, np.rot90(upright, -1))


def test_of_an_animation_the_first_frame(tmp_path: Path) -> None:
    path = tmp_path / "moving.gif"
    picture((255, 0, 0)).save(path, save_all=True, append_images=[picture((0, 0, 255))])
    with Image.open(path) as image:
        assert pixels(image)[0, 0].tolist() == [255, 0, 0]


def test_reducing_averages_all_pixels() -> None:
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    small = pixels(Image.fromarray(board), (8, 8))
    assert np.abs(small.astype(int) - 127).max() <= 2  # sampling without averaging would give 0 or 255


def test_another_aspect_ratio_is_cropped_around_the_centre() -> None:
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, :4, 0] = 255  # what is cropped away on the left
    wide[:, 4:12, 1] = 255  # the middle, which stays
    wide[:, 12:, 2] = 255
    assert (pixels(Image.fromarray(wide), (8, 8)) == [0, 255, 0]).all()
    smaller = pixels(Image.fromarray(wide), (4, 4)).astype(int)
    first_resized = np.asarray(Image.fromarray(wide).resize((8, 4), Image.Resampling.BICUBIC))
    assert np.abs(smaller - first_resized[:, 2:6]).max() <= 1
    tall = pixels(Image.fromarray(wide.transpose(1, 0, 2)), (8, 8))
    assert (tall == [0, 255, 0]).all()
