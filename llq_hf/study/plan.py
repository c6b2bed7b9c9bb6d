"""Plans: what a study runs. A plan is a mapping that expands to cells.

It comes from a YAML file, from the flags of `llq study`, or from a table of the study:

    title: two methods at two widths
    models: [demo]
    tasks: [llq_demo]
    presets: [study, best]        # of the methods; default: study
    seeds: [0]                    # of the calibration draws
    methods:                      # every value may be a list: each combination is a cell
      - {method: gptq, bits: [3, 2], group_size: [64, 128]}
      - {method: quip, bits: [3, 2], label: "QuIP, {bits} bits"}
      - {method: rtn, bits: 4, preset: best, calibration: {samples: 64}}
      - {method: nf4, bits: 4, finetune: {data: alpaca}}    # LoRA on the packed model
    calibration: {source: wikitext2, samples: 128, seqlen: 2048}
    divergence: {text: wikitext2, windows: 16}    # also measure KL from full precision
    baseline: true                # full precision too
    metadata: {text_file: wiki.txt}               # of the tasks
    limit, num_fewshot, dtype, revision           # as in lm-eval

`method: all` stands for every method, `bits: all` for every width of the method. Keys of an entry
that are no options of its method:

key         | what
label       | name of the cell's line in the report; {bits} and other options are filled in
preset      | in place of the plan's `presets`
calibration | over the plan's `calibration`
finetune    | `data`, and fields of `finetune.trainer.Recipe`

A combination that a method does not have is a cell all the same: it is refused when it runs, and
the report says why.
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
from ..common.markup import file_name
from ..common.words import nearest
from ..data.calibration import CalibrationOptions
from ..methods import METHODS, build
from .divergence import DivergenceOptions

DENSE = "none"  # the method that leaves the model as it is
EVERY = "all"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One line of a study. All that decides its figures, except the machine."""

    model: str
    method: str
    tasks: tuple[str, ...]
    preset: str = "study"
    # Options of the method, over those of the preset.
    options: Mapping[str, Any] = field(default_factory=dict)
    # `data`, and fields of finetune.trainer.Recipe; empty: no fine-tuning.
    finetune: Mapping[str, Any] = field(default_factory=dict)
    # Source, samples, seqlen; what is left out is the model's default.
    calibration: Mapping[str, Any] = field(default_factory=dict)
    # Fields of DivergenceOptions; empty: not measured.
    divergence: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    num_fewshot: int | None = None
    dtype: str = "auto"
    revision: str | None = None
    label: str | None = None  # for people; decides nothing

    @property
    def config(self) -> dict[str, Any]:
        """Every option of the method, defaults included.

        Only those given, where there is no such method or where it refuses them.
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

        Fields at their defaults do not count, so that a new field leaves the fingerprints of older
        studies as they were.
        """
        given = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name != "label" and getattr(self, each.name) != _default(each)
        }
        return fingerprint(
            {**given, "options": self.config, "preset": None, "tasks": list(self.tasks)}
        )

    @property
    def name(self) -> str:
        """Unique, for file names: demo-gptq-3-1f00dbabe1f00dba."""
        words = [Path(self.model).name, self.method]
        if "bits" in self.options:
            words.append(str(self.options["bits"]))
        # Of a file's name, file systems take 255 bytes.
        return "-".join([*(file_name(word)[:60] for word in words), self.fingerprint])

    @property
    def title(self) -> str:
        """For people: "gptq bits=3 group_size=64 (best)", or the label in place of the options."""
        remarks = [self.preset] if self.preset != "study" else []
        remarks += [f"seed {self.seed}"] if self.seed else []
        if self.calibration:
            remarks.append(
                f"calibration {' '.join(map(str, _calibration_words(self.calibration)))}"
            )
        return (self.label or self._option_words()) + (
            f" ({', '.join(remarks)})" if remarks else ""
        )

    def _option_words(self) -> str:
        if self.method == DENSE:
            return "full precision"
        words = [f"{key}={value}" for key, value in self.options.items()]
        if self.finetune:
            words.append(f"+ LoRA on {self.finetune.get('data')}")
        if self.finetune.get("connections"):
            words.append("connections")
        return " ".join([self.method, *words])


def _calibration_words(calibration: Mapping[str, Any]) -> Iterator[str]:
    """Words about the calibration: a file by its name only."""
    for key, value in calibration.items():
        yield Path(value).name if key == "source" else f"{key}={value}"


def _default(each: Field[Any]) -> Any:
    factory = each.default_factory
    return each.default if factory is MISSING else factory()


def defaults() -> dict[str, Any]:
    """Values of the cell's fields that records do not name which are older than the field."""
    return {each.name: _default(each) for each in fields(Cell)}


# Keys of a plan that are the same in all of its cells.
_SHARED = ("metadata", "limit", "num_fewshot", "dtype", "revision")
KEYS = (
    "title",
    "models",
    "tasks",
    "presets",
    "seeds",
    "methods",
    "baseline",
    "calibration",
    "divergence",
    *_SHARED,
)
# Keys of an entry of `methods` that are no options of the method.
ENTRY_KEYS = ("method", "label", "preset", "calibration", "finetune")


def expand(plans: Iterable[Mapping[str, Any]]) -> list[Cell]:
    """The cells of plans in their order, each once. LLQError for a plan that makes no sense."""
    cells: dict[str, Cell] = {}
    for plan in plans:
        for cell in _expand(plan):
            cells.setdefault(cell.fingerprint, cell)
    return list(cells.values())


