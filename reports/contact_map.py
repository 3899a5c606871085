"""The picture of a contact map."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from esm_packed.reports.page import OKABE_ITO, figure_style, write_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEPARATION = 6
"""Smallest distance in the sequence between the residues of a contact; closer residues always touch."""
_ORANGE = OKABE_ITO[1]
_DPI = 300
_SIDE_POINTS = 330
"""Approximate side of the square in points."""


@dataclass(frozen=True)
class ContactMap:
    """A contact map to draw.

    Args:
        probabilities: (num_residues, num_residues), symmetric.
        title: plain text.
    """

    probabilities: npt.NDArray[np.floating[Any]]
    title: str

    def most_probable(self) -> npt.NDArray[np.int64]:
        """(n, 2) residues i < j, counted from 0, of the most probable contacts, in descending order.

        n is the number of residues, or of pairs at least `SEPARATION` apart if there are fewer.
        """
        length = len(self.probabilities)
        pairs = np.stack(np.triu_indices(length, SEPARATION), axis=1)
        order = np.argsort(-self.probabilities[pairs[:, 0], pairs[:, 1]], kind="stable")
        return pairs[order[:length]]


def write_contact_map(drawn: ContactMap, path: Path, suffix: str) -> None:
    """Write a contact map to `path` in the format `suffix`, one of `page.PICTURES`.

    Raises:
        OSError: the file cannot be written.
    """
    with figure_style():
        write_picture(draw(drawn), path, suffix, _DPI)


def draw(drawn: ContactMap) -> Figure:
    """Probabilities above the diagonal, most probable contacts below it; call within `page.figure_style`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    length = len(drawn.probabilities)
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    axes = figure.subplots()
    bounds = (0.5, length + 0.5)
    upper = np.ma.masked_where(np.tri(length, dtype=bool), drawn.probabilities.astype(np.float32))
    image = axes.imshow(
        upper, cmap="Blues", vmin=0, vmax=1, extent=(*bounds, *bounds[::-1]), interpolation="nearest"
    )
    axes.plot(bounds, bounds, color="#aaaaaa", linewidth=0.8)
    rows, columns = drawn.most_probable().T + 1
    size = float(np.clip(_SIDE_POINTS / length, 1.5, 6.0)) ** 2
    label = f"{len(rows):,} most probable contacts, |i − j| ≥ {SEPARATION}"
    axes.scatter(rows, columns, s=size, color=_ORANGE, linewidths=0, label=label)
    axes.set_xlim(*bounds)
    axes.set_ylim(*bounds[::-1])
    axes.set_box_aspect(1)
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=11)
    axes.set_xlabel("residue", fontsize=13)
    axes.set_ylabel("residue", fontsize=13)
    axes.set_title(drawn.title.replace("$", r"\$"), fontsize=12, loc="left", wrap=True)
    if len(rows):
        legend = axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.12), fontsize=11, handletextpad=0)
        legend.legend_handles[0].set(sizes=[30])  # type: ignore[union-attr]
    bar = figure.colorbar(image, ax=axes, aspect=30)
    bar.set_label("contact probability", fontsize=12)
    bar.ax.tick_params(labelsize=11)
    return figure
