"""The folder of packed weights that a run writes: which tensor goes where, written whole or not at
all.

model-00001-of-N.safetensors   everything outside the decoder blocks, bitwise as in the base (or as rewritten)
model-0000k-of-N.safetensors   one decoder block each, written when it is done
llq_report.json                per linear: bits, errors, what the method noted (the same bytes however often killed)
index, tokenizer, config.json  last: without config.json nothing loads, so half a run never passes for a whole one
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..common.files import commit_draft, read_json, save_tensors, write_draft, write_json
from ..layers.linear import QuantLinear
from ..method import Method
from ..models.decoder import block_linears, replace_module
from .dense import INDEX, Checkpoint, Rewritten, header
from .fingerprint import fingerprint
from .format import CONFIG, REPORT, config_section

# Small files of the base that go along unchanged.
CARRIED = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "USE_POLICY*")


@dataclass(frozen=True)
class PackedFolder:
    """What `path` will hold once every block of `base` (module names `prefixes`) is quantized by
    `method`.
    """

    path: Path
    base: Checkpoint
    prefixes: list[str]
    method: Method

    def file(self, block: int | None) -> Path:
        """File of a block, or (None) of everything outside the blocks."""
        number = 1 if block is None else block + 2
        return self.path / f"model-{number:05d}-of-{len(self.prefixes) + 1:05d}.safetensors"

    def base_names(self, block: int | None) -> list[str]:
        """The base's tensors that belong to a block, or (None) to none."""
        if block is not None:
            return [
                name
                for name in sorted(self.base.files)
                if name.startswith(self.prefixes[block] + ".")
            ]
        inside = tuple(prefix + "." for prefix in self.prefixes)
        return [name for name in sorted(self.base.files) if not name.startswith(inside)]

    def save_rest(self) -> None:
        self._save(self.base.read(self.base_names(None)), self.file(None))

    def save_block(self, index: int, block: nn.Module) -> Path:
        """Write packed tensors of the block's quantized linears, and the base's own bytes of
        everything else in it.
        """
        prefix, tensors, replaced = self.prefixes[index], {}, set()
        for name, module in block.named_modules():
            if isinstance(module, QuantLinear):
                replaced.add(f"{prefix}.{name}.weight")
                tensors.update(
                    {f"{prefix}.{name}.{key}": t.cpu() for key, t in module.packed().items()}
                )
        tensors.update(
            self.base.read(name for name in self.base_names(index) if name not in replaced)
        )
        self._save(tensors, self.file(index))
        return self.file(index)

    def _save(self, tensors: dict[str, Tensor], path: Path) -> None:
        """Under the names that the base's files have."""
        save_tensors({self.base.in_file(name): tensor for name, tensor in tensors.items()}, path)

    def tune_block(
        self, index: int, tuned: dict[str, Tensor], before: Callable[[Path], None]
    ) -> None:
        """Put tuned tensors into the file of a finished block; `before` is called with the draft of
        the new file.
        """
        tensors = load_file(self.file(index))
        found = {self.base.in_file(name): tensor for name, tensor in tuned.items()}
        tensors |= {name: found[name] for name in tensors if name in found}
        draft = write_draft(tensors, self.file(index))
        before(draft)
        commit_draft(draft, self.file(index))

    def packed(self, index: int, linear: str) -> dict[str, Tensor]:
        """The stored tensors of a linear (full name) of a finished block."""
        prefix = self.base.in_file(f"{linear}.weight").removesuffix("weight")
        with safe_open(self.file(index), framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
            tensors = {name.removeprefix(prefix): file.get_tensor(name).clone() for name in names}
        return {key: tensor for key, tensor in tensors.items() if key != "bias"}

    def restore_block(self, index: int, block: nn.Module) -> None:
        """Put the packed linears of a finished block's file into a freshly loaded block."""
        prefix, device = self.prefixes[index], next(block.parameters()).device
        for name, linear in block_linears(block).items():
            method = self.method.for_linear(f"{prefix}.{name}")
            packed = {
                key: tensor.to(device)
                for key, tensor in self.packed(index, f"{prefix}.{name}").items()
            }
            replace_module(block, name, QuantLinear.from_packed(method, linear, packed))

    def finish(
        self, linears: list[dict[str, Any]], identity: dict[str, Any], made_from: dict[str, Any]
    ) -> dict[str, Any]:
        """Report, index, small files, and config.json as the last. Returns the report.

        made_from: by what names base and calibration went, which decides no byte of the tensors
        (see `origin`).
        """
        total_bytes = self.save_index()
        report: dict[str, Any] = {
            "fingerprint": fingerprint(identity),
            "identity": identity,
            "made_from": made_from,
            "linears": linears,
            "bits": self._bits(linears, total_bytes),
        }
        if isinstance(self.base, Rewritten):
            report["rewrite"] = dict(self.base.rewrite.notes)
        write_json(self.path / REPORT, report)
        copy_small_files(self.base.path, self.path)
        section = config_section(
            self.method, len(linears), identity["calibration"], report["fingerprint"]
        )
        write_json(self.path / CONFIG, {**self.base.config, "quantization_config": section})
        return report

    def save_index(self) -> int:
        """Write the index of all files; bytes of all tensors."""
        weight_map: dict[str, str] = {}
        total_bytes = 0
        for file in (self.file(None), *(self.file(i) for i in range(len(self.prefixes)))):
            for name, spec in header(file).items():
                weight_map[name] = file.name
                total_bytes += spec.nbytes
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(self.path / INDEX, index)
        return total_bytes

    def _bits(self, linears: list[dict[str, Any]], total_bytes: int) -> dict[str, float]:
        """Nominal bits, stored bits per quantized weight, and bits per parameter of the whole
        model.
        """
        weights = sum(record["shape"][0] * record["shape"][1] for record in linears)
        stored = sum(
            record["stored_bits"] * record["shape"][0] * record["shape"][1] for record in linears
        )
        return {
            "nominal": self.method.nominal_bits,
            "stored": stored / weights,
            "whole_model": total_bytes * 8 / self.base.parameters,
            "bytes": total_bytes,
        }


def copy_small_files(base: Path, out: Path) -> None:
    """Copy the base's small files: tokenizer, generation defaults, licence."""
    for pattern in CARRIED:
        for file in base.glob(pattern):
            if file.name not in (CONFIG, INDEX, REPORT) and file.is_file():
                shutil.copyfile(file, out / file.name)


def read_report(folder: Path) -> dict[str, Any]:
    return read_json(folder / REPORT)


def finished_fingerprint(folder: Path) -> str | None:
    """Fingerprint of the run that finished `folder`; None where no run did."""
    if not (folder / CONFIG).is_file():
        return None
    section: dict[str, Any] = read_json(folder / CONFIG).get("quantization_config", {})
    return section.get("fingerprint")
