"""The kernels of BERT's kind in C (`encoder.c`), for CPUs with AVX2: how they are built, loaded, and given a model."""
