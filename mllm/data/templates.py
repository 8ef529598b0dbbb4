"""Prompts for samples without a question, which ask for a description."""

# The first is the default question of `region-chat`.
DESCRIBE_REGION_WORDINGS = (
    "Describe this region.",
    "What is this?",
    "What is in this region?",
    "Give a short description of this region.",
)
DESCRIBE_REGION = DESCRIBE_REGION_WORDINGS[0]

# LLaVA-1.5's suffix of questions with short answers. Source: haotian-liu/LLaVA, docs/Evaluation.md.
SHORT_ANSWER = "Answer the question using a single word or phrase."

# Presets by name. Where a published prompt has a placeholder for the region, with words around it, these have "this
# region", because the alpha channel marks the region.
WORDINGS = {
    "own": DESCRIBE_REGION_WORDINGS,
    # lmms-eval's RefCOCOg tasks, unchanged: lmms_eval/tasks/refcocog/utils.py
    "lmms-eval": ("Provide a short description for this region.",),
    # GPT4RoI's, used in Alpha-CLIP's paper: jshilong/GPT4RoI f6306fa, gpt4roi/datasets/vg.py, FINAL_QUESTIONS, without
    # ten that repeat these with "please" or "exactly".
    "gpt4roi": (
        "Can you provide me with a detailed description of this region in the picture?",
        "I'm curious about this region in the picture. Could you describe it in detail?",
        "What can you tell me about this region in the image?",
        "I'd like to know more about this region in the photo. Can you give me a detailed description?",
        "Could you describe this region in the picture in great detail?",
        "What details can you give me about this region in the photo?",
        "Please provide me with a comprehensive description of this region in the image.",
        "Can you give me a detailed account of this region in the picture?",
        "I'm interested in learning more about this region in the photo. Can you describe it in detail?",
        "What is this region in the picture like? Could you give me a detailed description?",
    ),
}


def wordings(preset: str) -> tuple[str, ...]:
    """The prompts of a preset.

    Raises:
        ValueError: If the preset is unknown.
    """
    if preset not in WORDINGS:
        raise ValueError(f"wordings: expected one of {', '.join(WORDINGS)}, got {preset!r}")
    return WORDINGS[preset]
