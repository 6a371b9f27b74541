"""The kernels on CuPy arrays.

kernels.cu   the kernels, in CUDA C++           plan.py      shape and device -> launches
kernels.py   the functions of bncpu.cpu's kernels, on CuPy arrays: puts launches together

Importing this package imports nothing; bncpu.backends imports kernels.py, and so CuPy, when the
first array of a GPU comes.
"""
