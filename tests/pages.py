"""A reader of HTML pages that fails where tags do not match."""

from __future__ import annotations

from html.parser import HTMLParser
from types import SimpleNamespace

VOID = {"meta", "link", "img"}  # of those the page uses


class Tree(HTMLParser):
    """Elements of a page in order: tag, attributes, text inside; fails on tags that do not match."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[SimpleNamespace] = []
        self.elements: list[SimpleNamespace] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        element = SimpleNamespace(tag=tag, attrs=dict(attrs), text="", inside=[e.tag for e in self.open])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1].tag == tag, f"</{tag}> closes {[e.tag for e in self.open]}"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element.text += data

    def all(self, tag, **attrs):
        return [e for e in self.elements if e.tag == tag and all(e.attrs.get(k) == v for k, v in attrs.items())]

    def table(self, name: str) -> list[list[str]]:
        """Texts of the cells of the first table of that class, line by line."""
        start = next(i for i, e in enumerate(self.elements) if e.tag == "table" and e.attrs.get("class") == name)
        lines: list[list[str]] = []
        for element in self.elements[start + 1 :]:
            if "table" not in element.inside:
                break
            if element.tag == "tr":
                lines.append([])
            elif element.tag in ("th", "td"):
                lines[-1].append(element.text)
        return lines
