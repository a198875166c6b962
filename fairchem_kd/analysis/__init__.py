"""What distillation did: errors, the gap closed, throughput; with tables and plots.

    checkpoint -> models.read_model, load_model
    model, split -> evaluation.evaluate -> Evaluation: stock metrics, errors by system
    Evaluations of student, distilled student, teacher -> gap.measure_gap -> Gap, with intervals
    any number of runs -> compare.compare -> Comparison -> report: tables, JSON, plots

``fairchem-kd compare`` is these functions on the command line.
"""
