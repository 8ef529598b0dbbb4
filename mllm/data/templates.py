"""Question wordings for samples that have no question of their own."""

# The first is what `region-chat` asks when nothing is asked.
DESCRIBE_REGION_WORDINGS = (
    "Describe this region.",
    "What is this?",
    "What is in this region?",
    "Give a short description of this region.",
)
DESCRIBE_REGION = DESCRIBE_REGION_WORDINGS[0]

# Presets by name. lmms-eval's is the prompt of its RefCOCOg tasks (lmms_eval/tasks/refcocog).
WORDINGS = {
    "own": DESCRIBE_REGION_WORDINGS,
    "lmms-eval": ("Provide a short description for this region.",),
}


def wordings(preset: str) -> tuple[str, ...]:
    """The wordings of a preset.

    Raises:
        ValueError: If there is no such preset.
    """
    if preset not in WORDINGS:
        raise ValueError(f"wordings: expected one of {', '.join(WORDINGS)}, got {preset!r}")
    return WORDINGS[preset]
