"""What HTML pages load, for tests that they stand alone."""

from __future__ import annotations

from html.parser import HTMLParser


class Loads(HTMLParser):
    """Everything that a browser would fetch, the text, and the number of images in SVG."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str | None] = []
        self.text, self.images = "", 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.images += tag == "image"
        for name, value in attributes:
            if name in ("src", "href", "srcset", "poster", "data", "action", "xlink:href"):
                self.found.append(value)
        if tag in ("script", "link", "iframe", "object"):
            self.found.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data
