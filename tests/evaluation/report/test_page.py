"""The page is well-formed, loads nothing from elsewhere, and withstands any text in the data."""

import base64
import copy
import hashlib
import re
import subprocess
import sys
from itertools import pairwise
from xml.etree import ElementTree

from fusion_detox.evaluation.report import write_report

from .documents import measure, results
from .page import plots, read

EVIL = "</script></style></title><script>alert(1)</script><img src=https://evil.example/x>\"'&amp;"


def test_page_is_well_formed_and_navigable(written):
    page = read(written / "report.html")
    assert [f["lang"] for f in page.all("html")] == ["en"]
    assert len(page.all("h1")) == len(page.all("main")) == 1
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    linked = {f["href"] for f in page.all("a")}
    sections = {f"#{f['aria-labelledby']}" for f in page.all("section") if "aria-labelledby" in f}
    assert len(sections) == 11
    assert sections <= linked
    images = page.all("img")
    assert len(images) == 2 + 2 + 2  # trade-off and histogram per scorer, groups per suite
    assert all(image["alt"] for image in images)
    assert all(figure["aria-label"] for figure in page.all("figure"))
    for header in page.all("th"):
        assert header["scope"] in {"col", "row", "colgroup", "rowgroup"}
    regions = page.all("div", class_="scroll")
    assert len(regions) == len(page.all("table"))
    assert all(region["tabindex"] == "0" and region["role"] == "region" for region in regions)


def test_the_header_answers_the_main_questions(written):
    """Before the contents, so that a phone shows them first."""
    source = (written / "report.html").read_text("utf-8")
    header = source[source.index("<header>") : source.index("</header>")]
    text = re.sub(r"<[^>]+>", "", header).replace("\u202f", " ")
    told = " ".join(text.split())
    assert "Toxic prompts: 11.2 % [10.3 to 12.1] with fusion, 64.0 % [58.9 to 69.1]" in told
    assert "without (lower). Perplexity changes by +10 % [+9 to +11]." in told
    assert "Groups whose text suffers more than its control: 4 of 8." in told
    assert "797 prompts, 2 scorers, on demo_target." in told


def test_descriptions_of_plots_contain_their_numbers(written):
    described = " ".join(image["alt"] for image in read(written / "report.html").all("img"))
    described = described.replace("\u202f", " ")
    assert "target alone: 64 % of prompts toxic at perplexity 114;" in described
    assert "gay people, fusion: 1.04;" in described


def test_nothing_is_loaded_and_no_foreign_script_runs(written):
    page = read(written / "report.html")
    assert len(page.scripts) == 1
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    (policy,) = page.all("meta", http_equiv="Content-Security-Policy")
    assert policy["content"].split("; ") == [
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{digest}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    nothing_loaded(page, (written / "report.html").read_text(encoding="utf-8"))


def nothing_loaded(page, source):
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {
        name for name, _ in page.elements
    }
    for name, found in page.elements:
        assert not {"srcset", "action", "xlink:href"} & set(found), name
        assert name == "img" or "src" not in found
        assert found.get("src", "data:image/svg+xml;base64,").startswith("data:image/svg+xml;")
        assert not [key for key in found if key.startswith("on")], name
        assert (found.get("href") or "#").startswith("#"), name
        assert "url(" not in (found.get("style") or ""), name
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    for plot in plots(page):
        elements = ElementTree.fromstring(plot[plot.index("<svg") :]).iter()
        names = {element.tag.rpartition("}")[2] for element in elements}
        assert not {"script", "image", "foreignObject", "a"} & names
        links = re.findall(r'(?:href="|url\()([^")]*)', plot)
        assert all(link.startswith("#") for link in links)


def poisoned(value):
    """A document in which every text, including names, contains markup that tries to break out."""
    if isinstance(value, dict):
        return {key: poisoned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    if isinstance(value, str) and value not in ("base", "fusion", "wordfilter", "lexical"):
        return EVIL + value
    return value


def test_no_text_of_the_data_becomes_markup(tmp_path, written):
    document = poisoned(results())
    swap = EVIL + " scorer"
    for block in (document["scorers"], *(s["toxicity"] for s in document["settings"])):
        block[swap] = block.pop("contextual")
    for item in document["settings"]:
        item["toxicity"]["lexical"][EVIL] = measure(0.3)
        item["by_prompts"] = {EVIL + key: value for key, value in item["by_prompts"].items()}
    document["examples"] = {EVIL + key: value for key, value in document["examples"].items()}
    document["versions"][EVIL] = EVIL
    path = write_report(document, tmp_path)
    source = path.read_text(encoding="utf-8")
    page = read(path)
    assert page.scripts == read(written / "report.html").scripts
    nothing_loaded(page, source)
    assert page.text.count("<script>alert(1)</script>") > 100
    assert source.count("</script>") == 1


def test_surrogates_and_control_characters_can_be_written(tmp_path, undrawn):
    document = results(name="a\ud800b\x00c\x1b")
    document["examples"]["default"]["best"][0]["fused"] = "x\udfff\x07y"
    text = read(write_report(document, tmp_path)).text
    assert "a\ufffdb\ufffdc\ufffd" in text
    assert "x\ufffd\ufffdy" in text


def test_the_same_results_give_the_same_bytes_in_any_style(tmp_path, written):
    import matplotlib

    with matplotlib.rc_context({"xtick.direction": "in", "axes.labelpad": 20, "font.size": 3}):
        before = dict(matplotlib.rcParams)
        write_report(copy.deepcopy(results()), tmp_path)
        assert dict(matplotlib.rcParams) == before
    for name in ("report.html", "report.png"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.png"]


def test_pairs_are_hidden_until_opened(written):
    page = read(written / "report.html")
    switches = page.all("button", role="switch")
    assert [s["aria-checked"] for s in switches] == ["false"]
    buttons = [f for f in page.all("button") if "aria-controls" in f]
    veils = [f["id"] for f in page.all("div", class_="veil")]
    assert len(veils) == 20 + 4
    assert [f["aria-controls"] for f in buttons] == veils
    assert {f["aria-expanded"] for f in buttons} == {"false"}
    assert all(f["type"] == "button" for f in page.all("button"))
    assert len([f for f in page.all("dl") if "inert" in f]) == len(veils)
    assert "Content warning." in page.text


def test_conditions_are_stated_in_full(written):
    page = read(written / "report.html").text.replace("\u202f", " ")
    for stated in (
        "demo_target, 7.2 M parameters, vocabulary of 12,288, float32 c839a3106138",
        "english-16k 580269307d32 (vocabulary map: projection, 100.0 % covered)",
        "max new tokens 20, temperature 1, top p 0.9, top k 0, greedy no, samples 5",
        "Seeds1",
        "rtp-challenging597 prompts from rtp_challenging.jsonl 06882a2549d78b8e",
        "human labels 0.9498",
        "3 prompts could not be scored",
        "fusion-detox evaluate examples/demo_target/model english-16k --samples 5",
    ):
        assert stated in page, stated


def test_importing_the_report_is_light():
    code = (
        "import sys, fusion_detox.evaluation.report; "
        "print(sorted({'matplotlib', 'numpy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
