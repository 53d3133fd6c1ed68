"""The one module that knows Triton's intermediate representation: a kernel's TTIR as plain objects.

Triton's front end makes it (`front_end.py`). Its Python bindings cannot read an op's attributes in every release that we
support, its text can be read in all of them, so the text is parsed:

    %mask = arith.cmpi slt, %o_n, %N_splat : tensor<1024xi32> loc(#loc7)

becomes `Op("arith.cmpi", operands=[o_n, N_splat], results=[Value("mask", (1024,), "i1")], attributes={"words": ("slt",)})`
with the file and line that `#loc7` names. Nothing here knows what an op means; the rest of this package never sees text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


class UnsupportedOpError(NotImplementedError):
    """A kernel holds something that is not compiled for the CPU. Names it, the kernel and the line."""


@dataclass(eq=False, slots=True, repr=False)
class Value:
    """An SSA value: a scalar (shape ()) or a tensor. `element` is "f32", "bf16", "i1", ... or "ptr:f32" for a pointer.

    `op` is the op that it is result number `position` of. A region's argument has the op that holds the region, and
    `is_argument`; a kernel's argument has no op.
    """

    name: str
    shape: tuple[int, ...]
    element: str
    op: "Op | None" = None
    position: int = 0
    is_argument: bool = False
    uses: list["Op"] = field(default_factory=list)

    def __repr__(self) -> str:  # all of them together hold the whole kernel
        return f"%{self.name}: {'x'.join(map(str, (*self.shape, self.element)))}"


@dataclass(eq=False, slots=True, repr=False)
class Block:
    """Ops in order; the kernel's own blocks may end in branches, a region's ends in what it yields."""

    label: str
    arguments: list[Value]
    ops: list["Op"] = field(default_factory=list)


@dataclass(eq=False, slots=True, repr=False)
class Op:
    """An operation. `order` numbers ops as they are written; `parent` is the op whose region holds it."""

    kind: str
    operands: list[Value]
    results: list[Value]
    attributes: dict[str, Any]
    regions: list[list[Block]] = field(default_factory=list)
    parent: "Op | None" = None
    order: int = 0
    location: str = ""

    def __repr__(self) -> str:
        return f"{self.results} = {self.kind} {self.operands} {self.attributes}"

    @property
    def result(self) -> Value:
        return self.results[0]

    @property
    def ancestors(self) -> list["Op"]:
        return [] if self.parent is None else [self.parent, *self.parent.ancestors]


@dataclass(eq=False, repr=False)
class Function:
    """A kernel: its run-time arguments (None and constexprs are gone), its blocks, and the text they were read from."""

    name: str
    arguments: list[Value]
    blocks: list[Block]
    text: str

    def ops(self) -> Iterator[Op]:
        """All ops, those of regions included, except what a reduction or scan combines with."""
        return _walk(self.blocks)


def _walk(blocks: list[Block]) -> Iterator[Op]:
    for block in blocks:
        for op in block.ops:
            yield op
            if op.kind not in ("tt.reduce", "tt.scan"):
                for region in op.regions:
                    yield from _walk(region)


def parse(text: str) -> Function:
    """The public function of a module's text."""
    return _Parser(text).function()


_TYPE = re.compile(r"tensor<((?:\d+x)*)(.+)>$")
_OP = re.compile(r'(?:(%[^=]+?) = )?"?([a-z_]+\.[\w.]+)"?(.*)$')
_QUOTED = re.compile(r'"[^"]*"')
_OPERAND = re.compile(r"%[\w\-.$]+(?:#\d+)?")
_FOR = re.compile(r"(?: unsigned)? (%\S+) = (\S+) to (\S+) step (\S+)(?: iter_args\((.*?)\) -> \((.*)\))?\s*: (\w+) $")
_WHILE = re.compile(r"(?: \((.*)\))? : \((.*)\) -> \(?(.*?)\)? $")


def _type(text: str) -> tuple[tuple[int, ...], str]:
    text = text.strip()
    if tensor := _TYPE.match(text):
        return tuple(int(size) for size in tensor[1].split("x")[:-1]), _type(tensor[2])[1]
    if text.startswith("!tt.ptr<"):
        return (), "ptr:" + text[len("!tt.ptr<") : -1].split(",")[0]
    return (), text


def _split(text: str, separator: str = ",") -> list[str]:
    """Splits at separators that stand outside brackets and quotes."""
    parts, depth, start, quoted = [], 0, 0, False
    for i, c in enumerate(text):
        if c == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif c in "<({[":
            depth += 1
        elif c in ")}]" or (c == ">" and text[i - 1] != "-"):
            depth -= 1
        elif c == separator and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()] if text[start:].strip() else parts


def _types(text: str) -> list[tuple[tuple[int, ...], str]]:
    text = text.strip()
    return [_type(part) for part in _split(text[1:-1] if text.startswith("(") and text.endswith(")") else text)]


