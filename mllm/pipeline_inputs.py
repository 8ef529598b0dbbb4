"""What a pipeline of Transformers drops before it calls the processor, and a region with it."""

from __future__ import annotations

from collections.abc import Mapping
from types import FrameType

from vision_tower.region_arguments import is_region_name

_PIPELINE = "transformers.pipelines.image_text_to_text"


def check_pipeline_inputs(caller: FrameType | None) -> None:
    """For processors: no region is ignored that the user has given to the pipeline that calls.

    `ImageTextToTextPipeline` passes on only `images` and `text` of a dictionary of inputs (also those of a dataset or
    generator), and only `processor_kwargs` of the arguments where these are given. A call of the processor looks the
    same with and without what is dropped; only the variables of the pipeline's method tell.

    Args:
        caller: The frame that calls the processor.

    Raises:
        ValueError: If the pipeline has dropped something that is named like a region.
    """
    if caller is None or caller.f_globals.get("__name__") != _PIPELINE:
        return
    variables = caller.f_locals
    inputs, settings = variables.get("inputs"), variables.get("processing_kwargs") or {}
    dropped = {}
    if isinstance(inputs, Mapping):
        dropped |= {f"[{name!r}] of the inputs": inputs[name] for name in inputs.keys() - {"images", "text"}}
    if variables.get("processor_kwargs") is not settings:
        dropped |= {f"{name}= beside processor_kwargs": value for name, value in settings.items()}
    # rows of a dataset have other columns, too
    if names := sorted(name for name, value in dropped.items() if value is not None and is_region_name(name)):
        raise ValueError(
            f"the pipeline ignores {', '.join(names)}; pass regions= with images= and text=, in processor_kwargs, or "
            "in the image items of messages"
        )
