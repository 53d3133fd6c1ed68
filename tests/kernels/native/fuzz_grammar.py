"""The grammar of random kernels: one program on pieces of memory of every type, written line by line.

    Writer(seed).program()      a file that can be run alone: the kernel, `memory()`, which gives its arguments, and a launch

Tiles have no to three dimensions, some of one element. Loads and stores come in any order, through pointers of their own or
ones used before, to places that differ or repeat, under masks of every shape; between them arithmetic, casts, views,
reductions, scans, products, loops, while loops and ifs. `fuzz_words.py` has what lines are made of, `fuzz_meaning.py` says
what comes out.

What no machine has to agree on is not written: places that get different numbers from one store; and stores to places of one
pattern, moved, without a barrier between them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from .fuzz_words import (
    BOOLEANS,
    EXACT,
    FLOATS,
    INITIAL,
    LARGEST,
    MATRICES,
    MEMORY,
    NARROW,
    PIECES,
    SIZES,
    WRAPS,
    Pointer,
    Tile,
    Words,
)

PROGRAM = """import torch
import triton
import triton.language as tl

from llama_fast import native


@triton.jit
def kernel_{seed}({pieces}, n):
{body}


def memory():
    torch.manual_seed({seed})
    {memory}
    return {pieces}, {n}


if __name__ == "__main__":
    arguments = memory()
    native.launch(kernel_{seed}, (1,), *arguments)
