"""Images: upright, at their full depth, scaled and normalised as the model's processor says."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from shunter.data.images import Normalisation, find_images, open_image, read_image
from shunter.errors import UserError

TURNED = {3: lambda x: x[::-1, ::-1], 6: lambda x: np.rot90(x, -1), 8: lambda x: np.rot90(x), 2: lambda x: x[:, ::-1]}


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_turns_images_upright(orientation, tmp_path):
    stored = np.random.default_rng(int(torch.randint(2**31, ()))).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(stored)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    upright = TURNED[orientation](stored)
    found = read_image(tmp_path / "a.png", 8, 3)
    assert torch.equal(found, torch.from_numpy(upright.astype(np.float32) / 255).permute(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_of_sixteen_bits_keeps_its_values(channels, tmp_path):
    values = torch.randint(65536, (8, 8)).numpy().astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png", 8, channels)
    assert found.shape == (channels, 8, 8)
    expected = torch.from_numpy(values.astype(np.float32) / 65535).expand(channels, 8, 8)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_what_is_transparent_is_white(mode, tmp_path):
    """Whatever colour lies below, of an alpha channel or of one value that stands for none."""
    draw = np.random.default_rng(int(torch.randint(2**31, ())))
    drawn = draw.random((8, 8)) < 0.5
    if mode in ("RGBA", "LA"):
        below = draw.integers(0, 256, (8, 8, len(mode) - 1), dtype=np.uint8)
        below[drawn] = 0
        image = Image.fromarray(np.concatenate([below, 255 * drawn[..., None]], -1).astype(np.uint8))
        image.save(tmp_path / "a.png")
    else:
        image = Image.fromarray(np.where(drawn, 0, 9).astype(np.uint8))
        if mode == "P":
            image.putpalette([0, 0, 0] * 256)
        image.convert(mode).save(tmp_path / "a.png", transparency=(9, 9, 9) if mode == "RGB" else 9)
    found = read_image(tmp_path / "a.png", 8, 3)
    assert torch.equal(found, torch.from_numpy((~drawn).astype(np.float32)).expand(3, 8, 8))


def test_of_an_animation_the_first_picture_and_of_print_colours_the_seen(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "b.jpg", quality=100)
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 8, 8)
    for name in ("a.gif", "b.jpg"):
        torch.testing.assert_close(read_image(tmp_path / name, 8, 3), red, atol=0.02, rtol=0)


def test_an_image_whose_exif_data_are_damaged_is_named(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", exif=b"Exif\0\0no such header")
    with pytest.raises(UserError, match="a.png: not an image that can be read"):
        open_image(tmp_path / "a.png")


SETTINGS = [
    {},
    {"do_normalize": False},
    {"image_mean": [0.2, 0.3, 0.4], "image_std": [0.5, 0.6, 0.7]},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_pixels_are_as_the_models_own_processor_makes_them(settings, tmp_path):
    processor = ViTImageProcessor(**settings, size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path)
    array = torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy()
    Image.fromarray(array).save(tmp_path / "a.png")
    expected = processor(Image.open(tmp_path / "a.png"), return_tensors="pt")["pixel_values"][0]
    found = Normalisation.of(tmp_path, 3)(read_image(tmp_path / "a.png", 8, 3))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "content",
    [
        "[",
        "[]",
        "[" * 10**6,
        json.dumps({"image_mean": [0.5]}),
        json.dumps({"image_std": [0, 1, 1]}),
        json.dumps({"image_mean": "half"}),
        json.dumps({"rescale_factor": None}),
    ],
)
def test_settings_that_are_none_end_in_one_line(content, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(UserError, match="preprocessor_config.json") as caught:
        Normalisation.of(tmp_path, 3)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_what_is_no_image_is_named(tmp_path):
    folder = tmp_path / "cats"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "._a.png").write_bytes(b"AppleDouble")
    (folder / "notes.txt").write_text("text")
    with pytest.warns(UserWarning, match=r"left out \._a.png, notes.txt"):
        assert find_images([str(folder)], 4) == {"cats": [folder / "a.png"]}
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\xff" * 100)
    for name in ("b.png", "c.png"):
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name, 8, 3)


def test_a_picture_that_unpacks_to_hundreds_of_megabytes_is_refused(tmp_path):
    """Some kilobytes of PNG, or of a JPEG in several scans; a plain JPEG is decoded at half its size."""
    image = Image.new("L", (5800, 5800), 100)
    image.save(tmp_path / "a.png", compress_level=1)
    image.save(tmp_path / "b.jpg", progressive=True)
    image.save(tmp_path / "c.jpg")
    for name in ("a.png", "b.jpg"):
        with pytest.raises(UserError, match=f"{name}: not an image that can be read .*33,640,000 pixels; at most"):
            read_image(tmp_path / name, 8, 3)
    with open_image(tmp_path / "c.jpg") as half:
        assert half.size == (2900, 2900)
    torch.testing.assert_close(read_image(tmp_path / "c.jpg", 8, 1), torch.full((1, 8, 8), 100 / 255))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_large_picture_is_converted_as_a_small_one(mode, channels, tmp_path):
    """Which goes strip by strip: as all of it at once, by Pillow's own words."""
    draw = np.random.default_rng(int(torch.randint(2**31, ())))
    parts = {"RGBA": 4, "LA": 2, "RGB": 3}.get(mode, 1)
    pixels = draw.integers(0, 256, (150, 100, parts), dtype=np.uint8)
    image = Image.fromarray(pixels.squeeze(-1) if parts == 1 else pixels)
    if mode == "P":
        image.putpalette(draw.integers(0, 256, 768, dtype=np.uint8).tobytes())
    image = image.resize((1000, 1500), Image.Resampling.NEAREST)
    image.save(tmp_path / "a.png", compress_level=1, **({"transparency": 7} if mode == "P" else {}))
    whole = Image.alpha_composite(
        Image.new("RGBA", image.size, "white"), Image.open(tmp_path / "a.png").convert("RGBA")
    )
    whole = whole.convert("L" if channels == 1 else "RGB").resize((8, 8), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.asarray(whole, dtype=np.float32) / 255).reshape(8, 8, -1).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "a.png", 8, channels), expected)


def test_no_program_is_started_for_a_picture(tmp_path):
    """As for PostScript, under whatever name."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    with pytest.raises(UserError, match="cannot identify image file of any known kind"):
        read_image(tmp_path / "a.png", 8, 3)
