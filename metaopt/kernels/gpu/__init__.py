"""Multi-tensor kernels in Triton: every parameter of one dtype in a single launch, after a small preparation."""
