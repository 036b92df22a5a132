"""What the speed benchmarks share.

given.py: the models and texts. engines.py: one training step of ours and of ST. processes.py: one row from a process of
its own. report.py: rows, verdicts and the command line.

Two engines are compared: ours, and sentence-transformers ("ST"), tuned by its own options. Both load the same random
weights, start from the same strings, train the biases alone and take the same AdamW step; nothing runs around the bare
loop, so a trainer's overhead is on neither side. CPU seconds are those of the process, all its threads. Memory is the
peak of the resident size over what the process held before its first batch, when model, libraries and optimizer had
been used once.
"""
