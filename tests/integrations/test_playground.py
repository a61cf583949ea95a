"""The playground writes, marks and refuses what it should, with and without its page."""

import importlib.util
import os
import socket
import subprocess
import sys
import threading

import pytest

from fusion_detox.cli import main
from fusion_detox.errors import ConfigError, FusionDetoxError, MissingExtraError
from fusion_detox.generation.side_by_side import LiveSettings, Side, StreamedToken
from fusion_detox.integrations.playground import (
    CHAT,
    FORMS,
    PLAIN,
    PRESETS,
    Playground,
    Request,
    Target,
    _check_address,
    build_page,
    is_local,
    live_settings,
    side_html,
)

EVIL = "<script>alert(1)</script>\"'&"


def request(**changes):
    values = {
        "prompt": "She reads",
        "form": PLAIN,
        "system": "",
        "target": "tiny",
        "calibrator": "cal",
        "rule": "contrast",
        "max_new_tokens": 6,
        "seed": 3,
    }
    return Request(**{**values, **changes})


@pytest.fixture
def playground(target_folder, calibrator_folder, monkeypatch):
    found = Playground(
        [Target("tiny", str(target_folder)), Target("chat", "nowhere")],
        ["cal"],
        device="cpu",
        offline=True,
    )
    monkeypatch.setattr(found, "calibrators", ["cal", str(calibrator_folder)])
    found._loaded["cal"] = found.calibrator(str(calibrator_folder))
    return found


def written(playground, strength=2.0, **changes):
    live = LiveSettings(strength)
    return list(playground.write(request(**changes), lambda: live))


def test_both_texts_grow_token_by_token(playground):
    steps = written(playground)
    assert len(steps) == 8, "a note about loading, an empty text, then one step per token"
    assert 'role="status">Loading tiny with cal' in steps.pop(0)[1]
    for number, sides in enumerate(steps):
        for html in sides:
            assert f"{number} token{'s' * (number != 1)} " in html
            assert "She reads" in html
    assert "Without fusion" in steps[-1][0]
    assert "With fusion" in steps[-1][1]
    assert "tokens/s" in steps[-1][0]


def test_without_strength_both_texts_are_the_same(playground):
    base, fused = written(playground, 0.0)[-1]
    assert base.partition('class="prompt"')[2] == fused.partition('class="prompt"')[2]
    assert "<mark" not in base + fused


def test_models_are_loaded_once_and_on_demand(playground, monkeypatch):
    assert playground._models == {}
    playground.warm_up()
    assert list(playground._models) == ["tiny"]
    first = playground.processor("tiny", "cal", "contrast")
    assert playground.processor("tiny", "cal", "contrast") is first
    other = playground.processor("tiny", "cal", "product")
    assert (other.config.rule, other.config.strength) == ("product", 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "prompt 0 is empty"),
        ({"target": "/etc"}, "the model &#39;/etc&#39; was not offered: choose one of tiny, chat"),
        ({"calibrator": EVIL}, "the calibrator"),
        ({"rule": "none"}, "the rule &#39;none&#39; was not offered"),
        ({"form": "x"}, "the form &#39;x&#39; was not offered"),
        ({"form": CHAT}, "no chat template"),
        ({"rule": "aligned"}, "align"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
    ],
)
def test_mistakes_are_shown_on_the_page(playground, changes, message):
    (_, shown) = written(playground, **changes)[-1]
    assert 'role="alert"' in shown
    assert message in shown
    assert "<script" not in shown


def test_a_change_out_of_range_ends_with_a_message(playground):
    _, shown = written(playground, -1.0)[-1]
    assert "strength must be a number of at least 0" in shown


def side(fused):
    tokens = [
        StreamedToken(" bad", -1.5, " good" if fused else None, 2.0),
        StreamedToken(EVIL, 0.2, None, 2.0),
    ]
    return Side(fused, tokens, [1, 2], seconds=0.5, finished=True)


def score(words):
    return [float(word == "bad") for word in words]


def test_held_back_tokens_are_marked_and_offensive_words_blurred():
    base = side_html(side(fused=False), "You are", score)
    assert '<mark title="fusion would lower its log-prob by 1.5 nats">' in base
    assert '<span class="blur"> bad</span></mark>' in base
    assert base.count("<mark") == base.count("blur") == 1
    assert "2 tokens · 4.0 tokens/s · 1 that fusion would hold back · ended by the model" in base
    fused = side_html(side(fused=True), "You are", None)
    assert '<mark class="raised" title="instead of &#39;good&#39;">' in fused
    assert "1 changed · strength now 2.00" in fused
    assert "blur" not in fused


