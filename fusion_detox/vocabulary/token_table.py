"""The bytes of a tokenizer's tokens, lookup of tokens by bytes, and splitting of given bytes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import re
import warnings
from array import array
from bisect import bisect_left
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, cast

from fusion_detox.errors import VocabularyError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Kind = Literal["byte-level", "sentencepiece", "wordpiece", "other"]

# Some tokenizers prepend a space to a text. No known tokenizer merges a newline with the following
# word, so text after a newline is split as it is.
_GUARD = "\n"
_PLAIN_TEXT = "it was a cold night and nobody came to the door of the old house"
_UNUSUAL_TEXT = "Tab\there,  two spaces\nCafé Straße 北京 \U0001f642 don't 1,234.5\x07 end"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNUSED = re.compile(r"[\[<]unused\d+[\]>]")
_ENDS_OF_TEXT = {"<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<s>", "</s>"}
_RESET_ROLES = ("bos", "eos", "pad", "cls", "sep")


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """The bytes of every token of one tokenizer.

    Attributes:
        token_bytes: Bytes by id; ``None`` for special, unused and undecodable ids.
        kind: How the tokenizer represents bytes.
        special_ids: All control tokens.
        reset_ids: The special ids that begin or end a text: bos, eos, pad, cls, sep.
        dummy_prefix: Whether the tokenizer prepends a space to a text.
        byte_ids: SentencePiece's ``<0xNN>`` tokens. Some have the same bytes as a normal token,
            which the tokenizer then prefers.
        turn_ids: Tokens that the chat template writes around a message, such as ``<|im_start|>``;
            none if the tokenizer has no chat template.
    """

    token_bytes: tuple[bytes | None, ...]
    kind: Kind
    special_ids: frozenset[int]
    reset_ids: frozenset[int]
    dummy_prefix: bool
    byte_ids: frozenset[int] = frozenset()
    turn_ids: frozenset[int] = frozenset()

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> TokenTable:
        """Read the table from the tokenizer's definition, without calling ``decode``.

        Warns:
            UserWarning: The tokenizer is a WordPiece tokenizer or of an unknown kind, so it loses
                too much of a text's spacing to be mapped exactly.

        Raises:
            VocabularyError: The tokenizer has no fast backend or cannot be serialised, or its
                tokens do not spell a given text.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise VocabularyError(
                f"{type(tokenizer).__name__} has no fast backend, so the bytes of its tokens are "
                "unknown. Load it with AutoTokenizer.from_pretrained(..., use_fast=True), or "
                "convert it to a tokenizer.json first."
            )
        parts = _parts(backend)
        kind = _kind(backend, parts)
        added = backend.get_added_tokens_decoder()
        plain = backend.get_vocab(with_added_tokens=False)
        size = max(max(plain.values(), default=-1), max(added, default=-1)) + 1
        if not size:
            raise VocabularyError("The tokenizer has no tokens. Check the folder it came from.")
        token_bytes, byte_ids = _decode(backend, parts, kind, plain, size)
        special = {i for i, token in added.items() if token.special}
        special.update(i for i in tokenizer.all_special_ids if i < size)
        for i, token in added.items():
            token_bytes[i] = token.content.encode() or None
        for i in special:
            token_bytes[i] = None
        reset = {getattr(tokenizer, f"{role}_token_id", None) for role in _RESET_ROLES}
        reset.update(i for i, token in added.items() if token.content in _ENDS_OF_TEXT)
        table = cls(
            token_bytes=tuple(token_bytes),
            kind=kind,
            special_ids=frozenset(special),
            reset_ids=frozenset(cast("set[int]", reset - {None})) & special,
            dummy_prefix=_has_dummy_prefix(tokenizer, token_bytes),
            byte_ids=frozenset(i for i in byte_ids if token_bytes[i] is not None),
            turn_ids=_turn_ids(tokenizer),
        )
        table._verify(tokenizer)
        return table

    def fingerprint(self) -> str:
        """SHA-256 of the tokens' bytes and the special ids, the same on every machine."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        lengths = array("i", [-1 if text is None else len(text) for text in self.token_bytes])
        digest = hashlib.sha256(f"{self.kind} {self.dummy_prefix} {len(self.token_bytes)}".encode())
        digest.update(lengths.tobytes())
        digest.update(b"".join(text for text in self.token_bytes if text is not None))
        for ids in (self.special_ids, self.reset_ids, self.byte_ids):
            digest.update(json.dumps(sorted(ids)).encode())
        return digest.hexdigest()

    def split(
        self, tokenizer: PreTrainedTokenizerBase, texts: list[bytes]
    ) -> list[tuple[int, ...] | None]:
        """The tokenizer's ids for each of many byte strings, as if in the middle of a text.

        Returns:
            For each text, ids whose bytes concatenate to exactly that text; ``None`` if it is not
            UTF-8 or if the tokenizer changes it.
        """
        guard = _GUARD if self.dummy_prefix else ""
        results: list[tuple[int, ...] | None] = [None] * len(texts)
        places: list[int] = []
        valid: list[str] = []
        for index, text in enumerate(texts):
            try:
                valid.append(guard + text.decode())
            except UnicodeDecodeError:
                continue
            places.append(index)
        for index, ids in zip(places, encode(tokenizer, valid), strict=True):
            start = self._after_guard(ids) if guard else 0
            if self._spell(ids[start:]) == texts[index]:
                results[index] = tuple(ids[start:])
        return results

    def _after_guard(self, ids: list[int]) -> int:
        """Number of tokens up to and including the guard; 0 if it is merged with the text."""
        seen = b""
        for index, i in enumerate(ids):
            seen += self.token_bytes[i] or b""
            if seen.lstrip(b" ") == _GUARD.encode():
                return index + 1
        return 0

    def _spell(self, ids: list[int]) -> bytes:
        return b"".join([self.token_bytes[i] or b"" for i in ids])

    def _verify(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.kind in ("wordpiece", "other"):
            warnings.warn(
                f"Tokens of the kind {self.kind!r} do not represent text byte by byte. Spacing and "
                "letter case are guessed, so fusion is approximate.",
                UserWarning,
                stacklevel=3,
            )
        if self.kind == "wordpiece":
            return
        for text in (_PLAIN_TEXT, _UNUSUAL_TEXT):
            (ids,) = encode(tokenizer, [text])
            spelled, expected = self._spell(ids), text.encode()
            if spelled == expected or (self.dummy_prefix and spelled == b" " + expected):
                continue
            if text is _PLAIN_TEXT:
                raise VocabularyError(
                    f"The tokens of {text!r} spell {spelled.decode(errors='replace')!r}. This "
                    "tokenizer rewrites text in a way that is not supported. Use a byte-level or "
                    "SentencePiece tokenizer."
                )
            logger.info("the tokenizer rewrites unusual text: %r becomes %r", expected, spelled)


class ByteIndex:
    """Looks tokens up by their bytes.

    Args:
        token_bytes: Bytes by id; ids without bytes are left out.
        byte_ids: Ids of ``<0xNN>`` tokens, which come after normal tokens with the same bytes.

    Attributes:
        ids: The first id of each byte string.
        twins: Further ids of the same bytes.
        sorted: All byte strings in order, so that those with a common prefix are adjacent.
    """

    def __init__(self, token_bytes: tuple[bytes | None, ...], byte_ids: frozenset[int]) -> None:
        self.ids: dict[bytes, int] = {}
        self.twins: dict[bytes, list[int]] = {}
        normal = [i for i in range(len(token_bytes)) if i not in byte_ids]
        for i in chain(normal, sorted(i for i in byte_ids if i < len(token_bytes))):
            text = token_bytes[i]
            if text is not None and self.ids.setdefault(text, i) != i:
                self.twins.setdefault(text, []).append(i)
        self.sorted = sorted(self.ids)
        self._longest = [0] * 256  # length of the longest token by first byte
        for text in self.ids:
            self._longest[text[0]] = max(self._longest[text[0]], len(text))

    def all_ids(self, text: bytes) -> list[int]:
        """Every id of exactly these bytes."""
        return [self.ids[text], *self.twins.get(text, ())]

    def extensions(self, prefix: bytes) -> list[bytes]:
        """The bytes of all tokens that start with the prefix and are longer."""
        start = bisect_left(self.sorted, prefix)
        stop = bisect_left(self.sorted, prefix + b"\xff" * (self._longest[prefix[0]] + 1), start)
        return [text for text in self.sorted[start:stop] if text != prefix]

    def prefixes(self, text: bytes) -> list[int]:
        """Every id of all tokens that the text starts with."""
        found: list[int] = []
        for length in range(1, min(len(text), self._longest[text[0]]) + 1):
            if text[:length] in self.ids:
                found.extend(self.all_ids(text[:length]))
        return found

    def longest_prefix(self, text: bytes) -> int | None:
        """The longest token that the text starts with, if there is one."""
        for length in range(min(len(text), self._longest[text[0]]), 0, -1):
            if (i := self.ids.get(text[:length])) is not None:
                return i
        return None

    def greedy(self, text: bytes) -> tuple[int, ...] | None:
        """Split the text into longest tokens from left to right; ``None`` if that fails."""
        path: list[int] = []
        start = 0
        while start < len(text):
            for length in range(min(len(text) - start, self._longest[text[start]]), 0, -1):
                if (i := self.ids.get(text[start : start + length])) is not None:
                    path.append(i)
                    start += length
                    break
            else:
                return None
        return tuple(path)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text without special tokens, padding or truncation."""
    if not texts:
        return []
    backend = tokenizer.backend_tokenizer
    if backend.padding is None and backend.truncation is None:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
    # An earlier call left padding or truncation in the backend; this call resets them.
    batch = tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )
    return cast("list[list[int]]", batch["input_ids"])


