"""The `quantization_config` section of a packed checkpoint: the only place that knows its keys.

README.md in this folder describes the whole format.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from ..common.errors import LLQError
from ..method import Method
from ..methods import method_type
from .fingerprint import fingerprint

FORMAT_VERSION = 1
CONFIG, REPORT, HASHES = "config.json", "llq_report.json", "llq_hashes.json"
PREFIX = "llq_"
# Keys of the section that are not options of the method.
RUN_KEYS = (
    "quant_method",
    "format_version",
    "quantized_linears",
    "digest",
    "calibration",
    "fingerprint",
)
# Their types, where they are there.
_KINDS: dict[str, tuple[type, str]] = {
    "quantized_linears": (int, "a whole number"),
    "digest": (str, "a text"),
    "calibration": (Mapping, "an object"),
    "fingerprint": (str, "a text"),
}


@dataclass(frozen=True)
class PackedConfig:
    """What a checkpoint says about how its weights are stored.

    quantized_linears: how many linears are packed. calibration: what the calibration data were
    (their sha256, samples, tokens). run: fingerprint of the run, None where a model was quantized
    in memory. stored_digest, format_version, named: as found in a file; `named` are its options. An
    option that it does not name is younger than the file, and its default is what was done before.
    """

    method: Method
    quantized_linears: int | None = None
    calibration: dict[str, Any] | None = None
    run: str | None = None
    stored_digest: str | None = None
    format_version: Any = FORMAT_VERSION
    named: frozenset[str] | None = None

    @staticmethod
    def is_ours(section: Any) -> bool:
        """Whether llq-hf wrote this `quantization_config`."""
        return isinstance(section, Mapping) and str(section.get("quant_method", "")).startswith(
            PREFIX
        )

    @classmethod
    def from_section(cls, section: Mapping[str, Any]) -> Self:
        """The parsed section; LLQError for a method or an option that does not exist."""
        kind = method_type(str(section["quant_method"]).removeprefix(PREFIX))
        options = {key: value for key, value in section.items() if key not in RUN_KEYS}
        return cls.of(kind.build(**options), section, options)

    @classmethod
    def of(cls, method: Method, section: Mapping[str, Any], named: Iterable[str]) -> Self:
        """The same for a method that was built already, from the options `named`."""
        for key, (kind, words) in _KINDS.items():
            value = section.get(key)
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
                raise LLQError(
                    f"{CONFIG}: quantization_config.{key} is {value!r}, which is not {words}"
                )
        return cls(
            method,
            section.get("quantized_linears"),
            section.get("calibration"),
            section.get("fingerprint"),
            section.get("digest"),
            section.get("format_version", FORMAT_VERSION),
            frozenset(named),
        )

    def to_section(self) -> dict[str, Any]:
        """The section, as it stands in config.json."""
        return {
            "quant_method": PREFIX + self.method.name,
            **self.method.to_dict(),
            "format_version": FORMAT_VERSION,
            "quantized_linears": self.quantized_linears,
            "digest": self.digest,
            "calibration": self.calibration,
            "fingerprint": self.run,
        }

    @property
    def digest(self) -> str:
        """16 hex digits of all options. A file whose options were edited has another one."""
        return self._digest(self.method.to_dict())

    def _digest(self, options: Mapping[str, Any]) -> str:
        return fingerprint(
            {
                "method": self.method.name,
                **options,
                "linears": self.quantized_linears,
                "format": FORMAT_VERSION,
            }
        )

    def check(self) -> None:
        """LLQError unless this came with a finished checkpoint and was not edited since."""
        if self.format_version != FORMAT_VERSION:
            raise LLQError(
                f"the checkpoint has format_version {self.format_version}, this llq-hf reads "
                f"{FORMAT_VERSION}: update llq-hf"
            )
        options = self.method.to_dict()
        if self.named is not None:
            options = {key: value for key, value in options.items() if key in self.named}
        if self.quantized_linears is None or self.stored_digest != self._digest(options):
            raise LLQError(
                "the quantization_config in config.json was edited: its options do not match its "
                "digest. The packed weights mean what they meant when they were written; restore "
                "the file"
            )
