"""The ``Calibrator``: two small models that share a tokenizer, with recommended settings."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fusion_detox.calibrator.folder import (
    Settings,
    check_entries,
    check_folder,
    check_rule,
    read_model,
    read_record,
    read_settings,
    read_tokenizer,
    write_folder,
)
from fusion_detox.calibrator.lookup import find_calibrator
from fusion_detox.calibrator.probes import Probe, read_probes
from fusion_detox.calibrator.words import read_words
from fusion_detox.config import FusionConfig
from fusion_detox.errors import CalibratorError, ConfigError, ModelError, VocabularyError
from fusion_detox.files.loading_errors import first_line
from fusion_detox.files.models import check_causal, check_device, check_dtype, logits_width
from fusion_detox.vocabulary.token_table import TokenTable

_DEFAULT_MAX_CONTEXT = 128


class Calibrator:
    """A pair of small language models that share a start and differ in what they learned next.

    In the terms of DExperts (Liu et al. 2021), ``clean`` is the expert and ``reference`` the
    anti-expert. Both models are put into eval mode and their parameters are frozen.

    Args:
        clean: A causal language model, trained further on non-toxic text.
        reference: The same model, trained further on all text, or on toxic text, or not at
            all. If it is ``None``, only rules that use
            the clean model alone are possible, such as ``"product"`` and ``"mixture"``.
        tokenizer: The fast tokenizer of both models.
        config: Recommended settings; by default, those of ``FusionConfig``, or the product rule
            with strength 0.5 if there is no reference.
        context_length: Maximum number of tokens per model call, including BOS. By default, the
            models' number of positions, but at most 128.
        record: How the calibrator was trained, as JSON values; stored in ``training.json`` and
            shown on the card.
        name: The calibrator's name in messages and on its card.
        probes: Texts on which its effect is known, each with ``context``, ``avoided`` and ``kept``
            (see :class:`~fusion_detox.calibrator.probes.Probe`). Each new processor checks itself
            on them.
        words: Words that no harmless text needs, in lower case, and by how many nats to hold each
            back in any text. The contrast rule then does so whatever tokens a target writes them
            with; see ``word_weight`` in :class:`FusionConfig`.

    Attributes:
        tokens: The bytes of every token of ``tokenizer``.
        bos_id: The token that begins a text: BOS, or EOS if the tokenizer has no BOS.
        vocabulary_size: Width of the distributions: how many of the tokenizer's ids the models
            score.
        folder: The folder that ``from_pretrained`` loaded; ``None`` if built in memory.

    Raises:
        CalibratorError: Models and tokenizer do not match, or a probe is not one.
        ModelError: A model is not a causal language model.
        VocabularyError: The bytes of the tokenizer's tokens cannot be determined.
        ConfigError: The rule of ``config`` needs a reference and there is none.
    """

    def __init__(
        self,
        clean: PreTrainedModel,
        reference: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        config: FusionConfig | None = None,
        context_length: int | None = None,
        record: dict[str, Any] | None = None,
        name: str | None = None,
        probes: Iterable[Probe | Mapping[str, Any]] = (),
        words: Mapping[str, float] | None = None,
    ) -> None:
        if config is None:
            contrast, product = FusionConfig(), FusionConfig(rule="product", strength=0.5)
            config = contrast if reference is not None else product
        check_rule(config, reference is not None)
        self.clean = clean
        self.reference = reference
        self.tokenizer = tokenizer
        self.config = config
        self.record = {} if record is None else record
        self.name = name
        self.probes = read_probes(probes)
        self.words = read_words(words or {})
        self.folder: Path | None = None
        for part, model in self.models.items():
            check_causal(model.config, f"The {part} model")
            module: torch.nn.Module = model
            module.eval().requires_grad_(False)
        self.tokens = TokenTable.from_tokenizer(tokenizer)
        self.vocabulary_size = self._check_width()
        self.bos_id = self._check_bos()
        self.context_length = self._check_context(context_length)
        self._check_devices()

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """The models by distribution: ``"clean"`` and, if there is one, ``"reference"``."""
        both = {"clean": self.clean}
        if self.reference is not None:
            both["reference"] = self.reference
        return both

    @property
    def device(self) -> torch.device:
        """The device of the models."""
        return self.clean.device

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        verify: bool = True,
    ) -> Calibrator:
        """Load a calibrator after checking all of its files.

        Args:
            name_or_path: A folder, the name of a shipped calibrator, or a hub id
                (``"organisation/name"``), tried in this order. Only a hub id needs the network.
            device: Where to put the models; the CPU by default.
            dtype: Type of the weights; float32 by default.
            revision: Branch, tag or commit of a hub repository.
            token: Token for private hub repositories; by default, the one of ``hf auth login``.
            cache_dir: Where downloads are stored; by default the hub's cache.
            local_files_only: Take a hub repository from the cache only.
            verify: Compare every file that decides the numbers with its SHA-256 in
                ``calibrator.json``. Without it, only damage that is plain to see is found.

        Raises:
            CalibratorNotFoundError: No calibrator has that name.
            CalibratorError: The folder is incomplete, damaged or inconsistent.
            ConfigError: The device or dtype is not available.
        """
        on_device, weight_dtype = check_device(device), check_dtype(dtype or torch.float32)
        folder = find_calibrator(
            name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        check_entries(folder)
        settings, record = read_settings(folder, verify=verify), read_record(folder)
        if verify:
            check_folder(folder, settings)
        tokenizer = read_tokenizer(folder)
        models = {
            part: read_model(folder / part, device=on_device, dtype=weight_dtype)
            for part in settings.distributions
        }
        try:
            calibrator = cls(
                models["clean"],
                models.get("reference"),
                tokenizer,
                config=settings.fusion,
                context_length=settings.context_length,
                record=record,
                name=str(name_or_path),
                probes=settings.probes,
                words=settings.words,
            )
        except (CalibratorError, ConfigError, ModelError, VocabularyError) as error:
            raise CalibratorError(f"{folder}: {error}") from error
        except Exception as error:
            raise CalibratorError(
                f"{folder}: the tokenizer or a model cannot be used: {first_line(error)}. Copy the "
                f"whole folder again from its source."
            ) from error
        _check_vocabulary(folder, settings, calibrator)
        calibrator.folder = folder
        return calibrator

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        """Write the calibrator to a folder, replacing any calibrator there as a whole.

        Args:
            directory: The folder; created if it does not exist.
            dtype: Type of the weights on disk; by default, that of the models. ``"bfloat16"``
                takes half the space of float32.

        Raises:
            CalibratorError: The folder holds something other than a calibrator.
            DataFileError: It cannot be written; the folder is left as it was.
        """
        folder = Path(directory).expanduser()
        self._write(folder, dtype, name=folder.resolve().name)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Upload the calibrator to a hub repository, which is created if it does not exist.

        Args:
            repo_id: ``"organisation/name"``.
            private: Whether a new repository is private; by default the organisation's setting.
            token: By default, the one of ``hf auth login``.
            commit_message: Message of the commit.
            revision: The branch, created if it does not exist; ``main`` by default.

        Returns:
            The URL of the commit.

        Raises:
            CalibratorError: The hub refuses the upload or cannot be reached.
        """
        api = huggingface_hub.HfApi(token=token)
        try:
            repository = api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repository.repo_id, branch=revision, exist_ok=True)
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / "calibrator"
                self._write(folder, None, name=repository.repo_id)
                commit = api.upload_folder(
                    repo_id=repository.repo_id,
                    folder_path=folder,
                    commit_message=commit_message or "Upload calibrator",
                    revision=revision,
                )
        except (HfHubHTTPError, HFValidationError, ConnectionError) as error:
            raise CalibratorError(
                f"The calibrator was not uploaded to {repo_id!r}: {first_line(error)}. Check the "
                f"name and the network, and log in with `hf auth login`."
            ) from error
        return str(commit.commit_url)

    def to(self, device: str | torch.device) -> Calibrator:
        """Move the models to a device and return the calibrator itself."""
        checked = check_device(device)
        for model in self.models.values():
            model.to(checked)  # type: ignore[arg-type]
        return self

    def with_config(self, config: FusionConfig) -> Calibrator:
        """A copy with other recommended settings that shares the models.

        ``fusion_detox.calibrator.folder.write_config`` stores settings in a saved calibrator.
        """
        check_rule(config, self.reference is not None)
        changed = copy.copy(self)
        changed.config = config
        return changed

    def __repr__(self) -> str:
        return (
            f"Calibrator({self.name or 'unnamed'}: {' and '.join(self.models)}, "
            f"{self.vocabulary_size} tokens, context {self.context_length})"
        )

    def _write(self, folder: Path, dtype: str | torch.dtype | None, *, name: str) -> None:
        models = self.models
        if dtype is not None:
            checked = check_dtype(dtype)
            for part, model in models.items():
                converted: Any = copy.deepcopy(model)
                models[part] = converted.to(checked)
        settings = Settings(
            context_length=self.context_length,
            fusion=self.config,
            vocabulary_fingerprint=self.tokens.fingerprint(),
            vocabulary_size=self.vocabulary_size,
            distributions=tuple(models),
            probes=self.probes,
            words=self.words,
        )
        write_folder(folder, models, self.tokenizer, settings, self.record, name=name)

    def _check_width(self) -> int:
        widths = {part: logits_width(model) for part, model in self.models.items()}
        if len(set(widths.values())) > 1:
            raise CalibratorError(
                f"The clean model has {widths['clean']} logits and the reference "
                f"{widths['reference']}. Both must share a vocabulary; train one from the other."
            )
        width, ids = widths["clean"], len(self.tokens.token_bytes)
        # Special and unused ids have no bytes and may lie beyond the models' logits.
        unscored = [text for text in self.tokens.token_bytes[width:] if text is not None]
        if unscored:
            raise CalibratorError(
                f"The tokenizer has {ids} ids, but the models have only {width} logits, so "
                f"{len(unscored)} tokens would have no probability. The tokenizer belongs to other "
                f"models; use the one that these models were trained with."
            )
        return min(width, ids)

    def _check_bos(self) -> int:
        for id in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if isinstance(id, int) and 0 <= id < self.vocabulary_size:
                return id
        raise CalibratorError(
            "The tokenizer has neither a BOS nor an EOS token that the models know, so no "
            "token can begin a text. Set tokenizer.bos_token to one of its tokens."
        )

    def _check_context(self, context_length: Any) -> int:
        positions = [
            int(found)
            for model in self.models.values()
            if (found := getattr(model.config, "max_position_embeddings", None))
        ]
        longest = min(positions, default=None)
        if context_length is None:
            return min(_DEFAULT_MAX_CONTEXT, longest or _DEFAULT_MAX_CONTEXT)
        if isinstance(context_length, int) and 2 <= context_length <= (longest or context_length):
            return context_length
        limit = "" if longest is None else f" and at most {longest}, the number of positions"
        raise CalibratorError(
            f"context_length must be an integer of at least 2{limit}, but is {context_length!r}."
        )

    def _check_devices(self) -> None:
        devices = {str(model.device) for model in self.models.values()}
        if len(devices) > 1:
            raise CalibratorError(
                f"The clean model is on {self.clean.device}, but the models' devices are "
                f"{', '.join(sorted(devices))}. Move both to one device with .to(device)."
            )


def _check_vocabulary(folder: Path, settings: Settings, calibrator: Calibrator) -> None:
    """Refuse a tokenizer that is not the one the folder was saved with."""
    if calibrator.vocabulary_size != settings.vocabulary_size:
        reason = (
            f"vocabulary_size is {settings.vocabulary_size} in calibrator.json, but "
            f"tokenizer.json and the models have {calibrator.vocabulary_size} tokens"
        )
    elif calibrator.tokens.fingerprint() != settings.vocabulary_fingerprint:
        reason = "the tokens in tokenizer.json do not match vocabulary_fingerprint"
    else:
        return
    raise CalibratorError(
        f"{folder}: {reason}. Files of two calibrators were mixed, or a file was edited; copy the "
        f"whole folder again from its source."
    )
