"""The kernel laboratory: what can be proved about a Triton kernel without a GPU. Import its modules one by one."""
