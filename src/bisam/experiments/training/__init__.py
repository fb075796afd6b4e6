"""Training: one run.

train.py            the loop over the epochs, its checkpoint and its result
epoch.py            one pass over a split, to train on it or to predict it
optimizers.py       the base optimizer, its schedule, and the descent loss
fsdp.py             a model whose parameters are divided among devices
counting.py         gradients and forward passes that a method takes
reference_speed.py  plain training beside the run, as the unit of its time
metrics.py          accuracy and other scores
loggers.py          TensorBoard, Weights & Biases, MLflow
"""
