"""Sweeps: many runs out of one YAML, on this machine or through SLURM, and their table.

    sweep YAML -> points (spec, sampling) -> configs (keys) -> manifest and one config file per run
               -> workers of this machine, or SLURM arrays -> records -> table and plot (collect)

`fairchem --sweep-yml` reads the same YAML, and takes its points alone.
"""
