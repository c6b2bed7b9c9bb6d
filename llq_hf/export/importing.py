"""Makes a packed checkpoint of one that another library quantized, with the same codes.

No weight is rounded again. Everything is checked by headers and config before a tensor is read;
then the small tensors (zero points, groups) of all linears are read, because they decide how codes
are stored; then the files are read and written block by block. The folder appears when it is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoints.as_model import problems_of, with_own_heads
from ..checkpoints.carried import carried
from ..checkpoints.dense import Checkpoint, fetch, provenance, read_config
from ..checkpoints.fingerprint import fingerprint
from ..checkpoints.format import FORMAT_VERSION, PREFIX
from ..checkpoints.packed import PackedFolder
from ..checkpoints.records import LinearRecord, Report
from ..common.errors import LLQError
from ..common.files import read_json
from ..common.progress import Progress
from ..common.spec import Spec
from ..layers.linear import QuantLinear, check_linears
from ..method import ForeignCodes, Method, stored_bits
from ..methods import adopting
from ..models.decoder import block_prefixes, check_covered, quantizable, replace_module
from ..models.load import build_skeleton, module_names
from ..numerics.grids import Affine
from .convert import whole_or_nothing
from .foreign import CURE, Layout, layout_of, problems_with

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHOWN = 8  # problems in one error


def take_in(
    model: str, out: Path, revision: str | None = None, progress: Progress | None = None
) -> Report:
    """Write the checkpoint `model` (folder or Hub id) of another library to the new folder `out`,
    packed by llq; the report.

    LLQError, with the reason and the cure, for what has no equal here; nothing is left then.
    """
    progress = progress or Progress()
    if out.exists():
        raise LLQError(f"{out} exists; give a folder that does not")
    try:
        source = Source.open(model, revision)
        codes = source.codes(progress)
        try:
            method = adopting(codes)
        except LLQError as error:
            raise LLQError(f"{model} cannot be converted: {error}; {CURE}") from None
        source = source.with_own_heads(method)
        with whole_or_nothing(out) as draft:
            return _write(source, method, codes.sym, draft, progress)
    finally:
        progress.close()


@dataclass(frozen=True)
class Source:
    """The checkpoint of another library.

    files: as they are. dense: the same as if its linears were dense, by the model's names, which is
    what a packed folder is made from. modules: name of each quantized linear in the model -> in the
    files. section: its `quantization_config`.
    """

    files: Checkpoint
    dense: Checkpoint
    skeleton: PreTrainedModel
    layout: Layout
    modules: Mapping[str, str]
    section: Mapping[str, Any]

    @classmethod
    def open(cls, model: str, revision: str | None = None) -> Source:
        """Read config and headers. LLQError where they describe nothing that can be read."""
        path = fetch(model, revision)
        section = _section(path)
        try:
            layout = layout_of(section)
        except LLQError as error:
            raise LLQError(f"{model} cannot be converted: {error}") from None
        files = Checkpoint.open(str(path))
        carried(path)  # refuses a link that leads out of the folder
        skeleton = build_skeleton(path)
        check_covered(skeleton)
        modules = _modules(files, skeleton, layout)
        problems = _problems(files, skeleton, layout, modules)
        if problems:
            more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
            raise LLQError(
                f"{model} cannot be converted: {'; '.join(problems[:SHOWN])}{more}; {CURE}"
            )
        dense = _as_dense(files, skeleton, layout, modules)
        return cls(files, dense, skeleton, layout, modules, section)

    def with_own_heads(self, method: Method) -> Source:
        """The same, checked against the model that it is to become. LLQError where a tensor is
        missing, or a linear is too small for `method`.
        """
        dense = with_own_heads(self.dense, self.skeleton)
        problems = problems_of(dense, self.skeleton, method)
        if problems:
            raise LLQError(f"{self.files.path} cannot be converted: {'; '.join(problems[:SHOWN])}")
        return replace(self, dense=dense)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """[O, I] of every quantized linear, by its name in the model."""
        linears = quantizable(self.skeleton)
        return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}

    def codes(self, progress: Progress) -> ForeignCodes:
        """What the codes of all linears have in common, by their small tensors."""
        progress.stage("reading zero points and groups", len(self.modules))
        sym, in_order, dtypes = True, True, set()
        for name, (rows, columns) in self.shapes.items():
            stored = self.read(name, leave_out=self.layout.codes)
            groups_I = self._groups(name, stored, columns)
            in_order = in_order and bool((groups_I.diff() >= 0).all())
            zero_OG = self.layout.zero_OG(stored, rows, columns)
            sym = sym and bool((zero_OG == 2 ** (self.layout.bits - 1)).all())
            dtypes.add(stored[self.layout.scales].dtype)
            progress.advance()
        return ForeignCodes(
            self.layout.name,
            self.layout.bits,
            self.layout.group_size,
            sym,
            in_order,
            16 if dtypes == {torch.float16} else 32,
        )

    def _groups(self, name: str, stored: Mapping[str, Tensor], columns: int) -> Tensor:
        try:
            return self.layout.groups_I(stored, columns)
        except LLQError as error:
            raise LLQError(f"{self.modules[name]}: {error}") from None

    def read(self, name: str, leave_out: str | None = None) -> dict[str, Tensor]:
        """The tensors of a linear, by name inside its module, without its bias."""
        module = self.modules[name]
        known = self.layout.tensors(*self.shapes[name])
        keys = [key for key in known if f"{module}.{key}" in self.files.files and key != leave_out]
        tensors = self.files.read(f"{module}.{key}" for key in keys)
        return {key: tensors[f"{module}.{key}"] for key in keys}

    def affine(self, name: str, sym: bool) -> Affine:
        """A linear as codes on uniform grids."""
        rows, columns = self.shapes[name]
        stored = self.read(name)
        return Affine(
            self.layout.bits,
            self.layout.codes_OI(stored, rows, columns),
            self.layout.scale_OG(stored).float().contiguous(),
            self.layout.zero_OG(stored, rows, columns).contiguous(),
            self._groups(name, stored, columns),
            sym,
        )


def _section(path: Path) -> dict[str, Any]:
    """The `quantization_config`, also from the file in which AutoGPTQ once kept it. LLQError where
    there is none, or one of ours.
    """
    section: dict[str, Any] | None = read_config(path).get("quantization_config")
    older = path / "quantize_config.json"
    if section is None and older.is_file():
        section = {"quant_method": "gptq", **read_json(older)}
    if section is None:
        raise LLQError(f"{path} is not quantized: `llq quantize` packs full-precision models")
    if str(section.get("quant_method", "")).startswith(PREFIX):
        raise LLQError(f"{path} is a checkpoint of llq already; `llq export` writes other formats")
    return section


def _modules(files: Checkpoint, skeleton: PreTrainedModel, layout: Layout) -> dict[str, str]:
    """Name in the model -> in the files, of each module whose codes the files hold."""
    suffix = f".{layout.codes}"
    stored = [name.removesuffix(suffix) for name in files.files if name.endswith(suffix)]
    names = module_names(skeleton, [f"{module}.weight" for module in stored])
    return {
        name.removesuffix(".weight"): weight.removesuffix(".weight")
        for name, weight in names.items()
    }


def _problems(
    files: Checkpoint, skeleton: PreTrainedModel, layout: Layout, modules: Mapping[str, str]
) -> list[str]:
    """Phrases about linears that cannot be taken over, by headers only."""
    linears = quantizable(skeleton)
    problems = [
        f"{name} is not quantized in it, and llq packs every linear of the decoder's blocks"
        for name in linears
        if name not in modules
    ]
    problems += [
        f"{name} is quantized in it, and llq packs linears of the decoder's blocks only"
        for name in modules
        if name not in linears
    ]
    own = _by_module(files)
    for name, linear in linears.items():
        specs = own.get(modules.get(name, ""), {})
        if name in modules:
            shape = (linear.out_features, linear.in_features)
            problems += [f"{name}: {each}" for each in problems_with(specs, layout, shape)]
    return problems


def _by_module(files: Checkpoint) -> dict[str, dict[str, Spec]]:
    """Shapes and dtypes by module, then by name inside it."""
    modules: dict[str, dict[str, Spec]] = {}
    for name, spec in files.specs.items():
        module, _, key = name.rpartition(".")
        modules.setdefault(module, {})[key] = spec
    return modules


def _as_dense(
    files: Checkpoint, skeleton: PreTrainedModel, layout: Layout, modules: Mapping[str, str]
) -> Checkpoint:
    """The checkpoint as if each quantized linear were one dense weight, by the model's names."""
    state, inside = skeleton.state_dict(), set(modules.values())
    kept = [
        name
        for name in files.files
        if name.rpartition(".")[0] not in inside or name.endswith(".bias")
    ]
    named = module_names(skeleton, kept)
    for name, stored in list(named.items()):
        if name not in state and stored.rpartition(".")[0] in inside:
            _check_idle(files, stored)
            del named[name]
    specs = {name: files.specs[stored] for name, stored in named.items()}
    paths = {name: files.files[stored] for name, stored in named.items()}
    for name, module in modules.items():
        weight = f"{name}.weight"
        specs[weight] = Spec(tuple(state[weight].shape), torch.float16)
        paths[weight] = files.files[f"{module}.{layout.codes}"]
        named[weight] = f"{module}.weight"
    config = {key: value for key, value in files.config.items() if key != "quantization_config"}
    return Checkpoint(files.path, paths, specs, config, stored=named)


