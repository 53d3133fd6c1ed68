"""Shards: what is written is what is read, and nothing damaged, unfinished or foreign is read at all."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llama_fast.data.bpe import BOS, EOS, BpeConfig, train_tokenizer
from llama_fast.data.shard_writer import ShardWriter
from llama_fast.data.shards import Shards
from llama_fast.decoder.tokenizer import Tokenizer

TEXTS = [
    "Once upon a time",
    "",
    "人工智能正在改变世界。",
    "吾輩は猫である。名前はまだ無い。",
    f"{BOS}{EOS} spelt out",
    "word " * 500,
    "the end",
]
DEMO = Path(__file__).parents[2] / "llama_fast" / "demo_model"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(
        ["once upon a time, the end"] * 9, tmp_path_factory.mktemp("shards") / "bpe", BpeConfig(vocab_size=290)
    )


def documents(texts):
    return (Document(text=text, id=f"d/{i}") for i, text in enumerate(texts))


def write(folder, tokenizer, texts=TEXTS, *, task=0, tasks=1, **options):
    ShardWriter(str(folder), tokenizer.folder, **options).run(documents(texts), task, tasks)
    return folder


def test_documents_come_back(tokenizer, tmp_path):
    shards = Shards(write(tmp_path, tokenizer), tokenizer)
    assert len(shards) == len(TEXTS)
    assert [tokenizer.decode(document) for document in shards] == TEXTS
    assert shards.tokens == sum(map(len, shards)) == os.path.getsize(tmp_path / "00000_00000.ds") // 2
    assert tokenizer.decode(shards[-1]) == "the end" and len(shards[2:4]) == 2
    for outside in (len(TEXTS), -len(TEXTS) - 1):
        with pytest.raises(IndexError, match=f"document {outside} of 7"):
            shards[outside]


def test_each_document_has_one_bos_and_one_eos(tokenizer, tmp_path):
    """Also the empty one, and one whose text spells them."""
    for document in Shards(write(tmp_path, tokenizer), tokenizer):
        assert document[0] == tokenizer.bos_id and document[-1] == tokenizer.eos_id
        assert np.isin(document, [tokenizer.bos_id, tokenizer.eos_id]).sum() == 2


def test_tokens_are_those_of_both_loaders(tokenizer, tmp_path):
    theirs = AutoTokenizer.from_pretrained(tokenizer.folder)
    for text, document in zip(TEXTS, Shards(write(tmp_path, tokenizer), tokenizer), strict=True):
        if BOS not in text:
            assert (
                document.tolist()
                == [*tokenizer.encode(text), tokenizer.eos_id]
                == [*theirs(text)["input_ids"], theirs.eos_token_id]
            )


@given(st.lists(st.one_of(st.text(), st.sampled_from([BOS, EOS, "<|user|>"]))))
@settings(max_examples=30, deadline=None)
def test_any_text_comes_back(tokenizer, tmp_path_factory, texts):
    folder = write(tmp_path_factory.mktemp("any"), tokenizer, texts, shard_characters=5)
    assert [tokenizer.decode(document) for document in Shards(folder, tokenizer)] == texts


def test_a_document_is_a_view_of_the_file(tokenizer, tmp_path):
    document = Shards(write(tmp_path, tokenizer), tokenizer)[0]
    assert document.dtype == np.uint16 and not document.flags.writeable and not document.flags.owndata
    with (tmp_path / "00000_00000.ds").open("r+b") as file:
        file.seek(2)
        file.write(np.uint16(77).tobytes())
    assert document[1] == 77


def test_documents_longer_than_a_shard_stay_whole(tokenizer, tmp_path):
    folder = write(tmp_path, tokenizer, shard_characters=20)
    shards = Shards(folder, tokenizer)
    assert [tokenizer.decode(document) for document in shards] == TEXTS
    per_shard = [json.loads(path.read_text())["documents"] for path in sorted(folder.glob("*.json"))]
    assert per_shard == [3, 2, 1, 1]  # 16 + 0 + 11 letters, 16 + 41, 2,500, 7
    assert [document.tolist() for document in shards] == [
        d.tolist() for d in Shards(write(tmp_path / "one", tokenizer), tokenizer)
    ]


@pytest.mark.parametrize("texts", [[], [""]])
def test_little_or_nothing(tokenizer, tmp_path, texts):
    shards = Shards(write(tmp_path, tokenizer, texts), tokenizer)
    assert [document.tolist() for document in shards] == [[0, 1]] * len(texts) and shards.tokens == 2 * len(texts)


def test_documents_without_any_token(tokenizer, tmp_path):
    """A tokenizer that names neither BOS nor EOS makes nothing of an empty document; the others stay where they are."""
    (tmp_path / "bare").mkdir()
    content = json.loads((tokenizer.folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "bare" / "tokenizer.json").write_text(json.dumps(content))
    bare = Tokenizer(tmp_path / "bare")
    shards = Shards(write(tmp_path / "shards", bare, ["", "a", "", "", "b", ""], shard_characters=1), bare)
    assert [bare.decode(document) for document in shards] == ["", "a", "", "", "b", ""]
    assert shards.bos_id is None and shards.eos_id is None and shards.tokens == 2


def test_a_folder_that_pads_does_not_pad_documents(tmp_path):
    demo = Tokenizer(DEMO)
    assert "BatchLongest" in (DEMO / "tokenizer.json").read_text()
    shards = Shards(write(tmp_path, demo, ["Mia", "Mia went to the lake."]), demo)
    assert [document.tolist() for document in shards] == [
        [*demo.encode(text), demo.eos_id] for text in ["Mia", "Mia went to the lake."]
    ]


def test_a_large_vocabulary_takes_four_bytes(tokenizer, tmp_path):
    content = json.loads((tokenizer.folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"filler {i}": len(vocabulary) + i for i in range(65536)}
    shutil.copytree(tokenizer.folder, tmp_path / "large")
    (tmp_path / "large" / "tokenizer.json").write_text(json.dumps(content))
    large = Tokenizer(tmp_path / "large")
    assert large.vocab_size > 65536
    shards = Shards(write(tmp_path / "shards", large), large)
    assert shards.dtype == np.uint32 and [large.decode(document) for document in shards] == TEXTS


def test_from_a_folder_of_jsonl_by_several_tasks(tokenizer, tmp_path):
    """Documents stand in the order of the files, whatever the tasks; a task that has no file writes an empty shard."""
    (tmp_path / "documents").mkdir()
    texts = [text for text in TEXTS if text]  # datatrove's reader leaves empty ones out
    for i in range(3):
        lines = [json.dumps({"id": f"{i}/{j}", "text": f"{i}{text}"}) for j, text in enumerate(texts)]
        (tmp_path / "documents" / f"{i}.jsonl").write_text("\n".join(lines))
    steps = [JsonlReader(str(tmp_path / "documents")), ShardWriter(str(tmp_path / "shards"), tokenizer.folder)]
    LocalPipelineExecutor(steps, tasks=4, workers=1, logging_dir=str(tmp_path / "logs")).run()
    shards = Shards(tmp_path / "shards", tokenizer)
    assert [tokenizer.decode(document) for document in shards] == [f"{i}{text}" for i in range(3) for text in texts]


def test_a_task_that_runs_again_leaves_nothing_of_before(tokenizer, tmp_path):
    again = write(write(tmp_path / "again", tokenizer, shard_characters=1), tokenizer)
    once = write(tmp_path / "once", tokenizer)
    files = sorted(path.name for path in once.iterdir())
    assert sorted(path.name for path in again.iterdir()) == files
    assert all((again / name).read_bytes() == (once / name).read_bytes() for name in files)


def test_datatroves_own_tokenizer_writes_the_same(tokenizer, tmp_path):
    """Nothing of the format is ours: tokens and index are theirs, where a text spells no special token."""
    texts = [text for text in TEXTS if BOS not in text]
    tokens = DocumentTokenizer(
        str(tmp_path / "theirs"), str(tokenizer.folder / "tokenizer.json"), eos_token=EOS, shuffle_documents=False
    )
    tokens.run(documents([f"{BOS}{text}" for text in texts]), 0, 1)
    ours = write(tmp_path / "ours", tokenizer, texts)
    for ending in ("", ".index"):
        theirs = (tmp_path / "theirs" / f"00000_unshuffled.ds{ending}").read_bytes()
        assert theirs == (ours / f"00000_00000.ds{ending}").read_bytes()


def cut(folder):
    os.truncate(folder / "00000_00001.ds", os.path.getsize(folder / "00000_00001.ds") - 2)


def lengthen(folder):
    with (folder / "00000_00001.ds").open("ab") as file:
        file.write(b"\0\0")


def cut_index(folder):
    os.truncate(folder / "00000_00000.ds.index", 8)


def disorder_index(folder):
    ends = np.fromfile(folder / "00000_00000.ds.index", np.uint64)
    ends[0], ends[1] = ends[1], ends[0]
    ends.tofile(folder / "00000_00000.ds.index")


def remove(*names):
    def damage(folder):
        for name in names:
            (folder / name).unlink()

    return damage


def edit(**fields):
    def damage(folder):
        path = folder / "00000_00001.ds.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"00000_00001\.ds has 5,002 bytes, and its index says 2,502 tokens of uint16, 5,004 bytes"),
        (lengthen, r"00000_00001\.ds has .* it was cut or changed"),
        (cut_index, r"00000_00000\.ds\.index has 8 bytes, and 5 documents take 40"),
        (disorder_index, r"00000_00000\.ds\.index is damaged"),
        (remove("00000_00001.ds.json"), r"00000_00001\.ds is unfinished"),
        (remove("00000_00001.ds.index"), r"00000_00001\.ds has no index"),
        (remove("00000_00001.ds", "00000_00001.ds.json"), "shard 1 of 3 of task 0 is missing"),
        (edit(dtype="int8"), "dtype must be uint16 or uint32, got 'int8'"),
        (edit(dtype="uint32"), "several runs"),
        (edit(tasks=2), "several runs"),
        (edit(tokens=3), "damaged"),
        (edit(tokenizer="0" * 64), "another tokenizer"),
        (lambda folder: (folder / "00000_00001.ds.json").write_text("{"), r"00000_00001\.ds\.json is no ShardInfo"),
    ],
)  # fmt: skip
def test_damaged_shards_are_refused(tokenizer, tmp_path, damage, message):
    write(tmp_path, tokenizer, shard_characters=50)
    assert len(Shards(tmp_path, tokenizer)) == len(TEXTS)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        Shards(tmp_path, tokenizer)


def test_a_missing_task_is_named(tokenizer, tmp_path):
    write(tmp_path, tokenizer, task=0, tasks=3)
    write(tmp_path, tokenizer, task=2, tasks=3)
    with pytest.raises(ValueError, match="task 1 of 3 has no shard"):
        Shards(tmp_path, tokenizer)


def test_another_tokenizer_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"tokenised with another tokenizer \(\w{12}\) than .*demo_model"):
        Shards(write(tmp_path, tokenizer), Tokenizer(DEMO))


def test_a_folder_without_shards(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="has no shards"):
        Shards(tmp_path, tokenizer)


def test_half_a_character_is_named_with_its_document(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"document d/1 is not Unicode: its character 1 is '\\ud800'"):
        write(tmp_path, tokenizer, ["fine", "a\ud800"])
    with pytest.raises(ValueError, match="unfinished"):
        Shards(tmp_path, tokenizer)


def test_a_shard_of_no_characters(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="shard_characters must be at least 1, got 0"):
        ShardWriter(str(tmp_path), tokenizer.folder, shard_characters=0)
