"""Command-line options that are made from dataclasses (every method, the calibration), and those
that several commands share.
"""

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

RUN = "Run"  # the panel of options that decide how, and not what, is computed
Device = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, cuda:1, ...; `auto` takes a GPU where there is one.", rich_help_panel=RUN
    ),
]


def with_method_options(command: Command) -> Command:
    """Give a command one option per field of any method; it receives those that were set as the
    dict `options`.
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

    signature: list[inspect.Parameter] = []
    for each in inspect.signature(command, eval_str=True).parameters.values():
        keyword = each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        signature += parameters if each.name == name else [keyword]
    wrapper.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    wrapper.__name__ = command.__name__
    wrapper.__doc__ = command.__doc__
    return wrapper


def _method_options() -> list[inspect.Parameter]:
    """One command-line option per field of any method; the help gives defaults and owners."""
    owners: dict[str, dict[str, Any]] = {}
    types: dict[str, type] = {}
    for name, method in METHODS.items():
        for field, kind in field_types(method).items():
            types[field] = float if {kind, types.get(field, kind)} == {int, float} else kind
        for field, default in field_defaults(method).items():
            owners.setdefault(field, {})[name] = default
    return [
        _option(field, types[field], _owners(defaults), "Options of the method")
        for field, defaults in owners.items()
    ]


def _owners(defaults: dict[str, Any]) -> str:
    """ "Default: 4 (rtn, gptq), 8 (smoothquant).", from method -> default."""
    methods: dict[str, list[str]] = {}
    for method, default in defaults.items():
        text = f"{default:g}" if isinstance(default, float) else str(default) or "none"
        methods.setdefault(text, []).append(method)
    shown = "; ".join(f"{default} ({', '.join(names)})" for default, names in methods.items())
    everywhere = "Of all methods. " if len(defaults) == len(METHODS) else ""
    return f"{everywhere}Default: {shown}."


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
