"""Documents that share long n-grams with texts a model will be judged by are removed: datatrove's filter over an index of ours.

datatrove's own indexer reads the tasks of lighteval and needs it installed; the index is the same: hashes in files, one a set.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from datatrove.pipeline.decont import NGramsDecontFilter
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig
from datatrove.utils.hashing import create_hash_func
from datatrove.utils.text import ngrams, simplify_text

from ..documents import Document, Function, Removed
from .words import HASH, WORDS


def write_index(folder: Path, name: str, texts: Iterable[str], *, ngram: int) -> None:
    """Hashes of all n-grams of words of an evaluation set.

    Raises:
        ValueError: no text is long enough to have one, so that nothing would be found.
    """
    config = NGramsDecontConfig(n_grams=ngram, hash_config=HASH)
    hash_of = create_hash_func(config.hash_config)
    hashes: set[int] = set()
    for text in texts:
        words = WORDS.word_tokenize(simplify_text(text, config.norm_config))
        hashes.update(hash_of(" ".join(each)) for each in ngrams(words, ngram))
    if not hashes:
        raise ValueError(
            f"no text of {name} has {ngram} words, so none would be found again: set decontaminate.ngram lower, or leave it out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    array = np.array(sorted(hashes), dtype=config.hash_config.np_descr)
    (folder / f"{name}.index.hashes").write_bytes(array.tobytes())


def decontamination(folder: Path, *, ngram: int) -> Function:
    """Removes documents that have an n-gram of `folder`'s index; the reason names the set, the metadata the n-gram."""
    block = NGramsDecontFilter(str(folder), NGramsDecontConfig(n_grams=ngram, hash_config=HASH), language=WORDS)

    def judge(document: Document) -> Document | Removed:
        if block.filter(document) is True:
            return document
        return Removed(f"shares {ngram} words with {document.metadata['contaminated_task']}")

    return judge
