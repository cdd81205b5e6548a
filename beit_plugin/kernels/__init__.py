"""Triton kernels. Import only where Triton is wanted: its compiler looks for a GPU."""
