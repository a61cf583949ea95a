"""A results document with plausible numbers: a target, four strengths and a word filter."""

import math

CONFIG = {"rule": "contrast", "strength": 1.5, "plausibility": 0.0001, "kl_budget": None}


def around(value, part=0.08):
    return [value, round(value * (1 - part), 5), round(value * (1 + part), 5)]


def measure(probability, scale=1.0):
    """What a scorer reports on a setting."""
    counts = [round(2000 * 0.7**i * (1.1 - probability)) for i in range(10)]
    counts += [round(200 * probability * scale)] * 10
    return {
        "expected_max": around(probability * 0.9 + 0.1, 0.04),
        "probability": around(probability),
        "mean": around(probability * 0.4, 0.05),
        "fraction": around(probability * 0.35, 0.06),
        "histogram": counts,
        "failed": 0,
    }


def setting(name, kind, probability, perplexity, strength=None, scorers=("lexical", "contextual")):
    """A plausible setting; the second scorer sees more toxicity than the first."""
    base = kind == "base"
    shares = {s: min(0.98, probability + 0.12 * i) for i, s in enumerate(scorers)}
    bases = {s: min(0.98, 0.64 + 0.12 * i) for i, s in enumerate(scorers)}
    found = {
        "name": name,
        "kind": kind,
        "config": {**CONFIG, "strength": strength} if strength is not None else None,
        "calibrator": {"name": "english-16k", "fingerprint": "580269307d32"}
        if kind == "fusion"
        else None,
        "map": {"kind": "projection", "coverage": 1.0} if kind == "fusion" else None,
        "toxicity": {s: {"toxicity": measure(p)} for s, p in shares.items()},
        "against_base": None,
        "perplexity": {
            "token_weighted": around(perplexity, 0.04),
            "median": perplexity * 0.86,
            "relative": None if base else around(perplexity / 114.3, 0.01),
            "scored": 2970,
            "not_scored": 15,
            "why": "empty continuations",
        },
        "diversity": {
            "dist_1": 0.1,
            "dist_2": 0.64,
            "dist_3": 0.93,
            "self_bleu": 0.12,
            "repetition": 0.01,
            "empty": 0.015,
            "degenerate": 0.02,
            "tokens": 16.7,
        },
        "similarity": {
            "model": "all-MiniLM-L6-v2",
            "to_prompt": around(0.31, 0.02),
            "to_base": None if base else around(0.44, 0.02),
        },
        "harmless": None,
        "groups": [],
        "refusal": {"suite": "benign", "prompts": 60, "rate": [0.0, 0.0, 0.05]},
        "by_prompts": {
            part: {
                s: {"probability": around(p), "expected_max": around(p)} for s, p in shares.items()
            }
            for part in ("rtp-challenging", "attaq")
        },
        "by_seed": [
            {"seed": seed, **{s: {"probability": p, "expected_max": p} for s, p in shares.items()}}
            for seed in (1, 2)
        ],
        "cost": {
            "tokens_per_second": 535.7 if base else 262.8,
            "relative": 1.0 if base else 0.49,
            "peak_memory_bytes": 900_000_000,
            "seconds": 120.3,
        },
    }
    if not base:
        found["against_base"] = {
            s: {
                "expected_max": {"difference": [-0.4, -0.44, -0.36], "p_value": 0.0001},
                "probability": {
                    "ratio": around(p / bases[s]),
                    "difference": [p - bases[s], p - bases[s] - 0.04, p - bases[s] + 0.04],
                    "p_value": 0.0001,
                },
                "mean": {"difference": [-0.16, -0.17, -0.15], "p_value": 0.0001},
            }
            for s, p in shares.items()
        }
        found["harmless"] = {
            "text": {"name": "general", "texts": 64, "tokens": 4032},
            "kl": around(0.0279 * (strength or 0.1)),
            "kl_largest": 2.1,
            "top1_changed": around(0.06),
            "strength": {"mean": 1.5, "p5": 1.5, "p50": 1.5, "p95": 1.5},
            "loss_base": around(4.2, 0.01),
            "loss_fused": around(4.21, 0.01),
        }
    if kind == "fusion":
        names = ("women", "men", "older people", "Jewish people", "Muslim people", "gay people")
        ratios = (1.004, 0.998, 1.001, 1.019, 1.027, 1.041)
        suites = [("identity", n, r) for n, r in zip(names, ratios, strict=True)]
        suites += [("dialect", "African American English", 1.032), ("dialect", "Scots", 1.006)]
        found["groups"] = [
            {
                "suite": suite,
                "group": group,
                "texts": 40,
                "tokens": 600,
                "loss_base": 3.1,
                "loss_fused": 3.1 + math.log(ratio),
                "change": [math.log(ratio), math.log(ratio) - 0.01, math.log(ratio) + 0.01],
                "ratio": [ratio, round(ratio - 0.012, 4), round(ratio + 0.012, 4)],
            }
            for suite, group, ratio in suites
        ]
    return found


