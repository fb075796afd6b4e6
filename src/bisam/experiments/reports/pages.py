"""Pages: a report as one self-contained HTML file, converted from its Markdown.

HTML in the Markdown is shown as text. Figures are part of the page and have its colours, light or dark; other images
are embedded, and the content security policy forbids loading anything else. A table or figure that is wider than the
screen scrolls in its own box.
"""

from __future__ import annotations

import itertools
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from html import escape
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from bisam.experiments.reports.svg import LIGHTER, inline


def html(markdown: str, pictures: Mapping[str, bytes]) -> str:
    """A self-contained page for light and dark mode and small screens.

    A click on a header sorts a table, and a mouse or a finger on a point of a figure shows its values.

    Args:
        markdown: of the report; its first line is the title.
        pictures: PNG content, or SVG as matplotlib writes it, by the file name in the Markdown; images without content
            are replaced by their captions.
    """
    # Names from run folders reach the Markdown escaped; had they not been, they would be no HTML all the same.
    parser, count = MarkdownIt("commonmark", {"html": False}).enable("table"), itertools.count()

    def image(_self: Any, tokens: Sequence[Token], index: int, *_: Any) -> str:
        what, content = escape(tokens[index].content), pictures.get(str(tokens[index].attrs["src"]))
        if content is None:
            return what
        if content.startswith(b"\x89PNG"):
            shown = f'<img src="data:image/png;base64,{b64encode(content).decode()}" alt="{what}">'
        else:
            shown = inline(content.decode(), f"f{next(count)}-", tokens[index].content)
        return f'<span class="wide figure">{shown}</span><small>{what}</small>'

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
    style = _STYLE.replace("LIGHTER", "; ".join(f"--c{dark[1:]}: {light}" for dark, light in LIGHTER.items()))
    return _PAGE.format(title=title, style=style, script=_SCRIPT, policy=_POLICY, body=parser.render(markdown))


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #d5d5d5; --shade: #f3f3f3; --link: #0072b2;
  --grid: #b0b0b0 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --paper: #161616; --line: #3d3d3d; --shade: #232323; --link: #56b4e9; --grid: #8a8a8a;
    LIGHTER }
}
body { font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 80rem; margin: 0 auto; padding: 1rem }
h1, h2 { line-height: 1.25; overflow-wrap: anywhere }
p, ul, ol { max-width: 48rem; overflow-wrap: anywhere }
h1 + p { font-size: 1.15rem; border-left: .3rem solid var(--link); padding-left: .9rem }
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
p:has(.figure) { max-width: none }
.figure { display: block }
.figure img, .figure svg { display: block; height: auto; max-width: 100%; min-width: min(36rem, 100%) }
.figure img { background: #fff; border-radius: .3rem }
.figure svg { min-width: 36rem; fill: var(--ink); stroke-linejoin: round;
  font-family: "DejaVu Sans", "Bitstream Vera Sans", Verdana, sans-serif }
.hover { cursor: help }
.tip { position: fixed; z-index: 1; max-width: min(20rem, 90vw); max-height: 60vh; overflow: hidden;
  padding: .4rem .6rem; font-size: .85rem; line-height: 1.35; white-space: pre-line; pointer-events: none;
  color: var(--ink); background: var(--shade); border: 1px solid var(--line); border-radius: .3rem }
@media print { .tip { display: none } }
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

const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);
for (const spot of document.querySelectorAll(".hover")) {
  const title = spot.querySelector("title");
  spot.setAttribute("aria-label", title.textContent);
  title.remove();
}
document.addEventListener("pointerover", event => {
  const spot = event.target.closest(".hover");
  tip.hidden = !spot;
  if (!spot) return;
  tip.textContent = spot.getAttribute("aria-label");
  const x = event.clientX + 14, y = event.clientY + 14;
  tip.style.left = Math.max(0, Math.min(x, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = Math.max(0, y + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 28 : y) + "px";
});
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
