"""The definition of fusion: whole texts, no cache, one row at a time, plain Python.

From the library it uses only the vocabulary map, whose own definition is in
tests/vocabulary/test_map.py. Everything else is written again here: reading ids as text,
retokenising, running the calibrator, weighting the ways to read the end of a text, and the fusion
rule.
"""

from __future__ import annotations

import codecs
import math
import re

import torch
from transformers import LogitsProcessor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fusion_detox.vocabulary.map import Cover

BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
ENDS_OF_TEXT = {"<|endoftext|>", "<s>", "</s>"}
# Texts are spelled with a character for each byte, so U+0100 can stand for the template's tokens.
MARKUP = re.compile(r"\u0100\s*(?:(user|assistant|system)(?:(?=\u0100)|\s*\n\s*))?", re.ASCII)


class Definition:
    """A fused model's log-probs after the given ids: ``(ids, scores) -> scores``."""

    def __init__(self, calibrator, tokenizer, vocabulary, config, pad):
        self.calibrator, self.map, self.config, self.pad = calibrator, vocabulary, config, pad
        self.sentencepiece = "▁" in "".join(tokenizer.get_vocab())
        self.token_bytes = {i: self.spelled(t) for t, i in tokenizer.get_vocab().items()}
        specials = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.specials = specials | set(tokenizer.all_special_ids)
        roles = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        ends = {i for i, t in tokenizer.added_tokens_decoder.items() if t.content in ENDS_OF_TEXT}
        self.turns = set()
        if tokenizer.chat_template:
            self.turns = set(tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
        self.resets = (roles | ends) & self.specials - self.turns
        self.line_break = next((i for i, p in self.token_bytes.items() if p == b"\n"), None)
        self.laws = {}

    def spelled(self, token):
        if not self.sentencepiece:
            return bytes(BYTES[c] for c in token) if set(token) <= set(BYTES) else b""
        if token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def text_of(self, ids):
        """Return the ids after padding and after the last token that begins or ends a text."""
        ids = list(ids)
        while ids and ids[0] == self.pad:
            del ids[0]
        for place in range(len(ids) - 1, -1, -1):
            if ids[place] in self.resets:
                return ids[place + 1 :]
        return ids

    def read(self, ids):
        """Return the calibrator's ids, the bytes of the last word's tokens, and pending bytes."""
        ids = self.text_of(ids)
        if self.map.kind == "identity":
            path = []
            for i in ids:
                if i not in self.specials and i in self.token_bytes:
                    path.append(i)
                elif path:
                    path.append(self.line_break)
            return tuple(path), [], b""
        data = self.without_markup(self.spell(ids)).encode("latin-1")
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(data)
        own = self.calibrator.tokenizer
        path = tuple(own(text, add_special_tokens=False)["input_ids"])
        words = own.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        left = len(words[-1][0]) if words else 0
        tokens = own.convert_ids_to_tokens(list(path))
        word = []
        while left and len(word) < 4:
            piece = bytes(BYTES[c] for c in tokens[-len(word) - 1])
            word.insert(0, piece)
            left -= len(piece)
        return path, word, decoder.getstate()[0]

    def spell(self, ids):
        """Return the text's bytes as characters, and U+0100 for each token of the template."""
        data, begun = "", False
        for i in ids:
            if i in self.turns:
                data += "\u0100"
                continue
            if i in self.specials or i not in self.token_bytes:
                data += "\n" if begun else ""
                continue
            piece = self.token_bytes[i].decode("latin-1")
            if not begun and self.sentencepiece:
                piece = piece.removeprefix(" ")
            data, begun = data + piece, True
        return data

    def without_markup(self, data):
        """Return the last request and the answer, with a line break between them."""
        marked = MARKUP.sub(lambda m: "\u0101" if m[1] == "user" else "\u0100", data)
        request = marked.split("\u0101")[-1].lstrip("\u0100")
        if self.sentencepiece and data != request:
            request = request.removeprefix(" ")
        return re.sub("\u0100+", "\n", request)

    def held_back(self, ids, token):
        """By how many nats the list holds back a token, for the words that end inside it."""
        before = (
            self.without_markup(self.spell(self.text_of(ids)))
            .encode("latin-1")
            .decode(errors="replace")
        )
        text = before + self.token_bytes.get(token, b"").decode(errors="surrogateescape")
        letters = "[a-zA-Z\u00c0-\u1fff\u3040-\ud7ff\ue000-\uffbf]+"
        ends = [m for m in re.finditer(letters, text) if m.end() > len(before)]
        return max((self.calibrator.words.get(m[0].lower(), 0.0) for m in ends), default=0.0)

    def law(self, prefix):
        """Return both models' next-token probabilities, ``(2, vocabulary)``, without a cache."""
        length = self.calibrator.context_length
        start = 0
        while len(prefix) - start + 1 > length:
            start += length // 2
        seen = (self.calibrator.bos_id, *prefix[start:])
        if seen not in self.laws:
            models = (self.calibrator.clean, self.calibrator.reference)
            with torch.no_grad():
                logits = [m(torch.tensor([seen]), use_cache=False).logits[0, -1] for m in models]
            logits = torch.stack(logits)[:, : self.calibrator.vocabulary_size].double()
            self.laws[seen] = logits.softmax(-1)
        return self.laws[seen]

    def calibrated(self, ids):
        """Return the two distributions, projected onto the target's vocabulary."""
        path, word, pending = self.read(ids)
        laws, covers, weights = [], [], []
        for back in range(len(word), -1, -1):
            start = len(path) - back
            covers.append(Cover(0, len(laws), b"".join(word[len(word) - back :]) + pending))
            laws.append(self.law(path[:start]))
            # The probability of the tokens from the start of the word to this point.
            weight = torch.ones(2, dtype=torch.float64)
            for place in range(len(path) - len(word), start):
                weight = weight * self.law(path[:place])[:, path[place]]
            weights.append(weight)
        weights = torch.stack(weights, 1)
        weights = weights / weights.amax(1, keepdim=True)
        mode = "prefix" if self.config.rule == "contrast" else "transfer"
        probs = torch.stack(laws, 1)
        return self.map.project(probs.float(), covers, weights.float(), 1, mode=mode)[:, 0].double()

    def context(self, ids):
        """Return the factor for texts in which both models have recently agreed, in 0..1."""
        whole = self.config.context_kl
        if whole is None:
            return 1.0
        path, _, _ = self.read(ids)
        divergences = []
        for length in range(max(0, len(path) - 15), len(path) + 1):
            clean, reference = self.law(path[:length])
            divergences.append(float((reference * (reference / clean).log()).sum()))
        none, mean = self.config.context_threshold, sum(divergences) / len(divergences)
        return min(1.0, max(0.0, mean - none) / (whole - none))

    def __call__(self, ids, scores):
        """Return the fused log-probs of one row, ``(vocabulary,)``."""
        config, context = self.config, self.context(ids)
        strength = config.strength * context
        limit = math.inf if config.context_limit is None else config.context_limit
        clean, reference = (law.tolist() for law in self.calibrated(ids))
        own = scores.double().log_softmax(-1).tolist()
        best = max(own)
        mapped = self.map.mapped.tolist()
        # Around the limit, a token gets a part of its shift only.
        limit_of = -math.log(config.plausibility) if config.plausibility else math.inf
        width = min(1.0, limit_of)
        line = best - limit_of - width / 2
        judged = [i for i, on in enumerate(mapped) if on and own[i] > -math.inf and own[i] >= line]
        share = {i: min(1.0, (own[i] - line) / width) if width else 1.0 for i in judged}
        mass = math.fsum(math.exp(own[i]) for i in judged)
        moved = {}
        group = math.fsum(share[i] * clean[i] for i in judged)
        whole = math.fsum(share[i] * math.exp(own[i]) for i in judged)
        for i in judged:
            if config.rule == "contrast":
                ratio = math.log((clean[i] + config.floor) / (reference[i] + config.floor))
                ratio = math.copysign(max(0.0, abs(ratio) - config.threshold), ratio)
                ratio = max(-config.clip, min(config.clip, ratio))
                always = min(0.0, ratio + limit)
                ratio = context * (ratio - always) + always
                if nats := config.word_weight * self.held_back(ids, i):
                    ratio = min(ratio, -min(nats, config.clip))
                moved[i] = own[i] + config.strength * ratio
            elif config.rule == "product":
                other = math.log(clean[i] + config.floor)
                moved[i] = (1 - strength) * own[i] + strength * other
            else:
                inside = math.exp(own[i]) / whole
                # If the calibrator gives none of the candidates any probability, it has no effect.
                other = share[i] * clean[i] / group if group else inside
                mixed = (1 - strength) * inside + strength * other
                moved[i] = own[i] + math.log(mixed) - math.log(inside)

        def placed(constant):
            return {i: own[i] + share[i] * (moved[i] - own[i] + constant) for i in judged}

        low, high = -1e3, 1e3
        for _ in range(60):
            middle = (low + high) / 2
            if math.fsum(map(math.exp, placed(middle).values())) < mass:
                low = middle
            else:
                high = middle
        for i, value in placed(low).items():
            own[i] = value
        return torch.tensor(own)


class AsProcessor(LogitsProcessor):
    """Applies the definition in ``generate``'s own loop; ignores scores of another width."""

    def __init__(self, definition, width):
        self.definition, self.width = definition, width

    def __call__(self, input_ids, scores):
        if scores.shape[-1] != self.width:
            return scores
        rows = zip(input_ids.tolist(), scores, strict=True)
        return torch.stack([self.definition(row, score) for row, score in rows]).to(scores.dtype)
