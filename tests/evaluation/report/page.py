"""A report as a reader and as a browser see it."""

import re
from html.parser import HTMLParser

from fusion_detox.evaluation.report import headline
from fusion_detox.evaluation.report.reading import Run

VOID = {"br", "col", "hr", "img", "input", "link", "meta"}


class Page(HTMLParser):
    """A page read strictly: every tag closed in its order, ids unique, references to what is there.

    ``text`` is what a reader sees, ``scripts`` and ``elements`` what a browser acts on.
    """

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.ids, self.scripts = [], [], [], []
        self.seen, self.references = [], []
        self.feed(source)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        assert len(self.ids) == len(set(self.ids)), "an id is used twice"
        missing = set(self.references) - set(self.ids)
        assert not missing, f"nothing has the ids {missing}"

    def handle_starttag(self, name, attributes):
        assert len(attributes) == len(dict(attributes)), f"an attribute twice in <{name}>"
        found = dict(attributes)
        self.elements.append((name, found))
        if "id" in found:
            self.ids.append(found["id"])
        for key in ("aria-labelledby", "aria-controls", "aria-describedby"):
            self.references += (found.get(key) or "").split()
        for value in found.values():
            self.references += re.findall(r"url\(#([^)]*)\)", value or "")
        if (found.get("href") or "").startswith("#"):
            self.references.append(found["href"][1:])
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.handle_starttag(name, attributes)
        if name not in VOID:
            self.open.pop()

    def handle_endtag(self, name):
        assert self.open, f"</{name}> closes nothing"
        assert self.open[-1] == name, f"</{name}> inside <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.seen.append(data)

    @property
    def text(self):
        return " ".join("".join(self.seen).split())

    def all(self, name, **attributes):
        wanted = {key.replace("_", "-").rstrip("-"): value for key, value in attributes.items()}
        return [f for n, f in self.elements if n == name and wanted.items() <= f.items()]


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def said(document):
    """The headline as text: its title, and each sentence with its tone."""
    run = Run(document)
    lines = [(Page(s.text).text, s.tone) for s in headline.statements(run)]
    return headline.title(run), lines


def sentence(document, *parts):
    found = [line for line in said(document)[1] if all(part in line[0] for part in parts)]
    assert len(found) == 1, (parts, said(document))
    return found[0]
