"""Definitions of greedy search, sampling and beam search, one row at a time.

``options`` are those of ``generate``. Each built-in processor is written again, in a few lines,
as a function of one row's ids and scores. The order is that of ``generate``: fusion runs after the
processors that forbid or reweight tokens, and before those that truncate the distribution for
sampling.
"""

from __future__ import annotations

import math

import torch
import transformers

INF = math.inf
# transformers 4 treats padding as a token of the text.
PENALISES_PADDING = transformers.__version__.startswith("4.")


class Search:
    """One call of ``generate``, by definition.

    Args:
        model: The target; it reads whole texts, without a cache.
        fused: ``(ids, scores) -> scores`` for one row.
        prompts: Rows of ids, left padded as ``generate`` receives them.
        pad: The padding id.
        eos: The id that ends a text, unless the options name others.
        options: Options of ``generate``.
    """

    def __init__(self, model, fused, prompts, pad, eos, options):
        self.model, self.fused, self.pad = model, fused, pad
        self.eos = options.get("eos_token_id", [eos])
        self.options = options
        self.prompts = [list(row) for row in prompts]
        self.width = len(self.prompts[0])
        self.left = [next(i for i, t in enumerate(row) if t != pad) for row in self.prompts]
        self.most = self.width + options["max_new_tokens"]
        self.beams = options.get("num_beams", 1)

    def logits(self, ids):
        with torch.no_grad():
            return self.model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()

    def scores(self, which, row):
        """Return the raw and the fully processed next-token scores of a row of the given prompt."""
        raw = self.logits(row[self.left[which] :])
        scores = raw.log_softmax(-1) if self.beams > 1 else raw
        scores = self.weighed(which, row, scores.clone())
        scores = self.fused(row, scores).float()
        return raw, self.cut(scores) if self.options.get("do_sample") else scores

    def weighed(self, which, row, scores):  # noqa: C901 - a list of definitions
        """Apply the processors that run before fusion."""
        get, new = self.options.get, len(row) - self.width
        if (scale := get("guidance_scale")) is not None:
            negative = get("negative_prompt_ids")
            context = [row[self.width - 1]] if negative is None else negative[which].tolist()
            other = self.logits(context + row[self.width :]).log_softmax(-1)
            scores = scale * (scores.log_softmax(-1) - other) + other
        for *_, ids, bias in get("sequence_bias", []):
            if len(ids) <= len(row) + 1 and row[len(row) - len(ids) + 1 :] == ids[:-1]:
                scores[ids[-1]] += bias
        if (penalty := get("repetition_penalty")) is not None:
            for i in set(row if PENALISES_PADDING else row[self.left[which] :]):
                scores[i] = scores[i] * penalty if scores[i] < 0 else scores[i] / penalty
        if (size := get("no_repeat_ngram_size")) is not None:
            grams = [row[i : i + size] for i in range(len(row) - size + 1)]
            for gram in grams:
                if gram[:-1] == row[len(row) - size + 1 :]:
                    scores[gram[-1]] = -INF
        for word in get("bad_words_ids", []):
            if row[len(row) - len(word) + 1 :] == word[:-1]:
                scores[word[-1]] = -INF
        if len(row) < get("min_length", 0) or new < get("min_new_tokens", 0):
            scores[self.eos] = -INF
        if (allowed := get("prefix_allowed_tokens_fn")) is not None:
            scores = only(scores, allowed(which, torch.tensor(row)))
        if "forced_bos_token_id" in self.options and len(row) == 1:
            scores = only(torch.zeros_like(scores), [get("forced_bos_token_id")])
        if "forced_eos_token_id" in self.options and len(row) == self.most - 1:
            scores = only(torch.zeros_like(scores), [get("forced_eos_token_id")])
        if "exponential_decay_length_penalty" in self.options:
            start, factor = get("exponential_decay_length_penalty")
            for i in self.eos if new > start else ():
                scores[i] += abs(scores[i]) * (factor ** (new - start) - 1)
        scores[get("suppress_tokens", [])] = -INF
        if new == 0:
            scores[get("begin_suppress_tokens", [])] = -INF
        return scores

    def cut(self, scores):
        """Apply the processors that run after fusion, when sampling."""
        get = self.options.get
        least = 1 if self.beams == 1 else len(self.eos) + 1
        scores = scores / get("temperature", 1.0)
        if get("top_k"):
            scores = only(scores, best_first(scores)[: max(get("top_k"), least)])
        for name, kept in (
            ("top_p", nucleus),
            ("min_p", near_the_best),
            ("typical_p", typical),
            ("epsilon_cutoff", above_epsilon),
            ("eta_cutoff", above_eta),
        ):
            if name in self.options:
                chosen = kept(scores.double().softmax(-1), get(name), least)
                scores = only(scores, chosen)
        return scores.log_softmax(-1) if get("renormalize_logits") else scores

    def sample(self):
        """Greedy search or sampling: return sequences, and each step's scores of open rows."""
        copies = self.options.get("num_return_sequences", 1)
        owner = [which for which in range(len(self.prompts)) for _ in range(copies)]
        rows = [list(self.prompts[which]) for which in owner]
        done = [False] * len(rows)
        steps = []
        while len(rows[0]) < self.most and not all(done):
            found = {
                r: self.scores(owner[r], row)
                for r, row in enumerate(rows)
                if not done[r]
            }  # fmt: skip
            steps.append(found)
            width = len(next(iter(found.values()))[0])
            # A finished row also draws, and its draw is discarded.
            table = [found[r][1] if r in found else torch.zeros(width) for r in range(len(rows))]
            if self.options.get("do_sample"):
                drawn = torch.multinomial(torch.stack(table).softmax(-1), 1)[:, 0].tolist()
            else:
                drawn = [int(scores.argmax()) for scores in table]
            for r, row in enumerate(rows):
                row.append(self.pad if done[r] else drawn[r])
                done[r] = done[r] or row[-1] in self.eos
        return rows, steps

    def beam(self):
        """Beam search or beam sampling: return sequences, their scores, and each step's scores."""
        beams, get = self.beams, self.options.get
        penalty, early = get("length_penalty", 1.0), get("early_stopping", False)
        many = max(2, 1 + len(self.eos)) * beams
        items = [
            {
                "open": [(0.0 if b == 0 else -1e9, list(prompt)) for b in range(beams)],
                "closed": [],
                "can improve": True,
            }
            for prompt in self.prompts
        ]
        length, steps = self.width, []
        while True:
            tables = []
            steps.append([])
            for which, item in enumerate(items):
                table = []
                for score, row in item["open"]:
                    pair = self.scores(which, row)
                    steps[-1].append(pair)
                    table.append(pair[1] + score)
                tables.append(torch.cat(table))
            if get("do_sample"):
                chosen = torch.multinomial(torch.stack(tables).softmax(-1), many).tolist()
            else:
                chosen = [best_first(table)[:many] for table in tables]
            length += 1
            going_on = []
            for item, table, places in zip(items, tables, chosen, strict=True):
                size = len(table) // beams
                candidates = [
                    (float(table[p]), [*item["open"][p // size][1], p % size]) for p in places
                ]
                ends = [row[-1] in self.eos or length == self.most for _, row in candidates]
                going_on.append(not all(ends))
                running = [
                    (score - 1e9 * end, row)
                    for (score, row), end in zip(candidates, ends, strict=True)
                ]
                full = len(item["closed"]) == beams
                if item["can improve"] and not (full and early is True):
                    item["closed"] += [
                        (score / (length - self.width) ** penalty, row)
                        for (score, row), end in zip(candidates[:beams], ends, strict=False)
                        if end
                    ]
                item["closed"] = sorted(item["closed"], key=first, reverse=True)[:beams]
                item["open"] = sorted(running, key=first, reverse=True)[:beams]
                reach = length - self.width
                if early == "never" and penalty > 0:
                    reach = self.most - self.width
                possible = item["open"][0][0] / reach**penalty
                full = len(item["closed"]) == beams
                item["can improve"] &= not full or possible > item["closed"][-1][0]
            open_beam = early is not True or any(len(i["closed"]) < beams for i in items)
            if not (any(i["can improve"] for i in items) and open_beam and any(going_on)):
                break
        wanted = get("num_return_sequences", 1)
        closed = [pair for item in items for pair in item["closed"][:wanted]]
        longest = max(len(row) for _, row in closed)
        # transformers treats a padding id of 0 as missing, and fills with the end-of-text id.
        fill = self.pad or self.eos[0]
        rows = [row + [fill] * (longest - len(row)) for _, row in closed]
        return rows, [score for score, _ in closed], steps


def first(pair):
    return pair[0]


def best_first(scores):
    return scores.argsort(descending=True, stable=True).tolist()


def only(scores, kept):
    result = torch.full_like(scores, -INF)
    result[list(kept)] = scores[list(kept)]
    return result


def nucleus(probs, mass, least):
    """Keep the most probable tokens, including the one that reaches the mass."""
    kept, total = [], 0.0
    for i in best_first(probs):
        if total >= mass and len(kept) >= least:
            break
        kept.append(i)
        total += float(probs[i])
    return kept


def above(probs, line, least):
    return [i for n, i in enumerate(best_first(probs)) if n < least or float(probs[i]) >= line]


def near_the_best(probs, fraction, least):
    return above(probs, fraction * float(probs.max()), least)


def typical(probs, mass, least):
    """Keep tokens whose surprise is nearest to the entropy, up to a mass (Meister et al. 2023)."""
    surprise = -probs.log()
    entropy = float((probs * surprise).nan_to_num(0.0).sum())
    kept, total = [], 0.0
    for i in (surprise - entropy).abs().argsort(stable=True).tolist():
        kept.append(i)
        total += float(probs[i])
        if total >= mass and len(kept) >= least:
            break
    return kept


def above_epsilon(probs, epsilon, least):
    return above(probs, epsilon, least)


def above_eta(probs, epsilon, least):
    """Hewitt et al. 2022: an absolute cutoff, or a relative one if the entropy is high."""
    entropy = float(-(probs * probs.log()).nan_to_num(0.0).sum())
    line = min(epsilon, math.sqrt(epsilon) * math.exp(-entropy))
    return above(probs, line, least)
