"""Plain text out of HTML, man pages, Perl's POD and wikitext."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

_SKIPPED = {"script", "style", "head", "nav", "svg"}
_NEW_PARAGRAPH = {"p", "h1", "h2", "h3", "pre", "section", "title"}
_NEW_LINE = {
    "br", "dd", "div", "dt", "h4", "h5", "item", "li", "media", "note", "ol", "page", "table",
    "tr", "ul",
}  # fmt: skip
_BLOCK = _NEW_PARAGRAPH | _NEW_LINE


class _Text(HTMLParser):
    """Collects the text of a page; block elements begin and end lines."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipped = 0
        self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipped += tag in _SKIPPED
        self._verbatim += tag == "pre"
        if tag in _BLOCK:
            self.parts.append("\n\n" if tag in _NEW_PARAGRAPH else "\n")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCK:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _SKIPPED and self._skipped:
            self._skipped -= 1
        if tag == "pre" and self._verbatim:
            self._verbatim -= 1
        if tag in _BLOCK:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(data if self._verbatim else re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    """Return the text of an HTML or Mallard page; indents are kept where it has a `<pre`."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    around = r"[ \t]+\n" if "<pre" in page else r"[ \t]*\n[ \t]*"
    return re.sub(around, "\n", "".join(parser.parts))


_COMMENTS = ('.\\"', "'\\\"", '\\"')
_TITLES = (".TH ", ".Dd", ".Dt", ".Os")
_NO_TEXT = re.compile(r"[.'](de|ie|el|if|ds|nr|so|ad|hy|nh|ss|TS|TE|\.)\b")
_MACRO = re.compile(r"[.'] ?(\w+) ?(.*)")
_HEADINGS = ("SH", "SS", "Sh", "Ss")
_BREAKS = ("PP", "P", "LP", "IP", "TP", "br", "sp", "Pp")
_FONT_PAIRS = ("BR", "IR", "RB", "RI", "BI", "IB")
_ESCAPES = (
    (r"\-", "-"), (r"\(bu", "*"), (r"\(aq", "'"), (r"\(dq", '"'), (r"\(lq", '"'), (r"\(rq", '"'),
    (r"\(em", "--"), (r"\(en", "-"), (r"\(ti", "~"), (r"\(ha", "^"), (r"\e", "\\"), (r"\&", ""),
    (r"\ ", " "), (r"\|", ""), (r"\/", ""), (r"\,", ""),
)  # fmt: skip


def man_text(page: str) -> str:
    """Return the text of a manual page; of macros that it does not know, the arguments."""
    lines: list[str] = []
    for line in page.split("\n"):
        if line.startswith(_COMMENTS + _TITLES) or _NO_TEXT.match(line):
            continue
        macro = _MACRO.match(line)
        if not macro:
            lines.append(line)
            continue
        name, words = macro[1], macro[2].replace('" "', " ").replace('"', "")
        if name in _HEADINGS:
            lines += ["", words]
        elif name in _BREAKS:
            lines += ["", words] if words and name == "IP" else [""]
        elif name in _FONT_PAIRS:
            lines.append(words.replace(" ", ""))
        elif words:
            lines.append(words)
    text = re.sub(r"\\f(\(..|\[[^]]*\]|.)", "", "\n".join(lines))  # fonts
    text = re.sub(r"\\s[-+]?\d", "", text)  # sizes
    for escape, plain in _ESCAPES:
        text = text.replace(escape, plain)
    return re.sub(r"\\\[u([0-9A-F]{4,5})\]", lambda code: chr(int(code[1], 16)), text)


def pod_text(page: str) -> str:
    """Return the text of a page of Perl's documentation."""
    page = re.sub(r"(?m)^=(head\d|item|over|back|cut|pod|for|begin|end|encoding)\b[ \t]*", "", page)
    return re.sub(r"[A-Z]<{1,3} ?([^<>]*?) ?>{1,3}", r"\1", page)


_WIKI_TAIL = re.compile(r"\n== *(?:References|External links|See also|Notes|Further reading)")


def wiki_text(page: str) -> str:
    """Return the text of an article as it stands, escaped, in a dump; without tables and notes."""
    text = html.unescape(html.unescape(page))
    text = re.sub(
        r"(?s)<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<math>.*?</math>|<gallery.*?</gallery>", "", text
    )
    for _ in range(6):  # templates, from the inside
        text = re.sub(r"\{\{[^{}]*\}\}", "", text)
    text = re.sub(r"(?s)\{\|.*?\|\}", "", text)
    for _ in range(3):
        text = re.sub(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\[\]]*\|)?([^|\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    return _WIKI_TAIL.split(re.sub(r"'{2,}|<[^>]+>", "", text))[0]
