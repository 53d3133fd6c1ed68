"""Where trials run: what `fuse` finds must not depend on what is switched on around the call."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.modules import module as nn_module
from torch.overrides import _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes

_GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)

_ALONE = (
    threading.RLock()
)  # the default dtype and the hooks are the process's: two at once would give back each other's


@contextmanager
def default_modes() -> Iterator[None]:
    """PyTorch as it starts: float32 and the CPU by default, gradients, no autocast, and nobody who sees or changes what ops do.

    The default dtype and global hooks are the whole process's, so one thread is in here at a time, and others should not compute meanwhile.
    Deterministic algorithms and the precision of float32 products stay: they are how the model is going to run.
    """
    with _ALONE, ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.enter_context(_disable_current_modes())  # FakeTensorMode, FlopCounterMode
        for _ in range(torch._C._len_torch_function_stack()):
            stack.enter_context(_pop_mode_temporarily())
        for hooks in _GLOBAL_HOOKS:
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
