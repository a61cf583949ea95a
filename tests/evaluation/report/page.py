"""A report as a reader and as a browser see it."""

import base64
import re
from html.parser import HTMLParser

VOID = {"br", "col", "hr", "img", "input", "link", "meta"}


class Page(HTMLParser):
    """A strictly parsed page: tags nest, ids are unique, and every reference has a target.

    ``text`` is what a reader sees; ``scripts`` and ``elements`` are what a browser acts on.
    """

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.ids, self.scripts = [], [], [], []
        self.seen, self.references = [], []
        self.feed(source)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        assert len(self.ids) == len(set(self.ids)), "an id occurs twice"
        missing = set(self.references) - set(self.ids)
        assert not missing, f"nothing has the ids {missing}"

    def handle_starttag(self, name, attributes):
        assert len(attributes) == len(dict(attributes)), f"a repeated attribute in <{name}>"
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


def summary(path):
    """The sentences of the summary, each preceded by its state."""
    source = path.read_text(encoding="utf-8")
    start = source.index('id="summary"')
    part = source[start : source.index("</section>", start)]
    found = re.findall(r"<(?:p|li)>.*?</(?:p|li)>", part, re.DOTALL)
    return [Page(one).text.replace("\u202f", " ") for one in found]


def sentence(path, *parts):
    """The only sentence of the summary that contains all the parts."""
    found = [line for line in summary(path) if all(part in line for part in parts)]
    assert len(found) == 1, (parts, summary(path))
    return found[0]


def plots(page):
    """The plots of a page as SVG documents."""
    images = [found["src"].partition("base64,")[2] for found in page.all("img")]
    return [base64.b64decode(image).decode() for image in images]