def _parts(backend: Tokenizer) -> dict[str, Any]:
    """JSON of the backend's small parts; its model alone can take tens of megabytes."""
    from tokenizers import Tokenizer, models

    shell = Tokenizer(models.BPE())
    try:
        for name in ("normalizer", "pre_tokenizer", "decoder"):
            if getattr(backend, name) is not None:
                setattr(shell, name, getattr(backend, name))
        return cast("dict[str, Any]", json.loads(shell.to_str()))
    except Exception as error:  # the Rust side raises plain exceptions
        raise VocabularyError(
            f"The tokenizer cannot be serialised ({error}). Replace its parts written in Python "
            "with parts of the tokenizers library."
        ) from error


def _turn_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Added tokens that the chat template names, except those around every text, such as BOS."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    backend = tokenizer.backend_tokenizer
    around = set(backend.encode("a").ids) if template else set()
    return frozenset(
        i
        for i, token in backend.get_added_tokens_decoder().items()
        if token.content.strip() in template
        and token.content.strip()
        and token.content not in _ENDS_OF_TEXT
        and i not in around
    )


def _types(part: Any) -> set[str]:
    """Names of all components in a JSON part, nested sequences included."""
    if isinstance(part, list):
        return set().union(*map(_types, part)) if part else set()
    if not isinstance(part, dict):
        return set()
    names = {part["type"]} if isinstance(part.get("type"), str) else set()
    return names.union(*map(_types, part.values()))


