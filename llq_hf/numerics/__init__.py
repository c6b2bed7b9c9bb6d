"""The mathematics that methods share: number grids, statistics, factorizations, solvers, rotations."""
