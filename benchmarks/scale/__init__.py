"""Training on ImageNet on 1 to 1,024 GPUs, A MODEL, NOT A MEASUREMENT: ``python -m benchmarks.scale``.

model.py            machines as published, what is assumed, the time of a step
runs.py             runs of 130 epochs made of such steps, beside published ones
tables.py, plot.py  how docs/scale.md shows them
"""
