"""What kind of text a token is, from the passage around it: words are found first, then every token is placed in one.

A rough division without a language model or a tagger: function words are a closed list, everything else that is a word
counts as content.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

KINDS = (
    "content word, start",
    "content word, rest",
    "capitalised word",
    "function word",
    "number",
    "punctuation",
    "white space",
)

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_FUNCTION_WORD_LIST = """
a about above after again all also although am among an and another any are as at be because been before being below
between both but by can could did do does doing done down during each either else ever every few for from had has
have having he her here hers him his how however i if in into is it its itself just may me might mine more most much
must my neither never no nor not of off on once only or other our ours out over own same shall she should since so
some such than that the their theirs them then there these they this those though through to too toward under until
up upon us very was we were what when where whether which while who whom whose why will with within without would
yet you your yours it's don't isn't can't won't doesn't didn't i'm that's there's def class return import elif none
true false self
"""
_FUNCTION_WORDS = frozenset(_FUNCTION_WORD_LIST.split())


def token_kinds(pieces: Sequence[str]) -> list[str]:
    """The kind (one of KINDS) of every piece of a text cut into pieces, in order.

    A piece without characters (the rest of a character that spans several tokens) has the kind of the piece before it.
    """
    words = list(_WORD.finditer("".join(pieces)))
    kinds: list[str] = []
    start, place = 0, 0
    for piece in pieces:
        end = start + len(piece)
        while place < len(words) and words[place].end() <= start:
            place += 1
        word = words[place] if place < len(words) and words[place].start() < end else None
        if piece:
            kinds.append(_kind(piece, word, start))
        else:
            kinds.append(kinds[-1] if kinds else "punctuation")
        start = end
    return kinds


def _kind(piece: str, word: re.Match[str] | None, start: int) -> str:
    """The kind of a piece that begins at `start` and touches `word` (None: it touches no word)."""
    if any(character.isdigit() for character in piece):
        return "number"
    if word is not None:
        text = word.group()
        if text.lower() in _FUNCTION_WORDS:
            return "function word"
        if word.start() < start:
            return "content word, rest"
        return "capitalised word" if text[0].isupper() else "content word, start"
    return "punctuation" if piece.strip() else "white space"
