"""Images of folders as the tensors that a model of square images takes, with the domain of each: its folder."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import UserError, escaped, one_line
from ..untrusted import open_file, parse_json, read_file
from .files import files_in, say_left_out

__all__ = [
    "PATCH_IDS",
    "SUFFIXES",
    "Normalisation",
    "find_images",
    "image_ids",
    "moved",
    "on_white",
    "open_image",
    "patch_ids",
    "pixels_of",
    "read_image",
    "square_processor",
]

_BITS = 8
PATCH_IDS = 2**_BITS

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif"}

_KINDS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is read, by the file's first bytes and not by its name: for some others Pillow starts programs."""

_MOST_BYTES = 2**28  # that decoding and converting take
_PER_PIXEL, _PER_PIXEL_HELD_WHOLE = 8, 12  # of them; what WebP and JPEG in several scans hold besides the pixels
_STRIP = 2**20  # pixels that are converted at a time


def find_images(paths: Sequence[str], most: int) -> dict[str, list[Path]]:
    """Image files by domain, the name of their folder; of each domain an equal share of the most that are wanted.

    Args:
        paths: image files, or folders of them. What a folder holds besides is left out, and a warning names it.
        most: how many in all.

    Raises:
        UserError: where there is none.
    """
    found: dict[str, list[Path]] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        files = [path]
        if path.is_dir():
            files, left_out = files_in(path, lambda file: file.suffix.lower() in SUFFIXES)
            say_left_out(path, left_out, f"hidden, no regular files, or not images ({', '.join(sorted(SUFFIXES))})")
        for file in files:
            if file.suffix.lower() in SUFFIXES:
                found.setdefault(escaped(file.resolve().parent.name), []).append(file)
    if not found:
        raise UserError(f"{', '.join(paths)}: no file ends in {', '.join(sorted(SUFFIXES))}")
    share = max(1, most // len(found))
    return {
        name: sorted(random.Random(0).sample(files, min(len(files), share))) for name, files in sorted(found.items())
    }


def read_image(file: Path, size: int, channels: int) -> Tensor:
    """An image, upright as its EXIF data say, as (channels, size, size) float32 from 0 (black) to 1.

    Args:
        file: of 8 or 16 bits a channel, grey or in colours; what is transparent is white.
        size: it is scaled to this height and width.
        channels: 1 makes it grey, 3 gives it colours.

    Raises:
        UserError: where it cannot be read.
    """
    with open_image(file) as image:
        return pixels_of(image, size, channels)


def open_image(file: Path | BinaryIO) -> Image.Image:
    """An image, of a file or of bytes, decoded whole, upright as its EXIF data say; of an animation the first picture.

    A photograph (JPEG) of more than 33,554,432 pixels is decoded at half its height and width.

    Raises:
        UserError: where it cannot be read, or has more pixels.
    """
    try:
        with open_file(file) if isinstance(file, Path) else file as stream, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=_KINDS)
            _bound(image)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        name = f"{file}: " if isinstance(file, Path) else ""
        reason = re.sub(r" <[^>]*>$", " of any known kind", one_line(error))
        raise UserError(f"{name}not an image that can be read ({reason})") from None


