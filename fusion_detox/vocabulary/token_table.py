"""The bytes of every token of a tokenizer, and how it splits given bytes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import re
import warnings
from array import array
from typing import TYPE_CHECKING, Any, Literal, cast

from fusion_detox.errors import VocabularyError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Kind = Literal["byte-level", "sentencepiece", "wordpiece", "other"]

# No known tokenizer merges a newline with the word after it, so text behind one is split as it
# stands, without the space that some tokenizers put before a text.
_GUARD = "\n"
_ENGLISH = "it was a cold night and nobody came to the door of the old house"
_HARD = "Tab\there,  two spaces\nCafé Straße 北京 \U0001f642 don't 1,234.5\x07 end"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNUSED = re.compile(r"[\[<]unused\d+[\]>]")
_ENDS_OF_TEXT = {"<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<s>", "</s>"}
_RESET_ROLES = ("bos", "eos", "pad", "cls", "sep")


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """The bytes of every token of one tokenizer.

    Attributes:
        token_bytes: Bytes by id; ``None`` for special, unused and undecodable ids.
        kind: How the tokenizer spells bytes.
        special_ids: Every control token.
        reset_ids: Those of them that begin or end a text: bos, eos, pad, cls, sep.
        dummy_prefix: Whether the tokenizer puts a space before a text.
        byte_ids: SentencePiece's ``<0xNN>`` tokens. Some are twins of a normal piece, which is
            what the tokenizer itself then uses.
    """

    token_bytes: tuple[bytes | None, ...]
    kind: Kind
    special_ids: frozenset[int]
    reset_ids: frozenset[int]
    dummy_prefix: bool
    byte_ids: frozenset[int] = frozenset()

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> TokenTable:
        """Reads the table from the tokenizer's own definition, never through ``decode``.

        Warns:
            UserWarning: The tokenizer is of the WordPiece kind (or of an unknown one), which
                keeps too little of a text's spacing to be mapped exactly.

        Raises:
            VocabularyError: The tokenizer has no fast backend, cannot be serialised, or its
                tokens do not spell the text that it was given.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise VocabularyError(
                f"{type(tokenizer).__name__} has no fast backend, so the bytes of its tokens are "
                "unknown: load it with AutoTokenizer.from_pretrained(..., use_fast=True), or "
                "convert it to a tokenizer.json first"
            )
        parts = _parts(backend)
        kind = _kind(backend, parts)
        added = backend.get_added_tokens_decoder()
        plain = backend.get_vocab(with_added_tokens=False)
        size = max(max(plain.values(), default=-1), max(added, default=-1)) + 1
        if not size:
            raise VocabularyError("the tokenizer has no tokens: check the folder it came from")
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
        )
        table._verify(tokenizer)
        return table

    def fingerprint(self) -> str:
        """SHA-256 over token_bytes and special ids, the same on every machine."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        lengths = array("i", [-1 if piece is None else len(piece) for piece in self.token_bytes])
        digest = hashlib.sha256(f"{self.kind} {self.dummy_prefix} {len(self.token_bytes)}".encode())
        digest.update(lengths.tobytes())
        digest.update(b"".join(piece for piece in self.token_bytes if piece is not None))
        for ids in (self.special_ids, self.reset_ids, self.byte_ids):
            digest.update(json.dumps(sorted(ids)).encode())
        return digest.hexdigest()

    def split(
        self, tokenizer: PreTrainedTokenizerBase, texts: list[bytes]
    ) -> list[tuple[int, ...] | None]:
        """The tokenizer's own ids for each of many byte strings, as if in the middle of a text.

        Returns:
            For each text its ids, whose token_bytes join to exactly the text; ``None`` where the
            tokenizer cannot say: bytes that are not UTF-8, or that it changes or drops.
        """
        guard = _GUARD if self.dummy_prefix else ""
        results: list[tuple[int, ...] | None] = [None] * len(texts)
        where: list[int] = []
        valid: list[str] = []
        for index, text in enumerate(texts):
            try:
                valid.append(guard + text.decode())
            except UnicodeDecodeError:
                continue
            where.append(index)
        token_bytes = self.token_bytes
        for index, ids in zip(where, encode(tokenizer, valid), strict=True):
            start = self._after_guard(ids) if guard else 0
            if b"".join([token_bytes[i] or b"" for i in ids[start:]]) == texts[index]:
                results[index] = tuple(ids[start:])
        return results

    def _after_guard(self, ids: list[int]) -> int:
        """Number of tokens up to and including the guard; 0 where it is merged with the text."""
        seen = b""
        for index, i in enumerate(ids):
            seen += self.token_bytes[i] or b""
            if seen.lstrip(b" ") == _GUARD.encode():
                return index + 1
        return 0

    def _verify(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.kind in ("wordpiece", "other"):
            warnings.warn(
                f"tokens of the kind {self.kind!r} do not spell a text byte by byte: spacing and "
                "letter case are guessed, so fusion is approximate",
                UserWarning,
                stacklevel=3,
            )
        if self.kind == "wordpiece":
            return
        for text in (_ENGLISH, _HARD):
            (ids,) = encode(tokenizer, [text])
            spelled = b"".join(self.token_bytes[i] or b"" for i in ids)
            wanted = text.encode()
            if spelled == wanted or (self.dummy_prefix and spelled == b" " + wanted):
                continue
            if text is _ENGLISH:
                raise VocabularyError(
                    f"the tokens of {text!r} spell {spelled.decode(errors='replace')!r}: this "
                    "tokenizer rewrites text in a way that is not supported; use one of the "
                    "byte-level or SentencePiece kind"
                )
            logger.info("the tokenizer rewrites unusual text: %r becomes %r", wanted, spelled)


def _parts(backend: Tokenizer) -> dict[str, Any]:
    """JSON of the backend's small parts; that of its model can have tens of megabytes."""
    from tokenizers import Tokenizer, models

    shell = Tokenizer(models.BPE())
    try:
        for name in ("normalizer", "pre_tokenizer", "decoder"):
            if getattr(backend, name) is not None:
                setattr(shell, name, getattr(backend, name))
        return cast("dict[str, Any]", json.loads(shell.to_str()))
    except Exception as error:  # The Rust side raises nothing narrower.
        raise VocabularyError(
            f"the tokenizer cannot be serialised ({error}): replace parts written in Python by "
            "ones of the tokenizers library"
        ) from error


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
        for piece, i in plain.items():
            try:
                token_bytes[i] = piece.translate(alphabet).encode("latin-1") or None
            except UnicodeEncodeError:
                token_bytes[i] = None
        return token_bytes, byte_ids
    space = _metaspace(parts)
    prefix = getattr(backend.model, "continuing_subword_prefix", None) or "##"
    fallback = kind == "sentencepiece"
    for piece, i in plain.items():
        if fallback and (match := _BYTE.fullmatch(piece)):
            token_bytes[i] = bytes([int(match[1], 16)])
            byte_ids.add(i)
        elif _UNUSED.fullmatch(piece):
            token_bytes[i] = None
        elif kind == "wordpiece":
            word = piece.removeprefix(prefix)
            token_bytes[i] = (word if word != piece else " " + piece).encode() or None
        else:
            text = piece.replace(space, " ") if kind == "sentencepiece" else piece
            token_bytes[i] = text.encode(errors="surrogatepass") or None
    return token_bytes, byte_ids


@functools.cache
def _byte_alphabet() -> dict[int, str]:
    """Byte-level BPE's printable stand-ins to the bytes they stand for (Radford et al. 2019).

    Characters that stand for no byte become one that Latin-1 does not have.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    table = dict.fromkeys(hidden, chr(256))
    table.update({256 + index: chr(byte) for index, byte in enumerate(hidden)})
    return table


def _metaspace(parts: Any) -> str:
    """The character that stands for a space in SentencePiece tokens."""
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


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of each text without special tokens, padding or truncation."""
    if not texts:
        return []
    backend = tokenizer.backend_tokenizer
    if backend.padding is None and backend.truncation is None:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
    # An earlier call left its padding in the backend; this one sets it as it needs it.
    batch = tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )
    return cast("list[list[int]]", batch["input_ids"])
