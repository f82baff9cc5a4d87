"""A page as its elements, and the check that it opens offline."""

from html.parser import HTMLParser

VOID = {"meta", "path", "polyline", "polygon", "circle"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; every tag must be closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def headings(self, tag="h2"):
        return [text for where, text in self.texts if where == tag]

    def all_text(self):
        return " ".join(text for _, text in self.texts)


def offline(page):
    """Nothing is loaded and nothing runs."""
    names = {name for name, _ in page.attributes}
    assert not {n for n in names if n.startswith("on")} and "src" not in names
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    loading = {"script", "link", "img", "iframe", "object", "embed", "image", "use", "base"}
    assert not loading & set(page.seen)
    style = "".join(text for where, text in page.texts if where == "style")
    assert "url(" not in style and "@import" not in style
