"""The decoder in C for x86-64 CPUs with AVX2: a whole forward step in one call."""
