"""Configurations: CLIP's own, under names of their own so that saving and loading keep the alpha channel."""

from __future__ import annotations

from typing import Any

from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, PreTrainedConfig


class AlphaCLIPVisionConfig(CLIPVisionConfig):
    """Configuration of the vision tower: every field is CLIP's. `num_channels` stays 3: it counts RGB, alpha is extra.

    A CLIP directory (vision tower or full CLIP) is accepted by `from_pretrained`.
    """

    model_type = "alpha_clip_vision_model"

    def __post_init__(self, **kwargs) -> None:
        """Check the channels.

        Raises:
            ValueError: If they are not 3.
        """
        super().__post_init__(**kwargs)
        if self.num_channels != 3:
            raise ValueError(
                f"expected num_channels 3 (RGB; alpha is extra), got {self.num_channels}: an exported tower is for use "
                "without this package, load what it was made from (docs/export.md); an exported LLaVA loads with "
                "mllm.load"
            )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config file; CLIP's vision config is taken as ours.

        Raises:
            ValueError: If the directory holds another kind of model.
        """
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if "vision_config" in config and config.get("model_type") in ("clip", AlphaCLIPConfig.model_type):
            config = config["vision_config"]
        return _as_alpha(cls, config, "clip_vision_model", pretrained_model_name_or_path), kwargs


class AlphaCLIPConfig(CLIPConfig):
    """Configuration of the full model (text and image towers) for zero-shot use. A CLIP directory is accepted."""

    model_type = "alpha_clip"
    sub_configs_defaults = {"vision_config": AlphaCLIPVisionConfig, "text_config": CLIPTextConfig}

    text_config: dict | CLIPTextConfig | None = None
    vision_config: dict | AlphaCLIPVisionConfig | None = None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config file; CLIP's config is taken as ours.

        Raises:
            ValueError: If the directory holds another kind of model.
        """
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        config = _as_alpha(cls, config, "clip", pretrained_model_name_or_path)
        vision = dict(config.get("vision_config") or {})
        vision.pop("model_type", None)
        return {**config, "vision_config": vision}, kwargs


def _as_alpha(cls: type[PreTrainedConfig], config: dict[str, Any], clip_type: str, name: Any) -> dict[str, Any]:
    """`config` under our model_type; only CLIP's type, ours, or none at all (old CLIP files) is taken."""
    found = config.get("model_type", clip_type)
    if config and found not in (clip_type, cls.model_type):
        raise ValueError(f"expected a {clip_type} or {cls.model_type} directory, got model_type {found!r} in {name}")
    return {**config, "model_type": cls.model_type}
