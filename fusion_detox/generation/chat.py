"""Chat templates: whether a model is a chat model, and how a request is put to it."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_detox.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Parts of a model's name that say it answers requests: SmolLM2-135M-Instruct, gemma-3-270m-it.
_CHAT_NAME = re.compile(r"(?i)(?<![a-z])(instruct|chat)(?![a-z])|[-_]it(?![a-z])")
_NAME_FIELDS = ("_name_or_path", "_model_name_or_path", "general.name", "model", "model_name")
_NO_TEMPLATE = (
    "this tokenizer has no chat template, so requests cannot be put to its model as chat: use "
    "plain prompts (--no-chat), or a tokenizer whose folder has a chat_template"
)


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer can put requests to a chat model."""
    return bool(getattr(tokenizer, "chat_template", None))


def is_chat_model(
    model: str | os.PathLike[str] | PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Whether a model was tuned to answer requests, as far as its files say so.

    A chat template alone proves nothing, since many base models have one. So the model's name must
    also contain ``instruct``, ``chat`` or ``-it``. The name is looked up in the last part of the
    given path or hub id, in the name fields of the configuration (``_name_or_path`` and
    ``general.name``, among others) and of a packaged target, and in the title of the model card
    ``README.md``. Nothing else in the card counts, because the card of a base model often mentions
    its chat version.

    Args:
        model: A folder, a hub id, or the configuration of a loaded model.
        tokenizer: The model's tokenizer.
    """
    if not has_chat_template(tokenizer):
        return False
    sources = [model, tokenizer.name_or_path or "-"]
    return any(_CHAT_NAME.search(name) for source in sources for name in _names(source))


def choose_chat(
    chat: bool | None,
    system: str | None,
    model: str | os.PathLike[str] | PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> bool:
    """Decide whether prompts are put to a model as requests; ``None`` means if it is a chat model.

    Raises:
        ConfigError: Chat was asked for and the tokenizer has no chat template, or there is a system
            prompt without chat.
    """
    if chat and not has_chat_template(tokenizer):
        raise ConfigError(_NO_TEMPLATE)
    chosen = is_chat_model(model, tokenizer) if chat is None else chat
    check_system(chosen, system)
    return chosen


def check_system(chat: bool, system: str | None) -> None:
    """Refuse a system prompt without chat; raises ``ConfigError``."""
    if system is not None and not chat:
        raise ConfigError(
            "a system prompt needs a request in the model's chat template, but the prompts are "
            "plain texts to continue: turn chat on (--chat, chat=True), or leave it out"
        )


def ids_after_answer(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the chat template writes after an answer; none if it refuses one."""
    answer = "Yes."
    turns = [{"role": "user", "content": "Yes?"}, {"role": "assistant", "content": answer}]
    try:
        text = _render(tokenizer, turns, answer_next=False)
    except ConfigError:
        return []
    after = text.rpartition(answer)[2].lstrip()
    return list(tokenizer(after, add_special_tokens=False)["input_ids"])


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes after an answer, if there is one."""
    ids = ids_after_answer(tokenizer)
    added: Any = tokenizer.added_tokens_decoder
    return int(ids[0]) if ids and ids[0] in added and added[ids[0]].special else None


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: str | Sequence[str],
    system: str | None = None,
) -> str:
    """Write a conversation in the model's chat template, up to where its answer begins.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: The user's request, or a conversation: the user's and the model's messages in
            turn, ending with the user's.
        system: The system prompt; by default, what the template itself adds, if anything.

    Returns:
        The text. It holds the template's special tokens, so encode it with
        ``add_special_tokens=False``.

    Raises:
        ConfigError: The tokenizer has no chat template, the template refuses the conversation, or
            the conversation does not end with the user's message.
    """
    turns = [messages] if isinstance(messages, str) else list(messages)
    if not has_chat_template(tokenizer):
        raise ConfigError(_NO_TEMPLATE)
    if len(turns) % 2 == 0:
        raise ConfigError(
            f"a conversation must end with the user's message, but this one has {len(turns)} "
            "messages: give the user's and the model's messages in turn"
        )
    conversation = [] if system is None else [{"role": "system", "content": system}]
    for number, content in enumerate(turns):
        role = "assistant" if number % 2 else "user"
        conversation.append({"role": role, "content": content})
    return _render(tokenizer, conversation, answer_next=True)


def _render(
    tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, str]], *, answer_next: bool
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=answer_next
            )
        )
    except Exception as error:  # templates raise what they like
        raise ConfigError(
            f"the chat template refuses this conversation ({error}): many templates accept no "
            "system prompt, or only user and assistant messages in turn"
        ) from error


def _names(source: str | os.PathLike[str] | PretrainedConfig) -> Iterator[str]:
    """What the files of a model call it."""
    if not isinstance(source, (str, os.PathLike)):
        fields = source.to_dict()
        yield from (_last(str(fields[name])) for name in _NAME_FIELDS if fields.get(name))
        yield from _names(source.name_or_path or "-")
        return
    path = Path(source).expanduser()
    yield _last(os.fspath(source))
    for file in ("config.json", "packaged.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            values = json.loads((path / file).read_text(encoding="utf-8"))
            yield from (_last(str(values[name])) for name in _NAME_FIELDS if values.get(name))
    with contextlib.suppress(OSError, ValueError):
        title = re.search(r"^# (.*)$", (path / "README.md").read_text("utf-8"), re.MULTILINE)
        yield title[1] if title else ""


def _last(name: str) -> str:
    """The last part of a path or hub id; of a snapshot in the hub's cache, the repository's."""
    parts = re.split(r"[/\\]", name.rstrip("/\\"))
    for folder, below in pairwise(parts):
        if below == "snapshots" and folder.startswith("models--"):
            return folder.removeprefix("models--")
    return parts[-1]
