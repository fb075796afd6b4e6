"""Distributed: parameters and batches that are shared by ranks (DistributedDataParallel, FSDP2, tensor parallelism)."""