def test_no_text_becomes_markup_and_no_title_tells_an_offensive_word():
    replaced = Side(True, [StreamedToken(EVIL, 0.0, " bad", 2.0)], [1], seconds=1.0)
    html = side_html(replaced, EVIL + " bad", score)
    assert "<script" not in html
    assert "instead of" in html
    assert "instead of &#39;bad" not in html
    assert '<span class="blur">' in html.partition("</span></div>")[0]


def test_settings_of_the_page():
    assert live_settings({"strength": 2, "budget": 0}) == LiveSettings(2.0, None)
    assert live_settings({"strength": 2, "budget": 0.1}) == LiveSettings(2.0, 0.1)
    assert {form for form, _ in PRESETS.values()} == set(FORMS)
    assert is_local("127.0.0.1")
    assert not is_local("0.0.0.0")


def test_a_playground_needs_something_to_play_with():
    with pytest.raises(ConfigError, match="at least one target"):
        Playground([], ["cal"])
    with pytest.raises(ConfigError, match="are named 'a'"):
        Playground([Target("a", "x"), Target("a", "y")], ["cal"])


def test_the_command_explains_wrong_use(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FUSION_DETOX_CACHE", str(tmp_path))
    assert main(["playground", "--port", "0"]) == 1
    assert "--port must be a number from 1 to 65535" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["playground", "--no-browser"]) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert "Only the demo target is offered" in err
    assert "'gradio' is required but not installed" in err
    with pytest.raises(MissingExtraError, match="playground"):
        build_page(Playground([Target("a", "x")], ["cal"]))


SERVED = """
import socket, sys, urllib.request
from fusion_detox.errors import ConfigError
from fusion_detox.integrations.playground import Playground, Target, build_page, serve

playground = Playground([Target("tiny", sys.argv[1])], [sys.argv[2]], device="cpu", offline=True)
events = build_page(playground).config
sliders = {one["id"] for one in events["components"] if one["type"] == "slider"}
targets = lambda event: {found[0] for found in event["targets"]}
changes = [e for e in events["dependencies"] if targets(e) and targets(e) <= sliders]
print("QUEUED", [event["queue"] for event in changes])

def check(address):
    assert "torch" not in sys.modules, "the page opens before anything heavy is loaded"
    with urllib.request.urlopen(address, timeout=30) as answer:
        print("OPENED", address.rpartition(":")[0], answer.status)
    raise KeyboardInterrupt

try:
    serve(playground, opened=check)
except KeyboardInterrupt:
    pass
with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    try:
        serve(playground, port=taken.getsockname()[1])
    except ConfigError as error:
        print("REFUSED", error)
"""


@pytest.mark.slow
def test_the_page_opens_on_this_machine_only(target_folder, calibrator_folder, tmp_path):
    """Gradio leaves sockets and event loops behind, so this runs in a process of its own.

    The sliders' events must bypass the queue in which the text is being written.
    """
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("needs the extra playground")
    script = tmp_path / "served.py"
    script.write_text(SERVED)
    done = subprocess.run(
        [sys.executable, script, target_folder, calibrator_folder],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "QUEUED [False, False]" in done.stdout
    assert "OPENED http://127.0.0.1 200" in done.stdout
    assert "REFUSED the playground cannot listen on 127.0.0.1, port" in done.stdout


def test_the_status_tells_each_step_until_all_is_ready(playground):
    told = []
    follower = threading.Thread(target=lambda: told.extend(playground.status()))
    follower.start()
    playground.warm_up()
    follower.join(30)
    assert not follower.is_alive()
    assert told[-1] == '<p class="facts" role="status">Ready: tiny with cal.</p>'
    assert list(playground.status()) == told[-1:], "a page opened later shows that all is ready"


def test_the_status_tells_why_the_defaults_cannot_be_loaded(playground, monkeypatch):
    monkeypatch.setattr(playground, "targets", {EVIL: "/nowhere/at/all"})
    with pytest.raises(FusionDetoxError):
        playground.warm_up()
    (told,) = playground.status()
    assert "The defaults cannot be loaded: " in told
    assert "/nowhere/at/all" in told
    assert "<script" not in told


@pytest.mark.parametrize("host", ["203.0.113.1", "no.such.host.invalid"])
def test_an_address_of_another_machine_is_refused_at_once(host):
    with pytest.raises(ConfigError, match=f"cannot listen on {host}, port 7999 .*--host"):
        _check_address(host, 7999)


def test_a_port_in_use_is_refused_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} .*--port"):
            _check_address("127.0.0.1", port)
    _check_address("127.0.0.1", None)
