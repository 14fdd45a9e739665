"""Device code: Triton kernels as a package, CUDA sources as data; nothing here imports the rest of spkfast."""
