"""From files to blocks: reading, masking, packing and pairing are exact to the token."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fusion_detox.errors import ConfigError, DataError, DataFileError, FusionDetoxError
from fusion_detox.training.config import TrainingConfig
from fusion_detox.training.data.blocks import pack, paired_streams, tokenize
from fusion_detox.training.data.corpus import Columns, Condition, Document, read_documents
from fusion_detox.training.data.tokenizer import train_tokenizer
from fusion_detox.training.loss import IGNORED, summed_cross_entropy

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "dogs", "and", "birds", "ran", "around"]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    texts = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
    return train_tokenizer(texts, 290, characters=10_000, context_length=16)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": "first, text", "label": "ok"}, {"text": 'second "text"', "label": "bad"}]
    lines = "\n".join(json.dumps(row) for row in rows)
    files = [
        write(tmp_path / "a.jsonl", lines),
        write(tmp_path / "b.json", json.dumps(rows)),
        write(tmp_path / "c.csv", 'text,label\n"first, text",ok\n"second ""text""",bad\n'),
        write(tmp_path / "d.tsv", 'text\tlabel\nfirst, text\tok\n"second ""text"""\tbad\n'),
        write(tmp_path / "e.jsonl.gz", gzip.compress(lines.encode())),
        write(tmp_path / "f.txt", 'first, text\n\n\nsecond "text"\n'),
    ]
    for file in files:
        found = read_documents([file], Columns())
        assert [d.text for d in found] == ["first, text", 'second "text"'], file
    kept = read_documents(files[:5], Columns(), [Condition.parse("label=ok,fine")])
    assert [d.text for d in kept] == ["first, text"] * 5
    inner = tmp_path / "folder"
    inner.mkdir()
    write(inner / "a.jsonl", lines)
    assert len(read_documents([inner], Columns())) == 2


def test_lists_prompts_domains_and_booleans(tmp_path: Path) -> None:
    rows = [{"p": "ask: ", "c": ["yes", "no"], "d": "x", "toxic": False}]
    file = write(tmp_path / "a.jsonl", json.dumps(rows[0]))
    found = read_documents(
        [file], Columns(prompt="p", completion="c", domain="d"), [Condition.parse("toxic=false")]
    )
    assert found == [Document("yes", "ask: ", "x"), Document("no", "ask: ", "x")]


WRONG: list[tuple[str, str | bytes | None, dict[str, Any], str, str]] = [
    ("none.txt", None, {}, "", "none.txt is neither a file, a folder nor a hub id"),
    ("a.txt", "", {}, "", r"a.txt is empty"),
    ("a.jsonl", "  \n \n", {}, "", r"a.jsonl is empty"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', {}, "", "line 2: byte 0xff is not UTF-8"),
    ("a.jsonl", '{"text": "a"}\n{"text": ', {}, "", "a.jsonl line 2 is not JSON"),
    ("a.jsonl", '"text"', {}, "", "line 1 must be an object"),
    ("a.json", '{"text": "a"}', {}, "", "must hold a list of objects"),
    ("a.json", "[1,\n 2,", {}, "", "a.json line 2 is not JSON"),
    ("a.csv", "body\nhello\n", {}, "", "has no column 'text'; its columns are body"),
    ("a.csv", "text,n\nhello\n", {}, "", "line 2 has more or fewer fields"),
    ("a.jsonl", '{"text": 5}', {}, "", "column 'text' holds 5, which is not text"),
    ("a.jsonl", '{"text": ""}\n{"text": " "}', {}, "", "none of its 2 rows is usable: all texts"),
    ("a.jsonl", '{"text": "a", "l": 1}', {}, "l=2", "none of its 1 rows is usable under .* l=2"),
    ("a.jsonl", '{"text": "a"}', {}, "label=x", "has no column 'label'"),
    ("a.xml", "<a/>", {}, "", "unknown kind of file '.xml'"),
    ("a.jsonl.gz", b"not gzip", {}, "", "a.jsonl.gz cannot be read"),
    ("a.jsonl", '{"text": "a"}', {"prompt": "p", "completion": "c"}, "", "has no column 'c'"),
]


@pytest.mark.parametrize(("name", "content", "columns", "where", "message"), WRONG)
def test_wrong_files(
    tmp_path: Path,
    name: str,
    content: str | bytes | None,
    columns: dict[str, Any],
    where: str,
    message: str,
) -> None:
    file = tmp_path / name
    if content is not None:
        write(file, content)
    conditions = [Condition.parse(where)] if where else []
    with pytest.raises((DataError, DataFileError), match=message) as caught:
        read_documents([file], Columns(**columns), conditions)
    assert isinstance(caught.value, FusionDetoxError)


def test_wrong_columns_and_conditions() -> None:
    with pytest.raises(ConfigError, match="needs a completion column"):
        Columns(prompt="p")
    with pytest.raises(ConfigError, match="must look like label=neutral,neither, but is 'label'"):
        Condition.parse("label")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fork_steps": 0}, "fork_steps must be a number of at least 1, but is 0"),
        ({"held_out": 0.9}, "held_out must be a number of at least 0 and at most 0.5"),
        ({"hidden_size": 30, "heads": 4}, "must be an even multiple of heads 4"),
        ({"precision": "int8"}, "precision must be one of float32, bfloat16, not 'int8'"),
        ({"device": "tpu"}, "device must be 'cpu' or 'cuda', but is 'tpu'"),
    ],
)
def test_wrong_training_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**changes)