def _check_idle(files: Checkpoint, bias: str) -> None:
    """LLQError for a bias that the model does not have, unless it is of zeros: old AutoGPTQ wrote
    one for every linear.
    """
    if files.read([bias])[bias].any():
        raise LLQError(
            f"{files.path} holds {bias}, which the model of its config does not have: the "
            "config.json is that of another model"
        )


def _write(source: Source, method: Method, sym: bool, draft: Path, progress: Progress) -> Report:
    """Write the packed folder, a block at a time."""
    progress.stage("hashing the checkpoint", len(source.files.files))
    sha256, bad = source.files.scan(lambda done, total: progress.advance())
    if bad:
        raise LLQError(f"{bad[0]} of {source.files.path} holds NaN or infinity: fetch it again")
    prefixes = block_prefixes(source.skeleton)
    folder = PackedFolder(draft, source.dense, prefixes, method, source.shapes)
    digests, records = [folder.open()], []
    progress.blocks(0, len(prefixes))
    for index, prefix in enumerate(prefixes):
        linears = dict(_linears(source, method, sym, prefix))
        check_linears(linears)
        records += [_record(name, linear) for name, linear in linears.items()]
        with _in_place(source.skeleton, linears):
            digests.append(folder.save_block(index, source.skeleton.get_submodule(prefix)))
        progress.blocks(index + 1, len(prefixes))
    return folder.finish(records, _identity(source, method, sha256), _made_from(source), digests)


