"""One command-line option per field of any method, made from the methods themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ..method import field_defaults, field_types
from ..methods import METHODS


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
        help_text = f"default {shown}; {'all methods' if len(defaults) == len(METHODS) else ', '.join(defaults)}"
        names = [f"--{field.replace('_', '-')}"]
        if types[field] is bool:
            names = [f"{names[0]}/--no-{field.replace('_', '-')}"]
        option = typer.Option(
            *names, help=help_text, rich_help_panel="Options of the method", show_default=False
        )
        parameters.append(
            inspect.Parameter(
                field,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[types[field] | None, option],
            )
        )
    return parameters


def with_method_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option per method field; it receives those that were set as the dict
    `options`.
    """

    def wrapper(**kwargs: Any) -> None:
        names = {parameter.name for parameter in _method_options()}
        options = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        given = {name: value for name, value in options.items() if value is not None}
        whole = {
            n: int(v) for n, v in given.items() if isinstance(v, float) and v.is_integer()
        }  # floats take ints too
        command(**kwargs, options={**given, **whole})

    own = [
        p
        for p in inspect.signature(command, eval_str=True).parameters.values()
        if p.name != "options"
    ]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    wrapper.__signature__ = inspect.Signature([*own, *_method_options()])  # type: ignore[attr-defined]
    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    return wrapper