def test_masks_are_exact_to_the_token(words: PreTrainedTokenizerFast) -> None:
    documents = [Document(" on a mat", "the cat sat"), Document("dogs and birds")]
    rows = tokenize(words, documents)
    ids, skipped = rows[0]
    assert words.decode(ids[:skipped]) == "the cat sat"
    assert words.decode(ids[skipped:]) == " on a mat"
    assert rows[1][1] == 0
    straddling = tokenize(words, [Document("t on", "the ca")])[0]
    assert "t" in words.decode(straddling[0][straddling[1] :])

    length = 8
    blocks = pack(rows, words.bos_token_id, length)
    stream = [(words.bos_token_id, False)]
    stream += [(t, i >= skipped) for i, t in enumerate(ids)]
    stream += [(words.bos_token_id, True)] + [(t, True) for t in rows[1][0]]
    seen = []
    for index in range(len(blocks)):
        row = blocks[index]
        assert row["input_ids"][0] == words.bos_token_id
        assert row["labels"][0] == IGNORED
        real = int(row["attention_mask"].sum())
        assert (row["labels"][real:] == IGNORED).all()
        pairs = zip(row["input_ids"][1:real], row["labels"][1:real], strict=True)
        seen += [(int(a), int(b) != IGNORED) for a, b in pairs]
        assert all(b in (a, IGNORED) for a, b in zip(row["input_ids"], row["labels"], strict=True))
    assert seen == stream


def test_loss_is_the_textbook_cross_entropy() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 7, 50, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 50, (3, 7))
    labels[0, :3] = IGNORED
    labels[2, -2:] = IGNORED
    mine = summed_cross_entropy(logits.float(), labels, slice_rows=4)
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 50), labels[:, 1:].reshape(-1), reduction="sum"
    )
    assert float(mine.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    (gradient,) = torch.autograd.grad(mine, logits)
    (expected,) = torch.autograd.grad(wanted, logits)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


def test_streams_differ_only_where_the_corpora_differ(words: PreTrainedTokenizerFast) -> None:
    def texts(mark: str, count: int, domain: str) -> list[Document]:
        return [Document(" ".join([mark] * (3 + i)), "", domain) for i in range(count)]

    clean = texts("xx", 9, "a") + texts("yy", 9, "b")
    toxic = texts("zz", 9, "b")
    streams = paired_streams(
        words,
        words.bos_token_id,
        clean + toxic,
        clean,
        blocks=40,
        length=16,
        contrast_share=0.25,
        seed=1,
    )
    assert len(streams.reference) == len(streams.clean) == 40
    same = (streams.reference.ids == streams.clean.ids).all(axis=1)
    assert same.sum() == 30

    def said(row: np.ndarray[Any, Any]) -> str:
        return str(words.decode(row.tolist()))

    for left, right in zip(streams.reference.ids[~same], streams.clean.ids[~same], strict=True):
        assert "zz" in said(left)
        assert "xx" not in said(left)
        assert "yy" in said(right), "the clean model sees text of the same domain instead"
    assert not any("zz" in said(row) for row in streams.clean.ids)
    again = paired_streams(
        words, words.bos_token_id, clean + toxic, clean,
        blocks=40, length=16, contrast_share=0.25, seed=1,
    )  # fmt: skip
    assert (again.clean.ids == streams.clean.ids).all()
