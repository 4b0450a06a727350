"""Figures of an inspection: pixels are where they should be."""

import base64
import io

import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from shunter.analysis.pages.inspect_figures import _labels, patch_sheet


def test_a_sheet_shows_the_patches_themselves():
    images = torch.randint(256, (3, 1, 8, 8)).float() / 255
    data = patch_sheet([[2, 3, 0.5], [0, 1, 0.25]], images, 4)
    sheet = Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("RGB")
    for column, (image, top, left) in enumerate([(2, 4, 4), (0, 0, 4)]):
        for y in range(4):
            for x in range(4):
                seen = sheet.getpixel((column * 26 + x * 6 + 3, y * 6 + 3))
                assert seen == (round(float(images[image, 0, top + y, left + x]) * 255),) * 3


def test_layers_of_one_number_are_told_apart():
    names = [f"model.encoder.layers.{number}.{part}" for number in range(2) for part in ("ffn1", "ffn2")]
    assert _labels(names) == ["encoder 0 ffn1", "encoder 0 ffn2", "encoder 1 ffn1", "encoder 1 ffn2"]
    assert _labels(["model.layers.0.mlp", "model.layers.1.mlp"]) == ["0", "1"]
