"""Hessian spectra of parameter blocks: may the entries of a block share one learning rate?

H is the Hessian of the mean loss, restricted to the n entries of a block; stochastic Lanczos
quadrature finds Ritz values t_r and weights w_r of H from random unit vectors v:
    spectrum    share of H's eigenvalues at t = mean over v of sum_r w_r delta(t - t_r)
    trace       n * mean over v of sum_r w_r t_r
Blocks whose spectra diverge want learning rates of their own. To judge one block, cut it finer and
look at the divergences between its pieces.

Cost: per block at most n_lanczos * n_probes Hessian-vector products, of 0.1 (the head) to 1.5 (the
embedding) gradients each; twice that with several batches, whose graphs each step makes again.
Memory: the graph of one batch, and n_lanczos copies of one parameter at a time.

Source: arXiv 2402.16788.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .heterogeneity import BlockSpectra, BlockSpectrum

if TYPE_CHECKING:
    from .layouts import BlockEntry, BlockLayout

_MAX_BLOCKS = 512

# A solver yields a vector v and is sent H v, until it returns eigenvalues and weights.
_Solver = Generator[Tensor, Tensor, tuple[Tensor, Tensor]]


def hessian_spectrum(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Iterable[Any],
    blocks: "Mapping[str, BlockEntry] | None" = None,
    *,
    names: str | Iterable[str] | None = None,
    per_parameter: int | None = None,
    n_lanczos: int = 30,
    n_probes: int = 2,
    seed: int = 0,
) -> BlockSpectra:
    """Spectrum of the Hessian of the mean loss, restricted to each block of parameters in turn.

    The model runs in the mode it is in. Dropout and all that draws from torch draw the same numbers
    in every evaluation, so that training mode too has a Hessian: that of the one network so drawn.
    Buffers, such as running statistics, start each evaluation as they are, and end as they were.
    Attention runs in PyTorch's math kernel, since flash kernels cannot be differentiated twice;
    nor can compiled models. Frozen parameters are left out. bfloat16 gives few digits.

    Args:
        model: any module, in one process.
        loss_fn: (model, batch) to a scalar, finite, twice differentiable loss.
        data: the batches, a finite iterable of what loss_fn takes; each weighs the same.
        blocks: a BlockMap, whose blocks of a parameter are `name[0]`, `name[1]`, ...; None for one
            block per parameter.
        names: parameters to look at, as shell patterns; None for all. A tied parameter answers to
            each of its names and is listed under its first.
        per_parameter: at most this many blocks of each parameter, evenly spread; None for all.
        n_lanczos: Lanczos steps per probe, at least 1.
        n_probes: random probes per block, at least 1. A block of at most n_lanczos * n_probes
            entries is diagonalised instead, which takes no more products and is exact.
        seed: of the probes and of the model's randomness. A block's spectrum does not depend on
            which other blocks are looked at.

    Returns:
        The spectra, at most 512.

    Raises:
        ValueError: an argument out of range, no block or too many, a loss that is no finite scalar
            or has no gradient, or a Hessian that is not finite.

    Source: arXiv 2402.16788.
    """
    is_data = isinstance(data, Iterable) and not isinstance(data, Tensor | Mapping | str)
    numbers = [("n_lanczos", n_lanczos), ("n_probes", n_probes)]
    if per_parameter is not None:
        numbers.append(("per_parameter", per_parameter))
    for name, valid, expected, found in (
        ("model", isinstance(model, nn.Module), "a torch.nn.Module", type(model)),
        ("loss_fn", callable(loss_fn), "a function of model and batch", loss_fn),
        ("data", is_data, "an iterable of batches, such as [batch]", type(data)),
        ("blocks", blocks is None or isinstance(blocks, Mapping), "a BlockMap or None", blocks),
        ("names", names is None or isinstance(names, Iterable), "patterns or None", names),
        ("seed", isinstance(seed, int), "an int", seed),
        *((name, isinstance(n, int) and n >= 1, "an int of 1 or more", n) for name, n in numbers),
    ):
        if not valid:
            raise ValueError(f"{name}: expected {expected}, found {found!r}")
    batches = list(data)
    if not batches:
        raise ValueError("data: expected one batch or more, found none")
    selected = _selected(model, blocks, names)
    counts = {name: layout.n_blocks if layout else 1 for name, (_, layout) in selected.items()}
    total = sum(min(count, per_parameter or count) for count in counts.values())
    if total > _MAX_BLOCKS:
        most = max(counts, key=counts.__getitem__)
        raise ValueError(
            f"blocks: expected at most {_MAX_BLOCKS} to look at, found {total}; {most!r} alone has "
            f"{counts[most]}. Select parameters, as by names='*.q_proj.weight', or some blocks of "
            "each, as by per_parameter=8"
        )
    spectra: list[BlockSpectrum] = []
    with sdpa_kernel(SDPBackend.MATH), torch.inference_mode(False):  # which enables gradients too
        for name, (parameter, layout) in selected.items():

            def gradient(number: int, parameter: nn.Parameter = parameter) -> Tensor:
                with _same_every_time(model, seed + number):
                    return _gradient(loss_fn(model, batches[number]), parameter)

            if len(batches) == 1:  # one graph serves all products
                gradient = cache(gradient)
            pieces = _pieces(name, parameter, layout, per_parameter)
            solvers = {
                block: _spectrum(block, positions, parameter.dtype, n_lanczos, n_probes, seed)
                for block, positions in pieces.items()
            }
            spectra += _solve(solvers, pieces, parameter, gradient, len(batches))
    return BlockSpectra(spectra)


def _selected(
    model: nn.Module,
    blocks: "Mapping[str, BlockEntry] | None",
    names: str | Iterable[str] | None,
) -> "dict[str, tuple[nn.Parameter, BlockLayout | None]]":
    """Every parameter to look at and its layout, None for one block, by its first name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {parameter: name for name, parameter in model.named_parameters()}
    layouts: dict[str, BlockLayout | None] = dict.fromkeys(first.values())
    if blocks is not None:
        layouts.clear()
        for name, entry in blocks.items():
            if name not in parameters:
                raise ValueError(f"blocks: expected parameters of the model, found {name!r}")
            layout = getattr(entry, "layout", None)
            expected, found = tuple(parameters[name].shape), getattr(layout, "shape", None)
            if expected != found:
                raise ValueError(
                    f"blocks[{name!r}]: expected a layout of shape {expected}, found {found}"
                )
            layouts[first[parameters[name]]] = layout
    useful = {n for n in layouts if parameters[n].requires_grad and parameters[n].numel()}
    if not useful:
        raise ValueError("model: expected a parameter that requires a gradient, found none")
    patterns = ["*"] if names is None else [names] if isinstance(names, str) else list(names)
    chosen = set()
    for pattern in patterns:
        hits = {first[p] for name, p in parameters.items() if fnmatchcase(name, str(pattern))}
        if not hits & useful:
            what = f"frozen parameters or ones without blocks: {min(hits)!r}" if hits else "nothing"
            raise ValueError(f"names: expected patterns of parameters, {pattern!r} matches {what}")
        chosen |= hits & useful
    if not chosen:
        raise ValueError("names: expected one pattern or more, found none")
    return {name: (parameters[name], layouts[name]) for name in layouts if name in chosen}


