"""Chat templates: whether a model is a chat model, and how a request is put to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fusion_detox.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer can put requests to a chat model."""
    return bool(getattr(tokenizer, "chat_template", None))


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
        raise ConfigError(
            "this tokenizer has no chat template, so requests cannot be put to its model as chat: "
            "use plain prompts, or a tokenizer whose folder has a chat_template"
        )
    if len(turns) % 2 == 0:
        raise ConfigError(
            f"a conversation must end with the user's message, but this one has {len(turns)} "
            "messages: give the user's and the model's messages in turn"
        )
    conversation = [] if system is None else [{"role": "system", "content": system}]
    for number, content in enumerate(turns):
        role = "assistant" if number % 2 else "user"
        conversation.append({"role": role, "content": content})
    try:
        text = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates raise what they like
        raise ConfigError(
            f"the chat template refuses this conversation ({error}): many templates accept no "
            "system prompt, or only user and assistant messages in turn"
        ) from error
    return str(text)
