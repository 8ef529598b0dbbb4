"""The Alpha-CLIP tower inside language models. Importing this package registers its classes with the Auto classes."""

from mllm.inference import RegionChat
from mllm.loading import load
from mllm.processing_llava import AlphaLlavaProcessor
from mllm.quiet import silence_other_libraries
from vision_tower import Region

__all__ = ["AlphaLlavaProcessor", "Region", "RegionChat", "load"]

silence_other_libraries()
