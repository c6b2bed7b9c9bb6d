"""Command-line options made from dataclasses: those of every method, and those of the calibration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

from ..data.calibration import CalibrationOptions
from ..method import field_defaults, field_types
from ..methods import METHODS

Command = Callable[..., None]


def with_method_options(command: Command) -> Command:
    """Give a command an option per method field; it receives those that were set as the dict
    `options`.
    """

    def gather(given: dict[str, Any]) -> dict[str, Any]:
        """An option that takes a float in one method takes an int in another."""
        return {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in given.items()
        }

    return _with_options(command, "options", _method_options(), gather)


def with_calibration_options(command: Command) -> Command:
    """Give a command the options of the calibration; it receives them as `calibration`, a
    CalibrationOptions.
    """
    return _with_options(
        command,
        "calibration",
        _calibration_options(),
        lambda given: CalibrationOptions.split(given)[0],
    )


def _with_options(
    command: Command,
    name: str,
    parameters: Sequence[inspect.Parameter],
    gather: Callable[[dict[str, Any]], Any],
) -> Command:
    """Replace the parameter `name` of a command by options; it receives what `gather` makes of
    those that were set.
    """

    def wrapper(**kwargs: Any) -> None:
        values = {each.name: kwargs.pop(each.name) for each in parameters}
        given = {key: value for key, value in values.items() if value is not None}
        command(**kwargs, **{name: gather(given)})

    own = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for each in inspect.signature(command, eval_str=True).parameters.values()
        if each.name != name
    ]
    wrapper.__signature__ = inspect.Signature([*own, *parameters])  # type: ignore[attr-defined]
    wrapper.__name__ = command.__name__
    wrapper.__doc__ = command.__doc__
    return wrapper


def _method_options() -> list[inspect.Parameter]:
    """One command-line option per field of any method; the help says which methods have it, with
    which default.
    """
    owners: dict[str, dict[str, Any]] = {}
    types: dict[str, type] = {}
    for name, method in METHODS.items():
        for field, kind in field_types(method).items():
            types[field] = float if {kind, types.get(field, kind)} == {int, float} else kind
        for field, default in field_defaults(method).items():
            owners.setdefault(field, {})[name] = default
    parameters = []
    for field, defaults in owners.items():
        values = set(map(str, defaults.values()))
        shown = (
            values.pop() if len(values) == 1 else ", ".join(f"{n} {v}" for n, v in defaults.items())
        )
        whose = "all methods" if len(defaults) == len(METHODS) else ", ".join(defaults)
        parameters.append(
            _option(field, types[field], f"default {shown}; {whose}", "Options of the method")
        )
    return parameters


def _calibration_options() -> list[inspect.Parameter]:
    """One command-line option per field of CalibrationOptions."""
    types = get_type_hints(CalibrationOptions)
    return [
        _option(
            name,
            types[field.name],
            f"{field.metadata['help']} Default: {field.metadata['default']}.",
            "Calibration",
        )
        for name, field in zip(
            CalibrationOptions.option_names(), fields(CalibrationOptions), strict=True
        )
    ]


def _option(name: str, kind: Any, text: str, panel: str) -> inspect.Parameter:
    """An option that is None where it is not given. `text` says its default."""
    flag = f"--{name.replace('_', '-')}"
    flags = f"{flag}/--no-{name.replace('_', '-')}" if kind is bool else flag
    option = typer.Option(flags, help=text, rich_help_panel=panel, show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )
