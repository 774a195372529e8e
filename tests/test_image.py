"""Photos of every kind become what the contract says, or one sentence says why not."""
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from cnn import ImageError, Preprocess
from cnn.image import load_image, photos, resize

RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (20, 30, 3), np.uint8)


def encoded(picture, form="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    picture = Image.fromarray(PHOTO)
    path = tmp_path / "a.png"
    picture.save(path)
    for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), picture,
                   PHOTO):
        np.testing.assert_array_equal(load_image(source), PHOTO)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP", "GIF", "JPEG"])
def test_every_format_is_read(form):
    options = {"lossless": True} if form == "WEBP" else {}
    pixels = load_image(encoded(Image.fromarray(PHOTO), form, **options))
    assert pixels.shape == (20, 30, 3)
    if form not in ("GIF", "JPEG"):
        np.testing.assert_array_equal(pixels, PHOTO)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr"])
def test_modes_become_rgb_as_pillow_converts_them(mode):
    picture = Image.fromarray(PHOTO).convert(mode)
    form = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    np.testing.assert_array_equal(load_image(encoded(picture, form)),
                                  np.asarray(picture.convert("RGB")))


def test_16_bits_are_scaled_not_clipped():
    values = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    for form in ("PNG", "TIFF"):
        pixels = load_image(encoded(Image.fromarray(values), form))
        np.testing.assert_array_equal(pixels[..., 0], values >> 8)


def test_alpha_lies_over_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, (0, 51, 255)
    pixels = load_image(encoded(Image.fromarray(rgba)))
    np.testing.assert_array_equal(pixels[0], [[255, 255, 255], [244, 204, 204], [200, 0, 0]])
    grey = np.array([[[10, 0], [10, 255]]], np.uint8)
    pixels = load_image(encoded(Image.fromarray(grey, "LA")))
    np.testing.assert_array_equal(pixels[0, :, 0], [255, 10])


