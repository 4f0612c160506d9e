"""SPO in trainers of others.

`core` has the parts of an SPO step for any training loop: sampling, the buffer of samples, the loss of a micro-batch.
`head` lets a model compute a loss inside its ``forward``. `trl` is a trainer for TRL; it needs the extra ``[trl]``.
Nothing here is imported by ``import spo_kernels``.
"""
