"""One config to many runs: their names and settings, the cohorts they train in, all their stages.

Expansion imports configs alone and loads no JAX; `run_sweep` starts stages.
"""