def test_a_transparent_palette_colour_lies_over_white():
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    pixels = load_image(encoded(picture, transparency=0))
    np.testing.assert_array_equal(pixels[0], [[255, 255, 255], [0, 0, 255]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_upright_by_exif(orientation):
    picture = Image.fromarray(PHOTO)
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
            5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 3),
            7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, 1)}
    np.testing.assert_array_equal(load_image(encoded(picture, exif=exif)), undo[orientation](PHOTO))


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(load_image(data)[0, 0], [255, 0, 0])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP"])
def test_truncated_files_are_refused(form, tmp_path):
    data = encoded(Image.fromarray(np.tile(PHOTO, (5, 5, 1))), form)
    path = tmp_path / "cut"
    path.write_bytes(data[:len(data) // 2])
    with pytest.raises(ImageError, match=r"cut: the picture is damaged or cut off|cut: this is no"):
        load_image(path)


@pytest.mark.parametrize(("make", "sentence"), [
    (lambda p: p / "missing.jpg", "missing.jpg: there is no such file"),
    (lambda p: p, "this is a folder"),
    (lambda p: _write(p / "empty.png", b""), "empty.png: this is no picture"),
    (lambda p: _write(p / "text.jpg", b"hello"), "text.jpg: this is no picture"),
    (lambda p: _write(p / "a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n"), "a.eps: this is no picture"),
    (lambda p: b"", "the 0 bytes given: this is no picture"),
    (lambda p: 17, "not int"),
    (lambda p: None, "not NoneType"),
    (lambda p: np.zeros((4, 4, 3)), r"it is float64 of shape \(4, 4, 3\)"),
    (lambda p: np.zeros((4, 4), np.uint8), r"it is uint8 of shape \(4, 4\)"),
    (lambda p: np.zeros((4, 4, 4), np.uint8), r"it is uint8 of shape \(4, 4, 4\)"),
    (lambda p: np.zeros((0, 4, 3), np.uint8), r"it is uint8 of shape \(0, 4, 3\)"),
])
def test_what_is_no_picture_is_said(make, sentence, tmp_path):
    with pytest.raises(ImageError, match=sentence):
        load_image(make(tmp_path))


def _write(path, data):
    path.write_bytes(data)
    return path


def test_the_pixel_limit_holds_before_anything_is_decoded():
    data = encoded(Image.fromarray(PHOTO))
    assert load_image(data, max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(ImageError, match=r"has 30 x 20 pixels; the limit is 599 pixels"):
        load_image(data, max_pixels=599)
    small = bytearray(encoded(Image.new("1", (8, 8))))
    small[16:24] = struct.pack(">II", 60_000, 60_000)       # what a bomb's header says
    small[29:33] = struct.pack(">I", zlib.crc32(small[12:29]))
    with pytest.raises(ImageError, match=r"more pixels than the limit|60000 x 60000 pixels"):
        load_image(bytes(small))


# ---- pixels -> input --------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(20, 30), (31, 17), (1, 1), (2, 300), (224, 224)])
@pytest.mark.parametrize("crop", [None, 0.875, 1.0])
def test_crop_comes_first_and_then_resize_as_pillow_does_them(size, crop):
    pixels = RNG.integers(0, 256, (*size, 3), np.uint8)
    settings = Preprocess(size=(24, 32), crop=crop, interpolation="bicubic", mean=(1.0, 2.0, 3.0),
                          std=(4.0, 5.0, 6.0))
    picture = Image.fromarray(pixels)
    if crop is not None:
        side = max(1, int(crop * min(size)))
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    resized = np.asarray(picture.resize((32, 24), Image.Resampling.BICUBIC), np.float32)
    expected = (resized - np.float32([1, 2, 3])) / np.float32([4, 5, 6])
    found = photos([pixels], settings).normalised()[0]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_a_grey_network_sees_grey():
    settings = Preprocess(size=(20, 30), crop=None, mean=(0.0,), std=(1.0,))
    found = resize(PHOTO, settings)
    assert found.shape == (20, 30, 1)
    np.testing.assert_array_equal(found[..., 0], np.asarray(Image.fromarray(PHOTO).convert("L")))


def test_a_network_that_opencv_fed_sees_blue_first():
    """Its mean and deviations, too, are in the order of its channels."""
    settings = Preprocess((20, 30), None, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0), order="BGR")
    rgb = resize(PHOTO, Preprocess((20, 30), None))
    expected = (rgb[..., ::-1].astype(np.float32) - np.float32([1, 2, 3])) / np.float32([4, 5, 6])
    found = photos([PHOTO, PHOTO], settings)
    assert found.pixels.flags.c_contiguous
    np.testing.assert_array_equal(found.normalised()[1], expected)


@pytest.mark.parametrize(("name", "expected"), [
    ("imagenet", Preprocess((9, 8))),
    ("keras-tf", Preprocess((9, 8), None, "nearest", (127.5,) * 3, (127.5,) * 3)),
    ("keras-caffe", Preprocess((9, 8), None, "nearest", (103.939, 116.779, 123.68), (1.0,) * 3,
                               "BGR")),
    ("keras-torch", Preprocess((9, 8), None, "nearest")),
    ("keras-none", Preprocess((9, 8), None, "nearest", (0.0,) * 3, (1.0,) * 3))])
def test_named_settings(name, expected):
    """What Keras's preprocess_input gives for the mode, which is in its documentation."""
    assert Preprocess.named(name, (9, 8)) == expected


def test_many_photos_are_read_in_order_by_several_threads(tmp_path):
    """Pillow warns of each of them, and warnings are errors here."""
    settings = Preprocess(size=(4, 4), crop=None)
    sources = [encoded(Image.new("P", (8, 8), i), transparency=bytes([255])) for i in range(40)]
    before = list(warnings.filters)
    found = photos(sources, settings)
    assert found.shape == (40, 4, 4, 3)
    for one, source in zip(found.pixels, sources, strict=True):
        np.testing.assert_array_equal(one, resize(load_image(source), settings))
    assert warnings.filters == before
    assert photos([], settings).shape == (0, 4, 4, 3)
    with pytest.raises(ImageError, match="no such file"):
        photos([PHOTO, tmp_path / "missing.png"], settings)


def test_json_round_trip():
    for settings in (Preprocess((12, 34), None, "nearest", mean=(0.5,), std=(2.0,)),
                     Preprocess((1, 2), order="BGR")):
        assert Preprocess.from_json(settings.to_json()) == settings
    assert Preprocess.from_json('{"size": [1, 2]}').order == "RGB"      # as older files have it


@pytest.mark.parametrize(("arguments", "name"), [
    ({"size": 224}, "size=224"), ({"size": (0, 4)}, "size"), ({"size": (1 << 20, 4)}, "size"),
    ({"crop": 0}, "crop=0"), ({"crop": 1.5}, "crop=1.5"), ({"crop": "x"}, "crop='x'"),
    ({"interpolation": "cubic"}, "interpolation='cubic'"), ({"mean": (1.0, 2.0)}, "mean"),
    ({"std": (1.0, 0.0, 1.0)}, "std"), ({"mean": (float("nan"),) * 3}, "mean"),
    ({"order": "GBR"}, "order='GBR'"), ({"order": None}, "order=None"),
])
def test_settings_are_checked(arguments, name):
    with pytest.raises(ValueError, match=name):
        Preprocess(**{"size": (8, 8), **arguments})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"size": [1, 2], "sizes": 3}', '{"size": "x"}'])
def test_broken_json_is_refused(text):
    with pytest.raises(ValueError):     # noqa: PT011 - any sentence will do
        Preprocess.from_json(text)
