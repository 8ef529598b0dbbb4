"""The one image decoder: whatever holds an image -> its pixels as displayed, or a ValueError of one line.

- EXIF orientation is applied once; EXIF that cannot be read is ignored, and the image is used as stored.
- A file of several frames or pages gives its first. A PIL image gives the frame that it stands on.
- Transparency is laid onto white.
- 16-bit values are divided by 257 (65535 becomes 255). Wider integers count as 8-bit values if none is above 255, and
  as 16-bit values if none is above 65535. Floats count as 0..1 if none is above 1, and as 0..255 if the largest is from
  2 to 255. Any other range is an error, and so is NaN.
- Of 16-bit color, the upper 8 bits are taken, as PIL does when it reads such a file.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000  # of one image: 0.4 GB as RGB, which PIL stores in 4 bytes a pixel

# All that PIL's readers raise on damaged files: found by damaging files of every format that PIL can write, and some
# that it only reads, at random (tests/unit/vision_tower/test_damaged_images.py). A TypeError and the like count only
# around calls of PIL (`reading`), so that one in our own code remains what it is.
DAMAGE_ERRORS = (
    OSError,  # most formats; UnidentifiedImageError is one
    ValueError,
    SyntaxError,  # PNG, TIFF, EXIF
    RuntimeError,  # AVIF; NotImplementedError (DDS, BLP) is one
    TypeError,  # IM: a size that is a fraction
    IndexError,  # IPTC
    AssertionError,  # ICNS: a palette image without a palette
    struct.error,  # EXIF
    Image.DecompressionBombError,
)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STRIP = 4_000_000  # pixels converted at a time: of a large image, each intermediate copy would be 0.4 GB
_SLACK = 1e-3  # by which floats may leave their range: rounding, interpolation
_TENSOR_TYPES = "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32 float64".split()
_TENSOR_TYPES += "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu".split()
_TRANSPARENT_MODES = ("LA", "La", "PA", "RGBA", "RGBa")


def decode_image(
    source: Any, *, name: str | None = None, max_pixels: int = MAX_PIXELS, input_data_format: str | None = None
) -> Image.Image:
    """An image as displayed: mode RGB, without EXIF. A PIL image that is so already is returned itself.

    Args:
        source: A path, the bytes of a file, a file object, a PIL image, or a numpy array or torch tensor: (H, W),
            (H, W, C) or (C, H, W), where C is 1 (gray), 2 (gray and alpha), 3 (RGB) or 4 (RGBA). Where both could be
            meant, a numpy array is (H, W, C) and a tensor is (C, H, W).
        name: What to call the image in messages.
        max_pixels: The largest width * height that is decoded.
        input_data_format: "channels_first" or "channels_last", for arrays.

    Raises:
        ValueError: If the image cannot be found or read, is damaged, has too many pixels, or its values lie in no range
            that the module's docstring names. The message is one line and names the image.
    """
    name = describe(source) if name is None else name
    if isinstance(source, np.ndarray) or is_tensor(source):
        image = _from_array(source, name, max_pixels, input_data_format)
    else:
        image = open_image(source, name=name, max_pixels=max_pixels)
    return _to_rgb(image, name)


def open_image(source: Any, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image file or PIL image, loaded and as displayed, in its own mode.

    Raises:
        ValueError: As `decode_image`.
    """
    name = describe(source) if name is None else name
    if isinstance(source, Image.Image):
        return _loaded(source, name, max_pixels)
    with _opened(source, name) as image:
        return _loaded(image, name, max_pixels)


def image_size(source: Any, *, name: str | None = None) -> tuple[int, int]:
    """Width and height in pixels of an image file as displayed, read from its head alone where PIL can do so.

    Raises:
        ValueError: If the file is not found, is not an image, or has more than `MAX_PIXELS` pixels. Of a damaged image
            the head may be whole.
    """
    name = describe(source) if name is None else name
    with _opened(source, name) as image:
        _check_pixels(image.width, image.height, name, MAX_PIXELS)  # PIL reads a whole PNG to find its EXIF
        turned = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)  # PIL has turned a TIFF's size already
        return image.size[::-1] if turned else image.size


