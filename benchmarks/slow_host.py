"""A host made slow on purpose: a busy wait in each block that is started, forward, forward again and backward.

    with slow_host(5e-3):
        measure_machine(refresh=True)        sees 5 ms a block and pass more
        plan_device_map(..., gpus="here")    fewer parts, or one GPU
        run_step(...)                        takes that longer: is the plan the best one still?

Busy, and with Python's one lock held, since that is what starting kernels is like: the threads of two GPUs' backward
passes wait for each other. CUDA graphs start without Python, so a captured step is not slowed.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from thuglm.modeling_chatglm import ChatGLMAttention


def wait_busy(seconds: float) -> None:
    """Do nothing else for some seconds."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@contextmanager
def slow_host(
    seconds: float, wait: Callable[[Any, str, float], None] = lambda block, kind, seconds: wait_busy(seconds)
) -> Iterator[None]:
    """As long as it lasts, every block of every model here is started `seconds` later, in each pass.

    Args:
        seconds: for each block and pass; 0 changes nothing.
        wait: called with a block's attention, "forward" or "backward", and the seconds; a test turns its own clock.
    """

    # The attention: hooks of the block itself are left out when it runs again (transformers 5.24).
    def before(module: Any, _: Any) -> None:
        if isinstance(module, ChatGLMAttention):
            wait(module, "forward", seconds)

    def behind(module: Any, _: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(module, ChatGLMAttention) and isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: wait(module, "backward", seconds))

    hooks = [register_module_forward_pre_hook(before), register_module_forward_hook(behind)] if seconds else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
