"""The image decoder: files, PIL images, arrays and tensors -> RGB images as displayed.

- EXIF orientation is applied once. Unreadable EXIF is ignored, and the image is used as stored.
- Of a file with several frames or pages, the first is used; of a PIL image, the current frame.
- Transparent images are composited onto white.
- 16-bit values are divided by 257 (65535 becomes 255). Wider integers are interpreted as 8-bit values if their maximum
  is at most 255, and as 16-bit values if it is at most 65535. Floats are interpreted as 0..1 if their maximum is at
  most 1, and as 0..255 if it is from 2 to 255. Any other range, and NaN, is an error.
- 16-bit color is reduced to its upper 8 bits, as PIL does for files.
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

MAX_PIXELS = 100_000_000  # of one image: 0.4 GB as RGB, which PIL stores in 4 bytes per pixel

# Exceptions that PIL raises for damaged files, found by damaging files of all formats at random
# (tests/unit/vision_tower/test_damaged_images.py). Only calls of PIL are wrapped (`reading`), so that a TypeError in
# our code is not hidden.
DAMAGE_ERRORS = (
    OSError,  # most formats; UnidentifiedImageError is one
    ValueError,
    SyntaxError,  # PNG, TIFF, EXIF
    RuntimeError,  # AVIF; NotImplementedError (DDS, BLP) is one
    TypeError,  # IM: a fractional size
    IndexError,  # IPTC
    AssertionError,  # ICNS: a palette image without a palette
    struct.error,  # EXIF
    Image.DecompressionBombError,
)
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STRIP = 4_000_000  # pixels converted at a time; an intermediate copy of a large image would take 0.4 GB
_TOLERANCE = 1e-3  # by which floats may exceed their range after rounding and interpolation
_TENSOR_TYPES = "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 bfloat16 float32 float64".split()
_TENSOR_TYPES += "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu".split()
_TRANSPARENT_MODES = ("LA", "La", "PA", "RGBA", "RGBa")


def decode_image(
    source: Any, *, name: str | None = None, max_pixels: int = MAX_PIXELS, input_data_format: str | None = None
) -> Image.Image:
    """Decode an image.

    Args:
        source: A path, the bytes of a file, a file object, a PIL image, or a numpy array or torch tensor: (H, W),
            (H, W, C) or (C, H, W), where C is 1 (gray), 2 (gray and alpha), 3 (RGB) or 4 (RGBA). If the shape is
            ambiguous, a numpy array is (H, W, C) and a tensor is (C, H, W).
        name: Name of the image in messages.
        max_pixels: Maximum width * height.
        input_data_format: "channels_first" or "channels_last", for arrays.

    Returns:
        The image as displayed, in mode RGB and without EXIF. It is `source` itself if nothing has to be changed.

    Raises:
        ValueError: If the image is not found, cannot be read, is damaged, has too many pixels, or has an unsupported
            range of values (see the module's docstring). The message has one line.
    """
    name = describe(source) if name is None else name
    if isinstance(source, np.ndarray) or is_tensor(source):
        image = _from_array(source, name, max_pixels, input_data_format)
    else:
        image = open_image(source, name=name, max_pixels=max_pixels)
    return _to_rgb(image, name)


def open_image(source: Any, *, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Load an image file or PIL image and apply its EXIF orientation, without converting its mode.

    Raises:
        ValueError: As in `decode_image`.
    """
    name = describe(source) if name is None else name
    if isinstance(source, Image.Image):
        return _load(source, name, max_pixels)
    with _open_file(source, name) as image:
        return _load(image, name, max_pixels)


def image_size(source: Any, *, name: str | None = None) -> tuple[int, int]:
    """Width and height in pixels of an image file as displayed, read from its header if PIL supports this.

    Raises:
        ValueError: If the file is not found, is not an image, or has more than `MAX_PIXELS` pixels. Damage after the
            header is not detected.
    """
    name = describe(source) if name is None else name
    with _open_file(source, name) as image:
        _check_pixels(image.width, image.height, name, MAX_PIXELS)  # before EXIF, for which PIL reads all of a PNG
        # PIL has already swapped the size of a TIFF
        swapped = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
        return image.size[::-1] if swapped else image.size


def describe(source: Any) -> str:
    """The name of an image in messages."""
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
    """Convert exceptions of PIL to a ValueError with a one-line message. Use it around calls of PIL only."""
    try:
        with warnings.catch_warnings():
            # PIL warns at half of the size that is an error
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ValueError(f"image file not found: {name}") from None
    except Image.DecompressionBombError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} has too many pixels to be decoded safely ({reason})") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image in a format supported by PIL") from None
    except DAMAGE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot read the image {name}: {reason}") from error


