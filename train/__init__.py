"""Training of Alpha-CLIP with a contrastive loss, and fine-tuning of LLaVA and BLIP-2 with an alpha tower."""

# first, because it hides messages of libraries that the modules here import
import mllm  # noqa: F401
