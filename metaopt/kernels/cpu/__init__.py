"""The same updates on a CPU: one pass over memory, compiled by numba."""
