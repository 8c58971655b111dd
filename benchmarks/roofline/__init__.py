"""Reading of compiled kernels, and estimates of their time on a GPU, without a GPU.

The launches of an operator are recorded, each kernel is compiled ahead of time for a GPU, and its
code is read and, where addresses and branches are concerned, executed. A model turns the counts
into an ESTIMATE of the time. Nothing here is measured. See :mod:`benchmarks.roofline.model`.
"""
