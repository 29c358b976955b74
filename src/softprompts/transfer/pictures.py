"""A matrix of similarities as a picture: a heat map, and beside it the tree in which the prompts join.

The tree (average linkage on 1 - similarity) needs scipy, which comes with the extra ``similarity``; without it the
heat map alone is drawn, in the order that was given.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from softprompts.errors import StorageError

__all__ = ["draws_trees", "save_pictures"]

_MOST_NUMBERS = 14
"""Prompts up to which the values are written into the cells."""


def draws_trees() -> bool:
    """Whether scipy is installed, which computes the trees."""
    return importlib.util.find_spec("scipy") is not None


def save_pictures(matrix_KK: Tensor, labels: Sequence[str], title: str, stem: Path) -> list[Path]:
    """Draw a matrix of similarities as ``STEM.png`` and ``STEM.svg``.

    Args:
        matrix_KK: Symmetric.
        labels: A name per row.
        title: What the numbers are.
        stem: Path without suffix; its folder is made.

    Raises:
        StorageError: The files cannot be written.
    """
    matrix: NDArray[np.float64] = matrix_KK.double().cpu().numpy()
    count = len(labels)
    tree = _tree(matrix) if draws_trees() and count > 1 else None
    order = list(range(count)) if tree is None else [int(leaf) for leaf in tree["leaves"]]
    side = 1.6 + 0.5 * count
    figure = Figure(figsize=(side + (4.2 if tree else 2.6), side + 1.0), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=11)
    if tree is None:
        heat = figure.subplots()
    else:
        branches, heat = figure.subplots(1, 2, width_ratios=[1.6, side])
        _draw_tree(branches, tree, count)
    _draw_heat(figure, heat, matrix[np.ix_(order, order)], [labels[number] for number in order])
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        # the same matrix gives the same bytes
        with mpl.rc_context({"svg.hashsalt": "softprompts", "svg.fonttype": "none"}):
            figure.savefig(paths[0])
            figure.savefig(paths[1], metadata={"Date": None})
    except OSError as error:
        raise StorageError(
            f"the picture cannot be written to '{stem.parent}': {error.strerror or error}; name another folder"
        ) from error
    return paths


def _tree(matrix: NDArray[np.float64]) -> dict[str, Any]:
    """What scipy's ``dendrogram`` gives: the leaves from top to bottom, and the branches."""
    hierarchy = importlib.import_module("scipy.cluster.hierarchy")
    above = np.triu_indices(len(matrix), 1)
    joined = hierarchy.linkage(1.0 - matrix[above], method="average", optimal_ordering=len(matrix) <= 200)
    tree: dict[str, Any] = hierarchy.dendrogram(joined, no_plot=True)
    return tree


def _draw_tree(axes: Axes, tree: dict[str, Any], count: int) -> None:
    for across, along in zip(tree["dcoord"], tree["icoord"], strict=True):
        axes.plot(across, (np.asarray(along) - 5) / 10, color="#444444", lw=1.1)  # scipy's leaves stand at 5, 15, ...
    heights = [across[1] for across in tree["dcoord"]]
    span = max(heights) - min(heights) or 1.0
    axes.set_xlim(
        max(heights) + 0.1 * span, max(0.0, min(heights) - 0.5 * span)
    )  # where they join, and not all the way to 0
    axes.set_ylim(count - 0.5, -0.5)  # as the rows of the heat map
    axes.set_xlabel("1 - similarity", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", left=False, labelleft=False)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)


def _draw_heat(figure: Figure, axes: Axes, matrix: NDArray[np.float64], labels: Sequence[str]) -> None:
    count = len(labels)
    pairs = matrix[~np.eye(count, dtype=bool)]
    # The diagonal is often far above everything else; the colours are for the pairs.
    low, high = (float(pairs.min()), float(pairs.max())) if pairs.size and np.ptp(pairs) else (0.0, 1.0)
    image = axes.imshow(matrix, vmin=low, vmax=high, cmap="viridis", aspect="auto")
    axes.set_xticks(range(count), labels, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(count), labels, fontsize=8)
    axes.yaxis.tick_right()
    if count <= _MOST_NUMBERS:
        for row in range(count):
            for column in range(count):
                dark = (matrix[row, column] - low) / (high - low) < 0.6
                text = f"{matrix[row, column]:.2g}"
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    figure.colorbar(image, ax=axes, location="bottom", shrink=0.7, pad=0.02).ax.tick_params(labelsize=7)
