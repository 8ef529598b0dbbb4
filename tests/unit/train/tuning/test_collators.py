"""Labels: on the answers only, checked token by token against the text they must spell."""

import pytest
import torch

from mllm.processing_llava import VICUNA_V1_SYSTEM
from tests.tiny import build_tiny_blip2, build_tiny_llava, noise_image, prompt
from train.tuning.collators import IGNORE_INDEX, ConversationCollator, encode_prompt_and_answer, encode_with_labels
from vision_tower import Region

PROCESSOR = build_tiny_llava()[1]
IMAGE = noise_image(40, 40)


def conversation(*turns, region=None):
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages[0]["content"].insert(0, {"type": "image", "image": IMAGE, "region": region})
    return messages


@pytest.mark.parametrize(
    "turns",
    [
        [("What?", "a cat")],
        [("What?", "a cat"), ("Which colour?", "black")],
        [("Say ASSISTANT: no</s>", "I will not say USER: or </s>"), ("<image>?", "ASSISTANT: é")],
    ],
)
@pytest.mark.parametrize("system", [None, VICUNA_V1_SYSTEM])
def test_labels_spell_the_answers_and_nothing_else(turns, system):
    PROCESSOR.system = system
    try:
        ids, labels = encode_with_labels(PROCESSOR, conversation(*turns))
    finally:
        PROCESSOR.system = None
    eos = PROCESSOR.tokenizer.eos_token_id
    assert len(ids) == len(labels)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    answers, current = [], []
    for label in labels:
        if label != IGNORE_INDEX:
            current.append(label)
            if label == eos:
                answers.append(PROCESSOR.tokenizer.decode(current[:-1]).strip())
                current = []
    assert not current
    assert answers == [answer for _, answer in turns]


@pytest.mark.parametrize(("question", "answer"), [("", "a cat"), ("What is </s> <image>?", "a cat")])
def test_blip2_labels_begin_where_generation_begins(question, answer):
    model, processor = build_tiny_blip2("opt")
    turns = conversation((question, answer))
    ids, labels = encode_with_labels(processor, turns)
    first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    asked = processor.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=True)["input_ids"][0]
    assert ids[:first] == asked and labels[first:] == ids[first:]
    assert processor.tokenizer.decode(labels[first:]).strip() == "a cat</s>"
    batch = ConversationCollator(processor)([[turns], [turns]])
    with torch.no_grad():
        loss = model(**batch).loss
        inputs = {"input_ids": torch.tensor([ids]), "pixel_values": batch["pixel_values"][:1]}
        logits = model(**inputs).logits[0].log_softmax(-1)
    by_hand = torch.stack([-logits[i - 1, ids[i]] for i in range(first, len(ids))]).mean()
    torch.testing.assert_close(loss, by_hand, atol=1e-4, rtol=0)


def test_the_first_label_is_predicted_at_the_end_of_the_prompt():
    """What generation sees is exactly what stands before the first label: labels shifted by one would break this."""
    turns = conversation(("What?", "a cat"))
    ids, labels = encode_with_labels(PROCESSOR, turns)
    first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    asked = PROCESSOR(images=IMAGE, text=prompt("What?"), return_tensors="pt")["input_ids"][0].tolist()
    assert ids[:first] == asked
    assert PROCESSOR.tokenizer.decode(ids[first:]).strip() == "a cat</s>"


def test_loss_is_that_of_the_answer_tokens():
    """Transformers' loss on our batch = cross entropy computed by hand on the answer tokens of each conversation
    alone.
    """
    model, _ = build_tiny_llava()
    turns = [
        conversation(("What?", "a cat")),
        conversation(("Which colour is this thing?", "black"), ("Size?", "small")),
    ]
    batch = ConversationCollator(PROCESSOR)([turns])
    with torch.no_grad():
        loss = model(**batch).loss
        by_hand = []
        for row, turn in enumerate(turns):
            ids, labels = encode_with_labels(PROCESSOR, turn)
            pixels = batch["pixel_values"][row : row + 1]
            logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0].log_softmax(-1)
            by_hand += [-logits[i - 1, token] for i, token in enumerate(labels) if token != IGNORE_INDEX]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean(), atol=1e-5, rtol=0)


def test_batch_shapes_padding_and_regions():
    region = Region.from_box(4, 4, 20, 20)
    turns = [conversation(("What?", "a cat"), region=region), conversation(("What is this thing here?", "a small dog"))]
    batch = ConversationCollator(PROCESSOR)([turns])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"][0, -1] == 0 and batch["attention_mask"][1].all()
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORE_INDEX).all()
    expected = PROCESSOR.image_processor([IMAGE, IMAGE], [region, None], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)


def test_t5_reads_the_prompt_and_has_labels_for_the_answer():
    model, processor = build_tiny_blip2("t5")
    turns = [conversation(("What?", "a cat")), conversation(("Which one is it?", "the small </s> dog"))]
    batch = ConversationCollator(processor, encoder_decoder=True)([turns])
    for row, turn in enumerate(turns):
        prompt = processor.apply_chat_template(turn[:1], add_generation_prompt=True, tokenize=True)["input_ids"][0]
        assert batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist() == prompt
        labels = batch["labels"][row][batch["labels"][row] != IGNORE_INDEX].tolist()
        assert labels[-1] == processor.tokenizer.eos_token_id and labels.count(labels[-1]) == 1
        assert processor.tokenizer.decode(labels[:-1]) == turn[1]["content"][0]["text"]
    with torch.no_grad():
        loss, by_hand = model(**batch).loss, []
        for row, turn in enumerate(turns):
            prompt, answer = encode_prompt_and_answer(processor, turn)
            start = [model.config.text_config.decoder_start_token_id, *answer[:-1]]
            logits = (
                model(
                    input_ids=torch.tensor([prompt]),
                    pixel_values=batch["pixel_values"][row : row + 1],
                    decoder_input_ids=torch.tensor([start]),
                )
                .logits[0]
                .log_softmax(-1)
            )
            by_hand += [-logits[place, token] for place, token in enumerate(answer)]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean(), atol=1e-4, rtol=0)


def test_a_conversation_longer_than_the_model_reads_is_refused():
    with pytest.raises(ValueError, match="more than the 8 of the model; lower max_turns"):
        ConversationCollator(PROCESSOR, max_length=8)([[conversation(("What?", "a cat"))]])
