"""Every format, plain and compressed; and every way of being broken that costs no more than it must and is named."""

import gzip
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from llama_fast.data.config import Source
from llama_fast.data.documents import Document, Fault
from llama_fast.data.read.formats import read_file
from llama_fast.data.read.inputs import fingerprint, list_inputs

TEXTS = ["The first document.", "第二篇文章，用中文写成。", "三つ目の文書です。\nIt has two lines."]


def read(path, **options):
    items = [item for made in list_inputs(Source("s", str(path), **options)) for item in read_file(made)]
    return [i for i in items if isinstance(i, Document)], [i for i in items if isinstance(i, Fault)]


def jsonl(texts):
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def csv_of(texts, separator=","):
    rows = (f'{i}{separator}"{text}"' for i, text in enumerate(texts))
    return "\r\n".join([f"n{separator}text", *rows]).encode()


def parquet(texts):
    stream = io.BytesIO()
    pa.parquet.write_table(pa.table({"n": list(range(len(texts))), "text": texts}), stream)
    return stream.getvalue()


def arrow(texts):
    stream = io.BytesIO()
    table = pa.table({"text": texts})
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


def arrow_file(texts):
    stream = io.BytesIO()
    table = pa.table({"text": texts})
    with pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


NOT_UTF8 = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"\xff\xfe"], pa.binary()).buffers())

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
MANY = {
    ".jsonl": jsonl,
    ".csv": csv_of,
    ".tsv": lambda texts: csv_of(texts, "\t"),
    ".parquet": parquet,
    ".arrow": arrow,
}


@pytest.mark.parametrize("compressed", COMPRESS)
@pytest.mark.parametrize("ending", MANY)
def test_formats_of_many_documents(tmp_path, ending, compressed):
    (tmp_path / f"a{ending}{compressed}").write_bytes(COMPRESS[compressed](MANY[ending](TEXTS)))
    documents, faults = read(tmp_path)
    assert [each.text for each in documents] == TEXTS and faults == []
    assert all(each.metadata["source"] == "s" for each in documents)


