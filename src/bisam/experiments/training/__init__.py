"""Training: one run of a recipe, from start to result.

Read train.py for the course of a run and epoch.py for the training loop; the other files are their parts:

train.py            one run: build its parts, train the epochs, write checkpoints, test, return the result
epoch.py            one epoch: forward, loss, backward, clip, optimizer step, schedule; and predictions on a split
state.py            the state of a run, gathered for a checkpoint and restored from it
checks.py           whether recipe, data, model and devices fit together
devices.py          one process for each device
hidden.py           what frozen layers of text models return, computed once
fsdp.py             models that are sharded with FSDP2
optimizers.py       base optimizer, learning rate schedule, descent loss
trained.py          the model of a finished run, with its weights
weight_average.py   exponential moving average of the weights
batch_norm.py       running statistics of averaged weights
counting.py         gradients and forward passes that a method asks for
metrics.py          accuracy and other scores; sums over the batches of an epoch
measured.py         what a run measures of its weights after some epochs: ball.py, or ascents.py
reference_speed.py  plain training steps beside the run, the unit of its relative time
stacked/            several seeds of a recipe at once, as one batched model
journal.py          the lines of log.txt
step_metrics.py     loss, learning rate and speed within an epoch
loggers.py          TensorBoard, Weights & Biases, MLflow

The file of a checkpoint is in `runs/checkpoint.py`, the recipe in `recipes/recipe.py`.
"""
