"""What the Triton kernels share: building blocks, tile choices, launching. Imports Triton."""
