"""The page of an explanation: complete, self-contained, and offensive words only on request."""

import base64
import hashlib
import json
import math
import os
import shutil
import subprocess

import pytest

from fusion_detox.errors import ConfigError
from fusion_detox.evaluation.report import write_explanation
from fusion_detox.evaluation.report.explanation import in_words, plots
from fusion_detox.generation.explain import Step, TokenChange
from fusion_detox.generation.explanation import Candidate, ExplainedToken, Explanation

from .page import read

EVIL = "</script><script>alert(1)</script><img src=https://evil.example/x>\"'&amp;\x1b[2J\ud800"


def score(words):
    return [1.0 if word in ("bad", "badly") else 0.0 for word in words]


def token(text, before, after, **more):
    change = TokenChange(7, math.log(before), math.log(after) if after else -math.inf)
    values = {"strength": 1.5, "divergence": 0.05, "open_word": "", "healed": None, **more}
    options = (Candidate(text, change), Candidate("ly", change))
    step = Step(change, (), (), 0.25)
    return ExplainedToken(text, step, options, options, **values)


def explanation(*tokens, **more):
    values = {
        "model": "a model",
        "calibrator": "tiny",
        "config": {"rule": "contrast", "strength": 2.0},
        "prompt": "You are a bad",
        "chat": False,
        "system": None,
        "source": "given",
        "prompt_tokens": ("You", " are", " a", " bad"),
        "calibrator_tokens": ("You", " are a", " bad", " b", "ad"),
        **more,
    }
    return Explanation(tokens=tokens, **values)


TOKENS = (
    token(" b", 0.5, 0.1),
    token("ad", 0.2, 0.0, healed=((" b",), (" bad",)), open_word=" b"),
    token(" day", 0.1, 0.4),
)


@pytest.fixture
def page(tmp_path):
    return read(write_explanation(explanation(*TOKENS), tmp_path / "page.html", score=score))


def test_the_page_is_well_formed_and_loads_nothing(page):
    assert len(page.all("h1")) == len(page.all("main")) == len(page.scripts) == 1
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    (policy,) = page.all("meta", http_equiv="Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}'" in policy["content"]
    assert not [f for name, f in page.elements if "src" in f or "http" in (f.get("href") or "")]


def test_every_token_links_to_its_step(page):
    assert [f["href"] for f in page.all("a") if "token" in (f.get("class") or "")] == [
        "#step-1",
        "#step-2",
        "#step-3",
    ]
    titles = [f["title"] for f in page.all("a") if "title" in f]
    assert titles[0].startswith("5.00 times less likely, 50")
    assert titles[1].startswith("made impossible")
    assert titles[2].startswith("4.00 times more likely")


def test_offensive_words_are_hidden_until_asked_for(page):
    """Also a word of several tokens, an alternative that completes one, and the prompt."""
    buttons = page.all("span", class_="blur")
    hidden = {f["data-word"] for f in buttons}
    assert {"bad", "b", "ad", "ly"} <= hidden
    assert len(page.all("span", class_="word", hidden=None)) == len(buttons)
    assert "day" not in hidden
    assert all(f["aria-hidden"] == "true" for f in buttons)


def test_the_json_beside_it_holds_the_explanation(tmp_path):
    path = write_explanation(explanation(*TOKENS), tmp_path / "new" / "page.html", score=score)
    values = json.loads(path.with_suffix(".json").read_text("utf-8"))
    assert values == json.loads(json.dumps(explanation(*TOKENS).to_dict()))
    assert values["tokens"][1]["change"] is None


def test_no_text_becomes_markup(tmp_path):
    found = explanation(
        token(EVIL, 0.5, 0.5, open_word=EVIL, healed=((EVIL,), (EVIL,))),
        **dict.fromkeys(("model", "calibrator", "prompt"), EVIL),
        prompt_tokens=(EVIL,),
        calibrator_tokens=(EVIL,),
        config={"rule": EVIL, "strength": 1.0},
        chat=True,
        system=EVIL,
    )
    page = read(write_explanation(found, tmp_path / "page.html", score=score))
    assert len(page.scripts) == 1
    assert not page.all("img")
    assert "\x1b" not in page.text


def test_plots_draw_each_step_to_scale():
    change, strength, kl, divergence = plots(explanation(*TOKENS))
    assert [len(plot.bars) for plot in (change, strength, kl, divergence)] == [3] * 4
    lower, impossible, higher = change.bars
    assert lower.y == impossible.y == change.zero
    assert higher.y + higher.height == pytest.approx(change.zero, abs=0.02)
    assert lower.height / higher.height == pytest.approx(math.log(5) / math.log(4), abs=0.01)
    assert change.description.endswith("−1.61, −9.00, 1.39.")
    assert len(plots(explanation(token("x", 0.5, 0.5, divergence=None)))) == 3


def test_changes_in_words():
    def told(before, after):
        return in_words(TokenChange(0, math.log(before), math.log(after)))

    assert told(0.5, 0.5) == "unchanged"
    assert told(0.5, 0.25) == "2.00 times less likely"
    assert told(0.01, 0.5) == "50 times more likely"
    assert in_words(TokenChange(0, -math.inf, -math.inf)) == "unchanged"


def test_the_page_is_html(tmp_path):
    with pytest.raises(ConfigError, match=r"give a name that ends in \.html"):
        write_explanation(explanation(*TOKENS), tmp_path / "page.json", score=score)


KEYBOARD = """
<script>
addEventListener("load", () => {
  const out = {};
  const button = document.querySelector(".text .veiled button");
  out.focusable = button.tabIndex === 0;
  button.focus();
  button.click();
  out.focus = document.activeElement.textContent;
  out.hidden = button.hidden;
  const all = document.getElementById("show-all");
  all.click();
  out.all = [all.getAttribute("aria-checked"), document.querySelectorAll(".word[hidden]").length];
  location.hash = "#step-3";
  setTimeout(() => {
    out.open = document.querySelector("#step-3 details").open;
    out.step = document.activeElement.id;
    document.body.dataset.out = JSON.stringify(out);
  }, 200);
});
</script>
"""


def test_a_browser_shows_words_and_steps_on_request(tmp_path):
    """A button takes the keyboard's focus, and passes it on to the word that it shows."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if browser is None:
        pytest.skip("needs Chromium on the PATH")
    path = write_explanation(explanation(*TOKENS), tmp_path / "page.html", score=score)
    source = path.read_text("utf-8")
    policy = source[source.index("<meta http-equiv") : source.index('<meta name="viewport"')]
    path.write_text(source.replace(policy, "").replace("</body>", KEYBOARD + "</body>"), "utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=3000", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(tmp_path)},
        check=True,
    )
    start = done.stdout.index('data-out="') + len('data-out="')
    out = json.loads(done.stdout[start : done.stdout.index('"', start)].replace("&quot;", '"'))
    assert out.pop("focus").strip() == "bad"
    assert out == {
        "focusable": True,
        "hidden": True,
        "all": ["true", 0],
        "open": True,
        "step": "step-3",
    }
