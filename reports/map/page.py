"""Maps as pictures, and as interactive pages."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from esm_packed.reports.map.figure import Map, draw
from esm_packed.reports.page import figure_style, page_html, write_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".html")

_BODY = """\
<p>Hover over or tap a point to see its protein, or search: <input id="query" type="search"
placeholder="ID or part of it" autocomplete="off"> <span id="found"></span></p>
<div id="map"><img alt="{caption}" src="{source}"><div id="mark"></div><div id="tip"></div></div>
<style>
#map {{ position: relative; width: min(100%, 48rem) }} #map img {{ display: block; width: 100% }}
#mark, #tip {{ position: absolute; display: none; pointer-events: none }}
#mark {{ width: 14px; height: 14px; margin: -9px; border: 2px solid #000; border-radius: 50% }}
#tip {{ background: #fff; border: 1px solid #888; border-radius: 4px; padding: 2px 8px; white-space: pre;
  max-width: 60%; overflow: hidden; text-overflow: ellipsis }}
</style>
<script>
const ids = {ids}, notes = {notes}, xs = {xs}, ys = {ys};
const [map, mark, tip, query, found] = ["map", "mark", "tip", "query", "found"].map(
  name => document.getElementById(name));
function show(point) {{
  mark.style.display = tip.style.display = point < 0 ? "none" : "block";
  if (point < 0) return;
  tip.textContent = ids[point] + (notes[point] ? "\\n" + notes[point] : "");
  const isRight = xs[point] > 0.6;
  for (const item of [mark, tip]) item.style.top = 100 * ys[point] + "%";
  mark.style.left = 100 * xs[point] + "%";
  tip.style.left = isRight ? "auto" : `calc(${{100 * xs[point]}}% + 14px)`;
  tip.style.right = isRight ? `calc(${{100 * (1 - xs[point])}}% + 14px)` : "auto";
}}
for (const kind of ["pointermove", "pointerdown"]) map.addEventListener(kind, event => {{
  const box = map.getBoundingClientRect();
  const x = event.clientX - box.left, y = event.clientY - box.top;
  let nearest = -1, least = 15 ** 2;
  for (let point = 0; point < ids.length; point++) {{
    const distance = (xs[point] * box.width - x) ** 2 + (ys[point] * box.height - y) ** 2;
    if (distance < least) [nearest, least] = [point, distance];
  }}
  show(nearest);
}});
query.addEventListener("input", () => {{
  const text = query.value.trim().toLowerCase();
  const matches = text ? ids.flatMap((id, point) => id.toLowerCase().includes(text) ? [point] : []) : [];
  const exact = matches.find(point => ids[point].toLowerCase() === text);
  show(exact ?? matches[0] ?? -1);
  found.textContent = text ? `${{matches.length.toLocaleString("en")}} found` : "";
}});
</script>"""


def write_map(drawn: Map, path: Path, suffix: str, notes: Sequence[str]) -> None:
    """Write a map.

    Args:
        drawn: the map.
        path: file to write.
        suffix: the format, one of `SUFFIXES`.
        notes: (n,) text that an HTML page shows below the ID of a point, may be empty.

    Raises:
        OSError: the file cannot be written.
    """
    with figure_style():
        figure = draw(drawn)
        if suffix == ".html":
            path.write_text(_page(drawn, figure, notes), encoding="utf-8")
        else:
            write_picture(figure, path, suffix)


def _page(drawn: Map, figure: Figure, notes: Sequence[str]) -> str:
    picture = io.BytesIO()
    write_picture(figure, picture, ".svg")
    source = base64.b64encode(picture.getvalue()).decode()
    # positions in the laid-out picture, as fractions of its size
    places = figure.axes[0].transData.transform(drawn.points) / (figure.bbox.width, figure.bbox.height)
    body = _BODY.format(
        caption=html.escape(drawn.title),
        source=f"data:image/svg+xml;base64,{source}",
        ids=_script(drawn.ids),
        notes=_script(notes),
        xs=_script(np.round(places[:, 0], 5).tolist()),
        ys=_script(np.round(1 - places[:, 1], 5).tolist()),
    )
    return page_html(drawn.title, body)


def _script(values: Sequence[object]) -> str:
    """As a JavaScript array for a page, without `</script>`, which would end the script."""
    return json.dumps(list(values), separators=(",", ":")).replace("<", "\\u003c")
