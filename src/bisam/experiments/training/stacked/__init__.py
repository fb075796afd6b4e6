"""Stacked: several seeds of one recipe, trained at once as one batched model.

A small network leaves most of the time of a step to the calls of operations. In a stack each operation is called once
for all seeds: parameters have a leading dimension of seeds, and the optimizer takes one step for all of them. The
methods are those of the library; they query an oracle whose vectors have one norm for each seed.

network.py   the networks of a stack, and their forward pass
oracle.py    the oracle of a stack and its vectors
checks.py    which recipes can be stacked
train.py     the training of a stack, from its folders to its results

Each seed has its own data, initial weights, order of batches, running statistics, best epoch and result. The arithmetic
of a seed differs from that of a run of its own by the order of sums within products of matrices and norms alone.
"""