def _pieces(
    name: str, parameter: Tensor, layout: "BlockLayout | None", per_parameter: int | None
) -> dict[str, Tensor]:
    """By block name, the positions of its entries in the flat parameter."""
    if layout is None or layout.n_blocks == 1:
        return {name: torch.arange(parameter.numel(), device=parameter.device)}
    numbers = layout.index(parameter.device).flatten()
    lengths = numbers.bincount(minlength=layout.n_blocks).tolist()
    positions = numbers.argsort(stable=True).split(lengths)
    count = min(per_parameter or _MAX_BLOCKS, layout.n_blocks)
    wanted = torch.linspace(0, layout.n_blocks - 1, count).round().int().tolist()
    return {f"{name}[{i}]": positions[i] for i in wanted if lengths[i]}


@contextmanager
def _same_every_time(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers from `seed`, and copies for buffers; both are put back afterwards."""
    kept = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        try:
            for buffers, originals in kept:
                buffers |= {n: b.clone() for n, b in originals.items() if b is not None}
            yield
        finally:
            for buffers, originals in kept:
                buffers.clear()
                buffers |= originals


def _gradient(loss: Any, parameter: nn.Parameter) -> Tensor:
    """The gradient with its graph, zero if the loss does not depend on the parameter."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.isfinite():
        found = loss.tolist() if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn: expected a finite scalar, found {found}")
    if not loss.requires_grad:
        raise ValueError("loss_fn: expected a loss with a gradient, found one without")
    return torch.autograd.grad(loss, parameter, create_graph=True, materialize_grads=True)[0]


def _products(
    gradient: Tensor, parameter: nn.Parameter, vectors: Sequence[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """H v at the positions where v is not zero, for vectors v as (positions, values there).

    Reverse over reverse by hand: curvlinops 3.0.1, the maintained library, takes forward over
    `jacrev`, which in torch 2.13 fails on SiLU ("forward AD with aten::silu_backward").
    """
    products = []
    for positions, values in vectors:
        if not gradient.requires_grad:  # the loss is linear
            products.append(torch.zeros_like(values))
            continue
        vector = torch.zeros_like(parameter).flatten()
        vector[positions] = values.to(vector.dtype)
        (product,) = torch.autograd.grad(
            gradient,
            parameter,
            vector.view_as(parameter),
            retain_graph=True,
            materialize_grads=True,
        )
        products.append(product.flatten()[positions].to(values.dtype))
        if not products[-1].isfinite().all():
            raise ValueError("loss_fn: expected a finite Hessian, found nan or inf in a product")
    return products


def _solve(
    solvers: dict[str, Generator[Tensor, Tensor, BlockSpectrum]],
    pieces: dict[str, Tensor],
    parameter: nn.Parameter,
    gradient: Callable[[int], Tensor],
    n_batches: int,
) -> list[BlockSpectrum]:
    """Runs the solvers of one parameter's blocks in step, so that they share a batch's graph."""
    done: dict[str, BlockSpectrum] = {}
    asked = {name: next(solver) for name, solver in solvers.items()}
    while asked:
        vectors = [(pieces[name], vector) for name, vector in asked.items()]
        images = [torch.zeros_like(vector) for vector in asked.values()]
        for number in range(n_batches):  # no name here holds a graph while the next one is made
            for image, product in zip(images, _products(gradient(number), parameter, vectors)):
                image += product / n_batches
        for name, image in zip(list(asked), images):
            try:
                asked[name] = solvers[name].send(image)
            except StopIteration as end:
                done[name] = end.value
                del asked[name]
    return [done[name] for name in solvers]


def _spectrum(
    name: str, positions: Tensor, dtype: torch.dtype, n_lanczos: int, n_probes: int, seed: int
) -> Generator[Tensor, Tensor, BlockSpectrum]:
    """The spectrum of one block, as a solver."""
    n, device = len(positions), positions.device
    dtype = torch.promote_types(dtype, torch.float32)
    if n <= n_lanczos * n_probes:
        n_probes = 0
        found = [(yield from _diagonalise(torch.eye(n, dtype=dtype, device=device)))]
    else:  # Gaussian probes: they meet every eigenvector
        probes = torch.randn(n_probes, n, generator=torch.Generator().manual_seed(seed))
        found = []
        for probe in probes:
            found.append((yield from _lanczos(probe.to(device, dtype), n_lanczos)))
    eigenvalues, order = torch.cat([values for values, _ in found]).sort()
    weights = torch.cat([weights for _, weights in found])[order] / len(found)
    return BlockSpectrum(name, n, eigenvalues, weights, n_probes)


def _diagonalise(identity: Tensor) -> _Solver:
    """All eigenvalues of H, of one weight, from its columns."""
    columns = []
    for unit in identity:
        columns.append((yield unit))
    matrix = torch.stack(columns).double().cpu()
    eigenvalues = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    return eigenvalues, torch.full_like(eigenvalues, 1 / len(matrix))


def _lanczos(probe: Tensor, steps: int) -> _Solver:
    """Ritz values of H and their weights, from one probe and at most `steps` products."""
    basis = probe.new_empty(steps, len(probe))
    vector = probe / probe.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(steps):
        basis[step] = vector
        image = yield vector
        diagonal.append((image @ vector).item())
        known = basis[: step + 1]
        for _ in range(2):  # full re-orthogonalisation; once leaves a residue
            image = image - known.T @ (known @ image)
        norm = image.norm().item()
        if norm <= 10 * torch.finfo(probe.dtype).eps * max(map(abs, diagonal + beside)):
            break  # the probe lies in the span of the eigenvectors found
        beside.append(norm)
        vector = image / norm
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    matrix += torch.diag(torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64), -1)
    eigenvalues, vectors = torch.linalg.eigh(matrix)  # reads the lower triangle
    return eigenvalues, vectors[0].square()
