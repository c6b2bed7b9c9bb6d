"""Writes a packed checkpoint in another format, in one pass over its files, a block at a time.

Codes are carried over as they are; no weight is rounded to a grid again. Other formats have no
place for an input scale (of AWQ, SmoothQuant, QuIP). It is folded into the norm or the linear that
the input comes from, whose gain or scales are divided by it. That needs the same input scale in
every linear that reads the same output; else the export is refused. The folder appears when it is
whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from ..checkpoints.dense import Checkpoint
from ..checkpoints.inspection import inspect_checkpoint
from ..checkpoints.shards import names_by_block
from ..common.errors import LLQError
from ..common.files import rename, save_tensors
from ..common.progress import Progress
from ..layers.linear import QuantLinear, check_linears
from ..method import Method
from ..methods import build
from ..models.decoder import block_prefixes, quantizable
from ..models.load import build_skeleton, module_names
from ..models.residual_stream import Residual, residual_of
from .base import Exported, Format, Grid, Grids, Model
from .engines import Engine


class Exports(TypedDict):
    """What an export came to. Bits are per quantized weight. grid: None where it is dense."""

    stored_bits: float
    exported_bits: float
    bytes: int
    grid: Grid | None


def export(
    path: Path,
    out: Path,
    kind: type[Format],
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    engine: Engine | None = None,
) -> Exports:
    """Write the packed checkpoint in the folder `path` to the new folder `out`, in format `kind`.

    dtype: of scales and of all that is not quantized; by default the format's, or the base's.
    engine: that must read the result. LLQError where the method's storage does not fit the format,
    or the engine does not read what comes out.
    """
    progress = progress or Progress()
    packed = inspect_checkpoint(path)
    if out.exists():
        raise LLQError(f"{out} exists; give a folder that does not")
    checkpoint, skeleton = _opened(path)
    form = kind(dtype or kind.preferred or skeleton.dtype)
    model = Model(path, checkpoint.config, skeleton, _dense_modules(skeleton, checkpoint))
    form.check_model(model)
    method = build(packed["method"], **packed["config"])
    with whole_or_nothing(out) as draft:
        parts = [draft / f"part-{i}.safetensors" for i in range(len(block_prefixes(skeleton)) + 1)]
        try:
            written = _write(parts, checkpoint, method, form, _Folds(skeleton), progress)
            if engine is not None:
                engine.check(form.name, written.grid)
            progress.stage("putting the blocks together")
            total_bytes = form.finish(parts, draft, model, written.grid)
        finally:
            progress.close()
    weights = sum(rows * columns for rows, columns in _shapes(skeleton).values())
    return {
        "stored_bits": packed["stored_bits"],
        "exported_bits": written.linear_bytes * 8 / weights,
        "bytes": total_bytes,
        "grid": written.grid,
    }


def format_for(engine: Engine, kinds: Mapping[str, type[Format]], path: Path) -> type[Format]:
    """The format in which `engine` serves a packed checkpoint best, by the linears of its first
    block. kinds: all formats, by name.

    LLQError where codes fit none, with the reason of each and the cure. Dense weights are never
    chosen: they are another size.
    """
    packed = inspect_checkpoint(path)
    checkpoint, skeleton = _opened(path)
    method = build(packed["method"], **packed["config"])
    prefix = block_prefixes(skeleton)[0]
    names = [name for name in checkpoint.files if name.startswith(f"{prefix}.")]
    shapes = {name: s for name, s in _shapes(skeleton).items() if name.startswith(f"{prefix}.")}
    reasons: dict[str, list[str]] = {}  # and the formats that it holds for
    for reading in engine.reads:
        form = kinds[reading.form](torch.float16)
        if not form.holds_codes:
            continue
        try:
            grids = Grids()
            grids.see_all(_linears(checkpoint.read(names), method, form, shapes))
            reason = reading.refusal(grids.only(form.name)) if form.one_grid else None
        except LLQError as error:
            reason = str(error).replace(f" does not fit {form.name}", "")
        if reason is None:
            return type(form)
        reasons.setdefault(reason, []).append(form.name)
    listed = "; ".join(f"{', '.join(forms)}: {reason}" for reason, forms in reasons.items())
    raise LLQError(f"{engine} reads no export of {path} ({listed}); {engine.instead}")


def _opened(path: Path) -> tuple[Checkpoint, Any]:
    """The checkpoint by the model's names of its tensors, and the model on the meta device."""
    checkpoint = Checkpoint.open(str(path))
    skeleton = build_skeleton(checkpoint.path)
    return _named(checkpoint, skeleton), skeleton


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """Give a new folder to write to, which becomes `out` when the block ends; whatever the block
    raises, nothing of it is left.
    """
    draft = out.with_name(out.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        rename(draft, out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _named(checkpoint: Checkpoint, skeleton: Any) -> Checkpoint:
    """The checkpoint by the model's names of its tensors, which its files need not have.

    A packed tensor goes with the weight of its linear, because the skeleton does not know it.
    """
    names = module_names(skeleton, checkpoint.files)
    modules = {
        stored.removesuffix(".weight"): name.removesuffix(".weight")
        for name, stored in names.items()
        if stored.endswith(".weight")
    }

    def name_of(stored: str, name: str) -> str:
        module, _, key = stored.rpartition(".")
        return f"{modules[module]}.{key}" if module in modules else name

    return checkpoint.named({name_of(stored, name): stored for name, stored in names.items()})


def _in_files(checkpoint: Checkpoint, module: str) -> str:
    """The name of a module in the files, by one of its tensors; its own where they hold none."""
    tensor = next((name for name in checkpoint.files if name.startswith(f"{module}.")), module)
    stored, rest = checkpoint.in_file(tensor), tensor.removeprefix(module)
    return stored.removesuffix(rest) if stored.endswith(rest) else module


def _dense_modules(skeleton: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """The outermost modules that hold linears, none of which is quantized: head, vision tower, ...

    Each comes by its name in the model and, where that differs, by its name in the files: readers
    know it by the one or the other.
    """
    linears = {name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    packed = quantizable(skeleton).keys()

    def outermost(prefix: str, module: nn.Module) -> Iterator[str]:
        inside = {name for name in linears if f"{name}.".startswith(f"{prefix}." if prefix else "")}
        if inside and not inside & packed:
            yield prefix
        elif inside:
            for name, child in module.named_children():
                yield from outermost(f"{prefix}.{name}" if prefix else name, child)

    names = list(outermost("", skeleton))
    return list(dict.fromkeys([*names, *(_in_files(checkpoint, name) for name in names)]))


class _Written(NamedTuple):
    """grid: of all that was quantized; None where it is dense, or where grids may differ.
    linear_bytes: of the quantized linears, biases left out.
    """

    grid: Grid | None
    linear_bytes: int


def _write(
    parts: list[Path],
    checkpoint: Checkpoint,
    method: Method,
    form: Format,
    folds: _Folds,
    progress: Progress,
) -> _Written:
    """Write one file per block, after one of everything outside the blocks."""
    shapes = _shapes(folds.skeleton)
    grids, linear_bytes = Grids(), 0
    prefixes = block_prefixes(folds.skeleton)
    outside, *blocks = names_by_block(checkpoint.files, prefixes)

    def save(tensors: Mapping[str, Tensor], part: Path) -> None:
        name_of = checkpoint.in_file if form.keeps_names else str
        save_tensors({name_of(name): tensor for name, tensor in tensors.items()}, part)

    progress.blocks(0, len(blocks))
    save(_cast(checkpoint.read(outside), form), parts[0])
    for index, names in enumerate(blocks):
        tensors = checkpoint.read(names)
        own = {name: shapes[name] for name in shapes if name.startswith(f"{prefixes[index]}.")}
        linears = _linears(tensors, method, form, own)
        grids.see_all(linears)
        folds.apply(linears, tensors)
        stored = {
            f"{n}.{k}": t
            for n, linear in linears.items()
            for k, t in _tensors_of(form, n, linear).items()
        }
        save(_cast(tensors, form) | stored, parts[index + 1])
        linear_bytes += sum(tensor.nbytes for tensor in stored.values())
        progress.blocks(index + 1, len(blocks))
    return _Written(grids.only(form.name) if form.one_grid else None, linear_bytes)


def _shapes(skeleton: nn.Module) -> dict[str, tuple[int, int]]:
    """[O, I] of every quantized linear, by full name."""
    linears = quantizable(skeleton)
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}


def _linears(
    tensors: dict[str, Tensor], method: Method, form: Format, shapes: dict[str, tuple[int, int]]
) -> dict[str, Exported]:
    """Take a block's quantized linears out of its tensors; biases stay among the tensors."""
    linears = {}
    for name, (rows, columns) in shapes.items():
        keys = [key for key in tensors if key.startswith(name + ".") and not key.endswith(".bias")]
        packed = {key.removeprefix(name + "."): tensors.pop(key) for key in keys}
        own = method.for_linear(name)
        dense = nn.Linear(columns, rows, bias=False, device="meta")
        check_linears({name: QuantLinear.from_packed(own, dense, packed)})
        try:
            linears[name] = form.linear(own, packed, (rows, columns))
        except LLQError as error:
            raise LLQError(f"{name} does not fit {form.name}: {error}") from None
    return linears


def _tensors_of(form: Format, name: str, linear: Exported) -> dict[str, Tensor]:
    try:
        return form.tensors(linear)
    except LLQError as error:
        raise LLQError(f"{name} does not fit {form.name}: {error}") from None


def _cast(tensors: dict[str, Tensor], form: Format) -> dict[str, Tensor]:
    """Floats in the dtype of the format; LLQError where one overflows there."""
    cast = {n: t.to(form.dtype_of(t)) if t.is_floating_point() else t for n, t in tensors.items()}
    for name, tensor in cast.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise LLQError(f"{name} does not fit {tensor.dtype}; give another dtype")
    return cast


# --- input scales ---------------------------------------------------------------------------------


@dataclass
class _Folds:
    """Folds input scales into what comes before.

    It looks up where the input of each linear comes from, and does so when it is first needed.
    """

    skeleton: Any
    _residual: Residual | None = field(default=None)

    @property
    def residual(self) -> Residual:
        self._residual = self._residual or residual_of(self.skeleton)
        return self._residual

    def apply(self, linears: dict[str, Exported], tensors: dict[str, Tensor]) -> None:
        """Fold every input scale of a block's linears; changes both arguments in place."""
        for name, linear in linears.items():
            s_I = linear.in_scale_I
            if s_I is None:
                continue
            if (s_I != 1).any():
                norm = self.residual.readers.get(name)
                if norm is not None:
                    self._into_norm(norm, s_I, linears, tensors)
                else:
                    self._into_linear(name, s_I, linears, tensors)
            self._done(linear)

    def _done(self, linear: Exported) -> None:
        assert linear.affine is not None
        linear.affine = linear.affine._replace(in_scale_I=None)

    def _into_norm(
        self, norm: str, s_I: Tensor, linears: dict[str, Exported], tensors: dict[str, Tensor]
    ) -> None:
        """The norm's gain is divided once, for all of its readers."""
        readers = [name for name, source in self.residual.readers.items() if source == norm]
        for reader in readers:
            other_I = linears[reader].in_scale_I if reader in linears else None
            if other_I is None or not torch.equal(other_I, s_I):
                raise LLQError(
                    f"{norm} feeds {', '.join(readers)}, whose input scales differ: "
                    "they cannot be folded"
                )
        offset = 1 - self.residual.norms[norm]  # the gain is weight + offset
        gain = tensors[f"{norm}.weight"]
        tensors[f"{norm}.weight"] = (gain.float() + offset) / s_I - offset
        for reader in readers:
            self._done(linears[reader])

    def _into_linear(
        self, name: str, s_I: Tensor, linears: dict[str, Exported], tensors: dict[str, Tensor]
    ) -> None:
        """The rows of v_proj before o_proj, of up_proj before down_proj."""
        parent, _, kind = name.rpartition(".")
        source = f"{parent}.{'v_proj' if name in self.residual.outputs else 'up_proj'}"
        if source not in linears or kind not in ("o_proj", "down_proj"):
            raise LLQError(f"nothing before {name} can take its input scale")
        affine = linears[source].affine
        assert affine is not None
        rows = len(affine.codes_OI)
        if name in self.residual.outputs and rows != len(s_I):  # query heads share a value head
            heads = s_I.view(rows // self.residual.head_dim, -1, self.residual.head_dim)
            if (heads != heads[:, :1]).any():
                raise LLQError(
                    f"heads of {name} that share values have different input scales: "
                    "they cannot be folded"
                )
            s_I = heads[:, 0].flatten()
        linears[source].divide_outputs(s_I)
        if f"{source}.bias" in tensors:
            tensors[f"{source}.bias"] = tensors[f"{source}.bias"].float() / s_I