def describe(source: Any) -> str:
    """A name for messages."""
    if isinstance(source, str | os.PathLike):
        path = " ".join(os.fsdecode(source).split())
        return path if len(path) <= 500 else path[:500] + "..."
    if isinstance(source, bytes | bytearray | memoryview):
        return f"image of {len(source)} bytes"
    if isinstance(source, np.ndarray) or is_tensor(source):
        return f"array of shape {tuple(source.shape)} and type {source.dtype}"
    if isinstance(source, Image.Image):
        of = f" of {source.filename}" if getattr(source, "filename", "") else ""
        return f"PIL image{of} ({source.mode}, {source.width} x {source.height})"
    return str(getattr(source, "name", type(source).__name__))


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what PIL raises into a ValueError of one line; to be put around nothing but calls of PIL."""
    try:
        with warnings.catch_warnings():
            # PIL warns at half of the size that it refuses
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ValueError(f"there is no image file {name}") from None
    except Image.DecompressionBombError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} has too many pixels to be opened safely ({reason})") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image that PIL can read") from None
    except DAMAGE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot read the image {name}: {reason}") from error


class _File(io.BufferedReader):
    """A file for PIL, which asks for as many bytes as a damaged file states: Python would allocate them all first.

    PIL maps a file that it opens by its name into memory, and so a TIFF that is turned with the wrong size.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__(io.FileIO(path))
        self._length = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        return super().read(-1 if size is None or size < 0 else min(size, self._length))


@contextlib.contextmanager
def _opened(source: Any, name: str) -> Iterator[Image.Image]:
    with contextlib.ExitStack() as stack:
        if isinstance(source, bytes | bytearray | memoryview):
            source = io.BytesIO(source)
        elif isinstance(source, str | os.PathLike):
            if os.path.exists(source) and not os.path.isfile(source):  # reading a pipe would wait forever
                kind = "folder" if os.path.isdir(source) else "device or pipe"
                raise ValueError(f"there is no image file {name}; that is a {kind}")
            with reading(name):
                source = stack.enter_context(_File(source))
        elif not hasattr(source, "read"):
            raise ValueError(
                f"expected an image: a path, bytes, a file object, a PIL image, an array or a tensor; got {name}"
            )
        with reading(name):
            image = stack.enter_context(Image.open(source))
        yield image


@contextlib.contextmanager
def _unnamed(image: Image.Image) -> Iterator[None]:
    """Keep PIL from mapping the file of an image that it opened by its name: see `_File`."""
    filename = getattr(image, "filename", None)
    if not filename:
        yield
        return
    image.filename = ""
    try:
        yield
    finally:
        image.filename = filename


