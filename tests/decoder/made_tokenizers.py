"""Small tokenizers of each kind that LLaMA-like models come with, made with the `tokenizers` library."""

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

SAMPLES = [
    "Once upon a time, there was a small owl. It didn't sleep.",
    "  two spaces, a tab\tand\n\n lines ",
    "naïve café, 你好世界, 한국어, 🦙👩‍👩‍👧 ok",
    "",
    " ",
    "a",
]
SPECIAL = ["<unk>", "<s>", "</s>"]


def with_bos(backend: Backend) -> Backend:
    template = {"single": "<s> $A", "pair": "<s> $A <s> $B", "special_tokens": [("<s>", backend.token_to_id("<s>"))]}
    backend.post_processor = processors.TemplateProcessing(**template)
    return backend


def byte_level() -> Backend:
    """As Llama 3, Qwen and the embedded model: BPE on bytes, so that one character may be several tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(SAMPLES[:2] * 3, trainer)
    return with_bos(backend)


def byte_level_across() -> Backend:
    """The same, whose tokens begin and end anywhere in characters, as those of large vocabularies do in Thai."""
    backend = byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    backend.train_from_iterator(["ภาษาไทยภาษาไทย 你好世界你好 🦙🦙👩👩🦙"], trainer)
    return backend


def words() -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges of a BPE on characters, with ▁ for a space."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=80, show_progress=False)
    backend.train_from_iterator(SAMPLES[:1] * 3 + ["▁▁▁"], trainer)
    model = json.loads(backend.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(merge) for merge in model["merges"]]


def llama2() -> Backend:
    """As Llama 2's `tokenizer.json`: BPE on characters, bytes for unknown ones, a space before the text that decoding strips."""
    pieces, merges = words()
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(strip)
    return with_bos(backend)


def gemma() -> Backend:
    """As Gemma's: the same with a space only where the text has one."""
    backend = llama2()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def unigram() -> Backend:
    """As sentencepiece's Unigram models: Metaspace before the model and as the decoder, bytes for unknown characters."""
    pieces, _ = words()
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [(token, -float(i) / len(tokens)) for i, token in enumerate(tokens)]
    backend = Backend(models.Unigram(scores, unk_id=0, byte_fallback=True))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return with_bos(backend)


def word_level() -> Backend:
    """Whole words, with a space between any two."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, "a", "b", "\ufffd"])}
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return with_bos(backend)


MADE = {
    "byte-level": byte_level,
    "byte-level, across characters": byte_level_across,
    "llama-2": llama2,
    "gemma": gemma,
    "unigram": unigram,
}


def write(folder: Path, backend: Backend, **config) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
