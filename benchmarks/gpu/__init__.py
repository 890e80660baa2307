"""Measurements on one GPU, each against a peer in turn: ``python -m benchmarks.gpu``.

__main__.py                         the command: starts the worker, again if it dies, and shows what came of it
worker.py                           one measurement after the other, until the time is up
plan.py, results.py                 what is measured, most wanted first; the file it is written to
clock.py, precision.py              time and memory of a call; bfloat16, tf32 and float32
machine.py                          the machine, and what it does at best
attention.py, layer.py, networks.py the parts: cases, what is called, how it is checked
targets.py, tables.py, plot.py      what should be reached; how the results are shown
"""
