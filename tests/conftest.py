"""Fixtures that several test files share."""

import gc
import os
import signal

# Before torch is imported. Tiny models gain nothing from threads, which wait for each other at full speed; Java
# compiles and collects as for runs of seconds.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["JAVA_TOOL_OPTIONS"] = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.compatibility import (  # noqa: F401, pytest finds hooks and fixtures here
    measured,
    pytest_addoption,
    pytest_configure,
    pytest_runtest_makereport,
    pytest_sessionfinish,
)
from tests.drawn_back import fed_pixels  # noqa: F401, a fixture
from tests.files import ROOT
from tests.processes import ForkServer
from tests.tiny import build_tiny_llava, build_tiny_llava_next, save_model, tiny_vision_config

# A shell's background jobs ignore Ctrl-C, and what they start would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Nor one started with nohup; a handler of ours, which what we start does not inherit, so that it heeds SIGHUP.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_collection_finish():
    """What was imported stays: the garbage collector, which Trainer calls in each run, need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Nor at what earlier files have left in caches."""
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data():
    """Folder of real records and photographs: `ALPHA_SHARED_DATA`, or ../shared/data."""
    folder = Path(os.environ.get("ALPHA_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the real data for checks is not here ({folder}); set ALPHA_SHARED_DATA")
    return folder


@pytest.fixture(scope="session")
def processes():
    """Starts processes at little cost: see `tests.processes`."""
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
    """A random tiny CLIP vision tower of Transformers, in a folder."""
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**tiny_vision_config()))
    return save_model(tmp_path_factory.mktemp("clip"), model)


@pytest.fixture(scope="session")
def tiny_llava_dir(tmp_path_factory):
    """A random tiny LLaVA with our tower (alpha weight not zero) and its processor, in a folder."""
    folder = tmp_path_factory.mktemp("tiny_llava")
    return save_model(folder, *build_tiny_llava(alpha_std=0.3))


@pytest.fixture(scope="session")
def tiny_llava(tiny_llava_dir):
    """That model, loaded, and its processor."""
    import mllm

    return mllm.load(tiny_llava_dir, device="cpu")


@pytest.fixture(scope="session")
def tiny_llava_next():
    """A random tiny LLaVA-NeXT with our tower (alpha weight not zero), and its processor."""
    return build_tiny_llava_next()


@pytest.fixture(scope="session")
def tiny_llava_next_dir(tiny_llava_next, tmp_path_factory):
    """Both in a folder."""
    folder = tmp_path_factory.mktemp("tiny_llava_next")
    for part in tiny_llava_next:
        part.save_pretrained(folder)
    return folder
