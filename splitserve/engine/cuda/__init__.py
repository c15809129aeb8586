"""The engine for GPUs: steps are laid out once, launched as CUDA graphs, and read one behind."""