def _expand(plan: Mapping[str, Any]) -> Iterator[Cell]:
    _check(plan)
    entries = [combination for entry in plan["methods"] for combination in _combinations(entry)]
    if plan.get("baseline", True):
        entries.insert(0, {"method": DENSE})
    for model in plan["models"]:
        for entry in entries:
            presets = [entry["preset"]] if "preset" in entry else _list(plan, "presets", "study")
            for preset, seed in product(presets, _list(plan, "seeds", 0)):
                yield _cell(plan, model, entry, preset, seed)


def _cell(
    plan: Mapping[str, Any], model: str, entry: Mapping[str, Any], preset: str, seed: int
) -> Cell:
    dense = entry["method"] == DENSE
    options = own_options(entry)
    shared = {key: plan[key] for key in _SHARED if plan.get(key) is not None}
    return Cell(
        model=model,
        method=entry["method"],
        tasks=tasks_for(model, plan["tasks"]),
        preset="study" if dense else preset,
        options=options,
        finetune=finetune_for(model, entry.get("finetune", {})),
        calibration={**(plan.get("calibration") or {}), **entry.get("calibration", {})},
        divergence={} if dense else divergence_for(model, plan.get("divergence")),
        seed=seed,
        label=_fill_in(entry["label"], {**options, "preset": preset}) if "label" in entry else None,
        **shared,
    )


def own_options(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the method itself in an entry of a plan's `methods`."""
    return {key: value for key, value in entry.items() if key not in ENTRY_KEYS}


def _fill_in(label: str, options: Mapping[str, Any]) -> str:
    try:
        return label.format_map(options)
    except (KeyError, IndexError, ValueError) as error:
        raise LLQError(
            f"label {label!r} asks for {error}, which its entry does not give; "
            f"it gives: {', '.join(options)}"
        ) from error


# --- bundled models -------------------------------------------------------------------------------


@cache
def stand_ins() -> dict[str, Any]:
    """Bundled model -> {"task", "figures", ...}: what its cells run instead; see the file."""
    text = Path(__file__).with_name("stand_ins.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def tasks_for(model: str, tasks: Iterable[str]) -> tuple[str, ...]:
    """The tasks that a model's cells run for the tasks of a plan."""
    return (stand_ins()[model]["task"],) if model in stand_ins() else tuple(tasks)


def finetune_for(model: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """How a model is fine-tuned where a plan asks for that.

    A bundled model has a recipe of its own. It goes over what the plan says, unless the plan names
    the model's own data: then it was written for this model.
    """
    own = stand_ins().get(model, {}).get("finetune", {}) if asked else {}
    if asked.get("data") == own.get("data"):
        return {**own, **asked}
    return {**asked, **own}


def divergence_for(model: str, asked: Mapping[str, Any] | None) -> dict[str, Any]:
    """On which text a model's divergence is measured where a plan asks for that."""
    if asked is None:
        return {}
    given = DivergenceOptions(**asked).to_dict()
    return {**given, **stand_ins().get(model, {}).get("divergence", {})}


def figure_for(model: str, figure: str) -> str | None:
    """Where a figure stands in a model's record that stands at `figure` in the records of others.

    None: nowhere.
    """
    if model not in stand_ins() or not figure.startswith("results."):
        return figure
    place: str | None = stand_ins()[model]["figures"].get(figure.rpartition(".")[2])
    return place


# --- reading --------------------------------------------------------------------------------------


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
    for key in ("calibration", "divergence", "metadata"):
        _check_mapping(key, plan.get(key) or {})
    _check_calibration(plan.get("calibration") or {})
    for key in set(plan.get("divergence") or {}) - set(DivergenceOptions.names()):
        raise LLQError(
            f"the divergence of a plan has no {key!r}; it has: "
            f"{', '.join(DivergenceOptions.names())}"
        )
    for entry in plan["methods"]:
        _check_entry(entry)


def _check_entry(entry: Any) -> None:
    names = _list(entry, "method", []) if isinstance(entry, Mapping) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise LLQError(f"{entry!r} names no method; write {{method: NAME, bits: [4, 3], ...}}")
    _check_mapping("finetune", entry.get("finetune", {}))
    if not isinstance(entry.get("label", ""), str):
        raise LLQError(f"label: {entry['label']!r} should be one text")
    for calibration in _list(entry, "calibration", {}):
        _check_mapping("calibration", calibration)
        _check_calibration(calibration)


def _check_mapping(key: str, value: Any) -> None:
    example = "{data: alpaca, max_steps: 10000}" if key == "finetune" else "{key: value}"
    if not isinstance(value, Mapping):
        raise LLQError(f"{key}: {value!r} of a plan should be a mapping, as {example}")


def _check_calibration(calibration: Mapping[str, Any]) -> None:
    known = [each.name for each in fields(CalibrationOptions) if each.name != "seed"]  # see `seeds`
    for key in calibration:
        if key not in known:
            raise LLQError(
                f"the calibration of a plan has no {key!r}{nearest(str(key), known)}; it has:"
                f" {', '.join(known)} (and the plan itself has seeds)"
            )
    CalibrationOptions(**calibration)  # raises for a value that no cell could use


def _list(mapping: Mapping[str, Any], key: str, default: Any) -> Sequence[Any]:
    value = mapping.get(key, default)
    return value if isinstance(value, list) else [value]


def _combinations(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{method: gptq, bits: [3, 2]} -> one mapping per width; `all` written out."""
    names = list(METHODS) if entry["method"] == EVERY else _list(entry, "method", [])
    combinations = []
    for name in names:
        options = {**entry, "method": name}
        if options.get("bits") == EVERY:
            options["bits"] = list(METHODS[name].bits_range) if name in METHODS else [EVERY]
        values = [value if isinstance(value, list) else [value] for value in options.values()]
        combinations += [dict(zip(options, chosen, strict=True)) for chosen in product(*values)]
    return combinations