def _linears(
    source: Source, method: Method, sym: bool, prefix: str
) -> Iterator[tuple[str, QuantLinear]]:
    """The packed linears of a block, by full name."""
    for name, (rows, columns) in source.shapes.items():
        if not name.startswith(f"{prefix}."):
            continue
        try:
            packed = method.adopt(source.affine(name, sym))
        except LLQError as error:
            raise LLQError(f"{source.modules[name]} cannot be converted: {error}; {CURE}") from None
        dense = nn.Linear(columns, rows, bias=False, device="meta")
        yield name, QuantLinear.from_packed(method, dense, packed)


@contextmanager
def _in_place(model: nn.Module, linears: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the context these linears stand in the model, in place of its own."""
    own = {name: model.get_submodule(name) for name in linears}
    for name, linear in linears.items():
        replace_module(model, name, linear)
    try:
        yield
    finally:
        for name, linear in own.items():
            replace_module(model, name, linear)


def _record(name: str, linear: QuantLinear) -> LinearRecord:
    """Without an error: the weight that was quantized is not known."""
    shape = [linear.out_features, linear.in_features]
    return {"name": name, "shape": shape, "stored_bits": stored_bits(linear.layout, *shape)}


def _identity(source: Source, method: Method, sha256: str) -> dict[str, Any]:
    """Everything that decides the bytes of the result."""
    return {
        "format_version": FORMAT_VERSION,
        "converted_sha256": sha256,
        "converted_section": fingerprint(dict(source.section)),
        "method": method.name,
        "config": method.to_dict(),
        "calibration": None,
    }


def _made_from(source: Source) -> dict[str, Any]:
    """Where it comes from. `revision` is that of a full-precision base, which is not known."""
    found = provenance(source.files.path)
    converted = {
        "format": source.layout.name,
        "revision": found["revision"],
        "section": dict(source.section),
    }
    return {**found, "revision": None, "calibration": None, "converted": converted}
