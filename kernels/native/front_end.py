"""Triton's own front end: a plan's kernel and the types of its arguments -> TTIR, the text that `ttir.py` reads.

It turns a kernel and its arguments into TTIR and simplifies it (`make_ttir` of its GPU back ends, up to here the same for
every machine).
"""

import tempfile
from typing import Any

from ..launch import GPUS, LaunchPlan, stand_in_driver
from ..triton_compat import triton
from .ttir import Function, parse

FRONT_END = GPUS["sm_80"]  # it wants a target; from sm_90 on it keeps tensor descriptors, which we do not read
_NO_INLINE = "noinline = true"
_MAYBE = dict(instrumentation_mode="", sanitize_overflow=False, fpsan_homomorphic_casts=False)  # some releases ask for


class Specialization:
    """A plan's kernel with the types of its arguments: what machine code is made for.

    As Triton does it: an argument that is None, or an integer 1, becomes a constant. `arguments` are the run-time ones in
    order, with their types ("*fp32", "i32", "fp32"); `key` holds all that the TTIR follows from.
    """

    def __init__(self, plan: LaunchPlan) -> None:
        kernel = plan.kernel
        # Triton's checks of integer overflow, which come with asserts, are not for a CPU
        debug = keeps_asserts(plan)
        options = dict(num_warps=plan.num_warps, num_stages=plan.num_stages, debug=debug)
        with stand_in_driver(FRONT_END):
            *_, self._target, self._backend, binder = kernel.device_caches[FRONT_END.arch]
            known = {name: value for name, value in _MAYBE.items() if _takes(self._backend, name)}
            bound, specialization, remaining = binder(**plan.arguments, **plan.constants, **options, **known)
            parsed, signature, constexprs, attrs = kernel._pack_args(
                self._backend, options | known, bound, specialization, remaining
            )
        self._kernel, self._parsed = kernel, parsed
        self._signature, self._constexprs, self._attrs = signature, constexprs, attrs
        self.arguments = [(name, kind) for name, kind in signature.items() if kind != "constexpr"]
        constants = {path: getattr(value, "cache_key", None) or value for path, value in constexprs.items()}
        self.key = repr((triton.__version__, kernel.cache_key, signature, constants, debug))

    def ttir(self) -> str:
        """TTIR with locations, after Triton's own simplification."""
        from triton._C.libtriton import ir, passes
        from triton.compiler.compiler import ASTSource

        source = ASTSource(self._kernel, self._signature, self._constexprs, self._attrs)
        context = ir.context()
        ir.load_dialects(context)
        self._backend.load_dialects(context)
        code_generation = self._backend.get_codegen_implementation(self._parsed)
        with stand_in_driver(FRONT_END):
            module = source.make_ir(
                self._target, self._parsed, code_generation, self._backend.get_module_map(), context
            )
        module = _all_inline(module, context)
        manager = ir.pass_manager(context)
        passes.common.add_inliner(manager)
        if hasattr(passes.ttir, "add_rewrite_tensor_pointer"):  # as long as Triton has block pointers
            passes.ttir.add_rewrite_tensor_pointer(manager)
        passes.ttir.add_rewrite_tensor_descriptor_to_pointer(manager)
        passes.common.add_canonicalizer(manager)
        passes.ttir.add_combine(manager)
        passes.common.add_cse(manager)
        passes.common.add_symbol_dce(manager)
        manager.run(module, "make_ttir")
        return str(module)


def keeps_asserts(plan: LaunchPlan) -> bool:
    """Whether Triton would: asked for by the launch, the kernel's decorator or TRITON_DEBUG."""
    return bool(plan.options.get("debug", plan.kernel.debug) or triton.knobs.runtime.debug)


def require_same_globals(kernel: Any) -> None:
    """Raises `RuntimeError` where a global constexpr that a kernel was compiled with has another value now, as Triton does."""
    assert kernel.cache_key  # with it Triton finds them
    for (name, _), (then, its_globals) in kernel.used_global_vals.items():
        if (now := its_globals.get(name)) != then:
            raise RuntimeError(
                f"{kernel.__name__}: the global {name} was {then} when the kernel was compiled, and is {now}"
            )


def _all_inline(module: Any, context: Any) -> Any:
    """The module with functions that were to stay apart (`noinline`) made like all others."""
    from triton._C.libtriton import ir

    text = str(module)
    if _NO_INLINE not in text:
        return module
    with tempfile.NamedTemporaryFile("w", suffix=".ttir") as file:
        file.write(text.replace(_NO_INLINE, "noinline = false"))
        file.flush()
        module = ir.parse_mlir_module(file.name, context)
        module.context = context
        return module


def _takes(backend: Any, option: str) -> bool:
    """Whether this Triton's back end has the option."""
    return option in getattr(type(backend.parse_options({})), "__dataclass_fields__", {})


def read_plan(plan: LaunchPlan) -> Function:
    """The TTIR of a plan's kernel."""
    return parse(Specialization(plan).ttir())
