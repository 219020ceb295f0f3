"""Texts that cover a tokenizer's whole vocabulary, to compare two implementations of it; and their first difference."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ODD_STRINGS = (
    "",
    " ",
    "\x00",
    "a  b\t\n\n c\r\n",
    "\u00e9e\u0301 \U0001f600\U0001f468\u200d\U0001f469 \u4f60\u597d \u05d0\u05d1",
    "don't I'LL we've 12345 3.14e-10 __init__ -->",
    "<|endoftext|> <s></s> [INST] <|pad|>",
    "x" * 300 + " " * 300 + "\n" * 30,
    "def f(x):\n        return x ** 2  # comment\n\n\nclass A:\n\tpass\n",
)
_NAMES_PER_TEXT = 16
_SEPARATORS = ("", "", "", "", " ", "  ", "\n", ", ", "1", "7")

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Difference:
    """A text that two implementations encode differently, with the ids of both."""

    text: str
    expected: list[int]
    found: list[int]

    def __str__(self) -> str:
        """The text and the ids from the first difference on."""
        pairs = zip(self.expected, self.found, strict=False)
        begin = next((idx for idx, (one, other) in enumerate(pairs) if one != other), 0)
        expected, found = self.expected[begin : begin + 6], self.found[begin : begin + 6]
        return f"{self.text[:80]!r} gives {found} instead of {expected} from token {begin} on"


def covering_texts(names: Sequence[str], special: Sequence[str]) -> list[str]:
    """The same texts each time: odd strings, each special token in several surroundings, all `names` in random order.

    names: what each token stands for, as text. special: tokens that an implementation may treat in a way of its own.
    """
    texts = list(ODD_STRINGS)
    for name in special:
        texts += [name, name * 2, f"{name} {name}", f"a{name}b", f" {name} ", f"x  {name}  y", f"{name}\n"]
    chooser = random.Random(0)
    shuffled = chooser.sample(list(names), len(names))
    for begin in range(0, len(shuffled), _NAMES_PER_TEXT):
        group = shuffled[begin : begin + _NAMES_PER_TEXT]
        texts.append("".join(name + chooser.choice(_SEPARATORS) for name in group))
    return texts


def first_difference(reference: Encode, other: Encode, texts: Sequence[str]) -> Difference | None:
    """The shortest of `texts` that `other` encodes unlike `reference`; None where they agree."""
    pairs = zip(texts, reference(texts), other(texts), strict=True)
    different = [Difference(text, list(one), list(two)) for text, one, two in pairs if list(one) != list(two)]
    return min(different, key=lambda item: len(item.text)) if different else None
