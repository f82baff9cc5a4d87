"""How much the Hessian spectra of parameter blocks differ, as numbers, a table and a picture.

Of a spectrum with eigenvalues t_r and weights w_r, as `hessian_spectrum` finds them:
    linear      shares w_r at t_r, on a linear grid
    log         shares w_r t_r^2 of the squared Frobenius norm at log10|t_r|
both smoothed by Gaussians and made to sum to 1. Between two such densities, in nats:
    divergence  JS(p, q) = KL(p | (p+q)/2) / 2 + KL(q | (p+q)/2) / 2, in [0, log 2]

Source: arXiv 2402.16788, the block heterogeneity.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import ceil, inf, log, log10, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SMOOTHING = 0.25  # decades, of the log bins


class BlockSpectrum(NamedTuple):
    """The spectrum of one block.

    name: the parameter's name, with the block's number where it has several: `weight[3]`.
    entries: of the parameter, in this block.
    eigenvalues: [R], float64 on the CPU, rising; Ritz values, or all eigenvalues of a small block.
        R is also the number of Hessian-vector products that they took.
    weights: [R], the share of the spectrum at each; they sum to 1.
    probes: random vectors behind them; 0 if they are exact.
    """

    name: str
    entries: int
    eigenvalues: Tensor
    weights: Tensor
    probes: int

    @property
    def top(self) -> float:
        """The largest eigenvalue."""
        return self.eigenvalues[-1].item()

    @property
    def bottom(self) -> float:
        """The smallest eigenvalue, often negative."""
        return self.eigenvalues[0].item()

    @property
    def radius(self) -> float:
        """The largest magnitude of an eigenvalue."""
        return max(self.top, -self.bottom)

    @property
    def trace(self) -> float:
        """Unbiased estimate of the sum of all eigenvalues."""
        return self.entries * (self.weights @ self.eigenvalues).item()

    @property
    def trace_error(self) -> float:
        """Standard error of `trace`, from the variance of v'Hv on the unit sphere."""
        if self.probes == 0:
            return 0.0
        mean = self.weights @ self.eigenvalues
        variance = self.weights @ (self.eigenvalues - mean).square()
        return self.entries * sqrt(2 * variance.item() / ((self.entries + 2) * self.probes))


class Heterogeneity(NamedTuple):
    """Jensen-Shannon divergences (not their roots) between the spectra of K blocks, in nats.

    A number without its binning misleads. The linear grid spans the largest eigenvalue of all, and
    on it spectra that lie decades apart look alike. On log bins a mere count of eigenvalues shows
    how near to zero Lanczos resolves them, as most are there; their squares leave that out.

    linear: [K, K], eigenvalues counted on a linear grid, as in the paper.
    log: [K, K], eigenvalues weighted by their squares, on decades of their magnitude.
    mean_linear, mean_log: means over the pairs of different blocks.
    """

    linear: Tensor
    log: Tensor
    mean_linear: float
    mean_log: float


