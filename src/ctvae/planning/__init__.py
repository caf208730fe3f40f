"""What a run will cost, counted on tensors that have shapes but no memory: ledger, kernels' workspace, dry runs."""
