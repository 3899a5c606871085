"""Maps: their components, their colors, and what is beside the points."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esm_packed.errors import UsageError
from esm_packed.reports.map.coloring import NO_VALUE, Categories, Numbers, coloring
from esm_packed.reports.map.figure import Map, draw
from esm_packed.reports.map.pca import fit
from esm_packed.reports.page import figure_style


def test_components_are_those_of_the_covariance() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((200, 12)) * np.linspace(4, 1, 12) + 5).astype(np.float16)
    components = fit(rows)
    variances, axes = np.linalg.eigh(np.cov(rows.astype(np.float64).T))
    np.testing.assert_allclose(components.explained, variances[:-3:-1] / variances.sum(), rtol=1e-9)
    cosines = (components.axes * axes[:, :-3:-1]).sum(axis=0)
    np.testing.assert_allclose(np.abs(cosines), 1, rtol=1e-9)
    points = components.project(rows)
    np.testing.assert_allclose(points.var(axis=0, ddof=1), variances[:-3:-1], rtol=1e-9)
    np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-9)
    mirrored = fit(2 * rows.mean(axis=0, dtype=np.float64) - rows)
    np.testing.assert_allclose(mirrored.axes, components.axes, atol=1e-9)  # the sign is fixed
    assert (components.axes.max(axis=0) == np.abs(components.axes).max(axis=0)).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.eye(2, 4), "a map needs at least 3 proteins that were computed; there are 2"),
        (np.full((5, 4), 0.1, np.float32), "all embeddings are alike"),
    ],
)
def test_too_little_to_map(rows: np.ndarray, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit(rows)


def test_frequent_categories_have_colors_and_rare_ones_share_one() -> None:
    texts = [f"c{number:02}" for number in range(12) for _ in range(20 - number)] + ["", " NA ", "nan"]
    colors = coloring("kind", texts)
    assert isinstance(colors, Categories) and colors.has_others
    assert colors.labels == [*(f"c{number:02}" for number in range(9)), "3 others"]
    assert np.bincount(colors.codes + 1).tolist() == [3, *range(20, 11, -1), 11 + 10 + 9]
    assert colors.codes[-1] == NO_VALUE
    few = coloring("kind", ["b", "a", "b", ""])
    assert isinstance(few, Categories) and few.labels == ["b", "a"] and not few.has_others
    assert few.codes.tolist() == [0, 1, 0, NO_VALUE]


def test_more_than_nine_numbers_are_numbers() -> None:
    numbers = coloring("length", [*map(str, range(10)), "1e3", "", "-2.5"])
    assert isinstance(numbers, Numbers)
    np.testing.assert_array_equal(numbers.values, [*range(10), 1000, math.nan, -2.5])
    assert isinstance(coloring("cluster", ["1", "2", "3"] * 5), Categories)
    assert isinstance(coloring("mixed", [*map(str, range(10)), "x"]), Categories)
    assert isinstance(coloring("infinite", [*map(str, range(10)), "inf"]), Categories)


@pytest.mark.parametrize("number", [30, 6000])
@pytest.mark.parametrize("kind", ["categories", "numbers", "none"])
def test_nothing_covers_the_points(kind: str, number: int) -> None:
    rng = np.random.default_rng(0)
    texts = [f"a long name of a category, number {each % 12}" for each in range(number)]
    texts = [str(each) for each in range(number)] if kind == "numbers" else texts
    colors = None if kind == "none" else coloring("column $x$", [*texts[1:], ""])
    ids = [f"P{each:05}" for each in range(number)]
    drawn = Map(rng.standard_normal((number, 2)) * 10, np.array([0.5, 0.25]), "title", ids, colors)
    with figure_style():
        figure = draw(drawn)
        figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [legend.get_window_extent() for legend in [*figure.legends, axes.get_legend()] if legend]
    boxes += [other.bbox for other in figure.axes[1:]]
    assert len(boxes) == {"categories": 1, "numbers": 2, "none": 0}[kind]
    assert not any(axes.bbox.overlaps(box) for box in boxes)
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
    places = axes.transData.transform(drawn.points)
    assert all(axes.bbox.contains(x, y) for x, y in places)
    assert axes.get_xlabel() == "PC 1 (50.0% of the variance)"
    labels = [text.get_window_extent() for text in axes.texts]
    assert bool(labels) == (number == 30)
    assert not any(box.count_contains(places) for box in labels)
    assert not any(box.count_overlaps([each for each in labels if each is not box]) for box in labels)
