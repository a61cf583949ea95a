"""Scorers from packages of others: files are read as data, and give their authors' scores."""

import hashlib
import io
import os
import pickle
import zipfile
from dataclasses import replace

import joblib
import numpy as np
import pytest
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.svm import LinearSVC

from benchmarks import witnesses
from benchmarks.inert_pickle import read
from fusion_detox.errors import DataFileError

TEXTS = ["you rotten fool", "a lovely day", "rotten rotten day", "lovely fool", "a fool", "you day"]
LABELS = [1, 0, 1, 0, 1, 0]


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_no_call_of_a_pickle_happens(tmp_path, protocol):
    content = pickle.dumps({"words": [1, Attack(tmp_path / "made")]}, protocol)
    with pytest.raises(DataFileError, match=r"mkdir.*not expected"):
        read(io.BytesIO(content), {"collections OrderedDict"})
    inert = read(io.BytesIO(content), {f"{os.mkdir.__module__} mkdir"})["words"][1]
    assert inert.args == (str(tmp_path / "made"),)
    assert not (tmp_path / "made").exists()
    pickle.loads(content)
    assert (tmp_path / "made").exists(), "the attack would have worked"


@pytest.mark.parametrize(
    "content",
    [b"", b"no pickle", pickle.dumps([1, 2])[:-1], b"cos\nmkdir\n(S'x'\ntR.", b"\x80\x04R."],
)
def test_other_files_are_refused(content):
    with pytest.raises(DataFileError):
        read(io.BytesIO(content), set())


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_data_is_what_pickle_reads(protocol):
    shared = ["a", 1.5, None]
    data = {"x": shared, "y": (shared, (True, False)), 3: {"é": 2**40}, "b": b"bytes", "n": -7}
    found = read(io.BytesIO(pickle.dumps(data, protocol)), {"_codecs encode"})
    if protocol < 3:  # it has no opcode for bytes
        assert found.pop("b").args == (data.pop("b").decode(), "latin1")
    assert found == data
    assert found["y"][0] is found["x"]


@pytest.mark.parametrize("dtype", ["<f8", "<f4", "<i8", "<i4"])
def test_arrays_have_their_values(tmp_path, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    names = {*witnesses._NAMES, "numpy._core.multiarray _reconstruct"}
    for made in (array, np.asfortranarray(array)):
        inert = read(io.BytesIO(pickle.dumps(made, 4)), {*names, "_codecs encode"})
        assert np.array_equal(inert.array(), array)
        joblib.dump(made, tmp_path / "x.joblib")
        with (tmp_path / "x.joblib").open("rb") as file:
            assert np.array_equal(read(file, names), array)


def test_a_linear_model_scores_as_in_scikit_learn(tmp_path):
    vectorizer = TfidfVectorizer(stop_words="english").fit(TEXTS)
    model = CalibratedClassifierCV(LinearSVC(), cv=3).fit(vectorizer.transform(TEXTS), LABELS)
    for name, made in (("vectorizer", vectorizer), ("model", model)):
        joblib.dump(made, tmp_path / f"{name}.joblib")

    def files(member):
        return io.BytesIO((tmp_path / member.rpartition("/")[2]).read_bytes())

    weights, facts = witnesses.alt_profanity_check(files)
    own = witnesses.LinearWitness("x", weights, {**facts, "record": {}}).score(TEXTS)
    assert own == pytest.approx(model.predict_proba(vectorizer.transform(TEXTS))[:, 1])
    assert max(own) - min(own) > 0.01


@pytest.fixture
def lstm():
    noise = torch.Generator().manual_seed(1)
    shapes = {"embedding": (4, 3), "hidden.kernel": (4, 5), "hidden.bias": (5,)}
    shapes |= {"output.kernel": (5, 6), "output.bias": (6,)}
    for side in ("forward", "backward"):
        shapes |= {f"{side}.kernel": (3, 8), f"{side}.recurrent": (2, 8), f"{side}.bias": (8,)}
    weights = {name: torch.randn(shape, generator=noise).numpy() for name, shape in shapes.items()}
    facts = {"words": ["you", "fool", "day"], "filters": "!,", "record": {}}
    return weights, {**facts, "hard_sigmoid": False}


def test_the_lstm_is_the_one_of_torch(lstm):
    weights, facts = lstm
    witness = witnesses.LstmWitness("x", weights, facts)
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    network = torch.nn.LSTM(3, 2, bidirectional=True, batch_first=True)
    for side, suffix in (("forward", ""), ("backward", "_reverse")):
        for part, name in (("kernel", "weight_ih_l0"), ("recurrent", "weight_hh_l0")):
            getattr(network, name + suffix).data = tensors[f"{side}.{part}"].T.contiguous()
        getattr(network, f"bias_ih_l0{suffix}").data = tensors[f"{side}.bias"]
        getattr(network, f"bias_hh_l0{suffix}").data.zero_()
    texts = ["You, fool!", "day " * 150 + "you", "unknown"]
    with torch.no_grad():
        ids = torch.tensor([witness.ids(text) for text in texts])
        pooled = network(tensors["embedding"][ids])[0].amax(dim=1)
        hidden = (pooled @ tensors["hidden.kernel"] + tensors["hidden.bias"]).relu()
        chances = (hidden @ tensors["output.kernel"] + tensors["output.bias"]).sigmoid()
    assert witness.score(texts) == pytest.approx(chances[:, 0].tolist(), abs=1e-6)
    hard = witnesses.LstmWitness("x", weights, {**facts, "hard_sigmoid": True}).score(texts)
    assert hard != pytest.approx(chances[:, 0].tolist(), abs=1e-3)


def test_words_become_ids_as_in_keras(lstm):
    witness = witnesses.LstmWitness("x", *lstm)
    assert witness.ids("FOOL!you strange,Day")[-4:] == [0, 2, 1, 3]
    assert witness.ids("you " * 3 + "fool " * 100) == [2] * 100


def test_a_wheel_other_than_the_expected_one_is_refused(tmp_path):
    package = witnesses.PACKAGES["tox-block"]
    path = tmp_path / f"tox_block-{package.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("x", "y")
    with pytest.raises(DataFileError, match="delete the file"):
        witnesses.download("tox-block", package, tmp_path)
    right = replace(package, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    assert witnesses.download("tox-block", right, tmp_path) == path.read_bytes()
