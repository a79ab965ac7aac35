"""What bytes are for: the categories of a plan's memory, in the order in which they are shown."""

from __future__ import annotations

PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer state"
ACTIVATIONS, LOSS = "activations", "logits and loss"
GATHERED, COMMUNICATION = "gathered parameters", "communication buffers"
DATA, UPDATE, SLACK = "data", "optimizer step", "allocator, runtime (assumed)"
ROLES = (PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOSS, GATHERED, COMMUNICATION, DATA, UPDATE, SLACK)
