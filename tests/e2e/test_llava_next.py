"""LLaVA-NeXT in the commands: tuned on regions, merged, asked and evaluated."""

import json

import pytest
from safetensors.torch import load_file

from alpha_clip_commands import region_tune
from alpha_clip_commands.alpha_clip import main as alpha_clip
from alpha_clip_commands.region_eval import main as region_eval
from mllm import RegionChat
from mllm.data.shapes import visual_genome_layout
from tests.files import read_json
from tests.tiny import noise_image
from tests.training import write_splits


@pytest.mark.slow
def test_tuned_merged_asked_and_evaluated(tiny_llava_next_dir, tmp_path):
    write_splits(visual_genome_layout, tmp_path, 4, ("train", "val", "test"))
    (tmp_path / "recipe.yaml").write_text(
        f"""
model: {tiny_llava_next_dir}
data: [{tmp_path / "train"}, {tmp_path / "val"}]
lora_r: 4
train_parts: [multi_modal_projector, alpha]
learning_rate: 1.0e-2
max_steps: 2
eval_strategy: steps
eval_steps: 2
eval_samples: 3
per_device_train_batch_size: 2
gradient_checkpointing: true
save_strategy: "no"
use_cpu: true
disable_tqdm: true
"""
    )
    tuned, merged, out = (str(tmp_path / name) for name in ("tuned", "merged", "out"))
    assert region_tune.main([str(tmp_path / "recipe.yaml"), "--output_dir", tuned]) == 0
    adapter = load_file(tmp_path / "tuned" / "adapter_model.safetensors")
    assert any("patch_embedding.alpha" in name for name in adapter)
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)

    assert alpha_clip(["merge", tuned, merged, "--model", str(tiny_llava_next_dir)]) == 0
    question = (noise_image(100, 40), "box:10,5,40,30", "What?")
    answers = [
        RegionChat.from_pretrained(*source, **{"device": "cpu", **options}).ask(*question, max_new_tokens=8)
        for source, options in [([merged], {}), ([tiny_llava_next_dir], {"adapter": tuned})]
    ]
    assert answers[0] == answers[1]

    task = ["run", "--task", "shapes-caption", "--data", str(tmp_path / "test"), "--metrics", "literal_match"]
    settings = ["--limit", "4", "--max-new-tokens", "2", "--all-views", "--device", "cpu"]
    assert region_eval([*task, *settings, "--model", merged, "--out", out]) == 0
    run, metrics = (read_json(tmp_path / "out" / f"{name}.json") for name in ("run", "metrics"))
    assert "tiles" in json.dumps(run) and metrics["items"] == 4
