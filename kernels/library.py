"""How an op is registered with PyTorch: one schema, one implementation per device, a fake, and autograd.

The dispatcher picks the implementation: CUDA (and ROCm) tensors run the Triton kernel; CPU tensors the same kernel, compiled
for this CPU, or PyTorch's own ops (`cpu.py`), or the Triton kernel in the interpreter under TRITON_INTERPRET=1.

Autograd is an implementation for the `Autograd` key that enters an `autograd.Function` only when a gradient is needed:
13 and 23 us a call (inference, training) on the host where `torch.library.register_autograd` took 12 to 19 and 34 to 45.
"""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import cpu
from .launch import INTERPRETED
from .torch_compat import (
    BelowAutograd,
    below_autocast,
    in_forward_mode,
    nothing_looks_before_autograd,
    only_autograd_looks,
)

if TYPE_CHECKING:
    from torch._ops import OpOverload

_LIBRARY = torch.library.Library("llama_fast", "FRAGMENT")

_on_cpu: dict[Any, cpu.Implementation] = {}
_functions: dict[Any, type[torch.autograd.Function]] = {}


def call(op: "OpOverload", *arguments: Any, check: Callable[[], None] | None = None) -> Any:
    """`op(*arguments)`, without the dispatcher where that would only find what the same call found before.

    It takes 5 us to find autograd's implementation, and another 5 from there to the CPU's. `check` raises where the arguments do not
    fit each other in shape, dtype, device or number: arguments like those of a call before are not checked again.
    """
    known = None
    if (
        not torch.compiler.is_compiling()
        and (on_cpu := _on_cpu.get(op)) is not None
        and nothing_looks_before_autograd()
    ):
        known = on_cpu.known_call(arguments)
    if known is None or not only_autograd_looks():
        if check is not None:
            check()
        return op(*arguments)
    function = _functions.get(op)
    if function is not None and _needs_autograd(arguments):
        return function.apply(*arguments)
    return known(*arguments)


def below_autograd(op: "OpOverload", *arguments: Any) -> Any:
    """What `op` does where autograd is done with it, in the same way."""
    if (on_cpu := _on_cpu.get(op)) is not None and only_autograd_looks():
        known = on_cpu.known_call(arguments)
        if known is not None:
            return known(*arguments)
    with BelowAutograd():
        return op(*arguments)


def _never(*arguments: Any) -> bool:
    return False


def register(
    schema: str, *, kernel: Callable[..., Any], pytorch: Callable[..., Any], fake: Callable[..., Any],
    flops: Callable[..., int] | None = None, pytorch_is_faster: Callable[..., bool] = _never,
    check: Callable[..., None] | None = None,
) -> "OpOverload":  # fmt: skip
    """Registers `llama_fast::<schema>` and returns the op.

    `kernel` launches Triton, `pytorch` computes the same with PyTorch's ops (any dtype, float64 included), `fake` makes
    empty outputs with the shapes, dtypes and strides that both return. `flops` takes the same arguments, and says what
    `torch.utils.flop_counter` counts for the op's matrix products. `pytorch_is_faster` takes them too, and says where CPU
    tensors go to PyTorch. `check` raises for values, of tensors on the CPU, that are out of range: a GPU would have to be
    waited for.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CUDA")
    packet = getattr(torch.ops.llama_fast, name)
    on_cpu = (
        cpu.checked(check, kernel)
        if INTERPRETED
        else cpu.implementation(packet.default, kernel, pytorch, pytorch_is_faster, check)
    )
    _LIBRARY.impl(name, on_cpu, "CPU")
    if isinstance(on_cpu, cpu.Implementation):
        _on_cpu[packet.default] = on_cpu
    torch.library.register_fake(f"llama_fast::{name}", fake, lib=_LIBRARY)
    if flops is not None:
        register_flop_formula(packet, get_raw=True)(flops)
    return packet.default


def register_autograd(op: "OpOverload", function: type[torch.autograd.Function]) -> None:
    """Gives `op` a derivative: `function.forward` takes the op's arguments, and calls `below_autograd(op, ...)`."""

    def autograd(*args: Any) -> Any:
        return function.apply(*args) if _needs_autograd(args) else below_autograd(op, *args)

    _LIBRARY.impl(op._schema.name.split("::")[1], autograd, "Autograd")
    _functions[op] = function


def _needs_autograd(arguments: tuple[Any, ...]) -> bool:
    """For a gradient, or in forward mode to refuse tangents, which would be lost below autograd without a word."""
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, torch.Tensor) and argument.requires_grad:
                return True
    return in_forward_mode()


def register_autocast(op: "OpOverload", *, keep: Collection[str] = ()) -> None:
    """Under `torch.autocast`, casts the op's floating-point tensor arguments to the autocast dtype (as `F.linear` does).

    The arguments named in `keep` stay as they are.
    """
    casts = [argument.name not in keep for argument in op._schema.arguments]
    for device_type, key in (("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU")):
        _LIBRARY.impl(op._schema.name.split("::")[1], _autocast_to_lower(op, device_type, casts), key)


def _autocast_to_lower(op: "OpOverload", device_type: str, casts: list[bool]) -> Callable[..., Any]:
    def autocast(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with below_autocast():
            return op(*(_cast(arg, dtype) if cast else arg for arg, cast in zip(args, casts, strict=False)))

    return autocast


def _cast(arg: Any, dtype: torch.dtype) -> Any:
    is_floating = isinstance(arg, torch.Tensor) and arg.is_floating_point() and arg.dtype != torch.float64
    return arg.to(dtype) if is_floating else arg
