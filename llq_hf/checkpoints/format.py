"""The `quantization_config` section of a packed checkpoint, and the digest that guards it."""

from __future__ import annotations

from typing import Any

from ..method import FORMAT_VERSION, Method
from .fingerprint import fingerprint

CONFIG, REPORT = "config.json", "llq_report.json"


def config_section(
    method: Method, linears: int | None, calibration: dict[str, Any] | None, run: str | None
) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint. `digest` guards the options: edited ones are
    refused on loading.
    """
    return {
        "quant_method": f"llq_{method.name}",
        **method.to_dict(),
        "format_version": FORMAT_VERSION,
        "quantized_linears": linears,
        "digest": digest(method, linears),
        "calibration": calibration,
        "fingerprint": run,
    }


def digest(method: Method, linears: int | None) -> str:
    return fingerprint(
        {"method": method.name, **method.to_dict(), "linears": linears, "format": FORMAT_VERSION}
    )
