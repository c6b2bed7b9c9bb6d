"""Writes a packed checkpoint in another format, in one pass over its files, a block at a time.

Codes are carried over as they are; no weight is rounded to a grid again. Other formats have no
place for an input scale (of AWQ, SmoothQuant, QuIP). It is folded into the norm or the linear that
the input comes from, whose gain or scales are divided by it. That needs the same input scale in
every linear that reads the same output; else the export is refused. The folder appears when it is
whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.dense import Checkpoint, header
from ..checkpoints.format import CONFIG, REPORT
from ..checkpoints.inspection import inspect_checkpoint
from ..checkpoints.packed import copy_small_files
from ..checkpoints.shards import gathered, names_by_block
from ..common.errors import LLQError
from ..common.files import save_tensors, write_json
from ..common.progress import Progress
from ..layers.linear import QuantLinear, check_linears
from ..method import Method
from ..methods import build
from ..models.decoder import block_prefixes, quantizable
from ..models.load import build_skeleton
from ..models.residual_stream import Residual, residual_of
from ..numerics.grids import Affine
from .base import Exported, Format


def export(
    path: Path,
    out: Path,
    kind: type[Format],
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the packed checkpoint in the folder `path` to the new folder `out`, in format `kind`.

    dtype: of scales and of all that is not quantized; by default the format's, or the base's.
    Returns "stored_bits" and "exported_bits" per quantized weight, and "bytes" of the export.
    LLQError where the method's storage does not fit the format.
    """
    progress = progress or Progress()
    packed = inspect_checkpoint(path)
    checkpoint = Checkpoint.open(str(path))
    if out.exists():
        raise LLQError(f"{out} exists; give a folder that does not")
    skeleton = build_skeleton(checkpoint.path)
    form = kind(dtype or kind.preferred or skeleton.dtype)
    draft = out.with_name(out.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    method = build(packed["method"], **packed["config"])
    shapes = _shapes(skeleton)
    try:
        parts = [draft / f"part-{i}.safetensors" for i in range(len(block_prefixes(skeleton)) + 1)]
        first = _write(parts, checkpoint, method, form, _Folds(skeleton), progress)
        total_bytes = gathered(parts, draft).nbytes
        copy_small_files(path, draft)
        config = {
            k: v
            for k, v in checkpoint.config.items()
            if k not in ("quantization_config", "dtype", "torch_dtype")
        }
        section = form.section(first.affine)
        config |= {"quantization_config": section} if section else {}
        write_json(draft / CONFIG, {**config, "dtype": str(form.dtype).removeprefix("torch.")})
        (draft / REPORT).unlink(missing_ok=True)
        draft.rename(out)
    except (LLQError, OSError):
        shutil.rmtree(draft, ignore_errors=True)
        raise
    finally:
        progress.close()
    weights = sum(rows * columns for rows, columns in shapes.values())
    bits = _linear_bytes(out, shapes) * 8 / weights
    return {"stored_bits": packed["stored_bits"], "exported_bits": bits, "bytes": total_bytes}


def _write(
    parts: list[Path],
    checkpoint: Checkpoint,
    method: Method,
    form: Format,
    folds: _Folds,
    progress: Progress,
) -> Exported:
    """Write one file per block, after one of everything outside the blocks.

    Returns a linear from which `Format.section` is made.
    """
    grids = _OneGrid(form)
    shapes = _shapes(folds.skeleton)
    outside, *blocks = names_by_block(checkpoint.files, block_prefixes(folds.skeleton))
    progress.blocks(0, len(blocks))
    save_tensors(_to_dtype(checkpoint.read(outside), form.dtype), parts[0])
    for index, names in enumerate(blocks):
        tensors = checkpoint.read(names)
        linears = _linears(tensors, method, form, shapes)
        grids.see(linears)
        folds.apply(linears, tensors)
        stored = {
            f"{n}.{k}": t
            for n, linear in linears.items()
            for k, t in _tensors_of(form, n, linear).items()
        }
        save_tensors(_to_dtype(tensors, form.dtype) | stored, parts[index + 1])
        progress.blocks(index + 1, len(blocks))
    return grids.checked()


@dataclass
class _OneGrid:
    """Formats name one width, group size and symmetry for all linears, in `Format.section`."""

    form: Format
    # The linear to name it by: one with scattered groups if there is any, else with most groups.
    shown: Exported | None = None
    seen: dict[tuple[int, bool, int, int], str] = field(default_factory=dict)

    def see(self, linears: dict[str, Exported]) -> None:
        for name, linear in linears.items():
            affine = linear.affine
            if affine is None:
                self.shown = self.shown or linear
                continue
            key = (affine.bits, affine.sym, affine.group_size, affine.codes_OI.shape[1])
            self.seen.setdefault(key, name)
            if self.shown is None or _rank(affine) > _rank(self.shown.affine):
                self.shown = linear

    def checked(self) -> Exported:
        """The linear to name the grid by. LLQError where it is not the grid of all."""
        assert self.shown is not None
        shown = self.shown.affine
        for (bits, sym, size, columns), name in self.seen.items():
            assert shown is not None
            # A row that is one group may be as long as the others' groups.
            sizes = {size, columns} if size == -1 else {size}
            if (bits, sym) != (shown.bits, shown.sym) or shown.group_size not in sizes:
                raise LLQError(
                    f"{name} is stored in {_words(bits, sym, size)}, others in "
                    f"{_words(shown.bits, shown.sym, shown.group_size)}, and {self.form.name} "
                    "names one kind for all; export as dense"
                )
        return self.shown


def _rank(affine: Affine | None) -> tuple[bool, int]:
    assert affine is not None
    return not affine.in_order, affine.scale_OG.shape[1]


def _words(bits: int, sym: bool, size: int) -> str:
    groups = "whole rows" if size == -1 else f"groups of {size}"
    return f"{'symmetric' if sym else 'asymmetric'} {bits}-bit {groups}"


def _shapes(skeleton: nn.Module) -> dict[str, tuple[int, int]]:
    """[O, I] of every quantized linear, by full name."""
    linears = quantizable(skeleton)
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}


