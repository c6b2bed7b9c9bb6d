"""The study as a product: a plan of cells, run to records, drawn as a report.

    llq study plan.yaml --out runs
    llq study --preset paper-table1 --models demo --out runs
    llq report runs

plan     what to run: a plan expands to cells (model, method, preset, options, tasks, seed)
record   one JSON file per cell, written when it is done, failed or refused: the only thing a report reads
cell     runs one cell: quantize (cached), evaluate, measure
engine   runs many: in a process of their own on this machine, or as tasks of a Ray cluster
paper    the study's tables as data: published figures, and the cells that make them again
report   tables and plots of a folder of records, every figure with the file it stands in

Records are data: figures under `results` and `quantized` are the same wherever a cell runs, what
differs from run to run (seconds, memory, the machine) is under `cost` and `run`.
"""
