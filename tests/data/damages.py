"""Ways to damage a tidy folder of RGBA tiles in class folders. Each function returns the names that must be found, by
kind of finding; `tests/data/test_check_messy.py` tests that nothing else is found."""

import io
import os
import shutil
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

Expected = dict[str, set[str]]  # names by the kind of finding
DAMAGES: dict[str, Callable[[Path], Expected]] = {}


def damage(function: Callable[[Path], Expected]) -> Callable[[Path], Expected]:
    DAMAGES[function.__name__.replace("_", " ")] = function
    return function


def damage_all(folder: Path) -> Expected:
    """Apply every damage; returns what must be found."""
    expected: Expected = defaultdict(set)
    for function in DAMAGES.values():
        for kind, names in function(folder).items():
            expected[kind] |= names
    return dict(expected)


def image(number: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """An opaque image of 8 x 8 random patches, different for each number. size: (height, width)"""
    patches = np.random.default_rng(number).integers(40, 216, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize(size[::-1], Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def put(folder: Path, name: str, content: bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return name


# Files that cannot be used


@damage
def a_file_without_content(folder):
    return {"empty": {put(folder, "mon/x-empty.png", b"")}}


@damage
def text_named_as_an_image(folder):
    return {"no-image": {put(folder, "mon/x-text.png", b"nothing to see here\n" * 20)}}


@damage
def a_web_page_instead_of_a_download(folder):
    return {"no-image": {put(folder, "item/x-page.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>")}}


@damage
def an_archive_named_as_an_image(folder):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "a")
    return {"no-image": {put(folder, "item/x-zip.png", buffer.getvalue())}}


@damage
def a_png_that_ends_early(folder):
    content = encoded(image(1), "PNG")
    return {"truncated": {put(folder, "mon/x-half.png", content[: len(content) // 2])}}


@damage
def a_png_that_ends_in_its_header(folder):
    return {"truncated": {put(folder, "mon/x-head.png", encoded(image(2), "PNG")[:20])}}


@damage
def a_jpeg_that_ends_early(folder):
    content = encoded(image(3, (256, 256)), "JPEG", quality=95)
    return {"truncated": {put(folder, "gui/x-half.jpg", content[: len(content) * 2 // 3])}}


@damage
def a_webp_that_ends_early(folder):
    content = encoded(image(4, (128, 128)), "WEBP", quality=95)
    return {"truncated": {put(folder, "gui/x-half.webp", content[: len(content) // 2])}}


@damage
def a_png_with_wrong_bytes(folder):
    content = bytearray(encoded(image(5), "PNG"))
    middle = content.index(b"IDAT") + 20
    content[middle : middle + 40] = bytes(40)
    return {"damaged": {put(folder, "mon/x-bytes.png", bytes(content))}}


@damage
def a_png_of_more_pixels_than_can_be_decoded(folder):
    return {"too-large": {put(folder, "mon/x-bomb.png", encoded(Image.new("1", (14_000, 14_000)), "PNG"))}}


@damage
def numbers_without_a_range(folder):
    values = np.asarray(image(6).convert("L"), np.float32) * 1000
    return {"unsupported": {put(folder, "mon/x-float.tif", encoded(Image.fromarray(values), "TIFF"))}}


@damage
def a_link_to_nothing(folder):
    (folder / "mon/x-link.png").symlink_to(folder / "gone.png")
    return {"broken-link": {"mon/x-link.png"}}


# Copies


@damage
def a_copy_in_the_same_class(folder):
    put(folder, "mon/x-twice.png", encoded(image(10), "PNG"))
    shutil.copy(folder / "mon/x-twice.png", folder / "mon/x-twice2.png")
    return {"duplicates": {"mon/x-twice2.png"}}


@damage
def a_copy_in_another_class(folder):
    names = {put(folder, f"{kind}/x-torn.png", encoded(image(11), "PNG")) for kind in ("gui", "mon")}
    return {"duplicates": {max(names)}, "conflicts": names}


@damage
def a_copy_saved_at_twice_the_size(folder):
    put(folder, "gui/x-alike.png", encoded(image(12), "PNG"))
    twice = image(12).resize((64, 64), Image.Resampling.BICUBIC)
    return {"near-duplicates": {put(folder, "gui/x-alike2.jpg", encoded(twice, "JPEG", quality=90))}}


# Images with little information


@damage
def an_image_too_small(folder):
    return {"small": {put(folder, "gui/x-tiny.png", encoded(image(20, (5, 6)), "PNG"))}}


@damage
def an_image_much_longer_than_wide(folder):
    return {"extreme-aspect": {put(folder, "gui/x-long.png", encoded(image(21, (32, 200)), "PNG"))}}


@damage
def an_image_of_one_color(folder):
    return {"blank": {put(folder, "gui/x-blank.png", encoded(Image.new("RGB", (32, 32), (9, 99, 200)), "PNG"))}}


@damage
def white_on_transparency(folder):
    canvas = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    canvas.paste((255, 255, 255, 255), (8, 8, 24, 24))
    name = put(folder, "gui/x-white.png", encoded(canvas, "PNG"))
    return {"invisible": {name}, "transparent": {name}}


@damage
def an_image_with_a_speck(folder):
    canvas = Image.new("RGB", (32, 32), (9, 99, 20))
    canvas.putpixel((30, 30), (255, 0, 0))
    return {"low-information": {put(folder, "gui/x-speck.png", encoded(canvas, "PNG"))}}


@damage
def an_image_all_but_black(folder):
    dark = np.asarray(image(22)) // 25
    return {"low-information": {put(folder, "gui/x-dark.png", encoded(Image.fromarray(dark), "PNG"))}}


# Formats


@damage
def a_jpeg_named_png(folder):
    return {"wrong-endings": {put(folder, "item/x-jpeg.png", encoded(image(30), "JPEG"))}}


@damage
def an_animation(folder):
    frames = {"save_all": True, "append_images": [image(32)]}
    return {"animated": {put(folder, "item/x-moves.gif", encoded(image(31), "GIF", **frames))}}


@damage
def sixteen_bits(folder):
    deep = np.asarray(image(33).convert("L")).astype(np.uint16) * 257
    return {"sixteen-bit": {put(folder, "item/x-deep.png", encoded(Image.fromarray(deep), "PNG"))}}


@damage
def the_colors_of_print(folder):
    return {"cmyk": {put(folder, "item/x-print.jpg", encoded(image(34).convert("CMYK"), "JPEG"))}}


@damage
def another_color_profile(folder):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exchanged = srgb.replace(b"rXYZ", b"tmp ").replace(b"gXYZ", b"rXYZ").replace(b"tmp ", b"gXYZ")  # red and green
    put(folder, "item/x-srgb.png", encoded(image(38), "PNG", icc_profile=srgb))
    return {"profile": {put(folder, "item/x-profile.png", encoded(image(39), "PNG", icc_profile=exchanged))}}


@damage
def a_photo_on_its_side(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"rotated": {put(folder, "item/x-side.jpg", encoded(image(35, (32, 48)), "JPEG", exif=exif))}}


@damage
def metadata_that_cannot_be_read(folder):
    large = PngImagePlugin.PngInfo()
    large.add_text("workflow", "a node " * 300_000, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 77
    return {
        "odd-metadata": {
            put(folder, "item/x-workflow.png", encoded(image(36), "PNG", pnginfo=large)),
            put(folder, "item/x-turn.jpg", encoded(image(37), "JPEG", exif=exif)),
        }
    }


# Files that are not samples


@damage
def a_hidden_file(folder):
    return {"hidden-files": {put(folder, "item/._x.png", encoded(image(40), "PNG"))}}


@damage
def a_hidden_folder(folder):
    put(folder, ".thumbnails/a.png", encoded(image(41), "PNG"))
    return {"hidden-files": {".thumbnails/"}}


@damage
def an_archive(folder):
    return {"archives": {put(folder, "item/more.zip", b"PK\5\6" + bytes(18))}}


@damage
def an_image_without_ending(folder):
    return {"misnamed-images": {put(folder, "item/x-photo", encoded(image(42), "PNG"))}}


@damage
def a_film(folder):
    return {"other-files": {put(folder, "item/x.mp4", b"\0\0\0\x18ftypmp42" + bytes(100))}}


@damage
def a_folder_without_files(folder):
    (folder / "mon/nothing").mkdir()
    return {"empty-folders": {"mon/nothing/"}}


# Classes and names


@damage
def an_image_beside_the_classes(folder):
    return {"loose-images": {put(folder, "x-loose.png", encoded(image(50), "PNG"))}}


@damage
def one_class_under_two_names_one_of_them_with_a_single_image(folder):
    put(folder, "Mon/x-one.png", encoded(image(51), "PNG"))
    return {"class-names": {"'mon' = 'Mon'"}, "few-images": {"Mon (1)"}}


@damage
def two_names_that_differ_in_case(folder):
    for number, name in enumerate(("item/x-Case.png", "item/x-case.png"), start=52):
        put(folder, name, encoded(image(number), "PNG"))
    return {"case-names": {"item/x-Case.png, item/x-case.png"}}


@damage
def a_file_without_permission(folder):
    """The tests may run as a user who can read everything: then nothing is found."""
    path = folder / put(folder, "mon/x-locked.png", encoded(image(54), "PNG"))
    path.chmod(0)
    return {"unreadable": {"mon/x-locked.png"}} if not os.access(path, os.R_OK) else {}
