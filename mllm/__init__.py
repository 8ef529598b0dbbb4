"""The Alpha-CLIP tower inside language models. Importing this package registers its classes with the Auto classes."""

from mllm.loading import load
from mllm.processing_llava import AlphaLlavaProcessor
from mllm.quiet import silence_other_libraries

__all__ = ["AlphaLlavaProcessor", "load"]

silence_other_libraries()