class BlockSpectra(Mapping[str, BlockSpectrum]):
    """An immutable mapping from block name to spectrum, which compares, prints and draws itself.

    Args:
        spectra: one per block, of different names.
    """

    def __init__(self, spectra: Iterable[BlockSpectrum]) -> None:
        self._spectra = {spectrum.name: spectrum for spectrum in spectra}

    def __getitem__(self, name: str) -> BlockSpectrum:
        return self._spectra[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spectra)

    def __len__(self) -> int:
        return len(self._spectra)

    def heterogeneity(self) -> Heterogeneity:
        """Compares the spectra of every two blocks, on two binnings.

        Returns:
            The divergences, rows and columns in the order of this mapping.

        Raises:
            ValueError: there are fewer than two blocks.

        Source: arXiv 2402.16788, the linear grid; differs from the paper: log bins beside it.
        """
        if len(self) < 2:
            raise ValueError(f"blocks: expected two or more to compare, found {len(self)}")
        low = min(spectrum.bottom for spectrum in self.values())
        high = max(spectrum.top for spectrum in self.values())
        reach = (high - low) or 1.0
        grid = torch.linspace(low - 0.05 * reach, high + 0.05 * reach, 1000, dtype=torch.float64)
        linear = [_density(s.eigenvalues, s.weights, grid, 0.01 * reach) for s in self.values()]
        found = [_divergences(torch.stack(linear)), _divergences(self._log_densities()[1].sum(-1))]
        pairs = len(self) * (len(self) - 1)
        return Heterogeneity(*found, *(matrix.sum().item() / pairs for matrix in found))

    def _log_densities(self) -> tuple[Tensor, Tensor]:
        """log10 of magnitudes [bins], shares of positive and negative ones there [K, bins, 2]."""
        radii = [spectrum.radius for spectrum in self.values() if spectrum.radius > 0] or [1.0]
        lowest = log10(min(radii)) - 3  # smaller squares are 1e-6 of their block's largest
        ends = lowest - 4 * _SMOOTHING, log10(max(radii)) + 4 * _SMOOTHING
        grid = torch.linspace(*ends, ceil(40 * (ends[1] - ends[0])), dtype=torch.float64)
        densities = []
        for spectrum in self.values():
            squares = spectrum.weights * spectrum.eigenvalues.square()
            shares = squares if spectrum.radius > 0 else spectrum.weights
            negative = spectrum.eigenvalues < 0
            signed = torch.stack([shares * ~negative, shares * negative], dim=1)
            magnitudes = spectrum.eigenvalues.abs().log10().clamp(min=lowest)
            densities.append(_density(magnitudes, signed, grid, _SMOOTHING))
        return grid, torch.stack(densities)

    def __str__(self) -> str:
        rows = [("block", "entries", "top", "bottom", "trace", "+-", "products")]
        for name, x in self.items():
            numbers = (f"{n:.2e}" for n in (x.top, x.bottom, x.trace))
            end = (f"{x.trace_error:.0e}", str(len(x.eigenvalues)))
            rows.append((name, str(x.entries), *numbers, *end))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        form = "  ".join([f"{{:{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])])
        lines = [form.format(*row) for row in rows]
        if len(self) > 1:
            radii = [spectrum.radius for spectrum in self.values()]
            ratio = max(radii) / min(radii) if min(radii) else inf
            found = self.heterogeneity()
            lines.append(
                f"{len(self)} blocks whose largest eigenvalues differ {ratio:.1e} times; mean "
                f"Jensen-Shannon divergence {found.mean_log:.3f} nats on log bins, "
                f"{found.mean_linear:.3f} on a linear grid, of at most {log(2):.3f}"
            )
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draws the density of each block, and the divergences between two or more, on log bins.

        Args:
            path: file to write, of the format its suffix says; None to write none.

        Returns:
            The figure, of matplotlib.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("plot needs matplotlib: pip install matplotlib") from None
        k = len(self)
        size = (13 if k > 1 else 7, min(max(2 + 0.3 * k, 4), 24))
        figure = Figure(figsize=size, layout="constrained")
        left, *right = figure.subplots(1, min(k, 2), sharey=True, squeeze=False)[0]
        grid, densities = self._log_densities()
        for row, density in enumerate(densities):
            for sign, color in enumerate(("C0", "C3")):
                line = row + 0.4 - 0.85 * density[:, sign] / density.max()
                left.fill_between(10**grid, line, row + 0.4, color=color, alpha=0.35, linewidth=0)
                left.plot(10**grid, line, color=color, linewidth=1)
        signs = ("positive", "negative")
        figure.legend(left.lines[:2], signs, ncols=2, fontsize=8, loc="outside lower left")
        rows = range(0, k, ceil(k / 120))
        left.set_yticks(rows, [f"{list(self)[row]}  {row}" for row in rows], fontsize=8)
        left.set(ylim=(k - 0.5, -0.5), xscale="log", xlabel="|eigenvalue|")
        left.set(title="Hessian spectrum of each block", xlim=(10 ** (grid[0].item() + 1.5), None))
        left.grid(axis="x", alpha=0.3)
        if right:
            found = self.heterogeneity()
            options = dict(
                vmin=0, vmax=log(2), aspect="auto", interpolation="nearest", cmap="magma"
            )
            image = right[0].imshow(found.log.numpy(), **options)
            figure.colorbar(image, label="Jensen-Shannon divergence on log bins (nats)")
            title = f"mean {found.mean_log:.3f}, on a linear grid {found.mean_linear:.3f}"
            right[0].set(xlabel="block", title=title, xticks=range(0, k, ceil(k / 15)))
        if path is not None:
            figure.savefig(path, dpi=130)
        return figure


def _density(positions: Tensor, weights: Tensor, grid: Tensor, width: float) -> Tensor:
    """Shares by grid point, smoothed by Gaussians, which sum to 1; weights [R] or [R, ...]."""
    density = (-((grid[:, None] - positions) ** 2) / (2 * width**2)).exp() @ weights
    return density / density.sum()


def _divergences(densities: Tensor) -> Tensor:
    """Jensen-Shannon divergences [K, K] of densities [K, bins]: H((p+q)/2) - (H(p) + H(q)) / 2."""
    entropy = torch.special.entr(densities).sum(-1)
    rows = [
        torch.special.entr((density + densities) / 2).sum(-1) - (entropy[row] + entropy) / 2
        for row, density in enumerate(densities)
    ]
    return torch.stack(rows).clamp(min=0)
