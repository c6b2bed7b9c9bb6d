"""Mathematics that the methods share: grids, statistics, factorizations, solvers, rotations."""
