"""Checks of arguments. Each raises before anything is launched, and names the argument, what was expected and what came."""

import torch
from torch import Tensor

_FLOATING_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def require_tensors(**values: object) -> None:
    """Every one must be a tensor; None is none."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def require_floating(**tensors: Tensor) -> None:
    """Every one must be a floating-point tensor (float64 is for the PyTorch path on the CPU)."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATING_DTYPES:
            _refuse(name, tensor)


def require_floating_or_none(**tensors: Tensor | None) -> None:
    """The same of tensors that may be left out."""
    for name, tensor in tensors.items():
        if tensor is not None and (not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATING_DTYPES):
            _refuse(name, tensor)


def require_floating_on_one_device(first: Tensor, **others: Tensor | None) -> None:
    """`first`, called x, must be a floating-point tensor, and each of the others that is given one on its device."""
    if not isinstance(first, Tensor) or first.dtype not in _FLOATING_DTYPES:
        _refuse("x", first)
    device = first.device
    for name, tensor in others.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATING_DTYPES:
            _refuse(name, tensor)
        if tensor.device != device:
            require_same_device(x=first, **{name: tensor})


def _refuse(name: str, tensor: object) -> None:
    require_tensors(**{name: tensor})
    raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")  # type: ignore[attr-defined]


def require_int32(**tensors: Tensor | None) -> None:
    """Every one that is given must be an int32 tensor."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {tensor.dtype}")


def require_kernel_dtype(**tensors: Tensor | None) -> None:
    """The Triton kernels compute in float32: they refuse float64 by name."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype == torch.float64:
            raise TypeError(
                f"{name} is float64, and the Triton kernels accumulate in float32: "
                "cast it to float32, or run on the CPU without TRITON_INTERPRET for float64"
            )


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """`tensor.shape` must be `shape`."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def require_same(**tensors: Tensor) -> None:
    """Two tensors must agree in shape and dtype."""
    (first, x), (second, other) = tensors.items()
    if other.shape != x.shape:
        raise ValueError(f"{second} must have {first}'s shape, {tuple(x.shape)}, got {tuple(other.shape)}")
    if other.dtype != x.dtype:
        raise TypeError(f"{second} must have {first}'s dtype, {x.dtype}, got {other.dtype}")


def require_same_device(**tensors: Tensor | None) -> None:
    """All that are given must be tensors, on the first one's device."""
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            require_tensors(**{name: tensor})
        if first is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name} must be on {first}'s device, {device}, got {tensor.device}")
