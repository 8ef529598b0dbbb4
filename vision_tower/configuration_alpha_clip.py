"""Configurations: those of CLIP with a separate `model_type`, so that Auto classes create our models."""

from __future__ import annotations

from typing import Any

from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig


class AlphaCLIPVisionConfig(CLIPVisionConfig):
    """Configuration of the vision tower, with the fields of `CLIPVisionConfig`.

    `num_channels` is 3: it counts RGB, without alpha. `from_pretrained` also accepts CLIP directories (vision tower or
    full CLIP).
    """

    model_type = "alpha_clip_vision_model"

    def __post_init__(self, **kwargs) -> None:
        """Check `num_channels`.

        Raises:
            ValueError: If it is not 3.
        """
        super().__post_init__(**kwargs)
        if self.num_channels != 3:
            raise ValueError(
                f"expected num_channels 3 (RGB, without alpha), got {self.num_channels}; an exported tower is for use "
                "without this package: load the original instead (docs/export.md), or an exported LLaVA with mllm.load"
            )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config file, including the vision config of a CLIP.

        Raises:
            ValueError: If it is the config of another model type.
        """
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if "vision_config" in config and config.get("model_type") in ("clip", AlphaCLIPConfig.model_type):
            config = config["vision_config"]
        return _as_alpha(cls, config, "clip_vision_model", pretrained_model_name_or_path), kwargs


class AlphaCLIPConfig(CLIPConfig):
    """Configuration of the full model (text and vision towers), for zero-shot classification.

    `from_pretrained` also accepts CLIP directories.
    """

    model_type = "alpha_clip"
    sub_configs_defaults = {"vision_config": AlphaCLIPVisionConfig, "text_config": CLIPTextConfig}

    text_config: dict | CLIPTextConfig | None = None
    vision_config: dict | AlphaCLIPVisionConfig | None = None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config file, including that of a CLIP.

        Raises:
            ValueError: If it is the config of another model type.
        """
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        config = _as_alpha(cls, config, "clip", pretrained_model_name_or_path)
        vision = dict(config.get("vision_config") or {})
        vision.pop("model_type", None)
        return {**config, "vision_config": vision}, kwargs


def _as_alpha(cls: type[PreTrainedConfig], config: dict[str, Any], clip_type: str, name: Any) -> dict[str, Any]:
    """Set our `model_type`, after checking that it is CLIP's, ours, or missing (in old CLIP files)."""
    found = config.get("model_type", clip_type)
    if config and found not in (clip_type, cls.model_type):
        raise ValueError(f"expected a {clip_type} or {cls.model_type} directory, got model_type {found!r} in {name}")
    return {**config, "model_type": cls.model_type}
