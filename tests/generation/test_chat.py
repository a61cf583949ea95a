"""Requests in a model's chat template: their tokens, their end, and which models get them."""

import copy
import json
import runpy
from pathlib import Path

import pytest
from transformers import AutoConfig, LogitsProcessor

from fusion_detox.errors import ConfigError
from fusion_detox.files.models import load_target
from fusion_detox.generation.chat import chat_prompt, choose_chat, end_of_turn_id, is_chat_model
from fusion_detox.generation.sampling import Sampling, generate_rows, jobs, prompt_ids

TOKENIZERS = runpy.run_path(str(Path(__file__).resolve().parents[1] / "family_models.py"))[
    "TOKENIZERS"
]


@pytest.fixture(scope="module")
def chat(chat_folder):
    return load_target(chat_folder)


class Say(LogitsProcessor):
    """Says the same tokens in turn after prompts of the same length."""

    def __init__(self, ids):
        self.ids, self.length = ids, None

    def __call__(self, input_ids, scores):
        self.length = self.length or input_ids.shape[1]
        out = scores - 1000
        out[:, self.ids[input_ids.shape[1] - self.length]] = 0
        return out


def test_a_request_is_encoded_as_the_template_says(chat):
    model, tokenizer = chat
    for system in (None, "Be kind."):
        (job,) = jobs(["She reads"], chat=True, system=system)
        found = tokenizer.decode(prompt_ids(model, tokenizer, job, 4))
        assert found == chat_prompt(tokenizer, "She reads", system)
    assert "<|im_start|>system\nBe kind.<|im_end|>" in found


def test_the_template_alone_adds_special_tokens(chat):
    tokenizer = TOKENIZERS["llama3"]()
    (job,) = jobs(["She reads"], chat=True)
    ids = prompt_ids(chat[0], tokenizer, job, 4)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_an_answer_stops_at_the_end_of_its_turn(chat):
    model, tokenizer = chat
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = tokenizer("She reads")["input_ids"]
    said = [*text, end, *text, *text][: len(text) + 3]

    def say(**options):
        how = Sampling(max_new_tokens=len(said), greedy=True)
        work = jobs(["You are"], **options)
        (row,) = generate_rows(model, tokenizer, work, how, processor=Say(said))
        return row.completion

    answer, continuation = say(chat=True), say()
    assert (answer.text, answer.finished) == ("She reads", True)
    assert (continuation.token_ids, continuation.finished) == (tuple(said), False)


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("llama3", "<|eot_id|>"),
        ("qwen", "<|im_end|>"),
        ("gemma", "<end_of_turn>"),
        ("mistral", "</s>"),
        ("phi3", "<|end|>"),
    ],
)
def test_the_end_of_a_turn(kind, end):
    tokenizer = TOKENIZERS[kind]()
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(end)


def test_templates_that_name_no_end(chat):
    tokenizer = copy.deepcopy(chat[1])
    for template in ("{{ messages[0].content }}", "{{ raise_exception('no') }}", None):
        tokenizer.chat_template = template
        assert end_of_turn_id(tokenizer) is None


def test_chats_and_plain_prompts_do_not_mix(chat):
    work = [*jobs(["You"], chat=True), *jobs(["She"])]
    with pytest.raises(ConfigError, match="generate them in two calls"):
        list(generate_rows(*chat, work, Sampling(max_new_tokens=1)))


def test_wrong_use(chat, other_tokenizer):
    with pytest.raises(ConfigError, match="a system prompt needs a request"):
        jobs(["You"], system="Be kind.")
    with pytest.raises(ConfigError, match="has no chat template"):
        prompt_ids(chat[0], other_tokenizer, jobs(["You"], chat=True)[0], 1)
    with pytest.raises(ConfigError, match="has no chat template"):
        choose_chat(True, None, "tiny-instruct", other_tokenizer)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("models/Qwen2.5-Coder-0.5B-Instruct-AWQ/", True),
        ("google/gemma-3-270m-it", True),
        ("gemma-1.1-it-2b", True),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", True),
        ("~/.cache/huggingface/hub/models--google--gemma-3-270m-it/snapshots/0a1b", True),
        ("Qwen/Qwen2.5-0.5B", False),
        ("google/gemma-3-270m", False),
        ("my-chat-models/Qwen2.5-0.5B", False),
        ("chatty-instructor", False),
        ("big-italian", False),
    ],
)
def test_the_name_of_a_chat_model(chat, other_tokenizer, name, expected):
    tokenizer = copy.deepcopy(chat[1])
    tokenizer.name_or_path = ""
    assert is_chat_model(name, tokenizer) == expected
    assert not is_chat_model(name, other_tokenizer), "no template"


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("packaged.json", json.dumps({"model": "SmolLM2-135M-Instruct"}), True),
        ("packaged.json", json.dumps({"model": "Gemma 3 270M (base)"}), False),
        ("config.json", json.dumps({"_model_name_or_path": "Qwen2.5 0.5B Instruct AWQ"}), True),
        ("config.json", json.dumps({"general.name": "tiny-chat"}), True),
        ("config.json", "[1]", False),
        ("config.json", "{", False),
        ("README.md", "---\nlicense: mit\n---\n\n# Tiny 1B Instruct\n", True),
        ("README.md", "# Tiny 1B\n\nSee also Tiny-1B-Instruct.\n", False),
    ],
)
def test_the_files_of_a_chat_model(chat, tmp_path, file, content, expected):
    folder = tmp_path / "tiny"  # the folder of the test has "chat" in its name
    folder.mkdir()
    tokenizer = copy.deepcopy(chat[1])
    tokenizer.name_or_path = str(folder)
    (folder / file).write_text(content)
    assert is_chat_model(folder, tokenizer) == expected
    assert is_chat_model("packaged:tiny", tokenizer) == expected


def test_the_configuration_of_a_chat_model(chat, chat_folder, target_folder):
    tokenizer = copy.deepcopy(chat[1])
    tokenizer.name_or_path = ""
    assert is_chat_model(AutoConfig.from_pretrained(chat_folder), tokenizer)
    assert not is_chat_model(AutoConfig.from_pretrained(target_folder), tokenizer)
