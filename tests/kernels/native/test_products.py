"""Matrix products large enough to be packed, or streamed from memory, on each instruction set that this CPU has."""

import re

import pytest
import torch

from llama_fast import native
from llama_fast.kernels.launch import LaunchPlan
from llama_fast.kernels.native import drivers, machine
from llama_fast.kernels.native.codegen import emit_assembly
from llama_fast.kernels.native.front_end import read_plan
from llama_fast.kernels.native.inspection import inspect_plan
from llama_fast.kernels.native.lowering import lower
from llama_fast.kernels.triton_compat import tl, triton

pytestmark = pytest.mark.skipif(
    native.why_not_native() is not None, reason=f"no native kernels: {native.why_not_native()}"
)

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=machine.NAMES)
def target(request, monkeypatch):
    """Code for each instruction set that this CPU has."""
    monkeypatch.setenv(machine.VARIABLE, request.param)
    try:
        return machine.host()
    except ValueError:
        pytest.skip(f"this CPU has no {request.param}")


@triton.jit
def product_kernel(
    p_a, p_b, p_c, a_stride_m, a_stride_k, b_stride_k, b_stride_n, rows, columns, inner,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr, COMPUTED: tl.constexpr,
):  # fmt: skip
    """c = a @ b + 1 in STEPS pieces along K; what lies beyond rows, columns and inner is not there."""
    m, n = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    acc = tl.full([M, N], 1.0, dtype=tl.float32)
    for step in range(STEPS):
        k = step * K + tl.arange(0, K)
        p_left, p_right = p_a + m * a_stride_m + k[None, :] * a_stride_k, p_b + k[:, None] * b_stride_k + n * b_stride_n
        a = tl.load(p_left, mask=(m < rows) & (k < inner)[None, :], other=0.0)
        b = tl.load(p_right, mask=(k < inner)[:, None] & (n < columns), other=0.0)
        if COMPUTED:
            a = (a * 2).to(p_a.dtype.element_ty)
            b = (b * 0.5).to(p_b.dtype.element_ty)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(p_c + m * N + n, acc, mask=(m < rows) & (n < columns))


def inside_nan(rows, columns, dtype, along_rows):
    """A matrix with NaN on all sides, in memory along its rows or its columns."""
    wide = torch.full((columns + 16, rows + 16) if along_rows else (rows + 16, columns + 16), torch.nan, dtype=dtype)
    matrix = wide.t()[8 : 8 + rows, 8 : 8 + columns] if along_rows else wide[8 : 8 + rows, 8 : 8 + columns]
    return matrix.copy_(torch.randn(rows, columns))


