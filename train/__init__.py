"""Training: Alpha-CLIP itself by contrast, and language models with an alpha tower."""

# first of all: it drops messages of libraries that the modules here import
import mllm  # noqa: F401
