"""One model, one user at a time.

    chat window (a thread)   ─► answers, adapter off ─────────────►
    next cell of the notebook ──► compare(...)  ─► RuntimeError: the model is busy

Switching an adapter changes the model for everybody who holds it. Two answers at once, one with the adapter and one
without, would both come out wrong, and nothing would show it. So whoever lets a model answer holds it alone meanwhile.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from peft import PeftModel
from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()


@contextmanager
def held_alone(model: nn.Module) -> Iterator[None]:
    """Hold a model for the length of a `with` block, dropout off; afterwards every part is in the mode it was in.

    Args:
        model: a model, or a PEFT model on top of it; both are the same model here.

    Raises:
        RuntimeError: somebody else holds it.
    """
    lock = _LOCKS.setdefault(model.get_base_model() if isinstance(model, PeftModel) else model, threading.Lock())
    if not lock.acquire(blocking=False):
        raise RuntimeError(
            "another answer of this model is still being written: wait for it, stop it (`stop()` of its session, the "
            "button of its window), or `clear()` its session if nobody reads it any more"
        )
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
        lock.release()
