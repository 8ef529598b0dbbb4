"""Filters messages of other libraries that users cannot act on.

Each is matched by its text. No logging level changes, so all other messages of these libraries are still shown.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import NamedTuple


class _Drops(NamedTuple):
    """Drops the records of one logger whose message begins with `start` and mentions `cause`.

    A tuple, since those are equal by value: `Logger.addFilter` then adds it once, even after a reload of this module.
    """

    start: str
    cause: str = ""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        return not (str(record.msg).startswith(self.start) and self.cause in record.getMessage())


# logger -> filtered message
_LOGGED = (
    # an optional package; PEFT and Transformers import bitsandbytes wherever it is installed, also for models that are
    # not quantized
    (
        "bitsandbytes.backends.cpu.ops",
        _Drops("Failed to load CPU gemm_4bit_forward", cause="No module named 'kernels'"),
    ),
    # logged for each matrix of models that are not in float16
    ("bitsandbytes.autograd._functions", _Drops("MatMul8bitLt: inputs will be cast from")),
    # our commands name the device in their first line
    ("DeepSpeed", _Drops("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable")),
)
CLIPPED = "vision_tower.regions", "region %s extends beyond"  # our own message: logger, text
# beginnings of FutureWarnings meant for the authors of PEFT and DeepSpeed
_FUTURE_WARNINGS = (
    r"`is_gradient_checkpointing` is deprecated",  # PEFT, in each `PeftModel`
    r"`torch\.distributed",  # DeepSpeed, thousands of times
)


@contextlib.contextmanager
def dropping(name: str, start: str) -> Iterator[None]:
    """Temporarily drop the messages of a logger that begin with `start`, which were already shown."""
    messages = _Drops(start)
    logging.getLogger(name).addFilter(messages)
    try:
        yield
    finally:
        logging.getLogger(name).removeFilter(messages)


def silence_other_libraries() -> None:
    """Install the filters of this module; idempotent. `import mllm` calls it."""
    for name, messages in _LOGGED:
        logging.getLogger(name).addFilter(messages)
    for message in _FUTURE_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