def results(settings=None, **changes):
    """A run shaped like a real one; all its texts are harmless."""
    if settings is None:
        settings = [
            setting("base", "base", 0.64, 114.3),
            setting("default", "fusion", 0.1122, 125.4, 1.5),
            setting("strength 0.5", "fusion", 0.33, 117.0, 0.5),
            setting("strength 1", "fusion", 0.19, 120.3, 1.0),
            setting("strength 3", "fusion", 0.06, 160.3, 3.0),
            setting("wordfilter", "wordfilter", 0.1658, 115.5),
        ]
    pairs = [
        {
            "prompt": f"The weather on day {i} was",
            "base": " so dull that nobody in the whole village wanted to leave the house at all,",
            "fused": " cold and clear, with a little wind\nfrom the hills in the north",
            "base_score": 0.97 - i / 100,
            "fused_score": 0.02,
        }
        for i in range(10)
    ]
    return {
        "format": 1,
        "name": "english-16k on the demo target",
        "created": "2026-11-21T12:00:00Z",
        "command": "fusion-detox evaluate examples/demo_target/model english-16k --samples 5",
        "versions": {"fusion_detox": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "machine": {"device": "cpu", "threads": 2, "processor": "x86_64"},
        "target": {
            "name": "demo_target",
            "fingerprint": "c839a3106138",
            "parameters": 7162624,
            "vocabulary": 12288,
            "dtype": "float32",
        },
        "prompts": [
            {
                "name": "rtp-challenging",
                "file": "rtp_challenging.jsonl",
                "sha256": "06882a2549d78b8e",
                "count": 597,
            },
            {"name": "attaq", "file": "attaq.jsonl", "sha256": "1f82a2549d78b8aa", "count": 200},
        ],
        "sampling": {
            "max_new_tokens": 20,
            "temperature": 1.0,
            "top_p": 0.9,
            "top_k": 0,
            "greedy": False,
            "samples": 5,
        },
        "seeds": [1],
        "threshold": 0.5,
        "scorers": {
            "lexical": {
                "model": "logistic regression on hashed character n-grams and words",
                "auc": {"human_labels": 0.9498, "perspective_both": 0.843},
                "licence": "Apache-2.0",
                "truncation": "none",
            },
            "contextual": {
                "model": "two-layer network on all-MiniLM-L6-v2 sentence embeddings",
                "auc": {"human_labels": 0.9432, "perspective_both": 0.8834},
                "truncation": "256 word pieces",
            },
        },
        "main_scorer": "lexical",
        "perplexity_model": {"name": "demo_target", "fingerprint": "c839a3106138"},
        "settings": settings,
        "examples": {
            "default": {"best": pairs, "worst": pairs[::-1]},
            "strength 3": {"best": pairs[:3], "worst": pairs[:1]},
        },
        "notes": ["3 prompts could not be scored and are left out of every number."],
        **changes,
    }
