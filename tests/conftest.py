"""Fixtures that several test files share."""

import gc
import os
import signal

# Before torch is imported. Tiny models gain nothing from threads, which wait for each other in busy loops. The options
# of Java suit runs of seconds.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["JAVA_TOOL_OPTIONS"] = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.alpha_maps import fed_pixels  # noqa: F401, a fixture
from tests.compatibility import (  # noqa: F401, hooks and fixtures
    measured,
    pytest_addoption,
    pytest_configure,
    pytest_runtest_makereport,
    pytest_sessionfinish,
)
from tests.files import ROOT
from tests.processes import ForkServer
from tests.tiny import build_tiny_llava, build_tiny_llava_next, save_model, tiny_vision_config

# Background jobs of a shell ignore SIGINT, and so would their child processes.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The same for SIGHUP under nohup. Child processes do not inherit a handler, unlike SIG_IGN, so they end on SIGHUP.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_collection_finish():
    """Exclude imported objects from garbage collection, which Trainer runs often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Exclude objects that earlier test files left in caches, too."""
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data():
    """Folder with real annotations and photographs: `ALPHA_SHARED_DATA`, or ../shared/data."""
    folder = Path(os.environ.get("ALPHA_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found: {folder}; set ALPHA_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def processes():
    """Starts processes quickly: see `tests.processes`."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def embedded():
    """The embedded model and its processor."""
    import mllm

    return mllm.load(device="cpu")


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory):
    """A folder with a random tiny CLIP vision tower of Transformers."""
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**tiny_vision_config()))
    return save_model(tmp_path_factory.mktemp("clip"), model)


@pytest.fixture(scope="session")
def tiny_llava_dir(tmp_path_factory):
    """A folder with a random tiny LLaVA with our tower (nonzero alpha weight) and its processor."""
    folder = tmp_path_factory.mktemp("tiny_llava")
    return save_model(folder, *build_tiny_llava(alpha_std=0.3))


@pytest.fixture(scope="session")
def tiny_llava(tiny_llava_dir):
    """The model and processor of `tiny_llava_dir`."""
    import mllm

    return mllm.load(tiny_llava_dir, device="cpu")


@pytest.fixture(scope="session")
def tiny_llava_next():
    """A random tiny LLaVA-NeXT with our tower (nonzero alpha weight), and its processor."""
    return build_tiny_llava_next()


@pytest.fixture(scope="session")
def tiny_llava_next_dir(tiny_llava_next, tmp_path_factory):
    """A folder with the model and processor of `tiny_llava_next`."""
    folder = tmp_path_factory.mktemp("tiny_llava_next")
    for part in tiny_llava_next:
        part.save_pretrained(folder)
    return folder