def _kind(backend: Tokenizer, parts: dict[str, Any]) -> Kind:
    types = _types(parts["pre_tokenizer"]) | _types(parts["decoder"]) | _types(parts["normalizer"])
    if "ByteLevel" in types:
        return "byte-level"
    if "WordPiece" in types or type(backend.model).__name__ == "WordPiece":
        return "wordpiece"
    if types & {"Metaspace", "ByteFallback"} or getattr(backend.model, "byte_fallback", False):
        return "sentencepiece"
    return "other"


def _decode(
    backend: Tokenizer, parts: dict[str, Any], kind: Kind, plain: dict[str, int], size: int
) -> tuple[list[bytes | None], set[int]]:
    """Bytes by id, and the ids of ``<0xNN>`` tokens."""
    token_bytes: list[bytes | None] = [None] * size
    byte_ids: set[int] = set()
    if kind == "byte-level":
        alphabet = _byte_alphabet()
        for token, i in plain.items():
            try:
                token_bytes[i] = token.translate(alphabet).encode("latin-1") or None
            except UnicodeEncodeError:
                token_bytes[i] = None
        return token_bytes, byte_ids
    space = _metaspace(parts)
    prefix = getattr(backend.model, "continuing_subword_prefix", None) or "##"
    fallback = kind == "sentencepiece"
    for token, i in plain.items():
        if fallback and (match := _BYTE.fullmatch(token)):
            token_bytes[i] = bytes([int(match[1], 16)])
            byte_ids.add(i)
        elif _UNUSED.fullmatch(token):
            token_bytes[i] = None
        elif kind == "wordpiece":
            word = token.removeprefix(prefix)
            token_bytes[i] = (word if word != token else " " + token).encode() or None
        else:
            text = token.replace(space, " ") if kind == "sentencepiece" else token
            token_bytes[i] = text.encode(errors="surrogatepass") or None
    return token_bytes, byte_ids


