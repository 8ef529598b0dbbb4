"""Question wordings for samples that have no question of their own."""

# The first is what `region-chat` asks when nothing is asked.
DESCRIBE_REGION_WORDINGS = (
    "Describe this region.",
    "What is this?",
    "What is in this region?",
    "Give a short description of this region.",
)
DESCRIBE_REGION = DESCRIBE_REGION_WORDINGS[0]

# LLaVA-1.5's ending of a question that wants a short answer. Source: haotian-liu/LLaVA, docs/Evaluation.md.
SHORT_ANSWER = "Answer the question using a single word or phrase."

# Presets by name. Published wordings name a region by a placeholder; here alpha tells which it is, and the placeholder
# with the words around it has become "this region".
WORDINGS = {
    "own": DESCRIBE_REGION_WORDINGS,
    # lmms-eval's RefCOCOg tasks, unchanged: lmms_eval/tasks/refcocog/utils.py
    "lmms-eval": ("Provide a short description for this region.",),
    # GPT4RoI's, which Alpha-CLIP's paper tuned with: jshilong/GPT4RoI f6306fa, gpt4roi/datasets/vg.py, FINAL_QUESTIONS.
    # Ten of its twenty repeat these with "please" or "exactly", and are left out.
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
    """The wordings of a preset.

    Raises:
        ValueError: If there is no such preset.
    """
    if preset not in WORDINGS:
        raise ValueError(f"wordings: expected one of {', '.join(WORDINGS)}, got {preset!r}")
    return WORDINGS[preset]
