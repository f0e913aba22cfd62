"""Kernels in Triton: updates of every parameter of one dtype in a single launch, after a small preparation, and the
differentiable steps of one tensor."""
