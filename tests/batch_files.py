"""Batch files of `region-chat`: images and requests in a folder, and runs of them."""

import pytest

from mllm.inference import RegionChat
from mllm.region_chat.batch import read_requests, run_batch
from mllm.region_chat.batch_output import BatchOutput
from tests.files import read_json_lines, write_json_lines
from tests.tiny import noise_image

BOX = {"box": [2, 2, 30, 30]}


@pytest.fixture(name="folder")
def request_folder(tmp_path):
    noise_image(60, 40).save(tmp_path / "a.png")
    noise_image(40, 60, seed=1).save(tmp_path / "b.png")
    return tmp_path


def good(count):
    images = ("a.png", "b.png")
    return [{"id": i, "image": images[i % 2], "region": {"box": [i % 9, 2, 30, 30 - i % 5]}} for i in range(count)]


def write(folder, records):
    return write_json_lines(folder / "requests.jsonl", records)


def arguments(model, folder, output="answers.jsonl", size=4, tokens=3):
    flags = ["--model", model, "--batch", folder / "requests.jsonl", "--output", folder / output]
    return [str(flag) for flag in [*flags, "--batch-size", size, "--max-new-tokens", tokens]]


def answers(folder, output="answers.jsonl"):
    return read_json_lines(folder / output)


@pytest.fixture(name="asked")
def asked_batches(monkeypatch):
    """The boxes of each batch that reaches the model."""
    batches = []
    real = RegionChat.answer_each

    def spy(self, requests, **options):
        answers = real(self, requests, **options)
        pairs = zip(requests, answers, strict=True)
        if regions := [request[1] for request, answer in pairs if not isinstance(answer, ValueError)]:
            batches.append([region.data for region in regions])
        return answers

    monkeypatch.setattr(RegionChat, "answer_each", spy)
    return batches


def batch(tiny_llava, folder, output="answers.jsonl", **options):
    """Run the requests in this process with a loaded model."""
    requests = folder / "requests.jsonl"
    place = BatchOutput(str(folder / output))
    read = read_requests(str(requests))
    place.check([requests])
    settings = {"model_name": "tiny", "batch_size": 4, "max_new_tokens": 3, **options}
    return run_batch(RegionChat(*tiny_llava), str(requests), read, place, **settings)