def _loaded(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """The image with its pixels read and turned as its EXIF says."""
    if image.format == "EPS":
        raise ValueError(f"{name} is an EPS file, which is a program; convert it to PNG")
    _check_pixels(image.width, image.height, name, max_pixels)
    with reading(name), _unnamed(image):
        image.load()
    _check_pixels(image.width, image.height, name, max_pixels)  # an ICO's head may state another size
    turn = _TURNS.get(_orientation(image))
    if turn is None:
        return image
    with reading(name):
        turned = image.transpose(turn)
    turned.info = {key: value for key, value in image.info.items() if key == "transparency"}  # EXIF only once
    return turned


def _check_pixels(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"{name} is empty: it has {width} x {height} pixels")
    if width * height > max_pixels:
        raise ValueError(
            f"{name} has too many pixels: {width} x {height} = {width * height:,}, expected at most {max_pixels:,}; "
            "make it smaller, or raise max_pixels"
        )


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except DAMAGE_ERRORS as error:
        logger.info("EXIF that cannot be read is ignored: %s", error)
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _deep_gray(image, name)
    transparent = has_transparency(image)
    if image.mode == "RGB" and not transparent:
        return image
    rgb = Image.new("RGB", image.size)
    rows = max(1, _STRIP // image.width)
    with reading(name):
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            if strip.mode == "La":  # PIL converts it to nothing else
                strip = strip.convert("LA")
            if transparent:
                strip = strip.convert("RGBA")
                strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
            rgb.paste(strip.convert("RGB"), (0, top))
    return rgb


def has_transparency(image: Image.Image) -> bool:
    """Whether an image says of some pixels that they are transparent; they need not occur."""
    palette = image.palette if image.mode == "P" else None
    return (
        image.mode in _TRANSPARENT_MODES
        or image.info.get("transparency") is not None
        or (palette is not None and palette.mode.endswith("A"))
    )


def _deep_gray(image: Image.Image, name: str) -> Image.Image:
    """Gray of 16 or 32 bits. PIL reads 16-bit PNG and PPM files as 32-bit integers in some versions."""
    with reading(name):
        values = np.asarray(image)
    gray = _to_8_bits(values, name, deep=image.format in ("PNG", "PPM"))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        gray = np.where(values == clear, np.uint8(255), gray)
    return Image.merge("RGB", [Image.fromarray(gray)] * 3)


def _to_8_bits(values: np.ndarray, name: str, deep: bool = False, color: bool = False) -> np.ndarray:
    """Values of any type as uint8, by the rules in the module's docstring; `deep` integers have 16 bits."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "iuf":
        raise ValueError(f"expected numbers as pixels of the {name}")
    low, high = values.min(), values.max()  # NaN if any is
    if values.dtype.kind == "f":
        scale = 255 if high <= 1 + _SLACK else 1 if 2 <= high <= 255 + _SLACK else 0
        if low >= -_SLACK and scale:
            wide = values if values.dtype.itemsize >= 4 else values.astype(np.float32)
            return np.rint((wide * scale).clip(0, 255)).astype(np.uint8)
    elif low >= 0 and high <= 65535:
        deep = deep or high > 255 or values.dtype.itemsize == 2 and values.dtype.kind == "u"
        return (values // (256 if color else 257) if deep else values).astype(np.uint8)
    raise ValueError(
        f"the {name} has values from {low:g} to {high:g}; expected bools, integers 0..255 or 0..65535, or floats 0..1 "
        "or 0..255"
    )


def _from_array(source: np.ndarray | torch.Tensor, name: str, max_pixels: int, layout: str | None) -> Image.Image:
    first = is_tensor(source)
    array = as_array(source)
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"expected an image (H, W), (H, W, C) or (C, H, W), got the {name}")
    if array.ndim == 3:
        may_be_last, may_be_first = array.shape[2] in (1, 2, 3, 4), array.shape[0] in (1, 2, 3, 4)
        if layout is not None:
            first = str(getattr(layout, "value", layout)) == "channels_first"
        elif may_be_last != may_be_first:
            first = may_be_first
        if not (may_be_first if first else may_be_last):
            raise ValueError(f"expected 1, 2, 3 or 4 channels first or last, got the {name}")
        array = np.moveaxis(array, 0, -1) if first else array
    _check_pixels(array.shape[1], array.shape[0], name, max_pixels)
    color = array.ndim == 3 and array.shape[2] > 1
    pixels = np.ascontiguousarray(_to_8_bits(array, name, color=color))
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(pixels)


def is_tensor(value: Any) -> TypeGuard[torch.Tensor]:
    """Whether a value is a tensor. Without importing torch, which takes seconds: before that there is none."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def as_array(values: np.ndarray | torch.Tensor) -> np.ndarray:
    """A tensor of any device and type as a numpy array; bfloat16 and smaller floats become float32.

    Raises:
        ValueError: If the tensor is not a dense one of bools, integers or floats.
    """
    if not is_tensor(values):
        return values
    import torch

    dense = values.layout == torch.strided and not (values.is_meta or values.is_quantized or values.is_nested)
    if not dense or str(values.dtype).removeprefix("torch.") not in _TENSOR_TYPES:
        raise ValueError(
            f"expected a dense tensor of bools, integers or floats, got {values.layout}, {values.dtype}, on "
            f"{values.device}"
        )
    values = values.detach().cpu().resolve_neg()
    narrow = values.is_floating_point() and values.dtype not in (torch.float16, torch.float32, torch.float64)
    return (values.float() if narrow else values).numpy()