def _bound(image: Image.Image) -> None:
    """See that an image which is not decoded yet will not take more memory than it may."""
    held = image.format == "WEBP" or "progressive" in image.info
    most = _MOST_BYTES // (_PER_PIXEL_HELD_WHOLE if held else _PER_PIXEL)
    if image.width * image.height > most and not held:
        image.draft(None, (image.width // 2, image.height // 2))  # what JPEG alone can do
    if (pixels := image.width * image.height) > most:
        raise ValueError(f"it has {pixels:,} pixels; at most {most:,} are decoded: scale it down")


def pixels_of(image: Image.Image, size: int, channels: int) -> Tensor:
    """What `read_image` says, of an image that is decoded and upright."""
    if image.mode.startswith(("I", "F")):  # 16 bits, which conversion would cut at 255
        planes = [image.convert("F").resize((size, size), Image.Resampling.BILINEAR)] * channels
        array = np.stack([np.asarray(plane, dtype=np.float32) for plane in planes], -1) / 65535
    else:
        picture = _opaque(image, "L" if channels == 1 else "RGB")
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
        array = np.asarray(picture, dtype=np.float32) / 255
    return torch.from_numpy(array.copy()).reshape(size, size, -1).permute(2, 0, 1)


def _opaque(image: Image.Image, mode: str) -> Image.Image:
    """An image on white in another mode, strip by strip: what lies between takes no memory of its size."""
    if image.mode == mode and "transparency" not in image.info:
        return image
    picture, rows = Image.new(mode, image.size), max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        picture.paste(on_white(strip).convert(mode), (0, top))
    return picture


def on_white(image: Image.Image) -> Image.Image:
    """An image as it looks on white: what is transparent has whatever colour its file left there, black often."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    picture = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)


def moved(pixels: Tensor, down: int, right: int) -> Tensor:
    """Pixels (channels, height, width) moved, what comes in being as the edge is."""
    height, width = pixels.shape[-2:]
    rows = (torch.arange(height) - down).clamp(0, height - 1)
    columns = (torch.arange(width) - right).clamp(0, width - 1)
    return pixels[:, rows][:, :, columns]


def patch_ids(pixels: Tensor, patch: int) -> Tensor:
    """Ids (B, P) int64 from 0 to `PATCH_IDS` - 1 of the patches of images, alike for patches that look alike.

    The bits of an id are on which sides of fixed random planes a patch lies, its mean taken off (locality-sensitive
    hashing; Charikar 2002): what hash routing takes for the words of an image.

    Args:
        pixels: (B, channels, height, width).
        patch: the height and width of a patch.
    """
    rows = torch.nn.functional.unfold(pixels.float(), patch, stride=patch).mT  # (B, P, channels * patch * patch)
    sides = (rows - rows.mean(-1, keepdim=True)) @ _planes(rows.shape[-1]).to(rows.device) > 1e-6
    return (sides * 2 ** torch.arange(_BITS, device=rows.device)).sum(-1)


@cache
def _planes(width: int) -> Tensor:
    return torch.randn(width, _BITS, generator=torch.Generator().manual_seed(0))


def image_ids(pixels: Tensor, patch: int) -> Tensor:
    """The `patch_ids` (B, 1 + P) of images, before them an id of its own for the token of the class."""
    return torch.nn.functional.pad(patch_ids(pixels, patch), (1, 0), value=PATCH_IDS)


@dataclass(frozen=True)
class Normalisation:
    """What a model's image processor makes of values from 0 to 1: (value * scale - mean) / std.

    Args:
        scale: of the values; 1 where the processor brings bytes to 0 … 1, 255 where it leaves them.
        mean, std: (channels,), of the scaled values.
    """

    scale: float
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, folder: Path, channels: int) -> Normalisation:
        """That of a model's folder, by its preprocessor_config.json; mean and std are 0.5 where it has none.

        Raises:
            UserError: where the settings are not those of so many channels.
        """
        settings, file = _settings(folder)
        scale = 255 * _number(file, settings, "rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255.0
        if not settings.get("do_normalize", True):
            return cls(scale, torch.zeros(channels), torch.ones(channels))
        mean, std = (_channels(file, settings, name, channels) for name in ("image_mean", "image_std"))
        if not bool((std > 0).all()):
            raise UserError(f"{file}: image_std={std.tolist()} must be above 0")
        return cls(scale, mean, std)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (…, channels, height, width) as the model takes them."""
        return (pixels * self.scale - self.mean.reshape(-1, 1, 1)) / self.std.reshape(-1, 1, 1)


def square_processor(size: int, normalise: Normalisation) -> Any:
    """The image processor of transformers that scales images to a square, and bytes as a normalisation of 0 … 1."""
    import transformers

    # The first needs no torchvision; versions before it have the second alone, which needs none either.
    kind: Any = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    mean, std = normalise.mean.tolist(), normalise.std.tolist()
    return kind(image_mean=mean, image_std=std, size={"height": size, "width": size})


def _settings(folder: Path) -> tuple[dict[str, Any], Path]:
    """The settings of a folder's image processor, by itself or within a processor's."""
    for name, within in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        file = folder / name
        if file.exists() or file.is_symlink():
            try:
                found = parse_json(read_file(file))
            except UserError:
                raise
            except (OSError, ValueError) as error:
                raise UserError(f"{file}: cannot be read as JSON ({one_line(error)})") from None
            found = found.get(within) if within and isinstance(found, dict) else found
            if isinstance(found, dict):
                return found, file
            if within is None:
                raise UserError(f"{file}: must hold a JSON object, not a {type(found).__name__}")
    return {}, folder / "preprocessor_config.json"


def _number(file: Path, settings: dict[str, Any], name: str, default: float) -> float:
    value = settings.get(name, default)
    if not isinstance(value, int | float) or not 0 < value < 1e6:
        raise UserError(f"{file}: {name}={repr(value)[:80]} must be a number above 0")
    return float(value)


def _channels(file: Path, settings: dict[str, Any], name: str, channels: int) -> Tensor:
    value = settings.get(name)
    value = 0.5 if value is None else value
    values = value if isinstance(value, list) else [value] * channels
    if len(values) != channels or not all(isinstance(v, int | float) and abs(v) < 1e6 for v in values):
        raise UserError(f"{file}: {name}={repr(value)[:80]} must be a number, or one for each of {channels} channels")
    return torch.tensor(values, dtype=torch.float32)
