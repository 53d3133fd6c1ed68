"""What we use of PyTorch that it calls private, in one place: any release may take it away.

The package can be imported without it, and whatever needs what is gone raises `PrivateNameGoneError`, which names it.
"""

import ctypes
import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_TESTED = "2.13.0"  # as in constraints.txt


class PrivateNameGoneError(RuntimeError):
    """PyTorch is one that has no longer, or not yet, what was to be used of it."""

    def __init__(self, path: str) -> None:
        super().__init__(
            f"PyTorch {torch.__version__} has no {path}, which llama-fast uses: pip install torch=={_TESTED}"
        )


class _Gone:
    """Stands in for what PyTorch has not: it can be imported, and neither called nor looked into."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise PrivateNameGoneError(self._path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own questions: copy, pickle, inspect
            raise AttributeError(name)
        raise PrivateNameGoneError(self._path)


def _private(path: str) -> Any:
    try:
        return functools.reduce(getattr, path.split(".")[1:], torch)
    except AttributeError:
        return _Gone(path)


# modes, of this thread and of the process
BelowAutograd = _private("torch._C._AutoDispatchBelowAutograd")
DisableTorchFunction = _private("torch._C.DisableTorchFunction")
profiler_enabled = _private("torch.autograd._profiler_enabled")
count_torch_function_modes = _private("torch._C._len_torch_function_stack")
pop_torch_function_mode = _private("torch.overrides._pop_mode_temporarily")
disable_dispatch_modes = _private("torch.utils._python_dispatch._disable_current_modes")
GLOBAL_MODULE_HOOKS = tuple(
    _private(f"torch.nn.modules.module._global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
)
_ExcludeDispatchKeys = _private("torch._C._ExcludeDispatchKeyGuard")
_DispatchKeySet = _private("torch._C.DispatchKeySet")
_DispatchKey = _private("torch._C.DispatchKey")
_keys_of = _private("torch._C._dispatch_keys")
_keys_of_modes = _private("torch._C._dispatch_tls_local_include_set")

# ops
softmax_backward = _private("torch._softmax_backward_data")
flash_attention_cpu = _private("torch._scaled_dot_product_flash_attention_for_cpu")
flash_attention_cpu_backward = _private("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default")
empty_strided_cpu = _private("torch._C._dynamo.guards._empty_strided_cpu")  # past the dispatcher: 0.9 us, not 2.1
onednn_linear = _private("torch.ops.mkldnn._linear_pointwise.default")
has_kernel_for_key = _private("torch._C._dispatch_has_kernel_for_dispatch_key")


def below_autocast() -> Any:
    """Context in which an op's call goes past autocast."""
    return _ExcludeDispatchKeys(_DispatchKeySet(_DispatchKey.AutocastCUDA) | _DispatchKeySet(_DispatchKey.AutocastCPU))


_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_PLAIN_ARGUMENTS = frozenset((*_PLAIN_TYPES, type(None), bool, int, float, str, torch.dtype))


@functools.cache
def _plain_keys() -> tuple[frozenset[int], frozenset[int]]:
    """Of tensors on the CPU, and of a thread without modes and transforms: each outside of inference mode, and in it."""
    key, keys = _DispatchKey, _DispatchKeySet
    tensor, thread = keys(key.CPU) | keys(key.AutocastCPU), keys(key.BackendSelect)
    views = keys(key.ADInplaceOrView)
    both = (tensor, tensor | views | keys(key.AutogradCPU)), (thread, thread | views)
    of_tensors, of_threads = (frozenset(each.raw_repr() for each in pair) for pair in both)
    return of_tensors, of_threads


def is_plain_on_cpu(tensor: torch.Tensor) -> bool:
    """Whether it is on the CPU, and neither of a subclass, nor wrapped by a transform, nor a view that is negated when it is read."""
    return type(tensor) in _PLAIN_TYPES and _keys_of(tensor).raw_repr() in _plain_keys()[0]


def are_of_plain_types(arguments: tuple[Any, ...]) -> bool:
    """Whether none is a tensor of a subclass, which may have sizes that are no numbers: to ask for them would make them some."""
    return _PLAIN_ARGUMENTS.issuperset(map(type, arguments))


def only_autograd_looks() -> bool:
    """Whether in this thread no mode of `__torch_dispatch__` and no transform sees the calls of ops, but for autograd at most."""
    return _keys_of_modes().raw_repr() in _plain_keys()[1]


def nothing_looks_before_autograd() -> bool:
    """Whether nothing sees them before autograd: no autocast, no mode of `__torch_function__`, no profiler."""
    return not (torch.is_autocast_enabled("cpu") or count_torch_function_modes() or profiler_enabled())


def in_forward_mode() -> bool:
    """Whether derivatives are computed forward; where PyTorch does not say so, tangents are lost without a word."""
    return getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


@functools.cache
def has_onednn_linear() -> bool:
    """Whether `onednn_linear` is there, and oneDNN behind it."""
    return not isinstance(onednn_linear, _Gone) and bool(torch.backends.mkldnn.is_available())


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU does so in hardware, as far as PyTorch says."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


@functools.cache
def offsets_in_tensors() -> tuple[int, int]:
    """How many bytes behind the start of a Python tensor the C++ tensor stands, which is one pointer, to `_cdata`; and how many
    behind that its dispatch keys stand."""
    with torch.inference_mode():
        tensors = [torch.empty(0), torch.empty(0, device="meta")]
    with torch.inference_mode(False):
        tensors += [torch.empty(0), torch.empty(0, device="meta")]
    objects = [(id(tensor), tensor._cdata) for tensor in tensors]
    inside = [(tensor._cdata, _keys_of(tensor).raw_repr()) for tensor in tensors]
    found = (
        _offsets(objects, range(object.__basicsize__, torch.Tensor.__basicsize__, 8)),
        _offsets(inside, range(8, 256, 8)),
    )
    if [len(offsets) for offsets in found] != [1, 1]:
        raise PrivateNameGoneError("C++ tensor inside torch.Tensor, or dispatch keys in it")
    return found[0][0], found[1][0]


def _offsets(objects: list[tuple[int, int]], places: range) -> list[int]:
    """Where in all the objects, given by their addresses, their words stand."""
    return [
        place for place in places
        if all(ctypes.c_uint64.from_address(address + place).value == word for address, word in objects)
    ]  # fmt: skip


class LightDispatchMode(TorchDispatchMode):
    """A mode that does not import `torch._dynamo` when it is first heard, as PyTorch's wrapper does: that takes 1.5 s and 97 MB."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
