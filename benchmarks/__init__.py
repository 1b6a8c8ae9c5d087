"""How fast and how exact the operators are, beside what trainers run today: ``python -m benchmarks --help``.

- cases.py: what is measured; data.py: the inputs, and what float64 makes of them.
- contenders/: who is compared, one file per package. Functions of packages come from their pinned wheels' own source.
- harness.py: agreement with float64 first, then interleaved rounds, with a warm and with a cold cache; device.py: clocks and flushes.
- accuracy.py: errors against float64, ours beside verl's; goals.py: what the project wants of itself.
- report.py, plots.py: tables, JSON, CSV, PNG.
"""