"""


class Writer(Words):
    """Writes one kernel."""

    def program(self) -> str:
        for _ in range(2):
            self.load()
        for _ in range(self.random.randint(4, 14)):
            self.statement()
        for tile in self.unused(5):
            self.store(tile)
        memory = []
        for piece, kind in PIECES.items():
            low, high = {"int1": (0, 2), "uint8": (0, INITIAL + 1)}.get(kind, (-INITIAL, INITIAL + 1))
            dtype = "bool" if kind == "int1" else kind
            memory.append(f"{piece} = torch.randint({low}, {high}, ({MEMORY},)).to(torch.{dtype})")
        memory += [self.alias] * bool(self.alias)
        pieces, body, n = ", ".join(PIECES), "\n".join(self.lines), self.one(0, 1, 2, 3, 7, 16)
        return PROGRAM.format(seed=self.seed, pieces=pieces, body=body, memory="\n    ".join(memory), n=n)

    def statement(self) -> None:
        kinds: dict[Callable[[], object], int] = {
            self.load: 2, self.store: 2, self.repeat: 1, self.in_place: 1, self.atomic: 1, self.arithmetic: 6, self.compare: 2,
            self.select: 2, self.broadcast: 2, self.cast: 3, self.view: 4, self.reduce: 3, self.scan: 1, self.gather: 1,
        }  # fmt: skip
        if self.indent < 3:
            kinds |= {self.product: 2, self.loop: 2, self.branch: 1, self.while_loop: 1, self.loop_of_products: 1}
        (kind,) = self.random.choices(list(kinds), list(kinds.values()))
        kind()

    # -- stores

    def store(self, tile: Tile | None = None) -> None:
        tile = tile or self.pick()
        pieces = [piece for piece in PIECES if PIECES[piece] == tile.kind and piece not in self.constant]
        if not pieces:
            return self.store(self.wide(tile))
        used = [p for p in self.pointers if p.shape == tile.shape and p.piece in pieces and not p.repeats]
        pointer = self.one(*used) if used and self.chance(0.4) else self.pointer(self.one(*pieces), tile.shape)
        return self.put(pointer, self.below(tile, EXACT[tile.kind]) if tile.kind in FLOATS else tile.name)

    def put(self, pointer: Pointer, value: str) -> None:
        mask = self.mask(pointer.shape)
        self.order(pointer)
        self.say(f"tl.store({pointer.name}, {value}, {mask})" if mask else f"tl.store({pointer.name}, {value})")

    def order(self, pointer: Pointer) -> None:
        """Only a barrier orders stores to one pattern of places and the same, moved."""
        pattern = (pointer.piece, pointer.pattern)
        if any((p.piece, p.pattern) == pattern and p.shift != pointer.shift for p in self.stored):
            self.say("tl.debug_barrier()")
            self.stored.clear()
        self.stored.append(pointer)

    def repeat(self) -> None:
        """Places that repeat get the same from each of their elements; an atomic sum may get anything."""
        kind, shape = self.one("float32", "int32", "int32", "int16"), self.shape(1)
        piece = self.one(*([p for p in PIECES if PIECES[p] == kind and p not in self.constant] or "f"))
        pointer = self.repeating_pointer(piece, shape)
        if PIECES[piece] == "int32" and self.chance(0.3):
            value, mask = self.pick("int32", shape=shape), self.mask(shape)
            self.order(pointer)
            call = f"tl.atomic_{self.one('add', 'max', 'xor')}({pointer.name}, {value.name}"
            return self.say(f"{call}, mask={mask})" if mask else f"{call})")
        old = self.let(f"tl.load({pointer.name})", shape, PIECES[piece], EXACT[PIECES[piece]])
        return self.put(pointer, self.one("7", f"{self.room(old)} + 1", f"-{old.name}"))

    def in_place(self) -> None:
        """A tile whose elements change places in memory."""
        shape = self.one((16,), (64,), (1024,), (4, 4), (16, 16), (32, 32), (2, 2, 2), (1, 8), (8, 4))
        pointer = self.pointer(self.one(*(p for p in PIECES if p not in self.constant and p != "m")), shape)
        kind, n = PIECES[pointer.piece], math.prod(shape)
        x = self.let(f"tl.load({pointer.name})", shape, kind, EXACT[kind])
        ways = [f"tl.flip({x.name}, {len(shape) - 1})", f"tl.reshape(tl.trans(tl.reshape({x.name}, ({n // 2}, 2))), {shape})"]  # fmt: skip
        ways += [f"tl.gather({x.name}, {n - 1} - tl.arange(0, {n}), 0)"] * (len(shape) == 1)
        ways += [f"tl.trans({x.name})"] * 2 * (len(shape) == 2 and len(set(shape)) == 1)
        y = self.let(self.one(*ways), shape, kind, EXACT[kind])
        self.put(pointer, f"{self.room(y)} + {self.room(x)}" if self.chance(0.3) else y.name)

    def atomic(self) -> None:
        """At different places; what was there before is known where the mask is true."""
        value = self.pick("int32")
        pointer = self.pointer(self.one("h", *({"i"} - set(self.constant))), value.shape)
        mask = self.mask(value.shape)
        self.order(pointer)
        call = f"tl.atomic_{self.one('add', 'max', 'min', 'and', 'or', 'xor', 'xchg')}({pointer.name}, {value.name}"
        if not mask:
            return self.fit(f"{call})", value, WRAPS)
        before = self.name("t")
        self.say(f"{before} = {call}, mask={mask})")
        return self.fit(f"tl.where({mask}, {before}, 0)", value, WRAPS)

    # -- arithmetic

    def fit(self, expression: str, like: Tile, bound: int) -> None:
        self.let(expression, like.shape, like.kind, min(bound, EXACT[like.kind] if like.kind in FLOATS else WRAPS))

    def arithmetic(self) -> None:
        a = self.pick_number()
        b = self.pick(a.kind, shape=a.shape) if self.chance(0.8) else a
        more = ["floor"] if a.kind in FLOATS else ["&", "^", "|", "~", ">>", "<<", "//", "%"] * 2
        which = self.one("+", "-", "*", "minimum", "maximum", "neg", "abs", "number", *more)
        number = self.one(1, 2, 3, 7, *([] if a.kind == "uint8" else [-3, -8]))
        if which in "+-":
            return self.fit(f"{self.room(a)} {which} {self.room(b)}", a, a.bound + b.bound)
        if which == "*":
            return self.fit(f"{self.room(a, factors=True)} * {self.room(b, factors=True)}", a, a.bound * b.bound)
        if which == "number":
            added = "n" if a.kind in ("int32", "float32") and self.chance(0.5) else number
            return self.fit(f"{self.room(a)} + {added}", a, a.bound + 16)
        if which in ("minimum", "maximum"):
            return self.fit(self.same(f"tl.{which}({a.name}, {b.name})", a), a, max(a.bound, b.bound))
        if which == "floor":
            a = self.wide(a)
            return self.fit(f"tl.floor({self.room(a)} * 0.25)", a, a.bound)
        if which in ("//", "%"):  # signed ones towards zero
            divisor = f"({b.name} | 1)" if self.chance(0.4) else number
            return self.fit(f"{self.room(a)} {which} {divisor}", a, WRAPS)
        if which in (">>", "<<"):
            shift = f"({b.name} & 7)" if self.chance(0.4) else self.random.randrange(8)
            return self.fit(f"{a.name} {which} {shift}", a, WRAPS)
        unary = {"neg": f"-{a.name}", "abs": f"tl.abs({a.name})", "~": f"~{a.name}"}
        bound = a.bound if which in ("neg", "abs") else WRAPS
        return self.fit(unary.get(which, f"{a.name} {which} {b.name}"), a, bound)

    def compare(self) -> None:
        a = self.pick()
        b = self.pick(a.kind, shape=a.shape).name
        if a.kind == BOOLEANS:
            return self.fit(f"{a.name} {self.one('&', '|', '^')} {b}" if self.chance(0.7) else f"~{a.name}", a, 1)
        other = self.one(b, b, "n" if a.kind in ("int32", "float32") else "0")
        self.let(f"{a.name} {self.one('<', '<=', '>', '>=', '==', '!=')} {other}", a.shape, BOOLEANS, 1)
        return None

    def select(self) -> None:
        """By a tile, by a test of coordinates, or by one condition for all elements."""
        a = self.pick()
        b, c = self.pick(a.kind, shape=a.shape), self.wide(self.pick(shape=a.shape))
        scalar, mask = self.pick("int32", shape=()), self.mask(a.shape) or "n > 1"
        condition = self.one(f"{c.name} > {self.random.randint(-3, 3)}", mask, "n > 2", f"{scalar.name} > 0")
        self.fit(f"tl.where({condition}, {a.name}, {b.name})", a, max(a.bound, b.bound))

    def broadcast(self) -> None:
        """A tile, and one that has size 1 in some dimension or no dimensions."""
        a = self.wide(self.pick_number(dimensions=1))
        axis = self.random.randrange(len(a.shape))
        shape = (*a.shape[:axis], *a.shape[axis + 1 :])
        if self.chance(0.5):
            b = self.let(f"tl.max({a.name}, {axis})", shape, a.kind, a.bound)
        else:
            b = self.pick(a.kind, shape=self.one(shape, ()))
        index = f"[{', '.join('None' if i == axis else ':' for i in range(len(a.shape)))}]" if b.shape else ""
        left, right = self.room(a), f"({self.room(b)}){index}"
        if self.chance(0.3):
            self.let(f"{left} {self.one('<', '>=')} {right}", a.shape, BOOLEANS, 1)
        else:
            self.fit(f"{left} {self.one('+', '-')} {right}", a, min(a.bound + b.bound, EXACT[a.kind]))

    def cast(self) -> None:
        a = self.pick()
        target = self.one(*EXACT, "int32")
        if a.kind == "int32" and self.chance(0.3):  # as what it is without a sign, or in 64 bits
            unsigned = f"{a.name}.to(tl.uint32)"
            form = self.one(f"{unsigned} >> 3", f"{unsigned} // 3", f"{unsigned} % 5", f"{a.name}.to(tl.int64) * 65537 >> 4")  # fmt: skip
            return self.fit(f"({form}).to(tl.int32)", a, WRAPS)
        x, bound = a.name, min(a.bound, WRAPS if target == "int32" else EXACT[target])
        if target in FLOATS or (a.kind in FLOATS and target in NARROW):
            x, bound = self.below(a, 64), min(a.bound, 64)
        if a.kind in FLOATS and target == "uint8":
            x = f"tl.maximum({x}, 0)"
        if a.kind == "float32" and target == "int32":
            x = f"({self.room(a)} * 0.25)"
        self.let(f"{x}.to(tl.{target})", a.shape, target, bound)
        return None

    # -- tiles as wholes

    def view(self) -> None:
        a = self.pick()
        shape, n, b = a.shape, math.prod(a.shape), self.pick(a.kind, shape=a.shape)
        if not shape:
            return None
        first, axis = self.one(*(size for size in SIZES if n % size == 0)), self.random.randrange(len(shape))
        order = self.random.sample(range(len(shape)), len(shape))
        ways: list[tuple[str, tuple[int, ...]]] = [
            (f"tl.reshape({a.name}, ({first}, {n // first}))", (first, n // first)),
            (f"tl.reshape({a.name}, ({n},))", (n,)),
            (f"tl.permute({a.name}, {tuple(order)})", tuple(shape[i] for i in order)),
        ]
        ways += [(f"tl.flip({a.name}, {axis})", shape)] * (a.kind != BOOLEANS and shape[axis] > 1)
        if len(shape) < 3 and n <= LARGEST // 2:
            interleaved = (*shape[:-1], 2 * shape[-1])
            ways += [(f"tl.join({a.name}, {b.name})", (*shape, 2)), (f"tl.interleave({a.name}, {b.name})", interleaved)]
        if len(shape) == 3 or shape[-1] == 1 or self.chance(0.7):
            expression, shape = self.one(*ways)
            return self.fit(expression, Tile("", shape, a.kind, 0), max(a.bound, b.bound))
        left, right, half = self.name("t"), self.name("t"), (*shape[:-1], shape[-1] // 2)
        self.say(f"{left}, {right} = tl.split(tl.reshape({a.name}, {(*half, 2)}))")
        self.tiles += [Tile(name, half, a.kind, a.bound) for name in (left, right)]
        return None

    def reduce(self) -> None:
        """Along a dimension or all of them. Sums of narrow integers and extremes of all narrow numbers are wide."""
        a = self.pick()
        if not a.shape:
            return
        axis = self.one(None, *range(len(a.shape)))
        keep = axis is not None and self.chance(0.15)
        shape = () if axis is None else (*a.shape[:axis], *([1] * keep), *a.shape[axis + 1 :])
        which = self.one("sum", "sum", "sum", "max", "min", "argmax", "argmax", "argmin", "argmin", "max and index")
        cast = "" if a.kind in FLOATS else ".to(tl.int32)"
        options = f"{'' if axis is None else f', {axis}'}{', keep_dims=True' if keep else ''}"
        if which == "sum":
            kind, terms = self.summed(a)
            self.let(f"tl.sum({terms}{options}){cast}", shape, kind, EXACT[kind] if kind in FLOATS else WRAPS)
        elif which in ("max", "min"):
            kind = "float32" if a.kind in FLOATS else "int32"
            self.let(f"tl.{which}({a.name}{options}){cast}", shape, kind, a.bound)
        elif a.kind == BOOLEANS or axis is None:
            return
        elif which != "max and index":
            self.let(f"tl.{which}({a.name}{options})", shape, "int32", LARGEST)
        else:
            best, index = self.name("t"), self.name("t")
            self.say(f"{best}, {index} = tl.max({a.name}{options}, return_indices=True)")
            kind = "float32" if a.kind == "bfloat16" else a.kind
            self.tiles += [Tile(best, shape, kind, a.bound), Tile(index, shape, "int32", LARGEST)]

    def summed(self, tile: Tile) -> tuple[str, str]:
        """The kind of a tile's sum, and the tile, so small that the sum is exact or wraps around."""
        if tile.kind in FLOATS:
            if tile.kind == "bfloat16":  # which Triton sums in bfloat16: 8 bits
                return "float32", f"({self.below(tile, 64)}).to(tl.float32)"
            return ("float16", self.below(tile, 2)) if tile.kind == "float16" else ("float32", self.below(tile, 64))
        return "int32", tile.name

    def scan(self) -> None:
        a = self.pick_number(dimensions=1)
        (kind, terms), cast = self.summed(a), "" if a.kind in FLOATS else ".to(tl.int32)"
        call = f"tl.cumsum({terms}, {self.random.randrange(len(a.shape))}, reverse={self.chance(0.5)}){cast}"
        self.let(call, a.shape, kind, EXACT[kind] if kind in FLOATS else WRAPS)

    def gather(self) -> None:
        a = self.pick_number(dimensions=1)
        axis = self.random.randrange(len(a.shape))
        index = f"({' + '.join(self.coordinates(a.shape))} + n) % {a.shape[axis]}"
        if self.chance(0.4):
            index = f"{self.pick('int32', shape=a.shape).name} & {a.shape[axis] - 1}"
        self.fit(f"tl.gather({a.name}, {index}, {axis})", a, a.bound)

    def product(self) -> None:
        kind = self.one("float32", "float32", "float32", "float16", "bfloat16", "int8")
        if self.chance(0.1):
            a, b, shape = self.pick(kind, shape=(2, 16, 32)), self.pick(kind, shape=(2, 32, 16)), (2, 16, 16)
        else:
            a = self.matrix(kind, columns=32 if kind == "int8" else None)  # or more, as Triton wants
            b = self.matrix(kind, rows=a.shape[1])
            shape = (a.shape[0], b.shape[1])
        if math.prod(shape) > LARGEST:
            return
        summed = "int32" if kind == "int8" else "float32"
        operands = f"{a.name}, {b.name}" if kind == "int8" else f"{self.below(a, 8)}, {self.below(b, 8)}"
        if shape in MATRICES and self.chance(0.4):
            operands += f", {self.below(self.matrix(summed, *shape), 1 << 12)}"
        precision = ", out_dtype=tl.int32" if kind == "int8" else ', input_precision="ieee"'
        self.let(f"tl.dot({operands}{precision})", shape, summed, WRAPS if kind == "int8" else 1 << 13)

    # -- control flow

    def loop(self, carried: list[Tile] | None = None, products: int = 0) -> None:
        """Carries some tiles, which the body gives new values, and may move a pointer."""
        carried, some = carried or self.carried(), self.pick("int32", shape=()).name
        moving = self.pointer(self.one("f", "g", "h"), self.shape()) if self.chance(0.3) else None
        index = self.name("k")
        self.say(f"for {index} in range({self.one('n', '3', '1, n', 'n - 2', 'n, 0, -2', f'{some} & 3')}):")
        if moving is None:
            return self.inside(carried, [], index, products)
        self.inside(carried, [f"{moving.name} += {self.one('1', '32', 'n')}"], index, products)
        self.pointers.remove(moving)
        self.pointers.append(replace(moving, shift=f"{moving.shift}, moved by {index}"))
        return None

    def while_loop(self) -> None:
        """As often as a number says that was loaded or computed."""
        carried = self.carried()
        left = self.let(f"{self.pick('int32', shape=()).name} & 7", (), "int32", 7)
        first = carried[0] if carried[0].kind != BOOLEANS else left
        largest = f"tl.max({first.name})" if first.shape else first.name
        self.say(f"while {left.name} > 0:" if self.chance(0.6) else f"while ({left.name} > 0) & ({largest} < 40):")
        self.inside(carried, [f"{left.name} = {left.name} {self.one('- 1', '>> 1', '// 2')}"])

    def loop_of_products(self) -> None:
        """Operands and sums of products that the loop carries."""
        size = self.one(16, 16, 32)
        carried = [self.carry(number, self.matrix("float32", size, size)) for number in range(self.one(1, 2, 3))]
        self.loop(carried, products=self.one(1, 2, 3))

    def branch(self) -> None:
        carried, some = self.carried(), self.one("n", "n", self.pick("int32", shape=()).name)
        self.say(f"if {some} {self.one('>', '<', '==')} {self.random.randint(0, 3)}:")
        self.inside(carried)
        if self.chance(0.5):
            self.say("else:")
            self.inside(carried)

    def carried(self) -> list[Tile]:
        return [
            self.carry(number, self.pick_number() if number else self.pick()) for number in range(self.one(1, 2, 3))
        ]

    def carry(self, number: int, tile: Tile) -> Tile:
        """A variable of its own, floats within 64 from here on.

        No two of a loop begin with one value: of `a = b = x`, then `a, b = 2 * a, a` in a loop, Triton's own simplification
        (MLIR's, in Triton 3.7.1) makes `b = x`, on every target.
        """
        first, bound = (self.below(tile, 64), 64 + number) if tile.kind in FLOATS else (tile.name, WRAPS)
        return self.let(f"{first} + {number}" if number else first, tile.shape, tile.kind, bound)

    def inside(self, carried: list[Tile], last: Sequence[str] = (), index: str = "", products: int = 0) -> None:
        """A body: statements, then the new values of what is carried."""
        outside, pointers, stored = list(self.tiles), list(self.pointers), list(self.stored)
        self.indent += 1
        self.tiles += [Tile(index, (), "int32", 1 << 15)] if index else []
        for _ in range(products):
            self.product()
            self.one(self.view, self.arithmetic, self.select, self.load)()
        for _ in range(0 if products else self.one(1, 2, 3, 4)):
            self.statement()
        new = []
        for tile in carried:
            same = [t for t in self.tiles[-6:] if (t.shape, t.kind) == (tile.shape, tile.kind)]
            value = self.one(*same) if same else self.pick(tile.kind, shape=tile.shape)
            new.append(self.below(value, 64) if tile.kind in FLOATS else value.name)
        self.tiles = self.tiles[len(outside) :]
        for tile in self.unused(self.one(0, 1, 2)):
            self.store(tile)
        for line in (f"{', '.join(tile.name for tile in carried)} = {', '.join(new)}", *last):
            self.say(line)
        self.indent -= 1
        self.tiles, self.pointers = outside, pointers
        self.stored += stored  # a barrier inside may not have been reached
