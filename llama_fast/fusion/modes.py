"""Where trials run: what `fuse` finds must not depend on what is switched on around the call."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from ..kernels.torch_compat import (
    GLOBAL_MODULE_HOOKS,
    count_torch_function_modes,
    disable_dispatch_modes,
    pop_torch_function_mode,
)

# the default dtype and the hooks are the process's: two at once would give back each other's
_ALONE = threading.RLock()


@contextmanager
def default_modes() -> Iterator[None]:
    """PyTorch as it starts: float32 and the CPU by default, gradients, no autocast, and nobody who sees or changes what ops do.

    The default dtype and global hooks are the whole process's, so one thread is in here at a time, and others should not compute meanwhile.
    Deterministic algorithms and the precision of float32 products stay: they are how the model is going to run.
    """
    with _ALONE, ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.enter_context(disable_dispatch_modes())  # FakeTensorMode, FlopCounterMode
        for _ in range(count_torch_function_modes()):
            stack.enter_context(pop_torch_function_mode())
        for hooks in GLOBAL_MODULE_HOOKS:
            stack.callback(hooks.update, dict(hooks))
            hooks.clear()
        used = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
        stack.enter_context(torch.random.fork_rng(devices=list(used)))  # a model in training mode draws for its dropout
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
