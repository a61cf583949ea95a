"""Answers from a causal language model on this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_detox.config import check_number
from fusion_detox.errors import DataError, ModelError
from fusion_detox.training.negatives.config import NegativesConfig, PromptTexts
from fusion_detox.training.negatives.requests import (
    LENGTH,
    STOP,
    Answer,
    Keep,
    Request,
    chat_messages,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LocalWriter:
    """A transformers model, used with its chat template if its tokenizer has one.

    An answer depends on the seed, its sentence and its number, but not on its batch. The model is
    loaded with the first request.

    Args:
        model: A folder or a hub id.
        revision: Branch, tag or commit of a hub model.
        device: Device, such as ``"cuda:1"``; by default, CUDA if available, else the CPU.
        dtype: Dtype of the weights, such as ``"bfloat16"``; by default, that of the files.
        batch_size: Requests per batch.
        local_files_only: Never contact the hub.

    Raises:
        ConfigError: ``batch_size`` is below 1.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int = 8,
        local_files_only: bool = False,
    ) -> None:
        check_number("batch_size", batch_size, 1, whole=True)
        self.name, self.revision = os.fspath(model), revision
        self.batch_size = batch_size
        self._device, self._dtype, self._local = device, dtype, local_files_only
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._model: PreTrainedModel | None = None

    def record(self) -> dict[str, Any]:
        """Name, revision and dtype of the model; a folder's name includes a hash of its content."""
        from fusion_detox.files.fingerprints import folder_fingerprint

        folder = Path(self.name).expanduser()
        name = self.name
        if folder.is_dir():
            name = f"{folder.resolve().name}@{folder_fingerprint(folder)}"
        return {"model": name, "revision": self.revision, "dtype": self._dtype}

    def count_tokens(self, text: str) -> int:
        """The number of tokens of a text, counted by the model's tokenizer."""
        return len(self._load_tokenizer()(text, add_special_tokens=False)["input_ids"])

    def answer(
        self, requests: Sequence[Request], config: NegativesConfig, prompts: PromptTexts, keep: Keep
    ) -> None:
        """Answers requests batch by batch; see ``Writer``.

        Raises:
            ModelNotFoundError: The model was not found and cannot be downloaded.
            ModelError: It is damaged or not a causal language model, or memory runs out.
        """
        from fusion_detox.generation.sampling import Job, Sampling, complete_batch, prompt_ids

        model, tokenizer = self._load()
        sampling = Sampling(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            seed=config.seed,
        )
        for start in range(0, len(requests), self.batch_size):
            jobs, ids, sent = [], [], []
            for request in requests[start : start + self.batch_size]:
                text = self._framed(request.text, prompts)
                job = Job(request.seed(0), request.sample, text)
                try:
                    tokens = prompt_ids(model, tokenizer, job, config.max_new_tokens)
                except DataError as error:
                    keep(Answer(request, failure=f"too long for the model: {error}"))
                    continue
                if self._has_template():  # the template adds the special tokens
                    tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
                jobs.append(job)
                ids.append(tokens)
                sent.append(request)
            if not jobs:
                continue
            found = complete_batch(model, tokenizer, jobs, ids, sampling, None)
            for request, tokens, completion in zip(sent, ids, found, strict=True):
                finish = STOP if completion.finished else LENGTH
                length = len(completion.token_ids)
                keep(Answer(request, completion.text, finish, len(tokens), length))

    def _framed(self, text: str, prompts: PromptTexts) -> str:
        tokenizer = self._load_tokenizer()
        if not self._has_template():
            text = prompts.frame.replace("{request}", text)
            return f"{prompts.system}\n\n{text}" if prompts.system else text
        messages: Any = chat_messages(text, prompts)
        try:
            framed = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template can raise any exception
            raise ModelError(
                f"the chat template of {self.name} failed: {error}; if it does not support a "
                "system message, leave `system` empty in the prompts"
            ) from error
        return str(framed)

    def _has_template(self) -> bool:
        return bool(getattr(self._load_tokenizer(), "chat_template", None))

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            from fusion_detox.files.models import load_tokenizer

            self._tokenizer = load_tokenizer(
                self.name, revision=self.revision, local_files_only=self._local
            )
        return self._tokenizer

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self._model is None:
            import torch

            from fusion_detox.files.models import load_target

            self._model, self._tokenizer = load_target(
                self.name,
                device=self._device or ("cuda" if torch.cuda.is_available() else "cpu"),
                dtype=self._dtype,
                local_files_only=self._local,
                revision=self.revision,
            )
        assert self._tokenizer is not None
        return self._model, self._tokenizer
