"""Model + samples -> predictions, through the code that `region-chat` answers with."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm.auto import tqdm

from mllm.answering import RegionChat
from mllm.data.samples import RegionSample


def generate(
    chat: RegionChat,
    samples: Sequence[RegionSample],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    label: str = "answers",
) -> list[str]:
    """Answer every sample, greedily, in order.

    Args:
        chat: The model behind `region-chat`.
        samples: Each with one region; a sample without a question asks for a description.
        batch_size: Answers made in one `generate` call.
        max_new_tokens: Longest answer, in tokens.
        label: Name on the progress bar.

    Raises:
        ValueError: If a picture cannot be read or a region does not fit it.
    """
    predictions: list[str] = []
    for start in tqdm(range(0, len(samples), batch_size), desc=label, unit="batch"):
        batch = samples[start : start + batch_size]
        requests = [(sample.open_image(), sample.regions[0], sample.question) for sample in batch]
        predictions.extend(chat.answer_batch(requests, max_new_tokens=max_new_tokens))
    return predictions
