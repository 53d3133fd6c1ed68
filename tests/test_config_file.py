"""A TOML file as a dataclass: what is wrong is said with its key, and with the nearest right one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from llama_fast.config_file import ConfigError, read_config


@dataclass(frozen=True)
class Part:
    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Inner:
    vocab_size: int = 100
    kind: Literal["fast", "slow"] = "fast"
    on: bool = True

    def __post_init__(self) -> None:
        if self.vocab_size < 10:
            raise ValueError(f"vocab_size must be at least 10, and is {self.vocab_size}")


@dataclass(frozen=True)
class Outer:
    out: Path
    parts: tuple[Part, ...] = ()
    inner: Inner = Inner()
    note: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def read(tmp_path):
    def read(text, *settings):
        file = tmp_path / "c.toml"
        file.write_text(text)
        return read_config(file, Outer, settings)

    return read


def test_tables_arrays_and_defaults(read):
    text = 'out = "x"\n[[parts]]\nname = "a"\n[[parts]]\nname = "b"\nweight = 2\n[inner]\nkind = "slow"\n[extra]\ntime = "1:00"'
    assert read(text) == Outer(
        Path("x"), (Part("a"), Part("b", 2.0)), Inner(kind="slow"), extra={"time": "1:00"}
    )  # fmt: skip
    assert isinstance(read(text).parts[1].weight, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "out is missing"),
        ('out = "x"\n[iner]\n', "there is no iner; did you mean inner?"),
        ('out = "x"\n[inner]\nvocabsize = 5', "there is no inner.vocabsize; did you mean vocab_size?"),
        ('out = "x"\n[inner]\nzzz = 5', "there is no inner.zzz; there are vocab_size, kind, on"),
        ('out = "x"\n[[parts]]\nnme = "a"', r"there is no parts.0.nme; did you mean name?"),
        ('out = "x"\n[[parts]]\n', "parts.0.name is missing"),
        ('out = "x"\n[inner]\nvocab_size = "5"', "inner.vocab_size must be an integer, and is '5'"),
        ('out = "x"\n[inner]\nvocab_size = true', "inner.vocab_size must be an integer, and is True"),
        ('out = "x"\n[inner]\non = 1', "inner.on must be true or false, and is 1"),
        ('out = "x"\n[inner]\nkind = "slwo"', "inner.kind must be one of fast, slow, and is 'slwo'; did you mean slow?"),
        ('out = "x"\n[inner]\nvocab_size = 5', "inner: vocab_size must be at least 10, and is 5"),
        ('out = "x"\nparts = 5', "parts must be an array, and is 5"),
        ('out = "x"\ninner = 5', "inner must be a table, and is 5"),
        ('out = 5', "out must be a path, and is 5"),
        ("out =", "is no TOML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(read, text, message):
    with pytest.raises(ConfigError) as error:
        read(text)
    assert message in str(error.value) and "c.toml" in str(error.value)


def test_settings_change_what_the_file_says(read):
    text = 'out = "x"\n[[parts]]\nname = "a"'
    changed = read(
        text, "inner.vocab_size=50", "parts.0.weight=0.5", "note=some words", "inner.on=false", "extra.cpus=4"
    )
    assert changed == Outer(
        Path("x"), (Part("a", 0.5),), Inner(50, on=False), note="some words", extra={"cpus": 4}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("inner.vocab_size", "sets nothing"),
        ("inner.vocabsize=5", "did you mean vocab_size?"),
        ("parts.3.name=b", "'3' is no place in an array of 1"),
        ("parts.0=b", "sets a whole table"),
        ("out.deep=1", "'out' is no table"),
        ("inner.vocab_size=many", "must be an integer, and is 'many'"),
    ],
)
def test_wrong_settings_are_named(read, setting, message):
    with pytest.raises(ConfigError) as error:
        read('out = "x"\n[[parts]]\nname = "a"', setting)
    assert message in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.toml does not exist: it must be a configuration in TOML"):
        read_config(tmp_path / "none.toml", Outer)
