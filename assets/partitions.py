"""The one partitions definition: an SAE is a partition. Not here: which SAEs there are (the sensor and bootstrap say)."""

import dagster as dg

SAES_NAME = "saes"
SAES = dg.DynamicPartitionsDefinition(name=SAES_NAME)

# SAEs of one run share the subject model's forward pass, so every SAE-partitioned asset carries this same policy.
# How many is a bound on what one run may lose; how many fit into memory together is planned when it starts.
SHARED_RUNS = dg.BackfillPolicy.multi_run(max_partitions_per_run=16)

OWNERS = ["team:scope-atlas"]