def check(dtype, sizes, tile, *, steps=1, computed=False, along=(False, False)):
    (rows, columns, inner), (m, n, k) = sizes, tile
    a, b = inside_nan(rows, inner, dtype, along[0]), inside_nan(inner, columns, dtype, along[1])
    c = torch.full((m, n), torch.nan)
    native.launch(
        product_kernel, (1,), a, b, c, *a.stride(), *b.stride(), rows, columns, inner,
        M=m, N=n, K=k, STEPS=steps, COMPUTED=computed,
    )  # fmt: skip
    exact = a.double() @ b.double() + 1
    error = (c[:rows, :columns] - exact).norm() / exact.norm()
    assert error < 1e-6  # in every dtype: products of 16 bits are exact in float32
    assert c[rows:].isnan().all() and c[:, columns:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("along", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("tile", [(64, 128, 64), (32, 64, 16)], ids=str)
def test_packed(dtype, along, tile, target):
    check(dtype, (tile[0] - 3, tile[1] - 5, 2 * tile[2] - 7), tile, steps=2, along=along)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_packed_operands_that_are_computed(dtype, target):
    check(dtype, (60, 33, 61), (64, 64, 32), steps=2, computed=True, along=(False, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 4, 11])
@pytest.mark.parametrize(("rows", "inner"), [(63, 100), (15, 128), (80, 31), (128, 250)])
def test_streamed(dtype, columns, rows, inner, target):
    """Rows of a weight times few columns, all of which lie along K."""
    tile = (128, {1: 2, 4: 4, 11: 16}[columns], 128)
    check(dtype, (rows, columns, inner), tile, steps=2, along=(False, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize(("k", "inner"), [(64, 41), (2048, 1100)])
def test_every_remainder_of_rows_and_columns(dtype, n, k, inner, target):
    """By few columns one short row at a time is multiplied, or up to eight; 27 are 3 * 8 + 2 + 1."""
    for rows, columns in ((27, n), (4, n - 1)):
        check(dtype, (rows, columns, inner), (32, n, k), along=(False, True))


def plan_of_rows(columns, k, dtype=torch.float32):
    a, b, c = (torch.empty(shape, device="meta", dtype=dtype) for shape in ((32, k), (columns, k), (32, columns)))
    strides = dict(a_stride_m=k, a_stride_k=1, b_stride_k=1, b_stride_n=k, rows=27, columns=columns, inner=k)
    constants = dict(M=32, N=columns, K=k, STEPS=1, COMPUTED=False)
    return LaunchPlan(product_kernel, (1,), dict(p_a=a, p_b=b, p_c=c, **strides), constants)


def largest_step(plan, cpu, sums, asks):
    """Products and prefetches in the straight code that has most products, for which there are registers."""
    ir = drivers.with_work_function(lower(read_plan(plan), {}, cpu), "product_kernel", cpu)
    blocks = re.split(r"^\.LBB|%bb\.", emit_assembly(ir, cpu), flags=re.MULTILINE)
    most = max(blocks, key=lambda block: len(re.findall(sums, block)))
    assert not re.search(r"(16|32|64)-byte", most)  # vectors on the stack
    return len(re.findall(sums, most)), len(re.findall(asks, most))


@pytest.mark.parametrize(
    ("columns", "k", "tile", "narrow"),
    [(2, 1024, (1, 2), (1, 2)), (2, 2048, (8, 2), (4, 2)), (4, 1024, (8, 2), (4, 2)), (8, 1024, (4, 4), (2, 4))],
)
def test_tiles_of_few_columns(columns, k, tile, narrow):
    """Height times width sums; each line of the next tile is asked for once."""
    plan = plan_of_rows(columns, k)
    for cpu, (height, width), sums, asks in (
        (machine.AVX512, tile, r"vfmadd\d+ps.*zmm", r"prefetcht1"),
        (machine.AVX2, narrow, r"vfmadd\d+ps.*ymm", r"prefetcht1"),
        (machine.NEON, tile, r"fmla\tv", r"prfu?m\tpldl2keep"),
    ):
        lines = max(1, height * cpu.vector_bytes // 64)
        assert largest_step(plan, cpu, sums, asks) == (height * width, lines), cpu.name


def test_a_row_too_long_for_a_tile_is_asked_for_in_itself():
    assert largest_step(plan_of_rows(4, 8192), machine.AVX512, r"vfmadd\d+ps.*zmm", r"prefetcht0") == (16, 8)


def test_with_checks_of_bounds_no_row_is_read_by_the_matrix_unit(monkeypatch):
    weight, x, out = (torch.empty(128, 128, device="meta", dtype=torch.bfloat16) for _ in range(3))
    numbers = (*weight.stride(), 1, 128, 128, 4, 128)
    names = ["a_stride_m", "a_stride_k", "b_stride_k", "b_stride_n", "rows", "columns", "inner"]
    plan = LaunchPlan(
        product_kernel, (1,), dict(p_a=weight, p_b=x, p_c=out, **dict(zip(names, numbers, strict=True))),
        dict(M=128, N=4, K=128, STEPS=1, COMPUTED=False),
    )  # fmt: skip
    function = read_plan(plan)
    assert "tileloadd64" in lower(function, {}, machine.AMX)
    assert "tileloadd64" not in lower(read_plan(plan), {}, machine.AMX, check_bounds=True)


@triton.jit
def two_products_kernel(p_a, p_b, p_c, p_out, N: tl.constexpr):
    """(a @ b) @ c, and the first product again."""
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    first = tl.dot(tl.load(p_a + i), tl.load(p_b + i), input_precision="ieee")
    second = tl.dot(first.to(p_c.dtype.element_ty), tl.load(p_c + i), input_precision="ieee")
    tl.store(p_out + i, second)
    tl.store(p_out + N * N + i, first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_that_follow_one_another(dtype, target):
    a, b, c = (torch.randn(64, 64).to(dtype) for _ in range(3))
    out = torch.full((2, 64, 64), torch.nan)
    native.launch(two_products_kernel, (1,), a, b, c, out, N=64)
    first = a.double() @ b.double()
    torch.testing.assert_close(out[1].double(), first, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(out[0].double(), out[1].to(dtype).double() @ c.double(), rtol=1e-5, atol=2e-3)


@triton.jit
def zeros_kernel(p_a, p_b, p_c, rows, inner, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ACROSS: tl.constexpr):
    """a @ b + 1, with zeros in `a` from a row and from a place along K on, in all rows."""
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    if ACROSS:
        a = tl.load(p_a + k[:, None] * M + tl.arange(0, M)[None, :])
        a = tl.trans(tl.where((k < inner)[:, None] & (tl.arange(0, M) < rows)[None, :], a, 0.0))
    else:
        a = tl.where((m < rows) & (k < inner)[None, :], tl.load(p_a + m * K + k[None, :]), 0.0)
    b = tl.load(p_b + k[:, None] * N + n)
    tl.store(p_c + m * N + n, tl.dot(a, b, tl.full([M, N], 1.0, tl.float32), input_precision="ieee"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("across", [False, True])
def test_what_a_select_makes_zero_is_left_out_of_packed_products(dtype, across, target):
    """Rows that are only the accumulator then, and what lies along K beyond it: NaN, where it was multiplied."""
    a, b = torch.randn(64, 64).to(dtype), torch.randn(64, 32).to(dtype)
    for rows, inner in [(0, 64), (1, 64), (33, 64), (64, 64), (64, 0), (64, 6), (47, 32)]:
        expected = torch.ones(64, 32, dtype=torch.float64)
        expected[:rows] += a[:rows, :inner].double() @ b[:inner].double()
        c = torch.full((64, 32), torch.nan)
        poisoned = b if target.has_bf16_tiles else b.masked_fill((torch.arange(64) >= inner)[:, None], torch.nan)
        native.launch(
            zeros_kernel,
            (1,),
            a.t().contiguous() if across else a,
            poisoned,
            c,
            rows,
            inner,
            M=64,
            N=32,
            K=64,
            ACROSS=across,
        )
        assert (c - expected).norm() <= 1e-6 * expected.norm(), (rows, inner)


@triton.jit
def listed_rows_kernel(
    p_x, p_rows, p_list, p_out, rows, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr
):
    """2 * x @ the listed rows, transposed. Without a mask the list has N entries."""
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N), tl.arange(0, K)
    i = tl.load(p_list + n, mask=n < rows, other=0) if MASKED else tl.load(p_list + n)
    b = tl.load(p_rows + i[None, :] * K + k[:, None], mask=(n < rows)[None, :], other=0.0)
    x = 2 * tl.load(p_x + m * K + k[None, :])
    tl.store(p_out + m * N + n[None, :], tl.dot(x, b, input_precision="ieee"))


@triton.jit
def computed_columns_kernel(p_a, p_b, p_c, columns, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N), tl.arange(0, K)
    a = tl.load(p_a + m * K + k[None, :])
    b = tl.load(p_b + n[:, None] * K + k[None, :]).to(tl.float32)
    b = tl.where((n < columns)[:, None], b * tl.sum(b * 0.0 + 1.0, 1)[:, None], 0.0).to(p_b.dtype.element_ty)
    tl.store(p_c + m * N + n[None, :], tl.dot(a, tl.trans(b), input_precision="ieee"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [0, 1, 2, 3, 4])
def test_columns_that_a_select_makes_zero_are_not_multiplied(dtype, columns, target):
    """Of a tile that is computed, and lies in a buffer, too. Where they were multiplied, infinity times zero would be NaN."""
    a, b = torch.randn(8, 64).to(dtype), torch.randn(4, 64).to(dtype)
    expected = (64 * a.double() @ b.double().t())[:, :columns]
    c = torch.full((8, 4), torch.nan)
    native.launch(computed_columns_kernel, (1,), a, b, c, columns, M=8, N=4, K=64)
    assert (c[:, :columns] - expected).norm() <= 1e-6 * expected.norm()
    a[5, 7] = torch.inf
    native.launch(computed_columns_kernel, (1,), a, b, c, columns, M=8, N=4, K=64)
    assert c[5, :columns].isinf().all() and torch.equal(c[:, columns:], torch.zeros(8, 4 - columns))


@pytest.mark.parametrize(("masked", "rows"), [(True, 16), (True, 12), (False, 16)])
def test_a_list_of_rows_is_not_read_beyond_its_end(masked, rows, target):
    """Rows ahead are prefetched, for which the list would be read four entries ahead."""
    x, table = torch.randn(2, 64), torch.randn(32, 64)
    listed = torch.randperm(32)[:rows].int()
    out = torch.full((2, 16), torch.nan)
    native.launch(
        listed_rows_kernel, (1,), x, table, listed, out, rows, M=2, N=16, K=64, MASKED=masked, check_bounds=True
    )
    torch.testing.assert_close(out[:, :rows], 2 * x @ table[listed].T, rtol=1e-5, atol=1e-5)


@triton.jit
def moved_list_kernel(p_x, p_rows, p_list, p_out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N), tl.arange(0, K)
    i = tl.load(p_list + n)
    tl.store(p_list + n, i + 1)
    b = tl.load(p_rows + i[:, None] * K + k[None, :])
    x = tl.load(p_x + m * K + k[None, :])
    tl.store(p_out + n[:, None] * M + m.trans(), tl.dot(b, x.trans(), input_precision="ieee"))


def test_nor_is_a_list_that_is_kept():
    x, table, listed = torch.randn(2, 64), torch.randn(32, 64), torch.randperm(32)[:16]
    out, before = torch.full((16, 2), torch.nan), listed.clone()
    arguments = dict(p_x=x, p_rows=table, p_list=listed, p_out=out)
    plan = LaunchPlan(moved_list_kernel, (1,), arguments, dict(M=2, N=16, K=64))
    assert "prefetch" not in lower(read_plan(plan), {}, machine.AVX512)
    plan.launch()
    torch.testing.assert_close(out, table[before] @ x.T, rtol=1e-5, atol=1e-5)


def test_two_rows_are_multiplied_together():
    """One pass over the right operand for both: attention of 3 query heads on a kv head takes 0.85 of the time."""

    def products(rows):
        x, table, out = (torch.empty(size, 64, device="meta") for size in (rows, 32, rows))
        listed = torch.empty(16, dtype=torch.int32, device="meta")
        arguments = dict(p_x=x, p_rows=table, p_list=listed, p_out=out, rows=16)
        plan = LaunchPlan(listed_rows_kernel, (1,), arguments, dict(M=rows, N=16, K=64, MASKED=True))
        return inspect_plan(plan, machine.AVX512).fma

    assert products(2) == 2 * products(1)
