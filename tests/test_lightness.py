"""Importing the package and showing a command's help load nothing heavy."""

import subprocess
import sys

import pytest

import fusion_detox

HEAVY = ("torch", "transformers", "tokenizers", "numpy", "datasets", "accelerate", "sklearn")
CHECK = f"import sys; print(*sorted(set(sys.modules) & set({HEAVY!r})))"
HELP = """
import sys, time
began = time.process_time()
from fusion_detox.cli import main
sys.argv = ["fusion-detox", *{arguments!r}]
try:
    status = main()
except SystemExit as stopped:
    status = stopped.code
assert not status, status
print("SECONDS", time.process_time() - began)
"""


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_import_is_light():
    assert run(f"import fusion_detox; fusion_detox.__version__; {CHECK}") == [""]


def test_settings_are_light():
    assert run(f"from fusion_detox import FusionConfig; FusionConfig(); {CHECK}") == [""]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["demo", "--help"],
        ["generate", "--help"],
        ["explain", "--help"],
        ["playground", "--help"],
        ["train-calibrator", "--help"],
        ["finetune", "--help"],
        ["info", "--help"],
        ["doctor", "--help"],
        ["evaluate", "--help"],
        ["rescore", "--help"],
        ["compare", "--help"],
        ["tune", "--help"],
        ["make-negatives", "--help"],
        ["fetch-target", "--help"],
    ],
)
def test_help_is_light_and_quick(arguments):
    for _ in range(4):
        *text, seconds, heavy = run(HELP.format(arguments=arguments) + CHECK)
        assert "Usage" in "\n".join(text)
        assert heavy == ""
        if float(seconds.split()[1]) < 1:
            break
    # A third of a second on a quiet machine; a busy neighbour slows a processor to a third.
    assert float(seconds.split()[1]) < 1


def test_public_names_resolve():
    assert set(fusion_detox.__all__) <= set(dir(fusion_detox))
    for name in fusion_detox.__all__:
        assert getattr(fusion_detox, name) is not None


def test_an_unknown_name_raises_an_attribute_error():
    with pytest.raises(AttributeError, match="No fusion_detox attribute Fusion"):
        _ = fusion_detox.Fusion
