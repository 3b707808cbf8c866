"""The CUDA kernels, compiled by g++ and run thread by thread on the CPU; see
emulator.h.
"""