def _attribute(text: str) -> Any:
    if text.startswith('"'):
        return _unescaped(text[1:-1])
    if text.startswith("array<"):
        return tuple(int(number) for number in re.findall(r"-?\d+", text.partition(":")[2]))
    value = text.split(" : ")[0]
    if value in ("true", "false"):
        return value == "true"
    return int(value) if re.fullmatch(r"-?\d+", value) else value


def _escaped(quoted: re.Match[str]) -> str:
    """What is quoted, without a character that means something outside."""
    return re.sub(r"[^\w.\\\"]", lambda c: "".join(f"\\{byte:02X}" for byte in c[0].encode()), quoted[0])


def _unescaped(text: str) -> str:
    r"""MLIR writes `"` as `\22`, and bytes that are not ASCII so."""
    return re.sub(rb"\\([0-9A-F]{2})", lambda code: bytes([int(code[1], 16)]), text.encode()).decode()


def _without_locations(line: str) -> tuple[str, str]:
    """The line without its ` loc(...)`, and the last of them."""
    last = ""
    while (start := line.find(" loc(")) >= 0:
        depth, end = 0, start + 4
        while True:
            depth += (line[end] == "(") - (line[end] == ")")
            end += 1
            if depth == 0:
                break
        last = line[start + 5 : end - 1]
        line = line[:start] + line[end:]
    return line, last


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.lines = [line.strip() for line in text.splitlines() if line.strip()]
        self.locations = {
            line.split(" = ", 1)[0]: line.split(" = loc(", 1)[1][:-1] for line in self.lines if line.startswith("#loc")
        }
        self.position = 0
        self.scopes: list[dict[str, Value]] = [{}]
        self.order = 0
        self.name = ""

    def function(self) -> Function:
        while not self.lines[self.position].startswith("tt.func public"):
            self.position += 1
        head, _ = _without_locations(self.next_line())
        name = re.search(r"@([\w.]+)\(", head)
        assert name is not None, head
        self.name = name[1]
        arguments = head[name.end() : head.rindex(") attributes")]
        declared = [self.declare(*argument.split(": ", 1)) for argument in _split(arguments)]
        return Function(name[1], declared, self.region(), self.text)

    def next_line(self) -> str:
        self.position += 1
        return self.lines[self.position - 1]

    def declare(self, name: str, type_text: str) -> Value:
        shape, element = _type(type_text.split(" {")[0])
        return self.new(name.strip(), shape, element)

    def new(self, name: str, shape: tuple[int, ...], element: str, op: Op | None = None, position: int = 0) -> Value:
        value = self.scopes[-1][name] = Value(name.removeprefix("%"), shape, element, op, position)
        return value

    def value(self, name: str) -> Value:
        return next(scope[name] for scope in reversed(self.scopes) if name in scope)

    def region(self) -> list[Block]:
        """Blocks up to the line that closes them, which stays to be read."""
        blocks = [Block("entry", [])]
        while not (line := self.lines[self.position]).startswith("}"):
            self.position += 1
            if label := re.match(r"\^(\w+)(?:\((.*)\))?:", line := _without_locations(line)[0]):
                if blocks[-1].label != "entry" or blocks[-1].ops:
                    blocks.append(Block(label[1], []))
                blocks[-1].label = label[1]
                blocks[-1].arguments = [self.declare(*part.split(": ", 1)) for part in _split(label[2] or "")]
            else:
                blocks[-1].ops.append(self.op(self.lines[self.position - 1]))
        return blocks

    def op(self, line: str) -> Op:
        line, location = _without_locations(_QUOTED.sub(_escaped, line))
        try:
            return self.read_op(line, location)
        except (AssertionError, AttributeError, IndexError, KeyError, StopIteration, ValueError) as error:
            raise UnsupportedOpError(f"{self.name}, {self.where(location)}: {line.strip()!r} cannot be read") from error

    def read_op(self, line: str, location: str) -> Op:
        match = _OP.match(line)
        if match is None:
            raise ValueError(line)
        names, kind, rest = match.groups()
        self.order += 1
        op = Op(kind, [], [], {}, order=self.order)
        results: list[tuple[tuple[int, ...], str]]
        if rest.endswith("{"):
            results, location = self.op_with_regions(op, rest[:-1])
        else:
            results = self.plain_op(op, rest)
        op.location = self.where(location)
        for operand in op.operands:
            operand.uses.append(op)
        self.add_results(op, names or "", results)
        return op

    def plain_op(self, op: Op, rest: str) -> list[tuple[tuple[int, ...], str]]:
        if op.kind == "arith.constant":
            value, _, type_text = rest.strip().rpartition(" : ") if " : " in rest else (rest.strip(), "", "i1")
            op.attributes["value"] = value.removeprefix("dense<").removesuffix(">")
            return [_type(type_text)]
        for group in re.findall(r"<?\{(.*?)\}>?", rest):
            for part in _split(group):
                name, _, value = part.partition(" = ")
                op.attributes[name] = _attribute(value) if value else True
        rest = re.sub(r"<?\{.*?\}>?", "", rest)
        if op.kind == "tt.print":
            op.attributes["prefix"] = _unescaped(rest.split('"')[1])
            rest = rest.split('"')[2].strip().removeprefix(": ")
        elif op.kind == "tt.assert":
            op.attributes["message"] = _unescaped(rest.split('"')[1])
        divider = " : " if " : " in rest else " -> "
        before, arrow, types = rest.rpartition(divider) if divider in rest else (rest, "", "")
        types = arrow + types if arrow == " -> " else types
        op.operands = [self.value(name) for name in _OPERAND.findall(before)]
        words = [part.strip() for part in _split(_OPERAND.sub("", before).replace("(", ",").replace(")", ","))]
        for word in words:
            name, equals, value = word.partition(" = ")
            if equals:
                op.attributes[name] = _attribute(value)
        op.attributes["words"] = tuple(word for word in words if word and " = " not in word)
        op.attributes["labels"] = tuple(re.findall(r"\^(\w+)", before))
        return self.result_types(op, types)

    def result_types(self, op: Op, types: str) -> list[tuple[tuple[int, ...], str]]:
        for arrow in (" -> ", " to "):
            if arrow in types:
                results = _types(types.split(arrow)[1])
                return results * 2 if op.kind == "tt.split" else results
        if not types:
            return []
        if op.kind in ("arith.cmpi", "arith.cmpf"):
            return [(_type(types)[0], "i1")]
        if op.kind == "tt.load":
            shape, pointer = _type(types)
            return [(shape, pointer.removeprefix("ptr:"))]
        listed = _types(types)
        return [listed[-1]] if op.kind == "arith.select" else [listed[0]]

    def op_with_regions(self, op: Op, rest: str) -> tuple[list[tuple[tuple[int, ...], str]], str]:
        """Reads header, regions and the closing line; returns the results' types and the location."""
        arguments: list[tuple[str, str]] = []
        results: list[tuple[tuple[int, ...], str]] = []
        if op.kind == "scf.for":
            header = _FOR.match(rest)
            assert header is not None, rest
            carried = [part.split(" = ") for part in _split(header[5] or "")]
            op.operands = [self.value(name) for name in (*header.groups()[1:4], *(init for _, init in carried))]
            arguments = [
                (header[1], header[7]),
                *zip((name for name, _ in carried), _split(header[6] or ""), strict=True),
            ]
            results = _types(header[6] or "")
            op.attributes["unsigned"] = rest.startswith(" unsigned")
        elif op.kind == "scf.while":
            header = _WHILE.match(rest)
            assert header is not None, rest
            carried = [part.split(" = ") for part in _split(header[1] or "")]
            op.operands = [self.value(init) for _, init in carried]
            arguments = list(zip((name for name, _ in carried), _split(header[2]), strict=True))
            results = _types(header[3])
        else:
            op.operands = [self.value(name) for name in _OPERAND.findall(rest.split("->")[0])]
            results = _types(rest.split("->")[1]) if "->" in rest else []
            op.attributes["axis"] = int(found[1]) if (found := re.search(r"axis = (\d+)", rest)) else 0
            op.attributes["reverse"] = "reverse = true" in rest
        while True:
            self.scopes.append({})
            before = [self.declare(*argument) for argument in arguments]
            blocks = self.region()
            self.scopes.pop()
            blocks[0].arguments = before or blocks[0].arguments
            self.adopt(op, blocks)
            closing, location = _without_locations(self.next_line())
            if not closing.endswith("{"):
                break
            arguments = []
        if " : " in closing and op.kind in ("tt.reduce", "tt.scan"):
            results = _types(closing.split(" -> ")[1])
        return results, location

    def adopt(self, op: Op, blocks: list[Block]) -> None:
        for block in blocks:
            for position, argument in enumerate(block.arguments):
                argument.op, argument.position, argument.is_argument = op, position, True
            for inner in block.ops:
                inner.parent = op
        op.regions.append(blocks)

    def add_results(self, op: Op, names: str, types: list[tuple[tuple[int, ...], str]]) -> None:
        declared = _split(names)
        if len(declared) == 1 and ":" in declared[0]:
            name, count = declared[0].split(":")
            declared = [f"{name}#{i}" for i in range(int(count))]
        op.results = [self.new(name, *types[position], op, position) for position, name in enumerate(declared)]

    def where(self, location: str) -> str:
        """ "file:line" of a location; of a call's two places the callee's, if it is not Triton's own library."""
        location = self.locations.get(location, location)
        if call := re.match(r"callsite\((\S+) at (\S+)\)", location):
            callee, caller = self.where(call[1]), self.where(call[2])
            return caller if not callee or "triton/language" in callee else callee
        if named := re.match(r'"[^"]*"\((#loc\d*)\)', location):
            return self.where(named[1])
        place = re.match(r'"([^"]*)":(\d+):\d+', location)
        return f"{place[1]}:{place[2]}" if place else ""