@functools.cache
def _byte_alphabet() -> dict[int, str]:
    """Maps the characters of byte-level BPE to the bytes they represent (Radford et al. 2019).

    Characters that represent no byte become one that Latin-1 lacks.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    table = dict.fromkeys(hidden, chr(256))
    table.update({256 + index: chr(byte) for index, byte in enumerate(hidden)})
    return table


def _metaspace(parts: Any) -> str:
    """The character that represents a space in SentencePiece tokens."""
    if isinstance(parts, dict):
        if parts.get("type") == "Metaspace":
            return str(parts["replacement"])
        parts = list(parts.values())
    if isinstance(parts, list):
        found = {_metaspace(part) for part in parts} - {"▁"}
        return found.pop() if found else "▁"
    return "▁"


def _has_dummy_prefix(tokenizer: PreTrainedTokenizerBase, token_bytes: list[bytes | None]) -> bool:
    (ids,) = encode(tokenizer, ["a"])
    return b"".join(token_bytes[i] or b"" for i in ids) == b" a"


ENGLISH = """\
The committee met again on Tuesday evening to decide what to do about the old bridge. Nobody \
could remember who had built it, but everyone agreed that it wasn't safe any more: two of the \
wooden beams had cracked during the winter, and the railing on the north side was missing \
altogether.
"We've been talking about this since 2009," said Margaret, who runs the little bakery next to \
the post office. "Either we raise the money ourselves, or we close it. I don't see a third way."
Her neighbour laughed. He'd heard that before. "Give it another year and there won't be anything \
left to close!" Still, he put down $50 and promised to bring his tools on Saturday (if it didn't \
rain).
In mathematics and computer science, a graph is a set of objects in which some pairs are \
related. The objects are called vertices, and each pair is an edge; a typical drawing shows dots \
joined by lines. Graphs are one of the principal subjects of study in discrete mathematics, and \
they are used to model road networks, social relations, chemical molecules, and the flow of a \
computer program.

Edit: thanks for all the replies, I really didn't expect this to blow up. To answer the most \
common question: yes, I called the landlord, no, he hasn't answered, and my sister thinks I \
should just move out. So what would you guys do? Is it worth going to court over 3 months of \
rent? lol
- Add the flour, the salt and about 1/2 cup of warm water.
- Stir until smooth, then cover and let it rest for 20-30 minutes.
- Bake at 375 degrees until golden brown, and serve with butter.
Shares of the company fell by 4.6% in early trading after its chief executive resigned \
unexpectedly; analysts had predicted quarterly earnings of 1.2 billion. The government declined \
to comment, although a spokeswoman said that "all options remain on the table" and that a \
decision would follow next week.
"""
"""English text on which coverage is estimated and on which a tokenizer's splits are compared."""
