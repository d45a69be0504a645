"""What a test reads in a page, by the standard library's parser."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
from PIL import Image


class Page(HTMLParser):
    """Text of the cells of all tables, all text, and everything the page loads.

    Attributes:
        rows: the cells of every table's rows.
        lines: the items of lists.
        text: all of the text.
        loaded: values of ``src`` and ``href``.
        captions: those of pictures.
    """

    def __init__(self, text):
        super().__init__()
        self.rows, self.loaded, self.tags, self.in_cell = [], [], [], False
        self.lines, self.captions, self.text, self._open = [], [], "", []
        self.source = text
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._open.append(tag)
        self.loaded += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True
        if tag == "li":
            self.lines.append("")
        if tag == "figcaption":
            self.captions.append("")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data.strip()
        if "li" in self._open:
            self.lines[-1] += data.strip()
        if "figcaption" in self._open:
            self.captions[-1] += data

    @property
    def is_self_contained(self):
        return all(value.startswith(("data:", "#")) for value in self.loaded)

    @property
    def pictures(self):
        """The embedded pictures, ``(H, W, 3)`` uint8."""
        encoded = [v.partition(",")[2] for v in self.loaded if v.startswith("data:image/jpeg")]
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(e)))) for e in encoded]

    def row(self, name):
        """The cells after the first one of the row that begins with a name."""
        (found,) = [row[1:] for row in self.rows if row and row[0] == name]
        return found