def _linears(
    tensors: dict[str, Tensor], method: Method, form: Format, shapes: dict[str, tuple[int, int]]
) -> dict[str, Exported]:
    """Take a block's quantized linears out of its tensors; biases stay among the tensors."""
    linears = {}
    for name, shape in shapes.items():
        if f"{name}.weight" not in tensors:
            continue
        keys = [key for key in tensors if key.startswith(name + ".") and not key.endswith(".bias")]
        packed = {key.removeprefix(name + "."): tensors.pop(key) for key in keys}
        own = method.for_linear(name)
        dense = nn.Linear(shape[1], shape[0], bias=False, device="meta")
        check_linears({name: QuantLinear.from_packed(own, dense, packed)})
        try:
            linears[name] = form.linear(own, packed, shape)
        except LLQError as error:
            raise LLQError(f"{name} does not fit {form.name}: {error}") from None
    return linears


def _tensors_of(form: Format, name: str, linear: Exported) -> dict[str, Tensor]:
    try:
        return form.tensors(linear)
    except LLQError as error:
        raise LLQError(f"{name} does not fit {form.name}: {error}") from None


def _to_dtype(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floats in `dtype`; LLQError where one overflows there."""
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    for name, tensor in cast.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise LLQError(f"{name} does not fit {dtype}; give another dtype")
    return cast


def _linear_bytes(folder: Path, names: Iterable[str]) -> int:
    """Bytes of the quantized linears in the files, biases left out."""
    known, total = set(names), 0
    for file in folder.glob("*.safetensors"):
        for name, spec in header(file).items():
            module, _, key = name.rpartition(".")
            total += spec.nbytes if module in known and key != "bias" else 0
    return total


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
