"""Pages: a report as one self-contained HTML file, converted from its Markdown.

HTML in the Markdown is shown as text. Images are embedded, and the content security policy forbids loading anything
else.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from html import escape
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token


def html(markdown: str, pictures: Mapping[str, bytes]) -> str:
    """A self-contained page for light and dark mode and small screens; a click on a header sorts a table.

    Args:
        markdown: of the report; its first line is the title.
        pictures: PNG or SVG content by file name; images without content are replaced by their captions.
    """
    # Names from run folders reach the Markdown escaped; had they not been, they would be no HTML all the same.
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(_self: Any, tokens: Sequence[Token], index: int, *_: Any) -> str:
        what, content = escape(tokens[index].content), pictures.get(str(tokens[index].attrs["src"]))
        if content is None:
            return what
        kind, data = "png" if content.startswith(b"\x89PNG") else "svg+xml", b64encode(content).decode()
        return f'<img src="data:image/{kind};base64,{data}" alt="{what}"><small>{what}</small>'

    def link(self: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
        href = str(tokens[index].attrs["href"])
        if ":" not in href:  # a report beside this one, which has a page too
            tokens[index].attrs["href"] = href.removesuffix(".md") + ".html" * href.endswith(".md")
        return self.renderToken(tokens, index, options, env)

    parser.add_render_rule("image", image)
    parser.add_render_rule("link_open", link)
    parser.add_render_rule("table_open", lambda *_: '<div class="wide"><table>')
    parser.add_render_rule("table_close", lambda *_: "</table></div>")
    title = escape(markdown.splitlines()[0].removeprefix("# "))
    return _PAGE.format(title=title, style=_STYLE, script=_SCRIPT, policy=_POLICY, body=parser.render(markdown))


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #d5d5d5; --shade: #f3f3f3; --link: #0072b2 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --paper: #161616; --line: #3d3d3d; --shade: #232323; --link: #56b4e9 }
}
body { font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 80rem; margin: 0 auto; padding: 1rem }
p { max-width: 48rem; overflow-wrap: anywhere }
a { color: var(--link) }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; width: max-content; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  max-width: 20rem; overflow-wrap: anywhere }
tr { background: var(--paper) }
tbody tr:nth-child(even) { background: var(--shade) }
th:first-child, td:first-child { position: sticky; left: 0; background: inherit }
@media (max-width: 40rem) {
  th, td { padding: .3rem .4rem }
  th:first-child, td:first-child { max-width: 9rem }
}
th button { font: inherit; font-weight: bold; color: inherit; background: none; border: 0; padding: 0; cursor: pointer }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
p:has(img) { max-width: none }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: .3rem }
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const number = text => parseFloat(text.replace("\\u2212", "-").replace(/[^0-9.+-]*/, ""));
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const up = head.getAttribute("aria-sort") !== "ascending", sign = up ? 1 : -1;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const text = row => row.cells[i].textContent;
      const numbers = [...body.rows].every(row => /^((< )?[+\\u2212-]?[0-9]|\\u2013)/.test(text(row)));
      const less = (a, b) => {
        if (!numbers) return sign * text(a).localeCompare(text(b));
        const [x, y] = [a, b].map(row => number(text(row)));
        return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : sign * (x - y);
      };
      body.append(...[...body.rows].sort(less));
    };
  });
}
"""

_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{b64encode(sha256(_SCRIPT.encode()).digest()).decode()}'"
)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}<script>{script}</script>
</body>
</html>
"""
