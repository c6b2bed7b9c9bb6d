"""What to run: a plan is a mapping (YAML, flags, or a table of the study) that expands to cells.

    title: two methods at two widths
    models: [demo]
    tasks: [llq_demo]
    presets: [study, best]                       # of the methods; default: study
    seeds: [0]                                   # of the calibration draws
    methods:                                     # every value may be a list: all combinations are cells
      - {method: gptq, bits: [3, 2], group_size: [64, 128]}
      - {method: quip, bits: [3, 2]}
      - {method: nf4, bits: 4, finetune: {data: alpaca}}     # LoRA on the packed model: fields of adapters.train.Recipe
    calibration: {source: wikitext2, samples: 128, seqlen: 2048}
    baseline: true                               # full precision too
    metadata: {text_file: wiki.txt}              # of the tasks
    limit, num_fewshot, dtype, revision          # as in lm-eval

`method: all` stands for every method, `bits: all` for every width of the method. A combination that
a method does not have is a cell all the same: it is refused when it runs, and the report says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from ..checkpoints.fingerprint import fingerprint
from ..common.errors import LLQError
from ..common.words import nearest
from ..data.calibration import CalibrationOptions
from ..methods import METHODS, build

DENSE = "none"  # the method that leaves the model as it is
EVERY = "all"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One line of a study. All that decides its figures, except the machine."""

    model: str
    method: str
    tasks: tuple[str, ...]
    preset: str = "study"
    options: Mapping[str, Any] = field(default_factory=dict)  # of the method, over the preset
    finetune: Mapping[str, Any] = field(
        default_factory=dict
    )  # data, and fields of adapters.train.Recipe; {}: not
    calibration: Mapping[str, Any] = field(
        default_factory=dict
    )  # source, samples, seqlen; else the model's default
    seed: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    num_fewshot: int | None = None
    dtype: str = "auto"
    revision: str | None = None

    @property
    def config(self) -> dict[str, Any]:
        """Every option of the method; those given, where there is no such method or it refuses
        them.
        """
        if self.method == DENSE:
            return {}
        try:
            return build(self.method, self.preset, **self.options).to_dict()
        except LLQError:
            return {"preset": self.preset, **self.options}

    @property
    def fingerprint(self) -> str:
        """16 hex digits; equal for cells that differ in words only, as bits=4 and the default of 4.

        Fields at their defaults do not count: a new one leaves the cells of older studies what they
        were.
        """
        given = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) != _default(f)
        }
        return fingerprint(
            {**given, "options": self.config, "preset": None, "tasks": list(self.tasks)}
        )

    @property
    def name(self) -> str:
        """For people and file names, unique: demo-gptq-3-1f00dbabe1f00dba."""
        words = [
            Path(self.model).name,
            self.method,
            *([str(self.options["bits"])] if "bits" in self.options else []),
        ]
        return "-".join([*words, self.fingerprint])

    @property
    def title(self) -> str:
        """For people: gptq bits=3 group_size=64 (best)."""
        if self.method == DENSE:
            return "full precision"
        words = [f"{key}={value}" for key, value in self.options.items()]
        words += [f"+ LoRA on {self.finetune.get('data')}"] if self.finetune else []
        words += ["connections"] if self.finetune.get("connections") else []
        return " ".join([self.method, *words]) + (
            "" if self.preset == "study" else f" ({self.preset})"
        )


def _default(each: Field[Any]) -> Any:
    factory = each.default_factory
    return each.default if factory is MISSING else factory()


def defaults() -> dict[str, Any]:
    """What the fields of a cell are that a record written before there was such a field does not
    name.
    """
    return {each.name: _default(each) for each in fields(Cell)}


_SHARED = (
    "calibration",
    "metadata",
    "limit",
    "num_fewshot",
    "dtype",
    "revision",
)  # of a plan, the same in all cells
KEYS = ("title", "models", "tasks", "presets", "seeds", "methods", "baseline", *_SHARED)


def expand(plans: Iterable[Mapping[str, Any]]) -> list[Cell]:
    """The cells of plans, each once, in their order. LLQError for a plan that makes no sense as
    such.
    """
    cells: dict[str, Cell] = {}
    for plan in plans:
        for cell in _expand(plan):
            cells.setdefault(cell.fingerprint, cell)
    return list(cells.values())


