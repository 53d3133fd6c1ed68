"""Strings that tokenizers differ on: digits, spaces, accents, Chinese, emoji, code, special tokens."""

import random

from tests.decoder.gguf.files import CONTROL, USER_DEFINED, WORDS

_CODE = "def f(x):\n    return x**2\n/for(int i=0;i<10;++i){/x_1 = a[0]->b;/\n\t<p>/if x != 'y': # no\n/0x1F3a"
_SPACES = [" ", " ", " ", "  ", "   ", "     ", "\n", "\n\n", "\t", " \n", "\r\n", "\u00a0", "\u3000", "\u2009"]
_TEXT = (
    "the Hello it's WE'LL thing ababa abababab naïve Ångström cafe\u0301 你好世界 中文 日本語 привет مرحبا 😀 👩‍👩‍👧 🇫🇷 "
    "3.14 1,000,000 2024-05-06 ٣٤ ½ x² €20 ... !? -- `` ▁ §"
)
_SPECIAL = [*CONTROL, *USER_DEFINED, "<s>", "</s>", "<unk>", "<0x0A>", "<|endoftext|>"]


def strings(count: int) -> list[str]:
    """The same ones each time. None begins with a special token, and none is empty."""
    generator, text, code = random.Random(0), _TEXT.split(), _CODE.split("/")
    result = []
    for _ in range(count):
        pieces = [generator.choice(text)]
        for _ in range(generator.randrange(1, 12)):
            pool = generator.choices([text, WORDS, code, _SPACES, _SPECIAL], [5, 5, 2, 6, 1])[0]
            pieces.append(generator.choice(pool))
            if generator.random() < 0.4:
                pieces.append(" ")
        result.append(" " * generator.randrange(3) * (generator.random() < 0.3) + "".join(pieces))
    return result
