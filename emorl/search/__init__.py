"""Search: propose candidates, evaluate them to a vector of scores, record them in an Optuna study.

| proposer | what it does |
|---|---|
| simplex_refinement | pattern search on the simplex of weights: d (d - 1) points a poll (the default) |
| hierarchical_grid | EMORL's grid that halves its box at each level, 3^d points |
| tpe, gp, cma_es | Optuna's tree-structured Parzen estimator, Gaussian process, CMA-ES on the scalarised value |
| nsga2 | Optuna's NSGA-II on the vector of scores |
| qmc, random | Sobol points, random points: baselines |
"""
