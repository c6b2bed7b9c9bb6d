"""Sweeps: a plan expands to cells, each cell leaves a record, records become a report.

    llq study plan.yaml --out runs
    llq study --preset paper-table1 --models demo --out runs
    llq report runs

file        | what it does
plan        | expands a plan to cells: model, method, preset, options, tasks, seed
cell        | runs one cell: quantize (or take it from the cache), evaluate, measure
evaluate    | calls lm-eval and lmms-eval for a cell's tasks
divergence  | KL divergence of a packed model from the full-precision one
cost        | bytes, prefill and decode speed beside the full-precision model; also `llq bench`
launch      | runs many cells: in a process on this machine, or as tasks of a Ray cluster
watch       | progress bars of a sweep
record      | one JSON file per cell: all that a report reads
paper/      | the study's tables as data: published figures, and the cells that make them again
tables      | a report's tables
plots       | a report's plots
report      | writes tables and plots as HTML, Markdown, CSV, LaTeX, SVG

Figures under `results` and `quantized` of a record are the same wherever a cell runs. What differs
from run to run (seconds, memory, the machine) is under `cost` and `run`.
"""
