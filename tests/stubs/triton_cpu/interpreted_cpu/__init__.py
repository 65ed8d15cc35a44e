"""A Triton backend by the name of "cpu" that compiles nothing.

vLLM's CPU build takes Triton only where a backend of that name is installed. With this
folder on PYTHONPATH and TRITON_INTERPRET=1 its Triton kernels run interpreted.
"""