def _expand(plan: Mapping[str, Any]) -> Iterator[Cell]:
    _check(plan)
    shared = {key: plan[key] for key in _SHARED if plan.get(key) is not None}
    methods = [combination for entry in plan["methods"] for combination in _combinations(entry)]
    if plan.get("baseline", True):
        methods.insert(0, {"method": DENSE})
    for model in plan["models"]:
        for options, preset, seed in product(
            methods, _list(plan, "presets", "study"), _list(plan, "seeds", 0)
        ):
            yield Cell(
                model=model,
                method=options["method"],
                tasks=tasks_for(model, plan["tasks"]),
                preset="study" if options["method"] == DENSE else preset,
                options=own_options(options),
                finetune=finetune_for(model, options.get("finetune", {})),
                seed=seed,
                **shared,
            )


def own_options(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry of a plan's methods says to the method itself."""
    return {key: value for key, value in entry.items() if key not in ("method", "finetune")}


@cache
def stand_ins() -> dict[str, Any]:
    """Bundled model -> {"task", "figures"}: see the file."""
    found: dict[str, Any] = yaml.safe_load(
        Path(__file__).with_name("stand_ins.yaml").read_text(encoding="utf-8")
    )
    return found


def tasks_for(model: str, tasks: Iterable[str]) -> tuple[str, ...]:
    """The tasks that a model's cells run for the tasks of a plan."""
    return (stand_ins()[model]["task"],) if model in stand_ins() else tuple(tasks)


def finetune_for(model: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """How a model is fine-tuned where a plan asks for that."""
    return {**asked, **(stand_ins().get(model, {}).get("finetune", {}) if asked else {})}


def figure_for(model: str, figure: str) -> str | None:
    """Where in a model's record that figure stands, which is at `figure` in the records of others;
    None: nowhere.
    """
    if model not in stand_ins() or not figure.startswith("results."):
        return figure
    found: str | None = stand_ins()[model]["figures"].get(figure.rpartition(".")[2])
    return found


def load_plan(path: Path) -> dict[str, Any]:
    """A plan from a YAML file."""
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LLQError(
            f"{path} cannot be read ({error.strerror}); give a YAML file, or flags"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LLQError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(plan, dict):
        raise LLQError(f"{path} holds no mapping; a plan has the keys {', '.join(KEYS)}")
    return plan


def _check(plan: Mapping[str, Any]) -> None:
    for key in plan:
        if key not in KEYS:
            raise LLQError(
                f"a plan has no key {key!r}{nearest(str(key), KEYS)}; it has: {', '.join(KEYS)}"
            )
    for key in ("models", "tasks", "methods"):
        if not isinstance(plan.get(key), list) or not plan[key]:
            raise LLQError(f"a plan needs a list of {key}, this one has {plan.get(key)!r}")
    for entry in plan["methods"]:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("method"), str):
            raise LLQError(f"{entry!r} names no method; write {{method: NAME, bits: [4, 3], ...}}")
    for entry in plan["methods"]:
        if not isinstance(entry.get("finetune", {}), Mapping):
            raise LLQError(
                f"finetune: {entry['finetune']!r} should be a mapping, as {{data: alpaca, max_steps: 10000}}"
            )
    for key in ("calibration", "metadata"):
        if not isinstance(plan.get(key) or {}, Mapping):
            raise LLQError(f"{key}: {plan[key]!r} of a plan should be a mapping")
    calibration = plan.get("calibration") or {}
    known = [each.name for each in fields(CalibrationOptions) if each.name != "seed"]  # see `seeds`
    for key in calibration:
        if key not in known:
            raise LLQError(
                f"the calibration of a plan has no {key!r}{nearest(str(key), known)}; it has:"
                f" {', '.join(known)} (and the plan itself has seeds)"
            )
    CalibrationOptions(**calibration)  # raises for a value that no cell could use


def _list(plan: Mapping[str, Any], key: str, default: Any) -> Sequence[Any]:
    value = plan.get(key, default)
    return value if isinstance(value, list) else [value]


def _combinations(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{method: gptq, bits: [3, 2]} -> one mapping per width; `all` written out."""
    names = list(METHODS) if entry["method"] == EVERY else [entry["method"]]
    found = []
    for name in names:
        options = {**entry, "method": name}
        if options.get("bits") == EVERY:
            options["bits"] = list(METHODS[name].bits_range) if name in METHODS else [EVERY]
        values = [value if isinstance(value, list) else [value] for value in options.values()]
        found += [dict(zip(options, chosen, strict=True)) for chosen in product(*values)]
    return found
