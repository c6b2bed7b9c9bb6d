"""The folder of packed weights that a run writes: which tensor goes where, and in which order.

model.safetensors   all tensors, or shards of at most 5 GB with an index (see `shards`): packed
                    linears, and the base's own bytes of everything else
llq_report.json     per linear: bits, errors, what the method noted
llq_hashes.json     sha256 of every tensor and file, and a copy of config.json
tokenizer files, licence, ...   copied from the base (see `carried`)
config.json         last: without it nothing loads, so half a run never passes for a whole one
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..common.errors import LLQError
from ..common.files import read_json, write_json
from ..common.spec import Spec
from ..demo import MODELS, SMOLLM2
from ..layers.linear import QuantLinear
from ..method import Method
from ..models.decoder import block_linears, replace_module
from .carried import copy_small_files
from .dense import Checkpoint, Rewritten, fetch
from .fingerprint import fingerprint
from .format import CONFIG, REPORT, PackedConfig
from .hashes import Hashes
from .records import Bits, LinearRecord, Report
from .shards import Shards, names_by_block

# Folder, its whole config, bytes of its tensors -> JSON for the report.
Speak = Callable[[Path, dict[str, Any], int], dict[str, Any]]


@dataclass(frozen=True)
class PackedFolder:
    """What `path` will hold once every block of `base` is quantized by `method`.

    prefixes: module names of the blocks. linears: [O, I] of every linear that is quantized, by
    full module name.
    """

    path: Path
    base: Checkpoint
    prefixes: list[str]
    method: Method
    linears: Mapping[str, tuple[int, int]]

    @cached_property
    def shards(self) -> Shards:
        """The files, as planned from the layouts alone."""
        units = [self._specs(names) for names in self._base_names]
        return Shards(self.path, units)

    @cached_property
    def _base_names(self) -> list[list[str]]:
        """The base's tensors outside the blocks, then those of each block."""
        return list(names_by_block(self.base.files, self.prefixes))

    @cached_property
    def _layouts(self) -> dict[str, dict[str, Spec]]:
        """Of every quantized linear, by the name of its dense weight."""
        return {
            f"{name}.weight": self.method.for_linear(name).layout(*shape)
            for name, shape in self.linears.items()
        }

    def _specs(self, base_names: list[str]) -> dict[str, Spec]:
        """What is stored for these tensors of the base, under the names in its files."""
        specs: dict[str, Spec] = {}
        for name in base_names:
            module = name.removesuffix("weight")
            layout = self._layouts.get(name)
            if layout is None:
                specs[name] = self.base.specs[name]
            else:
                specs |= {module + key: spec for key, spec in layout.items()}
        return {self.base.in_file(name): spec for name, spec in specs.items()}

    def open(self) -> dict[str, str]:
        """Make the files, or take up an interrupted run's, and write all outside the blocks; sha256
        of each of these tensors, by the name in the file.
        """
        self.shards.open()
        return self._write((name, self.base.read([name])[name]) for name in self._base_names[0])

    def save_block(self, index: int, block: nn.Module) -> dict[str, str]:
        """Write a quantized block; sha256 of each of its tensors, by the name in the file.

        Packed tensors come from its QuantLinears, everything else from the base, bit for bit.
        """
        prefix, tensors = self.prefixes[index], {}
        for name, module in block.named_modules():
            if isinstance(module, QuantLinear):
                packed = module.packed()
                tensors.update({f"{prefix}.{name}.{key}": t.cpu() for key, t in packed.items()})
        kept = [name for name in self._base_names[index + 1] if name not in self._layouts]
        return self._write({**tensors, **self.base.read(kept)}.items())

    def _write(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
        """Under the names that the base's files have."""
        return self.shards.write((self.base.in_file(name), tensor) for name, tensor in tensors)

    def tuned(self, index: int, tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the tuned tensors that lie in a block, by the name in the file."""
        known = self.shards.units[index + 1]
        found = {self.base.in_file(name): tensor for name, tensor in tuned.items()}
        return {name: tensor for name, tensor in found.items() if name in known}

    def packed(self, linears: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """The stored tensors of linears (full names) of finished blocks."""
        names = {
            linear: {
                key: self.base.in_file(f"{linear}.{key}")
                for key in self._layouts[linear + ".weight"]
            }
            for linear in linears
        }
        tensors = self.shards.read(name for own in names.values() for name in own.values())
        return {
            linear: {key: tensors[name] for key, name in own.items()}
            for linear, own in names.items()
        }

    def restore_block(self, index: int, block: nn.Module) -> None:
        """Put the packed linears of a finished block into a freshly loaded block."""
        prefix, device = self.prefixes[index], next(block.parameters()).device
        linears = block_linears(block)
        stored = self.packed(f"{prefix}.{name}" for name in linears)
        for name, linear in linears.items():
            full = f"{prefix}.{name}"
            packed = {key: tensor.to(device) for key, tensor in stored[full].items()}
            quantized = QuantLinear.from_packed(self.method.for_linear(full), linear, packed)
            replace_module(block, name, quantized)

    def finish(
        self,
        linears: list[LinearRecord],
        identity: dict[str, Any],
        made_from: dict[str, Any],
        digests: Sequence[Mapping[str, str]],
        speak: Speak | None = None,
    ) -> Report:
        """Name the files, write report, small files, hashes, and config.json as the last. The
        report.

        made_from: by what names base and calibration went, which decides no byte of the tensors
        (see `provenance`). digests: those that `open` and then `save_block` gave. speak: tries the
        files, all but report and config.json, for the report.
        """
        self.shards.finish()
        small = copy_small_files(self.base.path, self.path)
        run = fingerprint(identity)
        config = PackedConfig(self.method, len(linears), identity["calibration"], run)
        whole = {**self.base.config, "quantization_config": config.to_section()}
        report: Report = {
            "fingerprint": run,
            "identity": identity,
            "made_from": made_from,
            "linears": linears,
            "bits": self._bits(linears),
        }
        if isinstance(self.base, Rewritten):
            report["rewrite"] = dict(self.base.rewrite.notes)
        if speak is not None:
            report["first_words"] = speak(self.path, whole, self.shards.nbytes)
        write_json(self.path / REPORT, dict(report))
        Hashes.of(self.path, whole, [*small, REPORT], digests).write(self.path)
        write_json(self.path / CONFIG, whole)
        return report

    def _bits(self, linears: list[LinearRecord]) -> Bits:
        """Nominal bits, stored bits per quantized weight, and bits per parameter of the model."""
        weights = sum(r["shape"][0] * r["shape"][1] for r in linears)
        stored = sum(r["stored_bits"] * r["shape"][0] * r["shape"][1] for r in linears)
        total_bytes = self.shards.nbytes
        return {
            "nominal": self.method.nominal_bits,
            "stored": stored / weights,
            "whole_model": total_bytes * 8 / self.base.parameters,
            "bytes": total_bytes,
        }


def read_report(folder: Path) -> Report:
    """LLQError where there is none, or where it is not what a run writes."""
    report: Any = read_json(folder / REPORT)
    linears = report.get("linears")
    sound = (
        isinstance(linears, list)
        and all(_is_record(record) for record in linears)
        and isinstance(report.get("bits"), dict)
        and isinstance(report.get("made_from", {}), dict)
    )
    if not sound:
        raise LLQError(f"{folder / REPORT} is damaged: it is not what a run writes")
    found: Report = report
    return found


def named_base(folder: Path) -> Path | None:
    """The folder of the full-precision model that the report of a packed checkpoint names; None
    where it names none that can be found again. A Hub model is downloaded.
    """
    made_from = read_report(folder).get("made_from", {}) if (folder / REPORT).is_file() else {}
    model, revision = made_from.get("model"), made_from.get("revision")
    if not isinstance(model, str) or (revision is None and model not in (*MODELS, SMOLLM2)):
        return None  # the name of a folder, whose place the report does not keep
    return fetch(model, revision)


def _is_record(record: Any) -> bool:
    """Whether this is the record of a linear: with its name and the two sizes of its weight."""
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        return False
    shape: Any = record.get("shape")
    if not isinstance(shape, list) or len(shape) != 2:
        return False
    return all(isinstance(size, int) and size > 0 for size in shape)


def finished_fingerprint(folder: Path) -> str | None:
    """Fingerprint of the run that finished `folder`; None where no run did."""
    if not (folder / CONFIG).is_file():
        return None
    section = read_json(folder / CONFIG).get("quantization_config")
    run = section.get("fingerprint") if isinstance(section, dict) else None
    return run if isinstance(run, str) else None
