"""What the lines of random kernels are made of: pieces of memory, tiles, pointers, masks.

Floats are small integers, so that sums in any order are exact, and results are compared bit by bit: `Tile.bound` holds how
large they may be, and what would leave `EXACT` is clamped before. Integers wrap around, those of 32 bits not in sums and
products: an index that does is no index.
"""

import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import TypeVar

PIECES = {
    "f": "float32", "g": "float32", "c": "float32", "h": "int32", "i": "int32", "b": "int8", "s": "int16", "u": "uint8",
    "d": "float16", "e": "bfloat16", "m": "int1",
}  # fmt: skip
MEMORY = 4096  # elements of each piece of memory
INITIAL = 8  # magnitude of what lies there
SIZES = (1, 2, 4, 8, 16, 32, 64, 256)
LARGEST = 1024  # elements of a tile
MATRICES = ((16, 16), (16, 32), (16, 64), (32, 16), (32, 32), (64, 16))  # that products take
EXACT = {"float32": 1 << 18, "float16": 1 << 11, "bfloat16": 1 << 8, "int32": 1 << 18, "int1": 1, "int8": 128, "int16": 1 << 15, "uint8": 255}  # fmt: skip
FLOATS, NARROW, BOOLEANS = ("float32", "float16", "bfloat16"), ("int8", "int16", "uint8"), "int1"
WRAPS = 1 << 31  # the bound of integers that may be anything

TESTS = ("{i} >= 1", "{i} > n", "{i} >= n", "{i} != 0", "{i} % 3 != 1", "n > {i}")
COUPLED = ("{i} < {j}", "{i} <= {j} + n", "{i} + {j} < n", "{i} + {j} >= 2", "{i} > {j}", "(({i} ^ {j}) & 1) == 0")

Shape = tuple[int, ...]
T = TypeVar("T")


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