@pytest.mark.parametrize("compressed", COMPRESS)
def test_arrows_other_format(tmp_path, compressed):
    """`datasets` writes streams; what ends as .arrow elsewhere is a file with an index."""
    (tmp_path / f"a.arrow{compressed}").write_bytes(COMPRESS[compressed](arrow_file(TEXTS)))
    documents, faults = read(tmp_path)
    assert [each.text for each in documents] == TEXTS and faults == []


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    (tmp_path / "a.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "b.txt")
    documents, faults = read(tmp_path)
    assert (
        documents == []
        and [fault.reason for fault in faults] == ["is no file, or a link to one that does not exist"] * 2
    )
    assert [fingerprint(made) for made in list_inputs(Source("s", str(tmp_path)))] == ["", ""]


def test_an_encoding_of_a_table_that_does_not_exist(tmp_path):
    (tmp_path / "a.csv").write_bytes(csv_of(TEXTS))
    _, (fault,) = read(tmp_path, encoding="utf-9")
    assert fault.reason == "is in an unknown encoding: utf-9"


@pytest.mark.parametrize("compressed", COMPRESS)
@pytest.mark.parametrize("ending", [".txt", ".md", ".html"])
def test_formats_of_one_document(tmp_path, ending, compressed):
    text = "\n\n".join(TEXTS)
    (tmp_path / f"a{ending}{compressed}").write_bytes(COMPRESS[compressed](text.encode()))
    (document,), faults = read(tmp_path)
    assert document.text == text and faults == []
    assert document.metadata.get("format") == ("html" if ending == ".html" else None)


def test_paragraphs_are_named_by_their_lines(tmp_path):
    (tmp_path / "a.txt").write_text("\nOne\ngoes on.\n\n\n \nTwo.\n\nThree.\n")
    documents, _ = read(tmp_path, split="paragraph")
    assert [(each.text, each.metadata["line"]) for each in documents] == [
        ("One\ngoes on.", 2),
        ("Two.", 7),
        ("Three.", 9),
    ]


def test_byte_order_mark_line_ends_and_other_encodings(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read(tmp_path)[0][0].text == "one\ntwo"
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    assert read(tmp_path, encoding="latin-1")[0][0].text == "café"
    (tmp_path / "a.txt").unlink()
    (tmp_path / "b.html").write_bytes('<meta charset="shift_jis"><p>日本語</p>'.encode("shift_jis"))
    assert "日本語" in read(tmp_path)[0][0].text


@pytest.mark.parametrize(
    ("name", "content", "kept", "line", "reason"),
    [
        ("a.jsonl", jsonl(TEXTS[:2]) + b'{"text": "cut\n' + jsonl(TEXTS[2:]), 3, 3, "is no JSON"),
        ("a.jsonl", jsonl(TEXTS) + b'{"txt": "x"}\n', 3, 4, "has no string 'text'"),
        ("a.jsonl", jsonl(TEXTS) + b'{"text": 5}\n', 3, 4, "has no string 'text'"),
        ("a.jsonl", jsonl(TEXTS) + b'{"text": "\\ud800"}\n', 3, 4, "is no JSON"),
        ("a.jsonl", jsonl(TEXTS) + b'{"text": "\xff"}\n', 3, 4, "is no JSON"),
        ("a.csv", csv_of(TEXTS[:2]) + b"\r\n1,2,3\r\n", 2, 4, "has 3 fields, and the header 2"),
        ("a.csv", csv_of(TEXTS[:2]) + b'\r\n2,"never closed', 2, 4, "is no CSV"),
        ("a.csv", b"n,body\n1,x\n", 0, 1, "has no column 'text'; there are n, body"),
        ("a.csv", csv_of(TEXTS[:1]) + b"\r\n1,\xff\xfe\r\n", 0, None, "is no utf-8"),
        ("a.txt", b"one\ntwo \xff\n", 0, 2, "is no utf-8: byte 0xff in line 2"),
        ("a.parquet", parquet(TEXTS)[:-20], 0, None, "cannot be read"),
        ("a.parquet", b"no table", 0, None, "cannot be read"),
        ("a.parquet", parquet([TEXTS[0], None]), 1, 2, "has no string 'text'"),
        ("a.arrow", arrow(TEXTS)[:100], 0, None, "cannot be read"),
        ("a.jsonl.gz", b"no gzip at all", 0, None, "cannot be read"),
        ("a.html", b"<meta charset=undefined><p>x", 0, None, "cannot be read as undefined"),
        ("a.html", b"<meta charset=utf-7><p>half +2AA-", 0, None, "cannot be read as utf-7"),
        ("a.html", b"<meta charset=nothing><p>x", 0, None, "is in an unknown encoding: nothing"),
        ("a.parquet", parquet(NOT_UTF8), 1, 2, "is no utf-8: byte 0xff"),
        ("a.parquet.gz", gzip.compress(parquet(TEXTS))[:-30], 0, None, "cannot be read"),
    ],
)  # fmt: skip
def test_faults_are_named_and_cost_little(tmp_path, name, content, kept, line, reason):
    (tmp_path / name).write_bytes(content)
    documents, (fault,) = read(tmp_path)
    assert len(documents) == kept
    assert Path(fault.file).name == name and reason in fault.reason
    assert line is None or fault.line == line


@pytest.mark.parametrize("compressed", [".gz", ".zst"])
def test_what_comes_before_a_break_is_kept(tmp_path, compressed):
    """A stream is decompressed in pieces of 64 kB, of which the last may be lost."""
    texts = [os.urandom(500).hex() for _ in range(1000)]
    whole = COMPRESS[compressed](jsonl(texts))
    (tmp_path / f"a.jsonl{compressed}").write_bytes(whole[: len(whole) * 3 // 4])
    documents, (fault,) = read(tmp_path)
    assert [each.text for each in documents] == texts[: len(documents)] and 600 < len(documents) < 760
    assert fault.line == len(documents) + 1 and "cannot be read" in fault.reason


def test_folders_globs_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("d/a.txt", "d/deep/b.jsonl", "d/c.bin", "d/d.MD"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text('{"text": "x"}')
    assert [made.file for made in list_inputs(Source("s", "d"))] == ["d/a.txt", "d/d.MD", "d/deep/b.jsonl"]
    assert [made.file for made in list_inputs(Source("s", "d/**/*.jsonl"))] == ["d/deep/b.jsonl"]
    assert [made.file for made in list_inputs(Source("s", "d/c.bin", format="text"))] == ["d/c.bin"]
    (only,) = list_inputs(Source("s", str(tmp_path / "d" / "a.txt")))
    assert only.file == str(tmp_path / "d/a.txt")
    before = fingerprint(only)
    Path("d/a.txt").write_text('{"text": "y"}')
    assert fingerprint(only) != before


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "there is nothing at nowhere"),
        ("*.txt", "there is nothing at"),
        ("only.bin", "none ends as those that can be read"),
        ("nosuch://x", "is no address"),
    ],
)
def test_nothing_to_read_is_an_error(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    Path("only.bin").write_text("x")
    with pytest.raises(ValueError, match=message) as error:
        list_inputs(Source("s", path))
    assert "'s'" in str(error.value)


def test_a_folder_of_datasets_is_read_without_its_notes(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "set")
    (tmp_path / "set" / "README.md").write_text("about it")
    documents, faults = read(tmp_path / "set")
    assert [each.text for each in documents] == TEXTS and faults == []


def test_addresses_of_the_hub_are_its_filesystem(monkeypatch):
    """Nothing is downloaded here: the hub's filesystem is asked for what a data set holds."""
    import fsspec
    from huggingface_hub import HfFileSystem

    local = fsspec.filesystem("memory")
    local.pipe("/datasets/o/n/a.jsonl", jsonl(TEXTS))
    local.pipe("/datasets/o/n/README.md", b"card")
    for name in ("isdir", "find", "exists", "open", "info"):
        monkeypatch.setattr(HfFileSystem, name, lambda self, path, *a, _n=name, **k: getattr(local, _n)("/" + self._strip_protocol(path).lstrip("/"), *a, **k))  # fmt: skip
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "_strip_protocol", classmethod(lambda c, p: p))
    documents, faults = read("hf://datasets/o/n")
    assert [each.text for each in documents] == TEXTS and faults == []
