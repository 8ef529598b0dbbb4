"""Write data/released_loss.safetensors: random embeddings, and the outputs of the original training code.

    python -m tests.parity.make_released_loss_fixture ALPHA_CLIP_CHECKOUT

The reference is SunzeY/AlphaCLIP at e5676c9: `inference` of train/train/train_grit_1m.py, `concat_all_gather` of
train/utils.py, and `cosine_lr` of train/scheduler.py. `inference` is a method of a class that loads weights onto a GPU,
in a file that imports data sets that are not public: only its lines are executed, unchanged, with towers that return
their input. All values are float64, to distinguish wrong gradients from rounding.
"""

import ast
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn import functional

FIXTURE = Path(__file__).parent / "data" / "released_loss.safetensors"
RANKS = {"alone": 1, "group_of_one": 1, "group_of_two": 2}  # "alone" has no process group
SCHEDULES = ((0, 50), (10, 50), (200, 5000), (800, 5000))  # (warm-up, steps); the last two are of the scripts


def main(checkout: str) -> None:
    """Run the original loss in each setting, and its schedule, and save inputs and outputs."""
    torch.manual_seed(11)
    inputs = {name: torch.randn(8, 6, dtype=torch.float64) for name in ("images", "texts")}
    inputs["log_scale"] = torch.tensor(1.5, dtype=torch.float64)
    content = {f"input.{name}": tensor for name, tensor in inputs.items()}
    for setting, ranks in RANKS.items():
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(run_rank, (checkout, folder, setting, inputs), nprocs=ranks)
            for rank in range(ranks):
                output = torch.load(Path(folder) / f"{rank}.pt")
                content |= {f"{setting}.{rank}.{name}": tensor for name, tensor in output.items()}
    scheduler = load(checkout, "scheduler")
    for warmup, steps in SCHEDULES:
        optimizer = SimpleNamespace(param_groups=[])
        rate = scheduler.cosine_lr(optimizer, base_lr=1.0, warmup_length=warmup, steps=steps)
        every = range(0, 2 * steps, steps // 50)
        factors = [rate(step) for step in every]
        content[f"schedule.{warmup}.{steps}.steps"] = torch.tensor(every)
        content[f"schedule.{warmup}.{steps}.factors"] = torch.tensor(factors, dtype=torch.float64)
    save_file({key: tensor.contiguous() for key, tensor in content.items()}, FIXTURE)


def run_rank(rank: int, checkout: str, folder: str, setting: str, inputs: dict[str, torch.Tensor]) -> None:
    """Loss and gradients of one process, with its share of the rows."""
    ranks = RANKS[setting]
    if setting != "alone":
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    rows = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    images, texts = (inputs[name][rows].clone().requires_grad_() for name in ("images", "texts"))
    log_scale = inputs["log_scale"].clone().requires_grad_()
    towers = SimpleNamespace(
        visual=lambda images, masks: images, encode_text=lambda texts: texts, logit_scale=log_scale
    )
    loss = original_inference(checkout)(SimpleNamespace(model=towers), images, None, texts)
    loss.backward()
    output = {"loss": loss.detach(), "images": images.grad, "texts": texts.grad, "log_scale": log_scale.grad}
    torch.save(output, Path(folder) / f"{rank}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def original_inference(checkout: str):
    """`CLIP_Clean_Train.inference`, as a function of (self, images, masks, texts)."""
    source = (Path(checkout) / "train" / "train" / "train_grit_1m.py").read_text(encoding="utf-8")
    (trainer,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    (method,) = (node for node in trainer.body if isinstance(node, ast.FunctionDef) and node.name == "inference")
    names = {"torch": torch, "dist": dist, "F": functional, **vars(load(checkout, "utils"))}
    exec(compile(ast.Module([method], []), "train_grit_1m.py", "exec"), names)
    return names["inference"]


def load(checkout: str, name: str) -> ModuleType:
    """A module of the original train folder."""
    spec = importlib.util.spec_from_file_location(name, Path(checkout) / "train" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(sys.argv[1])
