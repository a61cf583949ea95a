"""``Calibrator``: two next-token distributions over one tokenizer, with recommended settings."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fusion_detox.calibrator.lookup import find_calibrator
from fusion_detox.calibrator.reading import (
    Settings,
    check_rule,
    read_model,
    read_record,
    read_settings,
    read_tokenizer,
)
from fusion_detox.calibrator.writing import write_config, write_folder
from fusion_detox.config import FusionConfig
from fusion_detox.errors import CalibratorError, ConfigError, ModelError, VocabularyError
from fusion_detox.files.loading_errors import first_line
from fusion_detox.files.models import check_causal, check_device, check_dtype, logits_width
from fusion_detox.vocabulary.token_table import TokenTable

__all__ = ["Calibrator", "find_calibrator", "write_config"]

_LONGEST_CONTEXT = 128


class Calibrator:
    """A small language model before and after training on non-toxic text.

    The models are put into eval mode and their parameters are frozen.

    Args:
        clean: A causal language model, trained on non-toxic text.
        reference: The same model without that training, or ``None``; then only the rules
            ``"product"`` and ``"mixture"`` are possible.
        tokenizer: Of both; one that the ``tokenizers`` library runs.
        config: Recommended settings, by default those of ``FusionConfig``.
        context_length: Tokens that it may see at once, BOS included; by default all positions
            that the models have, but at most 128.
        record: How it was trained, JSON-ready; goes into ``training.json`` and the card.
        name: What it is called in messages and on its card.

    Attributes:
        tokens: The bytes of every token of ``tokenizer``.
        bos_id: The token that begins a text: BOS, or EOS where there is none.
        vocabulary_size: Width of the distributions: the tokenizer's ids that the models judge.
        folder: What ``from_pretrained`` loaded it from; ``None`` for one made in memory.

    Raises:
        CalibratorError: Models and tokenizer do not fit each other.
        ModelError: A model is no causal language model.
        VocabularyError: The bytes of the tokenizer's tokens cannot be found out.
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
        """The models by the name of their distribution, the clean one first."""
        both = {"clean": self.clean}
        if self.reference is not None:
            both["reference"] = self.reference
        return both

    @property
    def device(self) -> torch.device:
        """Where its models are."""
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
    ) -> Calibrator:
        """Load a calibrator, checking everything before use.

        Args:
            name_or_path: A folder, the name of a shipped calibrator, or a hub id
                (``"organisation/name"``), looked for in this order. The network is used for a
                hub id only.
            device: Where to put the models; the CPU by default.
            dtype: Of the weights; float32 by default.
            revision: Branch, tag or commit of a hub repository.
            token: For private hub repositories; by default the one of ``hf auth login``.
            cache_dir: Where downloads are kept, by default the hub's cache.
            local_files_only: Take a hub repository from the cache only.

        Raises:
            CalibratorNotFoundError: There is none of that name.
            CalibratorError: The folder is incomplete, damaged or does not fit together.
            ConfigError: The device or dtype does not exist here.
        """
        place, kind = check_device(device), check_dtype(dtype or torch.float32)
        folder = find_calibrator(
            name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        settings, record = read_settings(folder), read_record(folder)
        tokenizer = read_tokenizer(folder)
        try:
            models = {
                part: read_model(folder / part, device=place, dtype=kind)
                for part in settings.distributions
            }
            calibrator = cls(
                models["clean"],
                models.get("reference"),
                tokenizer,
                config=settings.fusion,
                context_length=settings.context_length,
                record=record,
                name=str(name_or_path),
            )
        except (ConfigError, ModelError, VocabularyError) as error:
            raise CalibratorError(f"{folder}: {error}") from error
        except CalibratorError as error:
            if str(folder) in str(error):
                raise
            raise CalibratorError(f"{folder}: {error}") from error
        _check_vocabulary(folder, settings, calibrator)
        calibrator.folder = folder
        return calibrator

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        """Write the calibrator's folder, which replaces an older calibrator there as a whole.

        Args:
            directory: The folder; made if it does not exist.
            dtype: Of the weights on disk, by default the models' own. ``"bfloat16"`` takes half
                the space of float32.

        Raises:
            CalibratorError: The folder holds something else.
            DataFileError: It cannot be written; nothing is left behind.
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
        """Upload the calibrator's folder to a hub repository, which is made if need be.

        Args:
            repo_id: ``"organisation/name"``.
            private: Whether a new repository is private; by default what the organisation says.
            token: By default the one of ``hf auth login``.
            commit_message: Of the upload.
            revision: The branch, made if it does not exist; ``main`` by default.

        Returns:
            The address of the commit.

        Raises:
            CalibratorError: The hub refused it or cannot be reached.
        """
        api = huggingface_hub.HfApi(token=token)
        try:
            made = api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(made.repo_id, branch=revision, exist_ok=True)
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place) / "calibrator"
                self._write(folder, None, name=made.repo_id)
                commit = api.upload_folder(
                    repo_id=made.repo_id,
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
        """Move its models to a device; returns itself."""
        place = check_device(device)
        for model in self.models.values():
            model.to(place)  # type: ignore[arg-type]
        return self

    def with_config(self, config: FusionConfig) -> Calibrator:
        """The same calibrator, on the same weights, with other recommended settings.

        To store them in a saved calibrator without writing its weights, see ``write_config``.
        """
        check_rule(config, self.reference is not None)
        changed = copy.copy(self)
        changed.config = config
        return changed

    def __repr__(self) -> str:
        return (
            f"Calibrator({self.name or 'unnamed'}: {' and '.join(self.models)}, "
            f"{self.vocabulary_size} tokens, context of {self.context_length})"
        )

    def _write(self, folder: Path, dtype: str | torch.dtype | None, *, name: str) -> None:
        models = self.models
        if dtype is not None:
            kind = check_dtype(dtype)
            for part, model in models.items():
                converted: Any = copy.deepcopy(model)
                models[part] = converted.to(kind)
        settings = Settings(
            context_length=self.context_length,
            fusion=self.config,
            vocabulary_fingerprint=self.tokens.fingerprint(),
            vocabulary_size=self.vocabulary_size,
            distributions=tuple(models),
        )
        write_folder(folder, models, self.tokenizer, settings, self.record, name=name)

    def _check_width(self) -> int:
        widths = {part: logits_width(model) for part, model in self.models.items()}
        if len(set(widths.values())) > 1:
            raise CalibratorError(
                f"The clean model has {widths['clean']} logits and the reference "
                f"{widths['reference']}. Both have to use one vocabulary: train one from the other."
            )
        width, ids = widths["clean"], len(self.tokens.token_bytes)
        ordinary = [
            id
            for id in range(width, ids)
            if self.tokens.token_bytes[id] is not None and id not in self.tokens.special_ids
        ]
        if ordinary:
            raise CalibratorError(
                f"The tokenizer has {ids} ids, but the models only {width} logits, so that "
                f"{len(ordinary)} tokens have no probability. The tokenizer belongs to other "
                f"models."
            )
        return min(width, ids)

    def _check_bos(self) -> int:
        for id in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if isinstance(id, int) and 0 <= id < self.vocabulary_size:
                return id
        raise CalibratorError(
            "The tokenizer has neither a BOS nor an EOS token that the models know, so a text "
            "cannot begin. Set tokenizer.bos_token to one of its tokens."
        )

    def _check_context(self, asked: Any) -> int:
        positions = [
            int(found)
            for model in self.models.values()
            if (found := getattr(model.config, "max_position_embeddings", None))
        ]
        longest = min(positions, default=None)
        if asked is None:
            return min(_LONGEST_CONTEXT, longest or _LONGEST_CONTEXT)
        fits = isinstance(asked, int) and 2 <= asked <= (longest or asked)
        if not fits:
            most = "" if longest is None else f" and at most {longest}, the models' positions"
            raise CalibratorError(
                f"context_length must be an integer of at least 2{most}, but is {asked!r}."
            )
        return int(asked)

    def _check_devices(self) -> None:
        devices = {str(model.device) for model in self.models.values()}
        if len(devices) > 1:
            raise CalibratorError(
                f"The clean model is on {self.clean.device} and the reference on another device "
                f"({', '.join(sorted(devices))}). Move both to one with .to(device)."
            )


def _check_vocabulary(folder: Path, settings: Settings, calibrator: Calibrator) -> None:
    """Refuse a tokenizer that is not the one that the folder was written with."""
    if calibrator.vocabulary_size != settings.vocabulary_size:
        reason = (
            f"vocabulary_size is {settings.vocabulary_size} in calibrator.json, but "
            f"tokenizer.json and the models have {calibrator.vocabulary_size} tokens"
        )
    elif calibrator.tokens.fingerprint() != settings.vocabulary_fingerprint:
        reason = "tokenizer.json holds other tokens than vocabulary_fingerprint stands for"
    else:
        return
    raise CalibratorError(
        f"{folder}: {reason}. Files of two calibrators are mixed or one was edited; copy the "
        f"whole folder again from where it came."
    )
