"""Distributed: parameters and batches that several ranks share (DistributedDataParallel, FSDP2, tensor parallelism)."""
