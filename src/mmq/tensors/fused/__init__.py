"""Kernels in Triton, a file each: what torch does in several passes over a GPU's memory, in one.

Each has a plain form in torch in `int4`, `experts` or `fp8`, which says what it computes and computes it wherever
`dispatch` takes another way. Tests run these kernels in Triton's interpreter and hold them to the plain forms.
"""
