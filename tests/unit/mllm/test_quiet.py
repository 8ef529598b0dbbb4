"""Messages of other libraries that no user can act on are dropped, and no others. In processes: pytest has its own
warning filters and log handlers.
"""

import os
import subprocess
import sys

import pytest

from tests.processes import ROOT
from tests.tiny import noise_image

TUNING = """
import mllm
from peft import LoraConfig, get_peft_model
model, _ = mllm.load(device="cpu")
get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
"""


def lines(process):
    """What was printed, without progress bars."""
    return [line for line in process.output().replace("\r", "\n").split("\n") if line and "it/s]" not in line]


def test_an_adapter_prints_nothing(processes):
    assert [line for line in lines(processes.run(TUNING)) if "Loading weights" not in line] == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is installed on Linux only")
def test_a_new_process_prints_nothing():
    for name in ("bitsandbytes", "deepspeed"):
        pytest.importorskip(name, reason="an optional dependency; make setup installs it on Linux")
    code = "import mllm, peft, bitsandbytes\nfrom deepspeed.accelerator import get_accelerator\nget_accelerator()"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert process.stdout + process.stderr == ""


def test_genuine_warnings_still_come_through(processes):
    code = """
import mllm, logging, warnings
backend, deepspeed = logging.getLogger("bitsandbytes.backends.cpu.ops"), logging.getLogger("DeepSpeed")
text = "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure ..."
backend.warning(text, "No module named 'kernels'")
backend.warning(text, "libgomp is too old")
backend.warning("this CPU cannot run it")
deepspeed.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
deepspeed.warning("loss scale is zero")
logging.getLogger("transformers.modeling_utils").warning("weights are damaged")
warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning)
warnings.warn("`is_gradient_checkpointing` is wrong", UserWarning)
warnings.warn("your argument is deprecated", FutureWarning)
mllm.quiet.silence_other_libraries()
assert len(backend.filters) == len(deepspeed.filters) == 1
"""
    said = "\n".join(lines(processes.run(code)))
    for genuine in ("too old", "cannot run", "loss scale", "damaged", "is wrong", "your argument is deprecated"):
        assert genuine in said, said
    for noise in ("No module named", "Setting accelerator", "checkpointing` is deprecated"):
        assert noise not in said, said


def test_commands_change_no_level(tiny_llava_dir, tmp_path, processes):
    """What Transformers warns of while a command runs is printed."""
    noise_image(60, 40).save(tmp_path / "a.png")
    before = """
import mllm.inference, transformers
ask = mllm.inference.RegionChat.ask
def warned(self, *args, **kwargs):
    transformers.utils.logging.get_logger("transformers.generation.utils").warning("a genuine warning")
    return ask(self, *args, **kwargs)
mllm.inference.RegionChat.ask = warned
"""
    arguments = ["--model", tiny_llava_dir, "--image", tmp_path / "a.png", "--box=1,1,20,20", "--ask", "x"]
    said = lines(
        processes.run("alpha_clip_commands.region_chat:main", [*arguments, "--max-new-tokens", 2], before=before)
    )
    said = [line for line in said if not line.startswith(("importing", "model: "))]
    assert said[0].endswith("a genuine warning") and len(said) <= 3, said
