"""The grammar of random kernels: one program on pieces of memory of every type, written line by line.

    Writer(seed).program()      a file that can be run alone: the kernel, `memory()`, which gives its arguments, and a launch

Tiles have no to three dimensions, some of one element. Loads and stores come in any order, through pointers of their own or
ones used before, to places that differ or repeat, under masks of every shape; between them arithmetic, casts, views,
reductions, scans, products, loops, while loops and ifs. `fuzz_meaning.py` says what comes out.

Floats are small integers, so that sums in any order are exact, and results are compared bit by bit: `Tile.bound` holds how
large they may be, and what would leave `EXACT` is clamped before. What no machine has to agree on is not written: places
that get different numbers from one store, and stores to places of one pattern, moved, without a barrier between them.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PIECES = {
    "f": "float32", "g": "float32", "c": "float32", "h": "int32", "i": "int32", "b": "int8", "s": "int16", "u": "uint8",
    "d": "float16", "e": "bfloat16", "m": "int1",
}  # fmt: skip
TYPES = {kind: "bool" if kind == "int1" else kind for kind in PIECES.values()}  # as torch calls them
MEMORY = 4096  # elements of each piece of memory
INITIAL = 8  # magnitude of what lies there
SIZES = (1, 2, 4, 8, 16, 32)
LARGEST = 1024  # elements of a tile
EXACT = {"float32": 1 << 18, "float16": 1 << 11, "bfloat16": 1 << 8, "int32": 1 << 18, "int1": 1, "int8": 128, "int16": 1 << 15, "uint8": 255}  # fmt: skip
FLOATS, NARROW = ("float32", "float16", "bfloat16"), ("int8", "int16", "uint8")
WRAPS = 1 << 31  # the bound of integers that may be anything

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tile:
    name: str
    shape: Shape
    kind: str
    bound: int  # of its magnitude


@dataclass(frozen=True)
class Pointer:
    """`pattern` is what differs between its elements, `shift` what does not."""

    name: str
    piece: str
    shape: Shape
    pattern: frozenset[str]
    shift: str
    repeats: bool = False


class Writer:
    """Writes one kernel; every choice is the seed's."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seed, self.lines, self.indent, self.names = seed, list[str](), 1, 0
        self.tiles: list[Tile] = []
        self.pointers: list[Pointer] = []
        self.stored: list[Pointer] = []  # since the last barrier
        self.alias = self.random.choice(("g = f", "g = f[32:]", "i = h")) if self.chance(0.2) else ""
        pieces = [piece for piece in PIECES if piece not in "fh" and piece not in self.alias]
        self.constant = self.random.sample(pieces, len(pieces) // 2)  # nothing is stored there

    def program(self) -> str:
        for _ in range(2):
            self.load()
        for _ in range(self.random.randint(4, 14)):
            self.statement()
        for tile in self.unused(5):
            self.store(tile)
        memory = [
            f"{piece} = torch.randint({0 if kind in ('int1', 'uint8') else -INITIAL}, {2 if kind == 'int1' else INITIAL + 1}, ({MEMORY},)).to(torch.{TYPES[kind]})"
            for piece, kind in PIECES.items()
        ]
        lines = [
            "import torch\nimport triton\nimport triton.language as tl\n\nfrom llama_fast import native\n",
            f"\n@triton.jit\ndef kernel_{self.seed}({', '.join(PIECES)}, n):",
            *self.lines,
            "\n\ndef memory():",
            *(f"    {line}" for line in [f"torch.manual_seed({self.seed})", *memory, self.alias] if line),
            f"    return {', '.join(PIECES)}, {self.random.choice((0, 1, 2, 3, 7, 16))}",
            f'\n\nif __name__ == "__main__":\n    arguments = memory()\n    native.launch(kernel_{self.seed}, (1,), *arguments)',
        ]
        return "\n".join(lines) + "\n"

    def unused(self, most: int) -> list[Tile]:
        """Tiles that nothing has been made of: Triton drops what is not stored in the end."""
        used = Counter(re.findall(r"\bt\d+", "\n".join(self.lines)))
        found = [tile for tile in self.tiles if used[tile.name] == 1]
        return self.random.sample(found, min(most, len(found)))

    # -- what a line is made of

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def say(self, line: str) -> None:
        self.lines.append("    " * self.indent + line)

    def name(self, letter: str) -> str:
        self.names += 1
        return f"{letter}{self.names}"

    def let(self, expression: str, shape: Shape, kind: str, bound: int = WRAPS) -> Tile:
        tile = Tile(self.name("t"), shape, kind, bound)
        self.say(f"{tile.name} = {expression}")
        self.tiles.append(tile)
        return tile

    def pick(self, *kinds: str, shape: Shape | None = None) -> Tile:
        """One of the last tiles of these kinds and this shape, or a new one."""
        found = [tile for tile in self.tiles if (not kinds or tile.kind in kinds) and shape in (None, tile.shape)]
        return self.random.choice(found[-6:]) if found else self.load(self.random.choice(kinds or FLOATS), shape)

    def pick_number(self, *, dimensions: int = 0) -> Tile:
        """Not a boolean, of as many dimensions or more."""
        found = [tile for tile in self.tiles if len(tile.shape) >= dimensions]
        tile = self.random.choice(found[-6:]) if found else self.load(shape=self.shape(dimensions))
        return tile if tile.kind != "int1" else self.let(f"{tile.name}.to(tl.int32)", tile.shape, "int32", 1)

    def below(self, tile: Tile, bound: int) -> str:
        """The tile, held within a bound."""
        if tile.bound <= bound:
            return tile.name
        least = tile.name if tile.kind == "uint8" else f"tl.maximum({tile.name}, {-bound})"
        return self.same(f"tl.minimum({least}, {bound})", tile)

    def same(self, extreme: str, tile: Tile) -> str:
        """The greater or lesser of two tiles, which of bfloat16 is a float32."""
        return f"{extreme}.to(tl.bfloat16)" if tile.kind == "bfloat16" else extreme

    def room(self, tile: Tile, *, factors: bool = False) -> str:
        """The tile, so small that a sum or a product of two is exact; narrow integers wrap around."""
        exact = EXACT[tile.kind]
        return tile.name if tile.kind in NARROW else self.below(tile, math.isqrt(exact) if factors else exact // 2)

    def shape(self, dimensions: int = 0) -> Shape:
        while True:
            shape = tuple(
                self.random.choice(SIZES) for _ in range(max(dimensions, self.random.choice((0, 1, 1, 2, 2, 2, 3))))
            )
            if math.prod(shape) <= LARGEST:
                return shape

    def coordinates(self, shape: Shape) -> list[str]:
        def spread(axis: int) -> str:
            index = ", ".join(":" if i == axis else "None" for i in range(len(shape)))
            return f"tl.arange(0, {shape[axis]})" + (f"[{index}]" if len(shape) > 1 else "")

        return [spread(axis) for axis in range(len(shape))]

    def pointer(self, piece: str, shape: Shape) -> Pointer:
        """Different places for all elements: dimensions in any order, some backwards, twice as far apart, or further on."""
        order = list(range(len(shape)))[::-1]
        if self.chance(0.4):
            self.random.shuffle(order)
        stride, pattern, coordinates = self.random.choice((1, 1, 1, 2)), list[str](), self.coordinates(shape)
        for axis in order:
            place = coordinates[axis]
            if self.chance(0.15):
                place = f"({shape[axis] - 1} - {place})"
            elif self.chance(0.1) and shape[axis] > 1:
                place = f"({place} ^ {self.random.randrange(1, shape[axis])})"
            pattern.append(f"{place} * {stride}" if stride > 1 else place)
            stride *= shape[axis]
        shift = self.random.choice(("n", "3", "n * 2", "100")) if self.chance(0.4) else ""
        return self.make_pointer(piece, shape, pattern, shift or ("" if shape else str(self.random.randrange(50))))

    def repeating_pointer(self, piece: str, shape: Shape) -> Pointer:
        """Some places for several elements."""
        coordinates = self.coordinates(shape)
        forms = [
            " + ".join(coordinates),
            " * ".join(coordinates),
            f"({' + '.join(coordinates)}) % 4",
            f"({' + '.join(coordinates)}) // 2 * n",
        ]
        forms += [
            f"({tile.name} & {self.random.choice((3, 1023))})"
            for tile in self.tiles
            if tile.kind == "int32" and tile.shape == shape
        ][-2:]
        zero = f"0 * ({' + '.join(coordinates)})"
        return self.make_pointer(
            piece, shape, [f"{self.random.choice(forms)} + {zero}"], self.random.choice(("", "5")), repeats=True
        )

    def make_pointer(
        self, piece: str, shape: Shape, pattern: list[str], shift: str, *, repeats: bool = False
    ) -> Pointer:
        moving = frozenset(term for term in pattern if "(0, 1)" not in term)
        pointer = Pointer(self.name("p"), piece, shape, moving, shift, repeats)
        self.say(f"{pointer.name} = {' + '.join([piece, *pattern, *([shift] if shift else [])])}")
        self.pointers.append(pointer)
        return pointer

    def mask(self, shape: Shape) -> str:
        """A boolean that broadcasts to the shape; "" for none."""
        if self.chance(0.35):
            return ""
        if not shape:
            numbers = [tile.name for tile in self.tiles if (tile.kind, tile.shape) == ("int32", ())]
            return f"{self.random.choice(numbers)} {self.random.choice(('>', '<', '!='))} 2" if numbers else ""
        found = [tile.name for tile in self.tiles if tile.kind == "int1" and tile.shape == shape]
        if found and self.chance(0.2):
            return self.random.choice(found)
        tests = [self.test(i, size) for i, size in zip(self.coordinates(shape), shape, strict=True)]
        if len(shape) > 1 and self.chance(0.3):
            i, j = self.random.sample(self.coordinates(shape), 2)
            coupled = (
                f"{i} < {j}",
                f"{i} <= {j} + n",
                f"{i} + {j} < n",
                f"{i} + {j} >= 2",
                f"{i} > {j}",
                f"(({i} ^ {j}) & 1) == 0",
            )
            tests.append(f"({self.random.choice(coupled)})")
        if self.chance(0.1):
            bound = self.pick("int32", shape=shape[:-1]).name
            wide = f"{bound}[{', '.join([':'] * (len(shape) - 1))}, None]" if len(shape) > 1 else bound
            tests.append(f"({self.coordinates(shape)[-1]} < {wide})")
        chosen = self.random.sample(tests, self.random.randint(1, len(tests)))
        return self.random.choice((" & ", " & ", " & ", " | ")).join(chosen)

    def test(self, i: str, size: int) -> str:
        """Of a coordinate: true up to some place, from some place on, or neither."""
        if self.chance(0.6):
            return f"({i} < {self.random.choice(('n', size - 1, size, 1))})"
        return self.random.choice(
            (
                f"({i} >= 1)",
                f"({i} > n)",
                f"({i} >= n)",
                f"({i} != 0)",
                f"({i} % 3 != 1)",
                f"(n > {i})",
                f"({i} == {size - 1})",
            )
        )

    # -- statements

    def statement(self) -> None:
        kinds: list[Callable[[], object]] = (
            [self.load] * 2 + [self.arithmetic] * 6 + [self.compare, self.select, self.broadcast] * 2
        )
        kinds += (
            [self.view] * 4
            + [self.reduce] * 3
            + [self.scan, self.gather, self.repeat, self.in_place, self.atomic]
            + [self.store] * 2
            + [self.cast] * 3
        )
        if self.indent < 3:
            kinds += [self.product] * 2 + [self.loop] * 2 + [self.branch, self.while_loop, self.loop_of_products]
        self.random.choice(kinds)()

    def load(self, kind: str | None = None, shape: Shape | None = None) -> Tile:
        kind = kind or self.random.choice(("float32", "int32", *EXACT))
        shape = self.shape() if shape is None else shape
        piece = self.random.choice([piece for piece in PIECES if PIECES[piece] == kind])
        used = [p for p in self.pointers if p.shape == shape and PIECES[p.piece] == kind]
        if used and self.chance(0.4):
            pointer = self.random.choice(used)
        else:
            pointer = (self.repeating_pointer if shape and self.chance(0.1) else self.pointer)(piece, shape)
        mask = self.mask(shape)
        other = self.random.choice((0, 0, 1) if kind in ("int1", "uint8") else (0, 0, 1, -5))
        loaded = f"tl.load({pointer.name}, {mask}, {other})" if mask else f"tl.load({pointer.name})"
        bound = INITIAL if pointer.piece in self.constant else EXACT[kind]
        return self.let(loaded, shape, kind, bound if kind in FLOATS or bound == INITIAL else WRAPS)

    def store(self, tile: Tile | None = None) -> None:
        tile = tile or self.pick()
        pieces = [piece for piece in PIECES if PIECES[piece] == tile.kind and piece not in self.constant]
        if not pieces:
            return self.store(self.wide(tile))
        used = [p for p in self.pointers if p.shape == tile.shape and p.piece in pieces and not p.repeats]
        pointer = (
            self.random.choice(used)
            if used and self.chance(0.4)
            else self.pointer(self.random.choice(pieces), tile.shape)
        )
        return self.put(pointer, self.below(tile, EXACT[tile.kind]) if tile.kind in FLOATS else tile.name)

    def put(self, pointer: Pointer, value: str) -> None:
        mask = self.mask(pointer.shape)
        self.order(pointer)
        self.say(f"tl.store({pointer.name}, {value}{', ' + mask if mask else ''})")

    def order(self, pointer: Pointer) -> None:
        """Only a barrier orders stores to one pattern of places and the same, moved."""
        if any(
            (p.piece, p.pattern) == (pointer.piece, pointer.pattern) and p.shift != pointer.shift for p in self.stored
        ):
            self.say("tl.debug_barrier()")
            self.stored.clear()
        self.stored.append(pointer)

    def wide(self, tile: Tile) -> Tile:
        if tile.kind in ("float32", "int32"):
            return tile
        kind = "float32" if tile.kind in FLOATS else "int32"
        return self.let(f"{tile.name}.to(tl.{kind})", tile.shape, kind, min(tile.bound, EXACT[tile.kind]))

    def repeat(self) -> None:
        """Places that repeat get the same from each of their elements; an atomic sum may get anything."""
        kind = self.random.choice(("float32", "int32", "int32", "int16"))
        piece = self.random.choice([p for p in PIECES if PIECES[p] == kind and p not in self.constant] or ["f"])
        shape = self.shape(1)
        pointer = self.repeating_pointer(piece, shape)
        if PIECES[piece] == "int32" and self.chance(0.3):
            value = self.pick("int32", shape=shape)
            mask = self.mask(shape)
            self.order(pointer)
            return self.say(
                f"tl.atomic_{self.random.choice(('add', 'max', 'xor'))}({pointer.name}, {value.name}{', mask=' + mask if mask else ''})"
            )
        old = self.let(f"tl.load({pointer.name})", shape, PIECES[piece], EXACT[PIECES[piece]])
        return self.put(pointer, self.random.choice(("7", f"{self.room(old)} + 1", f"-{old.name}")))

    def in_place(self) -> None:
        """A tile whose elements change places in memory."""
        shape = self.random.choice([(16,), (64,), (1024,), (4, 4), (16, 16), (32, 32), (2, 2, 2), (1, 8), (8, 4)])
        pointer = self.pointer(
            self.random.choice([piece for piece in PIECES if piece not in self.constant and piece != "m"]), shape
        )
        kind, n = PIECES[pointer.piece], math.prod(shape)
        tile = self.let(f"tl.load({pointer.name})", shape, kind, EXACT[kind])
        ways = [
            f"tl.flip({tile.name}, {len(shape) - 1})",
            f"tl.reshape(tl.trans(tl.reshape({tile.name}, ({n // 2}, 2))), {shape})",
        ]
        ways += [f"tl.gather({tile.name}, {n - 1} - tl.arange(0, {n}), 0)"] * (len(shape) == 1)
        ways += [f"tl.trans({tile.name})"] * 2 * (len(set(shape)) == 1 and len(shape) == 2)
        y = self.let(self.random.choice(ways), shape, kind, EXACT[kind])
        self.put(pointer, f"{self.room(y)} + {self.room(tile)}" if self.chance(0.3) else y.name)

    def atomic(self) -> None:
        """With a mask, at different places; what was there before is known where the mask is true."""
        value = self.pick("int32")
        pointer = self.pointer(self.random.choice(["h", *({"i"} - set(self.constant))]), value.shape)
        mask = self.mask(value.shape)
        self.order(pointer)
        which = self.random.choice(("add", "max", "min", "and", "or", "xor", "xchg"))
        call = f"tl.atomic_{which}({pointer.name}, {value.name}{', mask=' + mask if mask else ''})"
        before = self.let(call, value.shape, "int32")
        if mask:
            self.tiles.remove(before)
            self.let(f"tl.where({mask}, {before.name}, 0)", value.shape, "int32")

    def arithmetic(self) -> None:
        a = self.pick_number()
        b = self.pick(a.kind, shape=a.shape) if self.chance(0.8) else a
        which = self.random.choice(
            ["+", "-", "*", "minimum", "maximum", "neg", "abs", "number"]
            + (["floor"] if a.kind in FLOATS else ["&", "^", "|", "~", ">>", "<<", "//", "%"] * 2)
        )
        number = self.random.choice((1, 2, 3, 7) if a.kind == "uint8" else (1, 2, 3, 7, -3, -8))
        if which in "+-":
            return self.fit(f"{self.room(a)} {which} {self.room(b)}", a, a.bound + b.bound)
        if which == "*":
            return self.fit(f"{self.room(a, factors=True)} * {self.room(b, factors=True)}", a, a.bound * b.bound)
        if which == "number":
            return self.fit(
                f"{self.room(a)} + {'n' if a.kind in ('int32', 'float32') and self.chance(0.5) else number}",
                a,
                a.bound + 16,
            )
        if which in ("minimum", "maximum"):
            return self.fit(self.same(f"tl.{which}({a.name}, {b.name})", a), a, max(a.bound, b.bound))
        if which == "floor":
            small = self.wide(a)
            return self.fit(f"tl.floor({self.room(small)} * 0.25)", small, small.bound)
        if which in ("//", "%"):  # signed ones towards zero
            divisor = f"({b.name} | 1)" if self.chance(0.4) else number
            return self.fit(f"{a.name if a.kind in NARROW else self.room(a)} {which} {divisor}", a, WRAPS)
        if which in (">>", "<<"):
            shift = f"({b.name} & 7)" if self.chance(0.4) else self.random.randrange(8)
            return self.fit(f"{a.name} {which} {shift}", a, WRAPS)
        unary = {"neg": f"-{a.name}", "abs": f"tl.abs({a.name})", "~": f"~{a.name}"}
        return self.fit(
            unary.get(which, f"{a.name} {which} {b.name}"), a, a.bound if which in ("neg", "abs") else WRAPS
        )

    def fit(self, expression: str, like: Tile, bound: int) -> None:
        self.let(
            expression,
            like.shape,
            like.kind,
            min(bound, EXACT[like.kind]) if like.kind in FLOATS else min(bound, WRAPS),
        )

    def compare(self) -> None:
        a = self.pick()
        b = self.pick(a.kind, shape=a.shape).name
        if a.kind == "int1":
            return self.fit(f"{a.name} {self.random.choice('&|^')} {b}" if self.chance(0.7) else f"~{a.name}", a, 1)
        other = self.random.choice((b, b, "n" if a.kind in ("int32", "float32") else "0"))
        self.let(f"{a.name} {self.random.choice(('<', '<=', '>', '>=', '==', '!='))} {other}", a.shape, "int1", 1)

    def select(self) -> None:
        """By a tile, by a test of coordinates, or by one condition for all elements."""
        a = self.pick()
        b, c = self.pick(a.kind, shape=a.shape), self.wide(self.pick(shape=a.shape))
        scalar = self.pick("int32", shape=())
        condition = self.random.choice(
            (f"{c.name} > {self.random.randint(-3, 3)}", self.mask(a.shape) or "n > 1", "n > 2", f"{scalar.name} > 0")
        )
        self.fit(f"tl.where({condition}, {a.name}, {b.name})", a, max(a.bound, b.bound))

    def broadcast(self) -> None:
        """A tile, and one that has size 1 in some dimension or no dimensions."""
        a = self.wide(self.pick_number(dimensions=1))
        axis = self.random.randrange(len(a.shape))
        shape = (*a.shape[:axis], *a.shape[axis + 1 :])
        if self.chance(0.5):
            b = self.let(f"tl.max({a.name}, {axis})", shape, a.kind, a.bound)
        else:
            b = self.pick(a.kind, shape=self.random.choice((shape, ())))
        index = f"[{', '.join('None' if i == axis else ':' for i in range(len(a.shape)))}]" if b.shape else ""
        left, right = self.room(a), self.room(b) + index
        if b.bound > EXACT[b.kind] // 2:
            right = f"({self.room(b)}){index}"
        if self.chance(0.3):
            self.let(f"{left} {self.random.choice(('<', '>='))} {right}", a.shape, "int1", 1)
        else:
            self.fit(f"{left} {self.random.choice('+-')} {right}", a, min(a.bound + b.bound, EXACT[a.kind]))

    def cast(self) -> None:
        a = self.pick()
        target = self.random.choice([*EXACT, "int32"])
        if a.kind == "int32" and self.chance(0.3):  # as what it is without a sign, or in 64 bits
            forms = (
                "({}.to(tl.uint32) >> 3)",
                "({}.to(tl.uint32) // 3)",
                "({}.to(tl.uint32) % 5)",
                "({}.to(tl.int64) * 65537 >> 4)",
            )
            return self.fit(self.random.choice(forms).format(a.name) + ".to(tl.int32)", a, WRAPS)
        if a.kind == "float32" and target == "int32":
            self.let(f"({self.room(a)} * 0.25).to(tl.int32)", a.shape, "int32", EXACT["int32"])
            return
        x = a.name
        if target in FLOATS or (a.kind in FLOATS and target in NARROW):
            x = self.below(a, 64)
        if a.kind in FLOATS and target == "uint8":
            x = f"tl.maximum({x}, 0)"
        bound = min(a.bound, 64) if target in FLOATS else min(a.bound, EXACT[target]) if target in NARROW else a.bound
        self.let(f"{x}.to(tl.{target})", a.shape, target, 1 if target == "int1" else max(bound, 1))

    def view(self) -> None:
        a = self.pick()
        shape, n = a.shape, math.prod(a.shape)
        b = self.pick(a.kind, shape=shape)
        first = self.random.choice([size for size in SIZES if n % size == 0])
        axis, order = self.random.randrange(max(1, len(shape))), self.random.sample(range(len(shape)), len(shape))
        ways = {
            "reshape": (f"tl.reshape({a.name}, ({first}, {n // first}))", (first, n // first)),
            "ravel": (f"tl.reshape({a.name}, ({n},))", (n,)),
            "permute": (f"tl.permute({a.name}, {tuple(order)})", tuple(shape[i] for i in order)),
            "flip": (f"tl.flip({a.name}, {axis})", shape),
            "join": (f"tl.join({a.name}, {b.name})", (*shape, 2)),
            "interleave": (f"tl.interleave({a.name}, {b.name})", (*shape[:-1], 2 * shape[-1] if shape else 2)),
        }
        which = self.random.choice((*ways, "split", "split"))
        if (
            not shape
            or (which == "flip" and (a.kind == "int1" or shape[axis] == 1))
            or (which in ("join", "interleave") and (n > LARGEST // 2 or len(shape) > 2))
        ):
            return
        if which != "split":
            self.fit(ways[which][0], Tile("", ways[which][1], a.kind, 0), max(a.bound, b.bound))
        elif shape[-1] > 1 and len(shape) < 3:
            half = (*shape[:-1], shape[-1] // 2)
            left, right = self.name("t"), self.name("t")
            self.say(f"{left}, {right} = tl.split(tl.reshape({a.name}, {(*half, 2)}))")
            self.tiles += [Tile(name, half, a.kind, a.bound) for name in (left, right)]

    def reduce(self) -> None:
        """Along a dimension or all of them. Sums of narrow integers and extremes of all narrow numbers are wide."""
        a = self.pick()
        if not a.shape:
            return
        axis = self.random.choice((None, *range(len(a.shape))))
        keep = axis is not None and self.chance(0.15)
        shape = () if axis is None else (*a.shape[:axis], *([1] * keep), *a.shape[axis + 1 :])
        which = self.random.choice(
            ("sum", "sum", "sum", "max", "min", "argmax", "argmax", "argmin", "argmin", "max and index")
        )
        wide = "float32" if a.kind in FLOATS else "int32"
        cast = "" if a.kind in FLOATS else ".to(tl.int32)"
        options = f"{'' if axis is None else f', {axis}'}{', keep_dims=True' if keep else ''}"
        if which == "sum":
            x, kind = (
                (self.below(a, 2 if a.kind == "float16" else 64) if a.kind in FLOATS else a.name),
                "float16" if a.kind == "float16" else wide,
            )
            self.let(f"tl.sum({x}{options}){cast}", shape, kind, EXACT[kind] if kind in FLOATS else WRAPS)
        elif which in ("max", "min"):
            self.let(f"tl.{which}({a.name}{options}){cast}", shape, wide, a.bound)
        elif a.kind != "int1" and axis is not None and "arg" in which:
            self.let(f"tl.{which}({a.name}{options})", shape, "int32", LARGEST)
        elif a.kind != "int1" and axis is not None:
            best, index = self.name("t"), self.name("t")
            self.say(f"{best}, {index} = tl.max({a.name}{options}, return_indices=True)")
            self.tiles += [
                Tile(best, shape, "float32" if a.kind == "bfloat16" else a.kind, a.bound),
                Tile(index, shape, "int32", LARGEST),
            ]

    def scan(self) -> None:
        a = self.pick_number(dimensions=1)
        kind = "int32" if a.kind not in FLOATS else "float16" if a.kind == "float16" else "float32"
        x = self.below(a, 2 if a.kind == "float16" else 64) if a.kind in FLOATS else a.name
        cast = "" if a.kind in FLOATS else ".to(tl.int32)"
        call = f"tl.cumsum({x}, {self.random.randrange(len(a.shape))}, reverse={self.chance(0.5)}){cast}"
        self.let(call, a.shape, kind, EXACT[kind] if kind in FLOATS else WRAPS)

    def gather(self) -> None:
        a = self.pick_number(dimensions=1)
        axis = self.random.randrange(len(a.shape))
        index = f"({' + '.join(self.coordinates(a.shape))} + n) % {a.shape[axis]}"
        if self.chance(0.4):
            index = f"{self.pick('int32', shape=a.shape).name} & {a.shape[axis] - 1}"
        self.fit(f"tl.gather({a.name}, {index}, {axis})", a, a.bound)

    def matrix(self, kind: str, rows: int | None = None, columns: int | None = None) -> Tile:
        """One that a product takes: the latest that there are, or a new one."""
        found = [
            t
            for t in self.tiles
            if t.kind == kind
            and len(t.shape) == 2
            and min(t.shape) >= 16
            and rows in (None, t.shape[0])
            and columns in (None, t.shape[1])
        ]
        size = lambda given: given or self.random.choice((16, 32))  # noqa: E731
        return (
            self.random.choice(found[-4:])
            if found and self.chance(0.85)
            else self.load(kind, (size(rows), size(columns)))
        )

    def product(self) -> None:
        kind = self.random.choice(("float32", "float32", "float32", "float16", "bfloat16"))
        a = self.matrix(kind)
        b = self.matrix(kind, rows=a.shape[1])
        shape = (a.shape[0], b.shape[1])
        accumulator = f", {self.below(self.matrix('float32', *shape), 1 << 12)}" if self.chance(0.4) else ""
        self.let(
            f'tl.dot({self.below(a, 8)}, {self.below(b, 8)}{accumulator}, input_precision="ieee")',
            shape,
            "float32",
            1 << 13,
        )

    # -- control flow

    def loop(self, carried: list[Tile] | None = None, statements: int = 0) -> None:
        """Carries some tiles, which the body gives new values, and may move a pointer."""
        carried = carried or self.carried()
        some = self.pick("int32", shape=()).name
        moving = self.pointer(self.random.choice("fgh"), self.shape()) if self.chance(0.3) else None
        index = self.name("k")
        self.say(f"for {index} in range({self.random.choice(('n', '3', '1, n', 'n - 2', 'n, 0, -2', f'{some} & 3'))}):")
        moves = [f"{moving.name} += {self.random.choice(('1', '32', 'n'))}"] if moving else []
        self.inside(carried, moves, index, statements)

    def while_loop(self) -> None:
        """As often as a number says that was loaded or computed."""
        carried = self.carried()
        left = self.let(f"{self.pick('int32', shape=()).name} & 7", (), "int32", 7)
        first = carried[0] if carried[0].kind != "int1" else left
        largest = f"tl.max({first.name})" if first.shape else first.name
        self.say(f"while {left.name} > 0:" if self.chance(0.6) else f"while ({left.name} > 0) & ({largest} < 40):")
        self.inside(carried, [f"{left.name} = {left.name} {self.random.choice(('- 1', '>> 1', '// 2'))}"])

    def loop_of_products(self) -> None:
        """Operands and sums of products that the loop carries."""
        size = self.random.choice((16, 16, 32))
        carried = [
            self.carry(number, self.matrix("float32", size, size)) for number in range(self.random.randint(1, 3))
        ]
        self.loop(carried, self.random.randint(1, 3))

    def branch(self) -> None:
        carried = self.carried()
        some = self.random.choice(("n", "n", self.pick("int32", shape=()).name))
        self.say(f"if {some} {self.random.choice(('>', '<', '=='))} {self.random.randint(0, 3)}:")
        self.inside(carried)
        if self.chance(0.5):
            self.say("else:")
            self.inside(carried)

    def carried(self) -> list[Tile]:
        return [
            self.carry(number, self.pick_number() if number else self.pick())
            for number in range(self.random.randint(1, 3))
        ]

    def carry(self, number: int, tile: Tile) -> Tile:
        """A variable of its own, floats within 64 from here on.

        No two of a loop begin with one value: of `a = b = x`, then `a, b = 2 * a, a` in a loop, Triton's simplification (MLIR's,
        at least up to Triton 3.7.1) makes `b = x`, on every target.
        """
        first = self.below(tile, 64) if tile.kind in FLOATS else tile.name
        return self.let(
            f"{first} + {number}" if number else first,
            tile.shape,
            tile.kind,
            64 + number if tile.kind in FLOATS else WRAPS,
        )

    def inside(self, carried: list[Tile], last: Sequence[str] = (), index: str = "", products: int = 0) -> None:
        outside, pointers = list(self.tiles), list(self.pointers)
        self.indent += 1
        self.stored.clear()
        self.tiles += [Tile(index, (), "int32", 1 << 15)] if index else []
        for _ in range(products):
            self.product()
            self.random.choice((self.view, self.arithmetic, self.select, self.load))()
        for _ in range(0 if products else self.random.randint(1, 4)):
            self.statement()
        new = []
        for tile in carried:
            same = [t for t in self.tiles[-6:] if (t.shape, t.kind) == (tile.shape, tile.kind)]
            value = self.random.choice(same) if same else self.pick(tile.kind, shape=tile.shape)
            new.append(self.below(value, 64) if tile.kind in FLOATS else value.name)
        self.tiles = self.tiles[len(outside) :]
        for tile in self.unused(self.random.choice((0, 1, 2))):
            self.store(tile)
        self.say(f"{', '.join(tile.name for tile in carried)} = {', '.join(new)}")
        for line in last:
            self.say(line)
        self.indent -= 1
        self.stored.clear()
        self.tiles, self.pointers = outside, pointers
