"""Measurements, each against a peer in one run: ``python -m benchmarks.run``.

problems.py                       the shapes
peers.py, attention_peers.py      what sasa is measured against
attention.py, layer.py, stages.py, scaling.py     the parts: cases, checks, what is made of the figures
measure.py, processes.py, one.py  one call in one process; processes that take turns
targets.py                        what the library should reach
tables.py, plots.py, readme.py    how the results are shown
gpu/                              the same on one GPU: ``python -m benchmarks.gpu``
scale/                            a model, nothing measured: training on many GPUs, ``python -m benchmarks.scale``
"""
