"""Detects regions that a Transformers pipeline drops before it calls the processor."""

from __future__ import annotations

from collections.abc import Mapping
from types import FrameType

from vision_tower.region_arguments import is_region_name

_PIPELINE = "transformers.pipelines.image_text_to_text"


def check_pipeline_inputs(caller: FrameType | None) -> None:
    """Raise an error if the calling pipeline has dropped a region that the user passed to it.

    `ImageTextToTextPipeline` passes on only `images` and `text` of a dictionary of inputs (also from a dataset or
    generator), and only `processor_kwargs` of the arguments if they are given. The call of the processor is the same
    with and without the dropped values, so they can only be found in the variables of the pipeline's method.

    Args:
        caller: The frame that calls the processor, or None.

    Raises:
        ValueError: If the pipeline has dropped a value that is named like a region.
    """
    if caller is None or caller.f_globals.get("__name__") != _PIPELINE:
        return
    variables = caller.f_locals
    inputs, settings = variables.get("inputs"), variables.get("processing_kwargs") or {}
    dropped = {}
    if isinstance(inputs, Mapping):
        dropped |= {f"[{name!r}] of the inputs": inputs[name] for name in inputs.keys() - {"images", "text"}}
    if variables.get("processor_kwargs") is not settings:
        dropped |= {f"{name}= in addition to processor_kwargs": value for name, value in settings.items()}
    # rows of a dataset may have other columns
    if names := sorted(name for name, value in dropped.items() if value is not None and is_region_name(name)):
        raise ValueError(
            f"the pipeline ignores {', '.join(names)}; pass regions= with images= and text=, in processor_kwargs, or "
            "in the image items of messages"
        )
