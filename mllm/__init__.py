"""The Alpha-CLIP tower inside language models. Importing this package registers its classes with the Auto classes."""

from mllm.loading import load
from mllm.processing_llava import AlphaLlavaProcessor

__all__ = ["AlphaLlavaProcessor", "load"]
