"""How a layer is swapped: the same object gets another class, a subclass of its own.

`swap` sets `module.__class__` to a class made of a `Fused` layer and the module's own class, in this order. So the module
object, its parameters, buffers, hooks, name, `repr` and state dict stay as they are, no class is changed, no other instance
notices, and nothing is stored on the instance: `restore` sets the old class again. What a module's class brings (gradient
checkpointing around `forward`, `isinstance`) is inherited. PyTorch's FSDP2 swaps its modules in the same way.
"""

import copy
import functools
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module keeps the hooks that see its own inputs and outputs."""


class Fused(nn.Module):
    """Base of the layers that run fused kernels. A subclass brings `forward` and names its options as class attributes."""

    fused_parts: ClassVar[Any]
    """What its class was made of: the kind of fused layer, the module's own class, and the options."""

    if TYPE_CHECKING:  # what the layer's own class has: parameters, submodules, settings

        def __getattr__(self, name: str) -> Any: ...

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class was made at run time: pickle and copy make it again from its parts
        parts = super().__reduce_ex__(protocol)
        return _new, self.fused_parts, *parts[2:]


def swap(module: nn.Module, kind: type[Fused], **options: Any) -> None:
    """Gives `module` the class of a `kind` that was once its own; `options` become attributes of that class."""
    parts: Any = kind, type(module), tuple(options.items())
    module.__class__ = _fused_class(*parts)


def is_wrapped(module: nn.Module) -> bool:
    """Whether others gave a swapped layer a class of their own since, as FSDP2 does: then it can't be restored."""
    return isinstance(module, Fused) and "fused_parts" not in type(module).__dict__


def restore(module: nn.Module) -> None:
    """Gives `module` its own class again, if it was swapped."""
    if isinstance(module, Fused):
        _, module.__class__, _ = module.fused_parts


@functools.cache
def _fused_class(kind: Any, original: Any, options: tuple[tuple[str, Any], ...]) -> Any:
    """One class for all layers of the same kind, origin and options, under the name of the original.

    transformers, accelerate and FSDP look classes up by name and module (which layers not to split, whose outputs to
    record, which loss to use), so the name stays too.
    """
    namespace = dict(options) | dict(
        forward=_while_swapped(kind),
        __module__=original.__module__,
        __qualname__=original.__qualname__,
        __doc__=original.__doc__,
        fused_parts=(kind, original, options),
    )
    return type(original.__name__, (kind, original), namespace)


def _while_swapped(kind: Any) -> Any:
    """The forward of a `kind` for as long as a module is one. Others keep bound forwards (accelerate, `torch.compile`, a variable),
    and call them after `restore` too: then the module's own runs."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, kind):
            return kind.forward(self, *args, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    own: Any = forward
    own.__code__ = own.__code__.replace()  # one for each class: `torch.compile` counts its recompilations by code
    return own


def _new(*parts: Any) -> Any:
    made = _fused_class(*parts)
    return made.__new__(made)


def is_watched(module: nn.Module) -> bool:
    """Whether others see the module's own inputs and outputs, by hooks or by a `forward` of theirs on the instance (accelerate): it
    must then be called the way it always was."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy to try things on: with its own classes and config, no hooks, and no dropout."""
    twin = copy.deepcopy(module).eval()
    for submodule in twin.modules():
        restore(submodule)
        for hooks in HOOKS:
            getattr(submodule, hooks).clear()
    return twin
