"""Measurements, each against a peer in the same process: ``python -m benchmarks.run``, on a CPU or a GPU.

problems.py, peers.py, attention_peers.py        the shapes; what sasa is measured against
attention.py, layer.py, networks.py, ceiling.py  the parts: cases, what is called, how it is checked
cases.py, registry.py                            what a case and a part are; all parts in order
clock.py, verify.py                              time and memory of calls on a device; whether results are right
run.py, worker.py, results.py, machine.py        the command; the process that measures; the files; the machine
targets.py, tables.py, plots.py, readme.py       what should be reached; how the results are shown
detection.py                                     memory of a detector's training step
limits.py                                        what bounds the GPU's kernels, counted without a GPU
scale.py                                         a model, nothing measured: training on many GPUs
start.py, fine_tune/                             how converted networks start, and how a trained one is fine-tuned
"""
