"""``fairchem-kd demo``: the same student with and without its teacher, trained and compared.

configs, seeds -> plan (what to train, for how long) -> children (side by side, with progress)
-> fairchem_kd.analysis.compare.comparison -> a table, results.json, plots
"""