class _File(io.BufferedReader):
    """A file for PIL with bounded reads. PIL requests the length stated in a damaged file, which Python would allocate.

    A file that PIL opens by name is memory-mapped, which gives rotated TIFFs the wrong size.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__(io.FileIO(path))
        self._length = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        return super().read(-1 if size is None or size < 0 else min(size, self._length))


@contextlib.contextmanager
def _open_file(source: Any, name: str) -> Iterator[Image.Image]:
    with contextlib.ExitStack() as stack:
        if isinstance(source, bytes | bytearray | memoryview):
            source = io.BytesIO(source)
        elif isinstance(source, str | os.PathLike):
            if os.path.exists(source) and not os.path.isfile(source):  # reading a pipe would block forever
                kind = "folder" if os.path.isdir(source) else "device or pipe"
                raise ValueError(f"expected an image file, got a {kind}: {name}")
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
    """Prevent PIL from memory-mapping an image that it opened by name, see `_File`."""
    filename = getattr(image, "filename", None)
    if not filename:
        yield
        return
    image.filename = ""
    try:
        yield
    finally:
        image.filename = filename


def _load(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Read the pixels and apply the EXIF orientation."""
    if image.format == "EPS":
        raise ValueError(f"{name} is an EPS file, which contains code; convert it to PNG")
    _check_pixels(image.width, image.height, name, max_pixels)
    with reading(name), _unnamed(image):
        image.load()
    _check_pixels(image.width, image.height, name, max_pixels)  # the header of an ICO can state another size
    method = _TRANSPOSES.get(_orientation(image))
    if method is None:
        return image
    with reading(name):
        transposed = image.transpose(method)
    transposed.info = {key: value for key, value in image.info.items() if key == "transparency"}  # without EXIF
    return transposed


def _check_pixels(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"{name} is empty: it has {width} x {height} pixels")
    if width * height > max_pixels:
        raise ValueError(
            f"{name} has too many pixels: {width} x {height} = {width * height:,}, expected at most {max_pixels:,}; "
            "reduce its size, or increase max_pixels"
        )


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except DAMAGE_ERRORS as error:
        logger.info("ignoring unreadable EXIF: %s", error)
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
            if strip.mode == "La":  # the only conversion that PIL supports
                strip = strip.convert("LA")
            if transparent:
                strip = strip.convert("RGBA")
                strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
            rgb.paste(strip.convert("RGB"), (0, top))
    return rgb


def has_transparency(image: Image.Image) -> bool:
    """Whether an image can have transparent pixels, by its mode, palette or `transparency`."""
    palette = image.palette if image.mode == "P" else None
    return (
        image.mode in _TRANSPARENT_MODES
        or image.info.get("transparency") is not None
        or (palette is not None and palette.mode.endswith("A"))
    )


def _deep_gray(image: Image.Image, name: str) -> Image.Image:
    """Convert 16-bit or 32-bit gray to RGB. Some versions of PIL read 16-bit PNG and PPM as 32-bit integers."""
    with reading(name):
        values = np.asarray(image)
    gray = _to_8_bits(values, name, deep=image.format in ("PNG", "PPM"))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray = np.where(values == transparent, np.uint8(255), gray)
    return Image.merge("RGB", [Image.fromarray(gray)] * 3)


def _to_8_bits(values: np.ndarray, name: str, deep: bool = False, color: bool = False) -> np.ndarray:
    """Convert values to uint8 by the rules in the module's docstring; `deep` integers have 16 bits."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "iuf":
        raise ValueError(f"expected numeric pixels, got the {name}")
    low, high = values.min(), values.max()  # NaN if any is
    if values.dtype.kind == "f":
        scale = 255 if high <= 1 + _TOLERANCE else 1 if 2 <= high <= 255 + _TOLERANCE else 0
        if low >= -_TOLERANCE and scale:
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
    """Whether a value is a tensor, without importing torch, which takes seconds."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def as_array(values: np.ndarray | torch.Tensor) -> np.ndarray:
    """Convert a tensor on any device to a numpy array; bfloat16 and smaller floats become float32.

    Raises:
        ValueError: If the tensor is not dense, or its dtype is not bool, integer or float.
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
