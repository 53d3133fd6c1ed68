"""TTIR as plain objects: what is read of its text, and that of every kernel of this package."""

from pathlib import Path

import pytest

from llama_fast.kernels import catalog
from llama_fast.kernels.launch import CPU, INTERPRETED
from llama_fast.kernels.triton_compat import HAS_TRITON

if not HAS_TRITON or INTERPRETED:
    pytest.skip("Triton's front end makes TTIR, of kernels that are not the interpreter's", allow_module_level=True)

from llama_fast.kernels.native import ttir
from llama_fast.kernels.native.front_end import Specialization, read_plan
from llama_fast.kernels.native.lowering import UnsupportedOpError, lower
from llama_fast.kernels.native.machine import AVX2, AVX512, NEON

PLANS = {f"{e.kernel}-{e.dtype}": e.plan for op in catalog.OPS for e in catalog.examples(op, CPU)}


@pytest.mark.parametrize("name", PLANS)
def test_every_kernel_is_read_and_lowered(name):
    plan = PLANS[name]
    function = read_plan(plan)
    assert function.name == plan.kernel.__name__
    # by their places: a name is that of the last variable that an argument was assigned to
    assert len(function.arguments) == len(Specialization(plan).arguments)
    for op in function.ops():
        file, _, line = op.location.rpartition(":")
        if file:  # constants have no place
            assert Path(file).is_file() and 0 < int(line) <= len(Path(file).read_text().splitlines()), op
            assert "triton/language" not in file
    for machine in (AVX512, AVX2, NEON):
        assert "define internal void @program(" in lower(function, {}, machine)


MODULE = """
#loc = loc("a.py":1:0)
#loc1 = loc("a.py":7:4)
#loc2 = loc("/x/triton/language/standard.py":3:9)
#loc3 = loc(callsite(#loc2 at #loc1))
#loc4 = loc("named"(#loc3))
module {
  tt.func public @k(%p: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("p"(#loc)), %n: i32 loc(unknown)) attributes {noinline = false} {
BODY
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""


def read(*lines: str) -> list[ttir.Op]:
    function = ttir.parse(MODULE.replace("BODY", "\n".join(lines)))
    assert [(a.name, a.shape, a.element) for a in function.arguments] == [("p", (), "ptr:f32"), ("n", (), "i32")]
    return function.blocks[0].ops


def test_an_op_with_operands_attributes_type_and_place():
    compare, constant, _ = read(
        "%m = arith.cmpi slt, %n, %n : i32 loc(#loc4)",
        "%cst-1 = arith.constant dense<0xFF800000> : tensor<4x8xf32> loc(#loc1)",
    )
    assert (compare.kind, compare.attributes["words"], compare.result.element, compare.location) == (
        "arith.cmpi",
        ("slt",),
        "i1",
        "a.py:7",
    )
    assert (constant.result.shape, constant.result.name, constant.attributes["value"]) == (
        (4, 8),
        "cst-1",
        "0xFF800000",
    )


def test_loops():
    loop, unsigned, endless, _ = read(
        "%r:2 = scf.for %i = %n to %n step %n iter_args(%a = %n, %b = %p) -> (i32, !tt.ptr<f32>)  : i32 {",
        "%c = arith.addi %a, %i : i32 loc(#loc)",
        "scf.yield %c, %b : i32, !tt.ptr<f32> loc(#loc)",
        "} loc(#loc1)",
        "scf.for unsigned %i = %n to %n step %n  : i32 {",
        "} loc(#loc1)",
        "scf.while : () -> () {",
        "%t = arith.constant true loc(#loc)",
        "scf.condition(%t) loc(#loc)",
        "} do {",
        "scf.yield loc(#loc)",
        "} loc(#loc)",
    )
    assert [(result.shape, result.element) for result in loop.results] == [((), "i32"), ((), "ptr:f32")]
    assert [argument.name for argument in loop.regions[0][0].arguments] == ["i", "a", "b"]
    assert (loop.location, loop.attributes["unsigned"], unsigned.attributes["unsigned"]) == ("a.py:7", False, True)
    assert [len(region) for region in endless.regions] == [1, 1]


def test_text_of_asserts_and_prints():
    check, show, bare, _ = read(
        '%t = arith.constant true loc(#loc)\n    tt.assert %t, "a \\22b\\22, \\C3\\A4 : c" : i1 loc(#loc)',
        'tt.print " x: " {hex = false, isSigned = array<i32: 1>} : %n : i32 loc(#loc)',
        'tt.print " y" {hex = false, isSigned = array<i32>} loc(#loc)',
    )[1:]
    assert check.attributes["message"] == 'a "b", ä : c'
    assert (show.attributes["prefix"], show.attributes["isSigned"], show.operands[0].name) == (" x: ", (1,), "n")
    assert (bare.attributes["prefix"], bare.operands) == (" y", [])


@pytest.mark.parametrize(
    "line", ["%x = arith.addi %n, %missing : i32 loc(#loc1)", "?? loc(#loc1)", "scf.for %i = %n  : i32 { loc(#loc1)"]
)
def test_what_cannot_be_read_is_named(line):
    with pytest.raises(UnsupportedOpError, match=r"k, a\.py:7: .* cannot be read"):
        read(line)


def test_a_value_is_shown_without_all_that_it_holds():
    constant, _ = read("%c = arith.constant dense<1> : tensor<4xi32> loc(#loc)")
    assert repr(constant.result) == "%c: 4xi32" and len(repr(constant)) < 100
