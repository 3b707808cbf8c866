"""One definition, every backend: trace a formula, differentiate it, print it as C++ and Triton."""
