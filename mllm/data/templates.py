"""Question wordings for samples that have no question of their own."""

# The first is what `region-chat` asks when nothing is asked.
DESCRIBE_REGION_WORDINGS = (
    "Describe this region.",
    "What is this?",
    "What is in this region?",
    "Give a short description of this region.",
)
DESCRIBE_REGION = DESCRIBE_REGION_WORDINGS[0]