class Words:
    """Pieces of lines, and tiles to go on with; every choice is the seed's."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seed, self.lines, self.indent, self.names = seed, list[str](), 1, 0
        self.tiles: list[Tile] = []
        self.pointers: list[Pointer] = []
        self.stored: list[Pointer] = []  # since the last barrier
        self.alias = self.one("g = f", "g = f[32:]", "i = h") if self.chance(0.2) else ""
        pieces = [piece for piece in PIECES if piece not in "fh" and piece not in self.alias]
        self.constant = self.random.sample(pieces, len(pieces) // 2)  # nothing is stored there

    def unused(self, most: int) -> list[Tile]:
        """Tiles that nothing has been made of: Triton drops what is not stored in the end."""
        used = Counter(re.findall(r"\bt\d+", "\n".join(self.lines)))
        found = [tile for tile in self.tiles if used[tile.name] == 1]
        return self.random.sample(found, min(most, len(found)))

    # -- what a line is made of

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def one(self, *options: T) -> T:
        return self.random.choice(options)

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
            shape = tuple(self.one(*SIZES) for _ in range(max(dimensions, self.one(0, 1, 1, 2, 2, 2, 3))))
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
        stride, pattern, coordinates = self.one(1, 1, 1, 2), list[str](), self.coordinates(shape)
        for axis in order:
            place = coordinates[axis]
            if self.chance(0.15):
                place = f"({shape[axis] - 1} - {place})"
            elif self.chance(0.1) and shape[axis] > 1:
                place = f"({place} ^ {self.random.randrange(1, shape[axis])})"
            pattern.append(f"{place} * {stride}" if stride > 1 else place)
            stride *= shape[axis]
        shift = self.one("n", "3", "n * 2", "100") if self.chance(0.4) else ""
        return self.make_pointer(piece, shape, pattern, shift or ("" if shape else str(self.random.randrange(50))))

    def repeating_pointer(self, piece: str, shape: Shape) -> Pointer:
        """Some places for several elements."""
        coordinates = self.coordinates(shape)
        i = " + ".join(coordinates)
        known = [t.name for t in self.tiles if t.kind == "int32" and t.shape == shape][-2:]
        place = self.one(i, " * ".join(coordinates), f"({i}) % 4", f"({i}) // 2 * n", *(f"({t} & 1023)" for t in known))
        return self.make_pointer(piece, shape, [f"{place} + 0 * ({i})"], self.one("", "5"), repeats=True)

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
            return f"{self.one(*numbers)} {self.one('>', '<', '!=')} 2" if numbers else ""
        found = [tile.name for tile in self.tiles if tile.kind == "int1" and tile.shape == shape]
        if found and self.chance(0.2):
            return self.one(*found)
        coordinates = self.coordinates(shape)
        tests = [self.test(i, size) for i, size in zip(coordinates, shape, strict=True)]
        if len(shape) > 1 and self.chance(0.3):
            i, j = self.random.sample(coordinates, 2)
            tests.append(f"({self.one(*COUPLED).format(i=i, j=j)})")
        if self.chance(0.1):
            bound = self.pick("int32", shape=shape[:-1]).name
            wide = f"{bound}[{', '.join([':'] * (len(shape) - 1))}, None]" if len(shape) > 1 else bound
            tests.append(f"({coordinates[-1]} < {wide})")
        chosen = self.random.sample(tests, self.random.randint(1, len(tests)))
        return self.one(" & ", " & ", " & ", " | ").join(chosen)

    def test(self, i: str, size: int) -> str:
        """Of a coordinate: true up to some place, from some place on, or neither."""
        if self.chance(0.6):
            return f"({i} < {self.one('n', 'n * 7', size - 1, size, 1)})"
        return f"({self.one(*TESTS, f'{{i}} == {size - 1}').format(i=i)})"

    # -- tiles

    def load(self, kind: str | None = None, shape: Shape | None = None) -> Tile:
        kind = kind or self.one("float32", "int32", *EXACT)
        shape = self.shape() if shape is None else shape
        piece = self.one(*(piece for piece in PIECES if PIECES[piece] == kind))
        used = [p for p in self.pointers if p.shape == shape and PIECES[p.piece] == kind]
        if used and self.chance(0.4):
            pointer = self.one(*used)
        else:
            pointer = (self.repeating_pointer if shape and self.chance(0.1) else self.pointer)(piece, shape)
        mask = self.mask(shape)
        other = self.one(0, 0, 1, *([] if kind in ("int1", "uint8") else [-5]))
        loaded = f"tl.load({pointer.name}, {mask}, {other})" if mask else f"tl.load({pointer.name})"
        bound = INITIAL if pointer.piece in self.constant else EXACT[kind] if kind in (*FLOATS, BOOLEANS) else WRAPS
        return self.let(loaded, shape, kind, bound)

    def pick(self, *kinds: str, shape: Shape | None = None) -> Tile:
        """One of the last tiles of these kinds and this shape, or a new one."""
        found = [tile for tile in self.tiles if (not kinds or tile.kind in kinds) and shape in (None, tile.shape)]
        return self.one(*found[-6:]) if found else self.load(self.one(*kinds or FLOATS), shape)

    def pick_number(self, *, dimensions: int = 0) -> Tile:
        """Not a boolean, of as many dimensions or more."""
        found = [tile for tile in self.tiles if len(tile.shape) >= dimensions]
        tile = self.one(*found[-6:]) if found else self.load(shape=self.shape(dimensions))
        return tile if tile.kind != "int1" else self.let(f"{tile.name}.to(tl.int32)", tile.shape, "int32", 1)

    def matrix(self, kind: str, rows: int | None = None, columns: int | None = None) -> Tile:
        """One that a product takes: the latest that there are, or a new one."""
        shapes = [(m, n) for m, n in MATRICES if rows in (None, m) and columns in (None, n)]
        found = [tile for tile in self.tiles if tile.kind == kind and tile.shape in shapes]
        return self.one(*found[-4:]) if found and self.chance(0.85) else self.load(kind, self.one(*shapes))

    def wide(self, tile: Tile) -> Tile:
        if tile.kind in ("float32", "int32"):
            return tile
        kind = "float32" if tile.kind in FLOATS else "int32"
        return self.let(f"{tile.name}.to(tl.{kind})", tile.shape, kind, min(tile.bound, EXACT[tile.kind]))
